"""The ONNX Runtime backend: one inference session per subnetwork, on the CPU or through the CUDA provider.

Many sessions live in one process, so none may hold what it does not need while idle (figures: DiT-S/2, two cores):

- batches are split among threads if they have at least one image for each (`dydit.runtime.backends.batch_splitting`);
- threads do not spin: with other work on the machine, spinning made a step twice as slow (310 against 145 ms);
- no memory arena: each session would keep the activations of its largest step (24 MB for one image), to save 1.5 % of
  the time;
- all sessions share one map of `weights.bin`, unless `BackendOptions.packed` asks for a copy for each session. The CPU
  multiplies fp16 as fp32. A layer's weights are widened when it runs, not all of them when the subnetwork is loaded:
  that takes less memory and loading time, for somewhat longer steps (`benchmarks/xl.py` measures it);
- conditioning, a third of the weights and seldom needed, has a session only while it is evaluated.
"""

from __future__ import annotations

import dataclasses
import threading
from functools import partial
from pathlib import Path

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.bundle.io_spec import CONDITION, TEXT_BIAS, TEXT_VALUES, residual_name, token_mask_name
from dydit.bundle.manifest import CONDITIONING, TEXT_GRAPH, Routing
from dydit.bundle.stored_weights import Precision
from dydit.errors import BackendError
from dydit.extras import require
from dydit.runtime.backends.base import Arrays, Backend, BackendOptions, Subnet
from dydit.runtime.backends.batch_splitting import BatchSplitting
from dydit.runtime.backends.graph_subnet import GraphSubnet
from dydit.runtime.backends.int8_exactness import require_exact_products
from dydit.runtime.backends.session import (
    OLDEST_8_BITS,
    OLDEST_CUDA,
    PROVIDERS,
    Session,
    SessionSettings,
    load_cuda_libraries,
    require_runtime,
    runtime,
)
from dydit.runtime.dynamic_width import DynamicWidthWeights


