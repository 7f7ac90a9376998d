"""What an engine depends on: the settings of a build, the fingerprint of an engine, and why one is stale.

The fields of `EngineRequest` that change an engine are marked where they are declared; fingerprints and reasons derive
from the marks. An engine's fingerprint covers those and its graph's bytes, the weights' hash and its shape profile.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Final

from pydantic import Field, model_validator

from dydit.bundle.advice import capacity_chain_of
from dydit.bundle.manifest import Manifest, Routing
from dydit.bundle.stored_weights import Precision
from dydit.engines.flavour import Flavour, Gpu
from dydit.engines.profiles import Profile
from dydit.errors import BackendError
from dydit.models.config import Strict, parse_config

RECIPE = 2
"""Counts up whenever this package builds another engine from the same settings."""
_FOLDER_DIGITS = 16


class _ChangesEngine:
    """The mark of a field on which the engine depends."""


CHANGES_ENGINE: Final = _ChangesEngine()


class HardwareCompatibility(StrEnum):
    """Which GPUs an engine of `tensorrt` runs on, besides the one that it is built on."""

    NONE = "none"
    SAME_CAPABILITY = "same-capability"  # all of its compute capability
    AMPERE_PLUS = "ampere+"  # all of compute capability 8.0 and later


class EngineRequest(Strict):
    """The settings of a build.

    `compute_capabilities`: with `tensorrt-rtx` the targets, none of them standing for all of 8.0 and later; with
    `tensorrt` that of `gpu`, the GPU that it builds on. `tools`: versions of what else took part.
    """

    flavour: Annotated[Flavour, CHANGES_ENGINE]
    version: Annotated[str, CHANGES_ENGINE]
    precision: Annotated[Precision, CHANGES_ENGINE]
    opt_batch: Annotated[int, CHANGES_ENGINE] = Field(ge=1)
    max_batch: Annotated[int, CHANGES_ENGINE] = Field(ge=1)
    compute_capabilities: Annotated[tuple[str, ...], CHANGES_ENGINE] = ()
    gpu: Annotated[str | None, CHANGES_ENGINE] = None
    hardware_compatibility: Annotated[HardwareCompatibility, CHANGES_ENGINE] = HardwareCompatibility.NONE
    version_compatible: Annotated[bool, CHANGES_ENGINE] = False
    recipe: Annotated[int, CHANGES_ENGINE] = RECIPE
    tools: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> EngineRequest:
        if self.opt_batch > self.max_batch:
            raise ValueError(f"opt_batch {self.opt_batch} is larger than max_batch {self.max_batch}")
        return self

    def marked(self) -> dict[str, Any]:
        """The fields that change an engine, as JSON values."""
        values = self.model_dump(mode="json")
        return {name: values[name] for name in MARKED}

    @property
    def folder(self) -> str:
        """The name of the folder below `engines/` for engines of these settings."""
        return _digest(self.marked())[:_FOLDER_DIGITS]


MARKED = tuple(name for name, field in EngineRequest.model_fields.items() if CHANGES_ENGINE in field.metadata)
_WORDS = {
    "opt_batch": "the batch it is tuned for",
    "max_batch": "the largest batch",
    "compute_capabilities": "the compute capabilities",
    "gpu": "the GPU",
    "hardware_compatibility": "hardware compatibility",
    "version_compatible": "version compatibility",
    "recipe": "the way that dydit builds",
}


class EngineKey(Strict):
    """What an engine depends on besides the request."""

    graph_sha256: str
    weights_sha256: str
    profile: Profile

    def fingerprint(self, request: EngineRequest) -> str:
        """SHA-256 over everything that the engine depends on."""
        return _digest({"request": request.marked(), "key": self.model_dump(mode="json")})


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, allow_nan=False).encode()).hexdigest()


def stale_reasons(old: EngineRequest, new: EngineRequest) -> list[str]:
    """Why engines of the settings `old` do not serve `new`; empty where they do."""
    before, after = old.marked(), new.marked()
    return [
        f"{_WORDS.get(name, f'the {name}')}: {_text(before[name])} became {_text(after[name])}"
        for name in MARKED
        if before[name] != after[name]
    ]


def stale_key_reasons(old: EngineKey, new: EngineKey) -> list[str]:
    """Why an engine made for `old` does not serve `new`, of the same settings."""
    reasons = []
    if old.graph_sha256 != new.graph_sha256:
        reasons.append("the graph changed")
    if old.weights_sha256 != new.weights_sha256:
        reasons.append("the weights changed")
    for name in sorted(old.profile.keys() | new.profile.keys()):
        if (before := old.profile.get(name)) != (after := new.profile.get(name)):
            reasons.append(f"the shapes of {name} changed from {_shapes(before)} to {_shapes(after)}")
    return reasons


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(value) or "any"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)


def _shapes(extent: Any) -> str:
    return "none" if extent is None else f"{list(extent.min)} {list(extent.opt)} {list(extent.max)}"


def make_request(
    manifest: Manifest, flavour: Flavour, installed: str, gpu: Gpu | None, **settings: Any
) -> EngineRequest:
    """The request for a bundle's engines, held against what flavour, bundle and machine allow.

    `settings`: `max_batch` (default: the bundle's), `opt_batch` (default: `max_batch`), `compute_capabilities`,
    `hardware_compatibility`, `version_compatible`. `installed`: the flavour's version. Raises `ConfigError` for values
    out of range and `BackendError` for what cannot be built, with the reason and the alternative.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    max_batch = given.get("max_batch", manifest.max_batch)
    values = {"max_batch": max_batch, "opt_batch": max_batch, **given, "flavour": flavour, "version": installed}
    values |= {"precision": manifest.precision, "tools": _tools()}
    request = parse_config(EngineRequest, values)
    require_buildable(manifest, request, gpu)
    if not flavour.traits.ahead_of_time and gpu:
        values |= {"compute_capabilities": (gpu.compute_capability,), "gpu": gpu.name}
    return parse_config(EngineRequest, values)


def require_buildable(manifest: Manifest, request: EngineRequest, gpu: Gpu | None) -> None:
    """Raise `BackendError` where a flavour cannot build what is asked, with the reason and the alternative."""
    flavour, traits = request.flavour, request.flavour.traits
    if manifest.precision is Precision.INT8:
        raise BackendError(
            "int8 bundles are for onnxruntime on the CPU, with its own operators; export with --precision fp16 or bf16 "
            "to build engines"
        )
    if manifest.routing is Routing.DYNAMIC and not traits.data_dependent_shapes:
        raise BackendError(
            f"{flavour} has no NonZero, which dynamic routing needs; make a bundle of fixed token slots: "
            f"{capacity_chain_of(manifest)}; or build with --flavour tensorrt on the machine with the GPU"
        )
    if traits.ahead_of_time:
        _require_ahead_of_time(request)
        return
    if request.compute_capabilities:
        raise BackendError(
            f"{flavour} builds for the GPU that it builds on, not for others; leave --compute-capability out and use "
            f"--hardware-compatibility {HardwareCompatibility.AMPERE_PLUS}, or --flavour tensorrt-rtx"
        )
    if gpu is None:
        raise BackendError(
            f"{flavour} builds on the GPU that runs the engines, and there is no NVIDIA driver or GPU here; build on "
            "that machine, or with --flavour tensorrt-rtx, which needs none"
        )


def _require_ahead_of_time(request: EngineRequest) -> None:
    flavour, targets = request.flavour, request.flavour.traits.targets
    for capability in request.compute_capabilities:
        if capability == "7.5":
            raise BackendError(
                f"{flavour} has no fp32 matrix product for compute capability 7.5, and routers and embedding need it; "
                f"choose from {', '.join(targets)}"
            )
        if capability not in targets:
            raise BackendError(
                f"{flavour} cannot build for compute capability {capability}, only for {', '.join(targets)}; leave "
                "--compute-capability out for engines of 8.0 and later, or build with --flavour tensorrt on that GPU"
            )
    if len(set(request.compute_capabilities)) != len(request.compute_capabilities):
        raise BackendError(f"compute capability named twice: {', '.join(request.compute_capabilities)}")
    if request.hardware_compatibility is not HardwareCompatibility.NONE:
        raise BackendError(
            f"--hardware-compatibility is for tensorrt; engines of {flavour} run on all GPUs of 8.0 and later unless "
            "--compute-capability narrows that"
        )
    if request.version_compatible:
        raise BackendError(
            f"engines of {flavour} run on the version that built them and no other; leave --version-compatible out and "
            "build again after an upgrade"
        )


def _tools() -> Mapping[str, str]:
    found = {}
    for package in ("dydit", "polygraphy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
