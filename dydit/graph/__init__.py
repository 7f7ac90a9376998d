"""Writing ONNX: nodes and local functions, linear layers in every precision, where weights come from, the sampler step."""
