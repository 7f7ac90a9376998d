"""Parity end to end: it holds for what the exporter makes, and fails, in the right place, for one thing wrong."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind, Routing, pack_mask, unpack_mask
from dydit.bundle.stored_weights import WEIGHTS
from dydit.diffusion.coefficients import COEFFICIENTS
from dydit.diffusion.samplers import Sampler
from dydit.errors import ConfigError
from dydit.models.config import Routers
from dydit.parity.parity import REPORT, ParityConfig, run_parity
from dydit.reports.parity_report import ParityReport, Status
from tests.fixtures.cpu import needs_exact_int8

pytestmark = pytest.mark.numerics

CONFIG = ParityConfig(labels=(1, 4, 7), threads=1)  # 7 is the null class
ONE = ParityConfig(labels=(2,), threads=1, every=4)


def failed(report):
    return [check.name for check in report.checks if check.status is Status.FAILED]


@pytest.mark.parametrize("routing", list(Routing))
def test_it_holds_and_is_not_vacuous(make_checkpoint, make_bundle, routing, tmp_path):
    seen = []
    report = run_parity(
        make_bundle(routing=routing), make_checkpoint(), CONFIG, tmp_path / "out", lambda *at: seen.append(at)
    )
    assert report.ok and report.first_failure is None and not report.stale_reasons, report.summary
    assert [check.name for check in report.checks] == ["masks", "weights", "sliced", "step", "run"]
    for name in ("sliced", "step", "run"):
        check = report.check(name)
        assert 0 < check.worst < check.tolerance and check.decisions == 12 * 3 * 6 * 16 and len(check.per_step) == 12
    assert len(report.check("step").per_block) == 3 and max(report.check("step").per_block) < 1e-5
    assert all(0.1 < share < 0.9 for share in report.token_share), "tokens are routed and skipped"
    assert all(0.2 < ratio < 0.9 for ratio in report.flops_ratio), "gates are open and closed"
    assert seen == [(k + 1, 48) for k in range(48)]
    values = json.loads((tmp_path / "out" / REPORT).read_text())
    assert values["ok"] is True and ParityReport.parse(values) == report


def test_the_torch_backend_and_the_exact_plan(make_checkpoint, make_bundle):
    report = run_parity(
        make_bundle(plan=PlanKind.PER_STEP), make_checkpoint(), CONFIG.model_copy(update={"backend": "torch"})
    )
    assert report.ok and report.backend == "torch", report.summary


@pytest.mark.parametrize(
    ("precision", "backend", "tolerance"),
    [
        ("fp16", "onnxruntime", 0.01778),
        ("fp16", "torch", 0.01778),
        ("bf16", "torch", 0.01778),
        pytest.param("int8", "onnxruntime", 0.05623, marks=needs_exact_int8),
    ],
)
def test_below_fp32_the_picture_counts(make_checkpoint, make_bundle, small_config, precision, backend, tolerance):
    checkpoint = make_checkpoint(small_config.model_copy(update={"in_channels": 3}))
    config = CONFIG.model_copy(update={"backend": backend, "cfg_scale": 1.5})
    report = run_parity(make_bundle(checkpoint, precision=precision), checkpoint, config)
    assert [check.name for check in report.checks][:3] == ["masks", "weights", "sliced"]
    assert all(check.status is Status.PASSED for check in report.checks[:4]), report.summary
    step, run = report.check("step"), report.check("run")
    assert 1e-5 < step.worst < step.tolerance, "it is the lower precision that runs"
    assert run.tolerance == tolerance and "PSNR" in run.detail
    assert len(run.per_image) == len(CONFIG.labels) and None not in run.per_image, "no image is set aside"


def test_a_spoilt_weight_shows_below_fp32(make_checkpoint, make_bundle, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(make_bundle(precision="fp16").path, folder)
    bundle = Bundle.open(folder)
    entry = bundle.manifest.weights["blocks.1.fc2.weight"]
    with open(folder / WEIGHTS, "r+b") as file:
        file.seek(entry.offset)
        first = np.frombuffer(file.read(2), np.float16) + np.float16(0.001)
        file.seek(entry.offset)
        file.write(first.tobytes())
    report = run_parity(Bundle.open(folder, verify=False), make_checkpoint(), ONE)
    assert failed(report) == ["weights"] and report.check("weights").departure.where.startswith(
        "blocks.1.fc2.weight: 1 of"
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"plan": PlanKind.PER_STEP, "routing": Routing.DENSE},
        {"plan": PlanKind.DYNAMIC_WIDTH},
        {"routing": Routing.CAPACITY, "capacities": (2, 16, 5)},
    ],
    ids=["merged", "per-step", "dynamic-width", "overflowing"],
)
def test_a_multistep_sampler(make_checkpoint, make_bundle, settings):
    """Each step from the reference's latents and history, and the run with its own."""
    bundle = make_bundle(steps=6, sampler=Sampler.DPM_SOLVER, **settings)
    assert bundle.manifest.sampling.multistep
    report = run_parity(bundle, make_checkpoint(), CONFIG)
    assert [check.status for check in report.checks] == [Status.PASSED] * 5, report.summary
    assert report.sampler == "dpm-solver++" and bool(report.repeated_steps) == ("capacities" in settings)
    assert all(0 < report.check(name).worst < report.check(name).tolerance for name in ("sliced", "step", "run"))


