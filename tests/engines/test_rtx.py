"""Engines that TensorRT for RTX really builds, without a GPU."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from dydit.bundle.bundle import Bundle
from dydit.bundle.io_spec import subnet_inputs
from dydit.bundle.manifest import FileEntry, Routing
from dydit.bundle.stored_weights import Precision
from dydit.bundle.vae_entry import VAE_DECODER
from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.engines.build_workers import run_jobs
from dydit.engines.builder import Job, build_engine
from dydit.engines.bundle_engines import BuildReport, BuiltEngine, build_engines
from dydit.engines.fingerprint import EngineRequest, make_request
from dydit.engines.flavour import Flavour, installed_version, load_flavour, present_gpu
from dydit.engines.kernels import plan_programs
from dydit.engines.profiles import symbol_ranges
from dydit.engines.store import EngineStore
from dydit.errors import BackendError, BundleError
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.files import sha256_of
from dydit.models.config import ModelConfig
from dydit.models.dit.config import DiTConfig
from dydit.models.uvit.config import preset
from dydit.quickstart.quickstart import ASSETS
from dydit.runtime.device.engine_runtime import Runtime
from dydit.runtime.device.operations import CONDITIONER

release = pytest.mark.release
MODELS = Path(__file__).parents[2] / "docs" / "models"
SHIPPED = sorted(path for folder in (ASSETS.parent, MODELS) for path in folder.rglob("*.safetensors"))
SMALL = {"max_subnets": 2, "capacities": None, "steps": 4}  # one form of each subnetwork: fewer engines


@pytest.fixture
def small(rtx: Any, capacity_bundle: Callable[..., Bundle], tmp_path: Path) -> Callable[..., Bundle]:
    """`small(precision="fp16")`: a bundle of two subnetworks to build in."""
    return lambda precision="fp16": copy_of(capacity_bundle(precision, **SMALL), tmp_path / precision)


@pytest.fixture(scope="session")
def built_once(rtx: Any, capacity_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same in fp16, with its engines. Shared: do not write."""
    bundle = copy_of(capacity_bundle("fp16", **SMALL), tmp_path_factory.mktemp("built") / "bundle")
    report = build(bundle, jobs=2)
    assert [each.graph for each in report.built] == ["conditioning.onnx", "subnet-0000.onnx", "subnet-0001.onnx"]
    check_built(bundle, report)
    return bundle


def copy_of(bundle: Bundle, path: Path) -> Bundle:
    shutil.copytree(bundle.path, path)
    return Bundle.open(path)


def check_built(bundle: Bundle, report: BuildReport) -> None:
    store = EngineStore.of(bundle, report.request)
    index = store.read()
    assert index is not None
    for each in report.built:
        engine = store.load(each.graph)
        assert len(engine) == each.bytes > 100_000
        settings = [program.settings for program in plan_programs(engine) if "tf32" in program.settings]
        assert len(settings) == len(index.engines[each.graph].key.profiles), "a program for each optimization profile"
        for setting in settings:  # products in fp32 are not rounded, and a step can be captured in a CUDA graph
            assert (setting["tf32"], setting["stream_capturable"]) == ("0", "1")
            assert setting["accelerators"] == oldest_target(bundle, each.graph)
    log = report.log.read_text()
    assert all(f"{each.file} from {each.graph}: built in" in log for each in report.built)
    assert log.count("its kernels inspected") == sum(each.graph != VAE_DECODER for each in report.built)
    assert f"{report.warnings} builder warnings are in" in report.text()[-1]
    assert report.peak_memory > 0


def oldest_target(bundle: Bundle, graph: str) -> str:
    """An engine for all targets is for the oldest that has its types, and runs on later ones."""
    return "sm89" if bundle.manifest.precision is Precision.FP8 and graph.startswith("subnet") else "sm80"


def check_kernels(bundle: Bundle, built: BuiltEngine) -> None:
    """What the builder chose: products in 8 or 16 bits where the manifest says so, and one kernel for attention."""
    manifest, kernels = bundle.manifest, built.kernels
    model, low = manifest.model, manifest.precision.attention.dtype
    if built.graph == VAE_DECODER:
        assert kernels is None, "types of decoders are not checked"
        return
    assert kernels is not None and set(kernels.products) <= {
        "float32",
        low,
        manifest.precision.weight_dtype,
        "elementwise",
    }
    subnet = next((each for each in manifest.subnets if built.graph in (each.file, each.full_file)), None)
    if subnet is None:
        assert (kernels.fused_attention, kernels.in_8_bits) == (0, 0)
        return
    layers = model.depth * len(model.units.layer_names)
    attention = model.depth * (1 if model.text is None else 2)  # over the tokens, and over the text
    assert kernels.fused_attention == (0 if manifest.precision is Precision.FP32 else attention)
    in_16_bits = sum(map(len, subnet.fp16_layers or ()))
    if manifest.precision.in_8_bits:
        assert (kernels.in_8_bits, kernels.not_in_8_bits) == (layers - in_16_bits, ())
        assert kernels.products.get(manifest.precision.weight_dtype, 0) == layers - in_16_bits
        assert kernels.products.get("float16", 0) == in_16_bits
    else:
        assert kernels.products[low] >= layers


