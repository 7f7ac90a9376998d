"""Results appear on file systems that lack something: flushing of folders, hard links, renames, locks, maps.

And wherever a user keeps files: names with blanks, accents and `~`; under any umask.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dydit import files, locks
from dydit.bundle import bundle as bundles
from dydit.bundle.bundle import Bundle, mapped_file
from dydit.errors import BackendError, OutputError
from dydit.files import atomic_file, claimed, fsync_path, new_file, new_folder, user_path, write_atomic
from dydit.runtime.pipeline import DyDiTPipeline

EVERYTHING = {
    "convert": ["f.safetensors"],
    "export": ["conditioning.onnx", "manifest.json", "sliding.onnx", "weights.bin"],
    "sample": ["latents.npz", "samples.json"],
}


def commands(checkpoint: Path, bundle: Path, out: Path) -> dict[str, list[object]]:
    """Commands that write, each into a name of its own below `out`."""
    return {
        "convert": ["convert", checkpoint, "--out", out / "convert" / "f.safetensors"],
        "export": ["export", checkpoint, "--steps", 2, "--dynamic-width", "--out", out / "export"],
        "sample": ["sample", bundle, "--labels", 1, "--out", out / "sample"],
    }


def refuse(code: int) -> Callable[..., Any]:
    def fail(*_arguments: object, **_settings: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def exported(make_bundle) -> Bundle:
    return make_bundle(steps=2, plan="sliding")


@pytest.fixture(scope="module")
def usual(exported, make_checkpoint, tmp_path_factory) -> set[str]:
    """What the commands leave where nothing is missing."""
    from dydit.cli import main

    out = tmp_path_factory.mktemp("usual")
    for arguments in commands(make_checkpoint().path, exported.path, out).values():
        assert main([*map(str, arguments), "--quiet"]) == 0
    found = listing(out)
    for name, expected in EVERYTHING.items():
        assert {f"{name}/{file}" for file in expected} <= found
    return found


def no_flush_of_folders(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    fsync = os.fsync

    def flush(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)


def no_opening_of_folders(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    opened = os.open

    def open_(path: Any, flags: int, *more: Any, **settings: Any) -> int:
        if not settings and os.path.isdir(path) and flags == os.O_RDONLY:
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, flags, *more, **settings)

    monkeypatch.setattr(files.os, "open", open_)


def no_links(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(os, "link", refuse(code))


def no_renames(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, refuse(code))
    monkeypatch.setattr(os, "link", refuse(code))


def no_locks(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(locks.fcntl, "flock", refuse(code))


def no_maps(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    class Refused(np.memmap):
        def __new__(cls, *_arguments: Any, **_settings: Any) -> Any:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(bundles.np, "memmap", Refused)


LACKS = {
    "cifs": [(no_flush_of_folders, errno.EINVAL), (no_links, errno.ENOTSUP)],
    "fuse": [(no_opening_of_folders, errno.EACCES), (no_maps, errno.ENODEV), (no_links, errno.EPERM)],
    "devices": [(no_flush_of_folders, errno.ENOTSUP), (no_renames, errno.EXDEV)],
    "object store": [(no_flush_of_folders, errno.EACCES), (no_renames, errno.ENOSYS)],
}


@pytest.mark.parametrize("kind", LACKS)
def test_every_command_leaves_its_results(
    run, usual, exported, make_checkpoint, tmp_path, monkeypatch, kind: str
) -> None:
    for lack, code in LACKS[kind]:
        lack(monkeypatch, code)
    for arguments in commands(make_checkpoint().path, exported.path, tmp_path).values():
        done = run(*arguments, "--quiet")
        assert done.code == 0, done.err
    monkeypatch.undo()
    assert listing(tmp_path) == usual
    Bundle.open(tmp_path / "export")


def test_without_locks_the_first_to_finish_wins(tmp_path, monkeypatch) -> None:
    no_locks(monkeypatch, errno.ENOLCK)
    with pytest.raises(OutputError, match="exists already"), new_file(tmp_path / "f") as file:
        file.write(b"late")
        with new_file(tmp_path / "f") as other:
            other.write(b"early")
    with pytest.raises(OutputError, match="exists already"), new_folder(tmp_path / "d") as folder:
        (folder / "late").touch()
        with new_folder(tmp_path / "d") as other_folder:
            (other_folder / "early").touch()
    assert (tmp_path / "f").read_bytes() == b"early"
    assert {"f", "d", "d/early"} == {name for name in listing(tmp_path) if not name.startswith(".")}


def test_other_troubles_of_flushing_are_not_passed_over(tmp_path, monkeypatch) -> None:
    no_flush_of_folders(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        fsync_path(tmp_path)


@pytest.fixture(params=[0o077, 0o002], ids=oct)
def umask(request) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_modes_are_what_the_umask_says(run, exported, make_checkpoint, tmp_path, umask) -> None:
    for arguments in commands(make_checkpoint().path, exported.path, tmp_path).values():
        assert run(*arguments, "--quiet").code == 0
    write_atomic(tmp_path / "replaced", b"old")
    write_atomic(tmp_path / "replaced", b"new")
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


@pytest.mark.parametrize("name", ["with a blank, ünïcödé 図", "~", "a" * 240])
def test_paths_of_all_kinds(run, exported, make_checkpoint, tmp_path, monkeypatch, name: str) -> None:
    place = tmp_path / name
    place.mkdir()
    bundle, checkpoint = place / "bundle", place / "model.safetensors"
    shutil.copytree(exported.path, bundle)
    shutil.copy(make_checkpoint().path, checkpoint)
    for arguments in commands(checkpoint, bundle, place).values():
        done = run(*arguments)
        assert done.code == 0, done.err
    assert not [path for path in place.iterdir() if path.name.startswith(".")]
    with new_folder(tmp_path / "x" / name) as folder:
        (folder / "file").touch()
    with new_file(tmp_path / "x" / f"{name}.json") as file:
        file.write(b"{}")


def test_a_home_folder_is_found(run, exported, make_checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(exported.path, tmp_path / "bundle")
    shutil.copy(make_checkpoint().path, tmp_path / "model.safetensors")
    for arguments in commands(Path("~/model.safetensors"), Path("~/bundle"), Path("~/out")).values():
        done = run(*arguments)
        assert done.code == 0, done.err
    assert run("sample", "~/bundle", "--labels=1", "--out=~/more", "--latents-out=~/latents.npz").code == 0
    assert (tmp_path / "latents.npz").is_file() and not Path("~").exists()
    with DyDiTPipeline.from_bundle("~/bundle") as pipeline:
        assert pipeline([1], output_type="latent").latents.shape[0] == 1
    from dydit.checkpoints.checkpoint import load_checkpoint

    assert load_checkpoint("~/model.safetensors").path == tmp_path / "model.safetensors"
    assert user_path("~no-such-user/x") == Path("~no-such-user/x")


def test_too_little_memory_is_not_called_damage(exported, tmp_path, monkeypatch) -> None:
    """Neither by a map nor by reading in its place."""
    no_maps(monkeypatch, errno.ENOMEM)
    with pytest.raises(BackendError, match=r"not enough memory .* for the \d+ bytes of .*weights\.bin; free some"):
        exported.mapped_weights()
    no_maps(monkeypatch, errno.ENODEV)
    monkeypatch.setattr(bundles.np, "fromfile", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(BackendError, match="not enough memory"):
        exported.mapped_weights("c")


def test_a_file_that_cannot_be_mapped_is_read(exported, monkeypatch) -> None:
    expected = np.array(exported.mapped_weights())
    no_maps(monkeypatch, errno.ENODEV)
    for mode in ("r", "c"):
        raw = mapped_file(exported.file("weights.bin"), mode)
        assert np.array_equal(raw, expected) and raw.flags.writeable == (mode == "c")


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_an_address_space_that_is_too_small(exported, tmp_path, backend: str) -> None:
    """A process that may not have much memory ends in one line, and does not call the bundle damaged."""
    code = (
        "import resource, sys\nfrom dydit.cli import main\nimport torch, onnxruntime\n"
        "import dydit.commands.exit_codes, dydit.commands.sample\n"
        "import dydit.runtime.bulk.run, dydit.runtime.backends.torch\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]),) * 2)\nsys.exit(main(sys.argv[2:]))\n"
    )
    arguments = ["sample", str(exported.path), "--labels", "1", "--backend", backend, "--threads", "1"]
    command = [sys.executable, "-c", code, str(1 << 18), *arguments, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "memory" in done.stderr and "damaged" not in done.stderr


@pytest.mark.parametrize("how", [write_atomic, None], ids=["replacing", "new"])
def test_folders_that_were_made_for_a_failure_go_again(tmp_path, how) -> None:
    (tmp_path / "kept").mkdir()
    for writer in (atomic_file, new_file, new_folder):
        with pytest.raises(ValueError, match="no"), writer(tmp_path / "kept" / "a" / "b" / "out"):
            raise ValueError("no")
    assert listing(tmp_path) == {"kept"}


def test_an_error_about_another_file_keeps_its_name(tmp_path) -> None:
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(IsADirectoryError, match="checkpoint"), new_folder(tmp_path / "out"):
        (tmp_path / "checkpoint").read_bytes()
    with pytest.raises(OutputError, match="cannot write"), new_folder(tmp_path / "out") as folder:
        (folder / "x").mkdir()
        (folder / "x").write_bytes(b"")


def test_parts_of_killed_writers_go_and_others_stay(tmp_path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from dydit.files import new_file\n"
        "with new_file(Path(sys.argv[1])) as file:\n    file.write(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    names = ["out", "out.0123abcd", "a[b]c", "star*"]
    for name in names:
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False).returncode == -9
    assert len(listing(tmp_path)) == 2 * len(names)
    for left, name in enumerate(names):
        with claimed(tmp_path / name):
            assert len(listing(tmp_path)) == 2 * (len(names) - left) - 1
        assert len(listing(tmp_path)) == 2 * (len(names) - left - 1)


def test_a_claim_is_of_one_process(tmp_path) -> None:
    with claimed(tmp_path / "out"):
        for writer in (claimed, new_file, new_folder):
            with (
                pytest.raises(OutputError, match=r"another process is writing .*out; wait for it"),
                writer(tmp_path / "out"),
            ):
                pytest.fail("the body must not run")
    with open(tmp_path / ".out.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process"), claimed(tmp_path / "out"):
            pytest.fail("the body must not run")


def test_a_new_file_replaces_nothing(tmp_path) -> None:
    path = tmp_path / "file"
    with pytest.raises(OutputError, match="exists already"), new_file(path) as file:
        file.write(b"mine")
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs"
    with new_file(path, same_is_fine=True) as file:
        file.write(b"theirs")
    with pytest.raises(OutputError, match="exists already"), new_file(path, same_is_fine=True) as file:
        file.write(b"others")
    assert path.read_bytes() == b"theirs" and listing(tmp_path) == {"file"}
