"""Writing a subnetwork's graph: which functions are called with which weights. And the conditioning graph.

Weights come from a `WeightSource`: as windows on `weights.bin` (a static subnetwork, which a runtime can specialise),
or as graph inputs with symbolic widths (one graph for every width; DESIGN, decision 12).
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx.inliner import inline_local_functions

from dydit.bundle.graph_io import (
    TensorSpec,
    conditioning_inputs,
    conditioning_outputs,
    modulation_vectors,
    residual_name,
    subnet_inputs,
    subnet_outputs,
    token_mask_name,
    unit_input,
)
from dydit.bundle.manifest import Routing
from dydit.bundle.stored import WEIGHTS, Precision, WeightEntry, half_name
from dydit.calibrate.activations import LAYERS
from dydit.export.library import FunctionLibrary, call
from dydit.export.migrate import FACTOR, modulation_factors
from dydit.export.ops import CONTRIB, DATA_TYPES, DOMAIN, IR_VERSION, OPSET, Ops
from dydit.export.products import layer_precision, weight_parts
from dydit.export.weights import ALIGNMENT, runs
from dydit.models.config import ModelConfig
from dydit.models.layout import OUT_MAJOR
from dydit.models.migration import Migration


@dataclass(frozen=True)
class SubnetSpec:
    """What a subnetwork holds: slots per block, which (block, part) is gated, and how tokens are routed.

    `heads`, `groups`: ascending slots per block. `gated`: (block, part) pairs, part 0 heads and 1 groups, whose units
    are not all on in every step it serves. `capacities`: token slots per image and block, with `Routing.CAPACITY`.
    `input_scales`: of what enters each of a block's `LAYERS`, with calibrated precisions; None where a layer stays in
    16 bits.
    """

    heads: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    gated: frozenset[tuple[int, int]]
    routing: Routing | None
    capacities: tuple[int, ...] | None = None
    input_scales: tuple[tuple[float | None, ...], ...] | None = None

    @property
    def in_16_bits(self) -> tuple[tuple[str, ...], ...] | None:
        """By block, the layers that stay in 16 bits; None where there are none."""
        kept = [
            tuple(layer for layer, scale in zip(LAYERS, block, strict=True) if scale is None)
            for block in self.input_scales or ()
        ]
        return tuple(kept) if any(kept) else None


class WeightSource(ABC):
    """Gives the values that functions take as weights, and keeps what the graph must declare for them."""

    def __init__(self) -> None:
        self.initializers: dict[str, ir.Value] = {}
        self.inputs: list[TensorSpec] = []

    def local(self, name: str, array: np.ndarray) -> ir.Value:
        """A small constant of the graph itself."""
        if name not in self.initializers:
            self.initializers[name] = _initializer(name, ir.tensor(array, name=name))
        return self.initializers[name]

    @abstractmethod
    def whole(self, name: str) -> ir.Value:
        """A stored tensor, complete."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether a tensor is stored."""

    @abstractmethod
    def units(self, ops: Ops, block: int, part: str, slots: Sequence[int]) -> ir.Value:
        """The rows of the given slots of `blocks.<block>.<part>`, the unit axis merged with the next."""


class Windows(WeightSource):
    """Weights as external data: (offset, length) windows on `weights.bin`; a concatenation where slots have holes."""

    def __init__(self, entries: Mapping[str, WeightEntry]):
        super().__init__()
        self.entries = entries

    def whole(self, name: str) -> ir.Value:
        entry = self.entries[name]
        return self._external(name, entry)

    def has(self, name: str) -> bool:
        return name in self.entries

    def rows(self, name: str, first: int, end: int) -> ir.Value:
        """Rows first..end-1 of a stored tensor."""
        entry = self.entries[name]
        return self._external(f"{name}[{first}:{end}]", entry, first, (end - first, *entry.shape[1:]))

    def units(self, ops: Ops, block: int, part: str, slots: Sequence[int]) -> ir.Value:
        name = f"blocks.{block}.{part}"
        entry = self.entries[name]
        rows, *rest = entry.shape[1:]
        pieces = [
            self._external(f"{name}[{first}:{first + count}]", entry, first, (count * rows, *rest))
            for first, count in runs(slots)
        ]
        return pieces[0] if len(pieces) == 1 else ops.Concat(*pieces, axis=0)

    def _external(
        self, name: str, entry: WeightEntry, first: int = 0, shape: tuple[int, ...] | None = None
    ) -> ir.Value:
        """The window of `shape` that starts at unit `first` of a stored tensor; all of it by default."""
        if name not in self.initializers:
            shape = entry.shape if shape is None else shape
            offset = entry.offset + first * entry.item_bytes * math.prod(entry.shape[1:])
            length = entry.item_bytes * math.prod(shape)
            tensor = ir.ExternalTensor(
                WEIGHTS, offset, length, DATA_TYPES[entry.dtype], shape=ir.Shape(shape), name=name
            )
            self.initializers[name] = _initializer(name, tensor)
        return self.initializers[name]


