"""The table's picture: milliseconds a step of every side, against what multiply-adds and memory alone would take."""

from __future__ import annotations

from typing import Any

from results import Report, speed_rows, title
from sides import PYTORCH, is_dense

from dydit.reports.plot_style import ACCENT, ACCENT_LIGHT, INK, MUTED, OFF, SECOND, drawing, headline, png

BAR, ROW = 0.68, 0.19  # of a row's height; inches


def gpu_png(report: Report) -> bytes:
    """Bars by batch, fastest first; of each its two bounds. Raises `DyditError` where matplotlib is missing."""
    rows = [row for row in speed_rows(report) if "ms" in row]
    batches = sorted({row["batch"] for row in rows})
    groups = [sorted((row for row in rows if row["batch"] == batch), key=lambda row: row["ms"]) for batch in batches]
    counts = [max(1, len(group)) for group in groups]
    height = 1.25 + ROW * sum(counts) + 0.42 * len(groups)
    with drawing(9.2, max(2.4, height)) as figure:
        settings = report.settings
        where = "on the CPU, a dry run: no figures of a GPU" if settings.dry_run else f"on {settings.gpu}"
        headline(figure, f"{settings.model}, {settings.precision}, {where}", "milliseconds a step, with guidance")
        if not groups:
            figure.text(0.5, 0.4, "nothing was timed", ha="center", color=MUTED)
            return png(figure)
        axes = figure.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": counts})[:, 0]
        for axis, batch, group in zip(axes, batches, groups, strict=True):
            _panel(axis, batch, group)
        _legend(axes[0])
        return png(figure)


def _panel(axis: Any, batch: int, rows: list[dict[str, Any]]) -> None:
    longest = max(row[name] or 0 for row in rows for name in ("ms", "macs_ms", "memory_ms"))
    for place, row in enumerate(rows):
        axis.barh(place, row["ms"], BAR, color=_colour(row))
        axis.text(row["ms"] + 0.008 * longest, place, f"{row['ms']:.3g}", va="center", fontsize=7, color=INK)
        for name, colour, style in (("macs_ms", SECOND, "-"), ("memory_ms", INK, ":")):
            if row[name] is not None:
                axis.plot([row[name]] * 2, [place - BAR / 2, place + BAR / 2], color=colour, ls=style, lw=1.5)
    axis.set_yticks(range(len(rows)), [f"{title(row['way'])}: {row['side']}" for row in rows])
    axis.tick_params(axis="y", length=0, labelsize=7)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlim(0, 1.1 * longest)
    axis.set_title(f"batch {batch}", fontsize=8.5, color=MUTED)
    axis.spines["left"].set_visible(False)


def _colour(row: dict[str, Any]) -> str:
    if row["way"] == PYTORCH:
        return OFF
    return ACCENT_LIGHT if is_dense(row["way"], row["side"]) else ACCENT


def _legend(axis: Any) -> None:
    for colour, label in ((ACCENT, "dynamic"), (ACCENT_LIGHT, "dense"), (OFF, "PyTorch, as it is")):
        axis.barh([0], [0], color=colour, label=label)
    axis.plot([], [], color=SECOND, lw=1.5, label="multiply-adds alone")
    axis.plot([], [], color=INK, lw=1.5, ls=":", label="memory alone")
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1.0), ncols=5, fontsize=7, borderaxespad=0, handlelength=1.2)
