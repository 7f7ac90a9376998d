"""The one description of every graph's inputs and outputs.

The graph writer declares inputs and outputs from it, backends check feeds against it, and shape profiles for compilers
are derived from it. A dimension is a number or a symbol: `batch` images; `rows` of the condition (`batch` rows, or
twice that with classifier-free guidance: first the conditional rows, then the unconditional ones); `steps`; `labels`;
`texts` and their `text_tokens`; and the widths of `unit_input`, in a graph that takes block weights as inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dydit.bundle.stored_weights import WeightEntry
from dydit.diffusion.coefficients import COEFFICIENTS
from dydit.errors import BackendError
from dydit.models.architecture import Part
from dydit.models.config import ModelConfig

Dim = int | str
BATCH, ROWS, STEPS, LABELS, TEXTS, TEXT_TOKENS = "batch", "rows", "steps", "labels", "texts", "text_tokens"
CONDITION = "condition"
"""The input of a step that carries its timestep and label, one row for each row of the model. The conditioning graph
computes it."""
TEXT_VALUES, TEXT_BIAS, TEXT_ROWS = "text_values", "text_bias", "text_rows"
"""The inputs of a step that carry texts, where a model has them: what the text graph computes of some texts, and which
of these each row has."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, NumPy dtype name and shape (numbers and symbols) of one input or output."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    def concrete(self, symbols: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with its symbols replaced."""
        return tuple(symbols[dim] if isinstance(dim, str) else dim for dim in self.shape)


def subnet_inputs(model: ModelConfig, gated: bool) -> tuple[TensorSpec, ...]:
    """Inputs of a subnetwork's graph, without weights. `gates`: 0 or 1 for every unit, by slot.

    `history`: what the step before gave as `next_history`; zeros in the first step.
    """
    image: tuple[Dim, ...] = (BATCH, model.in_channels, model.input_size, model.input_size)
    specs = (
        TensorSpec("x", "float32", image),
        TensorSpec("history", "float32", image),
        TensorSpec("noise", "float32", image),
        TensorSpec("coefficients", "float32", (len(COEFFICIENTS),)),
        TensorSpec("cfg_scale", "float32", ()),
        TensorSpec(CONDITION, "float32", (ROWS, *model.condition_shape)),
    )
    gates = (TensorSpec("gates", "float32", (model.units.size,)),) if gated else ()
    rows = () if model.text is None else (TensorSpec(TEXT_ROWS, "int64", (ROWS,)),)
    return (*specs, *text_outputs(model), *rows, *gates)


def text_inputs(model: ModelConfig) -> tuple[TensorSpec, ...]:
    """Inputs of the text graph: texts encoded by a language model, and which of their tokens are not padding."""
    assert model.text is not None
    return (
        TensorSpec("embeddings", "float32", (TEXTS, TEXT_TOKENS, model.text.channels)),
        TensorSpec("mask", "bool", (TEXTS, TEXT_TOKENS)),
    )


def text_outputs(model: ModelConfig) -> tuple[TensorSpec, ...]:
    """Outputs of the text graph: keys and values of every block, and what is added to attention scores.

    Empty for a model without texts.
    """
    if model.text is None:
        return ()
    return (
        TensorSpec(TEXT_VALUES, "float32", (model.depth, TEXTS, 2, TEXT_TOKENS, model.hidden_size)),
        TensorSpec(TEXT_BIAS, "float32", (TEXTS, TEXT_TOKENS)),
    )


def width_symbol(part: Part, rows: int) -> str:
    """The symbol of a dimension that has `rows` rows for each active unit of a part: `heads_3*216`, `groups_3*288`."""
    return f"{part.group.name}_{part.block}*{rows}"


def unit_input(part: Part, tensor: str, weight: WeightEntry) -> TensorSpec:
    """A stored tensor of a part's units, as an input of the graph of dynamic width."""
    return TensorSpec(part.stored(tensor), weight.dtype, (width_symbol(part, weight.shape[1]), *weight.shape[2:]))


def unit_inputs(weights: Mapping[str, WeightEntry], model: ModelConfig) -> tuple[TensorSpec, ...]:
    """The weight inputs of the graph of dynamic width, in its order: those of block 0, then of block 1, ..."""
    parts = model.units.parts
    return tuple(
        unit_input(part, name, weights[part.stored(name)]) for part in parts for name in part.group.unit_tensors
    )


def subnet_outputs(model: ModelConfig, capacity: bool) -> tuple[TensorSpec, ...]:
    """Outputs of a subnetwork's graph. `token_overflow` [L]: routed tokens of each block without a slot."""
    image = subnet_inputs(model, False)[0].shape
    state = (TensorSpec("x_prev", "float32", image), TensorSpec("next_history", "float32", image))
    return (*state, TensorSpec("token_overflow", "int64", (model.depth,))) if capacity else state


def conditioning_inputs() -> tuple[TensorSpec, ...]:
    """Inputs of the conditioning graph: the model's own times and labels. The graph evaluates every pair of them."""
    return (TensorSpec("timesteps", "float32", (STEPS,)), TensorSpec("labels", "int64", (LABELS,)))


def conditioning_outputs(model: ModelConfig) -> tuple[TensorSpec, ...]:
    """Output of the conditioning graph."""
    return (TensorSpec(CONDITION, "float32", (STEPS, LABELS, *model.condition_shape)),)


def token_mask_name(block: int) -> str:
    """The name of the value in a graph with token routing that holds a block's token mask, bool [rows*N]."""
    return f"blocks.{block}.tokens"


def residual_name(block: int) -> str:
    """The name of the value in a graph that holds the residual stream after a block, f32 [rows, N, D]."""
    return f"blocks.{block}.x"


def check_feeds(specs: tuple[TensorSpec, ...], feeds: Mapping[str, np.ndarray], what: str) -> dict[str, int]:
    """Check feeds against their specs: names, then dtypes, then shapes. Returns the value of each symbol.

    Raises `BackendError`, which names the first input that differs, what it was and what was expected.
    """
    expected = {spec.name for spec in specs}
    if missing := sorted(expected - feeds.keys()):
        raise BackendError(f"{what}: input {missing[0]!r} is missing; expected {sorted(expected)}")
    if surplus := sorted(feeds.keys() - expected):
        raise BackendError(f"{what}: unknown input {surplus[0]!r}; expected {sorted(expected)}")
    symbols: dict[str, int] = {}
    for spec in specs:
        array = feeds[spec.name]
        if not isinstance(array, np.ndarray):
            raise BackendError(f"{what}: input {spec.name!r} is a {type(array).__name__}, expected a NumPy array")
        if array.dtype.name != spec.dtype:
            raise BackendError(f"{what}: input {spec.name!r} is {array.dtype.name}, expected {spec.dtype}")
        fits = array.ndim == len(spec.shape)
        for size, dim in zip(array.shape, spec.shape, strict=False):
            fits &= size == (symbols.setdefault(dim, size) if isinstance(dim, str) else dim)
        if not fits:
            raise BackendError(f"{what}: input {spec.name!r} has shape {array.shape}, expected {spec.shape}")
    batch = symbols.get(BATCH)
    if batch is not None and (batch < 1 or symbols[ROWS] not in (batch, 2 * batch)):
        raise BackendError(
            f"{what}: {CONDITION} has {symbols[ROWS]} rows for {batch} images; "
            "expected one row for each image, or two with guidance"
        )
    return symbols
