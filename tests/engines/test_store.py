from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dydit.bundle.bundle import Bundle
from dydit.engines.bundle_engines import build_engines
from dydit.engines.fingerprint import RECIPE, EngineRequest, HardwareCompatibility
from dydit.engines.flavour import Flavour, Gpu
from dydit.engines.store import EngineStore, build_command, open_store, unfit_reason
from dydit.errors import BackendError, BundleError

ADA, HOPPER, TURING = Gpu("NVIDIA L4", "8.9"), Gpu("NVIDIA H200", "9.0"), Gpu("NVIDIA T4", "7.5")
GRAPH = "subnet-0000.onnx"
VERSION = "1.7.1"


@pytest.fixture
def built(bundle: Bundle, request_for: Callable[..., EngineRequest], pretence) -> EngineStore:
    request = request_for(bundle)
    build_engines(bundle, request)
    return EngineStore.of(bundle, request)


def refusal(store: EngineStore, graph: str = GRAPH) -> str:
    with pytest.raises(BundleError) as caught:
        store.load(graph)
    return str(caught.value)


def test_an_engine_comes_back_as_it_was_built(built: EngineStore) -> None:
    assert built.load(GRAPH) == f"engine of {GRAPH} for {built.folder.name}".encode()


def test_a_bundle_with_engines_is_still_whole(built: EngineStore) -> None:
    assert Bundle.open(built.bundle.path).manifest == built.bundle.manifest


def test_a_changed_engine_is_refused(built: EngineStore) -> None:
    path = built.folder / "subnet-0000.engine"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    assert refusal(built) == (
        f"{path} was changed after it was built (its SHA-256 differs); remove it and run `dydit build "
        f"{built.bundle.path} --flavour tensorrt-rtx`"
    )


def test_a_missing_engine_is_refused(built: EngineStore) -> None:
    (built.folder / "subnet-0000.engine").unlink()
    assert refusal(built) == (
        f"{built.folder / 'subnet-0000.engine'} is missing; run `dydit build {built.bundle.path} --flavour "
        "tensorrt-rtx`"
    )


def test_a_graph_that_was_not_built_is_refused(built: EngineStore) -> None:
    assert f"has no engine for subnet-9999.onnx; run `dydit build {built.bundle.path}" in refusal(
        built, "subnet-9999.onnx"
    )


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (GRAPH, "subnet-0000.engine was built from another bundle's subnet-0000.onnx; run `dydit build"),
        ("weights.bin", "subnet-0000.engine was built with another bundle's weights; run `dydit build"),
    ],
)
def test_an_engine_of_another_bundle_is_refused(built: EngineStore, file: str, message: str) -> None:
    manifest = built.bundle.manifest
    entry = manifest.files[file].model_copy(update={"sha256": "0" * 64})
    other = manifest.model_copy(update={"files": {**manifest.files, file: entry}})
    assert message in refusal(EngineStore(Bundle(built.bundle.path, other), built.folder))


def edit(store: EngineStore, change: Callable[[dict], None], sign: bool = True) -> None:
    """Change the index as somebody might who means harm; `sign`: and mend its digest."""
    index = store.read()
    assert index is not None
    values = json.loads(index.to_json())
    change(values)
    if sign:
        values["digest"] = type(index).model_validate(values).compute_digest()
    (store.folder / "engines.json").write_text(json.dumps(values))


@pytest.mark.parametrize("name", ["../../../elsewhere.engine", "/tmp/elsewhere.engine", "engines.json", ".engine"])
def test_an_engine_is_loaded_from_the_bundles_own_folder_only(built: EngineStore, name: str) -> None:
    edit(built, lambda values: values["engines"][GRAPH].update(file=name))
    assert "is not in the bundle's own engines folder; engines are code" in refusal(built)


