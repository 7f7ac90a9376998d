"""The architectures that dydit knows, by name, and the interface that each one implements.

A new architecture is a folder beside `dit/` whose `__init__.py` has an instance called `ARCHITECTURE`, a line in
`_FOLDERS`, its layer in `pyproject.toml`, and its tests. All other code asks the `Architecture` of a model, and reads
no meaning out of the names of its tensors. PyTorch and ONNX are imported only by the methods that need them, because
running a bundle needs neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from dydit.errors import ConfigError, DyditError, UnsupportedError

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
    from dydit.models.config import ModelConfig
    from dydit.models.dynamic import DynamicModel
    from dydit.models.sliced import Linear, SlicedModel
    from dydit.quantization.smoothing import Smoothing

DEFAULT = "dit"
"""The architecture of a file that names none, because it is older than the choice."""


class Architecture(ABC):
    """One architecture: its configuration, and the forms of its models.

    The *masked* form is trained, and is the reference for the others: gates multiply dense results. The *sliced* form
    is one subnetwork in PyTorch with narrow matrices, on stored weights. The ONNX form is the same as a graph.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    config: type[ModelConfig]
    """`name`: in files, and in the field `architecture` of `config`. `title`: in reports."""

    # In PyTorch.

    @abstractmethod
    def masked(self, config: Any) -> DynamicModel:
        """A masked model with uninitialized weights."""

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
        """The subnetwork with the given slots, on stored weights; see `SlicedModel`."""

    @abstractmethod
    def conditioning(self, config: Any, weights: Mapping[str, Tensor], timesteps: Tensor, labels: Tensor) -> Tensor:
        """The conditions of all (timestep, label) pairs: int64 [T], int64 [R] -> [T, R, *condition_shape]."""

    def text_values(
        self, config: Any, weights: Mapping[str, Tensor], embeddings: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What steps take of texts (`io_spec.text_outputs`): embeddings [T, L, channels] and mask bool [T, L].

        Only for models whose configuration has a `text`.
        """
        raise self._unable("it is not conditioned by texts")

    # In NumPy.

    @abstractmethod
    def timestep_embedding(self, config: Any, weights: Mapping[str, np.ndarray], times: np.ndarray) -> np.ndarray:
        """The input of the width routers, from stored weights: the model's own times [T] -> float64 [T, D].

        With the stored `WIDTH_ROUTER`, it gives the masks of any timesteps without PyTorch.
        """

    # From the weights of a checkpoint to the weights of a bundle.

    @abstractmethod
    def stored_tensors(
        self,
        state: Mapping[str, Tensor],
        config: Any,
        order: Slots | None = None,
        smoothing: Smoothing | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, f32 tensor) of everything that a bundle stores, one after another, in the order of the file.

        `order`: the model's unit in each slot, by block and unit group; by default, unit i is in slot i. `smoothing`:
        applied to the weights; layers with `scaled_inputs` also get a tensor of factors.
        """

    def step_products(self, config: Any) -> Sequence[Product]:
        """The products of a step that no unit owns, for estimates of its bytes and operations. By default none."""
        return ()

    def condition_factors(self, config: Any, smoothing: Smoothing | None) -> np.ndarray | None:
        """The factors of smoothing on a row of `conditioning`, f32 of `condition_shape`; None if there are none."""
        return None

    # As ONNX.

    @abstractmethod
    def write_step(self, writer: GraphWriter) -> tuple[ir.Value, list[ir.Value]]:
        """Write the model between `x` and its output into a graph; the writer adds guidance and the sampler's step.

        Returns the output, and the number of each block's tokens without a slot, int64 [1]; an empty list unless
        routing is by capacity. What it has to handle: all kinds of `writer.spec.routing` (None: a static model); parts
        without units, of which only the last bias remains; gates; with dynamic width, an unknown number of units
        (`writer.count` is None). It names each block's token mask and residual stream as `dydit.bundle.io_spec` says.
        """

    @abstractmethod
    def conditioning_graph(
        self, config: Any, weights: Windows, precision: Precision, smoothing: Smoothing | None = None
    ) -> ir.Model:
        """(timesteps [T], labels [R]) -> condition f32 [T, R, *condition_shape]."""

    def text_graph(self, config: Any, weights: Windows, precision: Precision) -> ir.Model:
        """The graph with `io_spec.text_inputs` and `text_outputs`. Only for models whose configuration has a `text`."""
        raise self._unable("it is not conditioned by texts")

    # Reading checkpoints. Without these, only checkpoints in dydit's own format can be read.

    anchors: ClassVar[tuple[str, ...]] = ()
    top_level: ClassVar[tuple[str, ...]] = ()
    diffusers_classes: ClassVar[tuple[str, ...]] = ()
    output_layer: ClassVar[str | None] = None
    """`anchors`: published names; every state dict of this architecture has at least one of them. `top_level`: the
    first parts of published names. `diffusers_classes`: the classes in `config.json`. `output_layer`: the weight that
    is all zeros before training."""

    def recognises(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a state dict is of this architecture, by its published names."""
        return any(anchor in state for anchor in self.anchors)

    def infer_config(self, state: Mapping[str, Tensor], stated: Stated, given: Given) -> Inferred:
        """The configuration that the shapes of a recognised state dict describe.

        `stated`: by the training run. `given`: by the user. Raises `CheckpointError` if these contradict each other, or
        if something remains unknown.
        """
        raise self._unable("only checkpoints in dydit's own format can be read")

    def complete(self, state: dict[str, Tensor], config: Any, size: int) -> None:
        """Check that a recognised `state` is a complete model, and add computed tensors. `size`: bytes of the file.

        Raises `CheckpointError` for tensors that are missing, unknown, of the wrong shape or not finite.
        """
        raise self._unable("only checkpoints in dydit's own format can be read")

    def state_shapes(self, config: Any) -> Shapes:
        """Published name -> shape of every tensor of a model."""
        from dydit.models.meta import without_memory

        with without_memory():
            return {name: tuple(tensor.shape) for name, tensor in self.masked(config).state_dict().items()}

    def is_block_matrix(self, name: str) -> bool:
        """Whether a published name is of a block's matrix that is not zero before training."""
        return name.startswith("blocks.") and name.endswith(".weight")

    def is_width_router(self, name: str) -> bool:
        """Whether a tensor, by its published name, is needed to compute the masks of timesteps."""
        return True

    def is_router(self, name: str) -> bool:
        """Whether a tensor, by its published name, belongs to a router."""
        return False

    def recognises_folder(self, values: Mapping[str, Any]) -> bool:
        """Whether the `config.json` of a diffusers folder describes a model of this architecture."""
        return values.get("_class_name") in self.diffusers_classes

    def diffusers_config(self, values: dict[str, Any]) -> ModelConfig:
        """The configuration that a diffusers `config.json` describes."""
        raise self._unable("folders of diffusers cannot be read")

    def from_diffusers(self, state: Mapping[str, Tensor], config: Any, size: int) -> dict[str, Tensor]:
        """The tensors of a diffusers model under the published names."""
        raise self._unable("folders of diffusers cannot be read")

    # New models.

    def preset(self, name: str, **changes: Any) -> ModelConfig:
        """A published model by name. Raises `ConfigError`, which lists the names, for any other name."""
        raise self._unable("it has no presets")

    def initialize(self, model: Any, generator: torch.Generator) -> None:
        """Initialize weights for training, with routers that start with everything on."""
        raise self._unable("it cannot be trained")

    def initialize_routers(self, model: Any, generator: torch.Generator, token_bias: float, width_bias: float) -> None:
        """Initialize router weights, with biases that open every gate."""
        raise self._unable("it cannot be trained")

    def randomize_routers(self, model: Any, flops_ratio: float, generator: torch.Generator) -> None:
        """Change initialized routers so that they decide at random, at a FLOPs ratio near `flops_ratio`."""
        raise self._unable("it cannot be trained")

    def with_classes(
        self, state: Mapping[str, Tensor], config: Any, kept: Sequence[int | None], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """A state dict of `config` with another class table: for each new class the class whose row it keeps, or None.

        The other rows are drawn as for a new model. The row for "no class" is kept.
        """
        raise self._unable("its classes cannot be changed")

    def ordered_by_importance(self, state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        """A static model's state dict with its units in descending importance. The model computes the same function."""
        raise self._unable("its units cannot be ordered by importance")

    def synthetic(self, config: Any, seed: int, flops_ratio: float) -> DynamicModel:
        """Random weights that behave like trained ones (`dydit.models.synthetic`)."""
        raise self._unable("there are no synthetic models of this architecture")

    def route_share(self, state: dict[str, Tensor], config: Any, share: float) -> None:
        """Change a synthetic model's weights so that its token routers select exactly `share` of all tokens."""
        raise self._unable("there are no synthetic models of this architecture")

    def _unable(self, reason: str) -> UnsupportedError:
        return UnsupportedError(f"{self.title}: {reason}")


_FOLDERS = {name: f"dydit.models.{name}" for name in ("dit", "pixart", "uvit")}
_known: dict[str, Architecture] = {}


def register(new: Architecture) -> None:
    """Register an architecture in this process. For architectures that are not part of dydit."""
    _known[new.name] = new


def architecture(name: str) -> Architecture:
    """The architecture with a name. Raises `ConfigError`, which lists the known names, for any other name."""
    if name not in _known:
        if name not in _FOLDERS:
            known = ", ".join(sorted({*_FOLDERS, *_known}))
            raise ConfigError(f"unknown architecture {name!r}; expected one of: {known}. A newer dydit may have it")
        register(import_module(_FOLDERS[name]).ARCHITECTURE)
    return _known[name]


def architectures() -> list[Architecture]:
    """All known architectures. The default one is the last, because others also have names of its tensors."""
    return [architecture(name) for name in sorted({*_FOLDERS, *_known}, key=lambda name: (name == DEFAULT, name))]


def published(name: str) -> ModelConfig:
    """The published model of any architecture with a name: `DiT-XL/2`, `PixArt-XL/2`, `imagenet256-H/2`, ...

    Raises `ConfigError`, which lists the names, for any other name.
    """
    problems = []
    for each in reversed(architectures()):
        try:
            return each.preset(name)
        except DyditError as error:
            problems.append(f"{each.title}: {error}")
    raise ConfigError("; ".join(problems))


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture of a model."""
    return architecture(config.architecture)
