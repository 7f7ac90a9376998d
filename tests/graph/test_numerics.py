"""Graphs in onnxruntime against the masked model in float64 PyTorch: every form, routing mode and odd corner."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dydit.bundle.io_spec import residual_name, token_mask_name
from dydit.bundle.manifest import Routing
from dydit.bundle.stored_weights import Precision
from dydit.graph.library import FunctionLibrary
from dydit.graph.saving import save_graph
from dydit.graph.sources import WeightInputs, Windows
from dydit.graph.writer import subnet_graph
from dydit.models.config import Routers
from dydit.models.dit.graph import conditioning_graph

pytestmark = pytest.mark.numerics

MODES = [None, *Routing]
ALL = [range(4)] * 3
EVERY_TOKEN, NO_TOKEN = 1e4, -1e4
STEP = 1e-5  # relative L2 of one fp32 step against PyTorch


def random_slots(seed: int, empty: bool = False) -> tuple[list[list[int]], list[list[int]]]:
    """Sets of every kind: with holes, prefixes, single units; empty ones where asked for."""
    rng = np.random.default_rng(seed)
    sets = [sorted(rng.choice(4, rng.integers(0 if empty else 1, 5), replace=False).tolist()) for _ in range(6)]
    return sets[:3], sets[3:]


def spec_of(bench, heads, groups, routing, gated=frozenset(), capacities=(16, 16, 16)):
    return bench.spec(heads, groups, routing, gated, capacities if routing is Routing.CAPACITY else None)


def routed(out, rows: int, routing) -> np.ndarray:
    """Token decisions of a run with debug outputs, [L, rows, N]."""
    return np.stack([out[token_mask_name(block)].reshape(rows, -1) for block in range(3)])


def masks_of(routing) -> list[str]:
    return [token_mask_name(block) for block in range(3)] if routing else []


@pytest.mark.parametrize("routing", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_random_widths(make_bench, distance, routing, seed):
    bench = make_bench()
    heads, groups = random_slots(seed)
    spec, feeds = spec_of(bench, heads, groups, routing), bench.feeds(t=[999, 480, 0][seed], seed=seed)
    out, expected = bench.run(spec, feeds, masks_of(routing)), bench.expected(spec, feeds)
    if routing:
        np.testing.assert_array_equal(routed(out, 4, routing), expected.tokens)
        assert 0.1 < expected.tokens.mean() < 0.9
    assert out["x_prev"].dtype == out["next_history"].dtype == np.float32
    assert distance(out["x_prev"], expected.x_prev) < STEP
    assert distance(out["next_history"], expected.next_history) < STEP


@pytest.mark.parametrize(
    "changes",
    [{"routers": Routers.ALL_ROUTED}, {"routers": Routers.NONE}, {"learn_sigma": False, "in_channels": 3}],
    ids=["all-routed", "static", "no-sigma"],
)
def test_other_models(make_bench, distance, changes):
    bench = make_bench(**changes)
    routing = Routing.DYNAMIC if bench.config.dynamic else None
    spec, feeds = spec_of(bench, *random_slots(7), routing), bench.feeds()
    out, expected = bench.run(spec, feeds), bench.expected(spec, feeds)
    assert distance(out["x_prev"], expected.x_prev) < STEP
    assert distance(out["next_history"], expected.next_history) < STEP


@pytest.mark.parametrize("routing", MODES)
@pytest.mark.parametrize(
    ("heads", "groups"),
    [([[], [], []], [[], [], []]), ([[], [1], []], [[0, 3], [], []])],
    ids=["nothing-on", "some-empty"],
)
def test_empty_sets(make_bench, distance, routing, heads, groups):
    bench = make_bench(routers=Routers.ALL_ROUTED)
    spec, feeds = spec_of(bench, heads, groups, routing, capacities=(16, 1, 16)), bench.feeds()
    out, expected = bench.run(spec, feeds, masks_of(routing)), bench.expected(spec, feeds)
    if routing:
        np.testing.assert_array_equal(routed(out, 4, routing), expected.tokens)
        assert 0 < expected.tokens.mean() < 1
    assert distance(out["x_prev"], expected.x_prev) < STEP
    if routing is Routing.CAPACITY:
        assert out["token_overflow"].tolist() == [0, 0, 0], "a block with no group on needs no slots"


@pytest.mark.parametrize("routing", list(Routing))
@pytest.mark.parametrize("bias", [NO_TOKEN, EVERY_TOKEN], ids=["none", "all"])
def test_no_token_and_every_token(make_bench, distance, routing, bias):
    bench = make_bench(token_bias=bias)
    heads, groups = random_slots(1)
    feeds = bench.feeds()
    for sets in (groups, [[]] * 3):
        spec = spec_of(bench, heads, sets, routing)
        out, expected = bench.run(spec, feeds, masks_of(routing)), bench.expected(spec, feeds)
        assert expected.tokens.all() == (bias > 0) and expected.tokens.any() == (bias > 0)
        np.testing.assert_array_equal(routed(out, 4, routing), expected.tokens)
        assert distance(out["x_prev"], expected.x_prev) < STEP


def test_skipped_tokens_keep_their_residual_bit_for_bit(make_bench):
    bench = make_bench(token_bias=NO_TOKEN)
    heads, groups = random_slots(1)
    feeds, attended = bench.feeds(), [f"blocks.{block}.attended" for block in range(3)]
    for routing in Routing:
        out = bench.run(spec_of(bench, heads, groups, routing), feeds, [*attended, *map(residual_name, range(3))])
        for block in range(3):
            np.testing.assert_array_equal(out[residual_name(block)], out[attended[block]])


@pytest.mark.parametrize("routing", MODES)
def test_one_session_for_any_batch(make_bench, sessions, distance, routing):
    """Batch 1, odd and large, guided or not: one graph, symbolic dimensions."""
    bench = make_bench()
    open_session, run_session = sessions
    spec = spec_of(bench, *random_slots(2), routing)
    session = open_session(bench.write(spec))
    for batch, guided in [(1, False), (1, True), (3, True), (16, True), (5, False)]:
        feeds = bench.feeds(batch, guided, seed=batch)
        out = run_session(session, feeds)
        assert out["x_prev"].shape == out["next_history"].shape == (batch, 4, 8, 8)
        expected = bench.expected(spec, feeds)
        assert distance(out["x_prev"], expected.x_prev) < STEP
        assert distance(out["next_history"], expected.next_history) < STEP


def test_without_guidance_rows_the_scale_does_nothing(make_bench):
    bench = make_bench()
    spec = spec_of(bench, *random_slots(3), Routing.DYNAMIC)
    feeds = bench.feeds(guided=False)
    first = bench.run(spec, feeds)
    second = bench.run(spec, {**feeds, "cfg_scale": np.array(30, np.float32)})
    guided = bench.run(spec, bench.feeds(guided=True))
    for name in ("x_prev", "next_history"):
        np.testing.assert_array_equal(first[name], second[name])
        assert not np.allclose(guided[name], first[name])


@pytest.mark.parametrize("channels", [1, 4])
def test_guidance_acts_on_the_asked_channels(make_bench, distance, monkeypatch, channels):
    bench = make_bench()
    monkeypatch.setattr(bench, "cfg_channels", channels)
    monkeypatch.setattr(bench, "library", FunctionLibrary(bench.config, channels))
    spec, feeds = spec_of(bench, *random_slots(3), Routing.DYNAMIC), bench.feeds()
    guided, expected = bench.run(spec, feeds), bench.expected(spec, feeds)
    plain = bench.run(spec, {**feeds, "cfg_scale": np.array(1, np.float32)})
    for name in ("x_prev", "next_history"):
        assert distance(guided[name], getattr(expected, name)) < STEP
        same = np.isclose(guided[name], plain[name], rtol=0, atol=1e-5).reshape(2, 4, -1).all(-1).all(0)
        assert same.tolist() == [index >= channels for index in range(4)]


@pytest.mark.parametrize("routing", MODES)
def test_gates_make_the_union_the_narrow_subnetwork(make_bench, sessions, distance, routing):
    bench = make_bench()
    open_session, run_session = sessions
    union = ([[0, 1, 3], [0, 2], [1, 2, 3]], [[0, 1, 2, 3], [1, 3], [0, 2]])
    gated = {(0, 0), (1, 1), (2, 0), (0, 1)}  # the other parts are on in every step
    session = open_session(bench.write(spec_of(bench, *union, routing, gated)))
    feeds = bench.feeds()
    results = []
    for narrow in ([[0, 3], [0, 2], [2]], [[0, 2], [3], [0, 2]]), ([[1], [0, 2], []], [[], [], [0, 2]]), union:
        gates = bench.config.units.mask(zip(*narrow, strict=True)).astype(np.float32)
        out = run_session(session, {**feeds, "gates": gates})
        expected = bench.expected(spec_of(bench, *narrow, routing), feeds)
        assert distance(out["x_prev"], expected.x_prev) < STEP
        results.append(out["x_prev"])
    assert distance(results[0], results[2]) > 0.05 and distance(results[1], results[2]) > 0.05


@pytest.mark.parametrize("routing", MODES)
def test_one_graph_for_every_width(make_bench, sessions, distance, routing):
    """Weights as inputs: one session gives what a static subnetwork of each width gives."""
    bench = make_bench()
    open_session, run_session = sessions
    wide = open_session(bench.write(spec_of(bench, ALL, ALL, routing), WeightInputs))
    feeds, seen = bench.feeds(), []
    for slots in ((ALL, ALL), *(random_slots(seed) for seed in (4, 5, 6)), ([[3]] * 3, [[2]] * 3)):
        spec = spec_of(bench, *slots, routing)
        static = bench.run(spec, feeds)
        wide_out = run_session(wide, {**feeds, **bench.weight_feeds(*slots)})
        assert wide_out.keys() == static.keys()
        assert distance(wide_out["x_prev"], static["x_prev"]) < 1e-6
        assert distance(wide_out["next_history"], static["next_history"]) < 1e-6
        assert distance(wide_out["x_prev"], bench.expected(spec, feeds).x_prev) < STEP
        seen.append(wide_out["x_prev"])
    assert all(distance(a, b) > 0.05 for a, b in itertools.pairwise(seen)), "widths make a difference"


@pytest.mark.parametrize("routing", MODES)
def test_one_graph_for_width_zero_too(make_bench, sessions, distance, routing):
    bench = make_bench(routers=Routers.ALL_ROUTED)
    open_session, run_session = sessions
    wide = open_session(bench.write(spec_of(bench, ALL, ALL, routing), WeightInputs))
    feeds = bench.feeds()
    for slots in (([[0], [], [1, 2]], [[], [3], []]), ([[]] * 3, [[]] * 3)):
        out = run_session(wide, {**feeds, **bench.weight_feeds(*slots)})
        assert distance(out["x_prev"], bench.expected(spec_of(bench, *slots, routing), feeds).x_prev) < STEP


def test_the_order_of_heads_and_groups_does_not_matter(make_bench, sessions, distance):
    """What lets a buffer of weights keep its units in any order."""
    bench = make_bench()
    open_session, run_session = sessions
    wide = open_session(bench.write(spec_of(bench, ALL, ALL, Routing.DYNAMIC), WeightInputs))
    feeds = bench.feeds()
    results = [
        run_session(wide, {**feeds, **bench.weight_feeds([order] * 3, [order] * 3)})["x_prev"]
        for order in ([0, 2, 3], [3, 0, 2])
    ]
    assert distance(*results) < 1e-6


class TestCapacity:
    """Static shapes: every token that fits is served exactly, and those that do not are counted."""

    CAPACITIES = (2, 16, 5)

    def run(self, bench, capacities, feeds, extra=()):
        heads, groups = random_slots(4)
        return bench.run(spec_of(bench, heads, groups, Routing.CAPACITY, capacities=capacities), feeds, extra)

    @pytest.mark.parametrize(("batch", "guided"), [(1, False), (1, True), (3, True)])
    def test_overflow_is_counted_block_by_block(self, make_bench, batch, guided):
        bench = make_bench()
        rows, feeds = batch * (1 + guided), bench.feeds(batch, guided)
        out = self.run(bench, self.CAPACITIES, feeds, masks_of(True))
        wanted = routed(out, rows, True).sum((1, 2))
        slots = rows * np.array(self.CAPACITIES)
        assert out["token_overflow"].tolist() == np.maximum(wanted - slots, 0).tolist()
        assert out["token_overflow"].dtype == np.int64
        assert out["token_overflow"][0] > 0 and out["token_overflow"][1] == 0

    def test_first_come_first_served(self, make_bench):
        """Tokens that fit are those of lowest index; they get what they get at full capacity, others nothing."""
        bench = make_bench()
        feeds, extra = bench.feeds(), [*masks_of(True), residual_name(0), "blocks.0.attended"]
        tight, full = (self.run(bench, capacities, feeds, extra) for capacities in ((2, 16, 16), (16, 16, 16)))
        mask = tight[token_mask_name(0)]
        np.testing.assert_array_equal(mask, full[token_mask_name(0)])
        served = mask & (np.cumsum(mask) <= 2 * 4)
        assert 0 < served.sum() < mask.sum()
        a, b, before = (
            out.reshape(64, 64) for out in (tight[residual_name(0)], full[residual_name(0)], tight["blocks.0.attended"])
        )
        np.testing.assert_allclose(a[served], b[served], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(a[~served], before[~served])
        assert (np.abs(b[mask & ~served] - before[mask & ~served]).max(1) > 1e-4).all()

    def test_capacity_is_shared_by_the_rows(self, make_bench, distance):
        """Slots belong to the batch: one row may use what another leaves."""
        bench = make_bench()
        feeds = bench.feeds()
        wanted = routed(self.run(bench, (16,) * 3, feeds, masks_of(True)), 4, True)
        enough = -(-wanted.sum((1, 2)) // 4)
        assert (wanted.sum(2).max(1) > enough).any(), "a row needs more than its share"
        out = self.run(bench, tuple(enough.tolist()), feeds)
        assert out["token_overflow"].tolist() == [0, 0, 0]
        assert distance(out["x_prev"], self.run(bench, (16,) * 3, feeds)["x_prev"]) < 1e-6
        short = self.run(bench, tuple((enough - 1).tolist()), feeds)
        assert (short["token_overflow"] > 0).any()

    @pytest.mark.parametrize(("bias", "overflow"), [(NO_TOKEN, 0), (EVERY_TOKEN, 15 * 4)])
    def test_at_the_ends(self, make_bench, bias, overflow):
        bench = make_bench(token_bias=bias)
        assert self.run(bench, (1, 1, 1), bench.feeds())["token_overflow"].tolist() == [overflow] * 3


@pytest.mark.parametrize("routing", [None, *Routing])
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.INT8])
def test_lower_precision(make_bench, tmp_path, distance, routing, precision):
    """The same step with fp16 or 8-bit products: near, and not the same."""
    from dydit.export.weights import write_weights

    bench = make_bench()
    entries = write_weights(tmp_path / "weights.bin", bench.stored.items(), bench.config, precision)
    library = FunctionLibrary(bench.config, 3, precision)
    spec = spec_of(bench, [[0, 1, 3], [0, 2], [1, 2, 3]], [[0, 1, 2, 3], [1, 3], [0, 2]], routing, {(0, 0), (0, 1)})
    path = tmp_path / "half.onnx"
    save_graph(subnet_graph(bench.config, spec, library, Windows(entries)), path)
    from onnxruntime import InferenceSession

    feeds = {**bench.feeds(), "gates": np.ones(24, np.float32)}
    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    x_prev = session.run(["x_prev"], {name: feeds[name] for name in names})[0]
    assert x_prev.dtype == np.float32
    assert 1e-7 < distance(x_prev, bench.expected(spec, feeds).x_prev) < 0.03


def test_conditioning_is_what_the_blocks_compute(make_bench, sessions, distance):
    bench = make_bench()
    path = bench.folder / "conditioning-numerics.onnx"
    save_graph(conditioning_graph(bench.config, Windows(bench.entries), Precision.FP32), path)
    open_session, run_session = sessions
    session = open_session(path)
    timesteps, labels = np.array([999, 0, 500], np.float32), np.array([7, 0, 1, 0])
    table = run_session(session, {"timesteps": timesteps, "labels": labels})["condition"]
    assert table.shape == (3, 4, 20, 64)
    for index, t in enumerate(timesteps.astype(int).tolist()):
        feeds = bench.feeds(batch=2, t=t)  # labels 0, 1, null, null
        for row, label in ((1, 0), (2, 1), (3, 0), (0, 7)):
            expected = feeds["condition"][feeds["labels"].tolist().index(label)]
            assert distance(table[index, row], expected) < 1e-5
    alone = run_session(session, {"timesteps": timesteps[:1], "labels": labels[:1]})["condition"]
    np.testing.assert_allclose(alone[0, 0], table[0, 0], rtol=1e-4, atol=1e-5)
