"""Smoothing for a checkpoint, chosen from the inputs of its layers while it samples, and from their weights."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from dydit.calibrate.observers import ObservedRun, Progress, entering, sample_watched
from dydit.calibrate.smoothing_strength import Choice, InputStatistics, as_smoothing, choose_smoothing
from dydit.checkpoints.checkpoint import Checkpoint
from dydit.models.architecture import stored_name
from dydit.models.registry import architecture_of
from dydit.models.sliced import SlicedBlock
from dydit.quantization.quantize import quantize
from dydit.quantization.smoothing import Smoothing


@dataclass(frozen=True)
class FoundSmoothing:
    """The choice for each layer of each block, by name. `smoothing` is None if no layer is smoothed."""

    choices: tuple[dict[str, Choice], ...]

    @property
    def smoothing(self) -> Smoothing | None:
        """The chosen exponents; None if no layer is smoothed."""
        return as_smoothing(self.choices)

    @property
    def falls(self) -> list[float]:
        """The shares by which the squared errors of the products of smoothed layers fall, ascending."""
        every = (choice for block in self.choices for choice in block.values())
        return sorted(1 - each.error / each.unsmoothed for each in every if each.exponents is not None)

    def text(self) -> str:
        """The number of smoothed layers, and by how much the squared error of their products falls."""
        falls = self.falls
        total = sum(map(len, self.choices))
        if not falls:
            return f"smoothing lowers the error in none of {total} layers, so no layer is smoothed"
        return (
            f"smoothing lowers the error in {len(falls)} of {total} layers; on the observed activations, the squared "
            f"error of their int8 matrix products falls by {median(falls):.0%} in the median layer and by up to "
            f"{falls[-1]:.0%}"
        )

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        falls = self.falls
        return {
            "layers": sum(map(len, self.choices)),
            "migrated": len(falls),  # scripts read this key
            "error_falls_by": {"median": median(falls), "most": falls[-1]} if falls else None,
        }


def find_smoothing(checkpoint: Checkpoint, run: ObservedRun, progress: Progress | None = None) -> FoundSmoothing:
    """The smoothing for the segments of a run. Progress and errors are those of `sample_watched`."""
    config = checkpoint.config
    seen = InputStatistics(len(run.segments), config)

    def watch(segment: int, block: SlicedBlock, layer: str, values: np.ndarray) -> None:
        seen.add(segment, block.index, layer, values, entering(config, block, layer))

    sample_watched(watch, checkpoint, run, progress)
    layers = config.units.weights
    stored = architecture_of(config).stored_tensors(checkpoint.state, config)
    tensors = {name: tensor for name, tensor in stored if name in layers}

    def weight_of(block: int, layer: str) -> np.ndarray:
        name = stored_name(block, f"{layer}.weight")
        rows = tensors[name].flatten(0, 1).numpy()
        return np.ascontiguousarray(rows.T if layers[name].out_major else rows)  # [in, out]

    return FoundSmoothing(
        tuple(
            {layer: choose_smoothing(inputs, weight_of(block, layer), stored_in_int8) for layer, inputs in each.items()}
            for block, each in enumerate(seen.of)
        )
    )


def stored_in_int8(weight: np.ndarray) -> np.ndarray:
    """The value of a weight f32 [in, out] after a bundle has stored it in int8."""
    stored, scale = quantize(torch.from_numpy(weight)[None], out_major=False)
    return np.asarray((stored[0].to(torch.float32) * scale).numpy())
