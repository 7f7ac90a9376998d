"""Benchmarks: how long a step takes, side against side, in one run."""
