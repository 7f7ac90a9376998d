"""The paper's sweep of lambda and its ablations on a small model: quality and speed-up, beside the paper's figures.

    python benchmarks/ablations.py --work DIR [--json docs/benchmarks/ablations.json] [--plot docs/images/ablations.png]
    python benchmarks/ablations.py --markdown docs/benchmarks/ablations.json [--plot FILE]

Each row starts from one static checkpoint, and runs `dynamic` and `settle` of the recipe of the data with a few other
settings: a lambda; only the width routers or only the token routers; random routers, which stay; one decision for all
tokens of an image in a block (layer skipping). The last row, which the paper does not have, trains the static model for
as many iterations. Each row is exported with a subnetwork for each step in fp32, and samples on onnxruntime. Parts:

  train     the row's runs, from --static (default: the static digits model that comes with dydit)
  quality   `dydit evaluate --reference DATA` on --samples images: class consistency and Frechet distance
  routing   the FLOPs ratio that the routers decide in a run of up to 100 images
  latency   milliseconds of a step beside the static bundle, taking turns (`dydit.bench.bench`)

The token losses, which are not in the paper, pull the share of tokens to a target. It falls with lambda, from 1 through
the recipe's; with token routers alone it is the share at which the FLOPs ratio is lambda. Fixed routers have no losses.

Data and measures differ from the paper's, so only orders can be compared: each distance is divided by that of its own
baseline. By default `dynamic` has 0.15 of the recipe's iterations, and `settle` 0.6: enough for digits to reach lambda;
--dynamic-scale 1 --settle-scale 1 has all. DIR keeps everything, so that a killed script continues. The second command
prints the tables of a report.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dydit.bench.scripts import (
    finish,
    kept_bundle,
    kept_part,
    markdown_table,
    progress,
    require_settings,
    script_parser,
    settings_of,
)
from dydit.bench.small_models import Measures, latency, latency_figures, quality, routing_figures
from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind
from dydit.diffusion.samplers import Sampler
from dydit.errors import ConfigError, DyditError
from dydit.export.settings import ExportConfig
from dydit.files import sha256_of, write_atomic
from dydit.inspection.trace import trace_tokens
from dydit.models.config import ModelConfig
from dydit.models.macs import flops_ratio
from dydit.plot_style import in_few_colours
from dydit.quickstart.quickstart import ASSETS
from dydit.reports.bench_report import BenchReport
from dydit.reports.plots_ablations import Curve, ablations_png
from dydit.training.recipe import Recipe, Routed, Stage
from dydit.training.recipe_files import find_recipes
from dydit.training.sequence import train_sequence
from dydit.training.training_folder import has_run

Figures = dict[str, Any]
RECIPES = {"digits": "digits", "emoji": "uvit-emoji"}
TRACED, NEAR = 100, 0.02
LEAST_TOKENS = 0.02  # target of the token losses where token routers alone cannot reach lambda
START, LONGER, FULL = "static", "static-longer", "lambda-0.5"


@dataclass(frozen=True)
class Row:
    """A model that is trained. `target`: its lambda; 1: it is static. `overrides`: of its runs, as on the command line.
    `paper`: in the paper's ablation of DiT-S, the mean FID over five data sets."""

    title: str
    target: float
    overrides: tuple[str, ...] = ()
    paper: float = float("nan")

    @property
    def token_losses(self) -> bool:
        """Whether its token routers are trained."""
        return not {"routed=width", "random_routers=true"} & set(self.overrides)


SWEEP = {f"lambda-{value}": Row(f"lambda {value}", value) for value in (0.9, 0.8, 0.7, 0.5, 0.4, 0.3)}
ABLATIONS = {
    FULL: Row("width and tokens", 0.5, paper=16.94),
    "width": Row("width only", 0.5, ("routed=width",), 20.93),
    "tokens": Row("tokens only", 0.5, ("routed=tokens",), 35.12),
    "random": Row("random routers", 0.5, ("random_routers=true",), 136.01),
    "layer": Row("layer skipping instead of token skipping", 0.5, ("model.token_scope=layer",), 18.29),
}
ROWS = {**ABLATIONS, **SWEEP, LONGER: Row("static, trained as much longer", 1)}
SHOWN = {START: Row("static, where all rows start", 1), **ROWS}


@dataclass(frozen=True)
class Published:
    """A row of the paper's tables (Zhao et al. 2025): ImageNet at 256 pixels, 250 DDPM steps, a V100."""

    speed_up: float
    gflops: float
    fid: float