class GatheredUnits:
    """Copies of units that have holes between them, side by side at the end of `weights.bin`; each set of them once."""

    def __init__(self, file: Path):
        self.file = file
        self._made: dict[tuple[str, tuple[int, ...]], WeightEntry] = {}

    def entry(self, name: str, entry: WeightEntry, slots: Sequence[int]) -> WeightEntry:
        """Where the units `slots` of a stored tensor lie as one, [units, ...]."""
        key = name, tuple(slots)
        if key not in self._made:
            unit = entry.nbytes // entry.shape[0]
            with open(self.file, "r+b") as file:
                pieces = []
                for slot in slots:
                    file.seek(entry.offset + slot * unit)
                    pieces.append(file.read(unit))
                end = file.seek(0, 2)
                file.write(b"\0" * (-end % ALIGNMENT) + b"".join(pieces))
            shape = (len(slots), *entry.shape[1:])
            self._made[key] = WeightEntry(offset=end + -end % ALIGNMENT, shape=shape, dtype=entry.dtype)
        return self._made[key]


class SolidWindows(Windows):
    """Windows for compilers, which take a constant in 8 bits as it is or not at all: where slots have holes, a copy."""

    def __init__(self, entries: Mapping[str, WeightEntry], gathered: GatheredUnits):
        super().__init__(entries)
        self._gathered = gathered

    def units(self, ops: Ops, block: int, part: str, slots: Sequence[int]) -> ir.Value:
        name = f"blocks.{block}.{part}"
        entry = self.entries[name]
        if entry.item_bytes > 1 or len(list(runs(slots))) == 1:
            return super().units(ops, block, part, slots)
        solid = self._gathered.entry(name, entry, slots)
        count, rows, *rest = solid.shape
        return self._external(f"{name}{list(slots)}", solid, 0, (count * rows, *rest))


class WeightInputs(Windows):
    """Block weights as graph inputs whose first dimension is a symbol; what has one width only stays a constant."""

    def units(self, ops: Ops, block: int, part: str, slots: Sequence[int]) -> ir.Value:
        name = f"blocks.{block}.{part}"
        spec = unit_input(name, self.entries[name])
        self.inputs.append(spec)
        return _value(spec)


def _initializer(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    return ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )


def _value(spec: TensorSpec) -> ir.Value:
    return ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=ir.TensorType(DATA_TYPES[spec.dtype]))


def subnet_graph(config: ModelConfig, spec: SubnetSpec, library: FunctionLibrary, weights: WeightSource) -> ir.Model:
    """The graph of one sampling step on one subnetwork; inputs and outputs as `dydit.bundle.graph_io` describes them.

    Each block's residual stream and token mask are values of the main graph, under the names that `graph_io` gives.
    """
    writer = _SubnetWriter(config, spec, library, weights)
    return writer.write()


