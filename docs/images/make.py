"""Draw the pictures of README and docs/design.md, from the digits model that comes with dydit.

    python docs/images/make.py [--out docs/images] [--steps 250] [--models docs/models]

Masks, plans and tokens are the model's own; the pictures of graphs and of loops are diagrams. Beside each log of
docs/models its curves are drawn. It takes about a minute.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import dydit
from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind
from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.inspection.trace import Trace, trace_tokens
from dydit.models.config import parse_config
from dydit.planning.costs import macs_costs
from dydit.planning.plan import Plan, optimal_plans, per_step_plan, segment_costs
from dydit.plot_style import (
    ACCENT,
    ACCENT_LIGHT,
    FAINT,
    INK,
    MUTED,
    OFF,
    SECOND,
    drawing,
    headline,
    in_few_colours,
    png,
)
from dydit.reports.plots_masks import masks_png
from dydit.training.curves import curves_png
from dydit.training.recipe import Recipe

DIGITS = Path(dydit.__file__).parent / "assets" / "digits" / "dydit.safetensors"
MODELS = Path(__file__).parents[1] / "models"
"""The folder of the models, whose logs become curves."""
SHOWN = (2, 3, 1)
"""The digits whose tokens are shown."""
BLOCK = 2
"""The block whose heads show how subnetworks read the weights."""


def main() -> None:
    """Draw everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the pictures")
    parser.add_argument("--steps", type=int, default=250, help="number of sampling steps")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of the models")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        settings = ExportConfig(steps=arguments.steps, plan=PlanKind.PER_STEP)
        bundle = export(load_checkpoint(DIGITS), Path(work) / "bundle", settings)
        trace = trace_tokens(bundle, SHOWN, cfg_scale=2.0)
    model, timesteps = bundle.manifest.model, bundle.manifest.sampling.timesteps
    pictures = {
        "dynamic": dynamic_png(bundle, trace),
        "masks": masks_png(bundle.manifest.checkpoint_masks(), model.units, timesteps),
        "plan": plan_png(bundle),
        "graphs": graphs_png(bundle),
        "routing": routing_png(trace),
        "loop": loop_png(),
    }
    for name, data in pictures.items():
        small(data).save(arguments.out / f"{name}.png", optimize=True)
    for log in sorted(arguments.models.glob("*/*-log.jsonl")):
        log.with_name(log.name.replace("-log.jsonl", "-curves.png")).write_bytes(in_few_colours(run_png(log)))


def run_png(log: Path) -> bytes:
    """The curves of a run from its log; the recipe stands beside it."""
    recipe = parse_config(Recipe, json.loads(log.with_name(log.name.replace("-log.jsonl", "-recipe.json")).read_text()))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return curves_png(lines, recipe.name, recipe.process.prediction)


