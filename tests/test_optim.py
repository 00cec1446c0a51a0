"""MaskedSGD and MaskedAdamW against torch.optim, and what masks and checkpoints must not lose."""

import copy
import io

import pytest
import torch

from moe_unlearn.ops.bits import pack_bits, unpack_bits
from moe_unlearn.ops.masked_update import AdamW, Update, masked_adamw_ref
from moe_unlearn.ops.moments import row_bytes
from moe_unlearn.optim import NUMERICS, MaskedAdamW, MaskedSGD

BOTH = [MaskedSGD, MaskedAdamW]
# numerics and state
KINDS = [(numerics, "float32") for numerics in NUMERICS]
KINDS += [("stochastic", "bfloat16"), ("stochastic", "int8"), ("fp32_master", "int8")]
OPTIONS = {MaskedSGD: {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, MaskedAdamW: {"lr": 0.01}}
SHAPES = [(6, 5, 33), (40,), (), (7, 64)]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(dtype=torch.float32, seed=0):
    return [torch.nn.Parameter(randn(*s, seed=seed + i).to(dtype)) for i, s in enumerate(SHAPES)]


def random_masks(seed=0, keep=0.5):
    generator = torch.Generator().manual_seed(seed)
    return [pack_bits(torch.rand(s, generator=generator) < keep) for s in SHAPES]


def expert_masks(*experts):
    """Only these slices of the first parameter train, all of the second, none of the third."""
    first = torch.zeros(SHAPES[0], dtype=torch.bool)
    first[list(experts)] = torch.rand(len(experts), 5, 33, generator=torch.Generator().manual_seed(1)) < 0.7
    return [pack_bits(first), None, torch.zeros(1, dtype=torch.int32), None]


def kept(p, mask):
    """bool mask of what may move."""
    if mask is None:
        return torch.ones_like(p, dtype=torch.bool)
    return unpack_bits(mask, p.shape[-1] if p.dim() else 1).view(p.shape)


def gradients(params, step):
    for i, p in enumerate(params):
        p.grad = randn(*p.shape, seed=1000 * step + i).to(p.dtype)


def train(optimizer, params, steps, start=0):
    for step in range(start + 1, start + steps + 1):
        gradients(params, step)
        optimizer.step()


def values(params):
    return [p.detach().clone() for p in params]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def make(kind, params, masks=None, **options):
    optimizer = kind(params, **(OPTIONS[kind] | options))
    if masks is not None:
        optimizer.set_masks(masks)
    return optimizer


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "kind, theirs, options",
    [
        (MaskedSGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
        (MaskedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
        (MaskedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
        (MaskedAdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
        (MaskedAdamW, torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-4, "maximize": True}),
    ],
)
def test_parity_with_torch_under_a_scheduler(kind, theirs, options, dtype, rounded_sqrt):
    ours, reference = parameters(dtype), parameters(dtype)
    pair = kind(ours, **options), theirs(reference, foreach=False, fused=False, **options)
    masks = random_masks()
    pair[0].set_masks(masks)
    start = values(ours)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, 0.2, 20, cycle_momentum=False) for o in pair]
    for step in range(1, 21):
        for params, optimizer, scheduler in zip((ours, reference), pair, schedulers, strict=True):
            gradients(params, step)
            optimizer.step()
            scheduler.step()
    for mine, other, old, mask in zip(ours, reference, start, masks, strict=True):
        may_move = kept(mine, mask)
        assert torch.equal(mine[may_move], other[may_move])
        assert torch.equal(mine[~may_move], old[~may_move])


@pytest.mark.quick
@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("numerics, state", KINDS)
def test_state_exists_only_where_something_trains(numerics, state, kind):
    params = parameters(torch.bfloat16)
    masks = expert_masks(1, 4)
    optimizer = make(kind, params, masks, numerics=numerics, state=state, weight_decay=0.1)
    predicted = sum(optimizer.state_size(p, mask) for p, mask in zip(params, masks, strict=True))
    start = values(params)
    train(optimizer, params, 3)
    assert optimizer.state[params[0]]["slices"].tolist() == [1, 4]
    assert params[2] not in optimizer.state
    held = [v for state in optimizer.state.values() for k, v in state.items() if k not in ("step", "slices")]
    assert sum(v.numel() * v.element_size() for v in held) == predicted > 0
    elements = 2 * 5 * 33 + 40 + 7 * 64
    moments = elements * (2 if numerics == "parity" or state == "bfloat16" else 4)
    if state == "int8":
        moments = 2 * 5 * row_bytes(33) + 4 * 40 + 7 * row_bytes(64)
    count = 1 if kind is MaskedSGD else 2
    assert predicted == count * moments + 4 * elements * (numerics == "fp32_master")
    for p, old, mask in zip(params, start, masks, strict=True):
        assert torch.equal(p[~kept(p, mask)], old[~kept(p, mask)])
    assert (params[0][[1, 4]] != start[0][[1, 4]]).any() and (params[1] != start[1]).any()


@pytest.mark.quick
@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("numerics, state", KINDS)
def test_compact_state_changes_no_bit(numerics, state, kind):
    """One more bit in every slice turns compaction off; the other weights must not notice."""
    results = []
    for dense in (False, True):
        params, masks = parameters(torch.bfloat16), expert_masks(1, 4)
        if dense:
            masks[0][[0, 2, 3, 5], 0, 0] = 1
        optimizer = make(kind, params, masks, numerics=numerics, state=state)
        train(optimizer, params, 5)
        assert ("slices" in optimizer.state[params[0]]) != dense
        results.append(values(params))
    assert torch.equal(results[0][0][[1, 4]], results[1][0][[1, 4]]) and equal(results[0][1:], results[1][1:])


@pytest.mark.quick
def test_every_numerics_is_the_op_it_names():
    grad, mask = randn(4, 40, seed=1), pack_bits(randn(4, 40, seed=2) > 0)
    results = {}
    for numerics in NUMERICS:
        p = torch.nn.Parameter(randn(4, 40).bfloat16())
        p.grad = grad.bfloat16()
        # two groups: the parameter id that enters the random bits counts over both
        other = torch.nn.Parameter(torch.ones(3))
        optimizer = MaskedAdamW([{"params": [other]}, {"params": [p]}], lr=0.01, numerics=numerics, seed=5)
        optimizer.set_masks({1: mask})
        optimizer.step()
        zeros = torch.zeros(4, 40, dtype=torch.bfloat16 if numerics == "parity" else torch.float32)
        rounding = "stochastic" if numerics == "stochastic" else "nearest"
        update = Update(step=1, rounding=rounding, seed=5, parameter_id=1)
        start, rule = randn(4, 40).bfloat16(), AdamW(lr=0.01, weight_decay=0.01)
        master = start.float() if numerics == "fp32_master" else None
        expected = masked_adamw_ref(start, p.grad, zeros, zeros, mask, rule, update, master=master)
        assert torch.equal(p, expected[0])
        assert other not in optimizer.state
        results[numerics] = p
    assert not torch.equal(results["stochastic"], results["nearest"])


@pytest.mark.quick
def test_bf16_sgd_at_a_small_rate():
    """The reason for `numerics`: nearest changes nothing, the others move the mean as they should."""
    moved = {}
    for numerics in NUMERICS:
        p = torch.nn.Parameter(torch.full((100, 400), 1.5, dtype=torch.bfloat16))
        optimizer = MaskedSGD([p], lr=1e-5, numerics=numerics)
        for _ in range(100):
            p.grad = torch.full_like(p, 0.5)
            optimizer.step()
        moved[numerics] = float((1.5 - p.detach().double()).mean())
        master = optimizer.state[p].get("master")
    assert moved["parity"] == moved["nearest"] == 0
    gap, chance, trials = 2**-7, 5e-6 / 2**-7, 40_000 * 100
    deviation = gap * (chance * trials) ** 0.5 / 40_000
    assert abs(moved["stochastic"] - 100 * 5e-6) <= 5 * deviation < 1e-4
    # half a step of bfloat16 has not been reached yet, and the master knows
    assert moved["fp32_master"] == 0 and (master < 1.5 - 4e-4).all()


def saved(optimizer):
    """state_dict through a file, as a checkpoint has it."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.quick
@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("numerics, state", KINDS)
def test_saved_and_resumed_gives_the_same_bits(numerics, state, kind):
    whole = parameters(torch.bfloat16)
    optimizer = make(kind, whole, expert_masks(0, 5), numerics=numerics, state=state, seed=3)
    train(optimizer, whole, 3)
    taken, resumed = saved(optimizer), copy.deepcopy(whole)
    train(optimizer, whole, 3, start=3)

    fresh = make(kind, resumed, lr=123.0)  # everything comes from the state
    fresh.load_state_dict(taken)
    again = saved(fresh)
    for i, values_of in taken["state"].items():
        for name, value in values_of.items():
            assert again["state"][i][name].dtype == value.dtype and torch.equal(again["state"][i][name], value)
    train(fresh, resumed, 3, start=3)
    assert equal(values(whole), values(resumed))
    # the state was copied, not borrowed
    assert int(taken["state"][0]["step"]) == 3


@pytest.mark.quick
@pytest.mark.parametrize("kind, theirs", [(MaskedSGD, torch.optim.SGD), (MaskedAdamW, torch.optim.AdamW)])
def test_a_torch_state_is_continued(kind, theirs, rounded_sqrt):
    reference = parameters()
    optimizer = theirs(reference, foreach=False, **OPTIONS[kind])
    train(optimizer, reference, 3)
    ours = copy.deepcopy(reference)
    masked = make(kind, ours, numerics="nearest", seed=9)
    masked.load_state_dict(saved(optimizer))
    assert masked.param_groups[0]["seed"] == 9 and masked.param_groups[0]["numerics"] == "nearest"
    for params, o in ((reference, optimizer), (ours, masked)):
        train(o, params, 3, start=3)
    assert equal(values(reference), values(ours))


@pytest.mark.quick
@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_mask_that_changes_takes_its_state_along(in_place, kind):
    params = parameters(torch.bfloat16)
    masks = expert_masks(1, 4)
    optimizer = make(kind, params, masks, numerics="fp32_master")
    train(optimizer, params, 2)
    before = {k: v.clone() for k, v in optimizer.state[params[0]].items()}
    old = values(params)
    if in_place:
        masks[0].copy_(expert_masks(0, 4)[0])
    else:
        optimizer.set_masks({0: expert_masks(0, 4)[0]})
    train(optimizer, params, 1, start=2)
    state = optimizer.state[params[0]]
    assert state["slices"].tolist() == [0, 4]
    assert torch.equal(params[0][1], old[0][1])
    # expert 4 held position 1 and keeps its history, expert 0 starts from zero and its own weights
    grad = params[0].grad[[0, 4]].float()
    if kind is MaskedSGD:
        expected = before["momentum_buffer"][[0, 1]] * torch.tensor([0.0, 0.9])[:, None, None]
        expected += grad + 0.1 * torch.stack([old[0][0].float(), before["master"][1]])
        actual, moment = state["momentum_buffer"], "momentum_buffer"
    else:
        start = before["exp_avg"][[0, 1]] * torch.tensor([0.0, 1.0])[:, None, None]
        expected, actual, moment = torch.lerp(start, grad, 0.1), state["exp_avg"], "exp_avg"
    on = kept(params[0], masks[0] if in_place else optimizer.param_groups[0]["masks"][0])[[0, 4]]
    torch.testing.assert_close(actual[on], expected[on])
    assert not state[moment][0][~on[0]].any()
    off = ~on
    assert torch.equal(state["master"][0][off[0]], old[0][0].float()[off[0]])
    assert torch.equal(state["master"][1][off[1]], before["master"][1][off[1]])


@pytest.mark.quick
@pytest.mark.parametrize("kind", BOTH)
def test_missing_gradients_closures_and_a_zero_rate(kind):
    params = parameters()
    optimizer = make(kind, params)
    start = values(params)
    gradients(params, 1)
    params[1].grad = None
    assert optimizer.step(lambda: 7.5) == 7.5
    assert torch.equal(params[1], start[1]) and params[1] not in optimizer.state
    assert not torch.equal(params[0], start[0])
    optimizer.param_groups[0]["lr"] = 0.0
    start = values(params)
    train(optimizer, params, 1)
    assert equal(values(params), start) and optimizer.state[params[0]]["step"] == 2
    assert optimizer.state[params[1]]["step"] == 1

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    optimizer.param_groups[0]["lr"] = 0.01
    assert optimizer.step(closure) > sum(p.square().sum() for p in params)


@pytest.mark.quick
@pytest.mark.parametrize("kind", BOTH)
def test_a_gradient_of_no_parameter_is_not_dropped(kind):
    params, stranger = parameters(), torch.nn.Parameter(randn(3, 8))
    optimizer, start = make(kind, params), values(params)
    given = {p: randn(*p.shape) for p in params}
    with pytest.raises(
        ValueError, match=r"gradients of this optimizer's parameters; got others, of shapes \[\[3, 8\]\]"
    ):
        optimizer.step(gradients=given | {stranger: randn(3, 8)})
    assert equal(values(params), start) and not optimizer.state
    optimizer.step(gradients=given)
    assert not torch.equal(params[0], start[0])


@pytest.mark.quick
def test_a_wrapper_may_replace_the_parameters():
    """As FSDP does: masks follow the position in the group, not the tensor."""
    params, masks = parameters(), expert_masks(2)
    optimizer = make(MaskedAdamW, params, masks)
    replaced = copy.deepcopy(params)
    optimizer.param_groups[0]["params"] = replaced
    start = values(replaced)
    train(optimizer, replaced, 2)
    assert torch.equal(replaced[0][[0, 1, 3, 4, 5]], start[0][[0, 1, 3, 4, 5]])
    assert not torch.equal(replaced[0][2], start[0][2])


class Scanned(list):
    """Parameters of a group that count how often they are walked through."""

    walks = 0

    def __iter__(self):
        self.walks += 1
        return super().__iter__()


@pytest.mark.parametrize("kind", BOTH)
def test_a_parameter_is_found_without_a_walk_through_all(kind):
    """Hundreds of weights are looked for in every step; a place that was true once is not trusted."""
    params = parameters()
    optimizer = kind([{"params": params[:1]}, {"params": params[1:]}])
    masks = random_masks()
    optimizer.set_masks(masks)
    first, second = optimizer.param_groups
    second["params"] = Scanned(second["params"])
    optimizer.layout(params[-1])
    walks = second["params"].walks
    for _ in range(3):
        for i, p in enumerate(params):
            slot = optimizer._find(p)
            assert slot.group is (first, second)[i > 0] and slot.mask is masks[i] and slot.parameter_id == i
            assert slot.parameter is p
    assert second["params"].walks == walks
    second["params"][0], second["params"][2] = second["params"][2], second["params"][0]
    assert optimizer._find(params[3]).parameter_id == 1 and optimizer._find(params[1]).parameter_id == 3
    first["params"] = [torch.nn.Parameter(params[0].detach().clone()), params[0]]
    first["masks"] = [masks[0], None]
    assert optimizer._find(params[0])[2:] == (None, 1) and optimizer._find(params[3]).parameter_id == 2
    del second["params"][1:], second["masks"][1:]
    assert optimizer._find(params[1]) is optimizer._find(torch.nn.Parameter(torch.ones(2))) is None
    second["masks"].clear()
    with pytest.raises(ValueError, match="a group has 1 parameters but 0 masks"):
        optimizer.layout(params[3])


@pytest.mark.quick
def test_groups_and_copies():
    params = parameters()
    optimizer = make(MaskedSGD, params[:1], momentum=0.0)
    optimizer.add_param_group({"params": params[1:], "masks": expert_masks(0)[1:], "lr": 0.5})
    assert [len(g["masks"]) for g in optimizer.param_groups] == [1, 3]
    optimizer.set_masks(expert_masks(3))
    twin = copy.deepcopy(optimizer)
    train(optimizer, params, 1)
    train(twin, [p for g in twin.param_groups for p in g["params"]], 1)
    assert equal(values(params), values(p for g in twin.param_groups for p in g["params"]))


BAD = {
    "lr": (lambda p: MaskedSGD(p, lr=-1.0), ValueError, "lr must be at least 0; got -1.0"),
    "decay": (lambda p: MaskedAdamW(p, weight_decay=-1.0), ValueError, "weight_decay must be"),
    "momentum": (lambda p: MaskedSGD(p, momentum=-0.1), ValueError, "momentum must be"),
    "nesterov": (lambda p: MaskedSGD(p, nesterov=True), ValueError, "nesterov needs momentum"),
    "betas": (lambda p: MaskedAdamW(p, betas=(0.9, 1.0)), ValueError, "betas must be in"),
    "eps": (lambda p: MaskedAdamW(p, eps=-1.0), ValueError, "eps must be"),
    "numerics": (lambda p: MaskedAdamW(p, numerics="fp8"), ValueError, "numerics must be one of"),
    "state": (lambda p: MaskedSGD(p, state="int4"), ValueError, "state must be one of"),
    "state and numerics": (
        lambda p: MaskedAdamW(p, state="int8", numerics="nearest"),
        ValueError,
        "state 'int8' needs numerics 'stochastic' or 'fp32_master'; got 'nearest'",
    ),
    "count": (lambda p: MaskedSGD(p).set_masks([None]), ValueError, "each of 4 parameters; got 1"),
    "name": (lambda p: MaskedSGD(p).set_masks({4: None}), ValueError, "masks name parameter 4; there are 4"),
    "shape": (
        lambda p: MaskedSGD(p).set_masks({0: torch.zeros(6, 5, 1, dtype=torch.int32)}),
        ValueError,
        r"parameter 0 of shape \[6, 5, 33\]: mask must have shape \[6, 5, 2\]; got \[6, 5, 1\]",
    ),
    "dtype": (lambda p: MaskedSGD(p).set_masks({1: torch.zeros(2).long()}), TypeError, "parameter 1 .*int64"),
    "device": (
        lambda p: MaskedSGD(p).set_masks({1: torch.zeros(2, dtype=torch.int32, device="meta")}),
        ValueError,
        "mask must be on cpu; got meta",
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("call, error, message", BAD.values(), ids=BAD)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(parameters())


@pytest.mark.quick
def test_bad_masks_in_a_group_are_found_by_the_step():
    params = parameters()
    optimizer = make(MaskedSGD, params)
    gradients(params, 1)
    optimizer.param_groups[0]["masks"] = [None]
    with pytest.raises(ValueError, match="4 parameters but 1 masks"):
        optimizer.step()
    optimizer.param_groups[0]["masks"] = [None, torch.zeros(3, dtype=torch.int32), None, None]
    with pytest.raises(ValueError, match=r"parameter 1 .* must have shape \[2\]; got \[3\]"):
        optimizer.step()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
