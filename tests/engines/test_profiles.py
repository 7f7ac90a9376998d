from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dydit.bundle.io_spec import TensorSpec, conditioning_inputs, subnet_inputs, text_inputs, unit_inputs
from dydit.engines.profiles import (
    CONDITIONING_ELEMENTS,
    Extent,
    shape_profile,
    shape_profiles,
    symbol_ranges,
    tuned_batches,
    width_ranges,
)
from dydit.errors import BackendError
from dydit.models.config import ModelConfig
from dydit.models.dit.config import preset
from dydit.models.pixart.config import preset as pixart


def product(shape: tuple[int, ...]) -> int:
    out = 1
    for size in shape:
        out *= size
    return out


@settings(max_examples=25, deadline=None)
@given(opt=st.integers(1, 64), more=st.integers(0, 64))
def test_every_shape_lies_in_its_range(capacity_bundle, opt: int, more: int) -> None:
    manifest = capacity_bundle().manifest
    (ranges,) = symbol_ranges(manifest, [opt], opt + more)
    for specs in (subnet_inputs(manifest.model, True), conditioning_inputs()):
        profile = shape_profile(specs, ranges, "graph")
        assert profile.keys() == {spec.name for spec in specs if any(isinstance(dim, str) for dim in spec.shape)}
        for extent in profile.values():
            assert all(1 <= a <= b <= c for a, b, c in zip(extent.min, extent.opt, extent.max, strict=True))
    subnet = shape_profile(subnet_inputs(manifest.model, True), ranges, "graph")
    assert (subnet["x"].opt[0], subnet["x"].max[0]) == (opt, opt + more)
    assert subnet["condition"].min[0] == subnet["x"].min[0] == 1, "one image without guidance"
    assert subnet["condition"].max[0] == 2 * subnet["x"].max[0], "all images with guidance"


@settings(max_examples=25, deadline=None)
@given(largest=st.integers(1, 200))
def test_engines_are_tuned_for_one_image_for_the_most_and_for_one_size_between(largest: int) -> None:
    batches = tuned_batches(largest)
    assert list(batches) == sorted(set(batches)) and batches[-1] == largest
    assert len(batches) == (3 if largest >= 8 else 1) and batches[0] in (1, largest)
    assert tuned_batches(32) == (1, 6, 32)


@settings(max_examples=25, deadline=None)
@given(tuned=st.sets(st.integers(1, 40), min_size=1, max_size=4), more=st.integers(0, 20))
def test_every_batch_has_one_profile_and_its_rows_and_labels_fit_there(capacity_bundle, tuned, more: int) -> None:
    manifest, opts = capacity_bundle().manifest, sorted(tuned)
    several = symbol_ranges(manifest, opts, opts[-1] + more)
    assert [each["batch"].opt for each in several] == opts
    for size in range(1, opts[-1] + more + 1):
        (fits,) = (each for each in several if each["batch"].min <= size <= each["batch"].max)
        for rows in (size, 2 * size):
            assert fits["rows"].min <= rows <= fits["rows"].max and fits["labels"] == fits["rows"]
    for labels in range(1, 2 * (opts[-1] + more) + 1):
        assert any(each["labels"].min <= labels <= each["labels"].max for each in several), "single steps take any"
    profiles = shape_profiles(subnet_inputs(manifest.model, True), several, "graph")
    assert [profile["x"].opt[0] for profile in profiles] == opts
    assert len(shape_profiles((), several, "graph")) == 1, "equal profiles are one"


def test_every_row_may_have_a_label_of_its_own(capacity_bundle) -> None:
    (ranges,) = symbol_ranges(capacity_bundle().manifest, [3], 4)
    assert ranges["labels"] == ranges["rows"] == Extent(min=1, opt=6, max=8)


