"""Standard output or error that is closed, full or unread ends in one line or silently, and never a traceback.

And a result never gets what was meant for a closed stream.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dydit.bundle.bundle import Bundle
from dydit.cli import cli

RUN = """
import json, sys, warnings
from dydit.cli import main
def call(words):
    warnings.warn("for standard error")
    return main(words)
codes = [call(words) for words in json.loads(sys.argv[1])]
open(sys.argv[2], "w").write(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def exported(make_bundle) -> Bundle:
    return make_bundle(steps=2, plan="sliding")


def commands(bundle: Path, checkpoint: Path, out: Path) -> list[list[str]]:
    """Commands of every kind: they print, write, refuse, fail in their usage, and show help."""
    return [
        ["inspect", str(bundle)],
        ["inspect", str(bundle), "--json"],
        ["sample", str(bundle), "--labels", "1", "--out", str(out / "sample")],
        ["convert", str(checkpoint), "--out", str(out / "f.safetensors")],
        ["export", str(checkpoint), "--steps", "2", "--dynamic-width", "--out", str(out / "bundle")],
        ["inspect", str(out / "missing")],
        ["sample", "--labels"],
        ["--version"],
        *(["--help"] if name is None else [name, "--help"] for name in (None, *cli.commands)),
    ]


CODES = [0, 0, 0, 0, 0, 2, 2]


@pytest.mark.parametrize(
    "closed", [">&-", "<&- >&- 2>&-", *(pytest.param(each, marks=pytest.mark.release) for each in ("2>&-", ">&- 2>&-"))]
)
def test_closed_streams(exported, make_checkpoint, tmp_path: Path, closed: str) -> None:
    words = commands(exported.path, make_checkpoint().path, tmp_path)
    call = shlex.join([sys.executable, "-c", RUN, json.dumps(words), str(tmp_path / "codes")])
    done = subprocess.run(["bash", "-c", f"{call} {closed}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done.stderr
    codes = json.loads((tmp_path / "codes").read_text())
    assert codes == [*CODES, *[0] * (len(words) - len(CODES))]
    assert Bundle.open(tmp_path / "bundle").manifest.digest == exported.manifest.digest, "nothing was printed into it"


@pytest.mark.parametrize("index", [0, 2, 8])
def test_a_full_disk_behind_standard_output(exported, make_checkpoint, tmp_path: Path, index: int) -> None:
    words = commands(exported.path, make_checkpoint().path, tmp_path)[index]
    with open("/dev/full", "w") as full:
        call = [sys.executable, "-m", "dydit", *words]
        done = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    *progress, last = done.stderr.splitlines()
    assert (done.returncode, last) == (2, f"dydit: error: standard output: {os.strerror(errno.ENOSPC)}")
    assert all(line.startswith("sample: ") for line in progress)


@pytest.mark.parametrize("streams", ["stdout", "both"])
@pytest.mark.parametrize("index", [0, 1, 2, 8])
def test_a_reader_that_has_gone(exported, make_checkpoint, tmp_path: Path, index: int, streams: str) -> None:
    """As `dydit ... | head -1`, and `dydit ... 2>&1 | head -1`; what was asked for is there all the same."""
    words = commands(exported.path, make_checkpoint().path, tmp_path)[index]
    reader, writer = os.pipe()
    os.close(reader)
    errors = writer if streams == "both" else subprocess.PIPE
    done = subprocess.run([sys.executable, "-m", "dydit", *words], stdout=writer, stderr=errors, text=True, check=False)
    os.close(writer)
    assert done.returncode == 141 and all(line.startswith("sample: ") for line in (done.stderr or "").splitlines())
    assert index != 2 or (tmp_path / "sample" / "samples.json").is_file()


def test_progress_that_nobody_sees_does_not_end_a_run(exported, tmp_path: Path) -> None:
    """Standard error is a terminal that is closed while the run goes on."""
    ours, theirs = os.openpty()
    call = [sys.executable, "-m", "dydit", "sample", str(exported.path), "--labels", "1", "--num", "64"]
    process = subprocess.Popen([*call, "--out", str(tmp_path / "out")], stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    os.read(ours, 1)
    os.close(ours)
    assert process.wait(120) == 0 and (tmp_path / "out" / "samples.json").is_file()


def test_names_that_the_encoding_lacks(exported, tmp_path: Path) -> None:
    """Neither accents on an ASCII terminal nor bytes that are no text end in a traceback."""
    for name, encoding in (("bündel", "ascii"), (os.fsdecode(b"b\xff"), "utf-8")):
        (tmp_path / name).symlink_to(exported.path)
        bundle, codes = str(tmp_path / name), tmp_path / "codes"
        words = [["inspect", bundle], ["inspect", f"{bundle}-missing"]]
        call = [sys.executable, "-W", "ignore", "-c", RUN, json.dumps(words), str(codes)]
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run(call, capture_output=True, env=environment, check=False)
        assert json.loads(codes.read_text()) == [0, 2] and done.stdout, done.stderr
        assert done.stderr.count(b"\n") == 1, done.stderr
