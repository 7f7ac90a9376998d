"""The table of a GPU: a dry run on the CPU, end to end, stopped in between; what fails costs one cell; the bounds."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dydit.models.config import ModelConfig, preset

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
MODULES = tuple(path.stem for path in FOLDER.glob("*.py") if path.stem != "child")
SECONDS = 3600  # against a test that never ends; a dry run takes minutes


@pytest.fixture
def gpu(monkeypatch):
    """The folder's modules by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        sys.modules.pop(name, None)


def start(*words):
    return subprocess.Popen(
        [sys.executable, str(FOLDER / "run.py"), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def running(pid):
    """Whether a process is there, and not only waits for its parent to ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """A dry run that was killed after a few cells and then went on: what was there then, and what there is now."""
    folder = tmp_path_factory.mktemp("gpu")
    work, out = folder / "work", folder / "out"
    words = ("--work", work, "--dry-run")
    process, deadline = start(*words), time.monotonic() + SECONDS
    try:
        while time.monotonic() < deadline:
            if (work / "gpu.json").exists() and len(json.loads((work / "gpu.json").read_text())["cells"]) >= 4:
                break
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    killed = json.loads((work / "gpu.json").read_text())
    process = start(*words, "--out", out)
    printed, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    report = json.loads((out / "gpu.json").read_text())
    return SimpleNamespace(killed=killed, report=report, printed=printed, said=said, out=out, work=work)


def test_a_few_cells_run_and_the_next_run_goes_on(gpu, tmp_path):
    """The dry run's first steps; all of it is `TestDryRun`, for a release."""
    settings, work = gpu.settings.dry_settings(), gpu.settings.Work(tmp_path)
    names = ("small bundles", "run: onnxruntime fp32", "run: tensorrt fp32")
    chosen = [cell for cell in gpu.cells.cells(settings) if cell.name in names]
    assert tuple(cell.name for cell in chosen) == names
    gpu.run.Runner(settings, work, None).run(chosen[:1])
    before = json.loads(work.report.read_text())["cells"]
    runner = gpu.run.Runner(settings, work, None)
    runner.run(chosen)
    cells = json.loads(work.report.read_text())["cells"]
    assert cells["small bundles"] == before["small bundles"], "nothing is done twice"
    assert [cells[name]["status"] for name in names] == ["done", "done", "not run"], cells
    assert cells["run: tensorrt fp32"]["reason"] == gpu.cells.NO_GPU
    parts = cells["run: onnxruntime fp32"]["parts"]
    assert parts["step"]["holds"] and parts["run"]["holds"] and parts["whole"]["steps"] == 12
    gpu.run.write_out(runner.report, tmp_path / "out")
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert text.startswith("## CPU (dry run: these are not figures of a GPU)") and "None" not in text


@pytest.mark.release
class TestDryRun:
    def test_a_killed_run_goes_on_where_it_was(self, dry):
        before, after = dry.killed["cells"], dry.report["cells"]
        assert 4 <= len(before) < len(after)
        assert all(after[name] == cell for name, cell in before.items()), "nothing is measured twice"
        assert f"[{len(before) + 1}/" in dry.said and f"[{len(before)}/" not in dry.said
        assert after == json.loads((dry.work / "gpu.json").read_text())["cells"]

    def test_it_claims_nothing_about_a_gpu(self, dry):
        report = dry.report
        assert (report["dry_run"], report["device"]) == (True, "cpu")
        assert report["settings"]["gpu"] is None
        clocks = {row["clock"] for row in report["rows"] if "ms" in row}
        assert clocks == {"host clock"}
        assert all(row["memory_bytes"] is None for row in report["rows"] if "ms" in row)
        assert dry.printed.startswith("## CPU (dry run: these are not figures of a GPU)")
        assert "on the CPU:" in dry.printed and "on the GPU:" not in dry.printed

    def test_every_cell_has_an_outcome_and_the_reason_for_it(self, dry, gpu):
        cells = dry.report["cells"]
        assert list(cells) == [cell.name for cell in gpu.cells.cells(gpu.settings.dry_settings())]
        assert {cell["stage"] for cell in cells.values()} == set(gpu.cells.STAGES)
        for name, cell in cells.items():
            needs_gpu = any(word in name for word in ("graphs", "rtx", "tensorrt"))
            if needs_gpu or cell["status"] != "done":
                assert cell["status"] == "not run" and cell["parts"] == {}, (name, cell)
                assert (cell["reason"] == gpu.cells.NO_GPU) is needs_gpu and cell["reason"], name
        assert sum(cell["status"] == "done" for cell in cells.values()) >= 17

    def test_what_runs_gives_the_pictures_of_the_cpu(self, dry, gpu):
        for way, precision in gpu.cells.DRY_RUNS:
            parts = dry.report["cells"][f"run: {way} {precision}"]["parts"]
            assert parts["step"]["holds"] and parts["run"]["holds"] and parts["whole"]["steps"] == 12
            assert parts["run"]["decibels"] is (precision == "fp16")
            if precision == "fp16":
                assert parts["step"]["median"] > 1e-5, "really another precision"
        parts = dry.report["cells"]["parity: torch fp32"]["parts"]
        assert parts["ok"] and [hop["status"] for hop in parts["hops"]] == ["passed"] * 5

    def test_every_side_is_timed_beside_its_dense_model_and_held_against_both_bounds(self, dry):
        rows = {(row["way"], row["side"]): row for row in dry.report["rows"]}
        assert len(rows) == len(dry.report["rows"])
        for way in ("torch-resident", "torch", "onnxruntime", "ort-loop", "pytorch"):
            sides = {side: row for (each, side), row in rows.items() if each == way and "ms" in row}
            assert set(sides) == {
                "pytorch": {"eager static", "eager masked"},
                "ort-loop": {"dense", "merged-16"},
                "torch": {"dense", "merged-16"},
            }.get(way, {"dense", "merged-16", "merged-32", "sliding", "per-step"})
            for side, row in sides.items():
                dense = side in ("dense", "eager static")
                assert row["ms"] > 0 and row["rounds"] == 2 and row["steps"] == (6 if way == "ort-loop" else 2)
                assert row["images_per_second"] == pytest.approx(1e3 * 2 / (6 * row["ms"]))
                assert (row["speedup"] is None) is dense
                assert row["macs_share"] == pytest.approx(row["macs_ms"] / row["ms"]) and row["memory_share"] > 0
        dense, dynamic = rows["torch", "dense"], rows["onnxruntime", "per-step"]
        assert dynamic["macs_ms"] < 0.8 * dense["macs_ms"] and dynamic["memory_ms"] < dense["memory_ms"]
        assert rows["torch", "merged-16"]["macs_ms"] == dynamic["macs_ms"], "what a step asks for is no plan's affair"

    def test_the_ceilings_say_how_they_were_taken(self, dry):
        parts = dry.report["cells"]["ceilings"]["parts"]
        for name in ("product bf16", "product fp16", "product fp32", "copy"):
            figure = parts[name]["gb_per_s" if name == "copy" else "tflops"]
            assert figure == max(each["gb_per_s" if name == "copy" else "tflops"] for each in parts[name]["tried"]) > 0
            assert (parts[name]["warmup"], parts[name]["rounds"], parts[name]["statistic"]) == (5, 20, "median")

    def test_the_profile_is_that_of_the_fastest_in_pytorch(self, dry):
        ours = [row for row in dry.report["rows"] if row["way"].startswith("torch") and row["side"] != "dense"]
        fastest = min((row for row in ours if "ms" in row), key=lambda row: row["ms"])
        parts = dry.report["cells"]["kernels: best of PyTorch"]["parts"]
        assert parts["of"] == {name: fastest[name] for name in ("way", "side", "batch")}
        kernels = parts["kernels"]
        assert 5 < len(kernels) <= 15 and kernels == sorted(kernels, key=lambda row: -row["ms"])
        assert sum(row["share"] for row in kernels) <= 1.0001 and any("mm" in row["kernel"] for row in kernels)

    def test_without_the_time_for_more_the_first_round_is_the_figure(self, dry, gpu):
        told, work = {}, gpu.settings.Work(dry.work)
        words = ("onnxruntime", ["dense", "merged-16", "unheard-of"], 2)
        gpu.speed.measure(gpu.settings.dry_settings(), work, told.__setitem__, *words, seconds=0)
        for side in ("dense", "merged-16"):
            assert (told[side]["warmup"], len(told[side]["round_ms"])) == (0, 1)
            assert told[side]["ms"] == told[side]["first_round_ms"]
        assert told["unheard-of"] == {"not_run": "its bundle was not made"}

    def test_engines_are_built_before_the_gpu_is_asked_for(self, dry, gpu):
        if importlib.util.find_spec("tensorrt_rtx") is None or importlib.util.find_spec("polygraphy") is None:
            pytest.skip("TensorRT for RTX is not installed: pip install 'dydit[tensorrt-rtx]'")
        if gpu.run.present_gpu() is not None:
            pytest.skip("there is a GPU: the engines run")
        settings, work = gpu.settings.dry_settings(), gpu.settings.Work(dry.work)
        outcome = gpu.run.run_child("way", {"way": "rtx", "precision": "fp16"}, settings, work, "engines", SECONDS)
        assert outcome["parts"] == {"built": True} and outcome["status"] == "failed"
        assert outcome["reason"].startswith("TensorRT engines need an NVIDIA GPU, but no driver or GPU was found here")
        assert len(list(work.small("fp16", "small-rtx").glob("engines/*/*.engine"))) == 5

    def test_tables_and_picture_are_written(self, dry):
        text = (dry.out / "gpu.md").read_text()
        assert dry.printed.strip() == text.strip()
        for word in (
            "What is installed",
            "The two ceilings",
            "What runs",
            "`dydit parity`",
            "How fast",
            "Where the time",
        ):
            assert word in text
        tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
        assert len(tables) >= 7
        for table in tables:
            assert len({line.replace("\\|", "").count("|") for line in table}) == 1, table[0]
        assert text.count("no NVIDIA GPU (dry run)") > 10 and "None" not in text
        assert (dry.out / "gpu.png").read_bytes().startswith(b"\x89PNG")


class TestRunner:
    def test_a_cell_that_crashes_keeps_what_it_said(self, gpu, tmp_path, monkeypatch):
        child = tmp_path / "child.py"
        child.write_text(
            "import json, os\nprint(json.dumps({'part': 'first', 'value': 1}), flush=True)\n"
            "os.write(2, b'out of luck\\n')\nprint('{\"part\": ', flush=True, end='')\nos.abort()\n"
        )
        monkeypatch.setattr(gpu.run, "CHILD", child)
        work = gpu.settings.Work(tmp_path)
        outcome = gpu.run.run_child("ceilings", {}, gpu.settings.dry_settings(), work, "a cell", SECONDS)
        assert outcome["parts"] == {"first": 1} and outcome["status"] == "failed"
        assert outcome["reason"] == f"its process ended with exit code {-signal.SIGABRT}: out of luck"

    def test_a_cell_that_hangs_ends_with_all_that_it_started(self, gpu, tmp_path, monkeypatch):
        child = tmp_path / "child.py"
        child.write_text(
            "import json, subprocess, time\nother = subprocess.Popen(['sleep', '600'])\n"
            "print(json.dumps({'part': 'pid', 'value': other.pid}), flush=True)\ntime.sleep(600)\n"
        )
        monkeypatch.setattr(gpu.run, "CHILD", child)
        settings, work = gpu.settings.dry_settings(), gpu.settings.Work(tmp_path)
        for limit in (1, 10, 100):  # on a loaded machine it may take longer until it says anything
            outcome = gpu.run.run_child("x", {}, settings, work, "a cell", limit)
            assert (outcome["status"], outcome["reason"]) == ("failed", f"stopped after {limit} s")
            if "pid" in outcome["parts"]:
                break
        deadline = time.monotonic() + SECONDS
        while running(outcome["parts"]["pid"]):  # it dies when it is next given a turn
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def test_errors_are_one_line_and_the_cell_fails(self, gpu, tmp_path):
        arguments = {"way": "torch", "precision": "fp32"}
        work = gpu.settings.Work(tmp_path)
        outcome = gpu.run.run_child("way", arguments, gpu.settings.dry_settings(), work, "a cell", SECONDS)
        assert outcome["status"] == "failed" and str(tmp_path) in outcome["reason"] and "\n" not in outcome["reason"]

    def test_without_time_cells_are_left_for_the_next_run(self, gpu, tmp_path):
        settings, work = gpu.settings.dry_settings(), gpu.settings.Work(tmp_path)
        chosen = [cell for cell in gpu.cells.cells(settings) if cell.stage == "runs"]
        runner = gpu.run.Runner(settings, work, minutes=0)
        runner.run(chosen)
        statuses = {name: cell["status"] for name, cell in runner.report.cells.items()}
        assert statuses["small bundles"] == "left" and statuses["run: tensorrt fp32"] == "not run"
        again = gpu.run.Runner(settings, work, minutes=None)
        assert again.report.cells == runner.report.cells
        assert statuses["small bundles"] not in again._settled and "failed" in again._settled
        assert "failed" not in gpu.run.Runner(settings, work, None, retry=True)._settled

    def test_what_doctor_misses_is_the_reason(self, gpu, tmp_path):
        settings = gpu.settings.Settings(model="XL/2", gpu="a GPU (compute capability 9.0)")
        runner = gpu.run.Runner(settings, gpu.settings.Work(tmp_path), None)
        rows = [{"name": name, "ok": name != "pycuda", "detail": f"{name} is so"} for name in ("driver", "pycuda")]
        runner.report.cells["installed"] = {"status": "done", "parts": {"doctor": {"devices": rows}}}
        runner.report.cells["small bundles"] = {"status": "done"}
        found = {cell.name: runner._obstacle(cell) for cell in gpu.cells.cells(settings)}
        assert found["run: torch fp32"] is None
        assert found["run: ort-graphs fp32"] == "pycuda: pycuda is so"
        assert found["speed: torch core batch 8"] is None
        models = runner.report.cells["models"] = {"status": "failed"}
        cell = next(each for each in gpu.cells.cells(settings) if each.name == "speed: torch core batch 8")
        assert runner._obstacle(cell) == "needs the cell 'models': failed"
        models["status"] = "left"
        assert runner._obstacle(cell) is None and runner._waits_for(cell) == "models", "the next run may have it"
        assert runner._outcome(cell)["status"] == "left"

    def test_another_run_is_not_mixed_in(self, gpu, tmp_path, capsys):
        settings = gpu.settings.dry_settings().model_copy(update={"model": "S/2"})
        gpu.run.Runner(settings, gpu.settings.Work(tmp_path), 0).run(gpu.cells.cells(settings)[:1])
        assert gpu.run.main(["--work", str(tmp_path), "--dry-run"]) == 2
        assert "was measured with model S/2, not tiny; choose another --work" in capsys.readouterr().err

    def test_without_a_gpu_it_says_so(self, gpu, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(gpu.run, "present_gpu", lambda: None)
        assert gpu.run.main(["--work", str(tmp_path / "work")]) == 2
        assert "no NVIDIA GPU or driver on this machine; --dry-run" in capsys.readouterr().err
        assert not (tmp_path / "work").exists()


def test_the_order_gives_every_way_a_row_before_any_gets_more(gpu):
    settings = gpu.settings.Settings(model="XL/2", gpu="a GPU")
    timed = [cell.arguments for cell in gpu.cells.cells(settings) if cell.kind == "speed"]
    ways = {each["way"] for each in timed}
    first = timed[: len(ways)]
    assert {each["way"] for each in first} == ways and {each["batch"] for each in first} == {8}
    assert settings.by_worth() == (8, 32, 1)
    assert {(each["way"], side, each["batch"]) for each in timed for side in each["sides"]} >= {
        (way, side, batch) for way in ways - {"pytorch"} for side in gpu.settings.PLANS for batch in (1, 8, 32)
    }


class TestBounds:
    CONFIG = ModelConfig(hidden_size=8, depth=1, num_heads=2, patch_size=2, input_size=4, in_channels=4, num_classes=3)

    def test_by_hand(self, gpu):
        """N = 4, D = 8, hd = 4, gd = 16; one head and both groups on, half of the tokens; B = 3, R = 6; 2 bytes."""
        masks = np.array([[True, False, True, True]])
        work = gpu.bounds.step_work(self.CONFIG, masks, np.array([[0.5]]), 3, 2)
        attention, mlp, ends = 4 * 4 * 64 + 2 * 16 * 8, 8 * 4 * 64, 4 * 8 * 4 * (4 + 8)
        assert (attention, mlp, ends) == (1280, 2048, 1536)
        assert work.macs == 6 * (1280 / 2 + 2048 / 2 + 1536) == 19200
        assert work.weight_bytes == 2 * (4 * 4 * 8 + 2 * 32 * 8) + 4 * (4 * 12 * 8 + 4 * 8 + 8 * 1) == 2976
        assert work.input_bytes == 4 * (6 * 8 * 8 + 3 * 3 * 4 * 16) == 3840
        stream, inside = 4 * 4 * 8 * (2 + 2 * 0.5 + 1), 2 * 2 * 4 * (8 + 4 * 4 + 0.5 * (8 + 32))
        assert work.activation_bytes == 6 * (stream + inside) == 7296
        assert work.macs_ms(0.0384) == pytest.approx(1e-3) and work.memory_ms(14.112) == pytest.approx(1e-3)

    def test_steps_are_averaged(self, gpu):
        one, all_on = np.zeros((1, 4), bool), np.ones((1, 4), bool)
        works = [gpu.bounds.step_work(self.CONFIG, each, np.array([[1.0]]), 1, 2) for each in (one, all_on)]
        both = gpu.bounds.step_work(self.CONFIG, np.concatenate([one, all_on]), np.ones((2, 1)), 1, 2)
        for name, value in both.to_json().items():
            assert value == pytest.approx(sum(each.to_json()[name] for each in works) / 2)

    def test_dense_xl(self, gpu):
        """The published 1.50994944 G and 2.717908992 G a block."""
        work = gpu.bounds.dense_work(preset("XL/2"), 1, 2)
        assert work.macs == 2 * (28 * (1509949440 + 2717908992) + 256 * 1152 * 4 * 12)
        assert work.weight_bytes > 2 * 28 * 12 * 1152**2, "twelve matrices a block, in two bytes"


def test_libraries_are_found_where_the_loader_looks(gpu, tmp_path, monkeypatch):
    (tmp_path / "libnvinfer.so.10").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{tmp_path}")
    assert str(tmp_path / "libnvinfer.so.10") in gpu.facts.tensorrt_libraries()
    assert os.environ["LD_LIBRARY_PATH"].endswith(str(tmp_path))


def test_figures_of_a_side_that_failed_later_stay(gpu, tmp_path):
    settings = gpu.settings.Settings(model="XL/2", gpu="a GPU (compute capability 9.0)", steps=250)
    report = gpu.results.Report(tmp_path / "gpu.json", settings)
    side = {"round_ms": [10.0], "memory_bytes": 1 << 30, "clock": "CUDA events", "steps": 12, "repeated_steps": 0}
    side |= {"alone": False, "warmup": 1}
    arguments = {"way": "torch-resident", "sides": ["dense", "merged-16", "sliding"], "batch": 32}
    parts = {"dense": {"ms": 20.0, **side}, "merged-16": {"ms": 10.0, **side}, "sliding": {"error": "out of memory"}}
    report.cells["speed"] = {"arguments": arguments, "status": "failed", "reason": "exit code -11", "parts": parts}
    work = {"macs": 5e12, "weight_bytes": 1e9, "input_bytes": 0.5e9, "activation_bytes": 8.5e9}
    report.cells["models"] = {"arguments": {}, "parts": {"work": {"32": {"dense": work, "dynamic": work}}}}
    report.cells["ceilings"] = {
        "arguments": {},
        "parts": {"product fp16": {"tflops": 1000.0}, "copy": {"gb_per_s": 2000.0}},
    }
    dense, merged, sliding = gpu.results.speed_rows(report)
    assert (dense["speedup"], merged["speedup"]) == (None, 2.0)
    assert merged["images_per_second"] == pytest.approx(32 / (250 * 0.010))
    assert (merged["macs_ms"], merged["memory_ms"]) == (pytest.approx(10.0), pytest.approx(5.0))
    assert (merged["macs_share"], merged["memory_share"]) == (pytest.approx(1.0), pytest.approx(0.5))
    assert sliding["reason"] == "failed: out of memory" and "ms" not in sliding
