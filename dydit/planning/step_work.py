"""Bytes and floating point operations of one sampling step, for estimates of the least time that it can take.

They are counted from the description of the architecture (`UnitGroup`, `Architecture.step_products`):

    operations   two for each multiply-add of the units that are on and of the products that no unit owns
    bytes        the subnetwork's weights once, whatever the batch; inputs and outputs of each product once; queries,
                 keys, values and the result of each attention once, since fused attention stores no scores; the
                 condition of each row; the image, its noise and its history before and after the step

Everything between products (normalization, GELU, gates, residual sums, gathers) is taken as fused into them and not
counted. So are caches: a real step reads more where tiles are read twice, and less where a value is still in a cache.
Conditioning and texts are computed before the steps and are not part of one. NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dydit.bundle.stored_weights import Precision, StoredType
from dydit.dtypes import DTYPES
from dydit.models.architecture import Part, UnitLayer
from dydit.models.config import ModelConfig
from dydit.models.registry import architecture_of

STATES = 5
"""Images of the sampler in a step: x, history and noise are read; x_prev and the next history are written."""


@dataclass(frozen=True)
class StepWork:
    """What a step needs. `weights`, `activations`: bytes. `flops`: operations by the type of the products' inputs.

    `router_flops`: those of token routers among them, which are fp32.
    """

    weights: float
    activations: float
    flops: Mapping[StoredType, float]
    router_flops: float = 0.0

    @property
    def nbytes(self) -> float:
        """Bytes that are read and written."""
        return self.weights + self.activations

    @property
    def total_flops(self) -> float:
        """Operations of all types."""
        return sum(self.flops.values())


@dataclass(frozen=True)
class Counted:
    """What a step computes.

    `units`: the number of active units of each part, [P]. `tokens`: the share of tokens that enter each block's routed
    units, [L], in 0..1; None: all. `weights`: bytes of the weights that it reads. `fp16_layers`: names of the layers
    that stay in fp16 with 8 bits, by block.
    """

    units: np.ndarray
    weights: float
    tokens: np.ndarray | None = None
    fp16_layers: Sequence[Sequence[str]] | None = None


def step_work(model: ModelConfig, precision: Precision, images: int, rows: int, step: Counted) -> StepWork:
    """The work of a step of `images` images. `rows`: those of the batch, twice as many as images with guidance."""
    counter, router_flops = _Counter(precision), 0.0
    for product in architecture_of(model).step_products(model):
        dtype: StoredType = "float32" if product.weight in model.fp32_products else precision.dtype
        times = images if product.once else rows
        counter.add(dtype, dtype, times * product.macs, times * product.reads, times * product.writes)
        router_flops += 2 * times * product.macs * product.router
    for part, units in zip(model.units.parts, step.units, strict=True):
        if units:
            share = 1.0 if step.tokens is None or not part.group.routed else float(step.tokens[part.block])
            fp16 = step.fp16_layers[part.block] if step.fp16_layers else ()
            _count_part(counter, part, int(units), rows, share, model.tokens, fp16)
    fixed = rows * math.prod(model.condition_shape) + STATES * images * model.in_channels * model.input_size**2
    return StepWork(step.weights, counter.nbytes + 4 * fixed, counter.flops, router_flops)


class _Counter:
    """Adds up products."""

    def __init__(self, precision: Precision):
        self.precision = precision
        self.nbytes = 0.0
        self.flops: dict[StoredType, float] = {}

    def add(self, inputs: StoredType, outputs: StoredType, macs: float, reads: float, writes: float) -> None:
        """Count a product by the types of its inputs and outputs."""
        self.flops[inputs] = self.flops.get(inputs, 0.0) + 2 * macs
        self.nbytes += DTYPES[inputs].bytes * reads + DTYPES[outputs].bytes * writes


def _count_part(
    counter: _Counter, part: Part, units: int, rows: int, share: float, tokens: int, fp16: Sequence[str]
) -> None:
    """Count the layers of a part's active units, and its attention. `share`: of its tokens that are computed."""
    group, precision = part.group, counter.precision
    vectors = rows * share * tokens
    weights = [layer.unit_features * layer.features for layer in group.layers]
    of_layers = (group.macs - group.attention_macs) / sum(weights)

    def computed_in(layer: UnitLayer) -> StoredType:
        return "float16" if layer.name in fp16 else precision.weight_dtype

    for layer, weight in zip(group.layers, weights, strict=True):
        reads, writes = vectors * layer.in_features(units), vectors * layer.out_features(units)
        macs = rows * share * units * weight * of_layers
        counter.add(computed_in(layer), precision.dtype, macs, reads, writes)
    if group.attention:
        kind, first, last = precision.attention.dtype, group.layers[0], group.layers[-1]
        macs = rows * share * units * group.attention_macs
        counter.add(kind, kind, macs, vectors * first.out_features(units), vectors * last.in_features(units))
