"""No gradient of an expert weight is lost where a forward pass sees another tensor than the optimizer has."""

from unittest import mock

import pytest
import torch

from moe_unlearn.experts import enable, experts_modules, step_inputs
from moe_unlearn.model.batches import checked
from moe_unlearn.optim import MaskedSGD
from moe_unlearn.step.gradients import GradientStore
from moe_unlearn.step.sinks import CompactSink
from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB, data

pytestmark = pytest.mark.quick


def seeing(module, made, compiling):
    """Have each pass of an experts module see tensors that are `made` of its parameters, as a compiler does if so."""
    forward = module.forward

    def run(*args):
        own = dict(module._parameters)
        module._parameters.update({name: made(p) for name, p in own.items()})
        try:
            with mock.patch("torch.compiler.is_compiling", return_value=compiling):
                return forward(*args)
        finally:
            module._parameters.update(own)

    module.forward = run


def local(p):
    """Return what transformers' expert parallelism puts in place of a parameter: a part, computed for each pass."""
    return p.view_as(p)


def gathered(p):
    """Return what FSDP2 puts in place of a parameter: a leaf of its own, of which only its hooks know the parameter."""
    return p.detach().requires_grad_()


def gradients(made=None, *, owners=True, compiling=False, reentrant=None, lost=()):
    """The gradients of the expert weights of a small model, by name; `lost` are missing in the table of owners."""
    torch.manual_seed(0)
    model = tiny_olmoe(VOCAB).eval()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
    layers = experts_modules(model)
    for module in layers.values() if made else ():
        module._is_expert_parallel = made is local
        seeing(module, made, compiling)
    enable(model)
    store = GradientStore(MaskedSGD(model.parameters(), lr=0.1))
    store.begin(list(model.named_parameters()), {})
    sink = CompactSink(store)
    if made and owners:
        sink.owners = {
            name: {key: p for key, p in module.named_parameters() if key not in lost} for name, module in layers.items()
        }
    batch = checked(data()[0][0], "forget")
    with step_inputs(model, weight_gradients=sink):
        inputs = {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"]).requires_grad_()}
        model(**inputs, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss.backward()
    weights = {f"{name}.{key}": p for name, module in layers.items() for key, p in module.named_parameters()}
    return {name: store.of(p) for name, p in weights.items()}


WAYS = {
    "its parts": {"made": local},
    "its parts, compiled": {"made": local, "compiling": True},
    "its parts, checkpointed": {"made": local, "reentrant": False},
    "its parts, checkpointed from within": {"made": local, "reentrant": True},
    "its parts, without a table": {"made": local, "owners": False},
    "its parts, one without an owner": {"made": local, "lost": ("down_proj",)},
    "gathered": {"made": gathered},
    "gathered, checkpointed": {"made": gathered, "reentrant": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_gradient_comes_to_the_parameter_that_owns_the_weight(way):
    expected, ours = gradients(), gradients(**WAYS[way])
    assert ours.keys() == expected.keys() and len(ours) == 4
    for name, value in expected.items():
        assert ours[name] is not None and value.any(), name
        torch.testing.assert_close(ours[name], value, msg=name)


@pytest.mark.parametrize("table", [{"owners": False}, {"lost": ("down_proj",)}])
@pytest.mark.parametrize("checkpointed", [{}, {"reentrant": False}])
def test_a_gradient_without_an_owner_is_an_error_and_never_dropped(table, checkpointed):
    with pytest.raises(RuntimeError, match="that is no parameter of the step"):
        gradients(gathered, **table, **checkpointed)
