"""The doctor tries what it can, survives what crashes, and names the command that mends."""

from __future__ import annotations

import json
import sys

import numpy as np
import onnx
import pytest

from dydit.doctor import probes as doctor_probes
from dydit.doctor.doctor import EXTRAS, DoctorReport, memory_bytes, run_doctor
from dydit.doctor.probes import PROBES, Finding, Unavailable, attempt, run_probe
from tests.fixtures.packages import needs_openvino

STATUS = [
    ["onnxruntime", True, "onnxruntime 9"],
    ["torch", False, "broken"],
    ["tensorrt", False, "not in this version"],
]


def fake(**findings):
    """Every probe works, but for those given."""

    def probe(name):
        if name == "registry":
            return Finding(ok=True, detail=json.dumps(STATUS))
        return findings.get(name.replace("-", "_"), Finding(ok=True, detail=f"{name} works"))

    return probe


def row(rows, name):
    return next(each for each in rows if each.name == name)


def test_the_embedded_graph_is_what_it_says():
    model = onnx.load_from_string(doctor_probes._GRAPH)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["MatMul"]
    assert model.ir_version == 11 and model.opset_import[0].version == 23


def test_what_is_here_is_tried_and_works():
    for name, words in (("onnxruntime-cpu", "ran a graph in"), ("torch-cpu", " thread")):
        finding = attempt(name)
        assert finding.ok and words in finding.detail and finding.fix is None
    assert [entry[0] for entry in json.loads(attempt("registry").detail)][:2] == ["onnxruntime", "torch"]


@pytest.mark.parametrize("name", list(PROBES))
def test_every_probe_answers_in_one_line(name):
    finding = attempt(name)
    assert finding.detail and "\n" not in finding.detail and len(finding.detail) < 600


@pytest.mark.parametrize(
    ("module", "probe", "fix"),
    [
        ("onnxruntime", "onnxruntime-cpu", "pip install 'dydit[cpu]'"),
        ("onnxruntime", "onnxruntime-cuda", "pip install 'dydit[gpu]'"),
        ("torch", "torch-cpu", "pip install 'dydit[export]'"),
        ("openvino", "openvino-cpu", "pip install 'dydit[openvino]'"),
        ("tensorrt", "tensorrt", "pip install 'dydit[tensorrt]'"),
        ("tensorrt_rtx", "tensorrt-rtx", "pip install 'dydit[tensorrt-rtx]'"),
        ("pycuda.driver", "driver-package", "pip install 'dydit[gpu]'"),
    ],
)
def test_a_missing_package_names_the_command(monkeypatch, module, probe, fix):
    for name in (module, "cuda.bindings.driver") if probe == "driver-package" else (module,):
        monkeypatch.setitem(sys.modules, name, None)
    finding = attempt(probe)
    assert not finding.ok and finding.fix == fix and module.split(".")[0] in finding.detail


@needs_openvino
def test_so_does_openvino(monkeypatch):
    finding = attempt("openvino-cpu")
    assert finding.ok and "devices: cpu" in finding.detail and "ran a graph in" in finding.detail
    monkeypatch.setattr(doctor_probes, "_X", np.ones((2, 2), np.float32) * np.nan)
    assert not attempt("openvino-cpu").ok


def test_wrong_numbers_are_noticed(monkeypatch):
    monkeypatch.setattr(doctor_probes, "_X", np.ones((2, 2), np.float32) * np.nan)
    assert not attempt("onnxruntime-cpu").ok and not attempt("torch-cpu").ok


def test_a_broken_library_is_a_finding(monkeypatch):
    class Broken:
        __version__ = "1.0"

        class Logger:
            ERROR = 1

            def __init__(self, _):
                pass

        def Builder(self, _):
            raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setitem(sys.modules, "tensorrt", Broken())
    finding = attempt("tensorrt")
    assert not finding.ok and "cannot create a builder" in finding.detail and "GPU" in finding.fix


def test_a_crash_or_a_hang_costs_one_line():
    crashed = run_probe("no such probe")
    assert not crashed.ok and "crashed (exit code 1)" in crashed.detail and "KeyError" in crashed.detail
    late = run_probe("torch-cpu", seconds=0.01)
    assert not late.ok and "did not answer" in late.detail


def test_a_child_answers():
    assert run_probe("onnxruntime-cpu").ok


def test_trials_overrule_what_the_registry_says():
    report = run_doctor(fake(onnxruntime_cpu=Finding(ok=False, detail="illegal instruction", fix="pip install X")))
    assert not row(report.backends, "onnxruntime").ok and row(report.backends, "torch").ok
    assert row(report.backends, "tensorrt").detail == "not in this version"
    assert report.ok and report.text().endswith("backends that run bundles here: torch")
    assert "no  onnxruntime  illegal instruction  ->  pip install X" in report.text()


