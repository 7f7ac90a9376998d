"""Which package the driver comes from, and that each of them is called so that a run is right: by modules of the same
functions on the simulated driver, and by the names of the real ones where they are installed."""

from __future__ import annotations

import inspect
import re
import sys

import numpy as np
import pytest

from dydit.bundle.manifest import Routing
from dydit.errors import BackendError
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.device import driver
from dydit.runtime.device.backend import DeviceBackend
from dydit.runtime.device.driver_bindings import BindingsDriver, Graphs
from dydit.runtime.device.driver_pycuda import PyCudaDriver
from dydit.runtime.loop import MemoryStore
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import make_batches
from tests.fixtures.driver_modules import NOT_SUPPORTED, Bindings, PyCuda
from tests.fixtures.fake_driver import FakeDriver

BATCHES, NOISE = make_batches([3, 1, 3], [0, 1, 2], 2), SeededNoise(5, (4, 8, 8))
PACKAGES = {
    "cuda-bindings": lambda fake: BindingsDriver(Bindings(fake)),
    "pycuda": lambda fake: PyCudaDriver(PyCuda(fake), Graphs(Bindings(fake))),
    "pycuda alone": lambda fake: PyCudaDriver(PyCuda(fake)),
    "graphs not supported": lambda fake: BindingsDriver(Bindings(fake, {"cuStreamBeginCapture": NOT_SUPPORTED})),
}


@pytest.fixture
def sample(make_bundle, fake_device):
    """`sample(through)`: the latents of a run with graphs, and its device; the backend is closed."""

    class Backend(DeviceBackend):
        name = "fake"

    def run(through):
        devices, bundle = [], make_bundle(routing=Routing.DENSE)

        def make():
            devices.append(fake_device(bundle, through=through))
            return devices[-1]

        backend, store = Backend(bundle, BackendOptions(), make), MemoryStore()
        backend.sample_run(BATCHES, NOISE, store, 4.0)
        backend.close()
        return np.concatenate([store.load(b).x for b in range(len(BATCHES))]), devices[0]

    return run


@pytest.mark.parametrize("package", ["cuda-bindings", "pycuda"])
def test_a_run_is_the_same_by_every_package(package, sample):
    latents, device = sample(PACKAGES[package])
    wanted, _ = sample(lambda fake: fake)
    assert np.array_equal(latents, wanted)
    assert device.driver.replays
    device.driver.close()  # which refuses what was not freed


def test_pycuda_keeps_one_primary_context():
    module = PyCuda(FakeDriver())
    for _ in range(3):
        PyCudaDriver(module).close()
    assert module.retained == 1


def test_the_bindings_release_the_primary_context():
    module = Bindings(FakeDriver())
    first, second = BindingsDriver(module), BindingsDriver(module)
    assert module.retained == 2
    first.close()
    second.close()
    assert module.retained == 0


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        ("pycuda alone", "PyCUDA has none; pip install cuda-bindings"),
        ("graphs not supported", r"cuStreamBeginCapture failed \(801, operation not supported\)"),
    ],
)
def test_without_graphs_it_goes_on(package, reason, sample):
    with pytest.warns(UserWarning, match=f"CUDA graphs do not work here: {reason}; continuing without CUDA graphs"):
        latents, device = sample(PACKAGES[package])
    wanted, _ = sample(lambda fake: fake)
    assert np.array_equal(latents, wanted) and not device.driver.replays


@pytest.mark.parametrize("package", ["cuda-bindings", "pycuda"])
def test_errors_are_one_line(package):
    fake = FakeDriver(limit=1000)
    opened = PACKAGES[package](fake)
    opened.push()
    with pytest.raises(BackendError, match=r"out of (device )?memory") as caught:
        opened.allocate(2000)
    assert "\n" not in str(caught.value)
    assert opened.free_memory() == fake.free_bytes
    opened.pop()


def test_a_graph_that_cannot_be_made_is_not_left_behind():
    module = Bindings(FakeDriver(), {"cuGraphInstantiate": NOT_SUPPORTED})
    module.driver.push()
    stream, graphs = module.driver.make_stream(), Graphs(module)
    graphs.begin(stream)
    with pytest.raises(BackendError, match="cuGraphInstantiate failed"):
        graphs.end(stream)
    assert not module._captured


