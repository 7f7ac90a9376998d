"""Holding a state dict against what a model has, and what is known of a model besides its tensors.

Which names and shapes these are, the architecture says. Errors do not name the file: the caller does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dydit.checkpoints.conventions import Stated
from dydit.checkpoints.safe_load import listed, shown
from dydit.errors import CheckpointError
from dydit.models.config import ModelConfig
from dydit.models.registry import architecture_of

Shapes = dict[str, tuple[int, ...]]
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


def expected_shapes(config: ModelConfig) -> Shapes:
    """Published name -> shape of every tensor that a model of `config` has.

    Raises `CheckpointError` for sizes beyond `LIMITS`.
    """
    for size, limit in LIMITS.items():
        if getattr(config, size, 0) > limit:
            raise CheckpointError(f"describes a model with {size} above {limit}; no such model can be run")
    return architecture_of(config).state_shapes(config)


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


def require_trained(state: Mapping[str, Tensor], config: ModelConfig, entry: str) -> tuple[str, ...]:
    """Raise `CheckpointError` where all matrices of all blocks are zeros; `entry`: where the weights lay in the file.

    That is what an average holds that was set up and never updated. (One of a single block may be pruned.) Returns what
    the user should know: an output layer of zeros is that of a model before its training, whose output is zero.
    """
    architecture = architecture_of(config)
    if not any(bool(state[name].any()) for name in state if architecture.is_block_matrix(name)):
        hint = f" under `{shown(entry)}`; take others with --weights (weights=), such as model" if entry else ""
        raise CheckpointError(f"holds only zeros in the weights of its blocks{hint}: it is no trained model")
    last = architecture.output_layer
    if last is not None and not bool(state[last].any()):
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
            value, own = getattr(self, option), getattr(config, option, None)
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
