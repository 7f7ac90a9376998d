"""Benchmarks: what is counted, who takes turns, what is refused. No test asserts a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import dydit.bench.contender as contender_module
from dydit.bench.bench import (
    REPORT,
    BenchConfig,
    compare_sides,
    run_bench,
    sides_of,
    spread_steps,
)
from dydit.bench.bench_worker import open_side
from dydit.bench.contender import started
from dydit.bench.timing import Job, Latents, chained_run, settled_bytes
from dydit.bench.turns import deviation_of
from dydit.bundle.manifest import PlanKind, Routing
from dydit.diffusion.coefficients import HISTORY, NOISE, sampling_run
from dydit.diffusion.process import Process
from dydit.diffusion.samplers import Sampler, SamplerConfig
from dydit.errors import BackendError, ConfigError, DeviationError, UnavailableError
from dydit.models.config import Routers
from dydit.models.pixart.config import PixArtConfig
from dydit.models.transformer.units import attention_macs, mlp_macs
from dydit.reports.bench_report import BenchReport, Reference, Side, SideKind, SideResult
from dydit.reports.bench_table import table_lines

QUICK = BenchConfig(labels=(1, 7), steps_measured=3, repeats=2, threads=1)


@pytest.fixture(scope="module")
def report(make_checkpoint, make_bundle, tmp_path_factory):
    """Three sides of one run: merged with dynamic routing, per step by capacity, and the masked model."""
    out, seen = tmp_path_factory.mktemp("bench"), []
    sides = sides_of(
        make_bundle(),
        [make_bundle(plan=PlanKind.PER_STEP, routing=Routing.CAPACITY, capacities=(1, 16, 16))],
        make_checkpoint().path,
    )
    references = ("another", "pytorch-masked")
    made = run_bench(sides, QUICK, out, lambda *at: seen.append(at), references=references)
    assert seen == [(k + 1, 9) for k in range(9)]
    assert BenchReport.parse(json.loads((out / REPORT).read_text())) == made
    return made


def static_macs(config):
    return config.depth * (attention_macs(config) + mlp_macs(config))


def test_what_was_measured_is_said(report):
    assert report.steps_measured == (0, 6, 11)
    assert report.steps == 12 and "steps measured: 3 of 12" in report.summary
    assert (report.batch, report.threads, report.repeats, report.warmup) == (2, 1, 2, 1)
    assert report.timesteps[0] == 999 and report.timesteps[-1] == 0


def test_each_side_has_its_rounds_without_the_warm_up(report):
    for side in report.sides:
        assert len(side.round_ms) == 2 and len(side.step_ms) == 3
        assert side.min_ms <= side.median_ms <= side.max_ms
        assert side.images_per_second == pytest.approx(2 / (side.median_ms * 12 / 1e3))
        # Both are of one process, and a peak is no less than what stays. The factor is for the kernel's own counting,
        # which is not to the page; figures in two units would be a thousand apart.
        assert 2 * side.peak_bytes >= (side.settled_bytes or 1) and side.load_seconds > 0


def test_multiply_adds_are_those_of_the_decisions(report, small_config):
    """The sides ran on their own latents, which agree; so their decisions do."""
    merged, capacity, masked = report.sides
    assert merged.flops_ratio == pytest.approx(masked.flops_ratio)
    assert merged.flops_ratio == pytest.approx(capacity.flops_ratio)
    assert merged.token_share == pytest.approx(masked.token_share)
    assert all(0.2 < ratio < 0.9 for ratio in merged.flops_ratio)
    assert all(0.1 < share < 0.9 for share in merged.token_share)
    assert masked.macs == static_macs(small_config), "the masked model computes everything"


def test_errors_are_those_from_the_first_reference_that_runs(report):
    merged, capacity, masked = report.sides
    assert report.reference == masked.side.name and (masked.relative_l2, masked.psnr) == (0, None)
    for side in (merged, capacity):
        assert 0 <= side.relative_l2 < 1e-5 and (side.psnr is None or side.psnr > 80)
    header, *rows = table_lines(report)
    assert header.split() == ["configuration", "precision", "ms", "a", "step", "speed", "relative", "L2", "PSNR"]
    names = [side.side.name for side in sorted(report.sides, key=lambda side: side.median_ms)]
    assert [row.split()[0] for row in rows[:3]] == names
    assert "reference" in rows[names.index("pytorch-masked")] and "1.00\u00d7" in rows[names.index(merged.side.name)]
    assert "against pytorch-masked (fp32), worst image, same noise" in rows[4]


def test_reports_of_earlier_releases_are_read(report):
    values = report.to_json()
    del values["reference"]
    for side in values["sides"]:
        del side["psnr"], side["side"]["optional"]
    old = BenchReport.parse(values)
    assert old.reference == "" and [each.side for each in old.sides] == [each.side for each in report.sides]


def test_overflowing_steps_run_again_and_are_counted(report):
    merged, capacity, masked = report.sides
    assert (merged.overflows, masked.overflows) == (0, 0)
    assert capacity.overflows == capacity.steps_timed == 2 * 3, "every step of both counted rounds"
    assert report.lines[-1] == f"{capacity.side.name}: 6 of 6 timed steps ran again at full capacity"
    assert report.lines[-1] in report.to_json()["summary"]


def test_comparisons_are_pair_by_pair(report):
    assert [(pair.side, pair.other) for pair in report.comparisons] == [
        (report.sides[0].side.name, other.side.name) for other in report.sides[1:]
    ]
    first, masked = report.sides[0], report.sides[2]
    pair = report.comparison("pytorch-masked")
    assert pair.ratios == tuple(b / a for a, b in zip(first.round_ms, masked.round_ms, strict=True))
    assert pair.allowed is pair.achieved is None and "backends differ: onnxruntime and PyTorch" in pair.no_bound
    other = report.comparisons[0]
    assert other.allowed == pytest.approx(report.sides[1].macs / first.macs)
    assert other.achieved == pytest.approx(other.median / other.allowed) and other.no_bound == ""
    assert "alone would give" in report.lines[3] and "no bound by multiply-adds" in report.lines[4]


KINDS = {
    "exact masks": {"plan": PlanKind.PER_STEP},
    "sliding": {"plan": PlanKind.DYNAMIC_WIDTH},
    "merged": {"max_subnets": 1},
    "a slot for every token": {"max_subnets": 2, "routing": Routing.CAPACITY},
    "overflowing": {"plan": PlanKind.DYNAMIC_WIDTH, "routing": Routing.CAPACITY, "capacities": (1, 16, 16)},
    "dense": {"max_subnets": 2, "routing": Routing.DENSE},
}


@pytest.mark.parametrize("kind", KINDS)
def test_multiply_adds_are_those_that_the_bundle_computes(kind, make_bundle, small_config):
    """Of the union of a segment's masks, as it is compiled, and of the tokens that its routing computes."""
    bundle = make_bundle(**KINDS[kind])
    manifest, decided = bundle.manifest, open_side(job(bundle)).decided()
    again, expected = kind == "overflowing", []
    for k, step in enumerate((0, 5, 11)):
        segment = next(each for each in manifest.plan.segments if step in each.steps)
        union = bundle.masks[segment.first : segment.first + segment.count].any(axis=0)
        heads, groups = small_config.units.counts(union).reshape(small_config.depth, 2).T
        if manifest.routing is Routing.DYNAMIC:
            if kind == "merged":
                expected.append(None)  # needs the share of each block
            else:
                expected.append(decided.flops_ratio[k] * static_macs(small_config))
            continue
        slots = np.array(manifest.subnets[segment.subnet].capacities or (16,) * 3) / 16 + again
        attention, mlp = attention_macs(small_config) / 4, mlp_macs(small_config) / 4
        expected.append((heads * attention * (1 + again) + groups * slots * mlp).sum())
    if kind == "merged":
        exact = open_side(job(make_bundle(**KINDS["exact masks"]))).decided()
        assert decided.flops_ratio == pytest.approx(exact.flops_ratio)
        assert exact.macs * 1.05 < decided.macs < static_macs(small_config)
    else:
        assert decided.macs == pytest.approx(np.mean(expected))


