"""The style of every picture, with colours that colour-blind readers can distinguish.

Pictures need no display and no global state of matplotlib, and are returned as the bytes of a PNG.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from dydit.errors import DyditError
from dydit.extras import quiet_log
from dydit.files import write_atomic

T = TypeVar("T")

INK, MUTED, FAINT = "#1d2733", "#6b7785", "#dfe4ea"
ACCENT, ACCENT_LIGHT, SECOND = "#1b6ca8", "#a9cbe4", "#c75b12"
OFF = "#e4e9ee"
"""The colour of a unit that is off. `SECOND` (vermilion) marks limits, the chosen plan, and outlines."""

DPI = 200  # twice the 100 pixels per inch of a report

MARGIN, TITLE_PITCH, DETAIL_PITCH = 0.08, 0.215, 0.155  # inches

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
    """A `matplotlib.figure.Figure` of this size in inches in the style of reports; draw and call `png` in the context.

    Raises `DyditError` if matplotlib is not installed.
    """
    _find_fonts()
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with style.context(cast("Any", ["default", _STYLE])):  # whatever the user's matplotlibrc says
        layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.05, wspace=0.05, hspace=0.02)
        figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)
        FigureCanvasAgg(figure)
        yield figure


def _find_fonts() -> None:
    """Have matplotlib know the fonts that it comes with.

    It keeps one list of fonts for a user, whatever the environment. A list written by an environment that was just
    being removed lacks them, and stays: then every picture would log dozens of warnings, or fail. Raises `DyditError`
    if matplotlib is not installed.
    """
    try:
        with quiet_log("matplotlib.font_manager"):  # which says on standard error if making the list takes long
            from matplotlib import font_manager, get_data_path
    except ImportError as error:
        raise DyditError("pictures need matplotlib, which is not installed: pip install 'dydit[report]'") from error
    known = {font.fname for font in font_manager.fontManager.ttflist}
    for path in sorted(Path(get_data_path(), "fonts", "ttf").glob("*.ttf")):
        if str(path) not in known:
            font_manager.fontManager.addfont(path)


def headline(figure: Any, finding: str, detail: str = "") -> None:
    """The finding as the title of the picture and a detail in smaller type below it, both aligned left.

    Long lines are wrapped, and the picture becomes higher by the added lines.
    """
    width, height = figure.get_size_inches()
    title = {"fontsize": 11.5, "fontweight": "bold", "color": INK, "parse_math": False}
    quiet = {"fontsize": 8.5, "color": MUTED, "parse_math": False}  # a $ in a file's name is a $
    findings, details = wrapped(figure, finding, title), wrapped(figure, detail, quiet)
    top, band = 0.1, 0.145 + TITLE_PITCH * len(findings) + (0.045 if details else 0.0) + DETAIL_PITCH * len(details)
    height += TITLE_PITCH * max(0, len(findings) - 1) + DETAIL_PITCH * max(0, len(details) - 1)
    figure.set_size_inches(width, height)
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - band / height))
    for lines, pitch, how in ((findings, TITLE_PITCH, title), (details, DETAIL_PITCH, quiet)):
        for line in lines:
            figure.text(MARGIN / width, 1 - top / height, line, ha="left", va="top", **how)
            top += pitch
        top += 0.02


def wrapped(figure: Any, text: str, how: dict[str, Any]) -> list[str]:
    """A text in lines that fit the width of the figure, broken between words, or within words longer than a line."""
    room = (figure.get_size_inches()[0] - 2 * MARGIN) * figure.dpi
    probe = figure.text(0, 0, "", **how)
    renderer = figure.canvas.get_renderer()

    def fits(line: str) -> bool:
        probe.set_text(line)
        return bool(probe.get_window_extent(renderer).width <= room)

    lines: list[str] = []
    for word in text.split():
        if lines and fits(f"{lines[-1]} {word}"):
            lines[-1] += f" {word}"
            continue
        while not fits(word):
            most = next(count for count in range(len(word) - 1, 0, -1) if count == 1 or fits(word[:count]))
            lines.append(word[:most])
            word = word[most:]
        lines.append(word)
    probe.remove()
    return lines


def ramp() -> Any:
    """A colour map from nearly white to navy, with even steps of lightness."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("compute", [OFF, ACCENT_LIGHT, ACCENT, "#0c2f4f"])


def shortened(name: str) -> str:
    """A name, or the beginning and the end of a name of more than 28 characters."""
    return name if len(name) <= 28 else f"{name[:13]}\u2026{name[-14:]}"


def png(figure: Any) -> bytes:
    """The picture as PNG. The same input gives the same bytes with the same version of matplotlib."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": "dydit"})
    return buffer.getvalue()


def in_few_colours(picture: bytes) -> bytes:
    """A PNG in 256 colours, a third of the size: for pictures that are kept with documents."""
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(io.BytesIO(picture)) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def timestep_ticks(timesteps: Sequence[float]) -> tuple[list[float], list[str]]:
    """The positions of round timesteps on an axis of step indices 0..S-1 (noisiest first), and their labels."""
    times = np.asarray(timesteps, np.float64)
    first, last = int(times[0]), int(times[-1])
    stride = next((s for s in (1, 2, 5, 10, 20, 50, 100, 200, 250, 500) if (first - last) / s <= 5), 1000)
    round_times = range(first - first % stride, last - 1, -stride)
    values = [first, *(t for t in round_times if first - t > stride / 3)]
    return list(np.interp(values, times[::-1], np.arange(len(times))[::-1])), [str(value) for value in values]


def write_picture(draw: Callable[[T], bytes], result: T, path: Path) -> None:
    """Draw `result` and write the PNG to `path`, if matplotlib is installed; without it, nothing is written."""
    if find_spec("matplotlib") is not None:
        write_atomic(path, draw(result))
