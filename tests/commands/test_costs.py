"""`dydit export --cost` and `--memory-budget` as people use them: what is measured is said and kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dydit
from dydit.bench.timing import settled_bytes
from dydit.bundle.bundle import Bundle
from dydit.cli import main

DIGITS = Path(dydit.__file__).parent / "assets" / "digits" / "dydit.safetensors"
FEW_STEPS = ["--steps", "10"]
needs_smaps = pytest.mark.skipif(settled_bytes() is None, reason="this system has no /proc/self/smaps_rollup")


def export(out: Path, *options: str) -> int:
    return main(["export", str(DIGITS), "--out", str(out), *FEW_STEPS, *options])


def test_a_plan_by_measured_times(tmp_path, capsys):
    code = export(tmp_path / "out", "--cost", "measured", "--max-subnets", "3", "--cost-batch", "2", "--json")
    if code == 2:  # a measurement that says nothing is refused, and a busy machine may give such a one
        assert "the times measured here do not grow with the number of" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
        pytest.skip("this machine is too busy to measure on")
    assert code == 0
    plan, manifest = json.loads(capsys.readouterr().out)["plan"], Bundle.open(tmp_path / "out").manifest
    assert plan["measured"]["times"]["rows"] == 4 and plan["measured"]["residency"] is None
    assert plan["measured"] == manifest.plan.measured.model_dump(mode="json")
    assert main(["inspect", str(tmp_path / "out"), "--out", str(tmp_path / "pictures")]) == 0
    assert "According to a profile on onnxruntime" in capsys.readouterr().out


@needs_smaps
def test_a_budget_is_measured_memory(tmp_path, capsys):
    assert export(tmp_path / "out", "--memory-budget", "1GB") == 0  # more than this model takes anywhere
    assert "all subnetworks loaded on onnxruntime take " in capsys.readouterr().out
    measured = Bundle.open(tmp_path / "out").manifest.plan.measured
    assert measured.times is None and 0 < measured.resident_bytes <= 10**9


def test_where_memory_cannot_be_measured_weights_count_and_this_is_said(tmp_path, capsys):
    assert export(tmp_path / "out", "--memory-budget", "40MB", "--precision", "bf16") == 0
    assert (
        "The memory budget was compared with the size of the weights, not with measured memory: "
        in capsys.readouterr().out
    )
    assert Bundle.open(tmp_path / "out").manifest.plan.measured is None


def test_a_model_of_one_head_has_nothing_to_measure(tmp_path, run, make_checkpoint, small_config):
    single = make_checkpoint(small_config.model_copy(update={"num_heads": 1})).path
    reason = "a unit group with one unit has only one width, so nothing can be measured"
    done = run("export", single, "--out", tmp_path / "out", *FEW_STEPS, "--memory-budget", "1GB")
    assert done.code == 0 and f"size of the weights, not with measured memory: {reason}" in done.out, done.err
    done = run("export", single, "--out", tmp_path / "measured", *FEW_STEPS, "--cost", "measured")
    assert done.code == 2 and f"{reason}; use --cost macs" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cost", "measured", "--dynamic-width"], "--cost measured has no effect with --per-step or --dynamic-width"),
        (["--cost", "measured", "--per-step"], "--cost measured has no effect with --per-step or --dynamic-width"),
        (["--cost", "measured", "--precision", "bf16"], "onnxruntime has no bf16 matrix products on the CPU"),
        (["--cost", "measured", "--cost-batch", "17"], "cannot measure a batch of 17: the export allows at most 16"),
        (["--cost", "guessed"], "'guessed' is not one of 'macs', 'measured'"),
        pytest.param(["--memory-budget", "1kB"], "1000 bytes: the smallest plan needs", marks=needs_smaps, id="budget"),
    ],
)
def test_refusals(tmp_path, run, options, message):
    done = run("export", DIGITS, "--out", tmp_path / "out", *FEW_STEPS, *options)
    assert done.code == 2 and message in done.err and len(done.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