def small(data: bytes) -> Image.Image:
    """A picture at 1600 pixels' width or less, with 64 colours: a few dozen kilobytes."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    if picture.width > 1600:
        picture = picture.resize((1600, round(picture.height * 1600 / picture.width)), Image.Resampling.LANCZOS)
    return picture.quantize(64, dither=Image.Dither.NONE)


# What is dynamic


def dynamic_png(bundle: Bundle, trace: Trace) -> bytes:
    """Beside each other: which units each step uses, and how many blocks compute each token of three images."""
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap

    manifest = bundle.manifest
    axis, timesteps = manifest.model.units, manifest.sampling.timesteps
    steps = [round(share * (len(timesteps) - 1)) for share in (0.1, 0.5, 0.9)]
    with drawing(10, 3.4) as figure:
        headline(figure, "A DyDiT computes what a step and an image need; dydit compiles that into fast graphs")
        left, right = figure.subfigures(1, 2, width_ratios=(1, 1.12))
        plot = left.subplots()
        masks = manifest.checkpoint_masks().T
        plot.imshow(masks, cmap=ListedColormap([OFF, ACCENT]), aspect="auto", interpolation="nearest")
        for part in axis.parts[1:]:
            plot.axhline(part.start - 0.5, color="white", lw=2.4 if part.index == 0 else 0.8)
        heads = [part for part in axis.parts if part.index == 0]
        centres = [part.start + part.group.count for part in heads]
        plot.set_yticks([centre - 0.5 for centre in centres], [f"block {part.block}" for part in heads])
        plot.tick_params(left=False)
        plot.spines[:].set_visible(False)
        plot.set_xticks([0, len(timesteps) - 1], ["noise", "image"])
        plot.set_title(f"Heads and channel groups that each of {len(timesteps)} steps uses", fontsize=9)
        levels = manifest.model.depth + 1
        ramp = LinearSegmentedColormap.from_list("compute", [OFF, ACCENT_LIGHT, ACCENT, "#0c2f4f"])
        colours = ListedColormap(ramp(np.linspace(0, 1, levels)))
        grid = right.subplots(len(SHOWN), len(steps) + 1)
        side = round(trace.tokens.shape[-1] ** 0.5)
        for row in range(len(SHOWN)):
            grid[row, 0].imshow(trace.latents[row, 0], cmap="gray", vmin=-1, vmax=1)
            for column, step in enumerate(steps):
                counts = trace.tokens[step, :, row].sum(0).reshape(side, side)
                drawn = grid[row, column + 1].imshow(counts, cmap=colours, vmin=-0.5, vmax=levels - 0.5)
        for cell in grid.flat:
            cell.set(xticks=(), yticks=())
            cell.spines[:].set_visible(False)
        for column, title in enumerate(["image", *(f"t = {timesteps[step]:g}" for step in steps)]):
            grid[0, column].set_title(title, loc="center", fontsize=8.5)
        bar = right.colorbar(drawn, ax=grid, aspect=18, pad=0.02, ticks=range(levels))
        bar.set_label(f"blocks, of {levels - 1}, whose MLP\ncomputes the token")
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        return png(figure)


# The plan


def plan_png(bundle: Bundle) -> bytes:
    """What each step costs under three plans, and what a run costs for every number of subnetworks."""
    model, masks = bundle.manifest.model, bundle.masks
    costs = macs_costs(model)
    static, exact = costs.static, per_step_plan(masks, costs)
    plans = optimal_plans(masks, costs, len(exact.segments))
    few, more = plans[min(4, len(plans)) - 1], plans[min(16, len(plans)) - 1]
    table, steps = segment_costs(masks, costs), np.arange(len(masks) + 1)
    with drawing(10, 3.3) as figure:
        headline(
            figure,
            "Sixteen subnetworks cost little more than one for each mask",
            "digits model; multiply-adds of heads and channel groups, all tokens counted, relative to the static model",
        )
        each, total = figure.subplots(1, 2, width_ratios=(1.5, 1))
        own = [table[step, step + 1] / static for step in range(len(masks))]
        each.fill_between(steps[:-1], own, step="post", color=ACCENT_LIGHT, lw=0, label="each step its own mask")
        for plan, colour in ((more, ACCENT), (few, SECOND)):
            each.stairs(step_costs(plan, table) / static, steps, color=colour, lw=1.6, baseline=None, label=label(plan))
        each.set(ylim=(0, 1.03), xlim=(0, len(masks)), xlabel="sampling step (noise → image)", ylabel="cost of a step")
        each.legend(loc="upper left")
        counts = np.arange(1, len(plans) + 1)
        total.plot(counts, [plan.cost / (static * len(masks)) for plan in plans], color=ACCENT)
        limit = exact.cost / (static * len(masks))
        total.axhline(limit, color=MUTED, lw=1, ls="--")
        total.text(1, limit - 0.012, f"one subnetwork for each mask: {limit:.3f}", va="top", color=MUTED, fontsize=8)
        for plan, colour in ((more, ACCENT), (few, SECOND)):
            count, cost = len(plan.segments), plan.cost / (static * len(masks))
            total.plot(count, cost, "o", color=colour)
            total.annotate(f"{count}: {cost:.3f}", (count, cost), (6, 6), textcoords="offset points", fontsize=8)
        total.set(xscale="log", ylim=(limit - 0.06, 1.03), xlabel="number of subnetworks", ylabel="cost of a run")
        ticks = [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= len(plans)]
        total.set_xticks(ticks, [str(count) for count in ticks])
        return png(figure)


def step_costs(plan: Plan, table: np.ndarray) -> np.ndarray:
    """What each step of a plan costs, [S], of the costs of all segments."""
    return np.concatenate([np.full(end - first, table[first, end] / (end - first)) for first, end in plan.segments])


def label(plan: Plan) -> str:
    """A plan in the legend."""
    return f"the best plan of {len(plan.segments)} subnetworks"


# Diagrams: boxes, arrows, and rows of cells


def canvas(figure: Any, width: float, height: float) -> Any:
    """An empty plot whose unit is a cell's side; y points down."""
    plot = figure.subplots()
    plot.set(xlim=(0, width), ylim=(height, 0), xticks=(), yticks=(), aspect="equal")
    plot.spines[:].set_visible(False)
    return plot


def box(plot: Any, x: float, y: float, width: float, text: str, height: float = 1, colour: str = OFF) -> None:
    """A box with centred text; white text on dark colours."""
    from matplotlib.patches import Rectangle

    plot.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", lw=1.2))
    ink = "white" if colour in (ACCENT, SECOND, MUTED) else INK
    plot.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=7.5, color=ink, linespacing=1.25)