def test_a_multistep_sampler_on_torch_and_below_fp32(make_checkpoint, make_bundle, small_config):
    checkpoint = make_checkpoint(small_config.model_copy(update={"in_channels": 3}))
    for settings, backend in (({}, "torch"), ({"precision": "fp16"}, "onnxruntime")):
        bundle = make_bundle(checkpoint, steps=6, sampler=Sampler.DPM_SOLVER, **settings)
        report = run_parity(bundle, checkpoint, CONFIG.model_copy(update={"backend": backend, "cfg_scale": 1.5}))
        assert report.ok, report.summary


def test_a_static_model(make_checkpoint, make_bundle, small_config):
    checkpoint = make_checkpoint(small_config.model_copy(update={"routers": Routers.NONE}))
    report = run_parity(make_bundle(checkpoint), checkpoint, CONFIG)
    assert report.ok and report.routing is None, report.summary
    assert set(report.token_share) == {1.0} and set(report.flops_ratio) == {1.0}
    assert report.check("step").decisions == report.check("step").flips == 0


def test_tokens_without_a_slot_run_again(make_checkpoint, make_bundle):
    bundle = make_bundle(routing=Routing.CAPACITY, capacities=(2, 16, 5))
    report = run_parity(bundle, make_checkpoint(), ONE)
    assert report.ok and report.repeated_steps > 0, report.summary


def test_every_nth_step_and_the_last(make_checkpoint, make_bundle):
    report = run_parity(make_bundle(), make_checkpoint(), ParityConfig(labels=(0,), every=5, cfg_scale=1, threads=1))
    assert report.steps_compared == (0, 5, 10, 11)
    assert len(report.check("step").per_step) == 4 and len(report.check("run").per_step) == 12
    assert report.check("step").decisions == 4 * 3 * 1 * 16, "without guidance there is one row an image"


