"""The commands on small U-ViTs, conditional and not: from published files to images, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dydit.models.config import Routers
from dydit.models.synthetic import synthetic_model
from dydit.models.uvit.config import UViTConfig
from tests.fixtures.cpu import EXACT_INT8

SIZES = {"hidden_size": 32, "depth": 3, "num_heads": 4, "patch_size": 2, "input_size": 8, "in_channels": 3}
CLASSES = {"num_classes": 6, "null_class_row": True}
RUN = ("--steps", 5, "--max-subnets", 2)
ASSUMED = "assumed VP-SDE with beta from 0.1 to 20; if that is wrong, give --schedule"


def published(path: Path, **changes: Any) -> Path:
    torch.save(dict(synthetic_model(UViTConfig(**SIZES, **changes), 1).state_dict()), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`un.pth` (unconditional), `classes.pth`, `no-null.pth` and `static.pth`. Shared: do not write over them."""
    folder = tmp_path_factory.mktemp("u-vit")
    published(folder / "un.pth")
    published(folder / "classes.pth", **CLASSES)
    published(folder / "no-null.pth", num_classes=6)
    published(folder / "static.pth", **CLASSES, routers=Routers.NONE)
    return folder


@pytest.fixture
def ok(run: Callable[..., Any]) -> Callable[..., str]:
    """`ok(*arguments)`: what a command that succeeds prints."""

    def call(*arguments: object) -> str:
        result = run(*arguments)
        assert result.code == 0, result
        return result.out

    return call


@pytest.fixture
def refused(run: Callable[..., Any]) -> Callable[..., str]:
    """`refused(*arguments)`: the one line of a command that is refused."""

    def call(*arguments: object) -> str:
        result = run(*arguments)
        assert result.code == 2 and result.err.count("\n") == 1, result
        return result.err

    return call


@pytest.fixture
def bundles(folder, ok) -> tuple[Path, Path]:
    """An unconditional bundle and one with classes. Shared: do not write into them."""
    made = folder / "un-bundle", folder / "classes-bundle"
    for name, bundle in zip(("un", "classes"), made, strict=True):
        if not bundle.exists():
            ok("export", folder / f"{name}.pth", "--num-heads", 4, "--out", bundle, *RUN, "--max-batch", 4)
    return made


def test_a_published_file_is_converted(folder, tmp_path, ok, refused):
    told = ok("convert", folder / "static.pth", "--num-heads", 4, "--out", tmp_path / "a.safetensors")
    assert "a.safetensors: static U-ViT (hidden 32, 3 blocks, 4 heads, patch 2), read as uvit\n" in told
    assert ASSUMED in told and "assumed 6 classes, with the last of the 7 rows" in told
    read = ok("inspect", tmp_path / "a.safetensors")
    assert "U-ViT, static" in read and "3x8x8, 18 tokens, 6 classes\n" in read
    assert "does not show its number of heads" in refused("convert", folder / "static.pth", "--out", tmp_path / "b")
    assert "remove --num-classes" in refused("inspect", folder / "un.pth", "--num-classes", 6)


def test_a_training_folder_is_a_checkpoint_for_every_command(folder, tmp_path, ok, refused):
    source = tmp_path / "5000.ckpt"
    source.mkdir()
    for name, file in (("nnet_ema", "un"), ("nnet", "un")):
        state = torch.load(folder / f"{file}.pth")
        torch.save({key: value + (name == "nnet") for key, value in state.items()}, source / f"{name}.pth")
    assert "weights: ema (nnet_ema.pth); the folder also holds model" in ok("inspect", source)
    told = ok("export", source, "--out", tmp_path / "bundle", "--steps", 2)
    assert "weights: ema" in told and f"--against {source}" in told
    assert "parity holds" in ok("parity", tmp_path / "bundle", "--against", source, "--out", tmp_path / "parity")
    other = tmp_path / "other"
    assert "weights: model" in ok("convert", source, "--weights", "model", "--out", other)
    assert "is a checkpoint, not a bundle" in refused("sample", source, "--out", tmp_path / "out")


