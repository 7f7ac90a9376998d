"""Which model a state dict under the published names describes, and whether it describes it completely.

Sizes are read from the shapes of the tensors. The head count is not in them: it comes from the routers, a published
preset, the training arguments or the user, and is never guessed. Errors do not name the file: the caller does.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dydit.checkpoints.conventions import Stated, require_side, require_sigma
from dydit.checkpoints.safe_load import listed, shown
from dydit.errors import CheckpointError, ConfigError
from dydit.models.config import ModelConfig, Routers, parse_config, preset
from dydit.models.dit.model import DiT

Shapes = dict[str, tuple[int, ...]]
POSITIONS, LABELS = "pos_embed", "y_embedder.embedding_table.weight"
IMAGENET = 1000

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
_MATRIX = re.compile(r"blocks\.[0-9]+\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight$")
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


def require_trained(state: Mapping[str, Tensor], entry: str) -> tuple[str, ...]:
    """Raise `CheckpointError` where all matrices of all blocks are zeros; `entry`: where the weights lay in the file.

    That is what an average holds that was set up and never updated. (One of a single block may be pruned; matrices that
    start from zero, those of adaLN and of the final layer, say nothing.) Returns what the user should know: a final
    layer of zeros is that of a model before its training, whose output is zero.
    """
    matrices = [name for name in state if _MATRIX.match(name)]
    if not any(bool(state[name].any()) for name in matrices):
        hint = f" under `{shown(entry)}`; take others with --weights (weights=), such as model" if entry else ""
        raise CheckpointError(f"holds only zeros in the weights of its blocks{hint}: it is no trained model")
    if not bool(state["final_layer.linear.weight"].any()):
        return ("its final layer is all zeros, as before any training: it predicts nothing",)
    return ()


def _tensors(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({listed(names)})"


def _finite(tensor: Tensor) -> bool:
    """Whether every value is finite as fp32; `aminmax` propagates NaN and needs no temporary of the tensor's size."""
    return tensor.numel() == 0 or all(math.isfinite(bound.float()) for bound in tensor.aminmax())


@dataclass(frozen=True)
class Given:
    """What the user says of a file, which counts before what the file says or leaves open."""

    num_heads: int | None = None
    weights: str | None = None
    num_classes: int | None = None
    input_size: int | None = None

    def require_same(self, config: ModelConfig) -> None:
        """Raise `CheckpointError` where it contradicts the configuration that a file has."""
        for option in ("num_heads", "num_classes", "input_size"):
            value, own = getattr(self, option), getattr(config, option)
            if value is not None and value != own:
                what = {"num_heads": "heads", "num_classes": "classes", "input_size": "as the side of its inputs"}[
                    option
                ]
                raise CheckpointError(
                    f"says that it has {own} {what}, not {value}; remove --{option.replace('_', '-')}"
                )


@dataclass(frozen=True)
class Inferred:
    """A configuration, and what was assumed to come to it, in sentences for the user."""

    config: ModelConfig
    notes: tuple[str, ...] = ()


def infer_config(state: Mapping[str, Tensor], stated: Stated | None = None, given: Given | None = None) -> Inferred:
    """The configuration that the shapes in `state` describe; raises `CheckpointError` where they describe no DiT.

    `stated`: by the training run, as `conventions.stated_by` finds it; what it contradicts is refused.
    """
    stated, given = stated or {}, given or Given()
    patch = _shape(state, "x_embedder.proj.weight", 4)
    hidden, channels, patch_size = patch[0], patch[1], patch[2]
    depth = _depth(state)
    rows = _shape(state, "blocks.0.attn_rate.router.weight", 2)[0] if any(map(_ROUTER.match, state)) else None
    heads, routers = choose_heads(hidden, depth, rows, given.num_heads, _heads_from(stated, hidden))
    said = stated.get("num_heads")
    if type(said) is int and given.num_heads is None and said != heads:
        raise CheckpointError(
            f"contradicts itself: its training arguments say {said} heads, its tensors allow {heads}; give --num-heads"
        )
    learn_sigma = _learns_sigma(_shape(state, "final_layer.linear.weight", 2)[0], patch_size, channels)
    require_sigma(stated, learn_sigma)
    side, side_notes = _input_size(state, patch_size, stated, given.input_size)
    classes = class_table(_shape(state, LABELS, 2)[0], stated, given.num_classes)
    values = {
        "hidden_size": hidden,
        "depth": depth,
        "num_heads": heads,
        "patch_size": patch_size,
        "input_size": side,
        "in_channels": channels,
        "num_classes": classes.count,
        "learn_sigma": learn_sigma,
        "routers": routers,
        "null_class_row": classes.null_row,
    }
    return Inferred(parse_config(ModelConfig, values), (*side_notes, *classes.notes))


