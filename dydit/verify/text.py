"""Numbers and tables as people read them, for terminals, titles and reports."""

from __future__ import annotations

from collections.abc import Sequence


def bytes_text(size: float) -> str:
    """A size in binary units, with three figures: `7.34 MiB`."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    place = 0
    while size >= 1000 and place < len(units) - 1:
        size, place = size / 1024, place + 1
    digits = f"{size:.0f}" if place == 0 else f"{size:#.3g}".removesuffix(".")
    return f"{digits} {units[place]}"


def count_text(value: float) -> str:
    """A count in powers of a thousand, with three figures: `33.1 M`."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}"


def exponent(value: float) -> str:
    """`3.1e-7`: two figures and no padding; `0` for zero."""
    if value == 0:
        return "0"
    mantissa, _, power = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(power)}"


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = (), gap: str = "  ", indent: str = "") -> str:
    """Rows as columns of equal width; the columns in `right` are flush right. Rows may be short."""
    columns = max(map(len, rows), default=0)
    widths = [max((len(row[c]) for row in rows if c < len(row)), default=0) for c in range(columns)]
    lines = []
    for row in rows:
        cells = [text.rjust(widths[c]) if c in right else text.ljust(widths[c]) for c, text in enumerate(row)]
        lines.append((indent + gap.join(cells)).rstrip())
    return "\n".join(lines)
