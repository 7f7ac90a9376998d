"""Which model a state dict under the published names describes, and whether it describes it completely.

Sizes are read from the shapes of the tensors. The head count is not in them: it comes from the routers, a published
preset, the training arguments or the user, and is never guessed. Errors do not name the file: the caller does.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dydit.errors import CheckpointError, ConfigError
from dydit.models.config import ModelConfig, Routers, parse_config, preset
from dydit.models.dit.model import DiT
from dydit.models.safe_load import listed, shown

Shapes = dict[str, tuple[int, ...]]

# Far above any model that can be run. The configuration in a damaged or hostile file could claim anything, and the time
# that checking it takes grows with these.
LIMITS = {
    "depth": 10_000,
    "hidden_size": 1 << 16,
    "tokens": 1 << 16,
    "patch_size": 1 << 8,
    "in_channels": 1 << 16,
    "num_classes": 1 << 24,
}

_BLOCK = re.compile(r"blocks\.([0-9]{1,6})\.")
_ROUTER = re.compile(r"blocks\.[0-9]+\.(attn_rate|mlp_rate|token_selection)\.")
_PRESETS = [preset(f"{size}/2") for size in ("S", "B", "L", "XL")]


def expected_shapes(config: ModelConfig) -> Shapes:
    """Published name -> shape of every tensor that a model of `config` has, `pos_embed` included.

    Raises `CheckpointError` for sizes beyond `LIMITS`.
    """
    for size, limit in LIMITS.items():
        if getattr(config, size) > limit:
            raise CheckpointError(f"describes a model with {size} above {limit}; no such model can be run")
    with torch.device("meta"):
        single = DiT(config.model_copy(update={"depth": 1})).state_dict()
    shapes: Shapes = {}
    for index in range(config.depth):
        for name, tensor in single.items():
            shapes[name.replace("blocks.0.", f"blocks.{index}.")] = tuple(tensor.shape)
    return shapes


def require_fit(state: Mapping[str, Tensor], expected: Shapes) -> None:
    """Raise `CheckpointError` unless `state` has exactly the `expected` tensors, with their shapes and finite values.

    Values are checked tensor by tensor, so a memory-mapped state is read but not held.
    """
    faults = []
    if missing := [name for name in expected if name not in state]:
        faults.append(f"{len(missing)} missing ({listed(missing)})")
    if surplus := [name for name in state if name not in expected]:
        faults.append(f"{len(surplus)} unknown ({listed(surplus)})")
    if faults:
        raise CheckpointError(f"does not hold the tensors of the model it describes: {'; '.join(faults)}")
    wrong = [name for name, shape in expected.items() if tuple(state[name].shape) != shape]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"has the wrong shape in {_tensors(wrong)}: {shown(name)} is {list(state[name].shape)}, "
            f"expected {list(expected[name])}"
        )
    if bad := [name for name in expected if not _finite(state[name])]:
        raise CheckpointError(f"has NaN or infinite values in {_tensors(bad)}; use an earlier save")


def _tensors(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({listed(names)})"


def _finite(tensor: Tensor) -> bool:
    """Whether every value is finite as fp32; `aminmax` propagates NaN and needs no temporary of the tensor's size."""
    return tensor.numel() == 0 or all(math.isfinite(bound.float()) for bound in tensor.aminmax())


