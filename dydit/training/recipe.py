"""Recipes: all settings that decide the outcome of a training run, in one frozen configuration.

Recipe files, which `dydit.training.recipe_files` reads, state the settings of one run or of a sequence of runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from pydantic import ConfigDict, Field, model_validator

from dydit.diffusion.process import Process
from dydit.errors import ConfigError
from dydit.models.config import ModelConfig
from dydit.validation import Strict


class Stage(StrEnum):
    """What a run trains."""

    STATIC = "static"  # a plain DiT, every unit and token on
    DYNAMIC = "dynamic"  # routers and weights together, towards a share of the compute, with noise on the gates
    SETTLE = "settle"  # the same with the gates of inference: the weights adapt to the decisions


class Precision(StrEnum):
    """The type of the matrix products; weights, moments and losses are fp32 in both."""

    FP32 = "fp32"
    BF16 = "bf16"


class Tracker(StrEnum):
    """Where the lines of the log are sent, too."""

    TENSORBOARD = "tensorboard"  # event files in the folder `trackers` of the run
    WANDB = "wandb"  # the project "dydit"


class LearningRateSchedule(StrEnum):
    """What the learning rate does after its linear warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"  # half a cosine, to a twentieth of the peak


class StartWeights(StrEnum):
    """Which weights of a training file a run starts from."""

    EMA = "ema"  # the moving average
    MODEL = "model"  # the weights themselves


class Routed(StrEnum):
    """Which routers are trained. The others are fixed open."""

    BOTH = "both"
    WIDTH = "width"  # heads and channel groups only; every token enters the MLP
    TOKENS = "tokens"  # tokens only; every head and channel group is on


