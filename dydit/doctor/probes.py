"""The probes of `dydit doctor`: each runs what its name says, or gives the reason why that does not work here.

A probe runs in a process of its own (`run_probe`), so that a native library that crashes or hangs costs one line and
not the report. Its last line of output is one JSON object, `{"ok": bool, "detail": str, "fix": str | null}`.
"""

from __future__ import annotations

import base64
import ctypes
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from typing import Any

import numpy as np

from dydit.errors import BackendError, one_line
from dydit.reports.results import Result
from dydit.runtime.backends.session import load_cuda_libraries, runtime
from dydit.words import counted

SECONDS = 120
NO_GPU = "an NVIDIA GPU and its driver"
# The ONNX graph y = x @ x for x [2, 2] f32, opset 23, IR 11. It is written out, so that making it needs no package.
_GRAPH = base64.b64decode(
    "CAs6RAoRCgF4CgF4EgF5IgZNYXRNdWwSBXByb2JlWhMKAXgSDgoMCAESCAoCCAIKAggCYhMKAXkSDgoMCAESCAoCCAIKAggCQgQKABAX"
)
_X = np.array([[1, 2], [3, 4]], np.float32)


class Finding(Result):
    """The result of a probe. `fix`: what would make it work, as a command if possible."""

    ok: bool
    detail: str
    fix: str | None = None


class Unavailable(Exception):
    """Something is missing; `fix` says what to do about it."""

    def __init__(self, detail: str, fix: str | None = None):
        super().__init__(detail)
        self.fix = fix


def onnxruntime_cpu() -> str:
    """Run a graph on the CPU."""
    return _run_graph("CPUExecutionProvider", "pip install 'dydit[cpu]'")


def onnxruntime_cuda() -> str:
    """Run a graph through the CUDA provider."""
    fix = "pip uninstall -y onnxruntime; pip install 'dydit[gpu]'"
    onnxruntime = _onnxruntime("pip install 'dydit[gpu]'")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise Unavailable(f"onnxruntime {onnxruntime.__version__} is a build without CUDA", fix)
    load_cuda_libraries(onnxruntime)
    return _run_graph("CUDAExecutionProvider", fix)


def _onnxruntime(fix: str) -> Any:
    try:
        return runtime()
    except BackendError as error:
        raise Unavailable(one_line(error), fix) from error


def _run_graph(provider: str, fix: str) -> str:
    onnxruntime = _onnxruntime(fix)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(_GRAPH, settings, providers=[provider])
        if provider not in session.get_providers():
            raise Unavailable(f"onnxruntime {onnxruntime.__version__} cannot start its {provider}", fix)
        start = time.perf_counter()
        (y,) = session.run(None, {"x": _X})
    except Exception as error:  # native libraries raise anything, and that is the finding
        if isinstance(error, Unavailable):
            raise
        raise Unavailable(f"onnxruntime {onnxruntime.__version__}: {one_line(error)[:160]}", fix) from error
    if not np.array_equal(y, _X @ _X):
        raise Unavailable(f"onnxruntime {onnxruntime.__version__} multiplies incorrectly: {y.tolist()}", fix)
    return f"onnxruntime {onnxruntime.__version__} ran a graph in {1e3 * (time.perf_counter() - start):.1f} ms"


def openvino_cpu() -> str:
    """Run a graph on the CPU with OpenVINO, and list its devices."""
    from dydit.runtime.backends.openvino import describe
    from dydit.runtime.backends.ov_session import openvino_module

    fix = "pip install 'dydit[openvino]'"
    try:
        openvino, facts = openvino_module(), describe()
    except BackendError as error:
        raise Unavailable(one_line(error), fix) from error
    try:
        start = time.perf_counter()
        core = openvino.Core()
        (y,) = core.compile_model(core.read_model(_GRAPH), "CPU")({"x": _X}).values()
    except Exception as error:  # as in _run_graph
        raise Unavailable(f"{facts}: {one_line(error)[:160]}", fix) from error
    if not np.array_equal(y, _X @ _X):
        raise Unavailable(f"{facts}: multiplies incorrectly: {y.tolist()}", fix)
    return f"{facts}, ran a graph in {1000 * (time.perf_counter() - start):.1f} ms"


def torch_cpu() -> str:
    """Multiply matrices on the CPU."""
    torch = _torch()
    _multiply(torch, "cpu")
    return f"torch {torch.__version__}, {counted(torch.get_num_threads(), 'thread')}"


def torch_cuda() -> str:
    """Multiply matrices on the GPU."""
    torch = _torch()
    if torch.version.cuda is None:
        raise Unavailable(
            f"torch {torch.__version__} is a build without CUDA",
            "install torch's CUDA build: https://pytorch.org/get-started",
        )
    if not torch.cuda.is_available():
        raise Unavailable(f"torch {torch.__version__} finds no GPU", NO_GPU)
    try:
        _multiply(torch, "cuda")
    except RuntimeError as error:
        raise Unavailable(f"torch {torch.__version__}: {one_line(error)[:160]}") from error
    return f"torch {torch.__version__} with CUDA {torch.version.cuda} on {torch.cuda.get_device_name()}"


