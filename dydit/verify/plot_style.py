"""How every picture of a report looks: one restrained style, one accent, colours that colour-blind readers tell apart.

Pictures are made without a display and without matplotlib's global state, and are returned as the bytes of a PNG.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np

from dydit.errors import DyditError

INK, MUTED, FAINT = "#1d2733", "#6b7785", "#dfe4ea"
ACCENT, ACCENT_LIGHT, SECOND = "#1b6ca8", "#a9cbe4", "#c75b12"
OFF = "#e4e9ee"
"""A unit that is off. `SECOND` (vermilion) marks limits, the chosen plan, outlines."""

DPI = 200  # twice the 100 that a report shows an inch at

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 6,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


@contextmanager
def drawing(width: float, height: float) -> Iterator[Any]:
    """A `matplotlib.figure.Figure` of the given size in inches, in our style; draw and `png` inside the context.

    Raises `DyditError` where matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise DyditError("matplotlib is not installed, but draws the pictures: pip install 'dydit[report]'") from error
    with rc_context(cast("Any", _STYLE)):
        layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.05, wspace=0.05, hspace=0.02)
        figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)
        FigureCanvasAgg(figure)
        yield figure


def headline(figure: Any, finding: str, detail: str = "") -> None:
    """The finding as the picture's title, flush left, and one quieter line below it; the rest is laid out beneath."""
    width, height = figure.get_size_inches()
    band = 0.56 if detail else 0.36
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - band / height))
    left = 0.02 / width
    figure.text(left, 1 - 0.1 / height, finding, ha="left", va="top", fontsize=11.5, fontweight="bold", color=INK)
    figure.text(left, 1 - 0.335 / height, detail, ha="left", va="top", fontsize=8.5, color=MUTED)


def png(figure: Any) -> bytes:
    """The picture as PNG; the same input gives the same bytes with the same matplotlib."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": "dydit"})
    return buffer.getvalue()


def timestep_ticks(timesteps: Sequence[int], most: int = 6) -> tuple[list[float], list[str]]:
    """Where round timesteps lie on an axis of step indices 0..S-1, noisiest first, and their labels."""
    times = np.asarray(timesteps, np.float64)
    first, last = int(times[0]), int(times[-1])
    stride = next((s for s in (1, 2, 5, 10, 20, 50, 100, 200, 250, 500) if (first - last) / s <= most - 1), 1000)
    values = [t for t in range(first - first % stride, last - 1, -stride) if first - t > stride / 3]
    values = [first, *values]
    return list(np.interp(values, times[::-1], np.arange(len(times))[::-1])), [str(value) for value in values]
