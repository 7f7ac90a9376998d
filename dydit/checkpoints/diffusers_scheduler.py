"""What the scheduler of a diffusers pipeline says about how its model was trained, as claims.

The way in which a scheduler samples does not matter, because a bundle has its own sampler. A scheduler that states
nothing has its defaults, which count as stated. No PyTorch here. Errors do not name the folder: the caller does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dydit.checkpoints.conventions import short
from dydit.checkpoints.process_settings import claims_of
from dydit.checkpoints.stated_process import SUPPORTED, Claim, unsupported
from dydit.diffusion.process import TRAIN_STEPS
from dydit.errors import CheckpointError

_SAYS = "the scheduler of its pipeline says"
_DDPM_BETAS, _KARRAS_BETAS = (1e-4, 0.02), (0.00085, 0.012)
SCHEDULERS = {
    **dict.fromkeys(("DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "PNDM", "LMSDiscrete"), _DDPM_BETAS),
    **dict.fromkeys(("DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep"), _DDPM_BETAS),
    **dict.fromkeys(("EulerDiscrete", "EulerAncestralDiscrete", "SASolver"), _DDPM_BETAS),
    **dict.fromkeys(("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE"), _KARRAS_BETAS),
}
"""Schedulers for models that DDPM trains, and the default betas of each."""
_OF_TRAINING = (
    *("prediction_type", "beta_schedule", "beta_start", "beta_end", "trained_betas", "num_train_timesteps"),
    "rescale_betas_zero_snr",
)  # the others are settings of sampling, also UniPC's `predict_x0`


def scheduler_claims(values: Mapping[str, Any]) -> list[Claim]:
    """The claims of a `scheduler_config.json`. Raises `CheckpointError` for a model that we cannot sample."""
    kind = str(values.get("_class_name"))
    name = kind.removesuffix("Scheduler") if kind.endswith("Scheduler") else ""
    flows = {
        f"scheduler is {short(kind)}": name.startswith("FlowMatch"),
        "scheduler has use_flow_sigmas": bool(values.get("use_flow_sigmas")),
        "scheduler has prediction_type flow_prediction": values.get("prediction_type") == "flow_prediction",
    }
    for flow in (text for text, is_flow in flows.items() if is_flow):
        raise CheckpointError(
            f"belongs to a pipeline whose {flow}: such a model gets {TRAIN_STEPS} * sigma as its time and predicts "
            "noise - image; dydit samples flows that get 0 (noise) to 1 (image) and predict image - noise, as SiT, so "
            "samples of this one would be wrong"
        )
    if name not in SCHEDULERS:
        raise CheckpointError(f"belongs to a pipeline whose scheduler is {short(kind)}; {SUPPORTED}")
    if values.get("timestep_type", "discrete") != "discrete":
        raise unsupported(f"{_SAYS} timestep_type {short(values['timestep_type'])}")
    defaults = {
        "prediction_type": "epsilon",
        "beta_schedule": "linear",
        "beta_start": SCHEDULERS[name][0],
        "beta_end": SCHEDULERS[name][1],
        "num_train_timesteps": TRAIN_STEPS,
    }
    stated = {**defaults, **{key: value for key, value in values.items() if value is not None}}
    return claims_of([(key, _plain(stated[key])) for key in _OF_TRAINING if key in stated], _SAYS)


def _plain(value: Any) -> Any:
    """A value as `conventions.settings_in` gives it."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return value
