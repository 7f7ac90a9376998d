"""Interrupts at any moment of a call: each arrives as what it is, and the next call's bits are right.

The signals are real ones, of a timer, at random moments of a call. The ordinary run makes some 150 of them;
`DYDIT_INTERRUPTS=1000` makes as many for each way of running.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

import numpy as np
import pytest

from dydit.bundle.manifest import PlanKind
from dydit.runtime import dynamic_width
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.background import Pool
from dydit.runtime.dynamic_width import DynamicWidthWeights
from dydit.runtime.pipeline import DyDiTPipeline
from tests.fixtures.packages import needs_openvino
from tests.fixtures.simulated_device import SimulatedDeviceBackend

INTERRUPTS = int(os.environ.get("DYDIT_INTERRUPTS", "30"))
DYNAMIC, PER_STEP = {"plan": PlanKind.DYNAMIC_WIDTH, "steps": 3}, {"plan": PlanKind.PER_STEP, "steps": 3}
WAYS = {
    "onnxruntime, dynamic width": (
        DYNAMIC,
        lambda bundle: open_backend("onnxruntime", bundle, BackendOptions(2)),
    ),
    "onnxruntime, per step": (PER_STEP, lambda bundle: open_backend("onnxruntime", bundle, BackendOptions(2))),
    "torch, per step": (PER_STEP, lambda bundle: open_backend("torch", bundle, BackendOptions(1))),
    "torch, dynamic width": (DYNAMIC, lambda bundle: open_backend("torch", bundle, BackendOptions(1))),
    "openvino, per step": (PER_STEP, lambda bundle: open_backend("openvino", bundle, BackendOptions(2))),
    "device, dynamic width": (DYNAMIC, lambda bundle: SimulatedDeviceBackend(bundle, BackendOptions(1))),
}


class Timer:
    """Raises KeyboardInterrupt in the main thread, out of whatever it does, after a time; at most once."""

    def __init__(self):
        self.armed = False

    def __enter__(self):
        self._before = signal.signal(signal.SIGALRM, self._strike)
        return self

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)

    def _strike(self, *_):
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt

    def interrupts(self, call, seconds: float) -> bool:
        """Whether a call was interrupted, before it ended."""
        try:
            self.armed = True
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
            call()
            self.armed = False
        except KeyboardInterrupt:
            return True
        return False


def marked(ways):
    """The names of ways, those of OpenVINO with a reason to skip them."""
    at_release = (needs_openvino, pytest.mark.release)
    return [pytest.param(way, marks=at_release if "openvino" in way else ()) for way in ways]


@pytest.mark.parametrize("way", marked(WAYS))
def test_after_an_interrupt_the_next_call_is_right(way, make_bundle):
    settings, opened = WAYS[way]
    draws, struck = random.Random(way), 0
    with opened(make_bundle(**settings)) as backend, Timer() as timer:
        pipe = DyDiTPipeline(backend, 2)

        def call():
            return pipe([1, 2, 3], seed=7, output_type="latent").latents

        wanted, started = call(), time.perf_counter()
        call()
        whole = time.perf_counter() - started
        while struck < (INTERRUPTS // 10 if "openvino" in way else INTERRUPTS):  # it takes longer to load
            if timer.interrupts(call, draws.random() * whole):
                struck += 1
            started = time.perf_counter()
            assert np.array_equal(call(), wanted), f"after interrupt {struck}"
            whole = (whole + time.perf_counter() - started) / 2
        pipe.close()


@pytest.mark.parametrize("way", [way for way in WAYS if "dynamic width" in way])
def test_after_an_interrupt_other_steps_are_right(way, make_bundle):
    """Calls with other steps, one after another, some of them interrupted: on the way from one to the other, too."""
    settings, opened = WAYS[way]
    draws, struck = random.Random(way), 0
    with opened(make_bundle(**settings)) as backend, Timer() as timer:
        pipe = DyDiTPipeline(backend)

        def call(steps):
            return pipe([1, 2, 3], seed=7, output_type="latent", num_inference_steps=steps).latents

        wanted = {steps: call(steps) for steps in (3, 2, 4)}
        started = time.perf_counter()
        for steps in wanted:
            call(steps)
        whole = (time.perf_counter() - started) / len(wanted)
        while struck < INTERRUPTS // 3:
            steps = draws.choice(list(wanted))
            if timer.interrupts(lambda steps=steps: call(steps), draws.random() * whole):
                struck += 1
            steps = draws.choice(list(wanted))
            assert np.array_equal(call(steps), wanted[steps]), f"after interrupt {struck}"
        pipe.close()


def test_interrupted_at_every_line_of_an_exchange_the_weights_are_right(make_bundle):
    """An error out of any line of `runtime.dynamic_width`, as a signal handler might raise one."""
    bundle = make_bundle(**DYNAMIC)
    first, second = bundle.manifest.subnets[0], bundle.manifest.subnets[-1]
    wanted = {name: array.copy() for name, array in DynamicWidthWeights(bundle).run(second, dict).items()}
    weights, lines, last = DynamicWidthWeights(bundle), 0, 0

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code.co_filename != dynamic_width.__file__:
            return None
        if event == "line":
            lines += 1
            if lines == last:
                raise KeyboardInterrupt
        return trace

    interrupted = True
    while interrupted:
        weights.run(first, dict)
        lines, last, interrupted = 0, last + 1, False
        sys.settrace(trace)
        try:
            weights.run(second, dict)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(None)
        assert all(np.array_equal(array, wanted[name]) for name, array in weights.run(second, dict).items()), last
    assert last > 100, "lines that were interrupted"


def test_what_still_reads_the_weights_of_an_interrupted_step_reads_them_unchanged(make_bundle):
    """Threads go on with their images when the one that waits for them is interrupted."""
    bundle = make_bundle(**DYNAMIC)
    first, second = bundle.manifest.subnets[0], bundle.manifest.subnets[-1]
    weights, held = DynamicWidthWeights(bundle), {}

    def interrupted(fed):
        held.update(fed)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights.run(first, interrupted)
    before = {name: array.copy() for name, array in held.items()}
    for subnet in (second, first, second):
        weights.run(subnet, dict)
    assert all(np.array_equal(held[name], before[name]) for name in held)


def test_waiting_for_other_threads_is_interrupted_cleanly():
    """KeyboardInterrupt and nothing else, though waiting is all that the main thread does."""
    pool, draws = Pool(2), random.Random(0)
    with Timer() as timer:
        for number in range(1000):
            done = []

            def work(number=number, done=done):
                time.sleep(1e-4)
                done.append(number)
                return number

            tasks = [work] * 3
            if not timer.interrupts(lambda tasks=tasks: pool.all(tasks), draws.random() * 4e-4):
                assert done == [number] * 3
            assert pool.all([lambda: 1, lambda: 2]) == [1, 2]
    pool.close()


def test_an_error_of_a_task_is_raised_where_it_is_waited_for():
    pool = Pool(1)
    pending = pool.submit(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        pending.result()
    assert pending.done and pending.failed and pool.submit(lambda: 5).result() == 5
    pool.close()
    pool.close()
