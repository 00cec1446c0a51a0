"""Write files and folders whole or not at all.

What is written has a name of its own beside the target until every byte is on the disk; then it takes the target's
name. Whoever reads finds what was there before or what is new, never a part of it, even if a process is killed.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

UNFINISHED = ".moe-unlearn-"  # how the names of files and folders begin that have not taken their target's name
DAY = 86400  # seconds after which what is unfinished belongs to no living process
_OPEN: set[Path] = set()  # folders that this process has not finished: they sync their files themselves


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield the path of an empty file beside `path`, which replaces `path` when the block ends; both are synced.

    The folders of `path` are made. A link stays one, and what it points to is replaced; a file keeps its permissions.
    A stream (`stream_of`) is written to when the block ends. If anything fails, `path` stays as it was, and an OSError
    names it. What killed processes left beside it is removed (`remove_unfinished`, a day).
    """
    path = Path(path)
    stream = stream_of(path)
    target = path if stream else path.resolve()
    unfinished = Path(tempfile.mkdtemp()) / path.name if stream else _beside(target)
    remove_unfinished(unfinished.parent, seconds=DAY)
    try:
        with _named(unfinished, path, all_of_them=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            unfinished.open("xb").close()
            yield unfinished
            if stream:
                _write_to(stream, unfinished.read_bytes())
                return
            within = not _OPEN.isdisjoint(target.parents)
            if not within:
                _sync(unfinished)
            if target.is_file():
                unfinished.chmod(stat.S_IMODE(target.stat().st_mode))
            unfinished.replace(target)
            if not within:
                _sync_folder(target.parent)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        if stream:
            unfinished.parent.rmdir()


@contextlib.contextmanager
def whole_folder(path: str | Path, *, stays: Callable[[], bool] = lambda: False) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which replaces `path` when the block ends; all its files are synced.

    If `stays()` is true by then, or anything fails, `path` stays as it was. A folder that is replaced is moved aside
    first, so that a process killed between these two steps leaves no `path`. What killed processes left beside it is
    removed (`remove_unfinished`, a day).
    """
    path = Path(path).resolve()
    unfinished, former = _beside(path), _beside(path)
    remove_unfinished(path.parent, seconds=DAY)
    unfinished.mkdir(parents=True)
    _OPEN.add(unfinished)
    try:
        with _named(unfinished, path):
            yield unfinished
            _sync_all(unfinished)
            if not stays():
                if path.exists():
                    path.rename(former)
                os.replace(unfinished, path)
                _sync_folder(path.parent)
    finally:
        _OPEN.discard(unfinished)
        if former.exists() and not path.exists():
            former.rename(path)
        for leftover in (unfinished, former):
            remove(leftover, ignore_errors=True)


@contextlib.contextmanager
def whole_files(
    path: str | Path, *, last: Sequence[str] = (), stale: Callable[[str], object] = lambda name: False
) -> Iterator[Path]:
    """Yield an empty folder, whose files take their places in the folder `path` when the block ends; all are synced.

    What else is in `path` stays, but for the files there whose name is `stale`. Those named in `last` leave their
    places first and take them last, in this order: a reader who begins with the last one finds what was there before,
    what is new, or nothing. If anything fails, `path` stays as it was. What killed processes left in it is removed
    (`remove_unfinished`, a day). A `path` that is not there appears whole, as by `whole_folder`.
    """
    path = Path(path).resolve()
    if not path.exists():
        with whole_folder(path) as unfinished:
            yield unfinished
        return
    unfinished, former = _beside(path / "new"), _beside(path / "former")
    remove_unfinished(path, seconds=DAY)
    unfinished.mkdir()
    _OPEN.add(unfinished)
    moves: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        moves.append((source, target))
        os.replace(source, target)

    try:
        with _named(unfinished, path):
            yield unfinished
            _sync_all(unfinished)
        names = [file.relative_to(unfinished) for file in sorted(unfinished.rglob("*")) if not file.is_dir()]
        names.sort(key=lambda name: 1 + last.index(str(name)) if str(name) in last else 0)
        leaving = [*reversed(names), *(Path(name) for name in os.listdir(path) if stale(name))]
        for name in dict.fromkeys(leaving):
            if (path / name).is_symlink() or (path / name).is_file():
                move(path / name, former / name)
        for name in names:
            move(unfinished / name, path / name)
        for folder in {(path / name).parent for name in names}:
            _sync_folder(folder)
    except BaseException:
        for source, target in reversed(moves):
            if not os.path.lexists(source):  # the last one may not have been made
                os.replace(target, source)
        remove(former, ignore_errors=True)
        raise
    finally:
        _OPEN.discard(unfinished)
        remove(unfinished, ignore_errors=True)
    remove(former, ignore_errors=True)


@contextlib.contextmanager
def _named(unfinished: Path, path: Path, *, all_of_them: bool = False) -> Iterator[None]:
    """Let an OSError inside name a file of `unfinished` as it will be called, in or as `path`.

    With `all_of_them` one that names no file is taken for one of `unfinished`.
    """
    try:
        yield
    except OSError as error:
        file = error.filename or (unfinished if all_of_them else None)
        if error.errno is None or not isinstance(file, str | Path) or not Path(file).is_relative_to(unfinished):
            raise
        raise OSError(error.errno, error.strerror, str(path / Path(file).relative_to(unfinished))) from error


def stream_of(path: str | Path) -> Path | None:
    """Return what a path stands for if that is written to as it is; None for a file or folder, which is replaced.

    Terminals, pipes and devices are written to, and so is what somebody holds open: /dev/stdout, /dev/fd/1 and
    /proc/self/fd/1 are links below /proc, which may lead on to a file.
    """
    path = Path(path).absolute()
    if not path.exists() or path.is_dir():
        return None
    real = path.parent.resolve() / path.name
    while real.is_symlink() and not real.is_relative_to("/proc"):
        link = real.parent / real.readlink()
        real = link.parent.resolve() / link.name
    return real if real.is_relative_to("/proc") or not real.is_file() else None


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file as `whole_file` does."""
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        file.write(content)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, in UTF-8, as `whole_file` does."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, content: object) -> None:
    """Write an indented JSON file as `whole_file` does."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def finite(value: Any) -> Any:
    """Return plain values for JSON, which has no NaN and no infinity: None stands for them."""
    if isinstance(value, dict):
        return {key: finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_sealed(path: str | Path, content: bytes) -> None:
    """Write the SHA-256 of `content` as a first line, and then `content`, as `whole_file` does."""
    write_bytes(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def read_sealed(path: str | Path) -> bytes:
    """Return the content that `write_sealed` wrote; ValueError if it differs from what was written."""
    digest, _, content = Path(path).read_bytes().partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise ValueError("its content does not match its SHA-256")
    return content


def remove_unfinished(folder: Path, *, seconds: float = 0, former: str = "") -> None:
    """Remove what killed processes left in `folder`, unless it was written to in the last `seconds`.

    What a process of this machine left that is gone is removed whatever its age. `former` is how the names of such
    files began in earlier versions, which may still run: those are a day old.
    """
    ages = {UNFINISHED: seconds} | ({former: max(seconds, DAY)} if former else {})
    for prefix, age in ages.items():
        for path in folder.glob(f"{prefix}*"):
            with contextlib.suppress(OSError):
                if path not in _OPEN and (_abandoned(path) or time.time() - path.lstat().st_mtime >= age):
                    remove(path, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder, of which nobody finds a part under its name, even if this process is killed."""
    unfinished = _beside(path)
    path.rename(unfinished)
    remove(unfinished, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f"{UNFINISHED}{_here()}-{os.getpid()}-{secrets.token_hex(4)}")


@functools.cache
def _here() -> str:
    """Return what names this boot of a machine and, of several containers on it, the one whose processes are seen."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        return hashlib.sha256(f"{boot}{os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[:12]
    except OSError:
        return secrets.token_hex(6)  # which no other process has


def _abandoned(path: Path) -> bool:
    """Return whether the process that wrote a file or folder with a name by `_beside` ran here and is gone."""
    where, _, rest = path.name.removeprefix(UNFINISHED).partition("-")
    process = rest.partition("-")[0]
    if where != _here() or not process.isdecimal():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False


def _write_to(stream: Path, content: bytes) -> None:
    """Write to a stream behind what is there: to a descriptor of this process itself, which need not be a file."""
    own = stream.parent == Path("/proc/self/fd").resolve() and stream.name.isdecimal()
    for printed in filter(None, (sys.stdout, sys.stderr)):
        printed.flush()  # what was printed before comes first
    with os.fdopen(os.dup(int(stream.name)), "wb") if own else stream.open("ab") as file:
        file.write(content)


def remove(path: Path, *, ignore_errors: bool = False) -> None:
    """Remove a folder with all in it, a file, or of a link the link, if it is there; OSError unless `ignore_errors`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        with contextlib.suppress(OSError) if ignore_errors else contextlib.nullcontext():
            path.unlink(missing_ok=True)


def _sync_all(folder: Path) -> None:
    """Sync a folder and all that is in it."""
    for inside in [*folder.rglob("*"), folder]:
        _sync_folder(inside) if inside.is_dir() else _sync(inside)


def _sync_folder(path: Path) -> None:
    """Sync the names in a folder where that is possible: not every file system syncs folders, or lets one read them."""
    with contextlib.suppress(OSError):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # it knows a number alone
    finally:
        os.close(descriptor)


def make_folder(cache_dir: str | Path) -> Path:
    """Return the folder `cache_dir`, made private if need be; raise OSError that names it if it cannot be made."""
    folder = Path(cache_dir)
    try:
        make_private(folder)
    except OSError as error:
        what = "it is a file" if folder.is_file() else error.strerror
        raise OSError(error.errno, f"cache_dir cannot be made a folder: {what}", str(folder)) from error
    return folder


def make_private(folder: Path) -> None:
    """Make a folder that its owner alone may enter; one that is there keeps its permissions."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def check_output(out: str | Path, inputs: Iterable[str | Path]) -> None:
    """Raise ValueError if `out` is one of the inputs or lies in one, through whatever links, or one lies in `out`."""
    target = Path(out).resolve()
    for given in inputs:
        real = Path(given).resolve()
        if target.is_relative_to(real) or real.is_relative_to(target):
            raise ValueError(f"expected an output apart from what is read; {out} and {given} overlap")
