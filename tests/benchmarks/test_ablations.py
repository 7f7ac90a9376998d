"""The sweep and the ablations: the runs of each row, the tables and the picture, and a run of two rows."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dydit.bench.bench import compare_sides
from dydit.models.config import TokenScope
from dydit.models.macs import flops_ratio
from dydit.quickstart.quickstart import ASSETS
from dydit.reports.bench_report import BenchReport, Side, SideKind, SideResult
from dydit.reports.results import Machine
from dydit.training.recipe import Routed, Stage

STATIC = ASSETS / "dit.safetensors"


@pytest.fixture
def script(load_script):
    return load_script("ablations")


def both(dynamic=1.0, settle=1.0):
    return {Stage.DYNAMIC: dynamic, Stage.SETTLE: settle}


@pytest.fixture
def runs(script):
    """The runs of a row on digits, by its name."""
    return lambda name, *scales: script.runs_of(script.ROWS[name], "digits", STATIC, both(*scales))


class TestRuns:
    def test_lambda_and_the_token_target_fall_together(self, runs, script):
        targets = {}
        for name, row in script.SWEEP.items():
            dynamic, settle = runs(name)
            assert (dynamic.stage, settle.stage) == (Stage.DYNAMIC, Stage.SETTLE)
            assert dynamic.init == str(STATIC) and settle.init is None
            assert dynamic.lambda_target == settle.lambda_target == row.target
            assert dynamic.token_target == settle.token_target and dynamic.token_weight > 0
            targets[row.target] = dynamic.token_target
        assert targets[0.5] == pytest.approx(0.6), "the recipe's own"
        assert targets[0.9] == pytest.approx(0.92)
        assert sorted(targets.values()) == [targets[key] for key in sorted(targets)]

    def test_ablations_differ_from_the_full_model_in_one_thing(self, runs):
        changes = {
            "width": {"routed": Routed.WIDTH, "token_weight": 0.0},
            "random": {"random_routers": True, "token_weight": 0.0},
            "tokens": {"routed": Routed.TOKENS, "token_target": pytest.approx(0.1875, abs=1e-4)},
        }
        for name, changed in changes.items():
            ignored = {"token_target"} | set(changed)
            for run, full in zip(runs(name), runs("lambda-0.5"), strict=True):
                assert {key: getattr(run, key) for key in changed} == changed
                assert run.model_dump(exclude=ignored) == full.model_dump(exclude=ignored)
        for run in runs("layer"):
            assert run.model.token_scope is TokenScope.LAYER

    def test_tokens_alone_aim_at_lambda_where_they_can_reach_it(self, script, runs):
        (recipe, _), row = runs("tokens"), script.ROWS["tokens"]
        model = recipe.model
        everything = model.units.counts(np.ones((1, model.units.size), bool))
        ratio = flops_ratio(model, everything, np.full((1, model.depth), recipe.token_target))
        assert ratio == pytest.approx(0.5, abs=1e-4)
        below = script.Row("", script.lowest_ratio(model) - 0.1, row.overrides)
        assert script.token_target(recipe, below) == script.LEAST_TOKENS

    def test_the_static_control_trains_as_long(self, runs):
        for scales in ((1.0, 1.0), (0.15, 0.6), (0.02, 0.02), (0.0001, 0.0001)):
            (static,), rows = runs("static-longer", *scales), runs("lambda-0.5", *scales)
            assert static.iterations == sum(run.iterations for run in rows)
            assert static.stage is Stage.STATIC and static.init == str(STATIC) and not static.model.dynamic
        assert static.learning_rate == rows[0].learning_rate and rows[0].ramp_iterations == 0

    def test_the_emoji_have_the_same_rows(self, script):
        for row in script.ROWS.values():
            recipes = script.runs_of(row, "emoji", Path("uvit.safetensors"), both())
            assert {recipe.data for recipe in recipes} == {"emoji"}
            assert all(recipe.stage is Stage.STATIC or recipe.lambda_target == row.target for recipe in recipes)
            assert all(0 < recipe.token_target < 1 for recipe in recipes)


def side(name, milliseconds, macs):
    return SideResult(
        side=Side(name=name, kind=SideKind.BUNDLE, path="x"), load_seconds=1, subnets_loaded=1,
        round_ms=(milliseconds,) * 2, step_ms=(milliseconds,), median_ms=milliseconds, min_ms=milliseconds,
        max_ms=milliseconds, peak_bytes=1, images_per_second=1, overflows=0, token_share=(0.5,), flops_ratio=(0.5,),
        macs=macs, precision="fp32",
    )  # fmt: skip


def parts(script, name, distance, milliseconds):
    """The parts of a row beside a static model of 100 ms a step."""
    found = {"quality": {"class_consistency": 0.99, "frechet_distance": distance}}
    if name not in (script.START, script.LONGER):
        sides = side("dynamic", milliseconds, 50), side(script.START, 100, 100)
        report = BenchReport(
            batch=1, cfg_scale=1, latents="run", threads=1, repeats=2, warmup=1, seed=0, steps=20, steps_measured=(0,),
            timesteps=(999,), sides=sides, comparisons=(compare_sides(*sides),), load_average=(0, 0),
            machine=Machine.here(), seconds=1,
        )  # fmt: skip
        found |= {
            "lowest_ratio": 0.385,
            "routing": {"flops_ratio": 0.51, "token_ratio": 0.6, "distinct_masks": 9},
            "latency": {"report": report.to_json()},
        }
    return {**found, "summary": script.summary(found)}


@pytest.fixture
def report(script, tmp_path):
    """A report of all rows, in which layer skipping is best, as a file."""
    distances = {"static": 0.1, "static-longer": 0.09, "lambda-0.5": 0.12, "width": 0.15, "tokens": 0.3, "random": 1.2}
    distances |= {"layer": 0.11, "lambda-0.9": 0.1, "lambda-0.8": 0.11, "lambda-0.7": 0.11, "lambda-0.4": 0.13}
    distances["lambda-0.3"] = 0.2
    rows = {name: parts(script, name, value, 62.5) for name, value in distances.items()}
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"settings": {"data": "digits"}, "rows": rows}))
    return file


def test_the_tables_of_a_report(script, report, capsys):
    assert script.main(["--markdown", str(report)]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert len({len(row) for row in cells[:10]}) == 1 and len({len(row) for row in cells[10:]}) == 1
    by_title = {row[0]: row[1:] for row in cells}
    times = ["0.510", "62.5 (100.0)", "1.60", "2.00; 80%", "99.0%"]
    assert by_title["lambda 0.4"][:7] == [*times, "0.1300", "1.30"]
    assert by_title["lambda 0.4"][7:] == ["2.63; 1.71; 36.21, 1.69", "-"]
    assert by_title["static, trained as much longer"] == ["1.000", "-", "1", "-", "99.0%", "0.0900", "0.90", "-", "-"]
    assert by_title["tokens only"] == [*times, "0.3000", "2.50", "35.12, 2.07"]
    (order,) = (line for line in lines if line.startswith("From the best"))
    ours, paper = order.split("In the paper")
    layer, full = script.ROWS["layer"].title, script.ABLATIONS[script.FULL].title
    assert ours.index(layer) < ours.index(full) and paper.index(full) < paper.index(layer)
    assert any("the FLOPs ratio is at least 0.385." in line for line in lines)
    (missed,) = (line for line in lines if line.startswith("Not within"))
    assert "lambda 0.4 (0.510)" in missed and "tokens only" not in missed and "static" not in missed


def test_ablations_without_the_full_model_stand_beside_the_static_one(script):
    rows = {name: parts(script, name, value, 50) for name, value in ((script.START, 0.1), ("width", 0.15))}
    head, _, line = [line for line in script.tables(rows, "digits").splitlines() if line.startswith("|")][-3:]
    column = [cell.strip() for cell in head.split("|")].index("÷ static, where all rows start")
    assert line.split("|")[column].strip() == "1.50"
    size(script.plot(rows, "digits"))


def test_a_report_of_some_rows_has_no_others(script):
    rows = {name: parts(script, name, 0.1, 50) for name in (script.START, "lambda-0.9")}
    text = script.tables(rows, "digits")
    assert "lambda 0.9" in text and "lambda 0.5" not in text and "Token routers" not in text
    assert "ablations" not in text
    size(script.plot(rows, "digits"))


def size(png):
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(io.BytesIO(png)) as image:
        assert np.asarray(image.convert("L")).std() > 8, "not blank"
        return image.size


def test_the_picture_follows_the_figures(script, report, tmp_path):
    plot = tmp_path / "plot.png"
    assert script.main(["--markdown", str(report), "--plot", str(plot)]) == 0
    before = plot.read_bytes()
    size(before)
    values = json.loads(report.read_text())
    values["rows"]["random"]["summary"]["frechet_distance"] = 0.5
    assert script.plot(values["rows"], "digits") != before


def test_what_is_missing_is_said(script, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main(["--work", str(tmp_path), "--data", "emoji"])
    assert "--data emoji needs --static" in capsys.readouterr().err
    assert script.main(["--work", str(tmp_path), "--static", str(tmp_path / "none.safetensors")]) == 2
    assert "none.safetensors" in capsys.readouterr().err
    dynamic = ["--static", str(ASSETS / "dydit.safetensors"), "--steps", "2", "--rows", "width"]
    assert script.main(["--work", str(tmp_path), *dynamic]) == 2
    assert "has routers; give a static model" in capsys.readouterr().err


@pytest.mark.release
def test_a_run_of_two_rows(script, tmp_path, capsys):
    work, report = tmp_path / "work", tmp_path / "report.json"
    words = ["--rows", "random", "static-longer", "--work", str(work), "--json", str(report), "--threads", "1"]
    words += [
        "--dynamic-scale",
        "0.0005",
        "--settle-scale",
        "0.0005",
        "--samples",
        "70",
        "--steps",
        "2",
        "--repeats",
        "2",
    ]
    assert script.main(words) == 0
    rows = json.loads(report.read_text())["rows"]
    assert set(rows) == {"static", "random", "static-longer"}
    assert rows["random"]["train"]["iterations"] == rows["static-longer"]["train"]["iterations"] == 3
    assert rows["random"]["summary"]["flops_ratio"] == pytest.approx(0.5, abs=0.1), "as it was drawn"
    assert rows["random"]["summary"]["allowed"] > 1.5
    files = {path: path.read_bytes() for path in work.rglob("*.json")}
    assert script.main(words) == 0
    assert files == {path: path.read_bytes() for path in work.rglob("*.json")}, "nothing is measured twice"
    with pytest.raises(SystemExit, match="other settings"):
        script.main([*words, "--samples", "80"])
    assert "| random routers |" in capsys.readouterr().out
