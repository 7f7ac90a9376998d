"""What a step has to do at the least, and how long that takes at the two ceilings that were measured.

A step of B images has R = 2B rows with guidance. By block l: h heads and g channel groups of H are on, of hd and gd
channels; a share q of the N tokens enters the MLP; D is the hidden size, b the bytes of the type that matrix products
are in (2 for fp16 and bf16). These are what the step's own masks and routers ask for: what a merged plan or unused
token slots compute beyond that shows as a smaller share of the bound.

  multiply-adds  R * sum_l(h/H * (4*N*D^2 + 2*N^2*D) + g/H * q * 8*N*D^2), and of the embedding and the last layer
                 R * N * D * p^2 * (C + out). Not counted: routers, normalisation, and adaLN, which our bundles evaluate
                 once for many steps. One multiply-add is two operations: bound = 2 * multiply-adds / (operations/s).
  weights        once a step: b * sum_l(4 * h*hd * D + 2 * g*gd * D), and in fp32 embedding, positions, last layer,
                 token routers.
  inputs         in fp32: the modulation R * (6L+2) * D, and x, noise and x_prev.
  activations    of a program whose attention and element-wise chains are fused, but which keeps nothing in a cache from
                 one kernel to the next; each tensor is written once and read once. By block and row: residual stream in
                 fp32, read and written by attention (2*4*N*D) and by the MLP (2*4*q*N*D), and read by the token
                 router (4*N*D, dynamic models); what enters qkv (2b*N*D), qkv (2b*3*N*h*hd), what enters proj
                 (2b*N*h*hd); what enters fc1 (2b*q*N*D), the hidden channels (2b*q*N*g*gd).
  bound          (weights + inputs + activations) / (bytes/s of a device-to-device copy, read and written both counted).

The memory bound is an estimate, not a law: what stays in a cache need not move, so small batches may beat it. The bytes
are kept apart in the JSON for that.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dydit.models.config import ModelConfig
from dydit.models.macs import flops_ratio, static_macs

FP32 = 4


@dataclass(frozen=True)
class StepWork:
    """Mean over the measured steps: multiply-adds of all rows, and bytes."""

    macs: float
    weight_bytes: float
    input_bytes: float
    activation_bytes: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def macs_ms(self, tflops: float) -> float:
        """Milliseconds at `tflops` 10^12 operations a second."""
        return 2 * self.macs / (tflops * 1e12) * 1e3

    def memory_ms(self, gb_per_s: float) -> float:
        """Milliseconds at `gb_per_s` 10^9 bytes a second."""
        return (self.weight_bytes + self.input_bytes + self.activation_bytes) / (gb_per_s * 1e9) * 1e3


def step_work(config: ModelConfig, masks: np.ndarray, tokens: np.ndarray, batch: int, item: int) -> StepWork:
    """The work of a step with guidance.

    `masks`: bool [K, U] units that are on in K steps; `tokens`: [K, L] share that enters the MLPs; `item`: bytes of the
    type of matrix products.
    """
    n, d, rows = config.tokens, config.hidden_size, 2 * batch
    counts = config.units.counts(masks)
    heads, groups = counts[:, 0::2], counts[:, 1::2]  # a block of a DiT has these two parts
    patch = config.patch_size**2
    ratio, blocks = np.asarray(flops_ratio(config, counts, tokens)), static_macs(config)
    ends = n * d * patch * (config.in_channels + config.out_channels)
    attention, hidden = heads * config.head_dim, groups * config.group_dim  # channels that are on, [K, L]

    solid = patch * (config.in_channels + config.out_channels) * d + n * d
    router = d * config.token_router_hidden if config.dynamic else 0
    weights = item * (4 * attention * d + 2 * hidden * d).sum(axis=1) + FP32 * (solid + config.depth * router)
    latents = 3 * batch * config.in_channels * config.input_size**2
    inputs = FP32 * (rows * (6 * config.depth + 2) * d + latents)
    stream = FP32 * n * d * (2 + 2 * tokens + (1 if config.dynamic else 0))
    inside = 2 * item * n * (d + 4 * attention + tokens * (d + hidden))
    activations = rows * (stream + inside).sum(axis=1)
    return StepWork(
        macs=float(rows * (ratio.mean() * blocks + ends)),
        weight_bytes=float(weights.mean()),
        input_bytes=float(inputs),
        activation_bytes=float(activations.mean()),
    )


def dense_work(config: ModelConfig, batch: int, item: int) -> StepWork:
    """The same of the static model of these sizes."""
    everything = np.ones((1, config.units.size), bool)
    return step_work(config.without_routers(), everything, np.ones((1, config.depth)), batch, item)
