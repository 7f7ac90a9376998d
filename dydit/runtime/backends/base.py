"""The contract of a backend, which turns the bundle's graphs into callables. Subclasses only load and execute.

Names, dtypes, shapes and life cycle are checked here, once, for all backends.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.bundle.io_spec import check_feeds, conditioning_inputs, subnet_inputs, text_inputs, text_outputs
from dydit.bundle.manifest import Manifest
from dydit.diffusion.steps import State
from dydit.errors import BackendError, ConfigError
from dydit.models.config import TEXTS_NEEDED, ModelConfig
from dydit.runtime.forks import register

Arrays = Mapping[str, np.ndarray]
DecodeTile = Callable[[np.ndarray], np.ndarray]
_OF_A_RUN = {"model", "sampling", "plan", "subnets", "masks", "digest"}
"""What of a manifest may differ between bundles that one backend serves (`Backend.use`): the steps, and texts."""


@dataclass(frozen=True)
class BackendOptions:
    """How a backend runs. No option changes which function is computed.

    `threads`: cores to use (0: the backend chooses). `device`: `cpu` or `cuda`; on openvino, `cpu`, `gpu` or `npu`.
    `packed`: onnxruntime and torch on the CPU copy each subnetwork's matrices into their kernels' order. That takes as
    much memory for each resident subnetwork as its weights; otherwise all share one map of `weights.bin`. On
    onnxruntime steps are 5 to 8 % faster, and loading is 2.5 times as slow (DiT-S/2 at a FLOPs ratio of 0.5: 130
    against 140 ms for 2x256 tokens on one core, 230 against 100 ms to load, 75 against 12 MB), so it pays off from
    about a dozen steps per load. On torch it was not measured.
    """

    threads: int = 0
    device: str = "cpu"
    packed: bool = False


@dataclass(frozen=True)
class StepResult:
    """The result of one step.

    `x_prev`, `next_history` f32 [B, C, S, S] (None: the sampler keeps no history); `overflow` int64 [L] routed tokens
    above the capacity (zeros unless routing is by capacity). From a subnetwork loaded with `debug` also `tokens` bool
    [L, rows, N], `residuals` f32 [L, rows, N, D].
    """

    x_prev: np.ndarray
    next_history: np.ndarray | None
    overflow: np.ndarray
    tokens: np.ndarray | None = field(default=None, repr=False)
    residuals: np.ndarray | None = field(default=None, repr=False)

    @property
    def state(self) -> State[np.ndarray]:
        """The state from which the next step starts."""
        return State(self.x_prev, self.next_history)


class Subnet(ABC):
    """One loaded subnetwork. Use it as a context manager, or call `close`.

    `backend`: a step holds its lock, so that steps of several threads take turns, and none is closed while it runs.
    """

    def __init__(self, backend: Backend, index: int):
        self._backend, self._index, manifest = backend, index, backend.bundle.manifest
        self.entry = manifest.subnets[index]
        self.specs = subnet_inputs(manifest.model, self.entry.gated)
        self.what = f"subnetwork {index}"
        self._open = True

    def step(self, feeds: Arrays) -> StepResult:
        """Run one step on the inputs of `io_spec.subnet_inputs`. `gates` are dropped if the graph has none."""
        with self._backend.lock:
            self._backend.require_open()
            if not self._open:
                raise BackendError(f"{self.what} was closed")
            if not self._is_present:
                raise BackendError(f"{self.what} is of other steps than the backend runs now; load it again")
            if not self.entry.gated:
                feeds = {name: array for name, array in feeds.items() if name != "gates"}
            check_feeds(self.specs, feeds, self.what)
            result = self._step(feeds)
            for array in (result.x_prev, result.next_history):
                if array is not None:
                    _check_output(array, feeds["x"].shape, self.what)
            return result

    @property
    def _is_present(self) -> bool:
        """Whether the bundle that the backend runs now has this subnetwork, under this number."""
        subnets = self._backend.bundle.manifest.subnets
        return self._index < len(subnets) and subnets[self._index] == self.entry

    @abstractmethod
    def _step(self, feeds: Arrays) -> StepResult:
        """Execute; feeds have been checked."""

    def close(self) -> None:
        """Free what the subnetwork holds, after the current step."""
        with self._backend.lock:
            self._open = False
            self._free()

    def _free(self) -> None:  # noqa: B027
        """Free what the subnetwork holds. A second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Backend(ABC):
    """Loads subnetworks of one bundle and evaluates its conditioning.

    Threads may share a backend. They take turns by its `lock`: a step, a conditioning and a whole run of
    `dydit.runtime.loop.sample` each hold it. Loading a subnetwork does not, because it may happen in the background.

    Any of them may be interrupted at any moment (`KeyboardInterrupt`, or what another thread or a signal handler
    raises). So state that an interrupt can leave half-changed carries a mark, which is set before the change and
    removed after it. Whoever finds the mark builds that state again.

    `bundle`: the one whose steps run now, `opened`: that of the constructor; see `use`. `loads`: held by a thread that
    loads a subnetwork in the background, because `use` must not come in between.
    """

    name: str
    loads_lightly = False
    """Whether a loaded subnetwork takes little more memory than the weights that it reads."""

    def __init__(self, bundle: Bundle, options: BackendOptions | None = None):
        self.opened = self.bundle = bundle
        self.options = options or BackendOptions()
        self.lock, self.loads = threading.RLock(), threading.Lock()
        self.sampling = False  # whether the thread that holds the lock is in the middle of a run
        self._open = True
        register(self)

    def use(self, bundle: Bundle) -> None:
        """Run other steps or texts from now on: those of another manifest of the same files.

        See `dydit.planning.resampling` and `Bundle.with_texts`.

        Sessions, engines and weights stay. What depends on the steps compares its manifest with `bundle` when it is
        used next. A subnetwork loaded before serves only if the new manifest has it under the same number. Raises
        `BackendError` for the files of another bundle, and in the middle of a run.
        """
        with self.lock:
            self.require_open()
            if bundle.path != self.bundle.path or not _same_files(bundle.manifest, self.bundle.manifest):
                raise BackendError(f"this backend has the files of {self.bundle.path}; open another for {bundle.path}")
            if bundle.manifest != self.bundle.manifest or bundle.texts is not self.bundle.texts:
                self.require_no_run()
                with self.loads:
                    self.bundle = bundle

    def conditioning(self, timesteps: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """What steps take of every (timestep, label) pair: f32 [T], int64 [R] -> f32 [T, R, *condition_shape]."""
        feeds = {"timesteps": timesteps, "labels": labels}
        check_feeds(conditioning_inputs(), feeds, "conditioning")
        shape = (len(timesteps), len(labels), *self.bundle.manifest.model.condition_shape)
        with self.lock:
            self.require_open()
            rows = self._conditioning(feeds)
        _check_output(rows, shape, "conditioning")
        return rows

    @abstractmethod
    def _conditioning(self, feeds: Arrays) -> np.ndarray:
        """Execute; feeds have been checked."""

    def text_values(self, labels: np.ndarray) -> dict[str, np.ndarray]:
        """What steps take of the run's texts with these labels, int64 [T]: see `io_spec.text_outputs`.

        Raises `ConfigError` if the bundle has no texts (`Bundle.with_texts`).
        """
        model, texts = self.bundle.manifest.model, self.bundle.texts
        if texts is None:
            raise ConfigError(TEXTS_NEEDED)
        feeds = {"embeddings": texts.embeddings[labels], "mask": texts.mask[labels]}
        symbols = check_feeds(text_inputs(model), feeds, "text")
        with self.lock:
            self.require_open()
            out = self._text_values(feeds)
        for spec in text_outputs(model):
            _check_output(out[spec.name], spec.concrete(symbols), "text")
        return out

    def _text_values(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """Execute; feeds have been checked."""
        raise BackendError(f"{self.name} does not run models that texts condition; use backend='onnxruntime'")

    def expect(self, images: int) -> None:  # noqa: B027
        """Announce the batch size of the steps to come: a hint, for backends that are faster when they know it."""

    def tile_decoder(self) -> DecodeTile | None:
        """The function that turns tiles of latents f32 [B, C, tile, tile] into pixels f32 [B, 3, side, side].

        For a bundle with a VAE decoder. None if the backend has no decoder of its own; ONNX Runtime then decodes.
        """
        return None

    @abstractmethod
    def subnet(self, index: int, full_capacity: bool = False, debug: bool = False) -> Subnet:
        """Load a subnetwork. `full_capacity`: with room for every token; `debug`: with the additional outputs."""

    def close(self) -> None:
        """Free sessions, maps and threads, after the current call. A second call does nothing."""
        with self.lock:
            self._open = False
            self._free()

    def _free(self) -> None:  # noqa: B027
        """Free what the backend holds. A second call does nothing."""

    def require_open(self) -> None:
        """Raise `BackendError` after `close`."""
        if not self._open:
            raise BackendError("this backend was closed; open the bundle again")

    def require_no_run(self) -> None:
        """Raise `BackendError` in the middle of a run."""
        if self.sampling:
            raise BackendError("this bundle is in the middle of a run; start another one after it, not from within")

    def after_fork(self) -> None:
        """Replace the locks: in the parent, another thread may hold them."""
        self.lock, self.loads, self.sampling = threading.RLock(), threading.Lock(), False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _same_files(one: Manifest, other: Manifest) -> bool:
    """Whether two manifests describe the same files, with or without the same steps and texts."""
    same = Manifest.model_fields.keys() - _OF_A_RUN
    values = all(getattr(one, name) == getattr(other, name) for name in same)
    return values and _without_texts(one.model) == _without_texts(other.model)


def _without_texts(model: ModelConfig) -> ModelConfig:
    return model if model.text is None else model.with_texts(0, negative=False)


def _check_output(array: np.ndarray, shape: tuple[int, ...], what: str) -> None:
    """Raise `BackendError` if an output is not what the manifest describes: the graph is another one."""
    if array.shape != shape or array.dtype != np.float32:
        raise BackendError(
            f"{what} gave {array.dtype} {array.shape}, expected float32 {shape}; export the bundle again"
        )
