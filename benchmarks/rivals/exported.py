"""What contenders on an exported graph share: the export by PyTorch; guidance and the sampler's update in NumPy.

The graph is exported for the batch of the benchmark, because runtimes optimise fixed shapes best, and before the
contenders start. The timed processes do not import PyTorch, so that its memory is not counted.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from dydit.bench.timing import Job, Measured
from dydit.diffusion.guidance import Guidance
from dydit.errors import UnavailableError
from dydit.extras import missing
from dydit.files import new_folder

GRAPH = "static.onnx"


class Exported(Measured):
    """A static DiT as a graph. `rows`: labels int64 [2B], the null class in the second half."""

    def __init__(self, job: Job):
        super().__init__(job, job.sizes)
        self.rows = Guidance(job.cfg_scale, self.config.null_class).rows(self.labels)
        self.folder = Path(job.side.checkpoint or "")

    @abstractmethod
    def output(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """The graph's output f32 [2B, 2C, S, S] for `x`, `t` and `y`."""

    def feeds(self, k: int, x: np.ndarray) -> dict[str, np.ndarray]:
        """The graph's inputs in the k-th measured step."""
        repeated = np.concatenate([x] * (len(self.rows) // len(x)))
        return {"x": repeated, "t": np.full_like(self.rows, self.timesteps[k]), "y": self.rows}

    def step(self, k: int, x: np.ndarray) -> np.ndarray:
        out = self.output(self.feeds(k, x))
        batch, channels, guided = len(x), self.config.in_channels, self.job.cfg_channels
        eps, v = out[:batch, :channels], out[:batch, channels:]
        if len(out) > batch:
            free = out[batch:, :guided]
            eps = np.concatenate([free + self.job.cfg_scale * (eps[:, :guided] - free), eps[:, guided:]], axis=1)
        of_x, of_out, _, of_noise, slope, offset, *_ = self.coefficients[k]  # of a run without history
        deviation = np.exp(slope * v + offset) if self.config.learn_sigma else np.exp(offset)
        x_prev: np.ndarray = of_x * x + of_out * eps + of_noise * deviation * self.noise[k]
        return x_prev


def require_packages(packages: Sequence[str]) -> None:
    """Raise `UnavailableError`, saying what to install, if one of the packages is missing."""
    absent = missing(packages)
    if absent:
        raise UnavailableError(f"not installed: pip install {' '.join(absent)}")


def made_apart(folder: Path, make: Callable[..., None], *arguments: Any) -> Path:
    """The folder, unless it is there filled by `make(folder, *arguments)` in a process of its own."""
    if not folder.exists():
        with new_folder(folder) as new, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(make, new, *arguments).result()
    return folder


def export(folder: Path, path: Path, rows: int) -> None:
    """Write the model of a static checkpoint as ONNX, for `rows` rows."""
    require_packages(["onnxscript"])
    import torch

    from dydit.checkpoints.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(path)
    config = checkpoint.config
    x = torch.randn(rows, config.in_channels, config.input_size, config.input_size)
    t, y = torch.full((rows,), 500), torch.zeros(rows, dtype=torch.int64)
    names = {"input_names": ["x", "t", "y"], "output_names": ["out"]}
    torch.onnx.export(checkpoint.model(), (x, t, y), folder / GRAPH, dynamo=True, verbose=False, **names)
