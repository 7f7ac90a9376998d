"""`dydit build`: what it prints and how it exits."""

from __future__ import annotations

import json
import re
import sys
from types import ModuleType
from typing import Any

import pytest

from dydit.bundle.bundle import Bundle
from dydit.cli import cli
from dydit.commands.exit_codes import run_command


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pretence) -> Any:
    """`run(*words) -> (exit code, output, errors)`, with a TensorRT for RTX 1.7.1 that is not one."""
    fake = ModuleType("tensorrt_rtx")
    fake.__version__ = "1.7.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)

    def call(*words: object) -> tuple[int, str, str]:
        code = run_command(cli, ["build", *map(str, words)])
        out, errors = capsys.readouterr()
        return code, out, re.sub(r"^build: \d.*\n", "", errors, flags=re.MULTILINE)  # logged progress

    return call


def test_it_says_what_it_built_and_then_that_nothing_changed(run, bundle: Bundle) -> None:
    code, out, errors = run(bundle.path, "--flavour", "tensorrt-rtx", "--jobs", 2)
    assert (code, errors) == (0, "")
    lines = out.splitlines()
    folder = next(path for path in (bundle.path / "engines").iterdir())
    assert lines[0] == f"{folder}: 7 engines built by tensorrt-rtx 1.7.1"
    assert lines[1] == f"14 builder warnings are in {folder / 'build.log'}"
    assert lines[3] == f"Next: dydit sample {bundle.path} --labels 0 --backend tensorrt-rtx --out SAMPLES"
    assert run(bundle.path, "--flavour", "tensorrt-rtx") == (
        0,
        f"{folder}: all 7 engines for tensorrt-rtx 1.7.1 are up to date; nothing was built\n",
        "",
    )


def test_settings_reach_the_request_and_reasons_are_printed(run, bundle: Bundle) -> None:
    run(bundle.path, "--flavour", "tensorrt-rtx")
    first = next(path for path in (bundle.path / "engines").iterdir())
    words = ["--max-batch", 32, "--opt-batch", 8, "--compute-capability", "8.9", "--compute-capability", "12.0"]
    code, out, _ = run(bundle.path, "--flavour", "tensorrt-rtx", *words)
    assert code == 0
    assert out.splitlines()[0] == (
        f"the engines in {first} were built with other settings and are not used (the batches it is tuned for: 4 "
        "became 8; the largest batch: 4 became 32; the compute capabilities: any became 8.9 12.0); the folder is kept, "
        "remove it if you do not need it"
    )


def test_the_progress_bar_counts_engines(run, bundle: Bundle, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    _, _, errors = run(bundle.path, "--flavour", "tensorrt-rtx")
    assert re.search(r"\rbuild:   0 %\| +\| 0/7 ", errors)
    assert re.search(r"\rbuild: 100 %\|█+\| 7/7 ", errors)


def test_json_alone_is_printed(run, bundle: Bundle) -> None:
    code, out, _ = run(bundle.path, "--flavour", "tensorrt-rtx", "--json")
    values = json.loads(out)
    assert code == 0
    assert values["request"]["flavour"] == "tensorrt-rtx"
    assert len(values["built"]) == 7
    assert values["kept"] == 0
    assert values["jobs"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compute-capability", "9.0"], "tensorrt-rtx cannot build for compute capability 9.0, only for 8.0, 8.6"),
        (["--opt-batch", "9"], "--opt-batch 9 is larger than --max-batch 4"),
        (["--version-compatible"], "engines of tensorrt-rtx run only with the version that built them"),
        (["--jobs", "0"], "0 is not in the range x>=1"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(run, pretence, bundle, words: list[str], message: str) -> None:
    code, out, errors = run(bundle.path, "--flavour", "tensorrt-rtx", *words)
    assert (code, out) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert pretence.built == []
    assert not (bundle.path / "engines").exists()


def test_dynamic_routing_is_refused_before_anything_is_written(run, make_bundle) -> None:
    path = make_bundle(routing="dynamic").path
    code, _, errors = run(path, "--flavour", "tensorrt-rtx")
    assert code == 2
    assert errors == (
        "dydit: error: tensorrt-rtx has no NonZero, which dynamic routing needs; export a bundle with a fixed "
        "token capacity: `dydit calibrate CHECKPOINT --steps 12 --max-subnets 4 --out CAL.json`, then `dydit export "
        "CHECKPOINT --steps 12 --max-subnets 4 --routing capacity --calibration CAL.json --out BUNDLE`, then `dydit "
        "build BUNDLE`"
        "; or build with --flavour tensorrt on the machine with the GPU\n"
    )
    assert not (path / "engines").exists()


def test_a_missing_tensorrt_is_named(run, bundle: Bundle, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    code, _, errors = run(bundle.path, "--flavour", "tensorrt")
    assert code == 2 and errors.startswith("dydit: error: dydit build needs tensorrt, which is not installed: pip ")
    assert errors.endswith("[tensorrt]'\n")


def test_a_changed_bundle_is_refused(run, bundle: Bundle) -> None:
    with open(bundle.path / "weights.bin", "r+b") as file:
        file.seek(100)
        file.write(b"\x55")
    code, _, errors = run(bundle.path, "--flavour", "tensorrt-rtx")
    assert code == 2
    assert "weights.bin was changed (its SHA-256 differs); export the bundle again" in errors
