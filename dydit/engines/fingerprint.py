"""What an engine depends on: the settings of a build, the fingerprint of an engine, and why an engine is stale.

The fields of `EngineRequest` that change an engine are marked in their declaration; fingerprints and reasons derive
from the marks. An engine's fingerprint covers those and its graph's bytes, the weights' hash and its shape profile.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Final

from pydantic import Field, model_validator

from dydit.bundle.advice import capacity_chain_of
from dydit.bundle.manifest import Manifest, Routing
from dydit.bundle.stored_weights import Precision
from dydit.engines.flavour import Flavour, Gpu, require_target
from dydit.engines.profiles import Profile, tuned_batches
from dydit.errors import BackendError
from dydit.models.config import parse_config
from dydit.validation import Strict

RECIPE = 2
"""Increased whenever this package builds another engine from the same settings."""
_FOLDER_DIGITS = 16
_WITHOUT_FP8 = (
    "8.0",
    "8.6",
)  # tensorrt-rtx 1.7.1 refuses them for graphs in fp8, and by default builds for 8.9 and later


class _ChangesEngine:
    """Marks a field on which the engine depends."""


CHANGES_ENGINE: Final = _ChangesEngine()


class HardwareCompatibility(StrEnum):
    """On which GPUs an engine of `tensorrt` runs, besides the one that it is built on."""

    NONE = "none"
    SAME_CAPABILITY = "same-capability"  # all GPUs of its compute capability
    AMPERE_PLUS = "ampere+"  # all GPUs of compute capability 8.0 and later


class EngineRequest(Strict):
    """The settings of a build.

    `opt_batches`: the batch sizes that the engines are tuned for, in ascending order (`dydit.engines.profiles`).
    `compute_capabilities`: with `tensorrt-rtx` the targets, where none means all that it has; with `tensorrt` that of
    `gpu`, the GPU that it builds on. `tools`: versions of other packages that were used.
    """

    flavour: Annotated[Flavour, CHANGES_ENGINE]
    version: Annotated[str, CHANGES_ENGINE]
    precision: Annotated[Precision, CHANGES_ENGINE]
    opt_batches: Annotated[tuple[Annotated[int, Field(ge=1)], ...], CHANGES_ENGINE] = Field(min_length=1)
    max_batch: Annotated[int, CHANGES_ENGINE] = Field(ge=1)
    compute_capabilities: Annotated[tuple[str, ...], CHANGES_ENGINE] = ()
    gpu: Annotated[str | None, CHANGES_ENGINE] = None
    hardware_compatibility: Annotated[HardwareCompatibility, CHANGES_ENGINE] = HardwareCompatibility.NONE
    version_compatible: Annotated[bool, CHANGES_ENGINE] = False
    recipe: Annotated[int, CHANGES_ENGINE] = RECIPE
    tools: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> EngineRequest:
        if list(self.opt_batches) != sorted(set(self.opt_batches)):
            raise ValueError(f"opt_batches {_text(list(self.opt_batches))} are not in ascending order")
        if self.opt_batches[-1] > self.max_batch:
            raise ValueError(f"opt_batches {self.opt_batches[-1]} is larger than max_batch {self.max_batch}")
        return self

    def marked(self) -> dict[str, Any]:
        """The fields that change an engine, as JSON values."""
        values = self.model_dump(mode="json")
        return {name: values[name] for name in MARKED}

    @property
    def targets(self) -> tuple[str, ...]:
        """The compute capabilities that the flavour can build these engines for; empty if for the GPU that is there."""
        lacking = _WITHOUT_FP8 if self.precision is Precision.FP8 else ()
        return tuple(each for each in self.flavour.traits.targets if each not in lacking)

    @property
    def folder(self) -> str:
        """The name of the folder below `engines/` for engines of these settings."""
        return digest_of(self.marked())[:_FOLDER_DIGITS]


MARKED = tuple(name for name, field in EngineRequest.model_fields.items() if CHANGES_ENGINE in field.metadata)
_WORDS = {
    "opt_batches": "the batches it is tuned for",
    "max_batch": "the largest batch",
    "compute_capabilities": "the compute capabilities",
    "gpu": "the GPU",
    "hardware_compatibility": "hardware compatibility",
    "version_compatible": "version compatibility",
    "recipe": "how dydit builds engines",
}


class EngineKey(Strict):
    """What an engine depends on besides the request."""

    graph_sha256: str
    weights_sha256: str
    profiles: tuple[Profile, ...]

    def fingerprint(self, request: EngineRequest) -> str:
        """SHA-256 over everything that the engine depends on."""
        return digest_of({"request": request.marked(), "key": self.model_dump(mode="json")})


def digest_of(values: Any) -> str:
    """SHA-256 over the canonical JSON of values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, allow_nan=False).encode()).hexdigest()


def stale_reasons(old: EngineRequest, new: EngineRequest) -> list[str]:
    """Why engines of the settings `old` do not serve `new`; empty if they do."""
    before, after = old.marked(), new.marked()
    return [
        f"{_WORDS.get(name, f'the {name}')}: {_text(before[name])} became {_text(after[name])}"
        for name in MARKED
        if before[name] != after[name]
    ]


