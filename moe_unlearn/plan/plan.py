"""Prediction of what a step will do, and of the work and memory it will take.

The prediction is a rehearsal: two steps of the step's own code run on tensors without storage (`dry_run`), so it
follows whatever the step does. Results that prepare() has not made yet are assumed in their largest shape. The step,
its model and the random state stay unchanged. Not counted are the batches and all memory outside of torch's tensors:
the CUDA context, cuBLAS' workspace, scratch of the C++ kernels.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_unlearn import router_aux, trace
from moe_unlearn.experts import copy_gate, experts_modules
from moe_unlearn.masks import WeightMask
from moe_unlearn.model.batches import Batch, attended_mask, checked, refusal
from moe_unlearn.model.head import head_of
from moe_unlearn.ops.bits import num_words, unpack_bits
from moe_unlearn.plan.dry_run import Rehearsal
from moe_unlearn.plan.ways import Path, form, paths
from moe_unlearn.prepare.rows import RowCache
from moe_unlearn.prepare.stages import Calibration, Preparation, head_to_keep, needed, needs_head, uses_kl

_HIDDEN_BYTES = 2  # cached hidden states are bfloat16
_LOGPROB_BYTES = 4
CACHES = "reference caches"


@dataclass
class Plan:
    """A step's plan; `str(plan)` is the table that the command line prints.

    memory: bytes by component at the moment when their sum, `peak`, is largest. largest: the most bytes of each
    component at any time. flops, bytes: by kernel, the operations of matrix products and the bytes read and written,
    for one micro-batch and its update. paths: the way of each layer's gradients (`ways.Path`). Where the step cannot
    be rehearsed, a note says why, and memory holds what is known without: weights, optimizer state, mask and caches.
    """

    recipe: str
    levers: dict[str, str]
    weights: int  # elements of the model
    trained: int  # elements that may change
    layers: int
    steps: int
    device: str = "cpu"
    shape: str = ""  # the shapes of the batches
    data: str = ""  # rows and epochs, where they are known
    paths: list[Path] = field(default_factory=list)
    flops: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    largest: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Return the predicted bytes at the peak, the sum over all components."""
        return sum(self.memory.values())

    def __str__(self) -> str:
        share = self.trained / max(self.weights, 1)
        return "\n".join([
            f"recipe {self.recipe}: {self.steps} steps, {self.layers} MoE layers, on {self.device}",
            f"batch: {self.shape}",
            *([f"data: {self.data}"] if self.data else []),
            f"trained weights: {self.trained:,} of {self.weights:,} ({share:.1%})",
            *(f"  {name:<10} {text}" for name, text in self.levers.items()),
            *_path_lines(self.paths),
            f"{'one step':<26} {'GFLOP':>12} {'MiB moved':>12}",
            *(f"  {name:<24} {self.flops.get(name, 0) / 1e9:12.3f} {size / 2**20:12.1f}"
              for name, size in sorted(self.bytes.items(), key=lambda item: -item[1])),
            f"  {'total':<24} {sum(self.flops.values()) / 1e9:12.3f} {sum(self.bytes.values()) / 2**20:12.1f}",
            f"{'memory (MiB)':<26} {'at the peak':>12} {'at most':>12}",
            *(f"  {name:<24} {self.memory.get(name, 0) / 2**20:12.2f} {size / 2**20:12.2f}"
              for name, size in self.largest.items()),
            f"  {'peak':<24} {self.peak / 2**20:12.2f}",
            *(f"note: {note}" for note in self.notes),
        ])  # fmt: skip