def test_the_text_graph_is_not_counted_as_part_of_one_step(make_checkpoint, make_bundle):
    """It runs once in a round, for all steps of the run, of which each counts its share."""
    sizes = {"hidden_size": 32, "depth": 2, "num_heads": 4, "input_size": 8, "caption_channels": 16, "text_tokens": 6}
    bundle = make_bundle(make_checkpoint(PixArtConfig(**sizes)), plan=PlanKind.DYNAMIC_WIDTH)
    measured = open_side(job(bundle))
    measured.load()
    backend, before = measured.backend, measured.backend.spent
    backend.shares.clear()
    measured.round()
    assert backend.text_seconds > 0
    assert backend.spent - before == pytest.approx(backend.text_seconds + sum(backend.shares.values()))


def side_result(name="ours", rounds=(1.0, 1.0), macs=50.0, precision="fp32", **side):
    return SideResult(
        side=Side(**{"name": name, "kind": SideKind.BUNDLE, "path": "x", **side}), load_seconds=1, subnets_loaded=1,
        round_ms=rounds, step_ms=(1.0,), median_ms=1, min_ms=1, max_ms=1, peak_bytes=1, settled_bytes=None,
        images_per_second=1, overflows=0, token_share=(1.0,), flops_ratio=(1.0,), macs=macs, precision=precision,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"backend": "torch"}, "backends differ: onnxruntime and torch"),
        ({"precision": "int8"}, "precisions differ: fp32 and int8"),
        ({"precision": "fp32 with 3 layers in 16 bits"}, "precisions differ"),
        ({"kind": SideKind.TORCH_MASKED}, "backends differ: onnxruntime and PyTorch"),
        ({"kind": SideKind.SCRIPT}, "the multiply-adds of a script are unknown"),
    ],
)
def test_multiply_adds_set_a_bound_between_like_sides_alone(theirs, words):
    pair = compare_sides(side_result(), side_result("theirs", (2.84, 2.84), 109.0, **theirs))
    assert pair.median == 2.84 and pair.allowed is None and pair.achieved is None and words in pair.no_bound
    masked, static = (side_result(kind=kind) for kind in (SideKind.TORCH_MASKED, SideKind.TORCH_STATIC))
    assert "forms of the model differ" in compare_sides(masked, static).no_bound
    assert compare_sides(side_result(), side_result("theirs", macs=100.0)).allowed == 2


