"""The picture of samplers: image quality against speed, for each number of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dydit.plot_style import ACCENT, INK, MUTED, SECOND, drawing, headline, png

_COLOURS = {"ddpm": MUTED, "ddim": ACCENT, "dpm-solver++": SECOND}


def samplers_png(runs: Sequence[Mapping[str, Any]]) -> bytes:
    """Fréchet distance against images per second; one line for each sampler, a point for each number of steps.

    A run has `sampler`, `steps`, `images_per_second` and `frechet_distance`.
    """
    with drawing(7.2, 3.9) as figure:
        headline(figure, "Fewer steps are chosen when sampling", "one bundle; each point is a number of steps")
        axis = figure.subplots()
        for sampler in dict.fromkeys(run["sampler"] for run in runs):
            own = sorted((run for run in runs if run["sampler"] == sampler), key=lambda run: -run["steps"])
            speeds, distances = ([run[key] for run in own] for key in ("images_per_second", "frechet_distance"))
            colour = _COLOURS.get(sampler, INK)
            axis.plot(speeds, distances, "o-", color=colour, ms=5, mec="white", mew=1, label=sampler)
            for run, x, y in zip(own, speeds, distances, strict=True):
                axis.annotate(str(run["steps"]), (x, y), (0, 6), textcoords="offset points", ha="center", color=colour)
        axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("images per second (log scale; faster is right)")
        axis.set_ylabel("Fréchet distance\n(lower is better)")
        axis.grid(axis="y")
        axis.legend()
        return png(figure)
