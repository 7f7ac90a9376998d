"""The picture of a run: its losses, and its FLOPs ratio against the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dydit.diffusion.process import Prediction
from dydit.plot_style import ACCENT, ACCENT_LIGHT, INK, MUTED, SECOND, drawing, headline, png

_TARGETS = {
    Prediction.EPSILON: "the noise",
    Prediction.X0: "the image",
    Prediction.V: "v",
    Prediction.VELOCITY: "the velocity",
}
# (key of the log, its label, colour, width of the line); what comes later is on top.
_ERRORS = (("mse", "training", ACCENT_LIGHT, 1.0), ("probe_mse", "probe (EMA, no gate noise)", ACCENT, 1.6))
_RATIOS = (
    ("probe_heads", "heads", "#5b8c3a", 0.8),
    ("probe_groups", "groups", MUTED, 0.8),
    ("probe_tokens", "tokens", SECOND, 0.8),
    ("ratio", "FLOPs ratio, training", ACCENT_LIGHT, 1.0),
    ("probe_ratio", "FLOPs ratio, probe", ACCENT, 1.6),
)


def curves_png(log: Sequence[dict[str, Any]], name: str, prediction: Prediction) -> bytes:
    """The losses of a run over its iterations, as a PNG; of a dynamic one also the FLOPs ratio, and what is on.

    log: the lines of `log.jsonl`. name: that of the recipe. Raises `DyditError` if matplotlib is not installed.
    """
    dynamic = any("ratio" in line for line in log)
    with drawing(9.5 if dynamic else 5.5, 3.8) as figure:
        headline(figure, *_finding(log, name))
        errors, *ratios = figure.subplots(1, 1 + dynamic, squeeze=False)[0]
        _draw(errors, log, _ERRORS)
        low, high = errors.dataLim.intervaly
        errors.set(title=f"Mean squared error on {_TARGETS[prediction]}", yscale="log" if high > 4 * low else "linear")
        for axis in ratios:
            axis.plot(*_series(log, "target"), color=INK, lw=0.8, ls="--", label="FLOPs ratio, target")
            _draw(axis, log, _RATIOS)
            axis.set(title="Share that is on", ylim=(0, 1.02))
        for axis in (errors, *ratios):
            axis.set_xlabel("iteration")
            axis.grid(axis="y")
            if log:
                axis.legend(loc="best")
        return png(figure)


def _finding(log: Sequence[dict[str, Any]], name: str) -> tuple[str, str]:
    """The headline and the detail below it: where the run came to."""
    last = {key: value for line in log for key, value in line.items()}
    error, ratio = last.get("probe_mse", last.get("mse")), last.get("probe_ratio", last.get("ratio"))
    parts = [f"error {error:.3g}"] if error is not None else []
    if ratio is not None:
        parts.append(f"FLOPs ratio {ratio:.3f}" + (f" (target {last['target']:.2f})" if "target" in last else ""))
    return f"{name}: {', '.join(parts)}" if parts else name, f"after {last.get('iteration', 0):,} iterations"


def _draw(axis: Any, log: Sequence[dict[str, Any]], lines: Sequence[tuple[str, str, str, float]]) -> None:
    for key, label, colour, width in lines:
        iterations, values = _series(log, key)
        if values:
            axis.plot(iterations, values, color=colour, lw=width, label=label)


def _series(log: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    present = [line for line in log if key in line]
    return [line["iteration"] for line in present], [line[key] for line in present]
