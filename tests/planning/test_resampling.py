"""Other steps and samplers for a bundle that exists: masks are the model's, and what cannot be served is refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.bundle.manifest import PlanKind, Routing
from dydit.diffusion.process import Process
from dydit.diffusion.samplers import Sampler, SamplerChoice, Spacing
from dydit.errors import ConfigError
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.models.config import Routers
from dydit.parity.parity import ParityConfig, run_parity
from dydit.planning.masks import freeze_masks
from dydit.planning.resampling import resampled, step_masks, with_run
from dydit.reports.parity_report import Status

PLANS = [PlanKind.PER_STEP, PlanKind.MAX_SUBNETS]


@pytest.mark.parametrize("routers", [Routers.FIRST_ON, Routers.ALL_ROUTED])
@pytest.mark.parametrize("process", [None, Process(schedule="flow", prediction="velocity")], ids=["dit", "flow"])
def test_masks_of_all_timesteps_are_those_of_the_model(make_bundle, make_checkpoint, small_config, routers, process):
    """The stored routers, in float64, decide as the model's own in fp32, but for logits that are all but 0."""
    checkpoint = make_checkpoint(small_config.model_copy(update={"routers": routers, "process": process}))
    bundle = make_bundle(checkpoint, plan=PlanKind.DYNAMIC_WIDTH)
    times = np.linspace(0, 1, 101) if process else np.arange(0, 1000, 7)
    times = times.astype(np.float32)
    expected = freeze_masks(checkpoint.width_router_model(), times)
    order = [part.start + unit for part, units in small_config.units.zip(bundle.manifest.unit_order) for unit in units]
    masks = step_masks(bundle, times)
    assert 0 < masks.mean() < 1 and len(np.unique(masks, axis=0)) > 2
    assert (masks != expected[:, order]).mean() < 1e-4


def test_a_resampled_bundle_is_the_one_that_an_export_would_be(make_bundle):
    """But for the order of units, which belongs to the steps of its own export."""
    choice = {"steps": 7, "sampler": "dpm-solver++", "spacing": "trailing"}
    ours = resampled(make_bundle(plan=PlanKind.DYNAMIC_WIDTH), SamplerChoice(**choice)).manifest
    theirs = make_bundle(plan=PlanKind.DYNAMIC_WIDTH, **choice).manifest
    assert ours.sampling == theirs.sampling and ours.sampling.multistep
    assert np.array_equal(ours.checkpoint_masks(), theirs.checkpoint_masks())
    assert ours.plan == theirs.plan
    assert [subnet.weight_bytes for subnet in ours.subnets] == [subnet.weight_bytes for subnet in theirs.subnets]


@settings(max_examples=10)
@given(st.data())
def test_any_run_of_the_bundle_is_valid_and_has_its_own_digest(make_bundle, data):
    """A manifest checks itself; so this is a law of masks, segments and subnetworks."""
    bundle = make_bundle(plan=PlanKind.DYNAMIC_WIDTH)
    steps, sampler = data.draw(st.integers(1, 1000)), data.draw(st.sampled_from(["ddpm", "ddim", "dpm-solver++"]))
    spacing = data.draw(st.sampled_from([None, *Spacing]))
    choice = SamplerChoice(steps=min(steps, 900), sampler=sampler, spacing=spacing)
    other = resampled(bundle, choice)
    manifest = other.manifest
    assert manifest.sampling.steps == len(manifest.masks) == choice.steps
    assert manifest.executed_masks().shape == manifest.step_masks().shape
    assert (manifest.executed_masks() == manifest.step_masks()).all()  # exactly the units of each step
    assert manifest.digest == manifest.compute_digest()
    assert (manifest.digest == bundle.manifest.digest) == (manifest.sampling == bundle.manifest.sampling)
    assert with_run(other, bundle.manifest.sampling.config).manifest.masks == bundle.manifest.masks


@pytest.mark.parametrize("plan", PLANS)
def test_subnetworks_refuse_other_timesteps_in_one_line(make_bundle, plan):
    bundle = make_bundle(plan=plan)
    with pytest.raises(ConfigError, match="made for 12 steps of ddpm") as error:
        resampled(bundle, SamplerChoice(steps=5, sampler=Sampler.DPM_SOLVER))
    assert "\n" not in str(error.value)
    assert "--dynamic-width" in str(error.value) and "--steps 5 --sampler dpm-solver++" in str(error.value)


