"""A fused step never waits for the device but where it says so: in `factors.look`, and where a preparation is new.

On a CPU two checks stand in for a GPU's: a dispatch mode sees every operation that would wait there, in a step that
takes a GPU's way, and a walk over the sources sees every call that could.
"""

import ast
import collections
import copy
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_unlearn.errors import NonFiniteError
from moe_unlearn.model.head import final_hidden_states
from moe_unlearn.ops import bits, checks, legal
from moe_unlearn.ops.expert_wgrad import Factors
from moe_unlearn.optim import MaskedAdamW, MaskedSGD
from moe_unlearn.step import UnlearnStep
from moe_unlearn.step import factors as step_factors
from moe_unlearn.step.factors import largest_sum
from moe_unlearn.step.gradients import GradientStore
from moe_unlearn.step.sinks import UpdateSink
from tests.ops.expert_mlp.cases import case
from tests.static.ledger import ROOT
from tests.support.by_keyword import expert_mlp
from tests.support.models import tiny_olmoe
from tests.support.sources import sources_of_the_step
from tests.support.steps import VOCAB, changed, data, prepared, recipe, weights

pytestmark = pytest.mark.quick
_aten = torch.ops.aten
WAITING = {_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten._unique2, _aten.equal, _aten.is_nonzero}


class Watch(TorchDispatchMode):
    """Counts what would wait for a GPU, by the function of ours that asks for it."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func.overloadpacket in (_aten.index, _aten.index_put_) and any(
            v is not None and v.dtype == torch.bool for v in args[1]
        )
        if func.overloadpacket in WAITING or masks:
            frame = sys._getframe(1)
            while frame and not frame.f_code.co_filename.startswith(str(ROOT / "moe_unlearn")):
                frame = frame.f_back
            self.found[frame.f_code.co_qualname if frame else "elsewhere"] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).eval()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The CPU takes the way of a device that is not waited for."""
    monkeypatch.setattr(UpdateSink, "_waits", lambda self, bound: False)
    monkeypatch.setattr(step_factors, "_extremes", step_factors._extremes_on_device)
    monkeypatch.setattr(checks, "_is_readable", lambda indices: False)
    monkeypatch.setattr(legal, "_met", {})  # what is met here is not for the CPU's later steps


