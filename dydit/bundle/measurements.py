"""Measured costs of a model's subnetworks on a backend: what the planner may minimise and must keep to.

Both are fits over a short profile (`dydit.planning.profile`), linear in what a subnetwork holds; a bundle's manifest
keeps those that made its plan. The blocks of a model have one shape, so one block's figures serve all.
"""

from __future__ import annotations

from pydantic import Field, FiniteFloat, model_validator

from dydit.models.config import Strict


class GroupTimes(Strict):
    """Milliseconds that a unit group of a block adds: where any of its units is on, and for each of them."""

    any: FiniteFloat = Field(ge=0)
    unit: FiniteFloat = Field(gt=0)


class StepTimes(Strict):
    """Milliseconds of a sampling step of a whole batch, without its conditioning.

        fixed + blocks * block + sum over blocks and their unit groups g of  [any unit on] * g.any + units on * g.unit

    `rows`: images of the batch, twice with guidance. `token_share`: of the tokens, how many entered the MLPs, 0..1.
    `deviation`: the largest of the fit from a measured median, relative to it. The gates of a merged segment are not
    in it: they took 0 to 4 % of a block's time, which a short profile cannot tell from noise.
    """

    backend: str
    rows: int = Field(ge=1)
    threads: int = Field(ge=1)
    token_share: float = Field(gt=0, le=1)
    fixed: FiniteFloat = Field(ge=0)
    block: FiniteFloat = Field(ge=0)
    groups: dict[str, GroupTimes] = Field(description="by name of the unit group")
    deviation: FiniteFloat = Field(ge=0)


class Residency(Strict):
    """Bytes of memory of a process that has subnetworks loaded, beyond those of the process itself.

        (1 + margin) * (workspace + shared * (weights that any subnetwork maps, each once) + sum over subnetworks of
            (subnet + block * blocks + mapped * units' weights that it maps + joined * units' weights that it joins))

    A subnetwork maps the units of a block that stand side by side in `weights.bin`; those with holes between are joined
    into a copy of its own. `workspace`: what steps of `rows` rows need while they run, and leave behind in the heap.
    `deviation`: the largest of the fit from what was measured, relative to all of it. `margin`: for what the heap keeps
    besides, which differs from run to run.
    """

    backend: str
    rows: int = Field(ge=1)
    workspace: int = Field(ge=0)
    subnet: int = Field(ge=0)
    block: int = Field(ge=0)
    mapped: FiniteFloat = Field(ge=0)
    joined: FiniteFloat = Field(ge=0)
    shared: FiniteFloat = Field(ge=0)
    deviation: FiniteFloat = Field(ge=0)
    margin: FiniteFloat = Field(ge=0)


class Measured(Strict):
    """What was measured for a plan: times, where it was to be the fastest, and memory, where it has a budget."""

    times: StepTimes | None = None
    residency: Residency | None = None


class MeasuredPlan(Measured):
    """The same in a manifest, with what the plan comes to.

    `ms`, `per_step_ms`, `static_ms`: milliseconds of a run of the batch by the fit: of the plan, of the exact masks,
    and with everything on. `resident_bytes`: with all subnetworks loaded, by the fit.
    """

    ms: FiniteFloat | None = Field(default=None, gt=0)
    per_step_ms: FiniteFloat | None = Field(default=None, gt=0)
    static_ms: FiniteFloat | None = Field(default=None, gt=0)
    resident_bytes: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _complete(self) -> MeasuredPlan:
        if any((value is None) != (self.times is None) for value in (self.ms, self.per_step_ms, self.static_ms)):
            raise ValueError("milliseconds of a run go with measured times, all three of them")
        if (self.resident_bytes is None) != (self.residency is None):
            raise ValueError("resident bytes go with a measured residency")
        return self