def test_a_checkpoint_without_routers_is_called_static(make_bundle, make_checkpoint, small_config):
    static = make_checkpoint(small_config.model_copy(update={"routers": Routers.NONE}))
    for checkpoint, name, kind in (
        (static, "pytorch-static", SideKind.TORCH_STATIC),
        (make_checkpoint(), "pytorch-masked", SideKind.TORCH_MASKED),
    ):
        side = sides_of(make_bundle(), (), checkpoint.path)[1]
        assert (side.name, side.kind) == (name, kind)


def test_a_ratio_above_one_means_faster():
    ours, theirs = side_result(rounds=(10.0, 20.0, 10.0)), side_result("theirs", (20.0, 30.0, 30.0), 100.0)
    pair = compare_sides(ours, theirs)
    assert pair.ratios == (2.0, 1.5, 3.0) and (pair.median, pair.min, pair.max) == (2.0, 1.5, 3.0)
    assert (pair.allowed, pair.achieved) == (2.0, 1.0)


def test_a_static_model_computes_everything(make_checkpoint, make_bundle, small_config):
    checkpoint = make_checkpoint(small_config.model_copy(update={"routers": Routers.NONE}))
    bundle = make_bundle(checkpoint)
    for kind, path in ((SideKind.BUNDLE, bundle.path), (SideKind.TORCH_MASKED, checkpoint.path)):
        decided = open_side(job(bundle, Side(name="s", kind=kind, path=str(path)), cfg_scale=1.0)).decided()
        assert decided.macs == static_macs(small_config)
        assert set(decided.flops_ratio) == set(decided.token_share) == {1.0}


def test_without_its_routers_a_model_is_static(make_checkpoint, make_bundle, small_config):
    side = Side(name="static", kind=SideKind.TORCH_STATIC, path=str(make_checkpoint().path))
    decided = open_side(job(make_bundle(), side)).decided()
    assert set(decided.flops_ratio) == {1.0} and decided.macs == static_macs(small_config)


def job(bundle, side=None, **changes):
    manifest = bundle.manifest
    values = {
        "side": side or sides_of(bundle)[0],
        "sizes": manifest.model.without_routers(),
        "steps": (0, 5, 11),
        "run": manifest.sampling.config,
        "process": manifest.model.diffusion,
        "labels": (1,),
        "seed": 0,
        "cfg_scale": 4.0,
        "cfg_channels": manifest.sampling.cfg_channels,
        "threads": 1,
        "device": "cpu",
        "latents": Latents.RUN,
    }
    return Job.model_validate({**values, **changes})


