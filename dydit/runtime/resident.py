"""Keeps the subnetworks that are needed loaded, and loads the next one while the present one runs."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import Self

from dydit.bundle.manifest import Manifest, PlanKind, SubnetEntry
from dydit.errors import BackendError, DyditError
from dydit.runtime.backends.base import Arrays, Backend, StepResult, Subnet
from dydit.runtime.background import Pending, Pool
from dydit.runtime.forks import register

KEPT_BYTES = 512 << 20
"""A pipeline keeps all subnetworks of a per-step plan that together read at most so many bytes of weights: loading one
takes longer than a step of a model that small. On ONNX Runtime they take about as much memory (measured)."""
Key = tuple[int, SubnetEntry | None]
"""A subnetwork: its number, and its entry in the manifest. None: there is no such number, which the backend refuses."""


class ResidentSubnets:
    """Loaded subnetworks of one backend; the least recently used are unloaded. Use as a context manager, or `close`.

    `limit`: how many stay loaded (None: all; at least 2, the present one and the next). A subnetwork's full-capacity
    form is loaded when it is first needed and stays as long as its plain form. When the backend has gone on to other
    steps (`Backend.use`), subnetworks that these do not have are unloaded once the first of them is loaded: what the
    old and the new share stays.

    Threads may share one object. `step` and unloading both hold the backend's lock, so a subnetwork is never closed
    while it runs. Loading happens in a thread of its own, which takes no lock. Whoever waits for it may be interrupted
    at any moment; the subnetwork is then loaded later all the same. `_loaded` holds what is loaded or loading. It is
    the only table, so no interrupt can leave two tables that disagree.
    """

    def __init__(self, backend: Backend, limit: int | None = None, debug: bool = False):
        self._backend, self._debug = backend, debug
        self._limit = None if limit is None else max(2, limit)
        self._manifest = backend.bundle.manifest  # all that is loaded is of this one, or is loading
        self._loaded: OrderedDict[Key, Pending[Subnet | None]] = OrderedDict()
        self._full: dict[Key, Subnet] = {}
        self._open = True
        self._loader = Pool(1)
        register(self)

    def step(self, index: int, feeds: Arrays, full_capacity: bool = False) -> StepResult:
        """Run one step of a subnetwork; it is loaded now unless it is loaded or loading already."""
        with self._backend.lock:
            return (self.full(index) if full_capacity else self.get(index)).step(feeds)

    def get(self, index: int) -> Subnet:
        """The subnetwork; it is loaded now unless it is loaded or loading already.

        Another thread may unload it at any time, unless `backend.lock` is held; `step` holds it.
        """
        with self._backend.lock:
            self._require_open()
            key = self._key(index)
            subnet = self._wait(key)
            while subnet is None:  # it was ordered for these steps, but its turn came while other steps ran
                self._loaded.pop(key, None)
                subnet = self._wait(key)
            self._drop_others()
            self._make_room(key)
            return subnet

    def full(self, index: int) -> Subnet:
        """The full-capacity form of a loaded subnetwork, with room for every token."""
        with self._backend.lock:
            self._require_open()
            key = self._key(index)
            if key not in self._full:
                self._full[key] = self._backend.subnet(index, full_capacity=True, debug=self._debug)
            return self._full[key]

    def prefetch(self, index: int) -> None:
        """Start loading a subnetwork in the background; errors are raised when it is used."""
        with self._backend.lock:
            self._require_open()
            key = self._key(index)
            if key not in self._loaded:
                running = next(reversed(self._loaded), key)
                self._order(key)
                self._loaded.move_to_end(running)
                self._make_room(running)

    def close(self) -> None:
        """Free everything after the current step. A second call does nothing."""
        with self._backend.lock:
            self._open = False
            self._loader.close()
            for key in list(self._loaded):
                self._drop(key)

    def __len__(self) -> int:
        return len([pending for pending in self._loaded.values() if pending.done])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def after_fork(self) -> None:
        """Forget what was loading: a forked child has no loading thread."""
        self._loaded = OrderedDict((key, pending) for key, pending in self._loaded.items() if pending.done)

    def _key(self, index: int) -> Key:
        subnets = self._backend.bundle.manifest.subnets
        return index, subnets[index] if index < len(subnets) else None

    def _order(self, key: Key) -> None:
        """Order a subnetwork to be loaded, unless it is loaded or loading already."""
        if key not in self._loaded:
            backend, debug, manifest, (index, _) = self._backend, self._debug, self._backend.bundle.manifest, key

            def load() -> Subnet | None:
                with backend.loads:
                    return backend.subnet(index, debug=debug) if backend.bundle.manifest is manifest else None

            self._loaded[key] = self._loader.submit(load)

    def _wait(self, key: Key) -> Subnet | None:
        """The subnetwork, when it is loaded; None if it was not, because the backend ran other steps then."""
        self._order(key)
        self._loaded.move_to_end(key)
        pending = self._loaded[key]
        try:
            return pending.result()
        except BaseException:
            if pending.failed:  # otherwise only the wait was interrupted
                self._loaded.pop(key, None)
            raise

    def _require_open(self) -> None:
        if not self._open:
            raise BackendError("the subnetworks were closed; open the bundle again")

    def _drop_others(self) -> None:
        """Unload what the present steps do not have, if the backend ran other steps before."""
        manifest = self._backend.bundle.manifest
        if manifest is not self._manifest:
            present: set[Key] = set(enumerate(manifest.subnets))
            for key in [key for key in self._loaded if key not in present]:
                self._drop(key)
            self._manifest = manifest

    def _make_room(self, keep: Key) -> None:
        """Unload the least recently used, except `keep`, until at most `limit` are loaded or loading."""
        while self._limit is not None and len(self._loaded) > self._limit:
            self._drop(next(key for key in self._loaded if key != keep))

    def _drop(self, key: Key) -> None:
        full, pending = self._full.pop(key, None), self._loaded.pop(key)
        if full is not None:
            full.close()
        with contextlib.suppress(DyditError):  # of a subnetwork that could not be loaded
            if (subnet := pending.result()) is not None:
                subnet.close()


def default_residency(manifest: Manifest) -> int | None:
    """How many subnetworks a process that samples again and again keeps: all of a merged plan, 2 of a per-step one."""
    return 2 if manifest.plan.kind is PlanKind.PER_STEP else None


def host_residency(backend: Backend) -> int | None:
    """`default_residency` of a process that samples step by step on the host; None: all.

    There all of a per-step plan stay, too, if its subnetworks read at most `KEPT_BYTES` of weights, on a CPU and a
    backend that keeps little else.
    """
    manifest = backend.opened.manifest
    small = sum(entry.weight_bytes for entry in manifest.subnets) <= KEPT_BYTES
    keeps_all = small and backend.loads_lightly and backend.options.device == "cpu"
    return None if keeps_all else default_residency(manifest)
