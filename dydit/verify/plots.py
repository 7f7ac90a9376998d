"""Pictures of cost, time and agreement: the plan, latency against its bound, parity over the steps.

Each function returns the bytes of a PNG. Those of masks and tokens are in `dydit.verify.plots_masks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dydit.verify.plot_style import (
    ACCENT,
    ACCENT_LIGHT,
    INK,
    MUTED,
    SECOND,
    drawing,
    headline,
    png,
    timestep_ticks,
)
from dydit.verify.results import BenchReport, Comparison, Hop, ParityReport, SideKind, SideResult
from dydit.verify.text import bytes_text, exponent


@dataclass(frozen=True)
class PlanPoint:
    """A plan: segments of steps, distinct subnetworks that serve them, cost of a run in multiply-adds or milliseconds,
    bytes of the weights of all those subnetworks."""

    segments: int
    subnets: int
    cost: float
    weight_bytes: int


def plan_png(
    curve: Sequence[PlanPoint], chosen: PlanPoint, exact: float, static: float, what: str = "multiply-adds"
) -> bytes:
    """Cost and memory of the cheapest plans of K segments, and the plan that was chosen.

    `curve` ascends in K, its last being the exact masks'; `exact`, `static`: cost of a run with the per-step masks
    and with everything on; `what` it is counted in.
    """
    ks = [point.segments for point in curve]
    sizes = [point.weight_bytes / 2**20 for point in curve]
    count, extra = chosen.segments, chosen.cost / exact - 1
    with drawing(7.2, 4.6) as figure:
        cost = f"{extra:.1%} more {what}" if extra > 5e-4 else "no more"
        exact_size = bytes_text(curve[-1].weight_bytes)
        detail = f"for {_plural(count, 'segment')} of steps; they hold {bytes_text(chosen.weight_bytes)} of weights"
        if extra > 5e-4:
            detail += f", where the exact masks' {curve[-1].subnets} would hold {exact_size}"
        verb = "costs" if chosen.subnets == 1 else "cost"
        headline(figure, f"{_plural(chosen.subnets, 'subnetwork')} {verb} {cost} than the exact masks", detail)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1.5, 1))
        everything = static / exact
        upper.plot(ks, [point.cost / exact for point in curve], color=ACCENT)
        upper.axhline(everything, color=MUTED, lw=1, ls=(0, (4, 3)))
        _note(upper, f"everything on: {everything:.2f}", (ks[-1], everything), (0, 3), MUTED, ha="right")
        upper.set_ylim(1 - 0.05 * (everything - 1) - 1e-3, everything + 0.13 * (everything - 1) + 1e-3)
        upper.set_ylabel(f"{what},\nexact masks = 1")
        lower.plot(ks, sizes, color=ACCENT)
        lower.set_ylim(0, 1.08 * max(sizes))
        lower.set_ylabel("weights, MiB")
        lower.set_xlabel("segments K (cheapest plan of each K)")
        for axis, value in ((upper, chosen.cost / exact), (lower, chosen.weight_bytes / 2**20)):
            axis.axvline(count, color=SECOND, lw=0.9, alpha=0.6)
            axis.plot([count], [value], "o", ms=6, color=SECOND, mec="white", mew=1.2, zorder=5)
            axis.grid(axis="y")
        late = len(ks) > 1 and count > ks[-1] ** 0.8
        place = {"offset": (-7, 7), "ha": "right"} if late else {"offset": (7, 7)}
        _note(upper, f"chosen: K = {count}", (count, chosen.cost / exact), colour=SECOND, **place)
        if len(ks) > 1:
            _doubling_axis(lower, ks[-1])
        return png(figure)


def _doubling_axis(axis: Any, last: int) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    axis.set_xscale("log")
    doublings = [2**k for k in range(12) if 2**k < last / 1.5]
    axis.xaxis.set_major_locator(FixedLocator([*doublings, last]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(ScalarFormatter())


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _note(axis: Any, text: str, at: tuple[float, float], offset: tuple[float, float], colour: str, **how: Any) -> None:
    axis.annotate(text, at, offset, textcoords="offset points", fontsize=8, color=colour, **how)


def bound_of(bench: BenchReport) -> Comparison | None:
    """The comparison that sets the bound: the first with another bundle, else the first there is."""
    kinds = {side.side.name: side.side.kind for side in bench.sides}
    bundles = [pair for pair in bench.comparisons if kinds[pair.other] is SideKind.BUNDLE]
    return next(iter([*bundles, *bench.comparisons]), None)


def busy(bench: BenchReport) -> bool:
    """Whether others' work shows in the load average: more than twice as many wanted to run as there are cores."""
    return max(bench.load_average) > 2 * bench.machine.cores


