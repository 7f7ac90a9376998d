"""The two flavours of TensorRT: which package each is, where it can build, and what it cannot do.

`tensorrt` (data-centre GPUs) builds on the GPU that will run the engines; `tensorrt-rtx` (RTX GPUs) builds without a
GPU. Neither is imported before it is used. Polygraphy drives either, but only one of them in a process, so builds run
in processes of their own.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from dydit.errors import BackendError, one_line
from dydit.extras import require_release

_POLYGRAPHY_SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"
_CUDA_LIBRARY = "libcuda.so.1"
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


class Flavour(StrEnum):
    """A TensorRT package, by the name that users write."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"

    @property
    def module(self) -> str:
        """The Python module's name."""
        return self.value.replace("-", "_")

    @property
    def traits(self) -> Traits:
        """What it can do."""
        return _TRAITS[self]


@dataclass(frozen=True)
class Traits:
    """What a flavour can do.

    `package`: its name for pip. `majors`: the supported major versions. `oldest`: the first release that is taken.
    `ahead_of_time`: builds without a GPU. `data_dependent_shapes`: has NonZero. `targets`: the compute capabilities
    that it can build for; empty if it builds for the GPU that is there. 7.5 is missing for tensorrt-rtx: there it has
    no fp32 matrix product, and routers, embedding and final layer are fp32 in every precision.
    """

    package: str
    majors: tuple[int, ...]
    oldest: tuple[int, int]
    ahead_of_time: bool
    data_dependent_shapes: bool
    targets: tuple[str, ...]


_TRAITS = {
    # 10.14 is the first whose parser knows the operator Attention.
    Flavour.TENSORRT: Traits(
        "tensorrt", (10, 11), oldest=(10, 14), ahead_of_time=False, data_dependent_shapes=True, targets=()
    ),
    Flavour.TENSORRT_RTX: Traits(
        "tensorrt-rtx-cu13",
        (1,),
        oldest=(1, 7),
        ahead_of_time=True,
        data_dependent_shapes=False,
        targets=("8.0", "8.6", "8.9", "12.0", "12.1"),
    ),
}


def load_flavour(flavour: Flavour) -> Any:
    """The flavour's module. Raises `BackendError`, saying what to install, if it is missing, too old or too new."""
    install = f"pip install 'dydit[{flavour}]'"
    try:
        module = importlib.import_module(flavour.module)
    except (ImportError, OSError) as error:
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == flavour.module
        what = "is not installed" if is_missing else f"cannot be imported ({one_line(error)})"
        raise BackendError(f"{flavour.module} {what}: {install}") from error
    major = module.__version__.partition(".")[0]
    if not (major.isdigit() and int(major) in flavour.traits.majors):
        known = " or ".join(f"{each}.x" for each in flavour.traits.majors)
        raise BackendError(f"{flavour} {module.__version__} is not supported, only {known}: {install}")
    require_release(module, flavour.traits.package, flavour.traits.oldest, "the graphs of a bundle")
    return module


def installed_version(flavour: Flavour) -> str:
    """The version of a flavour, `1.7.1.116`. Raises as `load_flavour` does."""
    version: str = load_flavour(flavour).__version__
    return version


def load_polygraphy(flavour: Flavour) -> Any:
    """`polygraphy.backend.trt`, driving this flavour.

    Raises `BackendError` if Polygraphy is missing, or drives the other flavour in this process already.
    """
    load_flavour(flavour)
    rtx = flavour is Flavour.TENSORRT_RTX
    if "polygraphy" not in sys.modules:
        os.environ[_POLYGRAPHY_SWITCH] = str(int(rtx))
    try:
        config = importlib.import_module("polygraphy.config")
        loaders = importlib.import_module("polygraphy.backend.trt")
    except ModuleNotFoundError as error:
        raise BackendError(f"{error.name} is not installed: pip install 'dydit[{flavour}]'") from error
    if bool(config.USE_TENSORRT_RTX) != rtx:
        raise BackendError(
            f"Polygraphy already uses the other TensorRT flavour in this process; use {flavour} in a new process"
        )
    importlib.import_module("polygraphy.logger").G_LOGGER.module_severity = 1000  # our messages repeat what matters
    return loaders


def is_installed(flavour: Flavour) -> bool:
    """Whether the module is installed; it is not imported."""
    return importlib.util.find_spec(flavour.module) is not None


def default_flavour() -> Flavour:
    """The flavour that is installed; if both are, `tensorrt` where there is a GPU to build on.

    Raises `BackendError` if none is installed.
    """
    here = [flavour for flavour in Flavour if is_installed(flavour)]
    if not here:
        raise BackendError(
            "TensorRT is not installed: pip install 'dydit[tensorrt-rtx]' (builds without a GPU, for RTX GPUs) or "
            "'dydit[tensorrt]' (builds on the data-centre GPU that runs the engines)"
        )
    if len(here) == 1:
        return here[0]
    return Flavour.TENSORRT if present_gpu() else Flavour.TENSORRT_RTX


def require_target(flavour: Flavour, gpu: Gpu) -> None:
    """Raise `BackendError`, naming the alternatives, if engines of a flavour do not run on a GPU."""
    targets = flavour.traits.targets
    if targets and gpu.compute_capability not in targets:
        raise BackendError(
            f"{flavour} engines run on compute capability {', '.join(targets[:-1])} and {targets[-1]}, but not on the "
            f"{gpu} here; build with --flavour tensorrt (pip install 'dydit[tensorrt]'), or use backend='onnxruntime', "
            "device='cuda' (--backend onnxruntime --device cuda)"
        )


@dataclass(frozen=True)
class Gpu:
    """The first NVIDIA GPU here: its name and compute capability, `8.9`."""

    name: str
    compute_capability: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability})"


def present_gpu() -> Gpu | None:
    """The GPU that engines would run on, according to the driver; None without one."""
    try:
        cuda = ctypes.CDLL(_CUDA_LIBRARY)
    except OSError:
        return None
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    numbers = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0) or cuda.cuDeviceGetName(name, 256, device):
        return None
    for number, attribute in zip(numbers, (_CAPABILITY_MAJOR, _CAPABILITY_MINOR), strict=True):
        if cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
    return Gpu(name.value.decode(errors="replace"), f"{numbers[0].value}.{numbers[1].value}")