PAPER: dict[str, dict[float, Published]] = {
    "DiT-S": {
        1: Published(1.00, 6.07, 21.46),
        0.9: Published(1.03, 5.72, 21.06),
        0.8: Published(1.16, 4.94, 21.95),
        0.7: Published(1.27, 4.34, 23.01),
        0.5: Published(1.54, 3.16, 28.75),
        0.4: Published(1.71, 2.63, 36.21),
        0.3: Published(2.03, 1.96, 59.28),
    },
    "DiT-XL": {
        1: Published(1.00, 118.69, 2.27),
        0.7: Published(1.32, 84.33, 2.12),
        0.6: Published(1.49, 67.83, 2.18),
        0.5: Published(1.73, 57.88, 2.07),
        0.3: Published(2.40, 38.85, 3.36),
    },
}
"""By lambda; 1 is the static model."""


# Training


def lowest_ratio(model: ModelConfig) -> float:
    """The FLOPs ratio with all heads and channel groups and no token in any MLP: token routers alone reach no less."""
    counts = model.units.counts(np.ones((1, model.units.size), bool))
    return float(flops_ratio(model, counts, np.zeros((1, model.depth)))[0])


def token_target(recipe: Recipe, row: Row) -> float:
    """The target of the token losses of a row whose recipe, without overrides, is `recipe`."""
    if f"routed={Routed.TOKENS}" in row.overrides:
        lowest = lowest_ratio(recipe.model)
        return max(LEAST_TOKENS, (row.target - lowest) / (1 - lowest))
    return 1 - (1 - recipe.token_target) * (1 - row.target) / (1 - recipe.lambda_target)


def runs_of(row: Row, data: str, static: Path, scales: Mapping[Stage, float]) -> tuple[Recipe, ...]:
    """The runs of a row: dynamic and settle, or a static one of as many iterations. `scales`: of their iterations."""
    name = RECIPES[data]
    plain = [find_recipes(f"{name}-{stage}")[0] for stage in scales]
    if row.target == 1:
        iterations = sum(max(1, round(scales[recipe.stage] * recipe.iterations)) for recipe in plain)
        words = [f"init={static}", f"iterations={iterations}", f"learning_rate={plain[0].learning_rate}"]
        words.append(f"learning_rate_warmup={round(scales[plain[0].stage] * plain[0].learning_rate_warmup)}")
        return find_recipes(f"{name}-{Stage.STATIC}", words)
    runs = []
    for recipe in plain:
        scale = scales[recipe.stage]
        words = [f"iterations={max(1, round(scale * recipe.iterations))}", f"lambda_target={row.target}"]
        for setting in ("learning_rate_warmup", "ramp_iterations", "ramp_hold"):
            words.append(f"{setting}={round(scale * getattr(recipe, setting))}")
        words.append(f"token_target={token_target(recipe, row):.4f}" if row.token_losses else "token_weight=0")
        words += [f"init={static}"] * (recipe.stage is Stage.DYNAMIC)
        runs += find_recipes(f"{name}-{recipe.stage}", [*words, *row.overrides])
    return tuple(runs)


def trained(row: Row, folder: Path, title: str, options: Namespace) -> tuple[Path, Figures]:
    """The checkpoint of a row, and what its training took; continues in `folder`."""
    scales = {Stage.DYNAMIC: options.dynamic_scale, Stage.SETTLE: options.settle_scale}
    recipes, show = runs_of(row, options.data, options.static, scales), progress(f"{title}: training")
    resume = any(map(has_run, (folder, *(folder / stage for stage in Stage))))
    results = train_sequence(recipes, folder, resume, lambda done, total, _: show(done, total))
    return results[-1].model, {key: sum(each.summary[key] for each in results) for key in ("iterations", "seconds")}


# Measuring


def sampled(name: str, bundle: Bundle, folder: Path, options: Namespace) -> Figures:
    """The quality of a row's samples; continues in `folder`."""
    classifier = None if options.data == "digits" else options.work / "classifier.safetensors"
    show = progress(f"{name}: sampling")
    return quality(bundle, folder / "samples", Measures.of(options), options.data, classifier, progress=show)


def routed(bundle: Bundle, options: Namespace) -> Figures:
    """What the routers decide in a run."""
    measures = Measures.of(options)
    labels = measures.labels(bundle, min(TRACED, measures.samples))
    trace = trace_tokens(bundle, labels, measures.cfg_scale, measures.seed, measures.options)
    return routing_figures(bundle, trace.tokens)


def timed(name: str, bundle: Bundle, static: Bundle, options: Namespace) -> Figures:
    """A step of a row's bundle and of the static one, in turns."""
    return {"report": latency(bundle, static, Measures.of(options), progress=progress(f"{name}: timing")).to_json()}