# where a step or what prepares it may wait: how many such calls stand there, and why; any other is a fault
READS = {
    "look": (2, "what a step reads: its losses, the bounds of its gradients, their norm; and a number of that list"),
    "final_hidden_states": (0, "transformers looks whether a batch has padding"),
    "padded": (5, "where examples of packed rows begin, on the CPU"),
    "_paired": (2, "the numbers of a batch's rows, where refusals have theirs"),
    "_beginnings": (10, "packed rows: one read of a batch and of each of its offsets; the rest is on the CPU"),
    "content_keys": (2, "rows of a batch are known by their content: one read a batch"),
    "_content_key": (3, "arrays of the CPU"),
    "_read": (2, "a batch, before its forward pass"),
    "row_keys": (1, "the numbers of a batch's rows"),
    "RowCache.get": (1, "what is cached of a row is on the CPU: one read and one copy a batch"),
    "rows_of": (1, "what is cached of a row is on the CPU; in prepare()"),
    "Objectives._forget_side": (2, "SEUF's one expert"),
    "embed_diff": (0, "RMU takes the rows that count"),
    "CompactSink.trained_slices": (1, "the experts of the lowest layer that trains"),
    "UpdateSink.take": (1, "a bound that is on the CPU"),
    "_extremes": (1, "an offset that is on the CPU"),
    "join": (1, "factors of several passes, for MOLLM or several micro-batches"),
    "inner_products": (2, "MOLLM: the cheaper form for each expert"),
    "GradientStore.common_descent": (3, "MOLLM solves for its direction on the CPU"),
    "GradientStore.descend": (3, "MOLLM solves for its direction on the CPU"),
    "GradientStore.descent": (1, "MOLLM's log of descent"),
    "Tally.count": (1, "a number"),
    "_counts": (1, "a number"),
    "Ranks.sums": (1, "a tensor that was made on the CPU"),
    "Ranks.add_": (1, "a tensor that was made on the CPU"),
    "placing_of": (1, "a number of a placement"),
    "rows_here": (2, "the mesh is on the CPU"),
    "check_versions": (1, "numbers of a version"),
    "exchange_of": (1, "once for each mask"),
    "ShardedSink.trained_slices": (1, "the experts of the lowest layer that trains"),
    "TrainedWeights.mask": (1, "once, behind prepare()"),
    "closed": (1, "once, behind prepare()"),
    "_Masked._layout": (1, "once for each mask"),
    "slices_with_a_bit": (2, "once for each mask"),
    "fit_state": (1, "once for each mask"),
    "at_home": (1, "once for each parameter whose state lies on the host"),
    "Stage.settle": (1, "before state that lies on the host is read: a new mask, a save, a load, a verified step"),
    "_Masked.load_state_dict": (1, "the count of steps is on the CPU"),
    "probe": (1, "numbers of a configuration"),
    "loaded": (1, "the count of steps is on the CPU"),
    "_Masked._update": (1, "the count of steps is on the CPU"),
    "MaskedSGD._rule": (1, "a learning rate of the optimizer"),
    "MaskedAdamW._rule": (1, "a learning rate of the optimizer"),
    "verify_head": (4, "in prepare()"),
    "counted_row": (1, "in prepare()"),
    "head_of": (1, "numbers of a configuration"),
    "stack": (1, "numbers of rows, on the CPU"),
    "UnlearnStep.update": (1, "a number of the optimizer"),
    "_forward_ref": (1, "a reference"),
    "_backward_ref": (1, "a reference"),
    "grouped_linear": (1, "a reference"),
    "_products": (2, "a reference"),
    "gram_factors_ref": (1, "a reference"),
    "_counted": (1, "a reference"),
    "check_labels": (2, "a reference"),
    "_gram_factors_native": (1, "offsets of the CPU"),
    "tensor_digest": (2, "a digest of weights, in prepare()"),
    "gather": (4, "values of ranks, which are on the CPU"),
    "architecture": (1, "a variable of the environment"),
    "tile_for": (1, "a list"),
    "check_offsets": (2, "indices of the CPU; a flag"),
    "check_indices": (3, "indices of the CPU"),
    "check_routing": (2, "indices of the CPU"),
    "_check_distinct": (4, "indices of the CPU"),
}


@pytest.mark.parametrize("guard", ["loss", "strict"])
@pytest.mark.parametrize("name", ["graddiff", "graddiff balanced", "wagle", "trace"])
def test_a_step_waits_only_where_it_says_so(name, guard, model, as_on_a_gpu, monkeypatch):
    name, *balanced = name.split()
    made = recipe(name, f"guard={guard}", f"retain.router_aux={0.1 if balanced else 'off'}")
    step, forget, retain = prepared(model, made)
    step(forget[0], retain[0])
    with Watch() as watch, monkeypatch.context() as patch:
        patch.setattr(legal, "_note", None)  # what the step made itself needs no look
        step(forget[1], retain[1])
    allowed = {"_Masked._update", "final_hidden_states"}
    if name != "graddiff":
        allowed |= {"content_keys", "RowCache.get"}
    assert watch.found.keys() <= allowed < READS.keys(), watch.found


