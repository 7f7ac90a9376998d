"""What a pipeline keeps between calls: everything where that is small, else the present subnetwork and the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind
from dydit.runtime.backends.base import BackendOptions, Subnet
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.pipeline import DyDiTPipeline
from dydit.runtime.resident import host_residency

KEPT = "dydit.runtime.resident.KEPT_BYTES"


@pytest.fixture
def per_step(make_bundle: Callable[..., Bundle]) -> Bundle:
    return make_bundle(plan=PlanKind.PER_STEP)


def two_calls(bundle: Bundle, backend: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[np.ndarray]]:
    """The numbers of the subnetworks that a pipeline loads in two equal calls, and the latents of each."""
    numbers: list[int] = []
    with DyDiTPipeline.from_bundle(bundle.path, backend=backend, threads=1) as pipe:
        load = pipe.backend.subnet

        def subnet(index: int, *options: Any, **more: Any) -> Subnet:
            numbers.append(index)
            return load(index, *options, **more)

        monkeypatch.setattr(pipe.backend, "subnet", subnet)
        latents = [pipe(class_labels=[1], seed=0, output_type="latent").images for _ in range(2)]
    return numbers, latents


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_a_second_call_loads_nothing_where_all_are_kept(
    per_step: Bundle, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    every, read = (
        list(range(len(per_step.manifest.subnets))),
        sum(each.weight_bytes for each in per_step.manifest.subnets),
    )
    assert len(every) > 2
    monkeypatch.setattr(KEPT, read)
    once, latents = two_calls(per_step, backend, monkeypatch)
    assert sorted(once) == every
    monkeypatch.setattr(KEPT, read - 1)
    again, others = two_calls(per_step, backend, monkeypatch)
    assert sorted(again) != every and set(again) == set(every), "what was unloaded is loaded again"
    assert all(np.array_equal(latents[0], other) for other in (latents[1], *others))


def test_by_plan_device_and_backend(
    per_step: Bundle, make_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_backend("onnxruntime", make_bundle(max_subnets=4), BackendOptions()) as merged:
        monkeypatch.setattr(KEPT, 0)
        assert host_residency(merged) is None
    with open_backend("onnxruntime", per_step, BackendOptions()) as backend:
        assert host_residency(backend) == 2
        monkeypatch.setattr(KEPT, 1 << 40)
        assert host_residency(backend) is None
        backend.options = BackendOptions(device="cuda")
        assert host_residency(backend) == 2
    with open_backend("openvino", per_step, BackendOptions()) as heavy:
        assert host_residency(heavy) == 2
