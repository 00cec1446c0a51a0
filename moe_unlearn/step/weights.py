"""The weights that a step trains, within the recipe's scope, the selection and the mask, and the optimizer for them."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_unlearn import offload
from moe_unlearn.config import Recipe
from moe_unlearn.model import scope
from moe_unlearn.model.adapters import check_adapted
from moe_unlearn.model.quantised import check_moves
from moe_unlearn.optim import MaskedAdamW, MaskedSGD
from moe_unlearn.prepare.preparation import Preparation
from moe_unlearn.step.checks import check_dtypes
from moe_unlearn.step.sharded import Shards


class TrainedWeights:
    """Decides which weights of a model may change, until `restore`; frozen ones stay frozen."""

    def __init__(self, model: nn.Module, recipe: Recipe, shards: Shards | None = None):
        check_adapted(model, recipe)
        check_moves(model)
        self.model, self.recipe, self.shards = model, recipe, shards
        #: packed masks by name of the parameter, of what this rank holds of it
        self.masks: dict[str, Tensor] = {}
        self._flags = {name: p.requires_grad for name, p in model.named_parameters()}
        self._names: list[list[str]] = []
        self._applied: tuple[object, ...] | None = None  # what the masks were made of, unless flags have changed since

    @property
    def trainable(self) -> list[str]:
        """Return the names of the parameters that were not frozen at first."""
        return [name for name, trains in self._flags.items() if trains]

    def restrict(self, prepared: Preparation) -> None:
        """Freeze the parameters outside the scope; ValueError if none is left to train, and for `check_dtypes`."""
        self._applied = None
        scope.restrict(self.model, self.recipe, self._flags, prepared.selected)
        check_dtypes(self.model)

    def mask(self, prepared: Preparation, optimizer: MaskedSGD | MaskedAdamW) -> None:
        """Give the masks of the preparation to the optimizer, and freeze the parameters without a set bit.

        They are made once: a second call for the same masks leaves them, since both would stand in memory. Raises
        ValueError for an optimizer whose state lies on the host where weights are shared out.
        """
        offload.check_alone(optimizer.param_groups, shared=self.shards is not None)
        if self._applied is not None and _same(self._applied, self._made_of(prepared, optimizer)):
            return
        if self.shards is not None and prepared.mask is not None:
            prepared.mask = self.shards.share_out(prepared.mask)
        self.masks = scope.weight_masks(self.model, self.recipe.scope, prepared.selected, prepared.mask)
        moving = {name for name, words in self.masks.items() if words.any()}
        if self.shards is not None:
            moving = self.shards.take_masks(self.masks, moving)
        by_parameter = {p: self.masks.get(name) for name, p in self.model.named_parameters()}
        for group in optimizer.param_groups:
            group["masks"] = [by_parameter.get(p) for p in group["params"]]
        for name, p in self.model.named_parameters():
            if p.requires_grad and name in self.masks and name not in moving:
                p.requires_grad_(False)
        self._applied = self._made_of(prepared, optimizer)

    def _made_of(self, prepared: Preparation, optimizer: MaskedSGD | MaskedAdamW) -> tuple[object, ...]:
        given = [each for group in optimizer.param_groups for each in (*group["params"], *group["masks"])]
        return prepared.mask, prepared.selected, optimizer, *given

    def know(self, optimizer: MaskedSGD | MaskedAdamW) -> None:
        """Note the names of the parameters that an optimizer has, for `take_up`."""
        names = {p: name for name, p in self.model.named_parameters()}
        self._names = [[names.get(p, "") for p in group["params"]] for group in optimizer.param_groups]

    def take_up(self, optimizer: MaskedSGD | MaskedAdamW) -> None:
        """Give an optimizer that is known the parameters that the model has now under their names.

        Raises ValueError, and changes nothing, if it has states of others.
        """
        named = dict(self.model.named_parameters())
        if optimizer.state.keys() - named.values():
            raise ValueError(
                "the optimizer has states of weights that are no longer in the model: share them out before the first "
                "step, or load a checkpoint after `rebind`"
            )
        for group, names in zip(optimizer.param_groups, self._names, strict=False):  # groups may have been added
            group["params"] = [named.get(name, p) for name, p in zip(names, group["params"], strict=True)]

    def restore(self) -> None:
        """Restore the `requires_grad` flags that the parameters had at first."""
        self._applied = None
        scope.set_trainable(self.model, self._flags, set(self._flags))


def _same(ones: tuple[object, ...], others: tuple[object, ...]) -> bool:
    """Return whether two tuples have the very same objects."""
    return len(ones) == len(others) and all(one is other for one, other in zip(ones, others, strict=True))


def build_optimizer(model: nn.Module, recipe: Recipe) -> MaskedSGD | MaskedAdamW:
    """Build the recipe's masked optimizer over every parameter that requires a gradient."""
    settings = recipe.optimizer
    parameters = [p for p in model.parameters() if p.requires_grad]
    numerics = settings.numerics
    if numerics is None:
        narrow = settings.state != "float32" or any(p.dtype == torch.bfloat16 for p in parameters)
        numerics = "stochastic" if narrow else "parity"
    groups: list[dict[str, Any]] = [{"params": parameters, "offload": settings.offload}]
    if recipe.router.mode == "invariant" and any(p.dtype == torch.bfloat16 for p in parameters):
        # small, and what they keep would be lost in the rounding of each update
        own = {p for name, p in model.named_parameters() if name in scope.routing_parameters(model)}
        groups[0]["params"] = [p for p in parameters if p not in own]
        masters = {"params": [p for p in parameters if p in own], "offload": False, "numerics": "fp32_master"}
        groups = [group for group in (groups[0], masters) if group["params"]]
    common: dict[str, Any] = {
        "lr": settings.lr,
        "weight_decay": settings.weight_decay,
        "numerics": numerics,
        "state": settings.state,
        "seed": recipe.seed,
    }
    if settings.name == "sgd":
        return MaskedSGD(groups, momentum=settings.momentum, **common)
    first, second = settings.betas
    return MaskedAdamW(groups, betas=(first, second), eps=settings.eps, **common)


def twin_of(optimizer: MaskedSGD | MaskedAdamW, model: nn.Module, twin: nn.Module) -> MaskedSGD | MaskedAdamW:
    """Return an optimizer with the same options over the parameters of `twin`, a copy of the optimizer's `model`."""
    twins = dict(zip(model.parameters(), twin.parameters(), strict=True))
    groups = [{**group, "params": [twins[p] for p in group["params"]]} for group in optimizer.param_groups]
    return type(optimizer)(groups)
