"""What a recipe would do, before it runs: data, model, schedule, and estimates of memory and time. Writes nothing.

Parameters and activations are counted on PyTorch's meta device, which allocates no memory. The time is that of a few
steps of a model with two or three blocks on this machine, scaled by multiply-adds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from dydit.data.opened import open_data
from dydit.models.config import ModelConfig
from dydit.models.meta import without_memory
from dydit.models.registry import architecture_of
from dydit.models.routers import Gating, Static
from dydit.models.text import TextRows
from dydit.training.losses import ProcessTensors
from dydit.training.objective import Inputs, Objective
from dydit.training.recipe import Precision, Recipe, Stage
from dydit.training.start import start_note, with_one_process
from dydit.training.teacher import teacher_config
from dydit.words import counted, duration

FP32 = 4
"""Bytes of a number in weights, moments and gradients."""
QUARTERS = 4
"""Images of a measured step are a multiple of these: as many of each quarter of the times."""
MEASURED_MACS = 3e9
"""Multiply-adds of a forward pass in a measured step, at least: with fewer, the step would show its fixed costs."""
DAY = 24 * 3600
MEASURED_STEPS = 2
"""Steps that are timed, after one that is not."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a run needs: `weights`, and as many for the EMA and for gradients, twice as many for the moments.

    `activations`: an estimate of what the backward pass needs of a batch, without matrices of attention, which fused
    attention does not store. `teacher`: the weights of a teacher.
    """

    weights: int
    activations: int
    teacher: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return 5 * self.weights + self.activations + self.teacher


@dataclass(frozen=True)
class StepTime:
    """A measured step: seconds for an image of a model with `blocks` blocks and `macs` multiply-adds, on `device`."""

    seconds: float
    blocks: int
    macs: int
    device: str

    def of(self, recipe: Recipe) -> float:
        """Seconds of a whole run, scaled by multiply-adds. The warm-up runs the complete model as well, and a teacher
        runs forward only, which is a third of a step.
        """
        images = recipe.iterations * recipe.batch_size
        macs = images * recipe.model.macs
        if recipe.stage is not Stage.STATIC:
            macs += min(recipe.warmup_iterations, recipe.iterations) * recipe.batch_size * recipe.model.macs
        if (teacher := teacher_config(recipe)) is not None:
            macs += images * teacher.macs // 3
        return self.seconds * macs / self.macs


def describe(recipes: Sequence[Recipe], measure: Callable[[Recipe], StepTime] | None = None) -> list[str]:
    """The lines of a dry run. `measure`: how a step is measured; by default on this machine."""
    recipes = with_one_process(recipes)
    last = recipes[-1]
    images = len(open_data(last.data)) if last.data else None
    lines = [_row("data", _data_words(last, images)), *_model_lines(last.model)]
    if note := start_note(recipes[0]):
        lines.append(_row("start", note))
    lines += [_row("teacher", each) for each in dict.fromkeys(run.teacher for run in recipes) if each]
    for number, run in enumerate(recipes):
        lines += [_row("" if number else "run", _length_words(run, images)), _row("", _rate_words(run))]
    lines += _memory_lines(max(recipes, key=lambda run: memory(run).total))
    step = (measure or measured_step)(last)
    total = sum(step.of(run) for run in recipes)
    runs = "" if len(recipes) == 1 else f" ({', '.join(f'{run.stage} {_long(step.of(run))}' for run in recipes)})"
    lines.append(_row("time", f"about {_long(total)}{runs}"))
    how = f"estimated from steps of {counted(step.blocks, 'block')} on {step.device}, scaled by multiply-adds"
    return [*lines, _row("", how)]


def _row(title: str, text: str) -> str:
    return f"{title:8}{text}"


def _data_words(recipe: Recipe, images: int | None) -> str:
    model = recipe.model
    shape = f"{model.in_channels}x{model.input_size}x{model.input_size}"
    if model.text is not None:
        labels = f"texts of up to {counted(model.text.tokens, 'token')}"
    elif model.classes.unconditional:
        labels = "without labels"
    else:
        labels = counted(model.classes.count, "class", "classes")
    if images is None:
        return f"not given (--data PATH); the recipe takes {shape}, {labels}"
    return f"{recipe.data}: {counted(images, 'image')} of {shape}, {labels}"


def _model_lines(model: ModelConfig) -> list[str]:
    count = parameters(model)
    return [
        _row("model", f"{model.title}: {model.summary}"),
        _row("", f"{count:,} parameters; {model.macs / 1e9:.2f} G multiply-adds for an image with everything on"),
    ]


def _length_words(run: Recipe, images: int | None) -> str:
    epochs = "" if images is None else f", {run.iterations * run.batch_size / images:.3g} epochs"
    iterations, batch = counted(run.iterations, "iteration"), counted(run.batch_size, "image")
    return f"{run.name}: {iterations} of {batch}{epochs}"


def _rate_words(run: Recipe) -> str:
    warm = f", warm-up of {counted(run.learning_rate_warmup, 'iteration')}" if run.learning_rate_warmup else ""
    rate = f"learning rate {run.learning_rate:g} ({run.learning_rate_schedule}{warm})"
    if run.stage is Stage.STATIC:
        return rate
    return f"{rate}; {run.lambda_target:g} of the multiply-adds from iteration {run.ramp_iterations:,}"


def _memory_lines(run: Recipe) -> list[str]:
    needed = memory(run)
    whole = {"weights": 1, "EMA": 1, "gradients": 1, "moments": 2}
    parts = [f"{name} {_size(times * needed.weights)}" for name, times in whole.items()]
    parts += [f"teacher {_size(needed.teacher)}"] if needed.teacher else []
    activations = (
        f"about {_size(needed.activations)} of activations for {counted(run.batch_size // run.accumulate, 'image')}"
    )
    return [
        _row("memory", f"about {_size(needed.total)}: {', '.join(parts)},"),
        _row("", f"and {activations}, which several processes share"),
    ]


def _long(seconds: float) -> str:
    return duration(seconds) if seconds < 3 * DAY else f"{seconds / DAY:,.1f} days"


def _size(size: float) -> str:
    unit, scale = ("GB", 1e9) if size >= 1e9 else ("MB", 1e6)
    return f"{size / scale:.3g} {unit}" if size < 1000 * scale else f"{size / scale:,.0f} {unit}"


# Counts


def parameters(model: ModelConfig) -> int:
    """The number of values in the weights of a model, position embeddings included."""
    return sum(math.prod(shape) for shape in architecture_of(model).state_shapes(model).values())


def memory(recipe: Recipe) -> Memory:
    """The bytes that a run needs."""
    model = recipe.model
    one, more = (_activations(_of_depth(model, depth)) for depth in (1, 3))
    # With checkpointing, only the stream before each further block is stored.
    block = FP32 * model.tokens * model.hidden_size if recipe.checkpointing else (more - one) / 2
    share = 0.5 if recipe.precision is Precision.BF16 else 1.0
    images = recipe.batch_size // recipe.accumulate
    teacher = teacher_config(recipe)
    return Memory(
        weights=FP32 * parameters(model),
        activations=round(share * (one + block * (model.depth - 1)) * images),
        teacher=FP32 * parameters(teacher) if teacher is not None else 0,
    )


class _Soft(Gating):
    """Gates with a gradient, as in training, without noise."""

    def gate(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()


@lru_cache(maxsize=16)
def _activations(model: ModelConfig) -> int:
    """Bytes that one image's backward pass needs, from tensors without memory."""
    with without_memory():
        network = architecture_of(model).masked(model).to("meta")  # also what is computed, such as positions
        x, t, y = _inputs(model, 1)
    weights = {each.untyped_storage()._cdata for each in network.parameters()}
    saved: dict[int, int] = {}
    alive: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        is_attention = tensor.ndim >= 3 and tensor.shape[-1] == tensor.shape[-2] == model.tokens
        if storage._cdata not in weights and not is_attention:
            saved[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # so that no later tensor gets the same identity
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network(x, t, y, _Soft() if model.dynamic else Static())
    return sum(saved.values())


def _inputs(model: ModelConfig, count: int) -> tuple[Tensor, Tensor, Any]:
    """Images, times and labels or texts, on the current device."""
    x = torch.randn(count, model.in_channels, model.input_size, model.input_size)
    t = torch.zeros(count) if not model.diffusion.discrete else torch.zeros(count, dtype=torch.int64)
    if model.text is None:
        return x, t, torch.zeros(count, dtype=torch.int64)
    texts = torch.randn(count, model.text.tokens, model.text.channels)
    return x, t, TextRows(texts, torch.ones(count, model.text.tokens, dtype=torch.bool))


def _of_depth(model: ModelConfig, depth: int) -> ModelConfig:
    """The model with another number of blocks, as valid as the model is."""
    return type(model).model_validate({**model.model_dump(mode="json"), "depth": depth})


# Time


def measured_step(recipe: Recipe) -> StepTime:
    """Time training steps of a model with two blocks, or three where the number must be odd, on this machine."""
    try:
        model = _of_depth(recipe.model, 2)
    except ValidationError:
        model = _of_depth(recipe.model, 3)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = recipe.model_copy(update={"model": model, "warmup_iterations": 0})
    network = architecture_of(model).masked(model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.02)
    network.train().to(device)
    objective = Objective(network, small, ProcessTensors.of(small.process, device))
    optimizer = torch.optim.AdamW([each for each in network.parameters() if each.requires_grad], lr=1e-6)
    most = max(1, recipe.batch_size // QUARTERS)
    images = QUARTERS * min(most, math.ceil(MEASURED_MACS / (QUARTERS * max(1, model.macs))))
    with torch.device(device):
        x, t, y = _inputs(model, images)
        batch = Inputs(x, t, y, torch.randn_like(x), gate_seed=0, first=0)
    seconds = []
    for _ in range(1 + MEASURED_STEPS):
        started = time.perf_counter()
        objective(batch, 0)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    cpu = f"a CPU with {counted(torch.get_num_threads(), 'thread')}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return StepTime(float(np.median(seconds[1:])) / images, model.depth, model.macs, name)
