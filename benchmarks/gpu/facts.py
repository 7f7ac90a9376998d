"""What is on this machine: `dydit doctor`'s trials, the GPU, libraries of TensorRT, the CUDA compiler."""

from __future__ import annotations

import ctypes
import glob
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from dydit.doctor.doctor import run_doctor
from dydit.engines.flavour import present_gpu

FOLDERS = (
    *("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64"),
    *("/usr/local/cuda*/lib64", "/usr/local/tensorrt*/lib", "/usr/local/TensorRT*/lib", "/opt/tensorrt*/lib"),
    *("/opt/nvidia/*/lib", "/workspace/tensorrt/lib"),
)
SEARCHED = "libnvinfer*.so*"


def installed() -> dict[str, Any]:
    """Everything, as plain data; what is missing has a reason in its row."""
    gpu = present_gpu()
    return {
        "doctor": run_doctor().to_json(),
        "gpu": None if gpu is None else {"name": gpu.name, "compute_capability": gpu.compute_capability},
        "driver": driver_version(),
        "memory_bytes": None if (memory := device_memory()) is None else memory[1],
        "libnvinfer": tensorrt_libraries(),
        "nvcc": nvcc(),
    }


def driver_version() -> str | None:
    """The kernel driver's line, which has its version; None without one."""
    file = Path("/proc/driver/nvidia/version")
    return file.read_text().splitlines()[0] if file.is_file() else None


def tensorrt_libraries() -> list[str]:
    """Files of TensorRT in the usual folders, the library path and Python's packages, whoever put them there."""
    folders = [*FOLDERS, *os.environ.get("LD_LIBRARY_PATH", "").split(":")]
    folders += [
        f"{path}/{package}" for path in sys.path for package in ("tensorrt_libs", "tensorrt_rtx*_libs", "nvidia/*/lib")
    ]
    found = {name for folder in folders if folder for name in glob.glob(f"{folder}/{SEARCHED}")}
    return sorted(found)


def nvcc() -> str:
    """The CUDA compiler's version, or that there is none."""
    path = shutil.which("nvcc") or next(iter(sorted(glob.glob("/usr/local/cuda*/bin/nvcc"))), None)
    if path is None:
        return "no nvcc on the path or in /usr/local/cuda*"
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return f"{path}: {lines[-1] if lines else f'exit code {done.returncode}'}"


def device_memory() -> tuple[int, int] | None:
    """(free, total) bytes of the first GPU, by the driver alone; None where it does not tell.

    It takes the device's primary context, which PyTorch and onnxruntime use too.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return None
    try:
        if cuda.cuCtxPushCurrent_v2(context):
            return None
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        code = cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        cuda.cuCtxPopCurrent_v2(ctypes.byref(context))
        return None if code else (free.value, total.value)
    finally:
        cuda.cuDevicePrimaryCtxRelease_v2(device)
