"""Orders heads and MLP channels by importance before the routers are added.

Unit 0 of a DyDiT is always on, so the most important head and channel group come first. Importance is the magnitude of
weights. The order of heads and MLP channels does not affect what the model computes, if the layers before and after
them have the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dydit.errors import ConfigError
from dydit.models.transformer.config import TransformerConfig


def head_importance(qkv: Tensor, proj: Tensor, num_heads: int) -> Tensor:
    """Magnitude of each head, [H]: Frobenius norm of its q, k, v rows times that of its proj columns.

    qkv [3D, D] with rows (3, H, head_dim); proj [D, D] with columns (H, head_dim).
    """
    rows: Tensor = qkv.view(3, num_heads, -1, qkv.shape[1]).float().square().sum((0, 2, 3)).sqrt()
    columns: Tensor = proj.view(proj.shape[0], num_heads, -1).float().square().sum((0, 2)).sqrt()
    return rows * columns


def channel_importance(fc1: Tensor, fc2: Tensor) -> Tensor:
    """Magnitude of each hidden channel, [4D]: norm of its fc1 row [4D, D] times norm of its fc2 column [D, 4D]."""
    rows, columns = fc1.float().square().sum(1).sqrt(), fc2.float().square().sum(0).sqrt()
    return rows * columns


def rank_and_permute(state: dict[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """A static model's state dict with heads and MLP channels of every block in descending importance.

    Channels are sorted one by one, so group 0 holds the most important ones. The model computes the same function.
    Raises `ConfigError` for a model with routers, because they were trained for its order.
    """
    if any(".attn_rate." in name or ".mlp_rate." in name for name in state):
        raise ConfigError("the model already has routers; only a static one can be reordered by importance")
    out = dict(state)
    for block in range(config.depth):
        prefix = f"{config.block_name(block)}."
        qkv, proj = state[prefix + "attn.qkv.weight"], state[prefix + "attn.proj.weight"]
        heads = _descending(head_importance(qkv, proj, config.num_heads))
        for part in ("weight", "bias") if config.QKV_BIAS else ("weight",):
            rows = state[f"{prefix}attn.qkv.{part}"]
            split = rows.view(3, config.num_heads, config.head_dim, *rows.shape[1:])
            out[f"{prefix}attn.qkv.{part}"] = split[:, heads].reshape(rows.shape).clone()
        columns = proj.view(proj.shape[0], config.num_heads, config.head_dim)
        out[prefix + "attn.proj.weight"] = columns[:, heads].reshape(proj.shape).clone()

        fc1, fc2 = state[prefix + "mlp.fc1.weight"], state[prefix + "mlp.fc2.weight"]
        channels = _descending(channel_importance(fc1, fc2))
        out[prefix + "mlp.fc1.weight"] = fc1[channels].clone()
        out[prefix + "mlp.fc1.bias"] = state[prefix + "mlp.fc1.bias"][channels].clone()
        out[prefix + "mlp.fc2.weight"] = fc2[:, channels].clone()
    return out


def _descending(values: Tensor) -> Tensor:
    return torch.argsort(values, descending=True, stable=True)
