"""The choice of a backend: when it is measured, what decides, what is kept, and who else has to follow it."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dydit.bench import choice, choice_cache
from dydit.bench.choice import MARGIN, ROUNDS, Choice, Workload, fastest, fastest_backend, is_short
from dydit.bench.choice_cache import MOST, ChoiceCache, KeptChoice
from dydit.bench.contender import WORKER
from dydit.bundle.bundle import Bundle
from dydit.errors import ConfigError
from dydit.reports.results import Machine
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.registry import BACKENDS, candidates
from dydit.runtime.bulk.run import sample_to_folder
from dydit.runtime.bulk.run_folder import agreed_backend
from dydit.runtime.bulk.workers import Worker
from dydit.runtime.request import SampleRequest

CONTENDERS = """
import base64, json, os, struct, sys

name = json.loads(sys.stdin.readline())["side"]["backend"]
fails = name in os.environ["FAILS"]
answer = {"error": f"{name} has a bad day", "kind": "BackendError"} if fails else {"seconds": 0.5, "subnets": 1}
print(json.dumps(answer), flush=True)
for line in sys.stdin:
    if line == "round\\n":
        with open(os.environ["LOG"], "a") as log:
            print(name, file=log)
        answer = {"ms": [float(os.environ[f"MS_{name}"])]}
    else:
        value = 1.1 if name in os.environ["DEVIATES"] else 0.9
        answer = {"shape": [1, 1], "values": base64.b64encode(struct.pack("<f", value)).decode()}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="module")
def pixel_bundle(make_checkpoint, make_bundle, small_config) -> Bundle:
    """Three channels, so that samples are pictures; three steps."""
    checkpoint = make_checkpoint(small_config.model_copy(update={"in_channels": 3}))
    return make_bundle(checkpoint, steps=3, max_subnets=1, max_batch=4)


