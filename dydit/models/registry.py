"""The architectures that dydit knows, by name, and what each one has to say of itself.

A new architecture is a folder beside `dit/`, a line in `_FOLDERS`, and its tests. Every other room asks the
`Architecture` of a model and reads no meaning out of the names of tensors. What runs PyTorch or writes ONNX is imported
when it is asked for, so that a bundle runs with neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from dydit.errors import ConfigError

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
    from dydit.models.architecture import Slots
    from dydit.models.config import ModelConfig
    from dydit.models.dynamic import DynamicModel
    from dydit.models.sliced import Linear, SlicedModel
    from dydit.quantization.smoothing import Smoothing

DEFAULT = "dit"
"""What a file means that names no architecture: those of before there was a choice."""


class Architecture(ABC):
    """One architecture: its configuration, and the forms that a model of it takes.

    The *masked* form is trained, and is what others are held to: dense, its gates multiply. The *sliced* form is one
    subnetwork in PyTorch, really narrow, on stored weights. The ONNX form is the same as a graph.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    config: type[ModelConfig]

    # In PyTorch.

    @abstractmethod
    def masked(self, config: Any) -> DynamicModel:
        """A masked model, its weights not yet set."""

    @abstractmethod
    def sliced(
        self,
        config: Any,
        weights: Mapping[str, Tensor],
        slots: Slots,
        cfg_channels: int,
        capacities: Sequence[int] | None = None,
        linear: Linear | None = None,
    ) -> SlicedModel:
        """The subnetwork of some slots over stored weights; see `SlicedModel`."""

    @abstractmethod
    def conditioning(self, config: Any, weights: Mapping[str, Tensor], timesteps: Tensor, labels: Tensor) -> Tensor:
        """What steps take of every (timestep, label) pair: int64 [T], int64 [R] -> [T, R, *condition_shape]."""

    # From weights as they are trained to weights as they are stored.

    @abstractmethod
    def stored_tensors(
        self,
        state: Mapping[str, Tensor],
        config: Any,
        order: Slots | None = None,
        smoothing: Smoothing | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, f32 tensor) of everything that a bundle stores, one after another, in the order of the file.

        `order`: the model's unit in each slot, by block and unit group; by default the same number. With `smoothing`,
        weights have taken over their inputs' range, and factors of inputs are stored beside them where a layer has
        `scaled_inputs`.
        """

    def condition_factors(self, config: Any, smoothing: Smoothing | None) -> np.ndarray | None:
        """What smoothing multiplies a row of `conditioning` by, f32 of `condition_shape`; None: nothing changes."""
        return None

    # As ONNX.

    @abstractmethod
    def write_step(self, writer: GraphWriter) -> tuple[ir.Value, list[ir.Value]]:
        """Write a model from latents to its output; return that, and each block's count of tokens without a slot."""

    @abstractmethod
    def conditioning_graph(
        self, config: Any, weights: Windows, precision: Precision, smoothing: Smoothing | None = None
    ) -> ir.Model:
        """(timesteps [T], labels [R]) -> condition f32 [T, R, *condition_shape]."""

    # Reading checkpoints. What is not said here makes checkpoints of dydit's own format alone readable.

    anchors: ClassVar[tuple[str, ...]] = ()
    top_level: ClassVar[tuple[str, ...]] = ()
    diffusers_classes: ClassVar[tuple[str, ...]] = ()
    output_layer: ClassVar[str | None] = None
    """`anchors`: published names of which every model has one, by which its state dict is found in a file, and
    recognised. `top_level`: how published names start. `diffusers_classes`: what `config.json` calls it.
    `output_layer`: the weight whose zeros make an output of zeros."""

    def recognises(self, state: Mapping[str, Tensor]) -> bool:
        """Whether published names are those of this architecture."""
        return any(anchor in state for anchor in self.anchors)

    def infer_config(self, state: Mapping[str, Tensor], stated: Stated, given: Given) -> Inferred:
        """The configuration that the shapes of a recognised state dict describe.

        `stated`: by the training run; `given`: by the user. Raises `CheckpointError` where these contradict each other,
        or leave something open.
        """
        raise self._unable("files of other programs are not recognised")

    def complete(self, state: dict[str, Tensor], config: Any, size: int) -> None:
        """Check that a recognised `state` is all of a model, and add what can be computed. `size`: bytes of the file.

        Raises `CheckpointError` for what is missing, unknown, misshapen or not finite.
        """
        raise self._unable("files of other programs are not recognised")

    def state_shapes(self, config: Any) -> Shapes:
        """Published name -> shape of every tensor of a model."""
        import torch

        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in self.masked(config).state_dict().items()}

    def is_block_matrix(self, name: str) -> bool:
        """Whether a published name is of a block's matrix that training starts from something else than zero."""
        return name.startswith("blocks.") and name.endswith(".weight")

    def is_width_router(self, name: str) -> bool:
        """Whether the weights of a published name are needed to decide units at any timestep."""
        return True

    def is_router(self, name: str) -> bool:
        """Whether a published name is of a router."""
        return False

    def diffusers_config(self, values: dict[str, Any]) -> ModelConfig:
        """What a diffusers `config.json` describes."""
        raise self._unable("folders of diffusers are not read")

    def from_diffusers(self, state: Mapping[str, Tensor], config: Any, size: int) -> dict[str, Tensor]:
        """The tensors of a diffusers model under the published names."""
        raise self._unable("folders of diffusers are not read")

    # Models that are not loaded.

    def initialize(self, model: Any, generator: torch.Generator) -> None:
        """Fresh weights to train from, and routers that start with everything on."""
        raise self._unable("it cannot be trained")

    def initialize_routers(self, model: Any, generator: torch.Generator, token_bias: float, width_bias: float) -> None:
        """Fresh router weights, and biases that open every gate."""
        raise self._unable("it cannot be trained")

    def ordered_by_importance(self, state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        """A static model's state dict with its units in descending importance; the same function."""
        raise self._unable("its units have no order of importance")

    def synthetic(self, config: Any, seed: int, flops_ratio: float) -> DynamicModel:
        """Random weights that behave like trained ones (`dydit.models.synthetic`)."""
        raise self._unable("there are no synthetic models of it")

    def route_share(self, state: dict[str, Tensor], config: Any, share: float) -> None:
        """Change a synthetic model's weights so that its token routers select exactly `share` of all tokens."""
        raise self._unable("there are no synthetic models of it")

    def _unable(self, reason: str) -> ConfigError:
        return ConfigError(f"{self.title}: {reason}")


_FOLDERS = {"dit": "dydit.models.dit"}
_known: dict[str, Architecture] = {}


def register(new: Architecture) -> None:
    """Make an architecture known by its name, in this process; for one that is not part of dydit."""
    _known[new.name] = new


def architecture(name: str) -> Architecture:
    """The architecture of a name. Raises `ConfigError`, naming those that there are, for another name."""
    if name not in _known:
        if name not in _FOLDERS:
            known = ", ".join(sorted({*_FOLDERS, *_known}))
            raise ConfigError(f"unknown architecture {name!r}; known: {known}. A newer dydit may know it")
        register(import_module(_FOLDERS[name]).ARCHITECTURE)
    return _known[name]


def architectures() -> list[Architecture]:
    """All of them."""
    return [architecture(name) for name in sorted({*_FOLDERS, *_known})]


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture of a model."""
    return architecture(config.architecture)
