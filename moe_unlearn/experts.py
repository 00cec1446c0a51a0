"""The transformers experts implementation named "moe_unlearn".

Importing this module registers it; then any of these uses it:

    AutoModelForCausalLM.from_pretrained(..., experts_implementation="moe_unlearn")
    model.set_experts_implementation("moe_unlearn")
    with moe_unlearn.enable(model): ...

It reads the layout flags of the experts module (transposed, interleaved, bias, gate), never a model's name,
and an activation is never guessed from attributes: the module's own function is called once on a fixed probe
and compared with the known formulas. What it does not compute itself (an unknown gate, a norm after the
experts, weights that are not floating point) goes to transformers' "grouped_mm" with one warning.

Per-step inputs (token groups, tilt) live in one `StepInputs` on each experts module, set and cleared by
`step_inputs`.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from moe_unlearn.ops.expert_mlp import Gate, activate, expert_mlp
from moe_unlearn.ops.route import route

NAME = "moe_unlearn"
_ATTRIBUTE = "_moe_unlearn"
_FALLBACK = "grouped_mm"


@dataclass
class StepInputs:
    """Inputs of one step for one layer; all tensors or plain numbers.

    `group` [T] and `tokens_per_expert` [G, E] (int64, added to) count tokens of each group; `log_tilt` [E]
    is added up over a token's experts into `log_weight` [T]. `armed` is switched off before the backward, so
    that a gradient checkpoint's recompute counts nothing twice.
    """

    group: Tensor | None = None
    num_groups: int = 1
    log_tilt: Tensor | None = None
    log_weight: Tensor | None = None
    tokens_per_expert: Tensor | None = None
    armed: bool = True


@dataclass
class _State:
    """What lives on an experts module: the probed gate, and the inputs of the current step."""

    gate: Gate | None
    inputs: StepInputs | None = None


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> experts module, in the order of `named_modules`; empty for a model without any.

    Experts modules are those transformers decorates: they carry `is_transposed` and `down_proj`.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "is_transposed") and hasattr(module, "down_proj")
    }


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """transformers' experts contract: hidden states [T, H], indices and weights [T, K] -> [T, H]."""
    state = _state(self)
    inputs = state.inputs if state.inputs is not None and state.inputs.armed else None
    routing = route(
        top_k_index,
        self.num_experts,
        group=None if inputs is None else inputs.group,
        num_groups=1 if inputs is None else inputs.num_groups,
        log_tilt=None if inputs is None else inputs.log_tilt,
        log_weight=None if inputs is None else inputs.log_weight,
    )
    if inputs is not None and inputs.tokens_per_expert is not None:
        inputs.tokens_per_expert += routing.tokens_per_expert
    if state.gate is None:
        return ALL_EXPERTS_FUNCTIONS[_FALLBACK](self, hidden_states, top_k_index, top_k_weights)
    up = self.gate_up_proj if self.has_gate else self.up_proj
    biases = (None, None)
    if self.has_bias:
        biases = (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias, self.down_proj_bias)
    return expert_mlp(
        hidden_states,
        top_k_weights,
        routing.sorted_rows,
        routing.expert_offsets,
        up,
        self.down_proj,
        *biases,
        gate=state.gate,
        transposed=self.is_transposed,
        interleaved=not getattr(self, "is_concatenated", True),
        gated=self.has_gate,
    )


ExpertsInterface.register(NAME, experts_forward)


class enable:  # noqa: N801 -- used like a function
    """Switch a model's experts to "moe_unlearn"; idempotent, undone by `.disable()` or as a context manager.

    Raises ValueError for a model without decorated experts modules.
    """

    def __init__(self, model: nn.Module):
        modules = experts_modules(model)
        if not modules:
            raise ValueError(
                f"{type(model).__name__} has no Mixture-of-Experts layers that transformers decorates; families "
                "that work: OLMoE, Qwen2-MoE, Qwen3-MoE, Mixtral, DeepSeek-V2/V3, gpt-oss, GraniteMoE, PhiMoE "
                "and every other with an experts implementation"
            )
        # each module dispatches on its own config, which sub-models share or have for themselves
        configs = {id(m.config): m.config for m in modules.values()}
        self._previous = [(c, getattr(c, "_experts_implementation", None)) for c in configs.values()]
        for config in configs.values():
            config._experts_implementation = NAME

    def disable(self) -> None:
        """Restore the implementation each part had before."""
        for config, implementation in self._previous:
            config._experts_implementation = implementation

    def __enter__(self) -> "enable":
        return self

    def __exit__(self, *exception) -> None:
        self.disable()


