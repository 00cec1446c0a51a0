"""Files and folders are written whole or not at all, whatever fails and whenever it fails."""

import errno
import hashlib
import os
import re
import socket
import stat
import time
from pathlib import Path

import pytest
import torch

from moe_unlearn import checkpoint
from moe_unlearn.benchmark.trained_cache import ensure
from moe_unlearn.files import (
    UNFINISHED,
    read_sealed,
    remove_unfinished,
    stream_of,
    whole_file,
    whole_files,
    whole_folder,
    write_json,
    write_sealed,
    write_text,
)
from moe_unlearn.prepare.rows import RowStore

pytestmark = pytest.mark.quick


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_file_is_replaced_and_its_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "größe.json"
    for content in ([1, 2], {"größe": None}):
        write_json(path, content)
    assert path.read_bytes() == b'{\n "gr\\u00f6\\u00dfe": null\n}\n'
    write_text(str(path), "größe\r\n")
    assert path.read_bytes() == "größe\r\n".encode()
    assert names(tmp_path) == ["a", "a/b", "a/b/größe.json"]


def test_a_file_may_be_read_by_whom_the_umask_allows(tmp_path):
    former = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
        with whole_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(former)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_everything_is_on_the_disk_before_the_name_changes(tmp_path, monkeypatch, call):
    """The order of the calls; and if any of them fails, nothing has changed."""
    calls, path = [], tmp_path / "file"
    write_text(path, "former")
    real = {name: getattr(os, name) for name in ("fsync", "replace")}

    def watched(name):
        def run(*arguments):
            calls.append(name)
            if fails and name == call:
                raise OSError(28, "No space left on device")
            return real[name](*arguments)

        return run

    for name in real:
        monkeypatch.setattr(os, name, watched(name))
    fails = True
    with pytest.raises(OSError, match=f"No space left on device: .*{path}") as caught:
        write_text(path, "new")
    assert caught.value.errno == 28
    inside = f"No space left on device: '{tmp_path}/folder/inside'"
    with pytest.raises(OSError, match=re.escape(inside)), whole_folder(tmp_path / "folder") as folder:
        write_text(folder / "inside", "new")
    assert path.read_text(encoding="utf-8") == "former" and names(tmp_path) == ["file"]
    fails = False
    calls.clear()
    write_text(path, "new")
    assert calls == ["fsync", "replace", "fsync"]
    calls.clear()
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "inside").write_text("new", encoding="utf-8")
    assert calls == ["fsync", "fsync", "replace", "fsync"], "the file, its folder, the name, the folder around it"
    calls.clear()
    with whole_folder(tmp_path / "folder") as folder:
        write_text(folder / "inside", "new")
        write_text(folder / "below" / "inside", "new")
    assert calls == ["replace"] * 2 + ["fsync"] * 4 + ["replace", "fsync"], "each file and each folder once"
    calls.clear()
    write_text(tmp_path / "folder" / "inside", "newer")
    assert calls == ["fsync", "replace", "fsync"]


def test_an_error_in_the_block_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "file", "former")
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "kept").write_text("former", encoding="utf-8")
    before = names(tmp_path)
    for error in (KeyboardInterrupt, OSError("no number"), FileNotFoundError(2, "No such file", "another")):
        for whole in (whole_file, whole_folder):
            with pytest.raises(error if isinstance(error, type) else type(error)) as caught:
                with whole(tmp_path / whole.__name__.removeprefix("whole_")) as unfinished:
                    assert unfinished.exists() and unfinished.parent == tmp_path
                    raise error
            assert caught.value is error or error is KeyboardInterrupt
    assert (tmp_path / "file").read_text(encoding="utf-8") == "former" and names(tmp_path) == before


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    write_text(tmp_path / "file", "x")
    with pytest.raises(OSError, match=f"{tmp_path}/file"):
        write_text(tmp_path / "file" / "below", "x")
    with pytest.raises(IsADirectoryError, match=f"{tmp_path}'"):
        write_text(tmp_path, "x")
    refused = PermissionError(13, "Permission denied")
    monkeypatch.setattr(type(tmp_path), "open", lambda *_: (_ for _ in ()).throw(refused))
    with pytest.raises(PermissionError, match=f"Permission denied: '{tmp_path}/new'"):
        write_text(tmp_path / "new", "x")
    assert names(tmp_path) == ["file"]


