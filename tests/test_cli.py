"""The command line as people and scripts use it: help, exit codes, what goes to which stream, and whole small runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from dydit.cli import cli

STEPS = 6
COMMANDS = ("quickstart", "train", "convert", "export", "build", "sample", "parity", "bench", "inspect")
COMMANDS += ("doctor", "calibrate", "decode", "attach-vae", "encode", "evaluate", "prepare")
HEAVY = ("torch", "onnx", "onnx_ir", "onnxruntime", "openvino", "safetensors", "tensorrt", "tensorrt_rtx", "accelerate")
HEAVY += ("sklearn", "scipy", "matplotlib", "jinja2", "diffusers", "transformers", "pycuda", "torch_fidelity")


@pytest.fixture(scope="session")
def pixel_checkpoint(make_checkpoint, small_config) -> Path:
    return make_checkpoint(small_config.model_copy(update={"in_channels": 3})).path


@pytest.fixture(scope="session")
def bundle(make_bundle, make_checkpoint, small_config) -> Path:
    model = make_checkpoint(small_config.model_copy(update={"in_channels": 3}))
    return make_bundle(model, steps=STEPS, max_subnets=2).path


# Help


def test_the_commands_are_those_of_the_contract() -> None:
    assert set(cli.commands) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    command = cli.commands[name]
    assert command.help
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help and option.help.endswith((".", "]")), f"{name} {option.opts}: {option.help}"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(run, name: str) -> None:
    long, short = run(name, "--help"), run(name, "-h")
    assert long == short and long.code == 0 and long.err == ""
    assert long.out.startswith(f"Usage: dydit {name}")
    assert "--debug" in long.out


def test_help_of_all(run) -> None:
    done = run("--help")
    assert done.code == 0 and done.err == ""
    assert all(f"  {name} " in done.out for name in COMMANDS)
    assert run() == (2, "", done.out)


def test_version(run) -> None:
    from dydit import __version__

    assert run("--version") == (0, f"dydit {__version__}\n", "")


def test_help_needs_none_of_the_heavy_packages() -> None:
    code = f"""
import sys
for name in {HEAVY!r}:
    sys.modules[name] = None
from dydit.cli import cli, main
for command in [[], *([name] for name in cli.commands)]:
    assert main([*command, "--help"]) == 0, command
print("all of", len(cli.commands))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"all of {len(COMMANDS)}\n")


# Errors and exit codes


def raising(error: BaseException) -> Callable[..., None]:
    def raise_it(*_: object, **__: object) -> None:
        raise error

    return raise_it


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError("Unable to allocate 3 TiB"), 2, "not enough memory (Unable to allocate 3 TiB)"),
        (OSError(5, "Input/output error", "disk"), 2, "disk: Input/output error"),
        (OSError("odd"), 2, "odd"),
        (ModuleNotFoundError("No module named 'onnx'", name="onnx"), 2, "onnx is not installed: pip install"),
    ],
)
def test_what_is_not_the_programs_fault_is_one_line(
    run, monkeypatch, pixel_checkpoint, tmp_path, error, code, line
) -> None:
    monkeypatch.setattr("dydit.checkpoints.checkpoint.convert", raising(error))
    done = run("convert", pixel_checkpoint, "--out", tmp_path / "out")
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith(f"dydit: error: {line}") and done.err.count("\n") == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), EOFError("too short"), ModuleNotFoundError("No module named 'x'", name="x")]
)
def test_a_fault_keeps_its_traceback(run, monkeypatch, pixel_checkpoint, tmp_path, error) -> None:
    monkeypatch.setattr("dydit.checkpoints.checkpoint.convert", raising(error))
    with pytest.raises(type(error)) as raised:
        run("convert", pixel_checkpoint, "--out", tmp_path / "out")
    assert raised.value is error


