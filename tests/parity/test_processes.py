"""What is exported is what was trained: flows (SiT), continuous time, other betas and predictions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dydit.bundle.manifest import PlanKind, Routing
from dydit.diffusion.process import Process
from dydit.diffusion.samplers import Sampler, SamplerChoice
from dydit.errors import ConfigError
from dydit.models.config import ModelConfig
from dydit.parity.parity import ParityConfig, run_parity

FLOW = Process(schedule="flow", prediction="velocity")
PLANS = [PlanKind.PER_STEP, PlanKind.MAX_SUBNETS, PlanKind.DYNAMIC_WIDTH]
FLOW_SAMPLERS = [Sampler.EULER, Sampler.EULER_MARUYAMA, Sampler.DPM_SOLVER]
# Each sampler meets each plan and each routing mode.
FLOW_CASES = [
    (plan, routing, FLOW_SAMPLERS[(i + j) % 3])
    for (i, plan), (j, routing) in itertools.product(enumerate(PLANS), enumerate(Routing))
]
OTHERS = [
    (Process(schedule="vp-sde"), PlanKind.DYNAMIC_WIDTH, Sampler.EULER_MARUYAMA),
    (Process(schedule="vp-sde", prediction="v"), PlanKind.MAX_SUBNETS, Sampler.DPM_SOLVER),
    (Process(schedule="cosine", prediction="v"), PlanKind.PER_STEP, Sampler.DDPM),
    (Process(schedule="scaled-linear", prediction="x0"), PlanKind.DYNAMIC_WIDTH, Sampler.DDIM),
]


def of_process(config: ModelConfig, process: Process) -> ModelConfig:
    return config.model_copy(update={"process": process})


@pytest.mark.parametrize(("plan", "routing", "sampler"), FLOW_CASES)
def test_a_flow_in_every_plan_and_routing_mode(make_checkpoint, make_bundle, small_config, plan, routing, sampler):
    checkpoint = make_checkpoint(of_process(small_config, FLOW))
    capacities = (5, 9, 7) if routing is Routing.CAPACITY else None
    settings = {"steps": 7, "plan": plan, "max_subnets": 2, "routing": routing, "capacities": capacities}
    bundle = make_bundle(checkpoint, sampler=sampler, **settings)
    masks, times = bundle.masks, np.asarray(bundle.manifest.sampling.timesteps)
    assert 0 < masks.mean() < 1 and len(np.unique(masks, axis=0)) > 1
    assert (np.diff(times) > 0).all() and 0 <= times[0] < times[-1] < 1
    report = run_parity(bundle, checkpoint, ParityConfig(labels=(0, 3, 7), threads=1, cfg_scale=1.5))
    assert report.ok, report.summary
    assert 0 < np.mean(report.token_share) < 1


@pytest.mark.parametrize(("process", "plan", "sampler"), OTHERS)
def test_other_processes(make_checkpoint, make_bundle, small_config, process, plan, sampler):
    checkpoint = make_checkpoint(of_process(small_config, process))
    bundle = make_bundle(checkpoint, steps=7, plan=plan, sampler=sampler)
    report = run_parity(bundle, checkpoint, ParityConfig(threads=1))
    assert report.ok, report.summary


def test_a_flow_is_never_sampled_as_epsilon(make_checkpoint, make_bundle, small_config):
    """The same weights with another process are another model: parity says so, and DDPM is refused."""
    flow = make_checkpoint(of_process(small_config, FLOW))
    bundle = make_bundle(flow, steps=7)
    assert bundle.manifest.sampling.sampler is Sampler.EULER_MARUYAMA
    with pytest.raises(ConfigError, match=r"ddpm does not fit this model, which predicts velocity"):
        make_bundle(flow, steps=7, sampler=Sampler.DDPM)
    with pytest.raises(ConfigError, match="euler does not fit this model, which predicts epsilon"):
        make_bundle(make_checkpoint(), steps=7, sampler=Sampler.EULER)


def test_a_static_flow_takes_any_steps(make_checkpoint, make_bundle, small_config):
    checkpoint = make_checkpoint(of_process(small_config.without_routers(), FLOW))
    bundle = make_bundle(checkpoint, steps=5, sampler="euler")
    sampling = SamplerChoice(steps=9, sampler=Sampler.DPM_SOLVER)
    assert run_parity(bundle, checkpoint, ParityConfig(threads=1, sampling=sampling)).ok
