"""The backends by name, and which of them work here. Each is imported only when it is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

from dydit.bundle.bundle import Bundle
from dydit.engines.flavour import Flavour
from dydit.errors import BackendError, one_line
from dydit.extras import backend_modules, missing, require_release
from dydit.runtime.backends.base import Backend, BackendOptions
from dydit.runtime.backends.cores import thread_count
from dydit.runtime.device import driver

BACKENDS = ("onnxruntime", "torch", "openvino")
"""The backends that run a bundle as it is, the default first; those of TensorRT need engines."""
DEVICES = ("cpu", "cuda")
OPENVINO_DEVICES = ("cpu", "gpu", "npu")
"""The backend `openvino` calls Intel's GPUs and NPUs as OpenVINO does. `cuda` is always NVIDIA's."""
ALL_DEVICES = (*DEVICES, *OPENVINO_DEVICES[1:])
_RUNS_ON = {
    "cuda": "backend='onnxruntime' (--backend onnxruntime)",
    **dict.fromkeys(OPENVINO_DEVICES[1:], "backend='openvino' (--backend openvino)"),
}
OLDEST_TORCH = (2, 6)


def open_backend(name: str, bundle: Bundle, options: BackendOptions | None = None) -> Backend:
    """The backend `name` on a bundle.

    Raises `BackendError` for an unknown name or device, and if a package that the backend needs is not installed.
    """
    require_known(name)
    options = options or BackendOptions()
    device, colon, number = options.device.partition(":")
    devices = devices_of(name)
    if device not in ALL_DEVICES or (colon and not number.isdecimal()):
        raise BackendError(f"unknown device {options.device!r}; known: {', '.join(devices)}")
    if device not in devices:
        raise BackendError(
            f"{name} runs on {', '.join(devices[:-1])} and {devices[-1]}, not on {device}; use device='cpu' "
            f"(--device cpu), or {_RUNS_ON[device]}"
        )
    if number and int(number):
        if device != "cuda":
            raise BackendError(f"device {options.device!r}: only the first one can be used; use device={device!r}")
        raise BackendError(
            f"device {options.device!r}: only the first visible GPU can be used; set CUDA_VISIBLE_DEVICES={number} "
            "before the process starts, and use device 'cuda'"
        )
    options = dataclasses.replace(options, device=device)
    if options.threads < 0:
        raise BackendError(f"threads is {options.threads}, but must not be negative; 0 lets the backend choose")
    return _OPENERS[name](bundle, options)


def candidates(bundle: Bundle, device: str) -> tuple[str, ...]:
    """The backends that may run a bundle on a device, the default first: those whose packages are installed.

    Those of TensorRT are among them on `cuda`, where the bundle holds engines of their flavour. Nothing is imported,
    so a backend may still refuse.
    """
    names = [name for name in BACKENDS if device in devices_of(name) and not missing(backend_modules(name))]
    if device == "cuda":
        from dydit.engines.store import stores

        indices = [store.read() for store in stores(bundle)]
        names += sorted({index.request.flavour.value for index in indices if index is not None})
    return tuple(names)


def devices_of(name: str) -> tuple[str, ...]:
    """The devices that a backend knows."""
    return OPENVINO_DEVICES if name == "openvino" else DEVICES


def deciding_threads(name: str, options: BackendOptions) -> int | None:
    """The number of CPU threads that the last bits of results depend on; None if they are not computed on the CPU.

    Threads that share an operator split its matrix product. Kernels choose by the size of their part how many terms
    they add before they round: on ONNX Runtime where a thread gets 64 columns or fewer, or one row.
    """
    if options.device != "cpu" or name not in BACKENDS:
        return None
    if name == "torch" and not options.threads:
        require_torch()
        import torch

        return torch.get_num_threads()
    return thread_count(options.threads)


def require_known(name: str) -> None:
    """Raise `BackendError` for an unknown name; the message lists the known ones."""
    if not isinstance(name, str) or name not in _OPENERS:
        raise BackendError(f"unknown backend {name!r}; available: {', '.join(_OPENERS)}")


def backend_status() -> list[tuple[str, bool, str]]:
    """(name, whether it works here, versions and devices or what is missing) of every backend."""
    return [_status(name) for name in _OPENERS]


def _status(name: str) -> tuple[str, bool, str]:
    try:
        return name, True, _PROBES[name]()
    except BackendError as error:
        return name, False, one_line(error)


def _open_onnxruntime(bundle: Bundle, options: BackendOptions) -> Backend:
    if options.device == "cuda" and driver.is_installed():
        from dydit.runtime.backends.ort_cuda import OnnxRuntimeDeviceBackend

        return OnnxRuntimeDeviceBackend(bundle, options)
    from dydit.runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(bundle, options)


def _open_torch(bundle: Bundle, options: BackendOptions) -> Backend:
    require_torch()
    if options.device == "cuda" and driver.is_installed():
        from dydit.runtime.backends.torch_cuda import TorchDeviceBackend

        return TorchDeviceBackend(bundle, options)
    from dydit.runtime.backends.torch import TorchBackend

    return TorchBackend(bundle, options)


def _open_openvino(bundle: Bundle, options: BackendOptions) -> Backend:
    from dydit.runtime.backends.openvino import OpenVinoBackend

    return OpenVinoBackend(bundle, options)


def _open_tensorrt(bundle: Bundle, options: BackendOptions, flavour: Flavour | None = None) -> Backend:
    from dydit.runtime.backends.tensorrt import TensorRTBackend

    return TensorRTBackend(bundle, options, flavour)


def require_torch() -> None:
    """Raise `BackendError`, saying what to install, if PyTorch is missing or too old."""
    try:
        import torch
    except ImportError as error:
        raise BackendError(f"PyTorch cannot be imported ({one_line(error)}); pip install 'dydit[export]'") from error
    require_release(torch, "torch", OLDEST_TORCH, "the operators of a bundle")


def _probe_onnxruntime() -> str:
    from dydit.runtime.backends.session import OLDEST_CUDA, PROVIDERS, require_runtime, runtime

    ort = runtime()
    devices = [device for device, provider in PROVIDERS.items() if provider in ort.get_available_providers()]
    if "cuda" in devices:
        try:
            require_runtime(ort, OLDEST_CUDA, "bundles on a GPU")
        except BackendError as error:
            return f"onnxruntime {ort.__version__}, devices: cpu, but not cuda ({one_line(error)})"
    return f"onnxruntime {ort.__version__}, devices: {', '.join(devices)}"


def _probe_torch() -> str:
    require_torch()
    import torch

    return f"torch {torch.__version__}, devices: {'cpu, cuda' if torch.cuda.is_available() else 'cpu'}"


def _probe_openvino() -> str:
    from dydit.runtime.backends.openvino import describe

    return describe()


def _probe_tensorrt(flavour: Flavour | None = None) -> str:
    from dydit.runtime.backends.tensorrt import describe

    return describe(flavour)


# `tensorrt` runs engines of either flavour that `dydit build` made.
_OPENERS: dict[str, Callable[[Bundle, BackendOptions], Backend]] = {
    "onnxruntime": _open_onnxruntime,
    "torch": _open_torch,
    "openvino": _open_openvino,
    "tensorrt": _open_tensorrt,
    "tensorrt-rtx": partial(_open_tensorrt, flavour=Flavour.TENSORRT_RTX),
}
_PROBES: dict[str, Callable[[], str]] = {
    "onnxruntime": _probe_onnxruntime,
    "torch": _probe_torch,
    "openvino": _probe_openvino,
    "tensorrt": _probe_tensorrt,
    "tensorrt-rtx": partial(_probe_tensorrt, Flavour.TENSORRT_RTX),
}