def stale_key_reasons(old: EngineKey, new: EngineKey) -> list[str]:
    """Why an engine for `old` does not serve `new`, of the same settings."""
    reasons = []
    if old.graph_sha256 != new.graph_sha256:
        reasons.append("the graph changed")
    if old.weights_sha256 != new.weights_sha256:
        reasons.append("the weights changed")
    for name in sorted({name for key in (old, new) for profile in key.profiles for name in profile}):
        if (before := _shapes(old.profiles, name)) != (after := _shapes(new.profiles, name)):
            reasons.append(f"the shapes of {name} changed from {before} to {after}")
    return reasons


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "any"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)


def _shapes(profiles: Sequence[Profile], name: str) -> str:
    extents = [profile[name] for profile in profiles if name in profile]
    return " and ".join(f"{list(each.min)} {list(each.opt)} {list(each.max)}" for each in extents) or "none"


def make_request(
    manifest: Manifest,
    flavour: Flavour,
    installed: str,
    gpu: Gpu | None,
    *,
    max_batch: int | None = None,
    opt_batches: Sequence[int] = (),
    compute_capabilities: Sequence[str] = (),
    hardware_compatibility: HardwareCompatibility | str = HardwareCompatibility.NONE,
    version_compatible: bool = False,
) -> EngineRequest:
    """The request for a bundle's engines, checked against what flavour, bundle and machine allow.

    `installed`: the flavour's version. `max_batch`: by default the bundle's; `opt_batches`: by default
    `tuned_batches(max_batch)`.
    Raises `ConfigError` for values out of range and `BackendError` for what cannot be built, with the reason and the
    alternative.
    """
    max_batch = manifest.max_batch if max_batch is None else max_batch
    values = {
        "flavour": flavour,
        "version": installed,
        "precision": manifest.precision,
        "max_batch": max_batch,
        "opt_batches": tuple(sorted(set(opt_batches))) or tuned_batches(max_batch),
        "compute_capabilities": tuple(compute_capabilities),
        "hardware_compatibility": hardware_compatibility,
        "version_compatible": version_compatible,
        "tools": _tools(),
    }
    request = parse_config(EngineRequest, values)
    require_buildable(manifest, request, gpu)
    if not flavour.traits.ahead_of_time and gpu:
        values |= {"compute_capabilities": (gpu.compute_capability,), "gpu": gpu.name}
    return parse_config(EngineRequest, values)


def require_buildable(manifest: Manifest, request: EngineRequest, gpu: Gpu | None) -> None:
    """Raise `BackendError` if a flavour cannot build what is requested, with the reason and the alternative."""
    flavour, traits = request.flavour, request.flavour.traits
    if manifest.precision is Precision.INT8:
        raise BackendError(
            "int8 bundles run only on onnxruntime on the CPU; export with --precision fp16 or bf16 to build engines"
        )
    if manifest.routing is Routing.DYNAMIC and not traits.data_dependent_shapes:
        raise BackendError(
            f"{flavour} has no NonZero, which dynamic routing needs; export a bundle with a fixed token capacity: "
            f"{capacity_chain_of(manifest)}; or build with --flavour tensorrt on the machine with the GPU"
        )
    if traits.ahead_of_time:
        _require_ahead_of_time(request)
        if gpu is not None and not request.compute_capabilities:  # who names targets builds for another machine
            require_target(flavour, gpu)
            _require_fp8(request, gpu.compute_capability)
        return
    if request.compute_capabilities:
        raise BackendError(
            f"{flavour} builds for the GPU that it builds on, not for others; remove --compute-capability and use "
            f"--hardware-compatibility {HardwareCompatibility.AMPERE_PLUS}, or --flavour tensorrt-rtx"
        )
    if gpu is None:
        raise BackendError(
            f"{flavour} builds on the GPU that runs the engines, but there is no NVIDIA driver or GPU here; build on "
            "that machine, or use --flavour tensorrt-rtx, which builds without a GPU"
        )


def _require_fp8(request: EngineRequest, capability: str) -> None:
    if capability in request.flavour.traits.targets and capability not in request.targets:
        raise BackendError(
            f"GPUs of compute capability {capability} have no matrix products in {request.precision}, only those of "
            f"{', '.join(request.targets)}; export the bundle with --precision int8-static or fp16"
        )


def _require_ahead_of_time(request: EngineRequest) -> None:
    flavour, targets = request.flavour, request.targets
    for capability in request.compute_capabilities:
        _require_fp8(request, capability)
        if capability == "7.5":
            raise BackendError(
                f"{flavour} has no fp32 matrix product for compute capability 7.5, which routers and embedding need; "
                f"choose from {', '.join(targets)}"
            )
        if capability not in targets:
            raise BackendError(
                f"{flavour} cannot build for compute capability {capability}, only for {', '.join(targets)}; remove "
                "--compute-capability to build for all of these, or build with --flavour tensorrt on that GPU"
            )
    if len(set(request.compute_capabilities)) != len(request.compute_capabilities):
        raise BackendError(f"a compute capability is given twice: {', '.join(request.compute_capabilities)}")
    if request.hardware_compatibility is not HardwareCompatibility.NONE:
        raise BackendError(
            f"--hardware-compatibility is for tensorrt; engines of {flavour} run on all GPUs of compute capability "
            f"{', '.join(targets)}, unless --compute-capability names fewer"
        )
    if request.version_compatible:
        raise BackendError(
            f"engines of {flavour} run only with the version that built them; remove --version-compatible and build "
            "again after an upgrade"
        )


def _tools() -> Mapping[str, str]:
    versions = {}
    for package in ("dydit", "polygraphy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
