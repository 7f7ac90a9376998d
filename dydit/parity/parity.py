"""`dydit parity`: compare a bundle with the checkpoint that it was exported from, in five checks.

    masks    the gates of the model in every sampling step are the frozen table
    weights  every stored tensor is the checkpoint's, in the precision of the bundle, bit for bit
    sliced   the sliced form in PyTorch against the masked model, each step from the reference's latents
    step     the backend against the masked model, each step from the reference's latents
    run      the backend against the masked model, the whole run from the same noise

Tolerances depend on the precision of the bundle (`dydit.parity.tolerances`). The reference (`dydit.parity.reference`)
runs first and is never patched. All checks are made, also after one has failed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import Manifest
from dydit.bundle.stored_weights import fp16_name
from dydit.checkpoints.checkpoint import Checkpoint, load_checkpoint
from dydit.diffusion.coefficients import HISTORY
from dydit.diffusion.samplers import SamplerChoice
from dydit.diffusion.steps import State, run_steps
from dydit.errors import ConfigError
from dydit.export.exporter import stale_reasons
from dydit.export.weights import Copies, stored_forms
from dydit.files import new_folder, require_absent, write_json
from dydit.models.architecture import block_of
from dydit.models.config import ModelConfig, UserPath
from dydit.models.macs import flops_ratio
from dydit.models.registry import architecture_of
from dydit.models.sliced import text_feeds
from dydit.models.text import TextRows
from dydit.parity.checks import Verdict, exact_check, judge, locate, locate_in_run, skipped
from dydit.parity.comparison import (
    PIXEL_SPAN,
    Measure,
    StepComparison,
    StepValues,
    compare_step,
    picture_error,
    relative_l2,
)
from dydit.parity.reference import Images, Reference, Trajectory
from dydit.parity.tolerances import DERIVED_WEIGHTS, of_latents, tolerances
from dydit.planning.resampling import resampled
from dydit.plot_style import write_picture
from dydit.reports.parity_report import Check, Departure, ParityReport
from dydit.reports.plots import parity_png
from dydit.reports.results import Machine
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.images.pixels import ToPixels, picture_format
from dydit.runtime.loop import StepRunner
from dydit.runtime.resident import ResidentSubnets
from dydit.runtime.text_files import with_texts_for
from dydit.validation import Strict
from dydit.words import counted

REPORT = "parity.json"
Progress = Callable[[int, int], None]


class ParityConfig(Strict):
    """What to compare: an image for each label (the null class is a label, too); `cfg_scale` 1 is no guidance.

    By default two images, with the default guidance of the model (`ModelConfig.guidance_scale`).
    `every`: compare every n-th step and the last one from the reference's latents. The whole run always has all steps.
    `sampling`: changes of the bundle's run (`dydit.planning.resampling.resampled`). `texts`: a file of texts, for a
    model that they condition, whose labels are their numbers; by default random ones.
    """

    backend: str = "onnxruntime"
    threads: int = Field(default=0, ge=0)
    device: str = "cpu"
    labels: tuple[int, ...] = ()
    seed: int = Field(default=0, ge=0)
    cfg_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    every: int = Field(default=1, ge=1)
    sampling: SamplerChoice = SamplerChoice()
    texts: UserPath | None = None

    def images(self, model: ModelConfig) -> Images:
        """The images to sample. Raises `ConfigError` for what does not fit the model."""
        labels = self.labels or (0, 1 % model.classes.rows)
        images = Images(labels, self.seed, model.guidance_scale(self.cfg_scale))
        images.row_labels(model)
        return images


def compare_files(
    bundle: Path, checkpoint: Path, config: ParityConfig, out: Path, progress: Progress | None = None, **reading: Any
) -> tuple[ParityReport, list[str]]:
    """Compare a bundle with a checkpoint, and write parity.json and parity.png to the new folder `out`.

    `reading`: settings of `load_checkpoint`. Returns the report and what is to be said about the checkpoint. Raises as
    `run_parity`, `Bundle.open` and `load_checkpoint` do, and `OutputError` if `out` exists or cannot be written.
    """
    require_absent(out)
    opened, loaded = Bundle.open(bundle), load_checkpoint(checkpoint, **reading)
    with new_folder(out) as folder:
        report = run_parity(opened, loaded, config, folder, progress)
        write_picture(parity_png, report, folder / "parity.png")
    return report, list(loaded.notes)


def run_parity(
    bundle: Bundle,
    checkpoint: Checkpoint,
    config: ParityConfig,
    out: Path | None = None,
    progress: Progress | None = None,
) -> ParityReport:
    """Make every check and, with `out`, write `out/parity.json`. `progress(done, total)` counts model evaluations.

    A bundle of another checkpoint is not refused: its checks fail and name what differs. Raises `ConfigError` for
    labels that do not fit the bundle, and `BackendError` if the backend cannot run it.
    """
    start = time.perf_counter()
    bundle = with_texts_for(resampled(bundle, config.sampling), config.texts, max(config.labels, default=1) + 1)
    manifest = bundle.manifest
    if manifest.model.sizes == checkpoint.config.sizes:
        checkpoint = checkpoint.with_texts(bundle.texts)
    images = config.images(manifest.model)
    if images.batch > manifest.max_batch:
        raise ConfigError(
            f"{counted(images.batch, 'label')}, but the bundle was exported for batches up to {manifest.max_batch}"
        )
    steps = manifest.sampling.steps
    compared = sorted({*range(0, steps, config.every), steps - 1})
    if (other := _other_model(manifest, checkpoint.config)) is None:
        parity = _Parity(bundle, checkpoint, config, compared, progress)
        checks, trajectory = parity.checks()
        evaluations, repeated = parity.evaluations, parity.repeated
    else:
        checks, trajectory = other, None
        evaluations = repeated = 0
    tokens, ratio = (np.empty(0), np.empty(0)) if trajectory is None else cost_of(manifest.model, trajectory)
    report = ParityReport(
        bundle=str(bundle.path),
        checkpoint=str(checkpoint.path),
        **config.model_dump(include={"backend", "threads", "device"}),
        **dataclasses.asdict(images),
        steps=steps,
        sampler=manifest.sampling.sampler.value,
        routing=manifest.routing.value if manifest.routing else None,
        precision=manifest.precision.value,
        steps_compared=tuple(compared),
        timesteps=manifest.sampling.timesteps,
        stale_reasons=tuple(stale_reasons(manifest, checkpoint)),
        checks=tuple(checks),
        evaluations=evaluations,
        repeated_steps=repeated,
        token_share=tuple(tokens.tolist()),
        flops_ratio=tuple(ratio.tolist()),
        machine=Machine.here(),
        seconds=round(time.perf_counter() - start, 3),
    )
    if out is not None:
        write_json(out / REPORT, report.to_json())
    return report


def cost_of(model: ModelConfig, trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray]:
    """(share of tokens that entered the MLP, FLOPs ratio) of every step, each [S]."""
    counts = model.units.counts(trajectory.masks).mean(axis=1)  # [S, P], of all rows
    everything = np.ones((len(counts), model.depth))
    routed = everything if trajectory.tokens is None else trajectory.tokens.mean(axis=(2, 3))
    ratio: np.ndarray = flops_ratio(model, counts, routed)
    return routed.mean(axis=1), ratio


def _other_model(manifest: Manifest, reference: ModelConfig) -> list[Check] | None:
    """The checks of a bundle that cannot be compared step by step, because it is of another model; None if it can."""
    ours, theirs, what = manifest.model.sizes, reference.sizes, "the architecture differs"
    if ours != theirs:
        name, own, other = ours.difference(theirs)
        where = f"{name} is {own} in the bundle and {other} in the checkpoint"
    elif manifest.model.diffusion != reference.diffusion:
        what = "the training differs"
        where = f"{manifest.model.diffusion.words} in the bundle, {reference.diffusion.words} in the checkpoint"
    else:
        return None
    first, *rest = tolerances(manifest.precision).values()
    return [exact_check(first, 1, what, Departure(where=where)), *(skipped(each, what) for each in rest)]


class _Parity:
    """One comparison: what its checks share."""

    def __init__(
        self,
        bundle: Bundle,
        checkpoint: Checkpoint,
        config: ParityConfig,
        compared: Sequence[int],
        progress: Progress | None,
    ):
        self.bundle, self.checkpoint, self.config, self.compared = bundle, checkpoint, config, compared
        self.model, sampling = bundle.manifest.model, bundle.manifest.sampling
        self.images = config.images(self.model)
        self.texts = None if bundle.texts is None else TextRows.of(bundle.texts.embeddings, bundle.texts.mask)
        self.reference = Reference(checkpoint.model(), sampling.config, sampling.cfg_channels, self.texts)
        self.timesteps = self.reference.timesteps
        self.tolerances = tolerances(bundle.manifest.precision)
        if picture_format(bundle.manifest) is None:
            self.tolerances["run"] = of_latents(self.tolerances["run"])
        self.evaluations = self.repeated = 0
        self._progress, self._done, self._total = progress, 0, 2 * sampling.steps + 2 * len(compared)

    def tick(self) -> None:
        """Report that one more evaluation of the model is done."""
        self._done += 1
        if self._progress:
            self._progress(self._done, self._total)

    def checks(self) -> tuple[list[Check], Trajectory]:
        """All checks, in order, and the reference's run."""
        self.trajectory = self.reference.run(self.images, self.tick)
        masks = compare_masks(self.bundle, self.timesteps, self.trajectory.masks)
        return [masks, compare_weights(self.bundle, self.checkpoint), self._sliced(), *self._backend()], self.trajectory

    def _expected(self, step: int) -> StepValues:
        latents, logits = self.trajectory.latents, self.trajectory.logits
        tokens = None if logits is None else logits[step] > 0
        return StepValues(latents[step], latents[step + 1], tokens, next_history=self.trajectory.history[step + 1])

    def _compare(self, step: int, ours: StepValues, measure: Measure | None = None) -> StepComparison:
        """`measure`: of a whole run, which shows by its latents what its history was; None: a step by itself."""
        logits = None if self.trajectory.logits is None else self.trajectory.logits[step]
        rows, expected = self.reference.coefficients, self._expected(step)
        c_x = float(rows[step, 0])
        if measure is not None:
            return compare_step(step, ours, expected, c_x, logits, measure)
        c_history = float(rows[step + 1, HISTORY]) if step + 1 < len(rows) else 0.0
        return compare_step(step, ours, expected, c_x, logits, c_history=c_history)

    def _run_measure(self, step: int, to_pixels: ToPixels) -> Measure:
        """The measure of a whole run. Below fp32 it compares pictures; latents are decoded at the end only."""
        if not self.tolerances["run"].decibels:
            return relative_l2
        pictures = picture_format(self.bundle.manifest)
        if pictures is None or (pictures.decoded and step < len(self.timesteps) - 1):
            return lambda ours, reference: picture_error(ours, reference, None)
        return lambda ours, reference: picture_error(to_pixels(ours), to_pixels(reference), PIXEL_SPAN)

    def _located(self, verdict: Verdict, ours: Callable[[int], StepValues]) -> Check:
        """The check with the block at which it departs: that step runs once more in both forms, with residuals."""
        if verdict.step is None:
            return verdict.check
        expected, step = self._expected(verdict.step), verdict.step
        again = self.reference.step(self.images, step, self.trajectory.state(step), residuals=True)
        reference = StepValues(expected.x, expected.x_prev, expected.tokens, again.residuals)
        return locate(verdict, ours(step), reference, float(self.timesteps[step]))

    def _sliced(self) -> Check:
        known = architecture_of(self.model)
        weights = dict(known.stored_tensors(self.checkpoint.state, self.model))
        labels = torch.from_numpy(self.images.row_labels(self.model))
        texts = {} if self.texts is None else text_feeds(self.model, weights, self.texts, labels)

        def run(step: int) -> StepValues:
            slots = self.model.units.slots(self.trajectory.masks[step, 0])
            sliced = known.sliced(self.model, weights, slots, self.reference.cfg_channels)
            x, time = self.trajectory.latents[step], torch.from_numpy(self.timesteps[step : step + 1])
            condition = known.conditioning(self.model, weights, time, labels)[0]
            out = sliced.step(
                torch.from_numpy(x),
                torch.from_numpy(self.trajectory.history[step]),
                torch.from_numpy(self.images.noise(self.model, step)),
                torch.from_numpy(self.reference.coefficients[step].astype(np.float32)),
                torch.tensor(self.images.cfg_scale),
                condition,
                debug=True,
                **texts,
            )
            assert out.tokens is not None and out.residuals is not None
            ours = (each.numpy() for each in (out.x_prev, out.tokens, out.residuals, out.next_history))
            return StepValues(x, *ours)

        comparisons = []
        for step in self.compared:
            comparisons.append(self._compare(step, run(step)))
            self.tick()
        return self._located(judge(self.tolerances["sliced"], comparisons, self.timesteps), run)

    def _backend(self) -> list[Check]:
        """Both checks of the backend, step by step, so that each subnetwork is loaded once."""
        config = self.config
        backend = open_backend(
            config.backend, self.bundle, BackendOptions(threads=config.threads, device=config.device)
        )
        labels, state = self.images.row_labels(self.model), self.trajectory.state
        # Values come from the graphs that sampling uses; decisions come from the same graphs with more outputs.
        with ResidentSubnets(backend, 2) as plain, ResidentSubnets(backend, 2, debug=True) as with_debug:
            runner, watched = (StepRunner(backend, each, labels, self.images.cfg_scale) for each in (plain, with_debug))

            def run(step: int, before: State[np.ndarray], residuals: bool = False) -> StepValues:
                feeds = (step, before, self.images.noise(self.model, step), labels[: self.images.batch])
                observed, result = watched.run(*feeds), runner.run(*feeds)
                self.evaluations += 1
                self.repeated += bool(result.overflow.any())
                streams = observed.residuals if residuals else None
                return StepValues(before.x, result.x_prev, observed.tokens, streams, result.next_history)

            alone, together, to_pixels = [], [], ToPixels(backend)

            def compare(step: int, ours: StepValues) -> None:
                together.append(self._compare(step, ours, self._run_measure(step, to_pixels)))
                self.tick()
                if step in self.compared:
                    alone.append(self._compare(step, run(step, state(step))))
                    self.tick()

            run_steps(run, state(0), range(len(self.timesteps)), compare)
            single = self._located(
                judge(self.tolerances["step"], alone, self.timesteps), lambda step: run(step, state(step), True)
            )
        return [single, locate_in_run(judge(self.tolerances["run"], together, self.timesteps), self.timesteps)]


