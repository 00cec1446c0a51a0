"""Ops that `custom_op` defines mean what those of torch.library.custom_op mean, and run little Python around a call."""

import sys

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from moe_unlearn.ops.custom import custom_op

GRAD_MODES = []


@custom_op("moe_unlearn::test_double", mutates_args={"out", "spare"})
def double(x: Tensor, out: Tensor, spare: Tensor | None) -> None:
    out.data.copy_(2 * x)  # as a kernel writes, whom no version counts


@custom_op("moe_unlearn::test_triple")
def triple(x: Tensor, factor: float) -> Tensor:
    GRAD_MODES.append(torch.is_grad_enabled())
    return 3 * x * factor


@custom_op("moe_unlearn::test_square", schema="(Tensor x) -> Tensor")
def square(x):
    return x * x


double.register_fake(lambda x, out, spare: None)
triple.register_fake(lambda x, factor: torch.empty_like(x))
square.register_fake(torch.empty_like)
square.register_autograd(
    lambda ctx, grad: 2 * ctx.saved_tensors[0] * grad,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def test_torch_finds_nothing_wrong_with_them():
    x = torch.randn(3)
    opcheck(torch.ops.moe_unlearn.test_double.default, (x, torch.zeros(3), None))
    opcheck(torch.ops.moe_unlearn.test_triple.default, (x, 1.0))
    opcheck(torch.ops.moe_unlearn.test_square.default, (x.clone().requires_grad_(),))


@pytest.mark.parametrize("trained", [False, True])
def test_a_change_in_place_counts_in_the_version(trained):
    """Also of a leaf that trains, which an optimizer changes; what autograd saved of it is then refused."""
    x, out, spare = torch.ones(3), torch.zeros(3, requires_grad=trained), torch.zeros(3)
    kept = (out * torch.ones(3, requires_grad=True)).sum()
    before = out._version
    double(x, out, spare)
    assert out.tolist() == [2, 2, 2] and out._version == before + 1 and spare._version == 1 and x._version == 0
    assert out.is_leaf and out.requires_grad == trained
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_what_has_no_version_is_changed_too():
    with torch.inference_mode():
        out = torch.zeros(3)
        double(torch.ones(3), out, None)
    assert out.tolist() == [2, 2, 2]


def test_a_gradient_flows_or_is_an_error():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    square(x).sum().backward()
    assert x.grad.tolist() == [2, 4]
    GRAD_MODES.clear()
    result = triple(x, 2.0)
    assert result.tolist() == [6, 12] and GRAD_MODES == [False]
    with pytest.raises(RuntimeError, match="no gradient flows through moe_unlearn::test_triple"):
        result.sum().backward()


def test_a_compiled_function_calls_the_op_whole():
    def changed(x):
        out = torch.zeros_like(x)
        double(x, out, None)
        return out + triple(x, 1.0)

    compiled = torch.compile(changed, fullgraph=True, backend="aot_eager")
    assert compiled(torch.ones(2)).tolist() == [5, 5]


@pytest.mark.parametrize("call", [lambda x: double(x, x, None), lambda x: triple(x, 1.0)], ids=["changes", "returns"])
def test_a_call_runs_little_python(call):
    """With torch.library.custom_op it is 49 functions for the first, and more for more operands."""
    x, calls = torch.ones(2), 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    call(x)
    sys.setprofile(count)
    try:
        call(x)
    finally:
        sys.setprofile(None)
    assert calls <= 20
