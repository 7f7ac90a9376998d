"""`dydit calibrate`: sample a dynamic model, count the tokens that it routes, choose capacities, try them on others.

The model is sampled as one graph for every width with dynamic routing, which computes exactly what every plan and
routing computes. Counts of finished batches are kept in a work folder, so that a killed run goes on where it was; of
the images themselves nothing is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator, model_validator

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind
from dydit.calibrate import capacity
from dydit.calibrate.activation_ranges import ActivationRanges
from dydit.calibrate.calibration_file import Calibration, OverflowRates, TokenCalibration, plan_sha256
from dydit.calibrate.capacity import CapacityConfig, Groups, drawn_for, require_samples
from dydit.calibrate.observers import observe
from dydit.calibrate.precision_search import Announce, SearchConfig, search
from dydit.calibrate.range_methods import Method
from dydit.calibrate.smoothing_search import Found, find_migration
from dydit.calibrate.tokens import TokenCounter, TokenCounts, merge, spread_labels, spread_scales
from dydit.checkpoints.checkpoint import Checkpoint
from dydit.errors import BundleError, CalibrationError
from dydit.export.exporter import ExportConfig, export, planned_steps
from dydit.files import atomic_file, remove
from dydit.models.config import ModelConfig, Strict
from dydit.parity.frechet import FrechetReference
from dydit.planning.plan import Plan
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.images.image_files import kept_arrays
from dydit.runtime.loop import StepRunner
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import DEFAULT_CFG_SCALE, UINT64, Batch, make_batches
from dydit.runtime.resident import ResidentSubnets

Progress = Callable[[int, int], None]
MOST_AT_ONCE = 32
RESIDUAL_BYTES = 256 << 20
"""What the residual streams of a batch may take, which a step returns beside its token decisions."""
RATIO_DIGITS = 6


class CalibrationConfig(Strict):
    """What to sample: `samples` images to calibrate on and `held_out` others to verify on, over all guidance scales.

    Image i of the first draws its noise from (seed, i), of the others from (seed + 1, i). `activations`: how ranges of
    what enters linear layers are chosen, where they are wanted, from `activation_images` images of the first.
    `migrate`: move range from there into weights where that helps, and choose the ranges of what is left. `search`:
    which of these layers are to stay in 16 bits, where that is to be found.
    """

    samples: int = Field(default=128, ge=1)
    held_out: int = Field(default=64, ge=1)
    seed: int = Field(default=0, ge=0, lt=UINT64 - 1)
    cfg_scales: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = Field(
        default=(DEFAULT_CFG_SCALE,), min_length=1
    )
    capacity: CapacityConfig = CapacityConfig()
    activations: Method | None = None
    migrate: bool = False
    percentile: float | None = Field(default=None, gt=0, le=1)
    activation_images: int = Field(default=32, ge=1)
    search: SearchConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> CalibrationConfig:
        if self.search is not None and self.activations is None:
            raise ValueError("a search for the layers in 8 bits needs activation ranges; add --activations minmax")
        if self.migrate and self.activations is None:
            raise ValueError("--smooth needs activation ranges; add --activations minmax")
        return self

    @field_validator("cfg_scales")
    @classmethod
    def _scales(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(scales)))


@dataclass(frozen=True)
class CalibrationResult:
    """The calibration; for its pictures timesteps [S], the plan's bounds, the names of a block's layers, and the groups
    calibrated on; the migration."""

    calibration: Calibration
    timesteps: tuple[int, ...]
    bounds: tuple[int, ...]
    layers: tuple[str, ...]
    groups: tuple[Groups, ...]
    found: Found | None = None


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

    `work` keeps what is finished; a call with the same settings goes on with it. Remove it after success.
    `progress(done, total)` counts steps of batches; `announce` gets a line that says how long a search may take, before
    it starts. Raises `CalibrationError` for a static model, too few samples
    (before anything is sampled or written), and latents that are not finite; `ConfigError` and `BackendError` as
    exporting and sampling do.
    """
    model = checkpoint.config
    if not model.dynamic:
        raise CalibrationError(f"{checkpoint.path} is a static model: it has no token routers, so nothing to calibrate")
    for scale in config.cfg_scales:
        model.require_guidance(scale)
    for images, what in ((config.samples, "sample"), (config.held_out, "held-out sample")):
        for scale, count in spread_scales(images, config.cfg_scales):
            require_samples(config.capacity, count, scale, what)
    reference = _search_reference(checkpoint, exported, config)
    masks, plan = planned_steps(checkpoint, exported)
    bundle = _sampling_bundle(checkpoint, exported, work)
    counter = _Counter(bundle, config, work, backend, options, progress)
    seen, others = counter.run(config.seed, config.samples), counter.run(config.seed + 1, config.held_out)
    groups = drawn_for(seen, config.capacity, config.seed)
    capacities = capacity.choose_capacities(groups, plan.bounds, config.capacity, model.tokens)
    if exported.plan is PlanKind.SLIDING:  # one graph, and so one capacity for each block
        capacities[:] = capacities.max(axis=0)
    unions = [np.tile(masks[first:end].any(axis=0), (end - first, 1)) for first, end in plan.segments]
    routed = model.units.routed_macs(np.concatenate(unions))

    def rates(counts: list[TokenCounts], drawn: list[Groups]) -> OverflowRates:
        over = capacity.overflow_of(drawn, capacities, plan.bounds)
        return OverflowRates(
            images=sum(len(each.images) for each in counts),
            trials=over.trials,
            rate=over.rate,
            upper=over.upper,
            repeated_steps=over.repeated,
            mlp_ratio=capacity.mlp_ratio(counts, routed, capacities, plan.bounds, over.repeated),
        )

    mean = np.mean([each.mean for each in seen], axis=0) / model.tokens
    (ranges, found), sensitivity = _ranges(checkpoint, exported, plan, config, progress), None
    if config.search is not None:
        assert ranges is not None
        ranges, sensitivity = search(
            *(checkpoint, exported, plan.segments, ranges, mean, config.search, config.cfg_scales, config.seed, work),
            reference,
            progress,
            announce,
        )
    return CalibrationResult(
        Calibration(
            checkpoint_sha256=checkpoint.sha256,
            steps=exported.steps,
            sampler=exported.sampler,
            plan_sha256=plan_sha256(plan.bounds, masks),
            cfg_scales=config.cfg_scales,
            seed=config.seed,
            held_out_seed=config.seed + 1,
            tokens=TokenCalibration(
                tokens=model.tokens,
                settings=config.capacity,
                mean_ratio=tuple(tuple(round(each, RATIO_DIGITS) for each in row) for row in mean.tolist()),
                capacities=tuple(map(tuple, capacities.tolist())),
                predicted=rates(seen, groups),
                held_out=rates(others, drawn_for(others, config.capacity, config.seed + 1)),
            ),
            activations=ranges,
            sensitivity=sensitivity,
        ),
        bundle.manifest.sampling.timesteps,
        plan.bounds,
        model.units.layer_names,
        tuple(groups),
        found,
    )