def compare_masks(bundle: Bundle, timesteps: np.ndarray, masks: np.ndarray) -> Check:
    """The gates that the model used and the timesteps that it received, against those of the manifest.

    `masks`: bool [S, rows, U], by unit of the checkpoint. The departure is the first step, block and unit that differ.
    """
    tolerance, frozen = tolerances(bundle.manifest.precision)["masks"], bundle.manifest.checkpoint_masks()
    wrong = (masks != frozen[:, None]).any(axis=1)  # [S, U]
    late = np.asarray(bundle.manifest.sampling.timesteps, np.float32) != timesteps
    per_step = wrong.sum(axis=1) + late
    if not per_step.any():
        detail = f"all {wrong.size:,} gates of {counted(len(timesteps), 'step')} are equal"
        return exact_check(tolerance, 0, detail, None, per_step)
    step = int(np.argmax(per_step > 0))
    block, where = (
        None,
        f"step {step} is at timestep {bundle.manifest.sampling.timesteps[step]:g}, not {timesteps[step]:g}",
    )
    if not late[step]:
        place = int(np.argmax(wrong[step]))
        part = next(part for part in bundle.manifest.model.units.parts if place < part.stop)
        block, frozen_as = part.block, "on" if frozen[step, place] else "off"
        unit_name = f"{part.group.name.removesuffix('s')} {place - part.start}"
        where = f"step {step} (timestep {timesteps[step]:g}), block {block}: {unit_name} is frozen as {frozen_as}"
    departure = Departure(step=step, timestep=float(timesteps[step]), block=block, where=where)
    total = int(per_step.sum())
    detail = f"{total:,} of {wrong.size + len(late):,} gates and timesteps differ"
    return exact_check(tolerance, total, detail, departure, per_step)


