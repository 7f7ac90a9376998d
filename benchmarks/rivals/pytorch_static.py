"""PyTorch, eager, on the static DiT: every head, channel and token, and no routers."""

from __future__ import annotations

import sys

from torch import Tensor
from torch_rival import TorchRival

from dydit.bench.bench_worker import serve
from dydit.checkpoints.checkpoint import load_checkpoint


class PyTorchStatic(TorchRival):
    """The model as it comes from the checkpoint."""

    def build(self) -> None:
        self.model = load_checkpoint(self.path).model()

    def predict(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.model(x, t, y)
        return out


if __name__ == "__main__":
    sys.exit(serve(PyTorchStatic))
