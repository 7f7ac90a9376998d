"""Times on one device: its ceiling, and the contenders of a backend configuration."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from tasks import COMPILED, CONFIGURATIONS, MASKED, PYTORCH, Configuration, Settings, Work

from dydit.bench.bench import spread_steps
from dydit.bench.timing import Job, Latents, Measured, MeasuredBundle, Round
from dydit.bundle.bundle import Bundle
from dydit.diffusion.samplers import SamplerConfig
from dydit.errors import BackendError, UnavailableError, one_line
from dydit.reports.bench_report import Side, SideKind
from dydit.runtime.backends.base import Backend, BackendOptions
from dydit.runtime.backends.cores import available_cores
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.loop import MemoryStore
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import make_batches

Emit = Callable[[str, Any], None]
CFG_SCALE, GUIDED_CHANNELS, SEED = 4.0, 3, 0
SHARE = 0.9
"""Of a task's time, what may be used before its process is ended."""
TYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def ceiling(settings: Settings, work: Work, emit: Emit) -> None:
    """Emit TFLOP/s of a large square matrix product in the precision that is timed, by CUDA events."""
    from ceilings import Clock, product  # imports PyTorch

    n = 256 if settings.gpu is None else 8192
    emit("product", {"n": n, **product(Clock(settings.device), TYPES[settings.precision], n, n, n)})


def open_configuration(configuration: Configuration, bundle: Bundle, device: str) -> Backend:
    """A bundle's backend with the settings of a configuration. Raises `BackendError` and `BundleError`."""
    options = BackendOptions(device=device)
    if configuration.has_engines:
        from dydit.engines.flavour import Flavour
        from dydit.runtime.backends.tensorrt import TensorRTBackend

        return TensorRTBackend(bundle, options, Flavour(configuration.backend), configuration.graphs)
    if configuration.whole:
        from dydit.runtime.backends.ort_cuda import OnnxRuntimeDeviceBackend

        return OnnxRuntimeDeviceBackend(bundle, options, configuration.graphs)
    if configuration.backend == "onnxruntime":  # `open_backend` would choose the one whose loop is on the device
        from dydit.runtime.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(bundle, options)
    return open_backend(configuration.backend, bundle, options)


class WholeRun:
    """Whole runs on the device: all steps, with the host's noise and the latents' way back."""

    def __init__(self, settings: Settings, configuration: Configuration, bundle: Bundle, batch: int):
        model = bundle.manifest.model
        self._steps = bundle.manifest.sampling.steps
        self._backend: Any = open_configuration(configuration, bundle, settings.device)
        self._batches = make_batches([index % model.num_classes for index in range(batch)], range(batch), batch)
        self._noise = SeededNoise(SEED, (model.in_channels, model.input_size, model.input_size))

    def round(self) -> Round:
        """Time one run; every step gets the same share."""
        start = time.perf_counter()
        stats = self._backend.sample_run(self._batches, self._noise, MemoryStore(), CFG_SCALE)
        ms = 1e3 * (time.perf_counter() - start)
        return Round(ms=(ms / self._steps,) * self._steps, overflows=stats.repeated_steps)


def open_contender(settings: Settings, work: Work, configuration: str, name: str, batch: int) -> Measured | WholeRun:
    """Load one contender: a plan in a configuration, or a form of the whole model in PyTorch.

    Raises `UnavailableError` where its bundle is missing, `BackendError` where it cannot run or its latents are not
    finite.
    """
    chosen = CONFIGURATIONS[configuration]
    path = work.bundle(name, chosen)
    if chosen is not PYTORCH and not path.is_dir():
        raise UnavailableError("its engines were not built" if chosen.has_engines else "its bundle was not made")
    if chosen.whole:
        return WholeRun(settings, chosen, Bundle.open(path, verify=False), batch)
    if chosen is PYTORCH:
        contender = _pytorch(settings, work, name, batch)
    else:
        side = Side(name=name, kind=SideKind.BUNDLE, path=str(path), backend=chosen.backend)
        contender = MeasuredBundle(_job(settings, side, batch))
    contender.load()
    if not np.isfinite(contender.check()).all():
        raise BackendError("its latents hold NaN or infinite values after one step")
    return contender