def _input_size(
    state: Mapping[str, Tensor], patch_size: int, stated: Stated, given: int | None
) -> tuple[int, tuple[str, ...]]:
    """The side of the inputs, from the position embedding; without one, which can be computed, as told."""
    if POSITIONS in state:
        tokens = _shape(state, POSITIONS, 3)[1]
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise CheckpointError(f"has a pos_embed of {tokens} tokens; expected a square number")
        side *= patch_size
        if given not in (None, side):
            raise CheckpointError(f"has a pos_embed of inputs with a side of {side}, not {given}; remove --input-size")
        require_side(stated, side)
        return side, ()
    if given is not None:
        return given, ()
    pixels = stated.get("image_size")
    if type(pixels) is int and pixels > 0 and "vae" in stated and pixels % 8 == 0:
        return pixels // 8, (
            f"input size {pixels // 8}: its training arguments say images of {pixels} pixels and a VAE",
        )
    raise CheckpointError(
        "does not tell the side of its inputs, for it has no pos_embed; give it with --input-size (input_size=): 32 "
        "for a latent DiT at 256 pixels, 64 at 512"
    )


@dataclass(frozen=True)
class ClassTable:
    """How the rows of a class table are read: `count` classes, and whether a row for "no class" follows them."""

    count: int
    null_row: bool
    notes: tuple[str, ...] = ()


def class_table(rows: int, stated: Stated, given: int | None = None) -> ClassTable:
    """The classes of a table of `rows`: a DiT has one more row, for "no class", if labels were dropped in training.

    In this order: `given` by the user; the training arguments; ImageNet's count; one row, which can only be a class;
    else the last row is taken for "no class", and the note says so. Raises `CheckpointError` for counts that do not
    go with the rows.
    """
    said, dropped = stated.get("num_classes"), _dropout(stated)
    count = given if given is not None else said if type(said) is int else None
    if count is not None:
        if rows not in (count, count + 1) or count < 1:
            source = "--num-classes says" if given is not None else "its training arguments say"
            raise CheckpointError(
                f"has a class table of {rows} rows, which is not of the {count} classes that {source}: expected "
                f"{count}, or {count + 1} with the row for no class; --num-classes (num_classes=) says what is so"
            )
        if given is None and rows == count and dropped:
            raise CheckpointError(
                f"contradicts itself: its training arguments say {count} classes and that labels were dropped "
                f"({dropped:g}), but its class table of {rows} rows has none for no class; give --num-classes"
            )
        if rows == count + 1 and dropped == 0:
            note = f"its training dropped no labels, so row {count} of its class table was never trained: left out"
            return ClassTable(count, False, (note,))
        return ClassTable(count, rows == count + 1)
    if dropped == 0 or rows == 1:
        return ClassTable(rows, False)
    if rows == IMAGENET:
        note = f"{rows} classes, without a row for no class, so that guidance is not possible: assumed from the count"
        return ClassTable(rows, False, (f"{note}; --num-classes {rows - 1} says otherwise",))
    if rows == IMAGENET + 1 or dropped:
        return ClassTable(rows - 1, True)
    note = f"{rows - 1} classes, and a last row for no class, which guidance needs: assumed from {rows} rows"
    return ClassTable(rows - 1, True, (f"{note}; --num-classes {rows} says that all are classes",))


def _dropout(stated: Stated) -> float | None:
    for name in ("class_dropout_prob", "label_dropout", "label_dropout_prob"):
        value = stated.get(name)
        if isinstance(value, int | float):
            return float(value)
    return None


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
    raise CheckpointError(
        f"does not tell its number of heads{options}; give it with --num-heads (num_heads=), here or to dydit convert"
    )


def _heads_from(stated: Stated, hidden: int) -> int | None:
    """The head count that training arguments name: `num_heads`, or that of a published `model` of this hidden size."""
    heads, model = stated.get("num_heads"), stated.get("model")
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