def rtx_request(bundle: Bundle, **settings: Any) -> EngineRequest:
    flavour = Flavour.TENSORRT_RTX
    return make_request(bundle.manifest, flavour, installed_version(flavour), present_gpu(), **settings)


def build(bundle: Bundle, jobs: int = 1, **settings: Any) -> BuildReport:
    report = build_engines(bundle, rtx_request(bundle, **settings), jobs)
    for each in report.built:
        check_kernels(bundle, each)
    assert not any("8 bits" in line for line in report.text())
    return report


def test_every_subnetwork_of_a_digits_like_bundle_builds_in_fp16(built_once: Bundle) -> None:
    folder = EngineStore.of(built_once, rtx_request(built_once)).folder

    def engines() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.engine")}

    before = engines()
    again = build(built_once, jobs=2)
    assert (again.built, again.kept) == ((), 3)
    assert len(before) == 3 and engines() == before, "no engine is built or written a second time"


def test_an_engine_says_why_it_does_not_run_here(built_once: Bundle) -> None:
    """What `tensorrt_rtx` itself says of a whole engine where there is no GPU, in one line."""
    if present_gpu() is not None:
        pytest.skip("there is a GPU, on which the engine runs")
    store = EngineStore.of(built_once, rtx_request(built_once))
    runtime = Runtime(load_flavour(Flavour.TENSORRT_RTX), lambda engine: store.load("conditioning.onnx"))
    with pytest.raises(BackendError) as caught:
        runtime.load(CONDITIONER)
    assert f"tensorrt_rtx {installed_version(Flavour.TENSORRT_RTX)} cannot load conditioning: " in str(caught.value)
    assert "CUDA driver" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        pytest.param(path, each, marks=() if (path.stem, each) == ("dydit", Precision.BF16) else release)
        for path in SHIPPED
        for each in Precision
        if each is not Precision.INT8  # is for CPUs, and refused
    ],
    ids=lambda value: value.value if isinstance(value, Precision) else f"{value.parent.name}-{value.stem}",
)
def test_every_shipped_model_builds_in_every_precision(
    rtx, even_ranges, tmp_path: Path, model: Path, precision: Precision
) -> None:
    checkpoint = load_checkpoint(model)
    ranges = even_ranges(1, checkpoint.config.depth) if precision.is_calibrated else None
    settings: dict[str, Any] = {"routing": Routing.CAPACITY} if checkpoint.config.dynamic else {}
    config = ExportConfig(max_subnets=1, max_batch=4, precision=precision, activations=ranges, **settings)
    bundle = export(checkpoint, tmp_path / "bundle", config)
    report = build(bundle, jobs=2)
    assert {each.graph for each in report.built} == {name for name in bundle.manifest.files if name.endswith(".onnx")}
    check_built(bundle, report)
    again = build(Bundle.open(bundle.path))
    assert (again.built, again.kept) == ((), len(report.built))


@pytest.mark.parametrize("precision", ["int8-static", "fp8"])
def test_a_smoothed_bundle_builds(rtx, make_smoothing, digits_like, capacity_bundle, tmp_path, precision):
    """Of two subnetworks, gated; types on the way into products are what they are without."""
    smoothing = make_smoothing(digits_like)
    bundle = capacity_bundle(precision, **SMALL, smoothing=smoothing)
    assert smoothing.layers == 8 and bundle.manifest.smoothing == smoothing
    assert any(subnet.gated for subnet in bundle.manifest.subnets)
    report = build(copy_of(bundle, tmp_path / "copy"))
    assert [each.graph for each in report.built] == ["conditioning.onnx", "subnet-0000.onnx", "subnet-0001.onnx"]


