"""The facts of `dydit.inspection.inspect` as plain data that goes to JSON and back, and as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from dydit.bundle.manifest import PlanKind, Routing
from dydit.bundle.measurements import MeasuredPlan
from dydit.diffusion.process import Process
from dydit.models.config import ModelConfig
from dydit.reports.results import Result
from dydit.reports.text import aligned, bytes_text, count_text, measured_lines
from dydit.words import counted

ROWS_SHOWN = 12
CLASSES_SHOWN = 8


class WidthFacts(Result):
    """The width masks over a run. Shares are of all units and steps, 0..1."""

    steps: int
    distinct_masks: int
    shares: dict[str, float] = Field(description="share of units that are on, by unit group: heads, groups")
    toggling_units: int = Field(description="number of units that are on in some steps and off in others")
    units: int = Field(description="number of units of all blocks")
    flops_ratio: float = Field(description="of the blocks, by width only, with all tokens")


class PlanRow(Result):
    """The cheapest plan with a number of segments. `macs`: multiply-adds of the blocks for an image over the whole
    run."""

    segments: int
    subnets: int = Field(description="number of distinct subnetworks; segments with equal masks share one")
    macs: float
    versus_exact: float
    versus_static: float
    weight_bytes: int = Field(description="of all distinct subnetworks")
    ms: float | None = Field(
        default=None, description="time of a run of one batch, by the times that the plan was made with"
    )


class ModelFacts(Result):
    """Sizes and cost of a model: multiply-adds of one image and step with all units on."""

    config: ModelConfig
    process: Process = Field(default=Process(), description="how noise was added in training, and what is predicted")
    process_assumed: bool = Field(default=True, description="whether nothing states the process")
    tokens: int
    parameters: int
    router_parameters: int
    static_macs: int = Field(description="of the whole model, counted as in the paper")
    block_macs: int = Field(description="of attention and MLP in all blocks, which masks reduce")


class CheckpointFacts(Result):
    """A checkpoint."""

    kind: str = "checkpoint"
    path: str
    format: str
    sha256: str
    file_bytes: int
    metadata: dict[str, str]
    notes: tuple[str, ...] = Field(default=(), description="assumptions and choices made when it was read")
    model: ModelFacts
    width: WidthFacts
    plans: tuple[PlanRow, ...]


class PresetFacts(Result):
    """A published model without routers, of which there are no weights."""

    kind: str = "preset"
    name: str
    model: ModelFacts


class SubnetFacts(Result):
    """One subnetwork of a bundle. `units`: number of units of each group over all blocks."""

    index: int
    segments: int
    steps: int
    units: dict[str, int]
    gated: bool
    weight_bytes: int
    graph_bytes: int


class SegmentFacts(Result):
    """Consecutive steps of the plan of a bundle, and their subnetwork. `cost_share`: share 0..1 in the cost of the run,
    in the unit that the plan minimizes. `weight_bytes`: of the subnetwork. `slots`: with capacity routing, MLP token
    slots of a row, by block. `blocks_with_mlp`: the blocks in which a routed unit is on, so that slots are computed."""

    first: int
    steps: int
    subnet: int
    units: dict[str, int]
    gated: bool
    cost_share: float
    weight_bytes: int
    slots: tuple[int, ...] | None = None
    blocks_with_mlp: tuple[bool, ...] = ()

    @property
    def computed_slots(self) -> tuple[int, ...]:
        """The slots of the blocks that compute them."""
        return tuple(slot for slot, has_mlp in zip(self.slots or (), self.blocks_with_mlp, strict=False) if has_mlp)


class DecoderFacts(Result):
    """The VAE decoder of a bundle. `tile`: side of its input latents; `picture_side` in pixels; `bytes` on disk.

    `scaling`: how its input is scaled, in words.
    """

    source: str
    tile: int
    picture_side: int
    bytes: int
    scaling: str = ""


class BundleFacts(Result):
    """A bundle. `dense_bytes`: the weights that a step reads with all units on."""

    kind: str = "bundle"
    path: str
    schema_version: int
    checkpoint_sha256: str
    sampler: str
    steps: int
    cfg_channels: int
    routing: str | None
    precision: str
    max_batch: int
    plan_kind: str
    model: ModelFacts
    width: WidthFacts
    chosen: PlanRow
    plans: tuple[PlanRow, ...]
    segments: tuple[SegmentFacts, ...] = ()
    measured: MeasuredPlan | None = None
    layers: int = Field(default=0, description="number of linear layers in the blocks of all segments")
    layers_in_16_bits: int = Field(default=0, description="number of those in 16 bits while the others are in 8 bits")
    subnets: tuple[SubnetFacts, ...]
    bundle_bytes: int
    stored_bytes: int
    graph_bytes: int
    dense_bytes: int
    tools: dict[str, str]
    decoder: DecoderFacts | None = Field(default=None, description="its files are not included in other sizes")


def checkpoint_text(facts: CheckpointFacts) -> str:
    """Facts of a checkpoint for a terminal."""
    head = [
        ("checkpoint", facts.path),
        ("format", f"{facts.format}, {bytes_text(facts.file_bytes)}, SHA-256 {facts.sha256[:16]}"),
        *_model_lines(facts.model, "the file does not state it; change it with --prediction and --schedule"),
        *_width_lines(facts.model, facts.width),
        *((key, value if len(value) <= 80 else value[:77] + "...") for key, value in sorted(facts.metadata.items())),
        *(("assumed", note) for note in facts.notes),
    ]
    if not facts.model.config.dynamic:
        return aligned(head)
    return f"{aligned(head)}\n\n{_plan_table(facts.plans, None)}"


def preset_text(facts: PresetFacts) -> str:
    """Facts of a preset for a terminal."""
    return aligned([("preset", facts.name), *_model_lines(facts.model, "as published models of this kind")])


def bundle_text(facts: BundleFacts) -> str:
    """Facts of a bundle for a terminal. Of many subnetworks it shows the first and the last."""
    share = facts.bundle_bytes / facts.stored_bytes
    head = [
        ("bundle", f"{facts.path}, schema version {facts.schema_version}"),
        ("checkpoint", f"SHA-256 {facts.checkpoint_sha256[:16]}"),
        *_model_lines(facts.model, "its checkpoint did not state it; export again with --prediction and --schedule"),
        *_width_lines(facts.model, facts.width),
        (
            "sampling",
            f"{counted(facts.steps, f'{facts.sampler} step')}, {_guidance_words(facts)}, "
            f"batch up to {facts.max_batch}, {facts.precision}{_kept_words(facts)}",
        ),
        ("routing", routing_text(facts)),
        (
            "on disk",
            f"{bytes_text(facts.bundle_bytes)} = {share:.2f} x its weights ({bytes_text(facts.stored_bytes)}, stored "
            f"once); graphs {bytes_text(facts.graph_bytes)}",
        ),
        *_decoder_lines(facts),
        ("plan", _plan_line(facts)),
    ]
    parts = ["\n".join([aligned(head), *measured_lines(facts.measured)])]
    if facts.model.config.dynamic:
        parts.append(_plan_table(facts.plans, facts.chosen))
    return "\n\n".join([*parts, _segment_table(facts), _subnet_table(facts)])


def routing_text(facts: BundleFacts) -> str:
    """How tokens reach the MLPs, and the number of slots if it is fixed."""
    tokens = facts.model.tokens
    if facts.routing is None:
        return "static: every token enters the MLPs"
    if facts.routing == Routing.DENSE:
        return "dense: all tokens are computed, then masked"
    if facts.routing == Routing.DYNAMIC:
        return "dynamic: only routed tokens are computed"
    slots = [slot for segment in facts.segments for slot in segment.computed_slots]
    if not slots:
        return "capacity: no block has an MLP"
    if min(slots) == tokens:
        return f"capacity: a slot for each of the {counted(tokens, 'token')}, so routing saves nothing"
    sums = [
        (segment.steps * sum(segment.computed_slots), segment.steps * len(segment.computed_slots))
        for segment in facts.segments
    ]
    mean = sum(total for total, _ in sums) / sum(count for _, count in sums)
    return (
        f"capacity: {min(slots)} to {max(slots)} slots for {counted(tokens, 'token')}, on average {mean / tokens:.1%} "
        "of the tokens; steps whose tokens do not fit run again with all tokens"
    )


def _guidance_words(facts: BundleFacts) -> str:
    model = facts.model.config
    if model.null_class is None and model.text is None:
        return "without guidance"
    every = "all " if facts.cfg_channels == model.in_channels > 1 else ""
    return f"guidance on {every}{counted(facts.cfg_channels, 'channel')}"


def _kept_words(facts: BundleFacts) -> str:
    kept = facts.layers_in_16_bits
    return f", of {counted(facts.layers, 'linear layer')} {kept} in 16 bits" if kept else ""


def _decoder_lines(facts: BundleFacts) -> list[tuple[str, str]]:
    decoder, model = facts.decoder, facts.model.config
    if decoder is None:
        return (
            [] if model.samples_pixels else [("decoder", "none: samples stay latents; dydit attach-vae adds a decoder")]
        )
    side = decoder.picture_side
    tiles = "" if decoder.tile == model.input_size else f", in tiles of {decoder.tile}x{decoder.tile} latents"
    size = f"{side}x{side} pixels{tiles}; {bytes_text(decoder.bytes)} more on disk"
    return [("decoder", f"VAE from {decoder.source}, {size}"), ("", decoder.scaling)]


def _plan_line(facts: BundleFacts) -> str:
    served = counted(facts.chosen.subnets, "subnetwork")
    if facts.plan_kind == PlanKind.DYNAMIC_WIDTH:
        served = f"one graph of {counted(facts.chosen.subnets, 'width')}"
    sizes = f"{served} in {counted(facts.chosen.segments, 'segment')}"
    if not facts.model.config.dynamic:
        return sizes
    cost = f"{facts.chosen.versus_exact:.3f} x the exact masks, {facts.chosen.versus_static:.3f} x static"
    return f"{facts.plan_kind}: {sizes}, {cost}"


def _model_lines(model: ModelFacts, unstated: str) -> list[tuple[str, str]]:
    """`unstated`: what to say if nothing states how the model was trained."""
    c = model.config
    kind = f"{c.title}, routers {c.routers}" if c.dynamic else f"{c.title}, static"
    shape = f"{c.in_channels}x{c.input_size}x{c.input_size}"
    routers = f", including routers {model.router_parameters:,}" if model.router_parameters else ""
    classes = counted(c.classes.count, "class", "classes")
    if c.text is not None:
        classes = f"texts of {counted(c.text.tokens, 'token')} with {c.text.channels} channels"
    elif c.classes.unconditional:
        classes = "unconditional"
    elif c.null_class is None:
        classes += ", no null class, so no guidance"
    return [
        ("model", f"{kind}; {c.summary}"),
        ("input", f"{shape}, {counted(model.tokens, 'token')}, {classes}"),
        *([("classes", _class_names(c.class_names))] if c.class_names else []),
        ("training", model.process.words),
        *([("", f"assumed: {unstated}")] if model.process_assumed else []),
        ("samples", c.space_words),
        ("parameters", f"{model.parameters:,}{routers}"),
        (
            "cost",
            f"{count_text(model.static_macs)} multiply-adds per image and step with all units on, "
            f"including blocks {count_text(model.block_macs)}",
        ),
    ]


def _class_names(names: Sequence[str]) -> str:
    """The numbers and first names of the first classes: `0 cat, 1 dog`."""
    shown = [f"{number} {name.split(',')[0].strip()}" for number, name in enumerate(names[:CLASSES_SHOWN])]
    more = len(names) - len(shown)
    return ", ".join([*shown, *([f"... {more} more (--json lists them)"] if more else [])])


def _width_lines(model: ModelFacts, width: WidthFacts) -> list[tuple[str, str]]:
    if not model.config.dynamic:
        return []
    return [
        (
            "masks",
            f"{width.distinct_masks} distinct in {counted(width.steps, 'step')}; {width.toggling_units} of "
            f"{counted(width.units, 'unit')} toggle{'s' if width.toggling_units == 1 else ''}",
        ),
        (
            "width",
            f"{', '.join(f'{name} {share:.1%} on' for name, share in width.shares.items())}: "
            f"{width.flops_ratio:.3f} of the blocks' multiply-adds, before token routing",
        ),
    ]


def _plan_table(plans: Sequence[PlanRow], chosen: PlanRow | None) -> str:
    """The plans with 1, 2, 4, ... segments, the exact plan, and the chosen one."""
    shown = {row.segments: row for row in plans if row.segments.bit_count() == 1 or row is plans[-1]}
    shown |= {chosen.segments: chosen} if chosen else {}
    timed = any(row.ms is not None for row in shown.values())
    head = ["segments", "subnetworks", "x exact masks", "x static", "weights", *(["s a run"] if timed else []), ""]
    rows = [
        [
            str(count),
            str(row.subnets),
            f"{row.versus_exact:.3f}",
            f"{row.versus_static:.3f}",
            bytes_text(row.weight_bytes),
            *([] if not timed else ["" if row.ms is None else f"{row.ms / 1e3:.3g}"]),
            "<- chosen" if row is chosen else "",
        ]
        for count, row in sorted(shown.items())
    ]
    return aligned([head, *rows], right=range(len(head) - 1))


def _segment_table(facts: BundleFacts) -> str:
    slots = any(segment.slots for segment in facts.segments)
    head = ["steps", "subnetwork", *_group_heads(facts.model), "gated", "of the cost", "weights"]
    head += ["slots: min", "mean", "max", "of the tokens"] if slots else []
    rows = [
        [
            f"{segment.first}" + (f"-{segment.first + segment.steps - 1}" if segment.steps > 1 else ""),
            str(segment.subnet),
            *map(str, segment.units.values()),
            "yes" if segment.gated else "no",
            f"{segment.cost_share:.1%}",
            bytes_text(segment.weight_bytes),
            *(_slot_cells(segment.computed_slots, facts.model.tokens) if slots else []),
        ]
        for segment in facts.segments
    ]
    return _abbreviated(head, rows)


def _group_heads(model: ModelFacts) -> list[str]:
    """Column titles of the unit groups with their numbers of units: `heads/48`."""
    return [f"{name}/{count}" for name, count in model.config.units.total_counts().items()]


def _slot_cells(slots: Sequence[int], tokens: int) -> list[str]:
    """Slots of a segment over the blocks that compute them: min, mean, max, and the share of tokens."""
    if not slots:
        return ["-"] * 4
    mean = sum(slots) / len(slots)
    return [str(min(slots)), f"{mean:.1f}", str(max(slots)), f"{mean / tokens:.1%}"]


def _subnet_table(facts: BundleFacts) -> str:
    head = ["subnetwork", "steps", *_group_heads(facts.model), "gated", "weights", "x dense", "graph"]
    rows = [
        [
            str(subnet.index),
            str(subnet.steps),
            *map(str, subnet.units.values()),
            "yes" if subnet.gated else "no",
            bytes_text(subnet.weight_bytes),
            f"{subnet.weight_bytes / facts.dense_bytes:.2f}",
            bytes_text(subnet.graph_bytes),
        ]
        for subnet in facts.subnets
    ]
    return _abbreviated(head, rows)


def _abbreviated(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of all rows, or of the first and the last of many rows."""
    if len(rows) > 2 * ROWS_SHOWN:
        rows = [*rows[:ROWS_SHOWN], [f"... {len(rows) - ROWS_SHOWN - 2} more"], *rows[-2:]]
    return aligned([head, *rows], right=range(len(head)))
