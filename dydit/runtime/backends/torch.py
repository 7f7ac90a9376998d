"""The PyTorch backend: the sliced form (`dydit.models.dit.sliced`) on a bundle's weights. The yardstick of others."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dydit.bundle.bundle import Bundle
from dydit.bundle.stored import WEIGHTS
from dydit.errors import BackendError
from dydit.models.dit.sliced import SlicedDiT, conditioning
from dydit.runtime.backends.base import Arrays, Backend, BackendOptions, StepResult, Subnet

_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class TorchSubnet(Subnet):
    """A subnetwork as sliced matrices; consecutive slots are views of the shared weights."""

    def __init__(self, bundle: Bundle, index: int, weights: dict[str, Tensor], full_capacity: bool, debug: bool):
        super().__init__(bundle, index)
        manifest, entry = bundle.manifest, self.entry
        self._device, self._debug = weights["embed.bias"].device, debug
        self._model: SlicedDiT | None = SlicedDiT(
            manifest.model,
            weights,
            entry.units,
            manifest.sampling.cfg_channels,
            None if full_capacity else entry.capacities,
        )

    def _step(self, feeds: Arrays) -> StepResult:
        assert self._model is not None
        inputs = {name: torch.from_numpy(np.ascontiguousarray(feed)) for name, feed in feeds.items()}
        inputs["cfg_scale"] = inputs["cfg_scale"].reshape(())
        out = self._model.step(**{n: t.to(self._device) for n, t in inputs.items()}, debug=self._debug)
        arrays = [None if t is None else t.cpu().numpy() for t in (out.x_prev, out.overflow, out.tokens, out.residuals)]
        assert arrays[0] is not None and arrays[1] is not None
        return StepResult(arrays[0], arrays[1], *arrays[2:])

    def close(self) -> None:
        super().close()
        self._model = None


class TorchBackend(Backend):
    """Weights are mapped from the bundle, once (on `cuda`: copied to the device, once); any width is cut from them.

    `threads` sets PyTorch's threads for the whole process, as PyTorch knows no other way.
    """

    name = "torch"

    def __init__(self, bundle: Bundle, options: BackendOptions | None = None):
        super().__init__(bundle, options)
        if self.options.device == "cuda" and not torch.cuda.is_available():
            raise BackendError("this PyTorch sees no CUDA device; use --device cpu, or install a CUDA build of PyTorch")
        if bundle.manifest.precision.in_8_bits:
            raise BackendError(
                f"{bundle.manifest.precision} bundles run on onnxruntime; use --backend onnxruntime, or a bundle of "
                "another precision"
            )
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        self._weights = mapped_weights(bundle, torch.device(self.options.device))

    def _conditioning(self, feeds: Arrays) -> np.ndarray:
        device = torch.device(self.options.device)
        timesteps, labels = (torch.from_numpy(feeds[name]).to(device) for name in ("timesteps", "labels"))
        array: np.ndarray = conditioning(self.bundle.manifest.model, self._weights, timesteps, labels).cpu().numpy()
        return array

    def subnet(self, index: int, full_capacity: bool = False, debug: bool = False) -> Subnet:
        return TorchSubnet(self.bundle, index, self._weights, full_capacity, debug)


def mapped_weights(bundle: Bundle, device: torch.device) -> dict[str, Tensor]:
    """Every stored tensor, by name. On the CPU they are views of one private map of `weights.bin`."""
    # PyTorch wants writable memory: mode "c" gives it, and what is written would never reach the file.
    raw = np.memmap(bundle.file(WEIGHTS), np.uint8, "c")
    weights = {}
    for name, entry in bundle.manifest.weights.items():
        flat = torch.from_numpy(raw[entry.offset : entry.offset + entry.nbytes])
        weights[name] = flat.view(_TYPES[entry.dtype]).view(entry.shape).to(device)
    return weights
