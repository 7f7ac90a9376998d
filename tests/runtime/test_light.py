"""What must not be imported is not: a bundle runs without PyTorch, and `import dydit` brings next to nothing."""

from __future__ import annotations

import subprocess
import sys

WITHOUT_TORCH = """
import sys
for name in ("torch", "onnx", "onnx_ir", "safetensors", "scipy", "matplotlib"):
    sys.modules[name] = None
from pathlib import Path
from dydit.runtime.pipeline import DyDiTPipeline
from dydit.bundle.bundle import Bundle
from dydit.runtime.bulk.run import OutputOptions, sample_to_folder
from dydit.runtime.request import SampleRequest
with DyDiTPipeline.from_bundle(sys.argv[1], threads=1) as pipe:
    print(pipe([1]).images[0].size)
bundle, request = Bundle.open(sys.argv[1]), SampleRequest(labels=(1, 2))
print(sample_to_folder(bundle, request, Path(sys.argv[2]), OutputOptions(npz=True)).images)
"""

LIGHT = """
import sys
import dydit
assert dydit.__version__ == "0.1.0"
heavy = {"torch", "onnxruntime", "onnx", "numpy", "pydantic", "PIL"} & sys.modules.keys()
print(sorted(heavy))
import dydit.runtime.backends.registry, dydit.runtime.bulk.run, dydit.runtime.pipeline
print(sorted({"torch", "onnxruntime", "onnx"} & sys.modules.keys()))
assert dydit.DyDiTPipeline is dydit.runtime.pipeline.DyDiTPipeline
try:
    dydit.Nothing
except AttributeError as error:
    print(error)
"""


def lines(*arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", *arguments], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_bundle_runs_without_torch(pixel_bundle, tmp_path):
    assert lines(WITHOUT_TORCH, str(pixel_bundle.path), str(tmp_path / "run")) == ["(8, 8)", "2"]


def test_importing_the_package_is_light():
    assert lines(LIGHT) == ["[]", "[]", "module 'dydit' has no attribute 'Nothing'"]
