"""Which subnetworks are loaded: the few that are needed, the next one loading while the present one runs."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from dydit.errors import BackendError
from dydit.runtime.backends.base import Backend, Subnet


class ResidentSubnets:
    """Loaded subnetworks of one backend, the least recently used making room. Use as a context manager, or `close`.

    `limit`: how many stay loaded (None: all; at least 2, the present one and the next). A subnetwork's full-capacity
    form is loaded when first needed and stays as long as its plain form.
    """

    def __init__(self, backend: Backend, limit: int | None = None, debug: bool = False):
        self._backend, self._debug = backend, debug
        self._limit = None if limit is None else max(2, limit)
        self._loaded: OrderedDict[int, Subnet] = OrderedDict()
        self._full: dict[int, Subnet] = {}
        self._coming: dict[int, Future[Subnet]] = {}
        self._open = True
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="dydit-load")

    def get(self, index: int) -> Subnet:
        """The subnetwork, loaded now unless it is there or on its way."""
        self._require_open()
        if index not in self._loaded:
            coming = self._coming.pop(index, None)
            self._loaded[index] = coming.result() if coming else self._load(index)
        self._loaded.move_to_end(index)
        self._make_room()
        return self._loaded[index]

    def full(self, index: int) -> Subnet:
        """The form of a loaded subnetwork that has a slot for every token."""
        if index not in self._full:
            self._full[index] = self._backend.subnet(index, full_capacity=True, debug=self._debug)
        return self._full[index]

    def prefetch(self, index: int) -> None:
        """Start loading a subnetwork in the background; errors show when it is asked for."""
        self._require_open()
        if index not in self._loaded and index not in self._coming:
            self._coming[index] = self._loader.submit(self._load, index)
            self._make_room()

    def close(self) -> None:
        """Free everything."""
        self._open = False
        self._loader.shutdown(wait=True, cancel_futures=True)
        for coming in self._coming.values():
            if not coming.cancelled() and coming.exception() is None:
                coming.result().close()
        self._coming.clear()
        for index in list(self._loaded):
            self._drop(index)

    def __len__(self) -> int:
        return len(self._loaded)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load(self, index: int) -> Subnet:
        return self._backend.subnet(index, debug=self._debug)

    def _require_open(self) -> None:
        if not self._open:
            raise BackendError("the subnetworks were closed; open the bundle again")

    def _make_room(self) -> None:
        while self._limit is not None and len(self._loaded) > max(1, self._limit - len(self._coming)):
            self._drop(next(iter(self._loaded)))

    def _drop(self, index: int) -> None:
        self._loaded.pop(index).close()
        if full := self._full.pop(index, None):
            full.close()
