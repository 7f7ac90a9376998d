"""The GPU benchmark on the CPU: a few of its tasks, what a failing task costs, the time budget, and its tables."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
SECONDS = 3600  # so that a hanging test ends


@pytest.fixture
def gpu(gpu_scripts):
    """The folder's modules by name."""
    return gpu_scripts


@pytest.fixture
def make_runner(gpu, tmp_path):
    """`make_runner(code, ...)`: a runner whose tasks run the Python program `code`; `folder` is that of the results."""

    def make(code="", minutes=None, retry=False, settings=gpu.tasks.DRY):
        work = gpu.tasks.Work(tmp_path)
        program = f"import sys\nfrom pathlib import Path\nfolder = Path({str(tmp_path / 'results')!r})\n{code}"
        return gpu.run.Runner(settings, work, [sys.executable, "-c", program], minutes, retry)

    return make


def running(pid):
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def on_a_gpu(gpu, **values):
    return gpu.tasks.Settings(model="XL/2", gpu="a GPU (compute capability 9.0)", **values)


class TestDryRun:
    @pytest.fixture
    def dry(self, gpu, tmp_path):
        """The tasks of a dry run, done in this process."""
        settings, work = gpu.tasks.DRY, gpu.tasks.Work(tmp_path / "work")
        report = gpu.report.Report.open(work.report, settings)
        for task in gpu.tasks.tasks(settings):
            assert gpu.run.run_task(settings, work, task, SECONDS, end_with_parent=False) == 0
            parts = json.loads(work.results(task.name).read_text())
            report.tasks[task.name] = {"kind": task.kind, "arguments": task.arguments, "status": "done", "parts": parts}
        report.save()
        return report

    def test_it_checks_times_and_claims_nothing_about_a_gpu(self, dry, gpu):
        assert list(dry.tasks) == list(gpu.tasks.DRY_TASKS)
        parts = dry.tasks["check: onnxruntime fp32"]["parts"]
        assert parts["step"]["holds"] and parts["run"]["holds"] and parts["whole"]["steps"] == 12
        saved = json.loads(dry.path.read_text())
        assert saved["dry_run"] and saved["settings"]["gpu"] is None
        dense, merged, sliding = saved["rows"]
        for row in (dense, merged):
            assert row["ms"] > 0 and len(row["round_ms"]) == 2 and row["steps"] == 2 and row["memory_bytes"] is None
            assert row["images_per_second"] == pytest.approx(1e3 * 2 / (2 * row["ms"]))
        assert dense["speedup"] is None and merged["speedup"] == pytest.approx(dense["ms"] / merged["ms"])
        assert sliding["reason"] == "its bundle was not made" and "ms" not in sliding
        macs = dry.part("models", "macs")
        assert 0 < macs["dynamic"] < 0.8 * macs["static"]

        text = gpu.report.markdown(dry)
        assert text.startswith("## CPU (dry run: these are not figures of a GPU)") and "None" not in text
        assert "What runs" in text and "How fast" in text and "its bundle was not made" in text
        tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
        assert len(tables) == 3
        for table in tables:
            assert len({line.replace("\\|", "").count("|") for line in table}) == 1, table[0]


