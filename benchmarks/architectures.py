"""Published sizes of three architectures: export, memory, and how much of the saved multiply-adds becomes time.

    python benchmarks/architectures.py --work DIR [--json docs/benchmarks/architectures.json]
    python benchmarks/architectures.py --markdown docs/benchmarks/architectures.json

It makes the figures for DiT, U-ViT and PixArt-alpha on a CPU (docs/benchmarks/architectures.json); the second command
prints them as the table of docs/results.md.

The models are DiT-XL/2 (256 px), which is the yardstick, U-ViT-S/2 (CIFAR-10, unconditional), U-ViT-H/2 (256 px) and
PixArt-XL/2 (256 px, texts of 120 tokens). They have random weights, and routers set to a FLOPs ratio near 0.5. All
bundles are fp32, exported with the default options, and run on onnxruntime. Parts of each model:

  checkpoint  the model and its static form
  export      `dydit export` of both, each a process of its own: seconds, peak memory, size of the bundle
  sample      one image in a few steps, in a process of its own: peak memory
  step        milliseconds of a step of one image, from noise, all contenders taking turns (`dydit.bench.bench`): the
              dynamic bundle, the static bundle, and eager PyTorch, masked and static

Multiply-adds of long skips and of cross-attention are the same in the dynamic and in the static model. So there are two
bounds of the speed-up over the static bundle: of the blocks' dynamic multiply-adds, as the paper counts them, and of
all that the blocks compute. Limit: each model reaches at least 0.9 of the share of the second bound that DiT reaches.
Exit code 1 where one is missed.

DIR keeps the figures of each part, so that an interrupted run continues; models and bundles are deleted when all parts
of a model are measured. It takes about 20 minutes on two cores, 12 GB of disk and 16 GB of memory, and nothing else
should run meanwhile. --only measures some of the models; the others are reported if DIR has their figures. --small
tries the script with tiny models, for which there is no limit.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dydit.bench.bench import MASKED, STATIC, BenchConfig, run_bench
from dydit.bench.scripts import (
    ProcessResult,
    finish,
    kept_part,
    markdown_table,
    progress,
    random_checkpoint,
    require_settings,
    run_dydit,
    run_process,
    script_parser,
    settings_of,
    static_checkpoint,
)
from dydit.bench.timing import Latents
from dydit.bundle.bundle import Bundle
from dydit.diffusion.samplers import SamplerChoice
from dydit.models.config import ModelConfig
from dydit.models.dit import config as dit
from dydit.models.macs import static_macs
from dydit.models.pixart import config as pixart
from dydit.models.uvit import config as uvit
from dydit.planning.resampling import resampled
from dydit.reports.bench_report import BenchReport, Side, SideKind
from dydit.runtime.bulk.run import OutputOptions, sample_to_folder
from dydit.runtime.request import SampleRequest
from dydit.runtime.text_files import with_texts_for

DYNAMIC_BUNDLE, STATIC_BUNDLE = "dynamic", "static"
SAMPLED_STEPS, LABEL = 4, 0
OF_YARDSTICK = 0.9
PARTS = ("checkpoint", "export", "sample", "step")
Part = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A published model, and a tiny one of the same kind. `cfg_scale`: the published one; 1 without guidance."""

    title: str
    published: ModelConfig
    small: ModelConfig
    cfg_scale: float


_TINY: dict[str, Any] = {"hidden_size": 32, "num_heads": 4, "patch_size": 2, "input_size": 8}
YARDSTICK = "dit-xl"
MODELS = {
    YARDSTICK: Model("DiT-XL/2, 256 px", dit.preset("XL/2"), dit.DiTConfig(**_TINY, depth=2, num_classes=10), 4.0),
    "uvit-s": Model(
        "U-ViT-S/2, CIFAR-10", uvit.preset("cifar10-S/2"), uvit.UViTConfig(**_TINY, depth=3, in_channels=3), 1.0
    ),
    "uvit-h": Model(
        "U-ViT-H/2, 256 px",
        uvit.preset("imagenet256-H/2"),
        uvit.UViTConfig(**_TINY, depth=3, num_classes=10, null_class_row=True, conv=False),
        1.4,
    ),
    "pixart-xl": Model(
        "PixArt-XL/2, 256 px",
        pixart.preset("XL/2"),
        pixart.PixArtConfig(**_TINY, depth=2, caption_channels=16, text_tokens=6, interpolation_scale=1),
        4.5,
    ),
}


