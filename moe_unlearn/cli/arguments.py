"""Options that several verbs of the command line share, and the values made from them.

Parsing takes no torch: what needs it is imported where a verb makes its values.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_unlearn import config
from moe_unlearn.files import DAY, remove_unfinished, stream_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from moe_unlearn import data
    from moe_unlearn.model.loading import Loading

CACHE = "folder in which examples, and results of --benchmark, stay to be found again by their content"
SOURCE = "a file, folder, benchmark or hub data set: NAME_OR_PATH[:SPLIT][?OPTION=VALUE&...]"
MODEL = "folder written by save_pretrained, or ORG/NAME[@REVISION] of the hub"
SIDES = {
    "forget": "documents to forget",
    "retain": "documents to keep",
    "holdout": "documents that the model never saw, for PrivLeak",
}
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_data(sub: argparse.ArgumentParser, *, required: Sequence[str] = ("forget", "retain")) -> None:
    """Add the options for the model, the documents and their encoding."""
    add_model(sub)
    for side, what in SIDES.items():
        sub.add_argument(f"--{side}", required=side in required, metavar="SOURCE", help=f"{what}: {SOURCE}")
    add_chat(sub)
    sub.add_argument("--max-length", type=int, default=None, help="tokens per example, at most (default 512)")
    sub.add_argument(
        "--prompt-tokens",
        type=int,
        default=0,
        help="tokens at the head of each row of a forget or holdout text that are its prompt",
    )
    sub.add_argument(
        "--seam",
        choices=config.SEAMS,
        default="joint",
        help="how a prompt and its answer are told apart: encoded as one, or as open-unlearning does",
    )
    add_batch_size(sub)
    sub.add_argument("--cache", metavar="FOLDER", help=CACHE)


def add_batch_size(sub: argparse.ArgumentParser) -> None:
    """Add the option for the rows of a forward pass."""
    sub.add_argument("--batch-size", type=positive, default=8, help="rows of a forward pass (default 8)")


def add_progress(sub: argparse.ArgumentParser) -> None:
    """Add the option that has a verb say less about how far it is."""
    sub.add_argument("--quiet", action="store_true", help="show no progress: no bars and no lines about it")


def add_packing(sub: argparse.ArgumentParser) -> None:
    """Add the option that lets the rows of a batch share rows of the model's calls."""
    sub.add_argument(
        "--packing", action="store_true", help="call the model with several examples in a row, --max-length at most"
    )


def add_model(sub: argparse.ArgumentParser) -> None:
    """Add the options for the model and how it is loaded."""
    sub.add_argument("--model", required=True, help=f"the model: {MODEL}")
    add_loading(sub)


def add_loading(sub: argparse.ArgumentParser) -> None:
    """Add the options for how every model of a command is loaded."""
    sub.add_argument(
        "--device",
        default="auto",
        help="auto (the GPU if there is one), cpu, cuda, cuda:N, or auto-map: over all devices (eval, alternates)",
    )
    sub.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="number format of the weights; auto: that of the checkpoint"
    )
    sub.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model")
    sub.add_argument(
        "--allow-weights",
        metavar="REGEX",
        help="weights that a checkpoint may lack (they are random then) or have too many",
    )


def loading_of(options: argparse.Namespace) -> Loading:
    """Return how the models of a verb are loaded; ValueError for a device or ranks that are not here."""
    from moe_unlearn.model.loading import Loading

    return Loading(
        device=options.device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        allow_weights=options.allow_weights,
        **_sharing(options),
    )


def add_chat(sub: argparse.ArgumentParser) -> None:
    """Add the options for questions asked through the chat template."""
    sub.add_argument("--chat-template", action="store_true", help="ask questions through the chat template")
    sub.add_argument(
        "--enable-thinking", action=argparse.BooleanOptionalAction, help="whether the chat template is told to think"
    )
    sub.add_argument("--system", default="", help="the chat template's system message")
    sub.add_argument("--date", help="the chat template's today, as 2026-11-29 (default: the same day always)")


def add_mesh(sub: argparse.ArgumentParser, more: str = "") -> None:
    """Add the option that shares the weights of a model out."""
    sub.add_argument(
        "--mesh",
        metavar="fsdp=N[,ep=M]",
        help=f"share the weights out over the N ranks of torchrun, experts over M of them{more}",
    )


def add_dry_run(sub: argparse.ArgumentParser) -> None:
    """Add the option that plans a verb."""
    sub.add_argument(
        "--dry-run",
        action="store_true",
        help="print what memory it takes, from the model's config and the data, and stop",
    )
    sub.add_argument("--json", action="store_true", help="with --dry-run: print the plan as JSON, sizes in bytes")


