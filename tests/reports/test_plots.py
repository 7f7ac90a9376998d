"""Pictures are PNGs of sensible size whose content follows the data."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dydit.bench.bench import compare_sides
from dydit.diffusion.process import Process
from dydit.diffusion.samplers import SamplerConfig
from dydit.errors import DyditError
from dydit.models.dit.config import DiTConfig
from dydit.plot_style import ACCENT, ACCENT_LIGHT, OFF, SECOND, timestep_ticks
from dydit.reports import plots, plots_masks
from dydit.reports.bench_report import BUSY, BenchReport, NotRun, Side, SideKind, SideResult, busy
from dydit.reports.inspection_facts import PlanRow
from dydit.reports.parity_report import Check, FlippedImage, ParityReport, Status
from dydit.reports.plots import bound_of, latency_png, parity_png, plan_png, ranking_png
from dydit.reports.plots_ablations import Curve, ablations_png
from dydit.reports.plots_masks import masks_png, tokens_png
from dydit.reports.plots_samples import samples_png, side_by_side_png
from dydit.reports.results import Machine

NAVY = "#0c2f4f"
RNG = np.random.default_rng(0)


def pixels(png):
    """The picture, uint8 [H, W, 3], after the checks that hold for all of them."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(io.BytesIO(png)) as image:
        array = np.asarray(image.convert("RGB"))
    assert 250 < array.shape[0] < 2400 and 300 < array.shape[1] <= 2100
    assert array.std() > 8, "not blank"
    return array


def where(array, colour):
    """The rows of the pixels of a colour."""
    rgb = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
    return np.nonzero((array == rgb).all(axis=-1))[0]


def count(array, colour):
    return len(where(array, colour))


@pytest.fixture
def titles(monkeypatch):
    """The headlines of the pictures made in a test."""
    said = []
    for module in (plots, plots_masks):
        original = module.headline
        monkeypatch.setattr(
            module, "headline", lambda figure, *words, _real=original: (said.append(words), _real(figure, *words))
        )
    return said


def plan_row(segments, subnets, cost, size):
    facts = {"versus_exact": 1.0, "versus_static": 1.0, "weight_bytes": size}
    return PlanRow(segments=segments, subnets=subnets, macs=cost, ms=cost, **facts)


def times(steps):
    return SamplerConfig(steps=steps).times(Process()).tolist()


def axis_of(depth, units):
    model = DiTConfig(hidden_size=4 * units, depth=depth, num_heads=units, patch_size=2, input_size=8)
    return model.units


