"""The picture of a calibration: tokens over steps and blocks, and capacities over the needs of batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dydit.calibrate.calibration import CalibrationResult
from dydit.plot_style import ACCENT_LIGHT, MUTED, SECOND, drawing, headline, png, ramp, timestep_ticks
from dydit.reports.text import extra_text
from dydit.words import counted

PAIRS = 4


def calibration_png(result: CalibrationResult) -> bytes:
    """Top: share of routed tokens by step and block. Bottom: for a few segments and blocks, the number of tokens of a
    row that batches need, and the chosen capacity. Returns the bytes of a PNG."""
    tokens = result.calibration.tokens
    ratio = np.asarray(tokens.mean_ratio)  # [S, L]
    held = tokens.held_out
    with drawing(10, 5.6) as figure:
        headline(
            figure,
            f"{ratio.mean():.0%} of the tokens enter an MLP; with these capacities the MLPs compute "
            f"{extra_text(held.mlp_ratio)} than with dynamic routing",
            f"on {counted(held.images, 'held-out image')}, the tokens overflow in {held.rate:.3%} of the blocks of all "
            f"steps (below {held.upper:.2%} with 95 % confidence), so {held.repeated_steps:.2%} of the steps run twice",
        )
        upper, lower = figure.subfigures(2, 1, height_ratios=(1.15, 1))
        _ratio_map(upper, ratio, result.timesteps)
        axes = lower.subplots(1, PAIRS, sharey=True)
        for axis, (segment, block) in zip(axes, _pairs(len(tokens.capacities), ratio.shape[1]), strict=True):
            _need(axis, result, segment, block)
        axes[0].set_ylabel("share of steps and batches")
        lower.supxlabel("tokens per batch row that enter the MLP", fontsize=9)
        return png(figure)


def _pairs(segments: int, depth: int) -> list[tuple[int, int]]:
    """A few (segment, block) pairs, from the first of both to the last of both."""
    places = np.linspace(0, 1, PAIRS)
    return [(round(float(at) * (segments - 1)), round(float(at) * (depth - 1))) for at in places]


def _ratio_map(figure: Any, ratio: np.ndarray, timesteps: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axis = figure.subplots()
    drawn = axis.imshow(ratio.T, cmap=ramp(), aspect="auto", interpolation="nearest", vmin=0, vmax=1)
    axis.set_xticks(*timestep_ticks(timesteps))
    axis.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.tick_params(left=False)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.set(xlabel="timestep   (noise → image)", ylabel="block")
    bar = figure.colorbar(drawn, ax=axis, aspect=14, pad=0.01, format=PercentFormatter(1))
    bar.set_label("tokens that enter the MLP")
    bar.outline.set_visible(False)


def _need(axis: Any, result: CalibrationResult, segment: int, block: int) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    tokens = result.calibration.tokens
    first, end = result.bounds[segment : segment + 2]
    needed = np.concatenate([each.per_row(first, end, block).reshape(-1) for each in result.groups])
    chosen = tokens.capacities[segment][block]
    lowest, highest = int(needed.min()), max(int(np.ceil(needed.max())), chosen)
    counts, edges = np.histogram(needed, bins=min(24, 4 * (highest - lowest) + 1), range=(lowest, highest + 1))
    axis.stairs(counts / counts.sum(), edges, fill=True, color=ACCENT_LIGHT)
    axis.axvline(chosen, color=SECOND, lw=1.4)
    if highest < tokens.tokens <= 1.25 * highest:
        axis.axvline(tokens.tokens, color=MUTED, lw=1, ls=(0, (4, 3)))
    steps = f"step {first}" if end - first == 1 else f"steps {first} to {end - 1}"
    axis.set_title(f"{steps}, block {block}:\n{chosen} slots of {tokens.tokens}", fontsize=8.5)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
