"""ONNX Runtime on the static DiT as `torch.onnx.export` writes it.

Apart from the number of threads the session has onnxruntime's default settings.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from exported import GRAPH, Exported, require_packages

from dydit.bench.bench_worker import serve
from dydit.bench.timing import Loaded


class OnnxRuntimeExport(Exported):
    """An inference session on the exported graph."""

    def load(self) -> Loaded:
        require_packages(["onnxruntime"])
        import onnxruntime

        start, settings = time.perf_counter(), onnxruntime.SessionOptions()
        settings.intra_op_num_threads = self.job.threads
        self.session = onnxruntime.InferenceSession(self.folder / GRAPH, settings, providers=["CPUExecutionProvider"])
        return Loaded(seconds=time.perf_counter() - start, subnets=1, precision="fp32")

    def output(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        (out,) = self.session.run(None, feeds)
        return out


if __name__ == "__main__":
    sys.exit(serve(OnnxRuntimeExport))
