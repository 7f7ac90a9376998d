from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.data.dataset import EncodedCaptions, Examples
from dydit.data.small_sets import Digits
from dydit.diffusion.process import NoiseSchedule, Prediction, Process
from dydit.models.config import Space, TextSpec
from dydit.training.draws import Batch, BatchSource, Purpose, sample_indices, stratified_times, stream

FLOW = Process(schedule=NoiseSchedule.FLOW, prediction=Prediction.VELOCITY)
VP_SDE = Process(schedule=NoiseSchedule.VP_SDE)


class Captioned:
    """Images whose pixels tell their index, with captions of one token and an empty caption of two."""

    shape, space, classes, class_names = (1, 4, 4), Space.PIXELS, 3, None
    text = TextSpec(3, 2)

    def __len__(self) -> int:
        return 40

    def batch(self, indices: np.ndarray, generators: Sequence[np.random.Generator]) -> Examples:
        count = len(indices)
        images = np.broadcast_to(indices[:, None, None, None], (count, *self.shape)).astype(np.float32)
        embeddings = np.ones((count, 3, 2), np.float32)
        return Examples(images, indices % 3, EncodedCaptions(embeddings, np.tile([True, False, False], (count, 1))))

    def no_caption(self) -> EncodedCaptions:
        return EncodedCaptions(np.full((1, 2, 2), 7, np.float32), np.ones((1, 2), bool))


def generators(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, each]) for each in range(count)]


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
    timesteps = stratified_times(generators(count, seed), Process(), first)
    assert (timesteps == quarters * 250 + [each.integers(0, 250) for each in generators(count, seed)]).all()
    for process, last in ((FLOW, 1), (VP_SDE, 999)):
        times = stratified_times(generators(count, seed), process, first)
        assert times.dtype == np.float32
        assert (times >= quarters / 4 * last).all() and (times <= (quarters + 1) / 4 * last).all()


def test_timesteps_cover_their_quarters() -> None:
    timesteps = stratified_times([np.random.default_rng(0)] * 40_000, Process(), 0)
    assert timesteps.dtype == np.int64
    assert len(np.unique(timesteps)) == 1000 and timesteps.min() == 0 and timesteps.max() == 999


@pytest.mark.parametrize(("process", "last"), [(FLOW, 1), (VP_SDE, 999)])
def test_continuous_times_are_uniform(process: Process, last: int) -> None:
    times = np.sort(stratified_times([np.random.default_rng(0)] * 40_000, process, 0)) / last
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


def test_a_batch_depends_on_seed_and_iteration_alone(source: Callable[..., BatchSource]) -> None:
    reference = source().batch(7)
    late = source()
    late.batch(3)
    assert same(late.batch(7), reference)
    assert not (source().batch(8).noise == reference.noise).any()
    assert not (source(seed=4).batch(7).noise == reference.noise).any()


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("process", [Process(), FLOW])
def test_processes_share_the_batch_of_one(source: Callable[..., BatchSource], processes: int, process: Process) -> None:
    whole = source(diffusion=process, data=Captioned()).batch(5)
    parts = [
        source(diffusion=process, data=Captioned(), process=each, processes=processes).batch(5)
        for each in range(processes)
    ]
    for name in ("x0", "labels", "times", "noise"):
        assert (np.concatenate([getattr(part, name) for part in parts]) == getattr(whole, name)).all(), name
    captions = [part.captions for part in parts]
    assert (np.concatenate([each.embeddings for each in captions if each]) == whole.captions.embeddings).all()  # type: ignore[union-attr]
    assert {part.gate_seed for part in parts} == {whole.gate_seed}
    assert [part.first for part in parts] == [each * 16 // processes for each in range(processes)]


@pytest.mark.parametrize(("processes", "parts"), [(1, 4), (2, 2), (4, 2)])
def test_parts_of_a_batch_are_ranges_of_it(source: Callable[..., BatchSource], processes: int, parts: int) -> None:
    """A part has the same images for any number of processes."""
    whole = source().batch(5)
    for part in range(parts):
        shares = [source(process=each, processes=processes).batch(5, part, parts) for each in range(processes)]
        rows = slice(16 // parts * part, 16 // parts * (part + 1))
        for name in ("x0", "labels", "times", "noise"):
            assert (np.concatenate([getattr(share, name) for share in shares]) == getattr(whole, name)[rows]).all()
        assert [share.first for share in shares] == [rows.start + each * len(shares[0].x0) for each in range(processes)]


def test_dropped_captions_are_the_empty_one(source: Callable[..., BatchSource]) -> None:
    batch = source(data=Captioned(), null_class=3, batch_size=40).batch(0)
    assert batch.captions is not None
    dropped = batch.labels == 3
    assert 5 < dropped.sum() < 35
    assert (batch.captions.embeddings[dropped] == [[7, 7], [7, 7], [0, 0]]).all()
    assert (batch.captions.mask[dropped] == [True, True, False]).all()
    assert (batch.captions.mask[~dropped] == [True, False, False]).all() and (
        batch.captions.embeddings[~dropped] == 1
    ).all()


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


def test_streams_of_different_purposes_differ() -> None:
    draws = {stream(0, purpose, 1).integers(2**60) for purpose in Purpose}
    assert len(draws) == len(Purpose)
