"""`torch.compile` on the static DiT: with its default settings, or with frozen weights, in fp32 and bf16.

It needs a C++ compiler. It compiles for the batch of the benchmark, which takes from half a minute to minutes, before
anything is timed. Frozen weights are constants of the compiled code, packed in the order of its kernels.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import torch
from pytorch_bf16 import InBfloat16

from dydit.bench.bench_worker import serve
from dydit.bench.timing import Job, Loaded
from dydit.bench.timing_torch import MeasuredTorch
from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.errors import UnavailableError, one_line

DEFAULT, FROZEN, FROZEN_BF16 = "", "frozen", "frozen-bf16"
"""Variants of this contender."""


class Compiled(MeasuredTorch):
    """The static model, compiled."""

    def build(self, job: Job):
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # what PyTorch looks for
        if shutil.which(compiler) is None:
            raise UnavailableError(f"torch.compile needs a C++ compiler, but there is no {compiler}")
        if job.side.variant != DEFAULT:
            import torch._inductor.config as settings

            settings.freezing = True
        checkpoint = load_checkpoint(Path(job.side.checkpoint or ""))
        model = checkpoint.model().eval()
        compiled = torch.compile(InBfloat16(model).eval() if job.side.variant == FROZEN_BF16 else model)
        return lambda x, t, y, gating: compiled(x, t, y), checkpoint.config

    def load(self) -> Loaded:
        start = time.perf_counter()
        try:
            self.step(0, self.initial)  # compiles
        except torch._dynamo.exc.BackendCompilerFailed as error:  # a compiler that cannot compile, say without headers
            reason = one_line(error).partition(" Set TORCH")[0]  # advice to developers follows
            raise UnavailableError(f"torch.compile failed: {reason[:300]}") from error
        precision = "bf16" if self.job.side.variant == FROZEN_BF16 else "fp32"
        seconds = self.load_seconds + time.perf_counter() - start
        return Loaded(seconds=seconds, subnets=1, precision=precision)


if __name__ == "__main__":
    sys.exit(serve(Compiled))
