"""The small models that a profile runs: they have the shapes of the exported model, at chosen widths.

They have one block or three, so that the cost of a block can be told from that of a step. Their weights are random,
because time does not depend on them. Their token routers select exactly the given share of tokens, whatever the widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dydit.bench.bench import spread_steps
from dydit.bench.timing import chained_coefficients
from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind, Routing
from dydit.checkpoints.checkpoint import Checkpoint
from dydit.diffusion.coefficients import apply_step
from dydit.diffusion.noise import INITIAL_DRAW, image_noise
from dydit.diffusion.schedule import Schedule
from dydit.export.exporter import ExportConfig, export_planned
from dydit.models.config import ModelConfig
from dydit.models.routers import Masked, Recording
from dydit.models.synthetic import synthetic_model
from dydit.planning.plan import Plan

SHALLOW, DEEP = 1, 3
RUN_STEPS, SHARE_STEPS = 250, 4
_FAR, _LIMIT = 8.0, 4.0  # channel 0 of routed tokens (and its negative for others), and the router's threshold


@dataclass(frozen=True)
class Point:
    """A subnetwork whose blocks all have the same number of units, gated or not.

    `counts`: units of each unit group. `holes`: units are spread over all slots instead of standing side by side.
    """

    depth: int
    counts: tuple[int, ...]
    gated: bool = False
    holes: bool = False

    @property
    def timed(self) -> bool:
        """Whether it is timed: gates and holes change the time by no more than noise."""
        return not (self.gated or self.holes)

    def masks(self, model: ModelConfig) -> np.ndarray:
        """The masks of the steps that share it, bool [1 or 2, U] of `of_depth`: two if gated, differing in a unit."""
        axis = of_depth(model, self.depth).units
        masks = np.zeros((1 + self.gated, axis.size), bool)
        for part in axis.parts:
            count, units = self.counts[part.index], part.group.count
            on = np.linspace(0, units - 1, count).astype(int) if self.holes else np.arange(count)
            masks[:, part.start + on] = True
            if self.gated:
                masks[1, part.start + on[-1]] = False
        return masks


def of_depth(model: ModelConfig, depth: int) -> ModelConfig:
    """The same model with another number of blocks."""
    return model.model_copy(update={"depth": depth})


def profile_points(units: Sequence[int]) -> list[Point]:
    """The points for blocks of `units` units in each unit group, at least 2."""
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
    """Export a bundle whose subnetworks are the points, which all have the same depth, with the settings `config`."""
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
    config = model.model_copy(update={"depth": depth, "num_classes": 1, "null_class_row": True})
    state = synthetic_model(config).state_dict()
    if config.dynamic:
        _route_share(state, config, token_share)
    return Checkpoint(config, state, "dydit-safetensors", Path("profile"), "0" * 64, {})


def _route_share(state: dict[str, Tensor], config: ModelConfig, share: float) -> None:
    """Make routers decide by channel 0 of the residual stream: high for the first tokens, negative for the others.

    No other layer writes to that channel.
    """
    routed = round(share * config.tokens)
    state["pos_embed"][0, :routed, 0], state["pos_embed"][0, routed:, 0] = _FAR, -_FAR
    for block in range(config.depth):
        name = f"blocks.{block}"
        _blank(state, f"{name}.attn.proj")
        _blank(state, f"{name}.mlp.fc2")
        for layer in (0, 2):
            state[f"{name}.token_selection.mlp_head.{layer}.weight"].zero_()[0, 0] = 1
            state[f"{name}.token_selection.mlp_head.{layer}.bias"].zero_()
        state[f"{name}.token_selection.mlp_head.2.bias"].fill_(-_LIMIT)
    _blank(state, "x_embedder.proj")


def _blank(state: dict[str, Tensor], layer: str) -> None:
    state[f"{layer}.weight"][0] = 0
    state[f"{layer}.bias"][0] = 0


@torch.no_grad()
def token_share(checkpoint: Checkpoint) -> float:
    """The share of tokens that enter the MLPs, mean over the blocks, in a short DDIM run of one image with PyTorch.

    1 for a static model, and at least one token.
    """
    config = checkpoint.config
    if not config.dynamic:
        return 1.0
    model, steps = checkpoint.model(), spread_steps(RUN_STEPS, SHARE_STEPS + 1)[:-1]
    coefficients = chained_coefficients(steps, RUN_STEPS, config.learn_sigma)
    timesteps = Schedule.respaced(RUN_STEPS).timesteps[::-1]
    x = image_noise(0, range(1), INITIAL_DRAW, (config.in_channels, config.input_size, config.input_size))
    shares = []
    for row, step in zip(coefficients, steps, strict=True):
        recording = Recording(Masked(), config)
        out = model(torch.from_numpy(x), torch.tensor([int(timesteps[step])]), torch.tensor([0]), recording).numpy()
        shares.append(float(recording.decisions().tokens.mean()))
        eps, v = out[:, : config.in_channels], out[:, config.in_channels :] if config.learn_sigma else 0.0
        x = apply_step(row, x, eps, v, np.zeros_like(x)).astype(np.float32)
    return max(float(np.mean(shares)), 1 / config.tokens)
