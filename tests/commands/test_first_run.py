"""The first minutes: missing packages, typing mistakes, paths, what the command line suggests, logged progress."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

import dydit
from dydit import extras
from dydit.bundle.stored_weights import Precision
from dydit.cli import cli
from dydit.commands.options import PATH
from dydit.commands.suggestions import after_export, next_line

DIGITS = Path(dydit.__file__).parent / "assets" / "digits" / "dydit.safetensors"
OPTIONAL = (
    "torch",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "openvino",
    "safetensors",
    "accelerate",
    "sklearn",
    "scipy",
    "matplotlib",
)
OPTIONAL += ("jinja2", "diffusers", "onnxscript", "tensorrt", "tensorrt_rtx", "polygraphy", "torch_fidelity")
# Runs commands where only some of the optional packages can be imported; prints [[exit code, standard error], ...].
WITHOUT = """
import contextlib, io, json, sys
from dydit.cli import main
optional, allowed, calls = json.loads(sys.argv[1])
for name in set(optional) - set(allowed):
    sys.modules[name] = None
results = []
for call in calls:
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        results.append([main(call), errors.getvalue()])
print(json.dumps(results))
"""


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model as a bundle of a few steps, in a folder whose name has a space. Shared: do not write to it."""
    from dydit.cli import main

    out = tmp_path_factory.mktemp("with a space") / "my bundle"
    assert main(["export", str(DIGITS), "--steps", "6", "--out", str(out), "--quiet"]) == 0
    return out