@contextlib.contextmanager
def step_inputs(
    model: nn.Module,
    *,
    group: Tensor | None = None,
    num_groups: int = 1,
    log_tilt: Tensor | None = None,
    log_weight: Tensor | None = None,
    tokens_per_expert: Tensor | None = None,
) -> Iterator[list[StepInputs]]:
    """Give every experts module its inputs for the forward passes inside, and take them back at the end.

    log_tilt [L, E] and tokens_per_expert [L, G, E] are split by layer (order of `experts_modules`); group
    and log_weight [T] are shared by the layers. Leave the context before `backward()`.
    """
    modules = list(experts_modules(model).values())
    made = []
    try:
        for layer, module in enumerate(modules):
            inputs = StepInputs(
                group=group,
                num_groups=num_groups,
                log_tilt=None if log_tilt is None else log_tilt[layer],
                log_weight=log_weight,
                tokens_per_expert=None if tokens_per_expert is None else tokens_per_expert[layer],
            )
            _state(module).inputs = inputs
            made.append(inputs)
        yield made
    finally:
        for inputs in made:
            inputs.armed = False
        for module in modules[: len(made)]:
            _state(module).inputs = None


def _state(module: nn.Module) -> _State:
    state = module.__dict__.get(_ATTRIBUTE)
    if state is None:
        gate, reason = _probe(module)
        if gate is None:
            warnings.warn(
                f"{type(module).__name__}: {reason}; its experts run on {_FALLBACK!r} instead of {NAME!r}",
                stacklevel=3,
            )
        state = module.__dict__[_ATTRIBUTE] = _State(gate)
    return state


@torch.no_grad()
def _probe(module: nn.Module) -> tuple[Gate | None, str]:
    """The module's gate, or None and the reason it cannot be computed here."""
    if getattr(module, "has_post_expert_norm", False):
        return None, "it normalises after each expert"
    if not module.down_proj.is_floating_point():
        return None, f"its weights are {module.down_proj.dtype}"
    interleaved = not getattr(module, "is_concatenated", True)
    function = module._apply_gate if module.has_gate else module.act_fn
    # both signs, both sides of every limit in use, zero, and no two columns alike
    values = torch.linspace(-12, 12, 49)
    probe = torch.stack([values, values.roll(17)], -1 if interleaved else 0)
    probe = probe.reshape(1, -1) if module.has_gate else values[None]
    probe = probe.to(module.down_proj.device)
    try:
        expected = function(probe.clone())
    except Exception as error:  # a foreign function may fail in any way on the probe
        return None, f"its activation fails on a probe ({error})"
    for gate in _candidates(module):
        ours = activate(probe, gate, interleaved, module.has_gate)
        if ours.shape == expected.shape and torch.allclose(ours, expected, rtol=1e-5, atol=1e-6):
            return gate, ""
    return None, "its activation is none of the known formulas"


def _candidates(module: nn.Module) -> Iterator[Gate]:
    """Gates to compare with; a module's attributes only supply numbers to try."""
    for activation in ("silu", "gelu", "gelu_tanh", "relu", "relu2"):
        yield Gate(activation)
    attributes = [getattr(module, n, None) for n in ("alpha", "swiglu_alpha", "limit", "swiglu_limit")]
    numbers = {float(v) for v in attributes if isinstance(v, (int, float)) and not isinstance(v, bool)}
    for limit in sorted({7.0, math.inf} | numbers):
        for alpha in sorted({1.0, 1.702} | numbers):
            for shift in (0.0, 1.0):
                if limit > 0:
                    yield Gate("silu", alpha, limit, shift)
