"""`dydit calibrate`: sample a dynamic model, count its routed tokens, choose capacities, and check them on other
images.

The model is sampled as one graph of dynamic width with dynamic routing, which computes exactly what every plan and
routing computes. A work folder keeps the counts of finished batches, so that a killed run continues. Images are not
kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import AliasChoices, Field, field_validator, model_validator

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind
from dydit.calibrate import capacity
from dydit.calibrate.activation_ranges import ActivationRanges
from dydit.calibrate.calibration_file import Calibration, OverflowRates, TokenCalibration, plan_sha256
from dydit.calibrate.capacity import CapacityConfig, Groups, drawn_for, require_samples
from dydit.calibrate.observers import ObservedRun, observe
from dydit.calibrate.precision_search import Announce, SearchConfig, SearchInputs, search
from dydit.calibrate.range_methods import Method
from dydit.calibrate.sliced_sampler import spread_batches
from dydit.calibrate.smoothing_search import FoundSmoothing, find_smoothing
from dydit.calibrate.tokens import TokenCounter, TokenCounts, merge, spread_labels, spread_scales
from dydit.checkpoints.checkpoint import Checkpoint
from dydit.diffusion.steps import State, run_steps
from dydit.errors import BundleError, CalibrationError, ConfigError
from dydit.export.exporter import export, planned_steps
from dydit.export.settings import ExportConfig
from dydit.files import atomic_file, remove
from dydit.models.config import TEXTS_NEEDED, ModelConfig, UserPath
from dydit.parity.frechet import FrechetReference
from dydit.planning.plan import Plan
from dydit.runtime.backends.base import BackendOptions, StepResult
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.images.image_files import kept_arrays
from dydit.runtime.loop import StepRunner
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import UINT64, Batch
from dydit.runtime.resident import ResidentSubnets
from dydit.runtime.text_files import texts_for
from dydit.validation import Strict

Progress = Callable[[int, int], None]
MOST_AT_ONCE = 32
RESIDUAL_BYTES = 256 << 20
"""The most memory for the residual streams of a batch, which a step returns with its token decisions."""
RATIO_DIGITS = 6


class CalibrationConfig(Strict):
    """What to sample: `samples` images to calibrate on and `held_out` images to verify on, over all guidance scales.

    A calibration image i has the noise of (seed, i), a held-out one that of (seed + 1, i). `activations`: the method
    for activation ranges, from `activation_images` calibration images; None: no ranges. `smooth`: smooth the layers
    where that lowers the error, and choose the ranges of smoothed inputs. `search`: search for the layers that stay in
    16 bits; None: no search. `cfg_scales`: if empty, `for_model` gives the default of the model.
    """

    samples: int = Field(default=128, ge=1)
    held_out: int = Field(default=64, ge=1)
    seed: int = Field(default=0, ge=0, lt=UINT64 - 1)
    cfg_scales: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = ()
    capacity: CapacityConfig = CapacityConfig()
    activations: Method | None = None
    smooth: bool = Field(default=False, validation_alias=AliasChoices("smooth", "migrate"))
    percentile: float | None = Field(default=None, gt=0, le=1)
    activation_images: int = Field(default=32, ge=1)
    search: SearchConfig | None = None

    texts: UserPath | None = None

    @model_validator(mode="after")
    def _consistent(self) -> CalibrationConfig:
        if self.search is not None and self.activations is None:
            raise ValueError("the search for layers in 8 bits needs activation ranges; add --activations minmax")
        if self.smooth and self.activations is None:
            raise ValueError("--smooth needs activation ranges; add --activations minmax")
        return self

    @field_validator("cfg_scales")
    @classmethod
    def _scales(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(scales)))

    def for_model(self, model: ModelConfig) -> CalibrationConfig:
        """With guidance scales of a model. Raises `ConfigError` for those that it does not have."""
        scales = tuple(map(model.guidance_scale, self.cfg_scales or (None,)))
        return self.model_copy(update={"cfg_scales": scales})


@dataclass(frozen=True)
class CalibrationResult:
    """The calibration and what its pictures need: timesteps [S], the bounds of the plan, the names of the layers of a
    block, and the groups of calibration images; and the smoothing, if there is one."""

    calibration: Calibration
    timesteps: tuple[float, ...]
    bounds: tuple[int, ...]
    layers: tuple[str, ...]
    groups: tuple[Groups, ...]
    smoothing: FoundSmoothing | None = None


def run_calibration(
    checkpoint: Checkpoint,
    exported: ExportConfig,
    config: CalibrationConfig,
    work: Path,
    backend: str = "onnxruntime",
    options: BackendOptions | None = None,
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> CalibrationResult:
    """Calibrate a checkpoint for the steps, sampler and plan of an export.

    The folder `work` keeps finished parts, and a call with the same settings continues from them; remove it after
    success. `progress(done, total)` counts steps of batches. `announce` gets one line before a search starts: how long
    it may take. Raises `CalibrationError` for a static model and for too few samples (both before anything is sampled
    or written), and for latents that are not finite; `ConfigError` and `BackendError` as exporting and sampling do.
    """
    checkpoint = with_texts(checkpoint, config)
    config = config.for_model(checkpoint.config)
    _require_possible(checkpoint, config)
    reference = _search_reference(checkpoint, exported, config)
    masks, plan = planned_steps(checkpoint, exported)
    bundle = _sampling_bundle(checkpoint, exported, work)
    counter = _Counter(bundle, config, work, backend, options, progress)
    counts, held_out = counter.run(config.seed, config.samples), counter.run(config.seed + 1, config.held_out)
    groups = drawn_for(counts, config.capacity, config.seed)
    capacities = capacity.choose_capacities(groups, plan.bounds, config.capacity, checkpoint.config.tokens)
    if exported.plan is PlanKind.DYNAMIC_WIDTH:  # one graph has one capacity for each block
        capacities[:] = capacities.max(axis=0)
    token_ratio = np.mean([each.mean for each in counts], axis=0) / checkpoint.config.tokens
    unions = [np.tile(masks[first:end].any(axis=0), (end - first, 1)) for first, end in plan.segments]
    routed = checkpoint.config.units.routed_macs(np.concatenate(unions))
    tokens = TokenCalibration(
        tokens=checkpoint.config.tokens,
        settings=config.capacity,
        mean_ratio=tuple(tuple(round(each, RATIO_DIGITS) for each in row) for row in token_ratio.tolist()),
        capacities=tuple(map(tuple, capacities.tolist())),
        predicted=_rates(counts, groups, capacities, plan, routed),
        held_out=_rates(held_out, drawn_for(held_out, config.capacity, config.seed + 1), capacities, plan, routed),
    )
    (ranges, smoothing), sensitivity = _ranges(checkpoint, exported, plan, config, progress), None
    if config.search is not None:
        assert ranges is not None
        inputs = SearchInputs(
            checkpoint=checkpoint,
            exported=exported,
            segments=plan.segments,
            ranges=ranges,
            token_ratio=token_ratio,
            config=config.search,
            cfg_scales=config.cfg_scales,
            seed=config.seed,
            work=work,
            reference=reference,
        )
        ranges, sensitivity = search(inputs, progress, announce)
    calibration = Calibration(
        checkpoint_sha256=checkpoint.sha256,
        process=checkpoint.config.process,
        **dict(exported.sampling(checkpoint.config)),
        plan_sha256=plan_sha256(plan.bounds, masks),
        cfg_scales=config.cfg_scales,
        seed=config.seed,
        held_out_seed=config.seed + 1,
        tokens=tokens,
        activations=ranges,
        sensitivity=sensitivity,
    )
    return CalibrationResult(
        calibration=calibration,
        timesteps=bundle.manifest.sampling.timesteps,
        bounds=plan.bounds,
        layers=checkpoint.config.units.layer_names,
        groups=tuple(groups),
        smoothing=smoothing,
    )


def with_texts(checkpoint: Checkpoint, config: CalibrationConfig) -> Checkpoint:
    """The checkpoint with the texts to sample, if texts condition it.

    They decide ranges and token counts, so random ones would not stand for them. Raises `ConfigError` if there are
    none.
    """
    if checkpoint.texts is not None:
        return checkpoint
    if checkpoint.config.text is not None and config.texts is None:
        raise ConfigError(TEXTS_NEEDED)
    return checkpoint.with_texts(texts_for(checkpoint.config, config.texts, 0))


def _require_possible(checkpoint: Checkpoint, config: CalibrationConfig) -> None:
    """Raise `CalibrationError` for a static model or too few samples."""
    model = checkpoint.config
    if not model.dynamic:
        raise CalibrationError(
            f"{checkpoint.path} is a static model: it has no token routers, so there is nothing to calibrate"
        )
    for images, what in ((config.samples, "sample"), (config.held_out, "held-out sample")):
        for scale, count in spread_scales(images, config.cfg_scales):
            require_samples(config.capacity, count, scale, what)


def _rates(
    counts: list[TokenCounts], groups: list[Groups], capacities: np.ndarray, plan: Plan, routed: np.ndarray
) -> OverflowRates:
    """The overflow of some images at `capacities` [segments, L]; `routed` [S, L]: multiply-adds of routed layers."""
    over = capacity.overflow_of(groups, capacities, plan.bounds)
    return OverflowRates(
        **over.model_dump(),
        images=sum(len(each.images) for each in counts),
        mlp_ratio=capacity.mlp_ratio(counts, routed, capacities, plan.bounds, over.repeated_steps),
    )


def _search_reference(
    checkpoint: Checkpoint, exported: ExportConfig, config: CalibrationConfig
) -> FrechetReference | None:
    """The images to take Fréchet distances to, if there are any. Raises `CalibrationError` if a search is
    impossible."""
    if config.search is None:
        return None
    if exported.plan is PlanKind.DYNAMIC_WIDTH:
        raise CalibrationError(
            "a plan of dynamic width has no layers in 8 bits, so there is nothing to search; use --max-subnets or "
            "--per-step"
        )
    reference = config.search.reference
    return None if reference is None else FrechetReference.read(reference, checkpoint.config)


def _ranges(
    checkpoint: Checkpoint, exported: ExportConfig, plan: Plan, config: CalibrationConfig, progress: Progress | None
) -> tuple[ActivationRanges | None, FoundSmoothing | None]:
    """The ranges of the plan's segments and the smoothing, each if the configuration asks for it."""
    if config.activations is None:
        return None, None
    run = ObservedRun(
        segments=plan.segments,
        labels=spread_labels(config.activation_images, checkpoint.config.classes.count),
        cfg_scales=config.cfg_scales,
        sampling=exported.sampling(checkpoint.config),
        seed=config.seed,
        cfg_channels=exported.cfg_channels,
    )
    found = find_smoothing(checkpoint, run, progress) if config.smooth else None
    smoothing = found.smoothing if found else None
    seen = observe(checkpoint, run, smoothing, progress)
    ranges = seen.choose(config.activations, config.activation_images, config.percentile)
    return ranges.model_copy(update={"smoothing": smoothing}), found


