"""The data that a run on a device needs from the host, laid out as `Layout` describes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.bundle.io_spec import TEXT_ROWS
from dydit.bundle.texts import Texts
from dydit.diffusion.guidance import Guidance
from dydit.diffusion.steps import State
from dydit.errors import ConfigError
from dydit.models.config import TEXTS_NEEDED
from dydit.runtime.device.memory_layout import Layout
from dydit.runtime.device.operations import Address, HostArray
from dydit.runtime.noise_source import NoiseSource
from dydit.runtime.request import Batch


class HostInputs:
    """Computes each `HostArray` when it is requested; nothing large is kept.

    `load(batch)`: the state of a batch that has passed some segments already.
    """

    def __init__(
        self,
        bundle: Bundle,
        layout: Layout,
        batches: Sequence[Batch],
        noise: NoiseSource,
        load: Callable[[int], State[np.ndarray]],
        cfg_scale: float,
    ):
        assert tuple(len(batch.images) for batch in batches) == layout.shape.sizes
        self._bundle, self._layout, self._batches = bundle, layout, batches
        self._noise, self._load = noise, load
        self._guidance = Guidance(cfg_scale, bundle.manifest.model.null_class)
        self._tables: dict[str, Callable[[], np.ndarray]] = {
            "cfg_scale": lambda: np.asarray([cfg_scale], np.float32),
            "timesteps": self._timesteps,
            "labels.all": self._labels,
            f"{TEXT_ROWS}.all": self._text_rows,
        }

    def array(self, source: HostArray) -> np.ndarray:
        """The data, contiguous; rows of tables are padded to their stride."""
        if source.kind in self._tables:
            return self._tables[source.kind]()
        if source.kind == "weights":
            assert source.name is not None
            return self._bundle.weight(source.name)
        if source.kind == "records" and source.batch is None:
            return self._records(range(self._bundle.manifest.sampling.steps), self._layout.record_bytes(0))
        assert source.batch is not None
        if source.kind in ("embeddings", "mask"):
            texts = texts_of(self._bundle)
            return np.asarray(getattr(texts, source.kind)[self._texts(source.batch)])
        assert source.segment is not None
        if source.kind == "latents":
            batch = self._batches[source.batch]
            return pack(self._layout, self._load(source.batch) if source.segment else State(self._noise.initial(batch)))
        assert source.kind == "records", source
        return self._noisy_records(source.batch, source.segment)

    def _records(self, steps: range, nbytes: int) -> np.ndarray:
        """A record of `nbytes` for each step, with its coefficients and gates; the rest is zeros."""
        table = _table(self._bundle.manifest.sampling.coefficients[steps.start : steps.stop], np.float32, nbytes)
        if self._layout.gated:
            first = self._layout.record_parts(Address("records"))["gates"].offset // 4
            for row, step in zip(table, steps, strict=True):
                gates = self._bundle.step_gates(step)
                row[first : first + len(gates)] = gates
        return table

    def _noisy_records(self, index: int, segment: int) -> np.ndarray:
        """The records of a batch's steps of a segment. A step that adds no noise has zeros in its place."""
        batch, layout = self._batches[index], self._layout
        size, steps = len(batch.images), layout.segments[segment].steps
        table = self._records(steps, layout.record_bytes(size))
        first = layout.record_parts(Address("records"))["noise"].offset // 4
        for row, step in zip(table, steps, strict=True):
            if layout.adds_noise(step):
                row[first : first + size * layout.image_bytes // 4] = self._noise.step(batch, step).reshape(-1)
        return table

    def _timesteps(self) -> np.ndarray:
        timesteps = self._bundle.manifest.sampling.timesteps
        rows = [timesteps[chunk.start : chunk.stop] for chunk in self._layout.all_chunks]
        return _table(rows, np.float32, self._layout.timesteps_stride)

    def _labels(self) -> np.ndarray:
        """The labels on which the condition depends. Where texts take the place of labels, it depends on none."""
        rows = [self._guidance.rows(batch.labels) for batch in self._batches]
        if self._layout.has_texts:
            rows = [np.zeros_like(row) for row in rows]
        return _table(rows, np.int64, self._layout.labels_stride)

    def _text_rows(self) -> np.ndarray:
        rows = [np.unique(self._guidance.rows(batch.labels), return_inverse=True)[1] for batch in self._batches]
        return _table(rows, np.int64, self._layout.labels_stride)

    def _texts(self, index: int) -> np.ndarray:
        """The different texts of a batch, then some again, so that there are as many as the layout has room for."""
        distinct = np.unique(self._guidance.rows(self._batches[index].labels))
        return np.resize(distinct, self._layout.shape.texts)


def texts_of(bundle: Bundle) -> Texts:
    """The texts of a bundle's run. Raises `ConfigError` if it has none."""
    if bundle.texts is None:
        raise ConfigError(TEXTS_NEEDED)
    return bundle.texts


def text_sizes(bundle: Bundle, batches: Sequence[Batch], cfg_scale: float) -> tuple[int, int]:
    """The most different texts that a batch has, and the tokens of each; zeros for a model that takes labels.

    Raises `ConfigError` if the bundle has no texts.
    """
    model = bundle.manifest.model
    if model.text is None:
        return 0, 0
    guidance = Guidance(cfg_scale, model.null_class)
    return max(len(np.unique(guidance.rows(batch.labels))) for batch in batches), texts_of(bundle).tokens


def pack(layout: Layout, state: State[np.ndarray]) -> np.ndarray:
    """The state of a batch as it lies in device memory, flat float32."""
    size = len(state.x)
    data = np.zeros(layout.state_bytes(size) // 4, np.float32)
    data[: state.x.size] = state.x.reshape(-1)
    if layout.multistep and state.history is not None:
        data[-state.history.size :] = state.history.reshape(-1)
    return data


def unpack(layout: Layout, size: int, data: np.ndarray) -> State[np.ndarray]:
    """The inverse of `pack`, for a batch of `size` images."""
    model, values = layout.manifest.model, data.view(np.float32)
    shape = (size, model.in_channels, model.input_size, model.input_size)
    count = size * layout.image_bytes // 4
    return State(values[:count].reshape(shape), values[-count:].reshape(shape) if layout.multistep else None)


def _table(rows: Sequence[Sequence[float] | np.ndarray], dtype: type[np.generic], stride: int) -> np.ndarray:
    """Rows of numbers, each padded with zeros to `stride` bytes."""
    table = np.zeros((len(rows), stride // np.dtype(dtype).itemsize), dtype)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table
