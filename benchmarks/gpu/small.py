"""The images of the comparisons, and their noise. No PyTorch here, which would load CUDA for its neighbours."""

from __future__ import annotations

from settings import SEED

from dydit.bundle.bundle import Bundle
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import Batch, make_batches

SMALL_STEPS, SMALL_LABELS = 12, (3, 1, 0, 6)


def small_batch() -> Batch:
    """Four images of as many classes."""
    return make_batches(SMALL_LABELS, range(len(SMALL_LABELS)), len(SMALL_LABELS))[0]


def small_noise(bundle: Bundle) -> SeededNoise:
    """The noise of the images of a bundle."""
    model = bundle.manifest.model
    return SeededNoise(SEED, (model.in_channels, model.input_size, model.input_size))
