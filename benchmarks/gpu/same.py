"""Whether a way runs at all, and whether its pictures are those of the CPU: a small model, 12 steps, 4 images.

Engines show nothing of what they route, so that a token that is routed otherwise, a jump, cannot be set aside as
`dydit parity` does it; therefore the median image is judged, by the bars of `dydit.parity.tolerances`, and the worst is
told. Where a backend can show its decisions, `parity` is the whole of `dydit parity`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from settings import CFG_SCALE, Settings, Work
from small import small_batch, small_noise
from ways import open_way, way_of, with_engines

from dydit.bundle.bundle import Bundle
from dydit.bundle.stored_weights import Precision
from dydit.errors import one_line
from dydit.parity.comparison import picture_error, relative_l2
from dydit.parity.tolerances import tolerances
from dydit.reports.results import measured
from dydit.runtime.loop import MemoryStore, StepRunner, sample
from dydit.runtime.resident import ResidentSubnets

Emit = Callable[[str, Any], None]


def run_way(settings: Settings, work: Work, emit: Emit, way: str, precision: str) -> None:
    """Run the small bundle, whole and step by step, and hold both against what the CPU made in fp32."""
    chosen, path = way_of(way), work.small(precision)
    if chosen.flavour is not None:
        path = with_engines(chosen, path, work.small(precision, f"small-{way}"))
        emit("built", True)
    bundle = Bundle.open(path)
    with np.load(work.reference) as kept:
        reference = kept["latents"]
    batch, noise, bars = small_batch(), small_noise(bundle), tolerances(Precision(precision))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        backend = open_way(chosen, bundle, settings.device)
        with ResidentSubnets(backend, 2) as subnets:
            runner = StepRunner(backend, subnets, batch.labels, CFG_SCALE)
            store = MemoryStore()
            stats = sample(runner, [batch], noise, store)
            emit("whole", {"steps": stats.steps, "repeated": stats.repeated_steps})
            steps = np.stack(
                [
                    relative_l2(runner.run(k, x, noise.step(batch, k), batch.labels).x_prev, after)
                    for k, (x, after) in enumerate(pairwise(reference))
                ]
            ).max(axis=0)
        if (close := getattr(backend, "close", None)) is not None:
            close()
    final = store.load(0)
    measure = partial(picture_error, span=None) if bars["run"].decibels else relative_l2
    emit("warnings", sorted({one_line(each.message)[:300] for each in caught if isinstance(each.message, UserWarning)}))
    emit("step", _judged(steps, bars["step"].limit))
    emit("run", {**_judged(measure(final, reference[-1]), bars["run"].limit), "decibels": bars["run"].decibels})


def _judged(values: np.ndarray, bar: float) -> dict[str, Any]:
    """Of an image each."""
    middle, worst = float(np.median(values)), float(values.max())
    return {"median": measured(middle), "worst": measured(worst), "bar": bar, "holds": bool(middle <= bar)}


def parity(settings: Settings, work: Work, emit: Emit, way: str, precision: str) -> None:
    """`dydit parity` of the small bundle, from the checkpoint on."""
    from dydit.checkpoints.checkpoint import load_checkpoint
    from dydit.parity.parity import ParityConfig, run_parity

    config = ParityConfig(backend=way_of(way).backend, device=settings.device, labels=(3, 1), every=4)
    bundle, checkpoint = Bundle.open(work.small(precision)), load_checkpoint(work.small_checkpoint)
    report = run_parity(bundle, checkpoint, config)
    emit("ok", report.ok)
    emit("summary", report.summary)
    emit(
        "hops",
        [
            check.model_dump(mode="json", include={"name", "status", "detail", "worst", "tolerance"}, by_alias=True)
            for check in report.checks
        ],
    )
