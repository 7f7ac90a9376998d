"""The one table of what "the same" means, hop by hop (DESIGN, section 6), each bar with its reason. No PyTorch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """A hop's bar: the largest `measure` that passes. `tie`: the largest |logit|, in root mean squares of its block's
    logits, at which a token may be routed differently; beyond it a flip is a fault, not a tie."""

    hop: str
    title: str
    measure: str
    bar: float
    reason: str
    tie: float = 0.0


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
TOLERANCES = {each.hop: each for each in HOPS}

AGREEMENT = 0.9999
"""Least share of token decisions that agree, where at least `AGREEMENT_FROM` were compared: in fewer, one tie and what
follows from it exceed the share, so that only the ties themselves are judged."""
AGREEMENT_FROM = 100_000

DERIVED_WEIGHTS = {"time.frequencies": 1e-6}
"""Stored tensors that no checkpoint holds, with their relative tolerance: exp differs in the last bit between CPUs."""

RESIDUAL = 1e-5
"""Relative L2 of an image's residual stream at which a block counts as the one where two sides part."""
