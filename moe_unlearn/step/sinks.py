"""Sinks, which receive the weight gradients of the experts in the fused step instead of `.grad`.

    CompactSink    sum of the masked dW of the trained slices, [M_e, M, P] in the parameter's dtype
    FactorSink     the factors of dW, where they are smaller than dW: dW is computed once its use is known
    UpdateSink     the optimizer's update, computed from the factors of dW, which is never stored

A sink is given to `step_inputs(weight_gradients=...)`. In the forward pass the experts announce their weights
(`enter`). In the backward pass, after a layer's dgrad, they hand over the factors of each dW (`take`). After the
backward pass `settle` is called. An UpdateSink takes the compact form for a weight that entered twice, which has two
gradients to wait for; every sink takes it for a bias, for which there is no kernel that works from factors. Gradients
of weights that the optimizer does not train are dropped; a weight that is no parameter of the step is an error.

Deterministic. Source: our specification.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moe_unlearn.backend import is_on_cpu
from moe_unlearn.errors import NonFiniteError
from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.ops.expert_wgrad import Factors, expert_wgrad
from moe_unlearn.ops.sink import GradientSink
from moe_unlearn.step.factors import LARGEST, largest_sum, look, may_overflow
from moe_unlearn.step.gradients import GradientStore


def sink_of(store: GradientStore, form: str) -> "CompactSink":
    """Return a new sink of a step's gradients: "update", or a form of `plan.ways`: "compact", "factors" or "auto"."""
    plain = {"update": UpdateSink, "compact": CompactSink}.get(form)
    return FactorSink(store, form) if plain is None else plain(store)


class CompactSink(GradientSink):
    """Adds compact gradients to those of the store, which may be replaced between backward passes."""

    #: how many micro-batches like this one the step has, as far as is known
    micro_batches = 1.0
    #: whether the sink needs the largest absolute values of the factors
    bounded = False
    owners: Mapping[str, Mapping[str, Tensor]] | None = None

    def __init__(self, store: GradientStore):
        self.store, self.optimizer = store, store.optimizer
        #: names of the weights that the backward pass has updated
        self.updated: list[str] = []

    def enter(self, weight: Tensor) -> None:
        """Note that a forward pass uses `weight`."""

    def trained_slices(self, weights: Sequence[Tensor]) -> Tensor | None:
        """Return the slices that train of any of one layer's `weights`, ascending int32 [M_e]; None for all."""
        layouts = [found for found in map(self.optimizer.layout, weights) if found is not None]
        found = [layout.trained_slices for layout in layouts if layout.trained_slices is not None]
        if len(found) < len(layouts):
            return None
        slices: Tensor = torch.cat(found or [torch.empty(0, dtype=torch.long, device=weights[0].device)]).unique()
        return slices.int()

    def take(self, weight: Tensor, factors: Factors) -> None:
        """Take the factors of a gradient of `weight` from the backward pass."""
        layout = self.optimizer.layout(weight)
        if layout is None:
            self._check_known(weight)
            return
        trained_slices, mask = layout
        held = self.store.collected.get(weight)
        assert not isinstance(held, Factors)  # factors become the step's gradients after its backward passes
        if weight.dim() == 3:
            dw = expert_wgrad(**factors._asdict(), experts=trained_slices, mask=mask, out=held, out_dtype=weight.dtype)
        else:  # a bias, whose mask runs along the other dimension
            dw = expert_wgrad(**factors._asdict(), experts=trained_slices, out_dtype=weight.dtype).squeeze(2)
            dw = dw if mask is None else torch.where(unpack_bits(mask, dw.shape[1]), dw, 0)
            dw = dw if held is None else held.add_(dw)
        self.store.collected[weight] = dw

    def _check_known(self, weight: Tensor) -> None:
        """Raise RuntimeError for the gradient of a tensor that is none of the step's parameters: it would be lost."""
        if weight not in self.store.names:
            raise RuntimeError(
                f"the backward pass made a gradient of a weight {list(weight.shape)} that is no parameter of the step: "
                "something replaced the model's parameters after the step was made"
            )

    def settle(self) -> None:
        """Finish the backward pass; raises NonFiniteError for checks whose results it did not wait for."""


