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

HEAVY = (
    "torch",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "openvino",
    "safetensors",
    "tensorrt",
    "accelerate",
    "sklearn",
    "scipy",
)
HEAVY += ("matplotlib", "jinja2", "datasets", "pandas", "pyarrow")
# These run a bundle, or say what one is: without PyTorch, ONNX and whatever else is heavy.
LIGHT_ROOMS = ("bundle", "commands", "diffusion", "runtime")
LIGHT = {
    *("dydit", "dydit.child_process", "dydit.cli", "dydit.dtypes", "dydit.errors", "dydit.extras", "dydit.files"),
    *("dydit.locks", "dydit.validation", "dydit.words"),
    *("dydit.models.architecture", "dydit.models.config", "dydit.models.registry", "dydit.models.macs"),
    *("dydit.models.dit", "dydit.models.dit.config", "dydit.models.dit.units"),
    *("dydit.planning.costs", "dydit.planning.plan", "dydit.planning.profile_worker", "dydit.planning.sizes"),
    *("dydit.inspection.gpus", "dydit.planning.step_work"),
    *("dydit.reports.results", "dydit.reports.text", "dydit.training.recipe"),
    *("dydit.calibrate.activation_ranges", "dydit.calibrate.calibration_file", "dydit.calibrate.capacity"),
    *(name for name in MODULES if name.split(".")[1:2] and name.split(".")[1] in LIGHT_ROOMS),
} - {
    *("dydit.diffusion.sampler_step", "dydit.runtime.backends.torch", "dydit.runtime.backends.torch_cuda"),
    "dydit.runtime.backends.torch_products",
    "dydit.runtime.device.torch_engines",
}


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """Hold the package in `root` to the layers of pyproject.toml."""
    call = [
        Path(sys.executable).with_name("lint-imports"),
        "--no-cache",
        "--no-logo",
        "--config",
        ROOT / "pyproject.toml",
    ]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(call, capture_output=True, text=True, cwd=root, env=environment, check=False)


def test_imports_point_one_way() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_import_upwards_would_be_noticed(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "dydit", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    with (tmp_path / "dydit" / "bundle" / "manifest.py").open("a") as file:
        file.write("\n\ndef late():\n    from dydit.parity import parity\n    return parity\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1 and "dydit.bundle.manifest" in done.stdout and "dydit.parity" in done.stdout, (
        done.stdout
    )


def test_an_import_circle_would_be_noticed(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "dydit", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    with (tmp_path / "dydit" / "reports" / "results.py").open("a") as file:
        file.write("\n\ndef late():\n    from dydit.reports import bench_report\n    return bench_report\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1 and "No cycles are allowed in dydit.reports" in done.stdout, done.stdout


def test_every_room_has_a_layer() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = {name.strip() for layer in contracts[0]["layers"] for name in re.split("[:|]", layer)}
    for name, path in MODULES.items():
        above = [name.rsplit(".", up)[0] for up in range(name.count("."))]
        assert path.name == "__init__.py" or layers & set(above), f"{name} is in no layer of pyproject.toml"
    assert layers <= MODULES.keys()


def test_the_package_itself_imports_nothing_heavy() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    at_once = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {getattr(node, "module", None) for node in at_once} <= {"__future__", "typing"}


def test_light_modules_import_without_the_heavy_packages() -> None:
    code = f"""
import importlib, sys
for name in {HEAVY!r}:
    sys.modules[name] = None
for name in {sorted(LIGHT)!r}:
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


@pytest.mark.parametrize("name", ["base.txt", "dev.txt", "evaluate.txt"])
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
    assert names(extras["evaluate"]) <= pins("evaluate.txt").keys()
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

    for package, wanted in {**pins("dev.txt"), **pins("evaluate.txt")}.items():
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


# What only an architecture may know: names of its tensors, how many vectors modulate a block, sizes of its heads. The
# checkpoint formats, which translate other programs' names, may know names, too.
OF_AN_ARCHITECTURE = re.compile(
    r"\b(qkv|fc1|fc2|adaln|adaLN\w*|[xty]_embedder|final_layer|attn_rate|mlp_rate|token_selection|head_dim|null_class_row)\b"
    r"|6 ?\* ?(\w+\.)*depth|(?<!READING = )\bclass_rows\b"
)
KNOWS_ARCHITECTURES = ("dydit.models.registry", "dydit.checkpoints.")


@pytest.mark.parametrize(
    "name", [name for name in MODULES if not re.match(r"dydit\.models\.(dit|uvit|pixart|transformer)\b", name)]
)
def test_no_room_knows_what_an_architecture_is_made_of(name: str) -> None:
    text = MODULES[name].read_text()
    if not name.startswith(KNOWS_ARCHITECTURES):
        found = OF_AN_ARCHITECTURE.search(text)
        assert found is None, f"{name} names {found[0]!r}, which is an architecture's; ask dydit.models.registry"


def test_the_search_for_what_is_an_architectures_finds_it() -> None:
    for text in ('state["blocks.0.attn.qkv.weight"]', "rows = 6 * config.depth + 2", "model.t_embedder(t)"):
        assert OF_AN_ARCHITECTURE.search(text)
    known = [name for name in MODULES if OF_AN_ARCHITECTURE.search(MODULES[name].read_text())]
    assert "dydit.models.dit.layout" in known
