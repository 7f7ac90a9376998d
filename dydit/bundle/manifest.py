"""`manifest.json`: everything about a bundle that is not a weight or a graph.

Units (heads, channel groups) are numbered by *slot*, their position in `weights.bin`. `unit_order` says which unit of
the checkpoint is in each slot, by block and unit group. A step's mask has one bit for each unit of `ModelConfig.units`,
packed and written as hex.
"""

from __future__ import annotations

import hashlib
import json
from enum import StrEnum
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from pydantic import AliasChoices, Field, FiniteFloat, ValidationError, field_validator, model_validator

from dydit.bundle.consistency import mask_trouble, order_trouble, slots_trouble, weights_trouble
from dydit.bundle.measurements import MeasuredPlan
from dydit.bundle.stored_weights import WEIGHTS, Precision, WeightEntry
from dydit.bundle.vae_entry import VAE_DECODER, VAE_WEIGHTS, VaeEntry
from dydit.checkpoints.containers import looks_like_checkpoint
from dydit.diffusion.coefficients import COEFFICIENTS, HISTORY, NOISE, SamplingRun
from dydit.diffusion.process import TRAIN_STEPS
from dydit.diffusion.samplers import Sampler, SamplerConfig, Spacing
from dydit.errors import BundleError, one_line
from dydit.models.architecture import Slots
from dydit.models.config import ModelConfig
from dydit.quantization.smoothing import Smoothing
from dydit.validation import Strict, first_problem

SCHEMA_VERSION: Literal[3] = 3
MANIFEST, CONDITIONING, TEXT_GRAPH = "manifest.json", "conditioning.onnx", "text.onnx"
DYNAMIC_WIDTH_GRAPH, DYNAMIC_WIDTH_FULL_GRAPH = "sliding.onnx", "sliding-full.onnx"
"""The graph of dynamic width, and the same graph with a slot for every token."""
_LEFT_OUT_WHILE_NONE = ("vae", "migration")  # fields that older bundles, and so their digests, do not have


class Routing(StrEnum):
    """How routed tokens reach the MLP."""

    DYNAMIC = "dynamic"  # NonZero, Gather, MLP, ScatterND: the least compute, but data-dependent shapes
    CAPACITY = "capacity"  # prefix-sum compaction into a fixed number of slots: static shapes
    DENSE = "dense"  # the MLP computes every token, and the mask multiplies the result: the baseline


class PlanKind(StrEnum):
    """What the planner was asked for."""

    PER_STEP = "per-step"
    MAX_SUBNETS = "max-subnets"
    MEMORY_BUDGET = "memory-budget"
    DYNAMIC_WIDTH = "sliding"  # one graph that takes block weights as inputs, at the width of each step


class FileEntry(Strict):
    """Size in bytes and SHA-256 of a file of the bundle."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class SamplingEntry(Strict):
    """A sampling run of the bundle. Lists are in execution order, the noisiest step first.

    `timesteps`: the model's own times (`dydit.diffusion.process`). Rows of `coefficients` are those of
    `dydit.diffusion.coefficients`.
    """

    sampler: Sampler
    spacing: Spacing | None = None
    eta: FiniteFloat = Field(default=0.0, ge=0, le=1)
    timesteps: tuple[FiniteFloat, ...] = Field(max_length=TRAIN_STEPS)
    coefficients: tuple[tuple[FiniteFloat, ...], ...]
    cfg_channels: int = Field(ge=1, description="how many latent channels guidance acts on")

    @model_validator(mode="after")
    def _consistent(self) -> SamplingEntry:
        if not self.timesteps or len(self.coefficients) != len(self.timesteps):
            raise ValueError("timesteps and coefficients differ in length")
        if any(len(row) != len(COEFFICIENTS) for row in self.coefficients):
            raise ValueError(f"a step does not have {len(COEFFICIENTS)} coefficients")
        return self

    @classmethod
    def of(cls, config: SamplerConfig, run: SamplingRun, cfg_channels: int) -> SamplingEntry:
        """The entry of a run that was computed from the settings of a sampler."""
        return cls(
            sampler=config.sampler,
            spacing=config.spacing,
            eta=config.eta,
            timesteps=tuple(run.times.tolist()),
            coefficients=tuple(tuple(row) for row in run.coefficients.astype(np.float32).tolist()),
            cfg_channels=cfg_channels,
        )

    @property
    def steps(self) -> int:
        """Number of sampling steps S."""
        return len(self.timesteps)

    @property
    def config(self) -> SamplerConfig:
        """The sampler and its settings, from which times and coefficients were computed."""
        return SamplerConfig(sampler=self.sampler, steps=self.steps, spacing=self.spacing, eta=self.eta)

    @property
    def noisy_steps(self) -> tuple[int, ...]:
        """The execution indices of the steps that add noise."""
        return tuple(step for step, row in enumerate(self.coefficients) if row[NOISE] != 0)

    @property
    def multistep(self) -> bool:
        """Whether a step reads what the steps before it left as history."""
        return any(row[HISTORY] != 0 for row in self.coefficients)


class SubnetEntry(Strict):
    """One subnetwork. `units`: its slots by block and unit group, ascending. With dynamic width, all share `file`."""

    file: str
    units: Slots
    gated: bool = Field(description="takes the `gates` input, because the masks of its steps differ")
    capacities: tuple[int, ...] | None = Field(default=None, description="MLP token slots per row, by block")
    full_file: str | None = Field(default=None, description="the same with a slot for each token, if steps overflow")
    weight_bytes: int = Field(ge=0, description="bytes of weights.bin that the subnetwork reads")
    fp16_layers: tuple[tuple[str, ...], ...] | None = Field(
        default=None,
        validation_alias=AliasChoices("fp16_layers", "in_16_bits"),
        serialization_alias="in_16_bits",  # the key in the file, which the digests of older bundles cover
        description="in a bundle of calibrated 8 bits: the layers that stay in fp16, by block",
    )


class SegmentEntry(Strict):
    """Consecutive steps (execution order) that run on one subnetwork."""

    first: int = Field(ge=0)
    count: int = Field(ge=1)
    subnet: int = Field(ge=0)

    @property
    def steps(self) -> range:
        """The execution indices of the segment's steps."""
        return range(self.first, self.first + self.count)


