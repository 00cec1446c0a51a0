"""Prediction of what a step will do, and of the work and memory it will take.

The prediction is a rehearsal: two steps of the step's own code run on tensors without storage (`dry_run`), so it
follows whatever the step does. Results that prepare() has not made yet are assumed in their largest shape. The step,
its model and the random state stay unchanged. Not counted are the batches and all memory outside of torch's tensors:
the CUDA context, cuBLAS' workspace, scratch of the C++ kernels.

For a mesh it is the rehearsal of one rank, the one that holds most, and no rank is started; see `one_rank`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_unlearn import router_aux, trace
from moe_unlearn.config import Recipe
from moe_unlearn.experts import experts_modules
from moe_unlearn.model.batches import Batch, Sizes, all_checked
from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.plan.assumed import CACHES, assumed
from moe_unlearn.plan.dry_run import Rehearsal
from moe_unlearn.plan.known import cache_bytes, first_share, held_at_rest, state_bytes
from moe_unlearn.plan.mask import mask_plan
from moe_unlearn.plan.mesh import Mesh, check_whole
from moe_unlearn.plan.one_rank import OneRank
from moe_unlearn.plan.ways import Path, form, obstacle, paths
from moe_unlearn.prepare.stages import Preparation
from moe_unlearn.ranks import Ranks
from moe_unlearn.verify import Verifier
from moe_unlearn.view import StepView


@dataclass
class Plan:
    """A step's plan; `str(plan)` is the table that the command line prints.

    memory: bytes by component at the moment when their sum, `peak`, is largest. largest: the most bytes of each
    component at any time. flops, bytes: by kernel, the operations of matrix products and the bytes read and written,
    for one micro-batch and its update. paths: the way of each layer's gradients (`ways.Path`). mask: as memory, at the
    peak of making WAGLE's mask in prepare(). Where the step cannot be rehearsed, a note says why, and memory holds what
    is known without: weights, optimizer state, mask and caches.

    With a mesh all of these are of one rank, the one that holds most, but for `weights` and `trained`; traffic: the
    bytes that it sends to other ranks in a step, by cause. fits: the GiB that a device has, where that is asked for.
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
    mask: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    mesh: Mesh | None = None
    traffic: dict[str, int] = field(default_factory=dict)
    fits: float | None = None

    @property
    def peak(self) -> int:
        """Return the predicted bytes at the peak, the sum over all components."""
        return sum(self.memory.values())

    def __str__(self) -> str:
        share = self.trained / max(self.weights, 1)
        lines = [
            f"recipe {self.recipe}: {self.steps} steps, {self.layers} MoE layers, on {self.device}",
            *([] if self.mesh is None else [f"mesh: {self.mesh}; below is the rank that holds most"]),
            f"batch: {self.shape}" + ("" if self.mesh is None else ", on each rank"),
            *([f"data: {self.data}"] if self.data else []),
            f"trained weights: {self.trained:,} of {self.weights:,} ({share:.1%})",
            *(f"  {name:<10} {text}" for name, text in self.levers.items()),
            *_path_lines(self.paths),
            f"{'one step':<26} {'GFLOP':>12} {'MiB moved':>12}",
            *(
                f"  {name:<24} {self.flops.get(name, 0) / 1e9:12.3f} {size / 2**20:12.1f}"
                for name, size in sorted(self.bytes.items(), key=lambda item: -item[1])
            ),
            f"  {'total':<24} {sum(self.flops.values()) / 1e9:12.3f} {sum(self.bytes.values()) / 2**20:12.1f}",
            f"{'memory (MiB)':<26} {'at the peak':>12} {'at most':>12}",
            *(
                f"  {name:<24} {self.memory.get(name, 0) / 2**20:12.2f} {size / 2**20:12.2f}"
                for name, size in self.largest.items()
            ),
            f"  {'peak':<24} {self.peak / 2**20:12.2f}",
            *self._sent(),
            *self._fitting(),
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def _sent(self) -> list[str]:
        if self.mesh is None:
            return []
        causes = [*sorted(self.traffic.items(), key=lambda item: -item[1]), ("total", sum(self.traffic.values()))]
        head = f"{'sent in a step (MiB)':<39} {'to others':>12}"
        return [head, *(f"  {name:<37} {size / 2**20:12.2f}" for name, size in causes)]

    def _fitting(self) -> list[str]:
        if self.fits is None:
            return []
        ranks, answer = 1 if self.mesh is None else self.mesh.fsdp, "yes" if self.peak <= self.fits * 2**30 else "no"
        return [f"fits on {ranks} x {self.fits:g} GiB: {answer}, {self.peak / 2**30:.3g} GiB each"]


class Step(Protocol):
    """A step as it is planned: it shows its view, and its shadow is rehearsed."""

    prepared: Preparation
    verifier: Verifier
    ranks: Ranks

    def view(self) -> StepView:
        """Return what the step shows of itself at this moment."""

    def shadow(self, copied: Callable[[Any, dict], Any], prepared: Preparation) -> "Step":
        """Return a copy of the step by `copied`, prepared as given, without accumulated gradients."""

    def apply_preparation(self) -> None:
        """Let exactly those weights train that the scope and what is prepared allow."""

    def sizes(self, pairs: Iterable[tuple[Batch, Batch]]) -> dict[str, int]:
        """Count the units of a step with these (forget, retain) pairs."""

    def accumulate(
        self, forget_batch: Batch, retain_batch: Batch, *, sizes: Sizes | None, last: bool
    ) -> dict[str, float]:
        """Compute losses and gradients of one micro-batch and add the gradients up."""

    def update(self) -> dict[str, float]:
        """Update the weights from the accumulated gradients."""


def make_plan(
    step: Step,
    forget_batches: Iterable[Batch],
    retain_batches: Iterable[Batch],
    *,
    mesh: Mesh | str | None = None,
    fits: float | None = None,
) -> Plan:
    """Make the plan of an `UnlearnStep` in its present state, for the largest batch of each side.

    Without batches, the recipe's batch size, rows and length are assumed. A model on the meta device is planned for
    CUDA where there is a GPU, for the CPU otherwise. Before prepare(), masks are assumed to keep everything, and as
    many experts to be selected as the recipe allows. `mesh`, a `Mesh` or what its `parse` takes, plans for one rank of
    several, which has these batches to itself; `fits` asks whether a device of so many GiB is enough.

    Raises ValueError for a bad batch, for a mesh that the model does not fit, and for a model that is sharded already,
    which says with which `mesh` the model is planned before that.
    """
    mesh = Mesh.parse(mesh) if isinstance(mesh, str) else mesh
    forget, retain = all_checked(forget_batches, "forget"), all_checked(retain_batches, "retain")
    view, prepared = step.view(), step.prepared
    check_whole(view.model)
    if mesh is not None:
        mesh.placings(view.model)  # which refuses a model that does not fit
        view = dataclasses.replace(view, peers=mesh.peers)
    if fits is not None and not fits > 0:
        raise ValueError(f"fits must be above 0 GiB; got {fits:g}")
    recipe, named = view.recipe, list(view.model.named_parameters())
    device = _device(named)
    batches = {side: _largest(given, recipe, device) for side, given in (("forget", forget), ("retain", retain))}
    plan = Plan(
        recipe=recipe.name,
        levers=_levers(view, prepared),
        weights=sum(p.numel() for _, p in named),
        trained=sum(_kept(p, view.masks.get(name)) for name, p in view.trained),
        layers=len(experts_modules(view.model)),
        steps=recipe.steps,
        device=str(device),
        shape=", ".join(f"{side} {' x '.join(map(str, b['input_ids'].shape))}" for side, b in batches.items()),
        data=_data(recipe, forget, retain),
        paths=paths(view),
        mesh=mesh,
        fits=fits,
    )
    if recipe.mollm is not None:
        plan.notes.append(f"MOLLM keeps {2 + recipe.mollm.kl} gradient sets until their Gram matrix is known")
    if recipe.wagle is not None and recipe.wagle.mask is None and prepared.mask is None:
        _plan_mask(plan, view, {"forget": forget, "retain": retain}, batches)
    if recipe.scope.kind in ("experts", "seuf") and prepared.selected is None:
        plan.notes.append(
            "prepare() chooses the experts that train: trained weights and paths above count all, memory only as many "
            "as it chooses"
        )
    if mesh is not None and (padding := mesh.padding(view.model)):
        plan.notes.append(padding)
    if recipe.optimizer.max_grad_norm is not None:
        plan.notes.append("max_grad_norm needs every gradient before the first update")
    caches = cache_bytes(view, prepared, forget, retain)
    if each := state_bytes(view):
        plan.notes.append(f"the reference's hidden states take {each} bytes a token ({recipe.reference_dtype})")
    if device.type != "cpu" and caches:
        plan.notes.append(f"reference caches take {caches / 2**20:.2f} MiB on the host")
        caches = 0
    try:
        _rehearse(plan, view, step, Rehearsal(device), batches, caches)
    except (RuntimeError, TypeError) as error:
        # some wrappers cannot be copied, and torch's fakes do not know some operations
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        plan.notes.append(f"not rehearsed, so activations, gradients and workspace are unknown ({reason})")
        plan.memory = plan.largest = held_at_rest(view, prepared, caches, mesh)
    if step.verifier.remaining:
        steps = "every step" if step.verifier.remaining == math.inf else f"{step.verifier.remaining} steps"
        size = step.verifier.memory() / 2**20
        where = "" if mesh is None and view.peers == 1 else " on the first rank"
        plan.notes.append(
            f"verify runs {steps} beside the plain path, at 5 to 8 times their time and {size:.2f} MiB beside these"
            + where
        )
    return plan


def _plan_mask(plan: Plan, view: StepView, given: Mapping[str, Sequence[Batch]], batches: Mapping[str, Batch]) -> None:
    """Say in `plan` how WAGLE's mask will be made; of several ranks, how much its gradients take on one."""
    share, made_from = first_share(view, plan.mesh), "two float32 gradients"
    held = 2 * 4 * sum(share(p, p.numel()) for _, p in view.trained)
    if plan.mesh is None and view.peers > 1:
        held = held // view.peers + sum(p.nbytes for _, p in view.trained)
        made_from += f" that {view.peers} ranks share and that of a batch"
    said = f"prepare() makes WAGLE's mask from {made_from}, {held / 2**20:.2f} MiB beside the weights"
    if plan.mesh is None and view.peers == 1:
        # from its second batch on a side has the sums of all gradients beside the activations
        sides = {side: [batch] * min(len(given[side]) or 2, 2) for side, batch in batches.items()}
        try:
            made = mask_plan(view, Rehearsal(torch.device(plan.device)), sides)
            plan.mask, said = made.memory, str(made)
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, ValueError) and view.recipe.wagle is not None and view.recipe.wagle.memory is not None:
                raise
            said += f"; not rehearsed ({next(iter(str(error).splitlines()), type(error).__name__)})"
    plan.notes.append(said)


