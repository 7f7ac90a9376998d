"""The settings of an export."""

from __future__ import annotations

import numpy as np
from pydantic import Field, FiniteFloat, model_validator

from dydit.bundle.manifest import PlanKind, Routing
from dydit.bundle.stored_weights import Precision
from dydit.calibrate.activation_ranges import ActivationRanges
from dydit.calibrate.calibration_file import Calibration, plan_sha256
from dydit.diffusion.process import TRAIN_STEPS
from dydit.diffusion.samplers import DEFAULT_STEPS, Sampler, SamplerConfig, Spacing
from dydit.errors import ConfigError
from dydit.models.config import ModelConfig, Space
from dydit.planning.plan import Plan
from dydit.validation import Strict

"""The number of channels that guidance acts on by default, as in the public code of DiT."""


def guided_channels(model: ModelConfig, asked: int | None) -> int:
    """The number of channels that guidance acts on. Raises `ConfigError` if more are `asked` for than the model has."""
    if asked is not None and asked > model.in_channels:
        raise ConfigError(f"guidance on {asked} channels: the model has only {model.in_channels}")
    return model.guided_channels if asked is None else asked


class ExportConfig(Strict):
    """How to export a checkpoint.

    `steps`, `sampler`, `spacing`, `eta`: of the sampling run, see `SamplerConfig`. By default those of
    `ModelConfig.usual_run`. `max_subnets` applies to `PlanKind.MAX_SUBNETS`, `memory_budget` (bytes) to
    `PlanKind.MEMORY_BUDGET`. `cfg_channels`: the number of channels that guidance acts on, by default
    what the architecture says, for DiT the first 3.
    Capacity routing takes `capacities`, MLP token slots per row, by block, or a `calibration`, which has them for each
    segment; by default there is a slot for every token. `activations`: ranges of the inputs of linear layers for this
    plan's segments, which int8-static and fp8 need. `vae`, `vae_tile`, `vae_scale`, `vae_shift`: the decoder to add,
    see `dydit.export.vae_graph.export_vae`. `space`: what the model samples, pixels or latents, if its checkpoint does
    not state it or states it wrongly.
    """

    steps: int | None = Field(default=None, ge=1, le=TRAIN_STEPS)
    sampler: Sampler | None = None
    spacing: Spacing | None = None
    eta: FiniteFloat = Field(default=0.0, ge=0, le=1)
    plan: PlanKind = PlanKind.MAX_SUBNETS
    max_subnets: int = Field(default=32, ge=1)
    memory_budget: int | None = Field(default=None, gt=0)
    routing: Routing = Routing.DYNAMIC
    precision: Precision = Precision.FP32
    max_batch: int = Field(default=16, ge=1)
    cfg_channels: int | None = Field(default=None, ge=1)
    capacities: tuple[int, ...] | None = None
    calibration: Calibration | None = None
    activations: ActivationRanges | None = None
    vae: str | None = Field(default=None, min_length=1)
    vae_tile: int | None = Field(default=None, ge=1)
    vae_scale: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    vae_shift: FiniteFloat | None = None
    space: Space | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ExportConfig:
        if (self.plan is PlanKind.MEMORY_BUDGET) != (self.memory_budget is not None):
            raise ValueError("the plan memory-budget needs a memory budget, and no other plan takes one")
        if self.capacities is not None and self.routing is not Routing.CAPACITY:
            raise ValueError("capacities can only be given with capacity routing")
        if self.calibration is not None and self.routing is not Routing.CAPACITY and not self.precision.is_calibrated:
            raise ValueError("a calibration can only be given with capacity routing or precision int8-static or fp8")
        if self.calibration is not None and self.capacities is not None:
            raise ValueError("give either capacities or a calibration, not both")
        if self.precision.in_8_bits and self.plan is PlanKind.DYNAMIC_WIDTH:
            raise ValueError(
                f"dynamic width does not support {self.precision}: its weights are inputs of the graph, in fp32, fp16 "
                "or bf16; use another plan"
            )
        if self.precision.is_calibrated and self.activations is None and self.calibration is None:
            raise ValueError(f"{self.precision} needs a calibration, of `dydit calibrate --activations minmax`")
        if self.activations is not None and not self.precision.is_calibrated:
            raise ValueError(f"{self.precision} takes no calibrated activations; only int8-static and fp8 do")
        if self.vae is None and not (self.vae_tile is self.vae_scale is self.vae_shift is None):
            raise ValueError("a tile, scale or shift can only be given with a VAE decoder; give --vae")
        if self.vae is not None and self.space is Space.PIXELS:
            raise ValueError("a model that samples pixels has no latents to decode; remove the VAE")
        return self

    def sampling(self, model: ModelConfig) -> SamplerConfig:
        """The sampler and its settings for a model. Its usual number of steps goes with its usual sampler."""
        usual = model.usual_run
        sampler = self.sampler or usual.sampler
        steps = self.steps or (usual.steps if sampler is usual.sampler else DEFAULT_STEPS)
        return SamplerConfig(sampler=sampler, steps=steps, spacing=self.spacing, eta=self.eta)

    def calibration_for(self, checkpoint_sha256: str, model: ModelConfig, masks: np.ndarray, plan: Plan) -> Calibration:
        """The given calibration. `masks`: bool [S, U], by slot, of the plan's steps.

        Raises `CalibrationError`, naming what differs, if it is for another checkpoint, run or plan.
        """
        assert self.calibration is not None
        digest = plan_sha256(plan.bounds, masks)
        self.calibration.require(checkpoint_sha256, self.sampling(model), digest, model.process)
        return self.calibration
