"""Numbers and tables as people read them, for terminals, titles and reports."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dydit.bundle.measurements import MeasuredPlan
from dydit.words import counted

ROUGH = 0.25  # deviation of a fit of times; on idle machines it is a few percent


def bytes_text(size: float) -> str:
    """A size in binary units with three digits: `7.34 MiB`."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    place = 0
    while size >= 1000 and place < len(units) - 1:
        size, place = size / 1024, place + 1
    digits = f"{size:.0f}" if place == 0 else f"{size:#.3g}".removesuffix(".")
    return f"{digits} {units[place]}"


def count_text(value: float) -> str:
    """A count in powers of a thousand with three digits: `33.1 M`."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}"


def exponent(value: float) -> str:
    """`3.1e-7`: two digits without padding; `0` for zero."""
    if value == 0:
        return "0"
    mantissa, _, power = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(power)}"


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = (), indent: str = "") -> str:
    """Rows in columns of equal width; the columns in `right` are aligned right. Rows may have fewer columns."""
    columns = max(map(len, rows), default=0)
    widths = [max((len(row[c]) for row in rows if c < len(row)), default=0) for c in range(columns)]
    lines = []
    for row in rows:
        cells = [text.rjust(widths[c]) if c in right else text.ljust(widths[c]) for c, text in enumerate(row)]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def measured_lines(measured: MeasuredPlan | None) -> list[str]:
    """The time and memory of a plan by its profile, a line each."""
    lines = []
    if measured is not None and measured.times is not None:
        assert measured.ms is not None and measured.per_step_ms is not None and measured.static_ms is not None
        times = measured.times
        cores = counted(times.threads, "thread")
        batch = f"batch of {counted(times.rows, 'row')} (two per image with guidance)"
        setting = f"{cores}, {batch}, {times.token_share:.0%} of the tokens in the MLPs"
        lines.append(
            f"According to a profile on {times.backend} ({setting}; largest error of the fit: {times.deviation:.1%}), "
            f"a run takes {measured.ms / 1e3:.3g} s. This is {measured.ms / measured.static_ms:.1%} of the time with "
            f"all units on; a subnetwork for every step would take "
            f"{measured.per_step_ms / measured.static_ms:.1%}"
        )
        if times.deviation > ROUGH:
            lines.append("That fit is rough, which is typical of a busy machine: export again on an idle one")
    if measured is not None and measured.residency is not None:
        assert measured.resident_bytes is not None
        lines.append(
            f"According to a profile, all subnetworks loaded on {measured.residency.backend} take "
            f"{bytes_text(measured.resident_bytes)} of memory ({counted(measured.residency.rows, 'row')})"
        )
    return lines


def guidance_text(cfg_scale: float) -> str:
    """`no guidance` or `guidance 4`."""
    return "no guidance" if cfg_scale == 1 else f"guidance {cfg_scale:g}"


def decisions_text(flips: int, decisions: int) -> str:
    """The number of routing decisions that differ, as part of a sentence."""
    if not decisions:
        return "no token decisions to compare"
    return f"{flips:,} of {counted(decisions, 'token decision')} differ{'s' if flips == 1 else ''}"


def psnr_text(error: float) -> str:
    """The peak signal-to-noise ratio of a picture's error, as a lower bound."""
    return f"PSNR at least {-20 * math.log10(error):.1f} dB" if error else "no difference"


def extra_text(ratio: float) -> str:
    """`9.7% more` for 1.097, `2.0% less` for 0.98."""
    return f"{abs(ratio - 1):.1%} {'less' if ratio < 1 else 'more'}"
