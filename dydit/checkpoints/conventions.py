"""Finds what a file states about how its model was made, and refuses what contradicts its tensors.

The names and shapes of a DiT's tensors do not show what its output means. Training arguments, the metadata of a
safetensors file, and the scheduler of a diffusers pipeline often do. They are used or refused, and never ignored: a
model that is sampled by another convention than that of its training would produce noise without an error. What they
say about noise and predictions is read by `dydit.checkpoints.process_settings`. A file that states nothing is taken for
a published model. No PyTorch here. Errors do not name the file: the caller does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dydit.checkpoints.safe_classes import Inert
from dydit.errors import CheckpointError

Setting = tuple[str, Any]
"""A setting: the last part of its name, in lower case with underscores, and its value: text, a number or a boolean."""
Stated = Mapping[str, Any]
"""Settings by name. Of several with the same name, the outermost."""

_ENTRIES = (
    "args",
    "arguments",
    "hyper_parameters",
    "hparams",
    "config",
    "cfg",
    "model_args",
    "model_config",
    "settings",
)
_DEEPEST, _MOST = 6, 10_000
_LARGEST = 1 << 62  # larger integers are not read as numbers

_OTHER_BLOCKS = ("use_rope", "use_qknorm", "qk_norm", "use_swiglu", "swiglu", "use_rmsnorm", "rmsnorm")


def settings_in(loaded: Any, metadata: Mapping[str, str] | None = None) -> list[Setting]:
    """All settings in the known entries of a `torch.save` file, at its top level, and in `metadata`."""
    sources: list[Any] = []
    if isinstance(loaded, Mapping):
        sources = [loaded[name] for name in _ENTRIES if name in loaded]
        sources.append({key: value for key, value in loaded.items() if isinstance(value, str | int | float)})
    sources.append({key: _from_text(value) for key, value in (metadata or {}).items()})
    return [setting for source in sources for setting in _settings_of(source)]


def by_name(settings: Iterable[Setting]) -> dict[str, Any]:
    """The first setting of each name."""
    stated: dict[str, Any] = {}
    for name, value in settings:
        stated.setdefault(name, value)
    return stated


def _from_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _settings_of(source: Any) -> Iterator[Setting]:
    """(name, value) of all plain settings in nested containers, the outermost first."""
    level: list[Any] = [source]
    seen = 0
    for _ in range(_DEEPEST):
        deeper = []
        for holder in level:
            values = vars(holder) if isinstance(holder, argparse.Namespace) else holder
            if not isinstance(values, Mapping):
                continue
            for key, value in values.items():
                seen += 1
                if seen > _MOST:
                    return
                if isinstance(key, str) and isinstance(value, str | int | float):
                    vast = isinstance(value, int) and abs(value) > _LARGEST
                    yield key.lower().replace("-", "_"), "a huge number" if vast else value
                elif isinstance(key, str) and isinstance(value, list | tuple | Inert) and value:
                    yield key.lower().replace("-", "_"), "a list" if isinstance(value, list | tuple) else "an object"
                elif isinstance(value, Mapping | argparse.Namespace):
                    deeper.append(value)
        level = deeper


def require_blocks(stated: Stated, where: str = "training arguments") -> None:
    """Raise `CheckpointError` if settings show that a model has blocks that we do not have."""
    for name in _OTHER_BLOCKS:
        if stated.get(name) not in (None, False, 0, "", "none", "None"):
            raise CheckpointError(
                f"has other blocks than the models of dydit: its {where} say {name} {short(stated[name])}"
            )


def short(value: Any) -> str:
    """A value for an error: printable, and cut if it is long."""
    text = str(value)
    text = text if len(text) <= 40 else text[:37] + "..."
    return text if text.isprintable() else ascii(text)


def require_sigma(stated: Stated, learn_sigma: bool) -> None:
    """Raise `CheckpointError` if training arguments contradict the number of output channels."""
    value = stated.get("learn_sigma")
    if isinstance(value, bool) and value != learn_sigma:
        raise CheckpointError(
            f"contradicts itself: its training arguments say learn_sigma {value}, but its final layer "
            f"{'has' if learn_sigma else 'lacks'} the rows of a variance"
        )


def require_side(stated: Stated, input_size: int) -> None:
    """Raise `CheckpointError` if `image_size` (pixels) is not the side of the latents times a power of two."""
    size = stated.get("image_size")
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        factor, rest = divmod(size, input_size)
        if rest or factor & (factor - 1) or not factor:
            raise CheckpointError(
                f"contradicts itself: its training arguments say image_size {size}, but its pos_embed is for inputs "
                f"with a side of {input_size}"
            )
