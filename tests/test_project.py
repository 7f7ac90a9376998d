"""The project holds together: imports point one way, light parts stay light, pins are exact, what is written exists."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import dydit
from dydit.cli import cli
from dydit.extras import EXTRAS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dydit"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
LONGEST = 400

# Which parts a part may import. Those of `GROUND` belong to nobody and to all.
GROUND = {"errors", "extras", "files", "locks", "words"}
MODEL = GROUND | {"models", "diffusion"}
BUNDLE = MODEL | {"bundle"}
ENGINES = BUNDLE | {"engines"}
MIDDLE = ENGINES | {"calibrate", "training", "graph", "writing", "export", "runtime"}
# What an architecture writes of itself, beside its model: tensors and graphs of a bundle. A part of its own.
WRITING = {f"dydit.models.dit.{name}" for name in ("blocks", "ends", "graph", "smoothing")}
SHARED = {"cli_options", "cli_progress", "cli_suggest"}
COMMANDS = {"cli_build", "cli_calibrate", "cli_decode", "cli_export", "cli_sample", "cli_vae"}
ALLOWED = {
    "errors": {"words"},
    "extras": {"errors"},
    "files": {"errors", "locks", "words"},
    "words": set(),
    "locks": {"errors"},
    "diffusion": GROUND | {"diffusion"},
    "models": MODEL,
    "bundle": BUNDLE,
    "engines": ENGINES,
    "training": BUNDLE | {"training"},
    "calibrate": MODEL | {"calibrate"},
    "graph": BUNDLE | {"graph"},
    "writing": BUNDLE | {"graph", "writing"},
    "export": BUNDLE | {"calibrate", "graph", "writing", "export"},
    "runtime": ENGINES | {"runtime"},
    "verify": MIDDLE | {"verify"},
    "cli_progress": {"words"},
    "cli_options": MIDDLE | {"cli_progress"},
    "cli_suggest": MIDDLE | {"cli_options"},
    "cli_errors": GROUND | {"cli_options"},
    "cli_build": MIDDLE | {"verify", *SHARED},
    "cli_calibrate": MIDDLE | {"verify", *SHARED},
    "cli_decode": MIDDLE | {*SHARED, "cli_vae"},
    "cli_export": MIDDLE | {"verify", *SHARED, "cli_vae"},
    "cli_sample": MIDDLE | SHARED,
    "cli_vae": MIDDLE,
    "cli": MIDDLE | {"verify", "cli_errors", *SHARED, *COMMANDS},
    "__main__": {"cli"},
}
HEAVY = ("torch", "onnx", "onnx_ir", "onnxruntime", "safetensors", "tensorrt", "accelerate", "sklearn", "scipy")
HEAVY += ("matplotlib", "jinja2")
# These run PyTorch or write graphs: they, and nothing else in their parts, may need it as soon as they are imported.
TORCH_FREE = (
    *(
        "dydit",
        "dydit.cli",
        "dydit.cli_options",
        "dydit.cli_decode",
        "dydit.cli_progress",
        "dydit.cli_suggest",
        "dydit.cli_export",
        "dydit.cli_sample",
        "dydit.cli_vae",
        "dydit.cli_errors",
        "dydit.errors",
        "dydit.extras",
        "dydit.files",
        "dydit.words",
        "dydit.models.architecture",
        "dydit.models.config",
        "dydit.models.dit.units",
        "dydit.models.validation",
    ),
    *("dydit.models.cost", "dydit.training.recipe", "dydit.export.plan", "dydit.verify.results"),
    *("dydit.export.costs", "dydit.export.sizes", "dydit.verify.text", "dydit.verify.profile_worker"),
    *(name for name in MODULES if name.startswith(("dydit.diffusion", "dydit.bundle", "dydit.calibrate"))),
    *(name for name in MODULES if name.startswith("dydit.runtime") and name != "dydit.runtime.backends.torch"),
)


def imported_names(path: Path) -> set[str]:
    """Every module of `dydit` that a file imports anywhere, also inside functions and for types alone."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name in MODULES}


def part_of(name: str) -> str:
    if name in WRITING:
        return "writing"
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("name", [name for name in MODULES if part_of(name)])
def test_imports_point_one_way(name: str) -> None:
    part = part_of(name)
    assert part in ALLOWED, f"{name} is a part that the layering does not know"
    imported = {part_of(other) for other in imported_names(MODULES[name])} - {""}
    assert imported <= ALLOWED[part], f"{name} imports {sorted(imported - ALLOWED[part])}"


