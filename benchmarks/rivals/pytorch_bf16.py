"""The static DiT in PyTorch with its weights in bf16, eager.

Weights are cast once, as users do who load a model with `torch_dtype=torch.bfloat16`. Autocast would cast them in every
step, and keep the residual stream in fp32. The timestep's sinusoid stays fp32, as in diffusers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from dydit.bench.bench_worker import serve
from dydit.bench.timing import Job, Loaded
from dydit.bench.timing_torch import MeasuredTorch
from dydit.checkpoints.checkpoint import load_checkpoint


class InBfloat16(nn.Module):
    """A static DiT whose weights and values are bf16. Latents and outputs are fp32."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.to(torch.bfloat16)
        model.set_derived()  # the sinusoid's frequencies are fp32 again

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The model's output [B, 2C, S, S]."""
        return self.model(x.to(torch.bfloat16), t, y).float()


class Eager(MeasuredTorch):
    """The model as it is."""

    def build(self, job: Job):
        checkpoint = load_checkpoint(Path(job.side.checkpoint or ""))
        model = InBfloat16(checkpoint.model()).eval()
        return lambda x, t, y, gating: model(x, t, y), checkpoint.config

    def load(self) -> Loaded:
        return super().load().model_copy(update={"precision": "bf16"})


if __name__ == "__main__":
    sys.exit(serve(Eager))
