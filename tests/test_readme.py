"""The code in the documents: its commands parse and, on the shipped model in few steps, run in their order.

README, docs/usage.md, docs/training.md: what users type. docs/bundle.md: what other programs rely on. And every link
leads somewhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from PIL import Image

import dydit
from dydit.bundle.manifest import Manifest, PlanKind, Routing
from dydit.bundle.stored_weights import Precision
from dydit.cli import cli
from dydit.diffusion.noise import INITIAL_DRAW, normals
from dydit.models.synthetic import synthetic_model
from dydit.models.uvit.config import preset

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
USAGE = (ROOT / "docs" / "usage.md").read_text()
TRAINING = (ROOT / "docs" / "training.md").read_text()
BUNDLE = (ROOT / "docs" / "bundle.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
DIGITS = Path(dydit.__file__).parent / "assets" / "digits" / "dydit.safetensors"
# Options that make a command small; later ones win over those of the documents.
FEW = {
    "calibrate": ["--steps", "4", "--samples", "16", "--held-out", "4", "--batch-size", "2", "--quantile", "0.5"],
    "export": ["--steps", "4"],
    "parity": ["--every", "4"],
    "bench": ["--repeats", "1", "--steps-measured", "1"],
    "sample": ["--num", "2"],
}
NOT_RUN = ("quickstart", "prepare", "train", "evaluate", "doctor", "build")
"""These take long, or need what is not everywhere; they have tests of their own."""
LAUNCHED = ("torchrun", "accelerate")


def shell_lines(text: str) -> list[list[str]]:
    """The words of each line of a document's shell code, without its comments."""
    blocks = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
    return [words for line in blocks if (words := shlex.split(line, comments=True))]


def dydit_calls(text: str) -> list[list[str]]:
    """The arguments of every call of `dydit`, also by a launcher."""
    return [words[words.index("dydit") + 1 :] for words in shell_lines(text) if "dydit" in words]


def inline_calls() -> list[list[str]]:
    """Those within a sentence, `dydit calibrate --smooth`, which need not be complete."""
    spans = re.findall(r"`dydit ([^`]+)`", README + USAGE + TRAINING)
    return [shlex.split(span) for span in spans if "..." not in span]


def python_code(text: str) -> str:
    """The first block of Python code in a document."""
    return python_blocks(text)[0]


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def without_missing_files(arguments: list[str]) -> list[str]:
    """The arguments without a calibration, which is read while they are parsed."""
    at = arguments.index("--calibration") if "--calibration" in arguments else len(arguments)
    return arguments[:at] + arguments[at + 2 :]


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_every_call_parses() -> None:
    calls = dydit_calls(README + USAGE + TRAINING)
    assert len(calls) >= 30
    for name, *arguments in calls:
        with contextlib.suppress(click.exceptions.Exit):  # what only prints something, such as --list-recipes
            cli.commands[name].make_context(name, without_missing_files(arguments))


def test_every_option_in_a_sentence_exists() -> None:
    for name, *arguments in inline_calls():
        known = {option for each in cli.commands[name].params for option in each.opts}
        given = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        assert given <= known, f"dydit {name} has no {given - known}"


def test_options_in_sentences_exist_somewhere() -> None:
    known = {option for command in cli.commands.values() for each in command.params for option in each.opts}
    others = {"--multi_gpu", "--use_fsdp", "--fsdp_version", "--nproc-per-node", "--index-url", "--help", "--debug"}
    spans = " ".join(re.findall(r"`([^`]+)`", README + USAGE + TRAINING))
    assert set(re.findall(r"--[a-z][a-z_-]+", spans)) <= known | others


@pytest.mark.parametrize("launcher", LAUNCHED)
def test_a_launcher_is_told_what_to_start(launcher: str) -> None:
    for words in (each for each in shell_lines(USAGE + TRAINING) if each[0] == launcher):
        before = words[: words.index("dydit")]
        if launcher == "torchrun":  # it abbreviates options of its own: without `--` it takes `--num` for one
            assert before[-2:] == ["-m", "--"]
        else:
            assert before[-1] == "-m" and {"--multi_gpu", "--use_fsdp"} & set(before)


