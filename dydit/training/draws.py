"""All randomness of a run, as a pure function of (seed, iteration, process). There is no state to save for a resume.

Philox generators are keyed through NumPy's SeedSequence. Numbers are drawn on the CPU, so they are equal on every
device.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np

from dydit.diffusion.process import TRAIN_STEPS, Process
from dydit.training.data import Dataset

QUARTERS = 4
_FRACTIONS = 1 << 24  # float32 represents all multiples of 1/2^24 in 0 .. 1


class Purpose(IntEnum):
    """What a stream of random numbers is for; streams of different purposes are independent."""

    ORDER = 1
    BATCH = 2
    PROBE = 3
    INITIAL_WEIGHTS = 4
    NEW_CLASSES = 5


@dataclass(frozen=True)
class Batch:
    """One process' share of an iteration."""

    x0: np.ndarray  # [b, C, S, S] float32
    labels: np.ndarray  # [b] int64, the null class where the label was dropped
    times: np.ndarray  # [b] the model's own times: int64, or float32 where time is continuous
    noise: np.ndarray  # [b, C, S, S] float32
    gate_seed: int


def stream(seed: int, purpose: Purpose, *where: int) -> np.random.Generator:
    """The generator of one purpose, at `where` (an iteration and process, or an epoch)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, int(purpose), *where))))


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return stream(seed, Purpose.ORDER, epoch).permutation(count)


def sample_indices(seed: int, first: int, count: int, total: int) -> np.ndarray:
    """Entries `first .. first+count-1` of the endless sequence that visits `total` images once per epoch, [count]."""
    positions = np.arange(first, first + count)
    orders = {epoch: _epoch_order(seed, int(epoch), total) for epoch in np.unique(positions // total)}
    return np.array([orders[position // total][position % total] for position in positions], np.int64)


def stratified_times(rng: np.random.Generator, process: Process, first: int, count: int) -> np.ndarray:
    """The model's own times for batch elements `first ..`, [count]: each from one of the four quarters in turn.

    int64 in 0..999, or where time is continuous float32 in 0 .. 1 (flow) or 0 .. 999 (vp-sde), uniform in each quarter.
    """
    steps = TRAIN_STEPS if process.discrete else _FRACTIONS
    width = steps // QUARTERS
    drawn = (np.arange(first, first + count) % QUARTERS) * width + rng.integers(0, width, count)
    if process.discrete:
        return drawn
    last = 1 if process.flow else TRAIN_STEPS - 1
    return np.asarray(drawn / steps * last, np.float32)


@dataclass(frozen=True)
class BatchSource:
    """Draws the batches of one process. `batch_size` is that of all processes together.

    `diffusion`: the diffusion process, whose times are drawn.
    """

    data: Dataset
    seed: int
    batch_size: int
    label_dropout: float
    null_class: int
    diffusion: Process
    process: int = 0
    processes: int = 1

    def batch(self, iteration: int) -> Batch:
        """This process' share of iteration `iteration` (from 0)."""
        share = self.batch_size // self.processes
        offset = self.process * share
        indices = sample_indices(self.seed, iteration * self.batch_size + offset, share, len(self.data))
        return self._draw(
            stream(self.seed, Purpose.BATCH, iteration, self.process), indices, offset, self.label_dropout
        )

    def probe(self, count: int) -> Batch:
        """A fixed batch for monitoring a run: the first `count` images, with all labels."""
        indices = sample_indices(self.seed, 0, count, len(self.data))
        return self._draw(stream(self.seed, Purpose.PROBE), indices, 0, 0.0)

    def _draw(self, rng: np.random.Generator, indices: np.ndarray, offset: int, dropout: float) -> Batch:
        images, labels = self.data.batch(indices)
        if self.data.flip:
            mirrored = rng.random(len(indices)) < 0.5
            images = np.where(mirrored[:, None, None, None], images[..., ::-1], images)
        dropped = rng.random(len(indices)) < dropout
        return Batch(
            x0=np.ascontiguousarray(images, np.float32),
            labels=np.where(dropped, self.null_class, labels),
            times=stratified_times(rng, self.diffusion, offset, len(indices)),
            noise=rng.standard_normal(images.shape, np.float32),
            gate_seed=int(rng.integers(0, 2**62)),
        )
