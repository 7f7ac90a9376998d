"""`dydit bench --all`: what takes part, what errors are measured against, and what is left on disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dydit.bench.everything import _references, _settings
from dydit.bundle.manifest import PlanKind
from dydit.bundle.stored_weights import Precision
from dydit.reports.bench_report import BenchReport, Side, SideKind
from dydit.runtime.backends.registry import BACKENDS

FEW = ["--labels", "1,2", "--steps-measured", "2", "--repeats", "1", "--threads", "1"]


def test_all_that_is_installed_takes_part(run, make_bundle, tmp_path: Path, monkeypatch) -> None:
    bundle, out = make_bundle(), tmp_path / "out"
    for name in ("torch", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    done = run("bench", bundle.path, "--all", *FEW, "--out", out)
    assert (done.code, done.err) == (0, "")
    lines, name = done.out.splitlines(), f"{bundle.path.name} on onnxruntime"
    words = lines[1].removeprefix(name).split()
    assert (words[0], words[2:]) == ("fp32", ["1.00\u00d7", "reference"])
    assert [line.partition(":")[0] for line in lines[-3:-1]] == ["torch was not run", "openvino was not run"]
    report = BenchReport.parse(json.loads((out / "bench.json").read_text()))
    assert report.reference == name and [each.name for each in report.not_run] == ["torch", "openvino"]
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.png"]
    refused = run("bench", bundle.path, "--all", "--backend", "onnxruntime", "--out", tmp_path / "no")
    assert refused.code == 2 and "--all times every backend; remove --backend" in refused.err


@pytest.mark.release
def test_a_checkpoint_gives_the_other_precisions(run, make_checkpoint, make_bundle, tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "out", make_checkpoint().path
    bundle = make_bundle(plan=PlanKind.DYNAMIC_WIDTH)
    done = run("bench", bundle.path, "--all", "--against", checkpoint, *FEW, "--out", out)
    assert done.code == 0, done.err
    report = BenchReport.parse(json.loads((out / "bench.json").read_text()))
    assert report.reference == "pytorch-masked" and sorted(path.name for path in out.iterdir()) == [
        "bench.json",
        "bench.png",
    ]
    ran, left_out = {each.side.name for each in report.sides}, {each.name for each in report.not_run}
    names = [bundle.path.name, "fp16", "bf16", "int8"]
    asked = {f"{name} on {backend}" for name in names for backend in BACKENDS}
    assert ran | left_out == asked | {"pytorch-masked"} and {"bf16 on onnxruntime", "int8 on torch"} <= left_out
    for each in report.sides:
        assert each.relative_l2 < (1e-5 if each.precision == "fp32" else 0.1)
        assert each.side.path == str(bundle.path if each.side.name.startswith(names[0]) else checkpoint)


def test_the_reference_is_pytorch_or_an_fp32_bundle() -> None:
    sides = [Side(name=name, kind=SideKind.BUNDLE, path=name) for name in ("int8", "fp32")]
    precisions = {"int8": Precision.INT8, "fp32": Precision.FP32}
    assert _references(sides, precisions) == ["fp32", "int8"]
    masked = Side(name="masked", kind=SideKind.TORCH_MASKED, path="c")
    assert _references([*sides, masked], precisions) == ["masked", "fp32", "int8"]


@pytest.mark.parametrize("plan", PlanKind)
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.INT8])
def test_an_export_is_as_its_bundle_but_for_the_precision(make_bundle, plan: PlanKind, precision: Precision) -> None:
    memory = {"memory_budget": 1 << 30} if plan is PlanKind.MEMORY_BUDGET else {}
    manifest = make_bundle(plan=plan, max_batch=5, cfg_channels=2, sampler="ddim", **memory).manifest
    config = _settings(manifest, manifest.sampling.config, precision)
    assert (config.steps, config.sampler, config.max_batch, config.cfg_channels) == (12, "ddim", 5, 2)
    assert config.precision is precision and config.routing is manifest.routing
    kept = {PlanKind.PER_STEP: PlanKind.PER_STEP, PlanKind.DYNAMIC_WIDTH: PlanKind.DYNAMIC_WIDTH}
    expected = kept.get(plan, PlanKind.MAX_SUBNETS)
    if expected is PlanKind.DYNAMIC_WIDTH and precision is Precision.INT8:
        expected = PlanKind.PER_STEP
    assert config.plan is expected
