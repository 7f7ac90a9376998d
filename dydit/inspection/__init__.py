"""Inspection: what a checkpoint, a bundle or a run holds and computes."""
