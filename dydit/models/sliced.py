"""The sliced form: one subnetwork with narrow matrices and tokens routed by gather. It computes a sampler step.

It is the PyTorch form of a subnetwork's graph: it has the same inputs (`dydit.bundle.io_spec`) and outputs, and uses
the stored weights. It computes the same values as the masked form, with fewer multiply-adds.

Shapes: B images; rows R = B, or 2B with classifier-free guidance (conditional rows, then those of the null class);
N tokens of hidden size D; L blocks; U units.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dydit.diffusion.sampler_step import sampler_step
from dydit.models.architecture import Slots, UnitLayer, stored_name
from dydit.models.config import ModelConfig, TokenScope
from dydit.models.pointwise import PLAIN, Pointwise
from dydit.models.registry import architecture_of
from dydit.models.routers import TOKEN_ROUTER
from dydit.models.text import TextRows


@dataclass(frozen=True)
class SlicedOutput:
    """`x_prev`, `next_history` [B, C, S, S]; `overflow` int64 [L]; with debug `tokens` bool [L, R, N] and `residuals`
    [L, R, N, D].
    """

    x_prev: Tensor
    next_history: Tensor
    overflow: Tensor
    tokens: Tensor | None = None
    residuals: Tensor | None = None


@dataclass(frozen=True)
class StepTexts:
    """The texts of a step (`io_spec`): `values` [L, texts, 2, tokens, D], `bias` [texts, tokens], `rows` int64 [R]."""

    values: Tensor
    bias: Tensor
    rows: Tensor

    def of_block(self, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [R, tokens, D] of a block, and the bias [R, tokens], of every row."""
        keys, values = self.values[block][self.rows].unbind(1)
        return keys, values, self.bias[self.rows]


@dataclass(frozen=True)
class SlicedBlock:
    """A block's weights for its slots. With consecutive slots, they are views of the stored tensors.

    `layers`: weight and bias of each layer that units own, by name. The weight is [rows of all slots, features], see
    `UnitLayer`. `slots`: slots of each unit group, int64. `router`: the tensors `TOKEN_ROUTER`, which every block
    of a dynamic model has; None in a static model.
    """

    index: int
    layers: Mapping[str, tuple[Tensor, Tensor]]
    slots: tuple[Tensor, ...]
    router: tuple[Tensor, ...] | None

    def bias(self, layer: str) -> Tensor:
        """The bias of a layer."""
        return self.layers[layer][1]


Linear = Callable[[SlicedBlock, UnitLayer, Tensor], Tensor]
"""A function that computes a layer that units own: (block, layer, x [..., in]) -> [..., out]."""


def plain_linear(block: SlicedBlock, layer: UnitLayer, x: Tensor) -> Tensor:
    """Compute a layer on x, in the type of its weight."""
    weight, bias = block.layers[layer.name]
    return F.linear(x.to(weight.dtype), weight if layer.out_major else weight.T, bias)


Branch = Callable[[Tensor, Tensor], Tensor]
"""`branch(tokens [T, D], rows int64 [T])` returns what an MLP adds to tokens of the given rows of the batch."""


