"""`dydit inspect`: what a checkpoint or a bundle holds: sizes, routers, cost, masks over time, plan.

Facts are plain data (`to_json`), which `text` lays out for a terminal and `pictures` draws. Nothing is run but the
width routers of a checkpoint; a bundle needs neither PyTorch nor ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.bundle.graph_io import GROUP_WEIGHTS, HEAD_WEIGHTS
from dydit.bundle.manifest import MANIFEST, Manifest
from dydit.bundle.vae import VAE_DECODER, VAE_WEIGHTS
from dydit.diffusion.schedule import Schedule
from dydit.errors import CheckpointError
from dydit.export.plan import Plan, optimal_plans, per_step_plan, plan_bytes
from dydit.files import write_atomic
from dydit.models.config import ModelConfig
from dydit.models.cost import model_macs, unit_costs
from dydit.verify.inspect_facts import (
    BundleFacts,
    CheckpointFacts,
    DecoderFacts,
    ModelFacts,
    PlanRow,
    SubnetFacts,
    WidthFacts,
    bundle_text,
    checkpoint_text,
)
from dydit.verify.plots import PlanPoint, plan_png
from dydit.verify.plots_masks import masks_png

DEFAULT_STEPS = 250
CURVE_POINTS = 48


@dataclass(frozen=True)
class Inspection:
    """Facts, and the masks that they were counted on, bool [S, L, 2, H] by checkpoint unit at `timesteps`."""

    facts: CheckpointFacts | BundleFacts
    masks: np.ndarray
    timesteps: tuple[int, ...]
    curve: tuple[PlanPoint, ...]

    def pictures(self) -> dict[str, bytes]:
        """PNG files by name; none for a static model, which has nothing to show."""
        if not self.facts.model.config.dynamic:
            return {}
        pictures = {"masks.png": masks_png(self.masks, self.timesteps)}
        if isinstance(self.facts, BundleFacts):
            chosen = self.facts.chosen
            width = self.facts.width
            static = self.facts.model.block_macs * float(width.steps)
            point = PlanPoint(chosen.segments, chosen.subnets, chosen.macs, chosen.weight_bytes)
            pictures["plan.png"] = plan_png(self.curve, point, width.flops_ratio * static, static)
        return pictures

    def text(self) -> str:
        """For a terminal: columns aligned, lines of at most about 100 characters."""
        return bundle_text(self.facts) if isinstance(self.facts, BundleFacts) else checkpoint_text(self.facts)

    def write_pictures(self, out: Path) -> list[Path]:
        """Write the pictures into the folder `out`, replacing those of the same name; returns their paths."""
        paths = []
        for name, data in self.pictures().items():
            write_atomic(out / name, data)
            paths.append(out / name)
        return paths

    def to_json(self) -> dict[str, object]:
        """The facts as plain data."""
        return self.facts.to_json()


def inspect(path: Path | str, num_heads: int | None = None) -> Inspection:
    """A bundle where `path` is a folder with a manifest, else a checkpoint; see the two functions below."""
    if (Path(path) / MANIFEST).exists():
        return inspect_bundle(path)
    return inspect_checkpoint(path, num_heads)


def inspect_checkpoint(path: Path | str, num_heads: int | None = None, steps: int = DEFAULT_STEPS) -> Inspection:
    """A checkpoint of any known format, its width masks taken at the timesteps of a run of `steps`.

    Raises `CheckpointError` as `load_checkpoint` does.
    """
    try:
        from dydit.export.exporter import fixed_bytes, unit_bytes
        from dydit.export.masks import freeze_masks
        from dydit.models.checkpoint import load_checkpoint
    except ImportError as error:
        raise CheckpointError(f"reading a checkpoint needs {error.name}: pip install 'dydit[export]'") from error
    checkpoint = load_checkpoint(path, num_heads)
    config = checkpoint.config
    timesteps = Schedule.respaced(steps).timesteps[::-1]
    masks = freeze_masks(checkpoint.width_routers(), timesteps)
    routers = ("attn_rate", "mlp_rate", "token_selection")
    parameters = {name: tensor.numel() for name, tensor in checkpoint.state.items()}
    model = _model_facts(
        config, sum(parameters.values()), sum(n for name, n in parameters.items() if any(r in name for r in routers))
    )
    curve = _curve(masks, unit_costs(config), unit_bytes(config), fixed_bytes(config))
    facts = CheckpointFacts(
        path=str(path),
        format=checkpoint.source,
        sha256=checkpoint.sha256,
        file_bytes=_size_of(Path(path)),
        metadata=checkpoint.metadata,
        model=model,
        width=_width_facts(masks, config),
        plans=_rows(curve, masks, config),
    )
    return Inspection(facts, masks, tuple(timesteps.tolist()), curve)


def inspect_bundle(path: Path | str) -> Inspection:
    """A bundle, its files held against their hashes first.

    Raises `BundleError` as `Bundle.open` does.
    """
    bundle = Bundle.open(path)
    manifest, config = bundle.manifest, bundle.manifest.model
    masks = manifest.checkpoint_masks()
    unit_sizes = _unit_bytes(manifest)
    subnets = tuple(_subnet_facts(manifest, index) for index in range(len(manifest.subnets)))
    one = manifest.subnets[0]
    fixed = one.weight_bytes - _used_bytes(unit_sizes, one.heads, one.groups)
    curve = _curve(masks, unit_costs(config), unit_sizes, fixed)
    dense = int(unit_sizes.sum()) + fixed
    loaded = dense if manifest.sliding else sum(entry.weight_bytes for entry in manifest.subnets)
    point = PlanPoint(len(manifest.plan.segments), len(manifest.subnets), manifest.plan.macs, loaded)
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
        chosen=_row(point, manifest.plan.per_step_macs, manifest.plan.static_macs),
        plans=_rows(curve, masks, config),
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
    return Inspection(facts, masks, manifest.sampling.timesteps, curve)


def _decoder_facts(manifest: Manifest) -> DecoderFacts | None:
    if (vae := manifest.vae) is None:
        return None
    size = sum(manifest.files[name].bytes for name in (VAE_DECODER, VAE_WEIGHTS))
    side = manifest.model.input_size * vae.upscale
    return DecoderFacts(source=vae.source, tile=vae.tile, picture_side=side, bytes=size)


def _model_facts(config: ModelConfig, parameters: int, routers: int) -> ModelFacts:
    return ModelFacts(
        config=config,
        tokens=config.tokens,
        parameters=parameters,
        router_parameters=routers,
        static_macs=model_macs(config),
        block_macs=int(unit_costs(config).sum()),
    )


def _width_facts(masks: np.ndarray, config: ModelConfig) -> WidthFacts:
    costs = unit_costs(config)
    return WidthFacts(
        steps=len(masks),
        distinct_masks=len(np.unique(masks.reshape(len(masks), -1), axis=0)),
        head_share=float(masks[:, :, 0].mean()),
        group_share=float(masks[:, :, 1].mean()),
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
        heads=sum(map(len, entry.heads)),
        groups=sum(map(len, entry.groups)),
        gated=entry.gated,
        weight_bytes=entry.weight_bytes,
        graph_bytes=sum(manifest.files[name].bytes for name in (entry.file, entry.full_file) if name),
    )


def _unit_bytes(manifest: Manifest) -> np.ndarray:
    """Bytes of one head's and one group's stored weights, [L, 2, H]."""
    config = manifest.model
    sizes = np.empty((config.depth, 2, config.num_heads))
    for block in range(config.depth):
        for part, names in enumerate(((*HEAD_WEIGHTS, "qkv.scale"), (*GROUP_WEIGHTS, "fc1.scale"))):
            stored = (manifest.weights.get(f"blocks.{block}.{name}") for name in names)
            total = sum(entry.nbytes for entry in stored if entry)
            sizes[block, part] = total / config.num_heads
    return sizes


def _used_bytes(sizes: np.ndarray, heads: Sequence[Sequence[int]], groups: Sequence[Sequence[int]]) -> int:
    counts = np.array([[len(part) for part in block] for block in zip(heads, groups, strict=True)])
    return int((sizes[:, :, 0] * counts).sum())


def _stored_model_facts(manifest: Manifest) -> ModelFacts:
    """The width routers are not among a bundle's parameters: their decisions are frozen into its plan."""
    counts = {name: math.prod(entry.shape) for name, entry in manifest.weights.items()}
    del counts["time.frequencies"]
    return _model_facts(
        manifest.model, sum(counts.values()), sum(n for name, n in counts.items() if ".router." in name)
    )


