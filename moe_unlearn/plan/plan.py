"""Prediction of what a step will do, and of the work and memory it will take.

The prediction is a rehearsal: two steps of the step's own code run on tensors without storage (`dry_run`), so it
follows whatever the step does. Results that prepare() has not made yet are assumed in their largest shape. The step,
its model and the random state stay unchanged. Not counted are the batches and all memory outside of torch's tensors:
the CUDA context, cuBLAS' workspace, scratch of the C++ kernels.

For a mesh it is the rehearsal of one rank, the one that holds most, and no rank is started; see `one_rank`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_unlearn import offload, router_aux, routers, survive, trace
from moe_unlearn.config import Recipe
from moe_unlearn.experts import experts_modules
from moe_unlearn.model.batch_sets import all_checked
from moe_unlearn.model.batches import Batch
from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.plan.amounts import amount, scale
from moe_unlearn.plan.dry_run import Rehearsal
from moe_unlearn.plan.known import (
    cache_bytes,
    device_of,
    first_share,
    held_at_rest,
    largest,
    of_routers,
    on_host,
    retain_rows,
    state_bytes,
)
from moe_unlearn.plan.mask import mask_at_most, mask_plan
from moe_unlearn.plan.mesh import Mesh, check_whole
from moe_unlearn.plan.one_rank import GATHERED
from moe_unlearn.plan.rehearse import Setting, Step, periods_of, rehearsed
from moe_unlearn.plan.ways import Path, obstacle, paths
from moe_unlearn.prepare.preparation import Preparation
from moe_unlearn.view import StepView
from moe_unlearn.wagle.budget import SHARE

_BUS = 25e9  # bytes a second that PCIe is assumed to move each way


@dataclass
class Plan:
    """A step's plan; `str(plan)` is the table that the command line prints.

    memory: bytes by component at the moment when their sum, `peak`, is largest. largest: the most bytes of each
    component at any time. flops, bytes: by kernel, the operations of matrix products and the bytes read and written,
    for one micro-batch and its update. paths: the way of each layer's gradients (`ways.Path`). mask: as memory, at the
    peak of making WAGLE's mask in prepare(). Where the step cannot be rehearsed, a note says why, and memory holds what
    is known without: weights, optimizer state, mask and caches.

    With a mesh all of these are of one rank, the one that holds most, but for `weights` and `trained`; traffic: the
    bytes that it sends to other ranks in a step, by cause. fits: the GiB of devices, where it is asked whether they are
    enough. remedies: what to change where they are not, in lines, by size.
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
    fits: tuple[float, ...] = ()
    remedies: dict[float, list[str]] = field(default_factory=dict)
    yields: bool = False  # whether the mask's gradients take what a device leaves

    @property
    def peak(self) -> int:
        """Return the predicted bytes at the peak, the sum over all components."""
        return sum(self.memory.values())

    def __str__(self) -> str:
        share = self.trained / max(self.weights, 1)
        moved, unit = scale(sum(self.bytes.values())), scale(self.peak)
        lines = [
            f"recipe {self.recipe}: {self.steps} steps, {self.layers} MoE layers, on {self.device}",
            *([] if self.mesh is None else [f"mesh: {self.mesh}; below is the rank that holds most"]),
            f"batch: {self.shape}" + ("" if self.mesh is None else ", on each rank"),
            *([f"data: {self.data}"] if self.data else []),
            f"trained weights: {self.trained:,} of {self.weights:,} ({share:.1%})",
            *(f"  {name:<10} {text}" for name, text in self.levers.items()),
            *_path_lines(self.paths),
            f"{'one step':<26} {'GFLOP':>12} {f'{moved[0]} moved':>12}",
            *(
                f"  {name:<24} {self.flops.get(name, 0) / 1e9:12.3f} {size / moved[1]:12.1f}"
                for name, size in sorted(self.bytes.items(), key=lambda item: -item[1])
            ),
            f"  {'total':<24} {sum(self.flops.values()) / 1e9:12.3f} {sum(self.bytes.values()) / moved[1]:12.1f}",
            f"{f'memory ({unit[0]})':<26} {'at the peak':>12} {'at most':>12}",
            *(
                f"  {name:<24} {self.memory.get(name, 0) / unit[1]:12.2f} {size / unit[1]:12.2f}"
                for name, size in self.largest.items()
            ),
            f"  {'peak':<24} {self.peak / unit[1]:12.2f}",
            *self._sent(),
            *self._fitting(),
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def _sent(self) -> list[str]:
        if self.mesh is None:
            return []
        unit, one = scale(sum(self.traffic.values()))
        causes = [*sorted(self.traffic.items(), key=lambda item: -item[1]), ("total", sum(self.traffic.values()))]
        head = f"{f'sent in a step ({unit})':<39} {'to others':>12}"
        return [head, *(f"  {name:<37} {size / one:12.2f}" for name, size in causes)]

    def on(self, size: float) -> dict[str, int]:
        """Return the bytes by component at the peak of the whole run on a device of `size` GiB: a step, or the mask."""
        mask = dict(self.mask)
        if self.yields and mask:
            free = SHARE * (size * 2**30 - mask["weights"])
            mask["gradients"] = min(mask.get("gradients", 0), max(int(free), 0))
        return max(self.memory, mask, key=lambda memory: sum(memory.values()))

    def fits_on(self, size: float) -> bool:
        """Return whether a device of `size` GiB is enough for the whole run."""
        return sum(self.on(size).values()) <= size * 2**30

    def masking(self, size: float) -> bool:
        """Return whether the peak on a device of `size` GiB is that of making WAGLE's mask."""
        return self.on(size) != self.memory

    def _fitting(self) -> list[str]:
        ranks, lines = 1 if self.mesh is None else self.mesh.fsdp, []
        for size in self.fits:
            memory = self.on(size)
            when = " while the mask is made" if self.masking(size) else ""
            answer = "yes" if self.fits_on(size) else "no"
            peak = sum(memory.values()) / 2**30
            lines.append(f"fits on {ranks} x {size:g} GiB: {answer}, {peak:.3g} GiB each{when} (predicted)")
            lines += [f"  {line}" for line in self.remedies.get(size, [])]
        return lines


def make_plan(
    step: Step,
    forget_batches: Iterable[Batch],
    retain_batches: Iterable[Batch],
    *,
    mesh: Mesh | str | None = None,
    fits: float | Sequence[float] | None = None,
    shallow: Sequence[Step] = (),
    stored: bool = False,
) -> Plan:
    """Make the plan of an `UnlearnStep` in its present state, for the largest batch of each side.

    Without batches, the recipe's batch size, rows and length are assumed. A model on the meta device is planned for
    CUDA where there is a GPU, for the CPU otherwise. Before prepare(), masks are assumed to keep everything, and as
    many experts to be selected as the recipe allows. `mesh`, a `Mesh` or what its `parse` takes, plans for one rank of
    several, which has these batches to itself; `fits` asks whether a device of so many GiB is enough, or of each of
    several sizes. `shallow` are two steps of this recipe on models with as many layers as `repeat.depths` says, which
    are rehearsed in place of this one. `stored` says that prepare() keeps the reference's values on disk (`cache_dir`).

    Raises ValueError for a bad batch, for a mesh that the model does not fit, and for a model that is sharded already,
    which says with which `mesh` the model is planned before that.
    """
    mesh = Mesh.parse(mesh) if isinstance(mesh, str) else mesh
    forget, retain = all_checked(forget_batches, "forget"), all_checked(retain_batches, "retain")
    view, prepared = step.view(), step.prepared
    check_whole(view.model)
    routers.check_whole(view.recipe.router, shared=mesh is not None)
    if mesh is not None:
        mesh.placings(view.model)  # which refuses a model that does not fit
        offload.check_alone(view.optimizer.param_groups, shared=True)
        view = dataclasses.replace(view, peers=mesh.peers)
    sizes = tuple(fits) if isinstance(fits, Sequence) else () if fits is None else (fits,)
    if wrong := [size for size in sizes if not size > 0]:
        raise ValueError(f"fits must be above 0 GiB; got {wrong[0]:g}")
    recipe, named = view.recipe, list(view.model.named_parameters())
    device = device_of(view)
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
        fits=sizes,
    )
    if recipe.mollm is not None:
        plan.notes.append(f"MOLLM keeps {2 + recipe.mollm.kl} gradient sets until their Gram matrix is known")
    if recipe.scope.kind in ("experts", "seuf") and prepared.selected is None:
        plan.notes.append(
            "prepare() chooses the experts that train: trained weights and paths above count all, memory only as many "
            "as it chooses"
        )
    if mesh is not None and (padding := mesh.padding(view.model)):
        plan.notes.append(padding)
    if any(group["offload"] for group in view.optimizer.param_groups):
        plan.notes.append(_of_offload(view))
    if note := of_routers(view):
        plan.notes.append(note)
    if recipe.optimizer.max_grad_norm is not None:
        plan.notes.append("max_grad_norm needs every gradient before the first update")
    if recipe.survive is not None:
        size = survive.memory(view.model) / 2**20
        plan.notes.append(f"survive: after the last step {size:.2f} MiB beside the model and the optimizer's state")
    caches, on_disk = cache_bytes(view, prepared, forget, retain, stored=stored)
    if each := state_bytes(view):
        plan.notes.append(f"the reference's hidden states take {each} bytes a token ({recipe.reference_dtype})")
    if on_disk:
        plan.notes.append(f"the reference's values take {amount(on_disk)} on disk")
    if device.type != "cpu" and caches:
        plan.notes.append(f"reference caches take {amount(caches)} on the host")
        caches = 0
    try:
        made = rehearsed(step, shallow, Setting(mesh, device, batches, caches))
        plan.memory, plan.largest, plan.flops, plan.bytes = made.memory, made.largest, made.flops, made.bytes
        if made.products:
            plan.levers["head"] = f"a loss multiplies rows and head {made.products:.3g} times on average"
        plan.traffic = {cause: size * view.micro_batches for cause, size in made.traffic.items()}
    except (RuntimeError, TypeError) as error:
        # some wrappers cannot be copied, and torch's fakes do not know some operations
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        plan.notes.append(f"not rehearsed, so activations, gradients and workspace are unknown ({reason})")
        plan.memory = plan.largest = held_at_rest(view, prepared, caches, mesh)
    if recipe.wagle is not None and recipe.wagle.mask is None and prepared.mask is None:
        plan.yields = recipe.wagle.memory is None
        if mesh is not None or view.peers > 1:
            _plan_shared_mask(plan, view)
        else:
            _plan_mask(plan, step, shallow, {"forget": forget, "retain": retain}, batches)
    if step.verifier.remaining:
        steps = "every step" if step.verifier.remaining == math.inf else f"{step.verifier.remaining} steps"
        size = step.verifier.memory()
        where = "" if mesh is None and view.peers == 1 else " on the first rank"
        plan.notes.append(
            f"verify runs {steps} beside the plain path, at 5 to 8 times their time and {amount(size)} beside these"
            + where
        )
    return plan


