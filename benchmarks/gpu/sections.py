"""The parts of a run of nine minutes, in the order of their worth: `PARTS`."""

from __future__ import annotations

import math
import platform
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from budget import Context, Part
from ceilings import attention, copied, product
from contenders import (
    COMPILED,
    LOOP_DYNAMIC,
    LOOP_STATIC,
    MASKED,
    STATIC,
    DeviceLoop,
    Made,
    WholeModel,
    open_timed,
    opened,
)
from graphless import graphless_bundle, graphless_weights, plan_steps
from measure import SMALL_STEPS, compare, reference_latents
from tasks import SMALL
from timing import CFG_SCALE, SEED, TYPES, nvidia_smi, take_turns
from torch import Tensor

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind, Routing
from dydit.bundle.stored_weights import Precision
from dydit.errors import ConfigError, one_line
from dydit.export.settings import ExportConfig
from dydit.files import explained, new_file
from dydit.inspection.gpus import GPUS, Gpu
from dydit.inspection.roofline import bundle_roofline
from dydit.models.synthetic import synthetic_model
from dydit.parity.comparison import relative_l2
from dydit.reports.results import measured
from dydit.runtime.backends.base import Backend, BackendOptions
from dydit.runtime.backends.torch import TorchBackend
from dydit.runtime.device.driver import require_driver
from dydit.runtime.loop import MemoryStore, StepRunner, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import make_batches
from dydit.runtime.resident import ResidentSubnets

LABELS, IMAGES = (3, 1, 0, 6, 2), range(5)
NEAR = 1e-3
"""Relative L2 of the median image after a whole run in fp32: rounding, which a whole run makes larger."""
KINDS: dict[str, dict[str, Any]] = {
    "capacity": {"routing": Routing.CAPACITY, "capacities": (24, 40, 40)},
    "dense": {"routing": Routing.DENSE},
    "dynamic width": {
        "routing": Routing.CAPACITY,
        "capacities": (24, 40, 40),
        "plan": PlanKind.DYNAMIC_WIDTH,
    },
}
"""Launch lists: token slots that overflow, so that segments are repeated; all tokens; unit weights that are moved."""
PROFILED = 15
"""Rows of a profile."""


def small_bundle(folder: Path, state: dict[str, Tensor] | None = None, **settings: Any) -> Bundle:
    """The small model, or one of its sizes with other weights, without graphs, in a new folder."""
    folder.mkdir(parents=True)
    model = synthetic_model(SMALL)
    if state is not None:
        model.load_state_dict(state)
    values = {"steps": SMALL_STEPS, "max_subnets": 4, "max_batch": 4, "routing": Routing.CAPACITY, **settings}
    planned = plan_steps(model, ExportConfig.model_validate(values))
    return graphless_bundle(folder, graphless_weights(folder, model.state_dict(), planned), planned)


def launches(context: Context) -> None:
    """Launch lists on the driver, with small engines, against the same runs on the CPU, step by step."""
    if not context.dry:
        context.emit("driver", require_driver())
    steps, folder = 3 if context.dry else SMALL_STEPS, context.folder / "launches"
    bundles = {kind: small_bundle(folder / kind, steps=steps, **values) for kind, values in KINDS.items()}
    expected = {}
    for kind, bundle in bundles.items():
        with TorchBackend(bundle, BackendOptions(threads=1)) as backend:
            expected[kind], _ = _latents(backend, 2)
        with opened(context, bundle, fuse=False) as backend:
            latents, stats = _latents(backend, 2)
            values = {**_near(latents, expected[kind]), "steps": stats.steps, "repeated_steps": stats.repeated_steps}
            values["graphs"] = backend.replay(2, 4) > 0
            context.emit(kind, values)
            values["replayed_is_equal"] = bool(np.array_equal(_latents(backend, 2)[0], latents))
            values["other_batch_size"] = _near(_latents(backend, 3)[0], expected[kind])
            context.emit(kind, values)
        with opened(context, bundle, graphs=False, fuse=False) as backend:
            values["without_graphs_is_equal"] = bool(np.array_equal(_latents(backend, 2)[0], latents))
        context.emit(kind, values)
    if context.dry:  # compiling for the CPU takes longer than everything else
        return
    start = time.monotonic()
    with opened(context, bundles["capacity"], fuse=True) as backend:
        latents, _ = _latents(backend, 2)
    context.emit("compiled between products", _near(latents, expected["capacity"]) | {"seconds": _since(start)})


