"""U-ViT (Bao et al. 2023) with DyDiT's routers: configuration, model, stored layout, sliced form and graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dydit.models.registry import Architecture
from dydit.models.uvit.config import UViTConfig

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    import torch
    from torch import Tensor

    from dydit.bundle.stored_weights import Precision
    from dydit.checkpoints.conventions import Stated
    from dydit.checkpoints.fit import Given, Inferred, Shapes
    from dydit.graph.sources import Windows
    from dydit.graph.writer import GraphWriter
    from dydit.models.architecture import Product, Slots
    from dydit.models.sliced import Linear
    from dydit.models.uvit.model import UViT
    from dydit.models.uvit.sliced import SlicedUViT
    from dydit.quantization.smoothing import Smoothing


class UViTArchitecture(Architecture):
    """The U-ViT architecture. Its methods lead to the modules of this package."""

    name, title, config = "uvit", "U-ViT", UViTConfig
    anchors = ("mid_block.attn.qkv.weight",)
    top_level = (
        "patch_embed",
        "time_embed",
        "label_emb",
        "context_embed",
        "in_blocks",
        "mid_block",
        "out_blocks",
        "decoder_pred",
    )

    def masked(self, config: UViTConfig) -> UViT:
        from dydit.models.uvit.model import UViT

        return UViT(config)

    def sliced(
        self,
        config: UViTConfig,
        weights: Mapping[str, Tensor],
        slots: Slots,
        cfg_channels: int,
        capacities: Sequence[int] | None = None,
        linear: Linear | None = None,
    ) -> SlicedUViT:
        from dydit.models.uvit.sliced import SlicedUViT

        return SlicedUViT(config, weights, slots, cfg_channels, capacities, linear)

    def conditioning(
        self, config: UViTConfig, weights: Mapping[str, Tensor], timesteps: Tensor, labels: Tensor
    ) -> Tensor:
        from dydit.models.uvit.sliced import conditioning

        return conditioning(config, weights, timesteps, labels)

    def timestep_embedding(
        self, config: UViTConfig, weights: Mapping[str, np.ndarray], times: np.ndarray
    ) -> np.ndarray:
        from dydit.models.uvit.embedding import timestep_embedding

        return timestep_embedding(config, weights, times)

    def stored_tensors(
        self,
        state: Mapping[str, Tensor],
        config: UViTConfig,
        order: Slots | None = None,
        smoothing: Smoothing | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        from dydit.models.transformer.smoothed import smoothed_tensors
        from dydit.models.uvit.layout import stored_tensors

        return smoothed_tensors(stored_tensors, state, config, smoothing, order)

    def write_step(self, writer: GraphWriter) -> tuple[ir.Value, list[ir.Value]]:
        from dydit.models.uvit.graph import write_step

        return write_step(writer)

    def conditioning_graph(
        self, config: UViTConfig, weights: Windows, precision: Precision, smoothing: Smoothing | None = None
    ) -> ir.Model:
        from dydit.models.uvit.graph import conditioning_graph

        return conditioning_graph(config, weights)

    def infer_config(self, state: Mapping[str, Tensor], stated: Stated, given: Given) -> Inferred:
        from dydit.models.uvit.states import infer_config

        return infer_config(state, stated, given)

    def complete(self, state: dict[str, Tensor], config: UViTConfig, size: int) -> None:
        from dydit.models.uvit.states import complete

        complete(state, config, size)

    def state_shapes(self, config: UViTConfig) -> Shapes:
        from dydit.models.uvit.states import state_shapes

        return state_shapes(config)

    def is_block_matrix(self, name: str) -> bool:
        from dydit.models.uvit.states import is_block_matrix

        return is_block_matrix(name)

    def is_width_router(self, name: str) -> bool:
        from dydit.models.uvit.states import is_width_router

        return is_width_router(name)

    def is_router(self, name: str) -> bool:
        from dydit.models.uvit.states import is_router

        return is_router(name)

    def initialize(self, model: UViT, generator: torch.Generator) -> None:
        from dydit.models.uvit.model import initialize

        initialize(model, generator)

    def initialize_routers(self, model: UViT, generator: torch.Generator, token_bias: float, width_bias: float) -> None:
        from dydit.models.transformer.modules import initialize_routers

        initialize_routers(model.ordered_blocks(), generator, token_bias, width_bias)

    def step_products(self, config: UViTConfig) -> Sequence[Product]:
        from dydit.models.uvit.units import step_products

        return step_products(config)

    def preset(self, name: str, **changes: Any) -> UViTConfig:
        from dydit.models.uvit.config import preset

        return preset(name, **changes)

    def randomize_routers(self, model: UViT, flops_ratio: float, generator: torch.Generator) -> None:
        from dydit.models.transformer.synthetic import set_routers

        set_routers(model, flops_ratio, generator)

    def with_classes(
        self, state: Mapping[str, Tensor], config: UViTConfig, kept: Sequence[int | None], generator: torch.Generator
    ) -> dict[str, Tensor]:
        from dydit.models.uvit.states import with_classes

        return with_classes(state, config, kept, generator)

    def ordered_by_importance(self, state: dict[str, Tensor], config: UViTConfig) -> dict[str, Tensor]:
        from dydit.models.transformer.importance import rank_and_permute

        return rank_and_permute(state, config)

    def synthetic(self, config: UViTConfig, seed: int, flops_ratio: float) -> UViT:
        from dydit.models.uvit.synthetic import synthetic_model

        return synthetic_model(config, seed, flops_ratio)

    def route_share(self, state: dict[str, Tensor], config: UViTConfig, share: float) -> None:
        from dydit.models.uvit.synthetic import route_share

        route_share(state, config, share)


ARCHITECTURE = UViTArchitecture()
