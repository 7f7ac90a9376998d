"""What is built, and why; with a stand-in for TensorRT."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable

import pytest

from dydit.bundle.bundle import Bundle
from dydit.engines.bundle_engines import build_engines
from dydit.engines.fingerprint import EngineRequest
from dydit.engines.inspector import ChosenKernels
from dydit.engines.store import EngineStore
from dydit.errors import BundleError, ConfigError, OutputError

Requests = Callable[..., EngineRequest]


def test_every_graph_gets_an_engine(bundle: Bundle, request_for: Requests, pretence) -> None:
    progress: list[tuple[int, int]] = []
    report = build_engines(bundle, request_for(bundle), progress=lambda *numbers: progress.append(numbers))
    graphs = {name for name in bundle.manifest.files if name.endswith(".onnx")}
    assert len(graphs) == 7
    assert set(pretence.built) == graphs
    assert (len(report.built), report.kept, report.reasons) == (7, 0, ())
    assert progress == [(done, 7) for done in range(8)]
    store = EngineStore.of(bundle, report.request)
    for graph in graphs:
        assert store.load(graph)
    assert report.bytes == sum(path.stat().st_size for path in store.folder.glob("*.engine"))
    assert report.text()[0] == f"{store.folder}: 7 engines built by tensorrt-rtx 1.7.1"
    json.dumps(report.to_json(), allow_nan=False)


def test_products_that_are_not_computed_in_8_bits_are_named(bundle: Bundle, request_for: Requests, pretence) -> None:
    kept = ("blocks.0.fc1.weight", "blocks.1.qkv.weight")
    pretence.kernels = ChosenKernels(
        products={"int8": 6, "float16": 2}, fused_attention=2, in_8_bits=8, not_in_8_bits=kept
    )
    report = build_engines(bundle, request_for(bundle))
    graph = report.built[0].graph
    assert report.text()[1] == (
        f"the builder chose other types for 14 of 56 products that the bundle holds in 8 bits: {kept[0]} in {graph}, "
        f"{kept[1]} in {graph}, {kept[0]} in {report.built[1].graph} and 11 more; these gain nothing from 8 bits"
    )
    assert report.to_json()["built"][0]["kernels"]["products"] == {"int8": 6, "float16": 2}
    index = EngineStore.of(bundle, report.request).read()
    assert index is not None and index.engines[graph].kernels == pretence.kernels
    pretence.kernels = pretence.kernels.model_copy(update={"not_in_8_bits": ()})
    assert len(build_engines(bundle, request_for(bundle, max_batch=1)).text()) == 3, "settings, engines, log"


def test_the_text_graph_gets_an_engine(text_bundle, tmp_path, request_for: Requests, pretence) -> None:
    shutil.copytree(text_bundle().path, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    report = build_engines(bundle, request_for(bundle))
    assert [each.graph for each in report.built] == ["conditioning.onnx", "text.onnx", "subnet-0000.onnx"]
    index = EngineStore.of(bundle, report.request).read()
    assert index is not None
    assert index.engines["text.onnx"].key.profiles[0]["mask"].max == (3, 6), "two images and the negative text"
    assert index.engines["subnet-0000.onnx"].key.profiles[0]["text_values"].max == (2, 3, 2, 6, 64)


def test_when_nothing_changed_nothing_is_built(bundle: Bundle, request_for: Requests, pretence) -> None:
    build_engines(bundle, request_for(bundle))
    pretence.built.clear()
    again = build_engines(Bundle.open(bundle.path), request_for(bundle))
    assert (pretence.built, again.built, again.kept) == ([], (), 7)
    assert again.text() == [f"{again.folder}: all 7 engines for tensorrt-rtx 1.7.1 are up to date; nothing was built"]


def test_a_new_time_alone_builds_nothing(bundle: Bundle, request_for: Requests, pretence) -> None:
    folder = build_engines(bundle, request_for(bundle)).folder
    os.utime(folder / "conditioning.engine", ns=(1, 1))
    assert build_engines(bundle, request_for(bundle)).built == ()


def test_damage_that_leaves_size_and_time_is_found(bundle: Bundle, request_for: Requests, pretence) -> None:
    folder = build_engines(bundle, request_for(bundle)).folder
    path = folder / "subnet-0000.engine"
    times, data = path.stat(), path.read_bytes()
    path.write_bytes(data[::-1])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert [each.graph for each in build_engines(bundle, request_for(bundle)).built] == ["subnet-0000.onnx"]
    assert path.read_bytes() == data


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[::-1])])
def test_what_is_gone_or_changed_is_built_again_and_nothing_else(bundle, request_for, pretence, spoil) -> None:
    folder = build_engines(bundle, request_for(bundle)).folder
    pretence.built.clear()
    path = folder / "subnet-0001.engine"
    spoil(path)
    if path.exists():
        os.utime(path, ns=(1, 1))  # a coarse clock may not tell the two apart
    report = build_engines(bundle, request_for(bundle))
    assert pretence.built == ["subnet-0001.onnx"]
    assert report.text()[0] == "subnet-0001.onnx: subnet-0001.engine is missing or was changed"
    assert EngineStore(bundle, folder).load("subnet-0001.onnx")


def changed_bundle(bundle: Bundle, **files: bytes) -> Bundle:
    """The bundle with other files, its manifest telling so."""
    manifest = bundle.manifest
    entries = dict(manifest.files)
    for name, data in files.items():
        file = name.replace("__", ".").replace("_", "-")
        (bundle.path / file).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        entries[file] = manifest.files[file].model_copy(update={"bytes": len(data), "sha256": digest})
    changed = manifest.model_copy(update={"files": entries})
    (bundle.path / "manifest.json").write_text(changed.to_json())
    return Bundle.open(bundle.path)


def test_another_graph_is_built_again_with_the_reason(bundle: Bundle, request_for: Requests, pretence) -> None:
    build_engines(bundle, request_for(bundle))
    pretence.built.clear()
    report = build_engines(changed_bundle(bundle, subnet_0002__onnx=b"another graph"), request_for(bundle))
    assert pretence.built == ["subnet-0002.onnx"]
    assert report.text()[0] == "subnet-0002.onnx: the graph changed"


def test_other_weights_build_all_again(bundle: Bundle, request_for: Requests, pretence) -> None:
    build_engines(bundle, request_for(bundle))
    pretence.built.clear()
    weights = bytearray((bundle.path / "weights.bin").read_bytes())
    weights[5000] ^= 1
    report = build_engines(changed_bundle(bundle, weights__bin=bytes(weights)), request_for(bundle))
    assert len(pretence.built) == 7
    assert {reason for each in report.built for reason in each.reasons} == {"the weights changed"}


def test_other_settings_have_a_folder_of_their_own_and_say_why(bundle: Bundle, request_for, pretence) -> None:
    first = build_engines(bundle, request_for(bundle))
    second = build_engines(bundle, request_for(bundle, version="1.8.0", max_batch=8))
    assert second.folder != first.folder
    assert second.text()[0] == (
        f"the engines in {first.folder} were built with other settings and are not used (the version: 1.7.1 became "
        "1.8.0; the batches it is tuned for: 4 became 1 3 8; the largest batch: 4 became 8); the folder is kept, "
        "remove it if you do not need it"
    )
    assert build_engines(bundle, request_for(bundle)).built == ()


def test_equal_graphs_are_built_once(bundle: Bundle, request_for: Requests, pretence) -> None:
    same = (bundle.path / "subnet-0000-full.onnx").read_bytes()
    bundle = changed_bundle(bundle, subnet_0000__onnx=same)
    report = build_engines(bundle, request_for(bundle))
    assert len(pretence.built) == 6
    assert len(report.built) == 7
    store = EngineStore.of(bundle, report.request)
    assert store.load("subnet-0000.onnx") == store.load("subnet-0000-full.onnx")
    # The other of the two changes now: the one that is left keeps the file.
    pretence.built.clear()
    kept = store.load("subnet-0000-full.onnx")
    bundle = changed_bundle(bundle, subnet_0000__onnx=b"another graph")
    build_engines(bundle, request_for(bundle))
    assert pretence.built == ["subnet-0000.onnx"]
    store = EngineStore.of(bundle, report.request)
    assert store.load("subnet-0000-full.onnx") == kept
    assert store.load("subnet-0000.onnx") != b""


def test_a_graph_equal_to_one_that_is_built_takes_its_engine(bundle: Bundle, request_for: Requests, pretence) -> None:
    build_engines(bundle, request_for(bundle))
    pretence.built.clear()
    same = (bundle.path / "subnet-0000-full.onnx").read_bytes()
    bundle = changed_bundle(bundle, subnet_0000__onnx=same)
    report = build_engines(bundle, request_for(bundle))
    assert (pretence.built, report.built) == ([], ())
    store = EngineStore.of(bundle, report.request)
    assert store.load("subnet-0000.onnx") == store.load("subnet-0000-full.onnx")
    assert not (store.folder / "subnet-0000.engine").exists(), "no graph has it any more"


def test_after_a_failure_what_is_finished_stays(bundle: Bundle, request_for: Requests, pretence) -> None:
    pretence.fail_at = "subnet-0001.onnx"
    with pytest.raises(RuntimeError):
        build_engines(bundle, request_for(bundle))
    done, pretence.built, pretence.fail_at = pretence.built, [], None
    assert 0 < len(done) < 7
    report = build_engines(bundle, request_for(bundle))
    assert sorted(done + pretence.built) == sorted(name for name in bundle.manifest.files if name.endswith(".onnx"))
    assert report.kept == len(done)


def test_what_killed_builds_left_is_cleared(bundle: Bundle, request_for: Requests, pretence) -> None:
    folder = build_engines(bundle, request_for(bundle)).folder
    for name in (".subnet-0000.engine.x1y2.part", "subnet-0777.engine"):
        (folder / name).write_bytes(b"half")
    build_engines(bundle, request_for(bundle))
    assert not [path.name for path in folder.iterdir() if path.suffix == ".part" or "0777" in path.name]


def test_two_builds_at_a_time_are_refused(bundle: Bundle, request_for: Requests, pretence) -> None:
    folder = build_engines(bundle, request_for(bundle)).folder
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError) as caught:
            build_engines(bundle, request_for(bundle))
    assert str(caught.value) == f"another build is running in {folder}; wait for it, then run again"


def test_a_graph_that_is_not_the_manifests_is_refused(bundle: Bundle, request_for: Requests, pretence) -> None:
    (bundle.path / "subnet-0001.onnx").write_bytes(b"x" * bundle.manifest.files["subnet-0001.onnx"].bytes)
    with pytest.raises(BundleError, match=r"subnet-0001\.onnx was changed or removed after the bundle was opened"):
        build_engines(bundle, request_for(bundle))
    assert pretence.built == []


def test_no_jobs_are_refused(bundle: Bundle, request_for: Requests) -> None:
    with pytest.raises(ConfigError, match="0 jobs: expected at least 1"):
        build_engines(bundle, request_for(bundle), jobs=0)


def test_engines_of_a_copied_bundle_serve_it(bundle: Bundle, request_for: Requests, pretence, tmp_path) -> None:
    build_engines(bundle, request_for(bundle))
    pretence.built.clear()
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    again = build_engines(Bundle.open(copy), request_for(bundle))
    assert (pretence.built, again.kept) == ([], 7)
    assert EngineStore(Bundle.open(copy), again.folder).load("conditioning.onnx")


def test_the_decoder_depends_on_its_own_weights_and_small_batches(vae_bundle, request_for, pretence, tmp_path) -> None:
    bundle = Bundle.open(shutil.copytree(vae_bundle.path, tmp_path / "bundle"))
    store = EngineStore.of(bundle, request_for(bundle))
    build_engines(bundle, request_for(bundle))
    index = store.read()
    assert index is not None and store.load("vae_decoder.onnx")
    key = index.engines["vae_decoder.onnx"].key
    assert key.weights_sha256 == bundle.manifest.files["vae_weights.bin"].sha256
    extent = key.profiles[0]["latents"]
    assert (extent.min, extent.opt, extent.max) == ((1, 4, 8, 8), (4, 4, 8, 8), (4, 4, 8, 8)), "at most 4 of 8 images"
    others = [entry.key.weights_sha256 for name, entry in index.engines.items() if name != "vae_decoder.onnx"]
    assert set(others) == {bundle.manifest.files["weights.bin"].sha256}

    pretence.built.clear()
    entry = bundle.manifest.files["vae_weights.bin"].model_copy(update={"sha256": "0" * 64})
    manifest = bundle.manifest.model_copy(update={"files": {**bundle.manifest.files, "vae_weights.bin": entry}})
    report = build_engines(Bundle(bundle.path, manifest), request_for(bundle))
    assert [(each.graph, each.reasons) for each in report.built] == [("vae_decoder.onnx", ("the weights changed",))]


def test_a_decoder_takes_no_more_images_than_the_rest(vae_bundle, request_for, pretence, tmp_path) -> None:
    bundle = Bundle.open(shutil.copytree(vae_bundle.path, tmp_path / "bundle"))
    request = request_for(bundle, max_batch=2)
    build_engines(bundle, request)
    index = EngineStore.of(bundle, request).read()
    assert index is not None and index.engines["vae_decoder.onnx"].key.profiles[0]["latents"].max == (2, 4, 8, 8)
