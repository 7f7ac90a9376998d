"""OpenVINO on the static DiT as `torch.onnx.export` writes it, in fp32, in bf16, and in 8 bits as NNCF quantises it.

The settings are those for one batch at a time (the performance hint "latency"), with the number of threads of the
benchmark. In bf16 the graph is the same, and OpenVINO computes all of it in bf16: that is its default on a CPU with
bf16. In 8 bits NNCF has chosen which operators have which precision; its default for transformers.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from exported import GRAPH, Exported, require_packages

from dydit.bench.bench_worker import serve
from dydit.bench.timing import Job, Loaded
from dydit.errors import BackendError, UnavailableError
from dydit.runtime.backends.ov_session import TELEMETRY, openvino_module

FP32, BF16, INT8 = "fp32", "bf16", "int8"
"""Variants of this contender."""
QUANTIZED = "quantized.xml"


class OpenVinoExport(Exported):
    """A compiled model of the exported graph, or of the quantised one."""

    def load(self) -> Loaded:
        try:
            ov = openvino_module()
        except BackendError as error:
            raise UnavailableError(str(error)) from error
        start, variant = time.perf_counter(), self.job.side.variant
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": self.job.threads}
        if variant != INT8:
            settings["INFERENCE_PRECISION_HINT"] = {FP32: "f32", BF16: "bf16"}[variant]
        file = self.folder / (QUANTIZED if variant == INT8 else GRAPH)
        self.compiled = ov.Core().compile_model(file, "CPU", settings)
        self.request = self.compiled.create_infer_request()
        return Loaded(seconds=time.perf_counter() - start, subnets=1, precision=variant)

    def output(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        return self.request.infer(feeds)[0]


def quantize(folder: Path, job: str) -> None:
    """Write the graph of a job (JSON; its variant is fp32) in 8 bits, calibrated on the inputs of all of its steps."""
    require_packages(["openvino", "nncf"])
    ov = openvino_module()
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # NNCF would report usage to its vendor
    import nncf

    measured, inputs = OpenVinoExport(Job.model_validate_json(job)), []
    measured.load()

    def step(k: int, x: np.ndarray) -> np.ndarray:
        inputs.append(measured.feeds(k, x))
        return measured.step(k, x)

    measured.over_round(step)
    model = ov.Core().read_model(measured.folder / GRAPH)
    quantized = nncf.quantize(
        model, nncf.Dataset(inputs), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(inputs)
    )
    ov.save_model(quantized, folder / QUANTIZED, compress_to_fp16=False)


if __name__ == "__main__":
    sys.exit(serve(OpenVinoExport))
