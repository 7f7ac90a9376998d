"""Engines of a `Device` in PyTorch: the subnetworks of a bundle with fixed shapes, on memory of the device.

An engine reads its inputs and writes its outputs at the addresses that the launch list gives. It is the sliced form
(`dydit.models.sliced`) with `with_fixed_shapes`, so a step waits for nothing and CUDA graphs can capture it:

    capacity routing           slots of the plan; tokens without a slot are counted in `token_overflow`
    capacity routing, full     all tokens, of which those that are routed are kept
    dense or dynamic routing   the same. With dynamic routing this computes tokens that a step-by-step run would skip

What lies between inputs and outputs is PyTorch's own memory. All engines share one copy of the stored weights. Units
that do not lie side by side are copied for their subnetwork; with dynamic width, unit weights are inputs of a launch.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack

import numpy as np
import torch

from dydit.bundle.bundle import Bundle
from dydit.bundle.io_spec import CONDITION, TEXT_BIAS, TEXT_VALUES, unit_inputs
from dydit.bundle.manifest import Manifest, Routing
from dydit.dtypes import DTYPES
from dydit.errors import BackendError, one_line
from dydit.models.architecture import Slots
from dydit.models.pointwise import PLAIN, Pointwise
from dydit.models.registry import architecture_of
from dydit.models.sliced import SlicedModel
from dydit.runtime.device.cuda import CudaMemory
from dydit.runtime.device.driver import Driver
from dydit.runtime.device.execute import Tensor
from dydit.runtime.device.launches import EngineMemory
from dydit.runtime.device.operations import CONDITIONER, EngineId
from dydit.runtime.device.residency import engines_of

Named = Mapping[str, torch.Tensor]
Run = Callable[[Named], Named]
"""Computes the outputs of an engine from its inputs, by name."""
Settings = Callable[[], AbstractContextManager[None]]


class TorchEngines(CudaMemory):
    """PyTorch as the engines of a `Device`. How it captures is left to subclasses.

    `weights`: every stored tensor, on the device (`mapped_weights`). `settings`: what holds while PyTorch computes.
    `pointwise`: what computes between products. `kind`: the device of PyTorch, `cpu` or `cuda`.
    """

    kind: str
    failure: type[BackendError] = BackendError
    """What an error of PyTorch is raised as; a device that captures says `CaptureError` meanwhile."""

    def __init__(
        self,
        bundle: Bundle,
        weights: Named,
        settings: Settings,
        pointwise: Pointwise = PLAIN,
        driver: Driver | None = None,
    ):
        super().__init__(driver)
        self._manifest, self._weights, self._settings = bundle.manifest, weights, settings
        self._pointwise = pointwise
        self._engines: dict[EngineId, Run] = {}
        self._views: dict[Tensor, torch.Tensor] = {}

    def load(self, engine: EngineId) -> None:
        with self._queued():
            self._engines[engine] = make_engine(self._manifest, self._weights, engine, self._pointwise)

    def unload(self, engine: EngineId) -> None:
        del self._engines[engine]

    def close(self) -> None:
        self._engines.clear()
        self._views.clear()
        super().close()

    def memory(self, engine: EngineId) -> EngineMemory:
        return engine_memory(self._manifest)[engine]

    def longest(self, engine: EngineId, name: str) -> tuple[int, ...]:
        return (1 << 30, 1 << 30)

    def launch(
        self, engine: EngineId, inputs: Sequence[Tensor], outputs: Sequence[Tensor], workspace: tuple[int, int]
    ) -> None:
        try:
            with self._queued():
                results = self._engines[engine]({each.name: self._view(each) for each in inputs})
                for each in outputs:
                    self._view(each).copy_(results[each.name])
        except RuntimeError as error:
            raise self.failure(f"PyTorch failed in {engine}: {one_line(error)}") from error

    def _queued(self) -> AbstractContextManager[object]:
        """What holds while work of PyTorch is queued on the device's compute stream."""
        stack = ExitStack()
        stack.enter_context(self._settings())
        stack.enter_context(torch.inference_mode())
        return stack

    def _view(self, each: Tensor) -> torch.Tensor:
        if each not in self._views:
            self._views[each] = tensor_at(each, self.kind)
        return self._views[each]