def make_plan(step, forget: list[Batch], retain: list[Batch]) -> Plan:
    """Make the plan of an `UnlearnStep` in its present state, for the largest batch of each side.

    Without batches, the recipe's batch size, rows and length are assumed. A model on the meta device is planned for
    CUDA where there is a GPU, for the CPU otherwise. Before prepare(), masks are assumed to keep everything, and as
    many experts to be selected as the recipe allows.
    """
    forget, retain = [checked(b, "forget") for b in forget], [checked(b, "retain") for b in retain]
    recipe = step.recipe
    named = list(step.model.named_parameters())
    trained = [(name, p) for name, p in named if p.requires_grad]
    device = _device(named)
    batches = {side: _largest(given, step, device) for side, given in (("forget", forget), ("retain", retain))}
    plan = Plan(
        recipe=recipe.name,
        levers=_levers(step),
        weights=sum(p.numel() for _, p in named),
        trained=sum(_kept(p, step.masks.get(name)) for name, p in trained),
        layers=len(experts_modules(step.model)),
        steps=recipe.steps,
        device=str(device),
        shape=", ".join(f"{side} {' x '.join(map(str, b['input_ids'].shape))}" for side, b in batches.items()),
        data=_data(recipe, forget, retain),
        paths=paths(step),
    )
    if recipe.mollm is not None:
        plan.notes.append(f"MOLLM keeps {2 + recipe.mollm.kl} gradient sets until their Gram matrix is known")
    if recipe.wagle is not None and recipe.wagle.mask is None and step.prepared.mask is None:
        size = 2 * 4 * sum(p.numel() for _, p in trained) / 2**20
        plan.notes.append(f"prepare() makes WAGLE's mask from two float32 gradients, {size:.2f} MiB beside the weights")
    if recipe.scope.kind in ("experts", "seuf") and step.prepared.selected is None:
        plan.notes.append(
            "prepare() chooses the experts that train: trained weights and paths above count all, memory only as many "
            "as it chooses"
        )
    if recipe.optimizer.max_grad_norm is not None:
        plan.notes.append("max_grad_norm needs every gradient before the first update")
    caches = _cache_bytes(step, forget, retain)
    if device.type != "cpu" and caches:
        plan.notes.append(f"reference caches take {caches / 2**20:.2f} MiB on the host")
        caches = 0
    try:
        _rehearse(plan, step, Rehearsal(device), batches, caches)
    except (RuntimeError, TypeError) as error:
        # some wrappers cannot be copied, and torch's fakes do not know some operations
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        plan.notes.append(f"not rehearsed, so activations, gradients and workspace are unknown ({reason})")
        plan.memory = plan.largest = _static(step, named, caches)
    if step.verifier.remaining:
        steps = "every step" if step.verifier.remaining == math.inf else f"{step.verifier.remaining} steps"
        size = step.verifier.memory() / 2**20
        plan.notes.append(
            f"verify runs {steps} beside the plain path, at 5 to 8 times their time and {size:.2f} MiB beside these"
        )
    return plan


def _rehearse(plan: Plan, step, rehearsal: Rehearsal, batches: dict[str, Batch], caches: int) -> None:
    """Run two steps of a shadow of `step` and write their costs into `plan`."""
    ledger = rehearsal.ledger
    shadow = _shadow(step, rehearsal, batches)
    for tensor in (*shadow.model.parameters(), *shadow.model.buffers()):
        ledger.add(tensor, "weights")
    for tensor in _tensors(list(shadow.optimizer.state.values())):
        ledger.add(tensor, "optimizer state")
    ledger.hold(caches, CACHES)
    shadow.optimizer.register_step_pre_hook(lambda *_: ledger.label(shadow.gradients.held(), "gradients"))
    pair, factored = (batches["forget"], batches["retain"]), step.recipe.mollm is not None and form(step) != "compact"
    devices = [] if rehearsal.device.type == "cpu" else [rehearsal.device]
    with torch.random.fork_rng(devices), rehearsal:
        rehearsal.phase = "mask"
        shadow._apply_scope()
        shadow._apply_masks()
        sizes = None if step.micro_batches == 1 else shadow.sizes([pair] * step.micro_batches)
        # the first step creates the optimizer's state, the second one has it from its start
        for _ in range(2):
            # two micro-batches are enough: the second finds gradients, and later ones hold no more; but factors add up
            for _ in range(step.micro_batches if factored else min(step.micro_batches, 2)):
                rehearsal.reset_costs()
                rehearsal.phase = "activations"
                shadow.accumulate(*pair, sizes=sizes, last=step.micro_batches == 1)
                ledger.label(shadow.gradients.held(), "gradients")
            rehearsal.phase = "workspace"
            shadow.update()
            ledger.label(_tensors(list(shadow.optimizer.state.values())), "optimizer state")
    plan.flops = {name: count for name, count in rehearsal.flops.items() if count}
    plan.bytes = dict(rehearsal.moved)
    plan.memory, plan.largest = ledger.peak(), ledger.largest()


def _static(step, named: list[tuple[str, Tensor]], caches: int) -> dict[str, int]:
    """Return the bytes by component that are known without a rehearsal."""
    masks = step.masks.values()
    known = {
        "weights": sum(p.numel() * p.element_size() for _, p in named),
        "optimizer state": sum(step.optimizer.state_size(p, step.masks.get(n)) for n, p in named if p.requires_grad),
        "mask": sum(words.numel() * words.element_size() for words in masks),
        CACHES: caches + sum(kept.nbytes for kept in _reference_head(step) if kept is not None),
    }
    return {name: size for name, size in known.items() if size}


def _shadow(step, rehearsal: Rehearsal, batches: dict[str, Batch]):
    """Return a copy of the step on fakes, prepared for `batches` and without accumulated gradients."""
    assumed = _assumed(step, rehearsal, batches)
    memo = {id(step.prepared): assumed, id(step.masks): {}}
    memo |= {id(mask): mask for group in step.optimizer.param_groups for mask in group["masks"] if mask is not None}
    shadow = rehearsal.twin(step, memo)
    pairs = zip(*(experts_modules(s.model).values() for s in (step, shadow)), strict=True)
    for original, copied in pairs:
        copy_gate(original, copied)
    shadow.objectives.dual.warns = False
    shadow.discard()
    return shadow


