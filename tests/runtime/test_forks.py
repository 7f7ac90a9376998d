"""A pipeline in a forked child, and after it was closed: threads, sessions, maps."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dydit.bundle.manifest import PlanKind
from dydit.bundle.stored_weights import WEIGHTS
from dydit.errors import BackendError
from dydit.runtime import background
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.pipeline import DyDiTPipeline
from dydit.runtime.resident import ResidentSubnets
from tests.fixtures.packages import OPENVINO

PATIENCE = 240  # seconds, of a machine with much else to do; what hangs hangs for ever
PLANS = {"dynamic width": {"plan": PlanKind.DYNAMIC_WIDTH}, "per step": {"plan": PlanKind.PER_STEP}}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def in_child(work, file: Path) -> np.ndarray:
    """What `work()` returns in a forked child."""
    child = os.fork()
    if not child:
        code = 1
        try:
            np.save(file, work())
            code = 0
        finally:
            os._exit(code)
    waited = time.monotonic() + PATIENCE
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > waited:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    assert ended[1] == 0, "the child failed"
    return np.load(file)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["onnxruntime", "torch", OPENVINO])
def test_a_child_samples_what_its_parent_does(name, plan, make_bundle, tmp_path):
    """With threads at work on one image, and on an image each; before and after the child, the parent does, too."""
    bundle = make_bundle(steps=3, **PLANS[plan])
    with DyDiTPipeline.from_bundle(bundle.path, name, threads=2) as pipe:
        for labels in ([1], [1, 2, 3]):

            def call(labels=labels):
                return pipe(labels, seed=0, output_type="latent").latents

            wanted = call()
            theirs = in_child(call, tmp_path / "child.npy")
            # PyTorch has one thread there, so its products may add up otherwise.
            assert np.array_equal(theirs, wanted) if name != "torch" else np.allclose(theirs, wanted, rtol=1e-3)
            assert np.array_equal(call(), wanted)


def test_forked_while_another_thread_is_in_a_call(make_bundle, tmp_path):
    """The thread and what it holds are not in the child: neither the lock nor half-moved weights stop it."""
    bundle = make_bundle(steps=3, plan=PlanKind.DYNAMIC_WIDTH)
    with DyDiTPipeline.from_bundle(bundle.path, threads=2) as pipe:

        def call(progress=None):
            return pipe([1, 2, 3], seed=0, output_type="latent", progress=progress).latents

        wanted, inside, go_on = call(), threading.Event(), threading.Event()
        thread = threading.Thread(target=call, args=(lambda *now: (inside.set(), go_on.wait()),))
        thread.start()
        inside.wait()
        try:
            theirs = in_child(call, tmp_path / "child.npy")
        finally:
            go_on.set()
            thread.join()
        assert np.array_equal(theirs, wanted) and np.array_equal(call(), wanted)


def test_children_that_end_like_any_program(make_bundle):
    """Freeing what a parent's threads belonged to would wait for them: in a child that used the pipeline, and in one
    that did not.
    """
    bundle = make_bundle(steps=3, plan=PlanKind.PER_STEP)
    script = f"""
import os, sys
from dydit.runtime.pipeline import DyDiTPipeline
pipe = DyDiTPipeline.from_bundle({str(bundle.path)!r}, threads=2)
pipe([1], output_type="latent")
children = []
for used in (True, False):
    child = os.fork()
    if not child:
        if used:
            pipe([1], output_type="latent")
            pipe.close()
        sys.exit(7)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
assert codes == [7, 7], codes
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr


def ours() -> int:
    """How many threads of dydit's pools run in this process."""
    return sum(len(workers._running) for workers in background._ALIVE)


def mapped(bundle) -> int:
    """How many maps of the bundle's weights this process has."""
    return Path("/proc/self/maps").read_text().count(str(bundle.path / WEIGHTS))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not tell what is mapped")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["onnxruntime", "torch", OPENVINO])
def test_closing_frees_threads_sessions_and_maps(name, plan, make_bundle):
    bundle = make_bundle(steps=3, **PLANS[plan])
    gc.collect()
    before = ours()
    assert not mapped(bundle)
    pipe = DyDiTPipeline.from_bundle(bundle.path, name, threads=2)
    pipe([1, 2, 3], seed=0, output_type="latent")
    assert (mapped(bundle) or name == "openvino") and ours() > before  # what OpenVINO compiled before, it copies
    pipe.close()
    gc.collect()
    assert not mapped(bundle) and ours() == before
    pipe.close()
    for call in (lambda: pipe([1]), lambda: pipe(1, output_type="latent")):
        with pytest.raises(BackendError, match="this pipeline was closed; open the bundle again"):
            call()


@pytest.mark.parametrize("name", ["onnxruntime", "torch", OPENVINO])
def test_a_backend_is_closed_by_who_opened_it(name, make_bundle):
    bundle = make_bundle(steps=3, plan=PlanKind.PER_STEP)
    backend = open_backend(name, bundle, BackendOptions(threads=1))
    with DyDiTPipeline(backend) as pipe:
        wanted = pipe([1], seed=0, output_type="latent").latents
    with DyDiTPipeline(backend) as pipe:
        assert np.array_equal(pipe([1], seed=0, output_type="latent").latents, wanted)
        subnets = ResidentSubnets(backend)
        subnet = subnets.get(0)
        backend.close()
        backend.close()
        for call in (
            lambda: pipe([1], output_type="latent"),
            lambda: backend.subnet(0),
            lambda: subnet.step({}),
            lambda: backend.conditioning(np.array([1], np.float32), np.array([1])),
        ):
            with pytest.raises(BackendError, match="this backend was closed; open the bundle again"):
                call()
        subnets.close()
