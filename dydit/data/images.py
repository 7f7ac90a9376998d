"""An image file as pixels: opened, turned upright, put on white, cropped to a square, in grey or RGB.

A square is cut as ADM and DiT cut theirs (`center_crop_arr` of guided-diffusion): halve the image by averages of 2x2
pixels while its short side is at least twice the square's, scale the short side to the square's by bicubic
interpolation, and cut the square out of the middle.
"""

from __future__ import annotations

import io
import warnings
from enum import StrEnum
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dydit.errors import one_line

_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")


class Crop(StrEnum):
    """How an image becomes a square."""

    CENTER = "center"
    RESIZE = "resize"


class UnreadableError(Exception):
    """An image cannot be used; the text says why. It is no error of the command where images may be skipped."""


def read_pixels(image: Path | bytes | np.ndarray, size: int, channels: int, crop: Crop) -> np.ndarray:
    """The pixels of an image, uint8 [channels, size, size].

    `image`: a file, the bytes of a file, or pixels uint8 [H, W] or [H, W, C]. Raises `UnreadableError`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = Image.fromarray(image) if isinstance(image, np.ndarray) else _open(image)
            upright = ImageOps.exif_transpose(opened)
            plain = as_grey_or_rgb(upright, channels)
            square = center_crop(plain, size) if crop is Crop.CENTER else _resize(plain, (size, size))
    except UnreadableError:
        raise
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableError("it is no image of a known format") from error
    except OSError as error:
        raise UnreadableError(error.strerror or one_line(error)[:200]) from error
    except Exception as error:  # a damaged file can make the decoders raise anything
        raise UnreadableError(one_line(error)[:200]) from error
    pixels = np.asarray(square, np.uint8).reshape(size, size, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def as_grey_or_rgb(image: Image.Image, channels: int) -> Image.Image:
    """An image of any kind as 8 bits of grey (one channel) or RGB (three). What is transparent becomes white."""
    if image.mode in _SIXTEEN_BITS or image.mode == "I":
        values = np.asarray(image).astype(np.float64)
        if not 0 <= values.min() <= values.max() <= 0xFFFF:
            raise UnreadableError(f"its values lie in {values.min():g}..{values.max():g}; expected 0..65535")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    elif image.mode == "F":
        raise UnreadableError("its pixels are floating-point numbers; expected 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("L" if channels == 1 else "RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The square of `size` from the middle of an image, scaled so that its short side fits; see the module."""
    while min(image.size) >= 2 * size:
        width, height = image.size
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = _resize(image, (round(image.size[0] * scale), round(image.size[1] * scale)))
    left, top = (image.size[0] - size) // 2, (image.size[1] - size) // 2
    return image.crop((left, top, left + size, top + size))


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.BICUBIC)


def _open(image: Path | bytes) -> Image.Image:
    opened = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    opened.load()
    return opened
