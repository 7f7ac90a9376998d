"""Proof: parity, latency, reports on checkpoints and bundles."""
