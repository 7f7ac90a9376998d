"""The picture of a sweep of lambda and of ablations, each beside published figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

from dydit.plot_style import ACCENT, INK, MUTED, SECOND, drawing, headline, png

_COLOURS = (ACCENT, MUTED, SECOND, "#5b8c3a")
_BESIDE: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7.5}


@dataclass(frozen=True)
class Curve:
    """Models of one sweep. `points`: speed-up and distance, both relative to the static model, and a text beside it."""

    label: str
    points: tuple[tuple[float, float, str], ...]


def ablations_png(
    curves: Sequence[Curve],
    marks: Mapping[str, tuple[float, float]],
    bars: Mapping[str, tuple[float, float]],
    detail: str,
) -> bytes:
    """Distances against speed-up, and bars of ablations: ours and the published, relative to the complete model.

    `marks`: single points (speed-up, distance), by label. `bars`: both distances, by the title of the ablation; without
    any, there is no second panel. `detail`: what the reader has to know. All distances are above 0.
    """
    with drawing(10, 3.9) as figure:
        headline(figure, "Quality against speed-up, and what each kind of router contributes", detail)
        first, *others = figure.subplots(1, 1 + bool(bars), width_ratios=(1.15, 1)[: 1 + bool(bars)], squeeze=False)[0]
        _sweep(first, curves, marks)
        for axis in others:
            _ablations(axis, bars)
        return png(figure)


def _on_lines() -> dict[str, Any]:
    """Texts with a white rim, which can be read where lines cross them."""
    from matplotlib.patheffects import withStroke

    return {"path_effects": [withStroke(linewidth=2, foreground="white")], "zorder": 5}


def _sweep(axis: Any, curves: Sequence[Curve], marks: Mapping[str, tuple[float, float]]) -> None:
    axis.axhline(1, color=MUTED, lw=0.8, ls=":")
    for place, (curve, colour) in enumerate(zip(curves, _COLOURS, strict=False)):
        x, y, texts = zip(*curve.points, strict=True)
        style = {"color": colour, "ms": 5, "mec": "white", "mew": 1, "zorder": 3 - place / 10}  # the first is on top
        axis.plot(x, y, "o-", label=curve.label, **style)
        for text, point in zip(texts, zip(x, y, strict=True), strict=True):
            axis.annotate(text, point, (0, -12 if place else 5), ha="center", color=colour, **_BESIDE, **_on_lines())
    for label, mark in marks.items():
        axis.plot(*mark, "s", ms=6, mew=1.4, color="white", mec=ACCENT, label=label, zorder=4)
    axis.set_yscale("log")
    axis.margins(y=0.1)
    axis.set(xlabel="speed-up over the static model", ylabel="distance ÷ static model's\n(lower is better)")
    axis.set_title("Sweep of lambda, which stands beside each point")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2)  # no corner is free in every sweep
    _plain_ticks(axis.yaxis, axis.get_ylim())


def _ablations(axis: Any, bars: Mapping[str, tuple[float, float]]) -> None:
    both = zip(*bars.values(), strict=True)
    for offset, values, colour, label in zip((-0.2, 0.2), both, (ACCENT, MUTED), ("ours", "the paper"), strict=True):
        places = [place + offset for place in range(len(values))]
        axis.barh(places, [value - 1 for value in values], 0.38, left=1, color=colour, label=label)
        for place, value in zip(places, values, strict=True):
            axis.annotate(f"{value:.2f}", (max(1, value), place), (4, 0), va="center", color=INK, **_BESIDE)
    axis.axvline(1, color=INK, lw=0.8)
    axis.set_xscale("log")
    axis.set_xlim(right=axis.get_xlim()[1] * 1.3)  # room for the last number
    axis.set_yticks(range(len(bars)), [fill(title, 22) for title in bars])
    axis.invert_yaxis()
    axis.set_title("Ablations")
    axis.set_xlabel("distance ÷ that of the complete model")
    axis.legend(loc="upper right")
    _plain_ticks(axis.xaxis, axis.get_xlim())


def _plain_ticks(axis: Any, limits: tuple[float, float]) -> None:
    """Numbers such as 0.5, 1 and 20 on a logarithmic axis: fewer of each decade where it shows more than one."""
    low, high = sorted(limits)
    steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high < 10 * low else (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
    ticks = [step * 10.0**power for power in range(-6, 7) for step in steps]
    shown = [value for value in ticks if low <= value <= high]
    axis.set_ticks(shown, [f"{value:g}" for value in shown])
    axis.set_ticks([], minor=True)
