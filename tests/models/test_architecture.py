"""The axis of units: arrays along it are taken apart and put together without a loss, whatever the sizes of groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.models.architecture import BlockSpec, Side, UnitAxis, UnitGroup, UnitLayer, block_of, stored_name
from dydit.models.config import ModelConfig

LAW = settings(max_examples=25, deadline=None)
MakeAxis = Callable[[list[list[int]]], UnitAxis]


@dataclass(frozen=True)
class Drawn:
    """Units of each group of each block, and masks bool [S, U] with their units written out: [S][L][groups]."""

    counts: list[list[int]]
    masks: np.ndarray
    units: list[list[list[tuple[int, ...]]]]


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    """Up to three blocks of up to three groups of 1 to 9 units, all different."""
    groups = draw(st.integers(1, 3))
    block = st.lists(st.integers(1, 9), min_size=groups, max_size=groups)
    counts = draw(st.lists(block, min_size=1, max_size=3))
    steps = draw(st.integers(1, 4))
    bits = [
        [[draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in each] for each in counts] for _ in range(steps)
    ]
    rows = [[bit for block in step for group in block for bit in group] for step in bits]
    units = [[[tuple(i for i, bit in enumerate(group) if bit) for group in block] for block in step] for step in bits]
    return Drawn(counts, np.array(rows, bool), units)


def flat(nested) -> list:
    return [value for block in nested for value in block]


@LAW
@given(drawn())
def test_parts_cover_the_axis_in_order(make_axis: MakeAxis, case: Drawn) -> None:
    axis = make_axis(case.counts)
    assert axis.size == sum(flat(case.counts)) == axis.parts[-1].stop
    assert [part.group.count for part in axis.parts] == flat(case.counts)
    assert [part.start for part in axis.parts] == [0, *(part.stop for part in axis.parts[:-1])]
    assert [(part.block, part.index) for part in axis.parts] == [
        (block, index) for block, groups in enumerate(case.counts) for index in range(len(groups))
    ]
    for part in axis.parts:
        assert part.group is axis.blocks[part.block].groups[part.index]
        assert np.arange(axis.size)[part.units].tolist() == list(range(part.start, part.stop))


@LAW
@given(drawn())
def test_counts_and_any_are_those_of_the_units(make_axis: MakeAxis, case: Drawn) -> None:
    axis = make_axis(case.counts)
    expected = np.array([[len(units) for units in flat(step)] for step in case.units])
    counts, there = axis.counts(case.masks), axis.any(case.masks)
    assert counts.dtype == np.int64 and there.dtype == bool
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_array_equal(there, expected > 0)
    for step, mask in enumerate(case.masks):  # one mask, and any number of leading axes
        np.testing.assert_array_equal(axis.counts(mask), expected[step])
        np.testing.assert_array_equal(axis.any(mask), expected[step] > 0)
    np.testing.assert_array_equal(axis.counts(case.masks[:, None, None])[:, 0, 0], expected)
    np.testing.assert_array_equal(axis.any(case.masks[None])[0], expected > 0)


def test_counts_do_not_wrap_around(make_axis: MakeAxis) -> None:
    axis = make_axis([[300, 1000]])
    assert axis.counts(np.ones(1300, bool)).tolist() == [300, 1000]
    assert axis.counts(np.ones(1300, np.int8)).tolist() == [300, 1000]


@LAW
@given(drawn(), st.integers(0, 2**32 - 1))
def test_spread_gives_every_unit_its_parts_value(make_axis: MakeAxis, case: Drawn, seed: int) -> None:
    axis = make_axis(case.counts)
    values = np.random.default_rng(seed).normal(size=(2, len(axis.parts)))
    spread = axis.spread(values)
    assert spread.shape == (2, axis.size) and spread.dtype == values.dtype
    for place, part in enumerate(axis.parts):
        assert (spread[:, part.units] == values[:, [place]]).all()
    sizes = np.array(flat(case.counts))
    np.testing.assert_array_equal(axis.counts(axis.spread(sizes > 3)), np.where(sizes > 3, sizes, 0))
    np.testing.assert_array_equal(axis.per_unit(), axis.spread(np.array([part.group.macs for part in axis.parts])))


@LAW
@given(drawn())
def test_slots_and_masks_come_back(make_axis: MakeAxis, case: Drawn) -> None:
    axis = make_axis(case.counts)
    for mask, units in zip(case.masks, case.units, strict=True):
        slots = axis.slots(mask)
        assert slots == tuple(map(tuple, units)), "by block and unit group, each part numbered from 0"
        assert all(type(unit) is int for part in flat(slots) for unit in part), "JSON knows no NumPy"
        assert axis.mask(slots).dtype == bool
        np.testing.assert_array_equal(axis.mask(slots), mask)
        np.testing.assert_array_equal(axis.mask([[list(part) for part in block] for block in slots]), mask)
        assert axis.slots(axis.mask(slots)) == slots
    assert axis.slots(np.ones(axis.size, bool)) == axis.every_unit
    assert axis.mask(axis.every_unit).all()
    assert not axis.mask([[()] * len(groups) for groups in case.counts]).any()


@LAW
@given(drawn())
def test_shares_are_means_over_the_units_of_a_kind(make_axis: MakeAxis, case: Drawn) -> None:
    axis = make_axis(case.counts)
    shares = axis.shares(case.masks)
    assert list(shares) == [f"kind{index}" for index in range(len(case.counts[0]))]
    for index, share in enumerate(shares.values()):
        on = sum(len(block[index]) for step in case.units for block in step)
        assert share == pytest.approx(on / len(case.masks) / sum(groups[index] for groups in case.counts))
    assert set(axis.shares(np.ones(axis.size, bool)).values()) == {1.0}


@LAW
@given(drawn())
def test_nested_and_zip_are_inverse(make_axis: MakeAxis, case: Drawn) -> None:
    axis = make_axis(case.counts)
    values = [f"value of {part.start}" for part in axis.parts]
    nested = axis.nested(values)
    assert [len(block) for block in nested] == [len(groups) for groups in case.counts]
    assert flat(nested) == values
    assert list(axis.zip(nested)) == list(zip(axis.parts, values, strict=True))
    for wrong in (values[:-1], [*values, "one more"]):
        with pytest.raises(ValueError, match="unit groups"):
            axis.nested(wrong)


@LAW
@given(drawn(), st.data())
def test_units_that_a_part_does_not_have_are_refused(make_axis: MakeAxis, case: Drawn, data: st.DataObject) -> None:
    """They would be units of a neighbour."""
    axis = make_axis(case.counts)
    units = [[list(group) for group in block] for block in case.units[0]]
    part = data.draw(st.sampled_from(axis.parts))
    units[part.block][part.index].append(data.draw(st.sampled_from([-1, part.group.count, part.group.count + 3])))
    with pytest.raises(ValueError, match=f"block {part.block} has {part.group.count} {part.group.name}, not slots"):
        axis.mask(units)


@LAW
@given(drawn(), st.data())
def test_values_of_another_axis_are_not_zipped(make_axis: MakeAxis, case: Drawn, data: st.DataObject) -> None:
    axis = make_axis(case.counts)
    values = [list(groups) for groups in case.counts]
    block = data.draw(st.sampled_from(range(len(values))))
    if data.draw(st.booleans()):
        values[block].append(0)
    else:
        values[block].pop()
    with pytest.raises(ValueError, match="zip"):
        list(axis.zip(values))
    with pytest.raises(ValueError, match="zip"):
        axis.mask([[()] * len(groups) for groups in values])


@LAW
@given(drawn())
def test_layers_are_found_under_their_stored_names(make_axis: MakeAxis, case: Drawn) -> None:
    axis = make_axis(case.counts)
    kinds = range(len(case.counts[0]))
    assert axis.layer_names == tuple(name for index in kinds for name in (f"in{index}", f"out{index}"))
    names = {stored_name(block, f"{layer}.weight") for block in range(len(case.counts)) for layer in axis.layer_names}
    assert axis.weights.keys() == names
    assert axis.biases == {name.replace("weight", "bias") for name in names}
    for part in axis.parts:
        for layer in part.group.layers:
            assert axis.weights[part.stored(layer.weight)] is layer
            assert axis.blocks[part.block].group_of(layer.name) == part.index


def test_blocks_may_differ_in_units_but_not_in_layers(make_axis: MakeAxis) -> None:
    assert [part.stop for part in make_axis([[2, 3], [5, 1]]).parts] == [2, 5, 10, 11]
    with pytest.raises(ValueError, match="the same layers"):
        make_axis([[2, 3], [2]])
    with pytest.raises(ValueError, match="at least one unit"):
        make_axis([[2, 3], [0, 3]])


def test_a_layer_says_what_is_stored_and_how_wide_it_is() -> None:
    outputs, inputs = UnitLayer("a", Side.OUTPUT, 6, 32), UnitLayer("b", Side.INPUT, 5, 32, scaled_inputs=True)
    assert (outputs.out_major, inputs.out_major) == (True, False)
    assert (outputs.in_features(4), outputs.out_features(4)) == (32, 24)
    assert (inputs.in_features(4), inputs.out_features(4)) == (20, 32)
    group = UnitGroup("heads", 4, (outputs, inputs), 1.0)
    assert group.unit_tensors == ("a.weight", "a.bias", "b.weight"), "the bias of inputs belongs to no unit"
    assert group.all_unit_tensors == (*group.unit_tensors, outputs.scale, inputs.factor)
    assert (outputs.scale, inputs.factor) == ("a.scale", "b.factor")
    assert BlockSpec((group,)).layers == (outputs, inputs)


def test_the_block_of_a_stored_tensor(small_config: ModelConfig) -> None:
    for block in (0, 7, 12):
        assert block_of(stored_name(block, "a.weight")) == block
    assert [block_of(name) for name in ("embed.weight", "blocks", "blocks.x.weight", "more.blocks.1.weight")] == [
        None
    ] * 4
    blocks = [block_of(name) for name in small_config.stored_shapes()]
    assert set(blocks) == {None, 0, 1, 2} and blocks.count(0) == blocks.count(2) == 12


def test_unit_groups_in_words(small_config: ModelConfig, make_axis: MakeAxis) -> None:
    assert small_config.units.group_titles == "attention heads and channel groups"
    assert make_axis([[2, 3], [5, 1]]).group_titles == "kind0 and kind1", "names, if there are no titles"


def test_a_dit_has_as_many_groups_as_heads(small_config: ModelConfig) -> None:
    axis = small_config.units
    assert axis is small_config.model_copy().units, "made once for a model"
    assert (axis.size, len(axis.parts), axis.layer_names) == (24, 6, ("qkv", "proj", "fc1", "fc2"))
    assert [part.group.name for part in axis.parts] == ["heads", "groups"] * 3
    assert [part.group.routed for part in axis.parts] == [False, True] * 3
    assert axis.parts[3].stored("fc1.weight") == "blocks.1.fc1.weight"
    assert axis.blocks[0].groups[0].unit_tensors == ("qkv.weight", "qkv.bias", "proj.weight")
    assert axis.blocks[0].groups[1].all_unit_tensors == (
        *("fc1.weight", "fc1.bias", "fc2.weight"),
        *("fc1.scale", "fc2.factor"),
    )