class TestMeasure:
    def latents(self, side):
        """What each step of a round starts from."""
        seen = []
        step = side._step

        def watch(first, x, *rest):
            seen.append(x["x"] if isinstance(x, dict) else x)
            return step(first, x, *rest)

        side._step = watch
        side.round()
        return seen

    def test_a_round_is_a_run_through_the_measured_steps(self, make_checkpoint, make_bundle):
        """All steps of a DDIM run, chained, are that run: the bundle's own coefficients."""
        bundle = make_bundle(sampler=Sampler.DDIM)
        every = job(bundle, steps=tuple(range(12)))
        sampling = bundle.manifest.sampling
        chained = chained_run(Process(), sampling.config, every.steps, True)
        assert chained.times.tolist() == list(sampling.timesteps)
        assert np.allclose(chained.coefficients, np.asarray(sampling.coefficients, np.float32), rtol=1e-6)
        side = open_side(every)
        masked = open_side(
            job(bundle, Side(name="m", kind=SideKind.TORCH_MASKED, path=str(make_checkpoint().path)), steps=every.steps)
        )
        ours, theirs = self.latents(side), self.latents(masked)
        assert len(ours) == len(theirs) == 12
        assert np.allclose(ours[-1], theirs[-1], rtol=1e-3, atol=1e-3) and not np.allclose(ours[0], ours[-1], atol=0.1)

    def test_or_starts_each_step_from_noise(self, make_bundle):
        side = open_side(job(make_bundle(), latents=Latents.NOISE))
        for x in self.latents(side):
            assert abs(x.mean()) < 0.3 and 0.8 < x.std() < 1.2

    def test_fewer_steps_keep_their_marginals(self):
        run = chained_run(Process(), SamplerConfig(), (0, 100, 249), True)
        table, times = run.coefficients, SamplerConfig().times(Process())
        assert run.times.dtype == np.float32 and run.times.tolist() == times[[0, 100, 249]].tolist()
        full = sampling_run(Process(), SamplerConfig(sampler=Sampler.DDIM), True).coefficients
        assert table.shape == (3, 8) and not table[:, NOISE].any()
        assert np.allclose(table[2], full[249], rtol=1e-6), "the last step returns the sample in any run"
        signal = Process().alpha_sigma(times)[0]
        assert table[0, 0] == pytest.approx(signal[100] / signal[0], rel=1e-5)

    @pytest.mark.parametrize("sampler", [Sampler.EULER, Sampler.EULER_MARUYAMA, Sampler.DPM_SOLVER])
    def test_fewer_steps_of_a_flow_are_those_of_eulers_method(self, sampler):
        process = Process(schedule="flow", prediction="velocity")
        run = SamplerConfig(sampler=sampler, steps=20)
        chained, times = chained_run(process, run, (0, 7, 19), True), run.times(process)
        assert np.allclose(chained.times, times[[0, 7, 19]])
        lengths = np.diff([*times[[0, 7, 19]], 1])
        assert np.allclose(chained.coefficients[:, :2], np.stack([np.ones(3), lengths], 1))
        assert not chained.coefficients[:, 2:].any()

    def test_a_multistep_sampler_is_timed_on_the_steps_that_it_visits(self, make_bundle):
        """By deterministic steps without history: steps that are left out leave none."""
        bundle = make_bundle(sampler=Sampler.DPM_SOLVER)
        side, expected = open_side(job(bundle)), bundle.manifest.sampling
        assert side.timesteps.tolist() == [expected.timesteps[step] for step in (0, 5, 11)]
        assert expected.multistep and not side.coefficients[:, HISTORY].any()
        assert all(np.isfinite(x).all() for x in self.latents(side))

    @pytest.mark.parametrize(("batches", "runs"), [(1, 1), (5, 2)])
    def test_steps_of_a_plan_that_is_not_kept_are_timed_while_the_next_is_loaded(
        self, make_bundle, monkeypatch, batches, runs
    ):
        """As in a run; its other batches share what is loaded."""
        monkeypatch.setattr("dydit.runtime.resident.KEPT_BYTES", 0)
        bundle = make_bundle(plan=PlanKind.PER_STEP)
        side = open_side(job(bundle).model_copy(update={"batches": batches}))
        assert (side.keep_all, side.load().subnets) == (False, 1)
        assert len(self.latents(side)) == 3, "the first round, which is not counted, is what a user waits for"
        fetched = []
        monkeypatch.setattr(side.subnets, "prefetch", fetched.append)
        steps = {step: segment.subnet for segment in bundle.manifest.plan.segments for step in segment.steps}
        measured = [(steps.get(step - 1), steps[step], steps.get(step + 1)) for step in side.job.steps]
        same = sum(before == subnet for before, subnet, _ in measured)
        assert len(self.latents(side)) == runs * 3 + same
        assert fetched == [after for _, subnet, after in measured if after not in (None, subnet)] != []

    def test_steps_of_dynamic_width_exchange_the_units_of_one_step(self, make_bundle):
        side = open_side(job(make_bundle(plan=PlanKind.DYNAMIC_WIDTH)))
        assert side.keep_all and side.load().subnets
        assert len(self.latents(side)) == 3
        started = []
        step = side._step
        side._step = lambda index, feeds: (started.append(index), step(index, feeds))[1]
        side.round()
        of = side._subnet_of_step
        assert started == [each for k in side.job.steps for each in ((of[k - 1], of[k]) if k else (of[k],))]

    def test_what_a_pipeline_keeps_has_loaded_everything_before_it_is_timed(self, make_bundle):
        for bundle in (make_bundle(max_subnets=4), make_bundle(plan=PlanKind.PER_STEP)):
            side = open_side(job(bundle))
            assert side.keep_all and side.load().subnets == len(side.needed)
            assert len(self.latents(side)) == len(self.latents(side)) == 3

    def test_settled_memory_is_that_of_this_process(self):
        size = settled_bytes()
        assert size is None or 20e6 < size < 50e9


