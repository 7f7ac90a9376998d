"""Weights that slide: few moves, one order, the right rows, the file untouched, one graph for all."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dydit.bundle.bundle import Bundle
from dydit.bundle.io_spec import unit_inputs
from dydit.bundle.manifest import PlanKind, Routing
from dydit.bundle.stored_weights import WEIGHTS, Precision
from dydit.diffusion.steps import State
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.onnxruntime import OnnxRuntimeBackend
from dydit.runtime.dynamic_width import Arrangement, DynamicWidthWeights, exchanges, front
from dydit.runtime.loop import MemoryStore, StepRunner, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import make_batches
from dydit.runtime.resident import ResidentSubnets

pytestmark = pytest.mark.numerics

UNITS = 9
wanted_units = st.sets(st.integers(0, UNITS - 1)).map(sorted)


@given(st.permutations(range(UNITS)), st.permutations(range(UNITS)), wanted_units)
def test_exchanges_bring_the_wanted_units_to_the_front_in_one_order_whatever_was_before(places, others, wanted):
    def after(row):
        made = exchanges(row, wanted)
        row = list(row)
        assert len(made) <= sum(unit != place for unit, place in zip(row, front(wanted), strict=False))
        for first, second in made:
            row[first], row[second] = row[second], row[first]
        assert sorted(row) == list(range(UNITS)), "nothing is lost"
        return row[: len(wanted)]

    assert sorted(front(wanted)) == wanted
    assert after(places) == after(others) == front(wanted)
    assert all(front(wanted)[unit] == unit for unit in wanted if unit < len(wanted)), "who can stay stays"


def subsets(count):
    return st.sets(st.integers(0, count - 1)).map(lambda units: tuple(sorted(units)))


@st.composite
def slides(draw):
    """Units of the groups of each block, and the slots that some steps want: by block and unit group."""
    counts = draw(st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=2), min_size=1, max_size=2))
    slots = st.tuples(*[st.tuples(*map(subsets, block)) for block in counts])
    return counts, draw(st.lists(slots, min_size=1, max_size=5))


@given(slides())
def test_an_arrangement_keeps_account_of_every_place(make_axis, drawn):
    """Replayed on plain lists, exchanges lead to what the arrangement says, and what stays costs nothing."""
    counts, steps = drawn
    axis = make_axis(counts)
    arrangement = Arrangement(axis)
    replayed = {part: list(range(part.group.count)) for part in axis.parts}
    before = None
    for wanted in steps:
        made = arrangement.arrange(wanted)
        for each in made:
            row = replayed[each.part]
            row[each.first], row[each.second] = row[each.second], row[each.first]
        assert list(replayed.values()) == arrangement.order
        for part, units in axis.zip(wanted):
            assert sorted(replayed[part][: len(units)]) == list(units)
            assert sorted(replayed[part]) == list(range(part.group.count)), "nothing is lost"
        if wanted == before:
            assert not made
        before = wanted


@pytest.fixture
def width_bundle(make_bundle) -> Bundle:
    return make_bundle(plan=PlanKind.DYNAMIC_WIDTH)


def test_feeds_are_the_rows_of_the_units_that_are_on(width_bundle):
    """For every subnetwork, in an order that jumps about: as sets of units, the rows that the stored tensors have."""
    manifest, weights = width_bundle.manifest, DynamicWidthWeights(width_bundle)
    specs = unit_inputs(manifest.weights, manifest.model)
    before = hashlib.sha256((width_bundle.path / WEIGHTS).read_bytes()).hexdigest()
    count = len(manifest.subnets)
    assert count > 4
    for index in [*range(count), 0, count - 1, count // 2, *reversed(range(count))]:
        entry = manifest.subnets[index]
        feeds = weights.run(entry, dict)
        assert list(feeds) == [spec.name for spec in specs]
        for name, fed in feeds.items():
            stored, (_, block, part) = width_bundle.weight(name), name.split(".", 2)
            units = entry.units[int(block)][not part.startswith(("qkv", "proj"))]
            assert fed.shape == (len(units) * stored.shape[1], *stored.shape[2:]) and fed.flags.c_contiguous
            found = {row.tobytes() for row in fed.reshape(len(units), -1)}
            assert found == {np.ascontiguousarray(stored[unit]).tobytes() for unit in units}
        alone = DynamicWidthWeights(width_bundle).run(entry, dict)
        assert all(np.array_equal(fed, alone[name]) for name, fed in feeds.items()), "whatever was before"
    assert hashlib.sha256((width_bundle.path / WEIGHTS).read_bytes()).hexdigest() == before, "the file is untouched"


def test_a_part_with_nothing_on_gets_zeros(make_bundle, make_checkpoint, small_config):
    from dydit.models.config import Routers

    checkpoint = make_checkpoint(small_config.model_copy(update={"routers": Routers.ALL_ROUTED}), flops_ratio=0.15)
    bundle = make_bundle(checkpoint, plan=PlanKind.DYNAMIC_WIDTH)
    weights, empty = DynamicWidthWeights(bundle), 0
    for entry in bundle.manifest.subnets:
        feeds = weights.run(entry, dict)
        for block, (heads, _) in enumerate(entry.units):
            if not heads:
                empty += 1
                rows = feeds[f"blocks.{block}.qkv.weight"]
                assert rows.shape[0] == 3 * bundle.manifest.model.head_dim and not rows.any()
    assert empty, "some block of some step has no head on"


def test_one_graph_one_session_for_every_width(width_bundle, make_bundle):
    names = {entry.file for entry in width_bundle.manifest.subnets}
    assert names == {"sliding.onnx"} and len(width_bundle.manifest.subnets) > 4
    assert sorted(path.suffix for path in width_bundle.path.iterdir() if path.is_file()) == [
        ".bin",
        ".json",
        ".onnx",
        ".onnx",
    ]
    backend = OnnxRuntimeBackend(width_bundle, BackendOptions(threads=1))
    assert len({id(backend.subnet(index).graph) for index in range(3)}) == 1
    exact = make_bundle(plan=PlanKind.PER_STEP).manifest
    assert width_bundle.manifest.plan.macs == exact.plan.macs == exact.plan.per_step_macs
    assert [s.units for s in width_bundle.manifest.subnets] == [s.units for s in exact.subnets]


@pytest.mark.parametrize("settings", [{}, {"routing": Routing.CAPACITY, "capacities": (2, 16, 5)}])
def test_a_run_equals_the_per_step_plan(settings, make_bundle, relative):
    latents = {}
    for plan in (PlanKind.DYNAMIC_WIDTH, PlanKind.PER_STEP):
        bundle = make_bundle(plan=plan, **settings)
        if settings:
            assert bundle.manifest.subnets[0].full_file == (
                "sliding-full.onnx" if plan is PlanKind.DYNAMIC_WIDTH else "subnet-0000-full.onnx"
            )
        model = bundle.manifest.model
        backend = OnnxRuntimeBackend(bundle, BackendOptions(threads=1))
        batches, store = make_batches([0, 1, 2], [0, 1, 2], 2), MemoryStore()
        with ResidentSubnets(backend, 2) as subnets:
            noise = SeededNoise(3, (model.in_channels, model.input_size, model.input_size))
            stats = sample(StepRunner(backend, subnets, [0, 1, 2], 4.0), batches, noise, store)
        assert not settings or stats.repeated_steps > 0
        latents[plan] = np.concatenate([store.load(index).x for index in range(2)])
    assert relative(latents[PlanKind.DYNAMIC_WIDTH], latents[PlanKind.PER_STEP]) < 1e-4


def test_half_precision_slides_too(make_bundle, relative):
    bundle = make_bundle(plan=PlanKind.DYNAMIC_WIDTH, precision=Precision.FP16)
    feeds = DynamicWidthWeights(bundle).run(bundle.manifest.subnets[1], dict)
    assert {array.dtype.name for array in feeds.values()} == {"float16"}
    wide = make_bundle(plan=PlanKind.PER_STEP, precision=Precision.FP16)
    rng, model = np.random.default_rng(0), bundle.manifest.model
    x, noise = rng.standard_normal((2, 2, model.in_channels, model.input_size, model.input_size)).astype(np.float32)
    results = []
    for each in (bundle, wide):
        backend = OnnxRuntimeBackend(each, BackendOptions(threads=1))
        with ResidentSubnets(backend) as subnets:
            results.append(StepRunner(backend, subnets, [0, 1], 4.0).run(7, State(x), noise, np.array([0, 1])).x_prev)
    assert relative(*results) < 1e-3
