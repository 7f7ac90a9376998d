"""Batches on a CPU: every thread runs images of its own through the whole graph, a few at a time.

    all threads, operator by operator        images shared out
      1 2 | 1 2 | 1 2 | 1 . | 1 2              thread 1: image 0, image 2
      an operator ends when its last           thread 2: image 1, image 3
      thread does; some have one only          no thread waits, and values stay in its cache

The session is one, and so are its weights, and it has one thread. Then an image's values hardly ever depend on who it
shares a batch with. (They do where all images of a share have one token between them for a layer: a product with one
row has a kernel of its own. And threads that share an operator split its products, see `registry.deciding_threads`.)
Equal bits are promised for equal batches and equal numbers of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from dydit.models.config import ModelConfig
from dydit.runtime.backends.base import Arrays
from dydit.runtime.backends.cores import thread_count
from dydit.runtime.background import Pool

STREAM_BYTES = 1 << 20  # of an image or more at once: what a core's own cache has room for
_PER_IMAGE, _PER_ROW = ("x", "noise"), "condition"


class Sharing:
    """How the batches of a backend are shared out among `threads` (0: as many as there are cores to use).

    `expected`: images of the steps to come; with fewer of them than threads, all threads work on one operator.
    """

    def __init__(self, model: ModelConfig, threads: int):
        self._threads = thread_count(threads)
        self._pool = Pool(self._threads)
        self._image_bytes = 2 * 4 * model.tokens * model.hidden_size  # both rows of guidance, fp32
        self.expected = 1

    @property
    def apart(self) -> bool:
        """Whether threads have images of their own, and sessions one thread each."""
        return self.expected >= self._threads

    def shares(self, images: int) -> list[slice]:
        """Which images go through the graph together: even shares for all threads, no larger than is good."""
        if not self.apart:
            return [slice(0, images)]
        at_once = max(1, STREAM_BYTES // self._image_bytes)
        rounds = math.ceil(images / (at_once * self._threads))
        bounds = np.linspace(0, images, min(images, rounds * self._threads) + 1).round().astype(int).tolist()
        return [slice(first, end) for first, end in pairwise(bounds)]

    def run(self, feeds: Arrays, run: Callable[[Arrays], dict[str, Any]]) -> np.ndarray:
        """`x_prev` f32 [B, C, S, S] of a step, `run` once for every share of its batch, on all threads."""
        shares = self.shares(len(feeds["x"]))
        if len(shares) == 1:
            return np.asarray(run(feeds)["x_prev"])
        made = self._pool.all(partial(run, share_of(feeds, images)) for images in shares)
        return np.concatenate([each["x_prev"] for each in made])

    def close(self) -> None:
        """End the threads."""
        self._pool.close()


def share_of(feeds: Arrays, images: slice) -> Arrays:
    """A step's inputs for some images of the batch; of modulation, their rows with and without a class."""
    batch = len(feeds["x"])
    rows = feeds[_PER_ROW].reshape(-1, batch, *feeds[_PER_ROW].shape[1:])[:, images]
    chosen = dict(feeds, **{_PER_ROW: rows.reshape(-1, *rows.shape[2:])})
    return chosen | {name: feeds[name][images] for name in _PER_IMAGE}
