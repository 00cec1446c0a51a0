"""WAGLE: which weights may move (NeurIPS 2024, arXiv 2410.17509; paper and code read).

    S_i = theta_i g_f,i - (1 / gamma) g_r,i g_f,i          keep the top fraction of |S| over the whole model

N counts all elements of `named_parameters()`, shared tensors once; ties go by that order, then by flat index.

Native mode: gradients are means over the counted tokens of each set, gamma is on that scale, and a score of
exactly 0 is never kept, so experts the forget set never routes to freeze themselves and `fraction` may stay
below `keep`. Official mode reproduces the released code: gradients are sums over batches of mean losses,
gamma is its mu, exactly int(keep N) weights are kept and zeros fill up, in order.

The threshold is exact and needs no score tensor: `ops.weight_score` streams histograms. Memory: one gradient
per set, the mask one bit per weight.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_unlearn.experts import experts_modules
from moe_unlearn.losses import target_mask, token_losses
from moe_unlearn.ops.bits import num_words, unpack_bits
from moe_unlearn.ops.weight_score import score_histogram, score_mask, weight_score

Batch = dict[str, Tensor]
FORMAT = "moe-unlearn weight mask 1"


@dataclass
class WeightMask:
    """A packed mask over a model's parameters.

    `keep` is the fraction asked for, `magnitudes` the mean of the two score terms, |theta g_f| and
    |g_r g_f| / gamma.
    """

    shapes: dict[str, tuple[int, ...]]
    packed: dict[str, Tensor]
    keep: float
    magnitudes: dict[str, float]

    @property
    def names(self) -> list[str]:
        """Parameter names, in `named_parameters()` order."""
        return list(self.shapes)

    def words(self, name: str) -> Tensor:
        """The packed int32 words of one parameter."""
        return self.packed[name]

    def kept(self, name: str) -> Tensor:
        """bool tensor of the parameter's shape: which of its weights may move."""
        shape = self.shapes[name]
        return unpack_bits(self.packed[name], shape[-1] if shape else 1).view(shape)

    @property
    def fraction(self) -> float:
        """Kept weights over all weights."""
        total = sum(_numel(shape) for shape in self.shapes.values())
        return sum(int(self.kept(name).sum()) for name in self.names) / max(total, 1)

    def report(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """Kept fraction by `layer`, by `kind` of matrix, and by `expert` (layer name / expert id)."""
        sums: dict[str, dict[str, list[int]]] = {"layer": {}, "kind": {}, "expert": {}}
        experts = experts_modules(model)

        def add(group: str, key: str, kept: Tensor) -> None:
            entry = sums[group].setdefault(key, [0, 0])
            entry[0] += int(kept.sum())
            entry[1] += kept.numel()

        for name in self.names:
            kept = self.kept(name)
            parts = name.split(".")
            number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
            add("layer", ".".join(parts[: number + 1]) if number is not None else "outside layers", kept)
            add("kind", ".".join(p for p in parts[(number or 0) + 1 :] if p != "weight") or name, kept)
            owner = name.rpartition(".")[0]
            if owner in experts:
                for e, of_expert in enumerate(kept):
                    add("expert", f"{owner} / {e}", of_expert)
        return {group: {k: a / b for k, (a, b) in entries.items()} for group, entries in sums.items()}

    def check(self, model: nn.Module) -> None:
        """ValueError naming the first parameter in which the mask and the model differ."""
        own = {name: tuple(p.shape) for name, p in model.named_parameters()}
        for name in [*own, *self.shapes]:
            if own.get(name) != self.shapes.get(name):
                raise ValueError(
                    f"the mask belongs to another model: {name} is {_shape(self.shapes.get(name))} in the mask "
                    f"and {_shape(own.get(name))} in the model"
                )

    def state_dict(self) -> dict:
        """Nested dict of tensors and plain values."""
        return {
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "packed": dict(self.packed),
            "keep": self.keep,
            "magnitudes": self.magnitudes,
        }

    @classmethod
    def from_state_dict(cls, state: dict) -> "WeightMask":
        """Undo `state_dict`; ValueError if words and shapes do not fit together."""
        shapes = {name: tuple(int(n) for n in shape) for name, shape in state["shapes"].items()}
        if set(shapes) != set(state["packed"]):
            raise ValueError("a mask needs words for exactly the parameters it names")
        for name, shape in shapes.items():
            words = state["packed"][name]
            expected = (*shape[:-1], num_words(shape[-1])) if shape else (1,)
            if words.dtype != torch.int32 or tuple(words.shape) != expected:
                raise ValueError(
                    f"mask of {name}: expected int32 words {list(expected)}; got {words.dtype} {list(words.shape)}"
                )
        return cls(shapes, dict(state["packed"]), float(state["keep"]), dict(state["magnitudes"]))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; it is there whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = self.state_dict()
        tensors = {name: words.cpu().contiguous() for name, words in state.pop("packed").items()}
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".mask-")
        os.close(descriptor)
        try:
            save_file(tensors, temporary, {"format": FORMAT, "state": json.dumps(state)})
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "WeightMask":
        """Read `save`'s file; ValueError for a missing, damaged or foreign one."""
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"expected format {FORMAT!r}; got {metadata.get('format')!r}")
                packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
            state = json.loads(metadata["state"])
            return cls.from_state_dict({**state, "packed": packed})
        except (OSError, SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not a weight mask: {error}") from error


def weight_mask(
    model: nn.Module,
    forget_batches: Iterable[Batch],
    retain_batches: Iterable[Batch],
    *,
    keep: float,
    gamma: float,
    official: bool = False,
    forget_loss: Callable[[nn.Module, Batch], Tensor] | None = None,
) -> WeightMask:
    """Score all weights and keep the top fraction; see the module docstring.

    `forget_loss(model, batch)` replaces the forget side's NLL: a sum over the batch's tokens in native mode,
    a mean in official mode; its sign does not matter. Parameters that do not require a gradient score 0.
    The model, its gradients and its mode are left as they were.

    Raises ValueError for keep outside (0, 1], gamma <= 0, an empty set, or a score that is not finite.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1]; got {keep}")
    if not gamma > 0:
        raise ValueError(f"gamma must be above 0; got {gamma}")
    parameters = dict(model.named_parameters())
    held = {name: p.grad for name, p in parameters.items()}
    training = model.training
    model.eval()
    try:
        forget = _gradients(model, parameters, forget_batches, official, forget_loss, "forget")
        retain = _gradients(model, parameters, retain_batches, official, None, "retain")
    finally:
        model.train(training)
        for name, p in parameters.items():
            p.grad = held[name]

    def scored(name: str) -> tuple[Tensor, Tensor, Tensor]:
        p = parameters[name].detach()
        return p, forget.get(name, torch.zeros_like(p)), retain.get(name, torch.zeros_like(p))

    magnitudes = _magnitudes(parameters, scored, gamma)
    total = sum(p.numel() for p in parameters.values())
    threshold, ties = _threshold(parameters, scored, gamma, int(keep * total), official)
    packed = {}
    for name in parameters:
        packed[name], taken = score_mask(*scored(name), gamma=gamma, threshold_bits=threshold, ties=ties)
        ties -= taken
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    return WeightMask(shapes, packed, keep, magnitudes)


def _gradients(model, parameters, batches, official, loss, side) -> dict[str, Tensor]:
    """Gradient of each parameter that has one: a mean over tokens, or a sum over batches of means."""
    for p in parameters.values():
        p.grad = None
    tokens = 0
    for batch in batches:
        count = int(target_mask(batch).sum())
        tokens += count
        if not count:
            continue
        value = token_losses(model, batch).sum() / (count if official else 1) if loss is None \
            else loss(model, batch)  # fmt: skip
        value.backward()
    if not tokens:
        raise ValueError(f"the {side} set carries no loss: it is empty or all its labels are -100")
    gradients = {}
    for name, p in parameters.items():
        if p.grad is not None:
            gradients[name] = p.grad if official else p.grad / tokens
            p.grad = None
    return gradients


def _magnitudes(parameters, scored, gamma) -> dict[str, float]:
    """Means over the model of |theta g_f| and |g_r g_f| / gamma; also where a score that is not finite shows."""
    first = second = 0.0
    total = 0
    for name in parameters:
        weight, g_f, g_r = scored(name)
        if not weight_score(weight, g_f, g_r, gamma=gamma).isfinite().all():
            raise ValueError(f"the WAGLE score of {name} is not finite: its weights or gradients are not")
        first += float((weight.float() * g_f.float()).abs().double().sum())
        second += float((g_r.float() * g_f.float()).abs().double().sum()) / gamma
        total += weight.numel()
    return {"weight_term": first / max(total, 1), "retain_term": second / max(total, 1)}


def _threshold(parameters, scored, gamma, count, official) -> tuple[int, int]:
    """Bit pattern of the count-th largest |S|, and how many elements equal to it are kept."""

    def histogram(digit: int, prefix: int = 0) -> Tensor:
        return sum(
            score_histogram(*scored(name), gamma=gamma, digit=digit, prefix=prefix).cpu() for name in parameters
        )

    if count == 0:
        return 0x7FFFFFFF, 0
    high, above = _descend(histogram(0), count)
    low, above_low = _descend(histogram(1, high), count - above)
    threshold = (high << 16) | low
    if threshold == 0 and not official:
        return 0, 0  # all that is left scores exactly 0 and stays frozen
    return threshold, count - above - above_low


def _descend(histogram: Tensor, count: int) -> tuple[int, int]:
    """(bin that holds the count-th largest, elements in higher bins)."""
    from_top = histogram.flip(0).cumsum(0)
    position = int((from_top >= count).nonzero()[0])
    above = int(from_top[position - 1]) if position else 0
    return len(histogram) - 1 - position, above


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _shape(shape) -> str:
    return "absent" if shape is None else str(list(shape))