def without(allowed: Iterable[str], calls: Iterable[Iterable[object]]) -> list[tuple[int, str]]:
    """Exit code and standard error of each call, one after another in one process."""
    words = [[str(word) for word in call] for call in calls]
    command = [sys.executable, "-c", WITHOUT, json.dumps([OPTIONAL, list(allowed), words])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [(code, errors) for code, errors in json.loads(done.stdout)]


# Missing packages

DECODER = {"torch", "onnx", "onnx-ir", "diffusers", "onnxscript", "onnxruntime"}
CALLS: dict[str, tuple[list[str], set[str], set[str]]] = {
    # name: (arguments, packages that it asks for, extras that bring them)
    "quickstart": (
        ["quickstart", "--out", "OUT"],
        {"torch", "safetensors", "onnx", "onnx-ir", "onnxruntime", "jinja2", "matplotlib"},
        {"cpu", "export", "report"},
    ),
    "train": (
        ["train", "--recipe", "digits-static", "--out", "OUT"],
        {"torch", "safetensors", "accelerate", "scikit-learn", "matplotlib"},
        {"export", "train", "report"},
    ),
    "convert": (["convert", "MODEL", "--out", "OUT"], {"torch", "safetensors"}, {"export"}),
    "calibrate": (
        ["calibrate", "MODEL", "--out", "OUT"],
        {"torch", "safetensors", "onnx", "onnx-ir", "onnxruntime"},
        {"cpu", "export"},
    ),
    "export": (["export", "MODEL", "--out", "OUT"], {"torch", "safetensors", "onnx", "onnx-ir"}, {"export"}),
    "export --vae": (
        ["export", "MODEL", "--vae", "FOLDER", "--out", "OUT"],
        {"torch", "safetensors", "onnx", "onnx-ir", "diffusers", "onnxscript"},
        {"export", "vae"},
    ),
    "export --cost measured": (
        ["export", "MODEL", "--cost", "measured", "--out", "OUT"],
        {"torch", "safetensors", "onnx", "onnx-ir", "onnxruntime", "scipy"},
        {"cpu", "export"},
    ),
    "sample": (["sample", "BUNDLE", "--labels", "0", "--out", "OUT"], {"onnxruntime"}, {"cpu"}),
    "sample --backend torch": (
        ["sample", "BUNDLE", "--labels", "0", "--backend", "torch", "--out", "OUT"],
        {"torch"},
        {"export"},
    ),
    "sample --backend openvino": (
        ["sample", "BUNDLE", "--labels", "0", "--backend", "openvino", "--out", "OUT"],
        {"openvino"},
        {"openvino"},
    ),
    "parity": (
        ["parity", "BUNDLE", "--against", "MODEL", "--out", "OUT"],
        {"torch", "safetensors", "onnx", "onnx-ir", "onnxruntime"},
        {"cpu", "export"},
    ),
    "bench": (["bench", "BUNDLE", "--out", "OUT"], {"onnxruntime", "onnx"}, {"cpu", "export"}),
    "bench --against": (
        ["bench", "BUNDLE", "--against", "MODEL", "--out", "OUT"],
        {"onnxruntime", "onnx", "torch", "safetensors"},
        {"cpu", "export"},
    ),
    "decode": (["decode", "BUNDLE", "--vae", "FOLDER", "--out", "OUT"], DECODER, {"cpu", "export", "vae"}),
    "attach-vae": (["attach-vae", "BUNDLE", "--vae", "FOLDER"], DECODER, {"cpu", "export", "vae"}),
    "evaluate": (
        ["evaluate", "SAMPLES.npz", "--inception", "WEIGHTS"],
        {"torch", "safetensors", "torch-fidelity"},
        {"evaluate", "export"},
    ),
    "evaluate digits": (
        ["evaluate", "SAMPLES.npz", "--reference", "digits"],
        {"torch", "safetensors", "scikit-learn"},
        {"export", "train"},
    ),
    "inspect": (["inspect", "MODEL"], {"torch", "safetensors"}, {"export"}),
    "inspect --out": (["inspect", "BUNDLE", "--out", "OUT"], {"matplotlib"}, {"report"}),
    "build": (
        ["build", "BUNDLE", "--flavour", "tensorrt-rtx"],
        {"tensorrt_rtx", "polygraphy", "onnx"},
        {"tensorrt-rtx"},
    ),
}


def test_what_is_missing_is_said_at_once_and_in_one_command(digits_bundle: Path, tmp_path: Path) -> None:
    places = {"MODEL": DIGITS, "BUNDLE": digits_bundle, "OUT": tmp_path / "out"}
    done = without([], ([places.get(word, word) for word in words] for words, _, _ in CALLS.values()))
    for (words, packages, brought_by), (code, errors) in zip(CALLS.values(), done, strict=True):
        match = re.fullmatch(
            r"dydit: error: dydit ([\w-]+) needs (.*), which (?:is|are) not installed: "
            r"pip install (?:-e )?'\S*\[(.*)\]'( \(pip install torch .* first, where there is no GPU\))?\n",
            errors,
        )
        assert code == 2 and match, errors
        assert match[1] == words[0] and set(match[2].split(", ")) == packages, errors
        assert set(match[3].split(",")) == brought_by and bool(match[4]) == ("torch" in packages)
    assert not (tmp_path / "out").exists()


CALIBRATE_FEW = [
    *("--steps", "3", "--max-subnets", "2", "--samples", "8", "--held-out", "4", "--batch-size", "2"),
    *("--quantile", "0.5"),
]
FEW = {
    "train": ["iterations=2", "model.depth=1", "model.hidden_size=32", "batch_size=4"],
    "calibrate": CALIBRATE_FEW,
    "export": ["--steps", "3"],
    "parity": ["--every", "6"],
    "bench": ["--repeats", "1", "--steps-measured", "1"],
}


@pytest.mark.parametrize(
    "names",
    [["convert", "inspect"], ["export"], ["calibrate", "parity"], ["sample", "bench"], ["inspect --out"], ["train"]],
    ids=" ".join,
)
def test_nothing_else_is_needed(names: list[str], digits_bundle: Path, tmp_path: Path) -> None:
    """With the packages that a command asks for, and no others, it runs to its end."""
    modules = {package: module for module, package in extras.PACKAGES.items()}
    allowed, calls = set(), []
    for name in names:
        words, packages, _ = CALLS[name]
        allowed |= {modules.get(package, package) for package in packages}
        places = {"MODEL": DIGITS, "BUNDLE": digits_bundle, "OUT": tmp_path / f"{name}.out"}
        calls.append([*(places.get(word, word) for word in words), *FEW.get(words[0], []), "-q"])
    allowed |= {"scipy"} if "sklearn" in allowed else set()  # which scikit-learn needs itself
    allowed |= {"jinja2"} if "torch" in allowed else set()  # and PyTorch
    assert without(allowed, calls) == [(0, "")] * len(calls)


def test_a_bundle_is_inspected_without_any(digits_bundle: Path) -> None:
    assert without([], [["inspect", digits_bundle]]) == [(0, "")]


def test_doctor_says_how_to_get_what_is_missing(run, monkeypatch) -> None:
    from dydit.doctor import doctor
    from dydit.doctor.probes import Finding

    for name in OPTIONAL:
        monkeypatch.setitem(sys.modules, name, None)
    report = doctor.run_doctor(lambda name: Finding(ok=name != "registry", detail="[]"))
    for extra, names in (("export", "onnx, onnx-ir, safetensors, scipy, torch"), ("train", "accelerate, scikit-learn")):
        (row,) = [row for row in report.extras if row.name == extra]
        assert not row.ok and f"{names} missing" in row.detail and f"[{extra}]'" in (row.fix or "")


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'dydit[cpu,export]'"),
        ("not json", "pip install 'dydit[cpu,export]'"),
        ('{"url": "https://example.org/dydit.whl", "archive_info": {}}', "pip install 'dydit[cpu,export]'"),
        ('{"url": "file:///no/such/folder", "dir_info": {}}', "pip install 'dydit[cpu,export]'"),
        ('{"url": "file://FOLDER", "dir_info": {}}', "pip install 'FOLDER[cpu,export]'"),
        ('{"url": "file://FOLDER", "dir_info": {"editable": true}}', "pip install -e 'FOLDER[cpu,export]'"),
    ],
)
def test_a_checkout_is_installed_again_from_its_folder(monkeypatch, tmp_path: Path, origin, command: str) -> None:
    checkout = tmp_path / "check out"
    checkout.mkdir()
    text = origin and origin.replace("FOLDER", str(checkout).replace(" ", "%20"))
    found = SimpleNamespace(read_text=lambda name: text)
    monkeypatch.setattr(extras.importlib.metadata, "distribution", lambda name: found)
    message = f"onnx is missing: {extras.install_command(['export', 'cpu', 'cpu'])}, or do without"
    assert extras.as_installed(message) == f"onnx is missing: {command.replace('FOLDER', str(checkout))}, or do without"