@pytest.mark.release
def test_a_killed_dry_run_continues(gpu, tmp_path):
    """The whole script, its tasks in processes of their own; killed after two of them."""
    import subprocess

    words = [sys.executable, str(FOLDER / "run.py"), "--work", str(tmp_path), "--dry-run", "--out", str(tmp_path / "o")]
    process, report = subprocess.Popen(words, stdout=subprocess.PIPE, text=True), tmp_path / "gpu.json"
    while not report.exists() or len(json.loads(report.read_text())["tasks"]) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = json.loads(report.read_text())["tasks"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    after = json.loads((tmp_path / "o" / "gpu.json").read_text())["tasks"]
    assert list(after) == list(gpu.tasks.DRY_TASKS) and {task["status"] for task in after.values()} == {"done"}
    assert all(after[name] == task for name, task in before.items()), "nothing is measured twice"
    assert f"[{len(before) + 1}/" in done.stderr and f"[{len(before)}/" not in done.stderr
    assert done.stdout.strip() == (tmp_path / "o" / "gpu.md").read_text().strip()


class TestRunner:
    def test_a_task_that_crashes_keeps_its_parts(self, make_runner, gpu):
        code = (
            "import os\n(folder / 'a-task.json').write_text('{\"first\": 1}')\n"
            "os.write(2, b'out of memory\\n')\nos.abort()\n"
        )
        outcome = make_runner(code).run_child(gpu.tasks.Task("a task", "ceiling"), SECONDS)
        assert outcome["parts"] == {"first": 1} and outcome["status"] == "failed"
        assert outcome["reason"] == f"its process ended with exit code {-signal.SIGABRT}: out of memory"

    def test_a_task_that_hangs_ends_with_all_that_it_started(self, make_runner, gpu):
        code = (
            "import json, subprocess, time\nother = subprocess.Popen(['sleep', '600'])\n"
            "(folder / 'a-task.json').write_text(json.dumps({'pid': other.pid}))\ntime.sleep(600)\n"
        )
        for limit in (1, 10, 100):  # on a busy machine it may take longer until it writes anything
            outcome = make_runner(code).run_child(gpu.tasks.Task("a task", "ceiling"), limit)
            assert (outcome["status"], outcome["reason"]) == ("failed", f"stopped after {limit} s")
            if "pid" in outcome["parts"]:
                break
        deadline = time.monotonic() + SECONDS
        while running(outcome["parts"]["pid"]):  # it dies when it is next scheduled
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def test_an_error_is_one_line_and_the_task_fails(self, gpu, tmp_path, capsys):
        work = gpu.tasks.Work(tmp_path)
        task = next(task for task in gpu.tasks.tasks(gpu.tasks.DRY) if task.kind == "check")
        assert gpu.run.run_task(gpu.tasks.DRY, work, task, SECONDS, end_with_parent=False) == 1
        reason = json.loads(work.results(task.name).read_text())["failed"]
        assert str(tmp_path) in reason and "\n" not in reason
        assert "Traceback" in capsys.readouterr().err

    def test_without_time_tasks_are_left_for_the_next_run(self, make_runner, gpu):
        chosen = gpu.tasks.tasks(gpu.tasks.DRY)
        runner = make_runner(minutes=0)
        runner.run(chosen)
        statuses = {name: task["status"] for name, task in runner.report.tasks.items()}
        assert set(statuses) == set(gpu.tasks.DRY_TASKS) and set(statuses.values()) == {"left"}
        again = make_runner("folder.joinpath('ran').touch()")
        assert again.report.tasks == runner.report.tasks
        again.run(chosen)
        assert {task["status"] for task in again.report.tasks.values()} == {"done"}

    def test_failed_tasks_are_tried_again_only_when_asked(self, make_runner, gpu):
        chosen = gpu.tasks.tasks(gpu.tasks.DRY)[:1]
        make_runner("sys.exit('no luck')").run(chosen)
        first = make_runner()
        first.run(chosen)
        assert first.report.tasks["small bundles"]["reason"].endswith("exit code 1: no luck")
        second = make_runner(retry=True)
        second.run(chosen)
        assert second.report.tasks["small bundles"]["status"] == "done"

    def test_the_reason_is_what_doctor_misses_or_the_task_that_failed(self, make_runner, gpu):
        settings = on_a_gpu(gpu)
        runner = make_runner(settings=settings)
        rows = [
            {"name": name, "ok": name != "driver-package", "detail": f"{name} is so"}
            for name in ("driver", "driver-package")
        ]
        runner.report.tasks["installed"] = {"status": "done", "parts": {"doctor": {"devices": rows}}}
        runner.report.tasks["small bundles"] = {"status": "done"}
        chosen = {task.name: task for task in gpu.tasks.tasks(settings)}
        assert runner.obstacle(chosen["check: torch fp16"]) is None
        assert runner.obstacle(chosen["check: onnxruntime-graphs fp16"]) == "driver-package: driver-package is so"
        timing = chosen["time: pytorch batch 8"]
        models = runner.report.tasks["models"] = {"status": "failed"}
        assert runner.obstacle(timing) == "needs the task 'models': failed"
        models["status"] = "left"
        assert runner.obstacle(timing) is None, "the next run may have it"
        assert runner.outcome(timing)["status"] == "left"

    def test_another_run_is_not_mixed_in(self, make_runner, gpu, tmp_path, capsys):
        settings = gpu.tasks.DRY.model_copy(update={"model": "S/2"})
        make_runner(minutes=0, settings=settings).run(gpu.tasks.tasks(settings)[:1])
        assert gpu.run.main(["--work", str(tmp_path), "--dry-run"]) == 2
        assert "was measured with model S/2, not tiny; choose another --work" in capsys.readouterr().err

    def test_without_a_gpu_it_says_so(self, gpu, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(gpu.tasks, "present_gpu", lambda: None)
        assert gpu.run.main(["--work", str(tmp_path / "work")]) == 2
        assert "no NVIDIA GPU or driver on this machine; --dry-run" in capsys.readouterr().err
        assert not (tmp_path / "work").exists()


def test_every_configuration_is_timed_before_the_next_batch_size(gpu):
    timed = [task.arguments for task in gpu.tasks.tasks(on_a_gpu(gpu)) if task.kind == "time"]
    names = list(gpu.tasks.CONFIGURATIONS)
    assert sorted(each["configuration"] for each in timed[: len(names)]) == sorted(names)
    assert [each["batch"] for each in timed] == [batch for batch in (8, 32, 1) for _ in names]


def test_one_contender_that_fails_costs_no_other(gpu, tmp_path, monkeypatch):
    from dydit.bench.timing import Round

    def opened(settings, work, configuration, name, batch):
        if name == "missing":
            raise gpu.timing.UnavailableError("its bundle was not made")
        if name == "broken":
            raise MemoryError("out of\nmemory")
        return SimpleNamespace(round=lambda: Round(ms=(2.0, 4.0), overflows=1))

    monkeypatch.setattr(gpu.timing, "open_contender", opened)
    parts, settings = {}, gpu.tasks.DRY
    names = ("dense", "missing", "broken")
    gpu.timing.time_contenders(settings, None, parts.__setitem__, "torch", names, 2, SECONDS)
    assert parts["dense"]["ms"] == 3.0 and parts["dense"]["round_ms"] == [3.0, 3.0]
    assert parts["dense"]["repeated_steps"] == 2 and parts["dense"]["steps"] == 2
    assert parts["missing"] == {"reason": "its bundle was not made"}
    assert parts["broken"] == {"reason": "failed: MemoryError: out of memory"}


def test_figures_of_a_contender_that_failed_later_stay(gpu, tmp_path):
    report = gpu.report.Report.open(tmp_path / "gpu.json", on_a_gpu(gpu))
    values = {"round_ms": [10.0], "memory_bytes": 1 << 30, "steps": 12, "repeated_steps": 0}
    parts = {"dense": {"ms": 20.0, **values}, "merged-16": {"ms": 10.0, **values}, "sliding": {"reason": "failed: x"}}
    arguments = {"configuration": "torch", "contenders": ["dense", "merged-16", "sliding"], "batch": 32}
    failed = {"kind": "time", "arguments": arguments, "status": "failed", "reason": "exit code -11", "parts": parts}
    report.tasks["time"] = failed
    report.tasks["models"] = {"kind": "models", "parts": {"macs": {"static": 2e11, "dynamic": 1e11}}}
    report.tasks["ceiling"] = {"kind": "ceiling", "parts": {"product": {"tflops": 1000.0}}}
    dense, merged, sliding = report.rows()
    assert (dense["speedup"], merged["speedup"]) == (None, 2.0)
    assert merged["images_per_second"] == pytest.approx(32 / (250 * 0.010))
    assert merged["macs_share"] == pytest.approx(6.4 / 10) and dense["macs_share"] == pytest.approx(12.8 / 20)
    assert sliding["reason"] == "failed: x" and "ms" not in sliding