def test_an_engine_has_a_profile_for_each_batch_that_it_is_tuned_for(rtx, capacity_bundle, tmp_path: Path) -> None:
    """Read from the engine itself: each further profile has its own inputs there. Loading it would need a GPU."""
    bundle = copy_of(capacity_bundle("fp16", **{**SMALL, "max_subnets": 1, "routing": "dense"}), tmp_path / "copy")
    several = build(bundle, opt_batches=(1, 2, 4))
    store = EngineStore.of(bundle, several.request)
    index = store.read()
    assert index is not None
    for graph, name in (("subnet-0000.onnx", "x"), ("conditioning.onnx", "labels")):
        entry, engine = index.engines[graph], store.load(graph)
        assert [profile[name].opt[0] for profile in entry.key.profiles] == ([1, 2, 4] if name == "x" else [2, 4, 8])
        found = {number: f"{name} [profile {number}]".encode() in engine for number in range(1, 4)}
        assert found == {1: True, 2: True, 3: False}
        assert entry.activation_bytes is not None


def test_dense_routing_builds(rtx, capacity_bundle, tmp_path: Path) -> None:
    bundle = capacity_bundle("fp16", **{**SMALL, "max_subnets": 1, "routing": "dense"})
    assert len(build(copy_of(bundle, tmp_path / "copy")).built) == 2


def test_a_changed_graph_alone_is_built_again(built_once: Bundle, tmp_path: Path) -> None:
    bundle = copy_of(built_once, tmp_path / "copy")
    path = bundle.path / "subnet-0001.onnx"
    model = onnx.load(path, load_external_data=False)
    model.doc_string = "another graph"
    onnx.save(model, path)
    entry = FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))
    manifest = bundle.manifest.model_copy(update={"files": {**bundle.manifest.files, path.name: entry}})
    (bundle.path / "manifest.json").write_text(manifest.to_json())
    after = build(Bundle.open(bundle.path))
    assert [(each.graph, each.reasons) for each in after.built] == [("subnet-0001.onnx", ("the graph changed",))]
    assert after.kept == 2


@pytest.mark.parametrize(
    ("precision", "depth"),
    [("fp16", 1), *(pytest.param(each, 2, marks=release) for each in ("fp16", "int8-static", "fp8"))],
)
def test_a_wide_model_builds(
    rtx, even_ranges, make_checkpoint, make_bundle, tmp_path: Path, precision: str, depth: int
) -> None:
    wide = DiTConfig(hidden_size=1152, depth=depth, num_heads=16, patch_size=2, input_size=32, num_classes=10)
    settings = {"routing": "capacity", "max_subnets": 1, "steps": 2, "max_batch": 8}
    if precision != "fp16":
        settings["activations"] = even_ranges(1, depth)
    bundle = make_bundle(make_checkpoint(wide), precision=precision, **settings)
    report = build(copy_of(bundle, tmp_path / "wide"), compute_capabilities=("8.9", "12.0"), opt_batches=[8])
    assert [each.graph for each in report.built] == ["conditioning.onnx", "subnet-0000.onnx"]
    assert report.built[1].bytes > bundle.manifest.subnets[0].weight_bytes, "a static subnetwork holds its weights"


def test_a_bundle_of_dynamic_width_builds_into_one_engine_for_every_width(
    rtx, capacity_bundle: Callable[..., Bundle], digits_like: ModelConfig, tmp_path: Path
) -> None:
    """And its form at full capacity; neither plan holds a block's weights."""
    bundle = copy_of(capacity_bundle("fp16", plan="sliding", steps=6), tmp_path / "copy")
    assert len(bundle.manifest.subnets) > 2
    report = build(bundle, jobs=2)
    assert [each.graph for each in report.built] == ["conditioning.onnx", "sliding.onnx", "sliding-full.onnx"]
    check_built(bundle, report)
    store, heads, rows = EngineStore.of(bundle, report.request), digits_like.num_heads, 3 * digits_like.head_dim
    index = store.read()
    assert index is not None
    profile = index.engines["sliding.onnx"].key.profiles[0]["blocks.1.qkv.weight"]
    assert (profile.min, profile.max) == ((rows, 64), (heads * rows, 64))
    stored = (bundle.path / "weights.bin").read_bytes()
    for graph in ("sliding.onnx", "sliding-full.onnx"):
        plan = store.load(graph)
        for name in ("blocks.0.fc1.weight", "blocks.1.qkv.weight", "embed.weight"):
            offset = bundle.manifest.weights[name].offset
            assert (stored[offset : offset + 64] in plan) == (name == "embed.weight"), name
    assert build(bundle).built == ()


