"""How much range to move from what enters a layer into its weights (`dydit.quantization.smoothing`): where it helps.

    e_j = round( log2( max |x_j|^a / max |W_j|^(1-a) ) ), then the least of a layer's e is 0

with a strength a of `STRENGTHS`. Of what entered a layer, the largest magnitude of each channel is kept, by segment of
the plan, and a few rows as they were. On these rows the layer is computed as int8 would, over all of a segment's range,
with each strength and without any; a strength is taken where the squared error of the product falls by `LEAST_GAIN` or
more. (E4M3 rounds relatively to a value, whatever its size, so a smoothing chosen for int8 leaves it much as it was.)

Both are kept in the same memory for any number of rows, and those of parts add up to those of the whole in any order:
maxima by their nature, and rows because the ones kept are those whose bits have the least hashes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dydit.calibrate.range_methods import LEVELS
from dydit.errors import CalibrationError
from dydit.models.config import ModelConfig
from dydit.quantization.smoothing import MOST, Smoothing, as_digits, input_channels

STRENGTHS = (0.25, 0.5, 0.75)
LEAST_GAIN = 0.05
ROWS = 128
"""Rows of a layer that are kept."""
Stored = Callable[[np.ndarray], np.ndarray]
"""From a weight f32 [in, out] to what it is once it has been stored in 8 bits."""


class LayerInputs:
    """What is kept of the rows that entered a layer of so many input channels, over the segments of a plan.

    `maxima` f32 [segments, in]; of at most `limit` rows, by their hashes: `keys` uint64 [n], `segments` int64 [n] and
    `rows` f32 [n, in].
    """

    def __init__(self, segments: int, channels: int, limit: int = ROWS):
        self.maxima = np.zeros((segments, channels), np.float32)
        self.keys, self.segments = np.empty(0, np.uint64), np.empty(0, np.int64)
        self.rows, self._limit = np.empty((0, channels), np.float32), limit
        self._odd = np.random.Philox(key=np.array([channels, 0], np.uint64)).random_raw(channels) | np.uint64(1)

    def add(self, segment: int, values: np.ndarray, channels: np.ndarray | None = None) -> None:
        """Take in rows [..., k]: values of the given input channels, int [k], by default all; the others are 0.

        Raises `CalibrationError` where a value is NaN or infinite.
        """
        place = slice(None) if channels is None else channels
        rows = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1])
        if not rows.size:
            return
        largest = np.maximum(rows.max(0), -rows.min(0))
        if not np.isfinite(largest).all():
            raise CalibrationError("a value to calibrate on is NaN or infinite; hold the model against its checkpoint")
        self.maxima[segment, place] = np.maximum(self.maxima[segment, place], largest)
        keys = _mixed(rows.view(np.uint32).astype(np.uint64) @ self._odd[place])
        least = keys <= self.keys[-1] if len(self.keys) == self._limit else np.ones(len(keys), bool)
        wide = np.zeros((int(least.sum()), self.rows.shape[1]), np.float32)
        wide[:, place] = rows[least]
        self._keep(keys[least], np.full(len(wide), segment), wide)

    def merge(self, other: LayerInputs) -> None:
        """Add what another one kept, on the same plan."""
        np.maximum(self.maxima, other.maxima, out=self.maxima)
        self._keep(other.keys, other.segments, other.rows)

    def _keep(self, keys: np.ndarray, segments: np.ndarray, rows: np.ndarray) -> None:
        keys, segments = np.concatenate([self.keys, keys]), np.concatenate([self.segments, segments])
        order = np.lexsort((segments, keys))[: self._limit]
        self.rows = np.concatenate([self.rows, rows])[order]
        self.keys, self.segments = keys[order], segments[order]


class InputStatistics:
    """`LayerInputs` of every block and each of its layers, by name."""

    def __init__(self, segments: int, model: ModelConfig):
        names = model.units.layer_names
        self.of = [
            {layer: LayerInputs(segments, input_channels(model, layer)) for layer in names} for _ in range(model.depth)
        ]

    def add(self, segment: int, block: int, layer: str, values: np.ndarray, channels: np.ndarray | None = None) -> None:
        """Take in rows of a layer. Raises `CalibrationError` naming it where a value is not finite."""
        try:
            self.of[block][layer].add(segment, values, channels)
        except CalibrationError as error:
            raise CalibrationError(f"segment {segment}, block {block}, {layer}: {error}") from error


@dataclass(frozen=True)
class Choice:
    """A layer's exponents int64 [in], None for none; and the squared error of its product with and without them."""

    exponents: np.ndarray | None
    error: float
    unsmoothed: float


def exponents_for(inputs: np.ndarray, weights: np.ndarray, strength: float) -> np.ndarray:
    """e, int64 [in] of 0..`MOST`, from the largest magnitudes of input channels and of their weights, both [in].

    A channel that nothing enters or leaves has 0. Where more than `MOST` octaves lie between channels, those that would
    be divided least share a 0.
    """
    live = (inputs > 0) & (weights > 0)
    found = np.zeros(len(inputs), np.int64)
    if live.any():
        logs = strength * np.log2(inputs[live], dtype=np.float64) - (1 - strength) * np.log2(
            weights[live], dtype=np.float64
        )
        rounded = np.rint(logs).astype(np.int64)
        found[live] = np.maximum(rounded - max(rounded.min(), rounded.max() - MOST), 0)
    return found


def product_error(inputs: LayerInputs, weight: np.ndarray, exponents: np.ndarray, stored: Stored) -> float:
    """The squared error of x W on the rows kept, with x/s in int8 by the range of its segment and s W as stored.

    `weight` f32 [in, out].
    """
    divisor = np.ldexp(np.float32(1), exponents).astype(np.float32)
    thresholds = (inputs.maxima / divisor).max(1)[inputs.segments]
    scale = np.where(thresholds > 0, thresholds / LEVELS, 1).astype(np.float32)[:, None]
    levels = np.clip(np.rint(inputs.rows / divisor / scale), -LEVELS, LEVELS)
    difference = (levels * scale) @ stored(weight * divisor[:, None]) - inputs.rows @ weight
    return float(np.square(difference, dtype=np.float64).sum())


def choose_smoothing(inputs: LayerInputs, weight: np.ndarray, stored: Stored) -> Choice:
    """The strength with the least error on the rows kept, or none where it does not fall by `LEAST_GAIN`."""
    channels = len(weight)
    none = product_error(inputs, weight, np.zeros(channels, np.int64), stored)
    best = Choice(None, none, none)
    largest, of_weights = inputs.maxima.max(0), np.abs(weight).max(1)
    for strength in STRENGTHS:
        exponents = exponents_for(largest, of_weights, strength)
        if exponents.any():
            error = product_error(inputs, weight, exponents, stored)
            if error < best.error and error <= (1 - LEAST_GAIN) * none:
                best = Choice(exponents, error, none)
    return best


def as_smoothing(choices: Sequence[Mapping[str, Choice]]) -> Smoothing | None:
    """What was chosen, by block and layer; None where it is nothing."""
    blocks = [
        {layer: as_digits(choice.exponents) for layer, choice in block.items() if choice.exponents is not None}
        for block in choices
    ]
    found = Smoothing(blocks=tuple(blocks))
    return found if found.layers else None


def _mixed(keys: np.ndarray) -> np.ndarray:
    """Sums of products, spread over all 64 bits (the last step of SplitMix64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(keys ^ (keys >> np.uint64(31)))
