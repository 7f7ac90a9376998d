"""Sampling that stays on a GPU: what to launch, worked out in plain Python, and a thin layer that launches it."""
