"""How numbers are represented in 8 bits: scales, rounding, smoothing, and fake quantization in PyTorch."""
