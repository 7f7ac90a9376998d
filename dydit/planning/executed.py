"""Multiply-adds of a bundle's steps, counted on the compiled subnetworks rather than on the masks of the steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dydit.bundle.manifest import Manifest, Routing, SubnetEntry
from dydit.models.macs import flops_ratio


def subnet_of_steps(manifest: Manifest) -> list[SubnetEntry]:
    """The subnetwork of each sampling step, [S]."""
    return [manifest.subnets[segment.subnet] for segment in manifest.plan.segments for _ in segment.steps]


def computed_ratio(
    manifest: Manifest, steps: Sequence[int], routed: np.ndarray, repeated: np.ndarray | None = None
) -> np.ndarray:
    """Multiply-adds of each of the K `steps`, divided by those of the static model's blocks, [K].

    A merged plan computes the union of its steps' masks. Dynamic routing computes the routed tokens, a share `routed`
    [K, L] of all. Capacity routing computes its slots, and all tokens again in steps that were `repeated`, bool [K].
    Dense routing and static models compute all tokens.
    """
    config, entries = manifest.model, [subnet_of_steps(manifest)[step] for step in steps]
    counts = config.units.counts(manifest.executed_masks()[list(steps)])
    everything = np.ones((len(entries), config.depth))
    if manifest.routing is Routing.DYNAMIC:
        return np.asarray(flops_ratio(config, counts, routed))
    if manifest.routing is not Routing.CAPACITY:
        return np.asarray(flops_ratio(config, counts, everything))
    slots = np.array([entry.capacities or (config.tokens,) * config.depth for entry in entries]) / config.tokens
    ratio = np.asarray(flops_ratio(config, counts, slots))
    again = np.zeros(len(entries), bool) if repeated is None else repeated
    return ratio + again * np.asarray(flops_ratio(config, counts, everything))


def layers_in_16_bits(manifest: Manifest) -> tuple[int, int]:
    """The number of linear layers in the blocks of all segments, and how many of them stay in fp16."""
    entries = [manifest.subnets[segment.subnet] for segment in manifest.plan.segments]
    parts = ((part, units) for entry in entries for part, units in manifest.model.units.zip(entry.units))
    layers = sum(len(part.group.layers) for part, units in parts if units)
    return layers, sum(len(block) for entry in entries for block in entry.fp16_layers or ())
