"""token_loss against its reference and finite differences; what is dropped and what is never made."""

import importlib
import itertools

import pytest
import torch

from moe_unlearn import backend
from moe_unlearn.ops.token_loss import IGNORED, KINDS, Formula, Operands
from moe_unlearn.testing import LAYOUTS, check_against_ref, in_layout, integers, poison
from tests.support.by_keyword import token_loss, token_loss_ref

# the package re-exports the function under the name of its module
module = importlib.import_module("moe_unlearn.ops.token_loss")
IMPLS = [impl for impl in ("ref", "cpu") if backend.has("token_loss", impl, "cpu")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD_OPTIONS = [{"logit_scale": 0.25}, {"logit_softcap": 2.0}, {"logit_scale": 3.0, "logit_softcap": 5.0}]
GRADIENTS = ("hidden_states", "lm_head", "bias", "token_weights")


def check(inputs, impl, *, gradients=GRADIENTS, layout="contiguous", **options):
    """`check_against_ref` with hidden states and head transposed and their gradients as one row each.

    The rounding of one token's loss scales all of that token's gradient: a row of the criterion must hold
    many tokens, or two correct results differ by chance.
    """
    shapes = {k: inputs[k].t().shape for k in ("hidden_states", "lm_head")}
    inputs = {k: v.t().flatten() if k in shapes else v for k, v in inputs.items()}
    inputs = {k: in_layout(v, layout) if torch.is_tensor(v) else v for k, v in inputs.items()}

    def on_rows(function, **fixed):
        def call(hidden_states, lm_head, **rest):
            h, head = hidden_states.view(shapes["hidden_states"]).t(), lm_head.view(shapes["lm_head"]).t()
            return function(h, head, **rest, **fixed)

        return call

    op = on_rows(token_loss, impl=impl, **options)
    check_against_ref(op, on_rows(token_loss_ref), inputs, gradients=gradients, gradient_layout=layout)


def make(tokens=600, hidden=24, vocabulary=97, *, kind="nll", dtype=torch.float32, seed=0, weights=True):
    """Random inputs: a third of the labels ignored, uneven weights of which some are zero or negative."""
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


def small_workspace(monkeypatch, size=160 * 97):
    """Tiles of a few columns, so that every path over tiles is taken."""
    monkeypatch.setattr(module, "WORKSPACE_BYTES", size)


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiled", [False, True])
def test_value_and_gradients(tiled, dtype, kind, impl, monkeypatch):
    if tiled:
        small_workspace(monkeypatch)
    check(make(kind=kind, dtype=dtype), impl, chunk_rows=50 if tiled else None)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", HEAD_OPTIONS, ids=str)
def test_scale_and_softcap(options, kind, impl, monkeypatch):
    small_workspace(monkeypatch)
    check(make(kind=kind) | options, impl, chunk_rows=50)


@pytest.mark.quick
@pytest.mark.parametrize("options", [{}, {"logit_scale": 3.0, "logit_softcap": 5.0}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences(kind, options):
    inputs = make(4, 3, 5, kind=kind, dtype=torch.float64)
    inputs["token_weights"] = inputs["token_weights"].double() + 2
    names = GRADIENTS
    if kind == "kl":
        # the reference is a constant; numerically it would follow a head and bias that are shared with it
        inputs |= {"ref_lm_head": inputs["lm_head"].clone(), "bias": None}
        names = [name for name in GRADIENTS if name != "bias"]
    leaves = {k: inputs.pop(k).requires_grad_() for k in names}

    def function(*values):
        return token_loss(**dict(zip(leaves, values, strict=True)), **inputs, **options)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_formulas_of_the_docstring(kind):
    """Loss and dl/dz by hand, with an identity head so that hidden states are logits."""
    inputs = make(6, 9, 9, kind=kind, dtype=torch.float64, weights=False)
    labels = torch.tensor([3, 1, 8, 0, 0, 5])
    inputs |= {"lm_head": torch.eye(9, dtype=torch.float64), "bias": None, "labels": labels}
    h = inputs["hidden_states"].requires_grad_()
    p = torch.softmax(h.detach(), 1)
    onehot = torch.nn.functional.one_hot(inputs["labels"], 9)
    py = (p * onehot).sum(1)
    loss = token_loss(**inputs)
    loss.sum().backward()
    if kind == "nll":
        expected, slope = -py.log(), p - onehot
    elif kind == "uce":
        expected, slope = -(1 - py / 2).log(), (py / (2 - py))[:, None] * (onehot - p)
        target_slope = (h.grad * onehot).sum(1)
        torch.testing.assert_close(target_slope, py * (1 - py) / (2 - py))
        assert (loss < torch.log(torch.tensor(2.0))).all()
    else:
        q = torch.softmax(inputs["ref_hidden_states"], 1)
        expected, slope = (q * (q.log() - p.log())).sum(1), p - q
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(h.grad, slope)


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_dropped_rows_are_exactly_zero_whatever_they_hold(kind, impl):
    inputs = make(kind=kind)
    dropped = (inputs["labels"] == IGNORED) | (inputs["token_weights"] == 0)
    assert 120 < dropped.sum() < 480
    clean = {k: v.clone().requires_grad_() if k in GRADIENTS[:3] else v for k, v in inputs.items()}
    dirty = {k: v.detach().clone() if torch.is_tensor(v) else v for k, v in inputs.items()}
    dirty["hidden_states"][dropped] = torch.nan
    dirty["token_weights"][inputs["labels"] == IGNORED] = torch.nan
    if kind == "kl":
        dirty["ref_hidden_states"][dropped] = torch.inf
    else:
        # with weight 0 even a label out of range is not read
        dirty["labels"][dropped & (inputs["labels"] != IGNORED)] = 10**9
    dirty = {k: v.requires_grad_() if k in GRADIENTS[:3] else v for k, v in dirty.items()}
    upstream = torch.randn(600, generator=torch.Generator().manual_seed(1))
    losses, grads = [], []
    for leaves, up in ((clean, upstream), (dirty, torch.where(dropped, torch.nan, upstream))):
        losses.append(token_loss(**leaves, impl=impl))
        grads.append(torch.autograd.grad(losses[-1], [leaves[k] for k in GRADIENTS[:3]], up))
    assert torch.equal(losses[0], losses[1]) and not losses[1][dropped].any() and losses[1][~dropped].all()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert not grads[1][0][dropped].any()


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_need_a_gradient_keep_their_zero_rows(kind):
    inputs = make(kind=kind)
    weights = inputs["token_weights"].requires_grad_()
    token_loss(**inputs).sum().backward()
    unweighted = token_loss(**(inputs | {"token_weights": None}))
    assert torch.equal(weights.grad, unweighted)
    assert weights.grad[(weights == 0) & (inputs["labels"] != IGNORED)].all()


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needed", [c for n in (1, 2) for c in itertools.combinations(GRADIENTS, n)], ids=str)
def test_only_the_gradients_needed(needed, impl):
    inputs = make()
    # weights that need a gradient keep more rows, and with them another order of sums
    weighted = [*GRADIENTS[:3], *(["token_weights"] if "token_weights" in needed else [])]
    everything = {k: v.clone().requires_grad_() if k in weighted else v for k, v in inputs.items()}
    some = {k: v.clone().requires_grad_() if k in needed else v for k, v in inputs.items()}
    token_loss(**everything, impl=impl).sum().backward()
    token_loss(**some, impl=impl).sum().backward()
    for name in GRADIENTS:
        assert (some[name].grad is not None) == (name in needed)
        if name in needed:
            assert torch.equal(some[name].grad, everything[name].grad)


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["uce", "kl"])
def test_memory_layouts_of_inputs_and_upstream(kind, layout, impl):
    check(make(kind=kind), impl, layout=layout)


@pytest.mark.quick
def test_expanded_inputs_and_upstream():
    inputs = make() | {"hidden_states": torch.ones(1, 24).expand(600, 24), "token_weights": None}
    leaves = [inputs["lm_head"].requires_grad_(), inputs["bias"].requires_grad_()]
    upstream = torch.tensor(0.7).expand(600)
    expanded = torch.autograd.grad(token_loss(**inputs), leaves, upstream)
    inputs["hidden_states"] = inputs["hidden_states"].contiguous()
    plain = torch.autograd.grad(token_loss(**inputs), leaves, upstream.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(expanded, plain, strict=True))


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
def test_integer_valued_inputs_match_bitwise_through_the_head(impl, monkeypatch):
    """Equal hidden states give the same row whatever its chunk; the gradient of the head is exact."""
    small_workspace(monkeypatch)
    # one logit dominates, so softmax is exactly one-hot and every gradient is a sum of integers
    head = 100 * torch.eye(16)
    h = 4 * torch.eye(16)[torch.randint(0, 16, (40,), generator=torch.Generator().manual_seed(0))]
    labels = torch.arange(40) % 16
    leaves = h.requires_grad_(), head.requires_grad_()
    upstream = integers(40, seed=3)
    loss = token_loss(*leaves, labels, chunk_rows=7, impl=impl)
    grads = torch.autograd.grad(loss, leaves, upstream)
    dz = upstream[:, None] * (h.detach() / 4 - torch.nn.functional.one_hot(labels, 16))
    assert torch.equal(loss.detach(), torch.where(h.argmax(1) == labels, 0.0, 400.0))
    assert torch.equal(grads[0], dz @ head.detach()) and torch.equal(grads[1], dz.t() @ h.detach())


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_no_row_that_counts(tokens, kind, impl):
    inputs = make(tokens, kind=kind)
    inputs["labels"] = torch.full((tokens,), IGNORED)
    leaves = [inputs[k].requires_grad_() for k in GRADIENTS]
    with poison():
        loss = token_loss(**inputs, impl=impl)
        grads = torch.autograd.grad(loss, leaves, torch.full((tokens,), torch.nan))
    assert loss.shape == (tokens,) and not loss.any()
    for grad, leaf in zip(grads, leaves, strict=True):
        assert grad.shape == leaf.shape and not grad.any()


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_row_at_a_time(kind, impl):
    def row_by_row(**inputs):
        fixed = {k: inputs.pop(k) for k in ("lm_head", "bias", "kind")}
        rows = [{k: v[t : t + 1] for k, v in inputs.items()} for t in range(len(inputs["labels"]))]
        return torch.cat([token_loss(**row, **fixed, impl=impl) for row in rows])

    check_against_ref(row_by_row, token_loss_ref, make(400, kind=kind), gradients=("bias", "token_weights"))


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
def test_kl_to_itself_is_exactly_zero_and_its_gradient_too(impl, monkeypatch):
    small_workspace(monkeypatch)
    inputs = make(kind="kl")
    inputs["ref_hidden_states"] = inputs["hidden_states"].clone()
    leaves = [inputs[k].requires_grad_() for k in GRADIENTS[:3]]
    loss = token_loss(**inputs, impl=impl)
    assert not loss.any()
    assert not any(g.any() for g in torch.autograd.grad(loss.sum(), leaves))


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
def test_a_frozen_head_for_the_reference(impl):
    inputs = make(kind="kl") | {"ref_lm_head": make(seed=9)["lm_head"]}
    check(inputs, impl)
    inputs["ref_hidden_states"].requires_grad_()
    inputs["lm_head"].requires_grad_()
    token_loss(**inputs, impl=impl).sum().backward()
    assert inputs["ref_hidden_states"].grad is None


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_are_shown(kind, impl):
    inputs = make(kind=kind, weights=False)
    inputs["labels"][:4] = torch.tensor([5, 6, 7, 8])
    inputs["hidden_states"][0, 3] = torch.nan
    inputs["hidden_states"][1, 3] = torch.inf
    check(inputs, impl, gradients=("hidden_states",))
    loss = token_loss(**inputs, impl=impl)
    assert loss[:2].isnan().all() and loss[2:].isfinite().all()


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_large_logits_do_not_overflow(kind, impl):
    inputs = make(kind=kind)
    inputs["bias"] = inputs["bias"] * 1e4
    check(inputs, impl, gradients=("hidden_states", "lm_head"))
    assert token_loss(**inputs, impl=impl).isfinite().all()


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_does_not_reach_inside(impl):
    inputs = make()
    leaf = inputs["hidden_states"].requires_grad_()
    plain = token_loss(**inputs, impl=impl)
    grad = torch.autograd.grad(plain.sum(), leaf)[0]
    with torch.autocast("cpu", torch.bfloat16):
        cast = token_loss(**inputs, impl=impl)
        assert torch.equal(cast, plain)
        assert torch.equal(torch.autograd.grad(cast.sum(), leaf)[0], grad)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_tokens_times_vocabulary_is_ever_allocated(kind, impl):
    tokens, hidden, vocabulary = 1024, 16, 30_000
    inputs = make(tokens, hidden, vocabulary, kind=kind)
    inputs["labels"] = inputs["labels"].clamp_min(0)  # all rows count
    del inputs["token_weights"]
    for name in GRADIENTS[:3]:
        inputs[name].requires_grad_()
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as trace:
        token_loss(**inputs, impl=impl).sum().backward()
    changes = [e.nbytes() for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    live, peak = 0, 0
    for change in changes:
        live += change
        peak = max(peak, live)
    logits = tokens * vocabulary * 4
    # the trace sees what it should: the gradient of the head
    assert max(changes) >= vocabulary * hidden * 4
    assert max(changes) <= module.WORKSPACE_BYTES < logits / 3
    held = sum(inputs[k].numel() * 4 for k in GRADIENTS[:3]) * 2
    assert peak <= 2 * module.WORKSPACE_BYTES + held < logits


@pytest.mark.quick
def test_deterministic():
    inputs = make(200, 64, 501, kind="kl")
    leaves = [inputs[k].requires_grad_() for k in GRADIENTS]
    first, second = (torch.autograd.grad(token_loss(**inputs, chunk_rows=33).sum(), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    inputs = make(6, 5, 7, kind=kind)
    h, w, b, weights = (inputs[k].requires_grad_() for k in GRADIENTS)
    operands = Operands(h, w, inputs["labels"], b, weights, inputs.get("ref_hidden_states"), None)
    formula = Formula(kind, 2.0, 3.0, drop_zero_weights=False, chunk_rows=4)
    torch.library.opcheck(torch.ops.moe_unlearn.token_loss.default, (*operands, *formula, "auto", False, False))


@pytest.mark.parametrize("kind", ["nll", "kl"])
def test_compiles_as_one_graph(kind):
    inputs = make(kind=kind)
    leaves = [inputs[k].requires_grad_() for k in GRADIENTS]
    compiled = torch.compile(lambda: token_loss(**inputs).square().sum(), fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(token_loss(**inputs).square().sum(), leaves)
    for a, b in zip(torch.autograd.grad(compiled(), leaves), eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.quick
def test_no_double_backward():
    inputs = make()
    leaf = inputs["hidden_states"].requires_grad_()
    grad = torch.autograd.grad(token_loss(**inputs).square().sum(), leaf, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no double backward"):
        grad.sum().backward()


BAD = {
    "kind": (ValueError, "kind must be one of", {"kind": "mse"}),
    "hidden": (ValueError, r"got \[600, 23\] and \[97, 24\]", {"hidden_states": torch.ones(600, 23)}),
    "labels dtype": (TypeError, "labels must be int64", {"labels": torch.zeros(600).int()}),
    "labels shape": (ValueError, r"must have shape \[600\]; got \[9\]", {"labels": torch.zeros(9).long()}),
    "label": (ValueError, r"labels must be in \[0, 97\) or -100; got 97", {"labels": torch.full((600,), 97)}),
    "negative label": (ValueError, "got -1", {"labels": torch.full((600,), -1)}),
    "bias": (ValueError, "head.bias must have shape", {"bias": torch.ones(24)}),
    "weights": (TypeError, "token_weights must be floating", {"token_weights": torch.ones(600).long()}),
    "no reference": (ValueError, "needs a reference with hidden_states", {"kind": "kl"}),
    "a reference": (ValueError, "other kinds take neither", {"ref_hidden_states": torch.ones(600, 24)}),
    "softcap": (ValueError, "logit_softcap must be above 0", {"logit_softcap": 0.0}),
    "chunk": (ValueError, "chunk_rows must be at least 1", {"chunk_rows": 0}),
    "device": (ValueError, "head.weight must be on cpu", {"lm_head": torch.ones(97, 24, device="meta")}),
    "impl": (RuntimeError, "no implementation cuda", {"impl": "cuda"}),
}


@pytest.mark.quick
@pytest.mark.parametrize("error, message, change", BAD.values(), ids=BAD)
def test_bad_arguments(error, message, change):
    with pytest.raises(error, match=message):
        token_loss(**(make(weights=False) | change))
