from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.diffusion.process import NoiseSchedule, Prediction, Process
from dydit.training.data import Digits
from dydit.training.draws import Batch, BatchSource, Purpose, sample_indices, stratified_times, stream

FLOW = Process(schedule=NoiseSchedule.FLOW, prediction=Prediction.VELOCITY)
VP_SDE = Process(schedule=NoiseSchedule.VP_SDE)


class Ramp:
    """Images whose pixels tell their index and column; mirrored ones are told apart."""

    shape = (1, 4, 4)
    num_classes = 3

    def __init__(self, flip: bool):
        self.flip = flip

    def __len__(self) -> int:
        return 40

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        columns = np.arange(4, dtype=np.float32) / 10
        return np.broadcast_to(indices[:, None, None, None] + columns, (len(indices), 1, 4, 4)), indices % 3


@pytest.fixture
def source() -> Callable[..., BatchSource]:
    def make(**changes: object) -> BatchSource:
        values = {"data": Digits(), "seed": 3, "batch_size": 16, "label_dropout": 0.5, "null_class": 10}
        values = {**values, "diffusion": Process(), **changes}
        return BatchSource(**values)  # type: ignore[arg-type]

    return make


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.integers(1, 13), st.integers(1, 20))
def test_every_image_is_seen_once_an_epoch_whatever_the_batch(seed: int, batch: int, total: int) -> None:
    epochs = 3
    indices = np.concatenate([sample_indices(seed, at, batch, total) for at in range(0, epochs * total, batch)])
    for epoch in range(epochs):
        assert sorted(indices[epoch * total : (epoch + 1) * total]) == list(range(total))


def test_epochs_are_shuffled_differently() -> None:
    first, second = sample_indices(0, 0, 100, 100), sample_indices(0, 100, 100, 100)
    assert (first != second).any() and (first != np.arange(100)).any()
    assert (first != sample_indices(1, 0, 100, 100)).any()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.integers(0, 50), st.integers(1, 64))
def test_timesteps_come_from_the_quarters_in_turn(seed: int, first: int, count: int) -> None:
    quarters = (first + np.arange(count)) % 4
    timesteps = stratified_times(np.random.default_rng(seed), Process(), first, count)
    assert (timesteps == quarters * 250 + np.random.default_rng(seed).integers(0, 250, count)).all()
    for process, last in ((FLOW, 1), (VP_SDE, 999)):
        times = stratified_times(np.random.default_rng(seed), process, first, count)
        assert times.dtype == np.float32
        assert (times >= quarters / 4 * last).all() and (times <= (quarters + 1) / 4 * last).all()


def test_timesteps_cover_their_quarters() -> None:
    timesteps = stratified_times(np.random.default_rng(0), Process(), 0, 40_000)
    assert timesteps.dtype == np.int64
    assert len(np.unique(timesteps)) == 1000 and timesteps.min() == 0 and timesteps.max() == 999


@pytest.mark.parametrize(("process", "last"), [(FLOW, 1), (VP_SDE, 999)])
def test_continuous_times_are_uniform(process: Process, last: int) -> None:
    times = np.sort(stratified_times(np.random.default_rng(0), process, 0, 40_000)) / last
    assert np.abs(times - np.arange(40_000) / 40_000).max() < 0.01
    assert len(np.unique(times)) > 39_000


def test_batches_of_all_processes_differ_in_their_times_alone(source: Callable[..., BatchSource]) -> None:
    reference = source().batch(7)
    for process in (FLOW, VP_SDE):
        batch = source(diffusion=process).batch(7)
        assert same(batch, source(diffusion=process).batch(7)), "a pure function of seed and iteration"
        assert (batch.x0 == reference.x0).all() and (batch.labels == reference.labels).all()
        assert batch.times.dtype == np.float32 and not (batch.times == source(diffusion=process).batch(8).times).any()


def same(a: Batch, b: Batch) -> bool:
    arrays = ("x0", "labels", "times", "noise")
    return a.gate_seed == b.gate_seed and all((getattr(a, name) == getattr(b, name)).all() for name in arrays)


def test_a_batch_depends_on_seed_iteration_and_process_alone(source: Callable[..., BatchSource]) -> None:
    reference = source().batch(7)
    late = source()
    late.batch(3)
    assert same(late.batch(7), reference)
    assert not (source().batch(8).noise == reference.noise).any()
    assert not (source(seed=4).batch(7).noise == reference.noise).any()
    other = source(processes=2, process=1).batch(7)
    assert not (other.noise == reference.noise[8:]).any()


def test_processes_share_the_images_and_keep_the_quarters(source: Callable[..., BatchSource]) -> None:
    whole = source(label_dropout=0.0).batch(5)
    parts = [source(label_dropout=0.0, process=process, processes=4).batch(5) for process in range(4)]
    assert (np.concatenate([part.x0 for part in parts]) == whole.x0).all()
    assert (np.concatenate([part.labels for part in parts]) == whole.labels).all()
    assert (np.concatenate([part.times for part in parts]) // 250 == whole.times // 250).all()
    assert len({part.gate_seed for part in parts}) == 4


def test_labels_are_dropped_at_their_rate(source: Callable[..., BatchSource]) -> None:
    labels = np.concatenate([source(label_dropout=0.3).batch(i).labels for i in range(100)])
    assert 0.25 < (labels == 10).mean() < 0.35
    assert (source(label_dropout=0.0).batch(0).labels < 10).all()
    assert (source(label_dropout=1.0).batch(0).labels == 10).all()


def test_noise_is_normal(source: Callable[..., BatchSource]) -> None:
    noise = np.concatenate([source().batch(i).noise for i in range(20)])
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_the_probe_keeps_its_labels_and_stays(source: Callable[..., BatchSource]) -> None:
    assert same(source().probe(32), source().probe(32))
    assert (source().probe(32).labels < 10).all()


def test_images_are_mirrored_only_where_the_data_says_so(source: Callable[..., BatchSource]) -> None:
    plain = source(data=Ramp(flip=False)).batch(0).x0
    assert (np.diff(plain[:, 0, 0]) > 0).all()
    rising = (np.diff(source(data=Ramp(flip=True), batch_size=40).batch(0).x0[:, 0, 0]) > 0).all(1)
    assert 5 < rising.sum() < 35


def test_streams_of_different_purposes_differ() -> None:
    draws = {stream(0, purpose, 1).integers(2**60) for purpose in Purpose}
    assert len(draws) == len(Purpose)
