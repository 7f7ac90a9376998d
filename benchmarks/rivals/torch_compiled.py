"""`torch.compile` on the static DiT, with its default settings. Needs a C++ compiler.

It compiles for the job's very batch, which takes from half a minute to minutes, before anything is timed.
"""

from __future__ import annotations

import os
import shutil
import sys

import torch
from torch import Tensor
from torch_rival import TorchRival

from dydit.bench.bench_worker import serve
from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.errors import UnavailableError, one_line


class TorchCompiled(TorchRival):
    """The static model, compiled."""

    def build(self) -> None:
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # what PyTorch looks for
        if shutil.which(compiler) is None:
            raise UnavailableError(f"torch.compile needs a C++ compiler, but there is no {compiler}")
        self.model = torch.compile(load_checkpoint(self.path).model())
        try:
            self.step(0, self.initial)  # compiles
        except torch._dynamo.exc.BackendCompilerFailed as error:  # a compiler that cannot compile, say without headers
            reason = one_line(error).partition(" Set TORCH")[0]  # advice to developers follows
            raise UnavailableError(f"torch.compile failed: {reason[:300]}") from error

    def predict(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.model(x, t, y)
        return out


if __name__ == "__main__":
    sys.exit(serve(TorchCompiled))
