"""Other sampling steps for a bundle that exists: the masks of any timesteps follow from its stored width routers.

    stored routers, new times -> masks -> a segment at every change of the mask -> a manifest in memory

The graph of dynamic width takes the weights of each step as inputs, so it serves any mask. A static model has one
subnetwork, which serves every step. Subnetworks of a dynamic model were made for the masks of their own steps; they
serve another sampler only if that visits the same timesteps. Nothing is written: the files of the bundle stay as they
are. NumPy only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dydit.bundle.advice import sampler_words
from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import (
    Manifest,
    PlanEntry,
    SamplingEntry,
    SegmentEntry,
    SubnetEntry,
    pack_mask,
)
from dydit.diffusion.coefficients import sampling_run
from dydit.diffusion.samplers import SamplerChoice, SamplerConfig
from dydit.errors import ConfigError
from dydit.models.architecture import WIDTH_ROUTER
from dydit.models.registry import architecture_of
from dydit.planning.costs import macs_costs
from dydit.planning.plan import Plan, per_step_plan, plan_cost
from dydit.planning.sizes import subnet_bytes
from dydit.words import counted


def resampled(bundle: Bundle, choice: SamplerChoice) -> Bundle:
    """The bundle with some settings of its run changed. Raises `ConfigError` as `with_run` does."""
    return with_run(bundle, choice.over(bundle.manifest.sampling.config))


def with_run(bundle: Bundle, config: SamplerConfig) -> Bundle:
    """The bundle with other steps or another sampler than those that it was exported with.

    Raises `ConfigError` if its subnetworks cannot serve them, or if the sampler does not fit the model.
    """
    manifest = bundle.manifest
    own, model = manifest.sampling, manifest.model
    if config == own.config:
        return bundle
    run = sampling_run(model.diffusion, config, model.learn_sigma)
    sampling = SamplingEntry.of(config, run, own.cfg_channels)
    if sampling.timesteps == own.timesteps:
        return _with(bundle, sampling=sampling)
    if model.dynamic and not manifest.dynamic_width:
        raise ConfigError(
            f"this bundle has {counted(len(manifest.subnets), 'subnetwork')} made for {own.config.words}, which cannot "
            f"run {config.words}; export again with --dynamic-width to choose steps when sampling, or with "
            f"{' '.join(sampler_words(config))}"
        )
    masks = step_masks(bundle, run.times)
    macs = macs_costs(model)
    exact = per_step_plan(masks, macs)
    subnets, segments = _entries(manifest, masks, exact)
    plan = PlanEntry(
        kind=manifest.plan.kind,
        segments=segments,
        macs=plan_cost(exact, masks, macs),
        per_step_macs=exact.cost,
        static_macs=len(masks) * macs.static,
    )
    return _with(bundle, sampling=sampling, plan=plan, subnets=subnets, masks=tuple(map(pack_mask, masks)))


def step_masks(bundle: Bundle, times: np.ndarray) -> np.ndarray:
    """The width masks at the model's own `times` [S], by slot, bool [S, U]. A static model has everything on.

    Logits are computed in float64, so that every machine decides alike.
    """
    model = bundle.manifest.model
    if not model.dynamic:
        return np.ones((len(times), model.units.size), bool)
    weights = {name: bundle.weight(name) for name in bundle.manifest.weights if model.is_conditioning(name)}
    weight, bias = (np.asarray(weights[name], np.float64) for name in WIDTH_ROUTER)
    logits = architecture_of(model).timestep_embedding(model, weights, times) @ weight.T + bias
    return np.asarray(logits > 0)


def _entries(
    manifest: Manifest, masks: np.ndarray, exact: Plan
) -> tuple[tuple[SubnetEntry, ...], tuple[SegmentEntry, ...]]:
    """The subnetworks of the masks, bool [S, U], and the segments that run on them, one at every change of the mask."""
    model, graph = manifest.model, manifest.subnets[0]
    known: dict[bytes, int] = {}
    subnets: list[SubnetEntry] = []
    segments = []
    for first, end in exact.segments:
        mask = masks[first]
        if mask.tobytes() not in known:
            known[mask.tobytes()] = len(subnets)
            slots = model.units.slots(mask)
            size = subnet_bytes(model, manifest.precision, manifest.weights, slots, graph.fp16_layers)
            subnets.append(graph.model_copy(update={"units": slots, "weight_bytes": size}))
        segments.append(SegmentEntry(first=first, count=end - first, subnet=known[mask.tobytes()]))
    return tuple(subnets), tuple(segments)


def _with(bundle: Bundle, **changes: Any) -> Bundle:
    """The bundle with another manifest, whose digest tells it apart."""
    values = {name: getattr(bundle.manifest, name) for name in Manifest.model_fields} | changes
    manifest = Manifest(**values)
    manifest = manifest.model_copy(update={"digest": manifest.compute_digest()})
    return dataclasses.replace(bundle, manifest=manifest)