@pytest.fixture
def trials(tmp_path: Path, monkeypatch):
    """`trials(ms, fails="", deviates="")`: from now on a trial takes place before any run, and its candidates are three
    processes that say they take `ms` milliseconds. Returns the file in which each round leaves a line.
    """
    (tmp_path / "mine").mkdir()
    script, log = tmp_path / "mine" / "mine.py", tmp_path / "mine" / "log"
    script.write_text(CONTENDERS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine" / "cache"))
    monkeypatch.setattr("dydit.bench.contender.WORKER", [sys.executable, str(script)])
    monkeypatch.setattr(choice, "candidates", lambda bundle, device: BACKENDS)
    monkeypatch.setattr(choice, "SHORTEST", 0)
    monkeypatch.setattr(choice, "WORTH", 0)

    def prepare(ms: tuple[float, float, float], fails: str = "", deviates: str = "") -> Path:
        for name, value in zip(BACKENDS, ms, strict=True):
            monkeypatch.setenv(f"MS_{name}", str(value))
        monkeypatch.setenv("FAILS", fails)
        monkeypatch.setenv("DEVIATES", deviates)
        monkeypatch.setenv("LOG", str(log))
        log.write_text("")
        return log

    return prepare


def backend_of(out: Path) -> str:
    return json.loads((out / "samples.json").read_text())["settings"]["backend"]


def test_a_run_says_in_one_line_what_it_chose_and_keeps_it(
    run, trials, pixel_bundle, tmp_path: Path, monkeypatch
) -> None:
    trials((20.0, 10.04, 1.0), deviates="openvino")
    call = ["sample", pixel_bundle.path, "--labels", "1,2"]
    done = run(*call, "--out", tmp_path / "first")
    warning, line = done.err.splitlines()
    assert re.fullmatch(
        r"Warning: openvino is not used, because its steps differ from those of onnxruntime by \S+ \(relative L2; "
        r"at most 1e-5 is expected\)",
        warning,
    )
    assert line == "backend: torch, 10.0 ms a step (onnxruntime 20.0); measured now, kept for the next run"
    assert done.code == 0 and backend_of(tmp_path / "first") == "torch"

    monkeypatch.setattr("dydit.bench.contender.WORKER", [sys.executable, "-c", "raise SystemExit('a trial')"])
    again = run(*call, "--backend", "auto", "--out", tmp_path / "second")
    assert re.fullmatch(
        r"backend: torch, 10.0 ms a step \(onnxruntime 20.0\); as measured on \d{4}-\d\d-\d\d\n", again.err
    )
    assert backend_of(tmp_path / "second") == "torch"
    quiet = run(*call, "--out", tmp_path / "third", "-q")
    assert (quiet.code, quiet.err, backend_of(tmp_path / "third")) == (0, "", "torch")
    # Where something is known of a run, or its user names a backend, nothing is chosen.
    ChoiceCache.of_user().file.unlink()
    (tmp_path / "first" / "000001.png").unlink()
    repaired = run(*call, "--out", tmp_path / "first")
    assert (repaired.code, repaired.err) == (0, "") and "000001.png" in repaired.out
    named = run(*call, "--backend", "onnxruntime", "--out", tmp_path / "fourth")
    assert (named.code, named.err, backend_of(tmp_path / "fourth")) == (0, "", "onnxruntime")


def test_what_is_slow_or_fails_is_left_out_and_the_default_needs_to_be_beaten(trials, pixel_bundle) -> None:
    log, work = trials((10.0, 30.0, 9.9), fails="openvino"), Workload(labels=(1, 2), cfg_scale=4.0)
    done = fastest_backend(pixel_bundle, work)
    assert (done.backend, done.ms) == ("onnxruntime", {"onnxruntime": 10.0, "torch": 30.0})
    assert done.failed == {"openvino": "openvino: openvino has a bad day"} and done.is_kept
    rounds = log.read_text().split()
    assert rounds.count("onnxruntime") == 2 + ROUNDS, "one warms up, one shows how long the run will take"
    assert rounds.count("torch") == 1 + 1
    # Another batch is another choice, and a difference below noise is none.
    trials((10.0, 9.9, 20.0))
    other = fastest_backend(pixel_bundle, replace(work, labels=(1,)))
    assert (other.backend, set(other.ms)) == ("onnxruntime", set(BACKENDS)) and other.day is None


def test_a_trial_is_given_up_where_it_would_take_too_long(trials, pixel_bundle, monkeypatch) -> None:
    monkeypatch.setattr(choice, "WORTH", 1e9)
    log = trials((10.0, 5.0, 5.0))
    assert fastest_backend(pixel_bundle, Workload(labels=(1,))) == Choice("onnxruntime")
    assert log.read_text().split() == ["onnxruntime"] * 2
    assert not ChoiceCache.of_user().file.exists()


@given(st.dictionaries(st.sampled_from(BACKENDS), st.floats(0.01, 1e4), min_size=1))
def test_the_fastest_is_the_default_or_clearly_faster(ms: dict[str, float]) -> None:
    name, first = fastest(ms), next(iter(ms))
    assert ms[name] <= ms[first] and (name == first or ms[name] == min(ms.values()))
    assert (name == first) == (min(ms.values()) >= MARGIN * ms[first])


@given(batches=st.integers(1, 10**9), images=st.integers(1, 64), guided=st.booleans(), threads=st.integers(1, 64))
def test_longer_runs_are_worth_more(pixel_bundle, batches: int, images: int, guided: bool, threads: int) -> None:
    work = Workload((1,) * images, batches, 4.0 if guided else 1.0, options=BackendOptions(threads=threads))
    if not is_short(pixel_bundle, work):
        assert not is_short(pixel_bundle, replace(work, batches=2 * batches))
        assert not is_short(pixel_bundle, replace(work, cfg_scale=4.0))
    assert is_short(pixel_bundle, Workload((1,) * images)) and not is_short(pixel_bundle, Workload((1,), 10**9))


def test_the_candidates_of_a_device(pixel_bundle, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert candidates(pixel_bundle, "cpu") == candidates(pixel_bundle, "cuda") == ("onnxruntime", "torch")
    assert candidates(pixel_bundle, "npu") == ()
    monkeypatch.setitem(sys.modules, "torch", None)
    assert candidates(pixel_bundle, "cpu") == ("onnxruntime",)


def kept(cache: ChoiceCache, manifest, batch: int = 2, backend: str = "torch") -> KeptChoice:
    subject = cache.subject(manifest, ("onnxruntime", "torch"), "cpu", 2, batch, True, True)
    return KeptChoice(of=subject, backend=backend, ms={"torch": 1.5}, day="2026-11-29")


def test_a_choice_is_kept_for_one_subject_on_one_machine(pixel_bundle, tmp_path: Path, monkeypatch) -> None:
    manifest, machine = pixel_bundle.manifest, Machine.here()
    cache = ChoiceCache(tmp_path, machine)
    first = kept(cache, manifest)
    assert (
        cache.read(first.of) is None and cache.write(first) and ChoiceCache(tmp_path, machine).read(first.of) == first
    )
    for change in ({"device": "cuda"}, {"threads": 3}, {"batch": 3}, {"guided": False}, {"bundle": "x"}):
        assert cache.read(first.of.model_copy(update=change)) is None
    newer = machine.model_copy(update={"packages": {**machine.packages, "torch": "99"}})
    assert cache.read(kept(ChoiceCache(tmp_path, newer), manifest).of) is None
    other = ChoiceCache(tmp_path, machine.model_copy(update={"cpu": "another"}))
    assert other.read(first.of) is None and other.file != cache.file
    monkeypatch.setattr(choice_cache, "MOST", 3)
    for batch in (3, 4, 5, 4):
        assert cache.write(kept(cache, manifest, batch))
    assert [each.of.batch for each in cache._choices()] == [3, 5, 4] and MOST > 3
    assert len(list(tmp_path.iterdir())) == 1, "nothing else is left"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", "another machine", "no candidate", "a folder"])
def test_what_cannot_be_read_is_measured_again(pixel_bundle, tmp_path: Path, content: bytes | str) -> None:
    cache = ChoiceCache(tmp_path, Machine.here())
    good = kept(cache, pixel_bundle.manifest, backend="ncnn" if content == "no candidate" else "torch")
    assert cache.write(good)
    if content == "another machine":
        cache.file.write_text(cache.file.read_text().replace('"cores": ', '"cores": 1'))
    elif content == "a folder":
        cache.file.unlink()
        cache.file.mkdir()
    elif isinstance(content, bytes):
        cache.file.write_bytes(content)
    assert cache.read(good.of) is None
    assert cache.write(kept(cache, pixel_bundle.manifest)) is (content != "a folder")
    assert (cache.read(good.of) is None) is (content == "a folder")


def test_nothing_is_kept_where_nothing_can_be_written(pixel_bundle, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        folder = Path("/proc/dydit")  # nobody can write there
    else:
        folder = tmp_path / "read-only"
        folder.mkdir(mode=0o500)
    for cache in (ChoiceCache(folder, Machine.here()), ChoiceCache(None, Machine.here())):
        assert not cache.write(kept(cache, pixel_bundle.manifest))
        assert cache.read(kept(cache, pixel_bundle.manifest).of) is None


REQUEST = SampleRequest(labels=(3, 1), num=4, batch_size=2)


def test_the_workers_of_a_run_choose_once(pixel_bundle, tmp_path: Path) -> None:
    def never(run):
        raise AssertionError("a second choice")

    out = tmp_path / "out"
    sample_to_folder(pixel_bundle, REQUEST, out, backend=lambda run: "torch", worker=Worker(1, 2))
    done = sample_to_folder(pixel_bundle, REQUEST, out, backend=never, worker=Worker(0, 2))
    assert done.finished and backend_of(out) == "torch"
    assert sample_to_folder(pixel_bundle, REQUEST, out, backend=never).finished_before
    with pytest.raises(ConfigError):  # what is wrong with a request comes first
        sample_to_folder(pixel_bundle, SampleRequest(labels=(99,)), tmp_path / "no", backend=never)


def test_workers_that_start_together_wait_for_the_one_that_chooses(tmp_path: Path) -> None:
    calls, together = [], threading.Barrier(4)

    def choose() -> str:
        calls.append(threading.get_ident())
        return f"backend {len(calls)}"

    def work(number: int) -> None:
        together.wait()
        agreed[number] = agreed_backend(tmp_path / "out", choose, Worker(number, 4))

    agreed: dict[int, str] = {}
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert agreed == dict.fromkeys(range(4), "backend 1") and len(calls) == 1


@pytest.mark.release
def test_a_trial_of_what_is_installed_here(pixel_bundle, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(choice, "SHORTEST", 0)
    monkeypatch.setattr(choice, "WORTH", 0)
    cache = ChoiceCache(tmp_path, Machine.here())
    done = fastest_backend(pixel_bundle, Workload((1, 2), 1, 4.0, options=BackendOptions(threads=1)), cache)
    assert set(done.ms) == set(candidates(pixel_bundle, "cpu")) and not done.deviating and not done.failed
    assert done.backend in done.ms and done.is_kept and WORKER[-1] == "dydit.bench.bench_worker"
