"""Page-locked host memory through which data go to a device and come from it, as a ring of bounded size.

The driver may copy pageable memory synchronously, which would make the host wait for the stream, and refuses it while
work is captured. So data are copied into the ring first, in pieces; a piece's place is used again once the event behind
its copy has passed. The host waits only when the ring is full.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np

from dydit.runtime.device.driver import Driver
from dydit.runtime.device.operations import aligned

RING_BYTES = 32 << 20
PIECE_BYTES = 8 << 20
"""At least four pieces fit, so that the host fills one while others are copied."""


class _Piece(NamedTuple):
    """Bytes `start` to `end` of the ring, in use until `event` has passed."""

    start: int
    end: int
    event: Any


class PinnedRing:
    """Copies of pageable host memory to and from the device. The memory is allocated by the first copy.

    The context must be current. Not for use by several threads at once.
    """

    def __init__(self, driver: Driver, capacity: int = RING_BYTES, piece: int = PIECE_BYTES):
        assert aligned(piece) == piece <= capacity
        self._driver, self._capacity, self._piece = driver, capacity, piece
        self._memory: np.ndarray | None = None
        self._used: deque[_Piece] = deque()  # in the order of their places
        self._events: list[Any] = []  # those that nothing waits for

    def upload(self, to: int, data: np.ndarray, stream: int) -> None:
        """Queue copies of a contiguous array to the device; it may change as soon as this returns."""
        flat = data.reshape(-1).view(np.uint8)
        for offset in range(0, flat.nbytes, self._piece):
            part = flat[offset : offset + self._piece]
            start, place = self._take(part.nbytes)
            place[:] = part
            self._driver.upload(to + offset, place, stream)
            self._used.append(_Piece(start, start + aligned(part.nbytes), self._record(stream)))

    def download(self, source: int, nbytes: int, stream: int) -> np.ndarray:
        """Wait for a stream and return bytes of the device, uint8 [nbytes]."""
        data = np.empty(nbytes, np.uint8)
        for offset in range(0, nbytes, self._piece):
            part = data[offset : offset + self._piece]
            start, place = self._take(part.nbytes)
            self._driver.download(place, source + offset, stream)
            self._used.append(_Piece(start, start + aligned(part.nbytes), self._record(stream)))
            self._driver.synchronize(self._used[-1].event)
            part[:] = place
            self._events.append(self._used.pop().event)
        return data

    def close(self) -> None:
        """Free the memory and the events; nothing may be queued any more."""
        self._events += [piece.event for piece in self._used]
        self._used.clear()
        while self._events:
            self._driver.destroy_event(self._events.pop())
        memory, self._memory = self._memory, None
        if memory is not None:
            self._driver.free_host(memory)

    def _record(self, stream: int) -> Any:
        event = self._events.pop() if self._events else self._driver.make_event()
        self._driver.record(event, stream)
        return event

    def _take(self, nbytes: int) -> tuple[int, np.ndarray]:
        """A place that nothing uses: its offset in the ring, and its bytes."""
        if self._memory is None:
            self._memory = self._driver.allocate_host(self._capacity)
        while self._used and self._driver.query(self._used[0].event):
            self._events.append(self._used.popleft().event)
        while (start := self._gap(aligned(nbytes))) is None:
            first = self._used.popleft()
            self._events.append(first.event)
            self._driver.synchronize(first.event)
        return start, self._memory[start : start + nbytes]

    def _gap(self, nbytes: int) -> int | None:
        """Where `nbytes` fit behind the last piece; None if they do not."""
        if not self._used:
            return 0
        first, last = self._used[0].start, self._used[-1].end
        if last <= first:  # the pieces go around the end
            return last if last + nbytes <= first else None
        if last + nbytes <= self._capacity:
            return last
        return 0 if nbytes <= first else None
