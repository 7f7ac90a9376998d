"""Mutated checkpoints: each is refused in one line, or read as exactly what it says. See `conftest` for how many.

What a mutant may do is part of it. "refused": `CheckpointError`, and nothing else. "read": the configuration and every
bit of the weights are those that the mutant was built to say, or that an independent reading of its bytes gives. So a
mutant whose weights were changed on purpose is read with them, and one that only looks different as the original. In no
case does code of the file run, and none asks for more memory than a small file needs.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import random
import resource
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as safetensors_of
from safetensors.torch import save as safetensors_bytes

from dydit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from dydit.diffusion.process import Process
from dydit.errors import CheckpointError
from dydit.models.config import ModelConfig
from dydit.models.dit.config import DiTConfig
from dydit.models.dit.diffusers import diffusers_names
from dydit.models.synthetic import synthetic_model
from dydit.models.uvit.config import UViTConfig

State = dict[str, torch.Tensor]
CONFIG = DiTConfig(hidden_size=16, depth=2, num_heads=4, patch_size=2, input_size=4, num_classes=5)
STATIC = CONFIG.without_routers()
MODEL, EMA = (dict(synthetic_model(CONFIG, seed).state_dict()) for seed in (1, 2))
PLAIN = dict(synthetic_model(STATIC, 3).state_dict())
U_VIT_CONFIG = UViTConfig(
    hidden_size=16, depth=3, num_heads=4, patch_size=2, input_size=4, num_classes=5, null_class_row=True
)
U_VIT, U_VIT_EMA = (dict(synthetic_model(U_VIT_CONFIG, seed).state_dict()) for seed in (4, 5))
VP_SDE = Process(schedule="vp-sde")
ARGUMENTS = {"model": "DiT", "image_size": 32, "num_classes": 5, "vae": "ema", "lr": 1e-4}
STEM = "diffusion_pytorch_model"
SPARE_MEMORY = 4 << 30


@dataclass
class Case:
    """A mutant: what to open, what it says (`None`: nothing that can be read), and whether it may or must be read."""

    path: Path
    state: Mapping[str, torch.Tensor] | None = None
    config: ModelConfig = CONFIG
    must_read: bool = False
    process: Process | None = None
    options: dict[str, Any] = field(default_factory=dict)


Mutation = Callable[[random.Random, Path], Case]
MUTATIONS: list[Mutation] = []


def mutation(function: Mutation) -> Mutation:
    MUTATIONS.append(function)
    return function


def training(ema: Any = None, **entries: Any) -> dict[str, Any]:
    optimizer = {"state": {0: {"exp_avg": torch.ones(4), "step": 3}}, "param_groups": [{"lr": 0.1}]}
    return {"model": MODEL, "ema": ema or EMA, "opt": optimizer, "args": argparse.Namespace(**ARGUMENTS), **entries}


def saved(rng: random.Random, folder: Path, content: Any) -> Path:
    torch.save(content, folder / "a.pt", _use_new_zipfile_serialization=rng.random() < 0.7)
    return folder / "a.pt"


def some(rng: random.Random, state: Mapping[str, Any], fits: Callable[[Any], bool] = lambda each: True) -> str:
    return rng.choice([name for name, each in state.items() if fits(each)])


# Bytes


def mangled(rng: random.Random, data: bytes) -> bytes:
    """A few bytes flipped, set, inserted, deleted, repeated, or the end cut off."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        place = rng.randrange(len(out)) if rng.random() < 0.5 else rng.randrange(min(len(out), 3000))
        length = rng.choice([1, 1, 2, 7, 64])
        kind = rng.randrange(6)
        if kind == 0:
            out[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif kind == 2:
            out[place:place] = rng.randbytes(length)
        elif kind == 3:
            del out[place : place + length]
        elif kind == 4:
            out[place:place] = out[place : place + length]
        else:
            del out[rng.randrange(len(out)) :]
        if not out:
            return b"\0"
    return bytes(out)


def torch_bytes(content: Any, legacy: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


@mutation
def bytes_of_a_zip(rng: random.Random, folder: Path) -> Case:
    """Its checksums cover all that matters: whatever still loads is the original."""
    (folder / "a.pt").write_bytes(mangled(rng, torch_bytes(training(), legacy=False)))
    return Case(folder / "a.pt", EMA)


@mutation
def bytes_of_an_old_torch_file(rng: random.Random, folder: Path) -> Case:
    """No checksums: it says what PyTorch's own safe loading finds in it."""
    path = folder / "a.pt"
    path.write_bytes(mangled(rng, torch_bytes({"ema": EMA}, legacy=True)))
    try:
        content = torch.load(path, weights_only=True)
        (state,) = [each for each in content.values() if isinstance(each, dict)] or [None]
    except Exception:
        return Case(path)
    return Case(path, state)


def safetensors_said(data: bytes) -> State | None:
    try:
        return dict(safetensors_of(data))
    except Exception:
        return None


@mutation
def bytes_of_safetensors(rng: random.Random, folder: Path) -> Case:
    data = mangled(rng, safetensors_bytes(EMA))
    (folder / "a.safetensors").write_bytes(data)
    return Case(folder / "a.safetensors", safetensors_said(data))


@mutation
def bytes_of_our_own_format(rng: random.Random, folder: Path) -> Case:
    path = folder / "a.safetensors"
    save_checkpoint(path, EMA, CONFIG)
    path.write_bytes(mangled(rng, path.read_bytes()))
    return Case(path, safetensors_said(path.read_bytes()))


@mutation
def header_of_safetensors(rng: random.Random, folder: Path) -> Case:
    own = rng.random() < 0.5
    save_checkpoint(folder / "own", EMA, CONFIG)
    data = (folder / "own").read_bytes() if own else safetensors_bytes(EMA)
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = some(rng, {key: 0 for key in header if key != "__metadata__"})
    entry = header[name]
    huge = rng.choice([1 << 40, 1 << 63, -1, 0, 10**30])
    kind = rng.randrange(8)
    if kind == 0:
        entry["dtype"] = rng.choice(["F16", "BF16", "F64", "I32", "U32", "F8_E4M3", "BOOL", "X", 3, None])
    elif kind == 1:
        entry["shape"] = rng.choice([entry["shape"][::-1], [huge], [huge, huge], [], "x", [1.5], None])
    elif kind == 2:
        entry["data_offsets"] = rng.choice([[0, huge], [huge, huge], [4, 0], [0], None, [0, len(body)]])
    elif kind == 3:
        header[name + "2"] = dict(entry)
    elif kind == 4:
        header[rng.choice(["x", name.upper(), "module." + name])] = header.pop(name)
    elif kind == 5:
        del header[name]
    elif kind == 6:
        header["__metadata__"] = rng.choice(
            [{"a": 3}, [], "x", None, {"format": "dydit"}, {"format": "dydit", "version": "1"}]
        )
    else:
        entry["extra"] = "[" * 1000
    text = json.dumps(header).encode()
    size = rng.choice([len(text)] * 6 + [0, len(text) - 1, len(text) + 1, 1 << 40, (1 << 64) - 1])
    made = size.to_bytes(8, "little") + text + body
    (folder / "a.safetensors").write_bytes(made)
    return Case(folder / "a.safetensors", safetensors_said(made))


# Structure


@mutation
def renamed(rng: random.Random, folder: Path) -> Case:
    name = some(rng, EMA)
    place = rng.randrange(len(name))
    other = rng.choice([name[:place] + rng.choice("x.0") + name[place + 1 :], name.upper(), name + "\n", "", name[1:]])
    state = {other if each == name else each: tensor for each, tensor in EMA.items()}
    return Case(saved(rng, folder, training(state)), EMA if other == name else None)


@mutation
def dropped(rng: random.Random, folder: Path) -> Case:
    """The position embedding can be computed, from what the arguments say; nothing else can be missing."""
    name = some(rng, EMA)
    state = {each: tensor for each, tensor in EMA.items() if each != name}
    return Case(saved(rng, folder, training(state)), EMA if name == "pos_embed" else None)


@mutation
def duplicated(rng: random.Random, folder: Path) -> Case:
    name = some(rng, EMA)
    other = rng.choice(
        ["module." + name, name.replace("blocks.0", "blocks.2"), name + ".copy", "net." + name, "x." + name]
    )
    state = {**EMA, other: rng.choice([EMA[name], EMA[name] + 1])}
    return Case(saved(rng, folder, training(state)), state if other == name else None)


@mutation
def behind_a_prefix(rng: random.Random, folder: Path) -> Case:
    words = ["module", "_orig_mod", "model", "net", "ema_model", "a", "0", "ünï", "blocks", "x" * 50]
    prefix = "".join(f"{rng.choice(words)}." for _ in range(rng.randrange(1, 4)))
    state = {prefix + name: tensor for name, tensor in EMA.items()}
    return Case(saved(rng, folder, rng.choice([state, {"state_dict": state}, training(state)])), EMA, must_read=True)


@mutation
def with_other_modules_beside(rng: random.Random, folder: Path) -> Case:
    state: dict[str, Any] = {"model." + name: tensor for name, tensor in EMA.items()}
    for _ in range(rng.randrange(1, 4)):
        state[f"{rng.choice(['vae', 'loss', 'text'])}.{rng.choice(['a', 'blocks.0.attn.qkv.weight'])}"] = torch.ones(3)
    return Case(saved(rng, folder, {"state_dict": state, "hyper_parameters": {"lr": 1}}), EMA, must_read=True)


@mutation
def nested(rng: random.Random, folder: Path) -> Case:
    content: Any = {"ema": EMA}
    depth = rng.randrange(6)
    for _ in range(depth):
        content = {rng.choice(["state", "checkpoint", "ckpt", "a.b", "model"]): content, "step": 3}
    return Case(saved(rng, folder, content), EMA, must_read=depth < 3)


@mutation
def in_another_entry(rng: random.Random, folder: Path) -> Case:
    entry = rng.choice(["ema", "model", "state_dict", "model_state_dict", "state_dict_ema", "module", "x", "EMA", "üñ"])
    extra = rng.choice([{}, {"epoch": 1}, {"optimizer": {"state": {}}}, {"model": {}}, {"ema": None}, {"x2": [1, 2]}])
    return Case(saved(rng, folder, {**extra, entry: EMA}), EMA, must_read=True)


@mutation
def of_two_models(rng: random.Random, folder: Path) -> Case:
    """Two that nothing tells apart are not chosen from."""
    names = rng.sample(["teacher", "student", "model", "a", "b"], 2)
    return Case(saved(rng, folder, dict(zip(names, (EMA, MODEL), strict=True))))


@mutation
def which_weights(rng: random.Random, folder: Path) -> Case:
    wanted, state = rng.choice(
        [("ema", EMA), ("model", MODEL), ("opt", None), ("", None), ("x" * 500, None), ("args", None)]
    )
    return Case(saved(rng, folder, training()), state, must_read=state is not None, options={"weights": wanted})


@mutation
def values_of_other_kinds(rng: random.Random, folder: Path) -> Case:
    name = some(rng, EMA)
    dense = EMA[name]
    plain = [None, 3, "x", [dense], {"a": dense}, (dense,), {}, dense.numpy()]
    dtypes = [dense.to(kind) for kind in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)]
    layouts = [dense.to_sparse(), torch.empty(dense.shape, device="meta")]
    value: Any = rng.choice([*plain, *dtypes, *layouts, torch.nn.Parameter(dense.to(torch.int64), False)])
    return Case(saved(rng, folder, training({**EMA, name: value})))


@mutation
def keys_of_other_kinds(rng: random.Random, folder: Path) -> Case:
    key: Any = rng.choice([0, None, 1.5, b"x", ("a", "b"), True, torch.float32])
    return Case(saved(rng, folder, rng.choice([training({**EMA, key: torch.ones(3)}), {"ema": {**EMA, key: "x"}}])))


@mutation
def other_dtypes(rng: random.Random, folder: Path) -> Case:
    kinds = [torch.float16, torch.bfloat16, torch.float64, torch.float32]
    one = rng.choice(kinds)
    state = {name: tensor.to(rng.choice(kinds) if rng.random() < 0.3 else one) for name, tensor in EMA.items()}
    return Case(saved(rng, folder, training(state)), state, must_read=True)


@mutation
def other_shapes(rng: random.Random, folder: Path) -> Case:
    name = some(rng, EMA, lambda each: each.ndim > 0)
    tensor = EMA[name]
    more = [tensor[None], tensor[..., None], torch.cat([tensor, tensor]), torch.ones(()), torch.ones(3, 3)]
    other = [
        tensor.flatten(),
        tensor[:0],
        tensor.transpose(0, -1),
        tensor.flip(0),
        tensor[..., :-1],
        tensor.reshape(-1, 1),
    ]
    changed = rng.choice([*more, *other])
    fits = changed.shape == tensor.shape
    return Case(saved(rng, folder, training({**EMA, name: changed})), {**EMA, name: changed} if fits else None)


@mutation
def not_finite(rng: random.Random, folder: Path) -> Case:
    name = some(rng, EMA)
    changed = EMA[name].clone()
    changed.view(-1)[rng.randrange(changed.numel())] = rng.choice([torch.nan, torch.inf, -torch.inf])
    return Case(saved(rng, folder, training({**EMA, name: changed})))


@mutation
def all_zero(rng: random.Random, folder: Path) -> Case:
    blocks_alone = rng.random() < 0.5
    state = {
        name: torch.zeros_like(each) if not blocks_alone or name.startswith("blocks.") else each
        for name, each in EMA.items()
    }
    return Case(saved(rng, folder, training(state)))


# Storages


@mutation
def sharing_storages(rng: random.Random, folder: Path) -> Case:
    """Windows, overlaps, strides, expanded zeros: each says values, wherever they lie."""
    pool, state = torch.randn(1 << 13), dict(EMA)
    for name in rng.sample(sorted(EMA), rng.randrange(1, len(EMA))):
        shape, count = EMA[name].shape, EMA[name].numel()
        kind = rng.randrange(5)
        if kind == 0:
            state[name] = torch.randn(()).expand(shape)
        elif kind == 1 and 2 * count < len(pool):
            first = rng.randrange(len(pool) - 2 * count)
            state[name] = (
                pool[first : first + 2 * count : rng.choice([1, 2])][:count].view(shape) if count > 1 else EMA[name]
            )
        elif kind == 2 and len(shape) == 2:
            state[name] = torch.randn(shape[1], shape[0]).t()
        elif kind == 3:
            state[name] = torch.as_strided(pool, shape, [rng.randrange(0, 3) for _ in shape], rng.randrange(100))
        else:
            same = [each for each in EMA if EMA[each].shape == shape]
            state[name] = state[rng.choice(same)]
    return Case(saved(rng, folder, training(state)), state, must_read=True)


@mutation
def claims_of_any_size(rng: random.Random, folder: Path) -> Case:
    """Small files that describe huge tensors, one of them or a whole model: refused before anything is allocated."""
    if rng.random() < 0.5:
        name = some(rng, EMA)
        shape = rng.choice([(1 << 20, 1 << 20), (1 << 40,), (1, 1 << 30, 1 << 10), (*EMA[name].shape, 1 << 30)])
        return Case(saved(rng, folder, training({**EMA, name: torch.zeros(1).expand(shape)})))
    factor = rng.choice([1 << 8, 1 << 11, 1 << 12])
    depth = rng.choice([2, 200])
    state = {}
    for block in range(depth):
        for name, tensor in EMA.items():
            shape = [size * factor if size % 16 == 0 else size for size in tensor.shape]
            if name != "pos_embed" or rng.random() < 0.5:
                state[name.replace("blocks.0.", f"blocks.{block}.")] = torch.zeros(1).expand(shape)
    return Case(saved(rng, folder, {"ema": state}), options={"input_size": rng.choice([4, 512])})


# Code


class Call:
    """A pickle of it calls `function` wherever it is loaded."""

    def __init__(self, function: Any, *arguments: Any):
        self.called = function, arguments

    def __reduce__(self) -> Any:
        return self.called


def attack(rng: random.Random, canary: Path) -> Call:
    import functools
    import os
    import subprocess

    text = f"open({str(canary)!r}, 'w').close()"
    return rng.choice(
        [
            Call(os.system, f"touch {canary}"),
            Call(exec, text),
            Call(eval, text),
            Call(subprocess.call, ["touch", str(canary)]),
            Call(open, str(canary), "w"),
            Call(os.mkdir, str(canary)),
            Call(functools.partial, os.system, f"touch {canary}"),
            Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {canary}"))),
            Call(Path.touch, canary),
            Call(np.save, str(canary), np.ones(1)),
            Call(torch.save, {}, str(canary)),
            Call(getattr, "os", "system"),
            Call(__import__, "antigravity"),
        ]
    )


@mutation
def with_code(rng: random.Random, folder: Path) -> Case:
    evil = attack(rng, folder / "canary")
    name = some(rng, EMA)
    content = rng.choice(
        [
            training(args=argparse.Namespace(x=evil)),
            training(args=evil),
            training({**EMA, name: evil}),
            training({"x": evil, **EMA}),
            training(opt=evil),
            training(extra=[{"a": (evil,)}]),
            evil,
            [evil, training()],
        ]
    )
    if rng.random() < 0.2:
        (folder / "a.pt").write_bytes(pickle.dumps(content, rng.randrange(6)))
        return Case(folder / "a.pt")
    return Case(saved(rng, folder, content))


@mutation
def records_of_a_zip(rng: random.Random, folder: Path) -> Case:
    """Archives with right checksums whose records were compressed, dropped, renamed, repeated or replaced."""
    items = {}
    with zipfile.ZipFile(io.BytesIO(torch_bytes(training(), legacy=False))) as archive:
        items = {item.filename: archive.read(item) for item in archive.infolist()}
    name, kind = some(rng, items), rng.randrange(6)
    evil = pickle.dumps(attack(rng, folder / "canary"), 2)
    method = zipfile.ZIP_DEFLATED if kind == 0 else zipfile.ZIP_STORED
    if kind == 1:
        del items[name]
    elif kind == 2:
        items[rng.choice(["../" + name, "/etc/x", name + "x", "b/data.pkl"])] = items.pop(name)
    elif kind == 3:
        items[next(each for each in items if each.endswith("data.pkl"))] = evil
    elif kind == 4:
        items[name] = mangled(rng, items[name]) if items[name] else b"x"
    elif kind == 5:
        items[rng.choice(["a/extra.pkl", "a/code/x.py", "a/constants.pkl"])] = evil
    with zipfile.ZipFile(folder / "a.pt", "w", method) as archive:
        for each, data in items.items():
            archive.writestr(each, data)
    try:  # with its checksums right, an archive says what PyTorch's own safe loading finds in it
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(folder / "a.pt", weights_only=True)["ema"]
    except Exception:
        state = EMA  # such as one whose average cannot be read, but whose name is another
    return Case(folder / "a.pt", state)


@mutation
def other_arguments(rng: random.Random, folder: Path) -> Case:
    refused: dict[str, list[Any]] = {
        "path_type": ["Linear", "VP"],
        "prediction": ["velocity", "x"],
        "predict_v": ["x", 2],
        "diffusion_steps": [500, 4000],
        "noise_schedule": ["sigmoid", "scaled_linear"],
        "beta_end": [0.012],
        "num_classes": [7, 1000, 0, -1],
        "image_size": [33, 56],
        "learn_sigma": [False],
        "use_rope": [True],
        "num_heads": [2, 3],
    }
    harmless: list[Any] = [
        np.float32(3),
        Path("/x"),
        [1],
        None,
        "velocity",
        {"a": 1},
        1 << 70,
        torch.ones(2),
        {1, 2},
        b"x",
    ]
    harmful = rng.random() < 0.5
    name = rng.choice(list(refused)) if harmful else rng.choice(["seed", "wandb", "ünï", "", "data_path"])
    value = rng.choice(refused[name] if harmful else harmless)
    content = training(args=argparse.Namespace(**{**ARGUMENTS, name: value}))
    return Case(saved(rng, folder, content), None if harmful else EMA, must_read=not harmful)


@mutation
def another_training(rng: random.Random, folder: Path) -> Case:
    """Stated in one place or in two, which agree or do not."""
    known: list[tuple[str, Any, Process]] = [
        ("prediction", "v", Process(prediction="v")),
        ("predict_xstart", True, Process(prediction="x0")),
        ("parameterization", "eps", Process()),
        ("v_prediction", True, Process(prediction="v")),
    ]
    (name, value, process), (other, second, differing) = rng.choice(known), rng.choice(known)
    schedule = rng.choice(["linear", "cosine"])
    arguments = argparse.Namespace(**{**ARGUMENTS, name: value, "noise_schedule": schedule})
    content = training(args=arguments, **({"config": {other: second}} if rng.random() < 0.5 else {}))
    agree = "config" not in content or process == differing
    expected = Process(prediction=process.prediction, schedule=schedule)
    return Case(saved(rng, folder, content), EMA if agree else None, must_read=agree, process=expected)


@mutation
def odd_arguments(rng: random.Random, folder: Path) -> Case:
    """Settings that we look at, with values that make no sense: refused, or without effect on the weights."""
    names = ["num_classes", "class_dropout_prob", "image_size", "num_heads", "learn_sigma", "model", "diffusion_steps"]
    name = rng.choice([*names, "beta_start", "prediction", "path_type", "use_rope", "qk_norm", "predict_v"])
    value: Any = rng.choice(
        [None, -5, 1 << 2000, float("nan"), float("inf"), "x" * 10_000, "\n", [], {}, b"x", (1,), 0.5]
    )
    state = {each: tensor for each, tensor in EMA.items() if each != "pos_embed"} if rng.random() < 0.3 else EMA
    return Case(saved(rng, folder, training(state, args=argparse.Namespace(**{**ARGUMENTS, name: value}))), EMA)


# U-ViT


@mutation
def names_of_a_u_vit(rng: random.Random, folder: Path) -> Case:
    state, name = dict(U_VIT), some(rng, U_VIT)
    other = rng.choice([name, f"{name}x", name.replace("_blocks.", "_blocks.9"), name.upper(), f"mid_block.{name}"])
    state[other] = state.pop(name)
    content = rng.choice([state, {"nnet_ema": state, "step": 3}, {f"module.{each}": state[each] for each in state}])
    return Case(saved(rng, folder, content), U_VIT if other == name else None, U_VIT_CONFIG, other == name, VP_SDE)


@mutation
def shapes_of_a_u_vit(rng: random.Random, folder: Path) -> Case:
    name = some(rng, {each: 0 for each in U_VIT if each != "label_emb.weight"})  # which may have any number of rows
    shape = list(U_VIT[name].shape)
    place = rng.randrange(len(shape))
    shape[place] = rng.choice([0, shape[place] + 1, 2 * shape[place], 1 << 20 if len(shape) == 1 else 1 << 10])
    return Case(saved(rng, folder, {**U_VIT, name: torch.ones(shape)}))


@mutation
def training_folder_of_a_u_vit(rng: random.Random, folder: Path) -> Case:
    """One of its files is absent, or has a few other bytes, which checksums tell."""
    states, wanted = {"ema": U_VIT_EMA, "model": U_VIT}, rng.choice([None, "ema", "model", "step"])
    files = {"ema": folder / "nnet_ema.pth", "model": folder / "nnet.pth"}
    for entry, state in states.items():
        torch.save(state, files[entry])
    (folder / "optimizer.pth").write_bytes(b"what is not read")
    touched, absent = rng.choice([*states]), rng.random() < 0.5
    if absent:
        files.pop(touched).unlink()
    else:
        files[touched].write_bytes(mangled(rng, files[touched].read_bytes()))
    chosen = wanted or next(iter(files))
    state = states[chosen] if chosen in files else None
    must_read = state is not None and (absent or chosen != touched)
    return Case(folder, state, U_VIT_CONFIG, must_read, VP_SDE, {"weights": wanted})


# Folders of diffusers


def diffusers_state() -> State:
    state: State = {}
    for name, tensor in PLAIN.items():
        names = diffusers_names(name, STATIC.depth)
        pieces = tensor.chunk(3) if ".attn.qkv." in name else [tensor] * len(names)
        state.update({target: piece.clone() for target, piece in zip(names, pieces, strict=True)})
    return state


SETTINGS = {
    **{"_class_name": "DiTTransformer2DModel", "num_attention_heads": 4, "attention_head_dim": 4, "num_layers": 2},
    **{"sample_size": 4, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 5},
}


def pipeline(folder: Path) -> Path:
    inner = folder / "transformer"
    inner.mkdir()
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "DDIMScheduler", "beta_start": 0.0001, "beta_end": 0.02, "prediction_type": "epsilon"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (inner / "config.json").write_text(json.dumps(SETTINGS))
    state, weight_map = diffusers_state(), {}
    for part in range(2):
        file, names = f"{STEM}-0000{part + 1}-of-00002.safetensors", sorted(state)[part::2]
        (inner / file).write_bytes(safetensors_bytes({name: state[name] for name in names}))
        weight_map |= dict.fromkeys(names, file)
    (inner / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def trained(folder: Path) -> Process | None:
    """What the scheduler of a pipeline says, read by other code; None if that is nonsense."""
    try:
        values = json.loads((folder / "scheduler" / "scheduler_config.json").read_bytes())
        names = {"epsilon": "epsilon", "eps": "epsilon", "noise": "epsilon", "v_prediction": "v", "sample": "x0"}
        said = {name: value for name, value in values.items() if value is not None}
        betas = float(said.get("beta_start", 0.0001)), float(said.get("beta_end", 0.02))
        return Process(prediction=names[said.get("prediction_type", "epsilon").strip().lower()], betas=betas)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


@mutation
def settings_of_diffusers(rng: random.Random, folder: Path) -> Case:
    """Whatever is said of sizes is held against the tensors; the number of heads is said there alone."""
    path = pipeline(folder) / rng.choice(["transformer/config.json", "scheduler/scheduler_config.json"])
    values = json.loads(path.read_text())
    key = rng.choice([*values, "norm_eps", "attention_type", "trained_betas", "use_flow_sigmas", "x"])
    before = values.get(key)
    values[key] = rng.choice([None, 0, -1, 3, 1 << 40, 10**40, 0.5, "x", [], {}, True, "v_prediction", float("nan")])
    if rng.random() < 0.2:
        del values[key]
    if rng.random() < 0.2:
        values |= {"num_attention_heads": 2, "attention_head_dim": 8}
    path.write_text(json.dumps(values))
    config = STATIC
    if path.name == "config.json" and isinstance(values.get("num_attention_heads"), int):
        config = STATIC.model_copy(update={"num_heads": int(values["num_attention_heads"])})
    must_read = before == values.get(key) and config == STATIC
    return Case(folder, PLAIN, config, must_read, process=trained(folder))


@mutation
def bytes_of_a_folder(rng: random.Random, folder: Path) -> Case:
    files = [file for file in sorted(pipeline(folder).rglob("*")) if file.is_file() and file.suffix == ".json"]
    path = rng.choice(files)
    path.write_bytes(mangled(rng, path.read_bytes()))
    try:
        said = json.loads((folder / "transformer" / "config.json").read_text())["num_attention_heads"]
        config = STATIC.model_copy(update={"num_heads": int(said)})
    except (ValueError, KeyError, TypeError, RecursionError):
        return Case(folder)
    return Case(folder, PLAIN, config, process=trained(folder))


@mutation
def index_of_shards(rng: random.Random, folder: Path) -> Case:
    (folder / "secret.safetensors").write_bytes(safetensors_bytes(diffusers_state()))
    path = pipeline(folder) / "transformer" / f"{STEM}.safetensors.index.json"
    values = json.loads(path.read_text())
    weight_map = values["weight_map"]
    name, other = (
        some(rng, weight_map),
        rng.choice(["../secret.safetensors", "/dev/zero", "config.json", "", ".", "x", 3]),
    )
    kind = rng.randrange(5)
    if kind == 0:
        weight_map[name] = other
    elif kind == 1:
        del weight_map[name]
    elif kind == 2:
        weight_map[name + "x"] = weight_map[name]
    elif kind == 3:
        weight_map[name] = next(each for each in weight_map.values() if each != weight_map[name])
    else:
        values = rng.choice([[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": 3}, "x"])
    path.write_text(json.dumps(values))
    return Case(folder, config=STATIC)


# What is held


@pytest.fixture(scope="module", autouse=True)
def little_memory() -> Iterator[None]:
    """An address space that a claim of many gigabytes does not fit in; refusals must not come from that."""
    status = Path("/proc/self/status")
    if not status.exists():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = next(line for line in status.read_text().splitlines() if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, ((int(size.split()[1]) << 10) + SPARE_MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


RUNS_CODE = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pickle.find_class",
    "socket.connect",
)
watched: dict[str, Any] = {"on": False, "seen": []}


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's own record of what runs; it cannot be taken out again, so it is switched."""
    if watched["on"] and (
        event in RUNS_CODE or (event == "open" and isinstance(arguments[1], str) and "w" in arguments[1])
    ):
        watched["seen"].append((event, arguments))


sys.addaudithook(watch)


def test_a_mutant_is_refused_or_read_as_what_it_says(mutant: int, rng: random.Random, tmp_path: Path) -> None:
    mutate = MUTATIONS[mutant % len(MUTATIONS)]
    torch.manual_seed(rng.randrange(1 << 30))
    case = mutate(rng, tmp_path)
    watched.update(on=True, seen=[])
    try:
        checkpoint = load_checkpoint(case.path, **case.options)
    except CheckpointError as error:
        message = str(error)
        assert (
            message.startswith(f"{case.path}: ") and message.isprintable() and len(message) < 700 + len(str(case.path))
        )
        assert "not enough memory" not in message, f"{mutate.__name__}: something large was asked for"
        assert not case.must_read, f"{mutate.__name__}: refused: {message}"
        return
    else:
        model = checkpoint.model().state_dict()
    finally:
        watched["on"] = False
        assert not watched["seen"] and not (tmp_path / "canary").exists(), f"{mutate.__name__}: {watched['seen']}"
        shutil.rmtree(tmp_path)
    assert case.state is not None, f"{mutate.__name__}: accepted"
    config = checkpoint.config
    expected = case.config.model_copy(update={"process": case.process})
    assert config.model_copy(update={"num_classes": case.config.num_classes}) == expected, mutate.__name__
    said = {name.removeprefix("module."): tensor for name, tensor in case.state.items()}
    assert checkpoint.state.keys() == said.keys()
    for name, tensor in checkpoint.state.items():
        assert tensor.dtype == said[name].dtype and torch.equal(tensor, said[name]), f"{mutate.__name__}: {name}"
        assert torch.equal(model[name], tensor.float())