def measure(names: Sequence[str], options: Namespace) -> dict[str, Figures]:
    """The parts of the static model that all start from, and of each row; those that DIR has are not measured again."""
    if options.threads:
        torch.set_num_threads(options.threads)
    folders = {name: options.work / name for name in (START, *names)}
    sampling, room = Sampler(options.sampler), max(TRACED, options.batch)
    config = ExportConfig(steps=options.steps, sampler=sampling, plan=PlanKind.PER_STEP, max_batch=room)
    static = kept_bundle(options.static, folders[START] / "bundle", config)
    if static.manifest.model.dynamic:
        raise ConfigError(f"{options.static} has routers; give a static model, from which all rows start")
    parts: dict[str, Figures] = {}
    for name, folder in folders.items():
        parts[name], bundle = {}, static
        if name != START:
            model, parts[name]["train"] = trained(ROWS[name], folder / "train", name, options)
            bundle = kept_bundle(model, folder / "bundle", config)
        wanted: dict[str, Callable[[], Figures]] = {"quality": partial(sampled, name, bundle, folder, options)}
        if bundle.manifest.model.dynamic:
            parts[name]["lowest_ratio"] = lowest_ratio(bundle.manifest.model)
            wanted["routing"] = partial(routed, bundle, options)
            wanted["latency"] = partial(timed, name, bundle, static, options)
        parts[name] |= {part: kept_part(folder / f"{part}.json", measured) for part, measured in wanted.items()}
        parts[name]["summary"] = summary(parts[name])
    return parts


def summary(parts: Figures) -> Figures:
    """The figures of a row that the tables have. A static row has the speed of the static model."""
    figures = {key: parts["quality"][key] for key in ("class_consistency", "frechet_distance")}
    if "latency" not in parts:
        return {**figures, "flops_ratio": 1.0, "speed_up": 1.0}
    report = BenchReport.parse(parts["latency"]["report"])
    return {
        **figures,
        **{key: parts["routing"][key] for key in ("flops_ratio", "token_ratio", "distinct_masks")},
        **latency_figures(report),
    }


# Reporting


def tables(rows: Mapping[str, Figures], data: str) -> str:
    """The sweep, the ablations and remarks, as Markdown. `rows`: parts and `summary` of each, as in the report."""
    figures = {name: each["summary"] for name, each in rows.items()}
    lines = [
        [SHOWN[name].title, *_cells(figures[name], figures[START]), *_published(name)]
        for name in (START, *SWEEP, LONGER)
        if name in figures
    ]
    head = ["", *_HEAD, "÷ static", *(f"{model}: GFLOPs; speed-up; FID, ÷ static" for model in PAPER)]
    blocks = [f"The sweep on {data}, and the paper's on ImageNet:", markdown_table(head, lines)]
    ablated = {name: figures[name] for name in ABLATIONS if name in figures}
    if ablated:
        base = FULL if FULL in ablated else START
        head = ["", *_HEAD, f"÷ {(SHOWN | ABLATIONS)[base].title}", "DiT-S, five sets: mean FID, ÷ width and tokens"]
        lines = [
            [row.title, *_cells(each, figures[base]), f"{row.paper:.2f}, {row.paper / ABLATIONS[FULL].paper:.2f}"]
            for row, each in ((ABLATIONS[name], each) for name, each in ablated.items())
        ]
        blocks += [f"The ablations on {data} at lambda 0.5, and the paper's:", markdown_table(head, lines)]
        blocks.append(orders(ablated))
    return "\n\n".join([*blocks, *remarks(rows)])


_HEAD = ("FLOPs ratio", "ms per step (static)", "speed-up", "allowed; reached", "class consistency", "Fréchet distance")


def _cells(of: Figures, base: Figures) -> list[str]:
    """The cells of `_HEAD`, and the distance relative to that of `base`."""
    times = ["-", "1", "-"]
    if "ms" in of:
        times = [f"{of['ms']:.1f} ({of['static_ms']:.1f})", f"{of['speed_up']:.2f}"]
        times.append(f"{of['allowed']:.2f}; {of['reached']:.0%}")
    distance = of["frechet_distance"]
    quality = [f"{of['class_consistency']:.1%}", f"{distance:.4f}", f"{distance / base['frechet_distance']:.2f}"]
    return [f"{of['flops_ratio']:.3f}", *times, *quality]


def _published(name: str) -> list[str]:
    """What the paper has for each of its models at the lambda of a row."""
    if name == LONGER:
        return ["-"] * len(PAPER)
    rows = [(of.get(SHOWN[name].target), of[1].fid) for of in PAPER.values()]
    return [
        f"{row.gflops:.2f}; {row.speed_up:.2f}; {row.fid:.2f}, {row.fid / fid:.2f}" if row else "-" for row, fid in rows
    ]


