"""The class of weight masks, one packed bit for each weight of a model, with its safetensors file."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_unlearn.checkpoint.sealed import read_sealed
from moe_unlearn.checkpoint.tensor_file import kind_of, tensor_file
from moe_unlearn.masks.shards import shared_out
from moe_unlearn.ops.bits import pack_bits, unpack_bits, words_shape
from moe_unlearn.ranks import is_first, on_first
from moe_unlearn.sharding import is_sharded, part, whole

FORMAT = "moe-unlearn weight mask 2"
_FORMER = "moe-unlearn weight mask 1"  # without a digest
_BYTES = 1 << 20  # of words counted at a time, of which each takes 16 meanwhile
_BITS_IN_BYTE = torch.tensor([byte.bit_count() for byte in range(256)])


@dataclass(frozen=True)
class WeightMask:
    """One bit per weight of a model, packed; made by `weight_mask`.

    Of a model whose weights ranks share out (`sharding`), each rank holds the words of its rows; then every rank has to
    call what is computed of the mask, and `save`, which the first rank writes.
    """

    shapes: dict[str, tuple[int, ...]]  # in `named_parameters()` order
    packed: dict[str, Tensor]  # int32 words, layout `ops.bits`; DTensors where ranks share them out
    keep: float  # the fraction asked for
    gamma: float = 1.0
    official: bool = False
    magnitudes: dict[str, float] = field(default_factory=dict)  # mean |theta g_f|, mean |g_r g_f| / gamma

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep of a mask must be a fraction between 0 and 1; got {self.keep}")
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma of a mask must be finite and above 0; got {self.gamma}")

    @property
    def names(self) -> list[str]:
        """Return the parameter names, in `named_parameters()` order."""
        return list(self.shapes)

    def words(self, name: str) -> Tensor:
        """Return the packed int32 words [..., ceil(n / 32)] of one parameter, of all its rows."""
        return whole(self.packed[name])

    @property
    def shared(self) -> bool:
        """Return whether ranks share the words out."""
        return any(map(is_sharded, self.packed.values()))

    def kept(self, name: str) -> Tensor:
        """Return a bool tensor of the parameter's shape, True where a weight may move."""
        return self.unpacked(name, self.words(name))

    def unpacked(self, name: str, words: Tensor) -> Tensor:
        """Return `kept` of a parameter from all its words."""
        shape = self.shapes[name]
        return unpack_bits(words, shape[-1] if shape else 1).view(shape)

    @property
    def fraction(self) -> float:
        """Return kept weights over all weights; below `keep` where scores are exactly 0 (native mode)."""
        counts = [self._count(name) for name in self.names]
        return sum(kept for kept, _ in counts) / max(sum(total for _, total in counts), 1)

    @property
    def fraction_per_layer(self) -> dict[str, float]:
        """Return the kept fraction of each decoder layer, "outside layers" for embeddings, final norm and head."""
        return _fractions((_layer_and_kind(name)[0], *self._count(name)) for name in self.names)

    @property
    def fraction_per_kind(self) -> dict[str, float]:
        """Return the kept fraction of each kind of matrix: the same parameter in all layers."""
        return _fractions((_layer_and_kind(name)[1], *self._count(name)) for name in self.names)

    @property
    def fraction_per_expert(self) -> dict[str, Tensor]:
        """Return the kept fraction of each expert, [E] float64, by experts module."""
        kept: dict[str, Tensor] = {}
        total: dict[str, float] = {}
        for name, shape in self.shapes.items():
            owner = _experts_owner(name)
            # parameters of an experts module are stacked by expert along their first dimension
            if owner is not None and len(shape) >= 2:
                counts = _kept_per_row(self.words(name)).reshape(shape[0], -1).sum(1)
                kept[owner] = kept.get(owner, 0) + counts.double()
                total[owner] = total.get(owner, 0) + _numel(shape[1:])
        return {owner: counts / total[owner] for owner, counts in kept.items()}

    def differing(self, other: "WeightMask") -> dict[str, int]:
        """Count the weights that one of two masks of a model keeps and the other does not, by parameter.

        Gradients whose sums have another order, as those of FSDP2 have with more batches than ranks, move scores within
        their rounding, so that weights next to the threshold may differ. Raises ValueError for masks of other shapes.
        """
        if self.shapes != other.shapes:
            raise ValueError("expected two masks of one model; their parameters differ in name or shape")
        found = {}
        for name in self.names:
            ours, theirs = self.words(name).cpu(), other.words(name).cpu()
            found[name] = int(_kept_per_row(ours ^ theirs).sum())
        return found

    def check(self, model: nn.Module) -> None:
        """Raise ValueError naming the first parameter in which the mask and the model differ, if there is one."""
        own = {name: tuple(p.shape) for name, p in model.named_parameters()}
        for name in [*own, *self.shapes]:
            if own.get(name) != self.shapes.get(name):
                raise ValueError(
                    f"the mask belongs to another model: {name} is {_shape(self.shapes.get(name))} in the "
                    f"mask and {_shape(own.get(name))} in {type(model).__name__}"
                )

    def state_dict(self) -> dict:
        """Return the mask as a nested dict of tensors and plain values; words that were shared out, on the CPU."""
        packed = {name: self.words(name).cpu() if is_sharded(own) else own for name, own in self.packed.items()}
        return self._settings() | {"packed": packed}

    def _settings(self) -> dict:
        return {
            "shapes": [[name, list(shape)] for name, shape in self.shapes.items()],
            "keep": self.keep,
            "gamma": self.gamma,
            "official": self.official,
            "magnitudes": dict(self.magnitudes),
        }

    @classmethod
    def from_state_dict(cls, state: dict) -> "WeightMask":
        """Undo `state_dict`; ValueError if words and shapes do not fit together."""
        shapes = {str(name): tuple(shape) for name, shape in state["shapes"]}
        if shapes.keys() != state["packed"].keys():
            different = sorted(shapes.keys() ^ state["packed"].keys())
            raise ValueError(f"words and shapes name different parameters: {different[0]!r}")
        for name, shape in shapes.items():
            _check_words(name, shape, state["packed"][name])
        magnitudes = {str(k): float(v) for k, v in state["magnitudes"].items()}
        keep, gamma, official = float(state["keep"]), float(state["gamma"]), bool(state["official"])
        return cls(shapes, dict(state["packed"]), keep, gamma, official, magnitudes)

    def save(self, path: str | Path) -> None:
        """Write one sealed safetensors file, the same bytes for equal masks; it appears whole or not at all."""
        about = {"format": FORMAT, "state": json.dumps(self._settings())}

        def write(packed: dict[str, Tensor]) -> None:
            # safetensors' own save_file writes the entries of `about` in any order
            kinds = {name: kind_of(words) for name, words in packed.items()}
            with tensor_file(Path(path), kinds, about, sealed=True) as write_tensor:
                for name, words in packed.items():
                    write_tensor(name, words)

        self.written_once(write)

    def written_once(self, write: Callable[[dict[str, Tensor]], None]) -> None:
        """Run `write` of all words, by name, where they lie; if ranks share the mask, on the first alone and the CPU.

        No other rank has the words of more than one parameter. An error in `write` ends all.
        """
        if not self.shared:
            write(self.packed)
            return
        packed = {}
        for name in self.packed:
            words = self.words(name)
            if is_first():
                packed[name] = words.cpu()
        on_first(partial(write, packed))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> "WeightMask":
        """Read what `save` wrote, to the CPU; ValueError for a missing, damaged or foreign file.

        Of a `model` whose weights ranks share out, each rank keeps the words of its rows, on their device, and reads
        those of one parameter at a time. A file of an earlier version has no digest, of which a warning is logged.
        """
        parameters = {} if model is None else dict(model.named_parameters())

        def begun(about: dict[str, str]) -> Callable[[str, Tensor], Tensor]:
            shapes = {str(name): tuple(shape) for name, shape in json.loads(about["state"])["shapes"]}

            def take(name: str, words: Tensor) -> Tensor:
                parameter = parameters.get(name)
                if parameter is None or shapes.get(name) != tuple(parameter.shape):
                    return words
                _check_words(name, shapes[name], words)
                return shared_out(words, parameter)

            return take

        remedy = "WeightMask.load(path).save(path) adds one"
        try:
            packed, about = read_sealed(Path(path), FORMAT, former=_FORMER, remedy=remedy, begun=begun)
            return cls.from_state_dict({**json.loads(about["state"]), "packed": packed})
        except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a weight mask: {error}") from error

    def _count(self, name: str) -> tuple[int, int]:
        return int(_kept_per_row(self.words(name)).sum()), _numel(self.shapes[name])


