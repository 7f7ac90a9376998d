"""How a branch of a block reads the residual stream and joins it, as ONNX: the only part in which blocks differ.

adaLN-Zero (DiT, PixArt)     x + gate * f(LN(x) * scale + shift)     vectors from the condition, one set per row
affine (U-ViT)               x + f(LN(x) * weight + bias)            weights of the model
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from dydit.graph.ops import Ops

Named = Mapping[str, ir.Value]


def modulate(ops: Ops, x: ir.Value, ones: ir.Value, shift: ir.Value, scale: ir.Value, epsilon: float) -> ir.Value:
    """LN(x) * scale + shift. `scale` already contains the 1 of adaLN."""
    normed = ops.LayerNormalization(x, ones, axis=-1, epsilon=epsilon)
    return ops.Add(ops.Mul(normed, scale), shift)


@dataclass(frozen=True)
class BranchNorm(ABC):
    """`inputs`: the inputs of a branch's function that it reads. `joining`: those that it needs to join the stream.

    Methods take the function's inputs by name. `EPSILON`: of the LayerNorm.
    """

    inputs: ClassVar[tuple[str, ...]]
    joining: ClassVar[tuple[str, ...]] = ()
    EPSILON: ClassVar[float]

    @abstractmethod
    def read(self, ops: Ops, of: Named, x: ir.Value) -> ir.Value:
        """The normalized stream, of the shape of x."""

    @abstractmethod
    def scaled(self, ops: Ops, of: Named, branch: ir.Value) -> ir.Value:
        """What is added to the stream, for the fp32 output of the branch."""

    def at_rows(self, ops: Ops, of: Named, rows: ir.Value) -> Named:
        """The inputs for single tokens, [n, D], that are from the given rows of the batch [n]."""
        return of


@dataclass(frozen=True)
class Modulated(BranchNorm):
    """adaLN-Zero. Vectors are [rows, 1, D], or [n, D] for single tokens; `ones` [D] has no effect."""

    inputs = ("ones", "shift", "scale", "gate")
    joining = ("gate",)
    EPSILON = 1e-6

    def read(self, ops: Ops, of: Named, x: ir.Value) -> ir.Value:
        return modulate(ops, x, of["ones"], of["shift"], of["scale"], self.EPSILON)

    def scaled(self, ops: Ops, of: Named, branch: ir.Value) -> ir.Value:
        return ops.Mul(of["gate"], branch)

    def at_rows(self, ops: Ops, of: Named, rows: ir.Value) -> Named:
        def gathered(name: str) -> ir.Value:
            return ops.Gather(ops.Squeeze(of[name], ops.constant([1])), rows, axis=0)

        return {**of, **{name: gathered(name) for name in self.inputs[1:]}}


@dataclass(frozen=True)
class Affine(BranchNorm):
    """A LayerNorm with weight and bias [D]. The branch is added as it is."""

    inputs = ("norm_weight", "norm_bias")
    EPSILON = 1e-5

    def read(self, ops: Ops, of: Named, x: ir.Value) -> ir.Value:
        return ops.LayerNormalization(x, of["norm_weight"], of["norm_bias"], axis=-1, epsilon=self.EPSILON)

    def scaled(self, ops: Ops, of: Named, branch: ir.Value) -> ir.Value:
        return branch
