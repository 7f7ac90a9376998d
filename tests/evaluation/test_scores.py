"""The scores of features, against torch-fidelity's, closed forms and the evaluator of ADM."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dydit.evaluation import scores
from dydit.evaluation.frechet import Normal
from dydit.evaluation.scores import inception_score, precision_recall


def features(seed: int, count: int, size: int = 12) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def test_the_frechet_distance_is_that_of_torch_fidelity(fidelity: SimpleNamespace) -> None:
    a, b = features(0, 90), 1.3 * features(1, 70) + 0.2
    theirs = fidelity.fid.fid_statistics_to_metric(
        *(fidelity.fid.fid_features_to_statistics(each.double()) for each in (a, b)), verbose=False
    )
    ours = Normal.fit(a.numpy()).distance(Normal.fit(b.numpy()))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)


@pytest.mark.parametrize(("count", "split"), [(40, 40), (40, 10)])
def test_the_inception_score_is_that_of_torch_fidelity(fidelity: SimpleNamespace, count: int, split: int) -> None:
    logits = 2 * features(3, count, 30)
    theirs = fidelity.isc.isc_features_to_metric(logits, splits=count // split, shuffle=False)
    assert inception_score(logits, split) == pytest.approx(theirs["inception_score_mean"], rel=1e-12)


def test_the_last_part_of_the_inception_score_may_be_smaller() -> None:
    """As in the ADM evaluator, whose code this is, up to the dtype."""
    logits = features(4, 25, 8)
    preds, parts = logits.double().softmax(1).numpy(), []
    for first in range(0, len(preds), 10):
        part = preds[first : first + 10]
        kl = part * (np.log(part) - np.log(np.expand_dims(np.mean(part, 0), 0)))
        parts.append(np.exp(np.mean(np.sum(kl, 1))))
    assert inception_score(logits, 10) == pytest.approx(np.mean(parts), rel=1e-12)


@given(st.integers(1, 6), st.integers(1, 40))
def test_the_inception_score_of_sure_and_even_classes_is_their_number(classes: int, repeats: int) -> None:
    logits = 1e4 * torch.eye(classes).repeat(repeats, 1)
    assert inception_score(logits) == pytest.approx(classes, rel=1e-9)


@given(st.integers(0, 100), st.floats(0.5, 2), st.integers(5, 40), st.integers(5, 40))
def test_precision_and_recall_are_those_of_torch_fidelity(
    fidelity: SimpleNamespace, seed: int, scale: float, ours: int, theirs: int
) -> None:
    samples, reference = scale * features(seed, ours), features(seed + 1, theirs)
    precision, recall = fidelity.prc.calculate_precision_recall_full(samples, reference)
    found = precision_recall(samples, reference)
    assert (found.precision, found.recall) == (pytest.approx(precision), pytest.approx(recall))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, reference = features(7, 50, 5) + 0.7, features(8, 30, 5)
    whole = precision_recall(samples, reference)
    assert 0 < whole.precision < 1 and 0 < whole.recall < 1 and whole.precision != whole.recall
    monkeypatch.setattr(scores, "_BLOCK", 7 * 30)
    assert precision_recall(samples, reference) == whole


def test_far_samples_have_neither_precision_nor_recall() -> None:
    reference = features(9, 20)
    assert precision_recall(reference.clone(), reference) == scores.PrecisionRecall(1.0, 1.0)
    assert precision_recall(reference + 1000, reference) == scores.PrecisionRecall(0.0, 0.0)
