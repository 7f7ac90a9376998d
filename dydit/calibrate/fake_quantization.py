"""Fake quantization: sampling in PyTorch as a calibrated 8-bit bundle computes it, with any choice of layers in 16
bits.

Inputs of a layer in 8 bits are rounded to its scale and clipped to its range, its weight is the one that an export
stores, and products are in fp32, like QuantizeLinear, DequantizeLinear and MatMul. Layers in 16 bits, and attention
always, round their inputs and outputs to fp16, as engines do. (ONNX Runtime on the CPU has no such products and rounds
only their weights.) Nothing is exported, so a choice of layers can be tried at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dydit.bundle.stored_weights import Precision
from dydit.calibrate.activation_ranges import ActivationRanges
from dydit.checkpoints.checkpoint import Checkpoint
from dydit.diffusion.coefficients import step_coefficients
from dydit.diffusion.guidance import Guidance
from dydit.diffusion.schedule import Sampler, Schedule
from dydit.export.exporter import GUIDED_CHANNELS
from dydit.export.input_scales import LARGEST
from dydit.models.architecture import Slots, stored_name
from dydit.models.config import ModelConfig
from dydit.models.dit.sliced import SlicedBlock, SlicedDiT, conditioning
from dydit.models.dit.smoothed import FACTOR, modulation_factors, smoothed_tensors
from dydit.planning.masks import freeze_masks
from dydit.quantization.quantize import quantize

TYPES = {Precision.INT8_STATIC: torch.int8, Precision.FP8: torch.float8_e4m3fn}
Quantized = Mapping[str, tuple[Tensor, Tensor]]


def in_16_bits(values: Tensor) -> Tensor:
    """fp32 values rounded to fp16."""
    return values.half().float()


def in_8_bits(values: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """fp32 values rounded to int8 or float8 E4M3 with a scale."""
    ratio = values / scale
    if dtype is torch.int8:
        return ratio.round().clamp(-128, 127) * scale
    return ratio.clamp(-LARGEST[Precision.FP8], LARGEST[Precision.FP8]).to(dtype).float() * scale


class SmoothedDiT(SlicedDiT):
    """A subnetwork with smoothed weights, which contain the factors of fc2. It computes what its checkpoint
    computes."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], slots: Slots, cfg_channels: int):
        super().__init__(config, weights, slots, cfg_channels)
        self._factors = {
            block: weights[name] for block in range(config.depth) if (name := f"blocks.{block}.{FACTOR}") in weights
        }

    def linear(self, block: SlicedBlock, layer: str, x: Tensor) -> Tensor:
        """The layer on the output `x` of the layer before it."""
        if layer == "fc2" and block.index in self._factors:
            x = x * self._factors[block.index][block.groups].flatten()
        return self.product(block, layer, x)

    def product(self, block: SlicedBlock, layer: str, x: Tensor) -> Tensor:
        """The layer without the smoothing factors of its inputs."""
        return super().linear(block, layer, x)


class FakeQuantizedDiT(SmoothedDiT):
    """A subnetwork whose linear layers are in 8 bits, except for those in `kept`, bool [L, layers].

    `quantized`: weights in 8 bits and their scales, by name. `scales`: scales of the inputs of each layer, by block.
    `kept` may be set again before each step.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        quantized: Quantized,
        slots: Slots,
        cfg_channels: int,
        scales: Sequence[Sequence[float]],
        kept: np.ndarray,
    ):
        super().__init__(config, weights, slots, cfg_channels)
        self.kept, self._names = kept, config.units.layer_names
        self._quantized, self._scales = quantized, scales
        self._rounded: dict[tuple[int, str, bool], Tensor] = {}

    def product(self, block: SlicedBlock, layer: str, x: Tensor) -> Tensor:
        """The layer with the rounding of its precision."""
        kept = dict(zip(self._names, self.kept[block.index].tolist(), strict=True))
        if layer == "proj" or (layer == "fc2" and kept["fc1"]):
            x = in_16_bits(x)  # attention, and GELU after a product in 16 bits, give fp16
        weight, bias = self._weight(block, layer, kept[layer]), getattr(block, f"{layer}_bias")
        if kept[layer]:
            x, bias = in_16_bits(x), in_16_bits(bias)
        else:
            scale = self._scales[block.index][self._names.index(layer)]
            x = in_8_bits(x, scale, self._quantized[stored_name(block.index, f"{layer}.weight")][0].dtype)
        y = F.linear(x, weight, bias) if self._layers[layer].out_major else x @ weight + bias
        return in_16_bits(y) if kept[layer] or layer == "qkv" else y  # attention takes fp16

    def _weight(self, block: SlicedBlock, layer: str, kept: bool) -> Tensor:
        """The weight of the block's slots, rounded to 8 or 16 bits, in fp32."""
        key = block.index, layer, kept
        if key not in self._rounded:
            self._rounded[key] = in_16_bits(getattr(block, layer)) if kept else self._dequantized(block, layer)
        return self._rounded[key]

    def _dequantized(self, block: SlicedBlock, layer: str) -> Tensor:
        stored, scale = self._quantized[stored_name(block.index, f"{layer}.weight")]
        slots = block.slots[self.config.units.blocks[block.index].group_of(layer)]
        bits = stored.view(torch.uint8)[slots].view(stored.dtype)  # float8 has no indexing
        values = bits.float()
        return (values * (scale[slots][..., None] if self._layers[layer].out_major else scale)).flatten(0, 1)


