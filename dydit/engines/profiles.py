"""Optimization profiles: the smallest, typical and largest shape of every input, from the graphs' description.

A symbol of `dydit.bundle.io_spec` has a range; an input's three shapes follow from the ranges of its symbols.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pydantic import model_validator

from dydit.bundle.io_spec import BATCH, LABELS, ROWS, STEPS, TEXT_TOKENS, TEXTS, TensorSpec, text_outputs, width_symbol
from dydit.bundle.manifest import Manifest
from dydit.errors import BackendError
from dydit.models.config import ModelConfig
from dydit.validation import Strict

CONDITIONING_ELEMENTS = 1 << 28
"""The most numbers that one evaluation of the conditioning engine returns: 1 GiB, far below TensorRT's 2**31."""
TENSOR_ELEMENTS = (1 << 31) - 1
"""The most numbers that a tensor of TensorRT has."""


class Extent(Strict):
    """The range of a symbol, `1 <= min <= opt <= max`; an engine is tuned for `opt` and runs anywhere between."""

    min: int
    opt: int
    max: int

    @model_validator(mode="after")
    def _ordered(self) -> Extent:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(f"{self.min}, {self.opt}, {self.max} is not a range: expected 1 <= min <= opt <= max")
        return self


class ShapeExtent(Strict):
    """The smallest, typical and largest shape of an input."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


Ranges = Mapping[str, Extent]
Profile = dict[str, ShapeExtent]


def symbol_ranges(manifest: Manifest, opt_batch: int, max_batch: int) -> dict[str, Extent]:
    """Ranges of the symbols of a bundle's graphs.

    `rows` goes up to twice the batch, with guidance, and is tuned for that; so does `labels`, because each makes a row.
    `steps`: those of the longest segment, but no more than `CONDITIONING_ELEMENTS` allow for all labels. `texts`: one
    for each image, and the negative one; each of as many tokens as the model was trained with, for which it is tuned.
    Raises `BackendError` if the keys and values of so many texts are more than `TENSOR_ELEMENTS`.
    """
    counts = [segment.count for segment in manifest.plan.segments]
    rows = Extent(min=1, opt=2 * opt_batch, max=2 * max_batch)
    row_elements = math.prod(manifest.model.condition_shape)
    steps = max(1, min(max(counts), CONDITIONING_ELEMENTS // (rows.max * row_elements)))
    return {
        BATCH: Extent(min=1, opt=opt_batch, max=max_batch),
        ROWS: rows,
        STEPS: Extent(min=1, opt=min(steps, -(-sum(counts) // len(counts))), max=steps),
        LABELS: rows,
        **_text_ranges(manifest.model, opt_batch, max_batch),
    }


def _text_ranges(model: ModelConfig, opt_batch: int, max_batch: int) -> dict[str, Extent]:
    if model.text is None:
        return {}
    texts, tokens = max_batch + 1, model.text.tokens
    numbers = max(math.prod(spec.concrete({TEXTS: texts, TEXT_TOKENS: tokens})) for spec in text_outputs(model))
    if numbers > TENSOR_ELEMENTS:
        fits = TENSOR_ELEMENTS * texts // numbers - 1
        raise BackendError(
            f"TensorRT cannot hold the keys and values of the texts of {max_batch} images in one tensor; build with "
            f"--max-batch {fits} or less"
        )
    return {
        TEXTS: Extent(min=1, opt=opt_batch + 1, max=texts),
        TEXT_TOKENS: Extent(min=1, opt=tokens, max=tokens),
    }


def width_ranges(model: ModelConfig) -> dict[str, Extent]:
    """Ranges of the widths of a graph whose block weights are inputs (`WeightInputs` of `dydit.graph.sources`).

    A dimension `heads_3*216` is 216 rows for each head that block 3 has on: 1 to all of them, tuned for half.
    """
    ranges = {}
    for part in model.units.parts:
        most, opt = part.group.count, max(1, round(part.group.count / 2))
        for rows in {layer.unit_features for layer in part.group.layers}:
            ranges[width_symbol(part, rows)] = Extent(min=rows, opt=opt * rows, max=most * rows)
    return ranges


def shape_profile(specs: Sequence[TensorSpec], ranges: Ranges, what: str) -> Profile:
    """The three shapes of every input of `specs` that has a symbol.

    Raises `BackendError`, naming graph `what` and input, for a symbol without a range.
    """
    profile: Profile = {}
    for spec in specs:
        symbols = [dim for dim in spec.shape if isinstance(dim, str)]
        if unknown := [symbol for symbol in symbols if symbol not in ranges]:
            raise BackendError(
                f"{what}: no range is known for {unknown[0]!r}, a dimension of input {spec.name!r}; known: "
                f"{', '.join(sorted(ranges))}"
            )
        if symbols:
            profile[spec.name] = ShapeExtent(
                min=spec.concrete({symbol: ranges[symbol].min for symbol in symbols}),
                opt=spec.concrete({symbol: ranges[symbol].opt for symbol in symbols}),
                max=spec.concrete({symbol: ranges[symbol].max for symbol in symbols}),
            )
    return profile
