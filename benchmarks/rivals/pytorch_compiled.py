"""`torch.compile` on the static DiT, with its default settings. It needs a C++ compiler.

It compiles for the batch of the benchmark, which takes from half a minute to minutes, before anything is timed.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import torch

from dydit.bench.bench_worker import serve
from dydit.bench.timing import Job, Loaded
from dydit.bench.timing_torch import MeasuredTorch
from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.errors import UnavailableError, one_line


class Compiled(MeasuredTorch):
    """The static model, compiled."""

    def build(self, job: Job):
        assert job.side.checkpoint is not None
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # what PyTorch looks for
        if shutil.which(compiler) is None:
            raise UnavailableError(f"torch.compile needs a C++ compiler, but there is no {compiler}")
        checkpoint = load_checkpoint(Path(job.side.checkpoint))
        model = torch.compile(checkpoint.model())
        return lambda x, t, y, gating: model(x, t, y), checkpoint.config

    def load(self) -> Loaded:
        start = time.perf_counter()
        try:
            self.step(0, self.initial)  # compiles
        except torch._dynamo.exc.BackendCompilerFailed as error:  # a compiler that cannot compile, say without headers
            reason = one_line(error).partition(" Set TORCH")[0]  # advice to developers follows
            raise UnavailableError(f"torch.compile failed: {reason[:300]}") from error
        return Loaded(seconds=self.load_seconds + time.perf_counter() - start, subnets=1)


if __name__ == "__main__":
    sys.exit(serve(Compiled))
