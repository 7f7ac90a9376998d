"""Optional packages: which extra of `dydit` installs each, and the command for what is missing."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from dydit.errors import BackendError

EXTRAS = {
    **dict.fromkeys(("torch", "onnx", "onnx_ir", "safetensors", "scipy"), "export"),
    **dict.fromkeys(("accelerate", "sklearn"), "train"),
    **dict.fromkeys(("tensorboard", "wandb"), "trackers"),
    **dict.fromkeys(("jinja2", "matplotlib"), "report"),
    **dict.fromkeys(("diffusers", "onnxscript"), "vae"),
    "transformers": "text",
    "datasets": "data",
    "torch_fidelity": "evaluate",
    "onnxruntime": "cpu",
    "openvino": "openvino",
}
"""The extra that installs a module. `pyproject.toml` lists the packages of each extra."""
CHECKPOINTS = ("torch", "safetensors")
"""What reading and writing checkpoints needs."""
GRAPHS = ("onnx", "onnx_ir")
"""What writing graphs needs."""
FITS = ("scipy",)
"""What fitting measured costs needs."""
REPORTS = ("jinja2", "matplotlib")
"""What pictures and HTML reports need."""
VAES = ("diffusers", "onnxscript")
"""What exporting a VAE decoder needs."""
TEXTS = ("torch", "transformers")
"""What encoding prompts needs."""
DATASETS = ("datasets",)
"""What reading data sets of Hugging Face needs."""
INCEPTION = ("torch", "safetensors", "torch_fidelity")
"""What measuring samples with Inception features needs."""
CLASSIFIERS = ("torch", "safetensors", "sklearn")
"""What measuring samples of a small data set needs."""
TORCH_CPU = "pip install torch --index-url https://download.pytorch.org/whl/cpu"
"""Installs the build of PyTorch without CUDA, which is gigabytes smaller."""
PACKAGES = {"onnx_ir": "onnx-ir", "sklearn": "scikit-learn", "torch_fidelity": "torch-fidelity"}
"""Packages whose name differs from their module's name."""


def backend_modules(backend: str) -> list[str]:
    """The modules that a backend needs; none for TensorRT, which reports missing packages itself."""
    return [backend] if backend in EXTRAS else []


@contextmanager
def quiet_log(name: str) -> Iterator[None]:
    """Hide what a package logs below errors under this name, which is no news for a user of dydit."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def missing(modules: Iterable[str]) -> list[str]:
    """Those of the modules that are not installed. No module is imported."""
    return [module for module in modules if not _is_installed(module)]


def require(what: str, modules: Iterable[str], brought_by: str | None = None) -> None:
    """Raise `BackendError` if modules are missing: one line with all of them, and the command that installs them.

    `what`: what needs them, for example "dydit quickstart". `brought_by`: the extra that installs all of them, if one
    does.
    """
    absent = missing(modules)
    if absent:
        names = ", ".join(PACKAGES.get(module, module) for module in absent)
        extras = {brought_by or EXTRAS[module] for module in absent}
        verb = "is" if len(absent) == 1 else "are"
        first = f" ({TORCH_CPU} first, where there is no GPU)" if "torch" in absent else ""
        raise BackendError(f"{what} needs {names}, which {verb} not installed: {install_command(extras)}{first}")


def require_release(module: Any, package: str, oldest: tuple[int, int], why: str) -> None:
    """Raise `BackendError`, with the version that is needed and the installed one, if a module is older than `oldest`.

    `package`: its name for pip. `why`: what needs the release, for the message.
    """
    version = str(getattr(module, "__version__", "(of an unknown version)"))
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < oldest:
        needed = ".".join(map(str, oldest))
        raise BackendError(
            f"{module.__name__} {version} is too old: {why} need {needed} or newer; "
            f"pip install -U '{package}>={needed}'"
        )


def install_command(extras: Iterable[str]) -> str:
    """The shell command that installs extras."""
    return f"pip install 'dydit[{','.join(sorted(set(extras)))}]'"


def as_installed(text: str) -> str:
    """A message whose commands install from the checkout that dydit was installed from, if it was.

    Messages say `pip install 'dydit[cpu]'`, which pip would look up on an index.
    """
    source, editable = _source()
    if source == "dydit":
        return text
    return re.sub(r"'dydit(\[[a-z,-]+\])'", lambda match: "-e " * editable + shlex.quote(source + match[1]), text)


def _source() -> tuple[str, bool]:
    """The argument of `pip install` that installs dydit again (a checkout's folder, or its name), and if with -e."""
    try:
        text = importlib.metadata.distribution("dydit").read_text("direct_url.json")
        origin = json.loads(text or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return "dydit", False
    url = urlsplit(origin.get("url", ""))
    folder = unquote(url.path)
    if url.scheme != "file" or "dir_info" not in origin or not Path(folder).is_dir():
        return "dydit", False
    return folder, bool(origin["dir_info"].get("editable"))


def _is_installed(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None  # None: importing it is forbidden
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
