"""TensorRT engines of a bundle: built from its graphs, kept by content, loaded only where they belong."""