def test_engines_that_are_links_are_loaded_by_their_content(built: EngineStore, tmp_path: Path) -> None:
    expected, inside, outside = built.load(GRAPH), built.folder / "subnet-0000.engine", tmp_path / "blob"
    os.rename(inside, outside)
    inside.symlink_to(outside)
    assert built.load(GRAPH) == expected
    outside.write_bytes(expected[::-1])
    assert "was changed after it was built (its SHA-256 differs)" in refusal(built)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda path: path.write_text(path.read_text().replace(f'"recipe": {RECIPE}', '"recipe": 99')),
            "its digest differs",
        ),
        (lambda path: path.write_text("{"), "is damaged: not JSON"),
        (lambda path: path.write_text('{"schema_version": 3}'), "is not valid: request"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is damaged: not JSON"),
    ],
)
def test_a_spoiled_index_is_refused(built: EngineStore, spoil: Callable[[Path], object], message: str) -> None:
    spoil(built.folder / "engines.json")
    text = refusal(built)
    assert message in text
    assert text.endswith(f"remove {built.folder} and build again")


@pytest.mark.parametrize("version", [1, 2])
def test_engines_of_an_older_release_count_as_not_built(built: EngineStore, request_for, version: int) -> None:
    edit(built, lambda values: values.update(schema_version=version), sign=False)
    assert built.read() is None
    with pytest.raises(BundleError, match="has no tensorrt-rtx engines; run `dydit build"):
        open_store(built.bundle, Flavour.TENSORRT_RTX, VERSION, ADA)
    assert len(build_engines(built.bundle, request_for(built.bundle)).built) == 7


def test_an_unsigned_change_is_noticed(built: EngineStore) -> None:
    edit(built, lambda values: values["engines"][GRAPH].update(sha256="0" * 64), sign=False)
    assert "its digest differs" in refusal(built)


RTX = {"flavour": Flavour.TENSORRT_RTX, "version": "1.7.1"}
DATA = {"flavour": Flavour.TENSORRT, "version": "11.4.0", "compute_capabilities": ("9.0",), "gpu": "NVIDIA H200"}
FIT = [
    (RTX, "1.7.1", ADA, None),
    (
        RTX,
        "1.7.1",
        HOPPER,
        "was built for compute capability 8.0 or 8.6 or 8.9 or 12.0 or 12.1, but the GPU here is NVIDIA H200",
    ),
    ({**RTX, "precision": "fp8"}, "1.7.1", ADA, None),
    (
        {**RTX, "precision": "fp8"},
        "1.7.1",
        Gpu("NVIDIA RTX A4000", "8.6"),
        "was built for compute capability 8.9 or 12.0 or 12.1, but the GPU here is NVIDIA RTX A4000",
    ),
    (RTX, "1.7.1", None, "needs an NVIDIA GPU to run, but there is no driver or GPU here"),
    (RTX, "1.7.0", ADA, "was built by tensorrt-rtx 1.7.1, but 1.7.0 is installed"),
    (RTX, "1.8.0", ADA, "was built by tensorrt-rtx 1.7.1, but 1.8.0 is installed"),
    (
        RTX,
        "1.7.1",
        TURING,
        "but the GPU here is NVIDIA T4 (compute capability 7.5)",
    ),
    ({**RTX, "compute_capabilities": ("8.6", "8.9")}, "1.7.1", ADA, None),
    (
        {**RTX, "compute_capabilities": ("8.6", "12.0")},
        "1.7.1",
        ADA,
        "was built for compute capability 8.6 or 12.0, but the GPU here is NVIDIA L4 (compute capability 8.9)",
    ),
    (DATA, "11.4.0", HOPPER, None),
    (
        DATA,
        "11.4.0",
        ADA,
        "was built for compute capability 9.0 (NVIDIA H200), but the GPU here is NVIDIA L4 (compute capability 8.9)",
    ),
    ({**DATA, "hardware_compatibility": HardwareCompatibility.AMPERE_PLUS}, "11.4.0", ADA, None),
    ({**DATA, "hardware_compatibility": HardwareCompatibility.SAME_CAPABILITY}, "11.4.0", ADA, "was built for"),
    (DATA, "11.5.0", HOPPER, "was built by tensorrt 11.4.0, but 11.5.0 is installed"),
    ({**DATA, "version_compatible": True}, "11.5.0", HOPPER, None),
    ({**DATA, "version_compatible": True}, "11.3.0", HOPPER, "was built by tensorrt 11.4.0, but 11.3.0 is installed"),
    ({**DATA, "version_compatible": True}, "12.0.0", HOPPER, "was built by tensorrt 11.4.0, but 12.0.0 is installed"),
]


