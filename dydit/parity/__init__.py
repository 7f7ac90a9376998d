"""Parity: a bundle is compared with the model that it was exported from, check by check."""
