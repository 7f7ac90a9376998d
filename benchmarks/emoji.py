"""The emoji models: quality beside a static model trained equally long, what routing saves, parity, and the speed-up.

    dydit train --recipe uvit-emoji-static --out START
    dydit train --recipe uvit-emoji-static --init START/model.safetensors --out STATIC iterations=4500 \
        learning_rate=5e-4
    dydit train --recipe uvit-emoji-dynamic --init START/model.safetensors --out ROUTERS
    dydit train --recipe uvit-emoji-settle --init ROUTERS/model.safetensors --out DYNAMIC \
        teacher=STATIC/model.safetensors teacher_weight=8
    python benchmarks/emoji.py uvit --static STATIC/model.safetensors --dynamic DYNAMIC/model.safetensors \
        --work DIR --json docs/benchmarks/emoji_uvit.json --pictures docs/images

The second command trains the static model that the dynamic one starts from for as many further iterations as that has,
a control that the paper does not have; it also teaches the dynamic one. For PixArt the recipe is pixart-emoji, and all
commands take --data DATA, the folder that `dydit prepare emoji --text-encoder ...` writes.

Both models sample the same labels from the same noise on onnxruntime, with an exact subnetwork for each step. A U-ViT
samples all classes in turn; a PixArt samples the names of emoji that are spread over all of them. Quality is measured
as `dydit evaluate --reference emoji` does. --work keeps all parts, so that an interrupted script continues. Limits:
FLOPs ratio within 0.03 of the lambda of the recipe; Fréchet distance at most 1.15 times the static model's; more than
20 distinct masks; a standard deviation over images of the share of tokens above 0.02; parity. Exit code 1 where one is
missed.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dydit.bench.scripts import finish, kept_bundle, kept_part, progress, require_settings, script_parser, settings_of
from dydit.bench.small_models import Measures, latency, latency_figures, quality, routing_figures
from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind
from dydit.bundle.texts import Texts
from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.data.prepared import PreparedData
from dydit.data.small_sets import Emoji
from dydit.diffusion.samplers import Sampler
from dydit.export.settings import ExportConfig
from dydit.files import sha256_of, write_atomic
from dydit.inspection.trace import Trace, trace_tokens
from dydit.parity.parity import ParityConfig, run_parity
from dydit.plot_style import in_few_colours
from dydit.reports.bench_report import BenchReport
from dydit.reports.plots_masks import masks_png, tokens_png
from dydit.reports.plots_samples import side_by_side_png
from dydit.runtime.text_files import write_texts
from dydit.training.recipe_files import find_recipes

STATIC, DYNAMIC = "static", "dynamic"
TRACED, SHOWN_STEPS, SHOWN_IMAGES, ROWS = 100, 6, 6, 3
NEAR, MOST_DISTANCE, LEAST_MASKS, LEAST_DEVIATION = 0.03, 1.15, 20, 0.02
CAPTIONS = (
    "red apple",
    "cat face",
    "sunflower",
    "rocket",
    "smiling face with sunglasses",
    "octopus",
    "sailboat",
    "watermelon",
)
"""What is shown of a PixArt."""


@dataclass(frozen=True)
class Bundles:
    """The exported models. `classes`: the class of each text, `texts`: a file of them; None for a U-ViT."""

    by_name: dict[str, Bundle]
    names: tuple[str, ...]
    classes: np.ndarray | None = None
    texts: Path | None = None

    @property
    def dynamic(self) -> Bundle:
        """The bundle of the dynamic model."""
        return self.by_name[DYNAMIC]


def chosen_texts(data: PreparedData, count: int) -> tuple[Texts, np.ndarray]:
    """The captions of `CAPTIONS`, then of emoji that are spread over the data, `count` in all; and their classes."""
    emoji = Emoji()
    first = [emoji.captions.index(caption) for caption in CAPTIONS]
    spread = [index for index in np.linspace(0, len(emoji) - 1, count).astype(int) if index not in first]
    indices = np.array([*first, *spread][:count])
    examples = data.batch(indices, [np.random.default_rng(0) for _ in indices])
    if data.info.source != "emoji" or (examples.labels != emoji.labels[indices]).any() or examples.captions is None:
        raise SystemExit(f"{data.folder} is not what `dydit prepare emoji --text-encoder ...` writes")
    captions, empty = examples.captions, data.no_caption()
    texts = Texts(
        np.concatenate([captions.embeddings, empty.embeddings]),
        np.concatenate([captions.mask, empty.mask]),
        negative=True,
        prompts=tuple(emoji.captions[index] for index in indices),
    )
    return texts, examples.labels


def exported(options: Namespace) -> Bundles:
    """Both bundles; those in --work stay."""
    config = ExportConfig(
        steps=options.steps, sampler=Sampler(options.sampler), plan=PlanKind.PER_STEP, max_batch=TRACED
    )
    paths = {STATIC: options.static, DYNAMIC: options.dynamic}
    bundles = {name: kept_bundle(path, options.work / name / "bundle", config) for name, path in paths.items()}
    if options.model == "uvit":
        return Bundles(bundles, bundles[DYNAMIC].manifest.model.class_names or Emoji().class_names or ())
    texts, classes = chosen_texts(PreparedData(options.data), options.samples)
    file = options.work / "texts.npz"
    few = Texts(
        np.concatenate([texts.embeddings[:TRACED], texts.embeddings[-1:]]),
        np.concatenate([texts.mask[:TRACED], texts.mask[-1:]]),
        negative=True,
    )
    write_texts(file, few)
    return Bundles({name: each.with_texts(texts) for name, each in bundles.items()}, texts.prompts or (), classes, file)


def measure(bundles: Bundles, measures: Measures, options: Namespace) -> tuple[dict[str, Any], Trace]:
    """All figures; those in --work are not measured again. And the traced run."""
    work, figures = options.work, {}
    for name, bundle in bundles.by_name.items():

        def sampled(
            bundle: Bundle = bundle, folder: Path = work / name / "samples", name: str = name
        ) -> dict[str, Any]:
            keep, show = work / "classifier.safetensors", progress(f"{name}: sampling")
            return quality(bundle, folder, measures, "emoji", keep, bundles.classes, show)

        figures[name] = kept_part(work / name / "quality.json", sampled)
    labels = measures.labels(bundles.dynamic, min(TRACED, measures.samples))
    tracing = (measures.cfg_scale, measures.seed, measures.options, progress("routing"))
    trace = trace_tokens(bundles.dynamic, labels, *tracing)
    timed = kept_part(work / "latency.json", lambda: {"report": stepped(bundles, measures).to_json()})
    figures |= {
        "routing": routing_figures(bundles.dynamic, trace.tokens),
        "latency": latency_figures(BenchReport.parse(timed["report"])),
        "parity": kept_part(work / "parity.json", lambda: checked(bundles, measures, options)),
    }
    return figures, trace


def stepped(bundles: Bundles, measures: Measures) -> BenchReport:
    """A step of the dynamic model and of the static one, taking turns."""
    return latency(bundles.dynamic, bundles.by_name[STATIC], measures, bundles.texts, progress("timing"))


def checked(bundles: Bundles, measures: Measures, options: Namespace) -> dict[str, Any]:
    """Parity of the dynamic bundle with PyTorch, on four images."""
    config = ParityConfig(
        labels=measures.labels(bundles.dynamic, 4),
        cfg_scale=measures.cfg_scale,
        every=max(1, options.steps // 10),
        texts=bundles.texts,
    )
    report = run_parity(bundles.dynamic, load_checkpoint(options.dynamic), config, progress=progress("parity"))
    return {"ok": report.ok, "summary": report.summary, "worst": {each.name: each.worst for each in report.checks}}


def target_of(model: str) -> float:
    """The lambda of the recipe of a model."""
    (recipe,) = find_recipes(f"{model}-emoji-dynamic", data_needed=False)
    return recipe.lambda_target


def limits(figures: dict[str, Any], target: float) -> dict[str, bool]:
    """Which limits hold. `target`: the lambda of the recipe."""
    routed, distance = figures["routing"], figures[DYNAMIC]["frechet_distance"]
    return {
        f"FLOPs ratio within {NEAR} of {target}": abs(routed["flops_ratio"] - target) <= NEAR,
        f"Frechet distance at most {MOST_DISTANCE} of the static model's": distance
        <= MOST_DISTANCE * figures[STATIC]["frechet_distance"],
        f"more than {LEAST_MASKS} distinct masks": routed["distinct_masks"] > LEAST_MASKS,
        f"deviation of the share of tokens over images above {LEAST_DEVIATION}": routed["token_ratio_std"]
        > LEAST_DEVIATION,
        "parity": figures["parity"]["ok"],
    }


def sampled_images(folder: Path, count: int) -> np.ndarray:
    """The first images of a sampling run, f32 [n, 3, 32, 32] in [-1, 1]."""
    with np.load(folder / "samples.npz") as arrays:
        return arrays["arr_0"][:count].astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1


def draw(bundles: Bundles, trace: Trace, options: Namespace) -> None:
    """Write three pictures: samples of both models side by side, masks, and routed tokens."""
    manifest, name = bundles.dynamic.manifest, f"emoji-{options.model}"
    columns = bundles.names[: len(CAPTIONS)] if bundles.texts else bundles.names
    groups = {}
    for model in bundles.by_name:
        rows = 1 if bundles.texts else ROWS
        images = sampled_images(options.work / model / "samples", rows * len(columns))
        groups[model] = images.reshape(rows, len(columns), *images.shape[1:])
    times = np.asarray(manifest.sampling.timesteps)
    shown = np.linspace(0, len(times) - 1, SHOWN_STEPS).astype(int)
    images = slice(0, SHOWN_IMAGES)
    pictures = {
        name: in_few_colours(side_by_side_png(groups, columns)),
        f"{name}-masks": masks_png(manifest.step_masks(), manifest.model.units, times.tolist()),
        f"{name}-tokens": tokens_png(
            trace.latents[images],
            trace.tokens[shown, :, images],
            times[shown].tolist(),
            bundles.names[images],
            share=trace.token_share,
        ),
    }
    for file, picture in pictures.items():
        write_atomic(options.pictures / f"{file}.png", picture)


def main() -> int:
    """Run, print, draw, and tell by the exit code whether the limits hold."""
    parser = script_parser(
        __doc__,
        samples=954,
        steps=50,
        sampler=Sampler.DPM_SOLVER.value,
        cfg_scale=1.5,
        batch=18,
        repeats=7,
        threads=0,
        seed=0,
    )
    parser.add_argument("model", choices=["uvit", "pixart"], help="which models")
    for name in (STATIC, DYNAMIC):
        parser.add_argument(f"--{name}", type=Path, required=True, help=f"the {name} checkpoint")
    parser.add_argument("--data", type=Path, help="for pixart: the folder of `dydit prepare emoji`")
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps bundles, samples and figures")
    parser.add_argument("--pictures", type=Path, help="draw into this folder")
    options = parser.parse_args()
    if options.model == "pixart" and options.data is None:
        parser.error("pixart needs --data, a folder that `dydit prepare emoji --text-encoder ...` writes")
    files = (STATIC, DYNAMIC, "data")
    settings = {name: value for name, value in settings_of(options).items() if name not in files}
    settings |= {name: sha256_of(getattr(options, name)) for name in (STATIC, DYNAMIC)}
    require_settings(options.work, settings)
    bundles = exported(options)
    figures, trace = measure(bundles, Measures.of(options), options)
    if options.pictures:
        draw(bundles, trace, options)
    for name, values in figures.items():
        shown = {key: value for key, value in values.items() if isinstance(value, float | int)}
        print(name.ljust(9), ", ".join(f"{key} {value:.4g}" for key, value in shown.items()))
    return finish(options, {"settings": settings, **figures}, limits(figures, target_of(options.model)))


if __name__ == "__main__":
    sys.exit(main())
