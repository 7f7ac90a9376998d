"""The search of `dydit calibrate --target-psnr`: which linear layers stay in 16 bits, by measured loss.

First, the loss of each layer alone: the error of x_prev with only this layer in 8 bits, at some steps of every segment,
from the latents of a run with all layers in 16 bits; times the growth of such an error up to the image, measured with a
whole segment in 8 bits. Then, whole runs with more and more layers in 8 bits, in the order of loss per multiply-add
(`dydit.calibrate.mixed_precision`): a bisection for the largest number that reaches the target, and some points for the
curve. Only the order is predicted; everything that is reported is measured. The work folder keeps finished parts.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import Field, model_validator

from dydit.bench.bench import spread_steps
from dydit.bundle.stored_weights import Precision
from dydit.calibrate.activation_ranges import ActivationRanges
from dydit.calibrate.fake_quantization import FakeQuantizedImages, FakeQuantizedSampler
from dydit.calibrate.mixed_precision import (
    CURVE_POINTS,
    MOST_DECIBELS,
    CurvePoint,
    Quality,
    Sensitivity,
    Target,
    bound_on_speed,
    fp16_layers_after,
    int8_order,
    layer_macs,
    most_questions,
    most_that_holds,
    predicted_losses,
    share_in_8_bits,
    spread_counts,
)
from dydit.checkpoints.checkpoint import Checkpoint
from dydit.diffusion.steps import State
from dydit.errors import CalibrationError
from dydit.export.settings import ExportConfig
from dydit.files import atomic_file
from dydit.models.config import UserPath
from dydit.parity.comparison import PIXEL_SPAN, picture_error
from dydit.parity.frechet import LEAST_IMAGES, FrechetReference, pictures
from dydit.runtime.images.image_files import kept_arrays
from dydit.validation import Strict
from dydit.words import counted, duration

Progress = Callable[[int, int], None]
Announce = Callable[[str], None]
MEASURED_STEPS = 3
"""The number of steps from whose median time the duration of a search is estimated."""
OTHERS_RUNS = 2
"""The number of runs of the held-out images: without quantization, and with the chosen layers."""
MOST_GAINS = 16
"""The largest number of segments whose errors are measured in the image; others are interpolated."""


class SearchConfig(Strict):
    """What to search for: the largest number of layers in the 8 bits of `precision` that reaches `target`.

    `images`: number of images to search on, with the noise of the first calibration images, and of held-out images.
    `steps`: number of evenly spaced steps of a segment at which losses are measured. `reference`: file of images to
    take Fréchet distances to.
    """

    target: Target
    precision: Precision = Precision.INT8_STATIC
    images: int = Field(default=16, ge=1)
    steps: int = Field(default=4, ge=1)
    reference: UserPath | None = None

    @model_validator(mode="after")
    def _consistent(self) -> SearchConfig:
        if not self.precision.is_calibrated:
            raise ValueError(f"{self.precision} has no scales to calibrate; use int8-static or fp8")
        if self.target.fd_ratio is not None and self.reference is None:
            raise ValueError("a ratio of Fréchet distances needs reference images: add --reference FILE.npz")
        if self.reference is not None and self.images < LEAST_IMAGES:
            raise ValueError(
                f"{self.images} images are too few for Fréchet distances; use --search-images {LEAST_IMAGES} or more"
            )
        return self


@dataclass(frozen=True)
class SearchInputs:
    """What a search works on.

    `segments`: half-open ranges of the steps, to which the `ranges` of activations belong. `token_ratio` [S, L]: share
    of tokens that enter the MLP. Image i has the noise of (`seed`, i), a held-out one that of (`seed` + 1, i). `work`:
    the folder that keeps finished measurements. `reference`: images to take Fréchet distances to.
    """

    checkpoint: Checkpoint
    exported: ExportConfig
    segments: Sequence[tuple[int, int]]
    ranges: ActivationRanges
    token_ratio: np.ndarray
    config: SearchConfig
    cfg_scales: Sequence[float]
    seed: int
    work: Path
    reference: FrechetReference | None = None


class _Ticks:
    """Counts steps of batches."""

    def __init__(self, progress: Progress | None, total: int):
        self._progress, self._done, self._total = progress, 0, total

    def __call__(self, steps: int) -> None:
        self._done += steps
        if self._progress:
            self._progress(min(self._done, self._total), self._total)

    def remain(self, steps: int) -> None:
        """Set the number of steps that are left: the bisection may have needed fewer than it could."""
        self._total = self._done + steps

    def finish(self) -> None:
        """Report that nothing is left."""
        if self._progress and self._done < self._total:
            self._progress(self._total, self._total)


def search(
    inputs: SearchInputs, progress: Progress | None = None, announce: Announce | None = None
) -> tuple[ActivationRanges, Sensitivity]:
    """The ranges with the layers that stay in 16 bits, and the measurements that led to them.

    `progress(done, total)` counts steps of batches, also those read from the work folder; the total falls when the
    bisection needs fewer runs than it could. `announce` gets one line before the search starts: how long it may take.
    Raises `CalibrationError` if the target is missed with every layer in 16 bits, or if images are not finite.
    """
    return _Search(inputs).run(progress, announce)


class _Search:
    def __init__(self, inputs: SearchInputs):
        self.model, self.config, self.ranges = inputs.checkpoint.config, inputs.config, inputs.ranges
        self.segments, self.reference = list(inputs.segments), inputs.reference
        self.sampler = FakeQuantizedSampler(
            inputs.checkpoint,
            inputs.ranges,
            inputs.segments,
            inputs.config.precision,
            sampling=inputs.exported.sampling(self.model),
            cfg_channels=inputs.exported.cfg_channels,
        )
        self.images, self.others = (
            FakeQuantizedImages(self.sampler, seed, inputs.config.images, inputs.cfg_scales)
            for seed in (inputs.seed, inputs.seed + 1)
        )
        self.macs = layer_macs(self.model, self.sampler.masks, inputs.segments, inputs.token_ratio)
        self.everything = np.ones(self.macs.shape, bool)
        identity = {
            "precision": inputs.config.precision,
            "images": [inputs.config.images, *inputs.cfg_scales],
            "steps": inputs.config.steps,
            "segments": [list(each) for each in inputs.segments],
            "ranges": inputs.ranges.model_dump(mode="json", by_alias=True),
            "channels": inputs.exported.cfg_channels,
            "macs": hashlib.sha256(self.macs.tobytes()).hexdigest(),
        }
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        self.work = inputs.work / f"search-{name}"
        self.measured: dict[int, Quality] = {}

    def run(self, progress: Progress | None, announce: Announce | None) -> tuple[ActivationRanges, Sensitivity]:
        if announce:
            announce(self.estimate())
        ticks = _Ticks(progress, self._total())
        self.images.tick = self.others.tick = ticks
        self.ticks = ticks
        target, plain = self.config.target, self._plain(self.images, "")
        path = self._saved("trajectory", self._run_cost, self._trajectory)
        losses = self._losses(path)
        order = int8_order(losses, self.macs)
        shape = self.macs.shape

        def quality(count: int) -> Quality:
            if count not in self.measured:
                fp16_layers = fp16_layers_after(order, count, shape)
                name = f"point-{count}"
                images = (
                    self._saved(name, self._run_cost, lambda: self.images.run(fp16_layers)) if count else path[-1, 0]
                )
                self.measured[count] = self._quality(images, plain)
            return self.measured[count]

        best = most_that_holds(lambda count: target.holds(quality(count)), len(order))
        if best < 0:
            raise CalibrationError(self._missed(quality(0)))
        points = spread_counts(order, self.macs)
        ticks.remain((len(set(points) - self.measured.keys() - {0}) + OTHERS_RUNS) * self._run_cost)
        for count in points:
            quality(count)
        # A token that is routed differently is a jump, so quality may not fall steadily: a later point may reach the
        # target.
        best = max(count for count, each in self.measured.items() if target.holds(each))
        fp16_layers = fp16_layers_after(order, best, shape)
        others = self._saved(f"held-out-{best}", self._run_cost, lambda: self.others.run(fp16_layers))
        held_out = self._quality(others, self._plain(self.others, "held-out-"))
        ticks.finish()
        curve = tuple(self._point(order, count, self.measured[count]) for count in sorted(self.measured))
        rows = tuple(tuple(map(tuple, blocks)) for blocks in fp16_layers.tolist()) if fp16_layers.any() else None
        return self.ranges.model_copy(update={"in_16_bits": rows}), Sensitivity(
            precision="fp8" if self.config.precision is Precision.FP8 else "int8-static",
            target_psnr=target.psnr,
            target_fd_ratio=target.fd_ratio,
            reference_sha256=None if self.reference is None else self.reference.sha256,
            images=self.config.images,
            peak="2, pixels in [-1, 1]" if self.model.samples_pixels else "the range of the image's own latents",
            layers=len(order),
            losses=tuple(tuple(map(tuple, blocks)) for blocks in losses.tolist()),
            curve=curve,
            chosen=self._point(order, best, self.measured[best]),
            held_out=held_out,
            held_out_holds=target.holds(held_out),
        )

    def _losses(self, path: np.ndarray) -> np.ndarray:
        """Predicted losses [segments, L, layers], from the latents of the run in 16 bits [S+1, n, C, S, S]."""
        errors = np.stack(
            [
                self._saved(f"losses-{index}", self._losses_cost(index), partial(self._errors, index, path))
                for index in range(len(self.segments))
            ]
        )
        grown = np.full(len(self.segments), np.nan)
        for index in self._followed():
            cost = (self.images.steps - self.segments[index][0]) * len(self.images.batches)
            grown[index] = self._saved(f"gain-{index}", cost, partial(self._grown, index, path))
        return predicted_losses(errors, grown)

    def _errors(self, index: int, path: np.ndarray) -> np.ndarray:
        """The error of x_prev [L, layers] with one layer of a segment in 8 bits, summed over the steps of the
        segment."""
        first, end = self.segments[index]
        chosen = self._steps(index)
        errors = np.zeros(self.macs.shape[1:])
        for step in chosen:
            fp16_layers = np.ones(errors.shape, bool)
            subnet = self.sampler.subnet(step, self.sampler.layers(step, fp16_layers))
            for block, layer in self._layers(step):
                fp16_layers[:] = True
                fp16_layers[block, layer] = False
                after = self.images.step(subnet, step, State(*path[step]))
                errors[block, layer] += np.square(after.x.astype(np.float64) - path[step + 1, 0]).mean()
        return errors * ((end - first) / len(chosen))

    def _grown(self, index: int, path: np.ndarray) -> np.ndarray:
        """The mean square error of the images with one whole segment in 8 bits, against those with all in 16 bits."""
        fp16_layers = self.everything.copy()
        fp16_layers[index] = False
        first = self.segments[index][0]
        images, plain = (
            pictures(each, self.model).astype(np.float64)
            for each in (self.images.run(fp16_layers, first, State(*path[first])), path[-1, 0])
        )
        return np.asarray(np.square(images - plain).mean())

    def _steps(self, index: int) -> list[int]:
        """The steps of a segment at which losses are measured."""
        first, end = self.segments[index]
        return [first + step for step in spread_steps(end - first, self.config.steps)]

    def _layers(self, step: int) -> list[tuple[int, int]]:
        """The (block, layer) pairs that a step runs."""
        axis = self.model.units
        return [
            (part.block, axis.layer_names.index(layer.name))
            for part, units in zip(axis.parts, axis.counts(self.sampler.masks[step]), strict=True)
            if units
            for layer in part.group.layers
        ]

    def _followed(self) -> list[int]:
        return list(spread_steps(len(self.segments), MOST_GAINS))

    @property
    def _run_cost(self) -> int:
        return self.images.steps * len(self.images.batches)

    def _losses_cost(self, index: int) -> int:
        return sum(len(self._layers(step)) for step in self._steps(index)) * len(self.images.batches)

    @property
    def _most_runs(self) -> int:
        """The largest number of whole runs: without quantization and in 16 bits, bisection, curve, held-out images."""
        layers = int((self.macs > 0).sum())
        return 2 + OTHERS_RUNS + CURVE_POINTS + most_questions(layers)

    def _total(self) -> int:
        """The largest number of steps of batches."""
        grown = sum(self.images.steps - self.segments[index][0] for index in self._followed())
        losses = sum(self._losses_cost(index) for index in range(len(self.segments)))
        return self._most_runs * self._run_cost + grown * len(self.images.batches) + losses

    def estimate(self) -> str:
        """One line that says how long the search may take, from the measured time of a few steps of all images."""
        x = self.images.initial()
        in_8_bits, seconds = np.zeros(self.macs.shape[1:], bool), []
        for step in (self.images.steps // 2, *spread_steps(self.images.steps, MEASURED_STEPS)):
            start = time.perf_counter()
            self.images.step(self.sampler.subnet(step, self.sampler.layers(step, in_8_bits)), step, x)
            seconds.append((time.perf_counter() - start) / len(self.images.batches))
        each = float(np.median(seconds[1:]))  # the first also does what only a first call does
        total = self._total()
        return (
            f"The search for layers takes at most about {duration(each * total)}: {counted(total, 'step')} of a batch "
            f"at {each:.2g} s each. They are at most {counted(self._most_runs, 'run')} of "
            f"{counted(self.images.steps, 'step')} with {counted(self.config.images, 'image')} each, and measurements "
            "of single layers. Run the same command again to resume an interrupted search"
        )

    def _plain(self, images: FakeQuantizedImages, name: str) -> np.ndarray:
        """The images of the model without quantization."""
        return self._saved(f"{name}plain", self._run_cost, lambda: images.run(None))

    def _quality(self, images: np.ndarray, plain: np.ndarray) -> Quality:
        ours, theirs = pictures(images, self.model), pictures(plain, self.model)
        decibels = psnr(ours, theirs, PIXEL_SPAN if self.model.samples_pixels else None)
        ratio = None
        if self.reference is not None:
            distance = self.reference.distance(theirs)
            ratio = 1.0 if np.array_equal(ours, theirs) else self.reference.distance(ours) / max(distance, 1e-30)
        return Quality(psnr_least=decibels.min(), psnr_median=float(np.median(decibels)), fd_ratio=ratio)

    def _point(self, order: np.ndarray, count: int, quality: Quality) -> CurvePoint:
        share = share_in_8_bits(order, count, self.macs)
        return CurvePoint(layers=count, share=share, bound=bound_on_speed(share), quality=quality)

    def _missed(self, quality: Quality) -> str:
        target = self.config.target
        if target.psnr is not None:
            return (
                f"no choice of layers reaches {target.psnr:g} dB: with every layer in 16 bits the worst image has "
                f"{quality.psnr_least:.1f} dB; set a lower target"
            )
        return (
            f"no choice of layers reaches {target.fd_ratio:g} times the model's Fréchet distance: with every layer in "
            f"16 bits it is {quality.fd_ratio:.4f} times; set a higher ratio, or use more images"
        )

    def _trajectory(self) -> np.ndarray:
        """The states of a run with all layers in 16 bits, [S+1, 2, n, C, S, S]: latents and history before each step,
        and those of the images.
        """
        path: list[np.ndarray] = []

        def keep(state: State[np.ndarray]) -> None:
            path.append(np.stack([state.x, state.history_or(np.zeros_like)]))

        keep(self.images.initial())
        self.images.run(self.everything, on_step=keep)
        return np.stack(path)

    def _saved(self, name: str, cost: int, make: Callable[[], np.ndarray]) -> np.ndarray:
        """An array from the work folder, or else from `make` and then saved there; `cost` in steps of batches."""
        file = self.work / f"{name}.npz"  # which has a checksum, unlike .npy
        if (saved := kept_arrays(file, "array")) is not None:
            self.ticks(cost)
            return saved[0]
        array = make()
        with atomic_file(file) as opened:
            np.savez(opened, array=array)
        return array


def psnr(images: np.ndarray, reference: np.ndarray, span: float | None) -> np.ndarray:
    """PSNR of each image [n], at most 200 dB, for a range of values `span` (None: that of each reference image)."""
    with np.errstate(divide="ignore"):
        return np.minimum(-20 * np.log10(picture_error(images, reference, span)), MOST_DECIBELS)
