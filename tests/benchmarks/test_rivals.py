"""The comparison with other ways to run a DiT, end to end on a small model: all compute what PyTorch computes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest

from dydit.checkpoints.fit import expected_shapes
from dydit.models.config import Routers
from dydit.reports.bench_report import BenchReport, NotRun, Side, SideKind, SideResult
from dydit.reports.results import Machine
from tests.fixtures.cpu import EXACT_INT8

FOLDER = Path(__file__).parents[2] / "benchmarks" / "rivals"
QUICK = ("--steps", "2", "--repeats", "2", "--threads", "1", "--images", "2")
COMPILED, DIFFUSERS = "torch.compile static", "diffusers static"


@pytest.fixture
def script(load_script, monkeypatch):
    """`script(name)`: a file of the folder as a module, which finds the others."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: load_script(name, "rivals")


@pytest.fixture
def run(script):
    return script("run")


def only(*names):
    return [word for name in names for word in ("--only", name)]


def need(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'dydit[vae]'")


def need_compiler():
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"torch.compile needs a C++ compiler, but there is no {compiler}")


@pytest.mark.release
def test_every_side_computes_what_the_reference_computes(run, make_checkpoint, tmp_path, capsys):
    need("onnxscript")
    need("openvino")
    path = make_checkpoint().path
    names = [name for name in run.NAMES if not name.startswith("torch.compile") and name != DIFFUSERS]  # below
    if not EXACT_INT8:  # the backend refuses them: this CPU has no VNNI
        names = [name for name in names if name not in (run.INT8, "dydit static int8")]
    if not importlib.util.find_spec("nncf"):
        names.remove("openvino static int8 (NNCF)")
    arguments = ["--checkpoint", path, "--json", tmp_path / "r.json", "--plot", tmp_path / "r.png", *QUICK]
    assert run.main([str(each) for each in (*arguments, "--emulated", *only(*names))]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    sides = {side["side"]["name"]: side for side in report["sides"]}
    assert set(sides) == set(names) and report["not_run"] == []
    dense = sides[run.MASKED]["macs"]
    for name, side in sides.items():
        bar = run.FP32_TOLERANCE if side["precision"] == "fp32" else run.LOWER_TOLERANCE
        bar = 1 if "NNCF" in name else bar  # which is calibrated on two steps here
        assert side["relative_l2"] < bar and len(side["round_ms"]) == 2, name
        saves = name not in run.DENSE
        assert (side["macs"] < 0.8 * dense) if saves else (side["macs"] == dense), name
        routed = saves or name == run.MASKED
        assert all((share < 1) is routed for share in side["flops_ratio"]), name
        assert side["first_seconds"] > 1e-3 * sum(side["step_ms"]) / 2 and side["disk_bytes"] > 1e5, name
    assert sides[run.MASKED]["flops_ratio"] == pytest.approx(sides["dydit dynamic width"]["flops_ratio"])
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert all(f"\n{name}  " in said for name in names)


@pytest.mark.release
@pytest.mark.parametrize(
    ("name", "depth", "needs"),
    [
        (DIFFUSERS, 3, lambda: need("diffusers")),
        (COMPILED, 1, need_compiler),
        ("torch.compile frozen", 1, need_compiler),
        ("torch.compile frozen bf16", 1, need_compiler),
    ],
)
def test_so_does_what_is_slow_to_start(name, depth, needs, run, make_checkpoint, small_config, tmp_path):
    needs()
    path = make_checkpoint(small_config.model_copy(update={"depth": depth})).path
    arguments = ["--checkpoint", path, "--json", tmp_path / "r.json", "--emulated", *QUICK, *only(name)]
    assert run.main([str(each) for each in arguments]) == 0
    (side,) = json.loads((tmp_path / "r.json").read_text())["sides"]
    bar = run.FP32_TOLERANCE if side["precision"] == "fp32" else run.LOWER_TOLERANCE
    assert side["side"]["name"] == name and side["relative_l2"] < bar
    assert set(side["flops_ratio"]) == {1.0}


@pytest.mark.release
def test_what_cannot_run_here_is_listed_with_the_reason(run, make_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    arguments = ["--checkpoint", make_checkpoint().path, "--json", tmp_path / "r.json", *QUICK]
    assert run.main([str(each) for each in (*arguments, *only(COMPILED, run.STATIC))]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    reason = "torch.compile needs a C++ compiler, but there is no no-such-compiler"
    assert report["not_run"] == [{"name": COMPILED, "reason": reason}]
    assert [side["side"]["name"] for side in report["sides"]] == ["dydit static"]
    assert f"{COMPILED}: not run: {reason}" in capsys.readouterr().out


def test_a_dry_run_lists_what_this_cpu_cannot_run(run, make_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "multiplies", lambda dtype: False)
    bf16, work = ["pytorch static bf16", "dydit openvino bf16"], tmp_path / "work"
    arguments = ["--checkpoint", make_checkpoint().path, "--work", work, "--json", tmp_path / "r.json", *QUICK]
    assert run.main([str(each) for each in (*arguments, *only(run.FP32, *bf16))]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    (side,) = report["sides"]
    assert side["side"]["name"] == run.FP32 and side["relative_l2"] < run.FP32_TOLERANCE
    assert {each["name"] for each in report["not_run"]} == set(bf16)
    assert all("no instructions for bf16" in each["reason"] for each in report["not_run"])
    counted = json.loads((work / "rounds" / "dydit-per-step.json").read_text())["counted"]
    assert [sum(each["ms"]) / 2 for each in counted] == pytest.approx(side["round_ms"])
    said = capsys.readouterr().out
    assert "\ndydit per step  what is routed  fp32" in said and "\npytorch static bf16: not run: this CPU" in said
    with pytest.raises(SystemExit, match="figures of other settings"):
        run.main([str(each) for each in (*arguments, *only(run.STATIC))])


def side(name, ms, macs, precision="fp32", error=1e-6, **more):
    rounds = (ms, 1.1 * ms)
    return SideResult(
        side=Side(name=name, kind=more.pop("kind", SideKind.BUNDLE), path=name, **more),
        **{"load_seconds": 0.1, "subnets_loaded": 1, "round_ms": rounds, "step_ms": rounds, "median_ms": ms},
        **{"min_ms": ms, "max_ms": 1.1 * ms, "peak_bytes": 1 << 20, "images_per_second": 1.0, "overflows": 0},
        **{"token_share": (0.5,), "flops_ratio": (0.5,), "macs": macs, "precision": precision, "relative_l2": error},
    )


def test_the_fastest_of_any_precision_are_compared(run):
    """Among dense and among dynamic contenders; what is too inexact does not count."""
    sides = (
        side("dydit openvino bf16", 10.0, 50.0, "bf16", 4e-3, backend="openvino"),
        side(run.INT8, 9.0, 50.0, "int8", 0.2),
        side(run.FP32, 15.0, 50.0),
        side(run.STATIC, 24.0, 100.0),
        side("dydit static openvino bf16", 19.0, 100.0, "bf16", 4e-3, backend="openvino"),
        side("torch.compile frozen bf16", 16.0, 100.0, "bf16", 9e-3, kind=SideKind.SCRIPT),
        side("openvino static int8 (NNCF)", 8.0, 100.0, "int8", 0.3, kind=SideKind.SCRIPT),
        side(run.MASKED, 60.0, 100.0, kind=SideKind.TORCH_MASKED),
    )
    report = BenchReport(
        **{"batch": 4, "cfg_scale": 2.0, "latents": "noise", "threads": 2, "repeats": 2, "warmup": 1, "seed": 0},
        **{"steps": 12, "steps_measured": (0, 11), "timesteps": (999, 0), "load_average": (0, 0), "seconds": 1.0},
        **{"sides": sides, "comparisons": (), "machine": Machine.here()},
    )
    assert run.fastest(report, dense=False).side.name == "dydit openvino bf16"
    assert run.fastest(report, dense=True).side.name == "torch.compile frozen bf16"
    held = run.limits(report, "S/2")
    assert list(held.values()) == [True, True, False, False, True], held
    first, second, *_ = held
    assert first.startswith("dydit openvino bf16 1.60 times as fast as torch.compile frozen bf16")
    assert second.startswith("dydit openvino bf16 reaches 0.950 of what multiply-adds allow against dydit static")
    assert len(run.limits(report.model_copy(update={"batch": 1}), "XL/2")) == 2
    without = tuple(side for side in report.sides if side.side.name != run.INT8)
    *_, masked = run.limits(report, "S/2")
    *_, masked_in_fp32 = run.limits(
        report.model_copy(update={"sides": without, "not_run": (NotRun(name=run.INT8, reason="no VNNI"),)}), "S/2"
    )
    assert masked.endswith("as fast as pytorch masked, at least 5") and masked_in_fp32.endswith("at least 2.4")
    first, *inexact = run.verdict(report).splitlines()
    assert first.startswith(
        "dydit openvino bf16, the fastest dynamic one, is 1.60 times as fast as torch.compile frozen"
    )
    assert [line.partition(" deviates")[0] for line in inexact] == [run.INT8, "openvino static int8 (NNCF)"]
    assert run.limits(report, "XL/2") == {} and run.limits(report, "") == {}


def test_an_fp32_side_that_computes_something_else_fails(run, make_checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(run, "FP32_TOLERANCE", 1e-9)
    arguments = ["--checkpoint", str(make_checkpoint().path), *QUICK, *only("dydit static")]
    assert run.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("dydit static does not compute what PyTorch (torch-static) computes") and "1e-9" in error


def test_a_static_checkpoint_is_refused(run, make_checkpoint, small_config, capsys):
    static = make_checkpoint(small_config.model_copy(update={"routers": Routers.NONE}))
    assert run.main(["--checkpoint", str(static.path)]) == 2
    assert "has no routers" in capsys.readouterr().err


class TestDiffusers:
    @pytest.fixture
    def baseline(self, script):
        need("diffusers")
        return script("diffusers_dit")

    def test_names_go_there_and_back(self, baseline, make_checkpoint, small_config):
        from dydit.models.dit.diffusers import from_diffusers

        state, config = make_checkpoint().state, small_config.without_routers()
        static = {name: state[name] for name in expected_shapes(config)}
        back = from_diffusers(baseline.to_diffusers(static, config), config, 1 << 30)
        assert back.keys() == static.keys()
        assert all(back[name].equal(static[name]) for name in static)

    def test_it_computes_what_our_model_computes(self, baseline, make_checkpoint, small_config, tmp_path, monkeypatch):
        import torch

        static = make_checkpoint(small_config.model_copy(update={"routers": Routers.NONE}))
        x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 6, small_config.null_class])
        original = baseline.to_diffusers

        def spoilt(state, config):
            renamed = original(state, config)
            one, other = (f"transformer_blocks.1.attn1.{part}.weight" for part in ("to_q", "to_k"))
            return renamed | {one: renamed[other], other: renamed[one] * 2}

        deviations = []
        for rename in (original, spoilt):
            monkeypatch.setattr(baseline, "to_diffusers", rename)
            baseline.save_for_diffusers(tmp_path / rename.__name__, static.path)
            with torch.inference_mode():
                theirs = baseline.load_from_diffusers(tmp_path / rename.__name__)(x, timestep=t, class_labels=y).sample
                ours = static.model()(x, t, y)
            deviations.append(float((theirs - ours).norm() / ours.norm()))
        assert deviations[0] < 1e-4 < deviations[1]
