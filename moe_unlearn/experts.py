"""The transformers experts implementation named "moe_unlearn".

Importing this module registers it; then any of these uses it:

    AutoModelForCausalLM.from_pretrained(..., experts_implementation="moe_unlearn")
    model.set_experts_implementation("moe_unlearn")
    with moe_unlearn.enable(model): ...

The implementation reads the layout flags of the experts module (transposed, interleaved, bias, gate), never a model's
name. It never guesses an activation from attributes: it calls the module's own function once on a fixed probe and
compares the result with the known formulas. Modules that it cannot compute go to transformers' "grouped_mm" with
one warning: those with an unknown gate, a gate with parameters, a norm after each expert or quantised weights.

Per-step inputs (token groups, tilt, the sink of gradients) live in one `StepInputs` on each experts module, which
`step_inputs` sets and clears.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8ExpertsInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from moe_unlearn.expert_adapters import Aside
from moe_unlearn.expert_state import State, StepInputs, not_computable, probe, whole
from moe_unlearn.ops.expert_mlp import expert_mlp
from moe_unlearn.ops.gate import ExpertLayout, ExpertWeights
from moe_unlearn.ops.low_rank import LowRank, is_grouped, low_rank_mlp
from moe_unlearn.ops.route import Routing, route
from moe_unlearn.ops.sink import GradientSink, OfOnePass

NAME = "moe_unlearn"
_FALLBACK = "grouped_mm"
_ATTRIBUTE = "_moe_unlearn"


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the experts modules by name, in the order of `named_modules`; empty for a model without any.

    Experts modules are those that transformers decorates: they carry its layout flags. Wrappers around them (PEFT)
    do not count.
    """
    return {name: module for name, module in model.named_modules() if weights_of(module)}


def weights_of(module: Any) -> tuple[str, ...]:
    """Return the names of an experts module's two weights [E, ...]; empty for any other module."""
    flags = {"is_transposed", "is_concatenated", "has_gate"}
    if not flags <= vars(module).keys():
        return ()
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def is_parallel(module: nn.Module) -> bool:
    """Return whether transformers has shared out the experts of a layer over ranks."""
    return getattr(module, "_is_expert_parallel", False)


def total_experts(module: Any) -> int:
    """Return the number of a layer's experts on all ranks; `num_experts` are those of this rank's forward pass."""
    count: int = len(module.down_proj) if is_parallel(module) else module.num_experts
    return count


def copy_gate(source: nn.Module, target: nn.Module) -> None:
    """Copy the gate of `source` to `target`, a copy of that experts module whose values cannot be read."""
    if _ATTRIBUTE not in target.__dict__:
        target.__dict__[_ATTRIBUTE] = probe(source)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the experts' output [T, H] from hidden states [T, H], indices and weights [T, K].

    Arguments and result are those of transformers' experts implementations.

    Ids outside [0, num_experts) mean "this expert is not here" and contribute nothing, whatever their weight.
    """
    state = _state(self)
    up = self.gate_up_proj if self.has_gate else self.up_proj
    routing = _counted_routing(self, state, top_k_index)
    if reason := state.reason or not_computable(up):
        _warn_once(self, state, reason)
        fallback: Tensor = ALL_EXPERTS_FUNCTIONS[_FALLBACK](self, hidden_states, top_k_index, top_k_weights)
        return fallback
    if routing is None:
        routing = route(top_k_index, self.num_experts)
    biases: tuple[Tensor | None, Tensor | None] = (None, None)
    if self.has_bias:
        biases = (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias, self.down_proj_bias)
    operands = ExpertWeights(whole(up), whole(self.down_proj), *biases)
    layout = _layout(self, state)
    if state.low_rank:
        changes = [state.low_rank.get(name) for name in ("gate_up_proj" if self.has_gate else "up_proj", "down_proj")]
        routed = hidden_states, top_k_weights, routing.sorted_rows, routing.expert_offsets
        return low_rank_mlp(*routed, operands, *changes, layout=layout)
    operands, sink = _sink(self, state.inputs, operands)
    trained = None
    if sink is not None and not (hidden_states.requires_grad or top_k_weights.requires_grad):
        trained = sink.trained_slices(_trained(operands))
    return expert_mlp(
        hidden_states,
        top_k_weights,
        routing.sorted_rows,
        routing.expert_offsets,
        operands,
        layout=layout,
        trained_experts=trained,
        sink=None if sink is None else sink.take,
        bounded=sink is not None and sink.bounded,
    )


def layout_of(module: nn.Module) -> ExpertLayout:
    """Return activation and layout of an experts module; ValueError, with the reason, if they cannot be computed."""
    state = _state(module)
    if state.gate is None:
        raise ValueError(f"{type(module).__name__} has experts that are not computed here: {state.reason}")
    return _layout(module, state)


def _layout(module: Any, state: State) -> ExpertLayout:
    assert state.gate is not None
    return ExpertLayout(state.gate, module.is_transposed, state.interleaved, module.has_gate)


def _trained(operands: ExpertWeights) -> list[Tensor]:
    return [w for w in operands if w is not None and w.requires_grad]


def _sink(module: Any, inputs: StepInputs | None, operands: ExpertWeights) -> tuple[ExpertWeights, GradientSink | None]:
    """Return the weights of a forward pass, and the sink that takes their gradients; None if they go to the weights.

    Weights that are computed from others need gradients of their own, so that they get no sink.
    """
    sink = None if inputs is None else inputs.weight_gradients
    if inputs is None or sink is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return operands, None
    weights = operands
    if inputs.owners is not None:
        weights, owner = _owned(module, inputs.owners, operands)
        sink = OfOnePass(sink, owner)
    trained = _trained(weights)
    if not trained or not all(w.is_leaf for w in trained):
        return operands, None
    if not _recomputing():
        for weight in trained:
            sink.enter(weight)
    return weights, sink


def _owned(
    module: Any, owners: Mapping[str, Tensor], operands: ExpertWeights
) -> tuple[ExpertWeights, dict[Tensor, Tensor]]:
    """Return the weights of a forward pass, made leaves where they are parts of their owners, and whose each is."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    leaves, owner = list(operands), {}
    for i, name in enumerate((up, "down_proj", f"{up}_bias", "down_proj_bias")):
        weight, own = operands[i], owners.get(name)
        if weight is None or own is None:
            continue
        # expert parallelism makes local tensors of its parameters for each pass; that which an adapter makes is no part
        if is_parallel(module) and own.requires_grad and not weight.is_leaf:
            weight = leaves[i] = weight.detach().requires_grad_()
        owner[weight] = own
    return ExpertWeights._make(leaves), owner