@contextlib.contextmanager
def kept_if_begun(work: Path) -> Iterator[None]:
    """If the block fails before anything was counted, remove the work folder, unless it existed before."""
    begun = work.exists()
    try:
        yield
    except BaseException:
        if not begun and not any(work.glob("[!.]*.npz")):
            remove(work)
        raise


def work_name(checkpoint: Checkpoint, exported: ExportConfig, config: CalibrationConfig) -> str:
    """The name of a work folder. It depends only on what is sampled, so that runs with other choices share the
    counts."""
    checkpoint = with_texts(checkpoint, config)
    config = config.for_model(checkpoint.config)
    identity = {
        "checkpoint": checkpoint.sha256,
        "run": exported.sampling(checkpoint.config).model_dump(mode="json"),
        "images": config.model_dump(mode="json", include={"samples", "held_out", "seed", "cfg_scales"}),
    }
    if checkpoint.config.process is not None:
        identity["process"] = checkpoint.config.process.model_dump(mode="json")
    if checkpoint.texts is not None:
        identity["texts"] = checkpoint.texts.digest
    return f"{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]}.work"


def _sampling_bundle(checkpoint: Checkpoint, exported: ExportConfig, work: Path) -> Bundle:
    """The model as one graph of dynamic width, exported into the work folder unless it is there undamaged."""
    folder = work / "bundle"
    with contextlib.suppress(BundleError):  # absent or damaged
        return _with_texts(Bundle.open(folder), checkpoint)
    remove(folder)
    config = ExportConfig(
        **dict(exported.sampling(checkpoint.config)),
        plan=PlanKind.DYNAMIC_WIDTH,
        max_batch=_at_once(checkpoint.config),
        cfg_channels=exported.cfg_channels,
    )
    return _with_texts(export(checkpoint, folder, config), checkpoint)


