"""Tiled decoding: every pixel is covered, seams are blended, and a decoder of single latents decodes as if whole."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from dydit.bundle.vae_entry import VAE_DECODER, VaeEntry, vae_inputs, vae_outputs
from dydit.errors import BackendError
from dydit.runtime.images.vae_decoder import VaeDecoder, decode_tiled, ramp, tile_starts

MIX = np.array([[1, 0.5, 0, 0], [0, -1, 2, 0], [0.25, 0, 0, 1]], np.float32)


def entry_of(tile=8, upscale=2) -> VaeEntry:
    return VaeEntry(
        latent_channels=4, tile=tile, upscale=upscale, scaling_factor=0.18215, shift_factor=0.0, source="test"
    )


def pointwise(latents, upscale=2):
    """Each latent becomes a square of one colour."""
    return np.einsum("ij,bjhw->bihw", MIX, latents).repeat(upscale, 2).repeat(upscale, 3)


def random_latents(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 14), st.integers(0, 14), st.integers(1, 3), st.integers(1, 5))
def test_tiles_of_a_pointwise_decoder_are_the_whole(tile, more_h, more_w, upscale, at_once):
    latents, sizes = random_latents(2, 4, tile + more_h, tile + more_w), []

    def decode(tiles):
        sizes.append(tiles.shape)
        return pointwise(tiles, upscale)

    pixels = decode_tiled(latents, entry_of(tile, upscale), decode, at_once)
    assert pixels.dtype == np.float32
    assert np.allclose(pixels, pointwise(latents, upscale), atol=1e-5)
    assert all(shape[0] <= at_once and shape[1:] == (4, tile, tile) for shape in sizes)
    if more_h == more_w == 0:
        assert sum(shape[0] for shape in sizes) == 2, "one tile is decoded once"


@given(st.integers(1, 300), st.integers(1, 64))
def test_tiles_cover_and_overlap(side, tile):
    tile = min(side, tile)
    starts = tile_starts(side, tile)
    assert starts[0] == 0 and starts[-1] == side - tile and starts == sorted(set(starts))
    overlaps = [a + tile - b for a, b in pairwise(starts)]
    assert all(overlap >= (tile // 4 if tile > 1 else 0) for overlap in overlaps)


def test_weights_rise_fall_and_are_never_zero():
    assert ramp(8, 3).tolist() == [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]
    assert ramp(1, 2).tolist() == [pytest.approx(1 / 3)]


def test_seams_are_blended():
    """Two tiles that disagree meet in a ramp, not in a step."""
    calls = iter((0.0, 1.0))

    def decode(tiles):
        return np.stack([np.full((3, 16, 16), next(calls), np.float32) for _ in tiles])

    pixels = decode_tiled(random_latents(1, 4, 8, 14), entry_of(), decode, 1)
    row = pixels[0, 0, 0]
    assert row[0] == 0 and row[-1] == 1 and (np.diff(row) >= 0).all() and np.diff(row).max() < 0.5


@pytest.fixture
def decoder(tmp_path) -> VaeDecoder:
    """The pointwise decoder as a graph."""
    entry = entry_of()
    scaled = MIX[:, :, None, None] / np.float32(entry.scaling_factor)
    (latents,), (images,) = vae_inputs(entry), vae_outputs(entry)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["latents", "mix"], ["small"]),
            helper.make_node("Resize", ["small", "", "scales"], ["images"], mode="nearest"),
        ],
        "decoder",
        [helper.make_tensor_value_info("latents", TensorProto.FLOAT, latents.shape)],
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, images.shape)],
        [
            onnx.numpy_helper.from_array(scaled, "mix"),
            onnx.numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.save(model, tmp_path / VAE_DECODER)
    return VaeDecoder(tmp_path, entry)


def test_a_graph_decodes_whole_and_in_tiles(decoder):
    for shape in ((5, 4, 8, 8), (2, 4, 12, 17)):
        latents = random_latents(*shape)
        pixels = decoder.decode(latents)
        assert np.allclose(pixels, pointwise(latents / 0.18215), atol=1e-4)
        assert np.array_equal(pixels[0], decoder.decode(latents[:1])[0]), "an image alone is the same"


def test_latents_that_do_not_fit_are_refused(decoder):
    with pytest.raises(BackendError, match=r"latents of 7x12 are smaller than 8x8, the size that it was exported for"):
        decoder.decode(random_latents(1, 4, 7, 12))
    with pytest.raises(
        BackendError, match=r"latents are float32 \(1, 3, 8, 8\), expected float32 \('batch', 4, 8, 8\)"
    ):
        decoder.decode(random_latents(1, 3, 8, 8))
    with pytest.raises(BackendError, match="latents are float64"):
        decoder.decode(random_latents(1, 4, 8, 8).astype(np.float64))


def test_a_missing_graph_is_one_line(tmp_path):
    with pytest.raises(BackendError, match=r"cannot load .*vae_decoder.onnx") as caught:
        VaeDecoder(tmp_path, entry_of())
    assert "\n" not in str(caught.value)