def _kept_per_row(words: Tensor) -> Tensor:
    """Count the set bits along the last dimension, of some rows at a time."""
    rows = words.cpu().contiguous().view(torch.uint8)
    some = max(_BYTES // max(rows.shape[-1], 1), 1)
    blocks = rows.reshape(-1, rows.shape[-1]).split(some) if rows.numel() else []
    counts = [_BITS_IN_BYTE[block.long()].sum(-1) for block in blocks]
    return torch.cat(counts).view(rows.shape[:-1]) if counts else torch.zeros(rows.shape[:-1], dtype=torch.int64)


def _fractions(entries: Iterable[tuple[str, int, int]]) -> dict[str, float]:
    """Compute, for each key of (key, kept, total), the ratio of the two sums; keys in order of appearance."""
    sums: dict[str, tuple[int, int]] = {}
    for key, kept, total in entries:
        before = sums.get(key, (0, 0))
        sums[key] = (before[0] + kept, before[1] + total)
    return {key: kept / max(total, 1) for key, (kept, total) in sums.items()}


def _layer_and_kind(name: str) -> tuple[str, str]:
    """Split "model.layers.3.mlp.experts.down_proj" into ("model.layers.3", "mlp.experts.down_proj")."""
    parts = name.removesuffix(".weight").split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return "outside layers", ".".join(parts)
    return ".".join(parts[: number + 1]), ".".join(parts[number + 1 :])


def _experts_owner(name: str) -> str | None:
    owner = name.rpartition(".")[0]
    # PEFT wraps an experts module, under the same name, in layers called base_layer
    plain = [part for part in owner.split(".") if part != "base_layer"]
    return ".".join(plain) if plain and plain[-1] == "experts" else None


def _check_words(name: str, shape: tuple, words: Tensor) -> None:
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"mask of {name}: a shape is a list of sizes; got {list(shape)}")
    width = shape[-1] if shape else 1
    expected = words_shape(shape)
    if words.dtype != torch.int32 or tuple(words.shape) != expected:
        raise ValueError(
            f"mask of {name}: expected int32 words {list(expected)}; got {words.dtype} {list(words.shape)}"
        )
    allowed = pack_bits(torch.ones(width, dtype=torch.bool)).to(words.device)
    if (part(words) & ~allowed).any():
        raise ValueError(f"mask of {name}: bits are set behind the end of a row")


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _shape(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else str(list(shape))
