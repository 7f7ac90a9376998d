"""DiT (Peebles & Xie 2023) with DyDiT's routers: configuration, model, stored layout, sliced form and graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dydit.models.dit.config import DiTConfig
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
    from dydit.models.dit.model import DiT
    from dydit.models.dit.sliced import SlicedDiT
    from dydit.models.sliced import Linear
    from dydit.quantization.smoothing import Smoothing


class DiTArchitecture(Architecture):
    """The DiT architecture. Its methods lead to the modules of this package."""

    name, title, config = "dit", "DiT", DiTConfig
    anchors = ("x_embedder.proj.weight", "pos_embed.proj.weight")  # the patch embedder, as published and in diffusers
    top_level = ("x_embedder", "t_embedder", "y_embedder", "pos_embed", "blocks", "transformer_blocks", "final_layer")
    diffusers_classes = ("DiTTransformer2DModel", "Transformer2DModel")
    output_layer = "final_layer.linear.weight"

    def masked(self, config: DiTConfig) -> DiT:
        from dydit.models.dit.model import DiT

        return DiT(config)

    def sliced(
        self,
        config: DiTConfig,
        weights: Mapping[str, Tensor],
        slots: Slots,
        cfg_channels: int,
        capacities: Sequence[int] | None = None,
        linear: Linear | None = None,
    ) -> SlicedDiT:
        from dydit.models.dit.sliced import SlicedDiT

        return SlicedDiT(config, weights, slots, cfg_channels, capacities, linear)

    def conditioning(
        self, config: DiTConfig, weights: Mapping[str, Tensor], timesteps: Tensor, labels: Tensor
    ) -> Tensor:
        from dydit.models.dit.sliced import conditioning

        return conditioning(config, weights, timesteps, labels)

    def timestep_embedding(self, config: DiTConfig, weights: Mapping[str, np.ndarray], times: np.ndarray) -> np.ndarray:
        from dydit.models.dit.embedding import timestep_embedding

        return timestep_embedding(weights, times)

    def stored_tensors(
        self,
        state: Mapping[str, Tensor],
        config: DiTConfig,
        order: Slots | None = None,
        smoothing: Smoothing | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        from dydit.models.dit.layout import stored_tensors
        from dydit.models.transformer.smoothed import smoothed_tensors

        return smoothed_tensors(stored_tensors, state, config, smoothing, order)

    def condition_factors(self, config: DiTConfig, smoothing: Smoothing | None) -> np.ndarray | None:
        from dydit.models.transformer.modulation import modulation_factors

        return modulation_factors(config, smoothing)

    def write_step(self, writer: GraphWriter) -> tuple[ir.Value, list[ir.Value]]:
        from dydit.models.dit.graph import write_step

        return write_step(writer)

    def conditioning_graph(
        self, config: DiTConfig, weights: Windows, precision: Precision, smoothing: Smoothing | None = None
    ) -> ir.Model:
        from dydit.models.dit.graph import conditioning_graph

        return conditioning_graph(config, weights, precision, smoothing)

    def infer_config(self, state: Mapping[str, Tensor], stated: Stated, given: Given) -> Inferred:
        from dydit.models.dit.states import infer_config

        return infer_config(state, stated, given)

    def complete(self, state: dict[str, Tensor], config: DiTConfig, size: int) -> None:
        from dydit.models.dit.states import complete

        complete(state, config, size)

    def state_shapes(self, config: DiTConfig) -> Shapes:
        from dydit.models.dit.states import state_shapes

        return state_shapes(config)

    def is_block_matrix(self, name: str) -> bool:
        from dydit.models.dit.states import is_block_matrix

        return is_block_matrix(name)

    def is_width_router(self, name: str) -> bool:
        from dydit.models.dit.states import is_width_router

        return is_width_router(name)

    def is_router(self, name: str) -> bool:
        from dydit.models.dit.states import is_router

        return is_router(name)

    def diffusers_config(self, values: dict[str, Any]) -> DiTConfig:
        from dydit.models.dit.diffusers import read_config

        return read_config(values)

    def from_diffusers(self, state: Mapping[str, Tensor], config: DiTConfig, size: int) -> dict[str, Tensor]:
        from dydit.models.dit.diffusers import from_diffusers

        return from_diffusers(state, config, size)

    def initialize(self, model: DiT, generator: torch.Generator) -> None:
        from dydit.models.dit.model import initialize

        initialize(model, generator)

    def initialize_routers(self, model: DiT, generator: torch.Generator, token_bias: float, width_bias: float) -> None:
        from dydit.models.transformer.modules import initialize_routers

        initialize_routers(model.blocks, generator, token_bias, width_bias)

    def step_products(self, config: DiTConfig) -> Sequence[Product]:
        from dydit.models.transformer.units import step_products

        return step_products(config)

    def preset(self, name: str, **changes: Any) -> DiTConfig:
        from dydit.models.dit.config import preset

        return preset(name, **changes)

    def randomize_routers(self, model: DiT, flops_ratio: float, generator: torch.Generator) -> None:
        from dydit.models.transformer.synthetic import set_routers

        set_routers(model, flops_ratio, generator)

    def with_classes(
        self, state: Mapping[str, Tensor], config: DiTConfig, kept: Sequence[int | None], generator: torch.Generator
    ) -> dict[str, Tensor]:
        from dydit.models.dit.states import with_classes

        return with_classes(state, config, kept, generator)

    def ordered_by_importance(self, state: dict[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
        from dydit.models.transformer.importance import rank_and_permute

        return rank_and_permute(state, config)

    def synthetic(self, config: DiTConfig, seed: int, flops_ratio: float) -> DiT:
        from dydit.models.dit.synthetic import synthetic_model

        return synthetic_model(config, seed, flops_ratio)

    def route_share(self, state: dict[str, Tensor], config: DiTConfig, share: float) -> None:
        from dydit.models.dit.synthetic import route_share

        route_share(state, config, share)


ARCHITECTURE = DiTArchitecture()
