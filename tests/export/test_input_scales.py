"""Layers in 8 and in 16 bits: each weight is stored in the forms that some segment needs, and in no other."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from dydit.bundle.stored_weights import Precision, fp16_name
from dydit.calibrate.activation_ranges import ActivationRanges
from dydit.export.exporter import planned_steps
from dydit.export.settings import ExportConfig
from dydit.parity.parity import compare_weights

SEGMENTS, DEPTH = 3, 3
LAYERS = ("qkv", "proj", "fc1", "fc2")
SETTINGS = {"steps": 6, "max_subnets": SEGMENTS}


@pytest.fixture(scope="module")
def there(make_checkpoint) -> np.ndarray:
    """Which layers each segment runs, bool [segments, L, 4]."""
    checkpoint = make_checkpoint()
    masks, plan = planned_steps(checkpoint, ExportConfig(**SETTINGS))
    assert checkpoint.config.units.layer_names == LAYERS
    parts = np.stack([checkpoint.config.units.any(masks[first:end].any(axis=0)) for first, end in plan.segments])
    return np.repeat(parts.reshape(SEGMENTS, DEPTH, 2), 2, axis=2)


def ranges(in_fp16: np.ndarray) -> ActivationRanges:
    fours, none = (((value,) * 4,) * DEPTH for value in (4.0, 0.0))
    rows = tuple(tuple(map(tuple, blocks)) for blocks in in_fp16.tolist())
    return ActivationRanges(
        method="minmax", images=1, thresholds=(fours,) * SEGMENTS, clipped=(none,) * SEGMENTS, in_16_bits=rows
    )


def choice(which: str) -> np.ndarray:
    in_fp16 = np.zeros((SEGMENTS, DEPTH, len(LAYERS)), bool)
    if which == "one segment":
        in_fp16[0] = True
    elif which == "one layer":
        in_fp16[:, 1, LAYERS.index("fc2")] = True
    elif which == "by chance":
        in_fp16 = np.random.default_rng(1).random(in_fp16.shape) < 0.5
    return in_fp16


@pytest.mark.parametrize("precision", [Precision.INT8_STATIC, Precision.FP8])
@pytest.mark.parametrize("which", ["nothing", "one segment", "one layer", "by chance"])
def test_no_copy_is_stored_that_no_segment_reads(which, precision, there, make_bundle, make_checkpoint) -> None:
    in_fp16 = choice(which)
    bundle = make_bundle(precision=precision, activations=ranges(in_fp16), **SETTINGS)
    weights = bundle.manifest.weights
    for block, layer in np.ndindex(DEPTH, len(LAYERS)):
        name, used = f"blocks.{block}.{LAYERS[layer]}.weight", there[:, block, layer]
        fp16, quantized = (in_fp16[:, block, layer] & used).any(), (~in_fp16[:, block, layer] & used).any()
        assert (fp16_name(name) in weights) == fp16
        assert (name in weights) == (f"blocks.{block}.{LAYERS[layer]}.scale" in weights) == (quantized or not fp16)
    text = (bundle.path / "manifest.json").read_text()
    assert ("in_16_bits" in text) == in_fp16.any() and "fp16_layers" not in text, "the key of older bundles"
    read: set[int] = set()
    for segment, subnet in ((each, bundle.manifest.subnets[each.subnet]) for each in bundle.manifest.plan.segments):
        stay = {(block, layer) for block, layers in enumerate(subnet.fp16_layers or ()) for layer in layers}
        index = bundle.manifest.plan.segments.index(segment)
        assert stay == {(block, LAYERS[layer]) for block, layer in np.argwhere(in_fp16[index])}
        graph = onnx.load(bundle.file(subnet.file), load_external_data=False).graph
        size = 0
        for tensor in graph.initializer:
            if place := {each.key: int(each.value) for each in tensor.external_data if each.value.isdigit()}:
                read.add(place["offset"])
                # A block without units reads no scales, which `weight_bytes` does not tell apart.
                size += place["length"]
        assert 0.9 * subnet.weight_bytes <= size <= subnet.weight_bytes
    fp16_entries = [entry for name, entry in weights.items() if name.endswith("weight16")]
    assert bool(fp16_entries) == in_fp16.any() and all(entry.dtype == "float16" for entry in fp16_entries)
    for entry in fp16_entries:
        assert any(entry.offset <= place < entry.offset + entry.nbytes for place in read)
    assert compare_weights(bundle, make_checkpoint()).detail.startswith("all ")


def test_bundles_without_such_layers_are_as_they_were(make_bundle) -> None:
    """Functions, weights and manifest know nothing of them."""
    bundle = make_bundle(precision="fp8", activations=ranges(choice("nothing")), **SETTINGS)
    text = (bundle.path / "manifest.json").read_text()
    assert "in_16_bits" not in text and "weight16" not in text
