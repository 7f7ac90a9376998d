"""Mutated bundles: each is refused in one line, or runs as what it is. See `conftest` for how many.

What a mutant may do is part of it.

- Not signed (hashes, sizes and the digest are not made to fit): refused, or every step has the bits of the original.
- Signed, as somebody would who knows how the hashes are made: it is another bundle, and its author says what it
  computes. It is refused, or gives arrays of the shapes that its manifest says. Where only files changed that the
  manifest does not use, or how they are stored, the bits are again those of the original (`same`).
- `refused`: it reaches for a file outside the bundle, so it must not run at all.

In no case is anything raised but `DyditError`, a process started, code compiled, or a file outside the bundle opened or
changed, nor one in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from dydit.bundle.bundle import Bundle
from dydit.diffusion.steps import State
from dydit.errors import DyditError
from dydit.inspection.inspect import inspect
from dydit.models.dit.config import DiTConfig
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.loop import StepRunner
from dydit.runtime.resident import ResidentSubnets
from tests.fixtures.cpu import EXACT_INT8

CONFIG = DiTConfig(hidden_size=16, depth=2, num_heads=4, patch_size=2, input_size=4, num_classes=5)
KINDS: list[dict[str, Any]] = [
    {"max_subnets": 2},
    {"plan": "sliding"},
    {"plan": "per-step", "routing": "capacity", "capacities": (2, 3)},
    {"max_subnets": 2, "precision": "int8" if EXACT_INT8 else "fp16"},  # the backend would refuse it
    {"max_subnets": 1, "precision": "fp16"},
    {"max_subnets": 2, "sampler": "dpm-solver++"},
]
SPARE_MEMORY, SECONDS = 4 << 30, 60
WATCHED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "compile", "exec", "ctypes.dlopen")
Steps = list[np.ndarray]


@dataclass
class Case:
    """A copy of a bundle, and what is to come of it when it has been mutated."""

    folder: Path
    values: dict[str, Any]
    signed: bool = False
    same: bool = False
    refused: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return sorted(self.values["files"])

    def sign(self) -> None:
        """Make sizes, hashes and the digest fit what is there, and write the manifest."""
        for name, entry in self.values["files"].items():
            file = self.folder / name
            if isinstance(entry, dict) and name in ORIGINAL_NAMES and file.is_file() and file.stat().st_size < 1 << 24:
                data = file.read_bytes()
                entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self.write()
        self.signed = True

    def write(self) -> None:
        """Write the manifest with its digest."""
        kept = {key: value for key, value in self.values.items() if key != "digest"}
        self.values["digest"] = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
        (self.folder / "manifest.json").write_text(json.dumps(self.values))

    def edit_graph(self, rng: random.Random, change: Callable[[onnx.ModelProto], None]) -> None:
        """Change one of the graphs and sign the bundle."""
        name = rng.choice([name for name in self.names if name.endswith(".onnx")])
        model = onnx.load(self.folder / name, load_external_data=False)
        change(model)
        (self.folder / name).write_bytes(model.SerializeToString())
        self.notes.append(name)
        self.sign()


ORIGINAL_NAMES: set[str] = set()
Mutation = Callable[[Case, random.Random], None]
MUTATIONS: list[Mutation] = []


def mutation(function: Mutation) -> Mutation:
    MUTATIONS.append(function)
    return function


def spoil(data: bytes, rng: random.Random) -> bytes:
    """Change some bytes: flip, cut, repeat, or put others in."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        kind = rng.choice(["flip", "cut", "repeat", "insert", "zero"])
        if kind == "flip" and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del changed[at : at + rng.choice([1, 7, 1000, len(changed)])]
        elif kind == "repeat":
            changed[at:at] = changed[at : at + rng.choice([1, 64, 4096])]
        elif kind == "insert":
            changed[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
        else:
            changed[at : at + 16] = bytes(len(changed[at : at + 16]))
    return bytes(changed)


@mutation
def bytes_of_a_file(case: Case, rng: random.Random) -> None:
    file = case.folder / rng.choice([*case.names, "manifest.json"])
    file.write_bytes(spoil(file.read_bytes(), rng))


@mutation
def bytes_of_a_graph_signed(case: Case, rng: random.Random) -> None:
    file = case.folder / rng.choice([name for name in case.names if name.endswith(".onnx")])
    file.write_bytes(spoil(file.read_bytes(), rng))
    case.sign()


@mutation
def bytes_of_weights_signed(case: Case, rng: random.Random) -> None:
    file = case.folder / "weights.bin"
    file.write_bytes(spoil(file.read_bytes(), rng))
    case.sign()


@mutation
def files_missing_extra_or_swapped(case: Case, rng: random.Random) -> None:
    first, second = rng.sample(case.names, 2)
    kind = rng.choice(["missing", "swapped", "extra", "folder", "doubled"])
    if kind == "missing":
        (case.folder / first).unlink()
    elif kind == "swapped":
        data = (case.folder / first).read_bytes()
        shutil.copy(case.folder / second, case.folder / first)
        (case.folder / second).write_bytes(data)
    elif kind == "extra":
        (case.folder / "extra.onnx").write_bytes(rng.randbytes(99))
        case.same = True
    elif kind == "folder":
        (case.folder / first).unlink()
        (case.folder / first).mkdir()
    else:
        shutil.copy(case.folder / second, case.folder / first)
    case.notes.append(f"{kind} {first} {second}")
    if rng.random() < 0.5:
        case.sign()


@mutation
def links(case: Case, rng: random.Random) -> None:
    name = rng.choice(case.names)
    file, outside = case.folder / name, case.folder.parent / "outside"
    kind = rng.choice(["same", "other", "loop", "dangling", "pipe", "device", "folder"])
    shutil.move(file, outside)
    if kind == "pipe":
        os.mkfifo(file)
    else:
        target = {"loop": file, "dangling": case.folder / "gone", "device": "/dev/zero", "folder": case.folder}
        file.symlink_to(target.get(kind, outside))
    if kind == "other":
        outside.write_bytes(spoil(outside.read_bytes(), rng))
    case.same = kind == "same"
    case.notes.append(f"{kind} {name}")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def strange(old: Any, rng: random.Random) -> Any:
    """A value in place of another."""
    if isinstance(old, bool):
        return not old
    near: list[Any] = []
    if isinstance(old, int):
        near = [old + 1, old - 1, -old, old * 2, 0, old << 20, 1 << 31, 1 << 62, 10**30, float(old)]
    elif isinstance(old, float):
        near = [-old, 0.0, old * 1e300, 1e-300, float("nan"), float("inf")]
    elif isinstance(old, str):
        near = [old[:-1], old + "0", old.upper(), "../" + old, "/" + old, old + "\0", "é" * 300, "", old[::-1]]
    elif isinstance(old, list) and old:
        near = [old[:-1], old * 2, old[::-1], [old], [], rng.sample(old, len(old)), [*old, old[0]]]
    elif isinstance(old, dict) and old:
        keys = list(old)
        near = [
            {},
            {**old, "extra": 1},
            {key: old[key] for key in keys[1:]},
            dict(zip(keys, [*keys[1:], 0], strict=True)),
        ]
    return rng.choice([*near * 3, None, True, -1, "x", [], {}, [[[]]], 1e308])


@mutation
def values_of_the_manifest(case: Case, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        # Parts first: most places are entries of weights, which are much alike.
        top = rng.choice([key for key in case.values if key != "digest"])
        path = rng.choice([(top, *rest) for rest in places(case.values[top])])
        holder = case.values
        for key in path[:-1]:
            holder = holder[key]
        if rng.random() < 0.15:
            del holder[path[-1]]
            case.notes.append(f"without {path}")
        else:
            old = holder[path[-1]]
            holder[path[-1]] = strange(old, rng)
            case.notes.append(f"{path}: {str(old)[:40]} -> {str(holder[path[-1]])[:40]}")
    case.write()
    case.signed = True


@mutation
def names_of_files(case: Case, rng: random.Random) -> None:
    old = rng.choice(case.names)
    odd = [
        "../" + old,
        f"a/../{old}",
        "/etc/passwd",
        "..",
        ".",
        "",
        "x" * 300,
        "a\nb",
        "a\\b",
        "weights.bin/",
        "\uff57.bin",
    ]
    new = rng.choice([*odd, str(case.folder / old), f"sub/{old}", old.upper()])
    text = json.dumps(case.values).replace(json.dumps(old), json.dumps(new))
    case.values = json.loads(text)
    if rng.random() < 0.5 and new.startswith(("sub/", old.upper())):
        (case.folder / new).parent.mkdir(exist_ok=True)
        shutil.move(case.folder / old, case.folder / new)
    shutil.copytree(case.folder, case.folder.parent / "copy", ignore_dangling_symlinks=True)
    case.refused = new.startswith(("/", "../", "a/.."))
    case.notes.append(f"{old} -> {new!r}")
    case.write()
    case.signed = True


@mutation
def plans(case: Case, rng: random.Random) -> None:
    """Other segments, subnetworks, masks and orders, each sound by itself."""
    values, kind = case.values, rng.choice(["segments", "slots", "masks", "order", "subnets", "steps", "gated"])
    subnets, segments = values["subnets"], values["plan"]["segments"]
    if kind == "segments":
        rng.choice(segments)["subnet"] = rng.randrange(len(subnets) + 1)
    elif kind == "slots":
        part = rng.choice(rng.choice(subnets)["units"])
        part[rng.randrange(len(part))] = sorted(rng.sample(range(-1, 6), rng.randrange(6)))
    elif kind == "masks":
        index = rng.randrange(len(values["masks"]))
        values["masks"][index] = rng.randbytes(len(values["masks"][index]) // 2).hex()
    elif kind == "order":
        rng.shuffle(rng.choice(rng.choice(values["unit_order"])))
    elif kind == "subnets":
        rng.shuffle(subnets)
    elif kind == "gated":
        entry = rng.choice(subnets)
        entry["gated"] = not entry["gated"]
    else:
        for key in ("timesteps", "coefficients"):
            values["sampling"][key] = values["sampling"][key][:-1]
    case.notes.append(kind)
    case.write()
    case.signed = True


@mutation
def places_of_weights(case: Case, rng: random.Random) -> None:
    entry = case.values["weights"][rng.choice(sorted(case.values["weights"]))]
    kind = rng.choice(["offset", "shape", "dtype", "transposed"])
    if kind == "offset":
        entry["offset"] += rng.choice([1, 2, 64, -64, 1 << 40, -1])
    elif kind == "shape":
        entry["shape"] = [*entry["shape"], rng.choice([0, 1, 2, 1 << 40])]
    elif kind == "transposed":
        entry["shape"] = entry["shape"][::-1]
    else:
        entry["dtype"] = rng.choice(["float32", "float16", "bfloat16", "int8", "float8_e4m3fn", "float64"])
    case.notes.append(kind)
    case.write()
    case.signed = True


@mutation
def external_data_of_a_graph(case: Case, rng: random.Random) -> None:
    """Windows into weights that lie elsewhere: in other files, outside of them, or nowhere."""
    (case.folder.parent / "outside.bin").write_bytes((case.folder / "weights.bin").read_bytes())
    shutil.copy(case.folder / "weights.bin", case.folder.parent / "weights.bin")
    location = rng.choice(
        ["../outside.bin", "../weights.bin", str(case.folder.parent / "weights.bin"), "/dev/zero", ""]
    )
    kind = rng.choice(["location", "location", "offset", "length", "link"])

    def change(model: onnx.ModelProto) -> None:
        tensors = [tensor for tensor in model.graph.initializer if tensor.external_data]
        if not tensors:
            return
        for entry in rng.choice(tensors).external_data:
            if kind == "location" and entry.key == "location":
                entry.value, case.refused = location, True
            elif kind == "link" and entry.key == "location":
                entry.value, case.refused = "linked.bin", True
                (case.folder / "linked.bin").symlink_to(case.folder.parent / "outside.bin")
            elif entry.key == kind:
                entry.value = str(rng.choice([-1, 0, 1, 64, 1 << 40, (1 << 63) - 1]))

    case.notes.append(f"{kind} {location}")
    case.edit_graph(rng, change)


@mutation
def nodes_of_a_graph(case: Case, rng: random.Random) -> None:
    kind = rng.choice(["operator", "domain", "input", "gone", "doubled", "declared", "output"])

    def change(model: onnx.ModelProto) -> None:
        graph, node = model.graph, rng.choice(model.graph.node)
        if kind == "operator":
            node.op_type = rng.choice(["Add", "MatMul", "Identity", "Relu", "Loop", "NoSuchOperator"])
        elif kind == "domain":
            node.domain = rng.choice(["com.microsoft", "ai.onnx.ml", "evil.so"])
        elif kind == "input" and node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice(["x", "nothing", "", node.output[0]])
        elif kind == "gone":
            graph.node.remove(node)
        elif kind == "doubled":
            graph.node.add().CopyFrom(node)
        elif kind == "declared":
            given = rng.choice(graph.input)
            given.name = rng.choice(["y", given.name + "_", "x"])
        elif kind == "output":
            graph.output.remove(rng.choice(graph.output))

    case.notes.append(kind)
    case.edit_graph(rng, change)


@mutation
def texts_that_are_no_manifest(case: Case, rng: random.Random) -> None:
    file = case.folder / "manifest.json"
    text = file.read_text()
    odd = [
        *(
            "",
            "null",
            "[]",
            "{}",
            '"x"',
            "1" * 5000,
            "[" * 100_000,
            "\ufeff" + text,
            text + text,
            text[: len(text) // 2],
        ),
        *(text.replace("1", "NaN", 1), text.replace("1", "Infinity", 1), text.replace('"', "'"), "\0" + text),
        *('{"schema_version": 1, "model": ' + "[" * 5000 + "]" * 5000 + "}", text.replace(":", ": 1e999,", 1)),
        *('{"schema_version": 3}', '{"schema_version": "1"}', text.replace("{", '{"schema_version": 1, ', 1)),
    ]
    file.write_text(rng.choice(odd), encoding="utf-8")


@pytest.fixture(scope="module")
def originals(make_checkpoint, make_bundle) -> list[tuple[Path, Steps]]:
    """A bundle of each kind, and the outputs of its steps."""
    checkpoint = make_checkpoint(CONFIG)
    bundles = [make_bundle(checkpoint, steps=3, max_batch=4, **kind) for kind in KINDS]
    return [(bundle.path, run_steps(bundle, "onnxruntime")) for bundle in bundles]


def run_steps(bundle: Bundle, backend: str) -> Steps:
    """The outputs of all steps, each from the same latents and, of a multistep sampler, the same history."""
    model = bundle.manifest.model
    shape = (2, model.in_channels, model.input_size, model.input_size)
    rng, labels = np.random.default_rng(0), np.array([0, 1])
    x, noise, history = (rng.standard_normal(shape, np.float32) for _ in range(3))
    engine = open_backend(backend, bundle, BackendOptions(threads=1))
    with ResidentSubnets(engine) as subnets:
        runner = StepRunner(engine, subnets, labels, 2.0)
        steps = range(bundle.manifest.sampling.steps)
        states = [runner.run(step, State(x, history), noise, labels).state for step in steps]
    made = [each for state in states for each in (state.x, state.history) if each is not None]
    assert all(each.shape == shape and each.dtype == np.float32 for each in made)
    return made


class Watch:
    """Sees what Python opens, compiles and starts while it is on; an audit hook cannot be taken away again."""

    def __init__(self) -> None:
        self.inside: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event in WATCHED and not self._is_of_imports():
            self.seen.append(f"{event} {str(arguments)[:100]}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path = Path(os.fsdecode(arguments[0])).absolute()
            elsewhere = ".." not in path.parts and not path.is_relative_to(self.inside.parent)  # libraries' own files
            ours = path.is_relative_to(self.inside) or elsewhere
            changed = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not ours or (changed and path.is_relative_to(self.inside.parent)):
                self.seen.append(f"open {path}")

    def _is_of_imports(self) -> bool:
        frame = sys._getframe(2)
        while frame is not None:
            if "importlib" in frame.f_code.co_filename or "/collections/" in frame.f_code.co_filename:
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False

    @contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        self.inside, self.seen = folder, []
        try:
            yield
        finally:
            self.inside = None


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture
def limits() -> Iterator[None]:
    """No more memory than a small bundle needs, and no endless loops."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_MEMORY, before[1]))
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    resource.setrlimit(resource.RLIMIT_AS, before)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every entry below a folder, with size and time."""
    stats = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def test_a_mutant_is_refused_or_what_it_is(mutant: int, rng: random.Random, originals, watch, limits, tmp_path) -> None:
    number = rng.randrange(len(originals))
    source, expected = originals[number]
    folder = tmp_path / "bundle"
    shutil.copytree(source, folder)
    case = Case(folder, json.loads((folder / "manifest.json").read_text()))
    ORIGINAL_NAMES.update(case.names)
    mutate = MUTATIONS[mutant % len(MUTATIONS)]
    mutate(case, rng)
    about = f"{mutate.__name__} of {KINDS[number]}: {'; '.join(case.notes)}"
    backend = "torch" if rng.random() < 0.3 and not str(KINDS[number].get("precision")).startswith("int8") else ""
    before = snapshot(tmp_path)
    with watch.over(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            bundle = Bundle.open(folder)
            outputs = run_steps(bundle, "onnxruntime")
            assert not case.refused, f"{about}: it ran"
            if case.same or not case.signed:
                assert len(outputs) == len(expected), about
                assert all(np.array_equal(a, b) for a, b in zip(outputs, expected, strict=True)), about
            if backend:
                run_steps(bundle, backend)
            inspect(folder).text()
        except DyditError as error:
            line = str(error)
            assert "\n" not in line and line and len(line) < 2000 + 10 * len(str(folder)), about
            assert not case.same, f"{about}: {line}"
        except Exception as error:
            error.add_note(about)
            raise
    assert not watch.seen, f"{about}: {watch.seen}"
    assert snapshot(tmp_path) == before, about
