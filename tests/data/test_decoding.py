"""Images are decoded in their order by any number of processes, and a process that dies is one line."""

from __future__ import annotations

import itertools
import signal

import numpy as np
import psutil
import pytest

from dydit.data.decoding import Decoder, Decoding
from dydit.data.images import Crop
from dydit.data.sources.source import Record
from dydit.errors import BackendError

DECODING = Decoding(4, 3, Crop.CENTER)


def records(count: int) -> list[Record]:
    """Every fifth one is no image."""
    return [
        Record(str(number), b"?" if number % 5 == 4 else np.full((4, 4, 3), number % 256, np.uint8))
        for number in range(count)
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_images_come_in_their_order(workers: int) -> None:
    given = records(203)
    with Decoder(DECODING, workers) as decoder:
        for _ in range(2):
            found = list(decoder.decoded(given))
            assert [record for record, _ in found] == given
            for number, (_, pixels) in enumerate(found):
                if number % 5 == 4:
                    assert pixels == "it is no image of a known format"
                else:
                    assert not isinstance(pixels, str) and pixels.shape == (3, 4, 4) and (pixels == number % 256).all()
        assert list(decoder.decoded([])) == []


def test_a_process_that_dies_is_one_line() -> None:
    before = set(psutil.Process().children())
    endless = itertools.cycle(records(8))
    with Decoder(DECODING, 2) as decoder, pytest.raises(BackendError, match=r"was ended, .*use fewer --workers"):
        for number, _ in enumerate(decoder.decoded(endless)):
            if number == 40:
                workers = [each for each in psutil.Process().children() if each not in before]
                next(each for each in workers if "spawn_main" in " ".join(each.cmdline())).send_signal(signal.SIGKILL)
