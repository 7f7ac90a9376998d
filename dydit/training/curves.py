"""The plot of a run: its losses, and its FLOPs ratio against the target."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dydit.diffusion.process import Prediction
from dydit.extras import require
from dydit.files import write_atomic

_TARGETS = {
    Prediction.EPSILON: "the noise",
    Prediction.X0: "the image",
    Prediction.V: "v",
    Prediction.VELOCITY: "the velocity",
}


def draw_curves(log: Sequence[dict[str, Any]], path: Path, title: str, prediction: Prediction) -> None:
    """Draw the log's losses and, for a dynamic run, FLOPs ratio against target, as a PNG at `path`."""
    require("drawing the curves", ["matplotlib"])
    from matplotlib.figure import Figure

    dynamic = any("ratio" in entry for entry in log)
    figure = Figure(figsize=(10 if dynamic else 5.5, 4), layout="constrained")
    axes = figure.subplots(1, 2 if dynamic else 1, squeeze=False)[0]
    for key, label in (("mse", "training"), ("probe_mse", "probe (EMA, no gate noise)")):
        iterations, values = _series(log, key)
        axes[0].plot(iterations, values, label=label)
    error = f"{title}: error on {_TARGETS[prediction]}"
    axes[0].set(title=error, xlabel="iteration", ylabel="mean squared error", yscale="log")
    axes[0].legend()
    if dynamic:
        styles = (
            ("target", "target", "k--"),
            ("ratio", "training", "C0"),
            ("probe_ratio", "probe (EMA, no gate noise)", "C1"),
        )
        for key, label, style in styles:
            iterations, values = _series(log, key)
            axes[1].plot(iterations, values, style, label=label)
        parts = (("probe_heads", "heads"), ("probe_groups", "groups"), ("probe_tokens", "tokens"))
        for (key, label), color in zip(parts, ("C2", "C3", "C4"), strict=True):
            iterations, values = _series(log, key)
            axes[1].plot(iterations, values, color, label=f"probe, {label}", linewidth=0.8)
        axes[1].set(title="FLOPs ratio of the blocks", xlabel="iteration", ylim=(0, 1.02))
        axes[1].legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomic(path, picture.getvalue())


def _series(log: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    present = [entry for entry in log if key in entry]
    return [entry["iteration"] for entry in present], [entry[key] for entry in present]
