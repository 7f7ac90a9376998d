"""The sliced form of a DiT (`dydit.models.sliced`), on the stored layout of `dydit.models.dit.layout`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dydit.models.dit.config import DiTConfig
from dydit.models.transformer.modulation import add_ones
from dydit.models.transformer.modules import sinusoid
from dydit.models.transformer.sliced import ModulatedSliced


class SlicedDiT(ModulatedSliced):
    """One subnetwork of a DiT. Its condition is the modulation [R, 6L+2, D]."""


@torch.inference_mode()
def conditioning(config: DiTConfig, weights: Mapping[str, Tensor], timesteps: Tensor, labels: Tensor) -> Tensor:
    """Modulation of every (timestep, label) pair: int64 [T], int64 [R] -> [T, R, 6L+2, D].

    `dydit.models.transformer.modulation` describes the order of vectors. The 1 of each `1+scale` is added here.
    """
    waves = sinusoid(timesteps, weights["time.frequencies"]).to(weights["time.0.weight"].dtype)
    hidden = F.silu(F.linear(waves, weights["time.0.weight"], weights["time.0.bias"]))
    t_emb = F.linear(hidden, weights["time.2.weight"], weights["time.2.bias"])
    c = t_emb[:, None] + weights["label.table"][labels]
    out = F.linear(F.silu(c).to(weights["adaln.weight"].dtype), weights["adaln.weight"], weights["adaln.bias"])
    out = out.to(c.dtype).view(len(timesteps), len(labels), -1, config.hidden_size)
    add_ones(out)
    return out