def _size_of(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _curve(masks: np.ndarray, costs: np.ndarray, sizes: np.ndarray, fixed: int) -> tuple[PlanPoint, ...]:
    """The cheapest plans for numbers of segments from 1 to as many as the exact masks need."""
    exact = per_step_plan(masks, costs)
    most = len(exact.segments)
    plans = [*optimal_plans(masks, costs, most)[:-1], exact]
    wanted = {most, *(2**k for k in range(12))} | set(np.geomspace(1, most, CURVE_POINTS).round().astype(int).tolist())

    def point(plan: Plan) -> PlanPoint:
        distinct = {masks[first:end].any(axis=0).tobytes() for first, end in plan.segments}
        return PlanPoint(len(plan.segments), len(distinct), plan.cost, plan_bytes(plan, masks, sizes, fixed))

    return tuple(point(plan) for plan in plans if len(plan.segments) in wanted)


def _rows(curve: Sequence[PlanPoint], masks: np.ndarray, config: ModelConfig) -> tuple[PlanRow, ...]:
    """The table: K = 1, 2, 4, ... and the exact plan."""
    costs = unit_costs(config)
    exact, static = curve[-1].macs, float(costs.sum() * len(masks))
    doublings = {2**k for k in range(12)} | {curve[-1].segments}
    return tuple(_row(point, exact, static) for point in curve if point.segments in doublings)


def _row(point: PlanPoint, exact: float, static: float) -> PlanRow:
    return PlanRow(
        segments=point.segments,
        subnets=point.subnets,
        macs=point.macs,
        versus_exact=point.macs / exact,
        versus_static=point.macs / static,
        weight_bytes=point.weight_bytes,
    )
