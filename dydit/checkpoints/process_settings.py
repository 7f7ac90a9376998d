"""What the settings of training programs say about the process of training, as claims.

The names and values are those that DiT, guided-diffusion, SiT, diffusers, and programs built on them write:

    prediction       epsilon, x0 and v by their usual names, and flags such as `predict_xstart`
    betas            linear, scaled_linear, cosine (squaredcos_cap_v2), with `beta_start` and `beta_end`
    `linear_start`   latent-diffusion calls scaled-linear betas "linear", other programs do not: the user has to say
    flows            SiT's linear path with `prediction: velocity`; other programs differ in the direction of time and
                     in the sign of the velocity: the user has to say that a flow is like SiT's
    refused          other numbers of steps, zero terminal SNR, trained betas; SiT's other paths and predictions

No PyTorch here. Errors do not name the file: the caller does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from dydit.checkpoints.conventions import Setting, short
from dydit.checkpoints.stated_process import (
    ALL,
    COSINE,
    EPSILON,
    FLOW,
    LINEAR,
    SCALED,
    VELOCITY,
    X0,
    Claim,
    V,
    combinations,
    unsupported,
)
from dydit.diffusion.process import TRAIN_STEPS, Prediction

_PREDICTIONS = {
    EPSILON: ("epsilon", "eps", "noise", "pred_noise", "pred_epsilon", "predict_noise", "predict_epsilon"),
    X0: ("x0", "x_0", "sample", "xstart", "x_start", "start_x", "pred_x0", "pred_xstart", "pred_x_start", "predict_x0"),
    V: ("v", "v_pred", "v_prediction", "vpred", "pred_v", "predict_v", "v_parameterization"),
}
_VELOCITY = ("velocity", "pred_velocity", "predict_velocity")
_FLOW_OUTPUTS = ("flow", "flow_prediction", "flow_matching", "rectified_flow")
_SCHEDULES = {"linear": LINEAR, "scaled_linear": SCALED, "cosine": COSINE, "squaredcos_cap_v2": COSINE}
_TRUE, _FALSE = ("true", "1", "1.0", "yes", "on"), ("false", "0", "0.0", "no", "off")
_BY_SIT = ("path_type", "prediction", "model")  # what SiT's training arguments say about the process

_OUR_FLOW = "if its time is 0 for noise and 1 for images, and it predicts image - noise, give --schedule flow"
_OTHER_FLOW = f", but not the direction of its time and the sign of its velocity; {_OUR_FLOW}"
_V_OR_VELOCITY = f", which is v in some programs; if it is, give --prediction v; {_OUR_FLOW}"

Reader = Callable[[str, Any], Claim | None]
"""(text of the setting, value) -> what it says. Raises `CheckpointError` for a model that we cannot sample."""


def claims_of(settings: Iterable[Setting], says: str) -> list[Claim]:
    """The claims of `settings`. `says`: where they are from, such as "its training arguments say".

    Raises `CheckpointError` for a setting of a model that we cannot sample.
    """
    settings = [(name, value) for name, value in settings if not _is_unset(value)]
    _refuse_other_flows(settings, says)
    read = (
        (name, READERS[name](f"{says} {name} {short(value)}", value)) for name, value in settings if name in READERS
    )
    claims = [(name, claim) for name, claim in read if claim is not None]
    if any(claim.two_kinds for _, claim in claims):  # then "linear" has two senses
        linear, either = combinations([LINEAR]), combinations([LINEAR, SCALED])
        claims = [(name, replace(each, allowed=either) if each.allowed == linear else each) for name, each in claims]
    return _understood_by_sit(claims, settings) if _is_of_sit(settings) else [claim for _, claim in claims]


def _is_of_sit(settings: Iterable[Setting]) -> bool:
    """Whether the settings are those of a SiT with a linear path that predicts the velocity."""
    said = {(name, value) for name, value in settings if isinstance(value, str)}
    return {("path_type", "Linear"), ("prediction", "velocity")} <= said


def _understood_by_sit(claims: Iterable[tuple[str, Claim]], settings: Iterable[Setting]) -> list[Claim]:
    """The claims in SiT's sense. It stays open if there are settings that only other programs have.

    These reverse the time: they set the distribution of times in training, or a number of time steps.
    """
    foreign = next((each for each in settings if each[0] in _LENGTHS or each[0].startswith("time_dist")), None)
    if foreign is None:
        return [replace(claim, option=None) if name in _BY_SIT else claim for name, claim in claims]
    senses = f" as SiT does, but also {foreign[0]} {short(foreign[1])}, which SiT does not; {_OUR_FLOW}"
    return [replace(claim, senses=senses) if claim.option else claim for _, claim in claims]


def _refuse_other_flows(settings: Iterable[Setting], says: str) -> None:
    """Refuse flows whose path and prediction, together, are not what they would be alone."""
    path = next((value for name, value in settings if name == "path_type"), None)
    for name, value in settings:
        if path is None or name not in _PREDICTION_NAMES or _plain(value) in (*_VELOCITY, *_FLOW_OUTPUTS):
            continue
        text = f"{says} path_type {short(path)} and {name} {short(value)}"
        if _plain(value) == "v":  # REPA
            text += ", so its time runs from images to noise"
        raise unsupported(text)


# Readers of single settings


def _prediction(text: str, value: Any, strict: bool = True) -> Claim | None:
    plain = _plain(value)
    for prediction, names in _PREDICTIONS.items():
        if plain in names:
            return Claim(text, combinations(predictions=[prediction]))
    if plain in _VELOCITY:
        allowed = combinations(predictions=[V, VELOCITY])
        return Claim(text, allowed, option="--prediction", senses=_V_OR_VELOCITY)
    if plain in _FLOW_OUTPUTS:
        return _flow(text)
    if strict:
        raise unsupported(text)
    return None


def _beta_schedule(text: str, value: Any) -> Claim:
    if (schedule := _SCHEDULES.get(_plain(value))) is None:
        raise unsupported(text)
    return Claim(text, combinations([schedule]))


def _beta(end: str, two_kinds: bool, text: str, value: Any) -> Claim:
    number = _number(value)
    if not math.isfinite(number):
        raise unsupported(text)
    claim = Claim(text, ALL - combinations([FLOW]), two_kinds=two_kinds)
    return replace(claim, end=number) if end == "end" else replace(claim, start=number)


def _length(text: str, value: Any) -> Claim:
    if _number(value) != TRAIN_STEPS:
        raise unsupported(text)
    return Claim(text, decides=False)


def _flow(text: str) -> Claim:
    return Claim(text, combinations([FLOW]), option="--schedule", senses=_OTHER_FLOW)


def _flow_flag(text: str, value: Any) -> Claim:
    return _flow(text) if _is_on(text, value) else Claim(text, ALL - combinations([FLOW]), decides=False)


def _path(text: str, value: Any) -> Claim:
    if _plain(value) != "linear":
        raise unsupported(text)
    return _flow(text)


def _model(text: str, value: Any) -> Claim | None:
    return _flow(text) if isinstance(value, str) and value.lower().startswith("sit") else None


def _prediction_flag(prediction: Prediction, text: str, value: Any) -> Claim:
    allowed = combinations(predictions=[prediction])
    return Claim(text, allowed) if _is_on(text, value) else Claim(text, ALL - allowed, decides=False)


def _predict_epsilon(text: str, value: Any) -> Claim:
    """The first releases of diffusers: epsilon, or else x0."""
    return Claim(text, combinations(predictions=[EPSILON if _is_on(text, value) else X0]))


def _unsupported_flag(text: str, value: Any) -> None:
    if _is_on(text, value):
        raise unsupported(text)


_PREDICTION_NAMES = (
    *("prediction", "prediction_type", "pred_type", "parameterization", "parametrization", "model_mean_type"),
    *("model_prediction", "modelspec.prediction_type"),
)
_LENGTHS = ("diffusion_steps", "num_train_timesteps", "num_diffusion_steps", "num_diffusion_timesteps")
_V_FLAGS = ("v_prediction", "use_v_prediction", "v_pred", "predict_v", "v_parameterization")
_FLOW_FLAGS = ("flow_matching", "use_flow_matching", "rectified_flow", "use_rectified_flow")
_OTHERS = (
    "zero_terminal_snr",
    "rescale_betas_zero_snr",
    "enforce_zero_terminal_snr",
    "trained_betas",
    "use_flow_sigmas",
)
READERS: Mapping[str, Reader] = {
    **dict.fromkeys(_PREDICTION_NAMES, _prediction),
    "objective": partial(_prediction, strict=False),
    **dict.fromkeys(("noise_schedule", "noise_schedule_name", "beta_schedule"), _beta_schedule),
    **dict.fromkeys(_LENGTHS, _length),
    **{
        f"{kind}_{end}": partial(_beta, end, kind == "linear")
        for kind in ("beta", "linear")
        for end in ("start", "end")
    },
    **dict.fromkeys(("predict_xstart", "predict_x0"), partial(_prediction_flag, X0)),
    **dict.fromkeys(_V_FLAGS, partial(_prediction_flag, V)),
    "predict_epsilon": _predict_epsilon,
    **dict.fromkeys(_FLOW_FLAGS, _flow_flag),
    **dict.fromkeys(_OTHERS, _unsupported_flag),
    "path_type": _path,
    "model": _model,
}


def _plain(value: Any) -> str:
    """A value as text in lower case with underscores, without the name of an enumeration."""
    return str(value).strip().lower().replace("-", "_").replace(" ", "_").removeprefix("modelmeantype.")


def _is_unset(value: Any) -> bool:
    return value is None or (isinstance(value, str) and _plain(value) in ("none", ""))


def _is_on(text: str, value: Any) -> bool:
    """Whether a flag is on. What is neither true nor false is refused."""
    plain = _plain(value)
    if plain not in (*_TRUE, *_FALSE):
        raise unsupported(text)
    return plain in _TRUE


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