class FakeQuantizedSampler:
    """Samples a checkpoint step by step, without quantization or with any choice of layers in 8 bits. On the CPU.

    `segments`: half-open ranges of the steps, to which the `ranges` of activations belong.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ranges: ActivationRanges,
        segments: Sequence[tuple[int, int]],
        precision: Precision,
        steps: int,
        sampler: Sampler,
        cfg_channels: int | None = None,
    ):
        config, schedule = checkpoint.config, Schedule.respaced(steps)
        self.config, self.precision = config, precision
        self.timesteps = schedule.timesteps[::-1]
        self.masks = freeze_masks(checkpoint.width_routers(), self.timesteps)
        self.segment_of = [index for index, (first, end) in enumerate(segments) for _ in range(first, end)]
        self._weights = dict(smoothed_tensors(checkpoint.state, config, ranges.smoothing))
        self._factors = modulation_factors(config, ranges.smoothing)
        self._quantized = {
            name: quantize(self._weights[name], layer.out_major, TYPES[precision])
            for name, layer in config.units.weights.items()
        }
        self._scales = ranges.input_scales(LARGEST[precision])
        self._coefficients = torch.from_numpy(
            step_coefficients(schedule, sampler, config.learn_sigma).astype(np.float32)
        )
        self._channels = min(GUIDED_CHANNELS, config.in_channels) if cfg_channels is None else cfg_channels

    def plain(self, step: int) -> SlicedDiT:
        """The subnetwork of a step, without quantization."""
        return SmoothedDiT(self.config, self._weights, self._slots(step), self._channels)

    def subnet(self, step: int, kept: np.ndarray) -> FakeQuantizedDiT:
        """The subnetwork of a step with the layers `kept`, bool [L, layers], in 16 bits and the others in 8 bits."""
        scales = self._scales[self.segment_of[step]]
        slots = self._slots(step)
        return FakeQuantizedDiT(self.config, self._weights, self._quantized, slots, self._channels, scales, kept)

    def _slots(self, step: int) -> Slots:
        return self.config.units.slots(self.masks[step])

    def modulation(self, step: int, labels: np.ndarray, cfg_scale: float) -> Tensor:
        """The modulation of a step for labels [B] and, with guidance, for as many null classes after them."""
        rows = Guidance(cfg_scale, self.config.null_class).rows(labels)
        time = torch.tensor([int(self.timesteps[step])])
        modulation = conditioning(self.config, self._weights, time, torch.from_numpy(rows))[0]
        return modulation if self._factors is None else modulation * torch.from_numpy(self._factors)

    def step(
        self, subnet: SlicedDiT, step: int, x: np.ndarray, noise: np.ndarray, modulation: Tensor, cfg_scale: float
    ) -> np.ndarray:
        """x_prev f32 [B, C, S, S] from `x`, with the subnetwork and the modulation of this step."""
        out = subnet.step(
            torch.from_numpy(x),
            torch.from_numpy(noise),
            self._coefficients[step],
            torch.tensor(float(cfg_scale)),
            modulation,
        )
        return out.x_prev.numpy()
