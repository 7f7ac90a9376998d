"""Masks of the sampling steps, plan, weights, graphs: a checkpoint becomes a bundle."""
