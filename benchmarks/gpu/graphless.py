"""Bundles without graphs, for machines without the package onnx: weights on disk and a manifest in memory.

PyTorch needs nothing else of a bundle. What is written is what `dydit export` writes to `weights.bin`, and the manifest
is that of the same export, except that the files of graphs are listed with no bytes, no checksum was computed, and no
`manifest.json` is written: nothing but the process that made it can open such a bundle. A test holds both to the
exporter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import (
    CONDITIONING,
    DYNAMIC_WIDTH_FULL_GRAPH,
    DYNAMIC_WIDTH_GRAPH,
    SCHEMA_VERSION,
    FileEntry,
    Manifest,
    PlanEntry,
    PlanKind,
    Routing,
    SamplingEntry,
    SegmentEntry,
    SubnetEntry,
    pack_mask,
)
from dydit.bundle.stored_weights import WEIGHTS, WeightEntry
from dydit.diffusion.coefficients import sampling_run
from dydit.export.settings import ExportConfig, guided_channels
from dydit.export.weights import write_weights
from dydit.models.architecture import Slots
from dydit.models.config import ModelConfig
from dydit.models.dynamic import DynamicModel
from dydit.models.registry import architecture_of
from dydit.planning.costs import macs_costs
from dydit.planning.masks import activity_order, by_slot, freeze_masks
from dydit.planning.plan import Plan, merged_plan, per_step_plan, plan_cost
from dydit.planning.sizes import subnet_bytes

NOTHING = FileEntry(bytes=0, sha256=hashlib.sha256(b"").hexdigest())
"""The entry of a file that was not written."""


@dataclass(frozen=True)
class Planned:
    """The steps of an export. `masks`: bool [S, U] by slot. `order`: the checkpoint's unit in each slot."""

    model: ModelConfig
    config: ExportConfig
    masks: np.ndarray
    order: Slots
    plan: Plan

    def slots(self, tokens: np.ndarray) -> list[tuple[int, ...]]:
        """Token slots of each segment, by block, that hold the share of `tokens` [S, L] of each of its steps."""
        most = [tokens[first:end].max(axis=0) for first, end in self.plan.segments]
        return [tuple(int(np.ceil(share * self.model.tokens).clip(1)) for share in shares) for shares in most]


def plan_steps(model: DynamicModel, config: ExportConfig) -> Planned:
    """Masks and plan of a model's steps. The model is on PyTorch's default device."""
    masks = freeze_masks(model, config.sampling(model.config).times(model.config.diffusion))
    order = activity_order(masks, model.config.units)
    masks, costs = by_slot(masks, model.config.units, order), macs_costs(model.config)
    merged = config.plan is PlanKind.MAX_SUBNETS
    plan = merged_plan(masks, costs, config.max_subnets) if merged else per_step_plan(masks, costs)
    return Planned(model.config, config, masks, order, plan)


def graphless_weights(folder: Path, state: Mapping[str, Tensor], planned: Planned) -> dict[str, WeightEntry]:
    """Write the weights of a state dict, on any device, to the existing `folder`; returns their entries."""
    tensors = architecture_of(planned.model).stored_tensors(state, planned.model, planned.order, None)
    on_host = ((name, tensor.cpu()) for name, tensor in tensors)
    return write_weights(folder / WEIGHTS, on_host, planned.model, planned.config.precision)