def _pytorch(settings: Settings, work: Work, name: str, batch: int) -> Measured:
    """The whole model in the precision that is timed."""
    import torch

    from dydit.bench.timing_torch import MeasuredTorch

    dtype = getattr(torch, TYPES[settings.precision])

    class Converted(MeasuredTorch):
        def build(self, job: Job):
            model, config = super().build(job)
            model = model.to(dtype)
            if name == COMPILED:
                model = torch.compile(model)
            return lambda x, t, y, gating: model(x.to(dtype), t, y, gating).float(), config

    kind, path = (SideKind.TORCH_MASKED, work.dynamic) if name == MASKED else (SideKind.TORCH_STATIC, work.static)
    return Converted(_job(settings, Side(name=name, kind=kind, path=str(path)), batch))


def _job(settings: Settings, side: Side, batch: int) -> Job:
    """Steps spread over the run, from normal noise, because runs of random weights lead nowhere."""
    sizes = settings.config.without_routers()
    return Job(
        side=side,
        sizes=sizes,
        steps=spread_steps(settings.steps, settings.measured),
        run=SamplerConfig(steps=settings.steps),
        process=sizes.diffusion,
        labels=tuple(index % sizes.num_classes for index in range(batch)),
        seed=SEED,
        cfg_scale=CFG_SCALE,
        cfg_channels=min(GUIDED_CHANNELS, sizes.in_channels),
        threads=available_cores(),
        device=settings.device,
        latents=Latents.NOISE,
    )


def time_contenders(
    settings: Settings,
    work: Work,
    emit: Emit,
    configuration: str,
    contenders: Sequence[str],
    batch: int,
    seconds: float,
) -> None:
    """`take_turns` of contenders of a configuration, in a share of `seconds`."""
    openers = {name: partial(open_contender, settings, work, configuration, name, batch) for name in contenders}
    deadline = time.monotonic() + SHARE * seconds
    take_turns(openers, emit, lambda loaded: device_memory(settings), settings.repeats, deadline)


class Contender(Protocol):
    """Something that is timed in rounds."""

    def round(self) -> Round:
        """Time one round."""


def take_turns(
    openers: Mapping[str, Callable[[], Contender]],
    emit: Emit,
    memory: Callable[[bool], int | None],
    repeats: int,
    deadline: float,
) -> None:
    """Emit each contender's figures, again after each of its rounds, or why it has none.

    All are loaded and make a round that does not count; then they take turns. No round starts that would not end before
    `deadline`, of the monotonic clock. Device memory is what `memory(True)` counted after the first round, less what
    `memory(False)` counted before loading: weights, activations, and what the library keeps.
    """
    opened, figures = {}, {}
    for name, opener in openers.items():
        start, before = time.monotonic(), memory(False)
        try:
            contender = opener()
            loaded = time.monotonic()
            contender.round()
        except UnavailableError as error:
            emit(name, {"reason": one_line(error)})
        except Exception as error:  # whatever a library raises costs this contender alone
            emit(name, {"reason": f"failed: {type(error).__name__}: {one_line(error)[:300]}"})
        else:
            opened[name] = contender, time.monotonic() - loaded
            after = memory(True)
            used = None if before is None or after is None else max(0, after - before)
            loading = {"load_seconds": loaded - start, "memory_bytes": used}
            figures[name] = {**loading, "round_ms": [], "repeated_steps": 0}
    for _ in range(repeats):
        for name, (contender, round_seconds) in list(opened.items()):
            if time.monotonic() + round_seconds > deadline:
                continue
            values = figures[name]
            try:
                result = contender.round()
            except Exception as error:  # as above; what was measured before stays
                emit(name, {**values, "reason": f"failed: {type(error).__name__}: {one_line(error)[:300]}"})
                del opened[name]
                continue
            values["round_ms"].append(float(np.mean(result.ms)))
            values["repeated_steps"] += result.overflows
            values |= {"steps": len(result.ms), "ms": float(np.median(values["round_ms"]))}
            emit(name, values)


def macs_share(batch: int, macs: float, tflops: float, ms: float) -> float:
    """Of a step's time, the share that its multiply-adds alone would take at the ceiling. `macs`: of one image."""
    return 2e3 * batch * macs / (tflops * 1e12) / ms


def device_memory(settings: Settings, field: str = "memory.used") -> int | None:
    """Bytes of device memory that all processes use, or of all (`memory.total`); None on the CPU or where not known."""
    text = None if settings.gpu is None else nvidia_smi(field)
    return None if text is None else int(text) << 20


def nvidia_smi(field: str) -> str | None:
    """A field of the first GPU, as `nvidia-smi` prints it without units; None where that does not work."""
    words = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
