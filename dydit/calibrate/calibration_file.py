"""The calibration file, written by `dydit calibrate` and read by `dydit export`: for one checkpoint, run and plan.

One JSON object with sorted keys; the same inputs give the same bytes. `tokens`: the capacities of token routing.
`activations` (optional): the ranges of the inputs of linear layers. `sensitivity` (optional): the measurements that
decided which layers stay in 16 bits. Lists over steps are in execution order (noisiest first), lists over segments in
the order of the plan.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, FiniteFloat, ValidationError, model_validator

from dydit.calibrate.activation_ranges import ActivationRanges, lengths_of
from dydit.calibrate.capacity import CapacityConfig, Overflow, Share
from dydit.calibrate.mixed_precision import Sensitivity
from dydit.diffusion.process import TRAIN_STEPS, Process
from dydit.diffusion.samplers import Sampler, SamplerConfig, Spacing
from dydit.errors import CalibrationError, one_line
from dydit.validation import Strict, first_problem

SCHEMA_VERSION: Literal[1] = 1
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class OverflowRates(Overflow):
    """How often batches overflow, and what it costs.

    `mlp_ratio`: MLP multiply-adds with capacities, repeated steps included, over those of dynamic routing.
    """

    images: int = Field(ge=1, description="images of all guidance scales")
    mlp_ratio: FiniteFloat = Field(gt=0)


class TokenCalibration(Strict):
    """Capacities of token routing, the settings that chose them, and their overflow rates."""

    tokens: int = Field(ge=1, description="tokens of a row")
    settings: CapacityConfig
    mean_ratio: tuple[tuple[Share, ...], ...] = Field(description="share of tokens routed, by step and block")
    capacities: tuple[tuple[int, ...], ...] = Field(description="MLP token slots of a row, by segment and block")
    predicted: OverflowRates = Field(description="on the calibration images, which is optimistic")
    held_out: OverflowRates = Field(description="on held-out images")

    @model_validator(mode="after")
    def _consistent(self) -> TokenCalibration:
        depths = {len(blocks) for blocks in (*self.mean_ratio, *self.capacities)}
        if not self.mean_ratio or not self.capacities or len(depths) != 1:
            raise ValueError("every step and segment must have the same number of blocks, at least one")
        if any(not 1 <= each <= self.tokens for blocks in self.capacities for each in blocks):
            raise ValueError(f"a capacity is outside 1..{self.tokens}")
        return self

    @property
    def largest(self) -> tuple[int, ...]:
        """The largest capacity over all segments, by block, which one graph for all segments needs."""
        return tuple(map(max, zip(*self.capacities, strict=True)))


class Calibration(Strict):
    """A calibration, and the checkpoint, run and plan that it belongs to."""

    schema_version: Literal[1] = SCHEMA_VERSION
    checkpoint_sha256: Sha256
    process: Process | None = Field(default=None, description="of the model, if its checkpoint or the user stated it")
    steps: int = Field(ge=1, le=TRAIN_STEPS)
    sampler: Sampler
    spacing: Spacing | None = None
    eta: FiniteFloat = Field(default=0.0, ge=0, le=1)
    plan_sha256: Sha256
    cfg_scales: tuple[FiniteFloat, ...] = Field(min_length=1)
    seed: int = Field(ge=0)
    held_out_seed: int = Field(ge=0)
    tokens: TokenCalibration
    activations: ActivationRanges | None = None
    sensitivity: Sensitivity | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Calibration:
        if len(self.tokens.mean_ratio) != self.steps:
            raise ValueError("expected one row of token ratios for each step")
        if self.seed == self.held_out_seed:
            raise ValueError("held_out_seed must differ from seed")
        if self.sensitivity is not None:
            if self.activations is None:
                raise ValueError("there is a sensitivity, but there are no activation ranges")
            if lengths_of(self.sensitivity.losses) != lengths_of(self.activations.thresholds):
                raise ValueError("losses and activation ranges have different shapes")
        return self

    def to_json(self) -> str:
        """The text of the file."""
        absent = {name for name in ("process", "activations", "sensitivity") if getattr(self, name) is None}
        values = self.model_dump(mode="json", exclude=absent, by_alias=True)
        return json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @property
    def sampling(self) -> SamplerConfig:
        """The sampler and its settings."""
        return SamplerConfig(sampler=self.sampler, steps=self.steps, spacing=self.spacing, eta=self.eta)

    def require(
        self, checkpoint_sha256: str, sampling: SamplerConfig, plan_sha256: str, process: Process | None = None
    ) -> None:
        """Raise `CalibrationError`, naming the difference, if this belongs to another checkpoint, run or plan, or to a
        model of another process."""
        ours, wanted = self.process or Process(), process or Process()
        if self.checkpoint_sha256 != checkpoint_sha256:
            differs = "another checkpoint (its SHA-256 differs)"
        elif ours != wanted:
            differs = f"a model that {ours.words}, not for one that {wanted.words}"
        elif self.sampling != sampling:
            differs = f"{self.sampling.words}, not {sampling.words}"
        elif self.plan_sha256 != plan_sha256:
            differs = "another plan (its segments or masks differ)"
        else:
            return
        raise CalibrationError(
            f"the calibration is for {differs}; run `dydit calibrate` with the checkpoint and options of the export"
        )

    def require_searched(self, precision: str) -> None:
        """Raise `CalibrationError` if the search for layers in 16 bits was made for another precision."""
        if self.sensitivity is not None and self.sensitivity.precision != precision:
            raise CalibrationError(
                f"the layers that stay in 16 bits were searched for {self.sensitivity.precision}, not for {precision}; "
                f"run `dydit calibrate` with --precision {precision}"
            )


def plan_sha256(bounds: Sequence[int], masks: np.ndarray) -> str:
    """SHA-256 of a plan: segment bounds (0 = b_0 < ... < b_k = S) and the width masks bool [S, U] of steps."""
    head = json.dumps({"bounds": list(map(int, bounds)), "shape": list(masks.shape)})
    return hashlib.sha256(head.encode() + np.packbits(masks.reshape(-1)).tobytes()).hexdigest()


def read_calibration(path: Path) -> Calibration:
    """Read a calibration file. Raises `CalibrationError` with one line that says what is wrong."""
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CalibrationError(f"{path} does not exist; `dydit calibrate` makes it") from error
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path} is not a calibration: not JSON ({one_line(error)})") from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise CalibrationError(
            f"{path} is not a calibration that this version reads: schema version {version!r}, expected "
            f"{SCHEMA_VERSION}; calibrate again"
        )
    try:
        return Calibration.model_validate(values)
    except ValidationError as error:
        raise CalibrationError(f"{path} is not valid: {first_problem(error)}; calibrate again") from error
