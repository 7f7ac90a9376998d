"""Whole runs of every sampler in NumPy, PyTorch and ONNX: those of closed forms, and of diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.bundle.stored_weights import Precision
from dydit.diffusion.coefficients import sampling_run
from dydit.diffusion.process import NoiseSchedule, Prediction
from dydit.diffusion.sampler_step import sampler_step
from dydit.diffusion.samplers import Sampler, SamplerConfig, Spacing
from dydit.graph.ops import DOMAIN, IR_VERSION, OPSET, Ops
from dydit.graph.sampler_step import sampler_function
from dydit.models.dit.config import DiTConfig
from tests.fixtures.closed_forms import CHANNELS, SIDE, Case, alphas_cumprod, closed_form

# Largest relative distances of the latents after a step, at any step of a run of at most 1000.
FLOAT64 = 1e-9  # from the closed forms: two ways to write a formula round differently
DIFFUSERS = 1e-5  # from diffusers in float64: two of its schedulers round the latents to float32 in every step
FLOAT32 = 1e-5  # of float32 from float64 in a few steps: see `rounding`
UNIT = 2.0**-24  # one rounding to float32
ROUNDINGS = 8  # of a term of a step in float32: coefficient, output, guidance (3), product, sums (2)

DISCRETE = (NoiseSchedule.LINEAR, NoiseSchedule.SCALED_LINEAR, NoiseSchedule.COSINE)
SCHEDULES = {
    Sampler.DDPM: (*DISCRETE, NoiseSchedule.VP_SDE),
    Sampler.DDIM: (*DISCRETE, NoiseSchedule.VP_SDE),
    Sampler.DPM_SOLVER: (*DISCRETE, NoiseSchedule.VP_SDE, NoiseSchedule.FLOW),
    Sampler.EULER: (NoiseSchedule.FLOW,),
    Sampler.EULER_MARUYAMA: (NoiseSchedule.FLOW, NoiseSchedule.VP_SDE),
}
SPACINGS = (None, *Spacing)
# Long runs take most of the time, so most runs are short. `LONGEST` has the longest.
COUNTS = st.one_of(*[st.integers(1, 30)] * 4, st.integers(1, 1000))


@st.composite
def cases(draw: Any, sampler: Sampler, schedules: Any = None, counts: Any = COUNTS, spacings: Any = SPACINGS) -> Case:
    schedule = draw(st.sampled_from(schedules or SCHEDULES[sampler]))
    flow, timed = schedule is NoiseSchedule.FLOW, schedule is NoiseSchedule.VP_SDE or sampler is Sampler.EULER_MARUYAMA
    fit = [None] if timed else [each for each in spacings if not (flow and each is Spacing.LEADING)]
    steps, spacing = draw(counts), draw(st.sampled_from(fit))
    if sampler is Sampler.DPM_SOLVER and spacing is Spacing.LEADING:
        steps = min(steps, 999)  # 1000 are refused: they would stay at one timestep
    eta = draw(st.sampled_from([0.0, 1.0]) | st.floats(0, 1)) if sampler is Sampler.DDIM else 0.0
    return Case(
        schedule,
        Prediction.VELOCITY if flow else draw(st.sampled_from([Prediction.EPSILON, Prediction.X0, Prediction.V])),
        SamplerConfig(sampler=sampler, steps=steps, spacing=spacing, eta=eta),
        learn_sigma=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 1.5, 4.0])),
        guided_channels=draw(st.integers(0, CHANNELS)),
        seed=draw(st.integers(0, 2**32)),
    )


def longest(sampler: Sampler, schedule: NoiseSchedule, prediction: Prediction, **settings: Any) -> Any:
    config = SamplerConfig(sampler=sampler, steps=1000, **settings)
    case = Case(schedule, prediction, config, learn_sigma=True, scale=1.5, guided_channels=2)
    return pytest.param(case, id=f"{sampler}-{schedule}")


LONGEST = [
    longest(Sampler.DDPM, NoiseSchedule.LINEAR, Prediction.EPSILON),
    longest(Sampler.DDIM, NoiseSchedule.COSINE, Prediction.X0, eta=0.5),
    longest(Sampler.DPM_SOLVER, NoiseSchedule.SCALED_LINEAR, Prediction.V, spacing=Spacing.TRAILING),
    longest(Sampler.DPM_SOLVER, NoiseSchedule.FLOW, Prediction.VELOCITY, spacing=Spacing.LINSPACE),
    longest(Sampler.EULER, NoiseSchedule.FLOW, Prediction.VELOCITY),
]
LONGEST_OURS = [
    longest(Sampler.EULER_MARUYAMA, NoiseSchedule.FLOW, Prediction.VELOCITY),
    longest(Sampler.EULER_MARUYAMA, NoiseSchedule.VP_SDE, Prediction.EPSILON),
]


# Ours: rows of coefficients, and one formula that applies them.


def in_numpy(case: Case, row: np.ndarray, x: np.ndarray, history: np.ndarray, output: np.ndarray, noise: np.ndarray):
    out, v = case.guided(output)
    x_prev = row[0] * x + row[1] * out + row[2] * history + row[3] * np.exp(row[4] * v + row[5]) * noise
    return x_prev, row[6] * x + row[7] * out


def in_pytorch(case: Case, row: np.ndarray, x: np.ndarray, history: np.ndarray, output: np.ndarray, noise: np.ndarray):
    tensors = map(torch.from_numpy, (x, history, output, noise, row))
    x_prev, after = sampler_step(*tensors, 1.0 if case.scale is None else case.scale, case.guided_channels)
    return x_prev.numpy(), after.numpy()


def in_onnx(case: Case, row: np.ndarray, x: np.ndarray, history: np.ndarray, output: np.ndarray, noise: np.ndarray):
    scale = np.array(1.0 if case.scale is None else case.scale, x.dtype)
    feeds = {"x": x, "history": history, "noise": noise, "coefficients": row, "cfg_scale": scale, "out": output}
    return onnx_session(case.learn_sigma, case.guided_channels, x.dtype.name).run(None, feeds)


@lru_cache
def onnx_session(learn_sigma: bool, guided_channels: int, dtype: str) -> onnxruntime.InferenceSession:
    """A graph that calls the local function: on float32, as bundles do, or on float64."""
    sizes = {"hidden_size": 8, "depth": 1, "num_heads": 1, "patch_size": 2, "input_size": SIDE, "in_channels": CHANNELS}
    target = sampler_function(DiTConfig(**sizes, learn_sigma=learn_sigma), Precision.FP32, guided_channels)
    kind = ir.TensorType(ir.DataType.FLOAT if dtype == "float32" else ir.DataType.DOUBLE)
    ranks = {"x": 4, "history": 4, "noise": 4, "coefficients": 1, "cfg_scale": 0, "out": 4}
    inputs = [ir.Value(name=name, shape=ir.Shape([None] * rank), type=kind) for name, rank in ranks.items()]
    ops = Ops()
    outputs = ops.call(DOMAIN, target.name, inputs, ["x_prev", "next_history"])
    for value in outputs:
        value.type = kind
    graph = ir.Graph(inputs, outputs, nodes=ops.nodes, opset_imports={"": OPSET, DOMAIN: 1}, name="graph")
    proto = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, functions=[target]))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


@lru_cache(maxsize=8)  # tests share the longest runs
def trajectory(case: Case, step: Callable[..., Any], dtype: type = np.float64) -> np.ndarray:
    """The latents after every step, [steps, B, C, S, S]."""
    run = sampling_run(case.process, case.config, case.learn_sigma)
    x, noises = (each.astype(dtype) for each in case.draws)
    rows, history, visited = run.coefficients.astype(dtype), np.zeros_like(x), []
    for row, t, noise in zip(rows, run.times, noises, strict=True):
        x, history = step(case, row, x, history, case.model(x.astype(np.float64), t).astype(dtype), noise)
        assert x.dtype == history.dtype == dtype
        visited.append(x)
    return np.stack(visited)


def distances(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Relative L2 distance of the latents after each step, [steps]."""
    actual, expected = (each.reshape(len(each), -1) for each in (actual, expected))
    return np.linalg.norm(actual - expected, axis=1) / np.linalg.norm(expected, axis=1)


