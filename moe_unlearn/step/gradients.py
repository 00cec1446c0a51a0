"""The gradient store of a step: every gradient that it has accumulated, and what is computed from them.

A gradient has one of three forms:

    whole      in `.grad`, where autograd leaves it
    compact    [M, ...] for the M slices that train, with the mask applied; a sink (`sinks`) adds it up
    factors    of an expert weight's gradient, which a sink keeps

MOLLM has a set of gradients for each objective:

    one set      g = grad sum_i w_i L_i
    MOLLM        g = sum_i c_i grad L_i, c from the Gram matrix of the masked gradients; |g|^2 = c^T Gram c

With factors a step has two phases. First all factors become known, and MOLLM's inner products are computed from them
without storing a gradient. Then each weight gradient is made by a kernel whose epilogue updates the weight.
"""

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from moe_unlearn import mollm
from moe_unlearn.config import Mollm
from moe_unlearn.errors import NonFiniteError
from moe_unlearn.model.one_copy import add_up
from moe_unlearn.ops import gram
from moe_unlearn.ops.expert_wgrad import Factors, expert_wgrad
from moe_unlearn.optim import Layout, MaskedAdamW, MaskedSGD
from moe_unlearn.ranks import Ranks
from moe_unlearn.step.factors import inner_products, join, largest_sum, look, may_overflow

Gradient = Tensor | list[Factors] | None


