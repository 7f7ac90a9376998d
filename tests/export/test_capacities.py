"""Export by a calibration: each segment gets its own slots, and one of something else is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dydit.bundle.manifest import PlanKind, Routing
from dydit.calibrate.calibration_file import Calibration, OverflowRates, TokenCalibration, plan_sha256
from dydit.calibrate.capacity import CapacityConfig
from dydit.diffusion.samplers import Sampler, Spacing
from dydit.errors import CalibrationError, ConfigError
from dydit.export.exporter import export, planned_steps
from dydit.export.settings import ExportConfig
from dydit.models.config import parse_config

RATES = OverflowRates(images=4, trials=10, rate=0, upper=0.1, repeated_steps=0, mlp_ratio=1.1)
STEPS = 8


def calibrated(checkpoint, config: ExportConfig, capacities: Any = None, **changes: Any) -> Calibration:
    """A calibration of that export; by default segment k has k+2 slots in block 0, k+3 in block 1, and so on."""
    masks, plan = planned_steps(checkpoint, config)
    depth = checkpoint.config.depth
    given = capacities or tuple(tuple(range(k + 2, k + 2 + depth)) for k in range(len(plan.segments)))
    values: dict[str, Any] = {
        "checkpoint_sha256": checkpoint.sha256,
        **dict(config.sampling(checkpoint.config)),
        "plan_sha256": plan_sha256(plan.bounds, masks),
        "cfg_scales": (4.0,),
        "seed": 0,
        "held_out_seed": 1,
        "tokens": TokenCalibration(
            tokens=checkpoint.config.tokens,
            settings=CapacityConfig(),
            mean_ratio=((0.5,) * depth,) * config.steps,
            capacities=given,
            predicted=RATES,
            held_out=RATES,
        ),
    }
    return Calibration.model_validate({**values, **changes})


def by_capacity(checkpoint, calibration: Calibration, **settings: Any) -> ExportConfig:
    return ExportConfig(routing=Routing.CAPACITY, calibration=calibration, **settings)


def test_each_segment_has_its_own_slots_and_a_full_form(make_checkpoint, tmp_path):
    checkpoint, plan = make_checkpoint(), {"steps": STEPS, "max_subnets": 3}
    calibration = calibrated(checkpoint, ExportConfig(**plan))
    manifest = export(checkpoint, tmp_path / "out", by_capacity(checkpoint, calibration, **plan)).manifest
    assert [manifest.subnets[s.subnet].capacities for s in manifest.plan.segments] == [(2, 3, 4), (3, 4, 5), (4, 5, 6)]
    assert all(entry.full_file == f"subnet-{k:04d}-full.onnx" for k, entry in enumerate(manifest.subnets))


def test_equal_units_with_other_slots_are_other_subnetworks(make_checkpoint, tmp_path):
    """Per-step masks come back later in the run; such segments share a subnetwork only where their slots agree."""
    checkpoint, plan = make_checkpoint(flops_ratio=0.9), {"steps": 40, "plan": PlanKind.PER_STEP}
    masks, planned = planned_steps(checkpoint, ExportConfig(**plan))
    segments, distinct = len(planned.segments), len(np.unique(masks, axis=0))
    assert distinct < segments
    for name, slots, expected in (
        ("same", ((4, 4, 4),) * segments, distinct),
        ("own", tuple((4 + k % 2, 4 + k // 2 % 10, 4 + k // 20) for k in range(segments)), segments),
    ):
        calibration = calibrated(checkpoint, ExportConfig(**plan), slots)
        manifest = export(checkpoint, tmp_path / name, by_capacity(checkpoint, calibration, **plan)).manifest
        assert len(manifest.subnets) == expected
        assert tuple(manifest.subnets[s.subnet].capacities for s in manifest.plan.segments) == slots


def test_one_graph_gets_the_most_that_a_segment_needs(make_checkpoint, tmp_path):
    checkpoint, plan = make_checkpoint(), {"steps": STEPS, "plan": PlanKind.DYNAMIC_WIDTH}
    calibration = calibrated(checkpoint, ExportConfig(**plan))
    manifest = export(checkpoint, tmp_path / "out", by_capacity(checkpoint, calibration, **plan)).manifest
    assert {entry.capacities for entry in manifest.subnets} == {calibration.tokens.largest}
    assert calibration.tokens.largest == tuple(np.array(calibration.tokens.capacities).max(0))
    assert {(entry.file, entry.full_file) for entry in manifest.subnets} == {("sliding.onnx", "sliding-full.onnx")}


def test_no_full_form_where_every_token_has_a_slot(make_checkpoint, tmp_path):
    checkpoint, plan = make_checkpoint(), {"steps": STEPS, "max_subnets": 2}
    calibration = calibrated(checkpoint, ExportConfig(**plan), ((16, 16, 16), (16, 9, 16)))
    manifest = export(checkpoint, tmp_path / "out", by_capacity(checkpoint, calibration, **plan)).manifest
    assert [entry.full_file for entry in manifest.subnets] == [None, "subnet-0001-full.onnx"]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"steps": STEPS + 1}, "8 steps of ddpm, not 9 steps of ddpm"),
        ({"sampler": Sampler.DDIM}, "8 steps of ddpm, not 8 steps of ddim"),
        ({"spacing": Spacing.TRAILING}, "8 steps of ddpm, not 8 steps of ddpm, spacing trailing"),
        ({"sampler": Sampler.DDIM, "eta": 0.5}, "8 steps of ddpm, not 8 steps of ddim, eta 0.5"),
        ({"max_subnets": 2}, "another plan"),
        ({"plan": PlanKind.PER_STEP}, "another plan"),
    ],
)
def test_a_calibration_of_something_else(make_checkpoint, tmp_path, other, words):
    checkpoint, plan = make_checkpoint(), {"steps": STEPS, "max_subnets": 3}
    calibration = calibrated(checkpoint, ExportConfig(**plan))
    with pytest.raises(CalibrationError, match=words):
        export(checkpoint, tmp_path / "out", by_capacity(checkpoint, calibration, **{**plan, **other}))
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_of_another_or_a_static_checkpoint(make_checkpoint, small_config, tmp_path: Path):
    plan = {"steps": STEPS, "max_subnets": 3}
    calibration = calibrated(make_checkpoint(), ExportConfig(**plan))
    for checkpoint, words in (
        (make_checkpoint(seed=1), "another checkpoint"),
        (make_checkpoint(small_config.without_routers()), "is a static model: it routes no tokens"),
    ):
        with pytest.raises(CalibrationError, match=words):
            export(checkpoint, tmp_path / "out", by_capacity(checkpoint, calibration, **plan))
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_that_was_changed(make_checkpoint, tmp_path):
    checkpoint, plan = make_checkpoint(), {"steps": STEPS, "max_subnets": 3}
    calibration = calibrated(checkpoint, ExportConfig(**plan), ((4, 4, 4),) * 2)
    with pytest.raises(CalibrationError, match=r"\(2, 3, 16\), expected \(3, 3, 16\): it was changed"):
        export(checkpoint, tmp_path / "out", by_capacity(checkpoint, calibration, **plan))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"routing": "dynamic"},
            "a calibration can only be given with capacity routing or precision int8-static or fp8",
        ),
        ({"routing": "capacity", "capacities": (4, 4, 4)}, "give either capacities or a calibration, not both"),
    ],
)
def test_settings_that_contradict(make_checkpoint, settings, message):
    calibration = calibrated(make_checkpoint(), ExportConfig(steps=STEPS))
    with pytest.raises(ConfigError, match=message):
        parse_config(ExportConfig, {"steps": STEPS, "calibration": calibration, **settings})
