"""What the GPU benchmark measures: sizes, backend configurations, and the tasks in the order of their worth.

A run that ends early has measured what is worth most: first which configurations run and give the images of the CPU,
then times at the most telling batch size in every configuration, then the other batch sizes and precisions.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from dydit.bundle.manifest import PlanKind
from dydit.engines.flavour import present_gpu
from dydit.errors import ConfigError
from dydit.models.config import ModelConfig, parse_config
from dydit.models.dit.config import DiTConfig, preset
from dydit.validation import Strict

MODELS = ("digits", "S/2", "XL/2")
PRECISIONS = ("fp16", "bf16", "fp32")
DENSE, MERGED, DYNAMIC_WIDTH = "dense", "merged-16", "sliding"
PLANS: dict[str, dict[str, Any]] = {
    DENSE: {},
    MERGED: {"max_subnets": 16},
    DYNAMIC_WIDTH: {"plan": PlanKind.DYNAMIC_WIDTH},
}
"""Export settings of the bundles that are timed."""
STATIC, MASKED, COMPILED = "eager static", "eager masked", "compiled static"
"""The whole model in PyTorch: masked as the public code runs it, static, and static by `torch.compile`."""
SECONDS = {"installed": 120, "ceiling": 60, "small": 120, "check": 240, "models": 300, "bundle": 300}
SECONDS |= {"engines": 900, "time": 420}
"""Time limits by kind of task."""

# Three blocks of four heads of 16 channels, the least that attention is fused for, over 64 tokens.
SMALL = DiTConfig(hidden_size=64, depth=3, num_heads=4, patch_size=2, input_size=16, in_channels=4, num_classes=7)


class Settings(Strict):
    """Sizes of a run.

    `model`: one of `MODELS`, or `tiny` in a dry run. `batches`: batch sizes, with guidance. `steps`: sampling steps of
    a run; of these, `measured` are timed where steps can be timed alone, `repeats` rounds after one that does not
    count. `gpu`: its name and compute capability; None in a dry run, on the CPU. The first batch size says most.
    """

    model: str
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    batches: tuple[int, ...] = Field(default=(8, 32, 1), min_length=1)
    steps: int = Field(default=250, ge=2)
    measured: int = Field(default=12, ge=2)
    repeats: int = Field(default=5, ge=1)
    gpu: str | None = None

    @property
    def device(self) -> str:
        """Of PyTorch and the backends."""
        return "cpu" if self.gpu is None else "cuda"

    @property
    def config(self) -> ModelConfig:
        """Sizes of the dynamic model."""
        if self.model == "tiny":
            return SMALL.model_copy(update={"depth": 2, "input_size": 8})
        if self.model == "digits":
            from dydit.checkpoints.checkpoint import load_checkpoint  # imports PyTorch
            from dydit.quickstart.quickstart import ASSETS

            return load_checkpoint(ASSETS / "dydit.safetensors").config
        return preset(self.model)


S = TypeVar("S", bound=Settings)


def asked_settings(options: argparse.Namespace, dry: S, **more: Any) -> S:
    """What to measure: `dry` in a dry run, else settings of that kind by the options, and `more`.

    Raises `ConfigError` without a GPU, or where a value is out of range.
    """
    if options.dry_run:
        return dry
    gpu = present_gpu()
    if gpu is None:
        raise ConfigError("no NVIDIA GPU or driver on this machine; --dry-run tries the script on the CPU")
    values = {"model": options.model, "precision": options.precision, "gpu": str(gpu), **more}
    return parse_config(type(dry), values | ({"batches": tuple(options.batch)} if options.batch else {}))


DRY = Settings(model="tiny", precision="fp32", batches=(2,), steps=2, measured=2, repeats=2)
"""What `--dry-run` measures."""
DRY_TASKS = ("small bundles", "check: onnxruntime fp32", "models", f"bundle: {DENSE}", f"bundle: {MERGED}")
DRY_TASKS += ("time: onnxruntime batch 2",)


@dataclass(frozen=True)
class Configuration:
    """A backend with the settings that only a GPU shows.

    `probes`: rows of `dydit doctor` that must be well, beside the driver. `whole`: the loop stays on the device, so
    that only whole runs can be timed. `graphs`: with CUDA graphs.
    """

    name: str
    backend: str
    probes: tuple[str, ...]
    whole: bool = False
    graphs: bool = False

    @property
    def has_engines(self) -> bool:
        """Whether it runs engines that `dydit build` makes."""
        return self.backend.startswith("tensorrt")


PYTORCH = Configuration("pytorch", "pytorch", ("torch-cuda",))
BUNDLES = (
    Configuration("torch", "torch", ("torch-cuda",)),
    Configuration("onnxruntime", "onnxruntime", ("onnxruntime-cuda",)),
    Configuration("onnxruntime-loop", "onnxruntime", ("onnxruntime-cuda", "driver-package"), whole=True),
    Configuration("onnxruntime-graphs", "onnxruntime", ("onnxruntime-cuda", "driver-package"), whole=True, graphs=True),
    Configuration("tensorrt-rtx", "tensorrt-rtx", ("tensorrt-rtx", "driver-package"), whole=True, graphs=True),
    Configuration("tensorrt", "tensorrt", ("tensorrt", "driver-package"), whole=True, graphs=True),
)
CONFIGURATIONS = {each.name: each for each in (*BUNDLES, PYTORCH)}


@dataclass(frozen=True)
class Task:
    """A child process: what it does (`measure.KINDS`), with which arguments, and the tasks that must be done before."""

    name: str
    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)
    probes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


def tasks(settings: Settings) -> list[Task]:
    """All tasks of a run, in the order of their worth."""
    return [task for task in _tasks(settings) if settings.gpu is not None or task.name in DRY_TASKS]


def _tasks(settings: Settings) -> Iterator[Task]:
    yield Task("installed", "installed")
    yield Task("ceiling", "ceiling", probes=("driver", *PYTORCH.probes))
    yield Task("small bundles", "small")
    yield from (_check(each, settings.precision) for each in BUNDLES)
    yield Task("models", "models")
    for plan in PLANS:
        yield Task(f"bundle: {plan}", "bundle", {"plan": plan}, needs=("models",))
    for batch in settings.batches:
        for each in (PYTORCH, *BUNDLES):
            for plan in PLANS if each.has_engines and batch == settings.batches[0] else ():
                yield _task(f"engines: {each.name} {plan}", "engines", each, f"bundle: {plan}", plan=plan)
            contenders = [STATIC, MASKED, COMPILED] if each is PYTORCH else list(PLANS)
            need = "models" if each is PYTORCH else f"bundle: {DENSE}"
            yield _task(f"time: {each.name} batch {batch}", "time", each, need, contenders=contenders, batch=batch)
    yield from (_check(each, other) for other in PRECISIONS if other != settings.precision for each in BUNDLES)


def _task(name: str, kind: str, configuration: Configuration, need: str, **arguments: Any) -> Task:
    arguments["configuration"] = configuration.name
    return Task(name, kind, arguments, ("driver", *configuration.probes), (need,))


def _check(configuration: Configuration, precision: str) -> Task:
    name = f"check: {configuration.name} {precision}"
    return _task(name, "check", configuration, "small bundles", precision=precision)


class Work:
    """The files of a run, in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.report = folder / "gpu.json"
        self.dynamic, self.static = folder / "dynamic.safetensors", folder / "static.safetensors"
        self.small, self.reference = folder / "small.safetensors", folder / "reference.npz"
        self.tokens = folder / "tokens.npy"  # share of tokens that entered the MLPs, [measured steps, blocks]

    def bundle(self, name: str, configuration: Configuration | None = None) -> Path:
        """The bundle of a plan, or of the small model in a precision; with engines a copy for each configuration."""
        if configuration is not None and configuration.has_engines:
            return self.folder / "engines" / configuration.name / name
        return self.folder / "bundles" / name

    def results(self, task: str) -> Path:
        """The parts of a task's result, as far as they are known."""
        return self.folder / "results" / f"{''.join(c if c.isalnum() else '-' for c in task)}.json"

    def log(self, task: str) -> Path:
        """What a task's process prints."""
        return self.results(task).with_suffix(".log")
