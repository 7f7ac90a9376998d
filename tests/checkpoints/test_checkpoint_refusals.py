from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dydit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from dydit.errors import CheckpointError
from dydit.models.config import ModelConfig, Routers
from dydit.models.dit.config import DiTConfig
from dydit.models.dit.diffusers import diffusers_names
from dydit.models.dit.model import DiT
from dydit.models.dit.states import choose_heads

State = dict[str, torch.Tensor]


def model_state(routers: Routers = Routers.FIRST_ON, **changes: int) -> tuple[ModelConfig, State]:
    sizes = {"hidden_size": 32, "depth": 2, "num_heads": 4, "patch_size": 2, "input_size": 8, "num_classes": 10}
    config = DiTConfig.model_validate({**sizes, "routers": routers, **changes})
    return config, dict(DiT(config).state_dict())


def refusal(path: Path, num_heads: int | None = None) -> str:
    """The message with which `path` is refused, without the path; it must be one line that starts with it."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, num_heads)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 400 + len(str(path))
    return message.removeprefix(f"{path}: ")


def spoiled(tmp_path: Path, change: Callable[[State], Any]) -> str:
    _, state = model_state()
    change(state)
    torch.save(state, tmp_path / "bad.pt")
    return refusal(tmp_path / "bad.pt")


def test_missing_keys(tmp_path: Path) -> None:
    message = spoiled(tmp_path, lambda s: [s.pop(name) for name in list(s) if name.startswith("blocks.1.attn")])
    assert (
        "6 missing (blocks.1.attn.qkv.weight, blocks.1.attn.qkv.bias, blocks.1.attn.proj.weight and 3 more)" in message
    )


def test_a_missing_block(tmp_path: Path) -> None:
    message = spoiled(tmp_path, lambda s: [s.pop(name) for name in list(s) if name.startswith("blocks.0.")])
    assert message.startswith("is not a checkpoint of a DiT: it has no blocks.0.attn_rate.router.weight")


def test_surplus_keys(tmp_path: Path) -> None:
    message = spoiled(tmp_path, lambda s: s.update({"blocks.0.lora.a\nb": torch.ones(1)}))
    assert "1 unknown ('blocks.0.lora.a\\nb')" in message and "missing" not in message


def test_wrong_shape(tmp_path: Path) -> None:
    message = spoiled(tmp_path, lambda s: s.update({"blocks.1.mlp.fc1.bias": torch.ones(127)}))
    assert message == (
        "has the wrong shape in 1 tensor (blocks.1.mlp.fc1.bias): blocks.1.mlp.fc1.bias is [127], expected [128]"
    )


def test_routers_of_different_layouts(tmp_path: Path) -> None:
    message = spoiled(tmp_path, lambda s: s.update({"blocks.1.mlp_rate.router.weight": torch.ones(4, 32)}))
    assert "blocks.1.mlp_rate.router.weight is [4, 32], expected [3, 32]" in message


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    weight = torch.zeros(32, 128, dtype=dtype)
    weight[5, 7] = value
    message = spoiled(tmp_path, lambda s: s.update({"blocks.1.mlp.fc2.weight": weight}))
    assert message.startswith("has NaN or infinite values in 1 tensor (blocks.1.mlp.fc2.weight)")


def test_values_that_do_not_fit_fp32(tmp_path: Path) -> None:
    huge = torch.full((128,), 1e300, dtype=torch.float64)
    assert "infinite values" in spoiled(tmp_path, lambda s: s.update({"blocks.0.mlp.fc1.bias": huge}))


@pytest.mark.parametrize("value", [torch.ones(128, dtype=torch.int8), 3, torch.ones(128).to_sparse()])
def test_values_that_are_not_float_tensors(tmp_path: Path, value: object) -> None:
    message = spoiled(tmp_path, lambda s: s.update({"blocks.1.mlp.fc1.bias": value}))  # type: ignore[dict-item]
    assert "blocks.1.mlp.fc1.bias" in message


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("pos_embed", torch.zeros(1, 15, 32), "has a pos_embed of 15 tokens; expected a square number"),
        ("x_embedder.proj.weight", torch.zeros(32, 16), "expected 4 dimensions"),
        ("final_layer.linear.weight", torch.zeros(33, 32), "has a final layer of 33 rows; expected 16"),
        ("blocks.900000.mlp.fc1.weight", torch.zeros(1, 32), "not numbered from 0 on"),
    ],
)
def test_shapes_of_no_dit(tmp_path: Path, name: str, tensor: torch.Tensor, expected: str) -> None:
    assert expected in spoiled(tmp_path, lambda s: s.update({name: tensor}))


def test_another_architecture(tmp_path: Path) -> None:
    resnet = {"conv1.weight": torch.ones(4, 3, 7, 7), "bn1.weight": torch.ones(4), "bn1.bias": torch.ones(4)}
    torch.save({**resnet, "fc.weight": torch.ones(10, 4), "fc.bias": torch.ones(10)}, tmp_path / "resnet.pt")
    message = refusal(tmp_path / "resnet.pt")
    assert message.startswith(
        "is not a checkpoint that dydit can read: it has none of x_embedder.proj.weight (of a DiT)"
    )
    assert "it holds conv1.weight, bn1.weight, bn1.bias and 2 more" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"opt": {}, "args": argparse.Namespace()}, "holds no state dict: expected tensors, or `ema` or `model`"),
        ({}, "it holds nothing"),
        (torch.ones(3), "holds Tensor, not a state dict"),
        ([torch.ones(3)], "holds list, not a state dict"),
        ({0: torch.ones(3)}, "a key that is not text: 0"),
        ({"ema": {"a": 1}}, "whose a is not a tensor but int"),
    ],
)
def test_files_without_a_state_dict(tmp_path: Path, content: object, expected: str) -> None:
    torch.save(content, tmp_path / "odd.pt")
    assert expected in refusal(tmp_path / "odd.pt")


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert refusal(tmp_path / "absent.pt") == "does not exist"
    assert refusal(tmp_path / "loop") == "does not exist"
    assert refusal(tmp_path / "pipe") == "is not a regular file"
    assert refusal(tmp_path / "folder").startswith("is not a checkpoint folder: expected config.json")
    assert refusal(tmp_path / ("long" * 100)).startswith("cannot be read: ")


def own_file(path: Path, **metadata: str) -> Path:
    config, state = model_state()
    save_file(state, path, {"format": "dydit", "version": "1", "config": config.model_dump_json()} | metadata)
    return path


def config_with(**changes: object) -> str:
    return json.dumps(model_state()[0].model_dump() | changes)


def test_own_file_is_valid_before_it_is_spoiled(tmp_path: Path) -> None:
    assert load_checkpoint(own_file(tmp_path / "m.safetensors")).config == model_state()[0]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"version": "2"}, "has version 2 of the dydit format; this dydit reads 1"),
        ({"config": "{"}, "has a configuration that is not JSON"),
        ({"config": "[" * 100_000}, "has a configuration that is not JSON"),
        ({"config": "[]"}, "is not a JSON object"),
        ({"config": config_with(depth=3)}, "18 missing (blocks.2.attn.qkv.weight"),
        ({"config": config_with(depth=10**12)}, "describes a model with depth above 10000"),
        ({"config": config_with(hidden_size=2**40)}, "describes a model with hidden_size above"),
        ({"config": config_with(input_size=2**80)}, "describes a model with tokens above"),
        ({"config": config_with(num_heads=5)}, "hidden_size 32 is not a multiple of num_heads 5"),
        ({"config": config_with(num_heads=8)}, "wrong shape in 8 tensors"),
        ({"config": config_with(windows=True)}, "windows is not a known setting"),
    ],
)
def test_own_format_with_bad_metadata(tmp_path: Path, metadata: dict[str, str], expected: str) -> None:
    assert expected in refusal(own_file(tmp_path / "m.safetensors", **metadata))


def diffusers_folder(folder: Path, change: Callable[[State], Any] = lambda state: None, **settings: object) -> Path:
    config, state = model_state(Routers.NONE)
    renamed: State = {}
    for name, tensor in state.items():
        names = diffusers_names(name, config.depth)
        pieces = tensor.chunk(3) if ".attn.qkv." in name else [tensor] * len(names)
        renamed.update({target: piece.clone() for target, piece in zip(names, pieces, strict=True)})
    change(renamed)
    values = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 4, "attention_head_dim": 8}
    values |= {"num_layers": 2, "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values | {"num_embeds_ada_norm": 10} | settings))
    save_file(renamed, folder / "diffusion_pytorch_model.safetensors")
    return folder


def test_diffusers_folder_is_valid_before_it_is_spoiled(tmp_path: Path) -> None:
    assert load_checkpoint(diffusers_folder(tmp_path / "f")).config == model_state(Routers.NONE)[0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"norm_type": "ada_norm_single"}, "norm_type must be 'ada_norm_zero'"),
        ({"activation_fn": "geglu"}, "activation_fn must be 'gelu-approximate'"),
        (
            {"_class_name": "SD3Transformer2DModel"},
            "SD3Transformer2DModel, which dydit does not have; expected one of: DiT",
        ),
        ({"out_channels": 7}, "has 7 output channels for 4 input channels"),
        ({"num_layers": 3}, "missing (transformer_blocks.0"),
        ({"num_attention_heads": 8}, "wrong shape in"),
        ({"sample_size": 10}, "pos_embed.pos_embed is [1, 16, 32], expected [1, 25, 32]"),
        ({"sample_size": 10**9}, "describes a model with tokens above"),
        ({"num_layers": None}, "num_layers must be a whole number"),
    ],
)
def test_diffusers_settings(tmp_path: Path, settings: dict[str, object], expected: str) -> None:
    message = refusal(diffusers_folder(tmp_path / "f", **settings))
    assert expected in message or (message.startswith("does not hold") and "transformer_blocks.2" in message)


TABLE = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s[TABLE].add_(1e-7), f"has blocks whose embedders differ ({TABLE})"),
        (lambda s: s.pop("transformer_blocks.1.attn1.to_k.bias"), "1 missing (transformer_blocks.1.attn1.to_k.bias)"),
        (lambda s: s.update({"norm_out.weight": torch.ones(3)}), "1 unknown (norm_out.weight)"),
        (lambda s: s.update({"proj_out_1.bias": torch.ones(3)}), "proj_out_1.bias is [3], expected [64]"),
        (lambda s: s["proj_out_2.bias"].fill_(torch.nan), "NaN or infinite values in 1 tensor (proj_out_2.bias)"),
    ],
)
def test_diffusers_weights(tmp_path: Path, change: Callable[[State], Any], expected: str) -> None:
    assert expected in refusal(diffusers_folder(tmp_path / "f", change))


def test_diffusers_folder_in_pieces(tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path / "f")
    weights = folder / "diffusion_pytorch_model.safetensors"
    assert "give the folder that holds both" in refusal(weights)
    weights.rename(folder / "diffusion_pytorch_model-00001-of-00002.safetensors")
    assert "it has shards (diffusion_pytorch_model-00001-of-00002.safetensors), but no index" in refusal(folder)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text("{}")
    assert "has an index without a weight_map" in refusal(folder)
    index.unlink()
    weights.write_bytes(b"")
    assert refusal(folder).startswith("is empty")
    (folder / "config.json").write_bytes(b"\xff{")
    assert refusal(folder) == "has a config.json that is not JSON"


def test_head_count_of_a_plain_dit_is_asked_for(tmp_path: Path) -> None:
    config, state = model_state(Routers.NONE)
    torch.save(state, tmp_path / "plain.pt")
    assert refusal(tmp_path / "plain.pt").startswith("does not show its number of heads; give it with --num-heads")
    assert load_checkpoint(tmp_path / "plain.pt", num_heads=4).config == config
    assert "cannot have 5 heads" in refusal(tmp_path / "plain.pt", num_heads=5)


def test_ambiguous_head_count_is_asked_for_or_taken_from_the_arguments(tmp_path: Path) -> None:
    config, state = model_state(hidden_size=48)  # three rows: three heads or four, and both divide 48
    path = tmp_path / "dydit.pt"
    torch.save({"ema": state, "args": argparse.Namespace(model="DiT-S/2")}, path)
    assert refusal(path).startswith("does not show its number of heads (3 or 4); give it with --num-heads")
    assert load_checkpoint(path, num_heads=4).config == config
    assert load_checkpoint(path, num_heads=3).config.routers is Routers.ALL_ROUTED
    assert "cannot have 6 heads: its hidden size 48 and its routers allow 4 or 3" in refusal(path, num_heads=6)
    torch.save({"ema": state, "args": argparse.Namespace(num_heads=4)}, path)
    assert load_checkpoint(path).config == config


def test_a_head_count_that_contradicts_the_file(tmp_path: Path) -> None:
    config, state = model_state()
    save_checkpoint(tmp_path / "m.safetensors", state, config)
    assert load_checkpoint(tmp_path / "m.safetensors", num_heads=4).config == config
    assert refusal(tmp_path / "m.safetensors", num_heads=8).startswith("states num_heads 4, not 8")
    assert refusal(diffusers_folder(tmp_path / "f"), num_heads=8).startswith("states num_heads 4, not 8")


def test_head_counts_of_the_published_sizes() -> None:
    for hidden, depth, heads in ((384, 12, 6), (768, 12, 12), (1024, 24, 16), (1152, 28, 16)):
        assert choose_heads(hidden, depth, None) == (heads, Routers.NONE)
        assert choose_heads(hidden, depth, heads - 1) == (heads, Routers.FIRST_ON)
        assert choose_heads(hidden, depth, heads) == (heads, Routers.ALL_ROUTED)
    assert choose_heads(384, 12, 7) == (8, Routers.FIRST_ON)  # a preset's sizes, but not its heads
    with pytest.raises(CheckpointError, match="neither 34 nor 35 heads divide 32"):
        choose_heads(32, 2, 34)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 24), st.integers(1, 16), st.sampled_from([Routers.FIRST_ON, Routers.ALL_ROUTED]))
def test_a_head_count_is_right_or_refused(heads: int, width: int, routers: Routers) -> None:
    hidden, rows = 4 * heads * width, heads - (routers is Routers.FIRST_ON)
    if rows == 0:
        return
    assert choose_heads(hidden, 3, rows, given=heads) == (heads, routers)
    other = heads - 1 if routers is Routers.FIRST_ON else heads + 1
    if hidden % other:
        assert choose_heads(hidden, 3, rows) == (heads, routers)
    else:
        with pytest.raises(CheckpointError, match="--num-heads"):
            choose_heads(hidden, 3, rows)