# Typing mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sampel"], ["'sampel'", "'sample'"]),
        (["export", "x", "--step", "9", "--out", "y"], ["--step'", "'--steps'"]),
        (["sample", "x", "--lab", "0", "--out", "y"], ["'--labels'"]),
        (["sample"], ["dydit sample needs BUNDLE and --out"]),
        (["train"], ["dydit train needs --recipe and --out"]),
        (["inspect"], ["dydit inspect needs CHECKPOINT|BUNDLE"]),
        (["sample", "x", "--labels", "0", "--backend", "onnx", "--out", "y"], ["--backend", "onnxruntime, torch"]),
    ],
)
def test_a_mistake_is_answered_with_what_was_meant(run, arguments: list[str], words: list[str]) -> None:
    done = run(*arguments)
    assert done.code == 2 and done.out == "" and done.err.count("\n") == 1
    assert all(word in done.err for word in words), done.err


def test_help_is_a_command_too(run) -> None:
    assert run("help") == run("--help") and run("help", "sample") == run("sample", "--help")


# Paths


def test_home_is_expanded_where_a_shell_does_not(run, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("export", DIGITS, "--steps=2", "--out=~/my bundle").code == 0
    done = run("sample", "~/my bundle", "--labels=0", "--out=~/images", "--latents-out=~/latents.npz")
    assert done.code == 0 and (tmp_path / "images" / "000000.png").is_file() and (tmp_path / "latents.npz").is_file()
    assert "~/no-vae" not in run("export", DIGITS, "--vae=~/no-vae", "--out=~/other").err


def test_every_path_is_of_the_type_that_expands_home() -> None:
    for name, command in cli.commands.items():
        for option in command.params:
            assert not isinstance(option.type, click.Path) or option.type is PATH, f"{name} {option.name}"


# What is suggested


def suggestions(out: str) -> list[list[str]]:
    """The words of each suggested command."""
    return [shlex.split(line.removeprefix("Next: ")) for line in out.splitlines() if line.startswith("Next: ")]


def in_folder(words: list[str], folder: Path) -> list[str]:
    """The same command with what it writes, a word in capitals, in a folder."""
    return [str(folder / word) if re.fullmatch(r"[A-Z]+", word) else word for word in words[1:]]


def test_what_is_suggested_works_where_paths_have_spaces(run, tmp_path: Path, monkeypatch) -> None:
    """From a checkpoint along the suggestions: convert, inspect, export, sample, parity, bench."""
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "a folder"
    folder.mkdir()
    queue, seen = [["dydit", "convert", str(DIGITS), "--out", str(folder / "my model.safetensors")]], set()
    few = {"export": ["--steps", "6"], "bench": ["--repeats", "1", "--steps-measured", "2"]}
    while queue:
        words = queue.pop(0)
        assert words[0] == "dydit"
        done = run(*in_folder(words, folder), *few.get(words[1], []))
        assert done.code == 0, (words, done.err)
        seen.add(words[1])
        queue += suggestions(done.out)
    assert seen == {"convert", "inspect", "export", "sample", "parity", "bench"}


def test_what_calibrate_suggests_works(run, tmp_path: Path) -> None:
    file = tmp_path / "my calibration.json"
    done = run("calibrate", DIGITS, "--sampler", "ddim", *CALIBRATE_FEW, "--out", file)
    assert done.code == 0, done.err
    (export,) = suggestions(done.out)
    assert run(*in_folder(export, tmp_path)).code == 0


@pytest.fixture
def old_checkpoint(make_checkpoint: Callable[..., Any], small_config: Any, tmp_path: Path) -> Path:
    """A checkpoint of another program, which does not say how many heads it has, and samples latents."""
    import torch

    file = tmp_path / "old model.pt"
    torch.save(make_checkpoint(small_config.without_routers()).state, file)
    return file


def test_suggestions_repeat_what_the_checkpoint_needs_to_be_read(run, old_checkpoint: Path, tmp_path: Path) -> None:
    done = run("export", old_checkpoint, "--num-heads", 4, "--steps", 2, "--precision", "bf16", "--out", tmp_path / "b")
    assert done.code == 0, done.err
    sample, parity = suggestions(done.out)
    assert sample[-4:-2] == ["--backend", "torch"] and parity[-6:-2] == ["--num-heads", "4", "--backend", "torch"]
    assert run(*in_folder(sample, tmp_path)).code == 0
    assert run(*in_folder(parity, tmp_path)).code in (0, 1), "bf16 may round too much for a random model"


def test_a_latent_model_without_a_decoder_is_said_to_give_latents(run, old_checkpoint: Path, tmp_path: Path) -> None:
    done = run("export", old_checkpoint, "--num-heads", 4, "--steps", 2, "--out", tmp_path / "b")
    (line,) = [line for line in done.out.splitlines() if "no VAE decoder" in line]
    assert "writes latents" in line and "--vae" in line
    assert "no VAE decoder" not in run("export", DIGITS, "--steps", 2, "--out", tmp_path / "digits").out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("inspect", Path("a b")), "dydit inspect 'a b'"),
        (("inspect", Path("-x")), "dydit inspect ./-x"),
        (("inspect", Path("~/x")), "dydit inspect './~/x'"),
        (("inspect", Path("it's")), "dydit inspect 'it'\"'\"'s'"),
        (("sample", Path("b"), "--labels", "0"), "dydit sample b --labels 0"),
    ],
)
def test_commands_are_quoted(words: tuple[object, ...], text: str) -> None:
    assert next_line(*words) == f"Next: {text}"


