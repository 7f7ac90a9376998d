"""Optimization profiles: the smallest, typical and largest shape of every input, from the graphs' description.

A symbol of `dydit.bundle.io_spec` has a range; an input's three shapes follow from the ranges of its symbols. An engine
has a profile for each batch size that it is tuned for: its kernels are chosen for that size, and it serves the sizes
from the next smaller one up to it. Tuned for the largest batch alone, an engine is slow on small ones.
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


_SEVERAL_FROM = 8
"""The largest batch from which several profiles are worth the time to build them."""


def tuned_batches(max_batch: int) -> tuple[int, ...]:
    """The batch sizes that engines are tuned for by default: one image, the most, and the geometric mean of both."""
    return (1, round(math.sqrt(max_batch)), max_batch) if max_batch >= _SEVERAL_FROM else (max_batch,)


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


def symbol_ranges(manifest: Manifest, opt_batches: Sequence[int], max_batch: int) -> tuple[dict[str, Extent], ...]:
    """Ranges of the symbols of a bundle's graphs, one for each of the batch sizes to tune for, in ascending order.

    Each begins behind the one before; the last goes up to `max_batch`. `rows` goes up to twice the batch, with
    guidance, and is tuned for that; so does `labels`, because each makes a row. `steps`: those of the longest segment,
    but no more than `CONDITIONING_ELEMENTS` allow for all labels. `texts`: one for each image of the largest batch,
    because all batches of a run have equally many, and the negative one; each of as many tokens as the model was
    trained with, for which it is tuned. Raises `BackendError` if the keys and values of so many texts are more than
    `TENSOR_ELEMENTS`.
    """
    counts = [segment.count for segment in manifest.plan.segments]
    row_elements = math.prod(manifest.model.condition_shape)
    steps = max(1, min(max(counts), CONDITIONING_ELEMENTS // (2 * max_batch * row_elements)))
    of_steps = Extent(min=1, opt=min(steps, -(-sum(counts) // len(counts))), max=steps)
    ranges = []
    for first, opt, last in zip(
        (1, *(batch + 1 for batch in opt_batches)), opt_batches, (*opt_batches[:-1], max_batch), strict=False
    ):
        rows = Extent(min=first, opt=2 * opt, max=2 * last)
        of_texts = _text_ranges(manifest.model, opt, max_batch)
        ranges.append(
            {BATCH: Extent(min=first, opt=opt, max=last), ROWS: rows, STEPS: of_steps, LABELS: rows, **of_texts}
        )
    return tuple(ranges)


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


def shape_profiles(specs: Sequence[TensorSpec], several: Sequence[Ranges], what: str) -> tuple[Profile, ...]:
    """The `shape_profile` of each of several ranges, equal ones once."""
    profiles: list[Profile] = []
    for ranges in several:
        if (profile := shape_profile(specs, ranges, what)) not in profiles:
            profiles.append(profile)
    return tuple(profiles)


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