def _latents(backend: Backend, size: int) -> tuple[np.ndarray, Any]:
    noise = SeededNoise(SEED, (SMALL.in_channels, SMALL.input_size, SMALL.input_size))
    batches, store = make_batches(LABELS, IMAGES, size), MemoryStore()
    with ResidentSubnets(backend, 2) as subnets:
        stats = sample(StepRunner(backend, subnets, LABELS, CFG_SCALE), batches, noise, store)
    return np.concatenate([store.load(b).x for b in range(len(batches))]), stats


def _near(latents: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
    distance = relative_l2(latents, expected)
    median = float(np.median(distance))
    worst = float(distance.max())
    return {"median": measured(median), "worst": measured(worst), "tolerance": NEAR, "holds": median <= NEAR}


def ceilings(context: Context) -> None:
    """Large products in each precision, copies, and the products and the attention of the timed model's blocks."""
    clock, dry, config = context.clock, context.dry, context.settings.config
    if not dry:
        context.emit("gpu", {name: nvidia_smi(name) for name in ("driver_version", "memory.total", "power.limit")})
    n = 128 if dry else 8192
    for precision in dict.fromkeys((context.settings.precision, "bf16", "fp16", "fp32")):
        context.emit(f"product {precision}", product(clock, TYPES[precision], n, n, n))
    context.emit("copy", copied(clock, (1 << 20) if dry else (1 << 30)))
    dtype, d = TYPES[context.settings.precision], config.hidden_size
    for batch in context.settings.batches:
        rows = 2 * batch
        shape = (rows, config.num_heads, config.tokens, d // config.num_heads)
        context.emit(f"attention batch {batch}", attention(clock, dtype, shape))
        of_mlp = product(clock, dtype, rows * config.tokens, d, config.mlp_hidden)
        context.emit(f"first product of an MLP, batch {batch}", of_mlp)


def write_reference(path: Path, folder: Path) -> None:
    """Write the small model's weights and its latents on this CPU in fp32, step by step, to a new file."""
    model = synthetic_model(SMALL)
    with TorchBackend(small_bundle(folder / "reference"), BackendOptions(threads=1)) as backend:
        latents = reference_latents(backend)
    state = {f"state.{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}, numpy {np.__version__}"
    with explained(path), new_file(path) as file:
        np.savez(file, latents=latents, machine=np.array(machine), **state)


def read_reference(path: Path) -> tuple[np.ndarray, dict[str, Tensor], str]:
    """What `write_reference` wrote: latents, state dict, machine. Raises `ConfigError` for anything else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            state = {
                name.removeprefix("state."): torch.from_numpy(file[name]) for name in file if name.startswith("state.")
            }
            latents, machine = file["latents"], str(file["machine"])
        shape = (SMALL.in_channels, SMALL.input_size, SMALL.input_size)
        if latents.shape[0] != SMALL_STEPS + 1 or latents.shape[2:] != shape:
            raise ValueError(f"its latents are {latents.shape}")
        synthetic_model(SMALL).load_state_dict(state)
    except (OSError, ValueError, KeyError, RuntimeError, EOFError) as error:
        raise ConfigError(f"{path} is no reference: {one_line(error)}; write one with --make-reference") from error
    return latents, state, machine


def parity(context: Context) -> None:
    """Single steps and whole runs in every precision against a CPU's."""
    path = context.reference
    if path is None:
        path = context.folder / "reference.npz"
        write_reference(path, context.folder / "of reference")
    latents, state, machine = read_reference(path)
    context.emit("reference", {"made_here": context.reference is None, "machine": machine})
    for precision in (Precision.FP32, Precision.FP16, Precision.BF16):
        bundle, parts = small_bundle(context.folder / "parity" / precision, state, precision=precision), {}

        def emit(name: str, value: Any, precision: str = precision, parts: dict[str, Any] = parts) -> None:
            parts[name] = value
            context.emit(precision, parts)

        with opened(context, bundle) as backend:
            compare(backend, latents, precision, emit)


def made(context: Context) -> Made:
    """The timed model; made once."""
    if "model" not in context.made:
        context.made["model"] = Made(context)
        context.emit("model", context.made["model"].facts)
    return context.made["model"]


def speed(context: Context) -> None:
    """The model's forms that need little compilation, by batch size."""
    model, gpu = made(context), named_gpu(context)
    if gpu is not None:
        facts = {name: bundle_roofline(each.manifest, gpu) for name, each in _bundles(model).items()}
        context.emit("roofline", {name: each.model_dump(mode="json") for name, each in facts.items()})
    batches = context.settings.batches
    for place, batch in enumerate(batches):
        share = context.left / (len(batches) - place)
        _time(context, model, batch, (LOOP_DYNAMIC, LOOP_STATIC, STATIC, MASKED), share)


def compiled(context: Context) -> None:
    """The static model compiled, beside the device loop: the largest batch size first, each as far as time allows."""
    model, needed = made(context), 0.0
    for batch in sorted(context.settings.batches, reverse=True):
        if context.left < needed:
            context.emit(
                f"batch {batch}", {COMPILED: {"reason": f"compiling took {needed:.0f} s before; none are left"}}
            )
            continue
        start = time.monotonic()
        _time(context, model, batch, (COMPILED, LOOP_STATIC, LOOP_DYNAMIC), context.left)
        needed = time.monotonic() - start


def _bundles(model: Made) -> dict[str, Bundle]:
    return {LOOP_STATIC: model.static, LOOP_DYNAMIC: model.bundle}


def _time(context: Context, model: Made, batch: int, names: tuple[str, ...], seconds: float) -> None:
    """Time contenders in turns for about `seconds`, then whole runs of the device loop; and free them.

    PyTorch compiles anew for every batch size, as it would in a process of its own: functions that met too many shapes
    before would no longer be compiled.
    """
    torch.compiler.reset()
    deadline, contenders, figures = time.monotonic() + seconds, {}, {}

    def load(name: str) -> WholeModel | DeviceLoop:
        contenders[name] = open_timed(context, model, name, batch)
        return contenders[name]

    def emit(name: str, value: Any) -> None:
        figures[name] = dict(value)
        context.emit(f"batch {batch}", figures)

    try:
        take_turns(
            {name: partial(load, name) for name in names},
            emit,
            partial(device_bytes, context),
            context.settings.repeats,
            deadline,
        )
        for name, contender in contenders.items():
            if isinstance(contender, DeviceLoop) and "ms" in figures.get(name, {}):
                # The first run is done: this one captures nothing.
                whole = {"run_ms": contender.run_ms(), "repeated_steps": contender.stats.repeated_steps}
                emit(name, figures[name] | whole | {"graphs": contender.replay() > 0, "warnings": contender.warnings})
                contender.wait()
    finally:
        for contender in contenders.values():
            contender.close()


def device_bytes(context: Context, loaded: bool) -> int | None:
    """Bytes of the GPU's memory that are in use; None on the CPU. Before loading, PyTorch first frees what it keeps."""
    if context.dry:
        return None
    torch.cuda.synchronize()
    if not loaded:
        torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def named_gpu(context: Context) -> Gpu | None:
    """The GPU's entry among those whose datasheets are known. A dry run takes any: it says nothing about a GPU."""
    if context.dry:
        return GPUS["H200"]
    words = re.split(r"[\s-]+", str(context.settings.gpu).replace("RTX ", "RTX"))
    return next((gpu for name, gpu in GPUS.items() if name in words), None)


def profile(context: Context) -> None:
    """The kernels of a step that take most of its time: of the device loop, and of the static model in PyTorch."""
    model, batch = made(context), context.settings.batches[0]
    torch.compiler.reset()  # as in `_time`
    for name in (LOOP_DYNAMIC, STATIC):
        contender = open_timed(context, model, name, batch)
        try:
            contender.round()
            if isinstance(contender, DeviceLoop):
                table = profiled(context, lambda c=contender: (c.replay(), c.wait()), contender.stats.steps)
            else:
                table = profiled(context, contender.once, len(contender.steps))
            context.emit(f"{name}, batch {batch}", table)
        finally:
            contender.close()


def profiled(context: Context, work: Any, steps: int) -> dict[str, Any]:
    """Kernels by time, from `torch.profiler`: calls and microseconds of a step, and the share of all kernels' time."""
    from torch.profiler import ProfilerActivity

    kind = "cpu" if context.dry else "device"
    activity = ProfilerActivity.CPU if context.dry else ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as recorded:
        work()
        if not context.dry:
            torch.cuda.synchronize()
    averages = ((each.key, each.count, getattr(each, f"self_{kind}_time_total")) for each in recorded.key_averages())
    kernels = {name: (count, us) for name, count, us in averages if us > 0}
    total = math.fsum(us for _, us in kernels.values())
    slowest = sorted(kernels.items(), key=lambda item: -item[1][1])[:PROFILED]
    rows = [
        {"name": name[:120], "calls": count / steps, "us": us / steps, "share": us / total if total else None}
        for name, (count, us) in slowest
    ]
    return {"us": total / steps, "kernels": sum(count for count, _ in kernels.values()) / steps, "rows": rows}


def _since(start: float) -> float:
    return round(time.monotonic() - start, 2)


PARTS = (
    Part("launches", launches, 30),
    Part("ceilings", ceilings, 30),
    Part("parity", parity, 60),
    Part("speed", speed, 200, grace=30),
    Part("profile", profile, 30),
    Part("compiled", compiled, 300, grace=60),
)
