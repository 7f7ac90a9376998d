"""The masked form of a model, in which gates multiply dense results: the PyTorch interface of every architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dydit.models.config import ModelConfig
from dydit.models.routers import Gating, Masked, Static, TokenRouter, WidthRouter


class DynamicModel(nn.Module, ABC):
    """A diffusion transformer with routers, under the names of its published state dict.

    `blocks`: a module for each block, whose output is the residual stream [B, ..., D] after the block. If the
    model is dynamic, every block has a token router. Callers ask `ordered_blocks`.
    """

    blocks: nn.ModuleList
    checkpointing = False
    """Whether training keeps no intermediate values of blocks, and computes them again in the backward pass."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config: Any = config

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, y: Any, gating: Gating | None = None) -> Tensor:
        """Latents [B, C, S, S], timesteps [B], labels int64 [B] -> the output [B, C or 2C, S, S].

        `y`: for a model that is conditioned by texts, `TextRows` of B texts.
        `gating`: by default `inference_gating()`.
        """

    @abstractmethod
    def embed_timestep(self, t: Tensor) -> Tensor:
        """The input of width routers: timesteps [B] -> [B, D]."""

    @abstractmethod
    def width_routers(self) -> Sequence[WidthRouter]:
        """The width routers of all parts, in the order of the axis of units (`UnitAxis.parts`)."""

    def token_routers(self) -> Sequence[TokenRouter]:
        """The token routers of all blocks."""
        return [module for module in self.modules() if isinstance(module, TokenRouter)]

    def run_block(self, block: nn.Module, x: Tensor, *others: Any) -> Tensor:
        """The stream after a block: `block(x, *others)`, with `checkpointing` if it is on."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, *others, use_reentrant=False, preserve_rng_state=False)
        out: Tensor = block(x, *others)
        return out

    def ordered_blocks(self) -> Sequence[nn.Module]:
        """The blocks in the order of execution, for models that do not have all of them in `blocks`."""
        return list(self.blocks)

    def inference_gating(self) -> Gating:
        """The gating at inference: the routers' decisions, or everything on if there are no routers."""
        return Masked() if self.config.dynamic else Static()

    def set_derived(self) -> None:
        """Set the computed buffers, which are in no state dict. Called after weights were loaded."""
