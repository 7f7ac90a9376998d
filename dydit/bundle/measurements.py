"""Measured costs of subnetworks on a backend: times, which the planner minimizes, and memory, for its budget.

Both are fits to a short profile (`dydit.planning.profile`), linear in the units of a subnetwork. A bundle's manifest
keeps the fits that its plan is based on. The blocks of a model have the same shape, so one block's costs hold for all.
"""

from __future__ import annotations

from pydantic import Field, FiniteFloat, model_validator

from dydit.validation import Strict


class GroupTimes(Strict):
    """Milliseconds that a unit group adds to a block: `any` if a unit is on, and `unit` for each unit that is on."""

    any: FiniteFloat = Field(ge=0)
    unit: FiniteFloat = Field(gt=0)


class StepTimes(Strict):
    """Milliseconds of a sampling step of a whole batch, without its conditioning.

        fixed + blocks * block + sum over blocks and their unit groups g of  [any unit on] * g.any + units on * g.unit

    `rows`: images of the batch, twice with guidance. `token_share`: share of the tokens that entered the MLPs, 0..1.
    `deviation`: the largest relative deviation of the fit from a measured median. Gates of merged segments are left
    out: they took 0 to 4 % of a block's time, which a short profile cannot tell from noise.
    """

    backend: str
    rows: int = Field(ge=1)
    threads: int = Field(ge=1)
    token_share: float = Field(gt=0, le=1)
    fixed: FiniteFloat = Field(ge=0)
    block: FiniteFloat = Field(ge=0)
    groups: dict[str, GroupTimes] = Field(description="by name of unit group")
    deviation: FiniteFloat = Field(ge=0)


class Residency(Strict):
    """Bytes of memory that loaded subnetworks add to a process.

        (1 + margin) * (workspace + shared * (weights that any subnetwork maps, each once) + sum over subnetworks of
            (subnet + block * blocks + mapped * units' weights that it maps + joined * units' weights that it joins))

    A subnetwork maps the units of a block if they lie side by side in `weights.bin`. If there are gaps between them, it
    joins them into its own copy. `workspace`: what steps of `rows` rows need while they run, and leave in the heap.
    `deviation`: the largest deviation of the fit from the measured memory, relative to all of that memory. `margin`:
    for other memory that the heap keeps, which differs from run to run.
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
    """What was measured for a plan: times, if it minimizes measured time, and memory, if it has a budget."""

    times: StepTimes | None = None
    residency: Residency | None = None


class MeasuredPlan(Measured):
    """`Measured` in a manifest, with the fitted costs of the plan.

    Milliseconds of a run of the batch: `ms` with the plan, `per_step_ms` with the exact masks, `static_ms` with
    everything on. `resident_bytes`: memory with all subnetworks loaded.
    """

    ms: FiniteFloat | None = Field(default=None, gt=0)
    per_step_ms: FiniteFloat | None = Field(default=None, gt=0)
    static_ms: FiniteFloat | None = Field(default=None, gt=0)
    resident_bytes: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _complete(self) -> MeasuredPlan:
        if any((value is None) != (self.times is None) for value in (self.ms, self.per_step_ms, self.static_ms)):
            raise ValueError("ms, per_step_ms and static_ms must be given together with times, and only with them")
        if (self.resident_bytes is None) != (self.residency is None):
            raise ValueError("resident_bytes must be given together with residency, and only with it")
        return self
