"""Scripts of benchmarks/ as modules."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

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


@pytest.fixture
def gpu_scripts(monkeypatch) -> Iterator[SimpleNamespace]:
    """The modules of benchmarks/gpu, which import one another, by name."""
    folder = BENCHMARKS / "gpu"
    names = [path.stem for path in folder.glob("*.py")]
    monkeypatch.syspath_prepend(str(folder))
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)