def _sharing(options: argparse.Namespace) -> dict[str, int]:
    """Return how `--mesh` shares weights out, not at all for a plan; ValueError unless it is of the ranks that run."""
    if getattr(options, "mesh", None) is None or getattr(options, "dry_run", False):
        return {}
    from moe_unlearn.plan import Mesh
    from moe_unlearn.ranks import everyone

    mesh, ranks = Mesh.parse(options.mesh), everyone()
    count = 1 if ranks is None else ranks.size()
    if mesh.fsdp != count:
        raise ValueError(f"--mesh is of {mesh}; this run has {count}: start it with torchrun --nproc-per-node")
    return {"fsdp": mesh.fsdp, "ep": mesh.ep}


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1; got {text!r}")
    return int(text)


def steps(text: str) -> int:
    """Parse a number of steps, at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of steps; got {text!r}")
    return int(text)


def check_chat(settings: Any) -> None:
    """Raise ValueError for options of a chat template without the template itself."""
    given = [name for name in ("enable_thinking", "system", "date") if getattr(settings, name) not in (None, "")]
    if given and not settings.chat_template:
        raise ValueError(f"--{given[0].replace('_', '-')} is for a chat template: give --chat-template too")


def chat_of(settings: Any) -> bool | data.Chat:
    """Return `Chat.chosen` of a verb's options, which `check_chat` has checked."""
    check_chat(settings)
    from moe_unlearn.data import Chat

    return Chat.chosen(settings)


def examples_of(
    source: str,
    tokenizer: Tokenizer,
    settings: config.Data | argparse.Namespace,
    side: str,
    reports: dict[str, data.DataReport] | None = None,
    *,
    alternates: bool = False,
    cache: str | None = None,
) -> Sequence[data.Example]:
    """Return the examples of a source; print what was dropped, and keep the report in `reports` under `side`.

    They are in a file (`data.stored`), in the folder `cache` if there is one, and read when they are asked for.
    `alternates` says that the forget rows are needed with their alternate answers.
    """
    from moe_unlearn import data

    check_chat(settings)
    report = data.DataReport()
    documents = data.located(source, side=side, report=report)
    encoding = data.side_encoding(settings, side, alternates=alternates)
    examples = data.stored(documents, tokenizer, report=report, cache=cache, **encoding)
    if report.dropped or report.truncated or report.straddled:
        print(report, file=sys.stderr)
    if reports is not None:
        reports[side] = report
    if not examples:
        raise ValueError(
            f"the {side} set {source!r} is empty: name a source with documents (what was dropped is above)"
        )
    return examples


def earlier_of(
    recipe: config.Recipe,
    tokenizer: Tokenizer,
    forget: Sequence[data.Example],
    reports: dict[str, data.DataReport],
    *,
    cache: str | None = None,
) -> list[data.Example]:
    """Return the examples of all sources in `data.earlier`, read as forget sets; each report is kept as "earlier N".

    Raises ValueError if an example is to be forgotten again, which cannot be held as it is meanwhile.
    """
    from moe_unlearn import data

    found: list[data.Example] = []
    for number, source in enumerate(recipe.data.earlier, 1):
        own: dict[str, data.DataReport] = {}
        found += examples_of(source, tokenizer, recipe.data, "forget", own, cache=cache)
        reports[f"earlier {number}"] = own["forget"]
    if shared := data.overlap(forget, found):
        raise ValueError(
            f"{shared} of {len(forget)} forget examples stand in data.earlier too, whose rows are held as they are: "
            "take them out of one of the two"
        )
    return found


def sets_of(
    options: argparse.Namespace, tokenizer: Tokenizer, sides: Sequence[str] = ("forget", "retain")
) -> dict[str, Sequence[data.Example]]:
    """Return the examples of those sides that a verb's options name, as `examples_of` does."""
    given = {side: source for side in sides if (source := getattr(options, side)) is not None}
    return {side: examples_of(source, tokenizer, options, side, cache=options.cache) for side, source in given.items()}


def writable(out: str | Path | None, *, folder: bool = False) -> None:
    """Check, before the work, that the file or `folder` that a verb is to write can be written; None is no output.

    The nearest folder that exists is written to for a trial, and nothing stays, nor what killed processes left there;
    nothing is written to a stream, such as /dev/stdout or a pipe. Raises OSError that names `out`.
    """
    if out is None:
        return
    path = Path(out)
    if not folder and stream_of(path):
        if not os.access(path, os.W_OK):
            raise OSError(errno.EACCES, f"--out cannot be written: {os.strerror(errno.EACCES)}", str(out))
        return
    if not folder and path.is_dir():
        raise OSError(f"expected --out to be a file to write; {out} is a folder")
    where = path if folder else path.parent
    while not where.exists() and where != where.parent:
        where = where.parent
    try:
        with tempfile.TemporaryFile(dir=where):
            pass
    except OSError as error:
        raise OSError(error.errno, f"--out cannot be written: {error.strerror}", str(out)) from error
    remove_unfinished(where, seconds=DAY)