def latency_png(bench: BenchReport) -> bytes:
    """Milliseconds a step of each side, and how low its multiply-adds alone would let the first side go."""
    sides, pair = bench.sides, bound_of(bench)
    with drawing(7.2, 1.55 + 0.52 * len(sides)) as figure:
        first = sides[0]
        if pair is None:
            finding = f"{first.side.name} takes {first.median_ms:.2f} ms a step"
        else:
            finding = (
                f"{first.side.name} runs {pair.median:.2f}\u00d7 as fast as {pair.other}; "
                f"its multiply-adds allow {pair.allowed:.2f}\u00d7"
            )
        headline(figure, finding, _setting(bench))
        axis = figure.subplots()
        places = np.arange(len(sides))[::-1]
        bound = bench.side(pair.other).median_ms / pair.allowed if pair else 0.0
        most = 1.16 * max(side.max_ms for side in sides)
        colours = [ACCENT, *[ACCENT_LIGHT] * (len(sides) - 1)]
        _bars(axis, places, sides, colours, [bound, *[0.0] * (len(sides) - 1)])
        if pair is not None:
            _bound_mark(axis, places[0], bound, pair, most)
        axis.set_xlim(0, most)
        axis.set_ylim(-0.5, len(sides) - 0.18)
        return png(figure)


def ranking_png(bench: BenchReport, pair: Comparison | None = None) -> bytes:
    """Milliseconds a step of every side, slowest first, bundles in a colour of their own.

    `pair`: a line across all bars says what the first of its sides would take if it were as much faster than the other
    as its multiply-adds allow.
    """
    sides = sorted(bench.sides, key=lambda side: -side.median_ms)
    subject = bench.side(pair.side) if pair else sides[-1]
    with drawing(7.2, 1.6 + 0.36 * len(sides)) as figure:
        left_out = ", ".join(each.name for each in bench.not_run)
        finding = f"{subject.side.name} takes {subject.median_ms:.2f} ms a step"
        if pair is not None:
            finding = f"{pair.side} runs {pair.median:.2f}\u00d7 as fast as {pair.other}"
        headline(figure, finding, _setting(bench) + (f"; not run: {left_out}" if left_out else ""))
        axis = figure.subplots()
        places = np.arange(len(sides))[::-1]
        colours = [ACCENT if side.side.kind is SideKind.BUNDLE else ACCENT_LIGHT for side in sides]
        most = 1.16 * max(side.max_ms for side in sides)
        _bars(axis, places, sides, colours, [0.0] * len(sides))
        if pair is not None:
            bound = bench.side(pair.other).median_ms / pair.allowed
            axis.axvline(bound, color=SECOND, lw=1.2, ls=(0, (4, 3)))
            text = f"what its multiply-adds allow ({pair.allowed:.2f}\u00d7): {_ms(bound)}"
            offset, side = ((-4, -1), "right") if bound > 0.45 * most else ((4, -1), "left")
            _note(axis, text, (bound, len(sides) - 0.5), offset, SECOND, ha=side, va="center")
        axis.set_xlim(0, most)
        axis.set_ylim(-0.5, len(sides) - 0.2)
        return png(figure)


def _ms(value: float) -> str:
    return f"{value:.2f} ms" if value < 100 else f"{value:.0f} ms"


def _setting(bench: BenchReport) -> str:
    guidance = "no guidance" if bench.cfg_scale == 1 else f"guidance {bench.cfg_scale:g}"
    setting = f"batch {bench.batch}, {guidance}, {bench.threads or 'all'} thread{'s' if bench.threads != 1 else ''}"
    return f"{setting}; median of {_plural(bench.repeats, 'round')} that took turns, line: fastest to slowest"


def _bars(
    axis: Any, places: np.ndarray, sides: Sequence[SideResult], colours: Sequence[str], clear: Sequence[float]
) -> None:
    """A bar for each side with its time beside it, right of `clear` at least."""
    axis.barh(places, [side.median_ms for side in sides], height=0.56, color=colours)
    for place, side, least in zip(places, sides, clear, strict=True):
        axis.plot([side.min_ms, side.max_ms], [place, place], color=INK, lw=1.1)
        _note(axis, _ms(side.median_ms), (max(side.max_ms, least), place), (6, 0), INK, va="center")
    axis.set_yticks(places, [side.side.name for side in sides])
    axis.tick_params(left=False)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="x")
    axis.set_xlabel("milliseconds a step, whole batch")


