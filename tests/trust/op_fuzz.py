"""Calls every public op on random operands, legal ones and ones with a single fault, on all implementations in turn.

    python -m tests.trust.op_fuzz legal|illegal FIRST COUNT IMPL...

Call number i is the same whatever its neighbours. Its number is printed before it is made, so that whoever reads the
output of a process that died knows which call killed it; a verdict that is wrong follows as one line. A legal call must
return results of the same shapes and dtypes in every implementation. An illegal one must raise the same TypeError,
ValueError or IndexError in every one, and leave its operands as they were.
"""

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_unlearn import ops
from moe_unlearn.ops import bits
from moe_unlearn.ops.expert_wgrad import (
    Factors,
    expert_wgrad_adamw_,
    expert_wgrad_inner,
    expert_wgrad_sgd_,
)
from moe_unlearn.ops.retain_weights import moments, tilted_weights
from moe_unlearn.ops.weight_score import score_between, score_magnitudes

CLEAR = (TypeError, ValueError, IndexError)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = {torch.int32: 2**31 - 1, torch.int64: 2**63 - 1}
Operands = dict[str, Any]
Fault = Callable[[Tensor, random.Random], Tensor]


class Dice(random.Random):
    """Random sizes and tensors."""

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(self.getrandbits(32))
        return torch.randn(shape, generator=generator).to(dtype)

    def below(self, limit: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        generator = torch.Generator().manual_seed(self.getrandbits(32))
        return torch.randint(limit, shape, generator=generator).to(dtype)

    def some(self, limit: int, dtype: torch.dtype) -> Tensor | None:
        """Return distinct numbers below `limit`, at least one of them, or None."""
        chosen = self.sample(range(limit), self.randint(1, limit))
        return self.choice([None, torch.tensor(chosen, dtype=dtype)])

    def words(self, *shape: int) -> Tensor | None:
        return self.choice([None, bits.pack_bits(self.below(2, *shape).bool())])


def routed(dice: Dice) -> tuple[int, int, int, ops.Routing]:
    """Return tokens, experts per token, experts and their routing, some of whose rows may be elsewhere."""
    tokens, top_k, experts = dice.randint(0, 20), dice.randint(1, 3), dice.randint(1, 5)
    ids = dice.below(experts + dice.randint(0, 1), tokens, top_k)
    return tokens, top_k, experts, ops.route(ids, experts, impl="ref")


def route(dice: Dice) -> Operands:
    tokens, experts, groups = dice.randint(0, 20), dice.randint(1, 5), dice.randint(1, 3)
    kind = dice.choice([torch.int32, torch.int64])
    tilted = dice.random() < 0.5
    return {
        "top_k_index": dice.below(experts + 2, tokens, dice.randint(1, 3), dtype=kind) - 1,
        "num_experts": experts,
        "group": dice.choice([None, dice.below(groups + 1, tokens, dtype=kind) - 1]),
        "num_groups": groups,
        "log_tilt": dice.normal(experts, dtype=torch.float32) if tilted else None,
        "log_weight": dice.normal(tokens, dtype=torch.float32) if tilted else None,
    }


def expert_mlp(dice: Dice) -> Operands:
    tokens, top_k, experts, made = routed(dice)
    hidden, inner, dtype = dice.randint(1, 9), dice.randint(1, 9), dice.choice(FLOATS)
    return {
        "hidden_states": dice.normal(tokens, hidden, dtype=dtype),
        "top_k_weights": dice.normal(tokens, top_k, dtype=dtype),
        "sorted_rows": made.sorted_rows,
        "expert_offsets": made.expert_offsets,
        "gate_up_proj": dice.normal(experts, 2 * inner, hidden, dtype=dtype),
        "down_proj": dice.normal(experts, hidden, inner, dtype=dtype),
        "trained_experts": dice.some(experts, torch.int32),
    }


def layer_with_gradients(gate_up_proj: Tensor, down_proj: Tensor, impl: str, **operands: Any) -> list[Tensor]:
    """Run `expert_mlp` and its backward pass."""
    weights = ops.ExpertWeights(gate_up_proj.detach().requires_grad_(), down_proj.detach().requires_grad_())
    out = ops.expert_mlp(weights=weights, impl=impl, **operands)
    return [out.detach(), *torch.autograd.grad(out.sum(), [weights.gate_up_proj, weights.down_proj])]


def factors(dice: Dice, shape: tuple[int, int], experts: int, dtype: torch.dtype, prefix: str = "") -> Operands:
    """Return the operands of `Factors`, rows of either side in order or by number."""
    counts = [dice.randint(0, 6) for _ in range(experts)]
    rows = sum(counts)
    offsets = torch.tensor([sum(counts[:e]) for e in range(experts + 1)], dtype=torch.int32)
    if dice.random() < 0.3:
        offsets = torch.stack([offsets[:-1], offsets[1:] - (offsets.diff() > 1).int()], 1)
    made: Operands = {f"{prefix}expert_offsets": offsets}
    for name, width in zip(("grad", "input"), shape, strict=True):
        indexed, size = dice.random() < 0.5, rows + dice.randint(1, 3)
        kind = dice.choice([torch.int32, torch.int64])
        made[f"{prefix}{name}"] = dice.normal(size if indexed else rows, width, dtype=dtype)
        made[f"{prefix}{name}_rows"] = dice.below(size, rows, dtype=kind) if indexed else None
    return made


def store(dice: Dice, **more: Any) -> Operands:
    shape, experts, dtype = (dice.randint(1, 9), dice.randint(1, 40)), dice.randint(1, 4), dice.choice(FLOATS)
    listed = dice.some(experts, dice.choice([torch.int32, torch.int64]))
    count = experts if listed is None else len(listed)
    mask = dice.words(count, *shape)
    return factors(dice, shape, experts, dtype) | {"experts": listed, "mask": mask}


def accumulate(dice: Dice) -> Operands:
    made = store(dice)
    return made | {"out": dice.normal(*_shape(made), dtype=made["grad"].dtype)}


def _shape(made: Operands) -> tuple[int, int, int]:
    """Return the shape [M_e, M, P] of the gradient of the listed experts."""
    count = len(made["expert_offsets"]) - (made["expert_offsets"].dim() == 1)
    return count if made["experts"] is None else len(made["experts"]), made["grad"].shape[1], made["input"].shape[1]


def _side(operands: Operands, prefix: str = "") -> Factors:
    """Take the factors out of the operands."""
    return Factors(**{name: operands.pop(f"{prefix}{name}") for name in Factors._fields})


def sgd(dice: Dice) -> Operands:
    made = store(dice)
    count = len(made["expert_offsets"]) - (made["expert_offsets"].dim() == 1)
    weight = dice.normal(count, *_shape(made)[1:], dtype=dice.choice(FLOATS))
    return made | {"weight": weight, "momentum_buffer": torch.zeros(_shape(made), dtype=weight.dtype)}


def run_sgd(**operands: Any) -> list[Tensor]:
    side = _side(operands)
    weight, buffer = operands.pop("weight"), operands.pop("momentum_buffer")
    expert_wgrad_sgd_(weight, buffer, side, ops.SGD(0.1, 0.9), ops.Update(1), **operands)
    return [weight, buffer]


def adamw(dice: Dice) -> Operands:
    made = sgd(dice)
    moment = made.pop("momentum_buffer")
    return made | {"exp_avg": moment, "exp_avg_sq": moment.clone()}


def run_adamw(**operands: Any) -> list[Tensor]:
    side = _side(operands)
    tensors = [operands.pop(name) for name in ("weight", "exp_avg", "exp_avg_sq")]
    expert_wgrad_adamw_(*tensors, side, ops.AdamW(0.1), ops.Update(1), **operands)
    return tensors


def inner(dice: Dice) -> Operands:
    shape, experts, dtype = (dice.randint(1, 9), dice.randint(1, 9)), dice.randint(1, 4), dice.choice(FLOATS)
    sides = factors(dice, shape, experts, dtype, "f_") | factors(dice, shape, experts, dtype, "r_")
    return sides | {"experts": dice.some(experts, torch.int64)}


def run_inner(experts: Tensor | None, impl: str, **operands: Any) -> Tensor:
    return expert_wgrad_inner([_side(operands, "f_"), _side(operands, "r_")], experts=experts, impl=impl)


def gram(dice: Dice) -> Operands:
    shape, dtype = [dice.randint(1, 9) for _ in range(dice.randint(1, 3))], dice.choice(FLOATS)
    return {"a": dice.normal(*shape, dtype=dtype), "b": dice.normal(*shape, dtype=dtype), "mask": dice.words(*shape)}


def run_gram(a: Tensor, b: Tensor, mask: Tensor | None, impl: str) -> Tensor:
    return ops.gram([[a], [b]], masks=[mask], impl=impl)


def gram_factors(dice: Dice) -> Operands:
    rows, dtype = dice.randint(0, 12), dice.choice(FLOATS)
    inside = sorted(dice.randint(0, rows) for _ in range(dice.randint(1, 4)))
    return {
        "a": dice.normal(rows, width := dice.randint(1, 6), dtype=dtype),
        "b": dice.normal(rows, width, dtype=dtype),
        "inputs": dice.normal(rows, dice.randint(1, 6), dtype=dtype),
        "expert_offsets": torch.tensor([0, *inside], dtype=dice.choice([torch.int32, torch.int64])),
    }


def run_gram_factors(a: Tensor, b: Tensor, **operands: Any) -> Tensor:
    return ops.gram_factors([a, b], **operands)


def masked(dice: Dice) -> Operands:
    shape = [dice.randint(1, 5) for _ in range(dice.randint(1, 3))]
    slices, dtype = dice.some(shape[0], torch.int64), dice.choice(FLOATS)
    part = [shape[0] if slices is None else len(slices), *shape[1:]]
    made = {"param": dice.normal(*shape, dtype=dtype), "grad": dice.normal(*part, dtype=dtype), "slices": slices}
    return made | {"m": torch.zeros(part, dtype=dtype), "mask": dice.words(*part)}


def run_masked(param: Tensor, grad: Tensor, m: Tensor, mask: Tensor | None, **operands: Any) -> list[Tensor]:
    ops.masked_sgd_(param, grad, m, mask, ops.SGD(0.1, 0.9), ops.Update(1), **operands)
    return [param, m]


def masked_pair(dice: Dice) -> Operands:
    made = masked(dice)
    return made | {"v": made["m"].clone()}


def run_masked_pair(
    param: Tensor, grad: Tensor, m: Tensor, v: Tensor, mask: Tensor | None, **rest: Any
) -> list[Tensor]:
    ops.masked_adamw_(param, grad, m, v, mask, ops.AdamW(0.1), ops.Update(1), **rest)
    return [param, m, v]


def token_loss(dice: Dice) -> Operands:
    tokens, hidden, vocabulary, dtype = dice.randint(0, 9), dice.randint(1, 9), dice.randint(1, 40), dice.choice(FLOATS)
    labels = dice.below(vocabulary, tokens).masked_fill(dice.below(4, tokens) == 0, -100)
    return {
        "hidden_states": dice.normal(tokens, hidden, dtype=dtype),
        "weight": dice.normal(vocabulary, hidden, dtype=dtype),
        "labels": labels,
        "token_weights": dice.choice([None, dice.normal(tokens, dtype=torch.float32)]),
    }


def run_token_loss(hidden_states: Tensor, weight: Tensor, **operands: Any) -> list[Tensor]:
    leaves = [hidden_states.detach().requires_grad_(), weight.detach().requires_grad_()]
    loss = ops.token_loss(leaves[0], ops.Head(leaves[1]), **operands)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def members(dice: Dice) -> Operands:
    tokens, experts = dice.randint(1, 40), dice.randint(1, 40)
    return {
        "words": bits.pack_bits(dice.below(2, tokens, experts).bool()),
        "tilt": dice.normal(experts, dtype=torch.float64),
        "bias": dice.random(),
        "cap": dice.choice([None, 1.5]),
    }


def scored(dice: Dice) -> Operands:
    shape, dtype = [dice.randint(0, 9) for _ in range(dice.randint(1, 3))], dice.choice(FLOATS)
    return {name: dice.normal(*shape, dtype=dtype) for name in ("weight", "grad_forget", "grad_retain")}


def run_histogram(**operands: Any) -> Tensor:
    return ops.score_histogram(**operands, gamma=2.0, digit=0)


def run_mask(**operands: Any) -> tuple[Tensor, Tensor]:
    return ops.score_mask(**operands, gamma=2.0, threshold_bits=1 << 29, ties=2)


def run_between(**operands: Any) -> tuple[Tensor, ...]:
    *found, above = score_between(**operands, gamma=2.0, low=1 << 28, high=1 << 29, most=1 << 20)
    return *found, torch.tensor(above)


OPS: dict[str, tuple[Callable[[Dice], Operands], Callable[..., Any]]] = {
    "route": (route, ops.route),
    "expert_mlp": (expert_mlp, layer_with_gradients),
    "expert_wgrad": (store, ops.expert_wgrad),
    "expert_wgrad.accumulate": (accumulate, ops.expert_wgrad),
    "expert_wgrad.sgd": (sgd, run_sgd),
    "expert_wgrad.adamw": (adamw, run_adamw),
    "expert_wgrad.inner": (inner, run_inner),
    "gram": (gram, run_gram),
    "gram.factors": (gram_factors, run_gram_factors),
    "masked_update.sgd": (masked, run_masked),
    "masked_update.adamw": (masked_pair, run_masked_pair),
    "token_loss": (token_loss, run_token_loss),
    "retain_weights": (members, tilted_weights),
    "retain_weights.moments": (members, moments),
    "weight_score.histogram": (scored, run_histogram),
    "weight_score.mask": (scored, run_mask),
    "weight_score.between": (scored, run_between),
    "weight_score.magnitudes": (scored, score_magnitudes),
}


# ---- Faults ------------------------------------------------------------------------------------------------


def one_more_dimension(t: Tensor, dice: random.Random) -> Tensor:
    return t.unsqueeze(0).unsqueeze(0)  # one alone makes bounds of offsets


def longer(t: Tensor, dice: random.Random) -> Tensor:
    return torch.cat([t, t.new_zeros(7, *t.shape[1:])])


def other_dtype(t: Tensor, dice: random.Random) -> Tensor:
    return t.to(torch.complex64)


def elsewhere(t: Tensor, dice: random.Random) -> Tensor:
    return t.to("meta")


def outside(sizes: Callable[[Operands], int]) -> Callable[[Operands, str, random.Random], Tensor]:
    """Return the fault that one index leads outside of what has this size."""

    def fault(operands: Operands, name: str, dice: random.Random) -> Tensor:
        wrong, size = operands[name].clone(), sizes(operands)
        largest = LARGEST[wrong.dtype]
        far = [-1, -size - 1, size, size + dice.randint(0, 10**6), largest, -largest - 1]
        wrong[dice.randrange(len(wrong))] = dice.choice(far)
        return wrong

    return fault


def steep(operands: Operands, name: str, dice: random.Random) -> Tensor:
    """Return offsets, or bounds, of which one is negative, falls or is beyond all rows."""
    wrong = operands[name].clone()
    largest = LARGEST[wrong.dtype]
    kind = dice.choice(["first", "last", "falls"])
    if kind == "falls":
        e = dice.randrange(1, len(wrong)) if wrong.dim() == 1 else dice.randrange(len(wrong))
        if wrong.dim() == 1:
            wrong[e] = wrong[e - 1] - dice.choice([1, 10**6])
        else:
            wrong[e, 1] = wrong[e, 0] - dice.choice([1, 10**6])
    elif kind == "first":
        wrong.view(-1)[0] = dice.choice([-1, -(10**6), -largest - 1])
    else:
        wrong.view(-1)[-1] = dice.choice([10**6, largest])
    return wrong


def _experts(operands: Operands, prefix: str) -> int:
    offsets = operands[f"{prefix}expert_offsets"]
    return len(offsets) - (offsets.dim() == 1)


def faults_of(op: str, made: Operands) -> list[tuple[str, Callable[[Dice], Tensor]]]:
    """Return what can be wrong with these operands, by the name of one of them."""
    found: list[tuple[str, Callable[[Dice], Tensor]]] = []
    for name, value in made.items():
        if not isinstance(value, Tensor):
            continue
        plain: list[Fault] = [one_more_dimension, longer, other_dtype, elsewhere]
        for fault in plain:
            if (
                fault is longer
                and not _has_a_length(op, name, made)
                or fault is elsewhere
                and not _has_a_place(op, made)
            ):
                continue
            found.append((name, lambda dice, value=value, fault=fault: fault(value, dice)))
        index = index_faults(name, made)
        if index is not None and value.numel():
            found += [(name, lambda dice, name=name, index=index: index(made, name, dice))] * 6
    return found


def _has_a_place(op: str, made: Operands) -> bool:
    """Return whether other operands stand on the device where this one must be."""
    alone = op == "route" and made["group"] is None and made["log_tilt"] is None
    return not alone and not op.startswith("retain_weights")  # a tilt goes where the words are


def _has_a_length(op: str, name: str, made: Operands) -> bool:
    """Return whether the other operands say how long this one is."""
    if op.startswith("retain_weights"):
        return False  # words say how many tokens there are, and a few experts more fit into them
    if op == "token_loss":
        return name != "weight"
    if op == "route":
        return name != "top_k_index" or made["group"] is not None or made["log_weight"] is not None
    if op.startswith("masked_update"):
        return name != "param" or made["slices"] is None
    if op.startswith("expert_wgrad"):
        # nobody's are rows beyond the last offset and bounds of experts not listed; one may be listed twice
        bounds = name.endswith("offsets") and made[name].dim() == 2
        return not bounds and not name.endswith(("grad", "input", "_rows", "experts"))
    if op == "gram.factors":
        return name != "expert_offsets" or int(made[name][-1]) > 0
    return True


def index_faults(name: str, made: Operands) -> Callable[[Operands, str, random.Random], Tensor] | None:
    prefix = name[:2] if name[:2] in ("f_", "r_") else ""
    short = name.removeprefix(prefix)
    if short == "expert_offsets":
        return steep
    if short in ("grad_rows", "input_rows") and _all_rows_read(made, prefix):
        return outside(lambda o: len(o[f"{prefix}{short.removesuffix('_rows')}"]))
    if short == "sorted_rows" and int(made["expert_offsets"][-1]) == len(made["sorted_rows"]):
        return outside(lambda o: len(o["sorted_rows"]))
    if short in ("experts", "trained_experts"):
        where = "f_" if "f_expert_offsets" in made else ""
        return outside(lambda o: _experts(o, where))
    if short == "slices":
        return outside(lambda o: len(o["param"]))
    return None


def _all_rows_read(made: Operands, prefix: str) -> bool:
    """Return whether each position belongs to a listed expert."""
    offsets, rows = made[f"{prefix}expert_offsets"], made[f"{prefix}grad_rows"]
    rows = made[f"{prefix}input_rows"] if rows is None else rows
    return made["experts"] is None and offsets.dim() == 1 and int(offsets[-1]) == len(rows)


# ---- Calls -------------------------------------------------------------------------------------------------


def _copied(operands: Operands) -> Operands:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in operands.items()}


