"""How many subnetworks a run keeps loaded, so that it fits in the memory of its device."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Mapping

from dydit.bundle.manifest import Manifest
from dydit.errors import BackendError
from dydit.runtime.device.launches import EngineMemory, LaunchPlan
from dydit.runtime.device.memory_layout import LaunchOptions, RunShape
from dydit.runtime.device.operations import EngineId

_GIB = 1 << 30


def fit_resident(
    manifest: Manifest,
    shape: RunShape,
    memory: Mapping[EngineId, EngineMemory],
    options: LaunchOptions,
    limit: int,
) -> LaunchOptions:
    """The options with as many resident subnetworks, up to their own limit, as fit in `limit` bytes.

    Raises `BackendError` where not even two fit; with dynamic width, where the one engine does not.
    """

    def total(resident: int | None) -> int:
        tried = dataclasses.replace(options, resident=resident)
        return LaunchPlan(manifest, shape, memory, tried).memory.total

    if total(options.resident) <= limit:
        return options
    if (least := total(2)) > limit:
        loaded = "its one engine" if manifest.dynamic_width else "two subnetworks"
        raise BackendError(
            f"a batch of {max(shape.sizes)} images needs {least / _GIB:.1f} GiB of device memory with {loaded} "
            f"loaded, but only {limit / _GIB:.1f} GiB are free; use a smaller batch size"
        )
    more = range(3, (options.resident or len(manifest.subnets)) + 1)
    return dataclasses.replace(options, resident=2 + bisect_right(more, limit, key=total))