class _SubnetWriter:
    def __init__(self, config: ModelConfig, spec: SubnetSpec, library: FunctionLibrary, weights: WeightSource):
        self.config, self.spec, self.library, self.weights = config, spec, library, weights
        self.ops = Ops()
        self.functions: dict[str, ir.Function] = {}
        self.inputs = {each.name: _value(each) for each in subnet_inputs(config, bool(spec.gated))}
        self.ones = weights.local("ones", np.ones(config.hidden_size, np.float32))

    def write(self) -> ir.Model:
        inputs, ops, config = self.inputs, self.ops, self.config
        vectors = ops.split(inputs["modulation"], 1, modulation_vectors(config))  # [rows, 1, D] each
        embed = [self.weights.whole(name) for name in ("embed.weight", "embed.bias", "pos_embed")]
        (x,) = self._call(self.library.embed(), [inputs["x"], inputs["modulation"], *embed], ["tokens"])
        overflow = []
        for block in range(config.depth):
            shift1, scale1, gate1, shift2, scale2, gate2 = vectors[6 * block : 6 * block + 6]
            x = self._attention(block, x, [shift1, scale1, gate1])
            x, *counted = self._mlp(block, x, [shift2, scale2, gate2])
            overflow += counted
        final = [self.weights.whole(name) for name in ("final.weight", "final.bias")]
        (out,) = self._call(self.library.final(), [x, self.ones, *vectors[-2:], *final], ["model_output"])
        step = [inputs[name] for name in ("x", "noise", "coefficients", "cfg_scale")]
        capacity = self.spec.routing is Routing.CAPACITY
        outputs = [_value(each) for each in subnet_outputs(config, capacity)]
        self._call(self.library.sampler(), [*step, out], [outputs[0].name or ""], outputs[:1])
        if capacity:
            (total,) = ops.call("", "Concat", overflow, ["token_overflow"], {"axis": 0})
            outputs[1] = _typed(total, outputs[1])
        return _model("subnetwork", [*inputs.values(), *map(_value, self.weights.inputs)], outputs, self)

    def _call(
        self,
        target: ir.Function,
        inputs: Sequence[ir.Value],
        names: Sequence[str],
        typed: list[ir.Value] | None = None,
    ) -> Sequence[ir.Value]:
        self.functions[target.name] = target
        values = call(self.ops, target, inputs, names)
        if typed is not None:
            typed[:] = [_typed(value, like) for value, like in zip(values, typed, strict=True)]
        return values

    def _gates(self, block: int, part: int, slots: Sequence[int]) -> list[ir.Value]:
        """The gates of a part's slots, [units], where it is gated."""
        if (block, part) not in self.spec.gated:
            return []
        index = np.asarray(slots, np.int64) + (2 * block + part) * self.config.num_heads
        flat = self.ops.Reshape(self.inputs["gates"], self.ops.constant([-1]))
        return [self.ops.Gather(flat, self.ops.constant(index), axis=0)]

    def _attention(self, block: int, x: ir.Value, vectors: list[ir.Value]) -> ir.Value:
        slots, name = self.spec.heads[block], f"blocks.{block}"
        if not slots:
            bias = self.weights.whole(f"{name}.proj.bias")
            return self._call(self.library.attention_none(), [x, vectors[2], bias], [f"{name}.attended"])[0]
        gates = self._gates(block, 0, slots)
        heads = None if isinstance(self.weights, WeightInputs) else len(slots)
        layers = [*self._layer(block, "qkv", slots), *self._layer(block, "proj", slots)]
        function = self.library.attention(heads, bool(gates), self._kept(block, ("qkv", "proj")))
        return self._call(function, [x, self.ones, *vectors, *layers, *gates], [f"{name}.attended"])[0]

    def _layer(self, block: int, layer: str, slots: Sequence[int]) -> list[ir.Value]:
        """A linear layer's weights as functions take them: of the given slots, whatever has an axis of units."""
        kept = self._kept(block, (layer,))
        precision = layer_precision(self.library.precision, layer, kept)
        made = []
        for part in weight_parts(precision):
            stored = half_name(f"{layer}.{part}") if kept and part == "weight" else f"{layer}.{part}"
            if layer in OUT_MAJOR or part == "weight":
                value = self.weights.units(self.ops, block, stored, slots)
            else:
                value = self.weights.whole(f"blocks.{block}.{stored}")
            # Only the weight has a copy in 16 bits: a bias is small.
            made.append(self.ops.to_precision(value, precision) if kept and part == "bias" else value)
        if precision.is_calibrated:
            assert self.spec.input_scales is not None
            scale = self.spec.input_scales[block][LAYERS.index(layer)]
            made.append(self.weights.local(f"blocks.{block}.{layer}.input_scale", np.asarray(scale, np.float32)))
        return made

    def _kept(self, block: int, layers: Sequence[str]) -> tuple[str, ...]:
        """Those of a block's layers that stay in 16 bits."""
        kept = self.spec.in_16_bits
        return () if kept is None else tuple(layer for layer in layers if layer in kept[block])

    def _mlp(self, block: int, x: ir.Value, vectors: list[ir.Value]) -> Sequence[ir.Value]:
        """Returns x and, with capacity routing, the overflow."""
        slots, name, routing = self.spec.groups[block], f"blocks.{block}", self.spec.routing
        router = []
        if routing:
            parts = ("router.0.weight", "router.0.bias", "router.2.weight", "router.2.bias")
            router = [self.weights.whole(f"{name}.{part}") for part in parts]
        names = [residual_name(block), *([token_mask_name(block)] if routing else [])]
        capacity = routing is Routing.CAPACITY
        if not slots:
            bias = self.weights.whole(f"{name}.fc2.bias")
            x, *_ = self._call(self.library.mlp_none(bool(routing)), [x, vectors[2], bias, *router], names)
            return [x, *([self.ops.constant([0])] if capacity else [])]
        gates = self._gates(block, 1, slots)
        layers = [*self._layer(block, "fc1", slots), *self._layer(block, "fc2", slots)]
        arguments = [x, self.ones, *vectors, *layers, *router]
        if capacity:
            assert self.spec.capacities is not None
            arguments.append(self.ops.constant([self.spec.capacities[block]]))
            names.append(f"{name}.overflow")
        factor = []
        if self.weights.has(f"{name}.{FACTOR}"):
            factor.append(self.weights.units(self.ops, block, FACTOR, slots))
        function = self.library.mlp(routing, bool(gates), bool(factor), self._kept(block, ("fc1", "fc2")))
        x, *extra = self._call(function, [*arguments, *gates, *factor], names)
        return [x, *(extra[1:] if capacity else [])]