def orders(ablated: Mapping[str, Figures]) -> str:
    """The rows of the ablation from the best to the worst, ours and the paper's."""
    by_paper = sorted(ablated, key=lambda name: ABLATIONS[name].paper)
    by_ours = sorted(by_paper, key=lambda name: float(ablated[name]["frechet_distance"]))
    ours, paper = (", ".join(ABLATIONS[name].title for name in names) for names in (by_ours, by_paper))
    return f"From the best to the worst, here: {ours}. In the paper: {paper}."


def remarks(rows: Mapping[str, Figures]) -> list[str]:
    """What a reader has to know about the figures."""
    text = [
        "Data, sizes, hardware and measures differ from the paper's (ImageNet at 256 pixels and FID, a V100), so only "
        "the order of the figures can be compared."
    ]
    ratios = {name: rows[name]["summary"]["flops_ratio"] for name in ROWS if name in rows}
    if missed := [name for name, ratio in ratios.items() if abs(ratio - ROWS[name].target) > NEAR]:
        listed = ", ".join(f"{(SHOWN | ABLATIONS)[name].title} ({ratios[name]:.3f})" for name in missed)
        text.append(f"Not within {NEAR} of their lambda, so that their quality is that of another compute: {listed}.")
    if "tokens" in rows:
        text.append(
            "Token routers cannot shrink attention: whatever the lambda, with them alone the FLOPs ratio is at least "
            f"{rows['tokens']['lowest_ratio']:.3f}."
        )
    return text


def plot(rows: Mapping[str, Figures], data: str) -> bytes:
    """The picture of a report. `rows`: as for `tables`."""
    figures = {name: each["summary"] for name, each in rows.items()}
    base = figures[START]["frechet_distance"]
    places = {name: (each["speed_up"], each["frechet_distance"] / base) for name, each in figures.items()}
    ours = ((*places[name], f"{row.target:g}") for name, row in SWEEP.items() if name in places)
    curves = [Curve(f"ours, {data}", ((1.0, 1.0, ""), *ours))]
    for model, of in PAPER.items():
        points = ((row.speed_up, row.fid / of[1].fid, f"{at:g}" if at < 1 else "") for at, row in of.items())
        curves.append(Curve(f"the paper, {model}", tuple(points)))
    marks = {ROWS[LONGER].title: places[LONGER]} if LONGER in places else {}
    bars = {
        row.title: (places[name][1] / places[FULL][1], row.paper / ABLATIONS[FULL].paper)
        for name, row in ABLATIONS.items()
        if FULL in places and name in places
    }
    detail = f"Ours: {data}, CPU. The paper: ImageNet (ablations: DiT-S, five sets), V100. Only orders can be compared."
    return in_few_colours(ablations_png(curves, marks, bars, detail))


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and measure what is not there yet, print, and draw."""
    parser = script_parser(
        __doc__,
        {f"{stage}_scale": f"factor on the iterations of the recipe's {stage} run" for stage in ("dynamic", "settle")},
        samples=1000,
        steps=20,
        sampler=Sampler.DPM_SOLVER.value,
        cfg_scale=1.5,
        batch=20,
        repeats=7,
        threads=0,
        seed=0,
        dynamic_scale=0.15,
        settle_scale=0.6,
    )
    parser.add_argument("--work", type=Path, help="folder for runs, bundles, samples and figures")
    parser.add_argument("--data", choices=list(RECIPES), default="digits", help="what to train on  [digits]")
    parser.add_argument("--static", type=Path, help="the static checkpoint that all rows start from")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=" ".join(ROWS))
    parser.add_argument("--plot", type=Path, help="draw the sweep and the ablations into this PNG file")
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="print the tables of a report, measure nothing")
    options = parser.parse_args(arguments)
    if options.markdown:
        report = json.loads(options.markdown.read_text())
    else:
        if options.work is None:
            parser.error("give --work DIR, or --markdown JSON")
        if options.static is None and options.data != "digits":
            parser.error(f"--data {options.data} needs --static, a model of `dydit train --recipe {RECIPES['emoji']}`")
        options.static = options.static or ASSETS / "dit.safetensors"
        settings = {key: value for key, value in settings_of(options).items() if key not in ("rows", "markdown")}
        try:
            settings["static"] = sha256_of(options.static)
            require_settings(options.work, settings)
            report = {"settings": settings, "rows": measure(options.rows, options)}
        except (DyditError, OSError) as error:
            print(error, file=sys.stderr)
            return 2
    print(tables(report["rows"], report["settings"]["data"]))
    if options.plot:
        write_atomic(options.plot, plot(report["rows"], report["settings"]["data"]))
    return 0 if options.markdown else finish(options, report, {})


if __name__ == "__main__":
    sys.exit(main())
