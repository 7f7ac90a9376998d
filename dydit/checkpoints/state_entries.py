"""Finding the weights of a model in what a training script saved: in which entry they lie, and behind which prefix.

They are found by structure: wherever, at most three dictionaries deep, a name ends as one of an architecture's
`anchors` does (for a DiT its patch embedder), what comes before it is a prefix, and all names with this prefix are one
model. That covers bare state dicts, training files (`ema`, `model`, `state_dict`, ...), Lightning's (one state dict
with other modules beside the model) and wrappers of PyTorch. Errors do not name the file: the caller does.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dydit.checkpoints.safe_load import listed, shown
from dydit.errors import CheckpointError
from dydit.models.registry import architectures

EMA, MODEL = "ema", "model"
# Modules that only wrap another one: DataParallel, torch.compile, FSDP, checkpointing, DeepSpeed. None has weights.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_AVERAGED = re.compile(r"(?<![a-z])ema(?![a-z])|EMA|Ema(?![a-z])")
_DEEPEST, _MOST = 3, 10_000  # dictionaries inside each other, and looked at in all


def is_average(entry: str) -> bool:
    """Whether the name of an entry says that its weights are a moving average."""
    return bool(_AVERAGED.search(entry))


@dataclass(frozen=True)
class Found:
    """The weights of one model in a file: the `entry` where they lie ("" for the top level), and their names there.

    `beside`: names of other modules in the same dictionary.
    """

    entry: str
    state: Mapping[Any, Any]
    beside: tuple[str, ...] = ()

    @property
    def averaged(self) -> bool:
        """Whether these are the moving average of the weights, by the name of their entry."""
        return is_average(self.entry)


@dataclass(frozen=True)
class Unpacked:
    """The state dict that was chosen from a file, its entry, and what to tell the user about the choice."""

    state: Mapping[Any, Any]
    entry: str
    notes: tuple[str, ...] = ()
    by_default: bool = True


def unpack(loaded: Any, wanted: str | None = None) -> Unpacked:
    """Find the weights in what `torch.save` wrote, without the prefixes of wrappers.

    `wanted`: "ema" for a moving average, "model" for what is none, or the name of an entry; by default an average where
    there is one. Raises `CheckpointError` where there is no state dict, not the one wanted, or several that fit.
    """
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"holds {type(loaded).__name__}, not a state dict")
    found, odd = _find(loaded)
    if odd and wanted is None and not any(each.averaged for each in found):
        raise CheckpointError(
            f"has an average `{shown(odd[0])}` that is not of a DiT's tensors by their names; take other weights with "
            "--weights (weights=), such as model"
        )
    chosen = _choose(found, wanted) if found else _other(loaded)
    notes = []
    if others := [each.entry or "the top level" for each in found if each is not chosen]:
        notes.append(f"weights: {shown(chosen.entry)}; the file also holds {listed(others)} (see --weights)")
    if chosen.beside:
        notes.append(f"left out {len(chosen.beside)} tensors of other modules ({listed(chosen.beside)})")
    return Unpacked(chosen.state, chosen.entry, tuple(notes), wanted is None or _default(found) == [chosen])


def _find(loaded: Mapping[Any, Any]) -> tuple[list[Found], list[str]]:
    """All models, and the entries that are named as an average and hold matrices, but no model."""
    found: list[Found] = []
    odd = []
    queue: deque[tuple[tuple[str, ...], Mapping[Any, Any]]] = deque([((), loaded)])
    for _ in range(_MOST):
        if not queue:
            break
        path, mapping = queue.popleft()
        models = list(_models_of(path, mapping))
        found += models
        if not models and is_average(".".join(path)) and _has_matrices(mapping):
            odd.append(".".join(path))
        if len(path) < _DEEPEST:
            queue.extend(
                ((*path, key), value)
                for key, value in mapping.items()
                if isinstance(value, Mapping) and isinstance(key, str)
            )
    return found, odd


def _has_matrices(mapping: Mapping[Any, Any]) -> bool:
    listed_ones = (each for value in mapping.values() if isinstance(value, list) for each in value)
    return any(isinstance(each, Tensor) and each.ndim > 1 for each in (*mapping.values(), *listed_ones))


def _models_of(path: tuple[str, ...], mapping: Mapping[Any, Any]) -> Iterator[Found]:
    """The models whose weights lie in this very dictionary; names go to the longest prefix that they have."""
    plain: dict[str, Any] = {}
    twice = []
    for key, value in mapping.items():
        name = _unwrapped(key) if isinstance(key, str) else key
        if name in plain:
            twice.append(name)
        plain[name] = value
    texts = [name for name in plain if isinstance(name, str)]
    anchors = {anchor for each in architectures() for anchor in each.anchors}
    prefixes = {name.removesuffix(anchor) for anchor in anchors for name in texts if f".{name}".endswith(f".{anchor}")}
    if not prefixes:
        return
    if twice:
        raise CheckpointError(f"has names twice, with and without the prefix of a wrapper ({listed(twice)})")
    longest = sorted(prefixes, key=len, reverse=True)
    states: dict[str, dict[Any, Any]] = {prefix: {} for prefix in sorted(prefixes)}
    beside = []
    for name, value in plain.items():
        prefix = next((each for each in longest if isinstance(name, str) and name.startswith(each)), None)
        if prefix is None and "" in states:
            prefix = ""  # a key that is no text: for the caller to refuse
        if prefix is None:
            beside.append(name)
        elif prefix or not _is_setting(name, value):
            states[prefix][name.removeprefix(prefix) if prefix else name] = value
    if stray := [name for name in beside if isinstance(name, str) and _is_of_a_model(name)]:
        raise CheckpointError(f"has weights outside the prefix of the others ({listed(stray)})")
    tensors = tuple(name for name in beside if isinstance(name, str) and isinstance(plain[name], Tensor))
    for prefix, state in states.items():
        yield Found(".".join([*path, *filter(None, [prefix.rstrip(".")])]), state, tensors)


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _is_setting(name: Any, value: Any) -> bool:
    """Whether an entry at the top of a bare state dict is no weight but what a script noted beside them.

    Averages count their updates in a tensor of no dimension.
    """
    counter = not isinstance(value, Tensor) or value.ndim == 0
    return isinstance(name, str) and "." not in name and counter and not _is_of_a_model(name)


def _is_of_a_model(name: str) -> bool:
    first = name.partition(".")[0]
    return any(first in each.top_level for each in architectures())


def _default(found: list[Found]) -> list[Found]:
    """The averages, where there are any, else all."""
    return [each for each in found if each.averaged] or found


def _choose(found: list[Found], wanted: str | None) -> Found:
    averaged = [each for each in found if each.averaged]
    plain = [each for each in found if not each.averaged]
    if wanted is None:
        fitting = _default(found)
    elif wanted in (EMA, MODEL):
        fitting = averaged if wanted == EMA else plain
    else:
        fitting = [each for each in found if each.entry == wanted]
    names = [each.entry for each in found if each.entry]
    if not fitting:
        held = f"its weights are {listed(names)}" if names else "it has one set of weights, without a name"
        raise CheckpointError(
            f"holds no weights {shown(str(wanted))}: {held}; leave --weights (weights=) out, or name those"
        )
    if len(fitting) > 1:
        several = listed(each.entry or MODEL for each in fitting)
        raise CheckpointError(f"holds several models ({several}); name the one to take with --weights (weights=)")
    return fitting[0]


def _other(loaded: Mapping[Any, Any]) -> Found:
    """A state dict that is none of a DiT, so that the error can say what it holds instead."""
    for entry in (EMA, MODEL, "state_dict"):
        inner = loaded.get(entry)
        if isinstance(inner, Mapping) and inner:
            return Found(entry, inner)
    if not any(isinstance(value, Tensor) for value in loaded.values()):
        keys = listed(str(key) for key in loaded if isinstance(key, str | int)) or "nothing"
        raise CheckpointError(f"holds no state dict: expected tensors, or `ema` or `model` with them; it holds {keys}")
    return Found("", loaded)
