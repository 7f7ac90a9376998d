"""`dydit export`: a checkpoint becomes a bundle. Masks, then plan, weights, graphs, manifest, into one new folder."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from pydantic import Field, model_validator

from dydit.bundle.bundle import Bundle
from dydit.bundle.graph_io import GROUP_WEIGHTS, HEAD_WEIGHTS
from dydit.bundle.manifest import (
    CONDITIONING,
    MANIFEST,
    SCHEMA_VERSION,
    SLIDING,
    SLIDING_FULL,
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
from dydit.bundle.stored import ITEM_BYTES, WEIGHTS, Precision, WeightEntry
from dydit.bundle.vae import VaeEntry
from dydit.calibrate.activations import ActivationRanges, require_segments
from dydit.calibrate.file import Calibration
from dydit.diffusion.coefficients import step_coefficients
from dydit.diffusion.schedule import TRAIN_STEPS, Sampler, Schedule
from dydit.errors import ConfigError
from dydit.export.capacities import Capacities, calibrated_capacities, uniform_capacities
from dydit.export.graph import (
    GatheredUnits,
    SolidWindows,
    SubnetSpec,
    WeightInputs,
    WeightSource,
    Windows,
    conditioning_graph,
    save_graph,
    subnet_graph,
)
from dydit.export.library import FunctionLibrary
from dydit.export.masks import activity_order, by_slot, freeze_masks
from dydit.export.plan import Plan, budget_plan, merged_plan, per_step_plan
from dydit.export.vae import export_vae
from dydit.export.weights import write_weights
from dydit.files import new_folder, require_absent, sha256_of
from dydit.models.checkpoint import Checkpoint
from dydit.models.config import ModelConfig, Strict
from dydit.models.cost import unit_costs
from dydit.models.layout import stored_tensors

Progress = Callable[[int, int], None]
LARGEST = {Precision.INT8_STATIC: 127.0, Precision.FP8: 448.0}
GUIDED_CHANNELS = 3  # what the reference guides by default


class ExportConfig(Strict):
    """What to make of a checkpoint.

    `max_subnets` counts for `PlanKind.MAX_SUBNETS`, `memory_budget` (bytes) for `PlanKind.MEMORY_BUDGET`.
    `cfg_channels`: latent channels that guidance acts on, by default the first 3. For capacity routing, `capacities`:
    MLP token slots of a row, by block, or `calibration`, which has those of each segment; all tokens by default.
    `activations`: of this plan's segments, the ranges of what enters linear layers, which int8-static and fp8 need.
    `vae`, `vae_tile`: the decoder to add, as `dydit.export.vae.export_vae` takes them.
    """

    steps: int = Field(default=250, ge=1, le=TRAIN_STEPS)
    sampler: Sampler = Sampler.DDPM
    plan: PlanKind = PlanKind.MAX_SUBNETS
    max_subnets: int = Field(default=32, ge=1)
    memory_budget: int | None = Field(default=None, gt=0)
    routing: Routing = Routing.DYNAMIC
    precision: Precision = Precision.FP32
    max_batch: int = Field(default=16, ge=1)
    cfg_channels: int | None = Field(default=None, ge=1)
    capacities: tuple[int, ...] | None = None
    calibration: Calibration | None = None
    activations: ActivationRanges | None = None
    vae: str | None = Field(default=None, min_length=1)
    vae_tile: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> ExportConfig:
        if (self.plan is PlanKind.MEMORY_BUDGET) != (self.memory_budget is not None):
            raise ValueError("a memory budget goes with the memory-budget plan, and only with it")
        if self.capacities is not None and self.routing is not Routing.CAPACITY:
            raise ValueError("capacities go with capacity routing only")
        if self.calibration is not None and self.routing is not Routing.CAPACITY:
            raise ValueError("a calibration goes with capacity routing only")
        if self.calibration is not None and self.capacities is not None:
            raise ValueError("capacities come from a calibration or are given, not both")
        if self.precision.in_8_bits and self.plan is PlanKind.SLIDING:
            raise ValueError(
                f"a sliding plan has its weights as inputs, which are not packed for {self.precision}; use another plan"
            )
        if self.precision.is_calibrated and self.activations is None:
            raise ValueError(f"{self.precision} needs calibrated activations: make them with `dydit calibrate`")
        if self.activations is not None and not self.precision.is_calibrated:
            raise ValueError(f"calibrated activations go with int8-static and fp8, not with {self.precision}")
        if self.vae_tile is not None and self.vae is None:
            raise ValueError("a tile goes with a VAE decoder only")
        return self


def export(checkpoint: Checkpoint, out: Path, config: ExportConfig, progress: Progress | None = None) -> Bundle:
    """Write a bundle to the new folder `out`, complete or not at all; `progress(done, total)` counts graphs.

    Raises `ConfigError` for settings that do not fit the model, `CalibrationError` for a calibration of something else,
    `OutputError` where `out` exists or cannot be written,
    and for a VAE decoder what `export_vae` does.
    """
    require_absent(out)
    job = _plan_job(checkpoint, config)
    with new_folder(out) as folder:
        vae = None if config.vae is None else export_vae(config.vae, folder, job.model, config.vae_tile)
        head_order, group_order = job.order[:, 0].tolist(), job.order[:, 1].tolist()
        tensors = stored_tensors(checkpoint.state, job.model, head_order, group_order)
        weights = write_weights(folder / WEIGHTS, tensors, config.precision)
        save_graph(conditioning_graph(job.model, Windows(weights), config.precision), folder / CONDITIONING)
        subnets = _write_subnets(folder, job, weights, progress)
        manifest = _manifest(folder, checkpoint, config, job, weights, subnets, vae)
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle.open(out, verify=False)


def planned_steps(checkpoint: Checkpoint, config: ExportConfig) -> tuple[np.ndarray, Plan]:
    """What an export would run: the width masks bool [S, L, 2, H] of its steps, by slot, and its plan."""
    job = _plan_job(checkpoint, config)
    return job.masks, job.plan


@dataclass(frozen=True)
class _Job:
    """What the settings come to for one model, before anything is written."""

    model: ModelConfig
    schedule: Schedule
    order: np.ndarray  # [L, 2, H] checkpoint unit of each slot
    masks: np.ndarray  # [S, L, 2, H] by slot, execution order
    costs: np.ndarray  # [L, 2, H] multiply-adds a step
    plan: Plan
    sliding: bool
    routing: Routing | None
    capacities: tuple[Capacities, ...] | None  # of each segment
    cfg_channels: int
    precision: Precision
    input_scales: list[tuple[tuple[float, ...], ...]] | None


def _plan_job(checkpoint: Checkpoint, config: ExportConfig) -> _Job:
    model = checkpoint.config
    cfg_channels = min(GUIDED_CHANNELS, model.in_channels) if config.cfg_channels is None else config.cfg_channels
    if cfg_channels > model.in_channels:
        raise ConfigError(f"guidance on {cfg_channels} channels, but the model has {model.in_channels}")
    schedule = Schedule.respaced(config.steps)
    masks = freeze_masks(checkpoint.width_routers(), schedule.timesteps[::-1])
    order = activity_order(masks)
    masks = by_slot(masks, order)
    costs = unit_costs(model)
    routing = config.routing if model.dynamic else None
    plan, sliding = _make_plan(config, model, masks, costs), config.plan is PlanKind.SLIDING
    capacities = None
    if config.calibration is not None:
        capacities = calibrated_capacities(checkpoint, config.sampler, masks, plan, config.calibration, sliding)
    elif routing is Routing.CAPACITY:
        capacities = uniform_capacities(model, plan, config.capacities)
    scales = None
    if config.activations is not None:
        require_segments(config.activations, len(plan.segments), model.depth)
        scales = config.activations.input_scales(LARGEST[config.precision])
    return _Job(
        model, schedule, order, masks, costs, plan, sliding, routing, capacities, cfg_channels, config.precision, scales
    )


def _make_plan(config: ExportConfig, model: ModelConfig, masks: np.ndarray, costs: np.ndarray) -> Plan:
    if config.plan in (PlanKind.PER_STEP, PlanKind.SLIDING):
        return per_step_plan(masks, costs)
    if config.plan is PlanKind.MAX_SUBNETS:
        return merged_plan(masks, costs, config.max_subnets)
    assert config.memory_budget is not None
    return budget_plan(
        masks, costs, unit_bytes(model, config.precision), fixed_bytes(model, config.precision), config.memory_budget
    )


def unit_bytes(model: ModelConfig, precision: Precision = Precision.FP32) -> np.ndarray:
    """Bytes of one head's and one group's weights, [L, 2, H] float64."""
    d, hd, gs = model.hidden_size, model.head_dim, model.group_dim
    item, added = ITEM_BYTES[precision.weight_dtype], _channel_bytes(precision)
    sizes = np.empty((model.depth, 2, model.num_heads))
    sizes[:, 0], sizes[:, 1] = item * 4 * hd * d + added * 3 * hd, item * 2 * gs * d + added * gs
    return sizes


def _channel_bytes(precision: Precision) -> int:
    """Bytes of an output channel's bias, and of its scale with 8 bits."""
    return ITEM_BYTES[precision.dtype] + (4 if precision.in_8_bits else 0)


