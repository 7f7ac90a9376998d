"""Bundles to build engines from, and builds without TensorRT: a stand-in that writes files where engines would be."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dydit.bundle.bundle import Bundle
from dydit.bundle.stored import Precision
from dydit.calibrate.activations import ActivationRanges
from dydit.engines import build
from dydit.engines.builder import Built, Job
from dydit.engines.fingerprint import EngineRequest, make_request
from dydit.engines.flavour import Flavour, is_installed
from dydit.models.config import ModelConfig

VERSION = "1.7.1"


@pytest.fixture(scope="session")
def rtx() -> Any:
    """The `tensorrt_rtx` module."""
    if not is_installed(Flavour.TENSORRT_RTX):
        pytest.skip("tensorrt_rtx is not installed: pip install 'dydit[tensorrt-rtx]'")
    from dydit.engines.flavour import load_flavour

    return load_flavour(Flavour.TENSORRT_RTX)


@pytest.fixture(scope="session")
def digits_like() -> ModelConfig:
    """The shape of the digits model, small: one channel, learned variance, and two blocks."""
    return ModelConfig(hidden_size=64, depth=2, num_heads=4, patch_size=2, input_size=16, in_channels=1, num_classes=10)


@pytest.fixture(scope="session")
def even_ranges() -> Callable[[int, int], ActivationRanges]:
    """`even_ranges(segments, depth)`: one range for all, as good as any where nothing is run."""

    def make(segments: int, depth: int) -> ActivationRanges:
        fours, none = (((value,) * 4,) * depth for value in (4.0, 0.0))
        return ActivationRanges(method="minmax", images=1, thresholds=(fours,) * segments, clipped=(none,) * segments)

    return make


@pytest.fixture(scope="session")
def capacity_bundle(
    make_bundle: Callable[..., Bundle],
    make_checkpoint: Callable[..., Any],
    digits_like: ModelConfig,
    even_ranges: Callable[[int, int], ActivationRanges],
):
    """`capacity_bundle(precision, **export settings)`: of three subnetworks, gated and not. Shared: do not write."""

    def make(precision: str = "fp16", **settings: Any) -> Bundle:
        checkpoint = make_checkpoint(digits_like)
        kept = {"routing": "capacity", "max_subnets": 3, "max_batch": 4, "capacities": (40, 64), **settings}
        migration = kept.pop("migration", None)
        if Precision(precision).is_calibrated:
            ranges = even_ranges(kept["max_subnets"], checkpoint.config.depth)
            kept["activations"] = ranges.model_copy(update={"migration": migration})
        return make_bundle(checkpoint, precision=precision, **kept)

    return make


@pytest.fixture(scope="session")
def mixed_bundle(
    make_bundle: Callable[..., Bundle],
    make_checkpoint: Callable[..., Any],
    digits_like: ModelConfig,
    even_ranges: Callable[[int, int], ActivationRanges],
):
    """`mixed_bundle(precision, every)`: two subnetworks, every so-manieth layer in 16 bits. Shared: do not write."""

    def make(precision: str, every: int) -> Bundle:
        ranges = even_ranges(2, digits_like.depth)
        places = iter(range(2 * digits_like.depth * 4))
        kept = tuple(
            tuple(tuple(next(places) % every == 0 for _ in range(4)) for _ in range(digits_like.depth))
            for _ in range(2)
        )
        settings = {"routing": "capacity", "max_subnets": 2, "max_batch": 4, "steps": 4, "precision": precision}
        activations = ranges.model_copy(update={"in_16_bits": kept})
        return make_bundle(make_checkpoint(digits_like), activations=activations, **settings)

    return make


@pytest.fixture
def bundle(capacity_bundle: Callable[..., Bundle], tmp_path: Path) -> Bundle:
    """A copy to build in: fp16, capacity routing, three subnetworks, each also at full capacity."""
    copy = tmp_path / "bundle"
    shutil.copytree(capacity_bundle().path, copy)
    made = Bundle.open(copy)
    assert len(made.manifest.subnets) == 3
    assert any(subnet.gated for subnet in made.manifest.subnets)
    assert all(subnet.full_file for subnet in made.manifest.subnets)
    return made


@pytest.fixture
def request_for() -> Callable[..., EngineRequest]:
    """`request_for(bundle, flavour=tensorrt-rtx, version=..., gpu=None, **settings)`."""

    def make(bundle: Bundle, flavour: Flavour = Flavour.TENSORRT_RTX, version: str = VERSION, **settings: Any):
        return make_request(bundle.manifest, flavour, version, settings.pop("gpu", None), **settings)

    return make


class Pretence:
    """Takes the place of the building processes: an "engine" is the name of its graph; keeps what was asked for."""

    def __init__(self) -> None:
        self.built: list[str] = []
        self.fail_at: str | None = None

    def __call__(self, jobs: Sequence[Job], processes: int, done: Callable[[Job, Built], None]) -> None:
        for job in jobs:
            if job.graph.name == self.fail_at:
                raise RuntimeError("stopped")
            data = f"engine of {job.graph.name} for {job.request.folder}".encode()
            job.engine.write_bytes(data)
            self.built.append(job.graph.name)
            modified = job.engine.stat().st_mtime_ns
            done(job, Built(hashlib.sha256(data).hexdigest(), len(data), modified, 0.1, 1000, 10, 2, 5000))


@pytest.fixture
def pretence(monkeypatch: pytest.MonkeyPatch) -> Pretence:
    stand_in = Pretence()
    monkeypatch.setattr(build, "run_jobs", stand_in)
    return stand_in
