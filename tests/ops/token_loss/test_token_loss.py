"""token_loss in every implementation, against its reference; the reference against finite differences."""

import itertools

import pytest
import torch

from moe_unlearn.ops.token_loss import IGNORED, KINDS, Formula, Operands
from moe_unlearn.testing import LAYOUTS, check_against_ref, integers, poison
from tests.ops.token_loss.cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    GRADIENTS,
    HEAD_OPTIONS,
    check,
    dropped_rows,
    inputs_of,
    loss_and_gradients,
    make,
    module,
    one_hot,
    small_workspace,
)
from tests.support.by_keyword import token_loss, token_loss_ref
from tests.support.covers import cover
from tests.support.impls import REF, impls

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")]  # of NaN, as meant
IMPLS = impls("token_loss")
WORKSPACE_BYTES = module.WORKSPACE_BYTES
NEEDED = tuple(names for n in (1, 2) for names in itertools.combinations(GRADIENTS, n))


@pytest.fixture(autouse=True)
def workspace(monkeypatch):
    """The reference takes several tiles; other implementations have no workspace."""
    small_workspace(monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
@cover(indirect=["impl"], impl=IMPLS, dtype=DTYPES, options=({}, *HEAD_OPTIONS))
def test_value_and_gradients(options, dtype, impl, kind):
    check(impl, inputs_of(impl, kind, dtype) | options, chunk_rows=50)


@cover(dtype=DTYPES, kind=KINDS)
def test_value_and_gradients_in_one_tile(kind, dtype, monkeypatch):
    monkeypatch.setattr(module, "WORKSPACE_BYTES", WORKSPACE_BYTES)
    check(REF, make(kind=kind, dtype=dtype))


@cover(indirect=["impl"], impl=IMPLS, kind=KINDS, layout=LAYOUTS, dtype=(F32, BF16))
def test_memory_layouts_of_inputs_and_upstream(dtype, layout, kind, impl):
    check(impl, inputs_of(impl, kind, dtype), layout=layout)


MIXED = ({"lm_head": BF16}, {"hidden_states": BF16}, {"bias": F16}, {"bias": F64}, {"token_weights": F64})


@cover(indirect=["impl"], impl=IMPLS, mixed=MIXED)
def test_mixed_dtypes(mixed, impl):
    inputs = inputs_of(impl)
    inputs |= {name: inputs[name].to(dtype) for name, dtype in mixed.items()}
    check(impl, inputs)
    _, grads = loss_and_gradients(impl, inputs)
    assert [grad.dtype for grad in grads] == [inputs[name].dtype for name in GRADIENTS]


@cover(indirect=["impl"], impl=IMPLS, kind=KINDS, dtype=(F32, BF16))
def test_dropped_rows_are_exactly_zero_whatever_they_hold(dtype, kind, impl):
    inputs, names = inputs_of(impl, kind, dtype), GRADIENTS[:3]
    dropped = dropped_rows(inputs)
    assert 0.2 < dropped.float().mean() < 0.8
    dirty = {k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()}
    dirty["hidden_states"][dropped] = torch.nan
    dirty["token_weights"][inputs["labels"] == IGNORED] = torch.nan
    if kind == "kl":
        dirty["ref_hidden_states"][dropped] = torch.inf
    else:
        # with weight 0 even a label out of range is not read
        dirty["labels"][dropped & (inputs["labels"] != IGNORED)] = 10**9
    with poison():
        upstream = torch.randn(len(dropped), generator=torch.Generator().manual_seed(1)).to(impl.device)
        clean, expected = loss_and_gradients(impl, inputs, names, upstream)
        loss, grads = loss_and_gradients(impl, dirty, names, torch.where(dropped, torch.nan, upstream))
    assert torch.equal(loss, clean) and not loss[dropped].any() and loss[~dropped].all()
    assert all(map(torch.equal, grads, expected)) and not grads[0][dropped].any()


@cover(indirect=["impl"], impl=IMPLS, kind=KINDS)
def test_weights_that_need_a_gradient_keep_their_zero_rows(kind, impl):
    inputs = inputs_of(impl, kind)
    weights = inputs["token_weights"].requires_grad_()
    token_loss(**inputs, impl=impl.name).sum().backward()
    assert torch.equal(weights.grad, token_loss(**inputs | {"token_weights": None}, impl=impl.name))
    assert weights.grad[(weights == 0) & (inputs["labels"] != IGNORED)].all()


@cover(indirect=["impl"], impl=IMPLS, kind=KINDS)
def test_weights_of_any_stride_say_which_rows_count(kind, impl):
    inputs = inputs_of(impl, kind)
    weights = inputs["token_weights"]
    apart = torch.stack((weights, torch.zeros_like(weights)), 1)[:, 0]
    assert torch.equal(
        token_loss(**inputs | {"token_weights": apart}, impl=impl.name), token_loss(**inputs, impl=impl.name)
    )


@cover(indirect=["impl"], impl=IMPLS, kind=KINDS)
def test_all_weights_zero(kind, impl):
    inputs = inputs_of(impl, kind, BF16)
    inputs["token_weights"].zero_()
    with poison():
        loss, grads = loss_and_gradients(impl, inputs, GRADIENTS[:3])
    assert not loss.any() and not any(grad.any() for grad in grads)


def test_few_rows_of_many_count(impl):
    """Five: most programs of a kernel have nothing to do."""
    inputs = inputs_of(impl, dtype=BF16, weights=False)
    inputs["labels"][:] = IGNORED
    inputs["labels"][[3, 31, 32, 40, 63]] = torch.arange(5, device=impl.device) + 60
    check(impl, inputs, gradients=GRADIENTS[:3])


# weights that need a gradient keep more rows, and with them another order of sums
@cover(
    lambda case: case.get("impl") != "triton" or len(case.get("needed", "1")) == 1,
    indirect=["impl"],
    impl=IMPLS,
    needed=NEEDED,
)
def test_only_the_gradients_needed(needed, impl):
    inputs = inputs_of(impl, dtype=BF16 if impl.kind == "triton" else F32)
    weighted = GRADIENTS if "token_weights" in needed else GRADIENTS[:3]
    everything = dict(zip(weighted, loss_and_gradients(impl, inputs, weighted)[1], strict=True))
    _, some = loss_and_gradients(impl, inputs, needed)
    assert all(torch.equal(grad, everything[name]) for name, grad in zip(needed, some, strict=True))


def test_expanded_inputs_and_upstream(impl):
    inputs, names = inputs_of(impl), GRADIENTS[1:3]
    tokens, hidden = inputs["hidden_states"].shape
    one, upstream = torch.ones(1, hidden, device=impl.device), torch.tensor(0.7, device=impl.device).expand(tokens)
    inputs |= {"hidden_states": one.expand(tokens, hidden), "token_weights": None}
    _, expanded = loss_and_gradients(impl, inputs, names, upstream)
    plain = inputs | {"hidden_states": torch.ones(tokens, hidden, device=impl.device)}
    assert all(map(torch.equal, expanded, loss_and_gradients(impl, plain, names, upstream.clone())[1]))


@cover(indirect=["impl"], impl=IMPLS, dtype=DTYPES, size=((75, 48, 48), (1, 8, 1), (1, 7, 5), (40, 16, 65)))
def test_integer_valued_inputs_match_bitwise_through_the_head(size, dtype, impl):
    """Equal hidden states give the same row whatever its chunk; the gradient of the head is exact."""
    inputs, (dz, expected, h, head) = one_hot(*size, dtype)
    upstream = integers(size[0], seed=3)
    loss, grads = loss_and_gradients(impl, impl.moved(inputs), GRADIENTS[:2], impl.moved(upstream), chunk_rows=7)
    dz = upstream[:, None] * dz
    assert torch.equal(loss.cpu(), expected)
    assert torch.equal(grads[0].cpu().float(), dz @ head) and torch.equal(grads[1].cpu().float(), dz.t() @ h)


@cover(indirect=["impl"], impl=IMPLS, kind=KINDS, tokens=(0, 1, 5))
def test_no_row_that_counts(tokens, kind, impl):
    inputs = impl.moved(make(tokens, kind=kind))
    inputs["labels"][:] = IGNORED
    with poison():
        loss, grads = loss_and_gradients(impl, inputs, upstream=torch.full((tokens,), torch.nan, device=impl.device))
    assert loss.shape == (tokens,) and not loss.any()
    for grad, name in zip(grads, GRADIENTS, strict=True):
        assert grad.shape == inputs[name].shape and not grad.any()


@cover(indirect=["impl"], impl=("ref", "cpu"), kind=KINDS)
def test_one_row_at_a_time(kind, impl):
    def row_by_row(**inputs):
        fixed = {k: inputs.pop(k) for k in ("lm_head", "bias", "kind")}
        rows = [{k: v[t : t + 1] for k, v in inputs.items()} for t in range(len(inputs["labels"]))]
        return torch.cat([token_loss(**row, **fixed, impl=impl.name) for row in rows])

    check_against_ref(row_by_row, token_loss_ref, make(400, kind=kind), gradients=("bias", "token_weights"))


@cover(indirect=["impl"], impl=IMPLS, dtype=DTYPES)
def test_kl_to_itself_is_exactly_zero_and_its_gradient_too(dtype, impl):
    inputs = inputs_of(impl, "kl", dtype)
    inputs["ref_hidden_states"] = inputs["hidden_states"].clone()
    loss, grads = loss_and_gradients(impl, inputs)
    assert not loss.any() and not any(grad.any() for grad in grads)


@cover(indirect=["impl"], impl=IMPLS, dtype=(F32, BF16))
def test_a_frozen_head_for_the_reference(dtype, impl):
    other = inputs_of(impl, dtype=dtype, seed=9)["lm_head"]
    inputs = inputs_of(impl, "kl", dtype) | {"ref_lm_head": other}
    check(impl, inputs)
    inputs["ref_hidden_states"].requires_grad_()
    inputs["lm_head"].requires_grad_()
    token_loss(**inputs, impl=impl.name).sum().backward()
    assert inputs["ref_hidden_states"].grad is None


def test_labels_say_only_which_rows_count_in_kl(impl):
    inputs = inputs_of(impl, "kl")
    other = torch.where(inputs["labels"] == IGNORED, IGNORED, 10**9)
    assert torch.equal(*(token_loss(**inputs | {"labels": x}, impl=impl.name) for x in (inputs["labels"], other)))


@cover(indirect=["impl"], impl=IMPLS, kind=KINDS, dtype=(F32, BF16))
def test_a_row_of_nan_or_infinity_stays_alone(dtype, kind, impl):
    inputs = inputs_of(impl, kind, dtype, weights=False)
    inputs["labels"][:4] = torch.tensor([5, 6, 7, 8])
    _, (clean,) = loss_and_gradients(impl, inputs, GRADIENTS[:1])
    inputs["hidden_states"][0, 3], inputs["hidden_states"][1, 3] = torch.nan, torch.inf
    check(impl, inputs, gradients=GRADIENTS[:1])
    loss, (grad,) = loss_and_gradients(impl, inputs, GRADIENTS[:1])
    assert loss[:2].isnan().all() and grad[:2].isnan().all()
    assert loss[2:].isfinite().all() and grad[2:].isfinite().all()
    assert impl.kind != "triton" or torch.equal(grad[2:], clean[2:])  # others leave the order of sums to a library


@cover(indirect=["impl"], impl=IMPLS, kind=KINDS, bias=("scattered", "rising", "falling"))
def test_large_logits_do_not_overflow(bias, kind, impl):
    """Logits of ten thousand, which rise or fall from tile to tile."""
    inputs = inputs_of(impl, kind)
    rising = torch.linspace(0, 2e4, len(inputs["bias"]), device=impl.device)
    inputs["bias"] = {"scattered": inputs["bias"] * 1e4, "rising": rising, "falling": -rising}[bias]
    check(impl, inputs, gradients=GRADIENTS[:2])
    assert token_loss(**inputs, impl=impl.name).isfinite().all()


@cover(indirect=["impl"], impl=IMPLS, kind=KINDS)
def test_a_logit_of_minus_infinity_has_probability_zero(kind, impl):
    inputs = inputs_of(impl, kind)
    none = int(0.57 * len(inputs["bias"]))  # the first tile and a part of another
    inputs["bias"][:none] = -torch.inf
    inputs["labels"] = torch.where(inputs["labels"] == IGNORED, IGNORED, inputs["labels"].clamp(min=none))
    check(impl, inputs, gradients=GRADIENTS[:2])
    _, (_, grad) = loss_and_gradients(impl, inputs, GRADIENTS[:2])
    assert not grad[:none].any() and grad[none:].any()


def test_autocast_does_not_reach_inside(impl):
    inputs = inputs_of(impl)
    plain, grads = loss_and_gradients(impl, inputs, GRADIENTS[:1])
    with torch.autocast(impl.device.type, torch.bfloat16):
        cast, cast_grads = loss_and_gradients(impl, inputs, GRADIENTS[:1])
    assert torch.equal(cast, plain) and torch.equal(cast_grads[0], grads[0])


@cover(indirect=["impl"], impl=IMPLS, kind=("nll", "kl"))
@pytest.mark.slow
def test_compiles_as_one_graph_and_runs_agree(kind, impl):
    inputs = inputs_of(impl, kind, BF16)
    leaves = [inputs[k].requires_grad_() for k in GRADIENTS]

    def objective():
        return token_loss(**inputs, chunk_rows=33, impl=impl.name).square().sum()

    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    first = torch.autograd.grad(objective(), leaves)
    with poison():
        runs = [torch.autograd.grad(function(), leaves) for function in (objective, compiled)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(first, run, strict=True))


@cover(indirect=["impl"], impl=("ref", "cpu"), kind=KINDS)
def test_no_tensor_of_tokens_times_vocabulary_is_ever_allocated(kind, impl, monkeypatch):
    monkeypatch.setattr(module, "WORKSPACE_BYTES", WORKSPACE_BYTES)
    tokens, hidden, vocabulary = 1024, 16, 30_000
    inputs = make(tokens, hidden, vocabulary, kind=kind)
    inputs["labels"] = inputs["labels"].clamp_min(0)  # all rows count
    del inputs["token_weights"]
    for name in GRADIENTS[:3]:
        inputs[name].requires_grad_()
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as trace:
        token_loss(**inputs, impl=impl.name).sum().backward()
    changes = [e.nbytes() for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    live, peak = 0, 0
    for change in changes:
        live += change
        peak = max(peak, live)
    logits = tokens * vocabulary * 4
    # the trace sees what it should: the gradient of the head
    assert max(changes) >= vocabulary * hidden * 4
    assert max(changes) <= WORKSPACE_BYTES < logits / 3
    held = sum(inputs[k].numel() * 4 for k in GRADIENTS[:3]) * 2
    assert peak <= 2 * WORKSPACE_BYTES + held < logits


# ---- The op and its reference ------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    inputs = make(6, 5, 7, kind=kind)
    h, w, b, weights = (inputs[k].requires_grad_() for k in GRADIENTS)
    operands = Operands(h, w, inputs["labels"], b, weights, inputs.get("ref_hidden_states"), None)
    formula = Formula(kind, 2.0, 3.0, drop_zero_weights=False, chunk_rows=4)
    torch.library.opcheck(torch.ops.moe_unlearn.token_loss.default, (*operands, *formula, "auto", False, False))


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


@pytest.mark.parametrize("error, message, change", BAD.values(), ids=BAD)
def test_bad_arguments(error, message, change):
    with pytest.raises(error, match=message):
        token_loss(**(make(weights=False) | change))