def fixed_bytes(model: ModelConfig, precision: Precision = Precision.FP32) -> int:
    """Bytes of the weights that every subnetwork reads at any width: embedding, routers, final layer, biases."""
    d, p2 = model.hidden_size, model.patch_size**2
    r = model.token_router_hidden
    router = (r * d + 2 * r + 1) if model.dynamic else 0
    embed = (p2 * model.in_channels + 1 + model.tokens) * d
    final = p2 * model.out_channels * (d + 1)
    biases = 2 * d * _channel_bytes(precision)
    return 4 * (embed + final + model.depth * router) + model.depth * biases


def _write_subnets(
    folder: Path, job: _Job, weights: dict[str, WeightEntry], progress: Progress | None
) -> tuple[list[SubnetEntry], list[SegmentEntry]]:
    """Write a graph for every distinct subnetwork, or one for all; segments with the same one share it."""
    library = FunctionLibrary(job.model, job.cfg_channels, job.precision)
    entries: list[SubnetEntry] = []
    segments: list[SegmentEntry] = []
    known: dict[SubnetSpec, int] = {}
    shared = _write_sliding(folder, job, library, weights) if job.sliding else None
    gathered = GatheredUnits(folder / WEIGHTS)

    def source() -> WeightSource:
        return SolidWindows(weights, gathered) if job.precision.is_calibrated else Windows(weights)

    gc.freeze()  # graphs are cyclic garbage; without this, collecting them walks all of PyTorch's objects each time
    try:
        for done, (first, end) in enumerate(job.plan.segments):
            capacities = None if job.capacities is None else job.capacities[done]
            scales = None if job.input_scales is None else job.input_scales[done]
            spec = segment_spec(job.masks[first:end], job.routing, capacities, scales)
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
    masks: np.ndarray,
    routing: Routing | None,
    capacities: tuple[int, ...] | None,
    input_scales: tuple[tuple[float, ...], ...] | None = None,
) -> SubnetSpec:
    """The subnetwork for the union of the masks [steps, L, 2, H]; parts that the steps do not share are gated."""
    union = np.asarray(masks.any(axis=0))
    differs = np.asarray((masks != union).any(axis=(0, 3)))  # [L, 2]
    slots = [[tuple(map(int, np.flatnonzero(units))) for units in union[:, part]] for part in (0, 1)]
    gated = frozenset((int(block), int(part)) for block, part in np.argwhere(differs))
    return SubnetSpec(tuple(slots[0]), tuple(slots[1]), gated, routing, capacities, input_scales)


