"""The choice of smoothing factors (`dydit.quantization.smoothing`) for a layer, if smoothing lowers its error.

    e_j = round( log2( max |x_j|^a / max |W_j|^(1-a) ) ), shifted so that the smallest e of a layer is 0

with a strength a of `STRENGTHS`. Two statistics of a layer's inputs are kept: the largest magnitude of each channel, by
segment of the plan, and a few whole rows. On these rows the layer is computed as in int8, with the range of the
segment, for each strength and without smoothing. The best strength is used if it lowers the squared error of the
product by `LEAST_GAIN` or more. (E4M3 rounds relative to the value, so that smoothing chosen for int8 hardly changes
it.)

Both statistics take constant memory for any number of rows, and do not depend on the order of rows: of these, the ones
with the smallest hashes of their bits are kept.
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
"""The number of rows that are kept of each layer."""
Stored = Callable[[np.ndarray], np.ndarray]
"""Maps a weight f32 [in, out] to its value after it has been stored in 8 bits."""


class LayerInputs:
    """Statistics of the inputs of a layer with `channels` input channels, over the segments of a plan.

    `maxima` f32 [segments, in]. At most `ROWS` rows, chosen by their hashes: `keys` uint64 [n], `segments` int64 [n]
    and `rows` f32 [n, in].
    """

    def __init__(self, segments: int, channels: int):
        self.maxima = np.zeros((segments, channels), np.float32)
        self.keys, self.segments = np.empty(0, np.uint64), np.empty(0, np.int64)
        self.rows = np.empty((0, channels), np.float32)
        self._odd = np.random.Philox(key=np.array([channels, 0], np.uint64)).random_raw(channels) | np.uint64(1)

    def add(self, segment: int, values: np.ndarray, channels: np.ndarray | None = None) -> None:
        """Add rows [..., k] with the values of the input channels `channels` int [k] (by default all); others are 0.

        Raises `CalibrationError` if a value is NaN or infinite.
        """
        place = slice(None) if channels is None else channels
        rows = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1])
        if not rows.size:
            return
        largest = np.maximum(rows.max(0), -rows.min(0))
        if not np.isfinite(largest).all():
            raise CalibrationError("a value to calibrate on is NaN or infinite; check the checkpoint")
        self.maxima[segment, place] = np.maximum(self.maxima[segment, place], largest)
        keys = _mixed(rows.view(np.uint32).astype(np.uint64) @ self._odd[place])
        least = keys <= self.keys[-1] if len(self.keys) == ROWS else np.ones(len(keys), bool)
        wide = np.zeros((int(least.sum()), self.rows.shape[1]), np.float32)
        wide[:, place] = rows[least]
        keys = np.concatenate([self.keys, keys[least]])
        segments = np.concatenate([self.segments, np.full(len(wide), segment)])
        order = np.lexsort((segments, keys))[:ROWS]
        self.rows = np.concatenate([self.rows, wide])[order]
        self.keys, self.segments = keys[order], segments[order]


class InputStatistics:
    """`LayerInputs` of the layers of every block, by name."""

    def __init__(self, segments: int, model: ModelConfig):
        names = model.units.layer_names
        self.of = [
            {layer: LayerInputs(segments, input_channels(model, layer)) for layer in names} for _ in range(model.depth)
        ]

    def add(self, segment: int, block: int, layer: str, values: np.ndarray, channels: np.ndarray | None = None) -> None:
        """Add rows of a layer. Raises `CalibrationError`, naming the layer, if a value is not finite."""
        try:
            self.of[block][layer].add(segment, values, channels)
        except CalibrationError as error:
            raise CalibrationError(f"segment {segment}, block {block}, {layer}: {error}") from error


@dataclass(frozen=True)
class Choice:
    """The exponents of a layer, int64 [in], or None; and the squared error of its product with and without
    smoothing."""

    exponents: np.ndarray | None
    error: float
    unsmoothed: float


def exponents_for(inputs: np.ndarray, weights: np.ndarray, strength: float) -> np.ndarray:
    """e, int64 [in] in 0..`MOST`, from the largest magnitudes of the input channels and of their weights, both [in].

    A channel without inputs or weights has e = 0. If channels differ by more than `MOST` octaves, e = 0 for those that
    would be divided least.
    """
    live = (inputs > 0) & (weights > 0)
    exponents = np.zeros(len(inputs), np.int64)
    if live.any():
        logs = strength * np.log2(inputs[live], dtype=np.float64) - (1 - strength) * np.log2(
            weights[live], dtype=np.float64
        )
        rounded = np.rint(logs).astype(np.int64)
        exponents[live] = np.maximum(rounded - max(rounded.min(), rounded.max() - MOST), 0)
    return exponents


def product_error(inputs: LayerInputs, weight: np.ndarray, exponents: np.ndarray, stored: Stored) -> float:
    """The squared error of x W on the kept rows, with x/s in int8 in the range of its segment and s W as stored.

    `weight` f32 [in, out].
    """
    divisor = np.ldexp(np.float32(1), exponents).astype(np.float32)
    thresholds = (inputs.maxima / divisor).max(1)[inputs.segments]
    scale = np.where(thresholds > 0, thresholds / LEVELS, 1).astype(np.float32)[:, None]
    levels = np.clip(np.rint(inputs.rows / divisor / scale), -LEVELS, LEVELS)
    difference = (levels * scale) @ stored(weight * divisor[:, None]) - inputs.rows @ weight
    return float(np.square(difference, dtype=np.float64).sum())


def choose_smoothing(inputs: LayerInputs, weight: np.ndarray, stored: Stored) -> Choice:
    """The strength with the smallest error on the kept rows, or none if it does not lower the error by `LEAST_GAIN`."""
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
    """The chosen exponents, by block and layer; None if no layer is smoothed."""
    blocks = [
        {layer: as_digits(choice.exponents) for layer, choice in block.items() if choice.exponents is not None}
        for block in choices
    ]
    smoothing = Smoothing(blocks=tuple(blocks))
    return smoothing if smoothing.layers else None


def _mixed(keys: np.ndarray) -> np.ndarray:
    """Hashes of the sums of products over all 64 bits (the last step of SplitMix64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(keys ^ (keys >> np.uint64(31)))
