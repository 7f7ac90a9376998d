"""Checks a state dict against the tensors of a model, and combines what is known about a model besides its tensors.

The architecture says which tensors a model has. Errors do not name the file: the caller does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dydit.checkpoints.conventions import Stated
from dydit.checkpoints.safe_load import listed, shown
from dydit.checkpoints.stated_process import ProcessOptions
from dydit.errors import CheckpointError
from dydit.models.config import ModelConfig
from dydit.models.registry import architecture_of

Shapes = dict[str, tuple[int, ...]]
NOT_STATED = ProcessOptions()
IMAGENET = 1000
# Far above any model that can be run. The configuration in a damaged or malicious file could state any size, and the
# time to check it grows with these sizes.
LIMITS = {
    "depth": 10_000,
    "hidden_size": 1 << 16,
    "tokens": 1 << 16,
    "patch_size": 1 << 8,
    "in_channels": 1 << 16,
    "num_classes": 1 << 24,
    "caption_channels": 1 << 16,
    "text_tokens": 1 << 16,
    "interpolation_scale": 1 << 16,
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

    Values are checked one tensor at a time, so a memory-mapped state is read but does not stay in memory.
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
        raise CheckpointError(f"has NaN or infinite values in {_tensors(bad)}; use an earlier checkpoint")


def require_trained(state: Mapping[str, Tensor], config: ModelConfig, entry: str) -> tuple[str, ...]:
    """Raise `CheckpointError` if all matrices of all blocks are zeros. `entry`: the entry of the weights in the file.

    A moving average that was created but never updated is all zeros. (A single block may be pruned.) Returns notes for
    the user: with an output layer of zeros, as before training, the output of the model is zero.
    """
    architecture = architecture_of(config)
    if not any(bool(state[name].any()) for name in state if architecture.is_block_matrix(name)):
        hint = f" under `{shown(entry)}`; read others with --weights (weights=), such as model" if entry else ""
        raise CheckpointError(f"holds only zeros in the weights of its blocks{hint}: it is not a trained model")
    last = architecture.output_layer
    if last is not None and not bool(state[last].any()):
        return ("its final layer is all zeros, as before training, so its output is always zero",)
    return ()


def _tensors(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({listed(names)})"


def _finite(tensor: Tensor) -> bool:
    """Whether every value is finite as fp32. `aminmax` propagates NaN and allocates no copy of the tensor."""
    return tensor.numel() == 0 or all(math.isfinite(bound.float()) for bound in tensor.aminmax())


@dataclass(frozen=True)
class Given:
    """What the user states about a file. It takes precedence over what the file says, but `process` must agree."""

    num_heads: int | None = None
    weights: str | None = None
    num_classes: int | None = None
    input_size: int | None = None
    process: ProcessOptions = NOT_STATED

    def require_same(self, config: ModelConfig) -> None:
        """Raise `CheckpointError` if it contradicts the configuration in a file."""
        for option in ("num_heads", "num_classes", "input_size"):
            value, own = getattr(self, option), getattr(config, option, None)
            if value is not None and value != own:
                raise CheckpointError(f"states {option} {own}, not {value}; remove --{option.replace('_', '-')}")


@dataclass(frozen=True)
class Inferred:
    """A configuration, and the assumptions behind it, in sentences for the user."""

    config: ModelConfig
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClassTable:
    """How to read the rows of a class table: `count` classes, and whether a row for "no class" follows them."""

    count: int
    null_row: bool
    notes: tuple[str, ...] = ()


def class_table(rows: int, stated: Stated, given: int | None = None) -> ClassTable:
    """The classes of a table of `rows`. A DiT has one more row, for "no class", if training dropped labels.

    The number of classes is, in this order: `given` by the user; stated by the training arguments; 1 for one row;
    ImageNet's. Otherwise the last row is assumed to be "no class", which a note says. Raises `CheckpointError` for a
    number that does not fit the rows.
    """
    stated_count, dropped = stated.get("num_classes"), _dropout(stated)
    count = given if given is not None else stated_count if type(stated_count) is int else None
    if count is not None:
        if rows not in (count, count + 1) or count < 1:
            source = "--num-classes says" if given is not None else "its training arguments say"
            raise CheckpointError(
                f"has a class table of {rows} rows, but {source} {count} classes: expected {count} rows, or "
                f"{count + 1} with a row for no class; give the right number with --num-classes (num_classes=)"
            )
        if given is None and rows == count and dropped:
            raise CheckpointError(
                f"contradicts itself: its training arguments say {count} classes and that labels were dropped "
                f"({dropped:g}), but its class table of {rows} rows has none for no class; give --num-classes"
            )
        if rows == count + 1 and dropped == 0:
            note = f"row {count} of its class table, for no class, was removed: its training dropped no labels"
            return ClassTable(count, False, (note,))
        return ClassTable(count, rows == count + 1)
    if dropped == 0 or rows == 1:
        return ClassTable(rows, False)
    if rows == IMAGENET:
        note = f"assumed {rows} classes without a row for no class, so guidance is not possible"
        return ClassTable(rows, False, (f"{note}; if the last row is for no class, give --num-classes {rows - 1}",))
    if rows == IMAGENET + 1 or dropped:
        return ClassTable(rows - 1, True)
    note = f"assumed {rows - 1} classes, with the last of the {rows} rows of the class table for no class"
    return ClassTable(rows - 1, True, (f"{note}; if all of them are classes, give --num-classes {rows}",))


def _dropout(stated: Stated) -> float | None:
    for name in ("class_dropout_prob", "label_dropout", "label_dropout_prob"):
        value = stated.get(name)
        if isinstance(value, int | float):
            return float(value)
    return None