def _with_texts(bundle: Bundle, checkpoint: Checkpoint) -> Bundle:
    return bundle if checkpoint.texts is None else bundle.with_texts(checkpoint.texts)


def _at_once(model: ModelConfig) -> int:
    """Images of a batch: as many as `RESIDUAL_BYTES` allow for two copies, of which one belongs to the backend."""
    each = 2 * 4 * model.depth * 2 * model.tokens * model.hidden_size
    return max(1, min(MOST_AT_ONCE, RESIDUAL_BYTES // each))


class _Counter:
    """Samples images in batches and counts their tokens. Counts of earlier calls are read from the work folder."""

    def __init__(
        self,
        bundle: Bundle,
        config: CalibrationConfig,
        work: Path,
        backend: str,
        options: BackendOptions | None,
        progress: Progress | None,
    ):
        self._bundle, self._scales, self._work = bundle, config.cfg_scales, work
        self._engine = open_backend(backend, bundle, options)
        self._progress, self._done = progress, 0
        steps = bundle.manifest.sampling.steps
        self._total = sum(
            steps * len(batches) for n in (config.samples, config.held_out) for _, batches in self._batches(n)
        )

    def _batches(self, images: int) -> list[tuple[float, list[Batch]]]:
        manifest = self._bundle.manifest
        return spread_batches(images, manifest.model.classes.count, self._scales, manifest.max_batch)

    def run(self, seed: int, images: int) -> list[TokenCounts]:
        """The counts of `images` images of a seed, for each guidance scale."""
        return [
            merge([self._count(seed, scale, batch) for batch in batches]) for scale, batches in self._batches(images)
        ]

    def _count(self, seed: int, scale: float, batch: Batch) -> TokenCounts:
        model, steps = self._bundle.manifest.model, self._bundle.manifest.sampling.steps
        file = self._work / f"{seed}-{batch.images[0]}.npz"
        counts = _read_counts(file, scale, model.tokens, (len(batch.images), steps, model.depth))
        if counts is None:
            counts = self._sample(seed, scale, batch)
            with atomic_file(file) as opened:
                np.savez_compressed(opened, images=counts.images, counts=counts.counts)
        else:
            self._tick(steps)
        return counts

    def _sample(self, seed: int, scale: float, batch: Batch) -> TokenCounts:
        model, steps = self._bundle.manifest.model, self._bundle.manifest.sampling.steps
        noise = SeededNoise(seed, (model.in_channels, model.input_size, model.input_size))
        counter = TokenCounter(batch.images, steps, model.depth, model.tokens, scale)

        def count(step: int, result: StepResult) -> None:
            assert result.tokens is not None
            counter.add(step, result.tokens)
            self._tick(1)

        with ResidentSubnets(self._engine, 2, debug=True) as subnets:
            runner = StepRunner(self._engine, subnets, batch.labels, scale)
            x = run_steps(runner.steps_of(batch, noise), State(noise.initial(batch)), range(steps), count).x
        if not np.isfinite(x).all():
            raise CalibrationError(
                f"latents of images {batch.images[0]} to {batch.images[-1]} are NaN or infinite, so their tokens "
                "cannot be used; compare bundle and checkpoint with `dydit parity`"
            )
        return counter.finish()

    def _tick(self, steps: int) -> None:
        self._done += steps
        if self._progress:
            self._progress(self._done, self._total)


def _read_counts(file: Path, scale: float, tokens: int, shape: tuple[int, int, int]) -> TokenCounts | None:
    """The saved counts of a batch; None if there are none, or if they are damaged."""
    if (arrays := kept_arrays(file, "images", "counts")) is None:
        return None
    try:
        counts = TokenCounts(scale, tokens, *arrays)
    except CalibrationError:
        return None
    return counts if counts.counts.shape[:3] == shape else None
