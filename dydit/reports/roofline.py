"""Estimates of the least time of a sampling step on a GPU, as plain data and as a table."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from dydit.reports.results import Result
from dydit.reports.text import aligned, bytes_text, count_text

COUNTED = (
    "Counted: weights once a step, inputs and outputs of each product and attention once; no attention scores, nothing "
    "between products, no conditioning. routers: ms of the fp32 products of token routers. Estimates from datasheets, "
    "not measurements."
)


class Bound(StrEnum):
    """What limits a step."""

    MEMORY = "memory"
    COMPUTE = "compute"


class RooflineRow(Result):
    """One batch size, on the static model or on what is executed. Values of a step are means over the steps of a run.

    `bound`: what limits steps that take most of the run's time. `step_ms`: the lowest possible time of a step.
    `router_ms`: how much of the time of its products is that of token routers, which are fp32 in every precision.
    `images_per_second`: of a whole run.
    """

    batch: int
    rows: int = Field(description="rows of the model's batch: with guidance two for each image")
    model: str = Field(description="`static`: everything on; `executed`: what the plan and the routers leave on")
    flops: float
    nbytes: float = Field(description="bytes that are read and written")
    weight_bytes: float = Field(description="those of them that are weights")
    intensity: float = Field(description="operations per byte")
    bound: Bound
    step_ms: float
    router_ms: float
    images_per_second: float


class RooflineFacts(Result):
    """The table of one GPU. Throughput in operations per second; `bandwidth` in bytes per second."""

    gpu: str
    bandwidth: float
    rates: dict[str, float] = Field(description="throughput by the type of products' inputs, of the types that occur")
    precision: str
    steps: int
    guided: bool
    tokens: str = Field(description="which tokens the routed layers of the executed rows compute, in words")
    rows: tuple[RooflineRow, ...]


def roofline_text(facts: RooflineFacts) -> str:
    """The table for a terminal."""
    rates = ", ".join(f"{name} {count_text(rate)}FLOP/s" for name, rate in facts.rates.items())
    guided = "guidance (two rows an image)" if facts.guided else "no guidance"
    head = (
        f"Lowest possible times on {facts.gpu} ({count_text(facts.bandwidth)}B/s; {rates}): {facts.precision}, "
        f"{facts.steps} steps, {guided}"
    )
    titles = [
        "batch",
        "model",
        "FLOP a step",
        "bytes a step",
        "weights",
        "FLOP/byte",
        "bound",
        "ms a step",
        "routers",
        "images/s",
    ]
    rows = [
        [
            str(row.batch),
            row.model,
            count_text(row.flops),
            bytes_text(row.nbytes),
            bytes_text(row.weight_bytes),
            f"{row.intensity:.0f}",
            row.bound,
            f"{row.step_ms:.3g}",
            f"{row.router_ms:.2g}",
            f"{row.images_per_second:.3g}",
        ]
        for row in facts.rows
    ]
    executed = any(row.model == "executed" for row in facts.rows)
    notes = [COUNTED, *([f"Executed: {facts.tokens}."] if executed else [])]
    return "\n".join([head, aligned([titles, *rows], right=(0, 2, 3, 4, 5, 7, 8, 9)), *notes])
