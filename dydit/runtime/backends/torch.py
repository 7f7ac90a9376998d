"""The PyTorch backend: the sliced form (`dydit.models.sliced`) on a bundle's weights. The reference for others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dydit.bundle.bundle import Bundle
from dydit.bundle.io_spec import TEXT_BIAS, TEXT_VALUES
from dydit.errors import BackendError
from dydit.models.registry import architecture_of
from dydit.models.sliced import SlicedModel
from dydit.runtime.backends.base import Arrays, Backend, BackendOptions, StepResult, Subnet


class TorchSubnet(Subnet):
    """A subnetwork as sliced matrices; consecutive slots are views of the shared weights."""

    def __init__(self, backend: TorchBackend, index: int, weights: dict[str, Tensor], full_capacity: bool, debug: bool):
        super().__init__(backend, index)
        manifest, entry = backend.bundle.manifest, self.entry
        self._settings = backend.settings
        self._device, self._debug = torch.device(backend.options.device), debug
        self._model: SlicedModel | None = architecture_of(manifest.model).sliced(
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
        with self._settings():
            out = self._model.step(**{n: t.to(self._device) for n, t in inputs.items()}, debug=self._debug)
        arrays = [None if t is None else t.cpu().numpy() for t in (out.tokens, out.residuals)]
        required = [t.cpu().numpy() for t in (out.x_prev, out.next_history, out.overflow)]
        return StepResult(*required, *arrays)

    def _free(self) -> None:
        self._model = None


class TorchBackend(Backend):
    """Weights are mapped from the bundle once (on `cuda`: copied to the device once); every width is a slice of them.

    `threads` sets PyTorch's number for the calling thread and for threads that start later; PyTorch has no other way.
    In a forked child it is 1, because OpenMP's threads do not survive `fork`.
    """

    name = "torch"

    def __init__(self, bundle: Bundle, options: BackendOptions | None = None):
        super().__init__(bundle, options)
        if self.options.device == "cuda" and not torch.cuda.is_available():
            raise BackendError(
                "this PyTorch sees no CUDA device; use device='cpu' (--device cpu), or install a CUDA build of PyTorch"
            )
        if bundle.manifest.precision.in_8_bits:
            raise BackendError(
                f"{bundle.manifest.precision} bundles run on onnxruntime; use backend='onnxruntime' "
                "(--backend onnxruntime), or a bundle of another precision"
            )
        self._threads = self.options.threads
        self._weights = mapped_weights(bundle, torch.device(self.options.device))

    def _conditioning(self, feeds: Arrays) -> np.ndarray:
        device = torch.device(self.options.device)
        with self.settings():
            timesteps, labels = (torch.from_numpy(feeds[name]).to(device) for name in ("timesteps", "labels"))
            model = self.bundle.manifest.model
            table = architecture_of(model).conditioning(model, self._weights, timesteps, labels)
        array: np.ndarray = table.cpu().numpy()
        return array

    def _text_values(self, feeds: Arrays) -> dict[str, np.ndarray]:
        device, model = torch.device(self.options.device), self.bundle.manifest.model
        with self.settings(), torch.inference_mode():
            embeddings, mask = (torch.from_numpy(feeds[name]).to(device) for name in ("embeddings", "mask"))
            values, bias = architecture_of(model).text_values(model, self._weights, embeddings, mask)
        return {TEXT_VALUES: values.cpu().numpy(), TEXT_BIAS: bias.cpu().numpy()}

    def subnet(self, index: int, full_capacity: bool = False, debug: bool = False) -> Subnet:
        self.require_open()
        return TorchSubnet(self, index, self._weights, full_capacity, debug)

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """Reset what the calling thread may have changed and would affect the results: threads, autocast, the default
        device.
        """
        if self._threads and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        with contextlib.ExitStack() as changed:  # only what is needed: an interrupt may leave it changed
            if torch.is_autocast_enabled(self.options.device):
                changed.enter_context(torch.autocast(self.options.device, enabled=False))
            if torch.get_default_device().type != "cpu":
                changed.enter_context(torch.device("cpu"))
            yield

    def _free(self) -> None:
        self._weights = {}

    def after_fork(self) -> None:
        """As every backend; and use one thread, because OpenMP would wait for threads that are gone."""
        super().after_fork()
        self._threads = 1


def mapped_weights(bundle: Bundle, device: torch.device) -> dict[str, Tensor]:
    """Every stored tensor, by name. On the CPU they are views of one private map of `weights.bin`."""
    # PyTorch wants writable memory: mode "c" gives it, and what is written would never reach the file.
    raw = bundle.mapped_weights("c")
    weights = {}
    for name, entry in bundle.manifest.weights.items():
        flat = torch.from_numpy(raw[entry.offset : entry.offset + entry.nbytes])
        weights[name] = flat.view(getattr(torch, entry.dtype)).view(entry.shape).to(device)
    return weights
