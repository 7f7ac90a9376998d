"""Devices on a simulated driver, and the backend that their results are held against."""

from __future__ import annotations

import numpy as np
import pytest

from dydit.runtime.device.launches import EngineMemory
from dydit.runtime.device.residency import engines_of
from tests.fixtures.fake_driver import FakeDriver
from tests.fixtures.simulated_device import PairwiseBackend, SimulatedDevice


@pytest.fixture(autouse=True)
def drivers(monkeypatch):
    """The simulated drivers that a test opens. What one of them refused fails the test, even if it was caught."""
    opened = []
    monkeypatch.setattr(FakeDriver, "opened", opened)
    yield opened
    faults = [str(fault) for driver in opened for fault in driver.faults]
    assert not faults
    assert not any(driver.pageable for driver in opened), "copied from or to pageable memory"


@pytest.fixture
def fake_device():
    return SimulatedDevice


@pytest.fixture
def figures():
    """`figures(manifest, activation=1000)`: memory of every engine; each engine weighs differently."""

    def of(manifest, activation=lambda engine: 1000):
        return {
            engine: EngineMemory(activation(engine), 10_000 + 100 * (engine.subnet or 0) + 7 * engine.full)
            for engine in engines_of(manifest)
        }

    return of


@pytest.fixture
def relative_to():
    """|a - b| / |b|."""
    return lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture
def pairwise():
    """An ONNX Runtime backend whose conditioning is the same in any company."""
    return PairwiseBackend
