"""Samples become pictures and evaluator files without surprises."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dydit.errors import OutputError
from dydit.runtime.images.image_files import Streamed, make_grid, read_png, to_rgb, to_uint8, write_npz, write_png


def test_levels_round_to_nearest_and_clip():
    levels = np.arange(256)
    exact = (levels / 127.5 - 1).astype(np.float32)
    spread = np.concatenate([exact, exact + 0.0038, exact - 0.0038, [-1.7, 2.5, -1, 1]]).astype(np.float32)
    out = to_uint8(spread.reshape(1, 1, -1, 4))
    assert out.shape == (1, len(spread) // 4, 4, 1)
    assert np.array_equal(out.reshape(-1), [*levels, *levels, *levels, 0, 255, 0, 255])


def test_channels_go_last_and_grey_stays_grey(tmp_path):
    samples = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 4)).astype(np.float32)
    assert np.array_equal(to_uint8(samples)[1, 2, 3], to_uint8(samples[1:, :, 2:3, 3:])[0, 0, 0])
    for channels, mode in ((1, "L"), (3, "RGB")):
        image = to_uint8(samples[:, :channels])[0]
        write_png(tmp_path / "a.png", image)
        with Image.open(tmp_path / "a.png") as read:
            assert read.mode == mode
            assert np.array_equal(np.asarray(read).reshape(image.shape), image)
        assert np.array_equal(read_png(tmp_path / "a.png", 4, channels), image)
        with pytest.raises(OutputError, match=r"a\.png is not a picture of this run"):
            read_png(tmp_path / "a.png", 4, 4 - channels)
    assert to_rgb(to_uint8(samples[:, :1])).shape == (2, 4, 4, 3)


@pytest.mark.parametrize(("count", "shape"), [(1, (4, 4)), (2, (4, 10)), (5, (10, 16)), (100, (58, 58))])
def test_the_grid_holds_every_image_in_reading_order(count, shape):
    images = [np.full((4, 4, 3), i, np.uint8) for i in range(count)]
    grid = make_grid(images)
    assert grid.shape == (*shape, 3)
    columns = (shape[1] + 2) // 6
    for i in range(count):
        top, left = i // columns * 6, i % columns * 6
        assert (grid[top : top + 4, left : left + 4] == i).all()


def test_npz_streams_what_numpy_reads_and_repeats_its_bytes(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (10, 4, 4, 3), np.uint8)
    for name in ("a.npz", "b.npz"):
        pieces = (array[i : i + 3] for i in range(0, 10, 3))
        write_npz(
            tmp_path / name,
            {
                "arr_0": Streamed("uint8", array.shape, pieces),
                "arr_1": Streamed("int64", (2,), [np.array([3, 4])]),
            },
        )
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0", "arr_1"]
        assert np.array_equal(file["arr_0"], array) and file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_1"], [3, 4])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz"]


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_damaged_picture_is_one_line(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(OutputError, match=r"a\.png cannot be read \(.*\); remove it and run again") as caught:
        read_png(tmp_path / "a.png", 4, 3)
    assert "\n" not in str(caught.value)
    with pytest.raises(OutputError, match="cannot be read"):
        read_png(tmp_path / "missing.png", 4, 3)


def test_a_truncated_picture_is_one_line(tmp_path):
    write_png(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    with pytest.raises(OutputError, match="cannot be read"):
        read_png(tmp_path / "a.png", 16, 3)