def test_the_layering_would_notice_an_import_upwards(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("def f():\n    from dydit.verify import results\n    import dydit.runtime.loop\n")
    parts = {part_of(name) for name in imported_names(file)}
    assert {"verify", "runtime"} <= parts
    assert not parts <= ALLOWED["bundle"]
    assert all(name in MODULES for name in WRITING) and not ALLOWED["writing"] <= ALLOWED["models"]


def test_the_package_itself_imports_nothing_heavy() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    at_once = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {getattr(node, "module", None) for node in at_once} <= {"__future__", "typing"}


def test_light_modules_import_without_the_heavy_packages() -> None:
    code = f"""
import importlib, sys
for name in {HEAVY!r}:
    sys.modules[name] = None
for name in {TORCH_FREE!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_too_long(name: str) -> None:
    lines = len(MODULES[name].read_text().splitlines())
    assert lines <= LONGEST, f"{name} has {lines} lines, more than {LONGEST}"


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_for(name: str) -> None:
    assert ast.get_docstring(ast.parse(MODULES[name].read_text())), f"{name} has no docstring"


def requirements(name: str) -> list[str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pins(name: str) -> dict[str, str]:
    """Package (normalised) -> version, with what `-r` brings in."""
    found: dict[str, str] = {}
    for line in requirements(name):
        if line.startswith("-r "):
            found |= pins(line.removeprefix("-r "))
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)", line)
        assert match, f"requirements/{name}: {line!r} is not an exact pin"
        found[re.sub(r"[-_.]+", "-", match[1]).lower()] = match[2]
    return found


@pytest.mark.parametrize("name", ["base.txt", "dev.txt"])
def test_requirements_are_exact_and_portable(name: str) -> None:
    for package in pins(name):
        assert not package.startswith(("nvidia", "cuda", "triton")), f"{package} belongs to one kind of machine"
    assert "://" not in (ROOT / "requirements" / name).read_text()


def test_every_declared_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def names(lines: list[str]) -> set[str]:
        found = {re.split(r"[\[<>=!~;, ]", line, maxsplit=1)[0] for line in lines}
        return {re.sub(r"[-_.]+", "-", name).lower() for name in found} - {"dydit"}

    base = names([*project["dependencies"], *extras["export"], *extras["report"], *extras["cpu"]])
    assert base <= pins("base.txt").keys()
    assert names([*extras["train"], *extras["tensorrt-rtx"], *extras["vae"], *extras["dev"]]) <= pins("dev.txt").keys()
    rtx = {version for package, version in pins("dev.txt").items() if package.startswith("tensorrt-rtx-cu13")}
    assert len(rtx) == 1, "bindings and libraries are of one version"


def test_every_extra_that_a_message_advises_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    advised = {name for path in MODULES.values() for name in re.findall(r"'dydit\[([a-z-]+)\]'", path.read_text())}
    assert advised and advised <= extras.keys(), advised - extras.keys()
    assert set(EXTRAS.values()) <= extras.keys()


def test_the_environment_is_the_pinned_one() -> None:
    if os.environ.get("CI") != "true":
        pytest.skip("only CI promises to run in the pinned environment")
    from importlib.metadata import version

    for package, wanted in pins("dev.txt").items():
        assert version(package).partition("+")[0] == wanted, package


def test_make_targets_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = {target for line in documented_lines() for target in re.findall(r"^make ([a-z]+)\b", line)}
    assert {"quickstart", "test", "check"} <= targets
    assert asked and asked <= targets, asked - targets


def test_commands_in_the_documents_exist() -> None:
    calls = [line.split() for line in documented_lines() if re.match(r"(\S*/)?dydit [a-z]+( |$)", line)]
    assert calls
    for _, name, *rest in calls:
        assert name in cli.commands, name
        known = {option for parameter in cli.commands[name].params for option in parameter.opts}
        unknown = {word.strip("[]|").partition("=")[0] for word in rest if re.match(r"\[?--[a-z]", word)} - known
        assert not unknown, f"dydit {name} has no {unknown}"


def documented_lines() -> list[str]:
    """The lines of all code in README and CONTRIBUTING; continued ones joined, prompts taken off."""
    text = "\n".join((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
    return [
        line.strip().removeprefix("$ ") for block in code_in(text) for line in block.replace("\\\n", " ").split("\n")
    ]


def code_in(markdown: str) -> list[str]:
    """Fenced and indented blocks, and `spans`."""
    fenced = re.findall(r"^```[a-z]*\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
    return [*fenced, *re.findall(r"^ {4}(.*)$", markdown, re.MULTILINE), *re.findall(r"`([^`\n]+)`", markdown)]


def test_a_wheel_carries_what_the_package_reads(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source / "dydit", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run([*build, "-w", str(tmp_path), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("dydit-*.whl"))) as wheel:
        inside = set(wheel.namelist())
    data = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {str(path.relative_to(ROOT)) for path in data} <= inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)


def test_a_built_package_has_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "dydit.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", dydit.__version__)
    assert dydit.__version__ in (ROOT / "CHANGELOG.md").read_text()
    assert any("--version" in option.opts for option in cli.params)