def infer_config(
    state: Mapping[str, Tensor], arguments: argparse.Namespace | None = None, num_heads: int | None = None
) -> ModelConfig:
    """The configuration that the shapes in `state` describe; raises `CheckpointError` where they describe no DiT.

    `arguments`: those of the training run, as in a DyDiT training file; `num_heads`: what the user said, which counts
    before all else.
    """
    patch = _shape(state, "x_embedder.proj.weight", 4)
    hidden, channels, patch_size = patch[0], patch[1], patch[2]
    tokens = _shape(state, "pos_embed", 3)[1]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise CheckpointError(f"has a pos_embed of {tokens} tokens; expected a square number")
    depth = _depth(state)
    rows = _shape(state, "blocks.0.attn_rate.router.weight", 2)[0] if any(map(_ROUTER.match, state)) else None
    heads, routers = choose_heads(hidden, depth, rows, num_heads, _heads_from(arguments, hidden))
    values = {
        "hidden_size": hidden,
        "depth": depth,
        "num_heads": heads,
        "patch_size": patch_size,
        "input_size": side * patch_size,
        "in_channels": channels,
        "num_classes": _shape(state, "y_embedder.embedding_table.weight", 2)[0] - 1,
        "learn_sigma": _learns_sigma(_shape(state, "final_layer.linear.weight", 2)[0], patch_size, channels),
        "routers": routers,
    }
    return parse_config(ModelConfig, values)


def choose_heads(
    hidden: int, depth: int, rows: int | None, given: int | None = None, hint: int | None = None
) -> tuple[int, Routers]:
    """The head count H, and the router layout that goes with it.

    `rows`: those of the width routers, which are H-1 or H (PAPER, "TDW router"), None for a static DiT. In this order:
    `given` by the user; the `hint` of the training arguments; a preset of this hidden size and depth; for routers, the
    only one of the two counts that divides `hidden`. Raises `CheckpointError` where that leaves it open.
    """
    if rows is None:
        layouts = {heads: Routers.NONE for heads in range(1, hidden + 1) if hidden % heads == 0}
    else:
        layouts = {rows + 1: Routers.FIRST_ON, rows: Routers.ALL_ROUTED}
        layouts = {heads: layout for heads, layout in layouts.items() if heads > 0 and hidden % heads == 0}
    if given is not None and given not in layouts:
        fitting = "a divisor of it" if rows is None else " or ".join(map(str, layouts)) or "no head count"
        raise CheckpointError(f"cannot have {given} heads: its hidden size {hidden} and its routers allow {fitting}")
    published = [size.num_heads for size in _PRESETS if (size.hidden_size, size.depth) == (hidden, depth)]
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
    raise CheckpointError(f"does not tell its number of heads{options}; give it with --num-heads (num_heads=)")


def _heads_from(arguments: argparse.Namespace | None, hidden: int) -> int | None:
    """The head count that training arguments name: `num_heads`, or that of a published `model` of this hidden size."""
    values = {} if arguments is None else vars(arguments)
    heads, model = values.get("num_heads"), values.get("model")
    if type(heads) is int:
        return heads
    if isinstance(model, str):
        with contextlib.suppress(ConfigError):
            size = preset(model)
            return size.num_heads if size.hidden_size == hidden else None
    return None


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(
            f"is not a checkpoint of a DiT: it has no {name}; it holds {listed(state) or 'no tensors'} "
            "(expected an official DiT, a DyDiT training file, a diffusers DiT folder or a dydit file)"
        )
    shape = tuple(state[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(
            f"has {name} of shape {list(shape)}; expected {dimensions} dimensions, none of them empty"
        )
    return shape


def _depth(state: Mapping[str, Tensor]) -> int:
    numbers = {int(match[1]) for match in map(_BLOCK.match, state) if match}
    # A few gaps are reported as missing tensors, by name; a wild number would only make a long list of them.
    if not numbers or max(numbers) >= 2 * len(numbers):
        raise CheckpointError("is not a checkpoint of a DiT: its blocks are not numbered from 0 on")
    return max(numbers) + 1


def _learns_sigma(rows: int, patch_size: int, channels: int) -> bool:
    ratio = rows / (patch_size**2 * channels)
    if ratio not in (1, 2):
        raise CheckpointError(
            f"has a final layer of {rows} rows; expected {patch_size**2 * channels} (epsilon of {channels} channels in "
            f"patches of {patch_size}) or twice that (with the variance)"
        )
    return ratio == 2
