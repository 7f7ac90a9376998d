"""Requests are checked before anything runs, and refusals name value and range."""

from __future__ import annotations

import math

import pytest

from dydit.errors import ConfigError
from dydit.models.config import parse_config
from dydit.runtime.request import SampleRequest, check_batch_size, check_labels, make_batches


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"labels": (1,), "num": 0}, "num must be at least 1, not 0"),
        ({"labels": (1,), "seed": -1}, "seed must be at least 0, not -1"),
        ({"labels": (1,), "seed": 1 << 64}, "seed must be less than 18446744073709551616"),
        ({"labels": (1,), "cfg_scale": math.nan}, "cfg_scale must be"),
        ({"labels": (1,), "cfg_scale": math.inf}, "cfg_scale must be a finite number, not inf"),
        ({"labels": (1,), "cfg_scale": -1}, "cfg_scale must be at least 0, not -1"),
        ({"labels": (1,), "batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"labels": (1, 2), "first_image": (1 << 64) - 1}, r"image indices must be at most 2\^64-1"),
        ({"labels": (1,), "sed": 3}, "sed is not a known setting"),
        ({"labels": ("dog",)}, r"labels\.0 must be a whole number, not 'dog'"),
    ],
)
def test_values_outside_their_range(values, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(SampleRequest, values)


def test_labels_and_batch_size_are_held_against_the_bundle(pixel_bundle):
    manifest = pixel_bundle.manifest
    check_labels([0, 6, 7], manifest)
    for label in (-1, 8):
        message = rf"^label {label} is outside 0\.\.6, the classes of this model, or 7 for no class$"
        with pytest.raises(ConfigError, match=message):
            check_labels([0, label], manifest)
    with pytest.raises(ConfigError, match=r"batch size 9 is outside 1\.\.8.*--max-batch"):
        check_batch_size(9, manifest, 100)
    assert [check_batch_size(size, manifest, images) for size, images in ((None, 100), (None, 3), (5, 3))] == [8, 3, 5]


def test_batches_cover_the_run_in_order():
    batches = make_batches([0, 1, 2, 0, 1], range(10, 15), 2)
    assert [batch.first for batch in batches] == [0, 2, 4]
    assert [batch.images for batch in batches] == [(10, 11), (12, 13), (14,)]
    assert [batch.labels.tolist() for batch in batches] == [[0, 1], [2, 0], [1]]


def test_only_an_unconditional_model_needs_no_labels(small_config):
    from dydit.models.uvit.config import preset

    unconditional = preset("cifar10-S/2")
    assert SampleRequest().labels_for(unconditional) == (0,)
    assert SampleRequest(labels=(2, 1)).labels_for(small_config) == (2, 1)
    with pytest.raises(ConfigError, match="give at least one label"):
        SampleRequest(num=3).labels_for(small_config)
    assert (unconditional.guidance_scale(None), small_config.guidance_scale(None)) == (1, 4)
    assert (unconditional.guidance_scale(1), small_config.guidance_scale(1.5)) == (1, 1.5)
    with pytest.raises(ConfigError, match="needs a null class"):
        unconditional.guidance_scale(4)
