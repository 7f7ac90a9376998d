"""Pictures of what is dynamic: width over the timesteps (masks), and tokens over the image.

Each function returns the bytes of a PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dydit.verify.plot_style import ACCENT, FAINT, INK, MUTED, OFF, drawing, headline, png, timestep_ticks

PARTS = ("attention heads", "channel groups")


def masks_png(masks: np.ndarray, timesteps: Sequence[int]) -> bytes:
    """Which heads and channel groups are on at each sampling step.

    `masks` bool [S, L, 2, H] by checkpoint unit, steps in execution order (noisiest first); `timesteps` [S] original ones.
    """
    steps, depth, _, units = masks.shape
    height = min(max(depth * units * 0.062, 2.6), 8.5)
    distinct = len(np.unique(masks.reshape(steps, -1), axis=0))
    with drawing(10, height + 1.6) as figure:
        shares = [masks[:, :, part].mean() for part in (0, 1)]
        headline(
            figure,
            f"{shares[0]:.0%} of heads and {shares[1]:.0%} of channel groups are on, averaged over the run",
            f"{distinct} distinct masks in {steps} steps; a column is one step, a row one unit of the checkpoint "
            f"({depth} blocks of {units}); dark = on",
        )
        axes = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(0.85, height))
        for part in (0, 1):
            _share_line(axes[0, part], masks[:, :, part], PARTS[part])
            _mask_map(axes[1, part], masks[:, :, part], timesteps)
        axes[0, 0].set_ylabel("share on")
        axes[1, 0].set_ylabel("block")
        return png(figure)


def _share_line(axis: Any, masks: np.ndarray, name: str) -> None:
    from matplotlib.ticker import PercentFormatter

    share = masks.mean(axis=(1, 2))
    toggling = int((masks.any(0) & ~masks.all(0)).sum())
    axis.fill_between(range(len(share)), share, color=ACCENT, alpha=0.14, lw=0)
    axis.plot(share, color=ACCENT)
    axis.set(ylim=(0, 1.04), yticks=(0, 0.5, 1))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.grid(axis="y")
    axis.tick_params(bottom=False)
    unit = name.split()[-1]
    axis.set_title(f"{name.capitalize()}: {share.min():.0%} to {share.max():.0%} on; {toggling} of {masks[0].size} {unit} toggle")


def _mask_map(axis: Any, masks: np.ndarray, timesteps: Sequence[int]) -> None:
    from matplotlib.colors import ListedColormap

    steps, depth, units = masks.shape
    gap = max(1, round(units / 12))
    rows = np.full((depth, units + gap, steps), 2)  # 2: the white rows that part the blocks
    rows[:, :units] = masks.transpose(1, 2, 0)
    rows = rows.reshape(-1, steps)[:-gap]
    axis.imshow(rows, cmap=ListedColormap([OFF, ACCENT, "white"]), vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    blocks = range(0, depth, -(-depth // 14))
    axis.set_yticks([block * (units + gap) + (units - 1) / 2 for block in blocks], [str(block) for block in blocks])
    axis.set_xticks(*timestep_ticks(timesteps))
    axis.tick_params(left=False)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.set_xlabel("timestep   (noise → image)")


def tokens_png(
    images: np.ndarray,
    tokens: np.ndarray,
    timesteps: Sequence[int],
    labels: Sequence[str],
    share: float | None = None,
) -> bytes:
    """Where in the image compute went: for each image and step, how many blocks let each token into their MLP.

    `images` float [T, R, C, S, S] in [-1, 1], as they are after each shown step, or [R, C, S, S], one for all steps;
    `tokens` bool [T, L, R, N]; `timesteps` [T]; `labels` [R]. `share`: tokens computed over the whole run, where known.
    """
    shown, depth, rows, count = tokens.shape
    side = round(count**0.5)
    counts = tokens.sum(1).reshape(shown, rows, side, side)
    pictures = np.broadcast_to(images, (shown, *images.shape)) if images.ndim == 4 else images
    cell = min(1.32, 8.6 / shown)
    with drawing(shown * cell + 1.5, rows * cell + 1.25) as figure:
        per_step = tokens.mean(axis=(1, 2, 3))
        average = tokens.mean() if share is None else share
        spread = tokens.mean(axis=(0, 1, 3))
        headline(
            figure,
            f"The routers send {average:.0%} of the tokens through the MLPs",
            f"by image {spread.min():.0%} to {spread.max():.0%}; colour: blocks, of {depth}, that computed the token",
        )
        axes = figure.subplots(rows, shown, squeeze=False)
        drawn = None
        for row in range(rows):
            for column in range(shown):
                drawn = _token_cell(axes[row, column], pictures[column, row], counts[column, row], depth)
            axes[row, 0].set_ylabel(labels[row], rotation=0, ha="right", va="center", labelpad=8)
        for column, timestep in enumerate(timesteps):
            axes[0, column].set_title(f"t = {int(timestep)}\n{per_step[column]:.0%}", loc="center", fontsize=8.5, color=INK)
        bar = figure.colorbar(drawn, ax=axes, shrink=min(1.0, 3 / rows), aspect=18, pad=0.015, ticks=range(depth + 1))
        bar.set_label("blocks that computed the token")
        bar.outline.set_visible(False)
        return png(figure)


def _token_cell(axis: Any, image: np.ndarray, counts: np.ndarray, depth: int) -> Any:
    size = image.shape[-1]
    grey = np.clip((image.mean(0) + 1) / 2, 0, 1)
    axis.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=(0, size, size, 0), interpolation="nearest")
    heat = axis.imshow(
        counts, cmap="viridis", vmin=0, vmax=depth, alpha=0.6, extent=(0, size, size, 0), interpolation="nearest"
    )
    axis.set(xticks=(), yticks=())
    axis.spines[:].set_visible(False)
    return heat
