"""`dydit inspect`: the contents of a checkpoint or a bundle: sizes, routers, cost, masks over time, plan.

Facts are plain data (`to_json`), which `text` formats for a terminal and `pictures` draws. Only the width routers of a
checkpoint are run. Inspecting a bundle needs neither PyTorch nor ONNX.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import MANIFEST, Manifest, Routing
from dydit.bundle.measurements import StepTimes
from dydit.bundle.stored_weights import fp16_name
from dydit.bundle.vae_entry import VAE_DECODER, VAE_WEIGHTS
from dydit.errors import CheckpointError, ConfigError
from dydit.files import user_path, write_atomic
from dydit.inspection.gpus import GPUS, Gpu
from dydit.inspection.roofline import bundle_roofline, model_roofline
from dydit.models.architecture import WIDTH_ROUTER
from dydit.models.config import ModelConfig, Routers
from dydit.models.macs import unit_costs
from dydit.models.registry import architecture_of, published
from dydit.planning.costs import macs_costs, time_costs
from dydit.planning.executed import layers_in_16_bits
from dydit.planning.plan import Plan, optimal_plans, per_step_plan, segment_costs
from dydit.planning.sizes import PlanSizes, fixed_bytes
from dydit.reports.inspection_facts import (
    BundleFacts,
    CheckpointFacts,
    DecoderFacts,
    ModelFacts,
    PlanRow,
    PresetFacts,
    SegmentFacts,
    SubnetFacts,
    WidthFacts,
    bundle_text,
    checkpoint_text,
    preset_text,
)
from dydit.reports.plots import plan_png
from dydit.reports.plots_masks import masks_png
from dydit.reports.roofline import RooflineFacts, roofline_text


@dataclass(frozen=True)
class Inspection:
    """Facts, and the masks that they were computed from, bool [S, U] by unit of the checkpoint, at `timesteps`.

    `roofline`: the least times of a step on a GPU, if they were asked for. A preset has no masks (S = 0).
    """

    facts: CheckpointFacts | BundleFacts | PresetFacts
    masks: np.ndarray
    timesteps: tuple[float, ...]
    roofline: RooflineFacts | None = None

    def pictures(self) -> dict[str, bytes]:
        """PNG files by name. A static model has none, and a preset has none."""
        if isinstance(self.facts, PresetFacts) or not self.facts.model.config.dynamic:
            return {}
        pictures = {"masks.png": masks_png(self.masks, self.facts.model.config.units, self.timesteps)}
        if isinstance(self.facts, BundleFacts):
            measured, rows, chosen = self.facts.measured, self.facts.plans, self.facts.chosen
            if measured is not None and measured.per_step_ms and measured.static_ms:
                pictures["plan.png"] = plan_png(rows, chosen, measured.per_step_ms, measured.static_ms, timed=True)
            else:
                static = self.facts.model.block_macs * float(self.facts.width.steps)
                pictures["plan.png"] = plan_png(rows, chosen, self.facts.width.flops_ratio * static, static)
        return pictures

    def text(self) -> str:
        """For a terminal: aligned columns, lines of at most about 100 characters."""
        if isinstance(self.facts, PresetFacts):
            text = preset_text(self.facts)
        else:
            text = bundle_text(self.facts) if isinstance(self.facts, BundleFacts) else checkpoint_text(self.facts)
        return text if self.roofline is None else f"{text}\n\n{roofline_text(self.roofline)}"

    def write_pictures(self, out: Path) -> list[Path]:
        """Write the pictures into the folder `out`, where they replace those of the same name; returns their paths."""
        paths = []
        for name, data in self.pictures().items():
            write_atomic(out / name, data)
            paths.append(out / name)
        return paths

    def to_json(self) -> dict[str, object]:
        """The facts as plain data, and `roofline` if there is one."""
        return self.facts.to_json() | ({} if self.roofline is None else {"roofline": self.roofline.to_json()})


def inspect(path: Path | str, roofline: str | None = None, **reading: Any) -> Inspection:
    """Inspect a bundle if `path` is a folder with a manifest, else a checkpoint (`reading`: see below).

    `roofline`: the name of a GPU, for which the least times of a step are added. Raises `ConfigError`, which lists the
    known GPUs, for another name, and for a precision that the GPU does not have.
    """
    path = user_path(path)
    if (path / MANIFEST).exists():
        return inspect_bundle(path, roofline)
    return inspect_checkpoint(path, roofline=roofline, **reading)


def inspect_preset(name: str, roofline: str | None = None) -> Inspection:
    """Inspect the static model of a preset, such as `DiT-XL/2`, which has no weights.

    Raises `ConfigError`, which lists the presets, for another name. `roofline`: as in `inspect`.
    """
    config = published(name).without_routers()
    parameters = {key: math.prod(shape) for key, shape in config.stored_shapes().items() if key not in config.derived}
    model = _model_facts(config, sum(parameters.values()), 0)
    table = None if roofline is None else model_roofline(config, None, _gpu(roofline))
    return Inspection(PresetFacts(name=name, model=model), np.zeros((0, config.units.size), bool), (), table)


def inspect_checkpoint(
    path: Path | str, steps: int | None = None, roofline: str | None = None, **reading: Any
) -> Inspection:
    """Inspect a checkpoint of any known format. Its width masks are those of a run of `steps` steps.

    `steps`: by default the usual number for the model. `reading`: options of `load_checkpoint`. `roofline`: as in
    `inspect`. Raises `CheckpointError` as `load_checkpoint` does.
    """
    gpu = None if roofline is None else _gpu(roofline)
    try:
        from dydit.checkpoints.checkpoint import load_checkpoint
        from dydit.planning.masks import freeze_masks
        from dydit.planning.sizes import fixed_bytes, unit_bytes
    except ImportError as error:
        raise CheckpointError(f"reading a checkpoint needs {error.name}: pip install 'dydit[export]'") from error
    checkpoint = load_checkpoint(path, **reading)
    config = checkpoint.config
    run = config.usual_run
    timesteps = (run if steps is None else run.model_copy(update={"steps": steps})).times(config.diffusion)
    masks = freeze_masks(checkpoint.width_router_model(), timesteps)
    is_router = architecture_of(config).is_router
    parameters = {name: tensor.numel() for name, tensor in checkpoint.state.items()}
    model = _model_facts(config, sum(parameters.values()), sum(n for name, n in parameters.items() if is_router(name)))
    sizes = PlanSizes(config.units, masks, unit_bytes(config), fixed_bytes(config))
    facts = CheckpointFacts(
        path=str(path),
        format=checkpoint.source,
        sha256=checkpoint.sha256,
        file_bytes=_size_of(user_path(path)),
        metadata=checkpoint.metadata,
        notes=checkpoint.notes,
        model=model,
        width=_width_facts(masks, config),
        plans=_rows(masks, config, sizes, None),
    )
    table = None if gpu is None else model_roofline(config, masks, gpu)
    return Inspection(facts, masks, tuple(timesteps.tolist()), table)


def inspect_bundle(path: Path | str, roofline: str | None = None) -> Inspection:
    """Inspect a bundle, after its files have been verified by their hashes.

    Raises `BundleError` as `Bundle.open` does. `roofline`: as in `inspect`.
    """
    gpu = None if roofline is None else _gpu(roofline)
    bundle = Bundle.open(path)
    manifest, config = bundle.manifest, bundle.manifest.model
    table = None if gpu is None else bundle_roofline(manifest, gpu)
    masks = manifest.checkpoint_masks()
    unit_sizes = _unit_bytes(manifest)
    subnets = tuple(_subnet_facts(manifest, index) for index in range(len(manifest.subnets)))
    fixed = fixed_bytes(config, manifest.precision)
    measured, (layers, in_16_bits) = manifest.plan.measured, layers_in_16_bits(manifest)
    plans = _rows(
        masks, config, PlanSizes(config.units, masks, unit_sizes, fixed), measured.times if measured else None
    )
    dense = int(unit_sizes.sum()) + fixed
    loaded = dense if manifest.dynamic_width else sum(entry.weight_bytes for entry in manifest.subnets)
    chosen = PlanRow(
        segments=len(manifest.plan.segments),
        subnets=len(manifest.subnets),
        macs=manifest.plan.macs,
        versus_exact=manifest.plan.macs / manifest.plan.per_step_macs,
        versus_static=manifest.plan.macs / manifest.plan.static_macs,
        weight_bytes=loaded,
        ms=measured.ms if measured else None,
    )
    stored = sum(entry.nbytes for entry in manifest.weights.values())
    decoder = _decoder_facts(manifest)
    facts = BundleFacts(
        path=str(path),
        schema_version=manifest.schema_version,
        checkpoint_sha256=manifest.checkpoint_sha256,
        sampler=manifest.sampling.sampler,
        steps=manifest.sampling.steps,
        cfg_channels=manifest.sampling.cfg_channels,
        routing=manifest.routing,
        precision=manifest.precision,
        max_batch=manifest.max_batch,
        plan_kind=manifest.plan.kind,
        model=_stored_model_facts(manifest),
        width=_width_facts(masks, config),
        chosen=chosen,
        plans=plans,
        segments=_segment_facts(manifest, masks),
        measured=measured,
        layers=layers,
        layers_in_16_bits=in_16_bits,
        subnets=subnets,
        bundle_bytes=_size_of(bundle.path) - (decoder.bytes if decoder else 0),
        stored_bytes=stored,
        graph_bytes=sum(
            entry.bytes for name, entry in manifest.files.items() if name.endswith(".onnx") and name != VAE_DECODER
        ),
        dense_bytes=dense,
        tools=manifest.tools,
        decoder=decoder,
    )
    return Inspection(facts, masks, manifest.sampling.timesteps, table)


def _gpu(name: str) -> Gpu:
    if name not in GPUS:
        raise ConfigError(f"no figures of a GPU {name!r} are known; choose one of: {', '.join(GPUS)}")
    return GPUS[name]


def _decoder_facts(manifest: Manifest) -> DecoderFacts | None:
    if (vae := manifest.vae) is None:
        return None
    size = sum(manifest.files[name].bytes for name in (VAE_DECODER, VAE_WEIGHTS))
    side = manifest.model.input_size * vae.upscale
    return DecoderFacts(source=vae.source, tile=vae.tile, picture_side=side, bytes=size, scaling=vae.scaling_words)


def _model_facts(config: ModelConfig, parameters: int, routers: int) -> ModelFacts:
    return ModelFacts(
        config=config,
        process=config.diffusion,
        process_assumed=config.process is None,
        tokens=config.tokens,
        parameters=parameters,
        router_parameters=routers,
        static_macs=config.macs,
        block_macs=int(unit_costs(config).sum()),
    )


def _width_facts(masks: np.ndarray, config: ModelConfig) -> WidthFacts:
    costs = unit_costs(config)
    return WidthFacts(
        steps=len(masks),
        distinct_masks=len(np.unique(masks, axis=0)),
        shares=config.units.shares(masks),
        toggling_units=int((masks.any(0) & ~masks.all(0)).sum()),
        units=masks[0].size,
        flops_ratio=float((masks * costs).sum() / (costs.sum() * len(masks))),
    )


def _subnet_facts(manifest: Manifest, index: int) -> SubnetFacts:
    entry = manifest.subnets[index]
    segments = [segment for segment in manifest.plan.segments if segment.subnet == index]
    return SubnetFacts(
        index=index,
        segments=len(segments),
        steps=sum(segment.count for segment in segments),
        units=manifest.model.units.total_counts(manifest.model.units.mask(entry.units)),
        gated=entry.gated,
        weight_bytes=entry.weight_bytes,
        graph_bytes=sum(manifest.files[name].bytes for name in (entry.file, entry.full_file) if name),
    )


def _unit_bytes(manifest: Manifest) -> np.ndarray:
    """Bytes of the stored weights of each unit, [U]: the 8-bit copy where there is one."""
    axis, sizes = manifest.model.units, []
    for part in axis.parts:
        names = map(part.stored, part.group.all_unit_tensors)
        stored = (manifest.weights.get(name) or manifest.weights.get(fp16_name(name)) for name in names)
        sizes.append(sum(entry.nbytes for entry in stored if entry) / part.group.count)
    return axis.spread(np.array(sizes, np.float64))


def _stored_model_facts(manifest: Manifest) -> ModelFacts:
    """Facts of the stored weights. Computed tensors, and rows of units without a logit, are no parameters."""
    model = manifest.model
    counts = {name: math.prod(entry.shape) for name, entry in manifest.weights.items()}
    for copy in [fp16_name(name) for name in counts]:
        counts.pop(copy, None)
    for name in model.derived:
        del counts[name]
    if model.routers is Routers.FIRST_ON:
        for name in WIDTH_ROUTER:
            rows = manifest.weights[name].shape[0]
            counts[name] -= counts[name] // rows * len(model.units.parts)
    routers = sum(count for name, count in counts.items() if ".router." in name or name in WIDTH_ROUTER)
    return _model_facts(model, sum(counts.values()), routers)


def _size_of(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _rows(masks: np.ndarray, config: ModelConfig, sizes: PlanSizes, times: StepTimes | None) -> tuple[PlanRow, ...]:
    """The cheapest plan of every number of segments, from 1 to the number that the exact masks need: by `times` if the
    plan of the bundle was made by times, else by multiply-adds."""
    macs = macs_costs(config)
    costs = macs if times is None else time_costs(times, config)
    exact = per_step_plan(masks, costs)
    table, static = segment_costs(masks, macs), len(masks) * macs.static
    least = per_step_plan(masks, macs).cost

    def row(plan: Plan) -> PlanRow:
        cost = float(sum(table[segment] for segment in plan.segments))
        return PlanRow(
            segments=len(plan.segments),
            subnets=len(sizes.subnets(plan)),
            macs=cost,
            versus_exact=cost / least,
            versus_static=cost / static,
            weight_bytes=sizes.weights(plan),
            ms=None if times is None else plan.cost,
        )

    return tuple(row(plan) for plan in [*optimal_plans(masks, costs, len(exact.segments))[:-1], exact])


def _segment_facts(manifest: Manifest, masks: np.ndarray) -> tuple[SegmentFacts, ...]:
    config, plan = manifest.model, manifest.plan
    times = plan.measured.times if plan.measured else None
    costs = macs_costs(config) if times is None else time_costs(times, config)
    unions = [masks[segment.first : segment.first + segment.count].any(axis=0) for segment in plan.segments]
    spent = costs.of(np.stack(unions)) * [segment.count for segment in plan.segments]
    facts = []
    for segment, share in zip(plan.segments, spent / spent.sum(), strict=True):
        entry = manifest.subnets[segment.subnet]
        held = config.units.mask(entry.units)
        facts.append(
            SegmentFacts(
                first=segment.first,
                steps=segment.count,
                subnet=segment.subnet,
                units=config.units.total_counts(held),
                gated=entry.gated,
                cost_share=float(share),
                weight_bytes=entry.weight_bytes,
                slots=entry.capacities if manifest.routing is Routing.CAPACITY else None,
                blocks_with_mlp=tuple(bool(macs) for macs in config.units.routed_macs(held)),
            )
        )
    return tuple(facts)