@dataclass(frozen=True)
class Task:
    """A model to measure. `folder`: for its weights, bundles and figures."""

    name: str
    folder: Path
    small: bool
    steps: int
    repeats: int

    @property
    def config(self) -> ModelConfig:
        """The configuration to measure."""
        return MODELS[self.name].small if self.small else MODELS[self.name].published

    def checkpoint(self, form: str) -> Path:
        """The file of the dynamic or of the static model."""
        return self.folder / f"{form}.safetensors"

    def in_child(self, function: str) -> ProcessResult:
        """A function of this script in a process of its own."""
        words = ["--child", function, self.name, *(["--small"] if self.small else [])]
        return run_process([sys.executable, __file__, "--work", self.folder.parent, *words])


def fixed_macs(config: ModelConfig) -> int:
    """Multiply-adds of all blocks for one image that no router changes: of long skips, or of cross-attention.

    Keys and values of a text are not among them, because a bundle computes them once for a run.
    """
    d = config.hidden_size
    if isinstance(config, uvit.UViTConfig):
        return sum(map(config.has_skip, range(config.depth))) * config.tokens * 2 * d * d
    if isinstance(config, pixart.PixArtConfig):
        return config.depth * (2 * config.tokens * d * d + 2 * config.tokens * config.text_tokens * d)
    return 0


def make_checkpoints(task: Task) -> Part:
    """The model, with random weights, and its static form."""
    dynamic = random_checkpoint(task.checkpoint(DYNAMIC_BUNDLE), task.config)
    static = static_checkpoint(task.checkpoint(STATIC_BUNDLE), dynamic)
    return {
        "bytes": dynamic.path.stat().st_size,
        "dense_fp32_bytes": 4 * sum(tensor.numel() for tensor in static.state.values()),
        "dynamic_macs": static_macs(task.config),
        "fixed_macs": fixed_macs(task.config),
    }


def measure_export(task: Task, done: Part) -> Part:
    """The bundles of both forms."""
    part = {}
    for form in (DYNAMIC_BUNDLE, STATIC_BUNDLE):
        out = task.folder / form
        shutil.rmtree(out, ignore_errors=True)  # a part is measured whole
        result = run_dydit("export", task.checkpoint(form), "--out", out, "--json")
        size = json.loads(result.output)["bytes"]
        part[form] = {
            "seconds": result.seconds,
            "peak_bytes": result.peak_bytes,
            "peak_of_checkpoint": result.peak_bytes / task.checkpoint(form).stat().st_size,
            "bundle_bytes": size,
            "bundle_of_dense": size / done["checkpoint"]["dense_fp32_bytes"],
        }
    return part


def sample_image(task: Task) -> Part:
    """One image in a few steps, of a random text if the model takes texts."""
    bundle = resampled(Bundle.open(task.folder / DYNAMIC_BUNDLE), SamplerChoice(steps=SAMPLED_STEPS))
    request = SampleRequest(labels=(LABEL,), cfg_scale=MODELS[task.name].cfg_scale)
    out, latents = task.folder / "sampled", task.folder / "sampled.npz"
    done = sample_to_folder(with_texts_for(bundle, None, 1), request, out, OutputOptions(latents_out=latents))
    return {"seconds": done.seconds}


def measure_sample(task: Task, done: Part) -> Part:
    """The memory of a process that samples."""
    shutil.rmtree(task.folder / "sampled", ignore_errors=True)
    result = task.in_child("sample")
    return {
        "steps": SAMPLED_STEPS,
        "seconds": result.seconds,
        "peak_bytes": result.peak_bytes,
        "peak_of_dense": result.peak_bytes / done["checkpoint"]["dense_fp32_bytes"],
    }