def _search_reference(
    checkpoint: Checkpoint, exported: ExportConfig, config: CalibrationConfig
) -> FrechetReference | None:
    """The images to take Fréchet distances to, where there are any; and what a search cannot do is refused."""
    if config.search is None:
        return None
    if exported.plan is PlanKind.SLIDING:
        raise CalibrationError(
            "a sliding plan has no layers in 8 bits, so there is nothing to search; give --max-subnets or --per-step"
        )
    reference = config.search.reference
    return None if reference is None else FrechetReference.read(reference, checkpoint.config)


def _ranges(
    checkpoint: Checkpoint, exported: ExportConfig, plan: Plan, config: CalibrationConfig, progress: Progress | None
) -> tuple[ActivationRanges | None, Found | None]:
    """Ranges of the plan's segments, where they are wanted; and what was found of a migration, where that is."""
    if config.activations is None:
        return None, None
    labels = spread_labels(config.activation_images, checkpoint.config.num_classes)
    run = (checkpoint, plan.segments, labels, config.cfg_scales, exported.steps, exported.sampler, config.seed)
    settings: dict[str, Any] = {"cfg_channels": exported.cfg_channels, "progress": progress}
    found = find_migration(*run, **settings) if config.migrate else None
    migration = found.migration if found else None
    seen = observe(*run, migration=migration, **settings)
    ranges = seen.choose(config.activations, config.activation_images, config.percentile)
    return ranges.model_copy(update={"migration": migration}), found


