"""Writes the graph of one sampling step on one subnetwork.

This module writes the parts that all models share: inputs, weights of the subnetwork's units, gates, the sampler's step
and outputs. The architecture writes the blocks (`Architecture.write_step`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from dydit.bundle.io_spec import subnet_inputs, subnet_outputs
from dydit.bundle.manifest import Routing
from dydit.bundle.stored_weights import fp16_name
from dydit.graph.library import FunctionLibrary
from dydit.graph.ops import CONTRIB, DOMAIN, IR_VERSION, OPSET, Ops
from dydit.graph.products import weight_parts
from dydit.graph.sampler_step import sampler_function
from dydit.graph.sources import WeightSource, graph_value
from dydit.models.architecture import Part, Slots, UnitLayer
from dydit.models.config import ModelConfig
from dydit.models.registry import architecture_of


@dataclass(frozen=True)
class SubnetSpec:
    """The description of a subnetwork: its slots, its gated unit groups, and how it routes tokens.

    `units`: ascending slots by block and unit group. `gated`: (block, unit group) of groups that are not completely on
    in every step of the subnetwork. `capacities`: the blocks' token slots per row of a batch, with `Routing.CAPACITY`;
    the rows of a batch share them. `input_scales`: the blocks' scales of layer inputs, with calibrated precisions; None
    for a layer that stays in fp16.
    """

    units: Slots
    gated: frozenset[tuple[int, int]]
    routing: Routing | None
    capacities: tuple[int, ...] | None = None
    input_scales: tuple[tuple[float | None, ...], ...] | None = None

    def fp16_layers(self, layers: Sequence[str]) -> tuple[tuple[str, ...], ...] | None:
        """The layers that stay in fp16, by block; None if there are none. `layers`: the names of a block's layers."""
        in_fp16 = [
            tuple(layer for layer, scale in zip(layers, block, strict=True) if scale is None)
            for block in self.input_scales or ()
        ]
        return tuple(in_fp16) if any(in_fp16) else None


class GraphWriter:
    """The main graph while it is written, with methods that an architecture uses to write its blocks."""

    def __init__(self, config: ModelConfig, spec: SubnetSpec, library: FunctionLibrary, weights: WeightSource):
        self.config: Any = config
        self.spec, self.library, self.weights = spec, library, weights
        self.ops = Ops()
        self.functions: dict[str, ir.Function] = {}
        self.inputs = {each.name: graph_value(each) for each in subnet_inputs(config, bool(spec.gated))}
        self._parts = {(part.block, part.index): part for part in config.units.parts}
        self._fp16_layers = spec.fp16_layers(config.units.layer_names)

    def call(self, target: ir.Function, inputs: Sequence[ir.Value], names: Sequence[str]) -> Sequence[ir.Value]:
        """Call a local function and name its outputs."""
        self.functions[target.name] = target
        return self.ops.call(target.domain, target.name, inputs, names)

    def part(self, block: int, group: int) -> tuple[Part, tuple[int, ...]]:
        """The part of a block's unit group, and the slots of it that the subnetwork has."""
        return self._parts[block, group], self.spec.units[block][group]

    def count(self, slots: Sequence[int]) -> int | None:
        """The number of units in `slots`; None if the graph serves any number."""
        return None if self.weights.any_width else len(slots)

    def gates(self, part: Part, slots: Sequence[int]) -> list[ir.Value]:
        """The gates of a part's slots, [units]; an empty list if the part is not gated."""
        if (part.block, part.index) not in self.spec.gated:
            return []
        index = self.ops.constant(np.asarray(slots, np.int64) + part.start)
        return [self.ops.Gather(self.inputs["gates"], index, axis=0)]

    def layers(self, part: Part, slots: Sequence[int], padding: int = 0) -> list[ir.Value]:
        """The weights of a part's layers, in the order in which functions take them.

        `padding`: a number of rows, of any finite values, that follow the slots' in weights [in, out], whose inputs are
        padded with zeros (`dydit.graph.products.padding`).
        """
        return [value for layer in part.group.layers for value in self._layer(part, layer, slots, padding)]

    def factors(self, part: Part, slots: Sequence[int]) -> list[ir.Value]:
        """The stored factors of smoothed inputs of a part's layers, each [channels of the slots]."""
        names = [layer.factor for layer in part.group.layers if layer.scaled_inputs]
        return [
            self.weights.units(self.ops, part, name, slots) for name in names if self.weights.has(part.stored(name))
        ]

    def fp16_layers(self, part: Part) -> tuple[str, ...]:
        """The layers of a part that stay in fp16, while the others have 8 bits."""
        in_fp16 = () if self._fp16_layers is None else self._fp16_layers[part.block]
        return tuple(layer.name for layer in part.group.layers if layer.name in in_fp16)

    def _layer(self, part: Part, layer: UnitLayer, slots: Sequence[int], padding: int) -> list[ir.Value]:
        """A linear layer's weights, with the given slots of those tensors that have an axis of units."""
        in_fp16 = layer.name in self.fp16_layers(part)
        precision = self.library.precision.attention if in_fp16 else self.library.precision
        values = []
        for piece in weight_parts(precision):
            stored = fp16_name(layer.weight) if in_fp16 and piece == "weight" else f"{layer.name}.{piece}"
            if layer.out_major or piece == "weight":
                value = self.weights.units(self.ops, part, stored, slots, 0 if layer.out_major else padding)
            else:
                value = self.weights.whole(part.stored(stored))
            # Only the weight has a stored copy in fp16. A bias is small, so the graph converts it.
            values.append(self.ops.to_precision(value, precision) if in_fp16 and piece == "bias" else value)
        if precision.is_calibrated:
            assert self.spec.input_scales is not None
            index = self.config.units.layer_names.index(layer.name)
            scale = np.asarray(self.spec.input_scales[part.block][index], np.float32)
            values.append(self.weights.local(part.stored(f"{layer.name}.input_scale"), scale))
        return values