def test_without_a_driver_or_a_gpu_the_bindings_say_so():
    with pytest.raises(BackendError, match=r"^the NVIDIA driver does not start: cuInit failed \(100, unknown\)$"):
        BindingsDriver(Bindings(FakeDriver(), {"cuInit": 100}))

    class Missing(Bindings):
        def cuInit(self, Flags):
            raise RuntimeError('"cuda" is an NVIDIA driver library\nand can only be found via system search')

    with pytest.raises(BackendError, match=r"^no NVIDIA driver \(libcuda\) on this machine; use backend=") as caught:
        BindingsDriver(Missing(FakeDriver()))
    assert "\n" not in str(caught.value)


def test_pycuda_takes_sizes_of_32_bits():
    seen = []

    class Noting(PyCuda):
        def memset_d8_async(self, dest, data, size, stream):
            self._require_32_bits(size)
            seen.append((dest, size))

        def memcpy_dtod_async(self, dest, src, size, stream):
            self._require_32_bits(size)
            seen.append((dest, src, size))

    opened = PyCudaDriver(Noting(FakeDriver()))
    opened.push()
    stream, size = opened.make_stream(), (5 << 30) + 7
    opened.clear(1000, size, stream)
    assert seen[0] == (1000, 1 << 30) and sum(size for _, size in seen) == size and seen[-1] == (1000 + (5 << 30), 7)
    seen.clear()
    opened.copy(1000, 99, size, stream)
    assert sum(size for *_, size in seen) == size and seen[-1] == (1000 + (5 << 30), 99 + (5 << 30), 7)


@pytest.fixture
def installed(monkeypatch):
    """`installed(*packages)`: those that can be imported here."""

    def install(*packages):
        fake = FakeDriver()
        modules = {driver.PYCUDA: ("pycuda", PyCuda(fake)), driver.BINDINGS: ("cuda-bindings", Bindings(fake))}
        for name, (package, module) in modules.items():
            monkeypatch.setitem(sys.modules, name, module if package in packages else None)
            monkeypatch.setitem(sys.modules, name.split(".")[0], None)

    return install


def test_pycuda_is_used_where_it_is_installed(installed):
    installed("pycuda", "cuda-bindings")
    opened = driver.open_driver()
    assert isinstance(opened, PyCudaDriver) and opened._graphs is not None
    version = r"( [\d.]+)?"  # of whatever is installed here
    assert re.fullmatch(f"pycuda{version}, graphs by cuda-bindings{version}", driver.require_driver())
    installed("pycuda")
    opened = driver.open_driver()
    assert isinstance(opened, PyCudaDriver) and opened._graphs is None
    assert re.fullmatch(f"pycuda{version}, no CUDA graphs without cuda-bindings", driver.require_driver())
    installed("cuda-bindings")
    assert isinstance(driver.open_driver(), BindingsDriver)
    assert re.fullmatch(f"cuda-bindings{version}", driver.require_driver())


def test_without_a_package_all_that_is_missing_is_said(installed):
    installed()
    with pytest.raises(BackendError) as caught:
        driver.open_driver()
    said = str(caught.value)
    assert re.match(r"pycuda cannot be imported \(.*\) and cuda-bindings cannot be imported \(.*\); pip install", said)
    assert "\n" not in said and not driver.is_installed()


def test_the_functions_of_the_bindings_are_those_of_the_package():
    """By name and by parameters, which stand in their docstrings. No GPU is needed for that."""
    real = pytest.importorskip("cuda.bindings.driver")
    for name, function in inspect.getmembers(Bindings, inspect.isfunction):
        if name.startswith("cu"):
            text = getattr(real, name).__doc__.strip().splitlines()[0]
            parameters = re.findall(r"(\w+)(?:: \w+)?(?=[,)])", text)
            assert parameters == [each for each in inspect.signature(function).parameters if each != "self"], text
    assert int(real.CUstream_flags.CU_STREAM_NON_BLOCKING) == 1
    assert int(real.CUevent_flags.CU_EVENT_DISABLE_TIMING) == 2
    assert int(real.CUresult.CUDA_ERROR_NOT_READY) == 600
    assert real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL == 1
    with pytest.raises(BackendError, match="driver"):
        BindingsDriver(real).make_stream()  # fails without a driver, and with one for want of a current context
