"""Atomic writes: what is there is whole, whatever happened to the writer."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dydit import files
from dydit.errors import OutputError, one_line
from dydit.files import new_folder, require_absent, sha256_of, write_atomic, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refuse(code: int):
    def fail(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    return fail


def test_sha256_reads_beyond_one_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 3)
    (tmp_path / "abc").write_bytes(b"abcdefgh")
    assert sha256_of(tmp_path / "abc") == "9c56cc51b374c3ba189210d5b6d4bf57790d351c96c47c02190ecf1e430635ab"


def test_write_atomic_creates_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "result.bin"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["result.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_write_atomic_that_fails_keeps_the_old_state(tmp_path, monkeypatch, step):
    path = tmp_path / "result.bin"
    path.write_bytes(b"old")
    monkeypatch.setattr(files.os, step, refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["result.bin"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "no space left on the disk that holds {path}; free some space and run again"),
        (errno.EDQUOT, "no space left on the disk that holds {path}; free some space and run again"),
        (errno.EROFS, "cannot write {path}: Read-only file system; choose a folder that can be written"),
        (errno.EACCES, "cannot write {path}: Permission denied; choose a folder that can be written"),
        (errno.ENAMETOOLONG, "cannot write {path}: File name too long; choose another output"),
    ],
)
def test_refusals_of_the_system_are_explained(tmp_path, monkeypatch, code, message):
    path = tmp_path / "result"
    for name in ("replace", "rename"):
        monkeypatch.setattr(files.os, name, refuse(code))
    with pytest.raises(OutputError) as caught:
        write_atomic(path, b"data")
    assert str(caught.value) == message.format(path=path)
    with pytest.raises(OutputError) as caught, new_folder(path) as folder:
        (folder / "file").write_bytes(b"data")
    assert str(caught.value) == message.format(path=path)
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="choose another output"):
        write_atomic(tmp_path / "file" / "result", b"")
    with pytest.raises(OutputError, match="choose another output"):
        write_atomic(tmp_path, b"")
    with pytest.raises(OutputError, match="choose another output"), new_folder(tmp_path / "file" / "out"):
        pass


def test_write_json(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, 2.5, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, 2.5, None]}
    assert (tmp_path / "a.json").read_bytes().endswith(b"\n")
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(tmp_path / "b.json", {"x": value})
    assert names(tmp_path) == ["a.json"]


def test_require_absent(tmp_path):
    require_absent(tmp_path / "new")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path, tmp_path / "dangling"):
        with pytest.raises(OutputError, match="exists already; choose another output or remove it first"):
            require_absent(path)


def test_new_folder_appears_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        assert not out.exists()
        assert folder.parent == out.parent, "a rename is atomic within one file system only"
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
    assert (out / "inner" / "file").read_text() == "x"
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_new_folder_leaves_nothing_after_a_failure_inside(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        raise error
    assert names(tmp_path) == []


def test_new_folder_makes_files_durable_before_the_rename(tmp_path, monkeypatch):
    events: list[str] = []
    rename = os.rename
    monkeypatch.setattr(files.os, "fsync", lambda fd: events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    monkeypatch.setattr(files.os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    with new_folder(tmp_path / "out") as folder:
        (folder / "inner").mkdir()
        for name in ("one", "inner/two"):
            (folder / name).write_text("x")
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert {"one", "two", "inner", folder.name} <= set(before), "files, and the folders that name them"
    assert after == [tmp_path.name]


def test_new_folder_refuses_what_exists_before_and_after(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"), new_folder(tmp_path / "out"):
        pytest.fail("the body must not run")
    with pytest.raises(OutputError, match="exists already"), new_folder(tmp_path / "late") as folder:
        (folder / "file").write_text("mine")
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "file").write_text("theirs")
    assert (tmp_path / "late" / "file").read_text() == "theirs"
    assert names(tmp_path) == ["late", "out"]


def test_a_killed_writer_leaves_a_part_that_the_next_one_removes(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from dydit.files import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")]).returncode == -9
    part, lock = sorted(names(tmp_path), key=lambda name: name == ".out.lock")
    assert part.startswith(".out.") and part.endswith(".part") and lock == ".out.lock"
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["whole"]


def test_one_line_folds_white_space():
    assert one_line(OutputError("a\n  b\tc")) == "a b c"
    assert one_line(KeyError()) == "KeyError"
