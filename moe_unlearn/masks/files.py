"""Reads and writes weight masks, in our format and in that of the official WAGLE code.

    native      safetensors, one bit for each weight, under the names the parameters have in memory
    official    torch.save of {parameter name: bool tensor}, True where a weight may move

The official code names experts one by one (`experts.3.gate_proj.weight`); transformers holds them fused
(`experts.gate_up_proj` [E, 2I, H]). transformers' own weight conversions, those of `save_pretrained`, translate the
names and say which tensors are stacked and joined; so every family that they convert works here. An official file may
also use the names in memory. `torch.load(weights_only=True)` reads it, which runs no code of the file.

The native form carries a digest of all that it holds. One of the official form stands beside it, in FILE.sha256, as
`sha256sum` writes and checks it; a file without one is read with a warning.

Memory beside the packed bits, and beside a few bytes for each weight of one parameter at a time: a byte for each weight
of the model where the official form is written, since torch saves a whole dict; none where it is read from a file that
torch can map, as all but those of before torch 1.6.
"""

import difflib
import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_unlearn.checkpoint.manifest import describe
from moe_unlearn.errors import reason_of
from moe_unlearn.files import stream_of, whole_file, write_text
from moe_unlearn.masks import hub
from moe_unlearn.masks.shards import shared_out
from moe_unlearn.masks.weight_mask import WeightMask
from moe_unlearn.ops.bits import pack_bits

FORMATS = ("native", "official")
_log = logging.getLogger(__name__)
_PICKLED = (b"PK\x03\x04", b"\x80")  # torch.save's archive, and its form before 1.6


def save(mask: WeightMask, path: str | Path, model: nn.Module, format: str = "native") -> None:
    """Write `mask` of `model` in one of `FORMATS`; the file appears under its name whole or not at all.

    The official form loses `keep`, `gamma` and the score terms. Where ranks share the mask out, every rank calls this
    and the first writes. Raises ValueError for a mask of another model.
    """
    mask.check(model)
    if format == "native":
        mask.save(path)
        return
    plain = _plain(model)

    def write(packed: dict[str, Tensor]) -> None:
        named: dict[str, Tensor] = {}
        for name, words in packed.items():
            # clones, since torch saves a view with the whole tensor behind it
            kept = mask.unpacked(name, words.cpu())
            named |= {key: part.clone() for key, part in hub.to_hub(plain, {name: kept}).items()}
        target = Path(path)
        beside, stream = _digest_file(target), stream_of(target)
        if not stream:
            beside.unlink(missing_ok=True)  # a digest of another file would be worse than none
        with whole_file(target) as unfinished:
            with unfinished.open("wb") as file:  # an open file, since torch refuses some names
                torch.save(named, file)
            digest = describe(unfinished)["sha256"]
        if not stream:
            write_text(beside, f"{digest}  {target.name}\n")

    mask.written_once(write)


def load(path: str | Path, model: nn.Module) -> WeightMask:
    """Read a mask of `model` in either format, to the CPU; where ranks share weights out, each keeps its rows.

    Of an official file one parameter is read at a time. Its `keep` is the fraction that it keeps. Raises ValueError
    naming the file and the fault: not a mask, not what its digest says, a pickle that holds more than tensors, a name
    missing or unknown, another shape, values that are not bool.
    """
    try:
        with open(path, "rb") as file:
            pickled = (first := file.read(4)).startswith(_PICKLED)
    except OSError as error:
        raise ValueError(f"{path}: not a weight mask: {error}") from error
    if not pickled:
        mask = WeightMask.load(path, model)
        mask.check(model)
        return mask
    _check_digest(Path(path))
    try:
        named = torch.load(path, map_location="cpu", weights_only=True, mmap=first == _PICKLED[0])
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"{path}: cannot be read as tensors alone: {reason_of(error)}") from None
    try:
        return _from_official(model, named)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _check_digest(path: Path) -> None:
    """Raise ValueError if an official file differs from the digest beside it; log a warning if there is none."""
    beside = _digest_file(path)
    if not beside.is_file():
        make = f"(cd {path.parent} && sha256sum {path.name} > {beside.name})"
        _log.warning("%s has no digest, so that damage would not show; if it is as it was, make one: %s", path, make)
        return
    recorded = beside.read_bytes().partition(b" ")[0].decode("ascii", "replace").removeprefix("\\")
    if describe(path)["sha256"] != recorded:
        raise ValueError(f"{path}: damaged: it does not match its SHA-256 in {beside}")


def _plain(model: nn.Module) -> PreTrainedModel:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"official masks name the parameters of a plain transformers model; got {type(model).__name__}"
        )
    return model


def _from_official(model: nn.Module, named: object) -> WeightMask:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"expected a dict of parameter names and bool tensors; got {type(named).__name__}")
    fused = named.keys() == shapes.keys()
    if fused:
        expected = shapes
    else:
        meta = {name: torch.empty(shape, dtype=torch.bool, device="meta") for name, shape in shapes.items()}
        expected = {name: tuple(t.shape) for name, t in hub.to_hub(_plain(model), meta).items()}
    for name in [*named, *expected]:
        _check(name, named.get(name), expected)
    converted = named.items() if fused else hub.from_hub(_plain(model), named.keys(), named.__getitem__, shapes.keys())
    found = {name: pack_bits(torch.atleast_1d(kept)) for name, kept in converted}
    packed = {name: found[name] for name in shapes}
    mask = WeightMask(shapes, packed, keep=1.0, official=True)
    parameters = dict(model.named_parameters())
    packed = {name: shared_out(words, parameters[name]) for name, words in packed.items()}
    return WeightMask(shapes, packed, keep=mask.fraction, official=True)


def _check(name: str, value: object, expected: dict[str, tuple[int, ...]]) -> None:
    if name not in expected:
        near = difflib.get_close_matches(name, expected, n=1)
        raise ValueError(f"{name!r} is no parameter of this model{f'; did you mean {near[0]!r}?' if near else ''}")
    if value is None:
        raise ValueError(f"the mask of {name!r} is missing")
    if not isinstance(value, Tensor) or value.dtype != torch.bool or value.layout != torch.strided:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the mask of {name!r} must be a dense bool tensor; got {got}")
    if tuple(value.shape) != expected[name]:
        raise ValueError(f"the mask of {name!r} must have shape {list(expected[name])}; got {list(value.shape)}")
