"""Ranges by segment, block and layer: chosen, checked, and made into scales."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.calibrate.activation_ranges import ActivationRanges, Observations, repeat, require_segments
from dydit.calibrate.range_methods import Method
from dydit.errors import CalibrationError
from dydit.models.config import parse_config

LAYERS = ("qkv", "proj", "fc1", "fc2")


def observed(scales: list[float]) -> Observations:
    """A segment for each scale, one block, the layers twice, three and four times as large."""
    seen, rng = Observations(len(scales), 1, LAYERS), np.random.default_rng(0)
    for segment, scale in enumerate(scales):
        for place, layer in enumerate(LAYERS):
            seen.add(segment, 0, layer, scale * (place + 1) * rng.uniform(-1, 1, 1000))
    return seen


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=4), st.sampled_from(Method))
@settings(deadline=None)  # entropy takes its time on a busy machine
def test_each_segment_has_its_own_range(scales, method):
    ranges = observed(scales).choose(method, 3, 0.99)
    values = np.asarray(ranges.thresholds)
    assert values.shape == (len(scales), 1, 4) and ranges.shape == (len(scales), 1, 4)
    for place in range(4):
        assert np.allclose(values[:, 0, place], np.array(scales) * (place + 1), rtol=0.25)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=4))
def test_a_global_range_is_that_of_the_largest_segment(scales):
    seen = observed(scales)
    own, one = seen.choose(Method.MINMAX, 1), seen.together().choose(Method.MINMAX, 1)
    everywhere = repeat(one, len(scales))
    assert everywhere.shape == own.shape
    assert (np.asarray(everywhere.thresholds)[0] == np.asarray(own.thresholds).max(0)).all()


def test_scales_and_what_nothing_entered():
    seen = Observations(1, 1, LAYERS)
    seen.add(0, 0, "qkv", np.array([-2.0, 1.0]))
    seen.add(0, 0, "fc2", np.zeros(3))
    ranges = seen.choose(Method.MINMAX, 1)
    assert ranges.thresholds == (((2.0, 0.0, 0.0, 0.0),),)
    assert ranges.input_scales(127) == [((float(np.float32(2 / 127)), 1.0, 1.0, 1.0),)]


def test_what_does_not_belong_together(small_config):
    good, model = observed([1.0, 2.0]).choose(Method.MINMAX, 1), small_config.model_copy(update={"depth": 1})
    require_segments(good, 2, model)
    of = "has 2 segments, 1 block and 4 layers per block, but this plan has"
    with pytest.raises(CalibrationError, match=f"{of} 3, 1 and 4; calibrate with"):
        require_segments(good, 3, model)
    with pytest.raises(CalibrationError, match=f"{of} 2, 3 and 4; calibrate with"):
        require_segments(good, 2, small_config)
    few = Observations(2, 1, LAYERS[:3])
    few.add(0, 0, "qkv", np.ones(3))
    with pytest.raises(CalibrationError, match="3 layers per block, but this plan has 2, 1 and 4; calibrate with"):
        require_segments(few.choose(Method.MINMAX, 1), 2, model)
    with pytest.raises(CalibrationError, match="2 segments cannot be repeated"):
        repeat(good, 4)
    values = good.model_dump()
    for change, message in (
        ({"thresholds": ((*values["thresholds"][0], (1.0,)), values["thresholds"][1])}, "must have the same blocks"),
        ({"thresholds": (), "clipped": ()}, "must have the same blocks"),
        ({"clipped": values["clipped"][:1]}, "have different shapes"),
        ({"thresholds": (((-1.0, 1.0, 1.0, 1.0),),) * 2}, "a threshold is negative"),
    ):
        with pytest.raises(Exception, match=message):
            parse_config(ActivationRanges, {**values, **change})
