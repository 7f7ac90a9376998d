"""What reports are made of: frozen models that go to JSON and back, and the machine that something was measured on.

A measured value is None where it is not a finite number, which JSON cannot hold and no tolerance allows. `to_json`
gives plain dictionaries and lists; `parse` reads them back.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from dydit.runtime.backends.cores import available_cores
from dydit.runtime.backends.instruction_sets import instruction_sets
from dydit.validation import Strict

PACKAGES = (
    *("diffusers", "dydit", "nncf", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "onnxscript"),
    *("openvino", "polygraphy", "tensorrt", "tensorrt-rtx-cu13", "torch"),
)

Measured = float | None


def measured(value: float) -> Measured:
    """A number that JSON can hold: None in place of NaN and infinities."""
    value = float(value)
    return value if math.isfinite(value) else None


def measured_all(values: Iterable[float]) -> tuple[Measured, ...]:
    """`measured` of each."""
    return tuple(measured(value) for value in values)


class Result(Strict):
    """Base of everything here."""

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_json`. Computed fields are derived again."""
        return cls.model_validate(
            {name: value for name, value in values.items() if name not in cls.model_computed_fields}
        )


class Line(Result):
    """A finding in one line: `value` is the figure, `note` says what it was measured on."""

    label: str
    value: str
    note: str


class Machine(Result):
    """Where something was measured."""

    cpu: str
    cores: int
    system: str
    python: str
    packages: dict[str, str]
    date: str = Field(description="UTC, ISO 8601")
    instruction_sets: tuple[str, ...] = Field(default=(), description="of `dydit.runtime.backends.instruction_sets`")

    @classmethod
    def here(cls) -> Machine:
        """This machine, now."""
        packages = {}
        for package in PACKAGES:
            try:
                packages[package] = version(package)
            except PackageNotFoundError:
                continue
        return cls(
            cpu=_cpu_name(),
            cores=available_cores(),
            system=platform.platform(),
            python=platform.python_version(),
            packages=packages,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            instruction_sets=instruction_sets(),
        )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
