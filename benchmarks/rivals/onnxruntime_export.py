"""ONNX Runtime on the static DiT as `torch.onnx.export` writes it; guidance and the sampler's update are in NumPy.

Another process exports the graph before anything is timed, for the batch of the benchmark, because onnxruntime
optimises fixed shapes best. Apart from the number of threads the session has onnxruntime's default settings. PyTorch is
not imported in the timed process, so that its memory is not counted.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from dydit.bench.bench_worker import serve
from dydit.bench.timing import Job, Loaded, Measured
from dydit.diffusion.guidance import Guidance
from dydit.errors import UnavailableError


class OnnxRuntimeExport(Measured):
    """An inference session on the exported graph. `rows`: labels int64 [2B], the null class in the second half."""

    def __init__(self, job: Job):
        super().__init__(job, job.sizes)
        self.rows = Guidance(job.cfg_scale, self.config.null_class).rows(self.labels)

    def load(self) -> Loaded:
        for package in ("onnxruntime", "onnxscript"):
            if importlib.util.find_spec(package) is None:
                raise UnavailableError(f"{package} is not installed: pip install {package}")
        import onnxruntime

        start, settings = time.perf_counter(), onnxruntime.SessionOptions()
        settings.intra_op_num_threads = self.job.threads
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "static.onnx")
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                pool.submit(export, self.job.side.checkpoint, file, len(self.rows)).result()
            self.session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
        return Loaded(seconds=time.perf_counter() - start, subnets=1)

    def step(self, k: int, x: np.ndarray) -> np.ndarray:
        repeated = np.concatenate([x] * (len(self.rows) // len(x)))
        feeds = {"x": repeated, "t": np.full_like(self.rows, self.timesteps[k]), "y": self.rows}
        (out,) = self.session.run(None, feeds)
        batch, channels, guided = len(x), self.config.in_channels, self.job.cfg_channels
        eps, v = out[:batch, :channels], out[:batch, channels:]
        if len(out) > batch:
            free = out[batch:, :guided]
            eps = np.concatenate([free + self.job.cfg_scale * (eps[:, :guided] - free), eps[:, guided:]], axis=1)
        of_x, of_out, _, of_noise, slope, offset, *_ = self.coefficients[k]  # of a run without history
        deviation = np.exp(slope * v + offset) if self.config.learn_sigma else np.exp(offset)
        x_prev: np.ndarray = of_x * x + of_out * eps + of_noise * deviation * self.noise[k]
        return x_prev


def export(path: str, file: Path, rows: int) -> None:
    """Write the model of a static checkpoint as ONNX, for `rows` rows."""
    import torch

    from dydit.checkpoints.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(Path(path))
    config = checkpoint.config
    x = torch.randn(rows, config.in_channels, config.input_size, config.input_size)
    t, y = torch.full((rows,), 500), torch.zeros(rows, dtype=torch.int64)
    names = {"input_names": ["x", "t", "y"], "output_names": ["out"]}
    torch.onnx.export(checkpoint.model(), (x, t, y), file, dynamo=True, verbose=False, **names)


if __name__ == "__main__":
    sys.exit(serve(OnnxRuntimeExport))
