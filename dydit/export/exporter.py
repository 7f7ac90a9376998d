"""`dydit export`: writes the bundle of a checkpoint. Masks, then plan, VAE decoder, weights, graphs, manifest."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import (
    CONDITIONING,
    DYNAMIC_WIDTH_FULL_GRAPH,
    DYNAMIC_WIDTH_GRAPH,
    MANIFEST,
    SCHEMA_VERSION,
    TEXT_GRAPH,
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
from dydit.bundle.measurements import Measured
from dydit.bundle.stored_weights import WEIGHTS, Precision, WeightEntry
from dydit.bundle.vae_entry import VaeEntry
from dydit.checkpoints.checkpoint import Checkpoint
from dydit.diffusion.coefficients import SamplingRun, sampling_run
from dydit.diffusion.samplers import SamplerConfig
from dydit.export.capacities import Capacities, segment_capacities
from dydit.export.input_scales import Scales, planned_smoothing, segment_scales, weight_copies
from dydit.export.settings import ExportConfig, guided_channels
from dydit.export.vae_graph import export_vae
from dydit.export.vae_model import VaeOptions
from dydit.export.weights import write_weights
from dydit.files import new_folder, require_absent, sha256_of, user_path
from dydit.graph.library import FunctionLibrary
from dydit.graph.saving import save_graph
from dydit.graph.sources import GatheredUnits, SolidWindows, WeightInputs, WeightSource, Windows
from dydit.graph.writer import SubnetSpec, subnet_graph
from dydit.models.architecture import Slots, UnitAxis
from dydit.models.config import ModelConfig
from dydit.models.registry import architecture_of
from dydit.planning.costs import macs_costs, measured_plan, time_costs
from dydit.planning.masks import activity_order, by_slot, freeze_masks
from dydit.planning.plan import Plan, budget_plan, merged_plan, per_step_plan, plan_cost
from dydit.planning.sizes import PlanSizes, fixed_bytes, subnet_bytes, unit_bytes
from dydit.quantization.smoothing import Smoothing

Progress = Callable[[int, int], None]


def export(
    checkpoint: Checkpoint,
    out: Path,
    config: ExportConfig,
    progress: Progress | None = None,
    measured: Measured | None = None,
) -> Bundle:
    """Write a bundle to the new folder `out`, complete or not at all. `progress(done, total)` counts segments.

    `measured` (`dydit.planning.profile`): with times, the plan minimizes time, otherwise multiply-adds; with a
    residency, the memory budget limits memory, otherwise bytes of weights. Raises `ConfigError` for settings that do
    not fit the model, `CalibrationError` for a calibration of something else, `OutputError` if `out` exists or cannot
    be written, and for a VAE decoder what `export_vae` raises.
    """
    out = user_path(out)
    require_absent(out)
    masks, order = _masks_and_order(checkpoint, config)
    plan = _make_plan(config, checkpoint.config, masks, measured or Measured())
    return export_planned(checkpoint, out, config, masks, plan, order, progress, measured)


def export_planned(
    checkpoint: Checkpoint,
    out: Path,
    config: ExportConfig,
    masks: np.ndarray,
    plan: Plan,
    order: Slots | None = None,
    progress: Progress | None = None,
    measured: Measured | None = None,
) -> Bundle:
    """`export` with given `masks`, bool [S, U] by slot, and `plan`.

    `order`: the checkpoint's unit in each slot; by default, unit i is in slot i. The kind of plan in `config` does not
    change `plan`. It decides whether there is one graph of dynamic width, whose capacities are then the same in all
    segments, and it is written to the manifest.
    """
    require_absent(out)
    job = _make_job(checkpoint, config, masks, plan, order, measured or Measured())
    with new_folder(out) as folder:
        options = VaeOptions(tile=config.vae_tile, scale=config.vae_scale, shift=config.vae_shift)
        vae = None if config.vae is None else export_vae(config.vae, folder, job.model, options)
        architecture = architecture_of(job.model)
        tensors = architecture.stored_tensors(checkpoint.state, job.model, job.order, job.smoothing)
        copies = weight_copies(job.model.units, masks, plan, job.input_scales)
        weights = write_weights(folder / WEIGHTS, tensors, job.model, config.precision, copies)
        conditioning = architecture.conditioning_graph(job.model, Windows(weights), job.precision, job.smoothing)
        save_graph(conditioning, folder / CONDITIONING)
        if job.model.text is not None:
            save_graph(architecture.text_graph(job.model, Windows(weights), job.precision), folder / TEXT_GRAPH)
        subnets = _write_subnets(folder, job, weights, progress)
        manifest = _manifest(folder, checkpoint, config, job, weights, subnets, vae)
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle.open(out, verify=False)


def planned_steps(checkpoint: Checkpoint, config: ExportConfig) -> tuple[np.ndarray, Plan]:
    """The masks of an export's steps, bool [S, U] by slot, and its plan, if nothing is measured for it."""
    masks, _ = _masks_and_order(checkpoint, config)
    return masks, _make_plan(config, checkpoint.config, masks, Measured())


