"""Writing ONNX: nodes, local functions, linear layers in every precision, sources of weights, the sampler's step."""