@pytest.mark.parametrize(("depth", "units", "density"), [(6, 8, 0.3), (28, 16, 0.8)])
def test_masks_are_dark_where_units_are_on(depth, units, density, titles):
    axis = axis_of(depth, units)
    masks = RNG.random((60, axis.size)) < density
    array = pixels(masks_png(masks, axis, times(60)))
    lower = array[array.shape[0] // 2 :]
    on, off = count(lower, ACCENT), count(lower, OFF)
    assert on / (on + off) == pytest.approx(masks.mean(), abs=0.05)
    ((finding, detail),) = titles
    on = axis.shares(masks)
    assert f"{on['heads']:.0%} of attention heads" in finding and f"{on['groups']:.0%} of channel groups" in finding
    assert detail.startswith("60 distinct masks in 60 steps")


def test_masks_of_one_step_and_equal_masks(titles):
    axis = axis_of(2, 3)
    pixels(masks_png(np.ones((1, axis.size), bool), axis, [999]))
    pixels(masks_png(np.ones((9, axis.size), bool), axis, times(9)))
    assert titles[1][1].startswith("1 distinct mask in 9 steps")


def test_tokens_are_light_or_dark_by_how_many_blocks_computed_them(titles):
    images = RNG.standard_normal((2, 4, 8, 8)).clip(-1, 1)
    none, every = np.zeros((3, 6, 2, 16), bool), np.ones((3, 6, 2, 16), bool)
    labels = ["class 0", "class 1"]
    light, dark = (pixels(tokens_png(images, tokens, [980, 500, 0], labels)) for tokens in (none, every))
    # The colour bar shows every colour once; six cells of tokens decide.
    assert count(light, OFF) > 10 * count(light, NAVY) > 0
    assert count(dark, NAVY) > 10 * count(dark, OFF) > 0
    assert "0% of the tokens" in titles[0][0] and "100% of the tokens" in titles[1][0]


def test_tokens_that_are_not_of_the_image_are_on_no_map():
    """Those of time and class of a U-ViT stand before the patches, and are always on."""
    images = np.zeros((2, 3, 8, 8))
    patches = RNG.random((3, 6, 2, 16)) < 0.5
    everything = np.concatenate([np.ones((3, 6, 2, 2), bool), patches], -1)
    labels = ["class 0", "class 1"]
    alone, beside = (pixels(tokens_png(images, each, [980, 500, 0], labels)) for each in (patches, everything))
    for colour in (OFF, NAVY):
        assert count(alone, colour) == pytest.approx(count(beside, colour), rel=0.02, abs=50)


def test_an_image_of_one_channel_lies_over_its_tokens_as_an_outline():
    image = np.full((1, 1, 16, 16), -1.0)
    tokens = np.ones((1, 2, 1, 64), bool)
    empty = count(pixels(tokens_png(image, tokens, [0], ["a"])), SECOND)
    image[:, :, 4:12, 4:12] = 1
    assert count(pixels(tokens_png(image, tokens, [0], ["a"])), SECOND) > empty + 100


def test_tokens_show_the_share_that_they_are_told(titles):
    tokens = np.ones((1, 2, 1, 16), bool)
    tokens_png(np.zeros((1, 1, 8, 8)), tokens, [0], ["a"], share=0.25)
    assert titles[0][0].startswith("25% of the tokens")


def test_samples_stand_in_the_column_of_their_class():
    images = np.full((4, 1, 8, 8), -1.0)
    images[[1, 3]] = 1  # both of class 7
    array = pixels(samples_png(images, [2, 7, 2, 7]))
    middle = array.shape[1] // 2
    left, right = array[80:, 10 : middle - 20], array[80:, middle + 20 : -10]
    assert np.median(left) == 0 and np.median(right) == 255
    pixels(samples_png(np.zeros((5, 3, 8, 8)), [0, 1, 2, 0, 1]))


def test_the_plan_marks_its_choice_and_says_what_it_costs(titles):
    curve = [plan_row(k, k, 100 + 50 / k, 2**20 * k) for k in (1, 2, 4, 8, 16)]
    array = pixels(plan_png(curve, curve[2], 100.0, 160.0))
    assert count(array, SECOND) > 100
    finding, detail = titles[0]
    assert finding == "4 subnetworks cost 12.5% more multiply-adds than the exact masks"
    held = "the subnetworks hold 4.00 MiB of weights"
    assert detail == f"4 segments of steps; {held}; the 16 subnetworks of the exact masks would hold 16.0 MiB"
    pixels(plan_png(curve[:1], curve[0], 150.0, 150.0))
    assert titles[1][0] == "1 subnetwork costs no more than the exact masks"
    pixels(plan_png(curve, plan_row(4, 3, 100.0, 2**20), 100.0, 160.0))
    assert titles[2] == (
        "3 subnetworks cost no more than the exact masks",
        "4 segments of steps; the subnetworks hold 1.00 MiB of weights",
    )


def side(name, ms, kind=SideKind.BUNDLE, macs=50.0):
    rounds = tuple(ms * factor for factor in (0.95, 1.0, 1.1))
    return SideResult(
        side=Side(name=name, kind=kind, path=name),
        load_seconds=0.1,
        subnets_loaded=1,
        round_ms=rounds,
        step_ms=rounds,
        median_ms=ms,
        min_ms=rounds[0],
        max_ms=rounds[2],
        peak_bytes=1 << 20,
        settled_bytes=None,
        images_per_second=1.0,
        overflows=0,
        token_share=(0.5,),
        flops_ratio=(0.5,),
        macs=macs,
    )


def bench(*sides):
    first = sides[0]
    pairs = [compare_sides(first, other) for other in sides[1:]]
    return BenchReport(
        **{"batch": 4, "cfg_scale": 2.0, "latents": "run", "threads": 2, "repeats": 3, "warmup": 1, "seed": 0},
        **{"steps": 12, "steps_measured": (0, 11), "timesteps": (999, 0)},
        sides=sides,
        comparisons=tuple(pairs),
        load_average=(0.1, 0.2),
        machine=Machine.here(),
        seconds=1.0,
    )


def test_latency_draws_the_bound_of_the_other_bundle(titles):
    torch = side("eager", 40.0, SideKind.TORCH_MASKED, macs=100.0)
    report = bench(side("dynamic", 10.0), torch, side("static", 18.0, macs=100.0))
    array = pixels(latency_png(report))
    assert bound_of(report).other == "static"
    assert titles[0][0] == "dynamic: 1.80\u00d7 speed-up over static; multiply-adds alone would give 2.00\u00d7"
    assert "batch 4, guidance 2, 2 threads" in titles[0][1]
    alone = pixels(latency_png(bench(side("dynamic", 10.0))))
    assert count(array, SECOND) > 50 and count(alone, SECOND) == 0
    assert titles[1][0] == "dynamic takes 10.00 ms a step"
    assert not busy(report)
    loaded = report.model_copy(update={"load_average": (0.1, 2.1 * report.machine.cores)})
    assert busy(loaded) and set(loaded.lines) - set(report.lines) == {BUSY.capitalize()}
    assert "speed-up over static, median of pairs of rounds, " in report.lines[-1]


def test_the_ranking_has_the_bound_across_and_bundles_in_their_colour(titles):
    report = bench(
        side("dynamic", 11.0), side("eager", 60.0, SideKind.SCRIPT, macs=100.0), side("static", 20.0, macs=100.0)
    )
    array = pixels(ranking_png(report, report.comparison("static")))
    assert count(array, SECOND) > 200
    assert count(array, ACCENT_LIGHT) > 1.5 * count(array, ACCENT) > 1000, "60 ms of theirs, 31 of ours"
    assert titles[0] == (
        "dynamic: 1.82\u00d7 speed-up over static",
        "batch 4, guidance 2, 2 threads; bars: median of 3 rounds; lines: fastest to slowest round",
    )
    less = report.model_copy(update={"not_run": (NotRun(name="compiled", reason="no compiler"),)})
    assert count(pixels(ranking_png(less)), SECOND) == 0
    assert titles[1][0] == "dynamic takes 11.00 ms a step" and titles[1][1].endswith("; not run: compiled")
    assert count(pixels(ranking_png(report, report.comparison("eager"))), SECOND) == 0, "of a script there is no bound"
    eager = [
        where(pixels(ranking_png(report, None, {"above": above})), ACCENT_LIGHT).min()
        for above in (["eager"], ["dynamic"])
    ]
    assert eager[0] < eager[1], "a group stands above all others"


def test_repeated_steps_stand_in_the_picture(titles):
    repeated = side("tight", 10.0).model_copy(update={"overflows": 4})
    latency_png(bench(repeated, side("static", 18.0)))
    assert titles[0][1].endswith("; tight: 4 of 9 timed steps ran again at full capacity")


def test_without_a_bound_the_picture_says_why(titles):
    report = bench(side("dynamic", 10.0), side("eager", 28.4, SideKind.TORCH_MASKED))
    assert count(pixels(latency_png(report)), SECOND) == 0
    why = "no bound by multiply-adds, because the backends differ: onnxruntime and PyTorch"
    assert titles[0][0] == f"dynamic: 2.84\u00d7 speed-up over eager; {why}"


def check(name, tolerance, values, **more):
    known = [value for value in values if value is not None]
    facts = {"title": name, "measure": "relative L2", "reason": "rounding", "detail": f"{name} differs"}
    status = more.pop("status", Status.PASSED)
    worst = max(known, default=0.0)
    return Check(name=name, tolerance=tolerance, status=status, worst=worst, per_step=tuple(values), **facts, **more)


def parity(*checks, compared=(0, 6, 11), precision="fp32"):
    return ParityReport(
        **{"bundle": "b", "checkpoint": "c", "backend": "onnxruntime", "threads": 1, "device": "cpu", "labels": (0,)},
        **{"seed": 0, "cfg_scale": 2.0, "steps": 12, "sampler": "ddpm", "routing": "dynamic", "precision": precision},
        steps_compared=compared,
        timesteps=tuple(times(12)),
        stale_reasons=(),
        checks=checks,
        token_share=(),
        flops_ratio=(),
        machine=Machine.here(),
        seconds=1.0,
    )


def test_parity_draws_curves_bars_and_flips(titles):
    masks = check("masks", 0, ())
    step = check("step", 1e-5, (1e-7, None, 0.0), decisions=600)
    run = check("run", 1e-3, np.geomspace(1e-7, 1e-4, 12).tolist(), decisions=600)
    plain = pixels(parity_png(parity(masks, step, run)))
    finding, detail = titles[0]
    assert finding == "onnxruntime computes what PyTorch computes, to within rounding"
    assert detail == "1 image, 12 steps; worst: step 1e-7, run 1e-4; 0 of 1,200 token decisions differ"
    image = FlippedImage(image=0, step=5, timestep=545, block=1, margin=1e-6, tie=True, flips=2, value=0.013)
    flips = {"per_step_flips": (0,) * 5 + (2,) + (0,) * 6, "flips": 2, "flipped_images": (image,)}
    flipped = run.model_copy(update=flips)
    marked = pixels(parity_png(parity(masks, step, flipped)))
    assert count(marked, SECOND) > count(plain, SECOND) + 50
    assert titles[1][0] == "onnxruntime computes what PyTorch computes, except for 2 token decisions at a near-tie"
    assert titles[1][1].endswith("run 1e-4 (with a flipped token 1.3e-2); 2 of 1,200 token decisions differ")


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int8-static", "fp8", None])
def test_below_fp32_the_title_claims_what_was_measured(titles, precision):
    """And not that it is rounding: of a report that does not say its precision, nothing but the verdict."""
    step = check("step", 5e-2, (1e-2, 2e-2, 1e-2), decisions=600, flips=300, sets_aside=False)
    run = check("run", 0.05623, [0.01] * 12, decisions=600, flips=5, decibels=True, sets_aside=False)
    report = parity(step, run, precision=precision)
    parity_png(report)
    finding, detail = titles[0]
    assert "rounding" not in finding and "305 of 1,200 token decisions differ" in detail
    if precision is None:
        assert finding == "onnxruntime agrees with PyTorch within the tolerances"
        assert "within the tolerances of" not in report.summary
    else:
        assert finding == f"{precision} on onnxruntime: PSNR at least 40.0 dB against fp32 in PyTorch"
        assert f"within the tolerances of {precision}" in report.summary and "PSNR at least 40.0 dB" in report.summary
    exact = run.model_copy(update={"worst": 0.0})
    parity_png(parity(step, exact, precision="int8"))
    assert "no difference against fp32" in titles[1][0]


def test_repeated_steps_are_in_verdict_and_picture(titles):
    report = parity(check("run", 1e-3, [1e-7] * 12)).model_copy(update={"evaluations": 15, "repeated_steps": 4})
    parity_png(report)
    assert "4 of 15 evaluated steps ran again at full capacity" in report.summary
    assert "4 steps ran again at full capacity" in titles[0][1] and "no token decisions to compare" in titles[0][1]


def test_parity_that_fails_says_where(titles):
    broken = check("weights", 0, (), status=Status.FAILED)
    pixels(parity_png(parity(broken, check("run", 1e-3, [0.1] * 12, status=Status.FAILED))))
    assert titles[0] == ("Parity fails at \u201cweights\u201d", "weights differs")
    pixels(parity_png(parity(broken)))


def test_the_same_data_gives_the_same_bytes():
    axis = axis_of(2, 4)
    masks = RNG.random((12, axis.size)) < 0.5
    assert masks_png(masks, axis, times(12)) == masks_png(masks, axis, times(12)) != masks_png(~masks, axis, times(12))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 1000))