def test_a_folder_takes_the_place_of_another_unless_that_stays(tmp_path, monkeypatch):
    target = tmp_path / "folder"
    for number in (1, 2):
        with whole_folder(target) as folder:
            (folder / f"file{number}").write_text("x", encoding="utf-8")
    assert names(tmp_path) == ["folder", "folder/file2"]
    with whole_folder(target, stays=lambda: True) as folder:
        (folder / "file3").write_text("x", encoding="utf-8")
    assert names(tmp_path) == ["folder", "folder/file2"]
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), whole_folder(target):
        pass
    assert names(tmp_path) == ["folder", "folder/file2"], "the former folder is back"


def texts(folder):
    return {name: (folder / name).read_text(encoding="utf-8") for name in names(folder) if (folder / name).is_file()}


def renew(folder):
    """Replace two files, the index among them, write a third one and remove what is stale."""
    with whole_files(folder, last=("index", "config"), stale=lambda name: name.startswith("part")) as new:
        for name in ("below/new", "config", "index", "part1"):
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text("new", encoding="utf-8")


FORMER = {"checkpoint/part1": "kept", "config": "old", "index": "old", "notes": "kept", "part1": "old", "part2": "old"}
RENEWED = {
    **{"below/new": "new", "checkpoint/part1": "kept", "config": "new", "index": "new", "notes": "kept"},
    "part1": "new",
}


