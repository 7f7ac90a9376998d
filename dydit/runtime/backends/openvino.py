"""The OpenVINO backend: one compiled model per subnetwork, on the CPU, or on a GPU or NPU that OpenVINO lists.

- Precision is that of the bundle: values that its graphs have in fp32 (routers, the residual stream, modulation, the
  sampler) are computed in fp32, and products in the type in which they are written. A CPU without bf16 or fp16
  arithmetic computes such products in fp32.
- Of int8 bundles, OpenVINO takes the weights in 8 bits; what enters a product is rounded by OpenVINO, or not at all
  (`dydit.runtime.backends.ov_graph`).
- Batches are split among threads as on ONNX Runtime: every thread runs images of its own, in a stream of its own.
- Models are compiled once for each machine, and then come from a cache (`dydit.runtime.backends.ov_cache`).
- Each subnetwork has its own copy of its weights, in the order of OpenVINO's kernels. So has conditioning, a third of
  the weights: once loaded, it stays, because every call of a pipeline needs it and loading takes long.
"""

from __future__ import annotations

import threading
from functools import partial

import numpy as np

from dydit.bundle.bundle import Bundle, mapped_file
from dydit.bundle.io_spec import CONDITION, TEXT_BIAS, TEXT_VALUES, residual_name, token_mask_name, unit_inputs
from dydit.bundle.manifest import CONDITIONING, TEXT_GRAPH, Routing
from dydit.bundle.stored_weights import WEIGHTS, Precision
from dydit.bundle.vae_entry import VAE_DECODER, VAE_WEIGHTS
from dydit.errors import BackendError
from dydit.runtime.backends.base import Arrays, Backend, BackendOptions, DecodeTile, Subnet
from dydit.runtime.backends.batch_splitting import BatchSplitting
from dydit.runtime.backends.cores import thread_count
from dydit.runtime.backends.graph_subnet import GraphSubnet
from dydit.runtime.backends.ov_cache import ModelCache
from dydit.runtime.backends.ov_session import CompiledGraph, CompileSettings, devices_here, here, openvino_module
from dydit.runtime.dynamic_width import DynamicWidthWeights


class OpenVinoBackend(Backend):
    """Needs `openvino`, and to compile a bundle for the first time also the package onnx. No PyTorch."""

    name = "openvino"

    def __init__(self, bundle: Bundle, options: BackendOptions | None = None):
        super().__init__(bundle, options)
        openvino_module()
        device, precision = self.options.device, bundle.manifest.precision
        if not here(device):
            raise BackendError(
                f"OpenVINO lists no {device} on this machine, only {', '.join(devices_here())}; install its driver, or "
                "use device='cpu' (--device cpu)"
            )
        if precision.is_calibrated:
            raise BackendError(
                f"{precision} bundles do not run on openvino; use backend='onnxruntime' (--backend onnxruntime) for "
                "int8-static, backend='tensorrt' for fp8, or a bundle of another precision"
            )
        self._cache = ModelCache.of_user()
        self._splitting = BatchSplitting(bundle.manifest.model, self.options.threads)
        self._dynamic_width = DynamicWidthWeights(bundle) if bundle.manifest.dynamic_width else None
        self._bfloat16: frozenset[str] = frozenset()
        if self._dynamic_width is not None and precision is Precision.BF16:
            specs = unit_inputs(bundle.manifest.weights, bundle.manifest.model)
            self._bfloat16 = frozenset(spec.name for spec in specs if spec.dtype == "bfloat16")
        self._graphs: dict[tuple[str, bool, bool], CompiledGraph] = {}
        self._conditioner: CompiledGraph | None = None
        self._decoder: CompiledGraph | None = None
        self._loading = threading.Lock()  # the next subnetwork is loaded in the background

    def _conditioning(self, feeds: Arrays) -> np.ndarray:
        if self._conditioner is None:
            self._conditioner = self._load(CONDITIONING, (CONDITION,))
        return self._conditioner.run(feeds, "conditioning")[CONDITION]

    def _text_values(self, feeds: Arrays) -> dict[str, np.ndarray]:
        names = (TEXT_VALUES, TEXT_BIAS)
        out = self._load(TEXT_GRAPH, names).run(feeds, "text")
        return {name: out[name] for name in names}

    def expect(self, images: int) -> None:
        self._splitting.expected = images

    def tile_decoder(self) -> DecodeTile | None:
        """Decode with the bundle's VAE decoder, in fp32."""
        return None if self.bundle.manifest.vae is None else self._decode

    def subnet(self, index: int, full_capacity: bool = False, debug: bool = False) -> Subnet:
        self.require_open()
        entry = self.bundle.manifest.subnets[index]
        file = entry.full_file if full_capacity and entry.full_file else entry.file
        load = self._load_subnet if self._dynamic_width is None else self._load_shared
        # Where a batch shares its token capacity, it cannot be split.
        whole = debug or self.options.device != "cpu" or self.bundle.manifest.routing is Routing.CAPACITY
        splitting = None if whole else self._splitting
        return GraphSubnet(self, index, partial(load, file, debug), splitting, debug, self._dynamic_width)

    def _free(self) -> None:
        self._splitting.close()
        self._graphs.clear()
        self._conditioner = self._decoder = None
        if self._dynamic_width is not None:
            self._dynamic_width.close()

    def after_fork(self) -> None:
        """As every backend does; and release the lock of a thread that may have been loading."""
        super().after_fork()
        self._loading = threading.Lock()

    def _decode(self, tiles: np.ndarray) -> np.ndarray:
        with self.lock:
            self.require_open()
            if self._decoder is None:
                self._decoder = self._load(VAE_DECODER)
            return next(iter(self._decoder.run({"latents": tiles}, "the VAE decoder").values()))

    def _load_shared(self, file: str, debug: bool, apart: bool) -> CompiledGraph:
        """The one model of a plan of dynamic width."""
        with self._loading:
            graph = self._graphs.get((file, debug, apart))
            if graph is None:
                self._graphs.pop((file, debug, not apart), None)
                graph = self._graphs[file, debug, apart] = self._load_subnet(file, debug, apart)
            return graph

    def _load_subnet(self, file: str, debug: bool, apart: bool) -> CompiledGraph:
        blocks = range(self.bundle.manifest.model.depth) if debug else ()
        inside = tuple(name(block) for block in blocks for name in (residual_name, token_mask_name))
        return self._load(file, ("x_prev", "next_history"), inside, apart)

    def _load(
        self, file: str, gives: tuple[str, ...] = (), inside: tuple[str, ...] = (), apart: bool = False
    ) -> CompiledGraph:
        bundle, threads = self.bundle, thread_count(self.options.threads)
        files, weights = bundle.manifest.files, VAE_WEIGHTS if file == VAE_DECODER else WEIGHTS
        settings = CompileSettings(
            bundle.file(file),
            (files[file].sha256, files[weights].sha256),
            lambda name: mapped_file(bundle.file(name)),
            self.options.device,
            threads,
            threads if apart else 1,
            gives,
            inside,
        )
        return CompiledGraph(settings, self._cache, self._bfloat16)


def describe() -> str:
    """Version and devices, for `dydit doctor`. Raises `BackendError` for what is missing."""
    return f"openvino {openvino_module().__version__.split('-')[0]}, devices: {', '.join(devices_here())}"
