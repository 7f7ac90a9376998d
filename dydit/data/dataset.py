"""What training reads: images by index, with labels and, for models that texts condition, encoded captions.

The loop alone decides the order. Whatever is random about an image (whether it is mirrored, which of its captions is
read, the noise of a latent) is drawn from a generator of that image, so any split over processes gives the same batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dydit.models.config import Space, TextSpec


@dataclass(frozen=True)
class EncodedCaptions:
    """A caption for each image, encoded by a language model; the same as `dydit.models.text.TextRows`.

    `embeddings` float32 [n, L, channels], `mask` bool [n, L]: False for padding.
    """

    embeddings: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Examples:
    """Images of a batch. `captions`: None where the data have none.

    `images` float32 [n, C, S, S] in [-1, 1], or scaled latents; `labels` int64 [n].
    """

    images: np.ndarray
    labels: np.ndarray
    captions: EncodedCaptions | None = None


class Dataset(Protocol):
    """Labelled images or latents that can be read by index."""

    shape: tuple[int, int, int]  # (C, S, S)
    space: Space
    classes: int
    class_names: tuple[str, ...] | None
    text: TextSpec | None  # tokens of the longest caption, and channels of the language model

    def __len__(self) -> int:
        """Number of images."""
        ...

    def batch(self, indices: np.ndarray, generators: Sequence[np.random.Generator]) -> Examples:
        """The images at `indices`, int64 [n]; `generators`: one for each of them."""
        ...

    def no_caption(self) -> EncodedCaptions:
        """The empty caption, n = 1, which takes the place of dropped ones. Only where `text` is not None."""
        ...