@pytest.mark.parametrize("precision", list(Precision))
def test_suggestions_after_an_export_parse(make_bundle, precision: Precision, tmp_path: Path) -> None:
    manifest = make_bundle().manifest.model_copy(update={"precision": precision})
    for words in suggestions("\n".join(after_export(manifest, tmp_path / "a b", tmp_path / "c d", {"num_heads": 4}))):
        command = cli.commands[words[1]]
        context = command.make_context(words[1], words[2:])
        assert context.params["bundle"] == tmp_path / "a b"
        default = "auto" if words[1] == "sample" else "onnxruntime"
        assert context.params["backend"] == ("torch" if precision is Precision.BF16 else default)


def test_what_quickstart_suggests_parses(run, monkeypatch, tmp_path: Path) -> None:
    from dydit.quickstart import quickstart

    result = quickstart.QuickstartResult(out="o", report="r", ok=True, images=1, seconds=1, lines=())
    monkeypatch.setattr(quickstart, "run_quickstart", lambda *_: result)
    found = suggestions(run("quickstart", "--out", tmp_path / "my quickstart").out)
    assert [words[1] for words in found] == ["inspect", "sample"]
    for words in found:
        cli.commands[words[1]].make_context(words[1], words[2:])


# Logged progress


def test_without_a_terminal_progress_is_a_few_plain_lines(digits_bundle: Path, tmp_path: Path) -> None:
    call = [sys.executable, "-m", "dydit", "sample", str(digits_bundle), "--labels", "0", "--out"]
    done = subprocess.run([*call, str(tmp_path / "out")], capture_output=True, text=True, check=True)
    assert re.match(r"sample: 1/6 \(16 %\)(, .* left)?\n", done.stderr) and "\r" not in done.stderr
    assert done.stderr.count("\n") <= 4
    quiet = subprocess.run([*call, str(tmp_path / "quiet"), "-q"], capture_output=True, text=True, check=True)
    assert (quiet.stdout, quiet.stderr) == ("", "")


def test_other_steps_are_refused_for_a_bundle_that_was_made_for_its_own(run, make_bundle, tmp_path: Path) -> None:
    """With the options of an export that makes one for them, and of one that takes any steps."""
    for options in (["--steps", "5"], ["--sampler", "dpm-solver++"], ["--timestep-spacing", "trailing"]):
        done = run("sample", make_bundle().path, "--labels", "0", *options, "--out", tmp_path / "out")
        assert done.code == 2 and done.out == "" and done.err.count("\n") == 1, done
        assert "--dynamic-width" in done.err and " ".join(options) in done.err, done.err
        assert not (tmp_path / "out").exists()
