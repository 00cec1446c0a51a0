"""Cases of expert_wgrad: factors of one layer, the exact gradient, masks, and updates that every kernel must fuse."""

import torch

from moe_unlearn.ops import expert_wgrad, expert_wgrad_ref, masked_adamw_, masked_sgd_, route
from moe_unlearn.ops.bits import pack_bits, unpack_bits
from moe_unlearn.ops.expert_wgrad import Factors, expert_wgrad_adamw_, expert_wgrad_inner, expert_wgrad_sgd_
from moe_unlearn.testing import integers, poison, routing
from tests.ops.masked_update.cases import NUMERICS as OF_UPDATES
from tests.ops.masked_update.cases import PACKED, bits, packed
from tests.support.by_keyword import by_keyword
from tests.support.impls import Impl

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = (F32, BF16, F16)
E = 4
# M and P: 16 bytes divide the rows of the first, as tensor descriptors and CUDA need them
SHAPE, ODD = (40, 72), (37, 69)
EXPERTS = (3, 2, 1)  # half_empty gives rows to 1 and 3
# which factors are gathered row by row; the rows of the others stand in order
INDEXED = ("input", "neither", "grad", "both")


def takes(case: dict) -> bool:
    """Return whether the implementation has a kernel for what the case says of dtype, shape and numerics."""
    if case.get("impl") != "cuda":
        return True
    has_update = "numerics" not in case or NUMERICS[case["numerics"]][0] != F16
    return case.get("dtype", BF16) == BF16 and case.get("shape", SHAPE) != ODD and has_update


