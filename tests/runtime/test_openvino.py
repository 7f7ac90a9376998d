"""What only the OpenVINO backend has: its precision, its cache, its weights in 8 bits, its decoder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind
from dydit.bundle.stored_weights import WEIGHTS
from dydit.diffusion.steps import State
from dydit.errors import BackendError
from dydit.runtime.backends import ov_cache, ov_graph, ov_session
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.ov_cache import ModelCache
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.images.pixels import ToPixels
from dydit.runtime.loop import StepRunner
from dydit.runtime.pipeline import DyDiTPipeline
from dydit.runtime.resident import ResidentSubnets
from tests.fixtures.packages import needs_openvino
from tests.runtime.test_session import imports_of

PACKAGE = Path(ov_session.__file__).parents[2]
OPTIONS = BackendOptions(threads=1)
SECOND = 10**9


def latents(path: Path) -> np.ndarray:
    with DyDiTPipeline.from_bundle(path, "openvino", threads=1) as pipe:
        return pipe([1, 2], seed=3, output_type="latent").latents


# Precision


def graphs_of(bundle: Bundle, precision: str):
    """The layers that must be fp32, those that have weights of routers, and what OpenVINO executes."""
    ov = ov_session.openvino_module()
    core, raw = ov.Core(), bundle.mapped_weights()
    model = ov_graph.read_graph(ov, core, bundle.file(bundle.manifest.subnets[0].file), lambda name: raw)
    routers = {
        reader.get_node().get_friendly_name().removesuffix("/WithoutBiases")  # with its bias, one layer
        for node in model.get_ops()
        if ".router." in node.get_friendly_name() and node.get_friendly_name().endswith("weight")
        for reader in node.output(0).get_target_inputs()
    }
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    return ov_graph.fp32_layers(model), routers, ov_graph.executed_layers(compiled)


@needs_openvino
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_routers_residual_stream_and_sampler_stay_fp32(make_bundle, precision):
    """By what the compiled model says of each node, on CPUs with bf16 and fp16 as on those without."""
    fp32, routers, executed = graphs_of(make_bundle(precision=precision), "dynamic")
    seen = set().union(*(layers for _, layers in executed))
    assert len(routers) == 6 and routers <= fp32 & seen, "the check sees the routers"
    assert "next_history" in fp32 & seen and len(fp32 & seen) > 0.7 * len(fp32), "and most other layers"
    assert ov_graph.lowered_layers(fp32, executed) == []


@needs_openvino
def test_the_precision_of_openvino_itself_would_lower_them(make_bundle):
    """So that the test above has something to find."""
    core = ov_session.openvino_module().Core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bf16: OpenVINO computes everything in fp32")
    fp32, routers, executed = graphs_of(make_bundle(), "bf16")
    assert set(ov_graph.lowered_layers(fp32, executed)) & routers


def test_a_lowered_layer_is_named():
    executed = [("f32", frozenset({"a"})), ("bf16", frozenset({"b", "product"})), ("i32", frozenset({"c"}))]
    assert ov_graph.lowered_layers({"a", "b", "c"}, executed) == ["b"]
    assert ov_graph.lowered_layers({"a", "c"}, executed) == []


# Weights in 8 bits


@needs_openvino
def test_int8_weights_are_near_fp32_and_images_do_not_depend_on_the_batch(make_bundle, relative):
    plan = {"plan": PlanKind.PER_STEP, "steps": 4}
    bundle, exact = make_bundle(precision="int8", **plan), make_bundle(**plan)
    with DyDiTPipeline.from_bundle(bundle.path, "openvino", threads=1) as pipe:
        together = pipe([1, 2, 3], seed=3, output_type="latent").latents
        alone = pipe(2, seed=3, image_indices=[1], output_type="latent").latents
    with DyDiTPipeline.from_bundle(exact.path, "openvino", threads=1) as pipe:
        wanted = pipe([1, 2, 3], seed=3, output_type="latent").latents
    assert relative(alone[0], together[1]) < 1e-4
    assert 1e-6 < relative(together, wanted) < 5e-2
    _, _, executed = graphs_of(bundle, "dynamic")
    assert sum(precision == "i8" for precision, _ in executed) >= 12, "OpenVINO keeps the weights in 8 bits"


# The cache


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty cache of its own."""
    monkeypatch.setenv(ov_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@needs_openvino
def test_a_bundle_is_compiled_once_and_a_damaged_cache_is_not_used(make_bundle, folder, monkeypatch):
    bundle, compiled, real = make_bundle(steps=3, max_subnets=1), [], ov_session.read_graph

    def read_graph(ov, core, file, *arguments):
        compiled.append(file.name)
        return real(ov, core, file, *arguments)

    monkeypatch.setattr(ov_session, "read_graph", read_graph)
    wanted = latents(bundle.path)
    assert sorted(compiled) == ["conditioning.onnx", "subnet-0000.onnx"] and len(list(folder.iterdir())) == 2
    assert np.array_equal(latents(bundle.path), wanted) and len(compiled) == 2
    for damage in (
        lambda data: data[: len(data) // 2],
        lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        lambda _: b"",
    ):
        compiled.clear()
        for path in folder.iterdir():
            path.write_bytes(damage(path.read_bytes()))
        assert np.array_equal(latents(bundle.path), wanted) and len(compiled) == 2
    for path in folder.iterdir():  # whole, by its own hash, and still no model
        path.write_bytes(hashlib.sha256(b"x").digest() + b"x")
    assert np.array_equal(latents(bundle.path), wanted) and len(compiled) == 4


@needs_openvino
def test_other_weights_have_other_models(make_bundle, make_checkpoint, folder):
    """Of equal graphs."""
    one, other = (make_bundle(make_checkpoint(seed=seed), steps=3, max_subnets=1) for seed in (0, 1))
    first, second = latents(one.path), latents(other.path)
    assert not np.array_equal(first, second)
    assert np.array_equal(latents(one.path), first) and np.array_equal(latents(other.path), second)


@needs_openvino
@pytest.mark.parametrize("what", ["off", "a file", "read-only"])
def test_without_a_cache_it_runs_all_the_same(make_bundle, tmp_path, monkeypatch, what):
    bundle, place = make_bundle(steps=3, max_subnets=1), tmp_path / "place"
    if what == "a file":
        place.write_text("mine")
    elif what == "read-only":
        if os.geteuid() == 0:
            place = Path("/proc/dydit")  # nobody can write there
        else:
            place.mkdir(mode=0o500)
    monkeypatch.setenv(ov_cache.VARIABLE, what if what == "off" else str(place))
    assert np.isfinite(latents(bundle.path)).all()
    assert not place.is_dir() or not list(place.iterdir())


def test_the_cache_returns_what_was_written_and_the_oldest_go_first(tmp_path):
    cache, models = ModelCache(tmp_path, limit=350), {name: name.encode() * 68 for name in "abc"}
    for place, (name, model) in enumerate(models.items()):
        cache.write(name, model)
        os.utime(tmp_path / f"{name}{ov_cache.ENDING}", ns=(place * SECOND, place * SECOND))
    assert {name: cache.read(name) for name in models} == models
    for place, name in enumerate("bca"):
        os.utime(tmp_path / f"{name}{ov_cache.ENDING}", ns=(place * SECOND, place * SECOND))
    cache.write("d", b"d" * 68)
    assert cache.read("b") is None and cache.read("a") and cache.read("c") and cache.read("d")
    cache.write("e", b"e" * 400)
    assert cache.read("e") is None and len(list(tmp_path.iterdir())) == 3


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv(ov_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ModelCache.of_user().folder == tmp_path / "dydit" / "openvino"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert ModelCache.of_user().folder == Path("~/.cache/dydit/openvino").expanduser()
    monkeypatch.setenv(ov_cache.VARIABLE, "off")
    assert ModelCache.of_user().folder is None


# The rest


@needs_openvino
def test_usage_is_not_reported(make_bundle, tmp_path):
    """In a fresh process, with a package in place of the one that reports."""
    (tmp_path / f"{ov_session.TELEMETRY}.py").write_text("print('reports')")
    script = f"""
from dydit.runtime.pipeline import DyDiTPipeline
DyDiTPipeline.from_bundle({str(make_bundle(steps=3, max_subnets=1).path)!r}, "openvino")([1], output_type="latent")
import openvino, openvino.tools.ovc
print("ran")
import {ov_session.TELEMETRY}
"""
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ran", "reports"], "the package is found, but not by openvino"


@needs_openvino
def test_the_decoder_is_that_of_onnxruntime(vae_bundle, relative):
    model = vae_bundle.manifest.model
    x = np.random.default_rng(0).standard_normal((2, model.in_channels, 8, 8)).astype(np.float32)
    ours, theirs = (ToPixels(open_backend(name, vae_bundle, OPTIONS))(x) for name in ("openvino", "onnxruntime"))
    assert ours.shape == (2, 3, 16, 16) and relative(ours, theirs) < 1e-4


@needs_openvino
def test_a_graph_that_does_not_load_is_one_line(make_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv(ov_cache.VARIABLE, "off")
    bundle = make_bundle()
    copy = shutil.copytree(bundle.path, tmp_path / "bundle")
    (copy / bundle.manifest.subnets[0].file).write_bytes(b"not a graph")
    with open(copy / WEIGHTS, "r+b") as file:
        file.truncate(4096)
    backend = open_backend("openvino", Bundle(copy, bundle.manifest), OPTIONS)
    for index, message in ((0, r"cannot load .*subnet-0000.onnx"), (1, r"subnet-0001.onnx: weight .* lies outside")):
        with pytest.raises(BackendError, match=message) as caught:
            backend.subnet(index)
        assert "\n" not in str(caught.value)


@needs_openvino
@pytest.mark.parametrize("device", ["gpu", "npu"])
def test_a_device_that_openvino_does_not_list(make_bundle, device):
    if ov_session.here(device):
        pytest.skip(f"this machine has a {device}")
    with pytest.raises(BackendError, match=f"OpenVINO lists no {device} on this machine, only cpu.*--device cpu"):
        open_backend("openvino", make_bundle(), BackendOptions(device=device))


@needs_openvino
def test_a_release_that_is_too_old_is_refused_in_one_line(monkeypatch):
    import openvino

    monkeypatch.setattr(openvino, "__version__", "2025.4.0-1-abc")
    with pytest.raises(BackendError, match=r"too old: bundles need 2026.4 or newer; pip install -U 'openvino>=2026.4'"):
        ov_session.openvino_module()


def test_every_import_of_openvino_goes_through_one_place():
    import ast

    found = {file.name for file in PACKAGE.rglob("*.py") if imports_of(ast.parse(file.read_text()), "openvino")}
    assert found == {"ov_session.py"}
    assert (
        f'"openvino>={ov_session.OLDEST[0]}.{ov_session.OLDEST[1]}"' in (PACKAGE.parent / "pyproject.toml").read_text()
    )


@needs_openvino
def test_threads_split_batches_and_results_stay(make_bundle, relative):
    """On one thread, and with a stream for each of two."""
    bundle, made = make_bundle(), []
    rng, labels = np.random.default_rng(5), np.array([1, 2, 3, 4, 5])
    model = bundle.manifest.model
    x, noise = rng.standard_normal((2, 5, model.in_channels, 8, 8)).astype(np.float32)
    for threads in (1, 2):
        backend = open_backend("openvino", bundle, BackendOptions(threads=threads))
        backend.expect(5)
        with backend, ResidentSubnets(backend) as subnets:
            made.append(StepRunner(backend, subnets, labels, 4.0).run(6, State(x), noise, labels).x_prev)
    assert relative(*made) < 1e-5