def rounding(case: Case, visited: np.ndarray) -> np.ndarray:
    """The relative distance that float32 may keep from float64 after each step, [steps].

    Coefficients of consecutive steps may round to the same side, so the errors of n steps add up to n roundings. With a
    prediction of epsilon, x_0 = (x - sigma eps) / alpha is a small difference of large terms where alpha is small, so a
    step may err by ROUNDINGS of these terms instead; what it errs by, the model does not amplify.
    """
    if case.prediction is not Prediction.EPSILON:
        return FLOAT32 + UNIT * np.arange(1, len(visited) + 1)
    run, largest, remembered = sampling_run(case.process, case.config, case.learn_sigma), [], 0.0
    first, noises = case.draws
    for row, t, x, noise in zip(run.coefficients, run.times, [first, *visited[:-1]], noises, strict=True):
        output = case.model(x, t)
        out = np.abs(output[:, :CHANNELS]).max() * (1 if case.scale is None else 1 + 2 * case.scale)
        log_std = row[4] * case.guided(output)[1] + row[5]
        drawn = np.abs(row[3] * np.exp(log_std) * (1 + np.abs(log_std)) * noise).max()
        largest.append(abs(row[0]) * np.abs(x).max() + abs(row[1]) * out + abs(row[2]) * remembered + drawn)
        remembered = abs(row[6]) * np.abs(x).max() + abs(row[7]) * out
    norms = np.linalg.norm(visited.reshape(len(visited), -1), axis=1)
    return ROUNDINGS * UNIT * np.cumsum(largest) * visited[0].size ** 0.5 / norms


