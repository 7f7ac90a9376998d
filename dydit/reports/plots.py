"""Pictures of cost, time and agreement: the plan, latency against its bound, parity over the steps.

Each function returns the bytes of a PNG. The pictures of masks and tokens are in `dydit.reports.plots_masks`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from dydit.plot_style import (
    ACCENT,
    ACCENT_LIGHT,
    INK,
    MUTED,
    SECOND,
    drawing,
    headline,
    png,
    shortened,
    timestep_ticks,
)
from dydit.reports.bench_report import (
    BenchReport,
    Comparison,
    SideKind,
    SideResult,
    bound_text,
    repeats_text,
    speed_up_text,
)
from dydit.reports.bench_table import error_words, errors_text, speed_ratio
from dydit.reports.inspection_facts import PlanRow
from dydit.reports.parity_report import Check, ParityReport, parity_headline
from dydit.reports.text import bytes_text, exponent, guidance_text
from dydit.words import counted


def plan_png(curve: Sequence[PlanRow], chosen: PlanRow, exact: float, static: float, timed: bool = False) -> bytes:
    """Cost and memory of the cheapest plans of K segments, and the plan that was chosen.

    `curve` ascends in K and ends with the plan of the exact masks. `exact`, `static`: cost of a run with the per-step
    masks and with all units on. The cost is in multiply-adds, or with `timed` in the milliseconds of every plan.
    """
    what = "time" if timed else "multiply-adds"
    costs = [point.ms if timed else point.macs for point in (*curve, chosen)]
    *relative, of_chosen = (cost / exact for cost in costs if cost is not None)
    ks = [point.segments for point in curve]
    sizes = [point.weight_bytes / 2**20 for point in curve]
    count, extra = chosen.segments, of_chosen - 1
    with drawing(7.2, 4.6) as figure:
        cost = f"{extra:.1%} more {what}" if extra > 5e-4 else "no more"
        exact_size = bytes_text(curve[-1].weight_bytes)
        detail = (
            f"{counted(count, 'segment')} of steps; the subnetworks hold {bytes_text(chosen.weight_bytes)} of weights"
        )
        if extra > 5e-4:
            detail += f"; the {curve[-1].subnets} subnetworks of the exact masks would hold {exact_size}"
        verb = "costs" if chosen.subnets == 1 else "cost"
        headline(figure, f"{counted(chosen.subnets, 'subnetwork')} {verb} {cost} than the exact masks", detail)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1.5, 1))
        everything = static / exact
        upper.plot(ks, relative, color=ACCENT)
        upper.axhline(everything, color=MUTED, lw=1, ls=(0, (4, 3)))
        _note(upper, f"all units on: {everything:.2f}", (ks[-1], everything), (0, 3), MUTED, ha="right")
        upper.set_ylim(1 - 0.05 * (everything - 1) - 1e-3, everything + 0.13 * (everything - 1) + 1e-3)
        upper.set_ylabel(f"{what},\nexact masks = 1")
        lower.plot(ks, sizes, color=ACCENT)
        lower.set_ylim(0, 1.08 * max(sizes))
        lower.set_ylabel("weights, MiB")
        lower.set_xlabel("segments K (cheapest plan of each K)")
        for axis, value in ((upper, of_chosen), (lower, chosen.weight_bytes / 2**20)):
            axis.axvline(count, color=SECOND, lw=0.9, alpha=0.6)
            axis.plot([count], [value], "o", ms=6, color=SECOND, mec="white", mew=1.2, zorder=5)
            axis.grid(axis="y")
        late = len(ks) > 1 and count > ks[-1] ** 0.8
        place = {"offset": (-7, 7), "ha": "right"} if late else {"offset": (7, 7)}
        _note(upper, f"chosen: K = {count}", (count, of_chosen), colour=SECOND, **place)
        if len(ks) > 1:
            _doubling_axis(lower, ks[-1])
        else:
            lower.set_xticks(ks)
        return png(figure)


def _doubling_axis(axis: Any, last: int) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    axis.set_xscale("log")
    doublings = [2**k for k in range(12) if 2**k < last / 1.5]
    axis.xaxis.set_major_locator(FixedLocator([*doublings, last]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(ScalarFormatter())


def _note(axis: Any, text: str, at: tuple[float, float], offset: tuple[float, float], colour: str, **how: Any) -> None:
    axis.annotate(text, at, offset, textcoords="offset points", fontsize=8, color=colour, **how)


def bound_of(bench: BenchReport) -> Comparison | None:
    """The first comparison for which multiply-adds give a bound; else the first with another bundle; else the first."""
    kinds = {side.side.name: side.side.kind for side in bench.sides}
    bounded = [pair for pair in bench.comparisons if pair.allowed is not None]
    bundles = [pair for pair in bench.comparisons if kinds[pair.other] is SideKind.BUNDLE]
    return next(iter([*bounded, *bundles, *bench.comparisons]), None)


def latency_png(bench: BenchReport) -> bytes:
    """Milliseconds a step of each configuration, and the time of the first one if only its multiply-adds counted."""
    sides, pair = bench.sides, bound_of(bench)
    with drawing(7.2, 1.55 + 0.52 * len(sides)) as figure:
        name = sides[0].side.name
        finding = f"{name} takes {_ms(sides[0].median_ms)} a step"
        if pair is not None:
            finding = f"{name}: {speed_up_text(pair)}; {bound_text(pair)}"
        headline(figure, finding, _setting(bench))
        others, bound = len(sides) - 1, _bound_ms(bench, pair)
        axis, most = _bars(figure, bench, sides, [ACCENT, *[ACCENT_LIGHT] * others], bound, [bound, *[0.0] * others])
        if bound:
            axis.plot([bound, bound], [others - 0.36, others + 0.36], color=SECOND, lw=1.8)
            align = "left" if bound < 0.3 * most else "right" if bound > 0.7 * most else "center"
            _note(axis, f"by multiply-adds alone: {_ms(bound)}", (bound, others + 0.36), (0, 3), SECOND, ha=align)
        axis.set_ylim(-0.5, len(sides) - 0.18)
        return png(figure)


def ranking_png(
    bench: BenchReport, pair: Comparison | None = None, groups: Mapping[str, Collection[str]] | None = None
) -> bytes:
    """Milliseconds a step of every configuration, slowest first; bundles have their own colour.

    `pair`: what the headline says. If multiply-adds give it a bound, a line across all bars shows the time that its
    first configuration would take at that bound. `groups`: titles with the names of configurations that stand together,
    above all others.
    """
    rest, order = sorted(bench.sides, key=lambda side: -side.median_ms), dict[str, list[SideResult]]()
    for title, names in (groups or {}).items():
        order[title] = [side for side in rest if side.side.name in names]
        rest = [side for side in rest if side.side.name not in names]
    order[""] = rest
    sides = [side for group in order.values() for side in group]
    subject = bench.side(pair.side) if pair else sides[-1]
    with drawing(7.2, 1.6 + 0.36 * len(sides)) as figure:
        finding = f"{subject.side.name} takes {_ms(subject.median_ms)} a step"
        if pair is not None:
            finding = f"{pair.side}: {speed_up_text(pair)}"
        headline(figure, finding, _setting(bench))
        colours = [ACCENT if side.side.kind is SideKind.BUNDLE else ACCENT_LIGHT for side in sides]
        bound = _bound_ms(bench, pair)
        axis, most = _bars(figure, bench, sides, colours, bound, [0.0] * len(sides))
        if pair is not None and pair.allowed is not None:
            axis.axvline(bound, color=SECOND, lw=1.2, ls=(0, (4, 3)))
            text = f"by multiply-adds alone ({pair.allowed:.2f}\u00d7): {_ms(bound)}"
            offset, side = ((-4, -1), "right") if bound > 0.45 * most else ((4, -1), "left")
            _note(axis, text, (bound, len(sides) - 0.5), offset, SECOND, ha=side, va="center")
        below = len(sides)
        for title, group in order.items():
            below -= len(group)
            if group and title:
                _note(axis, title, (most, below), (-4, 0), MUTED, ha="right", va="center")
            if group and below:
                axis.axhline(below - 0.5, color=MUTED, lw=0.8)
        axis.set_ylim(-0.5, len(sides) - 0.2)
        return png(figure)


def errors_png(bench: BenchReport) -> bytes:
    """Milliseconds a step of every configuration, the fastest first, with the error of each beside its bar."""
    sides = sorted(bench.sides, key=lambda side: side.median_ms)
    first, fastest = bench.sides[0], sides[0]
    with drawing(7.2, 1.6 + 0.36 * len(sides)) as figure:
        finding = f"{fastest.side.name} is the fastest: {_ms(fastest.median_ms)} a step"
        if fastest is not first:
            finding += f", {speed_ratio(bench, fastest):.2f}\u00d7 as fast as {first.side.name}"
        errors = [f"errors {errors_text(bench)}"] if bench.reference else []
        headline(figure, finding, "; ".join([_setting(bench), *errors]))
        colours = [ACCENT if side is first else ACCENT_LIGHT for side in sides]

        def words(side: SideResult) -> str:
            return ";  ".join([_ms(side.median_ms), *filter(None, error_words(bench, side))])

        axis, most = _bars(figure, bench, sides, colours, 0.0, [0.0] * len(sides), words)
        axis.set_xlim(0, 1.45 * most)
        axis.set_ylim(-0.5, len(sides) - 0.2)
        return png(figure)


def _bound_ms(bench: BenchReport, pair: Comparison | None) -> float:
    """The time of a step of the first configuration of a pair if only multiply-adds counted; 0 without a bound."""
    return 0.0 if pair is None or pair.allowed is None else bench.side(pair.other).median_ms / pair.allowed


def _ms(value: float) -> str:
    return f"{value:.2f} ms" if value < 100 else f"{value:.0f} ms"


def _setting(bench: BenchReport) -> str:
    threads = counted(bench.threads, "thread") if bench.threads else "all threads"
    rounds = f"bars: median of {counted(bench.repeats, 'round')}; lines: fastest to slowest round"
    if bench.repeats == 1:
        rounds = "one round"
    left_out = ", ".join(each.name for each in bench.not_run)
    return "; ".join(
        [
            f"batch {bench.batch}, {guidance_text(bench.cfg_scale)}, {threads}; {rounds}",
            *(f"{side.side.name}: {repeats_text(side)}" for side in bench.sides if side.overflows),
            *([f"not run: {left_out}"] if left_out else []),
        ]
    )


def _bars(
    figure: Any,
    bench: BenchReport,
    sides: Sequence[SideResult],
    colours: Sequence[str],
    bound: float,
    clear: Sequence[float],
    words: Callable[[SideResult], str] = lambda side: _ms(side.median_ms),
) -> tuple[Any, float]:
    """A bar for each configuration with its time beside it, or other `words`, at least right of `clear`. Returns the
    axis of milliseconds and its end, which leaves room for the times and for `bound`.
    """
    axis, places = figure.subplots(), np.arange(len(sides))[::-1]
    most = 1.2 * max(bound, *(side.max_ms for side in bench.sides))
    axis.barh(places, [side.median_ms for side in sides], height=0.56, color=colours)
    for place, side, least in zip(places, sides, clear, strict=True):
        axis.plot([side.min_ms, side.max_ms], [place, place], color=INK, lw=1.1)
        _note(axis, words(side), (max(side.max_ms, least), place), (6, 0), INK, va="center")
    axis.set_yticks(places, [shortened(side.side.name) for side in sides], parse_math=False)
    axis.tick_params(left=False)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="x")
    axis.set_xlabel("milliseconds a step, whole batch")
    axis.set_xlim(0, most)
    return axis, most


_CURVES = {  # the colour and the label of a check, and the name of its tolerance
    "sliced": (ACCENT_LIGHT, "sliced form, one step", "sliced form"),
    "step": (ACCENT, "backend, one step", "one step"),
    "run": (INK, "backend, whole run", "whole run"),
}
_LOWEST = 1e-9  # where exact agreement is drawn on a logarithmic axis


def parity_png(parity: ParityReport) -> bytes:
    """Relative L2 of each step against the reference, on a logarithmic scale, with the tolerances and the flips.

    The values are those of the worst image among those whose routing agrees; the worst of the others is in the title.
    "One step" starts from the reference's latents; in the "whole run" deviations accumulate.
    """
    checks = [check for check in parity.checks if check.name in _CURVES and check.per_step]
    pictures = any(check.decibels for check in checks)
    with drawing(7.2, 4.4) as figure:
        headline(figure, *parity_headline(parity))
        axis = figure.subplots()
        axis.set_yscale("log")
        for check in checks:
            _curve(axis, check, parity)
        tolerances = sorted({check.tolerance for check in checks})
        for value in tolerances:
            names = [_CURVES[check.name][2] for check in checks if check.tolerance == value]
            _tolerance_line(axis, value, names, value == tolerances[-1])
        _flips(axis, checks, parity)
        axis.set_xticks(*timestep_ticks(parity.timesteps))
        margin = 0.01 * max(parity.steps, 10)
        axis.set_xlim(-margin, parity.steps - 1 + margin)
        low, high = axis.get_ylim()
        axis.set_ylim(low / 2, high * 2.5)
        axis.grid(axis="y")
        axis.set_xlabel("timestep   (noise → image)")
        axis.set_ylabel("difference from the reference" if pictures else "relative L2 to the reference")
        if checks:
            figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2 if pictures else 4)
        return png(figure)


def _steps_of(check: Check, parity: ParityReport) -> Sequence[int]:
    return range(len(check.per_step)) if check.name == "run" else parity.steps_compared


def _curve(axis: Any, check: Check, parity: ParityReport) -> None:
    colour, label, _ = _CURVES[check.name]
    steps = _steps_of(check, parity)
    if check.decibels:
        label += f": {check.measure.partition(',')[0]}"
    elif any(each.decibels for each in parity.checks):
        label += ": relative L2"
    values = np.array([np.nan if value is None else max(value, _LOWEST) for value in check.per_step], np.float64)
    axis.plot(steps, values, color=colour, label=label, marker="o" if len(steps) < 40 else None, ms=3)


def _tolerance_line(axis: Any, value: float, names: Sequence[str], highest: bool) -> None:
    """A tolerance with its name. The name of the highest is above its line, at the right; those of the others are below
    their lines, at the left, so that the names of close lines do not overlap."""
    axis.axhline(value, color=SECOND, lw=1.1, ls=(0, (4, 3)))
    at, offset, side = ((1.0, value), (-2, 3), "bottom") if highest else ((0.0, value), (4, -3), "top")
    _note(
        axis,
        f"tolerance of {' and '.join(names)}: {exponent(value)}",
        at,
        offset,
        SECOND,
        xycoords=axis.get_yaxis_transform(),
        ha="right" if highest else "left",
        va=side,
        bbox={"facecolor": "white", "alpha": 0.75, "pad": 0.5, "lw": 0},
    )


def _flips(axis: Any, checks: Sequence[Check], parity: ParityReport) -> None:
    """Steps in which a token was routed differently, as ticks at the bottom."""
    steps = {s for check in checks for s, n in zip(_steps_of(check, parity), check.per_step_flips, strict=False) if n}
    if steps:
        at_foot = {"transform": axis.get_xaxis_transform(), "ls": "", "marker": "|", "ms": 9, "mew": 1.4}
        axis.plot(sorted(steps), [0.025] * len(steps), color=SECOND, label="step with a flipped token", **at_foot)