def _masks_and_order(checkpoint: Checkpoint, config: ExportConfig) -> tuple[np.ndarray, Slots]:
    model = checkpoint.config
    times = config.sampling(model).times(model.diffusion)
    masks = freeze_masks(checkpoint.width_router_model(), times)
    order = activity_order(masks, model.units)
    return by_slot(masks, model.units, order), order


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Everything that follows from the settings for one model, before anything is written."""

    model: ModelConfig
    sampling: SamplerConfig
    run: SamplingRun
    order: Slots  # the checkpoint's unit in each slot
    masks: np.ndarray  # bool [S, U] by slot, in the order of execution
    plan: Plan
    measured: Measured
    dynamic_width: bool
    routing: Routing | None
    capacities: tuple[Capacities, ...] | None  # of each segment
    cfg_channels: int
    precision: Precision
    input_scales: tuple[Scales, ...] | None  # of each segment
    smoothing: Smoothing | None


def _make_job(
    checkpoint: Checkpoint,
    config: ExportConfig,
    masks: np.ndarray,
    plan: Plan,
    order: Slots | None,
    measured: Measured,
) -> _Job:
    model = checkpoint.config.stating(config.space, config.vae is not None)
    sampling = config.sampling(model)
    return _Job(
        model=model,
        sampling=sampling,
        run=sampling_run(model.diffusion, sampling, model.learn_sigma),
        order=model.units.every_unit if order is None else order,
        masks=masks,
        plan=plan,
        measured=measured,
        dynamic_width=config.plan is PlanKind.DYNAMIC_WIDTH,
        routing=config.routing if model.dynamic else None,
        capacities=segment_capacities(checkpoint, config, masks, plan),
        cfg_channels=guided_channels(model, config.cfg_channels),
        precision=config.precision,
        input_scales=segment_scales(checkpoint, config, masks, plan),
        smoothing=planned_smoothing(model, config),
    )


def _make_plan(config: ExportConfig, model: ModelConfig, masks: np.ndarray, measured: Measured) -> Plan:
    costs = macs_costs(model) if measured.times is None else time_costs(measured.times, model)
    if config.plan in (PlanKind.PER_STEP, PlanKind.DYNAMIC_WIDTH):
        return per_step_plan(masks, costs)
    if config.plan is PlanKind.MAX_SUBNETS:
        return merged_plan(masks, costs, config.max_subnets)
    assert config.memory_budget is not None
    sizes, residency = _plan_sizes(model, config.precision, masks), measured.residency

    def needed(plan: Plan) -> int:
        return sizes.weights(plan) if residency is None else sizes.resident(plan, residency)

    return budget_plan(masks, costs, needed, config.memory_budget)


def _plan_sizes(model: ModelConfig, precision: Precision, masks: np.ndarray) -> PlanSizes:
    return PlanSizes(model.units, masks, unit_bytes(model, precision), fixed_bytes(model, precision))


def _write_subnets(
    folder: Path, job: _Job, weights: dict[str, WeightEntry], progress: Progress | None
) -> tuple[list[SubnetEntry], list[SegmentEntry]]:
    """Write a graph for every distinct subnetwork, or one graph of dynamic width for all of them."""
    library = FunctionLibrary(job.model, job.cfg_channels, job.precision)
    entries: list[SubnetEntry] = []
    segments: list[SegmentEntry] = []
    known: dict[SubnetSpec, int] = {}
    shared = _write_dynamic_width(folder, job, library, weights) if job.dynamic_width else None
    gathered = GatheredUnits(folder / WEIGHTS)

    def source() -> WeightSource:
        return SolidWindows(weights, gathered) if job.precision.is_calibrated else Windows(weights)

    gc.freeze()  # graphs are cyclic garbage; without this, each collection walks over all objects of PyTorch
    try:
        for done, (first, end) in enumerate(job.plan.segments):
            capacities = None if job.capacities is None else job.capacities[done]
            scales = None if job.input_scales is None else job.input_scales[done]
            spec = segment_spec(job.model.units, job.masks[first:end], job.routing, capacities, scales)
            if spec not in known:
                known[spec] = len(entries)
                name = f"subnet-{len(entries):04d}"
                files = shared or _write_graphs(
                    folder, (f"{name}.onnx", f"{name}-full.onnx"), spec, job, library, source
                )
                entries.append(_subnet_entry(files, spec, job, weights))
            segments.append(SegmentEntry(first=first, count=end - first, subnet=known[spec]))
            if progress:
                progress(done + 1, len(job.plan.segments))
    finally:
        gc.unfreeze()
    return entries, segments


def segment_spec(
    axis: UnitAxis,
    masks: np.ndarray,
    routing: Routing | None,
    capacities: tuple[int, ...] | None,
    input_scales: Scales | None = None,
) -> SubnetSpec:
    """The subnetwork for the union of the `masks`, bool [steps, U]. Parts in which the steps differ are gated."""
    union = np.asarray(masks.any(axis=0))
    differs = axis.any((masks != union).any(axis=0))  # [P]
    gated = frozenset((part.block, part.index) for part, each in zip(axis.parts, differs, strict=True) if each)
    return SubnetSpec(axis.slots(union), gated, routing, capacities, input_scales)


def _write_dynamic_width(
    folder: Path, job: _Job, library: FunctionLibrary, weights: dict[str, WeightEntry]
) -> tuple[str, str | None]:
    """Write the graph that serves every width."""
    capacities = None if job.capacities is None else job.capacities[0]  # all segments have the same
    spec = SubnetSpec(job.model.units.every_unit, frozenset(), job.routing, capacities)
    names = DYNAMIC_WIDTH_GRAPH, DYNAMIC_WIDTH_FULL_GRAPH
    return _write_graphs(folder, names, spec, job, library, lambda: WeightInputs(weights))


def _write_graphs(
    folder: Path,
    names: tuple[str, str],
    spec: SubnetSpec,
    job: _Job,
    library: FunctionLibrary,
    weights: Callable[[], WeightSource],
) -> tuple[str, str | None]:
    """Write a subnetwork's graph under the first name. If tokens can overflow, write its full form under the second."""
    save_graph(subnet_graph(job.model, spec, library, weights()), folder / names[0])
    everything = (job.model.tokens,) * job.model.depth
    if spec.capacities in (None, everything):
        return names[0], None
    full = dataclasses.replace(spec, capacities=everything)
    save_graph(subnet_graph(job.model, full, library, weights()), folder / names[1])
    return names


