"""Reads how a model was trained from its file, and refuses training that we cannot sample.

The names and shapes of a DiT's tensors do not show what its output means. Training arguments, the metadata of a
safetensors file, and the scheduler of a diffusers pipeline often do. This module uses or refuses them, and never
ignores them: a model that predicts a velocity, or was trained on other betas, would produce noise without an error. We
support what DiT does: epsilon, over 1,000 steps of linear betas from 0.0001 to 0.02. This is assumed of a file that
states nothing. No PyTorch here. Errors do not name the file: the caller does.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from dydit.checkpoints.safe_classes import Inert
from dydit.diffusion.process import TRAIN_STEPS, Process
from dydit.errors import CheckpointError

Stated = Mapping[str, Any]
"""Settings by the last part of their name, in lower case with underscores. Values are text, numbers and booleans."""

BETA_START, BETA_END = Process().beta_range
SUPPORTED = (
    f"dydit samples models that predict epsilon over {TRAIN_STEPS:,} steps of linear betas from {BETA_START} to "
    f"{BETA_END}, as DiT does, so samples of this one would be wrong"
)
_ENTRIES = (
    "args",
    "arguments",
    "hyper_parameters",
    "hparams",
    "config",
    "cfg",
    "model_args",
    "model_config",
    "settings",
)
_DEEPEST, _MOST = 6, 10_000
_LARGEST = 1 << 62  # larger integers are not read as numbers

_EPSILON = ("epsilon", "eps", "noise", "pred_noise", "pred_epsilon", "modelmeantype.epsilon")
_PREDICTIONS = (
    *("prediction", "prediction_type", "pred_type", "parameterization", "parametrization", "model_mean_type"),
    *("model_prediction", "modelspec.prediction_type"),
)
_BETAS = ("noise_schedule", "noise_schedule_name", "beta_schedule")
_LENGTHS = ("diffusion_steps", "num_train_timesteps", "num_diffusion_steps", "num_diffusion_timesteps")
_STARTS, _ENDS = ("beta_start", "linear_start"), ("beta_end", "linear_end")
_FLOWS = ("flow_matching", "use_flow_matching", "rectified_flow", "use_rectified_flow", "use_flow_sigmas")
_OTHER_TRAINING = (
    *("predict_xstart", "predict_x0", "v_prediction", "use_v_prediction", "v_pred", "predict_v", "v_parameterization"),
    *("zero_terminal_snr", "rescale_betas_zero_snr", "enforce_zero_terminal_snr", "trained_betas"),
)
_OTHER_BLOCKS = ("use_rope", "use_qknorm", "qk_norm", "use_swiglu", "swiglu", "use_rmsnorm", "rmsnorm")

# Schedulers of diffusers for models that DDPM trains, and the default betas of each.
_DDPM_BETAS, _KARRAS_BETAS = (BETA_START, BETA_END), (0.00085, 0.012)
_SCHEDULERS = {
    **dict.fromkeys(("DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "PNDM", "LMSDiscrete"), _DDPM_BETAS),
    **dict.fromkeys(("DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep"), _DDPM_BETAS),
    **dict.fromkeys(("EulerDiscrete", "EulerAncestralDiscrete", "SASolver"), _DDPM_BETAS),
    **dict.fromkeys(("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE"), _KARRAS_BETAS),
}


def stated_by(loaded: Any, metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The settings in the known entries of a `torch.save` file, at its top level, and in `metadata`."""
    settings: dict[str, Any] = {}
    sources: list[Any] = []
    if isinstance(loaded, Mapping):
        sources = [loaded[name] for name in _ENTRIES if name in loaded]
        sources.append({key: value for key, value in loaded.items() if isinstance(value, str | int | float)})
    sources.append({key: _from_text(value) for key, value in (metadata or {}).items()})
    for source in sources:
        for name, value in _settings_of(source):
            settings.setdefault(name, value)
    return settings