def say(plot: Any, x: float, y: float, text: str, **how: Any) -> None:
    """Plain text, its left end in the middle of a row."""
    plot.text(x, y, text, **{"va": "center", "fontsize": 8, "color": INK, **how})


def arrow(plot: Any, start: tuple[float, float], end: tuple[float, float], colour: str = MUTED) -> None:
    """An arrow between two points."""
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 8}
    plot.annotate("", end, start, arrowprops=style)


def cells(plot: Any, x: float, y: float, values: Sequence[Any], colours: Sequence[str]) -> None:
    """A row of cells."""
    for place, (value, colour) in enumerate(zip(values, colours, strict=True)):
        box(plot, x + place, y, 1, str(value), colour=colour)


def graphs_png(bundle: Bundle) -> bytes:
    """One step's graph, and how three subnetworks read a block's heads from the one file of weights."""
    manifest = bundle.manifest
    part = next(part for part in manifest.model.units.parts if part.block == BLOCK)
    order, masks = manifest.unit_order[BLOCK][0], bundle.masks[:, part.units]
    distinct = {tuple(mask): step for step, mask in reversed(list(enumerate(masks)))}
    holes = [mask for mask in distinct if any(mask[i + 1] and not mask[i] for i in range(len(mask) - 1))]
    fewest, most = min(distinct, key=sum), max(distinct, key=sum)
    rows = list(dict.fromkeys([fewest, *holes[:1], most]))
    with drawing(10, 4.2) as figure:
        headline(figure, "A graph is one sampling step; its weights are windows on weights.bin")
        plot = canvas(figure, 36, 13)
        stages = [("patches", 3), ("attention", 4), ("MLP", 4), ("...", 1.6), ("final layer", 4), ("guidance", 3.6)]
        stages.append(("sampler's formula", 5.4))
        x = 2.2
        say(plot, 0.6, 1.4, "x")
        for name, width in stages:
            arrow(plot, (x - 0.9, 1.4), (x, 1.4))
            box(plot, x, 0.8, width, name, 1.2, ACCENT if name in ("attention", "MLP") else OFF)
            x += width + 1
        arrow(plot, (x - 0.9, 1.4), (x, 1.4))
        say(plot, x + 0.2, 1.4, "x_prev")
        for place, name in ((8.2, "condition, gates"), (13.2, ""), (24.1, "cfg_scale"), (30.2, "coefficients, noise")):
            arrow(plot, (place, 3), (place, 2.1))
            say(plot, place + (2.5 if name.startswith("condition") else 0), 3.4, name, ha="center", color=MUTED)
        left, top = 9, 5.6
        say(
            plot,
            0,
            top - 0.9,
            f"weights.bin: the query, key and value rows of block {BLOCK}'s heads, one slot after another",
        )
        say(plot, 0, top + 0.5, "slot")
        cells(plot, left, top, range(len(order)), [FAINT] * len(order))
        say(plot, 0, top + 1.5, "head of the checkpoint", color=MUTED)
        for place, unit in enumerate(order):
            say(plot, left + place + 0.5, top + 1.5, str(unit), ha="center", color=MUTED)
        for row, mask in enumerate(rows):
            y = top + 2.4 + 1.4 * row
            say(plot, 0, y + 0.5, f"subnetwork of step {distinct[mask]}")
            cells(plot, left, y, [""] * len(mask), [ACCENT if each else "white" for each in mask])
            windows = 1 + sum(bool(mask[i + 1] and not mask[i]) for i in range(1, len(mask) - 1))
            text = f"{sum(mask)} heads, "
            text += "side by side: one window" if windows == 1 else f"with a hole: {windows} windows and a Concat"
            say(plot, left + len(mask) + 0.8, y + 0.5, text, color=MUTED)
        return png(figure)


