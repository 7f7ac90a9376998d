"""The picture of a search for layers in 8 bits: speed against quality, and the layers that stay in 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dydit.calibrate.calibration import CalibrationResult
from dydit.calibrate.mixed_precision import Sensitivity
from dydit.plot_style import ACCENT, ACCENT_LIGHT, FAINT, INK, MUTED, OFF, SECOND, drawing, headline, png
from dydit.words import counted

_FP16, _INT8, _ABSENT = 2, 1, 0


def sensitivity_png(result: CalibrationResult) -> bytes:
    """Left: quality of the images over the share of multiply-adds in 8 bits, with the target and the choice. Right: the
    layers that stay in 16 bits, by segment and block. Returns the bytes of a PNG."""
    found, ranges = result.calibration.sensitivity, result.calibration.activations
    assert found is not None and ranges is not None
    stay, missed = found.layers - found.chosen.layers, "" if found.held_out_holds else ": the target is missed"
    with drawing(10, 4.6) as figure:
        headline(
            figure,
            f"{found.chosen.share:.0%} of the linear layers' multiply-adds in {found.precision}, {target_words(found)}",
            f"{stay} of {counted(found.layers, 'layer')} stay in 16 bits; on "
            f"{counted(found.images, 'held-out image')}, {quality_words(found, found.held_out)}{missed}",
        )
        left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
        _curve(left.subplots(), found)
        _map(right, found, ranges.fp16_layers, result.layers, result.bounds)
        return png(figure)


def search_words(found: Sensitivity) -> str:
    """The choice, its quality, and whether it also reaches the target on held-out images, in one line."""
    stay, chosen = found.layers - found.chosen.layers, found.chosen
    held = "which reaches the target" if found.held_out_holds else "which MISSES the target"
    return (
        f"{found.precision}, target {target_words(found)}: {stay} of {counted(found.layers, 'linear layer')} stay in "
        f"16 bits, and {chosen.share:.1%} of the multiply-adds are in 8 bits. By multiply-adds, the linear layers can "
        f"be at most {chosen.bound:.2f} times as fast as with all of them in 16 bits. On "
        f"{counted(found.images, 'image')}, {quality_words(found, chosen.quality)}. On as many "
        f"held-out images, {quality_words(found, found.held_out)}, {held}"
    )


def target_words(found: Sensitivity) -> str:
    """The target in words."""
    if found.target_psnr is not None:
        return f"at least {found.target_psnr:g} dB"
    return f"at most {found.target_fd_ratio:g} times the Fréchet distance of the model before quantization"


def quality_words(found: Sensitivity, quality: Any) -> str:
    """A quality in the measure of the target."""
    if found.target_psnr is not None:
        return f"the lowest PSNR is {quality.psnr_least:.1f} dB"
    return f"the Fréchet distance is {quality.fd_ratio:.3f} times the model's"


def _curve(axis: Any, found: Sensitivity) -> None:
    from matplotlib.ticker import PercentFormatter

    shares = [point.share for point in found.curve]
    if found.target_psnr is not None:
        target = found.target_psnr
        for name, colour, label in (
            ("psnr_median", ACCENT_LIGHT, "median image"),
            ("psnr_least", ACCENT, "worst image"),
        ):
            values = [getattr(point.quality, name) for point in found.curve]
            axis.plot(shares, values, "o-", color=colour, ms=3.5, lw=1.2, label=label)
        axis.set_ylabel("PSNR against the model without quantization, dB")
        chosen, held = found.chosen.quality.psnr_least, found.held_out.psnr_least
    else:
        assert found.target_fd_ratio is not None
        target = found.target_fd_ratio
        values = [point.quality.fd_ratio for point in found.curve]
        axis.plot(shares, values, "o-", color=ACCENT, ms=3.5, lw=1.2, label="images of the search")
        axis.set_ylabel("Fréchet distance, relative to the model's")
        chosen, held = found.chosen.quality.fd_ratio or 0.0, found.held_out.fd_ratio or 0.0
    axis.axhline(target, color=SECOND, lw=1, ls=(0, (4, 3)), label="target")
    axis.plot([found.chosen.share], [chosen], "o", color=SECOND, ms=7, mfc="none", mew=1.6, label="chosen")
    axis.plot([found.chosen.share], [held], "x", color=INK, ms=6, mew=1.4, label="chosen, held-out images")
    axis.grid(color=FAINT)
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.set(xlabel="multiply-adds of linear layers in 8 bits", xlim=(-0.03, 1.03))
    axis.legend(loc="best")
    above = axis.secondary_xaxis("top", functions=(lambda x: x, lambda x: x))
    above.set_xticks([0, 0.5, 1], ["1x", "1.33x", "2x"])
    above.tick_params(labelsize=7.5, labelcolor=MUTED)
    above.set_xlabel("bound on the speed of these layers, if 8 bits take half the time of 16", fontsize=8, color=MUTED)


def _map(
    figure: Any, found: Sensitivity, fp16_layers: np.ndarray, layers: Sequence[str], bounds: Sequence[int]
) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    existing = np.asarray(found.losses) > 0  # [segments, L, layers]
    state = np.where(fp16_layers, _FP16, np.where(existing, _INT8, _ABSENT))
    axes = figure.subplots(len(layers), 1, sharex=True)
    for axis, layer, name in zip(axes, np.moveaxis(state, 2, 0), layers, strict=True):
        colours = ListedColormap(["white", OFF, ACCENT])
        axis.imshow(layer.T, cmap=colours, vmin=0, vmax=2, aspect="auto", interpolation="nearest")
        axis.set_ylabel(f"{name}\nblock", fontsize=8)
        axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.tick_params(left=False, bottom=False)
    axes[0].set_title("layers in 16 bits (blue) and in 8 bits (grey)", fontsize=9)
    axes[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes[-1].set_xlabel(f"segment of {bounds[-1]} steps   (noise → image)")