def _bound_mark(axis: Any, place: float, bound: float, pair: Comparison, most: float) -> None:
    axis.plot([bound, bound], [place - 0.36, place + 0.36], color=SECOND, lw=1.8)
    text = f"multiply-add bound {bound:.2f} ms ({pair.other} / {pair.allowed:.2f})"
    side = "left" if bound < 0.3 * most else "right" if bound > 0.7 * most else "center"
    _note(axis, text, (bound, place + 0.36), (0, 3), SECOND, ha=side)


_CURVES = {
    "sliced": (ACCENT_LIGHT, "sliced form, one step"),
    "step": (ACCENT, "backend, one step"),
    "run": (INK, "backend, whole run"),
}
_LOWEST = 1e-9  # where exact agreement is drawn on a logarithmic axis


def parity_png(parity: ParityReport) -> bytes:
    """Relative L2 of each step against the reference, on a logarithmic scale, with each hop's bar and the flips.

    It is that of the worst image among those whose routing agrees; the others' worst is in the title. "One step"
    starts from the reference's own latents; "whole run" lets deviations accumulate.
    """
    hops = [hop for hop in parity.hops if hop.name in _CURVES and hop.per_step]
    with drawing(7.2, 4.4) as figure:
        headline(figure, *_parity_headline(parity, hops))
        axis = figure.subplots()
        axis.set_yscale("log")
        for hop in hops:
            _curve(axis, hop, parity)
        for value in sorted({hop.bar for hop in hops}):
            _bar_line(axis, value, [hop for hop in hops if hop.bar == value], parity.steps - 1)
        _flips(axis, hops, parity)
        axis.set_xticks(*timestep_ticks(parity.timesteps))
        margin = 0.01 * max(parity.steps, 10)
        axis.set_xlim(-margin, parity.steps - 1 + margin)
        low, high = axis.get_ylim()
        axis.set_ylim(low, high * 2.5)
        axis.grid(axis="y")
        axis.set_xlabel("timestep   (noise → image)")
        axis.set_ylabel("relative L2 to the reference")
        if hops:
            figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return png(figure)


def _parity_headline(parity: ParityReport, hops: Sequence[Hop]) -> tuple[str, str]:
    failed = parity.first_failure
    if failed is not None:
        return f"Parity fails at \u201c{failed.title}\u201d", failed.detail
    worst = "; ".join(f"{hop.name} {exponent(hop.worst)}{_jump(hop)}" for hop in hops if hop.worst is not None)
    decisions, flips = sum(hop.decisions for hop in hops), sum(hop.flips for hop in hops)
    return (
        f"{parity.backend} computes what PyTorch computes, to within rounding",
        f"worst: {worst}; {decisions_text(flips, decisions)}",
    )


def _jump(hop: Hop) -> str:
    values = [image.value for image in hop.flipped_images if image.value is not None]
    return f" (with a flipped token {exponent(max(values))})" if values else ""


def decisions_text(flips: int, decisions: int) -> str:
    """How many routing decisions differ, as part of a sentence."""
    return f"{flips} of {decisions:,} token decisions differ{'s' if flips == 1 else ''}"


def _steps_of(hop: Hop, parity: ParityReport) -> Sequence[int]:
    return range(len(hop.per_step)) if hop.name == "run" else parity.steps_compared


def _curve(axis: Any, hop: Hop, parity: ParityReport) -> None:
    colour, label = _CURVES[hop.name]
    steps = _steps_of(hop, parity)
    values = np.array([np.nan if value is None else max(value, _LOWEST) for value in hop.per_step], np.float64)
    axis.plot(steps, values, color=colour, label=label, marker="o" if len(steps) < 40 else None, ms=3)


def _bar_line(axis: Any, value: float, hops: Sequence[Hop], last: int) -> None:
    axis.axhline(value, color=SECOND, lw=1.1, ls=(0, (4, 3)))
    where = "whole run" if any(hop.name == "run" for hop in hops) else "one step"
    _note(axis, f"bar of {where}: {exponent(value)}", (last, value), (0, 3), SECOND, ha="right")


def _flips(axis: Any, hops: Sequence[Hop], parity: ParityReport) -> None:
    """Steps in which some token was routed differently, as ticks along the foot."""
    steps = {s for hop in hops for s, n in zip(_steps_of(hop, parity), hop.per_step_flips, strict=False) if n}
    if steps:
        at_foot = {"transform": axis.get_xaxis_transform(), "ls": "", "marker": "|", "ms": 9, "mew": 1.4}
        axis.plot(sorted(steps), [0.025] * len(steps), color=SECOND, label="step with a flipped token", **at_foot)
