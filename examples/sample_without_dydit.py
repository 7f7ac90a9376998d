"""Sample one image from a bundle with onnxruntime and NumPy alone: what a C++ or Rust program would do, step by step.

    python examples/sample_without_dydit.py BUNDLE LABEL OUT.png [GUIDANCE_SCALE] [SEED]

docs/bundle.md explains every file and input. This runs bundles of pixels, with a subnetwork per step or merged ones.
"""

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def sample(folder: Path, label: int, scale: float, noise) -> np.ndarray:
    """Latents (here: pixels) f32 [1, C, S, S]; `noise(draw)` gives standard normal arrays of that shape."""
    manifest = json.loads((folder / "manifest.json").read_text())
    model, sampling = manifest["model"], manifest["sampling"]
    units = sum(len(group) for block in manifest["unit_order"] for group in block)

    @cache
    def load(name: str) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])

    # Guidance runs two rows: the image with its label, and with the null class. Scale 1 needs the first one only.
    labels = np.array([label] if scale == 1 else [label, model["num_classes"]], np.int64)
    timesteps = np.array(sampling["timesteps"], np.int64)
    (modulation,) = load("conditioning.onnx").run(None, {"timesteps": timesteps, "labels": labels})
    x = noise(0)
    for segment in manifest["plan"]["segments"]:
        subnet = manifest["subnets"][segment["subnet"]]
        for step in range(segment["first"], segment["first"] + segment["count"]):
            feeds = {
                "x": x,
                "noise": noise(step + 1),
                "coefficients": np.array(sampling["coefficients"][step], np.float32),
                "cfg_scale": np.array(scale, np.float32),
                "condition": modulation[step],
            }
            if subnet["gated"]:  # which of the model's units this step uses: one bit each
                bits = np.frombuffer(bytes.fromhex(manifest["masks"][step]), np.uint8)
                feeds["gates"] = np.unpackbits(bits, count=units).astype(np.float32)
            x, *overflow = load(subnet["file"]).run(None, feeds)
            if overflow and overflow[0].any():  # capacity routing: tokens found no slot, so repeat with one for each
                x, *_ = load(subnet["full_file"]).run(None, feeds)
    return x


if __name__ == "__main__":
    bundle, label, out, scale, seed = (*sys.argv[1:], *("2.0", "0")[len(sys.argv) - 4 :])
    config = json.loads((Path(bundle) / "manifest.json").read_text())["model"]
    shape = (1, config["in_channels"], *[config["input_size"]] * 2)
    random = np.random.default_rng(int(seed))
    pixels = sample(Path(bundle), int(label), float(scale), lambda draw: random.standard_normal(shape, np.float32))
    grey = ((pixels[0].transpose(1, 2, 0) / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8)
    Image.fromarray(grey.squeeze(-1) if grey.shape[-1] == 1 else grey).resize((160, 160), 0).save(out)