def subnet_graph(config: ModelConfig, spec: SubnetSpec, library: FunctionLibrary, weights: WeightSource) -> ir.Model:
    """The graph of one sampling step on one subnetwork; inputs and outputs as `dydit.bundle.io_spec` describes them.

    Each block's residual stream and token mask are values of the main graph, named as in `io_spec`.
    """
    writer = GraphWriter(config, spec, library, weights)
    out, overflow = architecture_of(config).write_step(writer)
    step = [writer.inputs[name] for name in ("x", "history", "noise", "coefficients", "cfg_scale")]
    capacity = spec.routing is Routing.CAPACITY
    outputs = [graph_value(each) for each in subnet_outputs(config, capacity)]
    sampler = library.get(sampler_function, library.cfg_channels)
    values = list(writer.call(sampler, [*step, out], ["x_prev", "next_history"]))
    if capacity:
        values += writer.ops.call("", "Concat", overflow, ["token_overflow"], {"axis": 0})
    outputs = [typed(value, output) for value, output in zip(values, outputs, strict=True)]
    return graph_model("subnetwork", [*writer.inputs.values(), *map(graph_value, weights.inputs)], outputs, writer)


def typed(value: ir.Value, like: ir.Value) -> ir.Value:
    """Give `value` the shape and type of a declared output."""
    value.shape, value.type = like.shape, like.type
    return value


def graph_model(name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], writer: GraphWriter) -> ir.Model:
    """An ONNX model with the main graph and the functions that it calls."""
    functions = writer.functions.values()
    opsets = {CONTRIB: 1} if any(CONTRIB in each.opset_imports for each in functions) else {}
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=writer.ops.nodes,
        initializers=list(writer.weights.initializers.values()),
        opset_imports={"": OPSET, DOMAIN: 1, **opsets},
        name=name,
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="dydit", functions=list(functions))


def conditioning_model(
    inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], ops: Ops, weights: WeightSource
) -> ir.Model:
    """An ONNX model with a conditioning graph, which calls no functions."""
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=ops.nodes,
        initializers=list(weights.initializers.values()),
        opset_imports={"": OPSET},
        name="conditioning",
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="dydit")
