"""`dydit bench`: measures how long a step takes with several contenders (bundles, checkpoints, scripts).

Each contender runs in a process of its own, and they take turns, round by round: other load on the machine slows all of
them, and no contender's idle threads disturb another (sessions that shared a process made a 75 ms step take 104 ms).
The first `warmup` rounds are not counted; the first of all shows whether a contender runs here. `dydit.bench.timing`
says what a round is. Before a round counts, one step of each contender with a reference is compared with it, so that
nothing is timed that computes something else. Processes stay until the end, or, for models that do not fit into the
memory next to each other, start anew for each round (`apart`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from dydit.bench.timing import Job, Latents
from dydit.bench.turns import Progress, Running, Schedule, take_turns
from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import SamplingEntry
from dydit.diffusion.samplers import SamplerChoice
from dydit.errors import ConfigError
from dydit.files import new_folder, require_absent, write_json
from dydit.models.config import ModelConfig, UserPath
from dydit.parity.comparison import PIXEL_SPAN, picture_error, relative_l2
from dydit.planning.resampling import resampled
from dydit.plot_style import write_picture
from dydit.reports.bench_report import BenchReport, Comparison, Side, SideKind, SideResult
from dydit.reports.plots import latency_png
from dydit.reports.results import Machine, Measured, measured
from dydit.runtime.loop import packing_pays
from dydit.runtime.text_files import texts_for
from dydit.validation import Strict

REPORT = "bench.json"
MASKED, STATIC = "pytorch-masked", "pytorch-static"  # names of a checkpoint as a contender
REPORTED = {"cfg_scale", "latents", "threads", "repeats", "warmup", "seed", "apart"}
"""Settings that a report states."""


class BenchConfig(Strict):
    """What to time: a batch of one image per label; `cfg_scale` 1 disables guidance; None: the default of the model.

    `steps_measured`: sampling steps of a round, spread evenly over the run (all, if it has fewer). `threads`: cores for
    each contender (0: all). `sampling`: changes of the run, for bundles that can run others (`resampled`). `apart`: a
    new process for each round, after one that warms it up, so that one contender is in memory at a time.
    """

    labels: tuple[int, ...] = Field(default=(0,), min_length=1)
    seed: int = Field(default=0, ge=0)
    cfg_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    steps_measured: int = Field(default=25, ge=1)
    repeats: int = Field(default=7, ge=1)
    warmup: int = Field(default=1, ge=1)
    threads: int = Field(default=0, ge=0)
    device: str = "cpu"
    latents: Latents = Latents.RUN
    sampling: SamplerChoice = SamplerChoice()
    texts: UserPath | None = None
    apart: bool = False


def sides_of(
    bundle: Bundle, versus: Sequence[Bundle] = (), checkpoint: Path | None = None, backend: str = "onnxruntime"
) -> list[Side]:
    """The usual contenders: a bundle, others, and a checkpoint in PyTorch: masked, or static without routers.

    Raises `CheckpointError` as `load_checkpoint` does.
    """
    names = bundle_names([bundle, *versus])
    sides = [bundle_side(each, name, backend) for name, each in zip(names, [bundle, *versus], strict=True)]
    return sides if checkpoint is None else [*sides, checkpoint_side(checkpoint)]


def bundle_side(bundle: Bundle, name: str, backend: str, optional: bool = False) -> Side:
    """A bundle on a backend, with weights packed where a pipeline packs them."""
    packed = packing_pays(bundle.manifest, 1)
    path = str(bundle.path)
    return Side(name=name, kind=SideKind.BUNDLE, path=path, backend=backend, packed=packed, optional=optional)


def bundle_names(bundles: Sequence[Bundle]) -> list[str]:
    """A name for each bundle: that of its folder, or its path where an earlier one has that name."""
    names: list[str] = []
    for bundle in bundles:
        names.append(str(bundle.path) if bundle.path.name in names else bundle.path.name)
    return names


def checkpoint_side(checkpoint: Path) -> Side:
    """A checkpoint in PyTorch: masked, or static without routers. Raises as `load_checkpoint` does."""
    from dydit.checkpoints.checkpoint import load_checkpoint

    dynamic = load_checkpoint(checkpoint).config.dynamic
    name, kind = (MASKED, SideKind.TORCH_MASKED) if dynamic else (STATIC, SideKind.TORCH_STATIC)
    return Side(name=name, kind=kind, path=str(checkpoint))


def bench_files(
    bundle: Path,
    versus: Sequence[Path],
    checkpoint: Path | None,
    backend: str,
    config: BenchConfig,
    out: Path,
    progress: Progress | None = None,
) -> BenchReport:
    """Time a bundle, and others and a checkpoint where they are given; write bench.json and bench.png to the new
    folder `out`.

    Raises as `run_bench` and `Bundle.open` do, and `OutputError` if `out` exists or cannot be written.
    """
    require_absent(out)
    opened, *others = (Bundle.open(path, verify=False) for path in (bundle, *versus))
    sides = sides_of(opened, others, checkpoint, backend)
    with new_folder(out) as folder:
        report = run_bench(sides, config, folder, progress)
        write_picture(latency_png, report, folder / "bench.png")
    return report


def run_bench(
    sides: Sequence[Side],
    config: BenchConfig,
    out: Path | None = None,
    progress: Progress | None = None,
    run_of: Bundle | None = None,
    kept: Path | None = None,
    references: Sequence[str] = (),
) -> BenchReport:
    """Time all contenders and compare the first with each other one; with `out`, write `out/bench.json`.

    `run_of` defines the run (sampling steps, guided channels), by default the first bundle. `progress(done, total)`
    counts rounds. A contender whose script says that this machine lacks something is skipped and listed in `not_run`;
    so is an optional one that does not run here. `kept`: a folder for the rounds of every contender, with which an
    interrupted benchmark of the same settings continues; warm-ups are repeated. `references`: names; the errors of
    all contenders are measured against the first of these that runs. Raises `ConfigError` for contenders that cannot be
    compared, `BackendError` if one cannot run, and `DeviationError` if one deviates from its reference by more than the
    tolerance.
    """
    start, load_before = time.perf_counter(), os.getloadavg()[0]
    model, sampling, most = _common_run(sides, run_of, config.sampling)
    texts = texts_for(model, config.texts, max(config.labels) + 1)
    if texts is not None:
        model = model.with_texts(texts.count, texts.negative)
    if len(config.labels) > most:
        raise ConfigError(f"{len(config.labels)} labels, but a bundle was exported for batches up to {most}")
    for label in config.labels:
        if not 0 <= label < model.classes.rows:
            raise ConfigError(f"label {label} is outside 0..{model.classes.rows - 1}")
    settled = {"threads": config.threads or Machine.here().cores, "cfg_scale": model.guidance_scale(config.cfg_scale)}
    config = config.model_copy(update=settled)
    steps = spread_steps(sampling.steps, config.steps_measured)
    jobs = [job_of(side, config, model, sampling, steps) for side in sides]
    running, not_run, load_after = take_turns(
        jobs, Schedule(config.warmup, config.repeats, config.apart), kept, bool(references), progress or _silent
    )
    results = [_side_result(each, len(config.labels), sampling.steps) for each in running]
    by_name = {each.job.side.name: each for each in running}
    reference = next((by_name[name] for name in references if name in by_name), None)
    if reference is not None:
        results = [
            result.model_copy(update=_errors(each, reference, model))
            for result, each in zip(results, running, strict=True)
        ]
    report = BenchReport(
        batch=len(config.labels),
        **config.model_dump(include=REPORTED, mode="json"),
        steps=sampling.steps,
        steps_measured=steps,
        timesteps=tuple(sampling.timesteps[step] for step in steps),
        sides=tuple(results),
        comparisons=tuple(compare_sides(results[0], other) for other in results[1:]),
        not_run=tuple(not_run),
        reference="" if reference is None else reference.job.side.name,
        load_average=(load_before, load_after),
        machine=Machine.here(),
        seconds=round(time.perf_counter() - start, 3),
    )
    if out is not None:
        write_json(out / REPORT, report.to_json())
    return report


def _silent(done: int, total: int) -> None:
    """Show no progress."""


def spread_steps(steps: int, count: int) -> tuple[int, ...]:
    """`count` of the steps 0..steps-1, evenly spread, including the first and the last."""
    return tuple(int(step) for step in np.unique(np.linspace(0, steps - 1, min(count, steps)).round()))


def compare_sides(side: SideResult, other: SideResult) -> Comparison:
    """Compare a contender with another, round by round; with a bound if multiply-adds set one."""
    ratios = [second / first for first, second in zip(side.round_ms, other.round_ms, strict=True)]
    median, reason = float(np.median(ratios)), no_bound(side, other)
    allowed = None if reason else other.macs / side.macs
    return Comparison(
        side=side.side.name,
        other=other.side.name,
        ratios=tuple(ratios),
        median=median,
        min=min(ratios),
        max=max(ratios),
        allowed=allowed,
        achieved=None if allowed is None else median / allowed,
        no_bound=reason,
    )


def no_bound(side: SideResult, other: SideResult) -> str:
    """Why the multiply-adds of two contenders set no bound on their times; empty if they do.

    Where their backends, precisions or forms differ, a multiply-add costs each of them another time.
    """
    if SideKind.SCRIPT in (side.side.kind, other.side.kind):
        return "the multiply-adds of a script are unknown"

    def facts(of: SideResult) -> dict[str, str | None]:
        return {
            "backends": of.side.backend if of.side.kind is SideKind.BUNDLE else "PyTorch",
            "precisions": of.precision,
            "forms of the model": of.side.kind.value,
        }

    theirs = facts(other)
    for what, ours in facts(side).items():
        if ours != theirs[what]:
            return f"the {what} differ: {ours} and {theirs[what]}"
    return "" if side.macs > 0 else f"{side.side.name} computes no multiply-adds in its blocks"


def _common_run(
    sides: Sequence[Side], run_of: Bundle | None, choice: SamplerChoice
) -> tuple[ModelConfig, SamplingEntry, int]:
    """The model, the run and the largest batch that all contenders have in common. Verifies each bundle once."""
    if len({side.name for side in sides}) != len(sides):
        raise ConfigError(f"configurations need different names, not {', '.join(side.name for side in sides)}")
    bundles = [Bundle.open(path) for path in dict.fromkeys(s.path for s in sides if s.kind is SideKind.BUNDLE)]
    manifests = [resampled(bundle, choice).manifest for bundle in ([run_of] if run_of else []) + bundles]
    if not manifests:
        raise ConfigError("there is nothing to time; give at least one bundle")
    first = manifests[0]
    for other in manifests[1:]:
        if (model := first.model.sizes.without_routers()) != (second := other.model.sizes.without_routers()):
            name, *values = model.difference(second)
            raise ConfigError(
                f"the bundles cannot be compared: their model sizes differ ({name} {values[0]} and {values[1]})"
            )
        for what, ours, theirs in (
            ("sampling steps", first.sampling.steps, other.sampling.steps),
            ("guided channels", first.sampling.cfg_channels, other.sampling.cfg_channels),
        ):
            if ours != theirs:
                raise ConfigError(f"the bundles cannot be compared: their {what} differ ({ours} and {theirs})")
    return first.model, first.sampling, min(manifest.max_batch for manifest in manifests)


def job_of(side: Side, config: BenchConfig, model: ModelConfig, sampling: SamplingEntry, steps: tuple[int, ...]) -> Job:
    """What a contender is told to time: `steps` of the run `sampling`. Guidance and threads of `config` are settled."""
    shared = config.model_dump(include={"labels", "seed", "cfg_scale", "threads", "device", "latents", "texts"})
    return Job(
        side=side,
        sizes=model.sizes.without_routers(),
        steps=spread_steps(sampling.steps, config.steps_measured),
        run=sampling.config,
        process=model.diffusion,
        cfg_channels=sampling.cfg_channels,
        **shared,
    )


def _errors(each: Running, reference: Running, model: ModelConfig) -> dict[str, Measured]:
    """How far a contender is from a reference, for the worst image: see `SideResult`."""
    ours, theirs = each.facts, reference.facts
    assert ours is not None and ours.check is not None and ours.last is not None
    assert theirs is not None and theirs.check is not None and theirs.last is not None
    values = {"relative_l2": measured(relative_l2(ours.check, theirs.check).max()), "psnr": None}
    if each.job.latents is Latents.RUN:
        span = PIXEL_SPAN if model.samples_pixels else None
        error = picture_error(ours.last, theirs.last, span).max()
        values["psnr"] = measured(-20 * np.log10(error)) if error else None
    return values


def _side_result(each: Running, batch: int, steps: int) -> SideResult:
    facts, start = each.facts, each.record.start
    assert facts is not None
    table = np.array([counted.ms for counted in each.record.counted])
    means = table.mean(axis=1)
    median = float(np.median(means))
    return SideResult(
        side=each.job.side,
        load_seconds=start.loaded.seconds,
        subnets_loaded=start.loaded.subnets,
        round_ms=tuple(means.tolist()),
        step_ms=tuple(np.median(table, axis=0).tolist()),
        median_ms=median,
        min_ms=float(means.min()),
        max_ms=float(means.max()),
        peak_bytes=facts.peak_bytes,
        settled_bytes=facts.settled_bytes,
        first_seconds=start.seconds,
        disk_bytes=facts.disk_bytes,
        images_per_second=1e3 * batch / (median * steps),
        overflows=sum(counted.overflows for counted in each.record.counted),
        precision=start.loaded.precision,
        relative_l2=each.deviation,
        **facts.decided.model_dump(),
    )