class _Address:
    """Bytes on a GPU, as PyTorch takes them from other libraries."""

    def __init__(self, address: int, nbytes: int):
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def tensor_at(place: Tensor, kind: str) -> torch.Tensor:
    """The memory of an input or output as a tensor of PyTorch, on the device `kind`. Nothing is copied."""
    nbytes = DTYPES[place.dtype].bytes * math.prod(place.shape)
    if kind == "cuda":
        raw = torch.as_tensor(_Address(place.address, nbytes), device="cuda")
    else:
        raw = torch.from_numpy(np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(place.address)))
    return raw.view(getattr(torch, place.dtype)).view(place.shape)


def engine_memory(manifest: Manifest) -> dict[EngineId, EngineMemory]:
    """Bytes of the weights of each engine. Activations are not counted: PyTorch allocates them itself.

    The stored weights, which all engines share, are those of the conditioning, which is always loaded. A subnetwork has
    those that it copies, because its units do not lie side by side.
    """
    model = manifest.model
    memory = dict.fromkeys(engines_of(manifest), EngineMemory(0, 0))
    memory[CONDITIONER] = EngineMemory(0, sum(entry.nbytes for entry in manifest.weights.values()))
    for engine in memory:
        if engine.subnet is None or manifest.dynamic_width:
            continue
        copied = 0
        for part, units in model.units.zip(manifest.subnets[engine.subnet].units):
            if units and units[-1] - units[0] >= len(units):
                stored = (manifest.weights[part.stored(name)] for name in part.group.unit_tensors)
                copied += sum(entry.nbytes // part.group.count * len(units) for entry in stored)
        memory[engine] = EngineMemory(0, copied)
    return memory


def make_engine(manifest: Manifest, weights: Named, engine: EngineId, pointwise: Pointwise = PLAIN) -> Run:
    """The computation of an engine. Raises `BackendError` for the VAE decoder, which PyTorch does not run."""
    model = manifest.model
    if engine.decoder:
        raise BackendError("PyTorch does not run VAE decoders of bundles; decode with onnxruntime")
    if engine.texts:
        return lambda of: dict(
            zip(
                (TEXT_VALUES, TEXT_BIAS),
                architecture_of(model).text_values(model, weights, of["embeddings"], of["mask"]),
                strict=True,
            )
        )
    if engine.subnet is None:
        return lambda of: {
            CONDITION: architecture_of(model).conditioning(model, weights, of["timesteps"], of["labels"])
        }
    if manifest.dynamic_width:
        return _DynamicWidth(manifest, weights, engine, pointwise)
    return _step_of(_subnet(manifest, weights, engine, manifest.subnets[engine.subnet].units, pointwise))


def _subnet(manifest: Manifest, weights: Named, engine: EngineId, units: Slots, pointwise: Pointwise) -> SlicedModel:
    assert engine.subnet is not None
    model, entry = manifest.model, manifest.subnets[engine.subnet]
    capacities = None if engine.full or manifest.routing is not Routing.CAPACITY else entry.capacities
    sliced = architecture_of(model).sliced(model, weights, units, manifest.sampling.cfg_channels, capacities)
    return sliced.with_fixed_shapes(pointwise)


def _step_of(model: SlicedModel) -> Run:
    def run(inputs: Named) -> Named:
        out = model.step(**inputs)
        return {"x_prev": out.x_prev, "next_history": out.next_history, "token_overflow": out.overflow}

    return run


class _DynamicWidth:
    """A step whose unit weights are inputs: a subnetwork for every set of their places and widths.

    Its widths are those of the inputs, so a part without units has one unit of zeros, as its graph has.
    """

    def __init__(self, manifest: Manifest, weights: Named, engine: EngineId, pointwise: Pointwise):
        self._manifest, self._weights, self._engine, self._pointwise = manifest, weights, engine, pointwise
        self._names = tuple(spec.name for spec in unit_inputs(manifest.weights, manifest.model))
        self._steps: dict[tuple[tuple[int, int], ...], Run] = {}

    def __call__(self, inputs: Named) -> Named:
        key = tuple((inputs[name].data_ptr(), len(inputs[name])) for name in self._names)
        if key not in self._steps:
            self._steps[key] = self._made(inputs)
        return self._steps[key]({name: each for name, each in inputs.items() if name not in self._names})

    def _made(self, inputs: Named) -> Run:
        stored, axis = self._manifest.weights, self._manifest.model.units
        by_unit = {name: inputs[name].unflatten(0, (-1, stored[name].shape[1])) for name in self._names}
        first = (by_unit[part.stored(part.group.unit_tensors[0])] for part in axis.parts)
        units = axis.nested([tuple(range(len(each))) for each in first])
        weights = {**self._weights, **by_unit}
        return _step_of(_subnet(self._manifest, weights, self._engine, units, self._pointwise))