def measure_step(task: Task, done: Part) -> Part:
    """A step of all contenders, taking turns."""
    bundles = {form: str(task.folder / form) for form in (DYNAMIC_BUNDLE, STATIC_BUNDLE)}
    checkpoint = str(task.checkpoint(DYNAMIC_BUNDLE))
    sides = [
        *(Side(name=form, kind=SideKind.BUNDLE, path=path) for form, path in bundles.items()),
        Side(name=STATIC, kind=SideKind.TORCH_STATIC, path=checkpoint),
        Side(name=MASKED, kind=SideKind.TORCH_MASKED, path=checkpoint),
    ]
    config = BenchConfig(
        labels=(LABEL,),
        cfg_scale=MODELS[task.name].cfg_scale,
        steps_measured=task.steps,
        repeats=task.repeats,
        latents=Latents.NOISE,
    )
    return {"report": run_bench(sides, config, progress=progress(f"{task.name}: step")).to_json()}


def measure(task: Task) -> Part:
    """All parts of a model that are not measured yet, and then its weights are deleted."""
    task.folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[Task, Part], Part]] = {
        "checkpoint": lambda task, _: json.loads(task.in_child("checkpoint").output.splitlines()[-1]),
        "export": measure_export,
        "sample": measure_sample,
        "step": measure_step,
    }
    done: Part = {}
    for name in PARTS:
        done[name] = kept_part(task.folder / f"{name}.json", partial(parts[name], task, done))
        print(f"{task.name}, {name}: done", flush=True)
    for form in (DYNAMIC_BUNDLE, STATIC_BUNDLE):
        task.checkpoint(form).unlink(missing_ok=True)
        shutil.rmtree(task.folder / form, ignore_errors=True)
    return done


def summary(parts: Part) -> Part:
    """The figures of a model that are derived from its parts.

    `decided`, `computed`: the FLOPs ratio of the routers' decisions, and that of what the bundle computes. `allowed`,
    `reached`: the speed-up over the static bundle that multiply-adds allow, and the measured share of it. With `_all`,
    the fixed multiply-adds count on both sides.
    """
    report, of_checkpoint = BenchReport.parse(parts["step"]["report"]), parts["checkpoint"]
    dynamic, static, pair = report.side(DYNAMIC_BUNDLE), report.side(STATIC_BUNDLE), report.comparison(STATIC_BUNDLE)
    fixed, budget = of_checkpoint["fixed_macs"], of_checkpoint["dynamic_macs"]
    blocks, everything = static.macs / dynamic.macs, (static.macs + fixed) / (dynamic.macs + fixed)
    return {
        "decided": float(np.mean(dynamic.flops_ratio)),
        "computed": dynamic.macs / budget,
        "fixed_share": fixed / (budget + fixed),
        "speed_up": pair.median,
        "allowed": blocks,
        "reached": pair.median / blocks,
        "allowed_all": everything,
        "reached_all": pair.median / everything,
        "speed_up_over_pytorch_static": report.comparison(STATIC).median,
        "speed_up_over_pytorch_masked": report.comparison(MASKED).median,
    }


def limits(summaries: Mapping[str, Part]) -> dict[str, bool]:
    """Which limits hold, of the models that are there beside the yardstick."""
    if YARDSTICK not in summaries:
        return {}
    best = summaries[YARDSTICK]["reached_all"]
    held = {}
    for name, figures in summaries.items():
        share = figures["reached_all"] / best
        if name != YARDSTICK:
            sentence = f"{name}: reaches {share:.3f} of the share of the bound that {YARDSTICK} reaches"
            held[f"{sentence}, at least {OF_YARDSTICK}"] = share >= OF_YARDSTICK
    return held