def _of_offload(view: StepView) -> str:
    """Say what `optimizer.offload` keeps on the host, and what its copies take."""
    if not offload.is_apart(device_of(view)):
        return "optimizer.offload changes nothing here: the device's memory is that of the host"
    away = on_host(view)
    size = sum(view.optimizer.state_size(p, view.masks.get(name)) for name, p in view.trained if p in away)
    return (
        f"{amount(size)} of optimizer state lie on the host: what of it a step trains goes there and back, "
        f"{size / _BUS * 1e3:.3g} ms each way at an assumed {_BUS / 1e9:g} GB/s (predicted). That pays where the run "
        "does not fit otherwise; beside other work of the device, copies cost no time"
    )


def _plan_mask(
    plan: Plan, step: Step, shallow: Sequence[Step], given: Mapping[str, Sequence[Batch]], batches: Mapping[str, Batch]
) -> None:
    """Say in `plan` how WAGLE's mask will be made on one process."""
    view, device = step.view(), torch.device(plan.device)
    try:
        if shallow:
            made = mask_at_most(view, [each.view() for each in shallow], periods_of(step, shallow), device, batches)
        else:
            # from its second batch on a side has the sums of all gradients beside the activations
            sides = {side: [batch] * min(len(given[side]) or 2, 2) for side, batch in batches.items()}
            made = mask_plan(view, Rehearsal(device), sides)
        plan.mask, said = made.memory, str(made)
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ValueError) and view.recipe.wagle is not None and view.recipe.wagle.memory is not None:
            raise
        held = 2 * 4 * sum(p.numel() for _, p in view.trained)
        why = next(iter(str(error).splitlines()), type(error).__name__)
        said = f"prepare() makes WAGLE's mask from two float32 gradients, {amount(held)} beside the weights"
        said += f"; not rehearsed ({why})"
    plan.notes.append(said)


