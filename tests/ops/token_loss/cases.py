"""Cases of token_loss: random inputs with ignored labels and uneven weights, sizes, options, and the comparison."""

import importlib

import torch

from moe_unlearn.ops.token_loss import IGNORED, Formula, Operands
from moe_unlearn.testing import check_against_ref, in_layout
from tests.support.by_keyword import token_loss, token_loss_ref
from tests.support.impls import Impl

# the package re-exports the function under the name of its module
module = importlib.import_module("moe_unlearn.ops.token_loss")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = (F32, BF16, F16)
HEAD_OPTIONS = [{"logit_scale": 0.25}, {"logit_softcap": 2.0}, {"logit_scale": 3.0, "logit_softcap": 5.0}]
GRADIENTS = ("hidden_states", "lm_head", "bias", "token_weights")
# tokens, hidden and vocabulary that make several tiles in each direction, with tails; Triton's rows of bfloat16 are 16
# bytes long, and larger shapes take its interpreter minutes
SIZES = {"ref": (600, 24, 97), "cpu": (300, 64, 1301), "triton": (64, 24, 70)}


def make(tokens=600, hidden=24, vocabulary=97, *, kind="nll", dtype=F32, seed=0, weights=True) -> dict:
    """Return random inputs: a third of the labels ignored, uneven weights of which some are zero or negative."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 1 / 3] = IGNORED
    inputs = {
        "hidden_states": randn(tokens, hidden).to(dtype),
        # logits of about 1, for uce less: tokens then weigh alike, no single one decides the error of a sum
        "lm_head": (randn(vocabulary, hidden) / hidden**0.5 / (3 if kind == "uce" else 1)).to(dtype),
        "labels": labels,
        "bias": (randn(vocabulary) / 3).to(dtype),
        "kind": kind,
    }
    if weights:
        size = 0.5 + torch.rand(tokens, generator=generator)
        inputs["token_weights"] = randn(tokens).sign() * size * (randn(tokens) > -1)
    if kind == "kl":
        inputs["ref_hidden_states"] = (inputs["hidden_states"] + randn(tokens, hidden) / 2).to(dtype)
    return inputs


def inputs_of(impl: Impl, kind="nll", dtype=F32, **options) -> dict:
    """Return inputs of the size for an implementation, on its device."""
    return impl.moved(make(*SIZES[impl.kind], kind=kind, dtype=dtype, **options))


def uneven(inputs: dict) -> torch.Tensor:
    """Return upstream gradients that all differ."""
    return torch.linspace(-1.3, 0.9, len(inputs["labels"]), device=inputs["labels"].device)


def loss_and_gradients(impl: Impl, inputs: dict, names=GRADIENTS, upstream=None, **options):
    """Return the loss and the gradients of the inputs that are named and there, under uneven upstream gradients."""
    leaves = {k: inputs[k].detach().clone().requires_grad_() for k in names if inputs.get(k) is not None}
    loss = token_loss(**inputs | leaves, impl=impl.name, **options)
    return loss.detach(), torch.autograd.grad(
        loss, list(leaves.values()), uneven(inputs) if upstream is None else upstream
    )


def check(impl: Impl, inputs: dict, *, gradients=GRADIENTS, layout="contiguous", **options) -> None:
    """Assert by the criterion that loss and gradients are as accurate as the reference's.

    Hidden states and head are given transposed, and their gradients taken as one row each: the rounding of one token's
    loss scales all of that token's gradient, so a row of the criterion must hold many tokens, or two correct results
    differ by chance.
    """
    shapes = {k: inputs[k].t().shape for k in ("hidden_states", "lm_head")}
    inputs = {k: v.t().flatten() if k in shapes else v for k, v in inputs.items()}
    inputs = {k: in_layout(v, layout) if torch.is_tensor(v) else v for k, v in inputs.items()}

    def on_rows(function, **fixed):
        def call(hidden_states, lm_head, **rest):
            h, head = hidden_states.view(shapes["hidden_states"]).t(), lm_head.view(shapes["lm_head"]).t()
            return function(h, head, **rest, **fixed)

        return call

    op = on_rows(token_loss, impl=impl.name, **options)
    check_against_ref(op, on_rows(token_loss_ref), inputs, gradients=gradients, gradient_layout=layout)


def dropped_rows(inputs: dict) -> torch.Tensor:
    """Return which rows count for nothing."""
    return (inputs["labels"] == IGNORED) | (inputs["token_weights"] == 0)


def one_hot(tokens, hidden, vocabulary, dtype=F32):
    """Return inputs in which one logit of each row is 400 and the others 0, and the exact (dz, loss, h, head) of them.

    The softmax is exactly one-hot, so that every gradient is a sum of integers.
    """
    generator = torch.Generator().manual_seed(0)
    hot = torch.randint(0, min(hidden, vocabulary), (tokens,), generator=generator)
    h, head = 4 * torch.eye(hidden)[hot], 100 * torch.eye(vocabulary, hidden)
    labels = torch.arange(tokens) % vocabulary
    labels[::3] = hot[::3]
    dz = torch.nn.functional.one_hot(hot, vocabulary) - torch.nn.functional.one_hot(labels, vocabulary)
    inputs = {"hidden_states": h.to(dtype), "lm_head": head.to(dtype), "labels": labels}
    return inputs, (dz, torch.where(hot == labels, 0.0, 400.0), h, head)


def small_workspace(monkeypatch, size=160 * 97) -> None:
    """Give the reference tiles of a few columns, so that every path over tiles is taken."""
    monkeypatch.setattr(module, "WORKSPACE_BYTES", size)


def check_opcheck_and_one_graph(inputs: dict, formula: Formula) -> None:
    """Assert that opcheck accepts the op, and that it compiles as one graph with the gradients of eager mode."""
    h, w, b, weights = leaves = [inputs[name].requires_grad_() for name in GRADIENTS]
    operands = Operands(h, w, inputs["labels"], b, weights, inputs.get("ref_hidden_states"), None)
    torch.library.opcheck(torch.ops.moe_unlearn.token_loss.default, (*operands, *formula, "auto", False, False))
    compiled = torch.compile(lambda: token_loss(**inputs).square().sum(), fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(token_loss(**inputs).square().sum(), leaves)
    for found, expected in zip(torch.autograd.grad(compiled(), leaves), eager, strict=True):
        assert torch.equal(found, expected)
