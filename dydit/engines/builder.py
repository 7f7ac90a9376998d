"""Builds one engine: parse, check types, build, write. Runs in a process of its own (`dydit.engines.build_workers`)."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import resource
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dydit.bundle.io_spec import TensorSpec
from dydit.engines.findings import require_types, shown
from dydit.engines.fingerprint import EngineRequest, HardwareCompatibility
from dydit.engines.flavour import Flavour, load_flavour, load_polygraphy
from dydit.engines.inspector import ChosenKernels, inspect_engine
from dydit.engines.network import Messages, Network, Parsed, parse_graph, read_network, require_inputs
from dydit.engines.profiles import Extent, Profile, shape_profiles
from dydit.engines.store import Built
from dydit.errors import BackendError, one_line
from dydit.files import write_atomic
from dydit.models.config import ModelConfig
from dydit.validation import Strict


class Job(Strict):
    """One engine to build, for a graph of a bundle of `model`.

    `inputs`: the graph's inputs according to `io_spec`; None for a graph that it does not describe, such as a VAE
    decoder, whose types are not checked against the precision either. `ranges`: for each profile, the extent of every
    symbol of the inputs. `inspect`: also check the types of the kernels that were chosen, where that can be read.
    """

    graph: Path
    engine: Path
    request: EngineRequest
    model: ModelConfig
    inputs: tuple[TensorSpec, ...] | None
    ranges: tuple[dict[str, Extent], ...]
    log: Path
    timing_cache: Path | None = None
    inspect: bool = True


def build_engine(job: Job) -> Built:
    """Build and write one engine; the builder's messages go to the log.

    Raises `BackendError`, naming the graph, if it cannot be parsed, if its types or the kernels chosen for it do not
    have the bundle's precision, or if the builder fails.
    """
    started, messages = time.perf_counter(), Messages()
    outcome = "failed"
    try:
        trt = load_flavour(job.request.flavour)
        parsed = parse_graph(trt, job.graph, messages)
        network = read_network(parsed.network)
        if job.inputs is not None:
            require_inputs(network, job.inputs, job.graph.name)
            require_types(network, job.request.precision, job.model, job.graph.name)
        profiles = shape_profiles(network.inputs, job.ranges, job.graph.name)
        plan = _plan(trt, parsed, job, profiles, messages)
        kernels = _require_kernels(trt, plan, network, job) if job.inspect and job.inputs is not None else None
        digest = hashlib.sha256(plan).hexdigest()
        write_atomic(job.engine, plan)
        status = job.engine.stat()
        seconds = time.perf_counter() - started
        outcome = f"built in {seconds:.1f} s, {'its kernels inspected' if kernels else 'its kernels not inspected'}"
    finally:
        _log(job.log, f"{job.engine.name} from {job.graph.name}: {outcome}", messages)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Built(
        sha256=digest,
        bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
        seconds=seconds,
        peak_memory=peak,
        layers=len(network.layers),
        warnings=sum(messages.warnings.values()),
        activation_bytes=messages.activation_bytes,
        kernels=kernels,
    )


def _plan(trt: Any, parsed: Parsed, job: Job, profiles: Sequence[Profile], messages: Messages) -> Any:
    """The serialized engine, a buffer."""
    polygraphy = load_polygraphy(job.request.flavour)
    config = builder_config(trt, polygraphy, job, profiles)(parsed.builder, parsed.network)
    set_flags(trt, config, job.request.flavour)
    loader = polygraphy.EngineBytesFromNetwork(
        (parsed.builder, parsed.network, parsed.parser),
        config=config,
        save_timing_cache=str(job.timing_cache) if job.timing_cache else None,
    )
    try:
        return loader()
    except Exception as error:  # Polygraphy's own, which says less than the builder's messages
        reason = messages.reason() if messages.errors else one_line(error)
        raise BackendError(f"{job.request.flavour} cannot build {job.graph.name}: {reason}; see {job.log}") from error


def _require_kernels(trt: Any, plan: Any, network: Network, job: Job) -> ChosenKernels | None:
    """The engine's kernels; None where they cannot be inspected. Raises `BackendError` if their types are wrong."""
    request = job.request
    inspection = inspect_engine(trt, request.flavour, plan, network, request.precision, job.model)
    if inspection is None:
        return None
    if inspection.findings:
        raise BackendError(
            f"{request.flavour} {trt.__version__} built {job.graph.name} with types that {request.precision} does not "
            f"allow: {shown(inspection.findings)}; try another version of it, or keep such engines with --no-inspect"
        )
    return inspection.chosen


def set_flags(trt: Any, config: Any, flavour: Flavour) -> None:
    """Set the flags that every engine of a flavour is built with, if this version has them."""
    with contextlib.suppress(AttributeError):  # a version without the flag does not round so
        # On by default. It would round fp32 products to 10 bits, and routing decisions depend on them.
        config.clear_flag(trt.BuilderFlag.TF32)
    if flavour is Flavour.TENSORRT_RTX:
        with contextlib.suppress(AttributeError):
            # Without it an engine may allocate memory while it runs, and cannot be captured in a CUDA graph.
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


def builder_config(trt: Any, polygraphy: Any, job: Job, profiles: Sequence[Profile]) -> Any:
    """Polygraphy's loader of the builder's configuration."""
    shapes = [polygraphy.Profile() for _ in profiles]
    for each, profile in zip(shapes, profiles, strict=True):
        for name, extent in profile.items():
            each.add(name, extent.min, extent.opt, extent.max)
    request = job.request
    if request.flavour is Flavour.TENSORRT_RTX:
        rtx = importlib.import_module("polygraphy.backend.tensorrt_rtx")
        targets = [tuple(int(part) for part in each.split(".")) for each in request.compute_capabilities]
        return rtx.CreateConfigRTX(profiles=shapes, compute_capabilities=targets or None)
    cache = job.timing_cache if job.timing_cache and job.timing_cache.exists() else None
    return polygraphy.CreateConfig(
        profiles=shapes,
        load_timing_cache=str(cache) if cache else None,
        hardware_compatibility_level=_hardware_level(trt, request.hardware_compatibility),
        version_compatible=request.version_compatible,
    )


def _hardware_level(trt: Any, wanted: HardwareCompatibility) -> Any:
    if wanted is HardwareCompatibility.NONE:
        return None
    same = wanted is HardwareCompatibility.SAME_CAPABILITY
    level = getattr(trt.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY" if same else "AMPERE_PLUS", None)
    if level is None:
        raise BackendError(f"{trt.__name__} {trt.__version__} has no hardware compatibility {wanted.value!r}")
    return level


def _log(path: Path, title: str, messages: Messages) -> None:
    """Append to the build log in one write, so that the lines of several processes rarely mix."""
    stamp = datetime.now(UTC).isoformat(timespec="seconds")
    text = f"{stamp} {title}\n{messages.text()}".encode()
    with (
        contextlib.suppress(OSError),
        open(path, "ab", buffering=0) as file,
    ):  # a full disk is reported when the engine is written
        file.write(text)
