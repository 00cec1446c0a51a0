"""What was found of each group, kept in files while a mask is made, so that a run that was killed goes on.

    FOLDER/wagle-KEY/rank 0 of 1/begun, round 1 group 1, round 1 group 2, ...

KEY is a digest of all that decides what is found: the model, which of its weights train, both sides' batches and
losses, the rule, the budget asked for, and what computes. Each file is sealed with its own digest and takes its name
when it is whole; one that is not what was written counts as missing, and is made again. So a mask has the bits of a run
that was never interrupted.

The files take about as many bytes as the mask and the room for remembered scores, and half a MiB a group; where a guess
was wrong, as many again for each further round. The mask that is put together lies in a file too (`mapped`). Each rank
keeps its own, and goes on from what all of them have.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from moe_unlearn.files import read_sealed, write_sealed
from moe_unlearn.model.digest import tensor_digest
from moe_unlearn.ranks import Ranks, gather, together
from moe_unlearn.wagle.gradients import Side
from moe_unlearn.wagle.mapped import MappedWords

_log = logging.getLogger(__name__)
_FORMAT = "moe-unlearn groups of a mask 1"
_NAME = "wagle-"


class Resume:
    """Says in which folder masks keep what they find of their groups, and go on from what is there.

        with Resume(folder, digest) as resume:
            mask = mask_of(..., resume=resume)

    When the block ends well, the files of the masks that were made inside are removed; if `alone`, those of all masks
    in the folder. `model()` returns a digest of the model's function and of what computes it; all ranks call it.
    """

    def __init__(self, folder: Path, model: Callable[[], str], *, alone: bool = False):
        self.folder, self.model, self.alone = folder, model, alone
        self.journals: list[Journal] = []

    def __enter__(self) -> "Resume":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for journal in self.journals:
                journal.remove()
            for other in self.folder.glob(f"{_NAME}*") if self.alone else ():
                shutil.rmtree(other, ignore_errors=True)
            with suppress(OSError):
                self.folder.rmdir()  # if nothing else is in it

    def journal(self, content: object, ranks: Ranks | None) -> "Journal":
        """Return the journal of a mask that the JSON value `content` and the model decide."""
        key = hashlib.sha256(json.dumps([_FORMAT, self.model(), content], sort_keys=True).encode()).hexdigest()
        self.journals.append(Journal(self.folder / f"{_NAME}{key[:32]}", ranks))
        return self.journals[-1]


class Journal:
    """Keeps tensors by name in files; on `ranks` each has its own. A journal without a place keeps nothing."""

    def __init__(self, place: Path | None = None, ranks: Ranks | None = None):
        self.place, self.ranks = place, ranks
        rank, count = (0, 1) if ranks is None else (ranks.rank, ranks.count)
        self._own = None if place is None else place / f"rank {rank} of {count}"

    def kept(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return what all ranks have kept under `name`, else what `make` returns, which is kept from now on."""
        if self._own is None:
            return make()
        path = self._own / name
        found = _read(path)
        everywhere = [found is not None] if self.ranks is None else gather(found is not None, self.ranks.group)
        if found is not None and all(everywhere):
            return found
        made = make()
        write = partial(_write, path, made)
        if self.ranks is None:
            write()
        else:
            together(write, self.ranks.group)
        return made

    def storage(self, count: int) -> Callable[[], MappedWords] | None:
        """Return what makes memory in a file for `count` words of a mask; None without a place."""
        return None if self._own is None else partial(MappedWords, self._own, count)

    def remove(self) -> None:
        """Remove the files, and what has become empty by that."""
        if self.place is not None and self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)
            with suppress(OSError):
                self.place.rmdir()  # the last rank's


def described(side: Side) -> list:
    """Return a JSON value that tells a side from others: its batches, what their losses are divided by, and these."""
    batches = [{key: tensor_digest(value) for key, value in batch.items()} for batch in side.batches]
    return [batches, list(side.divisors), f"{side.loss.__module__}.{side.loss.__qualname__}"]


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        return load(read_sealed(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, SafetensorError) as error:
        _log.warning("%s is made again, since it cannot be read: %s", path, error)
        return None


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    write_sealed(path, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
