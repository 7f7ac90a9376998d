"""Products in calibrated 8 bits have a multiple of 16 input channels, and what is added for that changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from dydit.bundle.bundle import Bundle
from dydit.bundle.stored_weights import Precision
from dydit.export.exporter import export_planned
from dydit.export.settings import ExportConfig
from dydit.graph import products
from dydit.models.dit import config as dit
from dydit.models.pixart import config as pixart
from dydit.models.transformer.blocks import attention_padding
from dydit.models.transformer.config import TransformerConfig
from dydit.models.transformer.units import PROJ
from dydit.models.uvit import config as uvit
from dydit.planning.plan import Plan
from tests.fixtures.graphs import open_session, run_session

PRESETS = [
    *(dit.preset(name) for name in ("digits", "S/2", "B/2", "L/2", "XL/2")),
    *map(uvit.preset, uvit.PRESETS),
    *map(pixart.preset, pixart.PRESETS),
]
CALIBRATED = [each for each in Precision if each.is_calibrated]
MODEL = dit.DiTConfig(hidden_size=96, depth=3, num_heads=4, patch_size=2, input_size=8, num_classes=7)  # heads of 24
PREFIX, END, GAP = (0, 1, 2), (1, 2, 3), (0, 2, 3)


@pytest.mark.parametrize("model", PRESETS, ids=lambda model: f"{model.title}-{model.hidden_size}-{model.num_heads}")
@pytest.mark.parametrize("precision", CALIBRATED)
def test_products_of_all_presets_are_aligned_at_every_width(model: TransformerConfig, precision: Precision) -> None:
    padded = set()
    for layer in model.units.layers:
        for units in range(1, model.num_heads + 1):
            zeros = attention_padding(model, precision, units, ()) if layer.name == PROJ else 0
            padded |= {(model.head_dim, units % 2)} if zeros else set()
            assert (layer.in_features(units) + zeros) % 16 == 0, f"{layer.name} of {units} units"
            assert layer.out_features(units) % 4 == 0, "rows of fp32 begin at multiples of 16 bytes"
    assert padded == ({(72, 1)} if model.head_dim == 72 else set())
    assert attention_padding(model, precision, 1, (PROJ,)) == 0, "in fp16"
    assert all(attention_padding(model, other, 1, ()) == 0 for other in Precision if other not in CALIBRATED)


@pytest.fixture
def exported(make_checkpoint: Any, even_ranges: Any, tmp_path: Path) -> Callable[[str, str], Bundle]:
    """`exported(precision, name)`: a bundle whose blocks have heads that are a prefix, end at the last, have a gap."""
    masks = np.ones((2, MODEL.units.size), bool)
    for block, heads in enumerate((PREFIX, END, GAP)):
        masks[:, MODEL.units.parts[2 * block].units] = [head in heads for head in range(4)]

    def export(precision: str, name: str) -> Bundle:
        settings = {"precision": precision, "routing": "dense", "max_subnets": 1, "steps": 2}
        config = ExportConfig.model_validate(settings | {"activations": even_ranges(1, MODEL.depth)})
        return export_planned(make_checkpoint(MODEL), tmp_path / name, config, masks, Plan((0, 2), 1.0))

    return export


def projections(bundle: Bundle) -> list[tuple[int, ...]]:
    graph = onnx.load(bundle.file("subnet-0000.onnx"), load_external_data=False).graph
    return [tuple(each.dims) for each in graph.initializer if ".proj.weight" in each.name]


def step(bundle: Bundle) -> np.ndarray:
    session, rng = open_session(bundle.file("subnet-0000.onnx")), np.random.default_rng(0)
    sizes = {"batch": 2, "rows": 4}
    feeds = {
        each.name: rng.normal(size=[sizes.get(size, size) for size in each.shape]) for each in session.get_inputs()
    }
    return run_session(session, {name: np.asarray(value, np.float32) for name, value in feeds.items()})["x_prev"]


def test_zeros_change_no_step(exported: Callable[[str, str], Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight is a window that goes on into the next head's; the others are copies that end in zeros."""
    bundle = exported("fp8", "padded")
    assert projections(bundle) == [(80, 96)] * 3
    with monkeypatch.context() as patch:
        patch.setattr(products, "padding", lambda precision, channels: 0)
        plain = exported("fp8", "plain")
    assert projections(plain) == [(72, 96)] * 3
    np.testing.assert_allclose(step(bundle), step(plain), rtol=0, atol=2e-6)
    more = bundle.file("weights.bin").stat().st_size - plain.file("weights.bin").stat().st_size
    assert 0 < more < 2 * 80 * 96, "the prefix is not copied"


def test_windows_that_go_on_hold_the_weights_of_their_heads(exported: Callable[[str, str], Bundle]) -> None:
    bundle = exported("int8-static", "padded")
    graph = onnx.load(bundle.file("subnet-0000.onnx"), load_external_data=False).graph
    stored = np.fromfile(bundle.file("weights.bin"), np.int8)
    for block, heads in enumerate((PREFIX, END, GAP)):
        entry = bundle.manifest.weights[f"blocks.{block}.proj.weight"]
        whole = stored[entry.offset : entry.offset + entry.nbytes].reshape(entry.shape)
        tensor = next(each for each in graph.initializer if each.name.startswith(f"blocks.{block}.proj.weight"))
        place = {each.key: int(each.value) for each in tensor.external_data if each.key in ("offset", "length")}
        window = stored[place["offset"] : place["offset"] + place["length"]].reshape(80, 96)
        assert (window[:72] == whole[list(heads)].reshape(72, 96)).all()
        assert (window[72:] == (whole[3, :8] if heads == PREFIX else 0)).all()