def test_inspect_tells_what_a_bundle_is(bundles, ok):
    unconditional, classes = (ok("inspect", bundle) for bundle in bundles)
    assert "3x8x8, 17 tokens, unconditional\n" in unconditional and "without guidance" in unconditional
    assert "3x8x8, 18 tokens, 6 classes\n" in classes and "guidance on all 3 channels" in classes
    assert "5 euler-maruyama steps" in classes and "VP-SDE with beta from 0.1 to 20" in classes
    facts = json.loads(ok("inspect", bundles[0], "--json"))
    assert facts["model"]["parameters"] > facts["model"]["router_parameters"] > 0


def test_an_unconditional_model_is_sampled_without_labels(bundles, tmp_path, ok, refused):
    unconditional, _ = bundles
    said = ok("sample", unconditional, "--num", 3, "--npz", "--out", tmp_path / "three")
    assert "3 images in" in said
    ok("sample", unconditional, "--labels", "0", "--num", 3, "--npz", "--cfg-scale", 1, "--out", tmp_path / "labelled")
    arrays = [np.load(tmp_path / name / "samples.npz") for name in ("three", "labelled")]
    assert np.array_equal(arrays[0]["arr_0"], arrays[1]["arr_0"]) and len(np.unique(arrays[0]["arr_0"], axis=0)) == 3
    assert arrays[0]["arr_1"].tolist() == [0, 0, 0]
    again = ok("sample", unconditional, "--num", 3, "--npz", "--out", tmp_path / "three")
    assert "this run was complete already" in again
    assert "1 image in" in ok("sample", unconditional, "--out", tmp_path / "one")
    assert "unconditional and takes label 0 only" in refused(
        "sample", unconditional, "--labels", "1", "--out", tmp_path / "x"
    )
    guided = refused("sample", unconditional, "--cfg-scale", 2, "--out", tmp_path / "x")
    assert "needs a null class, which this model does not have" in guided


def test_a_conditional_model_is_guided_and_needs_labels(bundles, tmp_path, ok, refused):
    _, classes = bundles
    assert "give at least one label" in refused("sample", classes, "--num", 3, "--out", tmp_path / "x")
    images = {}
    for scale in (1, 1.4):
        out = tmp_path / str(scale)
        ok("sample", classes, "--labels", "0-5", "--cfg-scale", scale, "--npz", "--out", out)
        images[scale] = np.load(out / "samples.npz")["arr_0"]
    assert images[1].shape == (6, 8, 8, 3) and not np.array_equal(images[1], images[1.4])