def _assumed(step, rehearsal: Rehearsal, batches: dict[str, Batch]) -> Preparation:
    """Return a preparation with what prepare() has made and stand-ins for the rest; caches hold zeros for `batches`."""
    recipe, own = step.recipe, step.prepared
    stages = needed(recipe)
    out = Preparation(
        done=stages, inactive=own.inactive, selected=own.selected, mask=own.mask, calibration=own.calibration,
        kl_floor=own.kl_floor or 0.0,
    )  # fmt: skip
    forget, retain = batches["forget"], batches["retain"]
    modules = experts_modules(step.model)
    hidden = head_of(step.model).weight.shape[1]

    def zeros(batch: Batch, *tail: int, dtype: torch.dtype = torch.float32) -> RowCache:
        cache = RowCache("stand-in")
        cache.put(batch, torch.zeros(*batch["input_ids"].shape, *tail, dtype=dtype))
        return cache

    if out.selected is None and ("trace" in stages or "seuf" in stages):
        selected = torch.zeros(len(modules), max(m.num_experts for m in modules.values()), dtype=torch.bool)
        if "seuf" in stages:
            selected[0, 0] = True
        else:
            selected[:, : recipe.trace.per_layer] = True
        out.selected = selected
    if "trace" in stages and not out.inactive:
        if out.calibration is None:
            tilt = torch.zeros(out.selected.shape)
            out.calibration = Calibration(tilt, 0.0, tilt, 0.0, 1.0)
        if recipe.trace.refresh == "offline":
            out.token_weights = zeros(retain)
    if recipe.forget.objective in ("npo", "idk_dpo"):
        out.ref_logprobs = zeros(forget)
    if recipe.forget.objective == "idk_dpo":
        out.ref_logprobs_idk = zeros(refusal(forget))
    if uses_kl(recipe):
        out.ref_hidden_states = zeros(retain, hidden, dtype=torch.bfloat16)
    if recipe.forget.objective == "undial":
        out.ref_hidden_states_forget = zeros(forget, hidden, dtype=torch.bfloat16)
    out.ref_lm_head, out.ref_bias = (None if kept is None else rehearsal.fake(kept) for kept in _reference_head(step))
    for kept in out.ref_head.values():
        if kept is not None:
            rehearsal.ledger.add(kept, CACHES)
    if recipe.retain.objective == "embed_diff":
        out.ref_layer_states = zeros(retain, hidden, dtype=torch.bfloat16)
    if "wagle" in stages and out.mask is None:
        shapes = {name: tuple(p.shape) for name, p in step.model.named_parameters()}
        packed = {
            name: rehearsal.empty((*s[:-1], num_words(s[-1]) if s else 1), torch.int32) for name, s in shapes.items()
        }
        out.mask = WeightMask(shapes, packed, recipe.wagle.keep)
    if out.mask is not None:
        for words in out.mask.packed.values():
            rehearsal.ledger.add(words, "mask")
    return out


