"""What a profile finds: fits that give back what made the data, and on the backend itself costs that hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dydit
from dydit.bench.timing import settled_bytes
from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind, Routing, parse_manifest
from dydit.bundle.measurements import GroupTimes, Measured, Residency, StepTimes
from dydit.bundle.stored_weights import Precision
from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.diffusion.steps import State
from dydit.errors import BackendError, ConfigError, UnsupportedError
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.planning import profile as profiling
from dydit.planning.costs import time_costs
from dydit.planning.plan import Plan, merged_plan, plan_cost
from dydit.planning.profile import ProfileConfig, run_profile
from dydit.planning.profile_fit import MARGIN, WORKSPACES, fit_residency, fit_times, non_negative
from dydit.planning.profile_points import profile_points, token_share, write_profile_bundle
from dydit.planning.sizes import PlanSizes, fixed_bytes, unit_bytes
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.loop import StepRunner
from dydit.runtime.resident import ResidentSubnets

LAW = settings(max_examples=25, deadline=None)
DIGITS = Path(dydit.__file__).parent / "assets" / "digits" / "dydit.safetensors"
SETTINGS = {"backend": "onnxruntime", "rows": 2}
TIMES = {**SETTINGS, "threads": 1, "token_share": 0.5}
needs_smaps = pytest.mark.skipif(settled_bytes() is None, reason="this system has no /proc/self/smaps_rollup")


GROUPS = ("heads", "groups")
TIME_TERMS = ("fixed", "block", "any heads", "heads", "any groups", "groups")


def step_ms(point, terms: dict[str, float]) -> float:
    each = sum(
        terms[f"any {name}"] * (count > 0) + terms[name] * count
        for name, count in zip(GROUPS, point.counts, strict=True)
    )
    return terms["fixed"] + point.depth * (terms["block"] + each)


# Fits


@LAW
@given(st.integers(0, 2**32 - 1))
def test_non_negative_least_squares(seed):
    """Exact where the truth is not negative; else no other choice of non-negative coefficients nearby is better."""
    rng = np.random.default_rng(seed)
    columns, truth = rng.random((12, 4)), rng.random(4) * (rng.random(4) < 0.7)
    np.testing.assert_allclose(non_negative(columns, columns @ truth), truth, atol=1e-9)
    values = rng.standard_normal(12)
    found = non_negative(columns, values)
    assert (found >= 0).all()
    least = np.sum((values - columns @ found) ** 2)
    for _ in range(20):
        other = np.maximum(found + 0.1 * rng.standard_normal(4), 0)
        assert np.sum((values - columns @ other) ** 2) >= least - 1e-9


@LAW
@given(st.integers(2, 16), st.integers(2, 16), st.lists(st.floats(0.01, 5), min_size=6, max_size=6))
def test_times_that_are_linear_are_found(heads, groups, numbers):
    terms = dict(zip(TIME_TERMS, numbers, strict=True))
    points = [point for point in profile_points([heads, groups]) if point.timed]
    ms = [[step_ms(point, terms) * factor for factor in (1, 1, 40)] for point in points]
    found = fit_times(points, GROUPS, ms, **TIMES)
    fitted = {"fixed": found.fixed, "block": found.block}
    for name in GROUPS:
        fitted |= {f"any {name}": found.groups[name].any, name: found.groups[name].unit}
    assert fitted == pytest.approx(terms, rel=1e-6), "an outlier moves no median"
    assert found.deviation < 1e-6 and found.token_share == 0.5


@pytest.mark.parametrize("term", GROUPS)
def test_times_that_fall_with_width_are_refused(term):
    terms = dict.fromkeys(TIME_TERMS, 1.0) | {term: -0.05, "fixed": 10.0}
    points = [point for point in profile_points([8, 8]) if point.timed]
    with pytest.raises(ConfigError, match=f"do not grow with the number of {term} .* use --cost macs"):
        fit_times(points, GROUPS, [[step_ms(point, terms)] for point in points], **TIMES)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_memory_that_is_linear_is_found(small_config, precision):
    """A process that grows as `PlanSizes` says, subnetwork by subnetwork, gives back what made it grow."""
    model = small_config.model_copy(update={"hidden_size": 256, "num_heads": 8})
    truth = Residency.model_validate(
        {**SETTINGS, "workspace": 0, "deviation": 0, "margin": 0}
        | {"subnet": 40_000, "block": 9_000, "mapped": 0.5, "joined": 1.25, "shared": 1.0}
    )
    points, settled, before = profile_points([model.num_heads] * 2), [], 0
    for depth in dict.fromkeys(point.depth for point in points):
        cut, masks = model.model_copy(update={"depth": depth}), []
        bounds = [0]
        for point in (each for each in points if each.depth == depth):
            masks.append(point.masks(model))
            bounds.append(bounds[-1] + len(masks[-1]))
            so_far = np.concatenate(masks)
            sizes = PlanSizes(cut.units, so_far, unit_bytes(cut, precision), fixed_bytes(cut, precision))
            settled.append(10**7 + before + sizes.resident(Plan(tuple(bounds), 0.0), truth))
        before = settled[-1] - 10**7
    found = fit_residency(points, model, precision, settled, 1000, **SETTINGS)
    for name in ("subnet", "block", "mapped", "joined", "shared"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=1e-3)
    assert found.workspace == WORKSPACES * 1000 and found.margin == MARGIN and found.deviation < 1e-4


# What is run


@pytest.mark.parametrize("routing", [Routing.DYNAMIC, Routing.CAPACITY, Routing.DENSE])
def test_exactly_the_wanted_share_of_tokens_is_routed(small_config, tmp_path, routing):
    points = [point for point in profile_points([small_config.num_heads] * 2) if point.depth > 1]
    config = ExportConfig(routing=routing, capacities=(8, 8, 8) if routing is Routing.CAPACITY else None)
    bundle = write_profile_bundle(tmp_path / "bundle", points, small_config, config, 0.25)
    assert len(bundle.manifest.plan.segments) == len(points) == len(bundle.manifest.subnets)
    backend = open_backend("onnxruntime", bundle)
    labels, x = np.zeros(2, np.int64), np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    with ResidentSubnets(backend, debug=True) as subnets:
        runner = StepRunner(backend, subnets, labels, 4.0)
        for point, segment in zip(points, bundle.manifest.plan.segments, strict=True):
            entry = bundle.manifest.subnets[segment.subnet]
            assert {tuple(map(len, block)) for block in entry.units} == {point.counts}
            assert entry.gated == point.gated
            for step in segment.steps:
                result = runner.run(step, State(x), x, labels)
                assert (result.tokens.mean(axis=-1) == 0.25).all() and np.isfinite(result.x_prev).all()
                assert not result.overflow.any()


def test_the_share_of_tokens_is_the_models(make_checkpoint, small_config):
    low, middle, high = (token_share(make_checkpoint(flops_ratio=ratio)) for ratio in (0.3, 0.6, 1.0))
    assert 1 / 16 <= low < middle < high and 0.9 < high <= 1
    assert token_share(make_checkpoint(small_config.without_routers())) == 1


# On the backend


@pytest.fixture(scope="module")
def digits():
    return load_checkpoint(DIGITS)


GIVEN = Measured(
    times=StepTimes(
        **TIMES,
        fixed=0.2,
        block=0.05,
        groups={"heads": GroupTimes(any=0.1, unit=0.03), "groups": GroupTimes(any=0.1, unit=0.04)},
        deviation=0.02,
    ),
    residency=Residency(
        **SETTINGS,
        **{"workspace": 1_000_000, "subnet": 40_000, "block": 9_000, "mapped": 0.5, "joined": 1.25, "shared": 1.0},
        **{"deviation": 0.01, "margin": MARGIN},
    ),
)
"""What a profile may have found: the plans made of it are the same on every machine."""


def test_every_point_is_measured_in_some_rounds(digits, monkeypatch):
    """What comes out of the process that measures. Whether times grow with width, on this machine and at this moment,
    is for the fit to say, which refuses them where they do not."""
    seen = {}

    def fit(points, groups, ms, **settings):
        seen.update(points=points, groups=groups, ms=ms, settings=settings)
        return GIVEN.times

    def fit_memory(points, model, precision, settled, workspace, **settings):
        seen.update(settled=settled, workspace=workspace)
        return GIVEN.residency

    monkeypatch.setattr(profiling, "fit_times", fit)
    monkeypatch.setattr(profiling, "fit_residency", fit_memory)
    memory = settled_bytes() is not None
    found = run_profile(digits, ExportConfig(), ProfileConfig(threads=1, seconds=0.1), memory=memory)
    assert found.times == GIVEN.times and seen["settings"]["threads"] == 1
    assert seen["groups"] == ["heads", "groups"]
    points = profile_points([digits.config.num_heads] * 2)
    assert len(seen["ms"]) == len(seen["points"]) == sum(point.timed for point in points)
    assert all(5 <= len(rounds) <= 41 and min(rounds) > 0 for rounds in seen["ms"])
    if memory:
        assert len(seen["settled"]) == len(points) and min(seen["settled"]) > 0 and seen["workspace"] >= 0


def test_measured_times_make_the_plan_and_are_kept_with_it(digits, tmp_path):
    measured = Measured(times=GIVEN.times)
    bundle = export(digits, tmp_path / "bundle", ExportConfig(max_subnets=6), measured=measured)
    plan, masks = bundle.manifest.plan, bundle.masks
    costs = time_costs(measured.times, digits.config)
    best = merged_plan(masks, costs, 6)
    assert [segment.first for segment in plan.segments] == list(best.bounds[:-1])
    assert plan.measured.times == measured.times and plan.measured.ms == pytest.approx(best.cost)
    assert plan.measured.per_step_ms <= plan.measured.ms <= plan.measured.static_ms
    assert plan.per_step_macs <= plan.macs <= plan.static_macs
    assert parse_manifest(bundle.path / "manifest.json") == bundle.manifest
    assert plan_cost(best, masks, costs) == pytest.approx(best.cost)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_measured_memory_makes_the_plan_and_is_kept_with_it(digits, precision, tmp_path):
    """The more memory, the fewer multiply-adds; never more memory than the budget, by the figures that were given."""
    plans, measured = [], Measured(residency=GIVEN.residency)
    for budget in (12 * 2**20, 24 * 2**20):
        config = ExportConfig(plan=PlanKind.MEMORY_BUDGET, memory_budget=budget, precision=precision)
        bundle = export(digits, tmp_path / str(budget), config, measured=measured)
        plans.append(bundle.manifest.plan)
        assert plans[-1].measured.resident_bytes <= budget and plans[-1].measured.times is None
        assert plans[-1].measured.residency == GIVEN.residency
    assert 1 < len(plans[0].segments) < len(plans[1].segments) and plans[0].macs > plans[1].macs


LOAD_ALL = """
import sys, numpy as np
from dydit.bundle.bundle import Bundle
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.loop import StepRunner
from dydit.runtime.resident import ResidentSubnets
from dydit.bench.timing import settled_bytes
from dydit.diffusion.steps import State
bundle = Bundle.open(sys.argv[1])
backend = open_backend("onnxruntime", bundle, BackendOptions(threads=1))
labels, model = np.zeros(1, np.int64), bundle.manifest.model
x = np.random.default_rng(0).standard_normal((1, model.in_channels, model.input_size, model.input_size))
x = x.astype(np.float32)
subnets = ResidentSubnets(backend)
runner = StepRunner(backend, subnets, labels, 4.0)
runner.feeds(0, State(x), x, labels)
before = settled_bytes()
for segment in bundle.manifest.plan.segments:
    runner.run(segment.first, State(x), x, labels)
