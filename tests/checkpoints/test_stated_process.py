"""A process agrees with every setting that a file states, or the file is refused with the name of a setting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.checkpoints.process_settings import READERS, claims_of
from dydit.checkpoints.stated_process import ProcessOptions, Reading, own_claims, read_process
from dydit.diffusion.process import NoiseSchedule, Prediction, Process
from dydit.errors import CheckpointError, ConfigError

SAYS = "its training arguments say"
FLOW = Process(schedule="flow", prediction="velocity")
ANY_VELOCITY = (Prediction.V, Prediction.VELOCITY)
OURS = {"schedule": "flow"}
VP_SDE, SCALED = Process(schedule="vp-sde"), Process(schedule="scaled-linear")  # of published U-ViTs


def read(stated: dict[str, Any], **options: Any) -> Reading:
    return read_process(claims_of(stated.items(), SAYS), ProcessOptions(**options))


def refusal(stated: dict[str, Any], **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(stated, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, None),
        ({"diffusion_steps": 1000, "predict_xstart": False, "v_prediction": "False", "flow_matching": 0}, None),
        ({"model": "DiT-XL/2", "prediction": "none", "objective": "min", "path_type": None}, None),
        ({"prediction": "epsilon", "noise_schedule": "linear"}, Process()),
        (
            {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
            Process(schedule="cosine", prediction="v"),
        ),
        (
            {"parameterization": "x0", "beta_schedule": "cosine", "beta_start": 3},
            Process(schedule="cosine", prediction="x0"),
        ),
        ({"model_mean_type": "ModelMeanType.START_X", "noise_schedule": "linear"}, Process(prediction="x0")),
        ({"predict_xstart": True, "noise_schedule": "linear"}, Process(prediction="x0")),
        ({"predict_epsilon": False, "noise_schedule": "linear"}, Process(prediction="x0")),
        ({"v_prediction": "true", "beta_schedule": "linear", "beta_end": 0.02}, Process(prediction="v")),
        ({"objective": "pred_v", "beta_schedule": "linear"}, Process(prediction="v")),
        (
            {"prediction": "eps", "beta_schedule": "scaled-linear", "beta_start": "8.5e-4", "beta_end": 0.012},
            Process(schedule="scaled-linear"),
        ),
        (
            {"prediction": "eps", "beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012},
            Process(betas=(0.00085, 0.012)),
        ),
        (
            {"prediction": "eps", "beta_schedule": "scaled_linear", "linear_start": 0.0015, "linear_end": 0.0195},
            Process(schedule="scaled-linear", betas=(0.0015, 0.0195)),
        ),
        ({"path_type": "Linear", "prediction": "velocity", "model": "SiT-XL/2", "loss_weight": "None"}, FLOW),
    ],
)
def test_what_is_stated_is_read(stated: dict[str, Any], expected: Process | None) -> None:
    assert read(stated) == Reading(expected)


@pytest.mark.parametrize(
    ("stated", "expected", "assumed"),
    [
        ({"prediction": "v"}, Process(prediction="v"), ["--schedule"]),
        ({"noise_schedule": "cosine"}, Process(schedule="cosine"), ["--prediction"]),
        ({"beta_start": 0.0001, "beta_end": 0.02}, Process(), ["--schedule", "--prediction"]),
    ],
)
def test_a_note_says_what_is_assumed_beside_what_is_stated(stated, expected, assumed) -> None:
    reading = read(stated)
    assert reading.process == expected
    assert [note.split()[-1] for note in reading.notes] == assumed and all("assumed" in note for note in reading.notes)


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        ({"path_type": "GVP", "prediction": "velocity"}, "path_type GVP"),
        ({"path_type": "Linear", "prediction": "noise"}, "path_type Linear and prediction noise"),
        ({"path_type": "Linear", "prediction": "score"}, "path_type Linear and prediction score"),
        ({"path_type": "linear", "prediction": "v"}, "prediction v, so its time runs from images to noise"),
        ({"prediction": "score"}, "prediction score"),
        ({"model_mean_type": "PREVIOUS_X"}, "model_mean_type PREVIOUS_X"),
        ({"noise_schedule": "sqrt_linear"}, "noise_schedule sqrt_linear"),
        ({"num_diffusion_steps": 4000}, "num_diffusion_steps 4000"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
        ({"trained_betas": "a list"}, "trained_betas a list"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas True"),
        ({"beta_start": "x"}, "beta_start x"),
        ({"predict_v": "an object"}, "predict_v an object"),
    ],
)
def test_what_cannot_be_sampled_is_refused(stated: dict[str, Any], named: str) -> None:
    for options in ({}, OURS, {"prediction": "v"}):
        message = refusal(stated, **options)
        assert f"{SAYS} " in message and named in message and "dydit samples models that predict epsilon, x0" in message


@pytest.mark.parametrize(
    ("stated", "first", "second"),
    [
        ({"predict_xstart": True, "prediction": "epsilon"}, "predict_xstart True", "prediction epsilon"),
        ({"v_prediction": False, "prediction_type": "v"}, "v_prediction False", "prediction_type v"),
        ({"model": "SiT-B/4", "noise_schedule": "linear"}, "model SiT-B/4", "noise_schedule linear"),
        ({"beta_schedule": "linear", "noise_schedule": "cosine"}, "beta_schedule linear", "noise_schedule cosine"),
        ({"beta_end": 0.02, "linear_end": 0.012}, "beta_end 0.02", "linear_end 0.012"),
        ({"flow_matching": True, "beta_end": 0.02}, "flow_matching True", "beta_end 0.02"),
    ],
)
def test_settings_that_contradict_each_other_are_both_named(stated: dict[str, Any], first: str, second: str) -> None:
    message = refusal(stated)
    assert f"contradicts itself: {SAYS} {first}, but {SAYS} {second}; to decide it yourself, save" in message


def test_the_same_setting_at_two_places_must_be_the_same() -> None:
    twice = [("prediction", "epsilon"), ("prediction", "epsilon")]
    assert read_process(claims_of(twice, SAYS)).process == Process()
    with pytest.raises(CheckpointError, match="prediction epsilon, but its training arguments say prediction v"):
        read_process(claims_of([*twice, ("prediction", "v")], SAYS))


@pytest.mark.parametrize(
    ("stated", "named", "answer", "expected"),
    [
        ({"model": "SiT-XL/2"}, "model SiT-XL/2, but not the direction of its time", OURS, FLOW),
        ({"path_type": "Linear"}, "path_type Linear, but not the direction", {"prediction": "velocity"}, FLOW),
        ({"path_type": "linear", "prediction": "velocity"}, "path_type linear, but not the direction", OURS, FLOW),
        (
            {"path_type": "Linear", "prediction": "velocity", "time_dist_shift": 2.4},
            "path_type Linear as SiT does, but also time_dist_shift 2.4",
            OURS,
            FLOW,
        ),
        (
            {"path_type": "Linear", "prediction": "velocity", "num_train_timesteps": 1000},
            "path_type Linear as SiT does, but also num_train_timesteps 1000",
            OURS,
            FLOW,
        ),
        ({"rectified_flow": True}, "rectified_flow True, but not the direction", OURS, FLOW),
        ({"prediction_type": "flow_prediction"}, "flow_prediction, but not the direction", OURS, FLOW),
        ({"prediction": "velocity"}, "prediction velocity, which is v in some programs", OURS, FLOW),
        (
            {"prediction": "velocity", "noise_schedule": "cosine"},
            "prediction velocity, which is v in some programs",
            {"prediction": "v"},
            Process(schedule="cosine", prediction="v"),
        ),
        (
            {"beta_schedule": "linear", "linear_start": 0.0001, "linear_end": 0.02},
            "linear_start 0.0001, a name for linear betas in some programs, and for scaled-linear ones in others",
            {"schedule": "scaled-linear"},
            Process(schedule="scaled-linear", betas=(0.0001, 0.02)),
        ),
        (
            {"beta_schedule": "scaled_linear"},
            "beta_schedule scaled_linear, but not its betas; give --betas, 0.00085,0.012 if they are Stable Diff",
            {"betas": (0.00085, 0.012)},
            Process(schedule="scaled-linear"),
        ),
        (
            {"beta_schedule": "scaled_linear"},
            "but not its betas",
            {"schedule": "scaled-linear"},
            Process(schedule="scaled-linear"),
        ),
        (
            {"beta_schedule": "linear", "beta_end": 0.012},
            "beta_end 0.012, but only one of its two betas; give both with --betas START,END",
            {"betas": (0.0001, 0.012)},
            Process(betas=(0.0001, 0.012)),
        ),
        (
            {"beta_start": 0.00085, "beta_end": 0.012},
            "beta_start 0.00085, but nothing states the noise schedule; give --schedule",
            {"schedule": "linear"},
            Process(betas=(0.00085, 0.012)),
        ),
    ],
)
def test_what_is_left_open_the_user_has_to_say(stated, named, answer, expected) -> None:
    message = refusal(stated)
    assert message.startswith(f"leaves open how it was trained: {SAYS} ") and named in message and "give " in message
    assert read(stated, **answer).process == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prediction": "velocity"}, FLOW),
        ({"schedule": "flow"}, FLOW),
        ({"prediction": "v"}, Process(prediction="v")),
        ({"schedule": "vp-sde"}, Process(schedule="vp-sde")),
        ({"schedule": "vp-sde", "betas": (0.2, 10.0)}, Process(schedule="vp-sde", betas=(0.2, 10.0))),
        ({"schedule": "scaled-linear", "prediction": "v"}, Process(schedule="scaled-linear", prediction="v")),
        ({"betas": (0.0001, 0.02)}, Process()),
    ],
)
def test_what_the_user_states_of_a_file_that_states_nothing(options: dict[str, Any], expected: Process) -> None:
    assert read({}, **options).process == expected


def read_as(usual: Process, stated: dict[str, Any], **options: Any) -> Reading:
    return read_process(claims_of(stated.items(), SAYS), ProcessOptions(**options), usual)


@pytest.mark.parametrize("usual", [VP_SDE, SCALED])
def test_the_usual_process_of_an_architecture_is_assumed_with_a_note(usual: Process) -> None:
    note = f"assumed {usual.schedule_words}; if that is wrong, give --schedule"
    assert read_as(usual, {}) == read_as(usual, {"diffusion_steps": 1000}) == Reading(usual, (note,))
    for prediction in ("epsilon", "x0", "v"):
        expected = Reading(Process(schedule=usual.schedule, prediction=prediction), (note,))
        assert read_as(usual, {}, prediction=prediction) == read_as(usual, {"prediction": prediction}) == expected
    assert read_as(usual, {}, betas=usual.beta_range).process == usual
    assert note in read_as(usual, {}, betas=usual.beta_range).notes


@pytest.mark.parametrize("usual", [VP_SDE, SCALED])
def test_what_is_stated_takes_the_place_of_the_usual_process(usual: Process) -> None:
    for schedule in NoiseSchedule:
        assert read_as(usual, {}, schedule=schedule).process.schedule == schedule
    assert read_as(usual, {"noise_schedule": "cosine"}).process == Process(schedule="cosine")
    assert read_as(usual, {}, prediction="velocity").process == FLOW


@pytest.mark.parametrize("usual", [VP_SDE, SCALED])
@pytest.mark.parametrize("betas", [(0.0001, 0.02), (0.2, 10.0)])
def test_betas_of_another_process_leave_the_schedule_open(usual: Process, betas: tuple[float, float]) -> None:
    """Betas of DiT's linear schedule are no reason to take the usual schedule, nor DiT's."""
    stated = {"beta_start": betas[0], "beta_end": betas[1]}
    for statement, options in (({}, {"betas": betas}), (stated, {})):
        with pytest.raises(CheckpointError, match="but nothing states the noise schedule; give --schedule"):
            read_as(usual, statement, **options)
    with pytest.raises(CheckpointError, match="but only one of its two betas; give both with --betas"):
        read_as(usual, {"beta_end": usual.beta_range[1]})


@pytest.mark.parametrize(
    "options",
    [
        {"prediction": "velocity", "schedule": "linear"},
        {"prediction": "v", "schedule": "flow"},
        {"prediction": "velocity", "betas": (0.0001, 0.02)},
        {"schedule": "cosine", "betas": (0.0001, 0.02)},
        {"schedule": "linear", "betas": (0.02, 0.0001)},
        {"schedule": "linear", "betas": (0.0001, float("nan"))},
        {"prediction": "noise"},
    ],
)
def test_options_that_no_process_has(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ProcessOptions(**options)


def test_a_contradiction_with_the_user_names_both() -> None:
    assert refusal({"prediction_type": "v_prediction"}, prediction="epsilon") == (
        f"was trained in another way than --prediction epsilon: {SAYS} prediction_type v_prediction; "
        "remove --prediction"
    )
    assert "--schedule linear: its training arguments say beta_schedule cosine; remove --schedule" in refusal(
        {"beta_schedule": "cosine"}, schedule="linear"
    )
    assert "--betas 0.001,0.02: its training arguments say beta_start 0.0001" in refusal(
        {"beta_start": 1e-4, "beta_end": 0.02}, betas=(0.001, 0.02)
    )
    assert "--betas 0.001,0.02, but nothing states the noise schedule" in refusal({}, betas=(0.001, 0.02))


@given(
    st.sampled_from(NoiseSchedule),
    st.sampled_from(Prediction),
    st.none() | st.tuples(st.floats(1e-5, 0.01), st.floats(0.01, 0.9)),
)
def test_our_own_format_states_all(schedule: NoiseSchedule, prediction: Prediction, betas: Any) -> None:
    try:
        process = Process(schedule=schedule, prediction=prediction, betas=betas)
    except ValueError:
        return
    assert read_process(own_claims(process)) == Reading(process)
    assert read_process(own_claims(process), ProcessOptions(**process.model_dump())) == Reading(process)
    assert read_process([], ProcessOptions(**process.model_dump())).process == process
    for name, other in (("prediction", Prediction), ("schedule", NoiseSchedule)):
        for value in other:
            if value != getattr(process, name):
                with pytest.raises(CheckpointError, match=f"another way than --{name} {value}: it states "):
                    read_process(own_claims(process), ProcessOptions(**{name: value}))


# Combinations. What each setting means is written down once more, in other words than in dydit.


@dataclass(frozen=True)
class Meaning:
    """`agrees`: whether a process is one that a setting can be of. `positive`: whether it says what the process is.
    `clear`: whether it means the same in all programs and needs no other setting."""

    agrees: Callable[[Process, dict[str, Any]], bool]
    positive: bool = True
    clear: bool = True


def predicts(*names: str) -> Meaning:
    return Meaning(lambda process, _: process.prediction in names)


def not_(name: str) -> Meaning:
    return Meaning(lambda process, _: name not in (process.prediction, process.schedule), positive=False)


def has_schedule(name: str) -> Meaning:
    def agrees(process: Process, stated: dict[str, Any]) -> bool:
        either = name == "linear" and not {"linear_start", "linear_end"}.isdisjoint(stated)
        return process.schedule == name or (either and process.schedule == "scaled-linear")

    return Meaning(agrees, clear=name != "scaled-linear")


def has_beta(index: int, value: float, clear: bool) -> Meaning:
    def agrees(process: Process, _: dict[str, Any]) -> bool:
        if process.schedule == "flow":
            return False
        return process.schedule == "cosine" or process.beta_range[index] == pytest.approx(value, rel=1e-6)

    return Meaning(agrees, clear=clear)


ANYTHING, NOTHING = Meaning(lambda *_: True, positive=False), Meaning(lambda *_: False)
A_FLOW = Meaning(lambda process, _: process.flow, clear=False)
EITHER_VELOCITY = Meaning(lambda process, _: process.prediction in ANY_VELOCITY, clear=False)
PREDICTIONS = {
    "epsilon": predicts("epsilon"),
    "noise": predicts("epsilon"),
    "sample": predicts("x0"),
    "x0": predicts("x0"),
    "v": predicts("v"),
    "v_prediction": predicts("v"),
    "velocity": EITHER_VELOCITY,
    "flow_prediction": A_FLOW,
    "score": NOTHING,
}
SCHEDULES = {
    "linear": has_schedule("linear"),
    "scaled_linear": has_schedule("scaled-linear"),
    "cosine": has_schedule("cosine"),
    "squaredcos_cap_v2": has_schedule("cosine"),
    "sigmoid": NOTHING,
}
V_FLAG, X0_FLAG = {True: predicts("v"), False: not_("v")}, {True: predicts("x0"), "false": not_("x0")}
MEANINGS: dict[str, dict[Any, Meaning]] = {
    "prediction": PREDICTIONS,
    "prediction_type": PREDICTIONS,
    "parameterization": PREDICTIONS,
    "noise_schedule": SCHEDULES,
    "beta_schedule": SCHEDULES,
    "beta_start": {0.0001: has_beta(0, 0.0001, True), 0.00085: has_beta(0, 0.00085, False)},
    "beta_end": {0.02: has_beta(1, 0.02, True), "0.012": has_beta(1, 0.012, False)},
    "linear_start": {0.0001: has_beta(0, 0.0001, False)},
    "linear_end": {0.012: has_beta(1, 0.012, False)},
    "predict_xstart": X0_FLAG,
    "v_prediction": V_FLAG,
    "predict_v": V_FLAG,
    "diffusion_steps": {1000: ANYTHING, 4000: NOTHING},
    "num_train_timesteps": {"1000": ANYTHING},
    "flow_matching": {True: A_FLOW, False: not_("flow")},
    "path_type": {"Linear": A_FLOW, "linear": A_FLOW, "GVP": NOTHING, "VP": NOTHING},
    "model": {"SiT-XL/2": A_FLOW, "DiT-XL/2": ANYTHING},
    "zero_terminal_snr": {True: NOTHING, False: ANYTHING},
    "lr": {1e-4: ANYTHING},
}
assert set(MEANINGS) - {"lr"} <= set(READERS)
WITH_BETAS = [("linear", None), ("linear", (0.00085, 0.012)), ("scaled-linear", None), ("cosine", None)]
EVERY = [
    Process(schedule=schedule, prediction=prediction, betas=betas)
    for schedule, betas in [*WITH_BETAS, ("vp-sde", None)]
    for prediction in ("epsilon", "x0", "v")
] + [FLOW]
SETTINGS = st.lists(st.sampled_from(sorted(MEANINGS)), max_size=5, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: st.sampled_from(list(MEANINGS[name])) for name in names})
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "prediction": st.sampled_from(Prediction),
        "schedule": st.sampled_from(NoiseSchedule),
        "betas": st.sampled_from([(0.0001, 0.02), (0.00085, 0.012), (0.2, 10.0)]),
    },
)


@settings(max_examples=200)
@given(SETTINGS, st.just({}) | OPTIONS, st.sampled_from([Process(), VP_SDE, SCALED]))
def test_a_process_agrees_with_everything_or_a_refusal_names_a_statement(
    stated: dict[str, Any], options: dict[str, Any], usual: Process
) -> None:
    try:
        asked = ProcessOptions(**options)
    except ValueError:
        return
    meanings = [MEANINGS[name][value] for name, value in stated.items()]

    def agrees(process: Process) -> bool:
        has_betas = process.schedule not in ("flow", "cosine")
        return (
            options.get("prediction") in (None, process.prediction)
            and options.get("schedule") in (None, process.schedule)
            and options.get("betas") in (None, process.beta_range if has_betas else "none")
            and all(meaning.agrees(process, stated) for meaning in meanings)
        )

    try:
        process = read_process(claims_of(stated.items(), SAYS), asked, usual).process
    except CheckpointError as error:
        message = str(error)
        texts = [f"{name} {value}" for name, value in stated.items()]
        assert any(text in message for text in [*texts, *(f"--{name} " for name in options)]), message
        if not options and all(meaning.clear for meaning in meanings):
            of_usual = [each for each in EVERY if each.schedule == usual.schedule]
            assert not any(map(agrees, of_usual)), "refused without a reason"
        return
    if process is None:
        assert usual == Process() and agrees(Process())
        assert not options and not any(meaning.positive for meaning in meanings)
    else:
        assert agrees(process)
        if process.schedule != usual.schedule:
            assert not any(agrees(each) for each in EVERY if each.schedule == usual.schedule), "nothing says so"
        if process.flow and not options:
            assert stated["path_type"] == "Linear" and stated["prediction"] == "velocity", "only SiT's own statements"


def test_an_error_of_options_is_one_of_settings() -> None:
    from dydit.models.config import parse_config

    with pytest.raises(ConfigError, match="prediction must be"):
        parse_config(ProcessOptions, {"prediction": "noise"})
