"""The times that each sampler visits, by spacing, and the combinations that do not exist."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dydit.diffusion.coefficients import sampling_run
from dydit.diffusion.process import TRAIN_STEPS, NoiseSchedule, Prediction, Process
from dydit.diffusion.samplers import DEFAULT_STEPS, Sampler, SamplerConfig, Spacing, default_sampler
from dydit.errors import ConfigError
from dydit.models.config import parse_config

DIT = Process()
FLOW = Process(schedule=NoiseSchedule.FLOW, prediction=Prediction.VELOCITY)
VP_SDE = Process(schedule=NoiseSchedule.VP_SDE)


def times_of(steps: int, sampler: str = "ddpm", spacing: str | None = None, process: Process = DIT) -> np.ndarray:
    return SamplerConfig(sampler=sampler, steps=steps, spacing=spacing).times(process)


def respaced(steps: int) -> np.ndarray:
    """The timesteps of DDPM, ascending."""
    return times_of(steps)[::-1]


def test_every_count_follows_the_formula():
    for count in range(2, TRAIN_STEPS + 1):
        timesteps = respaced(count)
        # In whole numbers: |t - i*999/(count-1)| <= 1/2. A half may round either way; all else is the nearest integer.
        error = timesteps * (count - 1) - np.arange(count) * 999
        assert (2 * np.abs(error) <= count - 1).all(), count
        assert (np.diff(timesteps) > 0).all(), count
        assert (timesteps[0], timesteps[-1]) == (0, 999)
        assert timesteps.dtype == np.float64 and len(timesteps) == count
        assert (timesteps == timesteps.astype(np.int64)).all(), count


def test_known_respacings():
    assert respaced(1).tolist() == [0]
    assert respaced(2).tolist() == [0, 999]
    assert respaced(4).tolist() == [0, 333, 666, 999]
    assert respaced(1000).tolist() == list(range(1000))
    quarter = respaced(250)
    assert quarter[:6].tolist() == [0, 4, 8, 12, 16, 20] and quarter[-4:].tolist() == [987, 991, 995, 999]
    # Rounding happens once, at the end: the 125th lands on 125 * 999/249 = 501.506, not on 125 * 4 = 500.
    assert quarter[125] == 502


@pytest.mark.parametrize("count", [-1, 0, 1001])
def test_counts_outside_the_range_are_refused(count):
    with pytest.raises(ConfigError, match=f"steps must be at (least 1|most 1000), not {count}"):
        parse_config(SamplerConfig, {"steps": count})


@pytest.mark.parametrize(
    ("sampler", "spacing", "steps", "expected"),
    [
        ("ddim", None, 4, [999, 666, 333, 0]),
        ("ddim", "linspace", 4, [999, 666, 333, 0]),
        ("ddpm", "leading", 4, [750, 500, 250, 0]),
        ("ddim", "leading", 3, [666, 333, 0]),
        ("ddim", "trailing", 4, [999, 749, 499, 249]),
        ("ddim", "trailing", 3, [999, 666, 332]),
        # DPM-Solver++ has one interval more: its last step ends at the image, and does not start there.
        ("dpm-solver++", None, 4, [999, 749, 500, 250]),
        ("dpm-solver++", "linspace", 1, [999]),
        ("dpm-solver++", "leading", 4, [800, 600, 400, 200]),
        ("dpm-solver++", "trailing", 4, [999, 749, 499, 249]),
    ],
)
def test_discrete_times_by_spacing(sampler, spacing, steps, expected):
    assert times_of(steps, sampler, spacing).tolist() == expected


@pytest.mark.parametrize("schedule", [NoiseSchedule.SCALED_LINEAR, NoiseSchedule.COSINE])
def test_the_times_are_those_of_every_discrete_schedule(schedule):
    for sampler, spacing in itertools.product(("ddpm", "dpm-solver++"), (None, *Spacing)):
        ours = times_of(9, sampler, spacing, Process(schedule=schedule))
        np.testing.assert_array_equal(ours, times_of(9, sampler, spacing))


def test_times_of_a_flow():
    assert times_of(4, "euler", process=FLOW).tolist() == [0, 0.25, 0.5, 0.75]
    assert times_of(4, "euler", "trailing", FLOW).tolist() == [0, 0.25, 0.5, 0.75]
    np.testing.assert_allclose(times_of(4, "euler", "linspace", FLOW), [0, 0.333, 0.666, 0.999], atol=1e-15)
    assert times_of(4, "dpm-solver++", process=FLOW).tolist() == [0, 0.25, 0.5, 0.75]
    np.testing.assert_allclose(
        times_of(4, "dpm-solver++", "linspace", FLOW), 0.001 + 0.999 * np.arange(4) / 4, atol=1e-15
    )
    np.testing.assert_allclose(times_of(4, "euler-maruyama", process=FLOW), [0, 0.32, 0.64, 0.96], atol=1e-15)
    assert times_of(1, "euler-maruyama", process=FLOW).tolist() == [0]


@pytest.mark.parametrize("sampler", ["euler-maruyama", "ddpm", "ddim", "dpm-solver++"])
def test_times_of_continuous_time(sampler):
    np.testing.assert_allclose(times_of(4, sampler, process=VP_SDE), 999 * np.array([1, 0.667, 0.334, 0.001]))


@pytest.mark.parametrize("process", [DIT, FLOW, VP_SDE], ids=lambda each: each.schedule)
def test_times_go_from_noise_to_the_image(process):
    for sampler, spacing, steps in itertools.product(Sampler, (None, *Spacing), (1, 2, 3, 20, 499)):
        try:
            times = times_of(steps, sampler, spacing, process)
        except ConfigError:
            continue
        assert times.shape == (steps,) and times.dtype == np.float64
        assert (np.diff(times) > 0).all() if process.flow else (np.diff(times) < 0).all()
        assert times.min() >= 0 and times.max() <= (1 - 1e-6 if process.flow else 999)


FIT = {
    DIT: {"ddpm", "ddim", "dpm-solver++"},
    FLOW: {"euler", "euler-maruyama", "dpm-solver++"},
    VP_SDE: {"euler-maruyama", "ddpm", "ddim", "dpm-solver++"},
}


@pytest.mark.parametrize("process", list(FIT), ids=lambda each: each.schedule)
@pytest.mark.parametrize("sampler", list(Sampler))
def test_samplers_that_a_process_does_not_have_are_refused(process, sampler):
    config = SamplerConfig(sampler=sampler, steps=5)
    if sampler in FIT[process]:
        assert len(config.times(process)) == 5
        return
    with pytest.raises(ConfigError) as error:
        config.times(process)
    words = str(error.value)
    assert words.startswith(f"sampler {sampler} does not fit this model, which {process.words}; use one of: ")
    assert set(words.split("use one of: ")[1].split(", ")) == FIT[process]
    with pytest.raises(ConfigError, match="does not fit this model"):
        sampling_run(process, config, True)


@pytest.mark.parametrize(
    ("settings", "process", "words"),
    [
        ({"sampler": "ddpm", "eta": 0.5}, DIT, "eta is a setting of sampler ddim; ddpm has none"),
        ({"sampler": "dpm-solver++", "eta": 1}, DIT, r"eta is a setting of sampler ddim; dpm-solver\+\+ has none"),
        ({"sampler": "ddim", "spacing": "trailing"}, VP_SDE, "spacing has no effect in continuous time; remove it"),
        ({"sampler": "euler-maruyama", "spacing": "trailing"}, FLOW, "spacing has no effect in continuous time"),
        ({"sampler": "euler", "spacing": "leading"}, FLOW, "spacing leading does not exist for a flow; use linspace"),
        ({"sampler": "dpm-solver++", "spacing": "leading"}, FLOW, "spacing leading does not exist for a flow"),
        (
            {"sampler": "dpm-solver++", "spacing": "leading", "steps": 1000},
            DIT,
            "1000 steps with timestep spacing leading visit one timestep only; use fewer steps",
        ),
    ],
)
def test_settings_that_do_not_exist_are_refused(settings, process, words):
    config = SamplerConfig.model_validate({"steps": 5, **settings})
    with pytest.raises(ConfigError, match=words):
        config.times(process)
    with pytest.raises(ConfigError, match=words):
        sampling_run(process, config, True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sampler": "heun"}, "sampler must be 'ddpm', 'ddim', 'dpm-solver\\+\\+', 'euler' or 'euler-maruyama'"),
        ({"spacing": "karras"}, "spacing must be 'linspace', 'leading' or 'trailing'"),
        ({"eta": -0.1}, "eta must be at least 0, not -0.1"),
        ({"eta": 1.5}, "eta must be at most 1, not 1.5"),
        ({"order": 3}, "order is not a known setting"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        parse_config(SamplerConfig, settings)


def test_a_run_has_its_times_in_single_precision_and_a_row_for_each():
    for process, sampler in ((DIT, "ddim"), (FLOW, "euler"), (VP_SDE, "euler-maruyama")):
        config = SamplerConfig(sampler=sampler, steps=7)
        run = sampling_run(process, config, True)
        np.testing.assert_array_equal(run.times, config.times(process).astype(np.float32))
        assert run.times.dtype == np.float32
        assert run.coefficients.shape == (7, 8) and run.coefficients.dtype == np.float64


def test_the_default_sampler_is_the_one_that_models_are_published_with():
    assert SamplerConfig() == SamplerConfig(sampler="ddpm", steps=DEFAULT_STEPS, spacing=None, eta=0)
    assert [default_sampler(each) for each in (DIT, Process(schedule="cosine"))] == [Sampler.DDPM] * 2
    assert [default_sampler(each) for each in (FLOW, VP_SDE)] == [Sampler.EULER_MARUYAMA] * 2


def test_settings_in_words():
    assert SamplerConfig().words == "250 steps of ddpm"
    assert SamplerConfig(steps=1, sampler="euler").words == "1 step of euler"
    full = SamplerConfig(steps=20, sampler="ddim", spacing="trailing", eta=0.5)
    assert full.words == "20 steps of ddim, spacing trailing, eta 0.5"
