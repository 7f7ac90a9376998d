"""What the tasks of the GPU benchmark do, each in a process of its own: `KINDS`.

A task tells every part of its result by `emit(name, value)` as soon as it is known, so that what was measured before a
crash stays. PyTorch is imported only where a task needs it: it would load CUDA's libraries beside the backend's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from tasks import CONFIGURATIONS, DENSE, PLANS, SMALL, Configuration, Settings, Work
from timing import CFG_SCALE, SEED, Emit, ceiling, device_memory, nvidia_smi, open_configuration, time_contenders

from dydit.bench.bench import spread_steps
from dydit.bench.scripts import bundle_bytes, random_checkpoint, static_checkpoint
from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import Routing
from dydit.bundle.stored_weights import Precision
from dydit.diffusion.samplers import SamplerConfig
from dydit.diffusion.steps import State, run_steps
from dydit.errors import BackendError
from dydit.files import new_folder
from dydit.models.macs import flops_ratio, static_macs
from dydit.parity.comparison import picture_error, relative_l2
from dydit.parity.tolerances import tolerances
from dydit.reports.results import measured
from dydit.runtime.backends.base import Backend, BackendOptions
from dydit.runtime.backends.onnxruntime import OnnxRuntimeBackend
from dydit.runtime.loop import MemoryStore, StepRunner, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import Batch, make_batches
from dydit.runtime.resident import ResidentSubnets

SMALL_STEPS, SMALL_LABELS = 12, (3, 1, 0, 6)
SLACK = 1.15
"""Token slots of a block: the largest share of tokens that a measured step routed, times this."""


def installed(settings: Settings, work: Work, emit: Emit) -> None:
    """Emit the trials of `dydit doctor`, the driver's version and the device's memory."""
    from dydit.doctor.doctor import run_doctor

    emit("doctor", run_doctor().to_json())
    emit("driver", nvidia_smi("driver_version"))
    emit("memory_bytes", device_memory(settings, "memory.total"))


def models(settings: Settings, work: Work, emit: Emit) -> None:
    """Make the dynamic and the static model; emit the multiply-adds of an image's blocks, with guidance, in each.

    Masks and tokens are those of one image on normal noise, in fp32, mean over the measured steps. What merged plans or
    unused token slots compute beyond that shows as a smaller share of the bound. The tokens are kept for the exports.
    """
    import torch

    from dydit.checkpoints.checkpoint import load_checkpoint
    from dydit.models.synthetic import recorded_pass
    from dydit.quickstart.quickstart import ASSETS

    if settings.model == "digits":
        shutil.copyfile(ASSETS / "dydit.safetensors", work.dynamic)
        shutil.copyfile(ASSETS / "dit.safetensors", work.static)
        checkpoint = load_checkpoint(work.dynamic)
    else:
        checkpoint = random_checkpoint(work.dynamic, settings.config)
        static_checkpoint(work.static, checkpoint)
    config, device = checkpoint.config, settings.device
    model, generator = checkpoint.model().to(device).eval(), torch.Generator().manual_seed(SEED)
    timesteps = SamplerConfig(steps=settings.steps).times(config.diffusion)
    y = torch.tensor([0, config.null_class], device=device)
    masks, tokens = [], []
    for step in spread_steps(settings.steps, settings.measured):
        x = torch.randn(1, config.in_channels, config.input_size, config.input_size, generator=generator)
        t = torch.full((2,), float(timesteps[step]), device=device)
        _, recording = recorded_pass(model, x.repeat(2, 1, 1, 1).to(device), t, y)
        decisions = recording.decisions()
        masks.append(decisions.units[0].cpu().numpy() > 0)
        tokens.append(decisions.tokens.float().mean(dim=(1, 2)).cpu().numpy())
    np.save(work.tokens, np.stack(tokens))
    ratio = np.mean(flops_ratio(config, config.units.counts(np.stack(masks)), np.stack(tokens)))
    static = 2 * static_macs(config)
    emit("token_share", float(np.mean(tokens)))
    emit("macs", {"static": static, "dynamic": float(ratio) * static})


def bundle(settings: Settings, work: Work, emit: Emit, plan: str) -> None:
    """Export one of `PLANS`, unless an interrupted run has done it, and emit its size."""
    from dydit.checkpoints.checkpoint import load_checkpoint
    from dydit.export.exporter import export
    from dydit.export.settings import ExportConfig

    if not work.bundle(plan).is_dir():
        chosen = {"steps": settings.steps, "precision": settings.precision, "max_batch": max(settings.batches)}
        if plan != DENSE:
            tokens = settings.config.tokens
            share = np.load(work.tokens).max(axis=0)
            slots = tuple(int(min(tokens, np.ceil(SLACK * each * tokens))) for each in share)
            chosen |= {**PLANS[plan], "routing": Routing.CAPACITY, "capacities": slots}
        checkpoint = load_checkpoint(work.static if plan == DENSE else work.dynamic)
        export(checkpoint, work.bundle(plan), ExportConfig.model_validate(chosen))
    exported = Bundle.open(work.bundle(plan))
    emit("subnets", len(exported.manifest.subnets))
    emit("bytes", bundle_bytes(exported))


def engines(settings: Settings, work: Work, emit: Emit, configuration: str, plan: str) -> None:
    """Build the engines of a bundle for a configuration."""
    build_engines(CONFIGURATIONS[configuration], work, plan)


def build_engines(configuration: Configuration, work: Work, name: str) -> None:
    """Copy a bundle and let `dydit build` make its engines; `BackendError` has the last line that it printed."""
    copy = work.bundle(name, configuration)
    if not copy.is_dir():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(copy) as folder:
            shutil.copytree(work.bundle(name), folder, dirs_exist_ok=True)
    jobs = str(max(1, min(4, (os.cpu_count() or 2) // 2)))
    words = [sys.executable, "-m", "dydit", "build", str(copy), "--flavour", configuration.backend, "--jobs", jobs]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise BackendError(f"dydit build: {lines[-1] if lines else f'exit code {done.returncode}'}")


def small(settings: Settings, work: Work, emit: Emit) -> None:
    """Export the small model in three precisions, and keep the fp32 latents of each step on the CPU's ONNX Runtime."""
    from dydit.export.exporter import export
    from dydit.export.settings import ExportConfig

    checkpoint = random_checkpoint(work.small, SMALL)
    for precision in (Precision.FP32, Precision.FP16, Precision.BF16):
        shutil.rmtree(work.bundle(precision), ignore_errors=True)
        chosen = {"steps": SMALL_STEPS, "max_subnets": 4, "max_batch": len(SMALL_LABELS)}
        config = ExportConfig(routing=Routing.CAPACITY, precision=precision, **chosen)
        export(checkpoint, work.bundle(precision), config)
    backend = OnnxRuntimeBackend(Bundle.open(work.bundle(Precision.FP32)), BackendOptions())
    np.savez(work.reference, latents=reference_latents(backend))
    emit("images", len(SMALL_LABELS))