@pytest.mark.parametrize("count", [1, 2, 25, 249, 250, 400])
def test_steps_are_spread_over_the_run(count):
    steps = spread_steps(250, count)
    assert len(steps) == min(count, 250) == len(set(steps)) and steps[0] == 0
    assert count == 1 or steps[-1] == 249
    if count > 1:
        gaps = np.diff(steps)
        assert gaps.max() - gaps.min() <= 1


SCRIPT = """
import sys, time
import numpy as np
from dydit.errors import UnavailableError
from dydit.bench.bench_worker import serve
from dydit.bench.timing import Loaded, Measured

class Mine(Measured):
    def __init__(self, job):
        super().__init__(job, job.sizes)

    def load(self):
        if self.job.side.checkpoint == "nothing":
            raise UnavailableError("there is nothing to load")
        return Loaded(seconds=0.5, subnets=1)

    def step(self, k, x):
        time.sleep(0.02)
        print("chatter")
        return np.full_like(x, np.nan) if self.job.side.checkpoint == "nan" else x

sys.exit(serve(Mine))
"""


class TestScripts:
    @pytest.fixture
    def mine(self, tmp_path):
        """`mine(checkpoint, reference=None)`: a script whose model contributes next to nothing."""
        (tmp_path / "mine.py").write_text(SCRIPT)

        def make(checkpoint, reference=None):
            path = str(tmp_path / "mine.py")
            return Side(name="mine", kind=SideKind.SCRIPT, path=path, checkpoint=checkpoint, reference=reference)

        return make

    def test_a_script_is_a_side(self, mine, make_bundle, small_config):
        bundle = make_bundle()
        report = run_bench([mine("x"), *sides_of(bundle)], QUICK)
        side = report.side("mine")
        assert side.load_seconds == 0.5
        assert all(ms >= 20 for ms in side.step_ms), "a step sleeps for 20 ms, and a sleep is never shorter than asked"
        assert side.macs == static_macs(small_config) and set(side.token_share) == {1.0}
        assert side.relative_l2 is None and report.not_run == ()
        alone = run_bench([mine("x")], QUICK, run_of=bundle)
        assert alone.steps == 12 and alone.comparisons == ()
        assert BenchReport.parse(json.loads(json.dumps(report.to_json()))) == report

    def test_an_interrupted_benchmark_continues_and_lists_what_is_refused(self, mine, make_bundle, tmp_path):
        bundle, kept = make_bundle(), tmp_path / "kept"
        refused = [side.model_copy(update={"optional": True}) for side in sides_of(bundle, backend="nonsense")]
        first = run_bench([mine(str(tmp_path / "mine.py"))], QUICK, run_of=bundle, kept=kept).sides[0]
        assert first.disk_bytes == len(SCRIPT) and first.first_seconds > 0.06
        file = kept / "mine.json"
        written = json.loads(file.read_text())
        file.write_text(json.dumps({**written, "counted": written["counted"][:1]}))
        again = run_bench([mine(str(tmp_path / "mine.py")), *refused], QUICK, run_of=bundle, kept=kept)
        (side,) = again.sides
        assert side.first_seconds == first.first_seconds and len(side.round_ms) == len(first.round_ms) == 2
        assert side.round_ms[0] == first.round_ms[0] and side.round_ms[1] != first.round_ms[1]
        assert json.loads(file.read_text())["counted"][0] == written["counted"][0]
        assert [each.name for each in again.not_run] == [bundle.path.name]
        assert again.not_run[0].reason.startswith("unknown backend 'nonsense'")

    def test_contenders_may_be_in_memory_one_at_a_time(self, mine, make_bundle, make_checkpoint, tmp_path, monkeypatch):
        living, most, begun = [0], [0], []
        process = contender_module.ChildProcess

        class Counted(process):
            def __enter__(self):
                living[0] += 1
                most[0] = max(most[0], living[0])
                begun.append(living[0])
                return super().__enter__()

            def __exit__(self, *error):
                living[0] -= 1
                return super().__exit__(*error)

        monkeypatch.setattr(contender_module, "ChildProcess", Counted)
        held = mine("x", Reference(kind=SideKind.TORCH_MASKED, checkpoint=str(make_checkpoint().path)))
        other = held.model_copy(update={"name": "other", "reference": None})
        sides, of = [held, other], {"run_of": make_bundle(), "references": (held.name,)}
        together = run_bench(sides, QUICK, **of)
        assert most == [len(sides)] and len(begun) == 1 + len(sides)
        most[0], begun[:] = 0, []
        alone = QUICK.model_copy(update={"apart": True})
        apart = run_bench(sides, alone, kept=tmp_path / "kept", **of)
        assert most == [1], "the reference is not in memory either"
        assert len(begun) == 1 + len(sides) * (1 + QUICK.repeats), (
            "each is tried first, and starts again for each round"
        )
        begun.clear()
        again = run_bench(sides, alone, kept=tmp_path / "kept", **of)
        assert len(begun) == 1 + 2 * len(sides), "rounds that are kept need no process, but the facts after the last do"
        assert [each.round_ms for each in again.sides] == [each.round_ms for each in apart.sides]
        assert [each.load_seconds for each in again.sides] == [each.load_seconds for each in apart.sides]
        assert (apart.apart, together.apart) == (True, False)
        for one, other in zip(apart.sides, together.sides, strict=True):
            assert one.side == other.side and len(one.round_ms) == len(other.round_ms) == QUICK.repeats
            assert (one.macs, one.relative_l2, one.psnr) == (other.macs, other.relative_l2, other.psnr)
            assert one.first_seconds > 0 and one.peak_bytes > 0

    def test_what_a_side_computes_is_held_to_its_reference(self, mine, make_bundle, make_checkpoint):
        bundle, path = make_bundle(), str(make_checkpoint().path)

        def held(kind, bar):
            return Reference(kind=kind, checkpoint=path, bar=bar)

        right = sides_of(bundle)[0].model_copy(update={"reference": held(SideKind.TORCH_MASKED, 1e-5)})
        far = mine("x", held(SideKind.TORCH_MASKED, None))
        report = run_bench([right, far], QUICK)
        assert report.sides[0].relative_l2 < 1e-5 < 0.1 < report.sides[1].relative_l2
        wrong = right.model_copy(update={"reference": held(SideKind.TORCH_STATIC, 1e-4)})
        with pytest.raises(DeviationError, match=f"^{wrong.name} does not compute what PyTorch .*at most 1e-4"):
            run_bench([wrong], QUICK)

    def test_what_is_not_finite_is_refused_at_any_bar(self, mine, make_bundle):
        reference = Reference(kind=SideKind.TORCH_STATIC, checkpoint="c")
        known = {(reference.kind, reference.checkpoint): np.ones((1, 4, 8, 8), np.float32)}
        with (
            pytest.raises(DeviationError, match="is not finite, expected a finite number"),
            started(job(make_bundle(), mine("nan", reference))) as worker,
        ):
            deviation_of(worker, known)

    def test_a_script_that_lacks_something_is_left_out(self, mine, make_bundle):
        sides = sides_of(make_bundle())
        elsewhere = sides[0].model_copy(update={"name": "elsewhere", "backend": "ncnn", "optional": True})
        report = run_bench([mine("nothing"), elsewhere, *sides], QUICK)
        (name, reason), other = ((each.name, each.reason) for each in report.not_run)
        assert (name, reason) == ("mine", "there is nothing to load")
        assert other[0] == "elsewhere" and other[1].startswith("unknown backend 'ncnn'")
        assert [side.side for side in report.sides] == sides and report.comparisons == ()
        with pytest.raises(
            UnavailableError, match="no configuration runs on this machine: mine: there is nothing to load"
        ):
            run_bench([mine("nothing")], QUICK, run_of=make_bundle())


