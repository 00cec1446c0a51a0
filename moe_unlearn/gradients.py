"""The gradients of one step: in `.grad`, or compact in `optimizer.gradients`; for MOLLM a set for each objective.

    one set      g = grad sum_i w_i L_i
    MOLLM        g = sum_i c_i grad L_i, c from the Gram matrix of the masked gradients

Expert weights have theirs compact where a sink collects them, of the slices that train and with the mask
applied; what belongs to neither is None. See `sinks` and `mollm`.
"""

from torch import Tensor, nn

from moe_unlearn import mollm
from moe_unlearn.config import Mollm
from moe_unlearn.ops import gram
from moe_unlearn.optim import MaskedAdamW, MaskedSGD


class Gradients:
    """What a step has accumulated over the trained parameters (name, parameter) under its masks, by name."""

    def __init__(
        self, optimizer: MaskedSGD | MaskedAdamW, trained: list[tuple[str, nn.Parameter]], masks: dict[str, Tensor]
    ):
        self.optimizer, self.trained, self.masks = optimizer, trained, masks
        #: objective -> a gradient or None for each trained parameter; empty without MOLLM
        self.sets: dict[str, list[Tensor | None]] = {}
        self._compact: set[Tensor] = set()  # parameters whose gradients in the sets are compact

    def of(self, p: nn.Parameter) -> Tensor | None:
        """The gradient of the step, compact or not."""
        return self.optimizer.gradients.get(p, p.grad)

    def collect(self, objective: str) -> None:
        """Take what a backward pass of this objective left, and add it to the objective's set."""
        held = self.sets.setdefault(objective, [None] * len(self.trained))
        for i, (_, p) in enumerate(self.trained):
            new = self.of(p)
            if new is not None:
                held[i] = new if held[i] is None else held[i].add_(new)
                p.grad = None
        self._compact |= self.optimizer.gradients.keys()
        self.optimizer.gradients.clear()

    def divide(self, parts: int) -> None:
        """The mean of `parts` micro-batches, from their sum."""
        for gradients in self.sets.values() or [[self.of(p) for _, p in self.trained]]:
            for gradient in gradients:
                if gradient is not None and parts != 1:
                    gradient.div_(parts)

    def norm(self) -> float:
        """Of the gradient of the step, masks applied."""
        return float(self._gram([[self.of(p) for _, p in self.trained]])[0, 0]) ** 0.5

    def scale(self, factor: float) -> None:
        """Multiply the gradient of the step."""
        for _, p in self.trained:
            gradient = self.of(p)
            if gradient is not None:
                gradient.mul_(factor)

    def products(self) -> Tensor:
        """Gram matrix [m, m] of the objectives' masked gradients."""
        return self._gram(list(self.sets.values()))

    def descend(self, settings: Mollm, products: Tensor, active: Tensor, *, keep: bool) -> mollm.CommonDescent:
        """Make the common descent direction the gradient of the step; without `keep` the sets end here."""
        direction = mollm.common_descent(
            products, normalize=settings.normalize, rescale=settings.rescale, active=active
        )
        for i, (_, p) in enumerate(self.trained):
            terms = [
                (float(c), gradients[i])
                for c, gradients in zip(direction.coefficients, self.sets.values(), strict=True)
                if gradients[i] is not None and c != 0
            ]
            # at a stationary point nothing may move, momentum and decay included
            if not terms or direction.stationary:
                continue
            (c, first), *others = terms
            total = c * first if keep else first.mul_(c)
            for c, gradient in others:
                total.add_(gradient, alpha=c)
            if p in self._compact:
                self.optimizer.gradients[p] = total
            else:
                p.grad = total
        if not keep:
            self.sets = dict.fromkeys(self.sets, [])
        return direction

    def step_and_measure(self) -> dict[str, float]:
        """`optimizer.step()`; the inner product of the change it made with each objective's gradient."""
        before = [self._rows(p).clone() for _, p in self.trained]
        self.optimizer.step()
        change = [self._rows(p) - old for (_, p), old in zip(self.trained, before, strict=True)]
        # the change is zero wherever a mask is
        products = gram([*self.sets.values(), change])[:-1, -1]
        return dict(zip(self.sets, products.tolist(), strict=True))

    def _rows(self, p: nn.Parameter) -> Tensor:
        """The part of a parameter that its gradient is of."""
        layout = self.optimizer.layout(p) if p in self._compact else None
        return p.detach() if layout is None or layout[0] is None else p.detach()[layout[0]]

    def clear(self) -> None:
        """Drop everything."""
        self.optimizer.zero_grad(set_to_none=True)
        self.sets.clear()
        self._compact.clear()

    def _gram(self, sets: list[list[Tensor | None]]) -> Tensor:
        compact = self._compact | self.optimizer.gradients.keys()
        return gram(sets, masks=[None if p in compact else self.masks.get(name) for name, p in self.trained])