@pytest.mark.parametrize(
    ("precision", "settings"),
    [
        ("fp16", {"capacities": (10, 16)}),
        ("fp16", {"plan": "sliding", "routing": "dense"}),
        ("int8-static", {}),
        *(pytest.param(each, {}, marks=release) for each in ("fp32", "bf16", "fp8")),
    ],
)
def test_a_model_that_texts_condition_builds(rtx, text_bundle, tmp_path: Path, precision: str, settings) -> None:
    bundle = copy_of(text_bundle(precision, **settings), tmp_path / "copy")
    report = build(bundle)
    assert [each.graph for each in report.built][:2] == ["conditioning.onnx", "text.onnx"]
    assert {each.graph for each in report.built} == {name for name in bundle.manifest.files if name.endswith(".onnx")}
    assert build(bundle).built == ()


def test_wrong_types_fail_the_build_before_it_and_are_logged(small) -> None:
    bundle = small("fp32")
    request = rtx_request(bundle).model_copy(update={"precision": Precision.FP16})
    with pytest.raises(BackendError) as caught:
        build_engines(bundle, request)
    message = str(caught.value)
    assert "conditioning.onnx has types that fp16 does not allow: layer " in message
    assert "the matrix product with adaln.weight takes float32, expected float16" in message
    folder = EngineStore.of(bundle, request).folder
    assert not list(folder.glob("*.engine"))
    assert "conditioning.engine from conditioning.onnx: failed" in (folder / "build.log").read_text()


def test_a_graph_that_is_not_as_described_fails_the_build(small, tmp_path: Path) -> None:
    bundle = small()
    manifest = bundle.manifest
    request = rtx_request(bundle)
    inputs = subnet_inputs(manifest.model, not manifest.subnets[0].gated)
    ranges = symbol_ranges(manifest, request.opt_batches, request.max_batch)
    engine = tmp_path / "x.engine"
    graph, log = bundle.path / "subnet-0000.onnx", tmp_path / "build.log"
    job = Job(graph=graph, engine=engine, request=request, model=manifest.model, inputs=inputs, ranges=ranges, log=log)
    with pytest.raises(BackendError, match=r"subnet-0000\.onnx: input 'gates' is .*; export the bundle again"):
        build_engine(job)
    assert not engine.exists()


BUILD = """
import sys, time
from dydit.bundle.bundle import Bundle
from dydit.engines.bundle_engines import build_engines
from dydit.engines.fingerprint import make_request
from dydit.engines.flavour import Flavour, installed_version

def told(done, total):
    print(done, total, flush=True)
    if done == 1:
        time.sleep(3600)  # the test kills this process here, while the other worker builds

if __name__ == "__main__":
    bundle, flavour = Bundle.open(sys.argv[1]), Flavour.TENSORRT_RTX
    build_engines(bundle, make_request(bundle.manifest, flavour, installed_version(flavour), None), 2, told)
"""


def test_killed_and_run_again_it_keeps_what_was_finished(small, tmp_path: Path) -> None:
    bundle = small()
    script = tmp_path / "build.py"
    script.write_text(BUILD)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, str(script), str(bundle.path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["0 3\n", "1 3\n"]
    children = _children(process.pid)
    assert children
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 600  # against a test that never ends
    while any(_alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(child) for child in children), "the building processes end with the one that started them"
    report = build(bundle)
    assert (report.kept, len(report.built)) == (1, 2)
    assert all(
        EngineStore.of(bundle, report.request).load(graph) for graph in ("conditioning.onnx", "subnet-0001.onnx")
    )


def _children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return found


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_building_process_that_dies_is_reported(small, tmp_path: Path) -> None:
    bundle = small()
    request = rtx_request(bundle)
    ranges = symbol_ranges(bundle.manifest, request.opt_batches, request.max_batch)

    def job(name: str) -> Job:
        model = bundle.manifest.model
        return Job(
            graph=bundle.path / name,
            engine=tmp_path / f"{name}.engine",
            request=request,
            model=model,
            inputs=subnet_inputs(model, bundle.manifest.subnets[0].gated),
            ranges=ranges,
            log=tmp_path / "build.log",
        )

    def kill_all(_: Job, __: Any) -> None:
        for child in _children(os.getpid()):
            if b"dydit.engines.build_workers" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(child, signal.SIGKILL)

    with pytest.raises(BackendError) as caught:
        run_jobs([job("subnet-0000.onnx"), job("subnet-0000.onnx")], 1, kill_all)
    assert str(caught.value) == (
        "cannot build subnet-0000.onnx: the process that builds engines was ended by SIGKILL, which can mean that "
        "memory ran out: it wrote nothing to standard error; finished engines are kept; run the same command again, "
        "with fewer --jobs if memory ran out"
    )


def test_a_built_engine_that_is_changed_is_refused(built_once: Bundle, tmp_path: Path) -> None:
    bundle = copy_of(built_once, tmp_path / "copy")
    store = EngineStore.of(bundle, rtx_request(bundle))
    path = store.folder / "subnet-0000.engine"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"was changed after it was built \(its SHA-256 differs\); remove it and run"):
        store.load("subnet-0000.onnx")