@pytest.mark.parametrize("name", ["graddiff", "wagle"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_update_that_is_not_waited_for_has_the_same_bits(name, optimizer, model, monkeypatch):
    made = recipe(name, "guard=loss", f"optimizer.name={optimizer}", "optimizer.weight_decay=0.1")
    both = []
    for waits in (True, False):
        monkeypatch.setattr(UpdateSink, "_waits", lambda self, bound, waits=waits: waits)
        own = copy.deepcopy(model)
        step, forget, retain = prepared(own, made)
        before = weights(own)
        for i in range(2):
            step(forget[i], retain[i])
        assert changed(own, before)
        both.append((weights(own), step.optimizer.state_dict()["state"]))
    (ours, state), (waiting, waiting_state) = both
    assert all(torch.equal(ours[name], waiting[name]) for name in ours)
    for i, values in state.items():
        assert all(torch.equal(v, waiting_state[i][k]) for k, v in values.items() if torch.is_tensor(v))


@pytest.mark.parametrize("width", [64, 40])
@pytest.mark.parametrize("kind", [MaskedSGD, MaskedAdamW])
@pytest.mark.parametrize(
    "factor,message", [(float("nan"), "not finite"), (float("inf"), "not finite"), (1e20, "could overflow")]
)
def test_from_a_bad_weight_on_nothing_is_written(factor, message, kind, width, as_on_a_gpu):
    """Bits, moments and the count of steps of the bad weight and of those after it; the error names the others."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(3, 16, width, generator=generator)) for _ in range(3)]
    optimizer = kind(params, lr=0.1, weight_decay=0.1)
    optimizer.set_masks([None, bits.pack_bits(torch.rand(3, 16, width, generator=generator) < 0.5), None])
    store = GradientStore(optimizer)
    store.begin([*zip("abc", params, strict=True)], {})
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)

    def backward(sink, factor):
        for p in params:
            grad, x = torch.randn(5, 16, generator=generator), torch.randn(5, width, generator=generator)
            if p is params[1]:
                grad, x = factor * grad, x * factor
            sink.take(p, Factors(grad, x, offsets))
        sink.settle()

    sink = UpdateSink(store)
    backward(sink, 1.0)
    assert sink.updated == ["a", "b", "c"]
    before = [p.detach().clone() for p in params]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    sink = UpdateSink(store)
    with pytest.raises(NonFiniteError, match=f"the gradient of b .*{message}") as caught:
        backward(sink, factor)
    assert caught.value.updated == ("a",) and not store.collected
    assert [torch.equal(p, old) for p, old in zip(params, before, strict=True)] == [False, True, True]
    now = optimizer.state_dict()["state"]
    assert [int(now[i]["step"]) for i in range(3)] == [2, 1, 1]
    assert all(torch.equal(state[i][k], now[i][k]) for i in (1, 2) for k in state[i] if torch.is_tensor(state[i][k]))


@pytest.mark.parametrize("bad", [0, 1])
def test_weights_that_are_waited_for_are_updated_behind_those_that_are_not(bad, monkeypatch):
    """Some on a GPU, some on the CPU: what is bad on either stops the others, and the error names what was updated."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(2, 8, 32, generator=generator)) for _ in range(3)]
    optimizer = MaskedSGD(params, lr=0.1)
    store = GradientStore(optimizer)
    store.begin([*zip("abc", params, strict=True)], {})
    sink = UpdateSink(store)
    before = [p.detach().clone() for p in params]
    offsets = torch.tensor([0, 2, 4], dtype=torch.int32)
    with pytest.raises(NonFiniteError, match=f"the gradient of {'abc'[bad]} is not finite") as caught:
        for i, p in enumerate(params):
            monkeypatch.setattr(UpdateSink, "_waits", lambda self, bound, i=i: i > 0)
            grad = torch.randn(4, 8, generator=generator) * (torch.nan if i == bad else 1)
            sink.take(p, Factors(grad, torch.randn(4, 32, generator=generator), offsets))
        sink.settle()
    moved = [not torch.equal(p, old) for p, old in zip(params, before, strict=True)]
    assert moved == [i < bad for i in range(3)] and caught.value.updated == tuple("abc"[:bad])


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("rows", [0, 3, 5])
@pytest.mark.parametrize("value", [1.0, float("inf"), float("nan")])
def test_the_bound_is_the_same_on_a_device(value, rows, indexed, monkeypatch):
    """Rows behind the last expert belong to nobody and may hold anything; without rows nothing counts."""
    grad, x = torch.randn(5, 4), torch.randn(5, 6)
    grad[3], x[4] = value * grad[3], float("nan")
    order = torch.tensor([0, 1, 2, 3, 0][:rows]) if indexed else None
    offsets = torch.tensor([0, min(1, rows), rows], dtype=torch.int32)
    factors = Factors(grad, x[:4] if indexed else x, offsets, order, order)
    bound = largest_sum(factors)
    monkeypatch.setattr(step_factors, "_extremes", step_factors._extremes_on_device)
    assert torch.equal(bound.nan_to_num(nan=-1.0), largest_sum(factors).nan_to_num(nan=-1.0))
    assert bound.dtype == torch.float64 and (rows > 0 or bound == 0)
    if rows == 3 and not indexed:
        assert bound == 2 * grad[:3].abs().max().double() * x[:3].abs().max().double()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("impl", ["ref", "auto", "triton"])
@pytest.mark.slow(but=1)
def test_the_bound_takes_what_the_kernel_says(impl, transposed):
    """Factors that the layer's backward pass made are not read again; a changed copy of them has no known bound."""
    if impl == "triton":
        pytest.importorskip("triton")
    arguments = case("sentinels", transposed=transposed, bias=True)
    for name in ("gate_up_proj", "down_proj", "gate_up_bias"):
        arguments[name].requires_grad_()
    taken = {}
    out = expert_mlp(**arguments, sink=taken.__setitem__, bounded=True, impl=impl)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    known = {name: [v is not None for v in taken[arguments[name]].largest] for name in ("gate_up_proj", "down_proj")}
    assert known == {"gate_up_proj": [not transposed, transposed], "down_proj": [transposed, not transposed]}
    for factors in taken.values():
        bound = largest_sum(factors)
        assert bound > 0 and torch.equal(bound, largest_sum(Factors(*factors)))
        assert torch.equal(largest_sum(factors._replace(grad=2 * factors.grad)), 2 * bound)
    expert_mlp(**arguments, sink=taken.__setitem__, impl=impl).sum().backward()
    assert taken[arguments["gate_up_proj"]].largest == taken[arguments["down_proj"]].largest == (None, None)


def allowed(patch, function):
    """Let `function` wait for the device wherever a module of ours calls it."""

    def waiting(*args, **keywords):
        torch.cuda.set_sync_debug_mode("default")
        try:
            return function(*args, **keywords)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    for name, module in list(sys.modules.items()):
        if name.startswith("moe_unlearn.") and getattr(module, function.__name__, None) is function:
            patch.setattr(module, function.__name__, waiting)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("guard", ["loss", "strict"])
def test_on_a_gpu_every_other_wait_is_an_error(guard, model, monkeypatch):
    step = UnlearnStep(model.cuda(), recipe("graddiff", f"guard={guard}"))
    forget, retain = ([{k: v.cuda() for k, v in batch.items()} for batch in side] for side in data())
    step.prepare(forget, retain)
    step(forget[0], retain[0])
    for function in (step_factors.look, final_hidden_states):
        allowed(monkeypatch, function)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(forget[1], retain[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


METHODS = {"item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select", "is_nonzero", "equal", "synchronize"}
# what Python does with a tensor when it wants a number, or a truth
NUMBERS, TRUTHS = {"int", "float", "bool"}, {"any", "all"}


def waiting_calls(tree: ast.AST):
    """(qualified name of the function, call) of every call that waits if it is given a tensor of the device."""
    nodes = list(ast.walk(tree))
    tests = {id(node.test) for node in nodes if isinstance(node, ast.If | ast.While | ast.IfExp | ast.Assert)}
    tests |= {id(test) for node in nodes if isinstance(node, ast.comprehension) for test in node.ifs}
    tests |= {id(value) for node in nodes if isinstance(node, ast.BoolOp) for value in node.values}
    tests |= {id(node.operand) for node in nodes if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)}

    def walk(node, path):
        path = (*path, node.name) if isinstance(node, ast.FunctionDef | ast.ClassDef) else path
        if isinstance(node, ast.Call):
            function = node.func
            method = function.attr if isinstance(function, ast.Attribute) else ""
            number = isinstance(function, ast.Name) and function.id in NUMBERS
            number = number and node.args and not isinstance(node.args[0], ast.Constant)
            if method in METHODS or number or method in TRUTHS and id(node) in tests:
                yield ".".join(path), ast.unparse(node)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, path)

    return walk(tree, ())


def test_every_call_that_may_wait_is_listed_and_nothing_else():
    found = collections.defaultdict(list)
    for path in sources_of_the_step():
        for place, call in waiting_calls(ast.parse(path.read_text(encoding="utf-8"))):
            found[place].append(f"{path.name}: {place}: {call}")
    wrong = [lines for place, lines in found.items() if len(lines) != READS.get(place, (0,))[0]]
    assert not wrong, "\n".join(line for lines in wrong for line in lines)
    assert found.keys() == {place for place, (count, _) in READS.items() if count}


def test_what_is_seen_in_sources():
    source = """
class A:
    def read(self, x):
        if not x.any() and y:
            return int(x), x.tolist(), float("inf")
        z = x.all(), any(x)
        return 1 if x.isfinite().all() else x[0].item()
"""
    found = list(waiting_calls(ast.parse(source)))
    assert [call for _, call in found] == ["x.any()", "int(x)", "x.tolist()", "x.isfinite().all()", "x[0].item()"]
    assert {place for place, _ in found} == {"A.read"}
