"""All randomness of a run, as a pure function of (seed, iteration, position in the batch).

There is no state to save for a resume, and any number of processes draws the same batch, of which each has a share.

Philox generators are keyed through NumPy's SeedSequence. Numbers are drawn on the CPU, so they are equal on every
device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np

from dydit.data.dataset import Dataset, EncodedCaptions
from dydit.diffusion.process import TRAIN_STEPS, Process

QUARTERS = 4
_FRACTIONS = 1 << 24  # float32 represents all multiples of 1/2^24 in 0 .. 1


class Purpose(IntEnum):
    """What a stream of random numbers is for; streams of different purposes are independent."""

    ORDER = 1
    BATCH = 2
    PROBE = 3
    INITIAL_WEIGHTS = 4
    GATES = 5
    NEW_CLASSES = 6


@dataclass(frozen=True)
class Batch:
    """One process' share of an iteration."""

    x0: np.ndarray  # [b, C, S, S] float32
    labels: np.ndarray  # [b] int64, the null class where the label was dropped
    captions: EncodedCaptions | None  # of the images, the empty caption where it was dropped
    times: np.ndarray  # [b] the model's own times: int64, or float32 where time is continuous
    noise: np.ndarray  # [b, C, S, S] float32
    gate_seed: int  # of the whole iteration, the same in all processes
    first: int  # position of the first image in the batch of all processes


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


def stratified_times(generators: Sequence[np.random.Generator], process: Process, first: int) -> np.ndarray:
    """The model's own times for batch elements `first ..`, [n]: each from one of the four quarters in turn.

    int64 in 0..999, or where time is continuous float32 in 0 .. 1 (flow) or 0 .. 999 (vp-sde), uniform in each quarter.
    """
    steps = TRAIN_STEPS if process.discrete else _FRACTIONS
    width = steps // QUARTERS
    within = np.array([each.integers(0, width) for each in generators], np.int64)
    drawn = np.arange(first, first + len(within)) % QUARTERS * width + within
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

    def batch(self, iteration: int, part: int = 0, parts: int = 1) -> Batch:
        """This process' share of iteration `iteration` (from 0), or of one of `parts` equal parts of its batch.

        A part is a range of the batch of all processes, so it consists of the same images for any number of processes.
        """
        share = self.batch_size // parts // self.processes
        first = part * (self.batch_size // parts) + self.process * share
        indices = sample_indices(self.seed, iteration * self.batch_size + first, share, len(self.data))
        generators = [stream(self.seed, Purpose.BATCH, iteration, first + at) for at in range(share)]
        gate_seed = int(stream(self.seed, Purpose.GATES, iteration).integers(0, 2**62))
        return self._draw(generators, indices, first, self.label_dropout, gate_seed)

    def probe(self, count: int) -> Batch:
        """A fixed batch for monitoring a run: the first `count` images, with all labels and captions."""
        indices = sample_indices(self.seed, 0, count, len(self.data))
        return self._draw([stream(self.seed, Purpose.PROBE, at) for at in range(count)], indices, 0, 0.0, 0)

    def _draw(
        self,
        generators: Sequence[np.random.Generator],
        indices: np.ndarray,
        first: int,
        dropout: float,
        gate_seed: int,
    ) -> Batch:
        examples = self.data.batch(indices, generators)
        dropped = np.array([each.random() < dropout for each in generators])
        captions = examples.captions
        shape = examples.images.shape[1:]
        return Batch(
            x0=np.ascontiguousarray(examples.images, np.float32),
            labels=np.where(dropped, self.null_class, examples.labels),
            captions=None if captions is None else _without(captions, dropped, self.data.no_caption()),
            times=stratified_times(generators, self.diffusion, first),
            noise=np.stack([each.standard_normal(shape, np.float32) for each in generators]),
            gate_seed=gate_seed,
            first=first,
        )


def _without(captions: EncodedCaptions, dropped: np.ndarray, empty: EncodedCaptions) -> EncodedCaptions:
    """Captions [n, L, channels], with the empty one, padded to L tokens, in place of those of `dropped`, bool [n]."""
    embeddings, mask = captions.embeddings.copy(), captions.mask.copy()
    tokens = empty.mask.shape[1]
    embeddings[dropped], mask[dropped] = 0, False
    embeddings[dropped, :tokens], mask[dropped, :tokens] = empty.embeddings, empty.mask
    return EncodedCaptions(embeddings, mask)
