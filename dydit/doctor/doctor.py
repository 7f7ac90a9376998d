"""`dydit doctor`: which backends work on this machine, and why the others do not. Backends are run to find out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dydit.doctor.probes import NO_GPU, PROBES, Finding, run_probe
from dydit.extras import PACKAGES, install_command, missing
from dydit.reports.results import Machine, Result
from dydit.reports.text import aligned, bytes_text
from dydit.words import counted

Probe = Callable[[str], Finding]

DEVICES = ("driver", "onnxruntime-cuda", "torch-cuda", "tensorrt", "tensorrt-rtx", "driver-package")
# The flavours of TensorRT with what else building needs; and what running engines needs.
BUILDERS: dict[str, tuple[str, ...]] = {"tensorrt": ("driver",), "tensorrt-rtx": ()}
RUNNING = {"driver": NO_GPU, "driver-package": "PyCUDA or cuda-bindings"}
# Each extra: (its purpose, its modules). The modules are looked up, not imported.
EXTRAS = {
    "export": ("read checkpoints, write bundles", ("onnx", "onnx_ir", "safetensors", "scipy", "torch")),
    "report": ("pictures and HTML reports", ("jinja2", "matplotlib")),
    "train": ("train models", ("accelerate", "sklearn")),
    "evaluate": ("measure samples: FID and others", ("torch_fidelity",)),
    "vae": ("put a VAE decoder into a bundle", ("diffusers", "onnxscript")),
}


class Row(Finding):
    """One line of the report."""

    name: str


class DoctorReport(Result):
    """`backends`: what runs bundles (one is enough). `devices`: what backends can use. `extras`: optional packages."""

    machine: Machine
    memory_bytes: int | None
    backends: tuple[Row, ...]
    devices: tuple[Row, ...]
    extras: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether a backend works here."""
        return any(row.ok for row in self.backends)

    def text(self) -> str:
        """For a terminal: a line for each item, with a fix if it does not work."""
        memory = f", {bytes_text(self.memory_bytes)} memory" if self.memory_bytes else ""
        machine = self.machine
        head = [
            ("machine", f"{machine.cpu}, {counted(machine.cores, 'core')}{memory}"),
            ("instructions", ", ".join(machine.instruction_sets) or "unknown"),
            ("system", f"{machine.system}, Python {machine.python}"),
            ("packages", ", ".join(f"{name} {number}" for name, number in machine.packages.items())),
        ]
        parts = [aligned(head)]
        for title, rows in (("backends", self.backends), ("GPU", self.devices), ("extras", self.extras)):
            parts.append(f"{title}\n{aligned([_line(row) for row in rows], indent='  ')}")
        working = [row.name for row in self.backends if row.ok]
        verdict = f"backends that run bundles here: {', '.join(working)}" if working else "no backend works here"
        return "\n\n".join([*parts, f"{self.engines}\n{verdict}"])

    @property
    def engines(self) -> str:
        """The flavours of TensorRT that build engines here, and what is missing to run the engines."""
        rows = {row.name: row for row in self.devices}
        builders = [name for name, needs in BUILDERS.items() if rows[name].ok and all(rows[need].ok for need in needs)]
        if not builders:
            rtx = rows["tensorrt-rtx"]
            fix = f"  ->  {rtx.fix}" if rtx.fix else ""
            return (
                "TensorRT engines cannot be built here; tensorrt-rtx, which builds without a GPU, is not available: "
                f"{rtx.detail}{fix}"
            )
        missing = [what for name, what in RUNNING.items() if not rows[name].ok]
        needs = f"; running them here needs {' and '.join(missing)}" if missing else "; they can also be run here"
        return f"TensorRT engines can be built here by: {', '.join(builders)}{needs}"


def _line(row: Row) -> list[str]:
    fix = f"  ->  {row.fix}" if row.fix and not row.ok else ""
    return ["ok" if row.ok else "no", row.name, row.detail + fix]


def run_doctor(probe: Probe = run_probe) -> DoctorReport:
    """Run all probes, two at a time, which takes a few seconds. `probe` runs a probe by name."""
    with ThreadPoolExecutor(2) as pool:
        findings = dict(zip(PROBES, pool.map(probe, PROBES), strict=True))
    return DoctorReport(
        machine=Machine.here(),
        memory_bytes=memory_bytes(),
        backends=tuple(_backends(findings)),
        devices=tuple(_devices(findings)),
        extras=tuple(_extra(name) for name in EXTRAS),
    )


def _backends(findings: dict[str, Finding]) -> list[Row]:
    """The status that the runtime reports for each backend, or the result of its probe if it has one."""
    registry = findings["registry"]
    rows = []
    for name, ready, detail in json.loads(registry.detail) if registry.ok else [("runtime", False, registry.detail)]:
        trial = findings.get(f"{name}-cpu")
        if trial is not None:
            rows.append(_row(name, trial))
        elif ready and name in findings and not findings[name].ok:
            rows.append(_row(name, findings[name]))
        else:
            rows.append(Row(name=name, ok=ready, detail=detail))
    return rows


def _devices(findings: dict[str, Finding]) -> list[Row]:
    rows = [_row(name, findings[name]) for name in DEVICES]
    if findings["driver"].ok:
        return rows
    # Without a driver, packages alone do not help, so that the fix names the GPU, too.
    return [rows[0], *(_after_driver(row) for row in rows[1:])]


def _after_driver(row: Row) -> Row:
    if row.name == "tensorrt-rtx":  # builds engines without a GPU
        return row
    fixed_by_package = row.fix and row.fix.startswith("pip ")
    return row.model_copy(update={"fix": f"{row.fix}, on a machine with a GPU" if fixed_by_package else None})


def _row(name: str, finding: Finding) -> Row:
    return Row(name=name, **finding.to_json())


def _extra(name: str) -> Row:
    purpose, modules = EXTRAS[name]
    absent = missing(modules)
    fix = install_command([name]) if absent else None
    absent_names = ", ".join(PACKAGES.get(module, module) for module in absent)
    detail = f"{purpose}: {absent_names} missing" if absent else f"{purpose}: {_versions(modules)}"
    return Row(name=name, ok=not absent, detail=detail, fix=fix)


def _versions(modules: tuple[str, ...]) -> str:
    texts = []
    for module in modules:
        name = PACKAGES.get(module, module)
        try:
            texts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            texts.append(name)
    return ", ".join(texts)


def memory_bytes() -> int | None:
    """Memory of this machine, or the limit of its container; None if the system does not report it."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    try:
        text = limit.read_text().strip()
    except OSError:
        return total
    return min(total, int(text)) if text.isdigit() else total
