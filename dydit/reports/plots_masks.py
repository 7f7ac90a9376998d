"""Pictures of dynamic width over the timesteps (masks), and of routed tokens over the image.

Each function returns the bytes of a PNG.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dydit.models.architecture import UnitAxis
from dydit.plot_style import ACCENT, OFF, SECOND, drawing, headline, png, ramp, timestep_ticks
from dydit.reports.plots_samples import bare, picture_cell
from dydit.words import counted


def masks_png(masks: np.ndarray, axis: UnitAxis, timesteps: Sequence[float]) -> bytes:
    """The units that are on in each sampling step, with a column of plots for each unit group.

    `masks` bool [S, U] by checkpoint unit, steps in execution order (noisiest first); `timesteps` [S].
    """
    groups, depth = axis.blocks[0].groups, len(axis.blocks)
    most = max(group.count for group in groups)
    height = min(max(depth * most * 0.062, 2.6), 8.5)
    distinct = len(np.unique(masks, axis=0))
    with drawing(5 * len(groups), height + 1.6) as figure:
        shares = [
            f"{share:.0%} of {group.title}" for share, group in zip(axis.shares(masks).values(), groups, strict=True)
        ]
        units = " and ".join(str(count) for count in dict.fromkeys(group.count for group in groups))
        headline(
            figure,
            f"{' and '.join(shares)} are on, averaged over the run",
            f"{counted(distinct, 'distinct mask')} in {counted(len(masks), 'step')}; each column is a step, each row a "
            f"unit of the checkpoint ({counted(depth, 'block')} of {units}); dark = on",
        )
        shape = (2, len(groups))
        axes = figure.subplots(*shape, sharex=True, sharey="row", height_ratios=(0.85, height), squeeze=False)
        for column, group in enumerate(groups):
            _share_line(axes[0, column], axis.of_group(masks, group.name), group.title)
            _mask_map(axes[1, column], axis.of_group(masks, group.name), timesteps)
        axes[0, 0].set_ylabel("share on")
        axes[1, 0].set_ylabel("block")
        return png(figure)


def _share_line(axis: Any, masks: np.ndarray, name: str) -> None:
    from matplotlib.ticker import PercentFormatter

    share = masks.mean(axis=(1, 2))
    toggling = int((masks.any(0) & ~masks.all(0)).sum())
    axis.fill_between(range(len(share)), share, color=ACCENT, alpha=0.14, lw=0)
    axis.plot(share, color=ACCENT, marker="o" if len(share) == 1 else None)
    axis.set(ylim=(0, 1.04), yticks=(0, 0.5, 1))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.grid(axis="y")
    axis.tick_params(bottom=False)
    span = f"{share.min():.0%} to {share.max():.0%}" if share.min() < share.max() else f"{share[0]:.0%}"
    axis.set_title(
        f"{name.capitalize()}: {span} on; {toggling} of {masks[0].size} {name.split()[-1]} "
        f"toggle{'s' if toggling == 1 else ''}"
    )


def _mask_map(axis: Any, masks: np.ndarray, timesteps: Sequence[float]) -> None:
    from matplotlib.colors import ListedColormap

    steps, depth, units = masks.shape
    gap = max(1, round(units / 8))
    rows = np.full((depth, units + gap, steps), 2)  # 2: the white rows between the blocks
    rows[:, :units] = masks.transpose(1, 2, 0)
    rows = rows.reshape(-1, steps)[:-gap]
    axis.imshow(
        rows, cmap=ListedColormap([OFF, ACCENT, "white"]), vmin=0, vmax=2, aspect="auto", interpolation="nearest"
    )
    blocks = range(0, depth, -(-depth // 14))
    axis.set_yticks([block * (units + gap) + (units - 1) / 2 for block in blocks], [str(block) for block in blocks])
    axis.set_xticks(*timestep_ticks(timesteps))
    axis.tick_params(left=False)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.set_xlabel("timestep   (noise → image)")


def tokens_png(
    images: np.ndarray,
    tokens: np.ndarray,
    timesteps: Sequence[float],
    labels: Sequence[str],
    share: float | None = None,
) -> bytes:
    """Where in the image compute is spent: for each image and step, the number of blocks whose MLP each token enters.

    `images` float [R, C, S, S] in [-1, 1]: the finished images, shown in the first column; if they have one channel,
    their outline is drawn over each map. `tokens` bool [T, L, R, N] at the shown `timesteps` [T]. `labels` [R].
    `share`: share of tokens computed over the whole run, 0..1; None: that of the shown steps.
    """
    shown, depth, rows, count = tokens.shape
    side = math.isqrt(count)  # tokens that are not of the image come first
    counts = tokens[..., count - side**2 :].sum(1).reshape(shown, rows, side, side)
    heat = _count_colours(depth)
    average = tokens.mean() if share is None else share
    per_image, per_step = tokens.mean(axis=(0, 1, 3)), tokens.mean(axis=(1, 2, 3))
    cell = min(1.2, 8.4 / (shown + 1))
    by_image = f"{per_image.min():.0%} to {per_image.max():.0%}" if rows > 1 else f"{per_image[0]:.0%}"
    with drawing((shown + 1) * cell + 1.6, rows * cell + 1.15) as figure:
        headline(
            figure,
            f"{average:.0%} of the tokens enter the MLPs" + ("; the others skip them" if average < 1 else ""),
            f"in the shown {'step' if shown == 1 else 'steps'}, {by_image} of the tokens of an image enter the MLPs; "
            "the share over all images is above each column",
        )
        axes = figure.subplots(rows, shown + 1, squeeze=False)
        for row in range(rows):
            picture_cell(axes[row, 0], images[row])
            axes[row, 0].set_ylabel(labels[row], rotation=0, ha="right", va="center", labelpad=8)
            for column in range(shown):
                drawn = _heat_cell(axes[row, column + 1], counts[column, row], images[row], heat)
        axes[0, 0].set_title("image", loc="center", fontsize=8.5)
        for column, timestep in enumerate(timesteps):
            title = f"t = {timestep:.3g}\n{per_step[column]:.0%}"
            axes[0, column + 1].set_title(title, loc="center", fontsize=8.5, linespacing=1.35)
        _count_bar(figure, axes, drawn, depth)
        return png(figure)


def _count_colours(depth: int) -> Any:
    """A colour for each count 0..L."""
    from matplotlib.colors import ListedColormap

    return ListedColormap(ramp()(np.linspace(0, 1, depth + 1)))


def _heat_cell(axis: Any, counts: np.ndarray, image: np.ndarray, colours: Any) -> Any:
    size = image.shape[-1]
    limits = {"vmin": -0.5, "vmax": colours.N - 0.5}
    drawn = axis.imshow(counts, cmap=colours, extent=(0, size, size, 0), interpolation="nearest", **limits)
    if len(image) == 1 and image.min() < 0 < image.max():
        centres = np.arange(size) + 0.5
        axis.contour(centres, centres, image[0], levels=[0], colors="white", linewidths=2.2)
        axis.contour(centres, centres, image[0], levels=[0], colors=SECOND, linewidths=1.1)
    bare(axis)
    return drawn


def _count_bar(figure: Any, axes: Any, drawn: Any, depth: int) -> None:
    stride = -(-depth // 8)
    ticks = [*range(0, depth - stride // 2, stride), depth]
    bar = figure.colorbar(drawn, ax=axes, shrink=min(1.0, 3.2 / len(axes)), aspect=16, pad=0.02, ticks=ticks)
    gap = "\n" if len(axes) < 4 else " "  # a short colour bar has no room for a long line
    bar.set_label(f"blocks (of {depth}){gap}that computed{gap}the token")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