def _tensors(value) -> list[Tensor]:
    """Return the tensors in nested dicts, lists, tuples and plain objects of this package."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif type(value).__module__.startswith("moe_unlearn.") and hasattr(value, "__dict__"):
        value = vars(value).values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for item in value for tensor in _tensors(item)]


def _device(named) -> torch.device:
    device = named[0][1].device
    if device.type != "meta":
        return device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _largest(given: list[Batch], step, device: torch.device) -> Batch:
    if given:
        batch = max(given, key=lambda b: b["input_ids"].numel())
        return {key: value.to(device) for key, value in batch.items()}
    recipe = step.recipe
    ids = torch.ones(recipe.batch_size, recipe.data.max_length, dtype=torch.int64, device=device)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    return batch | {f"idk_{key}": value for key, value in batch.items()}


def _data(recipe, forget: list[Batch], retain: list[Batch]) -> str:
    """Describe the rows of both sides, given or the recipe's, and how many epochs the recipe's steps are."""
    sides = {"forget": (forget, recipe.data.forget_rows), "retain": (retain, recipe.data.retain_rows)}
    rows = {side: sum(len(b["input_ids"]) for b in given) or stated for side, (given, stated) in sides.items()}
    text = ", ".join(f"{count:,} {side} rows" for side, count in rows.items() if count)
    if rows["forget"]:
        visited = recipe.batch_size * recipe.accumulate
        epoch = math.ceil(rows["forget"] / visited)
        text += f"; an epoch is {epoch} steps of {visited}, the run {recipe.steps / epoch:.1f} epochs"
    return text


def _path_lines(paths: list[Path]) -> list[str]:
    """Return one line for each run of consecutive layers that take the same path for the same reason."""
    lines, i = [], 0
    while i < len(paths):
        j = i
        while j < len(paths) and paths[j][1:] == paths[i][1:]:
            j += 1
        layers = paths[i][0] if j == i + 1 else f"{paths[i][0]} ... {paths[j - 1][0]} ({j - i} layers)"
        lines.append(f"  {layers}: {paths[i].way}, {paths[i].trained}; {paths[i].reason}")
        i = j
    return lines


def _levers(step) -> dict[str, str]:
    recipe, prepared = step.recipe, step.prepared
    levers = {"trace": "off", "wagle": "off", "mollm": "off"}
    if recipe.trace is not None:
        levers["trace"] = "experts selected in prepare()"
        if prepared.inactive:
            settings, found = recipe.trace, prepared.frequencies
            why = trace.why_empty(**found, min_ratio=settings.min_ratio, min_load=settings.min_load)
            levers["trace"] = f"TRACE inactive: {why}"
        elif prepared.calibration is not None:
            levers["trace"] = (
                f"{int(prepared.selected.sum())} experts selected, effective retain sample "
                f"{prepared.calibration.ess:.0f} tokens"
            )
    if recipe.wagle is not None:
        levers["wagle"] = f"keep {recipe.wagle.keep:g}, mask made in prepare()"
        if prepared.mask is not None:
            levers["wagle"] = f"kept {prepared.mask.fraction:.4f} of all weights (asked {recipe.wagle.keep:g})"
    if recipe.mollm is not None:
        names = ["forget", "retain", *(["kl"] if recipe.mollm.kl else [])]
        levers["mollm"] = f"common descent of {', '.join(names)} ({recipe.mollm.normalize})"
    if recipe.dual is not None:
        settings, alpha = recipe.dual, step.objectives.dual.value
        levers["dual"] = (
            f"holds the retain loss at {settings.retain_loss_eps:g}, alpha is {alpha:g} and moves by "
            f"{settings.step_size:g} times the excess after {settings.warmup_steps} steps"
        )
    levers["scope"] = recipe.scope.kind
    if balance := router_aux.described(step.model, recipe):
        levers["router_aux"] = balance
    one_pass = "in the backward pass" if not step.obstacle else f"after it: {step.obstacle}"
    levers["update"] = f"{type(step.optimizer).__name__}, {one_pass}"
    return levers


def _kept(parameter: Tensor, words: Tensor | None) -> int:
    if words is None:
        return parameter.numel()
    return int(unpack_bits(words, parameter.shape[-1] if parameter.dim() else 1).sum())


def _reference_head(step) -> tuple[Tensor | None, Tensor | None]:
    """Return weight and bias of the head that the preparation keeps, or will; None where the model's own serves."""
    if "reference" in step.prepared.done:
        return step.prepared.ref_lm_head, step.prepared.ref_bias
    head = head_of(step.model)
    return head_to_keep(head, head) if needs_head(step.recipe) else (None, None)


def _cache_bytes(step, forget: list[Batch], retain: list[Batch]) -> int:
    """Return the bytes of values cached row by row, which lie on the host; the reference's head is on the device."""
    prepared, recipe = step.prepared, step.recipe
    caches = (
        prepared.token_weights,
        prepared.ref_logprobs,
        prepared.ref_logprobs_idk,
        prepared.ref_hidden_states,
        prepared.ref_hidden_states_forget,
        prepared.ref_layer_states,
    )
    if set(needed(recipe)) <= set(prepared.done):
        return sum(cache.nbytes for cache in caches if cache is not None)
    hidden = head_of(step.model).weight.shape[1]

    def tokens(batches: list[Batch], rows: int | None) -> int:
        assumed = (rows or 0) * recipe.data.max_length
        return sum(int(attended_mask(b).sum()) for b in batches) if batches else assumed

    forgotten, retained = tokens(forget, recipe.data.forget_rows), tokens(retain, recipe.data.retain_rows)
    predicted = 0
    if recipe.trace is not None and recipe.trace.refresh == "offline" and not prepared.inactive:
        predicted += retained * _LOGPROB_BYTES
    if recipe.forget.objective in ("npo", "idk_dpo"):
        predicted += forgotten * _LOGPROB_BYTES
    if recipe.forget.objective == "idk_dpo":
        predicted += tokens([refusal(b) for b in forget], recipe.data.forget_rows) * _LOGPROB_BYTES
    if recipe.retain.objective == "embed_diff":
        predicted += retained * hidden * _HIDDEN_BYTES
    if uses_kl(recipe):
        predicted += retained * hidden * _HIDDEN_BYTES
    if recipe.forget.objective == "undial":
        predicted += forgotten * hidden * _HIDDEN_BYTES
    return predicted
