"""The code in README: its commands parse and, on the shipped model in few steps, run in their order."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

import dydit
from dydit.cli import cli

README = (Path(__file__).parents[1] / "README.md").read_text()
DIGITS = Path(dydit.__file__).parent / "assets" / "digits" / "dydit.safetensors"
# Options that make a command small; later ones win over those of README.
FEW = {
    "calibrate": ["--steps", "4", "--samples", "16", "--held-out", "4", "--batch-size", "2", "--quantile", "0.5"],
    "export": ["--steps", "4"],
    "parity": ["--every", "4"],
    "bench": ["--repeats", "1", "--steps-measured", "1"],
    "sample": ["--num", "2"],
}
NOT_RUN = ("quickstart", "train", "doctor", "build")
"""These take long, or need what is not everywhere; they have tests of their own."""
LAUNCHED = ("torchrun", "accelerate")


def shell_lines() -> list[list[str]]:
    """The words of each line of README's shell code, without its comments."""
    blocks = re.findall(r"^ {4}(\S.*)$", README, re.MULTILINE)
    return [words for line in blocks if (words := shlex.split(line, comments=True))]


def dydit_calls() -> list[list[str]]:
    """The arguments of every call of `dydit`, also by a launcher."""
    return [words[words.index("dydit") + 1 :] for words in shell_lines() if "dydit" in words]


def inline_calls() -> list[list[str]]:
    """Those within a sentence, `dydit calibrate --smooth`, which need not be complete."""
    spans = re.findall(r"`dydit ([^`\n]+)`", README)
    return [shlex.split(span) for span in spans if "..." not in span]


def without_missing_files(arguments: list[str]) -> list[str]:
    """The arguments without a calibration, which is read while they are parsed."""
    at = arguments.index("--calibration") if "--calibration" in arguments else len(arguments)
    return arguments[:at] + arguments[at + 2 :]


def test_every_call_parses() -> None:
    calls = dydit_calls()
    assert len(calls) >= 12
    for name, *arguments in calls:
        cli.commands[name].make_context(name, without_missing_files(arguments))


def test_every_option_in_a_sentence_exists() -> None:
    for name, *arguments in inline_calls():
        known = {option for each in cli.commands[name].params for option in each.opts}
        given = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        assert given <= known, f"dydit {name} has no {given - known}"


def test_options_in_sentences_exist_somewhere() -> None:
    known = {option for command in cli.commands.values() for each in command.params for option in each.opts}
    others = {"--multi_gpu", "--nproc-per-node", "--minutes", "--work", "--dry-run", "--digits", "--xl", "--plans"}
    others |= {"--packed", "--only", "--targets", "--index-url", "--help"}
    spans = " ".join(re.findall(r"`([^`\n]+)`", README))
    assert set(re.findall(r"--[a-z][a-z_-]+", spans)) <= known | others


@pytest.mark.parametrize("launcher", LAUNCHED)
def test_a_launcher_is_told_what_to_start(launcher: str) -> None:
    (words,) = (each for each in shell_lines() if each[0] == launcher)
    # torchrun abbreviates options of its own: without `--` it takes `--num` for one.
    assert words[: words.index("dydit")][-2:] == (["-m", "--"] if launcher == "torchrun" else ["--multi_gpu", "-m"])


def test_the_commands_and_then_the_python_code_run(run, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(DIGITS, "DyDiT-XL.pt")
    (tmp_path / "dydit" / "assets").mkdir(parents=True)
    shutil.copytree(DIGITS.parent, "dydit/assets/digits")
    assert run("export", DIGITS, "--steps", 4, "--out", "quickstart/bundle").code == 0
    done = []
    for words in shell_lines():
        if words[0] != "dydit" or words[1] in NOT_RUN or "--worker" in words:
            continue
        name, *arguments = [word.replace("207,360", "2,3") for word in words[1:]]
        if "--vae" in arguments:  # digits are pixels
            at = arguments.index("--vae")
            del arguments[at : at + 2]
        result = run(name, *arguments, *FEW.get(name, []))
        # Random rounding at so few steps may be over parity's tolerance; everything else has to succeed.
        assert result.code in ((0, 1) if name == "parity" else (0,)), (words, result.err)
        done.append(name)
    assert done[:3] == ["sample", "export", "bench"]
    assert done[3:] == ["convert", "inspect", "export", "parity", "bench", "sample", "calibrate", "export"]
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    exec(compile(code.replace("207", "2"), "README.md", "exec"), {})
    assert (tmp_path / "dog.png").stat().st_size > 0


def test_extras_that_it_names_exist() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    text = README + (Path(__file__).parents[1] / "docs" / "hardware.md").read_text()
    named = {name for names in re.findall(r"'(?:\.|dydit)\[([a-z,-]+)\]'", text) for name in names.split(",")}
    assert named and named <= project["optional-dependencies"].keys()


def test_it_says_what_has_not_run_and_what_is_switched_off() -> None:
    head = README[: README.index("## Two commands")]
    assert "**Status.**" in head and "docs/hardware.md" in head and "(#limits)" in head
    assert "ORT_DISABLE_TELEMETRY" in README and "\n## Limits\n" in README