@pytest.mark.parametrize("where", ["before", "after", "environment"])
def test_debug_shows_where_an_error_came_from(run, monkeypatch, tmp_path: Path, where: str) -> None:
    if where == "environment":
        monkeypatch.setenv("DYDIT_DEBUG", "1")
    before, after = ["--debug"] * (where == "before"), ["--debug"] * (where == "after")
    done = run(*before, "convert", tmp_path / "missing", "--out", tmp_path / "out", *after)
    assert done.code == 2 and done.out == ""
    assert done.err.startswith("Traceback") and "CheckpointError" in done.err
    assert done.err.splitlines()[-1].startswith("dydit: error: ")


def test_an_interrupted_export_leaves_nothing(run, monkeypatch, pixel_checkpoint, tmp_path: Path) -> None:
    monkeypatch.setattr("dydit.export.exporter.save_graph", raising(KeyboardInterrupt()))
    done = run("export", pixel_checkpoint, "--steps", STEPS, "--out", tmp_path / "out")
    assert (done.code, done.err) == (130, "dydit: error: interrupted; nothing was written\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_interrupts_a_sampling_run(bundle: Path, tmp_path: Path, number: int, said: str) -> None:
    command = [sys.executable, "-m", "dydit", "sample", str(bundle), "--labels", "0-6", "--num", "100000", "-q"]
    process = subprocess.Popen(
        [*command, "--backend", "onnxruntime", "--out", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        # A job that a shell put into the background ignores this signal, and so would the process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    started, deadline = tmp_path / "out" / ".work" / "000003.npz", time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None and not started.exists():
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=600)
    line = f"dydit: error: {said}; run the same command again to resume\n"
    assert (process.returncode, err) == (128 + number, line)
    assert not list((tmp_path / "out").rglob("*.part"))


@pytest.mark.parametrize("module", ["click", "dydit.commands.exit_codes", "dydit.commands.inspect", "numpy"])
def test_an_interrupt_while_modules_are_imported_is_one_line(bundle: Path, module: str) -> None:
    code = f"""
import sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
from dydit.cli import main
sys.exit(main(["inspect", {str(bundle)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert re.fullmatch(r"dydit: error: interrupted(; nothing was written)?\n", done.stderr), done.stderr


def test_a_reader_that_goes_away(bundle: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "dydit", "inspect", str(bundle)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(), err) == (141, b"")


# Streams


def test_json_is_all_there_is_on_standard_output(run, bundle, pixel_checkpoint, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    calls = [
        ["export", pixel_checkpoint, "--steps", STEPS, "--out", tmp_path / "bundle"],
        ["sample", bundle, "--labels", "0-2", "--out", tmp_path / "images"],
        ["inspect", bundle],
        ["inspect", pixel_checkpoint],
        ["parity", bundle, "--against", pixel_checkpoint, "--out", tmp_path / "parity"],
    ]
    for call in calls:
        done = run(*call, "--json")
        assert done.code == 0, done
        assert isinstance(json.loads(done.out), dict), call


def test_progress_is_a_bar_on_a_terminal(run, pixel_checkpoint, tmp_path: Path, monkeypatch) -> None:
    call = ["export", pixel_checkpoint, "--steps", STEPS]
    assert "\r" not in run(*call, "--out", tmp_path / "1").err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert "\rexport: 100 %|" in run(*call, "--out", tmp_path / "2").err
    quiet = run(*call, "--out", tmp_path / "3", "--quiet")
    assert quiet == run("-q", *call, "--out", tmp_path / "4") == (0, "", "")
    assert all((tmp_path / str(n) / "manifest.json").is_file() for n in range(1, 5))


# Whole runs


def test_convert(run, pixel_checkpoint: Path, tmp_path: Path) -> None:
    done = run("convert", pixel_checkpoint, "--out", tmp_path / "model.safetensors")
    assert done.code == 0 and done.err == ""
    first, *others = done.out.splitlines()
    assert first.startswith(f"{tmp_path}/model.safetensors: dynamic DiT (hidden 64, 3 blocks, 4 heads, patch 2)")
    assert len(others) == 2 and all(each.startswith("Next: dydit ") for each in others)
    from dydit.checkpoints.checkpoint import load_checkpoint

    assert load_checkpoint(tmp_path / "model.safetensors").config == load_checkpoint(pixel_checkpoint).config


@pytest.mark.parametrize(
    ("options", "kind", "subnets"),
    [
        (["--max-subnets", "2"], "max-subnets", 2),
        (["--per-step"], "per-step", None),
        (["--memory-budget", "1GiB"], "memory-budget", None),
    ],
    ids=["max-subnets", "per-step", "memory-budget"],
)
def test_export(run, pixel_checkpoint, tmp_path: Path, options: list[str], kind: str, subnets: int | None) -> None:
    from dydit.bundle.bundle import Bundle

    more = ["--sampler", "ddim", "--routing", "dense", "--max-batch", "3", "--cfg-channels", "all"]
    done = run("export", pixel_checkpoint, "--steps", STEPS, *options, *more, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    manifest = Bundle.open(tmp_path / "out").manifest
    said = json.loads(done.out)
    assert said["bundle"] == str(tmp_path / "out")
    assert said["subnets"] == len(manifest.subnets) and said["plan"]["kind"] == manifest.plan.kind == kind
    assert subnets in (None, len(manifest.subnets))
    assert (manifest.sampling.steps, manifest.sampling.sampler, manifest.routing) == (STEPS, "ddim", "dense")
    assert (manifest.max_batch, manifest.sampling.cfg_channels) == (3, 3)


def test_sample_and_sample_again(run, bundle: Path, tmp_path: Path) -> None:
    call = ["sample", bundle, "--labels", "0-1,5", "--labels", "2", "--num", "5", "--npz", "--out", tmp_path / "out"]
    done = run(*call, "--latents-out", tmp_path / "latents.npz")
    assert done.code == 0, done.err
    pictures = sorted(path.name for path in (tmp_path / "out").glob("0*.png"))
    assert pictures == [f"{index:06d}.png" for index in range(5)]
    assert Image.open(tmp_path / "out" / pictures[0]).size == (8, 8)
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (5, 8, 8, 3)
        assert arrays["arr_1"].tolist() == [0, 1, 5, 2, 0]
    assert (tmp_path / "latents.npz").is_file()
    assert "grid.png" in done.out
    again = run(*call, "--latents-out", tmp_path / "latents.npz")
    assert again.code == 0 and "already" in again.out


def test_the_progress_and_the_closing_words_of_workers(run, bundle: Path, tmp_path: Path, monkeypatch) -> None:
    """One by hand shows its own progress, under its number; of those that a launcher starts, a machine's first does."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    call = ["sample", bundle, "--labels", "0-3", "--batch-size", "1", "--out", tmp_path / "out"]
    done = run(*call, "--worker", "0/3")
    assert re.search(r"\rsample \(worker 0/3\): 100 %\|█+\| 12/12 ", done.err)
    assert re.search(r"\rimages \(worker 0/3\): 100 %\|█+\| 2/2 ", done.err)
    assert (
        "out: 2 images in" in done.out and "worker 0/3 has sampled its images, but the run is not finished" in done.out
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for rank, shows in ((1, False), (2, True)):
        for name, value in (("RANK", rank), ("WORLD_SIZE", 3), ("LOCAL_RANK", rank % 2)):
            monkeypatch.setenv(name, str(value))
        done = run(*call)
        assert done.code == 0 and (f"sample (worker {rank}/3): 100 %" in done.err) == shows and bool(done.err) == shows
    assert "out: 4 images in" in done.out and "look at grid.png" in done.out and "not finished" not in done.out


def test_sampling_on_onnxruntime_needs_no_pytorch(bundle: Path, tmp_path: Path) -> None:
    without = [name for name in HEAVY if name != "onnxruntime"]
    code = f"""
import sys
for name in {without!r}:
    sys.modules[name] = None
from dydit.cli import main
sys.exit(main(sys.argv[1:]))
"""
    call = ["sample", str(bundle), "--labels", "3", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *call], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "000000.png").is_file()


def test_the_two_backends_give_the_same_pictures(run, bundle: Path, tmp_path: Path) -> None:
    for backend in ("onnxruntime", "torch"):
        call = ["sample", bundle, "--labels", "1", "--backend", backend, "--out", tmp_path / backend]
        assert run(*call, "--latents-out", tmp_path / f"{backend}.npz", "-q").code == 0
    ours, reference = (np.load(tmp_path / f"{name}.npz")["latents"] for name in ("onnxruntime", "torch"))
    assert np.linalg.norm(ours - reference) <= 1e-3 * np.linalg.norm(reference)


def test_parity_that_holds(run, bundle: Path, pixel_checkpoint: Path, tmp_path: Path) -> None:
    done = run("parity", bundle, "--against", pixel_checkpoint, "--labels", "1,2", "--out", tmp_path / "out")
    assert done.code == 0, done
    assert [line.split()[0] for line in done.out.splitlines()[:5]] == ["passed"] * 5
    assert "parity holds" in done.out
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["ok"] is True
    assert Image.open(tmp_path / "out" / "parity.png").width > 600


def test_parity_that_fails(run, bundle: Path, make_checkpoint, small_config, tmp_path: Path) -> None:
    other = make_checkpoint(small_config.model_copy(update={"in_channels": 3}), seed=1).path
    done = run("parity", bundle, "--against", other, "--out", tmp_path / "out", "--json")
    assert done.code == 1 and done.err == ""
    said = json.loads(done.out)
    assert said["ok"] is False and said["first_failure"] == "masks"
    assert json.loads((tmp_path / "out" / "parity.json").read_text()) == said


def test_inspect(run, bundle: Path, pixel_checkpoint: Path, tmp_path: Path) -> None:
    for path, drawn in ((bundle, {"masks.png", "plan.png"}), (pixel_checkpoint, {"masks.png"})):
        done = run("inspect", path, "--out", tmp_path / path.name)
        assert done.code == 0, done.err
        assert {file.name for file in (tmp_path / path.name).iterdir()} == drawn
        assert str(tmp_path / path.name) in done.out


@pytest.mark.parametrize("works", [True, False])
def test_doctor(run, monkeypatch, works: bool) -> None:
    from dydit.doctor import doctor
    from dydit.doctor.probes import Finding

    def probe(name: str) -> Finding:
        if name == "registry":
            return Finding(ok=True, detail=json.dumps([["onnxruntime", True, ""], ["tensorrt", False, "to come"]]))
        return Finding(ok=works, detail=name)

    report = doctor.run_doctor(probe)
    monkeypatch.setattr(doctor, "run_doctor", lambda probe: report)
    for options in ([], ["--json"]):
        done = run("doctor", *options)
        assert done.code == (0 if works else 1)
        assert "onnxruntime" in done.out
    assert {row["name"]: row["ok"] for row in json.loads(done.out)["backends"]} == {
        "onnxruntime": works,
        "tensorrt": False,
    }


def test_bench(run, bundle: Path, tmp_path: Path) -> None:
    rounds = ["--labels", "0-1", "--steps-measured", "2", "--repeats", "1", "--threads", "1"]
    done = run("bench", bundle, *rounds, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "ms a step (steps measured: 2 of 6)" in done.out
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"bench.json", "bench.png"}
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert (report["batch"], report["repeats"], len(report["sides"])) == (2, 1, 1)


@pytest.mark.parametrize("holds", [True, False])
def test_quickstart(run, monkeypatch, tmp_path: Path, holds: bool) -> None:
    from dydit.quickstart import quickstart

    asked = []

    def stand_in(out, config, overwrite, progress) -> quickstart.QuickstartResult:
        asked.append((out, config, overwrite))
        line = quickstart.Line(label="parity", value="holds" if holds else "fails", note="")
        report = str(out / "report.html")
        return quickstart.QuickstartResult(out=str(out), report=report, ok=holds, images=40, seconds=9, lines=(line,))

    monkeypatch.setattr(quickstart, "run_quickstart", stand_in)
    done = run("quickstart", "--steps", "20", "--per-class", "2", "--out", tmp_path / "out", "--overwrite")
    assert done.code == (0 if holds else 1) and f"{tmp_path}/out/report.html" in done.out
    assert run("quickstart", "--json").code == done.code
    first, second = asked
    assert first == (tmp_path / "out", quickstart.QuickstartConfig(steps=20, per_class=2), True)
    assert second == (Path("quickstart"), quickstart.QuickstartConfig(), False)


@pytest.mark.parametrize(
    ("precision", "dtype", "backend"),
    [(None, "float32", ""), ("fp16", "float16", ""), ("bf16", "bfloat16", " --backend torch")],
)
def test_export_in_a_precision(run, pixel_checkpoint, tmp_path: Path, precision, dtype: str, backend: str) -> None:
    from dydit.bundle.bundle import Bundle

    out, option = tmp_path / "out", ["--precision", precision] if precision else []
    done = run("export", pixel_checkpoint, "--steps", STEPS, "--max-subnets", 2, *option, "--out", out)
    assert (done.code, done.err) == (0, "")
    advice = f"dydit parity {out} --against {pixel_checkpoint}{backend} --out PARITY"
    assert done.out.splitlines()[-1].endswith(advice)
    manifest = Bundle.open(out).manifest
    assert manifest.precision == (precision or "fp32")
    assert manifest.weights["blocks.0.fc1.weight"].dtype == dtype
    assert manifest.weights["final.weight"].dtype == "float32", "what is fp32 in every precision"
    # The commands that it advises work.
    sample, parity = (
        [str(tmp_path / word) if word.isupper() else word for word in command.removeprefix("dydit ").split()]
        for command in (line.removeprefix("Next: ") for line in done.out.splitlines()[-2:])
    )
    assert run(*sample).code == 0
    held = run(*parity, "--cfg-scale", 1)
    assert held.code in ((0, 1) if precision == "bf16" else (0,)), "random weights carry bf16's roundings too far"
    assert "passed  weights" in held.out and "passed  step" in held.out


def test_the_precisions_are_explained(run) -> None:
    text = " ".join(run("export", "--help").out.split())
    assert "--precision [fp32|fp16|bf16|int8|int8-static|fp8]" in text
    assert "fp16: half the size, for TensorRT and ONNX Runtime. bf16: half the size, for TensorRT and PyTorch" in text


def test_train_then_export_then_sample(run, tmp_path: Path) -> None:
    sizes = ["model.hidden_size=32", "model.depth=2", "model.num_heads=2", "model.patch_size=4"]
    train = ["train", "--recipe", "digits", *sizes, "iterations=8", "batch_size=8", "static.iterations=4"]
    done = run(*train, "log_every=2", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    model = tmp_path / "run" / "dynamic" / "model.safetensors"
    assert f"{model}: 8 iterations" in done.out and "Next: dydit export" in done.out
    assert (tmp_path / "run" / "static" / "curves.png").is_file()
    assert run(*train, "log_every=2", "--resume", "--out", tmp_path / "run").code == 0
    assert run("export", model, "--steps", "4", "--out", tmp_path / "bundle").code == 0
    assert run("sample", tmp_path / "bundle", "--labels", "0-9", "--out", tmp_path / "images").code == 0
    assert len(list((tmp_path / "images").glob("0*.png"))) == 10