def _same(a: Operands, b: Operands) -> bool:
    pairs = [(a[name], b[name]) for name in a if isinstance(a[name], Tensor) and not a[name].is_meta]
    return all(torch.equal(x, y) for x, y in pairs)


def _seen(result: Any) -> str:
    """Describe the shapes and dtypes of what a call returned."""
    tensors = [result] if isinstance(result, Tensor) else result
    return ", ".join(f"{t.dtype} {list(t.shape)}" for t in tensors)


def verdicts(kind: str, number: int, impls: list[str]) -> list[str]:
    """Make one call with each implementation and return what was wrong with it."""
    dice = Dice(f"{kind} {number}")
    op, (make, run) = list(OPS.items())[number % len(OPS)]
    made, where = make(dice), op
    if kind == "illegal":
        choices = faults_of(op, made)
        name, fault = dice.choice(choices)
        made = made | {name: fault(dice)}
        shown = made[name].tolist() if made[name].numel() < 9 and not made[name].is_meta else _seen(made[name])
        where = f"{op}({name} = {shown})"
    found = {}
    for impl in impls:
        operands = _copied(made)
        try:
            found[impl] = _seen(run(**operands, impl=impl))
            if kind == "illegal":
                return [f"{where}: {impl} returned {found[impl]}"]
        except CLEAR as error:
            found[impl] = f"{type(error).__name__}: {error}"
            if kind == "legal":
                return [f"{where}: {impl} refused it: {found[impl]}"]
            if not _same(operands, made):
                return [f"{where}: {impl} changed its operands"]
        except Exception as error:
            return [f"{where}: {impl} raised {type(error).__name__}: {error}"]
    return [] if len(set(found.values())) == 1 else [f"{where}: {found}"]


def main() -> None:
    """Make the calls that the command line names."""
    kind, first, count, *impls = sys.argv[1:]
    for number in range(int(first), int(first) + int(count)):
        print(number, flush=True)
        for line in verdicts(kind, number, impls):
            print("wrong:", " ".join(line.split()), flush=True)


if __name__ == "__main__":
    main()
