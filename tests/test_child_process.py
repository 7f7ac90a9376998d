"""Child processes answer jobs in JSON, and their errors and deaths are told in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dydit.child_process import ChildDiedError, ChildProcess, answered
from dydit.errors import OutputError

WORKER = """
import os, signal, sys, time
from dydit.child_process import serve
from dydit.errors import OutputError

def answer(line):
    print("noise")
    if line == "refuse":
        raise OutputError("no room")
    if line == "crash":
        raise ValueError("a bug")
    if line == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if line == "sleep":
        time.sleep(3600)
    return {"line": line, "threads": os.environ.get("OMP_NUM_THREADS")}

sys.exit(serve(answer))
"""
COMMAND = [sys.executable, "-c", WORKER]


def test_jobs_are_answered_in_turn() -> None:
    with ChildProcess(COMMAND, "works", threads=3) as child:
        assert child.ask("a") == {"line": "a", "threads": "3"}
        assert child.ask("b") == {"line": "b", "threads": "3"}


def test_whichever_answers_is_told() -> None:
    with ChildProcess(COMMAND, "works") as first, ChildProcess(COMMAND, "works") as second:
        second.send("b")
        assert answered([first, second]) == [second]
        assert second.receive()["line"] == "b"


def test_an_error_keeps_its_class() -> None:
    with ChildProcess(COMMAND, "works") as child, pytest.raises(OutputError, match=r"^no room$"):
        child.ask("refuse")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("crash", r"the process that works ended: ValueError: a bug \(exit code 1\)"),
        ("kill", "the process that works was ended by SIGKILL, which can mean that memory ran out: noise"),
    ],
)
def test_a_death_is_told_with_the_last_words(line: str, message: str) -> None:
    with ChildProcess(COMMAND, "works") as child, pytest.raises(ChildDiedError, match=message) as caught:
        child.ask(line)
    assert line == "kill" or "Traceback" in caught.value.__notes__[0], "the whole of it is in a note"


def test_it_ends_with_its_parent() -> None:
    parent = f"""
import sys
from dydit.child_process import ChildProcess
child = ChildProcess([sys.executable, "-c", {WORKER!r}], "works")
child.ask("a")
child.send("sleep")
print(child._process.pid, flush=True)
sys.stdin.read()
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{child}").exists()
