"""Each installed package with the CUDA driver, on a GPU: memory, streams, events, pinned copies and graphs."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from dydit.errors import BackendError
from dydit.runtime.device import driver
from dydit.runtime.device.cuda import CudaDevice, CudaMemory
from dydit.runtime.device.driver_bindings import BindingsDriver, Graphs
from dydit.runtime.device.driver_pycuda import PyCudaDriver
from dydit.runtime.device.operations import COMPUTE, COPY
from dydit.runtime.device.pinned import RING_BYTES

OPENERS = {
    driver.BINDINGS: lambda module: BindingsDriver(module),
    driver.PYCUDA: lambda module: PyCudaDriver(module, Graphs(pytest.importorskip(driver.BINDINGS))),
}


@pytest.fixture(params=list(OPENERS))
def opened(request):
    pytest.importorskip(request.param.split(".")[0])
    return OPENERS[request.param](importlib.import_module(request.param))


def test_data_go_there_and_back(opened):
    """More than the ring of pinned memory holds, on both streams, changed by the host at once."""
    memory, rng = CudaMemory(opened), np.random.default_rng(0)
    with memory.activate():
        free = memory.free_memory()
        data = rng.integers(0, 256, 3 * RING_BYTES + 12345, np.uint8)
        wanted, a, b = data.copy(), memory.allocate(data.nbytes), memory.allocate(data.nbytes)
        assert a % 256 == b % 256 == 0 and memory.free_memory() < free
        memory.upload(a, data, COPY)
        data[:] = 0
        memory.record("there", COPY)
        memory.wait(COMPUTE, "there")
        memory.copy(b, a, data.nbytes)
        memory.clear(a, data.nbytes)
        assert np.array_equal(memory.download(b, data.nbytes), wanted)
        assert not memory.download(a, data.nbytes).any()
        memory.free(a)
        with pytest.raises(BackendError, match="the GPU cannot allocate"):
            memory.allocate(1 << 50)
    memory.close()


def test_a_graph_is_replayed(opened):
    device = CudaDevice(None, opened)
    with device.activate():
        a, b = device.allocate(1024), device.allocate(1024)
        device.clear(b, 1024)
        device.idle()
        device.begin_capture()
        device.copy(b, a, 1024)
        graph = device.end_capture()
        for value in (3, 5):
            assert not (device.download(b, 1024) == value).any(), "nothing ran yet"
            device.upload(a, np.full(1024, value, np.uint8), COMPUTE)
            device.replay(graph)
            assert (device.download(b, 1024) == value).all()
        device.idle()
        device.drop(graph)
    device.close()


def test_other_libraries_go_on_after_it_is_closed(opened):
    """The context is the primary one, which PyTorch uses too."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no GPU")
    before = torch.arange(1000, device="cuda")
    torch.cuda.synchronize()
    memory = CudaMemory(opened)
    with memory.activate():
        address = memory.allocate(1024)
        memory.clear(address, 1024)
        with torch.cuda.stream(torch.cuda.ExternalStream(memory.stream)):
            doubled = before * 2
        memory.idle()
    memory.close()
    assert int(doubled.sum()) == 999_000 and int((before + 1).sum()) == 500_500
