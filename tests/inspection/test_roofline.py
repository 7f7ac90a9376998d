"""The least times that `dydit inspect --roofline` shows follow from the bytes and operations beside them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from dydit.bundle.manifest import PlanKind, Routing
from dydit.bundle.stored_weights import Precision
from dydit.cli import main
from dydit.errors import ConfigError
from dydit.inspection.gpus import GPUS
from dydit.inspection.inspect import inspect, inspect_bundle, inspect_checkpoint, inspect_preset
from dydit.inspection.roofline import model_roofline
from dydit.models.config import Routers
from dydit.models.dit.config import preset
from dydit.models.macs import static_macs
from dydit.reports.roofline import Bound, RooflineFacts


def rows_of(inspection, model):
    return [row for row in inspection.roofline.rows if row.model == model]


@pytest.mark.parametrize("gpu", GPUS)
def test_a_row_follows_from_the_datasheet(gpu):
    found = inspect_preset("DiT-XL/2", gpu).roofline
    device = GPUS[gpu]
    assert [row.batch for row in found.rows] == [1, 8, 32] and found.guided and found.steps == 250
    for row in found.rows:
        assert row.rows == 2 * row.batch and row.intensity == pytest.approx(row.flops / row.nbytes)
        memory, fastest, slowest = row.nbytes / device.bandwidth, row.flops / device.fp16, row.flops / device.fp32
        assert max(memory, fastest) <= row.step_ms / 1e3 <= max(memory, slowest)
        assert row.step_ms / 1e3 == pytest.approx(memory) or row.bound is Bound.COMPUTE
        assert row.images_per_second == pytest.approx(row.batch / (row.step_ms / 1e3 * 250))
    assert all(b.images_per_second >= a.images_per_second for a, b in zip(found.rows, found.rows[1:], strict=False))


@pytest.mark.parametrize(("gpu", "share"), [("H100", 0.129), ("H200", 0.129), ("RTX4090", 0.020)])
def test_token_routers_of_the_published_model_are_one_percent_of_its_operations_but_not_of_its_time(gpu, share):
    """With half of all units on. Their products are fp32, which tensor cores compute only as TF32."""
    model = preset("XL/2", routers=Routers.FIRST_ON)
    half = np.concatenate([np.arange(part.group.count) < part.group.count / 2 for part in model.units.parts])
    for row in model_roofline(model, np.tile(half, (250, 1)), GPUS[gpu]).rows:
        if row.model == "executed":
            assert row.router_ms * 1e-3 * GPUS[gpu].fp32 / row.flops == pytest.approx(0.010, abs=5e-4)
            assert row.router_ms / row.step_ms == pytest.approx(share, abs=2e-3)


def test_a_gpu_that_computes_at_no_cost_is_bound_by_memory(make_bundle):
    found = inspect_bundle(make_bundle().path, "H100")
    assert {row.bound for row in found.roofline.rows} == {Bound.MEMORY}  # 64 channels: a few operations a byte
    for row in found.roofline.rows:
        assert row.step_ms / 1e3 == pytest.approx(row.nbytes / GPUS["H100"].bandwidth)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"plan": PlanKind.PER_STEP},
        {"plan": PlanKind.DYNAMIC_WIDTH},
        {"routing": Routing.CAPACITY, "capacities": (3, 5, 9)},
        {"routing": Routing.DENSE},
    ],
)
def test_executed_rows_are_the_plan_s(make_bundle, settings):
    bundle = make_bundle(**settings)
    manifest = bundle.manifest
    found = inspect_bundle(bundle.path, "H200")
    for row, static in zip(rows_of(found, "executed"), rows_of(found, "static"), strict=True):
        weights = [manifest.subnets[segment.subnet].weight_bytes for segment in manifest.plan.segments]
        counts = [segment.count for segment in manifest.plan.segments]
        assert row.weight_bytes == pytest.approx(np.average(weights, weights=counts))
        assert static.flops >= 2 * static.rows * static_macs(manifest.model)
        if "capacities" not in settings:
            routers = row.flops - 2 * row.rows * manifest.plan.macs / manifest.sampling.steps
            assert 0 < routers < 0.1 * row.flops
            assert 0 < row.router_ms < 1e3 * routers / GPUS["H200"].fp32, "the rest is the embedding and the last layer"
        assert static.router_ms == 0
    words = found.roofline.tokens
    assert ("slots" in words) == ("capacities" in settings) and ("dense" in words) == (
        settings.get("routing") == "dense"
    )


def test_slots_save_operations(make_bundle):
    few = inspect_bundle(make_bundle(routing=Routing.CAPACITY, capacities=(3, 5, 9)).path, "H200")
    every = inspect_bundle(make_bundle(routing=Routing.CAPACITY).path, "H200")
    for one, other in zip(rows_of(few, "executed"), rows_of(every, "executed"), strict=True):
        assert one.flops < other.flops and one.nbytes < other.nbytes and one.weight_bytes == other.weight_bytes


def test_a_checkpoint_is_estimated_in_fp16_as_its_exact_plan(make_checkpoint, make_bundle):
    ours = inspect_checkpoint(make_checkpoint().path, steps=12, roofline="L40S")
    exact = inspect_bundle(make_bundle(plan=PlanKind.PER_STEP, precision=Precision.FP16).path, "L40S")
    for one, other in zip(ours.roofline.rows, exact.roofline.rows, strict=True):
        assert (one.batch, one.rows, one.model, one.bound) == (other.batch, other.rows, other.model, other.bound)
        for value in ("flops", "nbytes", "weight_bytes", "intensity", "step_ms", "images_per_second"):
            assert getattr(one, value) == pytest.approx(getattr(other, value), rel=1e-12)
    assert inspect_checkpoint(make_checkpoint().path, steps=12).roofline is None


def test_json_holds_the_table_and_text_says_what_is_counted(make_bundle):
    found = inspect(make_bundle().path, "RTX4090")
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert RooflineFacts.parse(values["roofline"]) == found.roofline
    assert "roofline" not in inspect(make_bundle().path).to_json()
    lines = found.text().splitlines()
    assert lines[-2].startswith("Counted: weights once a step") and "not measurements" in lines[-2]
    assert lines[-1] == "Executed: all tokens, because token routing is not known before sampling."
    assert sum(line.split()[1:2] == ["executed"] for line in lines) == 3


def test_what_a_gpu_cannot_do_is_refused(make_bundle):
    with pytest.raises(ConfigError, match=r"'B9000'.*A100, H100"):
        inspect(make_bundle().path, "B9000")
    with pytest.raises(ConfigError, match="A100 has no fp8 products; choose one of: H100"):
        GPUS["A100"].rate("float8_e4m3fn")
    assert all(math.isfinite(GPUS[name].rate("int8")) for name in GPUS)


def test_the_command(capsys, make_bundle):
    assert main(["inspect", "--preset", "imagenet256-H/2", "--roofline", "a100", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["kind"] == "preset" and values["roofline"]["gpu"] == "A100"
    assert values["model"]["static_macs"] == inspect_preset("imagenet256-H/2").facts.model.static_macs
    for arguments, words in (
        (["--preset", "XL/3"], "XL/4, XL/8"),
        (["--preset", "DiT-XL/2", str(make_bundle().path)], "remove CHECKPOINT|BUNDLE"),
        (["--preset", "DiT-XL/2", "--roofline", "H9"], "H9"),
    ):
        assert main(["inspect", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1 and words in captured.err
