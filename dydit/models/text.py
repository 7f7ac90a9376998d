"""Texts that condition a model, as PyTorch tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TextRows:
    """A text for each row of a batch, encoded by a language model.

    `embeddings` f32 [R, L, channels]: the language model's output for L tokens; `mask` bool [R, L]: False for padding.
    """

    embeddings: Tensor
    mask: Tensor

    @classmethod
    def of(cls, embeddings: np.ndarray, mask: np.ndarray) -> TextRows:
        """The same from NumPy arrays."""
        return cls(torch.from_numpy(embeddings), torch.from_numpy(mask))

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, rows: Tensor) -> TextRows:
        """The texts with these indices, int64 [R]."""
        return TextRows(self.embeddings[rows], self.mask[rows])

    def to(self, device: torch.device) -> TextRows:
        """The same on a device."""
        return TextRows(self.embeddings.to(device), self.mask.to(device))
