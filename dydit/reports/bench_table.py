"""A benchmark of many configurations as a table: time, ratio and error of each, the fastest first."""

from __future__ import annotations

from dydit.reports.bench_report import BUSY, BenchReport, SideResult, busy, repeats_text
from dydit.reports.text import aligned, exponent
from dydit.words import counted

COLUMNS = ("configuration", "precision", "ms a step", "speed", "relative L2", "PSNR")


def table_lines(report: BenchReport) -> list[str]:
    """The table, what its columns mean, and what was not run."""
    first = report.sides[0]
    rows = [
        (
            side.side.name,
            side.precision or "",
            f"{side.median_ms:.1f}",
            f"{speed_ratio(report, side):.2f}\u00d7",
            *error_words(report, side),
        )
        for side in sorted(report.sides, key=lambda each: each.median_ms)
    ]
    lines = aligned([COLUMNS, *rows], right=range(2, len(COLUMNS))).splitlines()
    lines.append(f"Speed: that of {first.side.name} is 1, median of pairs of rounds")
    if report.reference:
        lines.append(f"Errors: {errors_text(report)}")
    lines += [f"{BUSY.capitalize()}"] * busy(report)
    lines += [f"{side.side.name}: {repeats_text(side)}" for side in report.sides if side.overflows]
    lines += [f"{each.name} was not run: {each.reason}" for each in report.not_run]
    return lines


def speed_ratio(report: BenchReport, side: SideResult) -> float:
    """How many times as fast as the first contender one is."""
    return 1.0 if side is report.sides[0] else 1 / report.comparison(side.side.name).median


def error_words(report: BenchReport, side: SideResult) -> tuple[str, str]:
    """The relative L2 and the PSNR of a contender."""
    if side.side.name == report.reference:
        return "reference", ""
    if side.relative_l2 is None:
        return "not finite" if report.reference else "", ""
    return exponent(side.relative_l2), f"{side.psnr:.1f} dB" if side.psnr is not None else ""


def errors_text(report: BenchReport) -> str:
    """What the errors of a report are measured on, and against what."""
    reference = report.side(report.reference)
    precision = f" ({reference.precision})" if reference.precision else ""
    after = f"; PSNR of the samples of {counted(len(report.steps_measured), 'step')}" if report.latents == "run" else ""
    return f"against {report.reference}{precision}, worst image, same noise: relative L2 of one step{after}"