class GradientStore:
    """The gradients of the step in progress; one store serves an optimizer from step to step.

    The optimizer takes `collected` in place of `.grad`, also where somebody else steps it, such as a trainer.
    """

    #: whether no other rank waits for this process in the backward pass
    alone = True

    def __init__(self, optimizer: MaskedSGD | MaskedAdamW):
        self.optimizer = optimizer
        #: parameter -> the step's gradient that is not in `.grad`: compact, or factors
        self.collected: dict[Tensor, Tensor | Factors] = {}
        #: whether gradients may have changed since the step's last micro-batch began
        self.touched = False
        #: whether the step has begun to change weights, and has not finished
        self.under_way = False
        self._ranks: Ranks | None = None  # those that have added the gradients up
        self._register()
        self.begin([], {})

    def begin(self, trained: Sequence[tuple[str, nn.Parameter]], masks: Mapping[str, Tensor]) -> None:
        """Begin a step that trains these parameters by name, under these masks by name."""
        self.trained, self.masks = trained, masks
        self.names: dict[Tensor, str] = {p: name for name, p in trained}
        self._reset()
        self._begun = len(trained) > 0

    def _reset(self) -> None:
        #: objective -> for each trained parameter a gradient, a list of factors or None; empty without MOLLM
        self.sets: dict[str, list[Gradient]] = {}
        #: where a `FactorSink` leaves the factors of a backward pass
        self.factors: dict[Tensor, list[Factors]] = {}
        #: weight -> whether a `FactorSink` keeps its factors in this step
        self.kept: dict[Tensor, bool] = {}
        self._compact: set[Tensor] = set()  # parameters whose gradients in the sets are compact
        self._norm: float | None = None  # the norm of MOLLM's direction
        self._rates: dict[str, float] = {}  # g_i . update, where it follows from the direction
        self._begun = False  # whether a step is in progress
        self._before: list[Tensor] = []  # the weights before the update, where the update is to be measured

    def __getstate__(self) -> dict:
        """Return the state without the hook: a copy of the optimizer has no hooks, and a copy of this makes its own."""
        return {name: value for name, value in vars(self).items() if name != "_hook"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._register()

    def _register(self) -> None:
        """Have the optimizer ask for the collected gradients in each step, and drop them in `zero_grad`."""
        self._hook = self.optimizer.register_step_pre_hook(self._hand_over)
        self.optimizer.zero_grad_hooks.append(self._drop)

    def note_update(self) -> None:
        """Note that weights are about to change; outside of a step nothing is noted."""
        self.under_way |= self._begun

    def _drop(self) -> None:
        self.collected.clear()

    def close(self) -> None:
        """Drop the collected gradients, and hand the optimizer no more of them."""
        self._drop()
        self._hook.remove()
        if self._drop in self.optimizer.zero_grad_hooks:
            self.optimizer.zero_grad_hooks.remove(self._drop)

    def _hand_over(self, optimizer: torch.optim.Optimizer, args: tuple, keywords: dict) -> tuple[tuple, dict]:
        """Add the collected gradients to the arguments of `optimizer.step`, and note that the update begins."""
        if len(args) > 1 and args[1] is not None:  # a closure, which makes the gradients first
            args = (args[0], partial(self._noted, args[1]), *args[2:])
        elif self.held():
            self.note_update()
        given = keywords.get("gradients")
        if given is self.collected:
            return args, keywords
        collected = self.collected if given is None else ChainMap(self.collected, given)
        return args, {**keywords, "gradients": collected}

    def _noted(self, closure: Callable[[], float]) -> float:
        value = closure()
        self.note_update()
        return value

    def of(self, p: Tensor) -> Tensor | Factors | None:
        """Return the step's gradient of `p`: whole, compact or as factors."""
        return self.collected.get(p, p.grad)

    def made(self, p: Tensor) -> Tensor | None:
        """Return the step's gradient of `p`, whole or compact; compute it from its factors if need be."""
        gradient = self.of(p)
        if not isinstance(gradient, Factors):
            return gradient
        trained_slices, mask = self._layout(p)
        return expert_wgrad(**gradient._asdict(), experts=trained_slices, mask=mask, out_dtype=p.dtype)

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        """Go backward from the loss of each of MOLLM's objectives, and collect its gradients."""
        for i, (name, value) in enumerate(losses.items()):
            # forget has a graph of its own; retain and KL share one, which the last of the two frees
            value.backward(retain_graph=name != "forget" and i + 1 < len(losses))
            self.collect(name)

    def collect(self, objective: str) -> None:
        """Add the gradients that a backward pass of this objective left to the objective's set."""
        held = self.sets.setdefault(objective, [None] * len(self.trained))
        for i, (_, p) in enumerate(self.trained):
            new = self.factors.get(p, self.of(p))
            before = held[i]
            # the form of a weight's gradient holds for the whole step
            if isinstance(new, list):
                assert not isinstance(before, Tensor)
                held[i] = [*(before or []), *new]
            elif new is not None:
                assert isinstance(new, Tensor) and not isinstance(before, list)
                held[i] = new if before is None else before.add_(new)
                p.grad = None
        self._compact |= self.collected.keys()
        self.collected.clear()
        self.factors.clear()

    def settle(self) -> bool:
        """Make the factors of one backward pass the step's gradients; return whether any gradient stays factored.

        Raises NonFiniteError if a factor is not finite. Where a sum could overflow, the gradient itself is computed.
        """
        return self.stopping(self._settled)

    def stopping(self, act: Callable[[], bool], updated: Sequence[str] = ()) -> bool:
        """Return act(), which may raise NonFiniteError after the weights `updated`."""
        return act()

    def _settled(self) -> bool:
        made = {p: _whole([(1.0, f) for f in parts]) for p, parts in self.factors.items()}
        self.collected.update(made)
        for p, bound in zip(made, look([largest_sum(gradient) for gradient in made.values()]), strict=True):
            if may_overflow(bound, self.names[p]) and (whole := self.made(p)) is not None:
                self.collected[p] = whole
        self.factors.clear()
        return any(isinstance(g, Factors) for g in self.collected.values())

    def add_up(self, ranks: Ranks) -> None:
        """Add up the gradients of all ranks in place; none of them may be factors."""
        self._ranks = ranks
        for gradients in self._each_set():
            apart = {name: g for (name, p), g in zip(self.trained, gradients, strict=True) if self._apart(p)}
            assert ranks.count == 1 or not any(isinstance(g, list) for g in apart.values())
            ranks.add_({name: _tensor(g) for name, g in apart.items()})

    def divide(self, parts: int) -> None:
        """Divide every gradient, a sum over `parts`, by that number, so that it becomes the mean."""
        if parts == 1:
            return
        for gradients in self._each_set():
            for i, gradient in enumerate(gradients):
                if isinstance(gradient, list):
                    gradients[i] = [f._replace(grad=f.grad / parts) for f in gradient]
                elif gradient is not None:
                    gradient.div_(parts)

    def change(self, changes: Mapping[Tensor, Callable[[Tensor], Tensor]]) -> None:
        """Replace the whole gradients of these parameters, in each set, by what the functions make of them."""
        for gradients in self._each_set() if changes else ():
            for (_, p), gradient in zip(self.trained, gradients, strict=True):
                if p in changes and isinstance(gradient, Tensor):
                    gradient.copy_(changes[p](gradient))

    def norm(self) -> float:
        """Return the norm of the step's gradient, masks applied, leaving out the gradients that are factors."""
        if self._norm is not None:
            return self._norm
        norm: float = look([self._gram([[_tensor(self.of(p)) for _, p in self.trained]])[0, 0]])[0] ** 0.5
        return norm

    def scale(self, factor: float) -> None:
        """Multiply the step's gradient by `factor`."""
        self._rates = {name: factor * rate for name, rate in self._rates.items()}
        for _, p in self.trained:
            gradient = self.of(p)
            if isinstance(gradient, Factors):
                self.collected[p] = gradient._replace(grad=gradient.grad * factor)
            elif gradient is not None:
                gradient.mul_(factor)

    def products(self) -> Tensor:
        """Return the Gram matrix [m, m] float64 of the objectives' masked gradients."""
        sets = list(self.sets.values())
        others: dict[Tensor, Tensor] = {}
        for i, (_, p) in enumerate(self.trained):
            present = {j: parts for j, gradients in enumerate(sets) if isinstance(parts := gradients[i], list)}
            if present:
                whole = [_whole([(1.0, f) for f in parts]) for parts in present.values()]
                index = torch.tensor([*present], device=p.device)
                others[p] = torch.zeros(len(sets), len(sets), dtype=torch.float64, device=p.device)
                others[p][index[:, None], index] = inner_products(whole, *self._layout(p))
        return self._gram([[_tensor(g) for g in gradients] for gradients in sets], others)

    def common_descent(self, settings: Mollm, left_out: Sequence[str], *, measure: bool) -> dict[str, float]:
        """Make the common descent direction of the objectives but those `left_out` the step's gradient; see `descend`.

        Returns metrics. Raises NonFiniteError if a gradient is not finite.
        """
        names, products = list(self.sets), self.products()
        if not torch.isfinite(products).all():
            raise NonFiniteError("a gradient is not finite: stopped before the update")
        active = torch.tensor([name not in left_out for name in names])
        direction = self.descend(settings, products, active, measure=measure)
        metrics = {f"lambda_{n}": float(w) for n, w in zip(names, direction.weights, strict=True)}
        return metrics | {"stationary": float(direction.stationary)}

    def descend(self, settings: Mollm, products: Tensor, active: Tensor, *, measure: bool) -> mollm.CommonDescent:
        """Make the common descent direction the step's gradient.

        With `measure`, `descent()` can be asked after the update. The sets are dropped here, unless they are needed to
        measure that update.
        """
        direction = mollm.common_descent(
            products, normalize=settings.normalize, rescale=settings.rescale, active=active
        )
        c = direction.coefficients.to(products)
        self._norm = 0.0 if direction.stationary else max(float(c @ products @ c), 0.0) ** 0.5
        keep = measure and not self._follows and not self.factored
        if self._follows:
            rates = -self.optimizer.param_groups[0]["lr"] * (not direction.stationary) * (products @ c)
            self._rates = dict(zip(self.sets, rates.tolist(), strict=True))
        elif keep:
            self._before = [self._rows(p).clone() for _, p in self.trained]
        # at a stationary point no weight may move, not even by momentum or decay: no parameter gets a gradient
        used = [] if direction.stationary else [*zip(c.tolist(), self.sets.values(), strict=True)]
        used = [(c_j, gradients) for c_j, gradients in used if c_j != 0]
        for i, (_, p) in enumerate(self.trained):
            if parts := [(c_j, f) for c_j, gradients in used if isinstance(g := gradients[i], list) for f in g]:
                self.collected[p] = _whole(parts)
                continue
            terms = [(c_j, g) for c_j, gradients in used if isinstance(g := gradients[i], Tensor)]
            if not terms:
                continue
            (first, own), *others = terms
            total: Tensor = first * own if keep else own.mul_(first)
            for c_j, gradient in others:
                add_up(total, gradient, c_j)
            if p in self._compact:
                self.collected[p] = total
            else:
                self._leave(p, total)
        if not keep:
            self.sets = dict.fromkeys(self.sets, [])
        return direction

    @property
    def factored(self) -> bool:
        """Return whether any gradient in the sets exists only as factors."""
        return any(isinstance(g, list) for gradients in self.sets.values() for g in gradients)

    @property
    def _follows(self) -> bool:
        """Return whether the update is -lr times the step's gradient, up to the last bits of float32."""
        groups = self.optimizer.param_groups
        plain = isinstance(self.optimizer, MaskedSGD) and not any(
            group["momentum"] or group["weight_decay"] or group["maximize"] or group["lr"] != groups[0]["lr"]
            for group in groups
        )
        return plain and all(p.dtype in (torch.float32, torch.float64) for _, p in self.trained)

    def descent(self) -> dict[str, float]:
        """Return the inner product of the update just made with each objective's gradient, by objective.

        It comes from the Gram matrix where the update follows the gradient, and is measured where `descend` prepared
        for that; otherwise the result is empty.
        """
        if not self._before:
            return self._rates
        change: list[Tensor | None] = [
            self._rows(p) - old for (_, p), old in zip(self.trained, self._before, strict=True)
        ]
        # no masks are needed: the change is zero wherever the mask forbids one
        sets = [[_tensor(g) for g in gradients] for gradients in self.sets.values()]
        products = self._inner([*sets, change], [None] * len(change), {})[:-1, -1]
        return dict(zip(self.sets, products.tolist(), strict=True))

    def held(self) -> list[Tensor]:
        """Return every tensor that holds a gradient or one of its factors."""
        found = [p.grad for _, p in self.trained if p.grad is not None]
        groups = (self.collected.values(), *self.sets.values(), *self.factors.values())
        for gradient in (g for group in groups for g in group):
            for part in gradient if isinstance(gradient, list) else [gradient]:
                found += [v for v in (part if isinstance(part, Factors) else [part]) if v is not None]
        return found

    def clear(self) -> None:
        """Drop all gradients and all that was derived from them."""
        self.optimizer.zero_grad(set_to_none=True)
        self._reset()

    def _each_set(self) -> list[list[Gradient]]:
        """Return the sets of gradients; without MOLLM the step's gradient is the only one."""
        return [*self.sets.values()] or [[_tensor(self.of(p)) for _, p in self.trained]]

    def _layout(self, p: Tensor) -> Layout:
        layout = self.optimizer.layout(p)
        assert layout is not None  # only weights that the optimizer trains have factors
        return layout

    def _rows(self, p: nn.Parameter) -> Tensor:
        """Return the part of a parameter that its gradient covers: the trained slices if the gradient is compact."""
        layout = self.optimizer.layout(p) if p in self._compact else None
        return p.detach() if layout is None or layout.trained_slices is None else p.detach()[layout.trained_slices]

    def _gram(self, sets: list[list[Tensor | None]], others: Mapping[Tensor, Tensor] | None = None) -> Tensor:
        compact = self._compact | self.collected.keys()
        masks = [None if p in compact else self.masks.get(name) for name, p in self.trained]
        return self._inner(sets, masks, others or {})

    def _inner(
        self, sets: list[list[Tensor | None]], masks: list[Tensor | None], others: Mapping[Tensor, Tensor]
    ) -> Tensor:
        """Compute the inner products of whole gradients, with those of `others`, on the first rank.

        `ShardedStore` completes those of parts.
        """
        total = gram(sets, masks=masks)
        for more in others.values():
            total += more.to(total.device)
        if self._ranks is not None:
            # processors of several kinds may round otherwise, and all ranks have to clip alike
            self._ranks.share_([total])
        return total

    def _apart(self, p: nn.Parameter) -> bool:
        """Return whether each rank has a gradient of `p` of its own until `add_up`."""
        return True

    def _leave(self, p: nn.Parameter, gradient: Tensor) -> None:
        """Leave a gradient where the optimizer finds it."""
        p.grad = gradient


def _tensor(gradient: Gradient | Factors) -> Tensor | None:
    """Return a gradient that is a tensor; None for factors."""
    return gradient if isinstance(gradient, Tensor) else None


def _whole(parts: list[tuple[float, Factors]]) -> Factors:
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    return join(parts)[0]
