"""Choosing a migration for a checkpoint: its layers' inputs are watched while it samples, its weights are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from dydit.calibrate.activations import LAYERS
from dydit.calibrate.migration import Choice, InputStatistics, as_migration, choose_migration
from dydit.export.quantize import quantize
from dydit.models.checkpoint import Checkpoint
from dydit.models.migration import Migration
from dydit.models.sliced import SlicedBlock
from dydit.verify.activations import entering, sample_watched

_PLACES = {"qkv": "attn", "proj": "attn", "fc1": "mlp", "fc2": "mlp"}


@dataclass(frozen=True)
class Found:
    """What was chosen for each layer, [L][4]; `migration` is None where nothing helps."""

    choices: tuple[tuple[Choice, ...], ...]

    @property
    def migration(self) -> Migration | None:
        """The exponents."""
        return as_migration(self.choices)

    @property
    def falls(self) -> list[float]:
        """The shares by which the squared errors of migrated layers' products fall, ascending."""
        every = (choice for block in self.choices for choice in block)
        return sorted(1 - each.error / each.unmigrated for each in every if each.exponents is not None)

    def text(self) -> str:
        """In how many layers it helps, and by how much the squared error of their products falls."""
        falls = self.falls
        said = f"migration helps in {len(falls)} of {sum(map(len, self.choices))} layers"
        if not falls:
            return f"{said}: none is migrated"
        return (
            f"{said}: the squared error of their products in int8, on rows that were watched, falls by "
            f"{median(falls):.0%} in the median, {falls[-1]:.0%} at most"
        )

    def to_json(self) -> dict[str, Any]:
        """The same for scripts."""
        falls = self.falls
        return {
            "layers": sum(map(len, self.choices)),
            "migrated": len(falls),
            "error_falls_by": {"median": median(falls), "most": falls[-1]} if falls else None,
        }


def find_migration(
    checkpoint: Checkpoint, segments: Sequence[tuple[int, int]], labels: Sequence[int], *arguments: Any, **settings: Any
) -> Found:
    """The migration for a plan's segments, from an image for each label; arguments and errors as `sample_watched`'s."""
    config = checkpoint.config
    seen = InputStatistics(len(segments), config)

    def watch(segment: int, block: SlicedBlock, layer: str, values: np.ndarray) -> None:
        seen.add(segment, block.index, layer, values, entering(config, block, layer))

    sample_watched(watch, checkpoint, segments, labels, *arguments, **settings)
    return Found(
        tuple(
            tuple(
                choose_migration(inputs, _weight(checkpoint, block, layer), stored_in_int8)
                for layer, inputs in zip(LAYERS, layers, strict=True)
            )
            for block, layers in enumerate(seen.of)
        )
    )


def stored_in_int8(weight: np.ndarray) -> np.ndarray:
    """What a weight f32 [in, out] is once a bundle has stored it in int8."""
    stored, scale = quantize("blocks.0.proj.weight", torch.from_numpy(weight)[None])
    return np.asarray((stored[0].to(torch.float32) * scale).numpy())


def _weight(checkpoint: Checkpoint, block: int, layer: str) -> np.ndarray:
    """f32 [in, out]."""
    weight = checkpoint.state[f"blocks.{block}.{_PLACES[layer]}.{layer}.weight"]
    return np.ascontiguousarray(weight.detach().to(torch.float32).numpy().T)
