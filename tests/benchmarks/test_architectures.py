"""The benchmark of published sizes: what it counts, its bounds and limits, its table, and a run of tiny models."""

from __future__ import annotations

import json

import pytest

from dydit.bench.bench import MASKED, STATIC, compare_sides
from dydit.models.macs import static_macs
from dydit.reports.bench_report import BenchReport, Side, SideKind, SideResult
from dydit.reports.results import Machine

KINDS = {STATIC: SideKind.TORCH_STATIC, MASKED: SideKind.TORCH_MASKED}
BUDGET, FIXED = 80, 20


@pytest.fixture
def script(load_script):
    return load_script("architectures")


def side(name, milliseconds, macs):
    return SideResult(
        side=Side(name=name, kind=KINDS.get(name, SideKind.BUNDLE), path="x"), load_seconds=1, subnets_loaded=1,
        round_ms=(milliseconds,) * 2, step_ms=(milliseconds,), median_ms=milliseconds, min_ms=milliseconds,
        max_ms=milliseconds, peak_bytes=1, images_per_second=1, overflows=0, token_share=(0.5,), flops_ratio=(0.4, 0.6),
        macs=macs, precision="fp32",
    )  # fmt: skip


def parts(milliseconds):
    """The parts of a model of which half of the budget is computed, and whose static bundle takes 100 ms a step."""
    sides = side("dynamic", milliseconds, BUDGET / 2), side("static", 100, BUDGET), side(STATIC, 200, BUDGET)
    sides = *sides, side(MASKED, 300, BUDGET)
    report = BenchReport(
        batch=1, cfg_scale=1, latents="noise", threads=1, repeats=2, warmup=1, seed=0, steps=250, steps_measured=(0,),
        timesteps=(999,), sides=sides, comparisons=tuple(compare_sides(sides[0], other) for other in sides[1:]),
        load_average=(0, 0), machine=Machine.here(), seconds=1,
    )  # fmt: skip
    return {
        "checkpoint": {"dynamic_macs": BUDGET, "fixed_macs": FIXED},
        "export": {"dynamic": {"seconds": 1, "peak_bytes": 3e9, "peak_of_checkpoint": 1.5, "bundle_of_dense": 1.01}},
        "sample": {"peak_bytes": 2.4e9, "peak_of_dense": 1.2},
        "step": {"report": report.to_json()},
    }


def test_fixed_multiply_adds_are_those_outside_of_the_units(script):
    of = {name: model.published for name, model in script.MODELS.items()}
    fixed = {name: script.fixed_macs(config) for name, config in of.items()}
    assert fixed["dit-xl"] == 0
    assert fixed["uvit-s"] == 6 * 257 * 1024 * 512
    assert fixed["uvit-h"] == 14 * 258 * 2304 * 1152
    pixart = of["pixart-xl"]
    texts = pixart.depth * 2 * pixart.text_tokens * pixart.hidden_size**2  # keys and values, once for a run
    assert fixed["pixart-xl"] + texts + static_macs(pixart) == pixart.macs_with(120)


def test_models_are_as_published(script):
    published = {name: model.published for name, model in script.MODELS.items()}
    assert published["uvit-s"].null_class is None and script.MODELS["uvit-s"].cfg_scale == 1
    assert published["uvit-h"].null_class == 1000 and published["pixart-xl"].text.tokens == 120
    assert all(config.dynamic for config in published.values())
    for model in script.MODELS.values():
        assert type(model.small) is type(model.published)


def test_the_bound_with_fixed_multiply_adds_is_lower(script):
    figures = script.summary(parts(milliseconds=60))
    assert figures["decided"] == figures["computed"] == 0.5 and figures["fixed_share"] == 0.2
    assert figures["speed_up"] == pytest.approx(100 / 60)
    assert figures["allowed"] == 2 and figures["reached"] == pytest.approx(100 / 60 / 2)
    assert figures["allowed_all"] == pytest.approx(100 / 60) and figures["reached_all"] == pytest.approx(1)
    assert figures["speed_up_over_pytorch_static"] == pytest.approx(200 / 60)
    assert figures["speed_up_over_pytorch_masked"] == pytest.approx(300 / 60)


@pytest.mark.parametrize(("share", "holds"), [(0.73, True), (0.71, False)])
def test_a_model_may_reach_a_tenth_less_than_the_yardstick(script, share, holds):
    held = script.limits({"dit-xl": {"reached_all": 0.8}, "pixart-xl": {"reached_all": share}})
    assert list(held.values()) == [holds] and "pixart-xl" in next(iter(held))
    assert script.limits({"pixart-xl": {"reached_all": share}}) == {}, "there is nothing to compare with"


def test_the_table_of_a_report(script, tmp_path, capsys):
    models = {}
    for name in ("dit-xl", "pixart-xl"):
        models[name] = parts(milliseconds=60)
        models[name]["summary"] = script.summary(models[name])
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"models": models}))
    assert script.main(["--markdown", str(file)]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "|  | DiT-XL/2, 256 px | PixArt-XL/2, 256 px |"
    cells = {row.split(" | ")[0].removeprefix("| "): row.split(" | ")[1] for row in rows}
    assert cells["all multiply-adds of the blocks allow; share that is reached"] == "1.67; 100%"
    assert cells["sampling in 4 steps: peak memory, in dense fp32 models"] == "1.20 (2.40 GB)"
    assert cells["ms per step: PyTorch, masked"] == "300 (300 to 300)"


def test_a_folder_of_other_settings_is_refused(script, tmp_path):
    script.require_settings(tmp_path, {"steps": 4})
    script.require_settings(tmp_path, {"steps": 4})
    with pytest.raises(SystemExit, match="other settings"):
        script.require_settings(tmp_path, {"steps": 5})


@pytest.mark.release
@pytest.mark.parametrize("name", ["uvit-s", "pixart-xl"])
def test_a_run_of_a_tiny_model(script, name, tmp_path, capsys):
    work, report = tmp_path / "work", tmp_path / "report.json"
    words = ["--small", "--only", name, "--steps", "2", "--repeats", "2", "--work", str(work), "--json", str(report)]
    assert script.main(words) == 0
    (model,) = json.loads(report.read_text())["models"].values()
    assert 0.2 < model["summary"]["computed"] < 0.8
    assert model["summary"]["computed"] == pytest.approx(model["summary"]["decided"])
    left = {path.name for path in (work / name).iterdir()}
    assert left.isdisjoint({"dynamic", "static", "dynamic.safetensors", "static.safetensors"}), "weights are deleted"
    before = (work / name / "step.json").read_bytes()
    assert script.main(words) == 0 and (work / name / "step.json").read_bytes() == before, "nothing is measured twice"
    assert "ms per step: dynamic bundle" in capsys.readouterr().out
