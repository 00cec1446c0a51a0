"""OneRank, which makes a rehearsal that of one rank of a mesh: what torch's FSDP2 and transformers' experts would do.

    at rest       a rank holds its rows of weights, masks and optimizer state (`sharding.rows`)
    a unit        gathers its weights before its forward pass and again before its backward pass: one buffer, from
                  which each weight is copied; the backward pass fetches the unit that is next while it works on one
    its reduction the whole gradients go into one buffer, and each rank keeps the sum of its rows
    the sink      compact gradients of expert weights are sent to the owners of their rows as soon as they are made
    experts       under `ep` each token goes to the ranks of its experts and comes back, evenly spread

Units are the decoder layers and one of what stands outside of them, which stays whole from its forward to its backward
pass; under `ep` the experts of a layer and the embedding are units too. The rank is the one that holds most.

No process is started and nothing communicates. `traffic` counts the bytes that the rank sends to others: for an
all_gather its part once for each of them, for a reduce_scatter or an all_to_all each of their parts. Sums of losses,
norms and inner products, a few numbers each, are left out.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from moe_unlearn.experts import experts_modules, step_inputs
from moe_unlearn.plan.dry_run import Rehearsal
from moe_unlearn.plan.mesh import Mesh
from moe_unlearn.plan.units import Unit, cut, unit_modules
from moe_unlearn.view import StepView

GATHERED, UNREDUCED = "gathered weights", "unreduced gradients"
_FORWARD, _BACKWARD = "all_gather of weights, forward", "all_gather of weights, backward"
_REDUCED = "reduce_scatter of gradients"
_COMPACT = "all_to_all of compact gradients"
_TOKENS = "all_to_all of tokens"


class OneRank:
    """The rank of a mesh on which the shadow of a step runs, once its preparation is applied; see the module."""

    def __init__(self, shadow: Any, mesh: Mesh, rehearsal: Rehearsal):
        view: StepView = shadow.view()
        self.mesh, self.rehearsal, self.ledger = mesh, rehearsal, rehearsal.ledger
        self.traffic: dict[str, int] = defaultdict(int)
        self._order: list[Unit] = []
        self._gathered: int | None = None  # the buffer of the last unit gathered in a forward pass
        self._reducing: int | None = None  # the buffer of the last unit reduced
        self._ends = False  # whether the end of the backward pass in progress is waited for
        kept = {} if shadow.prepared.mask is None else shadow.prepared.mask.packed
        self.of = cut(view, mesh, kept, rehearsal)
        self.whole: set[Tensor] = set()  # the parameters that are gathered at the moment
        self.units: list[Unit] = []
        left = set(self.of)
        for module in unit_modules(view.model, mesh):
            shards = [self.of[p] for p in module.parameters() if p in left]
            left -= {shard.parameter for shard in shards}
            self.units.append(self._hook(module, Unit(shards)))
        self.root = Unit([shard for p, shard in self.of.items() if p in left], keeps=True)
        self.units.append(self.root)
        if mesh.ep > 1:
            for module in experts_modules(view.model).values():
                self._dispatch(module)
        shadow.ranks.count, shadow.ranks.peers = mesh.fsdp, mesh.peers
        shadow.gradients.collected = _Collected(self)
        shadow.objectives = _InsideRoot(shadow.objectives, self)

    def enter_root(self) -> None:
        """Gather what stands outside of the other units, for a forward pass."""
        self._gather(self.root, _FORWARD)

    def leave_root(self, values: dict[str, Tensor]) -> None:
        """End a forward pass whose results are the losses `values`."""
        self._after_forward(self.root, list(values.values()))
        self._gathered = self._let_go(self._gathered)

    def sent(self, weight: Tensor, dw: Tensor, held: Tensor | None) -> Tensor | None:
        """Return the gradient of the rows held that replaces the compact gradient `dw` of all rows seen.

        It is added to the one `held` from earlier micro-batches; None if no row held trains.
        """
        shard = self.of[weight]
        if shard.ranks == 1:
            if held is not None:
                self.ledger.label([dw], UNREDUCED)
            return dw if held is None else held
        # rows travel and are summed in float32
        row = dw[:1].numel() * torch.promote_types(dw.dtype, torch.float32).itemsize
        self.ledger.label([dw], UNREDUCED)
        self.ledger.resize(dw, len(dw) * row)
        received = self.ledger.hold(shard.ranks * shard.own * row, UNREDUCED)
        self.traffic[_COMPACT] += (len(dw) - shard.own) * row
        total = self._kept((shard.own, *dw.shape[1:]), dw.dtype) if held is None and shard.own else held
        self.ledger.pulse(shard.own * row, UNREDUCED)
        self._let_go(received)
        return total

    def _hook(self, module: nn.Module, unit: Unit) -> Unit:
        """Let a module's forward and backward passes gather and reduce its unit."""

        def before(module: nn.Module, args: tuple, keywords: dict) -> tuple[tuple, dict]:
            self._gather(unit, _BACKWARD if _in_backward() else _FORWARD)
            if not torch.is_grad_enabled() or _in_backward():
                return args, keywords
            given = [*args, *keywords.values()]
            places = [i for i, v in enumerate(given) if isinstance(v, Tensor) and v.requires_grad]
            if places:
                for i, v in zip(places, _Begin.apply(self, unit, *(given[i] for i in places)), strict=True):
                    given[i] = v
            return tuple(given[: len(args)]), dict(zip(keywords, given[len(args) :], strict=True))

        def after(module: nn.Module, args: tuple, out: Any) -> None:
            if not _in_backward():
                self._after_forward(unit, list(out) if isinstance(out, tuple | list) else [out])

        module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        module.register_forward_hook(after)
        return unit

    def _after_forward(self, unit: Unit, results: list[Any]) -> None:
        if not unit.keeps:
            self._reshard(unit)
        unit.places.append(len(self._order))
        self._order.append(unit)
        for value in results:
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(lambda _: self._before_backward(unit))

    def _before_backward(self, unit: Unit) -> None:
        if unit.backward:
            return
        unit.backward = True
        if not self._ends:
            self._ends = True
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)
        self._gather(unit, _BACKWARD)
        at = unit.places.pop() if unit.places else 0
        if at and not (following := self._order[at - 1]).whole and following.buffer is None:
            following.buffer = self._all_gather(following, _BACKWARD)

    def _after_backward(self) -> None:
        """Reduce what is left, and release the buffers."""
        for unit in self.units:
            if unit.whole:
                self.reduce(unit)
            unit.buffer, unit.backward = self._let_go(unit.buffer), False
            unit.places.clear()
        self._order.clear()
        self._reducing, self._ends = self._let_go(self._reducing), False

    def _all_gather(self, unit: Unit, cause: str) -> int | None:
        """Receive what all ranks hold of a unit in one buffer; None if nobody else holds any."""
        if unit.ranks == 1:
            return None
        self.traffic[cause] += unit.size * (unit.ranks - 1) // unit.ranks
        return self.ledger.hold(unit.size, GATHERED)

    def _gather(self, unit: Unit, cause: str) -> None:
        if unit.whole:
            return
        buffer, unit.buffer = unit.buffer, None
        if buffer is None:
            buffer = self._all_gather(unit, cause)
        if cause == _FORWARD:
            self._gathered = self._let_go(self._gathered)
        unit.weights = self.ledger.hold(unit.size, GATHERED)
        self._show(unit, whole=True)
        if cause == _FORWARD:
            self._gathered = buffer  # until the next unit is gathered, so that copying may overlap with receiving
        else:
            self._let_go(buffer)

    def _reshard(self, unit: Unit) -> None:
        if unit.whole:
            self._show(unit, whole=False)
            unit.weights = self._let_go(unit.weights)

    def _show(self, unit: Unit, *, whole: bool) -> None:
        unit.whole = whole
        for shard in unit.shards:
            shard.show(whole=whole)
        parameters = {shard.parameter for shard in unit.shards}
        self.whole = self.whole | parameters if whole else self.whole - parameters

    def reduce(self, unit: Unit) -> None:
        """End the backward pass of a unit: what autograd left in `.grad` becomes the gradient of the rows held."""
        unit.backward = False
        found = [(shard, shard.parameter.grad) for shard in unit.shards if shard.parameter.grad is not None]
        if not unit.whole:
            return
        for shard in unit.shards:
            shard.parameter.grad = None
        self._reshard(unit)
        self._reducing = self._let_go(self._reducing)
        if not found:
            return
        self.ledger.label([gradient for _, gradient in found], UNREDUCED)
        size = sum(shard.padded * gradient.element_size() for shard, gradient in found)
        self._reducing = self.ledger.hold(size, UNREDUCED)
        self.traffic[_REDUCED] += size * (unit.ranks - 1) // unit.ranks
        reduced = [(shard, gradient.dtype) for shard, gradient in found]
        found.clear()
        for shard, dtype in reduced:
            shape = shard.part.shape
            if shard.parameter.grad is not None:
                self.ledger.pulse(shard.part.numel() * dtype.itemsize, UNREDUCED)
            elif shard.part.numel():
                shard.parameter.grad = self._kept(shape, dtype)

    def _kept(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = self.rehearsal.empty(shape, dtype)
        self.ledger.add(made, "gradients")
        return made

    def _let_go(self, key: int | None) -> int | None:
        """Release what the ledger holds under a key; return None, the key of nothing."""
        if key is not None:
            self.ledger.let_go(key)
        return None

    def _dispatch(self, module: Any) -> None:
        """Let an experts module compute the rank's experts, whose tokens come from all ranks that share them out."""
        computed, experts = module.forward, module.num_experts // self.mesh.ep
        module.num_experts = experts

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            # the order of operations is that of transformers' AllToAllEP
            ids = top_k_index.reshape(-1)
            order = ids.argsort()
            self._count_tokens(self.mesh.ep * experts * order.element_size())
            received = _Exchange.apply(self, hidden_states[order // top_k_index.shape[-1]])
            own = ids.remainder(experts)[:, None]
            with step_inputs(module):  # tokens are counted where they come from
                made = computed(received, own, torch.ones_like(own, dtype=received.dtype))
            returned = _Exchange.apply(self, made)
            sorted_back = torch.empty_like(returned)
            sorted_back[order] = returned
            by_token = sorted_back.view(*top_k_weights.shape, hidden_states.shape[-1])
            return (by_token * top_k_weights.unsqueeze(-1)).sum(dim=1).to(hidden_states.dtype)

        module.forward = forward

    def _count_tokens(self, size: int) -> None:
        self.traffic[_TOKENS] += size * (self.mesh.ep - 1) // self.mesh.ep


class _Collected(dict):
    """The store's compact gradients: of the rows held, and out of a sink's sight while the weight is whole."""

    def __init__(self, one: OneRank):
        super().__init__()
        self.one = one

    def get(self, weight: Tensor, default: Any = None) -> Any:
        return default if weight in self.one.whole else super().get(weight, default)

    def __setitem__(self, weight: Tensor, gradient: Any) -> None:
        if weight in self.one.whole:
            gradient = self.one.sent(weight, gradient, super().get(weight))
        if gradient is not None:
            super().__setitem__(weight, gradient)


class _InsideRoot:
    """A step's objectives, which run as one forward pass of the root."""

    def __init__(self, objectives: Any, one: OneRank):
        self.__dict__.update(objectives=objectives, one=one)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objectives, name)

    def __call__(self, *batches: Any, **options: Any) -> dict[str, Tensor]:
        self.one.enter_root()
        values: dict[str, Tensor] = self.objectives(*batches, **options)
        self.one.leave_root(values)
        return values


class _Begin(torch.autograd.Function):
    """The inputs of a unit unchanged; the unit is reduced once the backward pass has their gradients."""

    @staticmethod
    def forward(ctx: Any, one: OneRank, unit: Unit, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.end = lambda: one.reduce(unit)
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.end()
        return (None, None, *gradients)


class _Exchange(torch.autograd.Function):
    """An all_to_all of tokens, of which as many come as go."""

    @staticmethod
    def forward(ctx: Any, one: OneRank, tokens: Tensor) -> Tensor:
        size = tokens.nbytes
        ctx.count = lambda: one._count_tokens(size)  # which must not keep the tokens
        ctx.count()
        return torch.empty_like(tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        ctx.count()
        return None, torch.empty_like(gradient)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