assert len(subnets) == len(bundle.manifest.subnets)
print(settled_bytes() - before)
"""


@pytest.mark.release
@needs_smaps
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_a_memory_budget_holds_in_a_fresh_process(digits, precision, tmp_path):
    """With all subnetworks loaded and run, on a machine that does nothing else: this is a figure of the machine. The
    budget is that of subnetworks: Python, onnxruntime and the conditioning, which every plan has, are not in it."""
    budget = 30 * 2**20
    config = ExportConfig(plan=PlanKind.MEMORY_BUDGET, memory_budget=budget, precision=precision)
    found = run_profile(digits, config, ProfileConfig(threads=1), times=False)
    bundle = export(digits, tmp_path / "bundle", config, measured=found)
    plan = bundle.manifest.plan
    assert plan.measured.resident_bytes <= budget and plan.measured.times is None
    assert len(bundle.manifest.subnets) > 1
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALL, str(bundle.path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) <= budget


def test_a_bundle_of_multiply_adds_says_nothing_of_measurements(make_bundle):
    bundle: Bundle = make_bundle()
    assert bundle.manifest.plan.measured is None
    assert "measured" not in json.loads((bundle.path / "manifest.json").read_text())["plan"], "as older bundles"


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({"max_batch": 2}, {"batch": 3}, "cannot measure a batch of 3: the export allows at most 2"),
        ({"precision": "bf16"}, {}, "onnxruntime has no bf16 matrix products on the CPU"),
        ({}, {"backend": "nothing"}, "unknown backend 'nothing'"),
    ],
)
def test_what_cannot_be_measured_is_refused(make_checkpoint, config, settings, message):
    with pytest.raises((ConfigError, BackendError), match=message):
        run_profile(make_checkpoint(), ExportConfig.model_validate(config), ProfileConfig(**settings), memory=False)


def test_a_model_of_one_head_is_refused(make_checkpoint, small_config):
    single = make_checkpoint(small_config.model_copy(update={"num_heads": 1}))
    with pytest.raises(
        UnsupportedError, match="a unit group with one unit has only one width, so nothing can be measu"
    ):
        run_profile(single, ExportConfig(), ProfileConfig())


def test_a_worker_that_dies_is_explained(make_checkpoint, monkeypatch):
    monkeypatch.setattr(profiling, "WORKER", [sys.executable, "-c", "import sys; sys.exit('gone')"])
    with pytest.raises(BackendError, match=r"the process that measures ended: gone \(exit code 1\)"):
        run_profile(make_checkpoint(), ExportConfig(), ProfileConfig())