def save_pixart(folder: Path) -> None:
    """Add a small PixArt of diffusers to the folder of a pipeline."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'dydit[vae]'")
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    torch.nn.init.normal_(model.proj_out.weight)
    model.save_pretrained(folder / "transformer")


def test_the_commands_and_then_the_python_code_run(run, monkeypatch, tmp_path: Path, text_encoder: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("DyDiT-XL.pt", "SiT-XL-2-256x256.pt", "model.pt"):  # a SiT has the tensors of a DiT
        shutil.copy(DIGITS, name)
    small = preset("cifar10-S/2", hidden_size=32, depth=3, num_heads=4, input_size=8)
    torch.save(synthetic_model(small).state_dict(), "cifar10_uvit_small.pth")
    shutil.copytree(text_encoder, "PixArt-XL-2-256x256")
    save_pixart(Path("PixArt-XL-2-256x256"))
    (tmp_path / "dydit" / "assets").mkdir(parents=True)
    shutil.copytree(DIGITS.parent, "dydit/assets/digits")
    Path("run/settle").mkdir(parents=True)
    shutil.copy(DIGITS, "run/settle/model.safetensors")
    assert run("export", DIGITS, "--steps", 4, "--out", "quickstart/bundle").code == 0
    done, seen = [], set()
    for words in [*shell_lines(README), *shell_lines(USAGE)]:
        if words[0] != "dydit" or words[1] in NOT_RUN or "--worker" in words or tuple(words) in seen:
            continue
        seen.add(tuple(words))
        name, *arguments = [word.replace("207,360", "2,3").replace("cat,dog", "4,5") for word in words[1:]]
        if "--vae" in arguments:  # digits are pixels
            at = arguments.index("--vae")
            del arguments[at : at + 2]
        result = run(name, *arguments, *FEW.get(name, []))
        # Random rounding at so few steps may be over parity's tolerance; everything else has to succeed.
        assert result.code in ((0, 1) if name == "parity" else (0,)), (words, result.err)
        done.append(name)
    assert done[:8] == ["sample", "convert", "inspect", "export", "parity", "bench", "sample", "sample"]
    assert done[8:10] == ["export", "sample"], "of one's own images"
    assert done[10:18] == ["export", "sample", "convert", "export", "export", "export", "encode", "sample"]
    assert done[18:] == ["export", "bench", "calibrate", "export", "calibrate", "export", "sample", "parity"]
    assert python_code(README) == python_code(USAGE)
    exec(compile(python_code(README).replace("207", "2"), "README.md", "exec"), {})
    assert (tmp_path / "dog.png").stat().st_size > 0


def test_the_python_code_of_the_usage_runs_block_after_block(run, monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("export", DIGITS, "--steps", 4, "--out", "bundle").code == 0
    names: dict[str, Any] = {}
    for block in python_blocks(USAGE):
        exec(compile(block.replace("207", "2").replace("360", "3"), "docs/usage.md", "exec"), names)
    assert len(names["images"]) == 2 and names["images"][0].size == (16, 16)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [str(step) for step in range(20)]


def test_extras_that_they_name_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = README + USAGE + TRAINING + (ROOT / "docs" / "hardware.md").read_text()
    named = {name for names in re.findall(r"'(?:\.|dydit)\[([a-z,-]+)\]'", text) for name in names.split(",")}
    assert named and named <= project["optional-dependencies"].keys()


def test_it_says_what_has_not_run_and_what_is_switched_off() -> None:
    head = README[: README.index("## Two commands")]
    assert "**Status.**" in head and "docs/hardware.md" in head and "(#limits)" in head
    assert "ORT_DISABLE_TELEMETRY" in USAGE and "\n## Limits\n" in README


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_and_picture_is_there(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        file, _, anchor = target.partition("#")
        if file.startswith("http"):
            continue
        path = (document.parent / file).resolve() if file else document
        assert path.exists(), f"{document.name}: {target} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{document.name}: {path.name} has no heading for #{anchor}"


def test_modules_that_design_names_exist() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    named = set(re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.py)?)`", text))
    assert len(named) >= 20
    missing = {name for name in named if not (ROOT / "dydit" / name).exists() and not (ROOT / name).exists()}
    assert not missing, missing


# What docs/bundle.md says


def documented(section: str) -> set[str]:
    """Everything that a section of docs/bundle.md puts between backticks."""
    text = BUNDLE[BUNDLE.index(f"\n## {section}\n") :]
    end = text.find("\n## ", 1)
    return set(re.findall(r"`([^`]+)`", text[: None if end < 0 else end]))


def test_the_bundle_document_has_every_field_of_a_manifest(make_bundle) -> None:
    path = make_bundle(routing="capacity", capacities=(2, 2, 2)).path
    values, named = json.loads((path / "manifest.json").read_text()), documented("Fields of the manifest")
    fields = {field.serialization_alias or name for name, field in Manifest.model_fields.items()}
    assert fields | values.keys() <= named
    for part in (values["model"], values["sampling"], values["plan"], values["subnets"][0]):
        assert part.keys() <= named
    for kind in (PlanKind, Routing, Precision):
        assert {each.value for each in kind} <= named


@pytest.mark.parametrize("plan", ["max-subnets", "sliding"])
def test_the_bundle_document_has_every_file_input_and_output(make_bundle, plan: str) -> None:
    import onnxruntime

    bundle = make_bundle(plan=plan, routing="capacity", capacities=(2, 2, 2))
    files = {re.sub(r"\d{4}", "0000", each.name) for each in bundle.path.iterdir()}
    assert files <= documented("Files")
    entry = bundle.manifest.subnets[0]
    for file in ("conditioning.onnx", entry.file, entry.full_file):
        session = onnxruntime.InferenceSession(bundle.path / file, providers=["CPUExecutionProvider"])
        for value in (*session.get_inputs(), *session.get_outputs()):
            if value.name in bundle.manifest.weights:
                layer = re.sub(r"blocks\.\d+", "blocks.l", value.name).rpartition(".")[0]
                assert f"{layer}.weight" in documented("Weights"), value.name
            else:
                kind = {"tensor(float)": "f32", "tensor(int64)": "int64"}[value.type]
                assert re.search(rf"`{value.name}` \| {kind} \[.*\] \|", BUNDLE), (value.name, value.type)


def test_the_numbers_of_the_bundle_document_are_right() -> None:
    seed, image, draw = map(int, re.search(r"seed (\d+), image (\d+), draw (\d+) begins", BUNDLE).groups())
    assert draw == INITIAL_DRAW
    first = " ".join(f"{each:.8g}," for each in normals(seed, image, draw, 4)).rstrip(",")
    words = np.random.Philox(key=[seed, image], counter=[0, 0, draw, 0]).random_raw(2)
    text = " ".join(BUNDLE.split())
    assert first in text and all(hex(int(word)) in text for word in words)


def test_a_manifest_has_the_digest_that_the_document_describes(make_bundle) -> None:
    import hashlib

    fields = json.loads((make_bundle().path / "manifest.json").read_text())
    digest = fields.pop("digest")
    (code,) = re.findall(r"`(json\.dumps\(fields.*?)`", BUNDLE)
    assert hashlib.sha256(eval(code, {"json": json, "fields": fields})).hexdigest() == digest


PICTURES = {path.name: path for path in (ROOT / "docs" / "images").glob("*.png")}


def test_the_pictures_are_small() -> None:
    assert {name for name, path in PICTURES.items() if path.stat().st_size >= 150_000} == set()


@pytest.mark.release
def test_the_pictures_can_be_drawn_again(tmp_path: Path) -> None:
    models, out = tmp_path / "models", tmp_path / "images"
    shutil.copytree(ROOT / "docs" / "models", models, ignore=shutil.ignore_patterns("*.png", "*.safetensors"))
    out.mkdir()
    command = [sys.executable, ROOT / "docs" / "images" / "make.py", "--steps", "6", "--out", out, "--models", models]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    drawn = {path.name: path for path in out.iterdir()}
    assert drawn and drawn.keys() <= PICTURES.keys()
    for path in drawn.values():
        with Image.open(path) as picture:
            assert picture.width >= 1000
    kept = {path.relative_to(ROOT / "docs" / "models") for path in (ROOT / "docs" / "models").glob("*/*.png")}
    assert {path.relative_to(models) for path in models.glob("*/*.png")} == kept