def test_a_stopped_run_is_resumed(bundles, tmp_path, run, ok, monkeypatch):
    from dydit.runtime.bulk.run_folder import FolderStore

    unconditional, _ = bundles
    arguments = ("sample", unconditional, "--num", 10, "--batch-size", 3, "--threads", 1)
    ok(*arguments, "--out", tmp_path / "whole")
    save, saved = FolderStore.save, []

    def stopping(self: FolderStore, *values: Any) -> None:
        save(self, *values)
        saved.append(values)
        if len(saved) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "save", stopping)
        assert run(*arguments, "--out", tmp_path / "parts").code not in (0, 2)
    ok(*arguments, "--out", tmp_path / "parts")
    assert len(saved) == 3
    pictures = [sorted(path.name for path in (tmp_path / name).glob("*.png")) for name in ("whole", "parts")]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 11
    assert all(
        (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes() for name in pictures[0]
    )


def test_parity_and_bench_take_their_defaults_from_the_model(bundles, folder, tmp_path, ok, refused):
    for bundle, name in zip(bundles, ("un", "classes"), strict=True):
        out = tmp_path / f"{name}-parity"
        assert "parity holds" in ok(
            "parity", bundle, "--against", folder / f"{name}.pth", "--num-heads", 4, "--out", out
        )
        report = json.loads((out / "parity.json").read_text())
        assert report["cfg_scale"] == (1 if name == "un" else 4) and len(report["labels"]) == 2
        ok("bench", bundle, "--steps-measured", 1, "--repeats", 1, "--out", tmp_path / f"{name}-bench")
    mixed = refused("bench", bundles[0], "--versus", bundles[1], "--out", tmp_path / "x")
    assert "cannot be compared: their model sizes differ (num_classes 0 and 6)" in mixed


CALIBRATION = ("--samples", 60, "--held-out", 60, "--batch-size", 2, "--quantile", 0.9, "--threads", 1)
RANGES = ("--activations", "minmax", "--activation-images", 2)


@pytest.mark.parametrize(("name", "options"), [("un", ()), ("classes", ("--smooth", "--cfg-scale", 1.4))])
def test_calibrated_bundles(folder, tmp_path, run, ok, refused, name, options):
    source, sampler = folder / f"{name}.pth", ("--sampler", "ddim", *RUN)
    calibration = tmp_path / "calibration.json"
    said = ok("calibrate", source, *CALIBRATION, *RANGES, *options, *sampler, "--out", calibration)
    assert "token capacities for 2 segments" in said
    assert json.loads(calibration.read_text())["cfg_scales"] == [1.4 if options else 1]
    export = ("export", source, "--routing", "capacity", "--calibration", calibration, *sampler, "--max-batch", 4)
    for precision in ("int8", "int8-static", "fp16"):
        bundle = tmp_path / precision
        ok(*export, "--precision", precision, "--out", bundle)
        if precision != "fp16" and not EXACT_INT8:
            continue  # the backend refuses it
        scale = ("--cfg-scale", 1.4) if options else ()
        held = run("parity", bundle, "--against", source, "--out", tmp_path / f"{precision}-parity", *scale)
        passed = [line.split()[1] for line in held.out.splitlines() if line.startswith("passed ")]
        # The whole run of random weights in 8 bits may leave the tolerance, as that of no trained model.
        assert passed[:4] == ["masks", "weights", "sliced", "step"], held
        assert precision != "fp16" or held.code == 0, held
    wrong = ("export", folder / "no-null.pth", *export[2:], "--out", tmp_path / "x")
    assert "the calibration is for another checkpoint" in refused(*wrong)


def test_a_static_model_is_fine_tuned(tmp_path, ok, refused):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'dydit[train]'")
    sizes = {**SIZES, "patch_size": 4, "input_size": 16, "in_channels": 1}
    changes = [f"model.{name}={value}" for name, value in {"architecture": "uvit", **sizes}.items()]
    changes += ["model.learn_sigma=false", "iterations=4", "batch_size=4"]
    for name, classes in (("un", {}), ("classes", {"num_classes": 10, "null_class_row": True})):
        path, out = tmp_path / f"{name}.pth", tmp_path / name
        config = UViTConfig(**sizes, **classes, routers=Routers.NONE)
        torch.save(dict(synthetic_model(config).state_dict()), path)
        own = [f"model.num_classes={config.num_classes}", f"model.null_class_row={str(config.null_class_row).lower()}"]
        own += [] if classes else ["label_dropout=0"]
        ok("convert", path, "--num-heads", 4, "--out", tmp_path / f"{name}.safetensors")
        start = f"init={tmp_path / name}.safetensors"
        ok("train", "--recipe", "digits-dynamic", start, *changes, *own, "--out", out)
        told = ok("inspect", out / "model.safetensors")
        assert "dynamic U-ViT, routers first-on" in told and "VP-SDE" in told
        other = refused("train", "--recipe", "digits-dynamic", start, "--out", tmp_path / "x")
        assert "is a model of other sizes than that of the recipe: architecture uvit, not dit" in other
