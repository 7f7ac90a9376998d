"""Calibration: how many tokens are routed, and how large activations are. NumPy; PyTorch only where a model runs."""