def test_ticks_are_round_timesteps_where_they_belong(steps):
    run = times(steps)
    places, labels = timestep_ticks(run)
    values = [int(label) for label in labels]
    assert 1 <= len(places) <= 7 and values == sorted(set(values), reverse=True) and values[0] == run[0]
    for place, value in zip(places, values, strict=True):
        assert 0 <= place <= steps - 1
        assert np.interp(place, np.arange(steps), run) == pytest.approx(value, abs=1e-6)


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    axis = axis_of(2, 2)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DyditError, match=r"pip install 'dydit\[report\]'"):
        masks_png(np.ones((3, axis.size), bool), axis, times(3))


def test_ablations_have_bars_as_long_as_their_distances():
    curves = [Curve("ours", ((1, 1, ""), (1.5, 1.3, "0.5"))), Curve("theirs", ((1, 1, ""), (2, 0.9, "0.5")))]
    inks = []
    for ours in (1.5, 3.0, 6.0):
        bars = {"full": (1.0, 1.0), "a title of more than one line": (ours, 6.0)}
        inks.append(count(pixels(ablations_png(curves, {"control": (1, 1.1)}, bars, "detail")), ACCENT))
    assert inks[0] < inks[1] < inks[2]
    alone = pixels(ablations_png(curves, {}, {}, "detail"))
    assert count(alone, ACCENT) < inks[0], "the sweep alone"
    assert count(alone, SECOND) == 0 < count(pixels(ablations_png([*curves, curves[1]], {}, {}, "detail")), SECOND)


def test_models_side_by_side_have_the_same_columns():
    dark, bright = np.full((2, 3, 3, 8, 8), -1.0), np.ones((1, 3, 3, 8, 8))
    array = pixels(side_by_side_png({"static": dark, "dynamic": bright}, ["a", "b", "a long name of a class"]))
    gray = array if array.ndim == 2 else array.min(-1)
    inner = gray[:, gray.shape[1] // 4 : -gray.shape[1] // 4]
    black = (inner == 0).mean(1) > 0.5
    assert 0.3 < black.mean() < 0.7 and not black[-len(black) // 4 :].any(), "two of three rows, and they come first"