class Recipe(Strict):
    """One training run. Defaults are those of the paper for lambda 0.5 (Zhao et al. 2025, and their code)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    stage: Stage
    model: ModelConfig = Field(
        description="sizes of the model; model.process: how noise is added and what the model predicts, as --schedule "
        "and --prediction set it; model.token_scope: token, or layer to skip MLPs for all tokens of an image together"
    )
    data: str
    init: str | None = Field(default=None, description="checkpoint to start from; new weights if absent")
    init_weights: StartWeights | None = Field(
        default=None,
        description="which weights to take from `init`, if it is a training file: ema (the default, where it has them) "
        "or model",
    )

    teacher: str | None = Field(
        default=None,
        description="checkpoint whose predictions the run learns to reproduce, beside the data; it is not trained. Not "
        "in the paper: see dydit/training/teacher.py",
    )
    teacher_weight: float = Field(default=1.0, gt=0, description="weight of the loss on the predictions of `teacher`")

    iterations: int = Field(gt=0)
    batch_size: int = Field(default=256, gt=0, description="images per iteration, over all processes")
    learning_rate: float = Field(default=1e-4, gt=0, le=1e6)
    learning_rate_schedule: LearningRateSchedule = LearningRateSchedule.CONSTANT
    learning_rate_warmup: int = Field(default=0, ge=0, description="iterations of linear warm-up")
    router_learning_rate: float = Field(
        default=1.0, gt=0, le=1e6, description="learning rate of the routers, as a multiple of `learning_rate`"
    )
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(
        default=None, gt=0, description="scale gradients of a larger norm down to this norm"
    )
    grad_norm_limit: float | None = Field(
        default=200.0, gt=0, description="skip steps whose gradient norm is above this value"
    )
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    label_dropout: float = Field(default=0.1, ge=0, le=1)
    precision: Precision = Precision.FP32
    seed: int = Field(default=0, ge=0, lt=2**32)

    lambda_target: float = Field(default=0.5, gt=0, le=1, description="share of the blocks' multiply-adds to keep")
    flops_weight: float = Field(default=2.0, ge=0)
    token_target: float = Field(default=0.7, gt=0, le=1, description="share of tokens that the token losses aim at")
    token_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of the token losses, which are not in the paper: see dydit/training/losses.py",
    )
    token_spread: float = Field(
        default=0.0,
        ge=0,
        description="how much the target share of tokens increases with the detail of an image (0: not at all): see "
        "dydit/training/losses.py",
    )
    ramp_iterations: int = Field(
        default=1000,
        ge=0,
        description="iteration at which the target share of multiply-adds, which falls linearly, reaches lambda_target",
    )
    ramp_hold: int = Field(
        default=100, ge=0, description="the target share of multiply-adds is 1 before this iteration"
    )
    warmup_iterations: int = Field(default=0, ge=0, description="iterations with the complete model's loss added")
    temperature: float = Field(default=5.0, gt=0)
    noise_anneal: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of the iterations, at the end of the run, over which the noise of the gates falls to 0",
    )
    width_bias: float = 15.0
    token_bias: float = 35.0
    routed: Routed = Field(
        default=Routed.BOTH, description="which routers are trained: both, width or tokens; the others are fixed open"
    )
    random_routers: bool = Field(
        default=False,
        description="draw routers at random, so that they keep about lambda_target of the multiply-adds, and fix them",
    )

    log_every: int = Field(default=50, gt=0)
    save_every: int = Field(default=500, gt=0)

    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="of AdamW")
    adam_eps: float = Field(default=1e-8, gt=0, description="of AdamW")
    accumulate: int = Field(
        default=1,
        gt=0,
        description="parts of a batch that run one after another, to save memory; flops_weight and the token losses "
        "then see the means of a part of the batch (of all processes)",
    )
    checkpointing: bool = Field(
        default=False, description="compute blocks a second time in the backward pass, to save memory"
    )
    compile: bool = Field(default=False, description="compile the model with torch.compile")
    trackers: tuple[Tracker, ...] = Field(
        default=(), description='where the log is sent, too: ["tensorboard"], ["wandb"] or both'
    )
    sample_every: int | None = Field(
        default=None, gt=0, description="iterations between pictures of samples, samples-*.png; none if absent"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if (self.stage is not Stage.STATIC) != self.model.dynamic:
            raise ValueError(
                f"stage {self.stage} does not fit model.routers {self.model.routers}; stage static needs model.routers "
                "none, and the other stages need a model with routers"
            )
        if self.label_dropout and self.model.null_class is None and self.model.text is None:
            raise ValueError("label_dropout needs a model with a null class")
        if self.random_routers and self.routed is not Routed.BOTH:
            raise ValueError(f"random_routers draws all routers; set routed to both, not {self.routed}")
        if self.teacher is None and self.teacher_weight != 1:
            raise ValueError(f"teacher_weight {self.teacher_weight:g} needs a teacher; set teacher to a checkpoint")
        if self.batch_size % 4:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of 4 (timesteps are drawn from four quarters)"
            )
        if self.batch_size % (4 * self.accumulate):
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of {4 * self.accumulate}: each of the "
                f"{self.accumulate} parts of a batch (accumulate) has timesteps from four quarters"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas[0]:g} and {self.betas[1]:g} are not both from 0 to below 1")
        return self

    @property
    def process(self) -> Process:
        """How noise is added and what the model predicts: that of the model, or of published ones."""
        return self.model.diffusion

    def started_from(self, model: ModelConfig, where: str) -> Recipe:
        """The recipe with the process of the model that it starts from. `where`: words for that model.

        Raises `ConfigError` if the recipe states another process.
        """
        if self.model.process is None:
            return self.model_copy(update={"model": self.model.model_copy(update={"process": model.process})})
        if self.process.words != model.diffusion.words:
            raise ConfigError(
                f"recipe {self.name} ({self.process.words}) starts from {where}, which was trained in another way "
                f"({model.diffusion.words}); remove --schedule, --prediction and model.process to train as before"
            )
        return self

    def target(self, iteration: int) -> float:
        """The target FLOPs ratio at `iteration` (from 0): 1 until `ramp_hold`, then falling to `lambda_target`."""
        if iteration < self.ramp_hold:
            return 1.0
        if iteration >= self.ramp_iterations:
            return self.lambda_target
        return 1 - (1 - self.lambda_target) * iteration / self.ramp_iterations

    def made_longer(self, where: Sequence[int]) -> str:
        """A remark on a run that was made longer at iterations `where`; "" if it was not.

        Schedules that span all iterations would have been different from the start with more iterations.
        """
        if not where:
            return ""
        schedules = ["learning_rate_schedule"] if self.learning_rate_schedule is LearningRateSchedule.COSINE else []
        schedules += ["noise_anneal"] if self.stage is Stage.DYNAMIC and self.noise_anneal else []
        fact = f"the run was made longer at iteration {', then '.join(map(str, where))}"
        if not schedules:
            return f"{fact}; its result equals that of a single run of {self.iterations} iterations"
        return (
            f"{fact}; {' and '.join(schedules)} followed the shorter run until then, so its result differs slightly "
            f"from that of a single run of {self.iterations} iterations"
        )

    def gate_noise(self, iteration: int) -> float:
        """The factor on the gates' noise: 1, falling to 0 over the last `noise_anneal` share; 0 in stage settle."""
        if self.stage is Stage.SETTLE:
            return 0.0
        if self.noise_anneal == 0:
            return 1.0
        left = self.iterations - 1 - iteration
        return min(1.0, left / (self.noise_anneal * self.iterations))