def test_a_backend_whose_library_fails_its_trial_is_not_ready(monkeypatch):
    ready = [["onnxruntime", True, "here"], ["tensorrt", True, "tensorrt 11"]]
    monkeypatch.setattr(f"{__name__}.STATUS", ready)
    assert row(run_doctor(fake()).backends, "tensorrt").ok
    broken = run_doctor(fake(tensorrt=Finding(ok=False, detail="cannot create a builder", fix="a GPU")))
    assert not row(broken.backends, "tensorrt").ok and row(broken.backends, "tensorrt").fix == "a GPU"


def test_nothing_works():
    bad = Finding(ok=False, detail="gone")
    report = run_doctor(fake(onnxruntime_cpu=bad, torch_cpu=bad))
    assert not report.ok and report.text().endswith("no backend works here")


def test_without_a_driver_packages_are_not_enough():
    missing = Finding(ok=False, detail="no package", fix="pip install 'dydit[gpu]'")
    with_driver = run_doctor(fake(driver_package=missing))
    without = run_doctor(
        fake(driver_package=missing, driver=Finding(ok=False, detail="no driver", fix="an NVIDIA GPU"))
    )
    assert row(with_driver.devices, "driver-package").fix == "pip install 'dydit[gpu]'"
    assert row(without.devices, "driver-package").fix == "pip install 'dydit[gpu]', on a machine with a GPU"
    assert row(without.devices, "driver").fix == "an NVIDIA GPU"
    rtx = Finding(ok=False, detail="no tensorrt_rtx", fix="pip install rtx")
    without = run_doctor(fake(tensorrt_rtx=rtx, driver=Finding(ok=False, detail="no driver")))
    assert row(without.devices, "tensorrt-rtx").fix == "pip install rtx", "it builds without a GPU"


def test_what_builds_engines_and_what_is_missing_to_run_them_is_said():
    gone = Finding(ok=False, detail="no driver")
    both = "TensorRT engines can be built here by: tensorrt, tensorrt-rtx; they can also be run here"
    assert run_doctor(fake()).engines == both
    no_gpu = run_doctor(fake(driver=gone, driver_package=Finding(ok=False, detail="no package")))
    needs = "running them here needs an NVIDIA GPU and its driver and PyCUDA or cuda-bindings"
    said = f"TensorRT engines can be built here by: tensorrt-rtx; {needs}"
    assert no_gpu.engines == said, "tensorrt builds on the GPU alone"
    assert f"\n\n{said}\nbackends that run bundles here:" in no_gpu.text()
    assert run_doctor(fake(driver_package=gone)).engines.endswith(
        "tensorrt-rtx; running them here needs PyCUDA or cuda-bindings"
    )


def test_where_nothing_builds_engines_the_flavour_that_needs_no_gpu_is_named():
    gone = Finding(ok=False, detail="no driver")
    rtx = Finding(ok=False, detail="tensorrt_rtx cannot be imported", fix="pip install rtx")
    report = run_doctor(fake(driver=gone, tensorrt_rtx=rtx))
    assert report.engines == (
        "TensorRT engines cannot be built here; tensorrt-rtx, which builds without a GPU, is not available: "
        "tensorrt_rtx cannot be imported  ->  pip install rtx"
    )


def test_an_engine_is_built_without_a_gpu():
    pytest.importorskip("tensorrt_rtx")
    finding = attempt("tensorrt-rtx")
    assert finding.ok and "built an engine in" in finding.detail


@pytest.mark.parametrize("probe", ["tensorrt", "tensorrt-rtx"])
def test_tensorrt_without_what_drives_it_is_no_help(monkeypatch, probe):
    class Whole:
        __version__ = "1.0"

        class Logger:
            ERROR = 1

            def __init__(self, _):
                pass

        def Builder(self, _):
            return self

    monkeypatch.setitem(sys.modules, probe.replace("-", "_"), Whole())
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    finding = attempt(probe)
    assert not finding.ok and finding.fix == f"pip install 'dydit[{probe}]'"
    assert finding.detail.endswith("1.0 is installed, but polygraphy, which dydit uses with it, is not")


def test_extras_that_are_missing_are_named(monkeypatch):
    for name in ("jinja2", "diffusers"):
        monkeypatch.setitem(sys.modules, name, None)
    rows = {each.name: each for each in run_doctor(fake()).extras}
    assert set(rows) == set(EXTRAS)
    assert rows["report"].fix == "pip install 'dydit[report]'" and "jinja2 missing" in rows["report"].detail
    assert rows["export"].ok and rows["export"].fix is None and "onnx " in rows["export"].detail


def test_the_report_is_data_and_text():
    report = run_doctor(fake())
    assert DoctorReport.parse(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report
    text = report.text()
    assert all(word in text for word in ("machine", "Python", "numpy", "backends", "GPU", "extras"))
    assert report.memory_bytes == memory_bytes() > 1 << 28


def test_unavailable_keeps_its_fix():
    assert Unavailable("what", "fix").fix == "fix" and Unavailable("what").fix is None