def _rehearse(
    plan: Plan, view: StepView, step: Step, rehearsal: Rehearsal, batches: dict[str, Batch], caches: int
) -> None:
    """Run two steps of a shadow of `step` and write their costs into `plan`; `view` is the step on the plan's mesh."""
    ledger, rank = rehearsal.ledger, None
    shadow = step.shadow(rehearsal.twin, assumed(view, step.prepared, rehearsal, batches))
    if plan.mesh is not None:
        rehearsal.phase = "mask"
        with rehearsal:
            shadow.apply_preparation()
            rank = OneRank(shadow, plan.mesh, rehearsal)
    copied = shadow.view()
    for tensor in (*copied.model.parameters(), *copied.model.buffers()):
        ledger.add(tensor, "weights")
    for tensor in _tensors(list(copied.optimizer.state.values())):
        ledger.add(tensor, "optimizer state")
    ledger.hold(caches, CACHES)
    copied.optimizer.register_step_pre_hook(lambda *_: ledger.label(copied.gradients.held(), "gradients"))
    pair, factored = (batches["forget"], batches["retain"]), view.recipe.mollm is not None and form(view) != "compact"
    devices = [] if rehearsal.device.type == "cpu" else [rehearsal.device]
    with torch.random.fork_rng(devices), rehearsal:
        if rank is None:
            rehearsal.phase = "mask"
            shadow.apply_preparation()
        sizes = None if view.micro_batches == 1 else shadow.sizes([pair] * view.micro_batches)
        # the first step creates the optimizer's state, the second one has it from its start
        for _ in range(2):
            # two micro-batches are enough: the second finds gradients, and later ones hold no more; but factors add up
            for _ in range(view.micro_batches if factored else min(view.micro_batches, 2)):
                rehearsal.reset_costs()
                if rank is not None:
                    rank.traffic.clear()
                rehearsal.phase = "activations"
                shadow.accumulate(*pair, sizes=sizes, last=view.micro_batches == 1)
                ledger.label(copied.gradients.held(), "gradients")
            rehearsal.phase = "workspace"
            shadow.update()
            ledger.label(_tensors(list(copied.optimizer.state.values())), "optimizer state")
    plan.flops = {name: count for name, count in rehearsal.flops.items() if count}
    plan.bytes = dict(rehearsal.moved)
    plan.memory, plan.largest = ledger.peak(), ledger.largest()
    if rank is not None:
        plan.traffic = {cause: size * view.micro_batches for cause, size in rank.traffic.items() if size}