@pytest.mark.parametrize("sampler", Sampler)
@given(data=st.data())
@settings(max_examples=10)
def test_rows_are_the_closed_form(sampler, data):
    case = data.draw(cases(sampler))
    assert distances(trajectory(case, in_numpy), closed_form(case)).max() < FLOAT64


@pytest.mark.parametrize("case", LONGEST + LONGEST_OURS)
def test_1000_steps_are_the_closed_form(case):
    assert distances(trajectory(case, in_numpy), closed_form(case)).max() < FLOAT64


@pytest.mark.parametrize("step", [in_pytorch, in_onnx])
@pytest.mark.parametrize("sampler", Sampler)
@given(data=st.data())
@settings(max_examples=4)
def test_pytorch_and_onnx_are_the_closed_form(sampler, step, data):
    case = data.draw(cases(sampler))
    assert distances(trajectory(case, step), closed_form(case)).max() < FLOAT64


@pytest.mark.parametrize("step", [in_pytorch, in_onnx])
@pytest.mark.parametrize("case", LONGEST + LONGEST_OURS)
def test_guidance_and_learned_variance_in_pytorch_and_onnx(case, step):
    case = replace(case, config=case.config.model_copy(update={"steps": 12}))
    assert distances(trajectory(case, step), closed_form(case)).max() < FLOAT64


@pytest.mark.parametrize("step", [in_pytorch, in_onnx])
@pytest.mark.parametrize("sampler", Sampler)
@given(data=st.data())
@settings(max_examples=4)
def test_float32_differs_by_rounding(sampler, step, data):
    case = data.draw(cases(sampler))
    exact = trajectory(case, in_numpy)
    assert (distances(trajectory(case, step, np.float32), exact) < rounding(case, exact)).all()


# The schedulers of diffusers, in float64. Their tables are float32, which near t = 0 is wrong by 3e-4 in sigma, so they
# are replaced by those of float64. These are constants; the formulas stay theirs.


@pytest.fixture(scope="module")
def diffusers() -> Any:
    return pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'dydit[vae]'")


def set_table(scheduler: Any, name: str, table: np.ndarray) -> None:
    np.testing.assert_allclose(getattr(scheduler, name).numpy(), table, rtol=1e-5, atol=1e-5)
    setattr(scheduler, name, torch.from_numpy(table))


def discrete(kind: Any, case: Case, **options: Any) -> Any:
    """A scheduler for a discrete schedule, at its own timesteps, which are ours."""
    betas = {
        NoiseSchedule.LINEAR: {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        NoiseSchedule.SCALED_LINEAR: {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        NoiseSchedule.COSINE: {"beta_schedule": "squaredcos_cap_v2"},
    }[case.schedule]
    prediction = {Prediction.EPSILON: "epsilon", Prediction.X0: "sample", Prediction.V: "v_prediction"}[case.prediction]
    spacing = (case.config.spacing or Spacing.LINSPACE).value
    scheduler = kind(**betas, **options, prediction_type=prediction, timestep_spacing=spacing)
    set_table(scheduler, "alphas_cumprod", alphas_cumprod(case.schedule))
    scheduler.set_timesteps(case.config.steps)
    times = case.config.times(case.process).astype(int).tolist()
    own = scheduler.timesteps.tolist()
    if own != times:  # 62 counts with spacing "trailing", for which `arange` adds the timestep -1
        assert own == [*times, -1]
        scheduler.set_timesteps(timesteps=times)
    return scheduler


def ddpm(diffusers: Any, case: Case) -> tuple[Any, Any]:
    variance = "learned_range" if case.learn_sigma else "fixed_small"
    scheduler = discrete(diffusers.DDPMScheduler, case, clip_sample=False, variance_type=variance)

    def step(t: Any, x: Any, out: Any, v: Any, noise: Any) -> Any:
        return scheduler.step(torch.cat([out, torch.as_tensor(v)], 1) if case.learn_sigma else out, t, x)

    return scheduler, step


def ddim(diffusers: Any, case: Case) -> tuple[Any, Any]:
    scheduler = discrete(diffusers.DDIMScheduler, case, clip_sample=False)

    def step(t: Any, x: Any, out: Any, v: Any, noise: Any) -> Any:
        return scheduler.step(out, t, x, eta=case.config.eta, variance_noise=noise)

    return scheduler, step


def dpm_solver(diffusers: Any, case: Case) -> tuple[Any, Any]:
    kind = diffusers.DPMSolverMultistepScheduler
    if case.flow:
        scheduler = kind(use_flow_sigmas=True, prediction_type="flow_prediction")
        scheduler.set_timesteps(case.config.steps)
    else:
        scheduler = discrete(kind, case)
    return scheduler, solver_step(scheduler, case)


def euler(diffusers: Any, case: Case) -> tuple[Any, Any]:
    scheduler, n = diffusers.FlowMatchEulerDiscreteScheduler(), case.config.steps
    if case.config.spacing is Spacing.LINSPACE:
        scheduler.set_timesteps(n)
    else:
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / n, n).tolist())  # as its pipelines do
    return scheduler, solver_step(scheduler, case)