def test_the_decoder_of_a_latent_model_builds(rtx, vae_bundle: Bundle, tmp_path: Path) -> None:
    bundle = copy_of(vae_bundle, tmp_path / "bundle")
    report = build(bundle, jobs=2)
    assert [each.graph for each in report.built][-1] == "vae_decoder.onnx"
    assert report.built[-1].bytes > 100_000
    check_built(bundle, report)
    again = build(bundle)
    assert (again.built, again.kept) == ((), len(report.built))


@pytest.mark.parametrize(
    ("precision", "every"),
    [
        ("int8-static", 1),
        ("fp8", 2),
        ("int8-static", 3),
        *(pytest.param(*each, marks=release) for each in (("fp8", 1), ("int8-static", 2), ("fp8", 3))),
    ],
)
def test_a_bundle_whose_layers_are_in_8_and_in_16_bits_builds(
    rtx, mixed_bundle: Callable[..., Bundle], tmp_path: Path, precision: str, every: int
) -> None:
    """All of them in 16 bits, every second, every third: types are as asked for, on the network that was parsed."""
    bundle = copy_of(mixed_bundle(precision, every), tmp_path / "bundle")
    report = build(bundle, jobs=2)
    assert [each.graph for each in report.built] == ["conditioning.onnx", "subnet-0000.onnx", "subnet-0001.onnx"]
    check_built(bundle, report)


@pytest.mark.parametrize(
    ("settings", "graphs"),
    [
        (
            {"precision": "fp16", "max_subnets": 2, "capacities": (40, 65, 65)},
            ["subnet-0000", "subnet-0000-full", "subnet-0001", "subnet-0001-full"],
        ),
        ({"precision": "int8-static", "max_subnets": 1}, ["subnet-0000"]),
        ({"precision": "fp16", "plan": "sliding"}, ["sliding"]),
    ],
    ids=["fp16", "int8-static", "dynamic-width"],
)
def test_a_u_vit_builds(rtx, make_bundle, make_checkpoint, even_ranges, tmp_path: Path, settings, graphs) -> None:
    """Its long skips read the residual stream in the lower type; its convolution and its end stay fp32."""
    model = preset("cifar10-S/2", hidden_size=64, depth=3, num_heads=4, input_size=16)
    ranges = {"activations": even_ranges(1, 3)} if settings["precision"] == "int8-static" else {}
    shared = {"steps": 4, "max_batch": 4, "routing": "capacity"}
    bundle = copy_of(make_bundle(make_checkpoint(model), **shared, **settings, **ranges), tmp_path / "copy")
    report = build(bundle, jobs=2)
    assert [each.graph for each in report.built] == ["conditioning.onnx", *(f"{name}.onnx" for name in graphs)]
    assert build(bundle).built == ()


@release
def test_what_a_gpu_is_needed_to_build(rtx: Any) -> None:
    """Plans whose weights can be replaced or are left out, as docs/hardware.md says; streamed weights are built."""
    if present_gpu() is not None:
        pytest.skip("there is a GPU")

    def size(*flags: Any) -> int | None:
        builder = rtx.Builder(rtx.Logger(rtx.Logger.INTERNAL_ERROR))
        network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        values, plain = np.ones((64, 64), np.float16), rtx.MatrixOperation.NONE
        weight = network.add_constant((64, 64), values).get_output(0)
        product = network.add_matrix_multiply(network.add_input("x", rtx.float16, (8, 64)), plain, weight, plain)
        network.mark_output(product.get_output(0))
        config = builder.create_builder_config()
        for flag in flags:
            config.set_flag(flag)
        plan = builder.build_serialized_network(network, config)
        return None if plan is None else plan.nbytes

    flags = rtx.BuilderFlag
    assert size() is not None and size(flags.WEIGHT_STREAMING) == size()
    assert [size(each) for each in (flags.REFIT, flags.REFIT_IDENTICAL, flags.STRIP_PLAN)] == [None] * 3
