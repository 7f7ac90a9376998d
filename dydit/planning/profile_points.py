"""The subnetworks that a profile runs: small models with the layer shapes of the exported one, at chosen widths.

The models have one or three blocks, which separates the cost of a block from the cost of a step. Their weights are
random, because times do not depend on them. Their token routers select exactly the wanted share of tokens at any width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dydit.bench.bench import spread_steps
from dydit.bench.timing import chained_run
from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind, Routing
from dydit.bundle.texts import synthetic_texts
from dydit.checkpoints.checkpoint import Checkpoint
from dydit.diffusion.noise import INITIAL_DRAW, image_noise
from dydit.diffusion.sampler_step import sampler_step
from dydit.diffusion.samplers import SamplerConfig, default_sampler
from dydit.diffusion.steps import State, StateOnly, run_steps
from dydit.export.exporter import export_planned
from dydit.export.settings import ExportConfig
from dydit.models.config import ModelConfig
from dydit.models.registry import architecture_of
from dydit.models.routers import Masked, Recording
from dydit.models.synthetic import synthetic_model
from dydit.models.text import TextRows
from dydit.planning.plan import Plan

SHALLOW, DEEP = 1, 3
RUN_STEPS, SHARE_STEPS = 250, 4


@dataclass(frozen=True)
class Point:
    """A subnetwork whose blocks all have the same number of units of each unit group.

    `counts`: active units of each group. `gated`: whether it takes gates. `holes`: whether the units are spread with
    gaps between them, as far as their number allows.
    """

    depth: int
    counts: tuple[int, ...]
    gated: bool = False
    holes: bool = False

    @property
    def timed(self) -> bool:
        """Whether its time is measured. Gates and holes change times by less than noise, so they are not timed."""
        return not (self.gated or self.holes)

    def masks(self, model: ModelConfig) -> np.ndarray:
        """The masks of its steps, bool [1 or 2, U], for `of_depth`. A gated point has two, which differ in one unit."""
        axis = of_depth(model, self.depth).units
        masks = np.zeros((1 + self.gated, axis.size), bool)
        for part in axis.parts:
            count, units = self.counts[part.index], part.group.count
            slots = np.linspace(0, units - 1, count).astype(int) if self.holes else np.arange(count)
            masks[:, part.start + slots] = True
            if self.gated:
                masks[1, part.start + slots[-1]] = False
        return masks


def of_depth(model: ModelConfig, depth: int) -> ModelConfig:
    """The same model with another number of blocks."""
    return model.model_copy(update={"depth": depth})


def profile_points(units: Sequence[int]) -> list[Point]:
    """The points for blocks with the given number of `units` in each group, at least 2."""
    full = tuple(units)
    none, one = (0,) * len(full), (1,) * len(full)
    half = tuple((count + 1) // 2 for count in full)

    def only(group: int, rest: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(full[index] if index == group else rest[index] for index in range(len(full)))

    alone = [only(group, rest) for rest in (one, none) for group in range(len(full))]
    points = [Point(SHALLOW, counts) for counts in (none, one, half, *alone, full)]
    points += [Point(SHALLOW, counts, gated=True) for counts in (half, full)]
    deep = [Point(DEEP, none), Point(DEEP, one), Point(DEEP, half, gated=True), Point(DEEP, half)]
    if min(full) > 2:
        points += [Point(SHALLOW, tuple(count - 1 for count in full), holes=True), Point(SHALLOW, half, holes=True)]
        deep.append(Point(DEEP, half, holes=True))
    return list(dict.fromkeys([*points, *deep]))


def write_profile_bundle(
    folder: Path, points: list[Point], model: ModelConfig, config: ExportConfig, token_share: float
) -> Bundle:
    """Write a bundle whose subnetworks are the points, in their order. All points must have the same depth."""
    depth = points[0].depth
    checkpoint = _checkpoint(model, depth, token_share)
    masks = np.concatenate([point.masks(model) for point in points])
    bounds = np.cumsum([0, *(1 + point.gated for point in points)])
    capacities = None
    if config.capacities is not None and config.routing is Routing.CAPACITY:
        capacities = (round(sum(config.capacities) / len(config.capacities)),) * depth
    changes = {
        "steps": len(masks),
        "plan": PlanKind.MAX_SUBNETS,
        "memory_budget": None,
        "capacities": capacities,
        "vae": None,
        "vae_tile": None,
    }
    plan = Plan(tuple(map(int, bounds)), 0.0)
    return export_planned(checkpoint, folder, config.model_copy(update=changes), masks, plan)


def _checkpoint(model: ModelConfig, depth: int, token_share: float) -> Checkpoint:
    config = of_depth(model, depth)
    state = synthetic_model(config).state_dict()
    if config.dynamic:
        architecture_of(config).route_share(state, config, token_share)
    return Checkpoint(config, state, "dydit-safetensors", Path("profile"), "0" * 64, {})


@torch.no_grad()
def token_share(checkpoint: Checkpoint) -> float:
    """The share of tokens that enter the MLPs, averaged over the blocks of a short DDIM run of one image in PyTorch.

    A static model has 1. The share is never less than one token.
    """
    config = checkpoint.config
    if not config.dynamic:
        return 1.0
    model, steps = checkpoint.model(), spread_steps(RUN_STEPS, SHARE_STEPS + 1)[:-1]
    process = config.diffusion
    sampling = SamplerConfig(sampler=default_sampler(process), steps=RUN_STEPS)
    run = chained_run(process, sampling, steps, config.learn_sigma)
    shares, label = [], torch.tensor([0])
    random = None if config.text is None else synthetic_texts(config, 1)
    texts = None if random is None else TextRows.of(random.embeddings, random.mask)

    def step(index: int, state: State[Tensor]) -> StateOnly[Tensor]:
        x, recording = state.x, Recording(Masked(), config)
        out = model(x, torch.tensor(run.times[index : index + 1]), label if texts is None else texts[label], recording)
        shares.append(float(recording.decisions().tokens.mean()))
        row, zeros = torch.tensor(run.coefficients[index], dtype=torch.float32), torch.zeros_like(x)
        return StateOnly(State(*sampler_step(x, zeros, out, zeros, row, cfg_scale=1.0, guided_channels=0)))

    shape = (config.in_channels, config.input_size, config.input_size)
    run_steps(step, State(torch.from_numpy(image_noise(0, range(1), INITIAL_DRAW, shape))), range(len(steps)))
    return max(float(np.mean(shares)), 1 / config.tokens)
