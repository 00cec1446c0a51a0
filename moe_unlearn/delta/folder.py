"""Reads models' folders in hub layout: where their tensors are, none of them loaded, and what lies beside them."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from moe_unlearn.checkpoint.tensor_file import Kind, stored_by, stored_in

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: weights in whatever other form a folder has them: they are not those that a delta changes
OTHER_FORMS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".npz", ".gguf", ".onnx", ".onnx_data")
_WEIGHTS = (".safetensors", ".index.json", *OTHER_FORMS)


class ModelFolder:
    """The weights of a model's folder by name, as they stand in its safetensors files.

    `files` says what each of the files holds, of the single one or those of the index; `tensors` says where each tensor
    is, in their order. Raises ValueError, naming the file, for a folder without such files, for an index that names
    what is not there, and for a tensor that is in two files.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        self._indexed = not (self.path / SINGLE).is_file()
        if not self._indexed:
            self.files = {SINGLE: stored_in(self.path / SINGLE)}
            self.tensors = self.files[SINGLE].tensors
        elif (self.path / INDEX).is_file():
            self.files, self.tensors, _ = stored_by(self.path / INDEX, "a model's")
        else:
            raise ValueError(f"expected {SINGLE} or {INDEX} in {self.path}; it has neither")

    @property
    def kinds(self) -> dict[str, Kind]:
        """Return dtype and shape of each tensor."""
        return {name: stored.kind for name, stored in self.tensors.items()}

    @property
    def inputs(self) -> list[Path]:
        """Return the paths that are read: the folder, and its files of weights, which may be links out of it."""
        return [self.path, *(self.path / name for name in self.files)]

    def copy_others(self, target: Path) -> list[str]:
        """Copy to `target` all but the weights: config, tokenizer, index and more; return what was left out.

        Links become files. Left out are weights in another form, which are not those that a delta changes, links to
        folders and, not named, hidden folders.
        """
        left_out = []
        for folder, below, names in os.walk(self.path, onerror=_raise):
            within = Path(folder).relative_to(self.path)
            linked = {name for name in below if (Path(folder) / name).is_symlink()}
            left_out += [f"{within / name}/" for name in linked]
            below[:] = [name for name in below if not name.startswith(".") and name not in linked]
            known = {INDEX} if self._indexed and not within.parts else set()
            for name in names:
                if not name.endswith(_WEIGHTS) or name in known:
                    (target / within).mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(Path(folder) / name, target / within / name)
                elif within.parts or name not in self.files:
                    left_out.append(str(within / name))
        return sorted(left_out)


def _raise(error: OSError) -> None:
    raise error


def check_same(expected: Mapping[str, Kind], got: Mapping[str, Kind], of: str | Path, like: str | Path) -> None:
    """Raise ValueError, naming a tensor, unless what is `of` one model has the tensors of another that it is `like`."""
    lacking, more = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    for names, what in ((lacking, "lacks"), (more, "also has")):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"expected {of} to have the tensors of {like}; it {what} {names[0]!r}{others}")
    for name, kind in expected.items():
        if got[name] != kind:
            raise ValueError(f"expected {name!r} of {of} to be {kind}, as in {like}; got {got[name]}")