def table(models: Mapping[str, Part]) -> str:
    """A column for each model, as Markdown. `models`: the parts of each and its `summary`, as in the report."""

    def times(side: str) -> Callable[[Part], str]:
        def text(of: Part) -> str:
            result = BenchReport.parse(of["step"]["report"]).side(side)
            return f"{result.median_ms:,.0f} ({result.min_ms:,.0f} to {result.max_ms:,.0f})"

        return text

    def derived(key: str, digits: int = 2) -> Callable[[Part], str]:
        return lambda of: f"{of['summary'][key]:.{digits}f}"

    rows: Sequence[tuple[str, Callable[[Part], str]]] = (
        (
            "dynamic multiply-adds of the blocks, one image",
            lambda of: f"{of['checkpoint']['dynamic_macs'] / 1e9:.1f} G",
        ),
        ("fixed multiply-adds, share of all in the blocks", lambda of: f"{of['summary']['fixed_share']:.1%}"),
        ("`dydit export`: time", lambda of: f"{of['export'][DYNAMIC_BUNDLE]['seconds']:.1f} s"),
        (
            "`dydit export`: peak memory, relative to the checkpoint",
            lambda of: _memory(of["export"][DYNAMIC_BUNDLE], "peak_of_checkpoint"),
        ),
        (
            "size of the bundle, in dense fp32 models",
            lambda of: f"{of['export'][DYNAMIC_BUNDLE]['bundle_of_dense']:.2f}",
        ),
        (
            f"sampling in {SAMPLED_STEPS} steps: peak memory, in dense fp32 models",
            lambda of: _memory(of["sample"], "peak_of_dense"),
        ),
        ("ms per step: dynamic bundle", times(DYNAMIC_BUNDLE)),
        ("ms per step: static bundle", times(STATIC_BUNDLE)),
        ("ms per step: PyTorch, static", times(STATIC)),
        ("ms per step: PyTorch, masked", times(MASKED)),
        ("FLOPs ratio that the routers decide", derived("decided", 3)),
        ("FLOPs ratio that is computed", derived("computed", 3)),
        ("speed-up over the static bundle", derived("speed_up")),
        ("dynamic multiply-adds allow; share that is reached", lambda of: _of_bound(of, "")),
        ("all multiply-adds of the blocks allow; share that is reached", lambda of: _of_bound(of, "_all")),
        ("speed-up over PyTorch, static", derived("speed_up_over_pytorch_static")),
        ("speed-up over PyTorch, masked", derived("speed_up_over_pytorch_masked")),
    )
    head = ["", *(MODELS[name].title for name in models)]
    return markdown_table(head, [[title, *(text(of) for of in models.values())] for title, text in rows])


def _memory(of: Part, ratio: str) -> str:
    return f"{of[ratio]:.2f} ({of['peak_bytes'] / 1e9:.2f} GB)"


def _of_bound(of: Part, kind: str) -> str:
    return f"{of['summary'][f'allowed{kind}']:.2f}; {of['summary'][f'reached{kind}']:.0%}"


CHILDREN: dict[str, Callable[[Task], Part]] = {"checkpoint": make_checkpoints, "sample": sample_image}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the parts that are not there yet, print, and tell by the exit code whether the limits hold."""
    parser = script_parser(__doc__, {"steps": "sampling steps of a round"}, steps=4, repeats=5)
    parser.add_argument("--work", type=Path, help="folder for models, bundles and figures")
    parser.add_argument("--only", action="append", choices=list(MODELS), help="a model; may be repeated  [all]")
    parser.add_argument("--small", action="store_true", help="tiny models of the same kinds, to try the script")
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="print the table of a report, measure nothing")
    parser.add_argument("--child", nargs=2, help="(internal) run one function of this script")
    options = parser.parse_args(arguments)
    if options.markdown:
        print(table(json.loads(options.markdown.read_text())["models"]))
        return 0
    if options.work is None:
        parser.error("give --work DIR, or --markdown JSON")
    work: Path = options.work
    tasks = {name: Task(name, work / name, options.small, options.steps, options.repeats) for name in MODELS}
    if options.child:
        function, name = options.child
        print(json.dumps(CHILDREN[function](tasks[name])))
        return 0
    settings = {key: settings_of(options)[key] for key in ("small", "steps", "repeats")}
    require_settings(work, settings)
    models = {}
    for name, task in tasks.items():
        if not options.only or name in options.only or all((task.folder / f"{part}.json").exists() for part in PARTS):
            parts = measure(task)
            models[name] = {**parts, "summary": summary(parts)}
    print(table(models))
    held = {} if options.small else limits({name: parts["summary"] for name, parts in models.items()})
    return finish(options, {"settings": settings, "models": models}, held)


if __name__ == "__main__":
    sys.exit(main())
