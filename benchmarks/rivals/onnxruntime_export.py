"""ONNX Runtime on the static DiT as `torch.onnx.export` writes it, the rest of a step in NumPy, as a user would.

The export, for the job's very batch (fixed shapes are what onnxruntime optimises best), runs in a process of its own
before anything is timed. The session has onnxruntime's default settings but for the number of threads.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from rival import Rival, in_another_process, require

from dydit.bench.bench_worker import serve


class OnnxRuntimeExport(Rival):
    """An inference session on the exported graph."""

    def build(self) -> None:
        require("onnxruntime", "onnxscript")
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = self.job.threads
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "static.onnx")
            in_another_process(export, self.path, file, len(self.rows))
            self.session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])

    def step(self, k: int, x: np.ndarray) -> np.ndarray:
        repeated = np.concatenate([x] * (len(self.rows) // len(x)))
        feeds = {"x": repeated, "t": np.full_like(self.rows, self.timesteps[k]), "y": self.rows}
        (out,) = self.session.run(None, feeds)
        batch, channels, guided = len(x), self.config.in_channels, self.job.cfg_channels
        eps, v = out[:batch, :channels], out[:batch, channels:]
        if len(out) > batch:
            free = out[batch:, :guided]
            eps = np.concatenate([free + self.job.cfg_scale * (eps[:, :guided] - free), eps[:, guided:]], axis=1)
        of_x, of_eps, of_noise, slope, offset = self.coefficients[k]
        deviation = np.exp(slope * v + offset) if self.config.learn_sigma else np.exp(offset)
        x_prev: np.ndarray = of_x * x + of_eps * eps + of_noise * deviation * self.noise[k]
        return x_prev


def export(path: Path, file: Path, rows: int) -> None:
    """Write the model of a static checkpoint as ONNX, for `rows` rows."""
    import torch  # which the process that runs the graph does without

    from dydit.checkpoints.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(path)
    config = checkpoint.config
    x = torch.randn(rows, config.in_channels, config.input_size, config.input_size)
    t, y = torch.full((rows,), 500), torch.zeros(rows, dtype=torch.int64)
    names = {"input_names": ["x", "t", "y"], "output_names": ["out"]}
    torch.onnx.export(checkpoint.model(), (x, t, y), file, dynamo=True, verbose=False, **names)


if __name__ == "__main__":
    sys.exit(serve(OnnxRuntimeExport))
