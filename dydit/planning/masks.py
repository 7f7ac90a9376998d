"""Freezes the width routers: at inference they depend only on the timestep, so their decisions are a table.

Also chooses the order in which units are stored, the most often active ones first, so that most masks are prefixes.
"""

from __future__ import annotations

import numpy as np
import torch

from dydit.models.architecture import Slots, UnitAxis
from dydit.models.dynamic import DynamicModel
from dydit.models.routers import Masked


@torch.no_grad()
def freeze_masks(model: DynamicModel, timesteps: np.ndarray) -> np.ndarray:
    """The width masks of the given timesteps [S], read in f32: bool [S, U], by checkpoint unit.

    The model's own routers and gating decide, on the model's own timestep embedding. The model is on PyTorch's default
    device.
    """
    config = model.config
    masks = np.ones((len(timesteps), config.units.size), bool)
    if not config.dynamic:
        return masks
    gating = Masked()
    routers = model.width_routers()
    # One timestep at a time, as in the sampler, because the rounding of a matrix product may depend on the batch.
    for step, timestep in enumerate(timesteps):
        t_emb = model.embed_timestep(torch.tensor([timestep], dtype=torch.float32))
        for part, router in zip(config.units.parts, routers, strict=True):
            masks[step, part.units] = gating.gate(router(t_emb))[0].cpu().numpy() > 0
    return masks


def activity_order(masks: np.ndarray, axis: UnitAxis) -> Slots:
    """The unit of each slot: units that are on in more steps first. `masks`: [S, U]; ties keep the checkpoint's order.

    If the masks of a part are nested sets, every step's mask is then a prefix of the slots.
    """
    steps = masks.sum(axis=0, dtype=np.int64)
    order = [np.argsort(-steps[part.units], kind="stable") for part in axis.parts]
    return axis.nested([tuple(units.tolist()) for units in order])


def by_slot(masks: np.ndarray, axis: UnitAxis, order: Slots) -> np.ndarray:
    """Masks [S, U] by slot, from masks by checkpoint unit."""
    return np.ascontiguousarray(masks[:, [part.start + unit for part, units in axis.zip(order) for unit in units]])
