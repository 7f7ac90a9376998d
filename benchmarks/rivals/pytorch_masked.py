"""PyTorch, eager, on the DyDiT as the public code runs it: dense products times masks, so nothing is saved.

It decides heads, channel groups and tokens like any DyDiT, computes all of them, and multiplies by 0 what is off.
"""

from __future__ import annotations

import sys

import numpy as np
from torch import Tensor
from torch_rival import TorchRival

from dydit.bench.bench_worker import serve
from dydit.bench.timing import Decided
from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.models.routers import Gating, Masked, Recording


class PyTorchMasked(TorchRival):
    """The model as it comes from the checkpoint, its gates 0 or 1."""

    gating: Gating = Masked()

    def build(self) -> None:
        self.model = load_checkpoint(self.path).model()

    def predict(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.model(x, t, y, self.gating)
        return out

    def decided(self) -> Decided:
        """What its routers decide in a round: it computes everything all the same."""
        masks, tokens = [], []

        def step(k: int, x: np.ndarray) -> np.ndarray:
            self.gating = recording = Recording(Masked(), self.config)
            after = self.step(k, x)
            made = recording.decisions()
            # The same for all rows, because heads and groups depend on the timestep alone.
            masks.append(made.units[0].numpy() > 0)
            tokens.append(made.tokens.mean(dim=(1, 2)).numpy())
            return after

        self._over_round(step)
        return self._count(np.stack(masks), np.stack(tokens), np.ones(len(tokens)))


if __name__ == "__main__":
    sys.exit(serve(PyTorchMasked))
