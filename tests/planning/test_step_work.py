"""The work of a step against what is counted elsewhere, for every architecture."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.bundle.stored_weights import Precision
from dydit.models.config import Routers
from dydit.models.dit.config import DiTConfig
from dydit.models.macs import flops_ratio, static_macs
from dydit.models.pixart.config import PixArtConfig
from dydit.models.registry import architecture_of, published
from dydit.models.uvit.config import UViTConfig
from dydit.planning.sizes import fixed_bytes, unit_bytes
from dydit.planning.step_work import Counted, StepWork, step_work

MODELS = [
    DiTConfig(hidden_size=64, depth=3, num_heads=4, patch_size=2, input_size=8),
    DiTConfig(hidden_size=64, depth=3, num_heads=4, patch_size=2, input_size=8, routers=Routers.NONE),
    PixArtConfig(hidden_size=48, depth=2, num_heads=4, input_size=8, caption_channels=16, text_tokens=5),
    UViTConfig(hidden_size=64, depth=3, num_heads=4, patch_size=2, input_size=8, in_channels=4, num_classes=7),
]


def work_of(model, mask, precision=Precision.FP16, images=2, rows=4, tokens=None) -> StepWork:
    weights = float(mask @ unit_bytes(model, precision)) + fixed_bytes(model, precision)
    return step_work(model, precision, images, rows, Counted(model.units.counts(mask), weights, tokens))


def masks_of(model):
    return st.lists(st.booleans(), min_size=model.units.size, max_size=model.units.size).map(np.array)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(MODELS), st.sampled_from(list(Precision)))
def test_operations_are_two_for_each_multiply_add_and_less_width_is_never_more_work(data, model, precision):
    mask, other = data.draw(masks_of(model)), data.draw(masks_of(model))
    shares = st.lists(st.floats(0, 1), min_size=model.depth, max_size=model.depth).map(np.array)
    tokens, fewer = data.draw(shares), data.draw(shares)
    work = work_of(model, mask, precision, tokens=tokens)
    nothing = work_of(model, np.zeros_like(mask), precision)
    outside = sum(2 * (2 if each.once else 4) * each.macs for each in architecture_of(model).step_products(model))
    assert nothing.total_flops == pytest.approx(outside)
    blocks = 4 * 2 * static_macs(model) * flops_ratio(model, model.units.counts(mask), tokens)
    assert work.total_flops - outside == pytest.approx(blocks)
    assert work.weights >= fixed_bytes(model, precision) and work.nbytes >= work.weights
    narrow = work_of(model, mask & other, precision, tokens=tokens * fewer)
    assert narrow.nbytes <= work.nbytes * (1 + 1e-12) and narrow.total_flops <= work.total_flops * (1 + 1e-12)
    wide = work_of(model, mask, precision, images=4, rows=8, tokens=tokens)
    assert wide.total_flops == pytest.approx(2 * work.total_flops) and wide.weights == work.weights
    assert work.nbytes < wide.nbytes < 2 * work.nbytes


@pytest.mark.parametrize("model", MODELS)
def test_static_bytes_cover_the_stored_weights_that_a_step_reads(model):
    everything = np.ones(model.units.size, bool)
    stored = {name: np.prod(shape) for name, shape in model.stored_shapes().items() if not model.is_conditioning(name)}
    work = work_of(model, everything, Precision.FP32, images=1, rows=1)
    assert work.weights == 4 * sum(stored.values()) < work.nbytes


@pytest.mark.parametrize("model", MODELS)
def test_every_stored_product_of_a_step_is_counted_once(model):
    """A weight that is missing in `step_products`, or has other sizes there, would make every bound too low."""
    shapes = model.stored_shapes()
    outside = {*model.fp32_products, *(name for name in model.low_precision if len(shapes[name]) > 1)}
    expected = {name for name in outside if not model.is_conditioning(name)}
    products = [each for each in architecture_of(model).step_products(model) if each.weight is not None]
    assert sorted(each.weight for each in products) == sorted(expected)
    for each in products:
        assert each.macs % np.prod(shapes[each.weight]) == 0
        assert each.macs // np.prod(shapes[each.weight]) in (model.tokens, model.patches, model.input_size**2)


def test_the_parts_of_the_published_model_add_up_to_the_paper_s_count():
    model = published("DiT-XL/2").without_routers()
    n, d = model.tokens, model.hidden_size
    beside_the_steps = model.depth * 6 * d * d + 256 * d + d * d + 2 * d * d + 4 * n * d * (2 * model.depth + 1)
    everything = np.ones(model.units.size, bool)
    assert work_of(model, everything, images=1, rows=1).total_flops == 2 * (model.macs - beside_the_steps)


def test_types_of_products_are_those_of_the_precision():
    model = MODELS[0]
    everything = np.ones(model.units.size, bool)
    types = {each: set(work_of(model, everything, each).flops) for each in Precision}
    assert types[Precision.FP32] == {"float32"} and types[Precision.BF16] == {"float32", "bfloat16"}
    assert types[Precision.FP8] == {"float32", "float16", "float8_e4m3fn"}
    counted = Counted(model.units.counts(everything), 0.0, fp16_layers=[("qkv", "proj", "fc1", "fc2")] * model.depth)
    assert set(step_work(model, Precision.INT8_STATIC, 1, 1, counted).flops) == {"float32", "float16"}
