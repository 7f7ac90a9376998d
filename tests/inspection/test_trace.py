"""A trace keeps the decisions of the very run that it makes, and what they cost."""

from __future__ import annotations

import numpy as np
import pytest

from dydit.bundle.manifest import PlanKind
from dydit.errors import ConfigError
from dydit.inspection.trace import decided_ratio, executed_ratio, trace_tokens
from dydit.models.transformer.units import attention_macs, mlp_macs
from dydit.parity.parity import cost_of
from dydit.parity.reference import Images, Reference
from dydit.runtime.pipeline import DyDiTPipeline

LABELS = (1, 4)


@pytest.fixture(scope="module")
def trace(make_bundle):
    seen = []
    made = trace_tokens(make_bundle(), LABELS, 4.0, progress=lambda *at: seen.append(at))
    assert seen == [(k + 1, 12) for k in range(12)]
    return made


def test_images_are_those_of_sampling(trace, make_bundle):
    with DyDiTPipeline.from_bundle(make_bundle().path) as pipe:
        expected = pipe(LABELS, guidance_scale=4.0, seed=0, output_type="latent").latents
    assert np.linalg.norm(trace.latents - expected) < 1e-4 * np.linalg.norm(expected)


def test_decisions_and_cost_are_those_of_the_model(trace, make_bundle, make_checkpoint):
    manifest = make_bundle().manifest
    reference = Reference(make_checkpoint().model(), manifest.sampling.config, manifest.sampling.cfg_channels)
    trajectory = reference.run(Images(LABELS), lambda: None)
    assert np.array_equal(trace.tokens, trajectory.tokens)
    assert 0.1 < trace.token_share < 0.9, "tokens are routed and skipped"
    share, ratio = cost_of(manifest.model, trajectory)
    assert trace.token_share == pytest.approx(share.mean())
    assert decided_ratio(manifest, trace.tokens) == pytest.approx(ratio.mean())


def test_merged_subnetworks_execute_more_and_exact_ones_do_not(trace, make_bundle):
    merged, exact = make_bundle(max_subnets=2).manifest, make_bundle(plan=PlanKind.PER_STEP).manifest
    decided = decided_ratio(merged, trace.tokens)
    assert decided < executed_ratio(merged, trace.tokens) < 1
    assert executed_ratio(exact, trace.tokens) == pytest.approx(decided)


def test_slots_and_dense_routing_compute_what_they_hold_whatever_is_routed(trace, make_bundle, small_config):
    """Of the widths of the subnetworks: slots for 3, 8 and 16 of the 16 tokens, or all of them."""
    slots, dense = (
        make_bundle(max_subnets=2, **settings).manifest
        for settings in ({"routing": "capacity", "capacities": (3, 8, 16)}, {"routing": "dense"})
    )
    assert executed_ratio(dense, trace.tokens) == pytest.approx(dense.plan.macs / dense.plan.static_macs)
    attention, mlp, expected = attention_macs(small_config), mlp_macs(small_config), 0.0
    for segment in slots.plan.segments:
        entry = slots.subnets[segment.subnet]
        for (heads, groups), share in zip(entry.units, (3 / 16, 0.5, 1), strict=True):
            expected += segment.count * (len(heads) * attention + len(groups) * share * mlp) / 4
    assert executed_ratio(slots, trace.tokens) == pytest.approx(expected / slots.plan.static_macs)
    assert executed_ratio(slots, ~trace.tokens) == executed_ratio(slots, trace.tokens)


def test_a_static_model_computes_everything(make_bundle, make_checkpoint, small_config):
    static = make_bundle(make_checkpoint(small_config.without_routers()))
    made = trace_tokens(static, (1,), 1.0)
    assert made.tokens.all() and made.tokens.shape == (12, 3, 1, 16)
    assert executed_ratio(static.manifest, made.tokens) == pytest.approx(1)


def test_labels_must_fit(make_bundle):
    with pytest.raises(ConfigError, match="label 9"):
        trace_tokens(make_bundle(), (9,), 1.0)