@pytest.mark.parametrize("plan", PLANS)
def test_subnetworks_serve_another_sampler_of_the_same_timesteps(make_bundle, plan):
    """DDPM and DDIM visit the same ones."""
    bundle = make_bundle(plan=plan)
    other = resampled(bundle, SamplerChoice(sampler=Sampler.DDIM, eta=0.5)).manifest
    theirs = make_bundle(plan=plan, sampler="ddim", eta=0.5).manifest
    assert other.sampling == theirs.sampling
    assert other.plan == bundle.manifest.plan and other.subnets == bundle.manifest.subnets


def test_a_static_model_takes_any_steps_whatever_its_plan(make_bundle, make_checkpoint, small_config):
    checkpoint = make_checkpoint(small_config.without_routers())
    bundle = make_bundle(checkpoint, plan=PlanKind.PER_STEP)
    other = resampled(bundle, SamplerChoice(steps=5)).manifest
    assert other.step_masks().all() and len(other.subnets) == 1 and other.sampling.steps == 5


def test_nothing_changes_without_a_choice(make_bundle):
    bundle = make_bundle(plan=PlanKind.DYNAMIC_WIDTH)
    assert resampled(bundle, SamplerChoice()) is bundle
    assert resampled(bundle, SamplerChoice(steps=12, sampler=Sampler.DDPM)) is bundle


def test_another_sampler_leaves_spacing_and_eta_behind(make_bundle):
    """They are settings of the sampler of the export."""
    bundle = make_bundle(plan=PlanKind.DYNAMIC_WIDTH, sampler="ddim", eta=0.3, spacing="trailing")
    config = resampled(bundle, SamplerChoice(sampler=Sampler.DPM_SOLVER)).manifest.sampling.config
    assert (config.eta, config.spacing, config.steps) == (0, None, 12)
    kept = resampled(bundle, SamplerChoice(steps=6)).manifest.sampling.config
    assert (kept.eta, kept.spacing, kept.sampler) == (0.3, Spacing.TRAILING, Sampler.DDIM)


@pytest.mark.parametrize("routing", [Routing.DYNAMIC, Routing.CAPACITY, Routing.DENSE])
def test_a_resampled_run_is_the_model(make_bundle, make_checkpoint, routing):
    capacities = (5, 9, 7) if routing is Routing.CAPACITY else None
    bundle = make_bundle(plan=PlanKind.DYNAMIC_WIDTH, routing=routing, capacities=capacities)
    sampling = SamplerChoice(steps=6, sampler=Sampler.DPM_SOLVER)
    report = run_parity(bundle, make_checkpoint(), ParityConfig(threads=1, sampling=sampling))
    assert report.ok, report.summary
    assert (report.steps, report.sampler) == (6, "dpm-solver++")


def test_a_spoilt_router_is_found(make_checkpoint, tmp_path, monkeypatch):
    """Parity compares masks with the model's, so masks from a wrong router do not pass."""
    checkpoint = make_checkpoint()
    bundle = export(checkpoint, tmp_path / "bundle", ExportConfig(steps=12, plan=PlanKind.DYNAMIC_WIDTH))
    entry = bundle.manifest.weights["width.bias"]
    file = bundle.path / "weights.bin"
    with open(file, "r+b") as opened:
        opened.seek(entry.offset)
        opened.write(np.full(entry.shape, -1, np.float32).tobytes())
    bundle = dataclasses.replace(bundle, stamps={})
    config = ParityConfig(threads=1, sampling=SamplerChoice(steps=5))
    report = run_parity(bundle, checkpoint, config)
    assert not report.ok and {check.name for check in report.checks if check.status is Status.FAILED} >= {
        "masks",
        "weights",
    }


def test_commands_run_other_steps(make_bundle, run, tmp_path):
    bundle = make_bundle(plan=PlanKind.DYNAMIC_WIDTH)
    chosen = ("--steps", "5", "--sampler", "dpm-solver++", "--timestep-spacing", "trailing", "--threads", "1")
    done = run("sample", bundle.path, "--labels", "0-3", "--out", tmp_path / "out", *chosen)
    assert done.code == 0, done.err
    facts = json.loads((tmp_path / "out" / "samples.json").read_text())["settings"]
    assert (facts["steps"], facts["sampler"]) == (5, "dpm-solver++")
    again = run("sample", bundle.path, "--labels", "0-3", "--out", tmp_path / "out", "--threads", "1")
    assert again.code == 2 and "steps: 5 in the folder, 12 requested" in again.err
    refused = run("sample", make_bundle().path, "--labels", "0", "--out", tmp_path / "refused", "--steps", "5")
    assert refused.code == 2 and "--dynamic-width" in refused.err and not (tmp_path / "refused").exists()
    wrong = run("sample", bundle.path, "--labels", "0", "--out", tmp_path / "refused", "--sampler", "euler")
    assert wrong.code == 2 and "does not fit this model" in wrong.err and not (tmp_path / "refused").exists()
