"""The table of tolerances: how far a bundle may be from its model in each check, and why. No PyTorch here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dydit.bundle.stored_weights import Precision

AGREEMENT = 0.9999
AGREEMENT_FROM = 100_000
"""The number of compared token decisions from which their share of agreement is judged. Among fewer, a single near-tie
and the flips that follow from it would exceed the tolerance."""


@dataclass(frozen=True)
class Tolerance:
    """The tolerance of one check: the largest value of its `measure` that passes, and the reason for it.

    `near_tie`: the largest |logit| at which a token may be routed differently, in units of the root mean square of its
    block's logits. A flip beyond it is a fault. An image with a flip is excluded from the values, because a flip is a
    jump. None: rounding flips many tokens, so only their share is judged and no image is excluded. `agreement`: the
    smallest share of token decisions that must agree. `decibels`: the measure is the error of a picture, so that
    messages give its PSNR, too.
    """

    check: str
    title: str
    measure: str
    limit: float
    reason: str
    near_tie: float | None = 0.0
    agreement: float = AGREEMENT
    decibels: bool = False


_L2 = "relative L2 of x_prev per image, from the reference's own latents"

CHECKS = (
    Tolerance(
        "masks",
        "masked model -> frozen schedule",
        "differing timesteps and gates",
        0,
        "the width routers see only the timestep, so the frozen table is their output and not an approximation",
    ),
    Tolerance(
        "weights",
        "checkpoint -> stored weights",
        "differing elements",
        0,
        "fp32 weights are stored unchanged, in another order",
    ),
    Tolerance(
        "sliced",
        "masked model -> sliced form, step by step",
        _L2,
        1e-5,
        "slicing removes what the masks multiply by 0; only the order of fp32 sums differs (1e-7), scaled by guidance",
        near_tie=1e-4,
    ),
    Tolerance(
        "step",
        "masked model -> backend, step by step",
        _L2,
        1e-5,
        "the same sums in other fp32 kernels with their own exp and tanh (1e-7), scaled by guidance",
        near_tie=1e-4,
    ),
    Tolerance(
        "run",
        "masked model -> backend, whole run",
        "relative L2 of the final latents per image, same noise",
        1e-3,
        "differences of single steps accumulate through the model: float64 against float32 gives 1e-6",
        near_tie=1e-2,
    ),
)
"""The tolerances of an fp32 bundle."""

_LOWER = {
    # The tolerance of a step, the share of decisions that agree, and the PSNR of a run. Measured on the digits model
    # over 40 steps: fp16 differs by up to 7e-3 a step and in 2 of 10,000 decisions, bf16 by up to 7e-3 (more often) and
    # in 20 of 10,000.
    Precision.FP16: (2e-2, 0.999, 35.0),
    Precision.BF16: (5e-2, 0.99, 35.0),
    Precision.INT8: (5e-2, 0.99, 25.0),
    Precision.INT8_STATIC: (1e-1, 0.98, 25.0),
    Precision.FP8: (1e-1, 0.98, 25.0),
}


def tolerances(precision: Precision) -> dict[str, Tolerance]:
    """The tolerances of a bundle by the name of the check.

    The reference of every precision is the fp32 model. Below fp32, stored weights are those of the model rounded once;
    a step may differ by the rounding of its products; a whole run is judged by the peak signal-to-noise ratio of its
    pictures: 35 dB, or 25 dB in 8 bits.
    """
    table = {each.check: each for each in CHECKS}
    if precision not in _LOWER:
        return table
    limit, agreement, psnr = _LOWER[precision]
    changes: dict[str, dict[str, Any]] = {
        "weights": {
            "reason": f"the weights of matrix products are rounded to {precision}; all others are stored unchanged"
        },
        "step": {
            "limit": limit,
            "reason": f"matrix products and attention round to {precision}; this can change the routing of a token "
            "whose logit is near 0",
        },
        "run": {
            "measure": "root mean square difference of the picture, relative to its range of values",
            "limit": round(10 ** (-psnr / 20), 5),
            "reason": f"{psnr:g} dB PSNR: a difference that is {'hardly' if psnr < 35 else 'not'} visible",
            "decibels": True,
        },
    }
    for check in ("step", "run"):
        changes[check] |= {"near_tie": None, "agreement": agreement}
    return table | {check: dataclasses.replace(table[check], **change) for check, change in changes.items()}


def of_latents(tolerance: Tolerance) -> Tolerance:
    """The tolerance of a whole run if the bundle has no decoder, so that latents are compared in place of pictures."""
    if not tolerance.decibels:
        return tolerance
    measure = "root mean square difference of the final latents, relative to their range of values"
    return dataclasses.replace(tolerance, measure=measure, reason=f"{tolerance.reason} in pictures; these are latents")


DERIVED_WEIGHTS = {"time.frequencies": 1e-6}
"""Stored tensors that are computed and not read from a checkpoint, with their relative tolerance: exp differs in the
last bit between CPUs."""

RESIDUAL = 1e-5
"""Relative L2 of an image's residual stream from which a block is named as the first one that differs."""