def graphless_bundle(
    folder: Path, weights: dict[str, WeightEntry], planned: Planned, slots: Sequence[tuple[int, ...]] | None = None
) -> Bundle:
    """The bundle of what `graphless_weights` wrote.

    `slots`: token slots of each segment, by block, with capacity routing; by default those of the settings, and if
    these have none a slot for every token.
    """
    model, config, masks = planned.model, planned.config, planned.masks
    routing = config.routing if model.dynamic else None
    if routing is not Routing.CAPACITY:
        slots = None
    elif slots is None:
        slots = [config.capacities or (model.tokens,) * model.depth] * len(planned.plan.segments)
    subnets, segments = _subnets(planned, weights, slots)
    names = {name for each in subnets for name in (each.file, each.full_file) if name is not None}
    files = {WEIGHTS: NOTHING.model_copy(update={"bytes": (folder / WEIGHTS).stat().st_size})}
    sampling, costs = config.sampling(model), macs_costs(model)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model=model,
        sampling=SamplingEntry.of(
            sampling,
            sampling_run(model.diffusion, sampling, model.learn_sigma),
            guided_channels(model, config.cfg_channels),
        ),
        plan=PlanEntry(
            kind=config.plan,
            segments=segments,
            macs=plan_cost(planned.plan, masks, costs),
            per_step_macs=per_step_plan(masks, costs).cost,
            static_macs=len(masks) * costs.static,
        ),
        subnets=subnets,
        masks=tuple(map(pack_mask, masks)),
        unit_order=planned.order,
        routing=routing,
        precision=config.precision,
        max_batch=config.max_batch,
        weights=weights,
        files=files | dict.fromkeys((CONDITIONING, *sorted(names)), NOTHING),
        checkpoint_sha256=NOTHING.sha256,
        tools={"torch": torch.__version__},
    )
    return Bundle(folder, manifest)


def _subnets(
    planned: Planned, weights: dict[str, WeightEntry], slots: Sequence[tuple[int, ...]] | None
) -> tuple[tuple[SubnetEntry, ...], tuple[SegmentEntry, ...]]:
    """An entry for every distinct subnetwork, and the segments."""
    model, config, axis = planned.model, planned.config, planned.model.units
    wide, everything = config.plan is PlanKind.DYNAMIC_WIDTH, (model.tokens,) * model.depth
    entries: list[SubnetEntry] = []
    segments, known = [], {}
    for index, (first, end) in enumerate(planned.plan.segments):
        masks = planned.masks[first:end]
        union, capacities = masks.any(axis=0), None if slots is None else slots[index]
        differs = axis.any((masks != union).any(axis=0))
        key = (union.tobytes(), differs.tobytes(), capacities)
        if key not in known:
            name = f"subnet-{len(entries):04d}"
            file, full = (
                (DYNAMIC_WIDTH_GRAPH, DYNAMIC_WIDTH_FULL_GRAPH) if wide else (f"{name}.onnx", f"{name}-full.onnx")
            )
            units = axis.slots(union)
            known[key] = len(entries)
            entries.append(
                SubnetEntry(
                    file=file,
                    full_file=None if capacities in (None, everything) else full,
                    units=units,
                    gated=bool(differs.any()),
                    capacities=capacities,
                    weight_bytes=subnet_bytes(model, config.precision, weights, units, None),
                )
            )
        segments.append(SegmentEntry(first=first, count=end - first, subnet=known[key]))
    return tuple(entries), tuple(segments)


def static_form(bundle: Bundle) -> Bundle:
    """The static model on the weights of a bundle of its dynamic form: one subnetwork with everything, no routers."""
    manifest, model = bundle.manifest, bundle.manifest.model.without_routers()
    weights = {name: manifest.weights[name] for name in model.stored_shapes()}
    steps, every = manifest.sampling.steps, model.units.every_unit
    size = subnet_bytes(model, manifest.precision, weights, every, None)
    file = manifest.subnets[0].file
    values = {
        **{name: getattr(manifest, name) for name in type(manifest).model_fields},
        "model": model,
        "weights": weights,
        "plan": PlanEntry(
            kind=PlanKind.MAX_SUBNETS,
            segments=(SegmentEntry(first=0, count=steps, subnet=0),),
            **dict.fromkeys(("macs", "per_step_macs", "static_macs"), manifest.plan.static_macs),
        ),
        "subnets": (SubnetEntry(file=file, units=every, gated=False, weight_bytes=size),),
        "masks": (pack_mask(np.ones(model.units.size, bool)),) * steps,
        "routing": None,
    }
    return Bundle(bundle.path, Manifest(**values))