class TestRefusals:
    def test_bundles_of_other_runs(self, make_bundle, make_checkpoint, small_config):
        with pytest.raises(ConfigError, match=r"sampling steps differ \(12 and 6\)"):
            run_bench(sides_of(make_bundle(), [make_bundle(steps=6)]), QUICK)
        other = make_bundle(make_checkpoint(small_config.model_copy(update={"depth": 2})))
        with pytest.raises(ConfigError, match="model sizes differ"):
            run_bench(sides_of(make_bundle(), [other]), QUICK)

    def test_labels_and_batches(self, make_bundle):
        with pytest.raises(ConfigError, match=r"label 8 is outside 0..7"):
            run_bench(sides_of(make_bundle()), QUICK.model_copy(update={"labels": (8,)}))
        with pytest.raises(ConfigError, match=r"17 labels.*up to 16"):
            run_bench(sides_of(make_bundle()), QUICK.model_copy(update={"labels": (0,) * 17}))

    def test_no_bundle_or_the_same_name_twice(self, make_bundle, make_checkpoint):
        side = Side(name="t", kind=SideKind.TORCH_MASKED, path=str(make_checkpoint().path))
        with pytest.raises(ConfigError, match="at least one bundle"):
            run_bench([side], QUICK)
        with pytest.raises(ConfigError, match="different names"):
            run_bench([side, side], QUICK)

    def test_a_checkpoint_of_other_sizes(self, make_bundle, make_checkpoint, small_config):
        other = make_checkpoint(small_config.model_copy(update={"depth": 2}))
        side = Side(name="t", kind=SideKind.TORCH_MASKED, path=str(other.path))
        with pytest.raises(ConfigError, match="cannot be compared"):
            open_side(job(make_bundle(), side))

    def test_a_backend_that_is_not_there(self, make_bundle):
        with pytest.raises(BackendError, match=r"^bundle-\d+: unknown backend 'nonsense'"):
            run_bench(sides_of(make_bundle(), backend="nonsense"), QUICK)

    def test_a_process_that_dies_is_told_with_its_last_words(self, make_bundle, monkeypatch):
        monkeypatch.setattr("dydit.bench.contender.WORKER", [sys.executable, "-c", "raise SystemExit('out of luck')"])
        with pytest.raises(BackendError, match=r"ended: out of luck \(exit code 1\)"):
            run_bench(sides_of(make_bundle()), QUICK)


def test_the_worker_speaks_only_json_and_needs_no_torch_for_onnxruntime(make_bundle):
    code = (
        "import os, sys; from dydit.bench import bench_worker; code = bench_worker.main(); os.write(1, b'noise');"
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    lines = [job(make_bundle()).model_dump_json(), "check", "round", "memory", "decided", ""]
    done = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(lines), capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [sorted(answer) for answer in answers] == [
        ["precision", "seconds", "subnets"],
        ["shape", "values"],
        ["ms", "overflows"],
        ["peak_bytes", "settled_bytes"],
        ["flops_ratio", "macs", "token_share"],
    ]
    assert done.stderr.split() == ["noiseFalse"]


def test_a_gpu_would_embed_the_patches_in_fp32_too(make_checkpoint, make_bundle, monkeypatch):
    """A convolution, which PyTorch lets cuDNN round to TF32 unless it is told not to."""
    import torch

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    open_side(job(make_bundle(), Side(name="m", kind=SideKind.TORCH_MASKED, path=str(make_checkpoint().path))))
    assert torch.backends.cudnn.allow_tf32 is False
