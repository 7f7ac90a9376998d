"""PixArt-alpha (Chen et al. 2023) with DyDiT's routers: configuration, model, stored layout, sliced form and graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dydit.models.pixart.config import PixArtConfig
from dydit.models.registry import Architecture

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
    from dydit.models.pixart.model import PixArt
    from dydit.models.pixart.sliced import SlicedPixArt
    from dydit.models.sliced import Linear
    from dydit.quantization.smoothing import Smoothing


class PixArtArchitecture(Architecture):
    """The PixArt-alpha architecture. Its methods lead to the modules of this package."""

    name, title, config = "pixart", "PixArt-alpha", PixArtConfig
    anchors = ("t_block.1.weight", "y_embedder.y_proj.fc1.weight", "final_layer.scale_shift_table")
    top_level = (
        "x_embedder",
        "t_embedder",
        "y_embedder",
        "csize_embedder",
        "ar_embedder",
        "t_block",
        "pos_embed",
        "blocks",
        "final_layer",
    )
    diffusers_classes = ("PixArtTransformer2DModel", "Transformer2DModel")
    output_layer = "final_layer.linear.weight"

    def masked(self, config: PixArtConfig) -> PixArt:
        from dydit.models.pixart.model import PixArt

        return PixArt(config)

    def sliced(
        self,
        config: PixArtConfig,
        weights: Mapping[str, Tensor],
        slots: Slots,
        cfg_channels: int,
        capacities: Sequence[int] | None = None,
        linear: Linear | None = None,
    ) -> SlicedPixArt:
        from dydit.models.pixart.sliced import SlicedPixArt

        return SlicedPixArt(config, weights, slots, cfg_channels, capacities, linear)

    def conditioning(
        self, config: PixArtConfig, weights: Mapping[str, Tensor], timesteps: Tensor, labels: Tensor
    ) -> Tensor:
        from dydit.models.pixart.sliced import conditioning

        return conditioning(config, weights, timesteps, labels)

    def text_values(
        self, config: PixArtConfig, weights: Mapping[str, Tensor], embeddings: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        from dydit.models.pixart.sliced import text_values

        return text_values(config, weights, embeddings, mask)

    def timestep_embedding(
        self, config: PixArtConfig, weights: Mapping[str, np.ndarray], times: np.ndarray
    ) -> np.ndarray:
        from dydit.models.pixart.embedding import timestep_embedding

        return timestep_embedding(config, weights, times)

    def stored_tensors(
        self,
        state: Mapping[str, Tensor],
        config: PixArtConfig,
        order: Slots | None = None,
        smoothing: Smoothing | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        from dydit.models.pixart.layout import stored_tensors
        from dydit.models.transformer.smoothed import smoothed_tensors

        return smoothed_tensors(stored_tensors, state, config, smoothing, order)

    def condition_factors(self, config: PixArtConfig, smoothing: Smoothing | None) -> np.ndarray | None:
        from dydit.models.transformer.modulation import modulation_factors

        return modulation_factors(config, smoothing)

    def write_step(self, writer: GraphWriter) -> tuple[ir.Value, list[ir.Value]]:
        from dydit.models.pixart.graph import write_step

        return write_step(writer)

    def conditioning_graph(
        self, config: PixArtConfig, weights: Windows, precision: Precision, smoothing: Smoothing | None = None
    ) -> ir.Model:
        from dydit.models.pixart.graph import conditioning_graph

        return conditioning_graph(config, weights, precision, smoothing)

    def text_graph(self, config: PixArtConfig, weights: Windows, precision: Precision) -> ir.Model:
        from dydit.models.pixart.graph import text_graph

        return text_graph(config, weights, precision)

    def infer_config(self, state: Mapping[str, Tensor], stated: Stated, given: Given) -> Inferred:
        from dydit.models.pixart.states import infer_config

        return infer_config(state, stated, given)

    def complete(self, state: dict[str, Tensor], config: PixArtConfig, size: int) -> None:
        from dydit.models.pixart.states import complete

        complete(state, config, size)

    def state_shapes(self, config: PixArtConfig) -> Shapes:
        from dydit.models.pixart.states import state_shapes

        return state_shapes(config)

    def is_block_matrix(self, name: str) -> bool:
        from dydit.models.pixart.states import is_block_matrix

        return is_block_matrix(name)

    def is_width_router(self, name: str) -> bool:
        from dydit.models.pixart.states import is_width_router

        return is_width_router(name)

    def is_router(self, name: str) -> bool:
        from dydit.models.pixart.states import is_router

        return is_router(name)

    def recognises_folder(self, values: Mapping[str, Any]) -> bool:
        from dydit.models.pixart.diffusers import NORM_TYPE, SHARED_CLASS

        shared = values.get("_class_name") == SHARED_CLASS
        return super().recognises_folder(values) and (not shared or values.get("norm_type") == NORM_TYPE)

    def diffusers_config(self, values: dict[str, Any]) -> PixArtConfig:
        from dydit.models.pixart.diffusers import read_config

        return read_config(values)

    def from_diffusers(self, state: Mapping[str, Tensor], config: PixArtConfig, size: int) -> dict[str, Tensor]:
        from dydit.models.pixart.diffusers import from_diffusers

        return from_diffusers(state, config, size)

    def initialize(self, model: PixArt, generator: torch.Generator) -> None:
        from dydit.models.pixart.model import initialize

        initialize(model, generator)

    def initialize_routers(
        self, model: PixArt, generator: torch.Generator, token_bias: float, width_bias: float
    ) -> None:
        from dydit.models.transformer.modules import initialize_routers

        initialize_routers(model.blocks, generator, token_bias, width_bias)

    def step_products(self, config: PixArtConfig) -> Sequence[Product]:
        from dydit.models.pixart.units import step_products

        return step_products(config)

    def preset(self, name: str, **changes: Any) -> PixArtConfig:
        from dydit.models.pixart.config import preset

        return preset(name, **changes)

    def randomize_routers(self, model: PixArt, flops_ratio: float, generator: torch.Generator) -> None:
        from dydit.models.pixart.synthetic import random_texts
        from dydit.models.transformer.synthetic import set_routers

        set_routers(model, flops_ratio, generator, random_texts(model.config, generator))

    def ordered_by_importance(self, state: dict[str, Tensor], config: PixArtConfig) -> dict[str, Tensor]:
        from dydit.models.transformer.importance import rank_and_permute

        return rank_and_permute(state, config)

    def synthetic(self, config: PixArtConfig, seed: int, flops_ratio: float) -> PixArt:
        from dydit.models.pixart.synthetic import synthetic_model

        return synthetic_model(config, seed, flops_ratio)

    def route_share(self, state: dict[str, Tensor], config: PixArtConfig, share: float) -> None:
        from dydit.models.pixart.synthetic import route_share

        route_share(state, config, share)


ARCHITECTURE = PixArtArchitecture()