def fp8_experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute transformers' FP8 experts, which dispatch on functions of their own, under the same contract."""
    state = _state(self)
    _counted_routing(self, state, top_k_index)
    _warn_once(self, state, state.reason or "its weights are quantised")
    output: Tensor = ALL_FP8_EXPERTS_FUNCTIONS[_FALLBACK](self, hidden_states, top_k_index, top_k_weights)
    return output


def _counted_routing(module: Any, state: State, top_k_index: Tensor) -> Routing | None:
    """Route the tokens and add to the counters of the step's inputs; None if there is nothing to count."""
    if state.inputs is None or is_parallel(module) or _recomputing():
        return None
    return _counted(module.num_experts, state.inputs, top_k_index)


def _count_all(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Count before the tokens of an expert-parallel layer go to other ranks, with the ids of all experts."""
    inputs = _state(module).inputs
    if inputs is not None and not _recomputing():
        _counted(total_experts(module), inputs, kwargs["top_k_index"] if "top_k_index" in kwargs else args[1])


def _counted(num_experts: int, inputs: StepInputs, top_k_index: Tensor) -> Routing:
    routing = route(
        top_k_index,
        num_experts,
        group=inputs.group,
        num_groups=inputs.num_groups,
        log_tilt=inputs.log_tilt,
        log_weight=inputs.log_weight,
    )
    if inputs.tokens_per_expert is not None:
        inputs.tokens_per_expert += routing.tokens_per_expert
    return routing


ExpertsInterface.register(NAME, experts_forward)
FP8ExpertsInterface.register(NAME, fp8_experts_forward)


def check_model(model: object) -> None:
    """Raise TypeError, which says how a model is loaded, for what is no torch module."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch module, as AutoModelForCausalLM.from_pretrained(FOLDER) gives; got "
            f"{type(model).__name__}"
        )


class enable:  # noqa: N801 -- used like a function
    """Switch a model's experts to "moe_unlearn"; idempotent, undone by `.disable()` or as a context manager.

    The gates are probed here, so that the model may be compiled right away. Raises TypeError for what is no model, and
    ValueError for a model without decorated experts modules.
    """

    def __init__(self, model: nn.Module):
        check_model(model)
        modules: dict[str, Any] = experts_modules(model)
        if not modules:
            raise ValueError(_no_experts(model))
        # each module dispatches on its config, which the parts of a model may or may not share
        configs = {id(m.config): m.config for m in modules.values()}
        # the internal field, since the public setter would overwrite the choice of sub-configs too
        self._previous = [(c, c._experts_implementation_internal) for c in configs.values()]
        for config in configs.values():
            config._experts_implementation_internal = NAME
        for module in modules.values():
            if not module.down_proj.is_meta:
                _state(module)
        self._aside = Aside(model, _low_rank_of)

    def disable(self) -> None:
        """Restore the implementation each part had before; a second call changes nothing more."""
        for config, implementation in self._previous:
            config._experts_implementation_internal = implementation
        self._previous = []
        self._aside.undo()

    @property
    def enabled(self) -> bool:
        """Return whether `disable` has not been called."""
        return len(self._previous) > 0

    def __enter__(self) -> "enable":
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()