class FactorSink(CompactSink):
    """Keeps factors, one entry in the store for each time a backward pass met the weight.

    form: "factors" keeps the factors of every weight; "auto" keeps them only where those of all micro-batches together
    are smaller than the compact gradient. The form of a weight is chosen when a step first meets it, and holds for the
    rest of the step.
    """

    def __init__(self, store: GradientStore, form: str):
        super().__init__(store)
        self.form = form

    def take(self, weight: Tensor, factors: Factors) -> None:
        layout, kept = self.optimizer.layout(weight), self.store.kept
        if weight not in kept and layout is not None:
            experts = len(factors.expert_offsets) - 1  # of this rank
            trained = experts if layout.trained_slices is None else len(layout.trained_slices)
            size = self.micro_batches * (factors.grad.numel() + factors.input.numel())
            slice_size = weight.shape[1:].numel()
            kept[weight] = weight.dim() == 3 and (self.form == "factors" or size < trained * slice_size)
        if kept.get(weight):
            # detached, so that they do not keep the graph that they were computed in
            parts = Factors(**{name: v.detach() for name, v in factors._asdict().items() if v is not None})
            self.store.factors.setdefault(weight, []).append(parts)
        else:
            super().take(weight, factors)


class UpdateSink(CompactSink):
    """Updates every weight [E, M, P] that the forward pass used once.

    On the CPU, factors that are not finite raise NonFiniteError, which names the weights updated before; where the
    product of the factors could overflow, the gradient is stored for the caller to check.

    On a GPU the host does not wait for these checks. Factors that fail one of them, and those of every weight after
    them, update nothing, and `settle` raises the error after the backward pass, also for a product that could overflow.
    So it is on every device where other ranks wait in the backward pass: they all stop after it, for one of them.
    """

    bounded = True

    def __init__(self, store: GradientStore):
        super().__init__(store)
        self._uses: dict[Tensor, int] = {}
        self._unseen: list[tuple[Tensor, Tensor]] = []  # weights and their bounds, which the host has not read yet
        self._sound: Tensor | None = None  # bool [] on the device: whether all of these bounds are finite in float32

    def enter(self, weight: Tensor) -> None:
        self._uses[weight] = self._uses.get(weight, 0) + 1

    def take(self, weight: Tensor, factors: Factors) -> None:
        if weight.dim() != 3 or self._uses.get(weight, 0) > 1 or self.optimizer.layout(weight) is None:
            super().take(weight, factors)
            return
        bound = largest_sum(factors)
        if self._waits(bound):
            self._settled()  # a model on both CPU and GPU: update this weight only if the earlier ones passed the check
            if may_overflow(float(bound), self.store.names[weight], (*self.updated,)):
                super().take(weight, factors)
                return
            self.store.note_update()
            self.optimizer.update_from(weight, factors)
            self.updated.append(self.store.names[weight])
            return
        sound = bound < LARGEST
        if self._sound is not None:
            sound = sound & self._sound.to(sound.device, non_blocking=True)
        self._sound = sound
        self._unseen.append((weight, bound))
        self.store.note_update()
        self.optimizer.update_from(weight, factors, where=sound)

    def settle(self) -> None:
        self.store.stopping(self._settled, self.updated)

    def _settled(self) -> bool:
        """Read the checks that were put off and name the weights that passed them; NonFiniteError for others."""
        unseen, self._unseen, self._sound = self._unseen, [], None
        for i, bound in enumerate(look([bound for _, bound in unseen])):
            name = self.store.names[unseen[i][0]]
            if not bound < LARGEST:
                for weight, _ in unseen[i:]:
                    if "step" in self.optimizer.state.get(weight, {}):
                        self.optimizer.state[weight]["step"] -= 1  # this update was counted but wrote nothing
                may_overflow(bound, name, (*self.updated,))
                raise NonFiniteError(
                    f"the gradient of {name} could overflow: stopped before its update", (*self.updated,)
                )
            self.updated.append(name)
        return True

    def _waits(self, bound: Tensor) -> bool:
        """Return whether the bound is read before the update, which is so on the CPU, where reading costs no wait."""
        return is_on_cpu(bound) and self.store.alone
