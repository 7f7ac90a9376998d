"""The one table of what "the same" means, hop by hop (DESIGN, section 6), each bar with its reason. No PyTorch here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dydit.bundle.stored_weights import Precision

AGREEMENT = 0.9999
AGREEMENT_FROM = 100_000
"""So many token decisions must have been compared for their share to be judged: in fewer, one tie and what follows from
it exceed it, so that only the ties themselves are judged."""


@dataclass(frozen=True)
class Tolerance:
    """A hop's bar: the largest `measure` that passes.

    `tie`: the largest |logit|, in root mean squares of its block's logits, at which a token may be routed differently;
    beyond it a flip is a fault, not a tie. An image with a flip is set aside, as its values jump. None: rounding flips
    many tokens, so they are judged by their share alone, and no image is set aside. `agreement`: the least share of
    token decisions that agree. `decibels`: the measure is a picture's error, and is told as PSNR too.
    """

    hop: str
    title: str
    measure: str
    bar: float
    reason: str
    tie: float | None = 0.0
    agreement: float = AGREEMENT
    decibels: bool = False


_L2 = "relative L2 of x_prev per image, from the reference's own latents"

HOPS = (
    Tolerance(
        "masks",
        "masked model -> frozen schedule",
        "differing timesteps and gates",
        0,
        "the width routers see the timestep alone, so the frozen table is their output, not an approximation",
    ),
    Tolerance(
        "weights",
        "checkpoint -> stored weights",
        "differing elements",
        0,
        "fp32 weights are stored as they are, in another order",
    ),
    Tolerance(
        "sliced",
        "masked model -> sliced form, step by step",
        _L2,
        1e-5,
        "what is sliced off was multiplied by 0; only the order of fp32 sums differs (1e-7), and guidance scales it",
        tie=1e-4,
    ),
    Tolerance(
        "step",
        "masked model -> backend, step by step",
        _L2,
        1e-5,
        "the same sums by other fp32 kernels, with their own exp and tanh (1e-7), and guidance scales it",
        tie=1e-4,
    ),
    Tolerance(
        "run",
        "masked model -> backend, whole run",
        "relative L2 of the final latents per image, same noise",
        1e-3,
        "differences of single steps accumulate and are carried on by the model: float64 against float32 gives 1e-6",
        tie=1e-2,
    ),
)
"""The bars of an fp32 bundle."""

_LOWER = {
    # A step's bar, the share of decisions, and the PSNR of a run. Measured on the digits model over 40 steps: fp16
    # parts by up to 7e-3 a step and in 2 of 10,000 decisions, bf16 by up to 7e-3 (and often) and in 20 of 10,000.
    Precision.FP16: (2e-2, 0.999, 35.0),
    Precision.BF16: (5e-2, 0.99, 35.0),
    Precision.INT8: (5e-2, 0.99, 25.0),
    Precision.INT8_STATIC: (1e-1, 0.98, 25.0),
    Precision.FP8: (1e-1, 0.98, 25.0),
}


def rules(precision: Precision) -> dict[str, Tolerance]:
    """The bars of a bundle, by hop.

    Below fp32 the reference stays the fp32 model: stored weights are its own, rounded once; a step may differ by the
    rounding of its products; of a whole run the picture counts, by its peak signal-to-noise ratio: 35 dB, 25 in 8 bits.
    """
    table = {each.hop: each for each in HOPS}
    if precision not in _LOWER:
        return table
    bar, agreement, psnr = _LOWER[precision]
    changes: dict[str, dict[str, Any]] = {
        "weights": {"reason": f"weights of matrix products are stored rounded to {precision}, all others as they are"},
        "step": {
            "bar": bar,
            "reason": f"products and attention round to {precision}; a token near its router's zero may flip by that",
        },
        "run": {
            "measure": "root mean square difference of the picture, in its range of values",
            "bar": round(10 ** (-psnr / 20), 5),
            "reason": f"{psnr:g} dB PSNR: a difference that the eye {'hardly finds' if psnr < 35 else 'does not find'}",
            "decibels": True,
        },
    }
    for hop in ("step", "run"):
        changes[hop] |= {"tie": None, "agreement": agreement}
    return table | {hop: dataclasses.replace(table[hop], **change) for hop, change in changes.items()}


def of_latents(rule: Tolerance) -> Tolerance:
    """The bar of a whole run where no picture can be made, as latents have no decoder: the same, of the latents."""
    if not rule.decibels:
        return rule
    measure = "root mean square difference of the final latents, in their range of values"
    return dataclasses.replace(rule, measure=measure, reason=f"{rule.reason} in pictures; these are latents")


DERIVED_WEIGHTS = {"time.frequencies": 1e-6}
"""Stored tensors that no checkpoint holds, with their relative tolerance: exp differs in the last bit between CPUs."""

RESIDUAL = 1e-5
"""Relative L2 of an image's residual stream at which a block counts as the one where two sides part."""