def test_the_conditioning_goes_over_whole_segments_but_not_beyond_its_bound(capacity_bundle) -> None:
    manifest = capacity_bundle().manifest
    longest = max(segment.count for segment in manifest.plan.segments)
    assert [each["steps"].max for each in symbol_ranges(manifest, [1, 4], 4)] == [longest] * 2
    wide = manifest.model_copy(update={"model": preset("XL/2")})
    (ranges,) = symbol_ranges(wide, [512], 512)
    elements = ranges["steps"].max * ranges["labels"].max * wide.model.vectors * wide.model.hidden_size
    assert ranges["steps"].max < longest
    assert 0 < elements <= CONDITIONING_ELEMENTS


def test_every_image_may_have_a_text_of_its_own_besides_the_negative_one(capacity_bundle) -> None:
    model = pixart("XL/2")
    manifest = capacity_bundle().manifest
    assert not {"texts", "text_tokens"} & symbol_ranges(manifest, [3], 4)[0].keys()
    with_texts = manifest.model_copy(update={"model": model})
    (ranges,) = symbol_ranges(with_texts, [3], 4)
    assert ranges["texts"] == Extent(min=1, opt=4, max=5)
    assert ranges["text_tokens"] == Extent(min=1, opt=120, max=120)
    graph, step = (shape_profile(specs, ranges, "x") for specs in (text_inputs(model), subnet_inputs(model, False)))
    assert (graph["embeddings"].min, graph["embeddings"].max) == ((1, 1, 4096), (5, 120, 4096))
    assert step["text_values"].max == (28, 5, 2, 120, 1152) and step["text_rows"].max == (8,)
    with pytest.raises(BackendError) as caught:
        symbol_ranges(with_texts, [1], 400)
    message = (
        "TensorRT cannot hold the keys and values of the texts of 400 images in one tensor; build with --max-batch "
    )
    assert str(caught.value) == f"{message}276 or less"
    assert symbol_ranges(with_texts, [1], 276)[0]["texts"].max == 277
    with pytest.raises(BackendError):
        symbol_ranges(with_texts, [1], 277)


def test_a_symbol_without_a_range_is_refused() -> None:
    specs = (TensorSpec("latents", "float32", ("height", 4)),)
    with pytest.raises(BackendError) as caught:
        shape_profile(specs, {"batch": Extent(min=1, opt=1, max=1)}, "vae_decoder.onnx")
    assert str(caught.value) == (
        "vae_decoder.onnx: no range is known for 'height', a dimension of input 'latents'; known: batch"
    )


@pytest.mark.parametrize("bad", [(0, 1, 2), (2, 1, 3), (1, 3, 2)])
def test_a_range_is_ordered(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValidationError, match="is not a range"):
        Extent(min=bad[0], opt=bad[1], max=bad[2])


def test_widths_have_ranges_for_every_weight_that_is_an_input(tmp_path: Path, digits_like: ModelConfig) -> None:
    from dydit.export.weights import write_weights
    from dydit.graph.ops import Ops
    from dydit.graph.sources import WeightInputs
    from dydit.models.dit.layout import stored_tensors
    from dydit.models.synthetic import synthetic_model

    tensors = stored_tensors(synthetic_model(digits_like).state_dict(), digits_like)
    source = WeightInputs(write_weights(tmp_path / "weights.bin", tensors, digits_like))
    for part in digits_like.units.parts:
        for tensor in part.group.unit_tensors:
            source.units(Ops(), part, tensor, range(part.group.count))
    ranges = width_ranges(digits_like)
    profile = shape_profile(source.inputs, ranges, "sliding")
    assert tuple(source.inputs) == unit_inputs(source.entries, digits_like)
    assert profile.keys() == {spec.name for spec in source.inputs}
    assert {dim for spec in source.inputs for dim in spec.shape if isinstance(dim, str)} == ranges.keys()
    for spec in source.inputs:
        entry = source.entries[spec.name]
        assert product(profile[spec.name].max) == product(entry.shape), "all units on is the whole stored tensor"
        assert product(profile[spec.name].min) * digits_like.num_heads == product(entry.shape), "one unit"
