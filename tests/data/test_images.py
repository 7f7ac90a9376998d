"""Images of every kind become squares of 8 bits, and a damaged one says so."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dydit.data.images import Crop, UnreadableError, center_crop, read_pixels

SIDES = st.integers(1, 90)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, so that resizing changes them little."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(image: Path | bytes | np.ndarray, size: int, channels: int = 3, crop: Crop = Crop.CENTER) -> np.ndarray:
    return read_pixels(image, size, channels, crop)


@settings(max_examples=60)
@given(SIDES, SIDES, st.integers(1, 32))
def test_a_square_of_the_size_comes_out_of_any_image(width: int, height: int, size: int) -> None:
    for crop in Crop:
        pixels = read(np.asarray(picture(width, height)), size, crop=crop)
        assert pixels.shape == (3, size, size) and pixels.dtype == np.uint8


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(0, 5))
def test_a_square_image_of_the_size_is_not_changed(size: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    for crop in Crop:
        assert np.array_equal(read(image, size, crop=crop), image.transpose(2, 0, 1))


@settings(max_examples=40)
@given(st.integers(0, 255), SIDES, SIDES, st.integers(1, 24))
def test_one_colour_stays_that_colour(value: int, width: int, height: int, size: int) -> None:
    assert (read(np.full((height, width, 3), value, np.uint8), size) == value).all()


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(0, 3), st.integers(0, 9))
def test_doubling_every_pixel_is_undone_by_averages(size: int, halvings: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    large = image.repeat(2**halvings, 0).repeat(2**halvings, 1)
    assert np.array_equal(read(large, size), image.transpose(2, 0, 1))


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(0, 40), st.booleans(), st.integers(0, 9))
def test_the_middle_is_cut_out(size: int, margin: int, tall: bool, seed: int) -> None:
    """The short side fits already, so nothing is scaled."""
    rng = np.random.default_rng(seed)
    wide = rng.integers(0, 256, (size, size + margin, 3), np.uint8)
    middle = wide[:, margin // 2 : margin // 2 + size]
    image, wanted = (wide.transpose(1, 0, 2), middle.transpose(1, 0, 2)) if tall else (wide, middle)
    assert np.array_equal(read(np.ascontiguousarray(image), size), wanted.transpose(2, 0, 1))


def test_the_crop_is_that_of_guided_diffusion() -> None:
    """Steps of the published code, by hand: 100x75 is halved to 12x9 in three steps, scaled to 11x8, and cut to 8x8."""
    image = picture(100, 75)
    for size in ((50, 37), (25, 18), (12, 9)):
        image = image.resize(size, Image.Resampling.BOX)
    scaled = image.resize((11, 8), Image.Resampling.BICUBIC)
    wanted = np.asarray(scaled)[:, 1:9]
    assert np.array_equal(np.asarray(center_crop(picture(100, 75), 8)), wanted)


def test_resizing_takes_all_of_the_image() -> None:
    image = np.zeros((8, 32, 3), np.uint8)
    image[:, :8] = 255
    pixels = read(image, 8, crop=Crop.RESIZE)
    assert (pixels[:, :, 0] > 200).all() and (pixels[:, :, 4:] == 0).all()
    assert (read(image, 8) == 0).all(), "the middle alone"


def test_kinds_of_images_become_rgb() -> None:
    rgb = picture(16, 16)
    wanted = np.asarray(rgb).transpose(2, 0, 1).astype(int)

    def off(data: bytes) -> int:
        return int(abs(read(data, 16).astype(int) - wanted).max())

    assert off(encoded(rgb)) == off(encoded(rgb, "BMP")) == off(encoded(rgb, "WEBP", lossless=True)) == 0
    assert off(encoded(rgb.convert("RGBA"))) == 0
    assert off(encoded(rgb, "JPEG", quality=100, subsampling=0)) < 8
    assert off(encoded(rgb.convert("CMYK"), "TIFF")) < 4
    palette = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16), "P")
    palette.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    assert read(encoded(palette), 16)[:, 15, 15].tolist() == [255, 0, 7]
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert (read(encoded(grey), 16) == np.asarray(grey)).all()
    assert np.array_equal(read(encoded(grey), 16, 1)[0], np.asarray(grey))
    assert read(encoded(grey.point(lambda value: 255 * (value > 99), "1")), 16).max() == 255
    assert abs(read(encoded(rgb), 16, 1)[0] - np.asarray(rgb.convert("L")).astype(int)).max() == 0


def test_sixteen_bits_become_eight() -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    for data in (encoded(Image.fromarray(values)), encoded(Image.fromarray(values), "TIFF")):
        assert np.array_equal(read(data, 16, 1)[0], np.arange(256).reshape(16, 16))
    with pytest.raises(UnreadableError, match=r"values lie in 0\.\.70000; expected 0\.\.65535"):
        read(encoded(Image.fromarray(np.array([[0, 70000]], np.int32)), "TIFF"), 8)
    with pytest.raises(UnreadableError, match="floating-point"):
        read(encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), 8)


def test_what_is_transparent_becomes_white() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 2, 4))
    image.paste((0, 0, 0, 128), (2, 0, 4, 2))
    pixels = read(encoded(image), 4)
    assert pixels[:, 0, 0].tolist() == [255] * 3 and pixels[:, 3, 3].tolist() == [255, 0, 0]
    assert all(120 < value < 135 for value in pixels[:, 0, 3])
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert (read(encoded(palette, transparency=1), 4) == 255).all()
    grey = encoded(Image.new("LA", (4, 4), (0, 0)))
    assert (read(grey, 4) == 255).all() and (read(grey, 4, 1) == 255).all()


def test_images_are_turned_upright(tmp_path: Path) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the top of the scene is at the right
    Image.fromarray(image).save(tmp_path / "turned.png", exif=exif)
    pixels = read(tmp_path / "turned.png", 8)
    assert (pixels[:, :, 4:] == 255).all() and (pixels[:, :, :4] == 0).all()


def test_what_is_no_image_says_so(tmp_path: Path) -> None:
    data = encoded(picture(64, 64), "JPEG")
    for broken, words in {b"": "no image of a known format", b"words": "no image", data[:-60]: "truncated"}.items():
        with pytest.raises(UnreadableError, match=words):
            read(broken, 8)
    with pytest.raises(UnreadableError, match="No such file"):
        read(tmp_path / "missing.png", 8)
    with pytest.raises(UnreadableError):
        read(tmp_path, 8)
