"""Reads tensors from files of unknown origin: `torch.save` files and safetensors.

Only tensors, containers of them, and a few classes of settings, for which `safe_classes` has stand-ins, are unpickled.
Nothing is decompressed, and nothing is copied before its size was checked. Weights are mapped from the file if its
format and the file system allow it. Such a file must not be rewritten in place while the weights are in use; replacing
it by a rename is fine.

Errors say what is wrong with the file but do not name it: the caller does.
"""

from __future__ import annotations

import contextlib
import errno
import json
import pickletools
import re
import threading
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dydit.checkpoints.containers import Container
from dydit.checkpoints.safe_classes import ALLOWED
from dydit.errors import CheckpointError, one_line

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
EXPANSION_LIMIT = 4 << 30
"""Bytes that a model may take beyond the size of its file. Real models need less, even with zeros and shared tensors,
and it is too little to fill a machine's memory."""

_ADVICE = (
    "ask its author for the weights alone, saved with torch.save(model.state_dict(), PATH) or as safetensors; other "
    "entries may be numbers, text, lists, dictionaries, paths and NumPy scalars"
)
_UNSAFE = re.compile(r"GLOBAL ([\w.]+)")
_DAMAGED = "is damaged or incomplete: it cannot be read as {}; copy or download it again"
_NO_MEMORY = re.compile(r"not enough memory|can.?t allocate|cannot allocate|out of memory|os error 12\b", re.IGNORECASE)
_NO_MAP = re.compile(r"unable to mmap|mmapping|mmap failed|memory.?map", re.IGNORECASE)
_ASKED = re.compile(r"tried to allocate (\d+) bytes")
_WIDTHS = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1}
_WIDTHS |= {"Bool": 1, "Untyped": 1, "ComplexFloat": 8, "ComplexDouble": 16}
_LOADING = threading.Lock()  # allowed names are allowed for the whole process while a file is read


def read_torch(path: Path, container: Container) -> Any:
    """The object that `torch.save` wrote to `path`, on the CPU, memory-mapped if format and file system allow it.

    Raises `CheckpointError` for a damaged file, and for a file with anything but tensors, plain containers and the
    classes of `safe_classes`: such a file could run code, so nothing of it is used. Raises `OSError` or `MemoryError`
    if the file is valid but this machine cannot read it.
    """
    if path.name.endswith(".safetensors"):  # torch.load depends on the name
        raise CheckpointError(f"is {container.value}, not safetensors; rename it to .pt")
    zipped = container is Container.TORCH_ZIP
    if zipped:
        _check_archive(path)

    def read(mapped: bool) -> Any:
        with _LOADING, warnings.catch_warnings(), torch.serialization.safe_globals(ALLOWED):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)

    try:
        return _mapped_or_read(lambda: read(zipped), (lambda: read(False)) if zipped else None)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # bytes of unknown origin can make the parser raise anything
        raise _fault_of_pickle(error, path, zipped) from error


def _mapped_or_read(mapped: Callable[[], Any], read: Callable[[], Any] | None) -> Any:
    """The result of `mapped`, or of `read` if the file cannot be mapped, which some file systems do not support."""
    try:
        return mapped()
    except Exception as error:
        if read is None or not (_NO_MAP.search(str(error)) or _short_of_memory(error)):
            raise
    return read()


def _short_of_memory(error: BaseException) -> bool:
    failed = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return failed or isinstance(error, MemoryError) or bool(_NO_MEMORY.search(str(error)))


def _fault_of_pickle(error: Exception, path: Path, verified: bool) -> Exception:
    """The error to raise instead of `error`. `verified`: the checksums of the file are right, so it is not damaged."""
    unsafe, asked = _UNSAFE.search(str(error)), _ASKED.search(str(error))
    if unsafe:
        return CheckpointError(
            f"holds more than tensors ({shown(unsafe[1])}); such a file can run code when it is opened, so it was "
            f"not read; {_ADVICE}"
        )
    size = path.stat().st_size
    if _short_of_memory(error) and (asked is None or int(asked[1]) <= size):
        return MemoryError(f"reading {size} bytes")
    if verified and type(error).__name__ == "UnpicklingError":
        reason = one_line(error).rpartition("Unpickler error: ")[2].partition(". ")[0]
        return CheckpointError(
            f"holds more than tensors ({shown(reason)}); PyTorch's safe loading does not read that; {_ADVICE}"
        )
    return CheckpointError(_DAMAGED.format(Container.TORCH_ZIP.value if verified else Container.TORCH_LEGACY.value))