def _typed(value: ir.Value, like: ir.Value) -> ir.Value:
    value.shape, value.type = like.shape, like.type
    return value


def _model(name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], writer: _SubnetWriter) -> ir.Model:
    opsets = {CONTRIB: 1} if any(CONTRIB in each.opset_imports for each in writer.functions.values()) else {}
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=writer.ops.nodes,
        initializers=list(writer.weights.initializers.values()),
        opset_imports={"": OPSET, DOMAIN: 1, **opsets},
        name=name,
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="dydit", functions=list(writer.functions.values()))


def conditioning_graph(
    config: ModelConfig, weights: Windows, precision: Precision, migration: Migration | None = None
) -> ir.Model:
    """(timesteps [T], labels [R]) -> modulation [T, R, 6L+2, D] of every pair at once, migrated where it is."""
    ops, d, vectors = Ops(), config.hidden_size, modulation_vectors(config)
    timesteps, labels = (_value(spec) for spec in conditioning_inputs())
    angles = ops.Mul(
        ops.Unsqueeze(ops.Cast(timesteps, to=ir.DataType.FLOAT), ops.constant([1])), weights.whole("time.frequencies")
    )
    sinusoid = ops.Concat(ops.Cos(angles), ops.Sin(angles), axis=1)
    hidden = _silu(ops, ops.Gemm(sinusoid, weights.whole("time.0.weight"), weights.whole("time.0.bias"), transB=1))
    t_emb = ops.Gemm(hidden, weights.whole("time.2.weight"), weights.whole("time.2.bias"), transB=1)
    y_emb = ops.Gather(weights.whole("label.table"), labels, axis=0)
    c = ops.Add(ops.Unsqueeze(t_emb, ops.constant([1])), y_emb)  # [T, R, D]
    flat = _silu(ops, ops.Reshape(c, ops.constant([-1, d])))
    flat = ops.to_precision(flat, precision)
    # A product for each layer, so that a runtime that widens weights has to hold one layer's at a time.
    bounds = [*range(0, vectors * d, 6 * d), vectors * d]
    layers = []
    for first, end in itertools.pairwise(bounds):
        weight, bias = (weights.rows(f"adaln.{part}", first, end) for part in ("weight", "bias"))
        layers.append(ops.Gemm(flat, weight, bias, transB=1))
    out = ops.to_fp32(ops.Concat(*layers, axis=1), precision)
    ones = np.zeros((vectors, d), np.float32)
    ones[[*(6 * b + k for b in range(config.depth) for k in (1, 4)), vectors - 1]] = 1
    out = ops.Add(ops.Reshape(out, ops.constant([-1, vectors, d])), weights.local("scale_ones", ones[:, :1]))
    factors = modulation_factors(config, migration)
    if factors is not None:
        out = ops.Mul(out, weights.local("modulation_factors", factors))
    shape = ops.Concat(ops.Shape(timesteps), ops.Shape(labels), ops.constant([vectors, d]), axis=0)
    (modulation,) = ops.call("", "Reshape", (out, shape), ["modulation"])
    _typed(modulation, _value(conditioning_outputs(config)[0]))
    graph = ir.Graph(
        [timesteps, labels],
        [modulation],
        nodes=ops.nodes,
        initializers=list(weights.initializers.values()),
        opset_imports={"": OPSET},
        name="conditioning",
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="dydit")


def _silu(ops: Ops, x: ir.Value) -> ir.Value:
    return ops.Mul(x, ops.Sigmoid(x))


def save_graph(model: ir.Model, path: Path) -> None:
    """Serialise a graph; external weights stay references to `weights.bin` beside it."""
    proto: onnx.ModelProto = ir.to_proto(model)
    if any(node.op_type == "QuantizeLinear" for function in proto.functions for node in function.node):
        # TensorRT's parser takes no second such layer of one name, and every call of a function would make one.
        proto = inline_local_functions(proto)
        for node in proto.graph.node:
            node.name = ""
    path.write_bytes(proto.SerializeToString(deterministic=True))