class TestOneThingWrong:
    def test_one_weight_by_a_thousandth(self, make_checkpoint, make_bundle, spoil_weight):
        """Any magnitude shows, as stored weights are compared bit for bit; here also the least there is."""
        for factor in (1.001, 1 + 2**-23):

            def change(values, factor=factor):
                index = np.abs(values).argmax()
                values[index] *= np.float32(factor)

            bundle = spoil_weight(make_bundle(), "blocks.1.fc2.weight", change)
            report = run_parity(bundle, make_checkpoint(), ONE)
            assert not report.ok and report.first_failure.name == "weights"
            departure = report.first_failure.departure
            assert departure.block == 1 and departure.where.startswith("blocks.1.fc2.weight: 1 of ")
            assert "blocks.1.fc2.weight" in report.summary

    @pytest.mark.parametrize(
        ("name", "block"), [("blocks.0.qkv.weight", 0), ("blocks.1.proj.weight", 1), ("blocks.2.fc1.weight", 2)]
    )
    def test_values_tell_a_tensor_that_is_a_thousandth_off(
        self, make_checkpoint, make_bundle, spoil_weight, name, block
    ):
        """In 12 steps x_prev is 4e-5 to 8e-5 off. (At 250 a step has a tenth of that, below the tolerance.)"""

        def change(values):
            values *= np.float32(1.001)

        report = run_parity(spoil_weight(make_bundle(), name, change), make_checkpoint(), CONFIG)
        check = report.check("step")
        assert check.status is Status.FAILED and 1e-5 < check.worst < 1e-3
        assert check.departure.block == block
        assert report.check("sliced").status is Status.PASSED, "the checkpoint itself is sound"

    def test_a_weight_that_is_not_finite(self, make_checkpoint, make_bundle, spoil_weight, tmp_path):
        def change(values):
            values[:] = np.nan

        report = run_parity(spoil_weight(make_bundle(), "blocks.2.fc2.bias", change), make_checkpoint(), ONE, tmp_path)
        assert failed(report) == ["weights", "step", "run"]
        assert report.check("step").worst is None and report.check("step").departure.block == 2
        assert ParityReport.parse(json.loads((tmp_path / REPORT).read_text())) == report

    def test_a_router_that_decides_otherwise(self, make_checkpoint, make_bundle, spoil_weight):
        def change(values):
            values += 0.05

        report = run_parity(spoil_weight(make_bundle(), "blocks.1.router.2.bias", change), make_checkpoint(), CONFIG)
        check = report.check("step")
        assert check.status is Status.FAILED and check.departure.block == 1
        assert "routed differently" in check.departure.where
        assert check.flips > 0 and not all(each.tie for each in check.flipped_images)

    def test_a_mask_bit(self, make_checkpoint, make_bundle, spoil_manifest):
        bundle = make_bundle(max_subnets=1)
        manifest = bundle.manifest
        axis = manifest.model.units
        part = next(part for part in axis.parts if (part.block, part.index) == (2, 1))
        masks = [unpack_mask(text, axis.size) for text in manifest.masks]
        masks[5][part.start + 3] ^= True
        report = run_parity(spoil_manifest(bundle, masks=tuple(map(pack_mask, masks))), make_checkpoint(), CONFIG)
        check = report.first_failure
        assert check.name == "masks" and (check.worst, check.worst_step) == (1, 5)
        assert (check.departure.step, check.departure.block) == (5, 2)
        assert f"group {manifest.unit_order[2][1][3]} is frozen as" in check.departure.where

    def test_a_timestep_or_a_coefficient(self, make_checkpoint, make_bundle, spoil_manifest):
        bundle = make_bundle()
        sampling = bundle.manifest.sampling
        timesteps = list(sampling.timesteps)
        timesteps[3] -= 1
        late = spoil_manifest(bundle, sampling=sampling.model_copy(update={"timesteps": tuple(timesteps)}))
        report = run_parity(late, make_checkpoint(), ONE)
        assert report.first_failure.name == "masks" and report.first_failure.departure.step == 3
        rows = [list(row) for row in sampling.coefficients]
        rows[4][1] *= 1.001
        wrong = spoil_manifest(bundle, sampling=sampling.model_copy(update={"coefficients": tuple(map(tuple, rows))}))
        report = run_parity(wrong, make_checkpoint(), CONFIG)
        check = report.first_failure
        assert check.name == "step" and check.departure.step == 4
        assert check.departure.block is None and "after the last block" in check.departure.where

    @pytest.mark.parametrize("name", ["history", "history_of_x", "history_of_out"])
    def test_a_coefficient_of_the_history(self, name, make_checkpoint, make_bundle, spoil_manifest):
        bundle = make_bundle(steps=6, sampler=Sampler.DPM_SOLVER)
        sampling, column = bundle.manifest.sampling, COEFFICIENTS.index(name)
        rows = [list(row) for row in sampling.coefficients]
        assert rows[2][column] != 0
        rows[2][column] *= 1.001
        wrong = spoil_manifest(bundle, sampling=sampling.model_copy(update={"coefficients": tuple(map(tuple, rows))}))
        report = run_parity(wrong, make_checkpoint(), CONFIG)
        check = report.first_failure
        assert check.name == "step" and check.departure.step == 2, report.summary
        assert check.departure.block is None and "after the last block" in check.departure.where

    def test_a_graph_that_forgets_its_history(self, make_checkpoint, make_bundle, spoil_graphs):
        def forget(graph):
            (call,) = [node for node in graph.graph.node if node.op_type == "sampler_step"]
            (place,) = [index for index, name in enumerate(call.input) if name == "history"]
            call.input[place] = "noise"  # of a sampler that adds none, so zeros

        bundle = make_bundle(steps=6, sampler=Sampler.DPM_SOLVER)
        report = run_parity(spoil_graphs(bundle, forget), make_checkpoint(), CONFIG)
        assert failed(report) == ["step", "run"]
        assert report.check("step").departure.step == 1, "the first step that has a history"

    def test_a_graph_that_reads_its_neighbours_weights(self, make_checkpoint, make_bundle, spoil_graphs):
        def shift(graph):
            (entry,) = [each for each in graph.graph.initializer if each.name.startswith("blocks.2.fc1.bias[0:")]
            offset = next(each for each in entry.external_data if each.key == "offset")
            offset.value = str(int(offset.value) + 4)

        report = run_parity(spoil_graphs(make_bundle(), shift), make_checkpoint(), CONFIG)
        assert report.first_failure.name == "step"
        assert report.first_failure.departure.block == 2


def test_a_bundle_of_another_checkpoint(make_checkpoint, make_bundle):
    report = run_parity(make_bundle(), make_checkpoint(seed=1), ONE)
    assert not report.ok and "weights changed" in report.stale_reasons[0]
    assert report.first_failure.name == "masks" and report.check("weights").status is Status.FAILED
    assert report.check("step").status is Status.FAILED and report.check("sliced").status is Status.PASSED


def test_a_bundle_of_another_architecture(make_checkpoint, make_bundle, small_config):
    report = run_parity(make_bundle(), make_checkpoint(small_config.model_copy(update={"depth": 2})), ONE)
    assert not report.ok and "the architecture differs" in report.stale_reasons
    assert (
        report.first_failure.name == "masks"
        and "depth is 3 in the bundle and 2" in report.first_failure.departure.where
    )
    assert {check.status for check in report.checks[1:]} == {Status.SKIPPED}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"labels": (8,)}, "label 8 is outside 0..7"), ({"labels": (0,) * 17}, "17 labels.*up to 16")],
)
def test_labels_that_do_not_fit(make_checkpoint, make_bundle, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_parity(make_bundle(), make_checkpoint(), ParityConfig(**changes))
