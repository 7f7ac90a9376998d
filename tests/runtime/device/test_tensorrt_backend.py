"""What the TensorRT backend needs is asked for in order, each refusal in one line that says what to do."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import CONDITIONING, PlanKind, Routing
from dydit.bundle.texts import synthetic_texts
from dydit.engines.fingerprint import EngineKey, make_request
from dydit.engines.flavour import Flavour, Gpu
from dydit.engines.store import EngineEntry, EngineStore, weights_of
from dydit.errors import BackendError, BundleError
from dydit.models.pixart.config import PixArtConfig
from dydit.runtime.backends import tensorrt as backend
from dydit.runtime.backends.registry import backend_status, open_backend
from dydit.runtime.device.driver import require_driver
from dydit.runtime.device.launches import EngineMemory
from dydit.runtime.device.operations import CONDITIONER, DECODER, EngineId
from dydit.runtime.device.residency import engines_of, graph_of
from dydit.runtime.images.pixels import ToPixels
from dydit.runtime.loop import MemoryStore, StepRunner, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import make_batches
from dydit.runtime.resident import ResidentSubnets

ADA, HOPPER = Gpu("NVIDIA L4", "8.9"), Gpu("NVIDIA H200", "9.0")
VERSION = "1.7.1"


@pytest.fixture
def machine(monkeypatch):
    """`machine(flavours, gpu, version)`: what is installed here, as the backend sees it."""

    def install(flavours=(Flavour.TENSORRT_RTX,), gpu=ADA, version=VERSION):
        monkeypatch.setattr(backend, "is_installed", lambda flavour: flavour in flavours)
        monkeypatch.setattr(backend, "load_flavour", lambda flavour: SimpleNamespace(__version__=version))
        monkeypatch.setattr(backend, "present_gpu", lambda: gpu)
        monkeypatch.setattr(backend, "require_driver", lambda: None)

    return install


@pytest.fixture
def bundle(make_bundle, tmp_path, request) -> Bundle:
    """A bundle of its own, to build in; of merged subnetworks unless a test asks for another plan."""
    copy, plan = tmp_path / "bundle", getattr(request, "param", PlanKind.MAX_SUBNETS)
    shutil.copytree(make_bundle(plan=plan, routing=Routing.CAPACITY, capacities=(12, 14, 14)).path, copy)
    return Bundle.open(copy)


def build(bundle: Bundle, activation_bytes: int | None = None, **settings) -> EngineStore:
    """An index of engines whose files say which graph they stand for."""
    import hashlib

    request = make_request(bundle.manifest, Flavour.TENSORRT_RTX, VERSION, None, **settings)
    store = EngineStore.of(bundle, request)
    store.folder.mkdir(parents=True)
    entries = {}
    decoder = () if bundle.manifest.vae is None else (DECODER,)
    for engine in (*engines_of(bundle.manifest), *decoder):
        graph = graph_of(bundle.manifest, engine)
        data, name = f"engine of {graph}".encode(), graph.replace(".onnx", ".engine")
        (store.folder / name).write_bytes(data)
        files = bundle.manifest.files
        key = EngineKey(
            graph_sha256=files[graph].sha256,
            weights_sha256=files[weights_of(bundle.manifest, graph)].sha256,
            profiles=(),
        )
        entries[graph] = EngineEntry(
            file=name,
            key=key,
            fingerprint=key.fingerprint(request),
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
            modified_ns=0,
            seconds=1.0,
            peak_memory=1,
            layers=1,
            warnings=0,
            activation_bytes=activation_bytes,
        )
    store.write(request, entries)
    return store


def refusal(bundle: Bundle, name: str = "tensorrt", kind: type[Exception] = BackendError) -> str:
    with pytest.raises(kind) as caught:
        open_backend(name, bundle)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_tensorrt(bundle, monkeypatch):
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("dydit.engines.flavour.is_installed", lambda flavour: False)
    monkeypatch.setattr(backend, "is_installed", lambda flavour: False)
    assert "TensorRT is not installed: pip install 'dydit[tensorrt-rtx]'" in refusal(bundle)
    assert "tensorrt_rtx is not installed: pip install 'dydit[tensorrt-rtx]'" in refusal(
        bundle, "tensorrt-rtx"
    ).replace("cannot be imported (import of tensorrt_rtx halted; None in sys.modules)", "is not installed")
    status = {name: (works, detail) for name, works, detail in backend_status()}
    assert status["tensorrt"][0] is False and "pip install" in status["tensorrt"][1]


def test_without_a_gpu(bundle, machine):
    machine(gpu=None)
    wanted = "TensorRT engines need an NVIDIA GPU, but no driver or GPU was found here; use backend='onnxruntime' "
    wanted += "(--backend onnxruntime)"
    assert refusal(bundle) == refusal(bundle, "tensorrt-rtx") == wanted
    assert dict((n, d) for n, _, d in backend_status())["tensorrt"] == wanted


def test_without_a_driver_layer(bundle, machine, monkeypatch):
    machine()
    monkeypatch.setattr(backend, "require_driver", require_driver)
    for module in ("pycuda", "pycuda.driver", "cuda", "cuda.bindings.driver"):
        monkeypatch.setitem(sys.modules, module, None)
    assert refusal(bundle).startswith("pycuda cannot be imported (")
    assert refusal(bundle).endswith("pip install 'dydit[gpu]', or only cuda-bindings, which needs no compiler")


def test_without_engines(bundle, machine):
    machine()
    command = f"run `dydit build {bundle.path} --flavour tensorrt-rtx`"
    assert refusal(bundle, kind=BundleError) == f"{bundle.path} has no tensorrt-rtx engines; {command}"
    machine(flavours=tuple(Flavour))
    assert "has no tensorrt engines; run `dydit build" in refusal(bundle, kind=BundleError)


def test_engines_of_another_machine_are_refused(bundle, machine):
    build(bundle, compute_capabilities=("8.6",))
    machine(gpu=ADA)
    said = refusal(bundle, kind=BundleError)
    assert "was built for compute capability 8.6, but the GPU here is NVIDIA L4 (compute capability 8.9)" in said
    assert said.endswith(f"run `dydit build {bundle.path} --flavour tensorrt-rtx`")
    machine(gpu=Gpu("NVIDIA RTX A6000", "8.6"), version="1.8.0")
    assert "was built by tensorrt-rtx 1.7.1, but 1.8.0 is installed" in refusal(bundle, kind=BundleError)


def test_the_flavour_that_has_engines_is_taken(bundle, machine):
    store = build(bundle)
    machine(flavours=tuple(Flavour))
    trt, found = backend.open_engines(bundle, None)
    assert trt.__version__ == VERSION and found.folder == store.folder
    with pytest.raises(BundleError, match="has no tensorrt engines"):
        backend.open_engines(bundle, Flavour.TENSORRT)
    assert backend.describe(Flavour.TENSORRT_RTX) == f"tensorrt-rtx {VERSION} on NVIDIA L4 (compute capability 8.9)"


@pytest.fixture
def opened(bundle, open_on):
    """`opened()`: the backend on a device of NumPy arrays, and what it read and compiled."""
    return open_on(bundle)


@pytest.fixture
def open_on(machine, monkeypatch, fake_device):
    """`open_on(bundle)`: the same of a bundle, whose engines are built first."""

    def of(bundle, **settings):
        machine()
        return opener(bundle, monkeypatch, fake_device, **settings)

    return of


def opener(bundle, monkeypatch, fake_device, **settings):
    store = build(bundle, **settings)
    facts = SimpleNamespace(store=store, read=[], devices=[], compiled=b"kernels")

    class Compiler:
        def __init__(self, trt, read, cache):
            self.read, self.cache, self.contexts = read, cache, 0
            facts.cache = cache

        def compiled(self):
            return facts.compiled if facts.compiled != self.cache else None

    def device(runtime):
        made = fake_device(bundle)
        load, launch = made.load, made.launch

        def loading(engine):
            facts.read.append(runtime.read(engine).decode())
            load(engine)

        def launching(*arguments):
            runtime.contexts += 1
            launch(*arguments)

        made.load, made.launch = loading, launching
        facts.devices.append(made)
        return made

    monkeypatch.setattr(backend, "Runtime", Compiler)
    monkeypatch.setattr(backend, "CudaDevice", device)

    def make():
        facts.read.clear()
        facts.backend = open_backend("tensorrt", bundle)
        return facts

    return make


@pytest.fixture
def texts_bundle(make_bundle, make_checkpoint, tmp_path) -> Bundle:
    """A bundle of its own of a model that texts condition, with four texts and a negative one."""
    model = PixArtConfig(hidden_size=64, depth=2, num_heads=4, input_size=8, caption_channels=24, text_tokens=6)
    exported = make_bundle(make_checkpoint(model), routing=Routing.CAPACITY, steps=6, max_subnets=2)
    shutil.copytree(exported.path, tmp_path / "texts")
    return Bundle.open(tmp_path / "texts").with_texts(synthetic_texts(model, 4))


def test_texts_go_through_whole_runs(texts_bundle, open_on):
    check_whole_runs(texts_bundle, open_on(texts_bundle)())


@pytest.mark.parametrize("bundle", [PlanKind.MAX_SUBNETS, PlanKind.DYNAMIC_WIDTH], indirect=True)
def test_sampling_goes_through_whole_runs(bundle, opened):
    facts = opened()
    check_whole_runs(bundle, facts)
    (device,) = facts.devices
    assert any(engine.full for engine in device.engines) == bundle.manifest.dynamic_width


def check_whole_runs(bundle, facts):
    """A run is that of ONNX Runtime, and has read every engine."""
    batches = make_batches([1, 2, 3], [0, 1, 2], 3)
    model = bundle.manifest.model
    noise = SeededNoise(0, (model.in_channels, model.input_size, model.input_size))
    results = []
    for name in ("tensorrt", "onnxruntime"):
        engine = facts.backend if name == "tensorrt" else open_backend(name, bundle)
        store = MemoryStore()
        with ResidentSubnets(engine) as subnets:
            stats = sample(StepRunner(engine, subnets, [1, 2, 3], 4.0), batches, noise, store)
        results.append((store.load(0).x, stats.steps))
    assert results[0][1] == results[1][1]
    assert np.linalg.norm(results[0][0] - results[1][0]) < 1e-5 * np.linalg.norm(results[1][0])
    (device,) = facts.devices
    assert device.driver.replays
    assert set(facts.read) == {f"engine of {graph_of(bundle.manifest, e)}" for e in engines_of(bundle.manifest)}


def test_what_a_run_finds_out_is_kept_for_the_next_process(bundle, opened):
    facts = opened()
    noise, batches = SeededNoise(0, (4, 8, 8)), make_batches([1], [0], 1)
    facts.backend.sample_run(batches, noise, MemoryStore(), 1.0)
    assert facts.cache is None and facts.store.read_runtime_cache() == b"kernels"
    file = facts.store.folder / backend.FIGURES
    figures = json.loads(file.read_text())
    assert len(figures) == len(engines_of(bundle.manifest))
    facts = opened()
    facts.backend.sample_run(batches, noise, MemoryStore(), 1.0)
    assert facts.cache == b"kernels"
    assert facts.read[:2] == [f"engine of {CONDITIONING}", "engine of subnet-0000.onnx"], "nothing is measured again"
    known = backend._known(bundle, facts.store)
    assert known[CONDITIONER] == known[EngineId(0, True)] == EngineMemory(1000, 10_000)
    for damage in ("", "[1]", '{"a": 1}', '{"a": [1]}', '{"a": ["x", 1]}'):
        file.write_text(damage)
        assert backend._known(bundle, facts.store) == {}


def test_what_the_builder_reported_is_not_measured(bundle, open_on):
    facts = open_on(bundle, activation_bytes=1000)()
    sizes = {each.sha256: each.bytes for each in facts.store.read().engines.values()}
    known = backend._known(bundle, facts.store)
    assert {each.activation for each in known.values()} == {1000} and known.keys() == set(engines_of(bundle.manifest))
    facts.backend.sample_run(make_batches([1], [0], 1), SeededNoise(0, (4, 8, 8)), MemoryStore(), 1.0)
    assert facts.read[:2] == [f"engine of {CONDITIONING}", "engine of subnet-0000.onnx"]
    assert len(facts.read) == len(set(facts.read)), "no engine is loaded twice"
    assert not (facts.store.folder / backend.FIGURES).exists()
    hashes = list(sizes)
    (facts.store.folder / backend.FIGURES).write_text(json.dumps({hashes[0]: [2000, 5]}))
    measured = [each for each in backend._known(bundle, facts.store).values() if each == EngineMemory(2000, 5)]
    assert len(measured) == 1, "what was measured counts more"


def test_a_changed_engine_is_refused(bundle, opened):
    facts = opened()
    path = facts.store.folder / "subnet-0000.engine"
    path.write_bytes(path.read_bytes().replace(b"e", b"f"))
    with pytest.raises(BundleError, match=r"subnet-0000.engine was changed after it was built"):
        facts.backend.subnet(0)


def test_the_decoders_engine_makes_the_pictures(vae_bundle, open_on, tmp_path, monkeypatch):
    """Where it was built; else ONNX Runtime makes the same ones."""
    shutil.copytree(vae_bundle.path, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    facts = open_on(bundle)()
    latents = np.random.default_rng(0).standard_normal((5, 4, 8, 8)).astype(np.float32)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        to_pixels = ToPixels(facts.backend)
    pixels = to_pixels(latents)
    assert facts.read == ["engine of vae_decoder.onnx"] and facts.store.read_runtime_cache() == b"kernels"
    index = facts.store.read()
    engines = {name: entry for name, entry in index.engines.items() if name != "vae_decoder.onnx"}
    facts.store.write(index.request, engines)
    assert facts.backend.tile_decoder() is None
    without = ToPixels(facts.backend)(latents)
    assert pixels.shape == (5, 3, 16, 16) and np.linalg.norm(pixels - without) < 1e-5 * np.linalg.norm(without)


def test_a_decoder_of_another_bundle_is_refused(vae_bundle, open_on, tmp_path):
    shutil.copytree(vae_bundle.path, tmp_path / "bundle")
    facts = open_on(Bundle.open(tmp_path / "bundle"))()
    index = facts.store.read()
    entry = index.engines["vae_decoder.onnx"]
    key = entry.key.model_copy(update={"weights_sha256": "0" * 64})
    facts.store.write(index.request, {**index.engines, "vae_decoder.onnx": entry.model_copy(update={"key": key})})
    with pytest.raises(BundleError, match=r"vae_decoder\.engine was built with another bundle's weights; run"):
        facts.backend.decode(np.zeros((1, 4, 8, 8), np.float32))


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_bundle_that_cannot_be_written_to_runs(bundle, opened, monkeypatch, code):
    """What would make the next process faster is not kept, with a warning."""
    facts = opened()
    before = sorted(path.name for path in facts.store.folder.iterdir())

    def refuse(path, mode="r", *more, **settings):
        if mode in ("xb", "wb", "w", "ab") and str(path).startswith(str(bundle.path)):
            raise OSError(code, os.strerror(code), str(path))
        return opening(path, mode, *more, **settings)

    opening = builtins.open
    monkeypatch.setattr(builtins, "open", refuse)
    store = MemoryStore()
    with pytest.warns(UserWarning) as caught:
        facts.backend.sample_run(make_batches([1], [0], 1), SeededNoise(0, (4, 8, 8)), store, 1.0)
    said = [str(each.message).partition(":")[0] for each in caught]
    assert said == [f"{name} cannot be saved for the next process" for name in ("memory.json", "runtime.cache")]
    assert np.isfinite(store.load(0).x).all()
    assert sorted(path.name for path in facts.store.folder.iterdir()) == before


def test_compiled_kernels_are_saved_in_the_context_of_the_gpu(bundle, opened, monkeypatch):
    """TensorRT for RTX compares a cache with the context that is current."""
    facts = opened()
    saved = []

    def compiled(self):
        saved.append(facts.devices[0].active)
        return b"kernels"

    monkeypatch.setattr(backend.Runtime, "compiled", compiled)
    facts.backend._sampler  # noqa: B018 - makes the device
    (device,) = facts.devices
    activate = device.activate
    device.active = 0

    @contextmanager
    def counted():
        device.active += 1
        with activate():
            yield
        device.active -= 1

    monkeypatch.setattr(device, "activate", counted)
    facts.backend.sample_run(make_batches([1], [0], 1), SeededNoise(0, (4, 8, 8)), MemoryStore(), 1.0)
    assert saved == [1] and facts.store.read_runtime_cache() == b"kernels"


@pytest.mark.parametrize("error", [RuntimeError("no context"), BackendError("the GPU cannot be used: gone")])
def test_kernels_that_cannot_be_saved_fail_no_run(bundle, opened, monkeypatch, error):
    facts = opened()

    def compiled(self):
        raise error

    monkeypatch.setattr(backend.Runtime, "compiled", compiled)
    store = MemoryStore()
    with pytest.warns(UserWarning, match=f"compiled kernels cannot be saved for the next process: {error}"):
        facts.backend.sample_run(make_batches([1], [0], 1), SeededNoise(0, (4, 8, 8)), store, 1.0)
    assert np.isfinite(store.load(0).x).all()


def test_a_gpu_for_which_there_are_no_engines_is_named_with_the_alternatives(bundle, machine):
    build(bundle)
    machine(gpu=HOPPER)
    text = refusal(bundle)
    assert "engines run on compute capability 8.0, 8.6, 8.9, 12.0 and 12.1, but not on the NVIDIA H200" in text
    assert "pip install 'dydit[tensorrt]'" in text and "--backend onnxruntime --device cuda" in text
    with pytest.raises(BackendError, match="but not on the NVIDIA H200"):
        backend.describe()