class PlanEntry(Strict):
    """The segments, and what a run costs: multiply-adds of the blocks, for one image.

    `macs`: of this plan. `per_step_macs`: of the exact masks. `static_macs`: with everything on.
    """

    kind: PlanKind
    segments: tuple[SegmentEntry, ...]
    macs: FiniteFloat
    per_step_macs: FiniteFloat
    static_macs: FiniteFloat
    measured: MeasuredPlan | None = Field(default=None, description="what was measured to choose the plan")


class Manifest(Strict):
    """The description of a bundle. `digest` covers all other fields, so that an edited manifest is detected."""

    schema_version: Literal[3]
    model: ModelConfig
    sampling: SamplingEntry
    plan: PlanEntry
    subnets: tuple[SubnetEntry, ...]
    masks: tuple[str, ...]
    unit_order: Slots
    routing: Routing | None = Field(description="null: a static model, all of whose tokens enter the MLP")
    precision: Precision
    max_batch: int = Field(ge=1)
    weights: dict[str, WeightEntry]
    files: dict[str, FileEntry]
    checkpoint_sha256: str
    tools: dict[str, str]
    vae: VaeEntry | None = Field(default=None, description="the decoder; null: samples of latents are not decoded")
    smoothing: Smoothing | None = Field(
        default=None,
        validation_alias=AliasChoices("smoothing", "migration"),
        serialization_alias="migration",  # the key in the file, which the digests of older bundles cover
        description="the factors by which inputs of layers are divided and weights multiplied",
    )
    digest: str = ""

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
                raise ValueError(f"path {name!r} leads out of the bundle")
            if not name.isprintable():
                raise ValueError(f"path {name!r} is not a file name")
        return files

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        steps = self.sampling.steps
        ends = list(accumulate((segment.count for segment in self.plan.segments), initial=0))
        if [segment.first for segment in self.plan.segments] != ends[:-1] or ends[-1] != steps:
            raise ValueError("the plan's segments do not cover the sampling steps once each, in order")
        if any(segment.subnet >= len(self.subnets) for segment in self.plan.segments):
            raise ValueError("the plan names a subnetwork that does not exist")
        if len(self.masks) != steps:
            raise ValueError("the number of masks is not the number of sampling steps")
        if trouble := order_trouble(self.unit_order, self.model):
            raise ValueError(trouble)
        decoder = () if self.vae is None else (VAE_DECODER, VAE_WEIGHTS)
        subnets = (*(s.file for s in self.subnets), *(s.full_file for s in self.subnets))
        text = () if self.model.text is None else (TEXT_GRAPH,)
        for name in (WEIGHTS, CONDITIONING, *text, *subnets, *decoder):
            if name is not None and name not in self.files:
                raise ValueError(f"file {name!r} is used but not listed")
        if self.vae is not None and (reason := self.vae.unfit_reason(self.model)):
            raise ValueError(reason)
        if trouble := self._trouble():
            raise ValueError(trouble)
        return self

    def _trouble(self) -> str | None:
        """How weights, subnetworks or masks disagree with the model or each other; None if all agree."""
        if self.sampling.cfg_channels > self.model.in_channels:
            return f"guidance acts on {self.sampling.cfg_channels} channels, but the model has {self.model.in_channels}"
        if trouble := weights_trouble(self.weights, self.model, self.precision):
            return trouble
        for subnet in self.subnets:
            if trouble := slots_trouble(subnet.units, self.model):
                return trouble
            if subnet.capacities is not None and len(subnet.capacities) != self.model.depth:
                return "a subnetwork does not have one capacity per block"
        masks = self.step_masks()
        for segment in self.plan.segments:
            subnet = self.subnets[segment.subnet]
            served = masks[segment.first : segment.first + segment.count]
            if trouble := mask_trouble(self.model.units.mask(subnet.units), subnet.gated, served):
                return trouble
        return None

    @property
    def dynamic_width(self) -> bool:
        """Whether one graph serves every width. It takes the block weights as inputs."""
        return self.plan.kind is PlanKind.DYNAMIC_WIDTH

    def step_masks(self) -> np.ndarray:
        """Masks of all steps by slot, bool [S, U]."""
        return np.stack([unpack_mask(text, self.model.units.size) for text in self.masks])

    def checkpoint_masks(self) -> np.ndarray:
        """Masks of all steps by unit of the checkpoint, bool [S, U]."""
        slots = self.step_masks()
        units = np.empty_like(slots)
        for part, order in self.model.units.zip(self.unit_order):
            units[:, [part.start + unit for unit in order]] = slots[:, part.units]
        return units

    def executed_masks(self) -> np.ndarray:
        """The units that each step computes, those of its subnetwork, by slot, bool [S, U]."""
        subnets = [self.model.units.mask(subnet.units) for subnet in self.subnets]
        return np.stack([subnets[segment.subnet] for segment in self.plan.segments for _ in segment.steps])

    def compute_digest(self) -> str:
        """SHA-256 over the canonical JSON of every field but `digest`."""
        return hashlib.sha256(json.dumps(self._values(), sort_keys=True, allow_nan=False).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of `manifest.json`, with the digest filled in."""
        values = self._values() | {"digest": self.compute_digest()}
        return json.dumps(values, indent=1, allow_nan=False) + "\n"

    def _values(self) -> dict[str, Any]:
        values = self.model_dump(mode="json", exclude={"digest"}, by_alias=True)
        # Older bundles, and so their digests, do not have these keys.
        if self.plan.measured is None:
            del values["plan"]["measured"]
        for subnet in values["subnets"]:
            if subnet["in_16_bits"] is None:
                del subnet["in_16_bits"]
        return {name: value for name, value in values.items() if value is not None or name not in _LEFT_OUT_WHILE_NONE}


def pack_mask(mask: np.ndarray) -> str:
    """A mask bool [U] as hexadecimal text; the first unit is the highest bit."""
    return np.packbits(mask).tobytes().hex()


def unpack_mask(text: str, count: int) -> np.ndarray:
    """The inverse of `pack_mask`, bool [count]. Raises `BundleError` if the text does not have that many bits."""
    try:
        raw = bytes.fromhex(text)
    except ValueError as error:
        raise BundleError(f"manifest: a mask is not hexadecimal: {text[:20]!r}") from error
    if len(raw) != (count + 7) // 8:
        raise BundleError(f"manifest: a mask has {len(raw)} bytes, expected {(count + 7) // 8}")
    return np.unpackbits(np.frombuffer(raw, np.uint8), count=count).astype(bool)


def parse_manifest(path: Path) -> Manifest:
    """Read and check `manifest.json`. Raises `BundleError` with one line that says what is wrong."""
    if not path.is_file() and looks_like_checkpoint(path.parent):
        raise BundleError(
            f"{path.parent} is a checkpoint, not a bundle; export it with `dydit export {path.parent} --out BUNDLE`"
        )
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
    except FileNotFoundError as error:
        raise BundleError(f"{path.parent} is not a bundle: it has no {MANIFEST}") from error
    except NotADirectoryError as error:
        raise BundleError(f"{path.parent} is not a bundle: a bundle is a folder, written by `dydit export`") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}; check its permissions and the disk") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of thousands of digits, too deep
        raise BundleError(f"{path} is damaged: not JSON ({one_line(error)}); export the bundle again") from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path}: schema version {version!r}, but this dydit reads {SCHEMA_VERSION}; export the bundle again"
        )
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        raise BundleError(f"{path} is not valid: {first_problem(error)}; export the bundle again") from error
    if manifest.digest != manifest.compute_digest():
        raise BundleError(f"{path} was changed after it was written (its digest differs); export the bundle again")
    return manifest
