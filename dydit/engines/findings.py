"""Finds wrong types in a network, layer by layer, before anything is built.

The rules: below fp32, matrix products and attention are in the lower type, attention is the fused operator, and casts
are only at their edges. The residual stream, modulation, routers, embedding, final layer and the sampler's formula are
fp32. With calibrated 8 bits, both inputs of a block's linear layers are dequantized, attention is fp16, and
conditioning is fp32. A layer that stays fp16 is known by its weight, which is stored in fp16 under a name of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from dydit.bundle.stored_weights import Precision, fp16_name, stored_type
from dydit.dtypes import FLOATS
from dydit.engines.network import Layer, Network
from dydit.errors import BackendError
from dydit.models.config import ModelConfig

CONVOLUTIONS = frozenset({"convolution", "deconvolution"})
PRODUCTS = frozenset({"matrix_multiply", "einsum"}) | CONVOLUTIONS
ATTENTION = frozenset({"attention_input", "attention_output"})
_HEAVY = PRODUCTS | ATTENTION
# These pass values on unchanged, so a cast on their far side is still at the edge of what follows.
_MOVING = frozenset({"shuffle", "slice", "gather", "concatenation", "unsqueeze", "squeeze", "identity", "select"})
_GENERATED = frozenset({"constant", "fill"})
_SHOWN = 3


class Kind(StrEnum):
    """The kind of a finding."""

    PRODUCT = "product"  # a matrix product of the wrong type
    ATTENTION = "attention"  # attention that no compiler will fuse
    CAST = "cast"  # a cast that is not at the edge of a product or attention
    NORM = "norm"  # a normalisation, and so the residual stream, below fp32


@dataclass(frozen=True)
class Finding:
    """A layer whose types are wrong: its name, the kind of fault, and what it is and should be."""

    layer: str
    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"layer {self.layer}: {self.text}"


def type_findings(network: Network, precision: Precision, model: ModelConfig) -> list[Finding]:
    """All wrong types of a subnetwork or the conditioning of `model`, in the order of its layers."""
    check = _Check(network, precision, model)
    problems = ((str(layer), check.problem(layer)) for layer in network.layers)
    return [Finding(name, *problem) for name, problem in problems if problem is not None]


def require_types(network: Network, precision: Precision, model: ModelConfig, what: str) -> None:
    """Raise `BackendError`, naming the layers, if `type_findings` finds anything."""
    if findings := type_findings(network, precision, model):
        raise BackendError(
            f"{what} has types that {precision} does not allow: {shown(findings)}; export the bundle again "
            f"with --precision {precision}"
        )


def shown(findings: Sequence[Finding]) -> str:
    """The first findings, and how many more there are, for a message."""
    more = f" (and {len(findings) - _SHOWN} more)" if len(findings) > _SHOWN else ""
    return f"{'; '.join(map(str, findings[:_SHOWN]))}{more}"


@dataclass(frozen=True)
class Product:
    """A product of the network: its weight, empty for one of two activations, and the type of its operands."""

    weight: str
    dtype: str


def products(network: Network, precision: Precision, model: ModelConfig) -> dict[str, Product]:
    """The products of a network of the types that `type_findings` asks for, by their ONNX node as layers name it."""
    check = _Check(network, precision, model)
    return {layer.origin: check.product(layer) for layer in network.layers if layer.kind in PRODUCTS}


class _Check:
    def __init__(self, network: Network, precision: Precision, model: ModelConfig):
        self.network, self.low = network, precision.attention.dtype
        self.is_fp32, self.quantized = (
            precision is Precision.FP32,
            precision.weight_dtype if precision.in_8_bits else None,
        )
        self._fp16_weights = frozenset(map(fp16_name, model.units.weights)) if self.quantized else frozenset()
        followers = () if self.is_fp32 else model.low_precision  # fp32 if the precision's own type is
        self._exempt = model.fp32_products.union(
            name for name in followers if stored_type(model, name, precision) == "float32"
        )

    def problem(self, layer: Layer) -> tuple[Kind, str] | None:
        """What is wrong with a layer's types; None if they are right."""
        types = {self.network.dtypes[name] for name in layer.inputs} & FLOATS
        if strange := types - {"float32", self.low}:
            return Kind.CAST, f"works in {strange.pop()}, which {self.low} graphs do not use"
        if layer.kind in PRODUCTS:
            return self._product(layer, types)
        if layer.kind in ATTENTION and types - {self.low}:
            return Kind.ATTENTION, f"attention takes {_words(types)}, expected {self.low}"
        if layer.kind == "softmax" and not self.is_fp32:
            return Kind.ATTENTION, (
                "attention consists of separate matrix products and a softmax, which TensorRT does not fuse; expected "
                f"one Attention operator in {self.low}"
            )
        if layer.kind == "normalization" and types - {"float32"}:
            return Kind.NORM, f"normalizes {_words(types)}, expected a residual stream in float32"
        return self._cast(layer) if layer.kind == "cast" else None

    def _product(self, layer: Layer, types: set[str]) -> tuple[Kind, str] | None:
        if self.is_fp32:
            return None
        weights = self._weights_of(layer)
        named = f"with {weights[0]}" if weights else "of two activations"
        taken = f"the matrix product {named} takes {_words(types)}, expected"
        if self.is_exempt(layer):
            return (Kind.PRODUCT, f"{taken} float32 in every precision") if types - {"float32"} else None
        if self.quantized and self._fp16_weights.isdisjoint(weights):
            right = all(self._was_stored_in_8_bits(operand) for operand in layer.inputs)
            return None if right else (Kind.PRODUCT, f"{taken} {self.quantized} for both operands")
        if not weights:
            return Kind.ATTENTION, (
                f"a matrix product of two activations in {_words(types)} is attention that is not fused; expected one "
                "Attention operator"
            )
        if "float32" in types:
            return Kind.PRODUCT, f"the matrix product {named} takes float32, expected {self.low}"
        return None

    def product(self, layer: Layer) -> Product:
        """A product, with the type that its operands should have."""
        weights = self._weights_of(layer)
        if self.is_fp32 or self.is_exempt(layer):
            dtype = "float32"
        elif self.quantized and self._fp16_weights.isdisjoint(weights):
            dtype, weights = self.quantized, [name for each in layer.inputs for name in self._weights_in_8_bits(each)]
        else:
            dtype = self.low
        return Product(weights[0] if weights else "", dtype)

    def is_exempt(self, product: Layer) -> bool:
        """Whether a product has one of the weights that stay fp32.

        TensorRT keeps the kernel of a convolution in the layer, without its name. All convolutions of models are fp32.
        """
        if product.kind in CONVOLUTIONS and len(product.inputs) == 1:
            return True
        return not self._exempt.isdisjoint(self._weights_of(product))

    def _was_stored_in_8_bits(self, operand: str) -> bool:
        """Whether an operand comes, through layers that only move values, from a dequantization of the right type."""
        for producer in self._producers(operand, lambda layer: layer.kind in _MOVING):
            if producer.kind == "dequantize":
                return self.network.dtypes[producer.inputs[0]] == self.quantized
        return False

    def _weights_of(self, product: Layer) -> list[str]:
        return [name for operand in product.inputs for name in self._weights(operand)]

    def _weights(self, operand: str) -> list[str]:
        """The stored weights that an operand comes from; empty for an activation."""
        inputs = {spec.name for spec in self.network.inputs}
        names = []
        for name in self._back(operand, lambda layer: layer.kind in _MOVING or layer.kind == "cast"):
            producer = self.network.producers.get(name)
            if self.network.dtypes[name] not in FLOATS:
                continue
            if producer is None and name in inputs and "." in name:
                names.append(name)  # a weight that is an input of the graph
            elif producer is None or producer.kind not in _MOVING | _GENERATED | {"cast"}:
                return []
            elif producer.kind == "constant":
                names.append(producer.name)
        return [_without_window(name) for name in names]

    def _weights_in_8_bits(self, operand: str) -> list[str]:
        """The weights stored in 8 bits that an operand is dequantized from."""
        producers = self._producers(operand, lambda layer: layer.kind in _MOVING or layer.kind == "dequantize")
        stored = (each for each in producers if each.kind == "constant")
        return [_without_window(each.name) for each in stored if self.network.dtypes[each.outputs[0]] == self.quantized]

    def _cast(self, layer: Layer) -> tuple[Kind, str] | None:
        (source, *_), (result, *_) = layer.inputs, layer.outputs
        before, after = self.network.dtypes[source], self.network.dtypes[result]
        if before not in FLOATS or after not in FLOATS or before == after or self._is_constant(source):
            return None
        if after not in ("float32", self.low):
            return Kind.CAST, f"casts {before} to {after}, which {self.low} graphs do not use"
        if after == "float32":
            from_product = self._comes_from_product(source)
            text = f"casts {before} to float32, but its input is not the output of a matrix product"
            return None if from_product else (Kind.CAST, text)
        if not self._feeds_product(result):
            return Kind.CAST, f"casts float32 to {after}, but not at the edge of a product"
        if self._is_island(source):
            return Kind.CAST, f"casts a value from {after} to float32 and back to {after} between two matrix products"
        return None

    def _feeds_product(self, name: str) -> bool:
        """Whether a value just cast down goes into products, through layers that move it, or gates their results."""
        for reached in self._forward(name):
            if reached in self.network.outputs:
                return False
            for consumer in self.network.consumers.get(reached, []):
                if consumer.kind in _HEAVY or consumer.kind in _MOVING or consumer.kind in ("shape", "scatter"):
                    continue
                others = [other for other in consumer.inputs if other != reached]
                if consumer.kind == "elementwise" and all(map(self._is_constant, others)):  # attention scales its input
                    if all(map(self._feeds_product, consumer.outputs)):
                        continue
                    return False
                if consumer.kind != "elementwise" or not any(self._comes_from_product(other) for other in others):
                    return False
        return True

    def _comes_from_product(self, name: str) -> bool:
        """Whether a value in the lower type comes from a product or attention, or from what directly follows one."""

        def onward(layer: Layer) -> bool:
            return layer.kind not in _HEAVY and layer.kind not in ("cast", "normalization", "shape")

        return any(producer.kind in _HEAVY for producer in self._producers(name, onward))

    def _is_island(self, name: str) -> bool:
        """Whether a float32 value was in the lower type before, with no normalization in between.

        The residual stream is none, although what branches add to it was: it is fp32 for its own sake, and begins with
        the float32 product that embeds patches.
        """

        def onward(layer: Layer) -> bool:
            ends = layer.kind in _HEAVY or layer.kind in ("normalization", "shape")
            return not ends and not self._casts_up(layer) and not self._adds_to_stream(layer)

        reached = self._producers(name, onward)
        is_stream = any(each.kind in PRODUCTS and self.network.dtypes[each.outputs[0]] == "float32" for each in reached)
        return any(map(self._casts_up, reached)) and not is_stream

    def _adds_to_stream(self, layer: Layer) -> bool:
        """Whether a layer adds to the residual stream, which is what a block normalizes."""
        consumers = [each for name in layer.inputs for each in self.network.consumers.get(name, [])]
        return layer.kind == "elementwise" and any(each.kind == "normalization" for each in consumers)

    def _casts_up(self, layer: Layer) -> bool:
        return layer.kind == "cast" and self.network.dtypes[layer.inputs[0]] == self.low

    def _is_constant(self, name: str) -> bool:
        """Whether a value comes from constants alone: it is cast once, when the engine is built."""
        passed = _MOVING | {"cast"}
        reached = self._back(name, lambda layer: layer.kind in passed)
        producers = [self.network.producers.get(each) for each in reached if self.network.dtypes[each] in FLOATS]
        return all(each is not None and each.kind in _GENERATED | passed for each in producers)

    def _back(self, name: str, onward: Callable[[Layer], bool]) -> list[str]:
        """A tensor and all that it comes from, going back through the layers for which `onward` is true."""

        def sources(each: str) -> Sequence[str]:
            producer = self.network.producers.get(each)
            return producer.inputs if producer is not None and onward(producer) else ()

        return _reachable(name, sources)

    def _producers(self, name: str, onward: Callable[[Layer], bool]) -> list[Layer]:
        """The layers that output the tensors of `_back`."""
        producers = self.network.producers
        return [producers[each] for each in self._back(name, onward) if each in producers]

    def _forward(self, name: str) -> list[str]:
        """A tensor and all values that layers which only move values make of it."""

        def moved(each: str) -> list[str]:
            consumers = self.network.consumers.get(each, [])
            return [output for consumer in consumers if consumer.kind in _MOVING for output in consumer.outputs]

        return _reachable(name, moved)


def _reachable(name: str, following: Callable[[str], Sequence[str]]) -> list[str]:
    """A tensor and all that one comes to from it, going from each to those `following` it."""
    seen, waiting = dict.fromkeys([name]), [name]
    while waiting:
        fresh = [each for each in following(waiting.pop()) if each not in seen]
        seen.update(dict.fromkeys(fresh))
        waiting.extend(fresh)
    return list(seen)


def _without_window(name: str) -> str:
    """`NAME` for `NAME[0:3]`."""
    return re.sub(r"\[\d+:\d+\]$", "", name)


def _words(types: set[str]) -> str:
    return " and ".join(sorted(types)) or "no floats"