def _subnet_entry(
    files: tuple[str, str | None], spec: SubnetSpec, job: _Job, weights: dict[str, WeightEntry]
) -> SubnetEntry:
    fp16_layers = spec.fp16_layers(job.model.units.layer_names)
    return SubnetEntry(
        file=files[0],
        full_file=files[1],
        units=spec.units,
        gated=bool(spec.gated),
        capacities=spec.capacities,
        weight_bytes=subnet_bytes(job.model, job.precision, weights, spec.units, fp16_layers),
        fp16_layers=fp16_layers,
    )


def _plan_entry(kind: PlanKind, job: _Job, segments: list[SegmentEntry]) -> PlanEntry:
    macs, sizes = macs_costs(job.model), _plan_sizes(job.model, job.precision, job.masks)
    return PlanEntry(
        kind=kind,
        segments=tuple(segments),
        macs=plan_cost(job.plan, job.masks, macs),
        per_step_macs=per_step_plan(job.masks, macs).cost,
        static_macs=len(job.masks) * macs.static,
        measured=measured_plan(job.plan, job.masks, job.model, sizes, job.measured),
    )


def _manifest(
    folder: Path,
    checkpoint: Checkpoint,
    config: ExportConfig,
    job: _Job,
    weights: dict[str, WeightEntry],
    written: tuple[list[SubnetEntry], list[SegmentEntry]],
    vae: VaeEntry | None,
) -> Manifest:
    subnets, segments = written
    files = sorted(file for file in folder.iterdir() if file.is_file())
    packages = ("dydit", "numpy", "onnx", "onnx-ir", "torch", *(() if vae is None else ("diffusers",)))
    return Manifest(
        schema_version=SCHEMA_VERSION,
        model=job.model,
        sampling=SamplingEntry.of(job.sampling, job.run, job.cfg_channels),
        plan=_plan_entry(config.plan, job, segments),
        subnets=tuple(subnets),
        masks=tuple(pack_mask(mask) for mask in job.masks),
        unit_order=job.order,
        routing=job.routing,
        precision=config.precision,
        max_batch=config.max_batch,
        weights=weights,
        files={file.name: FileEntry(bytes=file.stat().st_size, sha256=sha256_of(file)) for file in files},
        checkpoint_sha256=checkpoint.sha256,
        tools={package: version(package) for package in packages},
        vae=vae,
        smoothing=job.smoothing,
    )


def stale_reasons(manifest: Manifest, checkpoint: Checkpoint) -> list[str]:
    """Why a bundle is stale, that is, not an export of this checkpoint; empty if it is not stale."""
    reasons = []
    if manifest.checkpoint_sha256 != checkpoint.sha256:
        reasons.append(f"the weights changed: the bundle was not exported from {checkpoint.path} as it is now")
    if manifest.model.sizes != checkpoint.config.sizes:
        reasons.append("the architecture differs")
    ours, theirs = manifest.model.diffusion, checkpoint.config.diffusion
    if ours != theirs:
        reasons.append(f"the training differs: {ours.words} in the bundle, {theirs.words} in the checkpoint")
    return reasons