def _plan_shared_mask(plan: Plan, view: StepView) -> None:
    """Say in `plan` how several ranks make WAGLE's mask, and what one holds of it, beside what a step has at most."""
    share = first_share(view, plan.mesh)
    held, made_from = 2 * 4 * sum(share(p, p.numel()) for _, p in view.trained), "two float32 gradients"
    if plan.mesh is None:
        held = held // view.peers + sum(p.nbytes for _, p in view.trained)
        made_from += f" that {view.peers} ranks share and that of a batch"
    weights = sum(share(p, p.nbytes) for p in view.model.parameters())
    beside = {name: size for name, size in plan.largest.items() if name in ("activations", "workspace", GATHERED)}
    bits = sum(share(p, p.numel() / 8) for p in view.model.parameters())
    plan.mask = {"weights": weights, "mask": bits, **beside, "gradients": held}
    plan.yields = False
    plan.notes.append(f"prepare() makes WAGLE's mask from {made_from}, {amount(held)} beside the weights")


def _largest(given: Sequence[Batch], recipe: Recipe, device: torch.device) -> Batch:
    if given:
        return largest(given, device)
    ids = torch.ones(recipe.batch_size, recipe.data.max_length, dtype=torch.int64, device=device)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    return batch | {f"idk_{key}": value for key, value in batch.items()}


def _data(recipe: Recipe, forget: Sequence[Batch], retain: Sequence[Batch]) -> str:
    """Describe the rows of both sides, given or the recipe's, and how many epochs the recipe's steps are."""
    sides = {"forget": (forget, recipe.data.forget_rows), "retain": (retain, retain_rows(recipe.data))}
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
    if recipe.router.mode != "free":
        levers["router"] = recipe.router.mode
        if prepared.routers and (shut := routers.closed(prepared.routers.values())):
            levers["router"] += f": {shut}"
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
