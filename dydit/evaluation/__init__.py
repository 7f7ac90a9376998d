"""Measures sampled images: FID and others with Inception features, or with a classifier of a small data set."""
