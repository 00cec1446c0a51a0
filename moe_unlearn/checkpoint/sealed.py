"""Reads safetensors files that carry a digest of all that they hold, which `tensor_file(..., sealed=True)` writes."""

import logging
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_unlearn.checkpoint.tensor_file import DIGEST, Seal, bytes_of, kind_of

_log = logging.getLogger(__name__)


def read_sealed(
    path: Path,
    format: str,
    *,
    former: str | None,
    remedy: str,
    begun: Callable[[dict[str, str]], Callable[[str, Tensor], Tensor]] | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a sealed file of a `format`, on the CPU, and its metadata.

    `begun(metadata)` may return what makes of each tensor, one after the other, the one that is kept. Files of the
    `former` format (None: without a format) have no digest: they are read with a warning, which ends with the `remedy`.
    Raises ValueError for another format and for what is not what was written, and OSError for what cannot be read.
    """
    seal, kinds, found = Seal(), {}, {}
    try:
        with safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            own = about.get("format")
            sealed = own == format or DIGEST in about
            if own not in (format, former):
                raise ValueError(f"expected format {format!r}; got {own!r}")
            take = None if begun is None else begun(about)
            for name in file.keys():  # noqa: SIM118 -- not a dict
                tensor = file.get_tensor(name)
                if sealed:
                    kinds[name] = kind_of(tensor)
                    seal.add(name, bytes_of(tensor))
                found[name] = tensor if take is None else take(name, tensor)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if not sealed:
        _log.warning("%s has no digest, so that damage would not show: an earlier version wrote it; %s", path, remedy)
    elif seal.of(kinds, about) != about.get(DIGEST):
        raise ValueError("damaged: what it holds does not match its SHA-256")
    return found, about
