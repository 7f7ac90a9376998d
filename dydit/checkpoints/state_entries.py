"""Finds the weights of a model in the file of a training script: their entry, and the prefix of their names.

The structure of the file decides. If, at most three dictionaries deep, a name ends with one of an architecture's
`anchors` (of a DiT its patch embedder, of a U-ViT its middle block), the text before it is a prefix, and all names with
this prefix are one model. This covers plain state dicts, training files (`ema`, `model`, `state_dict`, ...),
Lightning's files (one state dict for the model and other modules) and wrappers of PyTorch. Errors do not name the file:
the caller does.
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
# Modules that only wrap another one, without weights: DataParallel, torch.compile, FSDP, checkpointing, DeepSpeed.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_AVERAGED = re.compile(r"(?<![a-z])ema(?![a-z])|EMA|Ema(?![a-z])")
_DEEPEST, _MOST = 3, 10_000  # the depth of nested dictionaries, and the number of dictionaries that are searched


def is_average(entry: str) -> bool:
    """Whether weights are a moving average, by the name of their entry."""
    return bool(_AVERAGED.search(entry))


@dataclass(frozen=True)
class Entry:
    """The weights of one model in a file. `name`: of the entry with them, "" for the top level.

    `beside`: names of tensors of other modules in the same dictionary.
    """

    name: str
    state: Mapping[Any, Any]
    beside: tuple[str, ...] = ()

    @property
    def averaged(self) -> bool:
        """Whether these are the moving average of the weights, by the name of the entry."""
        return is_average(self.name)


@dataclass(frozen=True)
class Unpacked:
    """The state dict that was chosen from a file, the name of its entry, and notes about the choice for the user.

    `by_default`: whether the same entry is chosen if the user states nothing.
    """

    state: Mapping[Any, Any]
    entry: str
    notes: tuple[str, ...] = ()
    by_default: bool = True


def unpack(loaded: Any, wanted: str | None = None) -> Unpacked:
    """Find the weights in the object that `torch.save` wrote, and remove the prefixes of wrappers.

    `wanted`: "ema" for a moving average, "model" for other weights, or the name of an entry; by default an average if
    there is one. Raises `CheckpointError` if there is no state dict, not the wanted one, or several that fit.
    """
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"holds {type(loaded).__name__}, not a state dict")
    entries, unknown = _find(loaded)
    if unknown and wanted is None and not any(each.averaged for each in entries):
        raise CheckpointError(
            f"has an average `{shown(unknown[0])}` whose tensors do not have the names of a model that dydit "
            "knows; read other weights with --weights (weights=), such as model"
        )
    chosen = _choose(entries, wanted) if entries else _other(loaded)
    notes = []
    if others := [each.name or "the top level" for each in entries if each is not chosen]:
        notes.append(f"weights: {shown(chosen.name)}; the file also holds {listed(others)} (see --weights)")
    if chosen.beside:
        notes.append(f"did not read {len(chosen.beside)} tensors of other modules ({listed(chosen.beside)})")
    return Unpacked(chosen.state, chosen.name, tuple(notes), wanted is None or _default(entries) == [chosen])


def _find(loaded: Mapping[Any, Any]) -> tuple[list[Entry], list[str]]:
    """All models, and the names of entries that are averages with matrices but are not a model."""
    entries: list[Entry] = []
    unknown = []
    queue: deque[tuple[tuple[str, ...], Mapping[Any, Any]]] = deque([((), loaded)])
    for _ in range(_MOST):
        if not queue:
            break
        path, mapping = queue.popleft()
        models = list(_models_of(path, mapping))
        entries += models
        if not models and is_average(".".join(path)) and _has_matrices(mapping):
            unknown.append(".".join(path))
        if len(path) < _DEEPEST:
            queue.extend(
                ((*path, key), value)
                for key, value in mapping.items()
                if isinstance(value, Mapping) and isinstance(key, str)
            )
    return entries, unknown


def _has_matrices(mapping: Mapping[Any, Any]) -> bool:
    in_lists = (each for value in mapping.values() if isinstance(value, list) for each in value)
    return any(isinstance(each, Tensor) and each.ndim > 1 for each in (*mapping.values(), *in_lists))


def _models_of(path: tuple[str, ...], mapping: Mapping[Any, Any]) -> Iterator[Entry]:
    """The models whose weights are directly in this dictionary. A name belongs to the longest prefix that it has."""
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
        raise CheckpointError(f"has the same names with and without the prefix of a wrapper ({listed(twice)})")
    longest = sorted(prefixes, key=len, reverse=True)
    states: dict[str, dict[Any, Any]] = {prefix: {} for prefix in sorted(prefixes)}
    beside = []
    for name, value in plain.items():
        prefix = next((each for each in longest if isinstance(name, str) and name.startswith(each)), None)
        if prefix is None and "" in states:
            prefix = ""  # a key that is not text, which the caller refuses
        if prefix is None:
            beside.append(name)
        elif prefix or not _is_setting(name, value):
            states[prefix][name.removeprefix(prefix) if prefix else name] = value
    if stray := [name for name in beside if isinstance(name, str) and _is_of_a_model(name)]:
        raise CheckpointError(f"has weights outside the prefix of the others ({listed(stray)})")
    tensors = tuple(name for name in beside if isinstance(name, str) and isinstance(plain[name], Tensor))
    for prefix, state in states.items():
        yield Entry(".".join([*path, *filter(None, [prefix.rstrip(".")])]), state, tensors)


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _is_setting(name: Any, value: Any) -> bool:
    """Whether an entry at the top of a plain state dict is a setting that a script saved, and not a weight.

    A moving average counts its updates in a tensor without dimensions.
    """
    counter = not isinstance(value, Tensor) or value.ndim == 0
    return isinstance(name, str) and "." not in name and counter and not _is_of_a_model(name)


def _is_of_a_model(name: str) -> bool:
    first = name.partition(".")[0]
    return any(first in each.top_level for each in architectures())


def _default(entries: list[Entry]) -> list[Entry]:
    """The averages if there are any, else all entries."""
    return [each for each in entries if each.averaged] or entries


def _choose(entries: list[Entry], wanted: str | None) -> Entry:
    averaged = [each for each in entries if each.averaged]
    plain = [each for each in entries if not each.averaged]
    if wanted is None:
        fitting = _default(entries)
    elif wanted in (EMA, MODEL):
        fitting = averaged if wanted == EMA else plain
    else:
        fitting = [each for each in entries if each.name == wanted]
    names = [each.name for each in entries if each.name]
    if not fitting:
        known = f"only {listed(names)}" if names else "only one set of weights, without a name"
        raise CheckpointError(f"holds no weights {shown(str(wanted))}, {known}; change or remove --weights (weights=)")
    if len(fitting) > 1:
        several = listed(each.name or MODEL for each in fitting)
        raise CheckpointError(f"holds several models ({several}); choose one with --weights (weights=)")
    return fitting[0]


def _other(loaded: Mapping[Any, Any]) -> Entry:
    """A state dict without a known model, so that a later error can say what it holds."""
    for entry in (EMA, MODEL, "state_dict"):
        inner = loaded.get(entry)
        if isinstance(inner, Mapping) and inner:
            return Entry(entry, inner)
    if not any(isinstance(value, Tensor) for value in loaded.values()):
        keys = listed(str(key) for key in loaded if isinstance(key, str | int)) or "nothing"
        raise CheckpointError(f"holds no state dict: expected tensors, or `ema` or `model` with them; it holds {keys}")
    return Entry("", loaded)