def _multiply(torch: Any, device: str) -> None:
    x = torch.from_numpy(_X).to(device)
    product = (x @ x).cpu().numpy()
    if not np.array_equal(product, _X @ _X):  # of small integers, exact on every device
        raise Unavailable(
            f"torch {torch.__version__} multiplies incorrectly: {product.tolist()}", "pip install -U torch"
        )


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise Unavailable(f"torch cannot be imported: {one_line(error)}", "pip install 'dydit[export]'") from error
    return torch


def tensorrt() -> str:
    """Import TensorRT and create a builder, which needs its native libraries; and look for Polygraphy."""
    trt, _ = _tensorrt("tensorrt")
    return f"tensorrt {trt.__version__} imports and creates a builder"


def tensorrt_rtx() -> str:
    """Import TensorRT for RTX and build an engine, which works without a GPU."""
    trt, builder = _tensorrt("tensorrt_rtx")
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.INTERNAL_ERROR))
    start = time.perf_counter()
    built = parser.parse(_GRAPH) and builder.build_serialized_network(network, builder.create_builder_config())
    if not built:
        raise Unavailable(
            f"tensorrt_rtx {trt.__version__} cannot build an engine", "pip install -U 'dydit[tensorrt-rtx]'"
        )
    return f"tensorrt_rtx {trt.__version__} built an engine in {time.perf_counter() - start:.1f} s"


def _tensorrt(module: str) -> tuple[Any, Any]:
    """The module and a builder."""
    fix = f"pip install 'dydit[{module.replace('_', '-')}]'"
    try:
        trt = importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(f"{module} cannot be imported: {one_line(error)[:160]}", fix) from error
    try:
        builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    except Exception as error:  # as in _run_graph
        raise Unavailable(
            f"{module} {trt.__version__} cannot create a builder: {one_line(error)[:160]}", NO_GPU
        ) from error
    if find_spec("polygraphy") is None:
        raise Unavailable(
            f"{module} {trt.__version__} is installed, but polygraphy, which dydit uses with it, is not", fix
        )
    return trt, builder


def driver() -> str:
    """Ask the NVIDIA driver for its devices."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise Unavailable("no NVIDIA driver (libcuda) on this machine", NO_GPU) from error
    if code := library.cuInit(0):
        raise Unavailable(f"the NVIDIA driver does not start (CUDA error {code})", NO_GPU)
    number, devices = ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(number))
    library.cuDeviceGetCount(ctypes.byref(devices))
    if not devices.value:
        raise Unavailable("the NVIDIA driver sees no GPU", NO_GPU)
    names = []
    for index in range(devices.value):
        name = ctypes.create_string_buffer(100)
        library.cuDeviceGetName(name, 100, index)
        names.append(name.value.decode(errors="replace"))
    return f"CUDA up to {number.value // 1000}.{number.value % 1000 // 10}; {', '.join(names)}"


def driver_package() -> str:
    """Import PyCUDA or cuda-bindings, and open the primary context of the first GPU."""
    from dydit.runtime.device.driver import INSTALL, open_driver, require_driver

    try:
        found = require_driver()
    except BackendError as error:
        raise Unavailable(str(error).removesuffix(f"; {INSTALL}")[:320], "pip install 'dydit[gpu]'") from error
    try:
        opened = open_driver()
        opened.push()
        opened.pop()
        opened.close()
    except BackendError as error:
        raise Unavailable(f"{found}: {one_line(error)[:160]}", NO_GPU) from error
    return found


def registry() -> str:
    """The status that the runtime reports for each backend, as JSON: [[name, works, detail], ...]."""
    from dydit.runtime.backends.registry import backend_status

    return json.dumps(backend_status())


PROBES: dict[str, Callable[[], str]] = {
    "registry": registry,
    "onnxruntime-cpu": onnxruntime_cpu,
    "onnxruntime-cuda": onnxruntime_cuda,
    "openvino-cpu": openvino_cpu,
    "torch-cpu": torch_cpu,
    "torch-cuda": torch_cuda,
    "driver": driver,
    "tensorrt": tensorrt,
    "tensorrt-rtx": tensorrt_rtx,
    "driver-package": driver_package,
}


def attempt(name: str) -> Finding:
    """Run a probe in this process."""
    try:
        return Finding(ok=True, detail=PROBES[name]())
    except Unavailable as missing:
        return Finding(ok=False, detail=one_line(missing), fix=missing.fix)
    except (BackendError, PackageNotFoundError) as error:
        return Finding(ok=False, detail=one_line(error))


def run_probe(name: str, seconds: float = SECONDS) -> Finding:
    """Run a probe in a process of its own. A crash or a timeout becomes a finding."""
    command = [sys.executable, "-c", f"from dydit.doctor.probes import main; main({name!r})"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return Finding(ok=False, detail=f"did not answer within {seconds:.0f} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        errors = done.stderr.strip().splitlines()
        return Finding(
            ok=False, detail=f"crashed (exit code {done.returncode}): {errors[-1][:160] if errors else 'no output'}"
        )
    return Finding.parse(json.loads(lines[-1]))


def main(name: str) -> None:
    """Run a probe in the child process of `run_probe`."""
    print(json.dumps(attempt(name).to_json()))
