"""What the table measures: the model, the batches, how often; and where its files lie in the work folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from dydit.models.config import ModelConfig, Strict
from dydit.models.dit.config import DiTConfig, preset

MODELS = ("digits", "S/2", "XL/2")
DENSE, MERGED, MERGED_32, SLIDING, PER_STEP = "dense", "merged-16", "merged-32", "sliding", "per-step"
PLANS = (DENSE, MERGED, SLIDING, MERGED_32, PER_STEP)
ASSETS = {True: "dydit.safetensors", False: "dit.safetensors"}  # the digits models: dynamic, static
CFG_SCALE, SEED, FLOPS_RATIO = 4.0, 0, 0.5


class Settings(Strict):
    """Sizes of a run.

    `model`: one of `MODELS`, or `tiny`, which a dry run takes. `batches`: images at a time, with guidance. `steps`:
    sampling steps of a run, of which `measured` are timed where a step can be timed alone, `repeats` times after one
    round that does not count. `device`: `cuda`, or `cpu` in a dry run. `gpu`: its name and compute capability.
    """

    model: str
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    batches: tuple[int, ...] = Field(default=(1, 8, 32), min_length=1)
    steps: int = Field(default=250, ge=2)
    measured: int = Field(default=12, ge=2)
    repeats: int = Field(default=5, ge=1)
    device: Literal["cpu", "cuda"] = "cuda"
    gpu: str | None = None

    @property
    def dry_run(self) -> bool:
        """Whether this only tries the script, on the CPU."""
        return self.device == "cpu"

    @property
    def config(self) -> ModelConfig:
        """The dynamic model's sizes."""
        if self.model == "tiny":
            return small_config().model_copy(update={"depth": 2, "input_size": 8, "num_classes": 7})
        if self.model == "digits":
            from dydit.checkpoints.checkpoint import load_checkpoint

            return load_checkpoint(asset(True)).config
        return preset(self.model)

    @property
    def item_bytes(self) -> int:
        """Bytes of a number in matrix products."""
        return 4 if self.precision == "fp32" else 2

    def by_worth(self) -> tuple[int, ...]:
        """The batches: the middle one first, for it is quick and says most, then the largest, then the others."""
        ordered = sorted(set(self.batches))
        first = [ordered[len(ordered) // 2], ordered[-1]]
        return tuple(dict.fromkeys([*first, *ordered]))


def dry_settings() -> Settings:
    """What `--dry-run` measures, in seconds, on the CPU."""
    return Settings(model="tiny", batches=(2,), steps=6, measured=2, repeats=2, device="cpu")


def small_config() -> ModelConfig:
    """Three blocks of four heads of 16 channels, the least that attention is fused for, over 64 tokens."""
    return DiTConfig(hidden_size=64, depth=3, num_heads=4, patch_size=2, input_size=16, in_channels=4, num_classes=7)


def asset(dynamic: bool) -> Path:
    """The file of a model that comes with the package."""
    import dydit

    return Path(dydit.__file__).parent / "assets" / "digits" / ASSETS[dynamic]


class Work:
    """The files of a run, in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.report = folder / "gpu.json"
        self.logs = folder / "logs"
        self.decisions = folder / "decisions.npz"
        self.reference = folder / "reference.npz"

    def checkpoint(self, dynamic: bool) -> Path:
        """The model that is timed."""
        return self.folder / ("dynamic.safetensors" if dynamic else "static.safetensors")

    def bundle(self, plan: str) -> Path:
        """The bundle that is timed."""
        return self.folder / "bundles" / plan

    @property
    def small_checkpoint(self) -> Path:
        """The model of the comparisons."""
        return self.folder / "small.safetensors"

    def small(self, precision: str, copy: str = "small") -> Path:
        """The bundle of the comparisons; engines are built in a `copy` of it."""
        return self.folder / copy / precision