def _no_experts(model: nn.Module) -> str:
    classes = {type(m).__name__ for m in model.modules()}
    similar = sorted(c for c in classes if "expert" in c.lower() or c.lower().endswith(("moe", "moeblock")))
    return (
        f"{type(model).__name__} has no Mixture-of-Experts layers that transformers {transformers.__version__} "
        f"decorates (@use_experts_implementation); similar classes found: {', '.join(similar) or 'none'}. "
        "Families that work: OLMoE, Qwen2-MoE, Qwen3-MoE, Mixtral, DeepSeek-V2/V3, gpt-oss, GraniteMoE, PhiMoE, "
        "Nemotron-H and every other with an experts implementation"
    )


@contextlib.contextmanager
def step_inputs(
    model: nn.Module,
    *,
    group: Tensor | None = None,
    num_groups: int = 1,
    log_tilt: Tensor | None = None,
    log_weight: Tensor | None = None,
    tokens_per_expert: Tensor | Sequence[Tensor] | None = None,
    weight_gradients: GradientSink | None = None,
) -> Iterator[None]:
    """Set the inputs of every experts module for the passes inside, and restore the previous ones afterwards.

    log_tilt [L, E] and tokens_per_expert [L, G, E] belong to the layers in the order of `experts_modules`; all layers
    share group [T], log_weight [T] and weight_gradients. See `StepInputs`.

    The backward pass may run inside. It must run inside where weight_gradients meets gradient checkpointing, since the
    recompute reads it. Where it is missing, that of an enclosing `step_inputs` stays in force. Raises ValueError if an
    argument has not one entry per layer.
    """
    modules = experts_modules(model)
    states = [_state(module) for module in modules.values()]
    by_layer = {"log_tilt": log_tilt, "tokens_per_expert": tokens_per_expert}
    for name, value in by_layer.items():
        if value is not None and len(value) != len(states):
            raise ValueError(f"{name} must have one entry for each of {len(states)} MoE layers; got {len(value)}")
    previous = [state.inputs for state in states]
    made = []
    for layer, (module, before) in enumerate(zip(modules, previous, strict=True)):
        own = {name: None if value is None else value[layer] for name, value in by_layer.items()}
        sink = before.weight_gradients if weight_gradients is None and before is not None else weight_gradients
        owned = None if sink is None or sink.owners is None else sink.owners[module]
        made.append(StepInputs(group, num_groups, **own, log_weight=log_weight, weight_gradients=sink, owners=owned))
    try:
        for state, inputs in zip(states, made, strict=True):
            state.inputs = inputs
        yield
    finally:
        for state, before in zip(states, previous, strict=True):
            state.inputs = before


def _recomputing() -> bool:
    """Return whether this runs inside a backward pass, where only a gradient checkpoint calls a forward."""
    # the compiler decides what to recompute at compile time, and compiled code never runs this again
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _warn_once(module: nn.Module, state: State, reason: str) -> None:
    if not state.warned:
        state.warned = True
        # all layers warn from this one place: Python shows equal warnings from one place once
        warnings.warn(
            f"{type(module).__name__}: {reason}; its experts run on {_FALLBACK!r} instead of {NAME!r}",
            stacklevel=2,
        )


def _low_rank_of(module: Any, weight: Tensor) -> dict[str, LowRank] | None:
    """Return where an experts module takes the factors of an adapter on `weight`; None where it computes with the sum.

    The weight must be frozen, whole, and one with which torch multiplies the rows of all experts at once.
    """
    if module.config._experts_implementation != NAME or is_parallel(module) or weight.requires_grad:
        return None
    state = _state(module)
    taken = not state.reason and not not_computable(weight) and is_grouped(weight)
    return state.low_rank if taken else None


def _state(module: nn.Module) -> State:
    state: State | None = module.__dict__.get(_ATTRIBUTE)
    return _new_state(module) if state is None else state


@torch.compiler.disable(
    reason="call moe_unlearn.enable(model), or the model itself once, before compiling: gates are probed then"
)
def _new_state(module: nn.Module) -> State:
    module.__dict__[_ATTRIBUTE] = state = probe(module)
    if is_parallel(module):
        module.register_forward_pre_hook(_count_all, with_kwargs=True)
    return state
