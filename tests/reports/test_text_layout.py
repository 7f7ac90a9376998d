"""Pictures keep their texts apart and inside, whatever they have to show."""

from __future__ import annotations

import numpy as np
import pytest

from dydit.bundle.stored_weights import Precision
from dydit.diffusion.process import Process
from dydit.diffusion.samplers import SamplerConfig
from dydit.models.dit.config import DiTConfig
from dydit.parity.tolerances import of_latents, tolerances
from dydit.reports.bench_report import BenchReport, NotRun, Side, SideKind, SideResult
from dydit.reports.inspection_facts import PlanRow
from dydit.reports.parity_report import Check, FlippedImage, ParityReport, Status
from dydit.reports.plots import errors_png, latency_png, parity_png, plan_png, ranking_png
from dydit.reports.plots_masks import masks_png, tokens_png
from dydit.reports.plots_samples import samples_png, side_by_side_png
from dydit.reports.results import Machine

pytestmark = pytest.mark.usefixtures("layout")
RNG = np.random.default_rng(3)
LONG = "a/very/long/path/to/where/somebody/keeps/bundles-of-many-kinds/dynamic-250-steps-32-subnetworks-$x$"


def plan_row(segments, subnets, cost, size):
    facts = {"versus_exact": 1.0, "versus_static": 1.0, "weight_bytes": size}
    return PlanRow(segments=segments, subnets=subnets, macs=cost, ms=cost, **facts)


def times(steps: int) -> list[float]:
    return SamplerConfig(steps=steps).times(Process()).tolist()