class OnnxRuntimeBackend(Backend):
    """Needs `onnxruntime` or `onnxruntime-gpu`, and for `debug` also the package onnx. No PyTorch."""

    name = "onnxruntime"
    loads_lightly = True

    def __init__(self, bundle: Bundle, options: BackendOptions | None = None):
        super().__init__(bundle, options)
        self._sessions: dict[tuple[str, bool, bool], Session] = {}
        self._splitting = BatchSplitting(bundle.manifest.model, self.options.threads)
        self._dynamic_width = DynamicWidthWeights(bundle) if bundle.manifest.dynamic_width else None
        self._conditioner: Session | None = None
        self._loading = threading.Lock()  # the next subnetwork is loaded in the background
        provider = PROVIDERS[self.options.device]
        if provider not in runtime().get_available_providers():
            raise BackendError(
                f"this onnxruntime has no {provider}; pip uninstall onnxruntime, then pip install 'dydit[gpu]', "
                "or use device='cpu' (--device cpu)"
            )
        _require_precision(bundle.manifest.precision, self.options.device)
        if self.options.device == "cuda":
            require_runtime(runtime(), OLDEST_CUDA, "bundles on a GPU")
            load_cuda_libraries(runtime())

    def _conditioning(self, feeds: Arrays) -> np.ndarray:
        session = self._conditioner or self._open_once(CONDITIONING, (CONDITION,))
        if self.options.device == "cuda":
            self._conditioner = session
        return session.run(feeds, "conditioning")[CONDITION]

    def _text_values(self, feeds: Arrays) -> dict[str, np.ndarray]:
        return self._open_once(TEXT_GRAPH, (TEXT_VALUES, TEXT_BIAS)).run(feeds, "text")

    def _open_once(self, file: str, outputs: tuple[str, ...]) -> Session:
        """A session for a graph that is seldom needed."""
        options = dataclasses.replace(self.options, packed=False)
        return Session(self.bundle.file(file), options, SessionSettings(lazy=options.device == "cpu", gives=outputs))

    def expect(self, images: int) -> None:
        self._splitting.expected = images

    def subnet(self, index: int, full_capacity: bool = False, debug: bool = False) -> Subnet:
        self.require_open()
        entry = self.bundle.manifest.subnets[index]
        file = entry.full_file if full_capacity and entry.full_file else entry.file
        load = self._load_shared if self._dynamic_width is not None else self._load
        splitting = None if debug else self._usable_splitting
        return GraphSubnet(self, index, partial(load, file, debug), splitting, debug, self._dynamic_width)

    def _free(self) -> None:
        self._splitting.close()
        self._sessions.clear()
        self._conditioner = None
        if self._dynamic_width is not None:
            self._dynamic_width.close()

    def after_fork(self) -> None:
        """As every backend does; and release the lock of a thread that may have been loading."""
        super().after_fork()
        self._loading = threading.Lock()

    @property
    def _lazy(self) -> bool:
        """Whether fp16 weights are widened when they are multiplied; only the CPU does that."""
        cpu, half = self.options.device == "cpu", self.bundle.manifest.precision is Precision.FP16
        return cpu and half and not self.options.packed

    @property
    def _usable_splitting(self) -> BatchSplitting | None:
        """None where a batch shares its token capacity, or where every part would widen weights again."""
        by_capacity = self.bundle.manifest.routing is Routing.CAPACITY
        return None if by_capacity or self._lazy or self.options.device != "cpu" else self._splitting

    def _load_shared(self, name: str, debug: bool, apart: bool) -> Session:
        """The one session of a plan of dynamic width."""
        with self._loading:
            session = self._sessions.get((name, debug, apart))
            if session is None:
                self._sessions.pop((name, debug, not apart), None)
                session = self._sessions[name, debug, apart] = self._load(name, debug, apart)
            return session

    def _load(self, name: str, debug: bool, apart: bool) -> Session:
        file = self.bundle.file(name)
        graph = _with_debug_outputs(file, self.bundle.manifest.model.depth) if debug else None
        # This optimizer would turn 8-bit products into fp32 ones.
        left_out = ("MatMulAddFusion",) if self.bundle.manifest.precision.is_calibrated else ()
        options = dataclasses.replace(self.options, threads=1) if apart else self.options
        if self._lazy:
            left_out = (*left_out, "ConstantFolding")
        return Session(file, options, SessionSettings(graph, left_out, self._lazy, gives=("x_prev", "next_history")))


def _require_precision(precision: Precision, device: str) -> None:
    if device == "cpu" and precision is Precision.BF16:
        raise BackendError(
            "onnxruntime has no bf16 matrix products on the CPU; use backend='torch' (--backend torch), or a bundle in "
            "fp32 or fp16"
        )
    if precision is Precision.INT8 and device != "cpu":
        raise BackendError(
            f"int8 bundles run on the CPU, not on {device}; use device='cpu' (--device cpu), or a bundle in fp16"
        )
    if precision.is_calibrated:
        require_runtime(runtime(), OLDEST_8_BITS, f"{precision} bundles")
    if precision.weight_dtype == "int8" and device == "cpu":
        require_exact_products(runtime())


def _with_debug_outputs(file: Path, depth: int) -> bytes:
    """The graph with every block's residual stream, and its token decisions if it has any, as additional outputs."""
    require("comparing inside a graph", ["onnx"])
    import onnx

    model = onnx.load(file, load_external_data=False)
    values = {name for node in model.graph.node for name in node.output}
    for block in range(depth):
        for name, dtype in (
            (residual_name(block), onnx.TensorProto.FLOAT),
            (token_mask_name(block), onnx.TensorProto.BOOL),
        ):
            if name in values:
                model.graph.output.append(onnx.helper.make_tensor_value_info(name, dtype, None))
    data: bytes = model.SerializeToString()
    return data