def compare_weights(bundle: Bundle, checkpoint: Checkpoint) -> Check:
    """Every tensor of `weights.bin` against that of the checkpoint, in the manifest's order of units."""
    manifest = bundle.manifest
    elements, differing, first = 0, 0, None
    tensors = architecture_of(manifest.model).stored_tensors(
        checkpoint.state, manifest.model, manifest.unit_order, manifest.smoothing
    )

    def copies(name: str) -> Copies:
        fp16 = fp16_name(name) in manifest.weights
        return Copies(quantized=name in manifest.weights or not fp16, fp16=fp16)

    forms = (
        form for each in tensors for form in stored_forms(manifest.model, *each, manifest.precision, copies(each[0]))
    )
    for name, expected in forms:
        elements += expected.numel()
        count = _differing(bundle, name, expected)
        differing += count
        if count and first is None:
            first = Departure(block=block_of(name), where=f"{name}: {count} of {expected.numel()} elements differ")
    detail = f"all {elements:,} elements are equal"
    if differing:
        detail = f"{differing:,} of {counted(elements, 'element')} differ{'s' if differing == 1 else ''}"
    return exact_check(tolerances(manifest.precision)["weights"], differing, detail, first)


def _differing(bundle: Bundle, name: str, expected: torch.Tensor) -> int:
    """The number of elements that differ from the expected ones, bit for bit; computed tensors have a tolerance."""
    entry = bundle.manifest.weights.get(name)
    if entry is None or entry.shape != tuple(expected.shape) or entry.item_bytes != expected.element_size():
        return expected.numel()
    stored = bundle.weight(name)
    if name in DERIVED_WEIGHTS:
        return int((~np.isclose(stored, expected, rtol=DERIVED_WEIGHTS[name], atol=0)).sum())
    bits = np.dtype(f"u{entry.item_bytes}")
    return int((stored.view(bits) != expected.contiguous().view(torch.uint8).numpy().view(bits)).sum())