def _write_sliding(
    folder: Path, job: _Job, library: FunctionLibrary, weights: dict[str, WeightEntry]
) -> tuple[str, str | None]:
    """Write the graph that serves every width."""
    every = (tuple(range(job.model.num_heads)),) * job.model.depth
    capacities = None if job.capacities is None else job.capacities[0]  # those of all segments
    spec = SubnetSpec(every, every, frozenset(), job.routing, capacities)
    return _write_graphs(folder, (SLIDING, SLIDING_FULL), spec, job, library, lambda: WeightInputs(weights))


def _write_graphs(
    folder: Path,
    names: tuple[str, str],
    spec: SubnetSpec,
    job: _Job,
    library: FunctionLibrary,
    weights: Callable[[], WeightSource],
) -> tuple[str, str | None]:
    """Write a subnetwork's graph under the first name and, where tokens may not fit, its full form under the second."""
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
    units = len(job.order[0, 0])
    used = sum(
        weights[f"blocks.{block}.{part}"].nbytes // units * len(slots[block])
        for slots, parts in ((spec.heads, (*HEAD_WEIGHTS, "qkv.scale")), (spec.groups, (*GROUP_WEIGHTS, "fc1.scale")))
        for block in range(job.model.depth)
        for part in parts
        if f"blocks.{block}.{part}" in weights  # scales are there with 8 bits only
    )
    return SubnetEntry(
        file=files[0],
        full_file=files[1],
        heads=spec.heads,
        groups=spec.groups,
        gated=bool(spec.gated),
        capacities=spec.capacities,
        weight_bytes=used + fixed_bytes(job.model, job.precision),
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
    coefficients = step_coefficients(job.schedule, config.sampler, job.model.learn_sigma).astype(np.float32)
    files = sorted(file for file in folder.iterdir() if file.is_file())
    packages = ("dydit", "numpy", "onnx", "onnx-ir", "torch", *(() if vae is None else ("diffusers",)))
    return Manifest(
        schema_version=SCHEMA_VERSION,
        model=job.model,
        sampling=SamplingEntry(
            sampler=config.sampler,
            timesteps=tuple(job.schedule.timesteps[::-1].tolist()),
            coefficients=tuple(tuple(row) for row in coefficients.tolist()),
            cfg_channels=job.cfg_channels,
        ),
        plan=PlanEntry(
            kind=config.plan,
            segments=tuple(segments),
            macs=job.plan.cost,
            per_step_macs=float((job.masks * job.costs).sum()),
            static_macs=float(job.costs.sum() * config.steps),
        ),
        subnets=tuple(subnets),
        masks=tuple(pack_mask(mask) for mask in job.masks),
        head_order=tuple(map(tuple, job.order[:, 0].tolist())),
        group_order=tuple(map(tuple, job.order[:, 1].tolist())),
        routing=job.routing,
        precision=config.precision,
        max_batch=config.max_batch,
        weights=weights,
        files={file.name: FileEntry(bytes=file.stat().st_size, sha256=sha256_of(file)) for file in files},
        checkpoint_sha256=checkpoint.sha256,
        tools={package: version(package) for package in packages},
        vae=vae,
    )


def stale_reasons(manifest: Manifest, checkpoint: Checkpoint) -> list[str]:
    """Why a bundle no longer stands for a checkpoint; empty where it does."""
    reasons = []
    if manifest.checkpoint_sha256 != checkpoint.sha256:
        reasons.append(f"the weights changed: {checkpoint.path} is not the file that the bundle was exported from")
    if json.dumps(manifest.model.model_dump(mode="json")) != json.dumps(checkpoint.config.model_dump(mode="json")):
        reasons.append("the architecture differs")
    return reasons