@contextlib.contextmanager
def kept_if_begun(work: Path) -> Iterator[None]:
    """Where the block fails before anything was counted, remove the work folder unless it was there before."""
    begun = work.exists()
    try:
        yield
    except BaseException:
        if not begun and not any(work.glob("[!.]*.npz")):
            remove(work)
        raise


def work_name(checkpoint: Checkpoint, exported: ExportConfig, config: CalibrationConfig) -> str:
    """The name of a work folder: the same for runs that sample the same images, whatever they choose then."""
    what = {
        "checkpoint": checkpoint.sha256,
        "run": [exported.steps, exported.sampler],
        "images": config.model_dump(mode="json", include={"samples", "held_out", "seed", "cfg_scales"}),
    }
    return f"{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]}.work"


def _sampling_bundle(checkpoint: Checkpoint, exported: ExportConfig, work: Path) -> Bundle:
    """The model as one graph, made in the work folder unless it is there and whole."""
    folder = work / "bundle"
    with contextlib.suppress(BundleError):  # absent or damaged
        return Bundle.open(folder)
    remove(folder)
    config = ExportConfig(
        steps=exported.steps,
        sampler=exported.sampler,
        plan=PlanKind.SLIDING,
        max_batch=_at_once(checkpoint.config),
        cfg_channels=exported.cfg_channels,
    )
    return export(checkpoint, folder, config)


def _at_once(model: ModelConfig) -> int:
    """Images of a batch: as many as `RESIDUAL_BYTES` allow, twice over (one copy is the backend's)."""
    each = 2 * 4 * model.depth * 2 * model.tokens * model.hidden_size
    return max(1, min(MOST_AT_ONCE, RESIDUAL_BYTES // each))


class _Counter:
    """Samples images in batches and counts their tokens; what is counted already is read from the work folder."""

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

    def _batches(self, images: int) -> Iterator[tuple[float, list[Batch]]]:
        """For each guidance scale its batches; images are numbered through, classes spread evenly over a scale's."""
        first, size = 0, self._bundle.manifest.max_batch
        for scale, count in spread_scales(images, self._scales):
            labels = spread_labels(count, self._bundle.manifest.model.num_classes)
            yield scale, make_batches(labels, range(first, first + count), size)
            first += count

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
        with ResidentSubnets(self._engine, 2, debug=True) as subnets:
            runner = StepRunner(self._engine, subnets, batch.labels, scale)
            x = noise.initial(batch)
            for step in range(steps):
                result = runner.run(step, x, noise.step(batch, step), batch.labels)
                assert result.tokens is not None
                counter.add(step, result.tokens)
                x = result.x_prev
                self._tick(1)
        if not np.isfinite(x).all():
            raise CalibrationError(
                f"latents of images {batch.images[0]} to {batch.images[-1]} are NaN or infinite: their tokens mean "
                "nothing; hold bundle and checkpoint against each other with `dydit parity`"
            )
        return counter.finish()

    def _tick(self, steps: int) -> None:
        self._done += steps
        if self._progress:
            self._progress(self._done, self._total)


def _read_counts(file: Path, scale: float, tokens: int, shape: tuple[int, int, int]) -> TokenCounts | None:
    """Counts of a batch that were kept; None where there are none, or not whole."""
    if (arrays := kept_arrays(file, "images", "counts")) is None:
        return None
    try:
        found = TokenCounts(scale, tokens, *arrays)
    except CalibrationError:
        return None
    return found if found.counts.shape[:3] == shape else None
