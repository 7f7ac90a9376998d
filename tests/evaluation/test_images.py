"""Images are read in batches, and whatever is not 8-bit RGB is refused in one line."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dydit.errors import ConfigError
from dydit.evaluation.images import open_images
from tests.fixtures.fidelity import pictures


def all_of(path: Path, size: int) -> list[np.ndarray]:
    return list(open_images(path).batches(size))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_is_read_in_batches(save: Any, tmp_path: Path) -> None:
    images = pictures(0, 7)[:, :20]
    save(tmp_path / "a.npz", images, np.arange(7))
    opened = open_images(tmp_path / "a.npz")
    batches = list(opened.batches(3))
    assert opened.shape == (7, 20, 24, 3) and [len(batch) for batch in batches] == [3, 3, 1]
    assert np.array_equal(np.concatenate(batches), images)


def test_a_folder_is_read_by_names_without_the_overview(tmp_path: Path) -> None:
    images = pictures(0, 3)
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{index:06d}.png")
    Image.fromarray(images[0]).resize((99, 99)).save(tmp_path / "grid.png")
    assert np.array_equal(np.concatenate(all_of(tmp_path, 2)), images)


def test_grey_files_become_colours(tmp_path: Path) -> None:
    grey = pictures(0, 1)[0, ..., 0]
    Image.fromarray(grey).save(tmp_path / "0.png")
    assert np.array_equal(all_of(tmp_path, 1)[0][0], np.stack([grey] * 3, -1))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "arr_0 is float32 .*convert them to 8 bits"),
        (np.zeros((2, 3, 8, 8), np.uint8), "move the channels to the end"),
        (np.zeros((2, 8, 8, 1), np.uint8), "repeat the grey channel"),
        (np.zeros((2, 8, 8), np.uint8), "repeat the grey channel"),
        (np.zeros((2, 8, 8, 4), np.uint8), "not RGB images"),
        (np.zeros((0, 8, 8, 3), np.uint8), "not RGB images"),
        (np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8)), "Fortran order"),
        (np.array([{}]), "arr_0 is object"),
    ],
)
def test_other_arrays_are_refused(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", array)
    with pytest.raises(ConfigError, match=message):
        open_images(tmp_path / "a.npz")


def test_files_without_images_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", latents=np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("other.npz", "contains latents; expected the images as arr_0"),
        ("text.npz", "is not an .npz file of images"),
        ("missing.npz", "does not exist"),
        ("empty", "contains no PNG files"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_images(tmp_path / name)


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, pictures(0, 4))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"is damaged .*CRC"):
        all_of(path, 2)
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 8, 8, 3)}
        np.lib.format.write_array_header_1_0(member, header)
    with pytest.raises(ConfigError, match="fewer bytes than its shape"):
        open_images(path)


def test_files_of_other_sizes_and_modes_are_refused(tmp_path: Path) -> None:
    Image.fromarray(pictures(0, 1)[0]).save(tmp_path / "0.png")
    Image.new("RGB", (8, 9)).save(tmp_path / "1.png")
    with pytest.raises(ConfigError, match=r"1\.png has 8x9 pixels, but 0\.png has 24x24"):
        all_of(tmp_path, 4)
    Image.new("RGBA", (24, 24)).save(tmp_path / "1.png")
    with pytest.raises(ConfigError, match=r"1\.png has the mode RGBA"):
        all_of(tmp_path, 4)
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"1\.png cannot be read"):
        all_of(tmp_path, 4)
