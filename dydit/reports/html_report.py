"""The report as one HTML file: samples, masks, tokens, parity, latency, plan, machine.

The file is self-contained (pictures as base64 PNG, styles inline), so it can be mailed, archived and opened offline. It
has a section for each result that exists.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dydit.errors import DyditError
from dydit.files import write_atomic
from dydit.plot_style import DPI
from dydit.reports.bench_report import BenchReport, bound_text, busy, repeats_text
from dydit.reports.inspection_facts import BundleFacts, routing_text
from dydit.reports.parity_report import ParityReport
from dydit.reports.results import Line, Machine
from dydit.reports.text import bytes_text, count_text, exponent, guidance_text
from dydit.words import counted

TEMPLATE = "report.html.j2"
PICTURES = {
    "samples": "Sheet of generated images, a column for each class",
    "masks": "Heat maps of the active heads and channel groups over the sampling steps",
    "tokens": "Images, and the number of blocks that computed each of their tokens, by timestep",
    "parity": "Deviation from the reference in each step, with the tolerances",
    "latency": "Milliseconds a step of each configuration, and the bound by multiply-adds",
    "plan": "Cost and memory of plans by their number of segments",
}
"""The pictures of a report, and the alternative text of each."""
CSS_DPI = 100  # pictures are drawn at DPI and shown at this many pixels an inch: crisp on a screen of twice the density


@dataclass(frozen=True)
class ReportContent:
    """The content of a report. `headlines`: the findings at the top, values in large type. `pictures`: PNG bytes by the
    names in `PICTURES`. `facts`: rows of the last table."""

    title: str
    subtitle: str
    headlines: Sequence[Line]
    machine: Machine
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    samples_note: str = ""
    parity: ParityReport | None = None
    bench: BenchReport | None = None
    bundle: BundleFacts | None = None
    facts: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Picture:
    """An embedded picture: data URI, size in CSS pixels, and alternative text."""

    uri: str
    width: int
    height: int
    alt: str

    @classmethod
    def of(cls, data: bytes, alt: str) -> Picture:
        """From the bytes of a PNG drawn at `plot_style.DPI`."""
        width, height = struct.unpack(">II", data[16:24])  # the header chunk comes first in every PNG
        uri = "data:image/png;base64," + base64.b64encode(data).decode()
        return cls(uri, width * CSS_DPI // DPI, height * CSS_DPI // DPI, alt)


def write_report(path: Path, content: ReportContent) -> None:
    """Write the report as one HTML file, atomically, replacing `path`."""
    write_atomic(path, render_report(content).encode())


def render_report(content: ReportContent) -> str:
    """The report as HTML. Raises `DyditError` where jinja2 is not installed."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise DyditError("the report needs jinja2, which is not installed: pip install 'dydit[report]'") from error
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": bytes_text, "count": count_text, "exponent": _exponent, "counted": counted}
    environment.filters |= {"guidance": guidance_text, "bound": bound_text, "repeats": repeats_text}
    environment.filters["routing"] = routing_text
    pictures = {name: Picture.of(data, PICTURES[name]) for name, data in content.pictures.items()}
    checks = [check for check in content.parity.checks if check.sets_aside] if content.parity else []
    flipped = [image for check in checks for image in check.flipped_images]
    return environment.get_template(TEMPLATE).render(
        content=content, pictures=pictures, flipped=flipped, busy=content.bench is not None and busy(content.bench)
    )


def _exponent(value: float | None) -> str:
    return "\u2013" if value is None else exponent(value)
