"""The ways to run a bundle that the table compares: what each needs, and how it is opened.

A way is a backend with one setting of what only a GPU shows: CUDA graphs or none, engines built with the GPU out of
sight or for this very GPU. `probes` are the rows of `dydit doctor` that must be well for it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dydit.bundle.bundle import Bundle
from dydit.errors import BackendError
from dydit.files import new_folder
from dydit.runtime.backends.base import Backend, BackendOptions

DRIVER, TORCH, ORT, PYCUDA = "driver", "torch-cuda", "onnxruntime-cuda", "pycuda"


@dataclass(frozen=True)
class Way:
    """A way to run a bundle.

    `whole`: runs stay on the device, so that only whole runs can be timed. `dry`: has a form that runs on the CPU.
    `flavour`: of TensorRT; `ahead`: engines are built with the GPU out of sight.
    """

    name: str
    title: str
    backend: str
    probes: tuple[str, ...]
    whole: bool = False
    graphs: bool = False
    flavour: str | None = None
    ahead: bool = False
    dry: bool = False


WAYS = (
    Way("torch", "PyTorch backend", "torch", (DRIVER, TORCH), dry=True),
    Way("onnxruntime", "ONNX Runtime, step by step", "onnxruntime", (DRIVER, ORT), dry=True),
    Way("ort-loop", "ONNX Runtime, device loop", "onnxruntime", (DRIVER, ORT, PYCUDA), whole=True, dry=True),
    Way("ort-graphs", "ONNX Runtime, device loop with graphs", "onnxruntime", (DRIVER, ORT, PYCUDA), True, True),
    Way(
        *("rtx", "TensorRT for RTX, engines built ahead of time", "tensorrt-rtx"),
        probes=(DRIVER, "tensorrt-rtx", PYCUDA),
        whole=True,
        graphs=True,
        flavour="tensorrt-rtx",
        ahead=True,
    ),
    Way(
        *("rtx-here", "TensorRT for RTX, engines for this GPU", "tensorrt-rtx"),
        probes=(DRIVER, "tensorrt-rtx", PYCUDA),
        whole=True,
        graphs=True,
        flavour="tensorrt-rtx",
    ),
    Way(
        *("tensorrt", "TensorRT", "tensorrt"),
        probes=(DRIVER, "tensorrt", PYCUDA),
        whole=True,
        graphs=True,
        flavour="tensorrt",
    ),
)
TIMED = tuple(way for way in WAYS if way.name != "rtx-here")
"""What is timed: engines for one GPU and engines for all are told apart by whether they run."""


def way_of(name: str) -> Way:
    """A way by name."""
    return next(way for way in WAYS if way.name == name)


def open_way(way: Way, bundle: Bundle, device: str) -> Backend:
    """The backend. Raises `BackendError` and `BundleError` as backends do."""
    options = BackendOptions(device=device)
    if way.flavour is not None:
        from dydit.engines.flavour import Flavour
        from dydit.runtime.backends.tensorrt import TensorRTBackend

        return TensorRTBackend(bundle, options, Flavour(way.flavour), way.graphs)
    if way.whole:
        from dydit.runtime.backends.ort_cuda import OnnxRuntimeDeviceBackend

        return OnnxRuntimeDeviceBackend(bundle, options, way.graphs)
    if way.backend == "onnxruntime":
        from dydit.runtime.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(bundle, options)
    from dydit.runtime.backends.torch import TorchBackend

    return TorchBackend(bundle, options)


def with_engines(way: Way, bundle: Path, copy: Path, jobs: int = 2) -> Path:
    """A copy of a bundle with this way's engines, built by `dydit build`; made once.

    Raises `BackendError` with the line that `dydit build` said where it fails.
    """
    if not copy.is_dir():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(copy) as folder:
            shutil.copytree(bundle, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("engines"))
    build(way, copy, jobs)
    return copy


def build(way: Way, bundle: Path, jobs: int) -> str:
    """Build this way's engines into a bundle; what was said. Raises as `with_engines`."""
    assert way.flavour is not None
    words = [sys.executable, "-m", "dydit", "build", str(bundle), "--flavour", way.flavour, "--jobs", str(jobs)]
    environment = dict(os.environ)
    if way.ahead:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif way.flavour == "tensorrt-rtx":
        from dydit.engines.flavour import present_gpu

        gpu = present_gpu()
        words += ["--compute-capability", gpu.compute_capability] if gpu else []
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise BackendError(f"dydit build: {said[-1] if said else f'exit code {done.returncode}'}")
    return done.stdout.strip()
