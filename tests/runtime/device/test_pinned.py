"""Data through the ring of pinned memory: right whatever the sizes, the streams and their order; bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dydit.errors import BackendError
from dydit.runtime.device.pinned import PIECE_BYTES, RING_BYTES, PinnedRing
from tests.fixtures.fake_driver import FakeDriver

RING, PIECE, ROOM = 4096, 1024, 8192
uploads = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3000)), min_size=1, max_size=30)


def opened(seed=0):
    driver = FakeDriver(seed)
    driver.push()
    return driver, [driver.make_stream() for _ in range(2)], PinnedRing(driver, RING, PIECE)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(uploads, st.integers(0, 100))
def test_what_was_uploaded_is_on_the_device(sizes, seed):
    """Each upload has memory of its own; the host changes its data at once. Then all of it comes back."""
    driver, streams, ring = opened(seed)
    rng, wanted = np.random.default_rng(seed), []
    for stream, nbytes in sizes:
        data = rng.integers(0, 256, nbytes, np.uint8)
        address = driver.allocate(nbytes)
        wanted.append((address, streams[stream], data.copy()))
        ring.upload(address, data, streams[stream])
        data[:] = 0
    for address, stream, data in wanted:
        assert np.array_equal(ring.download(address, data.nbytes, stream), data)
    for stream in streams:
        driver.synchronize_stream(stream)
    for address, _, _ in wanted:
        driver.free(address)
    ring.close()
    for stream in streams:
        driver.destroy_stream(stream)
    driver.pop()
    driver.close()
    assert not driver.faults and not driver.pageable


def test_the_host_waits_only_where_the_ring_is_full():
    driver, (stream, _), ring = opened()
    address = driver.allocate(ROOM)
    for _ in range(RING // 256):
        ring.upload(address, np.zeros(200, np.uint8), stream)
    assert driver.waits == 0
    ring.upload(address, np.zeros(200, np.uint8), stream)
    assert driver.waits == 1, "for the oldest piece"
    assert driver.has_run(stream) is False


def test_pieces_of_large_data_follow_one_another_in_bounded_memory():
    driver, (stream, _), ring = opened()
    address, data = driver.allocate(10 * ROOM), np.arange(10 * ROOM // 4, dtype=np.float32).reshape(2, -1)
    ring.upload(address, data, stream)
    assert sum(each.nbytes for each in driver._host.values()) == RING
    assert np.array_equal(ring.download(address, data.nbytes, stream).view(np.float32), data.ravel())


def test_after_a_download_that_failed_its_place_is_not_used_early():
    driver, (stream, other), ring = opened()
    source, to = driver.allocate(PIECE), driver.allocate(PIECE)
    driver.clear(source, PIECE, stream)
    synchronize = driver.synchronize

    def fail(event):
        raise BackendError("unspecified launch failure")

    driver.synchronize = fail
    with pytest.raises(BackendError, match="launch failure"):
        ring.download(source, PIECE, stream)
    driver.synchronize = synchronize
    data = np.full(PIECE, 5, np.uint8)
    ring.upload(to, data, other)
    driver.synchronize_stream(stream)
    driver.synchronize_stream(other)
    assert np.array_equal(driver.contents(to, PIECE), data)


def test_the_ring_that_runs_use_holds_several_pieces():
    assert RING_BYTES % PIECE_BYTES == 0 and RING_BYTES // PIECE_BYTES >= 4
