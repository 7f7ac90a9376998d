"""The report as Markdown, in the form of docs/hardware.md. A cell that was not run says why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from cells import BEST, BEST_TORCH
from results import Report, Status, speed_rows, title
from ways import WAYS, Way

from dydit.reports.text import bytes_text, exponent

PRECISIONS = ("fp32", "fp16", "bf16")
NONE = "-"


def markdown(report: Report) -> str:
    """All tables."""
    parts = [_head(report), _installed(report), _ceilings(report), _runs(report), _parity(report), _speed(report)]
    parts += [_kernels(report, best) for best in (BEST_TORCH, BEST)] + [_left(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(text) for text in line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _head(report: Report) -> str:
    settings, machine = report.settings, report.machine or {}
    name = "CPU (dry run: these are not figures of a GPU)" if settings.dry_run else str(settings.gpu)
    packages = machine.get("packages", {})
    shown = [
        f"{each} {packages[each]}"
        for each in packages
        if each.startswith(("dydit", "torch", "onnxruntime", "tensorrt"))
    ]
    lines = [f"## {name}", "", f"{', '.join(shown)}; {machine.get('system', '')}; {machine.get('date', '')}."]
    if driver := report.part("installed", "driver"):
        lines.append(f"Driver: {driver}.")
    if memory := report.part("installed", "memory_bytes"):
        lines.append(f"Device memory: {bytes_text(memory)}.")
    return "\n".join(lines)


def _installed(report: Report) -> str:
    rows = [["yes" if row["ok"] else "no", name, row["detail"]] for name, row in report.doctor().items()]
    if not rows:
        return ""
    libraries, nvcc = report.part("installed", "libnvinfer") or [], report.part("installed", "nvcc") or NONE
    rows.append(["yes" if libraries else "no", "libnvinfer*", ", ".join(libraries) or "none in the usual folders"])
    rows.append(["no" if nvcc.startswith("no nvcc") else "yes", "nvcc", nvcc])
    return "What is installed:\n\n" + _table(["", "", "found"], rows)


def _ceilings(report: Report) -> str:
    rows = []
    for name in ("bf16", "fp16", "fp32"):
        if found := report.part("ceilings", f"product {name}"):
            size = f"{found['n']} x {found['n']}, " if "n" in found else ""
            rows.append([f"matrix product, {name}", _figure(found, "tflops", "TFLOP/s"), size + _method(found)])
    if found := report.part("ceilings", "copy"):
        size = f"{bytes_text(found['bytes'])}, read and written; " if "bytes" in found else ""
        rows.append(["copy within the memory", _figure(found, "gb_per_s", "GB/s"), size + _method(found)])
    if not rows:
        return f"The two ceilings: {_why(report, 'ceilings')}."
    return f"The two ceilings, on {'the CPU' if report.settings.dry_run else 'the GPU'}:\n\n" + _table(
        ["", "", "how"], rows
    )


def _figure(found: dict[str, Any], name: str, unit: str) -> str:
    return f"{found[name]:.4g} {unit}" if name in found else f"not measured: {found['error']}"


def _method(found: dict[str, Any]) -> str:
    if "clock" not in found:
        return NONE
    return f"{found['statistic']} of {found['rounds']} after {found['warmup']}, {found['clock']}"


def _runs(report: Report) -> str:
    rows = [[way.title, *(_ran(report, way, precision) for precision in PRECISIONS)] for way in WAYS]
    head = (
        "What runs (a small model, 12 steps, 4 images with guidance): the median image against the CPU's in fp32, {}."
    )
    explained = head.format("relative L2 after the run, and its PSNR below fp32; in brackets its worst single step")
    return f"{explained}\n\n" + _table(["", *PRECISIONS], rows)


def _ran(report: Report, way: Way, precision: str) -> str:
    name = f"run: {way.name} {precision}"
    cell = report.cells.get(name)
    if cell is None or cell["status"] != Status.DONE:
        return _why(report, name)
    step, run = cell["parts"]["step"], cell["parts"]["run"]
    value, one = run["median"], step["median"]
    if value is None or one is None:
        return "runs, and gives NaN or infinite values"
    found = f"{-20 * np.log10(value):.0f} dB" if run["decibels"] and value > 0 else exponent(value)
    verdict = "yes" if step["holds"] and run["holds"] else f"runs, but is over a bar ({exponent(step['bar'])} a step)"
    remark = f"; {'; '.join(cell['parts']['warnings'])}" if cell["parts"]["warnings"] else ""
    return f"{verdict}: {found} ({exponent(one)}){remark}"


def _parity(report: Report) -> str:
    rows = []
    for way in WAYS[:2]:
        for precision in PRECISIONS:
            name = f"parity: {way.name} {precision}"
            if name in report.cells:
                done = report.cells[name]["status"] == Status.DONE
                said = str(report.part(name, "summary")) if done else _why(report, name)
                rows.append([way.title, precision, said])
    return "`dydit parity` of the same model:\n\n" + _table(["", "", ""], rows) if rows else ""


def _why(report: Report, name: str) -> str:
    cell = report.cells.get(name)
    if cell is None:
        return "not run yet"
    word = "no" if cell["status"] == Status.FAILED else "not run"
    return f"{word}: {cell.get('reason')}"


def _speed(report: Report) -> str:
    rows, settings = speed_rows(report), report.settings
    if not rows:
        return "How fast: nothing was timed yet."
    share = report.part("models", "token_share")
    weights = "" if settings.model == "digits" else "random weights, "
    tokens = "" if share is None else f" ({share:.0%} of the tokens in the MLPs)"
    lines = [
        f"How fast: {settings.model}, {settings.precision}, guidance, {settings.steps} DDPM steps, {weights}masks of "
        f"the dynamic model at a FLOPs ratio near 0.5{tokens}. ms a step: median over rounds. Whole runs are of all "
        f"{settings.steps} steps, the others of steps spread over the run. Speed-up: over dense, same way, same batch, "
        "taking turns. Shares: of the step's time, what its multiply-adds (its bytes) take at the ceiling above."
        f"{' Here, in small sizes and with fp16 as a CPU has it, they mean nothing.' if settings.dry_run else ''}"
    ]
    head = [
        "batch",
        "way",
        "",
        "ms/step",
        "images/s",
        "speed-up",
        "of multiply-adds",
        "of memory",
        "device memory",
        "steps x rounds",
    ]
    measured = [row for row in rows if "ms" in row]
    for batch in sorted({row["batch"] for row in measured}):
        chosen = sorted((row for row in measured if row["batch"] == batch), key=lambda row: row["ms"])
        lines.append(_table(head, [_speed_row(row) for row in chosen]))
    without = [row for row in rows if "ms" not in row]
    if without:
        lines.append("Not timed:\n\n" + _table(["way", "", "batches", "why"], list(_not_timed(without))))
    return "\n\n".join(lines)


def _speed_row(row: dict[str, Any]) -> list[str]:
    remarks = [f"{row['repeated_steps']} repeated"] if row["repeated_steps"] else []
    remarks += ["alone"] if row["alone"] else []
    remarks += [] if row["warmup"] else ["no warm-up"]
    return [
        str(row["batch"]),
        title(row["way"]),
        row["side"] + (f" ({', '.join(remarks)})" if remarks else ""),
        f"{row['ms']:.4g}",
        f"{row['images_per_second']:.3g}",
        NONE if row["speedup"] is None else f"{row['speedup']:.2f}",
        _percent(row["macs_share"]),
        _percent(row["memory_share"]),
        NONE if row["memory_bytes"] is None else bytes_text(row["memory_bytes"]),
        f"{row['steps']} x {row['rounds']}, {row['clock']}",
    ]


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.3g}%"


def _not_timed(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Rows that say the same stand together."""
    together: dict[tuple[str, str], dict[str, list[int]]] = {}
    for row in rows:
        together.setdefault((row["way"], row["reason"]), {}).setdefault(row["side"], []).append(row["batch"])
    for (way, reason), sides in together.items():
        batches = sorted({batch for each in sides.values() for batch in each})
        yield [title(way), ", ".join(sides), ", ".join(map(str, batches)), reason]


def _kernels(report: Report, best: str) -> str:
    name = f"kernels: {best}"
    found, rows = report.part(name, "of"), report.part(name, "kernels")
    if not rows:
        return f"Where the time goes ({best}): {_why(report, name)}."
    total = report.part(name, "total")
    intro = (
        f"Where the time goes ({best}): {title(found['way'])}, {found['side']}, batch {found['batch']}; "
        f"{report.part(name, 'what')}, {total['ms']:.4g} ms in {total['calls']} calls over {total['steps']} steps."
    )
    table = [[f"`{row['kernel']}`", f"{row['ms']:.3g}", _percent(row["share"]), str(row["calls"])] for row in rows]
    return f"{intro}\n\n" + _table(["", "ms", "share", "calls"], table)


def _left(report: Report) -> str:
    """Cells that no table above speaks of."""
    rows = [
        [name, f"{cell['status']}: {cell.get('reason')}"]
        for name, cell in report.cells.items()
        if cell["status"] != Status.DONE and not name.startswith(("run:", "parity:", "speed:", "kernels:", "ceilings"))
    ]
    return "Also not done:\n\n" + _table(["", "why"], rows) if rows else ""