@pytest.mark.parametrize(("values", "installed", "gpu", "reason"), FIT)
def test_where_engines_run(values: dict, installed: str, gpu: Gpu | None, reason: str | None) -> None:
    request = EngineRequest(**{"precision": "fp16", "opt_batches": (1,), "max_batch": 1, **values})
    found = unfit_reason(request, installed, gpu)
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)


def test_the_engines_that_run_here_are_found_among_others(built: EngineStore, request_for) -> None:
    newer = request_for(built.bundle, version="1.8.0")
    build_engines(built.bundle, newer)
    assert open_store(built.bundle, Flavour.TENSORRT_RTX, VERSION, ADA).folder == built.folder
    assert open_store(built.bundle, Flavour.TENSORRT_RTX, "1.8.0", ADA).folder.name == newer.folder


def test_engines_of_another_version_or_gpu_are_refused_with_the_command(built: EngineStore) -> None:
    command = f"run `dydit build {built.bundle.path} --flavour tensorrt-rtx`"
    with pytest.raises(BundleError) as caught:
        open_store(built.bundle, Flavour.TENSORRT_RTX, "2.0.0", ADA)
    assert str(caught.value) == (
        f"{built.folder} was built by tensorrt-rtx {VERSION}, but 2.0.0 is installed; {command}"
    )
    for gpu in (TURING, HOPPER):
        with pytest.raises(BackendError) as refused:
            open_store(built.bundle, Flavour.TENSORRT_RTX, VERSION, gpu)
        assert "engines run on compute capability 8.0, 8.6, 8.9, 12.0 and 12.1, but not on" in str(refused.value)
        assert str(gpu) in str(refused.value) and "--flavour tensorrt (" in str(refused.value)
    with pytest.raises(BundleError) as caught:
        open_store(built.bundle, Flavour.TENSORRT, "11.4.0", HOPPER)
    assert str(caught.value) == (
        f"{built.bundle.path} has no tensorrt engines; run `dydit build {built.bundle.path} --flavour tensorrt`"
    )


def test_the_command_repeats_what_was_not_default(bundle: Bundle, request_for) -> None:
    request = request_for(bundle, max_batch=32, opt_batches=(8,), compute_capabilities=("8.9", "12.0"))
    assert build_command(bundle, request) == (
        f"dydit build {bundle.path} --flavour tensorrt-rtx --max-batch 32 --opt-batch 8 --compute-capability 8.9 "
        "--compute-capability 12.0"
    )
    other = request_for(
        bundle,
        Flavour.TENSORRT,
        gpu=HOPPER,
        hardware_compatibility=HardwareCompatibility.AMPERE_PLUS,
        version_compatible=True,
    )
    assert build_command(bundle, other) == (
        f"dydit build {bundle.path} --flavour tensorrt --hardware-compatibility ampere+ --version-compatible"
    )


def test_a_runtime_cache_comes_back_unless_it_was_changed(built: EngineStore) -> None:
    assert built.read_runtime_cache() is None
    built.write_runtime_cache(b"compiled kernels")
    assert built.read_runtime_cache() == b"compiled kernels"
    (built.folder / "runtime.cache").write_bytes(b"somebody's kernels")
    assert built.read_runtime_cache() is None
    (built.folder / "runtime.json").write_text("{")
    assert built.read_runtime_cache() is None