def _check_archive(path: Path) -> None:
    """Refuse archives that `torch.save` never writes, and records with a wrong checksum, which PyTorch does not check.

    A compressed file could become a thousand times larger in memory. A checksum of 0 means that there is none:
    `set_crc32_options(False)`. If the size of a record is not that of its storage, PyTorch reads beyond the record.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            items = archive.infolist()
            if any(item.compress_type != zipfile.ZIP_STORED for item in items):
                raise CheckpointError("is a compressed zip archive; expected a file as torch.save writes it")
            for item in items:
                if item.CRC:
                    with archive.open(item) as record:
                        while record.read(1 << 22):
                            pass
            sizes = {item.filename: item.file_size for item in items}
            for item in [item for item in items if item.filename.endswith("/data.pkl")]:
                for key, size in _storages(_record(path, item)).items():
                    record_size = sizes.get(f"{item.filename.removesuffix('.pkl')}/{key}")
                    if record_size not in (None, size):
                        raise CheckpointError(_DAMAGED.format(Container.TORCH_ZIP.value))
    except (OSError, MemoryError, CheckpointError):
        raise
    except Exception as error:  # as in read_torch
        raise CheckpointError(_DAMAGED.format(Container.TORCH_ZIP.value)) from error


def _record(path: Path, item: zipfile.ZipInfo) -> bytes:
    """The bytes of an uncompressed record. Its checksum is not checked."""
    with open(path, "rb") as file:
        file.seek(item.header_offset)
        header = file.read(30)  # it ends with the lengths of the name and the extra field, which follow
        file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), 1)
        return file.read(item.file_size)


def _storages(data: bytes) -> dict[str, int]:
    """The storages that the pickle of a `torch.save` archive refers to, and their stated sizes in bytes.

    A reference is a tuple of "storage", its type, its key, its device and its number of elements.
    """
    sizes: dict[str, int] = {}
    memo: dict[int, Any] = {}
    pushed: deque[Any] = deque([None] * 3, maxlen=4)
    for operation, argument, _ in pickletools.genops(data):
        name = operation.name
        if name in ("BINPUT", "LONG_BINPUT") and argument is not None:
            memo[argument] = pushed[-1]
        elif name in ("BINGET", "LONG_BINGET") and argument is not None:
            pushed.append(memo.get(argument))
        elif name == "BINPERSID":
            kind, key, _, count = pushed
            width = _WIDTHS.get(str(kind).rpartition(" ")[2].removesuffix("Storage"))
            if width is not None and isinstance(count, int):
                sizes[str(key)] = count * width
        elif argument is not None:
            pushed.append(argument)
    return sizes


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (CPU, memory-mapped) and the metadata of a safetensors file.

    Raises `CheckpointError` if it is damaged; `OSError` or `MemoryError` if this machine cannot read a valid file.
    """
    from safetensors import safe_open
    from safetensors.torch import load

    def mapped() -> tuple[dict[str, Tensor], dict[str, str]]:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118

    def read() -> tuple[dict[str, Tensor], dict[str, str]]:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        return load(data), dict(json.loads(data[8 : 8 + length]).get("__metadata__") or {})

    try:
        contents: tuple[dict[str, Tensor], dict[str, str]] = _mapped_or_read(mapped, read)
        return contents
    except (OSError, MemoryError):
        raise
    except Exception as error:  # as in read_torch
        if _short_of_memory(error):
            raise MemoryError(f"reading {path.stat().st_size} bytes") from error
        raise CheckpointError(_DAMAGED.format(Container.SAFETENSORS.value)) from error


def plain_tensors(state: Mapping[Any, Any], size: int) -> dict[str, Tensor]:
    """`state` as a dictionary of dense CPU float tensors, without gradients and without copying.

    They may share storage, be parts of a larger storage, or repeat one value by strides of zero. `size`: bytes of the
    file, see `require_sane`. Raises `CheckpointError` for a key that is not text, and for a value that is not a dense
    float tensor.
    """
    plain, total = {}, 0
    for name, value in state.items():
        if not isinstance(name, str):
            key = shown(repr(name)) if isinstance(name, int | float) else type(name).__name__
            raise CheckpointError(f"has a state dict with a key that is not text: {key}")
        if not isinstance(value, Tensor):
            raise CheckpointError(f"has a state dict whose {shown(name)} is not a tensor but {type(value).__name__}")
        if type(value) not in (Tensor, torch.nn.Parameter) or value.layout is not torch.strided or value.is_meta:
            raise CheckpointError(f"has a state dict whose {shown(name)} is not a dense tensor")
        if value.dtype not in DTYPES:
            kinds = ", ".join(str(kind).removeprefix("torch.") for kind in DTYPES)
            dtype = str(value.dtype).removeprefix("torch.")
            raise CheckpointError(f"has {shown(name)} in {dtype}; expected one of {kinds}")
        plain[name] = value.detach()
        total += value.numel()
    require_sane(total, size)
    return plain


def require_sane(numbers: int, size: int) -> None:
    """Raise `CheckpointError` if `numbers` values in fp32 would take far more than the `size` bytes of their file.

    A small file can describe a tensor of any size, by strides of zero or by repeated use of one storage. The limit is
    twice the file, because fp16 doubles in fp32, plus `EXPANSION_LIMIT`.
    """
    if 4 * numbers > 2 * size + EXPANSION_LIMIT:
        raise CheckpointError(
            f"describes {4 * numbers} bytes of weights in a file of {size} bytes, which no real model does; the file "
            "is not a checkpoint, or is malicious"
        )


@contextlib.contextmanager
def explained_memory(path: Path) -> Iterator[None]:
    """Raise `CheckpointError` if the weights of `path` do not fit into memory. PyTorch raises a RuntimeError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _short_of_memory(error):
            raise
        raise CheckpointError(f"{path}: not enough memory for its weights in fp32") from error


def shown(name: str) -> str:
    """`name` from a file, for a one-line message: at most 80 printable characters."""
    short = name if len(name) <= 80 else name[:77] + "..."
    return short if short.isprintable() else ascii(short)


def listed(names: Iterable[str]) -> str:
    """The first three of `names`, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(shown(name) for name in names[:3]) + more
