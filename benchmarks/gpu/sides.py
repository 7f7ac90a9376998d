"""What is timed: bundles by a way, the same subnetworks with all inputs on the device, and PyTorch beside them.

A side's `round` gives the milliseconds of each step that it timed. Opening a side loads all that its rounds need.
PyTorch is imported by the sides that run on it alone: it would load CUDA's libraries for the others, and take memory.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

from clock import WALL, clock_of, each_ms
from settings import CFG_SCALE, DENSE, PER_STEP, SEED, Settings, Work
from ways import Way, open_way, way_of

from dydit.bench.bench import spread_steps
from dydit.bench.timing import Job, Latents, MeasuredBundle
from dydit.bundle.bundle import Bundle
from dydit.errors import BackendError, UnavailableError
from dydit.reports.bench_report import Side as BenchSide
from dydit.reports.bench_report import SideKind
from dydit.runtime.loop import MemoryStore, WholeRuns
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import make_batches

RESIDENT, PYTORCH = "torch-resident", "pytorch"
MASKED, STATIC, COMPILED = "eager masked", "eager static", "compiled static"
TITLES = {
    RESIDENT: "PyTorch, inputs on the device",
    PYTORCH: "PyTorch, the whole model",
}
EVERYTHING = (MASKED,)
"""Sides that compute the dynamic model; the other rivals compute the static one."""


class Side(ABC):
    """A side, opened. `steps`: how many a round times. `clock`: what its times were read from."""

    clock = WALL
    steps: int

    @abstractmethod
    def round(self) -> list[float]:
        """Milliseconds of each step of a round."""

    @property
    def repeated(self) -> int:
        """Steps that ran again at full capacity, so far."""
        return 0

    def close(self) -> None:  # noqa: B027  (most sides go with their last reference)
        """Free what it holds."""


def open_side(settings: Settings, work: Work, way: str, name: str, batch: int) -> Side:
    """Open a side. Raises `BackendError` where it cannot run, `UnavailableError` where something is missing."""
    if way == PYTORCH:
        return Rival(settings, work, name, batch)
    bundle = _bundle(work, way, name)
    if way == RESIDENT:
        return Resident(settings, bundle, batch)
    chosen = way_of(way)
    if chosen.whole:
        return WholeRun(settings, chosen, bundle, batch)
    return SingleSteps(settings, chosen, bundle, batch)


def _bundle(work: Work, way: str, plan: str) -> Bundle:
    path = work.bundle(plan)
    if way not in (RESIDENT, PYTORCH) and (flavour := way_of(way).flavour):
        path = work.folder / "engines" / flavour / plan
        if not path.is_dir():
            raise UnavailableError("its engines were not built")
    if not path.is_dir():
        raise UnavailableError("its bundle was not made")
    bundle = Bundle.open(path, verify=False)
    if plan == PER_STEP and way not in (RESIDENT, PYTORCH) and way_of(way).whole:
        count = len(bundle.manifest.subnets)
        raise UnavailableError(f"a whole run loads {count} subnetworks, each for one step; it is timed step by step")
    return bundle


class WholeRun(Side):
    """Whole runs on the device: all steps, the host's noise and the latents' way back included."""

    def __init__(self, settings: Settings, way: Way, bundle: Bundle, batch: int):
        model = bundle.manifest.model
        self.steps, self._repeated = bundle.manifest.sampling.steps, 0
        self._backend: Any = open_way(way, bundle, settings.device)
        assert isinstance(self._backend, WholeRuns)
        labels = [index % model.num_classes for index in range(batch)]
        self._batches = make_batches(labels, range(batch), batch)
        self._noise = SeededNoise(SEED, (model.in_channels, model.input_size, model.input_size))

    def round(self) -> list[float]:
        start = time.perf_counter()
        stats = self._backend.sample_run(self._batches, self._noise, MemoryStore(), CFG_SCALE)
        ms = 1e3 * (time.perf_counter() - start)
        self._repeated += stats.repeated_steps
        return [ms / self.steps] * self.steps

    @property
    def repeated(self) -> int:
        return self._repeated

    def close(self) -> None:
        self._backend.close()


class SingleSteps(Side):
    """Steps spread over the run, as the generic loop runs them: inputs go to the device and latents come back."""

    def __init__(self, settings: Settings, way: Way, bundle: Bundle, batch: int):
        manifest, side = (
            bundle.manifest,
            BenchSide(name=way.name, kind=SideKind.BUNDLE, path=str(bundle.path), backend=way.backend),
        )
        measured = spread_steps(manifest.sampling.steps, settings.measured)
        job = Job(
            side=side,
            sizes=manifest.model.without_routers(),
            steps=measured,
            of=manifest.sampling.steps,
            labels=tuple(index % manifest.model.num_classes for index in range(batch)),
            seed=SEED,
            cfg_scale=CFG_SCALE,
            cfg_channels=manifest.sampling.cfg_channels,
            threads=0,
            device=settings.device,
            latents=Latents.NOISE,
        )
        self.steps, self._repeated = len(measured), 0
        self._measured = MeasuredBundle(job)
        self._measured.load()

    def round(self) -> list[float]:
        made = self._measured.round()
        self._repeated += made.overflows
        return list(made.ms)

    @property
    def repeated(self) -> int:
        return self._repeated

    def close(self) -> None:
        self._measured.subnets.close()


class Resident(Side):
    """The PyTorch backend's subnetworks with everything on the device: what is left is kernels and their launches.

    The conditioning of all measured steps, one call, is part of a round.
    """

    def __init__(self, settings: Settings, bundle: Bundle, batch: int):
        import torch

        from dydit.models.dit.sliced import SlicedDiT
        from dydit.runtime.backends.torch import mapped_weights

        manifest, self._device = bundle.manifest, settings.device
        model, device = manifest.model, torch.device(settings.device)
        self.clock = clock_of(self._device)
        measured = spread_steps(manifest.sampling.steps, settings.measured)
        self.steps, self._model, self._weights = len(measured), model, mapped_weights(bundle, device)
        subnet_of = {step: segment.subnet for segment in manifest.plan.segments for step in segment.steps}
        entries = {index: manifest.subnets[index] for index in sorted({subnet_of[step] for step in measured})}
        subnets = {
            index: SlicedDiT(model, self._weights, each.units, manifest.sampling.cfg_channels)
            for index, each in entries.items()
        }
        labels = [index % model.num_classes for index in range(batch)]
        self._labels = torch.tensor([*labels, *[model.null_class] * batch], device=device)
        self._timesteps = torch.tensor([manifest.sampling.timesteps[step] for step in measured], device=device)
        shape = (batch, model.in_channels, model.input_size, model.input_size)
        x, noise = (torch.randn(shape, generator=torch.Generator().manual_seed(s)).to(device) for s in (1, 2))
        scale, self._modulation = torch.tensor(CFG_SCALE, device=device), torch.empty(0)
        self._work = [self._condition]
        for place, step in enumerate(measured):
            index = subnet_of[step]
            gates = torch.from_numpy(bundle.step_gates(step)).to(device) if entries[index].gated else None
            row = torch.tensor(manifest.sampling.coefficients[step], dtype=torch.float32, device=device)

            def run(subnet=subnets[index], place=place, gates=gates, row=row) -> None:
                self.last = subnet.step(x, noise, row, scale, self._modulation[place], gates).x_prev

            self._work.append(run)

    def _condition(self) -> None:
        from dydit.models.dit.sliced import conditioning

        self._modulation = conditioning(self._model, self._weights, self._timesteps, self._labels)

    def round(self) -> list[float]:
        first, *rest = each_ms(self._device, self._work)
        _require_finite(self.last)
        return [ms + first / self.steps for ms in rest]


class Rival(Side):
    """The whole model in PyTorch, in half precision throughout: masked as the public code runs it, static, compiled."""

    def __init__(self, settings: Settings, work: Work, name: str, batch: int):
        import torch

        from dydit.checkpoints.checkpoint import load_checkpoint
        from dydit.diffusion.coefficients import step_coefficients
        from dydit.diffusion.sampler_step import sampler_step
        from dydit.diffusion.schedule import Sampler, Schedule
        from dydit.export.settings import GUIDED_CHANNELS
        from dydit.models.routers import Masked, Static

        checkpoint = load_checkpoint(work.checkpoint(name == MASKED))
        config, device = checkpoint.config, torch.device(settings.device)
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[settings.precision]
        model: Any = checkpoint.model().eval().to(device=device, dtype=dtype)
        gating = Masked() if name == MASKED else Static()
        if name == COMPILED:
            model = torch.compile(model)
        measured = spread_steps(settings.steps, settings.measured)
        schedule = Schedule.respaced(settings.steps)
        rows = torch.from_numpy(step_coefficients(schedule, Sampler.DDPM, config.learn_sigma))
        self.steps, self._device, self.clock = len(measured), settings.device, clock_of(settings.device)
        labels = [index % config.num_classes for index in range(batch)]
        y = torch.tensor([*labels, *[config.null_class] * batch], device=device)
        shape = (batch, config.in_channels, config.input_size, config.input_size)
        x, noise = (torch.randn(shape, generator=torch.Generator().manual_seed(s)).to(device) for s in (1, 2))
        self._work, guided = [], min(GUIDED_CHANNELS, config.in_channels)
        for step in measured:
            t = torch.full((2 * batch,), int(schedule.timesteps[::-1][step]), device=device)

            @torch.inference_mode()
            def run(t=t, row=rows[step]) -> None:
                out = model(x.repeat(2, 1, 1, 1).to(dtype), t, y, gating)
                self.last = sampler_step(x, out.float(), noise, row, CFG_SCALE, guided)

            self._work.append(run)

    def round(self) -> list[float]:
        times = each_ms(self._device, self._work)
        _require_finite(self.last)
        return times


def _require_finite(latents: Any) -> None:
    if not bool(latents.isfinite().all()):
        raise BackendError("the latents after its last step hold NaN or infinite values, so that its times say nothing")


def is_dense(way: str, name: str) -> bool:
    """Whether a side computes the static model."""
    return name in (DENSE, STATIC, COMPILED) if way != PYTORCH else name not in EVERYTHING
