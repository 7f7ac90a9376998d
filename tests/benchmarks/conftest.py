"""Scripts of benchmarks/ as modules."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load_script(monkeypatch) -> Callable[..., ModuleType]:
    """`load_script(name, folder)`: the module of a file in benchmarks/, or in a folder there."""

    def load(name: str, folder: str = "") -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load