def routing_png(trace: Trace) -> bytes:
    """Routed tokens of one image in one block, and the two ways in which only they are computed."""
    mask, last = trace.tokens[len(trace.tokens) // 2, -1, 0], trace.tokens.shape[1] - 1
    side = round(len(mask) ** 0.5)
    first = int(np.argmin([abs(int(mask[i : i + 16].sum()) - 8) for i in range(0, len(mask) - 15, side)])) * side
    shown = mask[first : first + 16].astype(int)
    routed = np.flatnonzero(shown)
    room = len(routed) + 2
    with drawing(10, 4.2) as figure:
        headline(
            figure,
            "Only routed tokens enter the MLP; the others keep their residual",
            f"left: halfway through the run, the tokens that block {last} skips are covered; right: 16 tokens",
        )
        plot = canvas(figure, 35, 13.2)
        extent = (0.3, 8.3, 10.6, 2.6)
        plot.imshow(trace.latents[0, 0], cmap="gray", vmin=-1, vmax=1, extent=extent, aspect="equal", zorder=0)
        for place, routes in enumerate(mask):
            row, column = divmod(place, side)
            if not routes:
                box(plot, 0.3 + column * 8 / side, 2.6 + row * 8 / side, 8 / side, "", 8 / side, OFF)
        plot.set(xlim=(0, 35), ylim=(13.2, 0))
        left = 16.4
        rows: list[tuple[float, str, Sequence[Any], Sequence[str]]] = [
            (0.4, "router: logit > 0", shown, [ACCENT if each else OFF for each in shown]),
            (2.4, "dynamic: NonZero", routed, [ACCENT] * len(routed)),
            (
                5.3,
                "capacity: CumSum - 1",
                [int(v) - 1 if on else "" for v, on in zip(shown.cumsum(), shown, strict=True)],
                [ACCENT if each else OFF for each in shown],
            ),
            (7.3, "its slots: token ids", [*routed, "", ""], [ACCENT] * len(routed) + [FAINT] * 2),
            (
                10.4,
                "back: gather by slot",
                ["y" if each else "x" for each in shown],
                [ACCENT if each else OFF for each in shown],
            ),
        ]
        for y, name, values, colours in rows:
            say(plot, left - 0.4, y + 0.5, name, ha="right")
            cells(plot, left, y, values, colours)
        say(plot, left, 3.9, "Gather these rows, MLP, ScatterND. The number of rows depends on the data.", color=MUTED)
        say(plot, left, 8.8, f"Gather, MLP on {room} rows, always. Two slots are empty here.", color=MUTED)
        say(plot, left, 11.9, "More tokens than slots: the step runs again with a slot for each.", color=MUTED)
        return png(figure)


def loop_png() -> bytes:
    """What runs when: on the CPU segment by segment, and on a device as a list of launches."""
    with drawing(10, 4.9) as figure:
        headline(figure, "A subnetwork runs all batches before the next one, which loads meanwhile")
        plot = canvas(figure, 36, 15.6)
        notes = {"color": MUTED}
        say(plot, 0, 0.6, "CPU loop", fontweight="bold")
        say(plot, 0, 2.0, "steps")
        say(plot, 0, 3.3, "loading")
        x = 9.0
        for steps, colour in ((3, ACCENT), (2, SECOND)):
            for batch in "ABC":
                box(plot, x, 1.5, 1.6 * steps, f"batch {batch}:\n{steps} steps", colour=colour)
                x += 1.6 * steps + 0.1
        box(plot, 5.5, 2.8, 3.5, "segment 1")
        box(plot, 9.0, 2.8, 3.5, "segment 2")
        box(plot, 23.7, 2.8, 3.5, "segment 3")
        say(
            plot,
            9,
            4.5,
            "Between segments the latents of a batch lie in memory, or on disk where a run can be resumed.",
            **notes,
        )
        say(plot, 0, 6.4, "Device loop", fontweight="bold")
        host, compute, copy = 7.2, 8.7, 10.2
        for name, y in (("host", host), ("compute stream", compute), ("copy stream", copy)):
            say(plot, 0, y + 0.5, name)
        box(plot, 5.5, host, 3.3, "queue batch A")
        box(plot, 8.9, host, 5.2, "load segment 2's engine")
        box(plot, 14.2, host, 2.9, "draw noise B")
        box(plot, 17.2, host, 3.3, "queue batch B")
        box(plot, 20.6, host, 4.2, "draw noise A, next")
        box(plot, 31.1, host, 4.6, "read the overflow", colour=MUTED)
        for x, batch in ((7.0, "A"), (20.0, "B")):
            box(plot, x, compute, 2.2, "take\nnoise")
            box(plot, x + 2.2, compute, 2.8, "condi-\ntioning")
            for step in range(3):
                box(plot, x + 5 + 1.9 * step, compute, 1.9, f"{batch}{step + 1}", colour=ACCENT)
        say(plot, 18.85, compute + 0.5, "waits", ha="center", **notes)
        box(plot, 17.1, copy, 2.7, "noise B")
        box(plot, 24.8, copy, 4.2, "noise A, segment 2")
        arrow(plot, (9.2, compute + 1), (17.1, copy + 0.3))
        arrow(plot, (19.8, copy + 0.1), (20.1, compute + 1))
        arrow(plot, (22.2, compute + 1), (24.8, copy + 0.3))
        for y, text in (
            (12.1, "Guidance and the sampler's formula are inside the graph, so a step is one launch."),
            (13.1, "With CUDA graphs one step of a subnetwork is captured for each batch size, then replayed."),
            (14.1, "Between the steps of a batch, neither the host nor the GPU waits for the other. Between batches,"),
            (
                14.9,
                "the GPU waits for the next noise. At a segment's end the host may read overflow counters or latents.",
            ),
        ):
            say(plot, 5.5, y, text, **notes)
        return png(figure)


if __name__ == "__main__":
    main()