class SlicedModel(ABC):
    """One subnetwork on stored weights.

    `slots`: ascending slots by block and unit group. `capacities`: slots for routed tokens per row, by block; by
    default, one for every token. `cfg_channels`: the number of channels that guidance acts on. `linear`: computes
    layers that units own, for callers that observe or quantize their inputs. The model runs on the weights' device and
    in their dtype. If only the layers that units own have a lower precision, only their products do.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        slots: Slots,
        cfg_channels: int,
        capacities: Sequence[int] | None = None,
        linear: Linear | None = None,
    ):
        self.cfg_channels, self.capacities, self._linear = cfg_channels, capacities, linear or plain_linear
        self.config: Any = config
        self._units = {layer.name: layer for layer in config.units.layers}
        self.blocks = [_cut(config, weights, index, each) for index, each in enumerate(slots)]
        self._fixed_shapes, self.pointwise = False, PLAIN
        self._overflow = torch.zeros(0)
        self._text: StepTexts | None = None
        self._tokens: list[Tensor] = []
        self._residuals: list[Tensor] = []
        self._take(weights)

    @abstractmethod
    def _take(self, weights: Mapping[str, Tensor]) -> None:
        """Keep the stored weights that no unit owns and that are needed."""

    @abstractmethod
    def _output(self, x: Tensor, condition: Tensor, gates: Sequence[Tensor] | None) -> Tensor:
        """The model's output [R, C or 2C, S, S] for x [B, C, S, S], condition [R, ...] and gates [units] of each part.

        Calls `linear`, `route` and `finish_block` for each block.
        """

    def with_fixed_shapes(self, pointwise: Pointwise = PLAIN) -> Self:
        """This model with token routing whose shapes do not depend on the data, as CUDA graphs need it.

        With capacities, the tokens of a batch are compacted into `capacity * R` slots by a prefix sum, and empty slots
        compute a token whose result is not used. Without, or with a slot for each token, the MLP computes all tokens,
        and those that are not routed keep their residual. A step then has no operation for which the host waits.
        `pointwise`: what computes between products.
        """
        self._fixed_shapes, self.pointwise = True, pointwise
        return self

    @torch.inference_mode()
    def step(
        self,
        x: Tensor,
        history: Tensor,
        noise: Tensor,
        coefficients: Tensor,
        cfg_scale: Tensor,
        condition: Tensor,
        gates: Tensor | None = None,
        debug: bool = False,
        text_values: Tensor | None = None,
        text_bias: Tensor | None = None,
        text_rows: Tensor | None = None,
    ) -> SlicedOutput:
        """One sampler step on the inputs of a subnetwork's graph.

        x, history, noise [B, C, S, S]; coefficients [8]; cfg_scale []; condition [R, *condition_shape]; gates [U] of
        0 or 1, by slot; the text inputs of `io_spec.subnet_inputs`. With capacities, a block's routed tokens beyond
        `capacity * R` keep their residual and are counted in `overflow`.
        """
        self._overflow = torch.zeros(self.config.depth, dtype=torch.int64, device=x.device)
        self._tokens, self._residuals = [], []
        self._text = None
        if text_values is not None and text_bias is not None and text_rows is not None:
            self._text = StepTexts(text_values, text_bias, text_rows)
        parts = None if gates is None else gates.split([part.group.count for part in self.config.units.parts])
        output = self._output(x, condition, parts)
        state = sampler_step(x, history, output, noise, coefficients, cfg_scale, self.cfg_channels)
        if not debug:
            return SlicedOutput(*state, self._overflow)
        return SlicedOutput(*state, self._overflow, torch.stack(self._tokens), torch.stack(self._residuals))

    def entering_type(self, block: SlicedBlock, layer: str) -> torch.dtype | None:
        """The type in which normalized tokens are given to a layer; None: in that of the stream."""
        return block.layers[layer][0].dtype if self.pointwise.narrow else None

    def linear(self, block: SlicedBlock, layer: str, x: Tensor) -> Tensor:
        """Compute a layer that a block's units own, by its name, on x [..., in]."""
        return self._linear(block, self._units[layer], x)

    def route(self, block: SlicedBlock, x: Tensor, branch: Branch, has_units: bool) -> Tensor:
        """The residual stream [R, N, D] after a branch through which only the routed tokens pass.

        `has_units`: whether the branch has active units. Without them it is only a bias, which needs no token slots.
        """
        assert block.router is not None
        first, first_bias, last, last_bias = block.router
        logits = F.linear(F.relu(F.linear(x, first, first_bias)), last, last_bias)[..., 0]
        if self.config.token_scope is TokenScope.LAYER:
            logits = logits[:, self.config.extra_tokens :].mean(1, keepdim=True).repeat(1, x.shape[1])
        routed = logits > 0
        routed[:, : self.config.extra_tokens].fill_(True)
        self._tokens.append(routed)
        room = None if self.capacities is None or not has_units else self.capacities[block.index] * len(x)
        if self._fixed_shapes:
            return self._in_slots(block, x, routed.flatten(), branch, room)
        chosen, flat = routed.flatten().nonzero()[:, 0], x.flatten(0, 1)
        if room is not None:
            self._overflow[block.index] = max(0, len(chosen) - room)
            chosen = chosen[:room]
        entering = flat[chosen]
        return flat.index_copy(0, chosen, entering + branch(entering, chosen // x.shape[1])).view_as(x)

    def _in_slots(self, block: SlicedBlock, x: Tensor, routed: Tensor, branch: Branch, room: int | None) -> Tensor:
        """The stream after a branch that computes `room` slots, or all tokens if it is None. `routed`: bool [R*N]."""
        flat, tokens = x.flatten(0, 1), x.shape[1]
        ids = torch.arange(len(flat), device=x.device)
        if room is None or room >= len(flat):
            return self.pointwise.kept(flat, branch(flat, ids // tokens), routed).view_as(x)
        slot = routed.cumsum(0) - 1
        fits = routed & (slot < room)
        self._overflow[block.index] = (slot[-1] + 1 - room).clamp(min=0)
        # Tokens without a slot are written behind the last one.
        table = ids.new_zeros(room + 1).scatter_(0, torch.where(fits, slot, room), ids)[:room]
        entering = flat.index_select(0, table)
        return self.pointwise.left(flat, entering, branch(entering, table // tokens), slot, fits).view_as(x)

    def keep_every_token(self, x: Tensor) -> None:
        """Record that all tokens of a block [R, N, D] pass, because no token router decides on them."""
        self._tokens.append(torch.ones_like(x[..., 0], dtype=torch.bool))

    def finish_block(self, x: Tensor) -> None:
        """Record the residual stream [R, N, D] after a block."""
        self._residuals.append(x)


def text_feeds(
    config: ModelConfig, weights: Mapping[str, Tensor], texts: TextRows, labels: Tensor
) -> dict[str, Tensor]:
    """The text inputs of `SlicedModel.step` for rows whose texts have these labels, int64 [R]."""
    distinct, rows = labels.unique(return_inverse=True)
    chosen = texts[distinct]
    values, bias = architecture_of(config).text_values(config, weights, chosen.embeddings, chosen.mask)
    return {"text_values": values, "text_bias": bias, "text_rows": rows}


def _rows(stored: Tensor, slots: Sequence[int]) -> Tensor:
    """The rows of slots, merged: [units, a, ...] -> [len(slots)*a, ...]; a view if the slots are consecutive."""
    first, count = (slots[0], len(slots)) if slots else (0, 0)
    consecutive = list(slots) == list(range(first, first + count))
    chosen = stored[first : first + count] if consecutive else stored[list(slots)]
    return chosen.flatten(0, 1)


def _cut(config: ModelConfig, weights: Mapping[str, Tensor], index: int, slots: Sequence[Sequence[int]]) -> SlicedBlock:
    def of(name: str) -> Tensor:
        return weights[stored_name(index, name)]

    layers = {}
    for group, units in zip(config.units.blocks[index].groups, slots, strict=True):
        for layer in group.layers:
            bias = _rows(of(layer.bias), units) if layer.out_major else of(layer.bias)
            layers[layer.name] = _rows(of(layer.weight), units), bias
    router = tuple(map(of, TOKEN_ROUTER)) if config.dynamic else None
    device = next(iter(weights.values())).device
    slot_tensors = tuple(torch.tensor(list(units), dtype=torch.int64, device=device) for units in slots)
    return SlicedBlock(index, layers, slot_tensors, router)
