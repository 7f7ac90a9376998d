"""Sample one image from a bundle with onnxruntime and NumPy alone: what a C++ or Rust program would do, step by step.

    python examples/sample_without_dydit.py BUNDLE LABEL OUT.png [GUIDANCE_SCALE] [SEED]

It runs bundles of models that sample pixels, with any plan. docs/bundle.md explains every file and input."""

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def sample(folder: Path, label: int, scale: float, noise) -> np.ndarray:
    """Pixels f32 [1, C, S, S]; `noise(draw)` gives standard normal arrays f32 of that shape."""
    manifest = json.loads((folder / "manifest.json").read_text())
    sampling, file = manifest["sampling"], np.memmap(folder / "weights.bin", np.uint8, "r")
    units = sum(len(group) for block in manifest["unit_order"] for group in block)
    load = cache(lambda name: onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"]))

    def unit_weights(value, subnet) -> np.ndarray:  # an input of a graph of dynamic width: the rows of a step's units
        group, block = value.shape[0].partition("*")[0].split("_")  # its first dimension is named like heads_3*216
        slots, entry = subnet["units"][int(block)][("heads", "groups").index(group)], manifest["weights"][value.name]
        tensor = np.frombuffer(file, entry["dtype"], np.prod(entry["shape"]), entry["offset"])
        tensor = tensor.reshape(entry["shape"])
        rows = tensor[slots] if slots else np.zeros_like(tensor[:1])
        return rows.reshape(-1, *rows.shape[2:])

    # Guidance runs two rows: the image with its label, and with the null class. Scales 1 and 0 need one of them.
    both, timesteps = np.array([label, manifest["model"]["num_classes"]]), np.array(sampling["timesteps"], np.float32)
    feeds = {"timesteps": timesteps, "labels": {1: both[:1], 0: both[1:]}.get(scale, both)}  # labels are int64
    (condition,), (output,) = load("conditioning.onnx").run(None, feeds), load("conditioning.onnx").get_outputs()
    x, history = (start := noise(0)), np.zeros_like(start)  # history: what a multistep sampler hands to the next step
    for segment in manifest["plan"]["segments"]:
        subnet = manifest["subnets"][segment["subnet"]]
        for step in range(segment["first"], segment["first"] + segment["count"]):
            graph, coefficients = load(subnet["file"]), np.array(sampling["coefficients"][step], np.float32)
            feeds = {"x": x, "noise": noise(step + 1), "coefficients": coefficients, output.name: condition[step]}
            feeds |= {"history": history, "cfg_scale": np.array(scale, np.float32)}
            if subnet["gated"]:  # which of the model's units this step uses: one bit each
                bits = np.array([*bytes.fromhex(manifest["masks"][step])], np.uint8)
                feeds["gates"] = np.unpackbits(bits, count=units).astype(np.float32)
            feeds |= {v.name: unit_weights(v, subnet) for v in graph.get_inputs() if v.name in manifest["weights"]}
            x, history, *overflow = graph.run(None, feeds)
            if overflow and overflow[0].any():  # capacity routing: tokens found no slot, so repeat with one for each
                x, history, *_ = load(subnet["full_file"]).run(None, feeds)
    return x


if __name__ == "__main__":
    bundle, label, out, scale, seed = (*sys.argv[1:], *("2.0", "0")[len(sys.argv) - 4 :])
    model, random = json.loads((Path(bundle) / "manifest.json").read_text())["model"], np.random.default_rng(int(seed))
    shape = (1, model["in_channels"], *[model["input_size"]] * 2)
    pixels = sample(Path(bundle), int(label), float(scale), lambda draw: random.standard_normal(shape, np.float32))
    levels = (pixels[0].transpose(1, 2, 0) * 127.5 + 128).clip(0, 255).astype(np.uint8)
    Image.fromarray(levels.squeeze(-1) if levels.shape[-1] == 1 else levels).resize((160, 160), 0).save(out)