def parity(precision: str, steps: int, images: int, flips: int = 0, level: float = 0.3, latents: bool = False):
    """A report whose curves end at `level` times the tolerances."""
    table, checks = tolerances(Precision(precision)), []
    compared = tuple(sorted({*range(0, steps, 7), steps - 1}))
    for name, tolerance in table.items():
        tolerance = of_latents(tolerance) if latents and name == "run" else tolerance
        curve: tuple[float, ...] = ()
        if name in ("sliced", "step", "run"):
            count = steps if name == "run" else len(compared)
            curve = tuple((level * tolerance.limit * np.geomspace(0.01, 1, count)).tolist())
        flipped = tuple(
            FlippedImage(image=i, step=0, timestep=999, block=0, margin=1e-6, tie=True, flips=flips, value=0.0123)
            for i in range(images if flips else 0)
        )
        sets_aside = tolerance.near_tie is not None
        checks.append(
            Check(
                **{
                    "name": name,
                    "title": tolerance.title,
                    "measure": tolerance.measure,
                    "tolerance": tolerance.limit,
                    "reason": tolerance.reason,
                },
                **{"status": Status.PASSED, "detail": "fine", "worst": curve[-1] if curve else 0.0},
                **{"per_step": curve, "decisions": 12_800 if curve else 0, "flips": flips if curve else 0},
                per_step_flips=tuple(flips for _ in curve),
                flipped_images=flipped if curve and sets_aside else (),
                **{"decibels": tolerance.decibels, "sets_aside": sets_aside},
            )
        )
    return ParityReport(
        **{"bundle": "b", "checkpoint": "c", "backend": "onnxruntime", "threads": 1, "device": "cpu", "seed": 0},
        **{"labels": (0,) * images, "cfg_scale": 2.0, "steps": steps, "sampler": "ddpm", "routing": "dynamic"},
        **{"precision": precision, "steps_compared": compared, "timesteps": tuple(times(steps))},
        **{"stale_reasons": (), "checks": tuple(checks), "evaluations": 2 * steps, "repeated_steps": flips},
        **{"token_share": (), "flops_ratio": (), "machine": Machine.here(), "seconds": 1.0},
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize(("steps", "images", "flips", "level"), [(1, 1, 0, 0.9), (250, 100, 305, 0.001)])
def test_parity(precision, steps, images, flips, level):
    parity_png(parity(precision, steps, images, flips, level, latents=images > 2))


def test_parity_that_fails_at_length():
    report = parity("int8", 12, 2)
    failed = report.checks[4].model_copy(update={"status": Status.FAILED, "detail": "a reason of many words; " * 12})
    parity_png(report.model_copy(update={"checks": (*report.checks[:4], failed)}))
    parity_png(report.model_copy(update={"checks": (report.checks[0].model_copy(update={"status": Status.FAILED}),)}))


def side(name, ms, kind=SideKind.BUNDLE, spread=1.1, overflows=0, macs=50.0, **more):
    rounds = (ms / spread, ms, ms * spread)
    return SideResult(
        side=Side(name=name, kind=kind, path=name, **more),
        **{"load_seconds": 0.1, "subnets_loaded": 1, "round_ms": rounds, "step_ms": rounds, "median_ms": ms},
        **{"min_ms": rounds[0], "max_ms": rounds[2], "peak_bytes": 1 << 20, "images_per_second": 1.0},
        **{"overflows": overflows, "token_share": (0.5,), "flops_ratio": (0.5,), "macs": macs, "precision": "fp32"},
    )


def bench(*sides, **changes):
    from dydit.bench.bench import compare_sides

    values = {
        **{"batch": 4, "cfg_scale": 2.0, "latents": "run", "threads": 2, "repeats": 3, "warmup": 1, "seed": 0},
        **{"steps": 12, "steps_measured": (0, 11), "timesteps": (999, 0), "load_average": (0.1, 0.2), "seconds": 1.0},
    }
    pairs = tuple(compare_sides(sides[0], other) for other in sides[1:])
    return BenchReport(**{**values, **changes}, sides=sides, comparisons=pairs, machine=Machine.here())


SIDES = {
    "alone": [side("dynamic", 0.001)],
    "close": [side("dynamic", 17.9), side("static", 18.0, macs=51.0)],
    "far": [side("dynamic", 1.0), side("static", 4000.0, macs=100.0), side("eager", 9000.0, SideKind.TORCH_MASKED)],
    "slower": [side("dynamic", 40.0, macs=200.0), side("static", 18.0, macs=50.0)],
    "other kinds": [side("dynamic", 10.0, backend="torch"), side("eager", 40.0, SideKind.TORCH_STATIC, spread=2)],
    "long names": [side(LONG, 1234.5, overflows=4), side(f"another/{LONG}", 2234.5, overflows=1, macs=80.0)],
    "many": [side(f"side {k}", 10.0 + k, macs=50.0 + k) for k in range(14)],
}


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
def test_latency(sides):
    report = bench(*sides, not_run=(NotRun(name=LONG, reason="no compiler"),) if len(sides) == 2 else ())
    latency_png(report)
    ranking_png(report, report.comparisons[0] if report.comparisons else None)
    errors = {"relative_l2": 1.2e-5, "psnr": 101.2}
    held = tuple(each.model_copy(update=errors) for each in report.sides)
    errors_png(report.model_copy(update={"sides": held, "reference": held[0].side.name}))


@pytest.mark.parametrize(("most", "static", "at"), [(1, 1.0, 0), (1, 3.0, 0), (2, 1.02, 0), (9, 3.0, 4), (70, 3.0, -1)])
def test_plans(most, static, at):
    curve = [plan_row(k, k, 1 + (static - 1) * (most - k) / (most * k), 2**28 * k) for k in range(1, most + 1)]
    plan_png(curve, curve[at], curve[-1].macs, static, timed=True)


@pytest.mark.parametrize(("steps", "depth", "units", "density"), [(1, 2, 3, 0), (2, 1, 1, 1), (250, 28, 16, 1)])
def test_masks(steps, depth, units, density):
    axis = DiTConfig(hidden_size=4 * units, depth=depth, num_heads=units, patch_size=2, input_size=8).units
    masks_png(RNG.random((steps, axis.size)) < density, axis, times(steps))


@pytest.mark.parametrize(
    ("shown", "depth", "rows", "side"), [(1, 1, 1, 1), (2, 28, 1, 8), (6, 6, 6, 8), (6, 12, 2, 16)]
)
def test_tokens(shown, depth, rows, side):
    tokens = RNG.random((shown, depth, rows, side**2)) < 0.5
    images = RNG.standard_normal((rows, 4, 2 * side, 2 * side)).clip(-1, 1)
    tokens_png(images, tokens, times(shown), [f"class {999 - row}" for row in range(rows)])


@pytest.mark.parametrize("classes", [1, 40])
def test_samples(classes):
    samples_png(np.zeros((classes, 3, 8, 8)), range(classes))


@pytest.mark.parametrize(
    "columns", [["a"], ["Animals & Nature", "People & Body"] * 4, ["smiling face with sunglasses"] * 8]
)
def test_models_side_by_side(columns):
    shape = (2, len(columns), 3, 8, 8)
    side_by_side_png({"static": np.zeros(shape), "dynamic": np.zeros(shape)}, columns)
