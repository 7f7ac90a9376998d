"""The layers that TensorRT for RTX makes of a bundle's graphs, read from the builder's messages without a GPU.

    python scripts/rtx_layers.py BUNDLE [GRAPH ...]      by default subnet-0000.onnx

A line for each layer of the engine in order of execution: its kind, what it computes, and the shapes, strides and types
of its inputs and weights. It shows what was fused, which transposes are left, and the type that each product takes.
Which kernel runs a product is decided on the GPU. Nothing is written.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from dydit.bundle.bundle import Bundle
from dydit.engines.builder import set_flags
from dydit.engines.fingerprint import make_request
from dydit.engines.flavour import Flavour, installed_version, load_flavour
from dydit.engines.network import read_network
from dydit.engines.profiles import shape_profiles, symbol_ranges

_LAYER = re.compile(r"^Name: ([^,]*), LayerType: ([^,]*), Inputs: \[(.*)\], Outputs: \[")
_TENSOR = re.compile(r"Dimensions: (\[[-\d,]*\]), Strides: (\[[-\d,]*\]).*?Datatype: (\w+)")
_WAITS = ("signal", "wait")


def layers(bundle: Bundle, graph: str) -> list[tuple[str, str, list[tuple[str, ...]]]]:
    """Kind, name, and (shape, strides, type) of the inputs and weights of each layer."""
    trt = load_flavour(Flavour.TENSORRT_RTX)
    said: list[str] = []

    class Log(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            said.extend(message.splitlines() if "LayerType: " in message else ())

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(bundle.file(graph))):
        sys.exit(f"{graph}: {parser.get_error(0)}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    set_flags(trt, config, Flavour.TENSORRT_RTX)
    request = make_request(bundle.manifest, Flavour.TENSORRT_RTX, installed_version(Flavour.TENSORRT_RTX), None)
    ranges = symbol_ranges(bundle.manifest, request.opt_batches, request.max_batch)
    for each in shape_profiles(read_network(network).inputs, ranges, graph):
        profile = builder.create_optimization_profile()
        for name, extent in each.items():
            profile.set_shape(name, extent.min, extent.opt, extent.max)
        config.add_optimization_profile(profile)
    if builder.build_serialized_network(network, config) is None:
        sys.exit(f"{graph}: not built")
    found = [match.groups() for match in map(_LAYER.search, said) if match]
    return [(kind, name, _TENSOR.findall(taken)) for name, kind, taken in found if kind not in _WAITS]


def main(folder: str, *graphs: str) -> None:
    """Print the layers of each graph."""
    bundle = Bundle.open(Path(folder))
    for graph in graphs or ("subnet-0000.onnx",):
        print(graph)
        for kind, name, taken in layers(bundle, graph):
            print(f"  {kind:<15} {name:<90}", *(" ".join(each) for each in taken[:2]), sep="  ")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