def solver_step(scheduler: Any, case: Case) -> Any:
    """A step of a scheduler that works with sigma / alpha, or with a flow's sigma."""
    times = case.config.times(case.process)
    squared = None if case.flow else alphas_cumprod(case.schedule)[times.astype(int)]
    set_table(scheduler, "sigmas", np.append(1 - times if squared is None else np.sqrt(1 / squared - 1), 0.0))
    scheduler.set_begin_index(0)
    sign = -1 if case.flow else 1  # its velocity is noise - image

    def step(t: Any, x: Any, out: Any, v: Any, noise: Any) -> Any:
        return scheduler.step(sign * out, t, x)

    return step


SCHEDULERS = {Sampler.DDPM: ddpm, Sampler.DDIM: ddim, Sampler.DPM_SOLVER: dpm_solver, Sampler.EULER: euler}


def of_diffusers(diffusers: Any, case: Case) -> np.ndarray:
    """The latents after every step, [steps, B, C, S, S]."""
    scheduler, step = SCHEDULERS[case.config.sampler](diffusers, case)
    times = (1 - scheduler.sigmas[:-1] if case.flow else scheduler.timesteps).tolist()
    (x, noises), visited = case.draws, []
    noises = torch.from_numpy(noises.copy())
    noises[-1] = (
        0  # its DDPM draws noise in the last step too, unless that is at timestep 0; Ho et al. and DiT never do
    )
    drawn = iter(noises)
    with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(drawn)):
        for timestep, t, noise in zip(scheduler.timesteps, times, noises, strict=True):
            out, v = case.guided(case.model(x, t))
            x = step(timestep, torch.from_numpy(x), torch.from_numpy(out), v, noise).prev_sample.numpy()
            visited.append(x)
    return np.stack(visited)


# Where diffusers' schedulers do the same. Its DDIM steps to t - 1000 // n, which is the next visited timestep only with
# spacing "leading", with "trailing" if n divides 1000, and with "linspace" if n is 1 or 1000. Its solver has one
# spacing for a flow.
DIVISORS = st.sampled_from([n for n in range(1, 500) if 1000 % n == 0])
COMPARABLE = {
    Sampler.DDPM: cases(Sampler.DDPM, DISCRETE),
    Sampler.DDIM: cases(Sampler.DDIM, DISCRETE, spacings=[Spacing.LEADING])
    | cases(Sampler.DDIM, DISCRETE, DIVISORS, [Spacing.TRAILING]),
    Sampler.DPM_SOLVER: cases(Sampler.DPM_SOLVER, DISCRETE, st.integers(1, 40) | st.integers(1, 999))
    | cases(Sampler.DPM_SOLVER, [NoiseSchedule.FLOW], spacings=[Spacing.LINSPACE]),
    Sampler.EULER: cases(Sampler.EULER),
}


@pytest.mark.parametrize("sampler", COMPARABLE)
@given(data=st.data())
@settings(max_examples=10)
def test_runs_are_those_of_diffusers(diffusers, sampler, data):
    case = data.draw(COMPARABLE[sampler])
    assert distances(trajectory(case, in_numpy), of_diffusers(diffusers, case)).max() < DIFFUSERS


@pytest.mark.parametrize("case", LONGEST)
def test_1000_steps_are_those_of_diffusers(diffusers, case):
    assert distances(trajectory(case, in_numpy), of_diffusers(diffusers, case)).max() < DIFFUSERS


TWICE = Case(NoiseSchedule.LINEAR, Prediction.EPSILON, SamplerConfig(sampler=Sampler.DPM_SOLVER, steps=1000))


def test_a_solver_that_visits_a_timestep_twice_stays_finite():
    """1000 intervals between 999 timesteps."""
    (twice,) = np.flatnonzero(np.diff(TWICE.config.times(TWICE.process)) == 0)
    visited = trajectory(TWICE, in_numpy)
    np.testing.assert_allclose(visited[twice], visited[twice - 1], rtol=FLOAT64)  # a step of no length
    assert distances(visited, closed_form(TWICE)).max() < FLOAT64


def test_the_solver_of_diffusers_does_not(diffusers):
    """The one run that is left out of the comparison."""
    with np.errstate(invalid="ignore"):
        assert np.isnan(of_diffusers(diffusers, TWICE)[-1]).all()
