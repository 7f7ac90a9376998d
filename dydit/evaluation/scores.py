"""Inception Score, precision and recall of features, as the ADM evaluator (Dhariwal & Nichol 2021) defines them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SPLIT = 5000
"""Images of one part in the Inception Score."""
NEIGHBOURS = 3
"""Which nearest neighbour of an image bounds its part of the manifold."""
_BLOCK = 1 << 26
"""Distances in memory at a time: 256 MiB."""


def inception_score(logits: Tensor, split: int = SPLIT) -> float:
    """Inception Score (Salimans et al. 2016) of logits [n, classes]: exp of the mean KL(p(y|x) || p(y)), float64.

    Computed for parts of `split` images in their order, and averaged; the last part may be smaller.
    """
    scores = []
    for part in logits.split(split):
        log_p = part.double().log_softmax(1)
        p = log_p.exp()
        divergence = (p * (log_p - p.mean(0, keepdim=True).log())).sum(1)
        scores.append(divergence.mean().exp())
    return float(torch.stack(scores).mean())


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares, 0..1. `precision`: of the samples that lie on the reference's manifold; `recall`: the reverse."""

    precision: float
    recall: float


def precision_recall(samples: Tensor, reference: Tensor, neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """Precision and recall (Kynkäänniemi et al. 2019) of features [n, F] and [m, F], on the device of the features.

    The manifold of a set consists of a ball for each image that reaches to its `neighbours`-th nearest neighbour. Both
    sets need more images than `neighbours`.
    """
    return PrecisionRecall(
        precision=_share_inside(samples, reference, _radii(reference, neighbours)),
        recall=_share_inside(reference, samples, _radii(samples, neighbours)),
    )


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """The distance of each image to its `neighbours`-th nearest neighbour. The nearest image of all is itself."""
    blocks = features.split(_rows(features))
    return torch.cat([torch.cdist(block, features).kthvalue(neighbours + 1).values for block in blocks])


def _share_inside(features: Tensor, centres: Tensor, radii: Tensor) -> float:
    blocks = features.split(_rows(centres))
    inside = torch.cat([(torch.cdist(block, centres) <= radii).any(dim=1) for block in blocks])
    return float(inside.double().mean())


def _rows(centres: Tensor) -> int:
    return max(1, _BLOCK // len(centres))
