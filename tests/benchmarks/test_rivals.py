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
    path = make_checkpoint().path
    names = [name for name in run.NAMES if name not in (COMPILED, DIFFUSERS)]  # slow to start; below
    if not EXACT_INT8:
        names.remove(run.INT8)  # the backend refuses it: this CPU has no VNNI
    arguments = ["--checkpoint", path, "--json", tmp_path / "r.json", "--plot", tmp_path / "r.png", *QUICK]
    assert run.main([str(each) for each in (*arguments, *only(*names))]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    sides = {side["side"]["name"]: side for side in report["sides"]}
    assert set(sides) == set(names) and report["not_run"] == []
    dense = sides[run.MASKED]["macs"]
    for name, side in sides.items():
        assert (
            side["relative_l2"] < (0.05 if name == run.INT8 else run.FP32_TOLERANCE) and len(side["round_ms"]) == 2
        ), name
        saves = name in (run.FP32, run.INT8, "dydit sliding", "dydit 16 merged")
        assert (side["macs"] < 0.8 * dense) if saves else (side["macs"] == dense), name
        routed = saves or name == run.MASKED
        assert all((share < 1) is routed for share in side["flops_ratio"]), name
    assert sides[run.MASKED]["flops_ratio"] == pytest.approx(sides["dydit sliding"]["flops_ratio"])
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert all(f"\n{name}  " in said for name in names)


@pytest.mark.release
@pytest.mark.parametrize(
    ("name", "depth", "needs"), [(DIFFUSERS, 3, lambda: need("diffusers")), (COMPILED, 1, need_compiler)]
)
def test_so_does_what_is_slow_to_start(name, depth, needs, run, make_checkpoint, small_config, tmp_path):
    needs()
    path = make_checkpoint(small_config.model_copy(update={"depth": depth})).path
    arguments = ["--checkpoint", path, "--json", tmp_path / "r.json", *QUICK, *only(name)]
    assert run.main([str(each) for each in arguments]) == 0
    (side,) = json.loads((tmp_path / "r.json").read_text())["sides"]
    assert side["side"]["name"] == name and side["relative_l2"] < run.FP32_TOLERANCE
    assert set(side["flops_ratio"]) == {1.0}


@pytest.mark.release
def test_what_cannot_run_here_is_listed_with_the_reason(run, make_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    arguments = ["--checkpoint", make_checkpoint().path, "--json", tmp_path / "r.json", *QUICK]
    assert run.main([str(each) for each in (*arguments, *only(COMPILED, "dydit static"))]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    reason = "torch.compile needs a C++ compiler, but there is no no-such-compiler"
    assert report["not_run"] == [{"name": COMPILED, "reason": reason}]
    assert [side["side"]["name"] for side in report["sides"]] == ["dydit static"]
    assert f"{COMPILED}: not run: {reason}" in capsys.readouterr().out


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
            baseline.save_for_diffusers(static.path, tmp_path / rename.__name__)
            with torch.inference_mode():
                theirs = baseline.load_from_diffusers(tmp_path / rename.__name__)(x, timestep=t, class_labels=y).sample
                ours = static.model()(x, t, y)
            deviations.append(float((theirs - ours).norm() / ours.norm()))
        assert deviations[0] < 1e-4 < deviations[1]