def _from_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _settings_of(source: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of all plain settings in nested containers, the outermost first."""
    level: list[Any] = [source]
    seen = 0
    for _ in range(_DEEPEST):
        deeper = []
        for holder in level:
            values = vars(holder) if isinstance(holder, argparse.Namespace) else holder
            if not isinstance(values, Mapping):
                continue
            for key, value in values.items():
                seen += 1
                if seen > _MOST:
                    return
                if isinstance(key, str) and isinstance(value, str | int | float):
                    vast = isinstance(value, int) and abs(value) > _LARGEST
                    yield key.lower().replace("-", "_"), "a huge number" if vast else value
                elif isinstance(key, str) and isinstance(value, list | tuple | Inert) and value:
                    yield key.lower().replace("-", "_"), "a list" if isinstance(value, list | tuple) else "an object"
                elif isinstance(value, Mapping | argparse.Namespace):
                    deeper.append(value)
        level = deeper


def require_supported(stated: Stated, where: str = "training arguments") -> None:
    """Raise `CheckpointError` if settings show that a model was trained in a way that we cannot sample."""
    model, path = stated.get("model"), stated.get("path_type")
    if path is not None or (isinstance(model, str) and model.lower().startswith("sit")):
        setting = f"path_type {path}" if path is not None else f"model {model}"
        raise CheckpointError(f"is a flow-matching model (SiT): its {where} say {_short(setting)}; {SUPPORTED}")
    for name in (*_PREDICTIONS, *_BETAS, *_LENGTHS, *_STARTS, *_ENDS, *_FLOWS, *_OTHER_TRAINING):
        value = stated.get(name)
        if value is not None and not _as_dit(name, value):
            raise CheckpointError(f"was trained in another way: its {where} say {name} {_short(value)}; {SUPPORTED}")
    for name in _OTHER_BLOCKS:
        if stated.get(name) not in (None, False, 0, "", "none", "None"):
            raise CheckpointError(
                f"has other blocks than a DiT: its {where} say {name} {_short(stated[name])}, which dydit does not have"
            )


def _as_dit(name: str, value: Any) -> bool:
    if name in _PREDICTIONS:
        return str(value).lower() in _EPSILON
    if name in _BETAS:
        return str(value).lower() == "linear"
    if name in _LENGTHS:
        return _number(value) == TRAIN_STEPS
    if name in _STARTS:
        return math.isclose(_number(value), BETA_START, rel_tol=1e-6)
    if name in _ENDS:
        return math.isclose(_number(value), BETA_END, rel_tol=1e-6)
    return value in (False, 0, "", "none", "None")


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _short(value: Any) -> str:
    text = str(value)
    text = text if len(text) <= 40 else text[:37] + "..."
    return text if text.isprintable() else ascii(text)


def require_sigma(stated: Stated, learn_sigma: bool) -> None:
    """Raise `CheckpointError` if training arguments contradict the number of output channels."""
    value = stated.get("learn_sigma")
    if isinstance(value, bool) and value != learn_sigma:
        raise CheckpointError(
            f"contradicts itself: its training arguments say learn_sigma {value}, but its final layer "
            f"{'has' if learn_sigma else 'lacks'} the rows of a variance"
        )


def require_side(stated: Stated, input_size: int) -> None:
    """Raise `CheckpointError` if `image_size` (pixels) is not the side of the latents times a power of two."""
    size = stated.get("image_size")
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        factor, rest = divmod(size, input_size)
        if rest or factor & (factor - 1) or not factor:
            raise CheckpointError(
                f"contradicts itself: its training arguments say image_size {size}, but its pos_embed is for inputs "
                f"with a side of {input_size}"
            )


def require_scheduler(values: Stated) -> None:
    """Raise `CheckpointError` if a diffusers `scheduler_config.json` is of a model that we cannot sample.

    The sampler of the scheduler does not matter, because a bundle has its own. How the model was trained does.
    """
    kind = values.get("_class_name")
    betas = _SCHEDULERS.get(str(kind).removesuffix("Scheduler")) if str(kind).endswith("Scheduler") else None
    if betas is None:
        raise CheckpointError(f"belongs to a pipeline whose scheduler is {_short(kind)}; {SUPPORTED}")
    defaults = {"beta_start": betas[0], "beta_end": betas[1], "num_train_timesteps": TRAIN_STEPS}
    stated = {**defaults, **{key: value for key, value in values.items() if value is not None}}
    for name in (*_PREDICTIONS, *_BETAS, *_LENGTHS, *_STARTS, *_ENDS, *_FLOWS, *_OTHER_TRAINING):
        if name in stated and not _as_dit(name, stated[name]):
            raise CheckpointError(
                f"belongs to a pipeline whose scheduler has {name} {_short(stated[name])}; {SUPPORTED}"
            )
