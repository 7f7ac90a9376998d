"""Calibration of a model: counts are those of sampling, runs repeat byte for byte, and the images stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dydit.bundle.manifest import PlanKind, Routing
from dydit.calibrate import calibration as module
from dydit.calibrate.calibration import CalibrationConfig, run_calibration, work_name
from dydit.calibrate.capacity import CapacityConfig
from dydit.calibrate.plots_calibration import calibration_png
from dydit.errors import CalibrationError, ConfigError
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.inspection.trace import trace_tokens
from dydit.models.config import parse_config
from dydit.quickstart.quickstart import ASSETS
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.loop import MemoryStore, StepRunner, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import make_batches
from dydit.runtime.resident import ResidentSubnets

pytestmark = pytest.mark.numerics

STEPS = 6
EXPORTED = ExportConfig(steps=STEPS, max_subnets=3)


def settings(**changes: Any) -> CalibrationConfig:
    capacity = CapacityConfig(quantile=1, margin=0, batch_sizes=(2,))
    values = {"samples": 9, "held_out": 6, "cfg_scales": (4.0, 1.0), "seed": 3, "capacity": capacity}
    return CalibrationConfig.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def calibrated(make_checkpoint, tmp_path_factory):
    """A calibration and the folder that its counts are kept in."""
    work, seen = tmp_path_factory.mktemp("calibration") / "work", []
    result = run_calibration(make_checkpoint(), EXPORTED, settings(), work, progress=lambda *now: seen.append(now))
    assert seen == [(k + 1, 4 * STEPS) for k in range(4 * STEPS)], "two guidance scales, of either set"
    return result, work


def kept(work: Path, seed: int, first: int) -> np.ndarray:
    with np.load(work / f"{seed}-{first}.npz") as arrays:
        return np.asarray(arrays["counts"])


def test_counts_are_those_of_sampling(calibrated, make_bundle):
    """Of five images with guidance 1 and four with 4, classes spread over each, as the merged plan routes them."""
    bundle = make_bundle(steps=STEPS, max_subnets=3)
    plain = trace_tokens(bundle, [0, 1, 2, 4, 5], 1.0, seed=3)
    np.testing.assert_array_equal(kept(calibrated[1], 3, 0)[..., 0], plain.tokens.sum(-1).transpose(2, 0, 1))
    ratio = np.asarray(calibrated[0].calibration.tokens.mean_ratio)
    guided = kept(calibrated[1], 3, 5)
    assert guided.shape == (4, STEPS, 3, 2)
    assert ratio == pytest.approx((plain.tokens.mean((2, 3)) + guided.mean((0, 3)) / 16) / 2, abs=1e-6)
    assert 0.1 < ratio.mean() < 0.9, "tokens are routed and skipped"


def test_held_out_images_are_others(calibrated):
    assert sorted(path.name for path in calibrated[1].glob("*.npz")) == ["3-0.npz", "3-5.npz", "4-0.npz", "4-3.npz"]
    assert not np.array_equal(kept(calibrated[1], 3, 0)[:3], kept(calibrated[1], 4, 0))
    tokens = calibrated[0].calibration.tokens
    assert tokens.predicted.rate == 0 and (tokens.predicted.images, tokens.held_out.images) == (9, 6)
    assert tokens.held_out.rate > 0, "a handful of images does not show all there is"
    assert tokens.held_out.mlp_ratio > 1 < tokens.predicted.mlp_ratio


def test_a_repeated_and_a_resumed_run_give_the_same_bytes(calibrated, make_checkpoint, tmp_path):
    text = calibrated[0].calibration.to_json()
    again = run_calibration(make_checkpoint(), EXPORTED, settings(), tmp_path / "again")
    assert again.calibration.to_json() == text

    def stop(done: int, total: int) -> None:
        if done == 2 * STEPS + 3:
            raise KeyboardInterrupt

    work = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run_calibration(make_checkpoint(), EXPORTED, settings(), work, progress=stop)
    assert sorted(path.name for path in work.iterdir()) == ["3-0.npz", "3-5.npz", "bundle"]
    (work / "3-5.npz").write_bytes(b"PK\x03\x04 torn")
    seen: list[int] = []
    resumed = run_calibration(
        make_checkpoint(), EXPORTED, settings(), work, progress=lambda done, total: seen.append(done)
    )
    assert resumed.calibration.to_json() == text
    assert seen == [STEPS, *range(STEPS + 1, 4 * STEPS + 1)], "one batch was there, one was not whole"


def test_work_belongs_to_what_is_sampled(make_checkpoint):
    name = work_name(make_checkpoint(), EXPORTED, settings())
    other = settings(capacity=CapacityConfig(quantile=0.9))
    assert work_name(make_checkpoint(), ExportConfig(steps=STEPS, max_subnets=2), other) == name
    assert work_name(make_checkpoint(seed=1), EXPORTED, settings()) != name
    assert work_name(make_checkpoint(), EXPORTED, settings(samples=10)) != name
    others = (
        {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 0.5},
        {"spacing": "trailing"},
        {"sampler": "dpm-solver++"},
    )
    names = {work_name(make_checkpoint(), ExportConfig(steps=STEPS, **other), settings()) for other in others}
    assert len(names | {name}) == 5


@pytest.mark.parametrize("plan", [{"max_subnets": 1}, {"plan": PlanKind.PER_STEP}, {"plan": PlanKind.DYNAMIC_WIDTH}])
def test_every_kind_of_plan(calibrated, make_checkpoint, plan):
    """The counts are there; only what is chosen from them depends on the plan."""
    exported = ExportConfig(steps=STEPS, **plan)
    made = run_calibration(make_checkpoint(), exported, settings(), calibrated[1]).calibration.tokens
    assert made.mean_ratio == calibrated[0].calibration.tokens.mean_ratio and made.predicted.rate == 0
    if "max_subnets" in plan:
        assert made.capacities == (calibrated[0].calibration.tokens.largest,)
    else:
        assert len(made.capacities) == STEPS
        assert (made.capacities == (made.largest,) * STEPS) == (exported.plan is PlanKind.DYNAMIC_WIDTH)


def latents(bundle, images: int, seed: int, cfg_scale: float) -> tuple[np.ndarray, int]:
    """Images of a bundle, all in one batch, and how many steps were repeated."""
    model = bundle.manifest.model
    labels = [image % model.num_classes for image in range(images)]
    engine, store = open_backend("onnxruntime", bundle), MemoryStore()
    noise = SeededNoise(seed, (model.in_channels, model.input_size, model.input_size))
    with ResidentSubnets(engine) as subnets:
        runner = StepRunner(engine, subnets, labels, cfg_scale)
        stats = sample(runner, make_batches(labels, range(images), images), noise, store)
    return store.load(0).x, stats.repeated_steps


@pytest.mark.parametrize(("quantile", "repeats"), [(1, False), (0.5, True)])
def test_the_digits_model_gives_the_images_of_dynamic_routing(tmp_path, quantile, repeats):
    from dydit.checkpoints.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(ASSETS / "dydit.safetensors")
    config = settings(cfg_scales=(1.5,), capacity=CapacityConfig(quantile=quantile, margin=0.02, batch_sizes=(4,)))
    found = run_calibration(checkpoint, EXPORTED, config, tmp_path / "work").calibration
    assert max(map(max, found.tokens.capacities)) < found.tokens.tokens == 64, "fewer slots than tokens"
    dynamic = export(checkpoint, tmp_path / "dynamic", EXPORTED)
    by_capacity = EXPORTED.model_copy(update={"routing": Routing.CAPACITY, "calibration": found})
    capacity = export(checkpoint, tmp_path / "capacity", by_capacity)
    expected, _ = latents(dynamic, 4, 9, 1.5)
    images, again = latents(capacity, 4, 9, 1.5)
    for ours, theirs in zip(images, expected, strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
    assert bool(again) == repeats


def test_texts_of_the_picture_are_apart_and_inside(calibrated, layout):
    calibration_png(calibrated[0])
    assert any("held-out image" in text for text in layout)


def test_the_picture_is_one_and_repeats(calibrated):
    picture = calibration_png(calibrated[0])
    assert picture.startswith(b"\x89PNG") and picture == calibration_png(calibrated[0])


def test_latents_that_are_not_finite(make_checkpoint, tmp_path, monkeypatch):
    class Broken(SeededNoise):
        def step(self, batch, step):
            noise = super().step(batch, step)
            noise[1] = np.nan if step == 3 else noise[1]
            return noise

    monkeypatch.setattr(module, "SeededNoise", Broken)
    with pytest.raises(CalibrationError, match="latents of images 0 to 4 are NaN or infinite"):
        run_calibration(make_checkpoint(), EXPORTED, settings(), tmp_path / "work")
    assert list((tmp_path / "work").glob("*.npz")) == []


class TestRefusals:
    def test_a_static_model(self, make_checkpoint, small_config, tmp_path):
        with pytest.raises(CalibrationError, match="is a static model: it has no token routers"):
            run_calibration(make_checkpoint(small_config.without_routers()), EXPORTED, settings(), tmp_path / "work")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"samples": 3}, r"1 sample at guidance 4 is too few .*: 2 are needed for each guidance scale"),
            ({"held_out": 2}, r"1 held-out sample at guidance 1 is too few"),
            ({"capacity": CapacityConfig(quantile=0.999, batch_sizes=(1,))}, "1000 are needed"),
        ],
    )
    def test_too_few_samples(self, make_checkpoint, tmp_path, changes, words):
        with pytest.raises(CalibrationError, match=words):
            run_calibration(make_checkpoint(), EXPORTED, settings(**changes), tmp_path / "work")
        assert list(tmp_path.iterdir()) == [], "nothing is sampled first"

    @pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
    def test_guidance_that_is_no_number_from_0(self, scale):
        with pytest.raises(ConfigError, match=r"cfg_scales\.\d must be (at least 0|a finite number)"):
            parse_config(CalibrationConfig, {"cfg_scales": (1.0, scale)})


def test_a_damaged_bundle_of_a_stopped_run_is_made_again(make_checkpoint, tmp_path):
    from dydit.bundle.bundle import Bundle
    from dydit.calibrate.calibration import _sampling_bundle
    from dydit.export.settings import ExportConfig

    made = _sampling_bundle(make_checkpoint(), ExportConfig(steps=2), tmp_path / "work")
    for name in ("weights.bin", "manifest.json"):
        (made.path / name).write_bytes(b"")
        again = _sampling_bundle(make_checkpoint(), ExportConfig(steps=2), tmp_path / "work")
        assert Bundle.open(again.path).manifest == made.manifest
