"""Batch splitting on a CPU: every thread runs images of its own through the whole graph, a few at a time.

    all threads on each operator             batch splitting
      1 2 | 1 2 | 1 2 | 1 . | 1 2              thread 1: image 0, image 2
      an operator ends when its last           thread 2: image 1, image 3
      thread does; some use only one           no thread waits, and values stay in its cache

There is one session, with one thread and one copy of the weights, which all threads use. An image's values then hardly
ever depend on the other images of its batch. (They do where all images of a part have a single token for a layer: a
product with one row has a kernel of its own. And where threads split an operator, they split its products, see
`registry.deciding_threads`.) Equal bits are promised for equal batches and equal numbers of threads.
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

STREAM_BYTES = 1 << 20  # residual stream of the images that a thread runs at once: what fits a core's own cache
_PER_IMAGE, _PER_ROW = ("x", "history", "noise"), ("condition", "text_rows")
_OUTPUTS = ("x_prev", "next_history")


class BatchSplitting:
    """How the batches of a backend are split among `threads` (0: one for each available core).

    `expected`: images of a batch in the steps to come. If there are fewer than threads, batches are not split and all
    threads work on one operator.
    """

    def __init__(self, model: ModelConfig, threads: int):
        self._threads = thread_count(threads)
        self._pool = Pool(self._threads)
        self._image_bytes = 2 * 4 * model.tokens * model.hidden_size  # both rows of guidance, fp32
        self.expected = 1

    @property
    def apart(self) -> bool:
        """Whether threads have images of their own, and the session one thread."""
        return self.expected >= self._threads

    def parts(self, images: int) -> list[slice]:
        """Which images run through the graph together: parts of even size, small enough for a core's cache."""
        if not self.apart:
            return [slice(0, images)]
        at_once = max(1, STREAM_BYTES // self._image_bytes)
        rounds = math.ceil(images / (at_once * self._threads))
        bounds = np.linspace(0, images, min(images, rounds * self._threads) + 1).round().astype(int).tolist()
        return [slice(first, end) for first, end in pairwise(bounds)]

    def run(self, feeds: Arrays, run: Callable[[Arrays], dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """`x_prev` and `next_history` f32 [B, C, S, S] of a step; calls `run` for every part of its batch, on all
        threads.
        """
        parts = self.parts(len(feeds["x"]))
        if len(parts) == 1:
            outputs = run(feeds)
            return outputs["x_prev"], outputs["next_history"]
        done = self._pool.all(partial(run, feeds_of(feeds, images)) for images in parts)
        x_prev, history = (np.concatenate([each[name] for each in done]) for name in _OUTPUTS)
        return x_prev, history

    def close(self) -> None:
        """End the threads."""
        self._pool.close()


def feeds_of(feeds: Arrays, images: slice) -> Arrays:
    """A step's inputs for some images of the batch. Of what has rows: their conditional and unconditional ones."""
    batch, chosen = len(feeds["x"]), dict(feeds)
    for name in feeds.keys() & set(_PER_ROW):
        rows = feeds[name].reshape(-1, batch, *feeds[name].shape[1:])[:, images]
        chosen[name] = rows.reshape(-1, *rows.shape[2:])
    return chosen | {name: feeds[name][images] for name in _PER_IMAGE}