def small_images() -> tuple[Batch, SeededNoise]:
    """The images of the checks, and their noise."""
    (batch,) = make_batches(SMALL_LABELS, range(len(SMALL_LABELS)), len(SMALL_LABELS))
    return batch, SeededNoise(SEED, (SMALL.in_channels, SMALL.input_size, SMALL.input_size))


def check(settings: Settings, work: Work, emit: Emit, configuration: str, precision: str) -> None:
    """Run the small bundle, whole and step by step, and compare both with the CPU's fp32 latents.

    Engines do not show which tokens they route, so an image whose token is routed otherwise cannot be set aside as in
    `dydit parity`. Therefore the median image is judged, by `dydit.parity.tolerances`, and the worst is reported.
    """
    chosen = CONFIGURATIONS[configuration]
    if chosen.has_engines:
        build_engines(chosen, work, precision)
        emit("built", True)
    with np.load(work.reference) as file:
        expected = file["latents"]
    backend = open_configuration(chosen, Bundle.open(work.bundle(precision, chosen)), settings.device)
    compare(backend, expected, Precision(precision), emit)


def reference_latents(backend: Backend) -> np.ndarray:
    """The latents before and after each step of the checks' images, f32 [steps + 1, B, C, S, S], by single steps."""
    batch, noise = small_images()
    latents, steps = [noise.initial(batch)], backend.bundle.manifest.sampling.steps
    with ResidentSubnets(backend, 2) as subnets:
        step = StepRunner(backend, subnets, SMALL_LABELS, CFG_SCALE).steps_of(batch, noise)
        run_steps(step, State(latents[0]), range(steps), lambda _, result: latents.append(result.x_prev))
    return np.stack(latents)


def compare(backend: Backend, expected: np.ndarray, precision: Precision, emit: Emit) -> None:
    """Run the checks' images on a backend, whole and step by step, and compare both with `reference_latents`."""
    allowed, (batch, noise) = tolerances(precision), small_images()
    store, steps = MemoryStore(), []
    with ResidentSubnets(backend, 2) as subnets:
        runner = StepRunner(backend, subnets, batch.labels, CFG_SCALE)
        stats = sample(runner, [batch], noise, store)
        emit("whole", {"steps": stats.steps, "repeated": stats.repeated_steps})
        for k, (x, after) in enumerate(pairwise(expected)):
            steps.append(relative_l2(runner.run(k, State(x), noise.step(batch, k), batch.labels).x_prev, after))
    decibels = allowed["run"].decibels
    measure = partial(picture_error, span=None) if decibels else relative_l2
    emit("step", _judged(np.stack(steps).max(axis=0), allowed["step"].limit))
    emit("run", {**_judged(measure(store.load(0).x, expected[-1]), allowed["run"].limit), "decibels": decibels})


def _judged(values: np.ndarray, tolerance: float) -> dict[str, Any]:
    """The verdict on a value for each image."""
    median, worst = float(np.median(values)), float(values.max())
    holds = bool(median <= tolerance)
    return {"median": measured(median), "worst": measured(worst), "tolerance": tolerance, "holds": holds}


KINDS: dict[str, Callable[..., None]] = {
    "installed": installed,
    "ceiling": ceiling,
    "small": small,
    "check": check,
    "models": models,
    "bundle": bundle,
    "engines": engines,
    "time": time_contenders,
}
