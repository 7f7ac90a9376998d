"""A graph as TensorRT parsed it, and a plain description of its layers that can be checked without TensorRT.

Parsing needs no GPU. Weights are read from `weights.bin` beside the graph. Networks are strongly typed: the graph
decides the precision.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dydit.bundle.io_spec import TensorSpec
from dydit.dtypes import DTYPES
from dydit.errors import BackendError
from dydit.extras import require

_DTYPES = {dtype.tensorrt: name for name, dtype in DTYPES.items()}
_FUNCTION = re.compile(r"\((\w+)\)\]\s*$")
_ACTIVATION_WORDS = "Total Activation Memory: "
_ACTIVATION = re.compile(_ACTIVATION_WORDS + r"(\d+) bytes")
_MESSAGES = 3


@dataclass(frozen=True)
class Layer:
    """A layer: its name, kind (`matrix_multiply`, `cast`, ...), tensors, and the ONNX node that it comes from."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    origin: str = ""

    @property
    def function(self) -> str:
        """The local function that the layer is part of; empty for the main graph."""
        match = _FUNCTION.search(self.origin)
        return match[1] if match else ""

    def __str__(self) -> str:
        return f"{self.name} ({self.function})" if self.function else self.name


@dataclass(frozen=True)
class Network:
    """Layers in any order, the dtype of every tensor (NumPy's name), the inputs with their symbols, output names."""

    layers: tuple[Layer, ...]
    dtypes: dict[str, str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]

    @cached_property
    def producers(self) -> dict[str, Layer]:
        """The layer that outputs a tensor, by the tensor's name."""
        return {name: layer for layer in self.layers for name in layer.outputs}

    @cached_property
    def consumers(self) -> dict[str, list[Layer]]:
        """The layers that read a tensor, by the tensor's name."""
        taken: dict[str, list[Layer]] = {}
        for layer in self.layers:
            for name in dict.fromkeys(layer.inputs):
                taken.setdefault(name, []).append(layer)
        return taken


@dataclass
class Messages:
    """TensorRT's messages about one graph: errors, and warnings with their counts.

    `activation_bytes`: device memory for the engine's activations at the largest shapes of any profile; None until it
    is reported.
    """

    errors: list[str] = field(default_factory=list)
    warnings: dict[str, int] = field(default_factory=dict)
    activation_bytes: int | None = None

    def reason(self) -> str:
        """The first errors, for a message."""
        return "; ".join(dict.fromkeys(" ".join(each.split()) for each in self.errors[:_MESSAGES])) or "no reason given"

    def text(self) -> str:
        """All messages, one a line."""
        lines = [f"  error: {' '.join(each.split())}" for each in self.errors]
        for message, times in self.warnings.items():
            lines.append(f"  warning{f' ({times} times)' if times > 1 else ''}: {' '.join(message.split())}")
        return "".join(line + "\n" for line in lines)


def make_logger(trt: Any, messages: Messages) -> Any:
    """A TensorRT logger that collects errors and warnings in `messages`."""
    warning = int(trt.ILogger.WARNING)  # errors are below it; what is above is some 12,000 lines for a small engine

    class Collector(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            level = int(severity)
            if level > warning:
                if _ACTIVATION_WORDS in message and (match := _ACTIVATION.search(message)):
                    messages.activation_bytes = max(messages.activation_bytes or 0, int(match[1]))
            elif level < warning:
                messages.errors.append(message)
            else:
                # The nodes of a function are reported again for every call of it.
                message = re.sub(r"A node named \S+ already", "A node named ... already", message)
                messages.warnings[message] = messages.warnings.get(message, 0) + 1

    return Collector()


@dataclass(frozen=True)
class Parsed:
    """TensorRT's builder, network and parser (which owns the weights), and the logger that must outlive them."""

    builder: Any
    network: Any
    parser: Any
    logger: Any


def parse_graph(trt: Any, path: Path, messages: Messages) -> Parsed:
    """Parse an ONNX graph as a strongly typed network. Raises `BackendError` with the parser's reason."""
    require_distinct_names(path)
    logger = make_logger(trt, messages)
    builder = trt.Builder(logger)
    # TensorRT 11 has only such networks, and may drop the flag.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = [" ".join(str(parser.get_error(index)).split()) for index in range(parser.num_errors)]
        raise BackendError(f"{trt.__name__} cannot parse {path.name}: {'; '.join(errors[:1]) or messages.reason()}")
    return Parsed(builder, network, parser, logger)


def require_distinct_names(path: Path) -> None:
    """Raise `BackendError` if a value inside a function has the name of a value of the main graph.

    TensorRT's parser (tensorrt-rtx 1.7.1) confuses the two, silently if their shapes agree.
    """
    require("building engines", ["onnx"])
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, which onnx does not wrap
        raise BackendError(f"{path} is not an ONNX graph ({type(error).__name__}); export the bundle again") from error
    graph = model.graph
    main = {each.name for each in (*graph.input, *graph.initializer)}
    main.update(name for node in graph.node for name in node.output)
    for function in model.functions:
        inner = {name for node in function.node for name in node.output}
        if shared := sorted(inner & main):
            raise BackendError(
                f"{path.name}: function {function.name!r} and the main graph both have a value named "
                f"{shared[0]!r}, and TensorRT's parser does not distinguish them; export the bundle again"
            )


def read_network(network: Any) -> Network:
    """The description of a parsed network."""
    layers, dtypes = [], {}

    def name_of(tensor: Any) -> str:
        name: str = tensor.name
        if name not in dtypes:
            dtypes[name] = _dtype(tensor)
        return name

    for index in range(network.num_layers):
        layer = network.get_layer(index)
        layer_inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        layer_outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        layers.append(
            Layer(
                name=layer.name,
                kind=layer.type.name.lower(),
                inputs=tuple(name_of(tensor) for tensor in layer_inputs if tensor is not None),
                outputs=tuple(name_of(tensor) for tensor in layer_outputs),
                origin=layer.metadata,
            )
        )
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    specs = tuple(TensorSpec(name_of(tensor), _dtype(tensor), _shape(tensor)) for tensor in inputs)
    return Network(tuple(layers), dtypes, specs, tuple(name_of(tensor) for tensor in outputs))


def _dtype(tensor: Any) -> str:
    name: str = tensor.dtype.name
    return _DTYPES.get(name, name.lower())


def _shape(tensor: Any) -> tuple[int | str, ...]:
    """The dimensions: numbers, and the symbols that ONNX has for the dynamic ones."""
    return tuple(
        (tensor.get_dimension_name(axis) or f"axis {axis} of {tensor.name}") if size < 0 else size
        for axis, size in enumerate(tensor.shape)
    )


def require_inputs(network: Network, specs: Sequence[TensorSpec], what: str) -> None:
    """Compare a parsed network's inputs with their description. Raises `BackendError` for the first that differs."""
    parsed, expected = {spec.name: spec for spec in network.inputs}, {spec.name: spec for spec in specs}
    for name in sorted(parsed.keys() | expected.keys()):
        if parsed.get(name) != expected.get(name):
            raise BackendError(
                f"{what}: input {name!r} is {_describe(parsed.get(name))}, expected {_describe(expected.get(name))}; "
                "export the bundle again"
            )


def _describe(spec: TensorSpec | None) -> str:
    return "missing" if spec is None else f"{spec.dtype} {list(spec.shape)}"
