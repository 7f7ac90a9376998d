"""Freezing the width routers: at inference they depend on the timestep alone, so their decisions are a table.

Also the order in which units are stored: most often on first, so that the masks of a run are mostly prefixes.
"""

from __future__ import annotations

import numpy as np
import torch

from dydit.models.dit import DiT
from dydit.models.routers import Masked


@torch.no_grad()
def freeze_masks(model: DiT, timesteps: np.ndarray) -> np.ndarray:
    """The width masks of the given timesteps [S], bool [S, L, 2, H], axis 2 being (heads, groups), by checkpoint unit.

    The decisions are those of the model itself: the same routers on the same embedding, thresholded by the same gating.
    """
    config = model.config
    masks = np.ones((len(timesteps), config.depth, 2, config.num_heads), bool)
    if not config.dynamic:
        return masks
    gating = Masked()
    # One timestep at a time: a matrix product's rounding may depend on the batch, and the sampler evaluates one t a
    # step.
    for step, timestep in enumerate(timesteps):
        t_emb = model.t_embedder(torch.tensor([int(timestep)]))
        for index, block in enumerate(model.blocks):
            masks[step, index, 0] = gating.gate(block.attn_rate(t_emb))[0].numpy() > 0
            masks[step, index, 1] = gating.gate(block.mlp_rate(t_emb))[0].numpy() > 0
    return masks


def activity_order(masks: np.ndarray) -> np.ndarray:
    """Unit of each slot, int64 [L, 2, H], so that units on in more steps come first (ties keep the checkpoint's order).

    Where the masks of a block are nested, as sets, every step's mask is then a prefix of the slots.
    """
    return np.argsort(-masks.sum(axis=0, dtype=np.int64), axis=-1, kind="stable")


def by_slot(masks: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Masks [S, L, 2, H] by checkpoint unit, rearranged by slot."""
    return np.take_along_axis(masks, np.broadcast_to(order, masks.shape), axis=-1)
