"""The PyTorch backend: the sliced form (`dydit.models.sliced`) on a bundle's weights. The reference for others.

On a CPU, batches are split among threads as on ONNX Runtime (`dydit.runtime.backends.batch_splitting`), and products
are those of `dydit.runtime.backends.torch_products`. Nothing is compiled there: `torch.compile` would make a graph for
each subnetwork, and one graph of a DiT-S/2 takes it 6 s (docs/benchmarks/rivals_avx512.json).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dydit.bundle.bundle import Bundle
from dydit.bundle.io_spec import TEXT_BIAS, TEXT_VALUES
from dydit.bundle.manifest import Routing
from dydit.errors import BackendError
from dydit.models.registry import architecture_of
from dydit.models.sliced import SlicedModel
from dydit.runtime.backends.base import Arrays, Backend, BackendOptions, StepResult, Subnet
from dydit.runtime.backends.batch_splitting import BatchSplitting
from dydit.runtime.backends.torch_products import PackedLinear, multiplied_weights, packs


class TorchSubnet(Subnet):
    """A subnetwork as sliced matrices; consecutive slots are views of the shared weights.

    `splitting`: None where batches are not split. `packed`: products use packed copies of the weights.
    """

    def __init__(
        self,
        backend: TorchBackend,
        index: int,
        weights: dict[str, Tensor],
        full_capacity: bool,
        debug: bool,
        splitting: BatchSplitting | None,
        packed: bool,
    ):
        super().__init__(backend, index)
        manifest, entry = backend.bundle.manifest, self.entry
        self._settings, self._splitting = backend.settings, splitting
        self._device, self._debug = torch.device(backend.options.device), debug
        linear = PackedLinear() if packed else None
        self._model: SlicedModel | None = architecture_of(manifest.model).sliced(
            manifest.model,
            weights,
            entry.units,
            manifest.sampling.cfg_channels,
            None if full_capacity else entry.capacities,
            linear,
        )
        if linear is not None:
            for block in self._model.blocks:
                for layer in manifest.model.units.layers:
                    linear.pack(block, layer)

    def _step(self, feeds: Arrays) -> StepResult:
        if self._splitting is None or len(self._splitting.parts(len(feeds["x"]))) == 1:
            return self._run(feeds)
        state = self._splitting.run(feeds, self._part)
        with self._settings():  # PyTorch gives the number of a thread to all threads that start later
            torch.set_num_threads(torch.get_num_threads())
        return StepResult(*state, np.zeros(self._backend.bundle.manifest.model.depth, np.int64))

    def _part(self, feeds: Arrays) -> dict[str, np.ndarray | None]:
        result = self._run(feeds, threads=1)
        return {"x_prev": result.x_prev, "next_history": result.next_history}

    def _run(self, feeds: Arrays, threads: int = 0) -> StepResult:
        assert self._model is not None
        inputs = {name: torch.from_numpy(np.ascontiguousarray(feed)) for name, feed in feeds.items()}
        inputs["cfg_scale"] = inputs["cfg_scale"].reshape(())
        model = copy.copy(self._model)  # a step keeps what it observes in the model, and several threads may run one
        with self._settings(threads):
            out = model.step(**{n: t.to(self._device) for n, t in inputs.items()}, debug=self._debug)
        arrays = [None if t is None else t.cpu().numpy() for t in (out.tokens, out.residuals)]
        required = [t.cpu().numpy() for t in (out.x_prev, out.next_history, out.overflow)]
        return StepResult(*required, *arrays)

    def _free(self) -> None:
        self._model = None


class TorchBackend(Backend):
    """Weights are mapped from the bundle once (on `cuda`: copied to the device once); every width is a slice of them. A
    CPU that does not multiply bf16 or fp16 gets copies in fp32.

    `threads` sets PyTorch's number for the calling thread and for threads that start later; PyTorch has no other way.
    In a forked child it is 1, because OpenMP's threads do not survive `fork`.
    """

    name = "torch"
    loads_lightly = True

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
        self._multiplied = self._weights
        self._splitting: BatchSplitting | None = None
        if self.options.device == "cpu":
            self._multiplied = multiplied_weights(self._weights)
            if bundle.manifest.routing is not Routing.CAPACITY:  # slots belong to the batch
                self._splitting = BatchSplitting(bundle.manifest.model, self.options.threads)

    def _conditioning(self, feeds: Arrays) -> np.ndarray:
        device = torch.device(self.options.device)
        with self.settings():
            timesteps, labels = (torch.from_numpy(feeds[name]).to(device) for name in ("timesteps", "labels"))
            model = self.bundle.manifest.model
            table = architecture_of(model).conditioning(model, self._multiplied, timesteps, labels)
        array: np.ndarray = table.cpu().numpy()
        return array

    def _text_values(self, feeds: Arrays) -> dict[str, np.ndarray]:
        device, model = torch.device(self.options.device), self.bundle.manifest.model
        with self.settings(), torch.inference_mode():
            embeddings, mask = (torch.from_numpy(feeds[name]).to(device) for name in ("embeddings", "mask"))
            values, bias = architecture_of(model).text_values(model, self._multiplied, embeddings, mask)
        return {TEXT_VALUES: values.cpu().numpy(), TEXT_BIAS: bias.cpu().numpy()}

    def subnet(self, index: int, full_capacity: bool = False, debug: bool = False) -> Subnet:
        self.require_open()
        packed = self.options.packed and self.options.device == "cpu" and packs()
        return TorchSubnet(
            self, index, self._multiplied, full_capacity, debug, None if debug else self._splitting, packed
        )

    def expect(self, images: int) -> None:
        if self._splitting is not None:
            self._splitting.expected = images

    @contextlib.contextmanager
    def settings(self, threads: int = 0) -> Iterator[None]:
        """Reset what the calling thread may have changed and would affect the results: threads, autocast, the default
        device. `threads`: in place of the backend's.
        """
        threads = threads or self._threads
        if threads and torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        with contextlib.ExitStack() as changed:  # only what is needed: an interrupt may leave it changed
            if torch.is_autocast_enabled(self.options.device):
                changed.enter_context(torch.autocast(self.options.device, enabled=False))
            if torch.get_default_device().type != "cpu":
                changed.enter_context(torch.device("cpu"))
            yield

    def _free(self) -> None:
        self._weights, self._multiplied = {}, {}
        if self._splitting is not None:
            self._splitting.close()

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
