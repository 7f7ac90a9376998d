"""Fake quantization: sampling in PyTorch as a calibrated 8-bit bundle computes it, with any choice of layers in 16
bits.

Inputs of a layer in 8 bits are rounded to its scale and clipped to its range, its weight is the one that an export
stores, and products are in fp32, like QuantizeLinear, DequantizeLinear and MatMul. Layers in 16 bits, and attention
always, round their inputs and outputs to fp16, as engines do. (ONNX Runtime on the CPU has no such products and rounds
only their weights.) Nothing is exported, so a choice of layers can be tried at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dydit.bundle.stored_weights import Precision
from dydit.calibrate.activation_ranges import ActivationRanges
from dydit.calibrate.sliced_sampler import Condition, SlicedSampler, spread_batches
from dydit.checkpoints.checkpoint import Checkpoint
from dydit.diffusion.samplers import SamplerConfig
from dydit.diffusion.steps import State, StateOnly, run_steps
from dydit.errors import CalibrationError
from dydit.export.input_scales import LARGEST
from dydit.models.architecture import UnitLayer, stored_name
from dydit.models.config import ModelConfig
from dydit.models.sliced import SlicedBlock, SlicedModel, plain_linear
from dydit.quantization.quantize import quantize
from dydit.runtime.noise_source import SeededNoise

TYPES = {Precision.INT8_STATIC: torch.int8, Precision.FP8: torch.float8_e4m3fn}
Quantized = Mapping[str, tuple[Tensor, Tensor]]
BATCH = 16


def in_16_bits(values: Tensor) -> Tensor:
    """fp32 values rounded to fp16."""
    return values.half().float()


def in_8_bits(values: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """fp32 values rounded to int8 or float8 E4M3 with a scale."""
    ratio = values / scale
    if dtype is torch.int8:
        return ratio.round().clamp(-128, 127) * scale
    return ratio.clamp(-LARGEST[Precision.FP8], LARGEST[Precision.FP8]).to(dtype).float() * scale


class SmoothedLayers:
    """The layers of a subnetwork with smoothed weights, beside which the factors of inputs are stored. Together they
    compute what the layers of the checkpoint compute."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor]):
        self._axis, self._weights = config.units, weights

    def __call__(self, block: SlicedBlock, layer: UnitLayer, x: Tensor) -> Tensor:
        """The layer on the output `x` of the layer before it."""
        factor = self._weights.get(stored_name(block.index, layer.factor))
        if factor is not None:
            x = x * factor[self._slots(block, layer)].flatten()
        return self.product(block, layer, x)

    def product(self, block: SlicedBlock, layer: UnitLayer, x: Tensor) -> Tensor:
        """The layer without the smoothing factors of its inputs."""
        return plain_linear(block, layer, x)

    def _slots(self, block: SlicedBlock, layer: UnitLayer) -> Tensor:
        return block.slots[self._axis.blocks[block.index].group_of(layer.name)]


class FakeQuantizedLayers(SmoothedLayers):
    """The layers of a subnetwork in 8 bits, except for those in `fp16_layers`, bool [L, layers].

    `quantized`: weights in 8 bits and their scales, by name. `scales`: scales of the inputs of each layer, by block.
    `fp16_layers` may be changed before each step.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        quantized: Quantized,
        scales: Sequence[Sequence[float]],
        fp16_layers: np.ndarray,
    ):
        super().__init__(config, weights)
        self.fp16_layers, self._names = fp16_layers, config.units.layer_names
        self._quantized, self._scales = quantized, scales
        self._rounded: dict[tuple[int, str, bool], Tensor] = {}

    def product(self, block: SlicedBlock, layer: UnitLayer, x: Tensor) -> Tensor:
        """The layer with the rounding of its precision."""
        in_fp16 = dict(zip(self._names, self.fp16_layers[block.index].tolist(), strict=True))
        spec = self._axis.blocks[block.index]
        group = spec.groups[spec.group_of(layer.name)]
        if not layer.out_major and (group.attention or in_fp16[group.layers[0].name]):
            x = in_16_bits(x)  # attention, and what follows a product in 16 bits, give fp16
        weight, bias = self._weight(block, layer, in_fp16[layer.name]), block.bias(layer.name)
        if in_fp16[layer.name]:
            x, bias = in_16_bits(x), in_16_bits(bias)
        else:
            scale = self._scales[block.index][self._names.index(layer.name)]
            x = in_8_bits(x, scale, self._quantized[stored_name(block.index, layer.weight)][0].dtype)
        y = F.linear(x, weight, bias) if layer.out_major else x @ weight + bias
        takes_fp16 = in_fp16[layer.name] or (group.attention and layer.out_major)
        return in_16_bits(y) if takes_fp16 else y

    def _weight(self, block: SlicedBlock, layer: UnitLayer, in_fp16: bool) -> Tensor:
        """The weight of the block's slots, rounded to 8 or 16 bits, in fp32."""
        key = block.index, layer.name, in_fp16
        if key not in self._rounded:
            weight = in_16_bits(block.layers[layer.name][0]) if in_fp16 else self._dequantized(block, layer)
            self._rounded[key] = weight
        return self._rounded[key]

    def _dequantized(self, block: SlicedBlock, layer: UnitLayer) -> Tensor:
        stored, scale = self._quantized[stored_name(block.index, layer.weight)]
        slots = self._slots(block, layer)
        bits = stored.view(torch.uint8)[slots].view(stored.dtype)  # float8 has no indexing
        values = bits.float()
        return (values * (scale[slots][..., None] if layer.out_major else scale)).flatten(0, 1)


