"""A GPU's memory and streams on the simulated driver: what they make of errors, and that closing frees everything."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from dydit.errors import BackendError
from dydit.runtime.device.cuda import CudaDevice, CudaMemory
from dydit.runtime.device.execute import CaptureError
from dydit.runtime.device.operations import COMPUTE, COPY
from tests.fixtures.fake_driver import FakeDriver


@pytest.fixture
def memory():
    opened = CudaMemory(FakeDriver())
    with opened.activate():
        yield opened


def test_memory_is_aligned_and_copied(memory):
    a, b = memory.allocate(1000), memory.allocate(1000)
    assert a % 256 == b % 256 == 0
    data = np.arange(200, dtype=np.float32)
    memory.upload(a, data, COMPUTE)
    memory.clear(b, 1000)
    memory.copy(b + 256, a, 400)
    assert np.array_equal(memory.download(b + 256, 400).view(np.float32), data[:100])
    assert not memory.download(b, 256).any() and not memory.download(b + 656, 300).any()
    memory.free(a)


def test_streams_wait_for_events(memory):
    a, b, data = memory.allocate(256), memory.allocate(256), np.full(256, 3, np.uint8)
    memory.upload(a, data, COPY)
    memory.record("there", COPY)
    memory.wait(COMPUTE, "there")
    memory.copy(b, a, 256)
    memory.record("done", COMPUTE)
    memory.synchronize("done")
    assert np.array_equal(memory.download(b, 256), data)


def test_closing_frees_what_nobody_freed():
    """Of a run that was interrupted, say: memory, events, pinned memory, graphs; in the middle of a capture, too."""
    driver = FakeDriver()
    device = CudaDevice(None, driver)
    with device.activate():
        address = device.allocate(1000)
        device.upload(address, np.zeros(1000, np.uint8), COPY)
        device.record("event", COPY)
        device.idle()
        device.begin_capture()
        device.clear(address, 1000)
        device.replay(device.end_capture())
        device.begin_capture()
        device.clear(address, 1000)
    device.close()
    assert not driver.memory and not driver.graphs and not driver.faults


def test_errors_say_what_cannot_be_done(memory, monkeypatch):
    def fail(*arguments):
        raise BackendError("cuSomething failed (700, an illegal memory access)")

    for name in ("allocate", "record", "synchronize_stream", "free_memory", "begin_capture"):
        monkeypatch.setattr(memory._driver, name, fail)
    with pytest.raises(
        BackendError, match=r"the GPU cannot allocate 2 MiB \(use a smaller batch size, .*: cuSomething"
    ):
        memory.allocate(2 << 20)
    with pytest.raises(BackendError, match="the GPU cannot record an event: cuSomething"):
        memory.record("event", COMPUTE)
    with pytest.raises(BackendError, match="the GPU cannot finish its work: cuSomething"):
        memory.idle()
    with pytest.raises(BackendError, match="the GPU cannot say how much memory is free: cuSomething"):
        memory.free_memory()
    device = CudaDevice(None, memory._driver)
    with pytest.raises(CaptureError, match="CUDA graphs do not work here: cuSomething"):
        device.begin_capture()


def test_a_device_is_used_from_any_thread_that_activates_it():
    memory, results = CudaMemory(FakeDriver()), []
    with memory.activate():
        address = memory.allocate(256)
        memory.clear(address, 256)

    def work():
        with memory.activate():
            results.append(memory.download(address, 256))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not results[0].any()
    memory.close()
