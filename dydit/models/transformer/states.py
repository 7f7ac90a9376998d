"""What the readers of state dicts share. Errors do not name the file: the caller does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dydit.checkpoints.conventions import Stated, require_side
from dydit.checkpoints.safe_load import listed
from dydit.errors import CheckpointError
from dydit.models.config import Routers

_EXPECTED = {
    "DiT": "an official DiT, a DyDiT training file, a diffusers DiT folder or a dydit file",
    "PixArt-alpha": "an original PixArt-alpha, a diffusers folder of it or a dydit file",
    "U-ViT": "an official U-ViT, a training folder of it or a dydit file",
}


def shape_of(state: Mapping[str, Tensor], name: str, dimensions: int, title: str) -> tuple[int, ...]:
    """The shape of a tensor. Raises `CheckpointError` if it is absent, empty or has other `dimensions`."""
    if name not in state:
        raise CheckpointError(
            f"is not a checkpoint of a {title}: it has no {name}; it holds {listed(state) or 'no tensors'} "
            f"(expected {_EXPECTED[title]})"
        )
    shape = tuple(state[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(
            f"has {name} of shape {list(shape)}; expected {dimensions} dimensions, none of them empty"
        )
    return shape


def side_of_positions(tokens: int, patch_size: int, stated: Stated, given: int | None) -> int:
    """The side of the inputs of a model whose position embedding has `tokens`, all of them patches.

    Raises `CheckpointError` if that is no square, or not what the user or the training arguments say.
    """
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise CheckpointError(f"has a pos_embed of {tokens} tokens; expected a square number")
    side *= patch_size
    if given not in (None, side):
        raise CheckpointError(f"has a pos_embed of inputs with a side of {side}, not {given}; remove --input-size")
    require_side(stated, side)
    return side


def rebuilt_class_table(
    table: Tensor, kept: Sequence[int | None], null: int | None, std: float, generator: torch.Generator
) -> Tensor:
    """A class table with a row for each new class: the row of the class in `kept`, or normal values of deviation `std`.

    `null`: the row for "no class", which becomes the last one.
    """
    new = torch.randn(len(kept), table.shape[1], generator=generator).to(table) * std
    for row, old in enumerate(kept):
        if old is not None:
            new[row] = table[old]
    return new if null is None else torch.cat([new, table[null : null + 1]])


def learns_sigma(rows: int, patch_size: int, channels: int) -> bool:
    """Whether a final layer of `rows` also has the variance. Raises `CheckpointError` for any other number of rows."""
    ratio = rows / (patch_size**2 * channels)
    if ratio not in (1, 2):
        raise CheckpointError(
            f"has a final layer of {rows} rows; expected {patch_size**2 * channels} (epsilon of {channels} channels in "
            f"patches of {patch_size}) or twice that (with the variance)"
        )
    return ratio == 2


def block_count(numbers: set[int], what: str) -> int:
    """The number of blocks, from their numbers in names."""
    # A few gaps are reported as missing tensors, by name. A very large number would make a very long list.
    if not numbers or max(numbers) >= 2 * len(numbers):
        raise CheckpointError(f"is not a checkpoint of a {what}: its blocks are not numbered from 0 on")
    return max(numbers) + 1


def choose_heads(
    hidden: int,
    rows: int | None,
    published: Sequence[int],
    given: int | None = None,
    hint: int | None = None,
) -> tuple[int, Routers]:
    """The head count H, and the router layout for it.

    `rows`: rows of the width routers, which are H-1 or H; None for a static model. The first of these that is possible
    is taken: `given` by the user; the `hint` of the training arguments; that of a `published` model of these sizes; for
    routers, the only one of the two counts that divides `hidden`. Raises `CheckpointError` if there is none.
    """
    if rows is None:
        layouts = {heads: Routers.NONE for heads in range(1, hidden + 1) if hidden % heads == 0}
    else:
        layouts = {rows + 1: Routers.FIRST_ON, rows: Routers.ALL_ROUTED}
        layouts = {heads: layout for heads, layout in layouts.items() if heads > 0 and hidden % heads == 0}
    if given is not None and given not in layouts:
        fitting = "a divisor of it" if rows is None else " or ".join(map(str, layouts)) or "no head count"
        raise CheckpointError(f"cannot have {given} heads: its hidden size {hidden} and its routers allow {fitting}")
    for heads in (given, hint, *published):
        if heads in layouts:
            return heads, layouts[heads]
    if rows is not None and len(layouts) == 1:
        return next(iter(layouts.items()))
    if rows is not None and not layouts:
        raise CheckpointError(
            f"has routers of {rows} rows: neither {rows} nor {rows + 1} heads divide {hidden} channels"
        )
    options = "" if rows is None else f" ({' or '.join(map(str, sorted(layouts)))})"
    raise CheckpointError(
        f"does not show its number of heads{options}; give it with --num-heads (num_heads=), here or to dydit convert"
    )


def require_stated_heads(stated: Stated, heads: int, given: int | None) -> None:
    """Raise `CheckpointError` if training arguments say another number of heads, and the user none."""
    said = stated.get("num_heads")
    if type(said) is int and given is None and said != heads:
        raise CheckpointError(
            f"contradicts itself: its training arguments say {said} heads, but its tensors allow {heads}; "
            "give --num-heads"
        )