class FakeQuantizedSampler(SlicedSampler):
    """Samples a checkpoint step by step, without quantization or with any choice of layers in 8 bits.

    `segments`: half-open ranges of the steps, to which the `ranges` of activations belong.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ranges: ActivationRanges,
        segments: Sequence[tuple[int, int]],
        precision: Precision,
        sampling: SamplerConfig,
        cfg_channels: int | None = None,
    ):
        super().__init__(checkpoint, sampling, cfg_channels, ranges.smoothing)
        self.precision = precision
        self.segment_of = [index for index, (first, end) in enumerate(segments) for _ in range(first, end)]
        self._quantized = {
            name: quantize(self.weights[name], layer.out_major, TYPES[precision])
            for name, layer in self.config.units.weights.items()
        }
        self._scales = ranges.input_scales(LARGEST[precision])

    def layers(self, step: int, fp16_layers: np.ndarray | None) -> SmoothedLayers:
        """The layers of a step's subnetwork: those in `fp16_layers`, bool [L, layers], in 16 bits and the others in
        8 bits; None: without quantization."""
        if fp16_layers is None:
            return SmoothedLayers(self.config, self.weights)
        scales = self._scales[self.segment_of[step]]
        return FakeQuantizedLayers(self.config, self.weights, self._quantized, scales, fp16_layers)


class FakeQuantizedImages:
    """The images of a seed in batches, and steps and runs of all of them."""

    def __init__(self, sampler: FakeQuantizedSampler, seed: int, images: int, cfg_scales: Sequence[float]):
        config = sampler.config
        self.sampler, self.steps = sampler, len(sampler.timesteps)
        self._noise = SeededNoise(seed, (config.in_channels, config.input_size, config.input_size))
        spread = spread_batches(images, config.classes.count, cfg_scales, BATCH)
        self.batches = [(scale, batch) for scale, batches in spread for batch in batches]
        self.tick: Callable[[int], None] = lambda steps: None
        self._step, self._drawn = -1, [np.empty(0)]
        self._conditions: list[Condition] = []

    def initial(self) -> State[np.ndarray]:
        """The state that all images start from, with x [n, C, S, S]."""
        return State(np.concatenate([self._noise.initial(batch) for _, batch in self.batches]))

    def step(self, subnet: SlicedModel, step: int, state: State[np.ndarray]) -> State[np.ndarray]:
        """One step of all images: the state after it from that before it."""
        if step != self._step:
            self._step = step
            self._drawn = [self._noise.step(batch, step) for _, batch in self.batches]
            self._conditions = [self.sampler.condition(step, batch.labels, scale) for scale, batch in self.batches]
        parts, first = [], 0
        for (scale, batch), drawn, condition in zip(self.batches, self._drawn, self._conditions, strict=True):
            own = slice(first, first + len(batch.images))
            parts.append(self.sampler.step(subnet, step, state.part(own), drawn, condition, scale))
            first = own.stop
            self.tick(1)
        return State(np.concatenate([each.x for each in parts]), np.concatenate([each.history for each in parts]))

    def run(
        self,
        fp16_layers: np.ndarray | None,
        first: int = 0,
        state: State[np.ndarray] | None = None,
        on_step: Callable[[State[np.ndarray]], None] | None = None,
    ) -> np.ndarray:
        """The images of a run from the `state` before step `first`, with the layers `fp16_layers` [segments, L, layers]
        in 16 bits (None: without quantization). `on_step` gets the state after every step.
        """
        sampler = self.sampler

        def step(index: int, state: State[np.ndarray]) -> StateOnly[np.ndarray]:
            chosen = None if fp16_layers is None else fp16_layers[sampler.segment_of[index]]
            subnet = sampler.subnet(index, sampler.layers(index, chosen))
            return StateOnly(self.step(subnet, index, state))

        def observe(_: int, outcome: StateOnly[np.ndarray]) -> None:
            if on_step is not None:
                on_step(outcome.state)

        x = run_steps(step, state or self.initial(), range(first, self.steps), observe).x
        if not np.isfinite(x).all():
            kind = "without quantization" if fp16_layers is None else f"in {sampler.precision}"
            raise CalibrationError(
                f"images {kind} are NaN or infinite and cannot be compared; check the checkpoint, or "
                "use another precision"
            )
        return x