def _tensors(value: object) -> list[Tensor]:
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


def _device(named: Sequence[tuple[str, Tensor]]) -> torch.device:
    device = named[0][1].device
    if device.type != "meta":
        return device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _largest(given: Sequence[Batch], recipe: Recipe, device: torch.device) -> Batch:
    if given:
        batch = max(given, key=lambda b: b["input_ids"].numel())
        return {key: value.to(device) for key, value in batch.items()}
    ids = torch.ones(recipe.batch_size, recipe.data.max_length, dtype=torch.int64, device=device)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    return batch | {f"idk_{key}": value for key, value in batch.items()}


def _data(recipe: Recipe, forget: Sequence[Batch], retain: Sequence[Batch]) -> str:
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


def _levers(view: StepView, prepared: Preparation) -> dict[str, str]:
    recipe = view.recipe
    levers = {"trace": "off", "wagle": "off", "mollm": "off"}
    if recipe.trace is not None:
        levers["trace"] = "experts selected in prepare()"
        if prepared.inactive:
            assert prepared.frequencies is not None
            settings, found = recipe.trace, prepared.frequencies
            why = trace.why_empty(**found, min_ratio=settings.min_ratio, min_load=settings.min_load)
            levers["trace"] = f"TRACE inactive: {why}"
        elif prepared.calibration is not None and prepared.selected is not None:
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
        dual = recipe.dual
        levers["dual"] = (
            f"holds the retain loss at {dual.retain_loss_eps:g}, alpha is {view.alpha:g} and moves by "
            f"{dual.step_size:g} times the excess after {dual.warmup_steps} steps"
        )
    levers["scope"] = recipe.scope.kind
    if balance := router_aux.described(view.model, recipe):
        levers["router_aux"] = balance
    why = obstacle(view)
    one_pass = f"after it: {why}" if why else "in the backward pass"
    levers["update"] = f"{type(view.optimizer).__name__}, {one_pass}"
    return levers


def _kept(parameter: Tensor, words: Tensor | None) -> int:
    if words is None:
        return parameter.numel()
    return int(unpack_bits(words, parameter.shape[-1] if parameter.dim() else 1).sum())
