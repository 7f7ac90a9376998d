"""ONNX Runtime is imported in one place, which switches its reports off and asks for a release that is new enough."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dydit.engines.flavour import Flavour
from dydit.errors import BackendError
from dydit.runtime.backends import session
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.onnxruntime import OnnxRuntimeBackend
from dydit.runtime.backends.registry import OLDEST_TORCH, backend_status, open_backend

PACKAGE = Path(session.__file__).parents[2]
HOME = PACKAGE / "runtime" / "backends" / "session.py"


def imports_of(tree: ast.AST, package: str) -> list[str]:
    """What a file imports of a package, by statements anywhere and by `import_module` and `__import__`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            found += [str(node.args[0].value)] * (called in ("import_module", "__import__"))
    return [name for name in found if name.split(".")[0] == package]


def test_every_import_of_onnxruntime_goes_through_one_place():
    found = {file for file in PACKAGE.rglob("*.py") if imports_of(ast.parse(file.read_text()), "onnxruntime")}
    assert found == {HOME}
    for sample in (
        "def f():\n    import onnxruntime as ort",
        "from onnxruntime.capi import x",
        "import_module('onnxruntime')",
    ):
        assert imports_of(ast.parse(sample), "onnxruntime"), "the test sees such an import"


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0"), ("", "")])
def test_usage_is_not_reported_unless_the_user_says_so(before, after, make_bundle, tmp_path):
    """In a fresh process with a fresh folder for temporary files, in which the reports would be gathered."""
    bundle = make_bundle(steps=3)
    environment = {name: value for name, value in os.environ.items() if name != session.TELEMETRY}
    environment |= {"TMPDIR": str(tmp_path)} | ({} if before is None else {session.TELEMETRY: before})
    script = f"""
import os
from dydit.runtime.pipeline import DyDiTPipeline
pipe = DyDiTPipeline.from_bundle({str(bundle.path)!r})
pipe([1], output_type="latent")
print(repr(os.environ[{session.TELEMETRY!r}]))
"""
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [repr(after)]
    if after == "1":
        assert not list(tmp_path.iterdir())


def test_weights_lie_apart_from_the_arena_of_a_gpu():
    on_gpu = session.base_options(session.runtime(), BackendOptions(device="cuda"))
    assert on_gpu.get_session_config_entry(session.WEIGHTS_APART) == "1"
    on_cpu = session.base_options(session.runtime(), BackendOptions())
    with pytest.raises(RuntimeError, match="use_device_allocator_for_initializers"):
        on_cpu.get_session_config_entry(session.WEIGHTS_APART)


@pytest.mark.parametrize("version", ["1.22.1", "1.9", "0.4.0", "1.23.0rc2"])
def test_a_release_that_is_too_old_is_refused_in_one_line(version, make_bundle, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", version)
    with pytest.raises(
        BackendError, match=rf"onnxruntime {re.escape(version)} is too old: .* need 1.24 or newer"
    ) as caught:
        session.runtime()
    assert "pip install -U 'onnxruntime>=1.24'" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["1.24", "1.24.0rc1", "1.100.0", "2.0", "1.25.0.dev20260101+cu13"])
def test_newer_releases_are_taken(version, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", version)
    assert session.runtime() is onnxruntime


def test_so_is_an_old_torch(make_bundle, monkeypatch):
    import torch

    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(BackendError, match=r"torch 2\.5\.1\+cpu is too old: .*; pip install -U 'torch>=2\.6'"):
        open_backend("torch", make_bundle(steps=3))


def test_what_is_needed_is_what_is_declared():
    declared = (PACKAGE.parent / "pyproject.toml").read_text()
    needed, on_gpu = (".".join(map(str, each)) for each in (session.OLDEST, session.OLDEST_CUDA))
    assert re.findall(r'"torch>=([\d.]+)', declared) == [".".join(map(str, OLDEST_TORCH))]
    assert re.findall(r"onnxruntime(?:-gpu\[[a-z,]+\])?>=([\d.]+)", declared) == [needed, on_gpu]
    for flavour, package in ((Flavour.TENSORRT, "tensorrt"), (Flavour.TENSORRT_RTX, "tensorrt-rtx-cu13")):
        (oldest,) = re.findall(rf'"{package}>=([\d.]+)', declared)
        assert oldest == ".".join(map(str, flavour.traits.oldest))


def test_a_gpu_needs_a_release_with_all_kernels(make_bundle, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.27.0")
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    with pytest.raises(BackendError) as caught:
        OnnxRuntimeBackend(make_bundle(steps=3), BackendOptions(device="cuda"))
    assert str(caught.value) == (
        "onnxruntime 1.27.0 is too old: bundles on a GPU need 1.28 or newer; pip install -U 'onnxruntime-gpu>=1.28'"
    )
    _, works, text = next(each for each in backend_status() if each[0] == "onnxruntime")
    assert works and text.startswith("onnxruntime 1.27.0, devices: cpu, but not cuda (onnxruntime 1.27.0 is too old")
    OnnxRuntimeBackend(make_bundle(steps=3), BackendOptions(threads=1)).close()


def test_calibrated_bundles_need_a_release_that_reads_them(capacity_bundle, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.27.0")
    with pytest.raises(
        BackendError, match=r"too old: fp8 bundles need 1\.28 or newer; pip install -U 'onnxruntime>=1\.28'"
    ):
        OnnxRuntimeBackend(capacity_bundle("fp8", steps=4))