def factors(shape=SHAPE, dtype=BF16, pattern="skewed", tokens=40, top_k=2, *, exact=False, seed=0) -> Factors:
    """Return gradient rows in sorted order and inputs by token, small integers if `exact`."""
    index = routing(pattern, tokens, E, top_k, seed=seed)
    made = route(index, E, impl="ref")  # an emulation may have one op alone
    sizes = (tokens * top_k, shape[0]), (tokens, shape[1])
    if exact:
        grad, input = (integers(*size, dtype=dtype, low=-2, high=2, seed=seed + i) for i, size in enumerate(sizes))
    else:
        generator = torch.Generator().manual_seed(seed)
        grad, input = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return Factors(grad, input, made.expert_offsets, None, made.sorted_rows // top_k)


def scattered(made: Factors, indexed: str) -> Factors:
    """Return the same factors in sorted order, the indexed ones scattered among rows of NaN."""
    made = made._replace(input=made.input[made.input_rows], input_rows=None)
    for name in {"neither": (), "both": ("grad", "input")}.get(indexed, (indexed,)):
        rows = getattr(made, name)
        place = torch.randperm(2 * len(rows), generator=torch.Generator().manual_seed(0))[: len(rows)]
        wide = torch.full((2 * len(rows), rows.shape[1]), torch.nan, dtype=rows.dtype)
        wide[place] = rows
        made = made._replace(**{name: wide, f"{name}_rows": place})
    return made


def parts(made: Factors) -> list[Factors]:
    """Return the two groups of a batch: the first two thirds of each expert's rows, and the rest."""
    start, stop = made.expert_offsets[:-1], made.expert_offsets[1:]
    middle = (start + 2 * stop) // 3
    return [made._replace(expert_offsets=torch.stack(bounds, 1)) for bounds in ([start, middle], [middle, stop])]


def spoiled(made: Factors, experts=range(E)) -> Factors:
    """Return the factors with NaN and infinity in all that the experts do not use, and rows of none that lead nowhere.

    Columns beside the factors' own are spoiled too.
    """
    bounds = made.expert_offsets.tolist()
    bounds = list(zip(bounds[:-1], bounds[1:], strict=True)) if made.expert_offsets.dim() == 1 else bounds
    own = torch.cat([torch.arange(*bounds[e]) for e in experts])
    changed = made
    for name in ("grad", "input"):
        rows, index = getattr(made, name), getattr(made, f"{name}_rows")
        wide = torch.full((len(rows), rows.shape[1] + 16), torch.inf, dtype=rows.dtype)
        wide[::2] = torch.nan
        used = own if index is None else index[own].long()
        wide[used, 8:-8] = rows[used]
        changed = changed._replace(**{name: wide[:, 8:-8]})
        if index is not None:
            elsewhere = torch.full_like(index, 10**9)
            elsewhere[own] = index[own]
            changed = changed._replace(**{f"{name}_rows": elsewhere})
    return changed


def gold(made: Factors, experts=None) -> torch.Tensor:
    """Return dW in float64, by the reference, which is tested against a sum row by row."""
    wide = (t.double() if t is not None and t.is_floating_point() else t for t in made)
    return expert_wgrad_ref(*wide, None if experts is None else torch.as_tensor(experts, dtype=torch.int64))


def on_device(impl: Impl, made: Factors) -> Factors:
    """Return the factors on the device of an implementation, in the memory layout that they have."""
    return Factors(*(None if t is None else t.to(impl.device) for t in made))


def store(impl: Impl, made: Factors, **options) -> torch.Tensor:
    """Return dW, or a copy of `out` after it was added, on the CPU."""
    made, options = on_device(impl, made), impl.moved(options)
    with poison():
        out = expert_wgrad(*made[:3], grad_rows=made.grad_rows, input_rows=made.input_rows, impl=impl.name, **options)
    return out.cpu()


def check_inner(impl: Impl, gradients: list[Factors], kept: torch.Tensor | None = None) -> None:
    """Assert that the inner products of gradients of integers are exact, where their bits are kept, and not all 0."""
    whole = torch.stack([gold(one) for one in gradients], 1).flatten(2)
    if kept is not None:
        whole = torch.where(kept.flatten(1)[:, None], whole, 0)
    mask = None if kept is None else words_of(kept).to(impl.device)
    got = expert_wgrad_inner([on_device(impl, one) for one in gradients], mask=mask, impl=impl.name).cpu()
    assert got.dtype == F64 and got.any() and torch.equal(got, whole @ whole.mT)


def keep(*shape, seed=0) -> torch.Tensor:
    """Return bits of which some tiles, rows, words and experts have none."""
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    kept[:, ::3, :64] = False
    kept[1:3, shape[1] // 8 :] = False
    return kept


def words_of(kept: torch.Tensor) -> torch.Tensor:
    """Return the packed bits, with ones in the places of the last word that stand for no element."""
    words = pack_bits(kept)
    if kept.shape[-1] % 32:
        words[..., -1] |= -(1 << kept.shape[-1] % 32)
    return words


# ---- Updates -----------------------------------------------------------------------------------------------

# options of a rule, and the number of tensors of its state
RULES = {
    "sgd plain": ({}, 0),
    "sgd beside an unused buffer": ({"weight_decay": 0.1}, 1),
    "sgd dampening": ({"momentum": 0.8, "dampening": 0.3}, 1),
    "sgd nesterov": ({"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, 1),
    "adamw": ({}, 2),
    # a first moment that keeps no more than half is computed from the gradient on
    "adamw decay": ({"weight_decay": 0.1, "betas": (0.5, 0.95), "eps": 0.3}, 2),
}
# a weight of float32 is never rounded stochastically
NUMERICS = {name: numerics for name, numerics in OF_UPDATES.items() if name != "fp32 stochastic"}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors have the bits of each other, where NaN of any payload is NaN."""
    if a.dtype == PACKED:
        return torch.equal(a, b)
    width = {2: torch.int16, 4: torch.int32}[a.element_size()]
    a, b = (torch.where(t.isnan(), torch.nan, t).contiguous() for t in (a, b))
    return a.dtype == b.dtype and torch.equal(a.view(width), b.view(width))


def check_update(
    impl: Impl,
    rule: str,
    numerics: str,
    made: Factors | None = None,
    *,
    experts=EXPERTS,
    mask: torch.Tensor | str | None = "random",
    layout: str = "contiguous",
) -> None:
    """Assert that the fused update has the bits of the reference's masked update by the gradient, and no others.

    The gradient is what the implementation stores, or the exact one of integers for Triton, whose store may sum in
    another order. NaN stands in the experts that are not listed, in the state of weights without a bit, and in what
    the first step does not read; but zeros in packed state, of which blocks are coded anew. Steps 1 and 3 are taken.
    """
    options, states = RULES[rule]
    dtype, state_dtype, rounding, has_master = NUMERICS[numerics]
    if made is None:
        made = factors(dtype=BF16 if impl.kind == "cuda" else dtype, pattern="half_empty", exact=impl.kind == "triton")
    experts = None if experts is None else torch.tensor(experts, dtype=torch.int64)
    shape = (E if experts is None else len(experts), made.grad.shape[1], made.input.shape[1])
    if isinstance(mask, str):
        mask = words_of(keep(*shape))
    kept = torch.ones(shape, dtype=torch.bool) if mask is None else unpack_bits(mask, shape[-1])
    generator = torch.Generator().manual_seed(1)

    def randn(*size):
        return torch.randn(size, generator=generator)

    weight = randn(E, *shape[1:]).to(dtype)
    weight[-1].flatten()[33:35] = torch.tensor([-0.0, torch.inf])
    trained = slice(None) if experts is None else experts
    weight[[e for e in range(E) if experts is not None and e not in experts]] = torch.nan
    tensors = {"weight": weight, "master": weight[trained].float() + randn(*shape) / 512 if has_master else None}
    names = ("exp_avg", "exp_avg_sq") if states == 2 else ("momentum_buffer",)
    for name in names[:states]:
        value = torch.full(shape, torch.nan) if states == 1 else randn(*shape).square() / 16
        if state_dtype == PACKED:
            value = torch.zeros(shape) if states == 1 else torch.where(kept, value, 0)
            tensors[name] = packed(value, second=name == "exp_avg_sq")
        else:
            tensors[name] = torch.where(kept, value, torch.nan).to(state_dtype)
    tensors |= {"momentum_buffer": None} if states == 0 else {}
    before, starts = weight.clone(), {name: tensors[name].clone() for name in names[:states]}
    narrow = dtype == state_dtype == made.grad.dtype and rounding == "nearest" and not has_master
    own = {"experts": experts, "out_dtype": dtype if narrow else F32}
    dw = gold(made, experts).float() if impl.kind == "triton" else store(impl, made, **own)
    moved = {k: impl.moved(t, layout if t is None or t.dtype != PACKED else "contiguous") for k, t in tensors.items()}
    there = {"factors": on_device(impl, made), "experts": impl.moved(experts)}
    there["mask"] = None if mask is None else mask.to(impl.device)  # whose rows may be one in memory
    fused, plain = (expert_wgrad_adamw_, masked_adamw_) if states == 2 else (expert_wgrad_sgd_, masked_sgd_)
    for step in (1, 3):
        rest = options | {"lr": 0.03, "step": step, "rounding": rounding, "seed": 2**35 + 5, "parameter_id": 3}
        by_keyword(fused)(**moved, **there, impl=impl.name, **rest)
        state = {k: t for k, t in tensors.items() if k != "weight"}
        # a sum of negative zeros alone may keep its sign or not
        by_keyword(plain)(weight, dw + 0.0, mask=mask, slices=experts, impl="ref", **state, **rest)
    for name, expected in tensors.items():
        assert expected is None or same_bits(moved[name].cpu(), expected), name
    touched = torch.zeros(weight.shape, dtype=torch.bool)
    touched[trained] = kept
    of_state = [] if state_dtype == PACKED else [(n, starts[n], ~kept) for n in starts]
    for name, expected, kept_back in (("weight", before, ~touched), *of_state):
        left, expected = (bits(t[kept_back]) for t in (moved[name].cpu(), expected))
        assert torch.equal(left, expected), f"{name}: what does not train has other bits"
    assert not kept.any() or not same_bits(weight[touched], before[touched])