@pytest.fixture
def filled(tmp_path):
    folder = tmp_path / "folder"
    (folder / "checkpoint").mkdir(parents=True)
    for name, text in FORMER.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_files_take_their_places_among_others_in_order(filled, tmp_path, monkeypatch):
    seen, replace = [], os.replace

    def watched(source, target):
        seen.append((source if filled == source.parent else target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    renew(filled)
    assert texts(filled) == RENEWED
    assert seen == ["config", "index", "part1", "part2", "new", "part1", "index", "config"]
    renew(tmp_path / "fresh")
    assert texts(tmp_path / "fresh") == {name: text for name, text in RENEWED.items() if text == "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "fresh"]


@pytest.mark.parametrize("at", range(8))
def test_a_place_that_cannot_be_taken_leaves_all_as_it_was(filled, monkeypatch, at):
    replace, calls = os.replace, iter(range(99))

    def full(source, target):
        if next(calls) == at:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        renew(filled)
    assert texts(filled) == FORMER and not list(filled.glob(f"{UNFINISHED}*"))


def test_a_folder_of_the_name_of_a_file_stays(filled):
    (filled / "config").unlink()
    (filled / "config" / "own").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        renew(filled)
    assert (filled / "config" / "own").is_dir() and texts(filled).keys() == FORMER.keys() - {"config"}
    assert not list(filled.glob(f"{UNFINISHED}*"))


@pytest.mark.parametrize("at", range(9))
def test_a_writer_killed_between_the_files_leaves_the_former_the_new_or_no_config(filled, monkeypatch, at):
    if not (child := os.fork()):
        replace, calls = os.replace, iter(range(99))
        os.replace = lambda *paths: os._exit(9) if next(calls) == at else replace(*paths)
        renew(filled)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (9 if at < 8 else 0)
    left = {name: text for name, text in texts(filled).items() if not name.startswith(UNFINISHED)}
    assert left == (FORMER if at == 0 else RENEWED) if at in (0, 8) else "config" not in left
    assert left["notes"] == left["checkpoint/part1"] == "kept"
    renew(filled)
    assert {name: text for name, text in texts(filled).items() if not name.startswith(UNFINISHED)} == RENEWED


def test_a_sealed_file_is_a_digest_and_its_content(tmp_path):
    path, content = tmp_path / "sealed", b'{"a": 1}\nb'
    # as files of earlier versions are: the first line is the SHA-256 of the rest
    path.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    assert read_sealed(path) == content
    written = path.read_bytes()
    write_sealed(path, content)
    assert path.read_bytes() == written
    for damaged in (written[:-1], written + b" ", b"", content, written.replace(b"1}", b"2}"), b"x" + written[1:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="does not match its SHA-256"):
            read_sealed(path)


def test_what_killed_processes_left_is_removed_once_it_is_old(tmp_path):
    write_text(tmp_path / "file", "x")
    (tmp_path / f"{UNFINISHED}1").write_text("half", encoding="utf-8")
    (tmp_path / f"{UNFINISHED}2" / "below").mkdir(parents=True)
    remove_unfinished(tmp_path, seconds=60)
    assert len(names(tmp_path)) == 4
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["file"]
    remove_unfinished(tmp_path / "nowhere")


def aged(path, seconds, *, folder=False):
    path.mkdir() if folder else path.write_text("half", encoding="utf-8")
    os.utime(path, (time.time() - seconds,) * 2)
    return path


@pytest.mark.parametrize("folder", [False, True])
def test_the_next_writer_removes_what_a_killed_one_left_a_day_ago(tmp_path, folder):
    old, young, foreign = (
        aged(tmp_path / f"{prefix}1{age}", age, folder=folder)
        for prefix, age in ((UNFINISHED, 90000), (UNFINISHED, 3600), (".tmp-", 9e6))
    )
    if folder:
        with whole_folder(tmp_path / "new"):
            pass
    else:
        write_text(tmp_path / "new", "x")
    assert not old.exists() and young.exists() and foreign.exists()


def test_the_next_writer_removes_at_once_what_a_process_left_that_is_gone(tmp_path):
    if not (child := os.fork()):
        with whole_file(tmp_path / "file"):
            os._exit(0)  # as if killed: nothing is cleaned up
    os.waitpid(child, 0)
    assert [name.startswith(UNFINISHED) for name in names(tmp_path)] == [True]
    with whole_file(tmp_path / "own"):
        living = names(tmp_path)
        assert len(living) == 1 and f"-{os.getpid()}-" in living[0]
        remove_unfinished(tmp_path, seconds=60)
        assert names(tmp_path) == living
    assert names(tmp_path) == ["own"]


def test_names_of_earlier_versions_are_removed_where_they_are_the_writers_own(tmp_path):
    """The checkpoints', the rows' and the trained models' own, a day old; others' and young ones stay."""
    kept = [aged(tmp_path / f".{name}-young", 3600) for name in ("tmp", "rows", "building")]
    old = {name: aged(tmp_path / f".{name}-old", 90000, folder=name != "rows") for name in ("tmp", "rows", "building")}
    checkpoint.commit(tmp_path, 1, {"state": {}})
    assert [path.exists() for path in old.values()] == [False, True, True]
    RowStore(tmp_path, torch.float32).write({"a": torch.zeros(2)})
    assert [path.exists() for path in old.values()] == [False, False, True]
    ensure(tmp_path / "model", lambda folder: None)
    assert not any(path.exists() for path in old.values()) and all(path.exists() for path in kept)
    assert (tmp_path / "model").is_dir() and checkpoint.latest(tmp_path) == tmp_path / "step-00000001"


def test_a_link_stays_and_permissions_too(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old", encoding="utf-8")
    real.chmod(0o600)
    link.symlink_to(real)
    write_text(link, "new")
    assert link.is_symlink() and real.read_text(encoding="utf-8") == "new" and real.stat().st_mode & 0o777 == 0o600
    folder, way = tmp_path / "folder", tmp_path / "way"
    folder.mkdir()
    way.symlink_to(folder)
    with whole_folder(way) as unfinished:
        (unfinished / "x").write_text("1", encoding="utf-8")
    assert way.is_symlink() and [path.name for path in folder.iterdir()] == ["x"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link.json", "real.json", "way"]


def test_a_pipe_is_written_to_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "told")
    assert os.read(reader, 99) == b"told" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="there is no /proc")
@pytest.mark.parametrize("kind", ["file", "pipe", "socket"])
def test_what_is_held_open_is_written_to_where_it_is(tmp_path, kind):
    """What `--out /proc/self/fd/1` or `/dev/fd/1` writes with `> file` comes behind what was written before."""
    if kind == "file":
        descriptor = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
        reader = os.open(tmp_path / "out", os.O_RDONLY)
    else:
        ends = [end.detach() for end in socket.socketpair()] if kind == "socket" else os.pipe()
        reader, descriptor = ends
    link = tmp_path / "link"
    link.symlink_to(f"/proc/self/fd/{descriptor}")
    os.write(descriptor, b"before ")
    for path in (f"/proc/self/fd/{descriptor}", f"/dev/fd/{descriptor}", link):
        write_text(path, "told ")
    os.write(descriptor, b"after")
    assert os.read(reader, 99) == b"before told told told after" and link.is_symlink()
    assert names(tmp_path) == (["link", "out"] if kind == "file" else ["link"])
    for end in (reader, descriptor):
        os.close(end)


def test_what_is_no_stream_is_replaced(tmp_path):
    write_text(tmp_path / "file", "x")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    for path in ("file", "link", "loop", "nothing", "."):
        assert stream_of(tmp_path / path) is None
    assert stream_of("/dev/null") == Path("/dev/null")


def test_a_folder_that_cannot_be_synced_loses_nothing(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "this file system syncs no folders")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "a", "1")
    with whole_folder(tmp_path / "b") as unfinished:
        (unfinished / "x").write_text("2", encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
