"""`dydit inspect --roofline`: the least time that a step can take on a GPU, by its datasheet.

A step takes at least as long as its products take at full throughput, and at least as long as its bytes take at full
bandwidth (`dydit.planning.step_work` says what is counted). Steps on different subnetworks have different bounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from dydit.bundle.manifest import Manifest, Routing
from dydit.bundle.stored_weights import Precision
from dydit.inspection.gpus import Gpu
from dydit.models.config import ModelConfig
from dydit.planning.executed import subnet_of_steps
from dydit.planning.sizes import fixed_bytes, unit_bytes
from dydit.planning.step_work import Counted, StepWork, step_work
from dydit.reports.roofline import Bound, RooflineFacts, RooflineRow

BATCHES = (1, 8, 32)
CHECKPOINT_PRECISION = Precision.FP16
"""The precision of the estimate for a model that was not exported."""
_ALL_TOKENS = "all tokens, because token routing is not known before sampling"


def bundle_roofline(manifest: Manifest, gpu: Gpu) -> RooflineFacts:
    """The table of a bundle: its precision, its plan and, with capacity routing, its token slots."""
    model = manifest.model
    steps = []
    for entry, times in Counter(subnet_of_steps(manifest)).items():
        slots = entry.capacities if manifest.routing is Routing.CAPACITY else None
        counted = Counted(
            units=model.units.counts(model.units.mask(entry.units)),
            weights=entry.weight_bytes,
            tokens=None if slots is None else np.array(slots) / model.tokens,
            fp16_layers=entry.fp16_layers,
        )
        steps.append((counted, times))
    words = {
        Routing.CAPACITY: "the token slots of the plan, without repeated steps",
        Routing.DENSE: "all tokens, because routing is dense",
    }
    tokens = _ALL_TOKENS if manifest.routing is None else words.get(manifest.routing, _ALL_TOKENS)
    return _facts(model, manifest.precision, gpu, manifest.sampling.steps, steps, tokens)


def model_roofline(model: ModelConfig, masks: np.ndarray | None, gpu: Gpu) -> RooflineFacts:
    """The table of a model that was not exported, in fp16, with the units of `masks`, bool [S, U], in each step.

    Without masks, that of the static model for its usual number of steps.
    """
    precision, steps = CHECKPOINT_PRECISION, []
    if masks is not None:
        sizes, fixed = unit_bytes(model, precision), fixed_bytes(model, precision)
        for mask, times in zip(*np.unique(masks, axis=0, return_counts=True), strict=True):
            steps.append((Counted(model.units.counts(mask), float(mask @ sizes) + fixed), int(times)))
    count = model.usual_run.steps if masks is None else len(masks)
    return _facts(model, precision, gpu, count, steps, _ALL_TOKENS)


def _facts(
    model: ModelConfig,
    precision: Precision,
    gpu: Gpu,
    steps: int,
    executed: Sequence[tuple[Counted, int]],
    tokens: str,
) -> RooflineFacts:
    """`executed`: what steps compute, with the number of steps that compute it."""
    static = model.without_routers()
    everything = static.units.counts(np.ones(static.units.size, bool))
    weights = float(unit_bytes(static, precision).sum()) + fixed_bytes(static, precision)
    guided = model.text is not None or (model.null_class is not None and not model.classes.unconditional)
    rows: list[RooflineRow] = []
    types: dict[str, float] = {}

    def row(batch: int, name: str, config: ModelConfig, parts: Sequence[tuple[Counted, int]]) -> RooflineRow:
        model_rows = batch * (1 + guided)
        works = [(step_work(config, precision, batch, model_rows, each), times) for each, times in parts]
        for work, _ in works:
            types.update({dtype: gpu.rate(dtype) for dtype in work.flops})
        return _row(batch, model_rows, name, works, gpu, steps)

    for batch in BATCHES:
        rows.append(row(batch, "static", static, [(Counted(everything, weights), steps)]))
        if model.dynamic and executed:
            rows.append(row(batch, "executed", model, executed))
    return RooflineFacts(
        gpu=gpu.name,
        bandwidth=gpu.bandwidth,
        rates=types,
        precision=precision,
        steps=steps,
        guided=guided,
        tokens=tokens,
        rows=tuple(rows),
    )


def least_times(work: StepWork, gpu: Gpu) -> tuple[float, float]:
    """The least seconds of a step's bytes, and those of its products."""
    return work.nbytes / gpu.bandwidth, sum(flops / gpu.rate(dtype) for dtype, flops in work.flops.items())


def _row(batch: int, rows: int, name: str, works: Sequence[tuple[StepWork, int]], gpu: Gpu, steps: int) -> RooflineRow:
    seconds = dict.fromkeys(Bound, 0.0)
    for work, times in works:
        memory, compute = least_times(work, gpu)
        seconds[Bound.MEMORY if memory >= compute else Bound.COMPUTE] += times * max(memory, compute)
    run = sum(seconds.values())
    flops, nbytes, weights, routers = (
        sum(times * getattr(work, value) for work, times in works) / steps
        for value in ("total_flops", "nbytes", "weights", "router_flops")
    )
    return RooflineRow(
        batch=batch,
        rows=rows,
        model=name,
        flops=flops,
        nbytes=nbytes,
        weight_bytes=weights,
        intensity=flops / nbytes,
        bound=max(seconds, key=lambda bound: seconds[bound]),
        step_ms=1e3 * run / steps,
        router_ms=1e3 * routers / gpu.rate("float32"),
        images_per_second=batch / run,
    )
