from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dydit.checkpoints.checkpoint import Checkpoint, convert, load_checkpoint, save_checkpoint
from dydit.checkpoints.fit import expected_shapes
from dydit.errors import CheckpointError, OutputError
from dydit.files import sha256_of
from dydit.models.config import ModelConfig, Routers
from dydit.models.dit.config import DiTConfig
from dydit.models.dit.diffusers import diffusers_names
from dydit.models.dit.model import DiT
from dydit.models.routers import Masked, Recording


def config(routers: Routers = Routers.FIRST_ON, **changes: object) -> ModelConfig:
    sizes = {"hidden_size": 32, "depth": 2, "num_heads": 4, "patch_size": 2, "input_size": 8, "num_classes": 10}
    return DiTConfig.model_validate({**sizes, "routers": routers, **changes})


def random_model(routers: Routers = Routers.FIRST_ON, seed: int = 0, **changes: object) -> DiT:
    model = DiT(config(routers, **changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def inputs(model: DiT) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    side, channels = model.config.input_size, model.config.in_channels
    x = torch.randn(3, channels, side, side, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 500, 999]), torch.tensor([0, 7, model.config.null_class])


def output(model: DiT) -> torch.Tensor:
    with torch.no_grad():
        return model(*inputs(model))


def diffusers_state(model: DiT) -> dict[str, torch.Tensor]:
    """The weights of a static `model` as diffusers lays them out, the position embedding left out."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name != "pos_embed":
            names = diffusers_names(name, model.config.depth)
            pieces = tensor.chunk(3) if ".attn.qkv." in name else [tensor] * len(names)
            state.update({target: piece.clone() for target, piece in zip(names, pieces, strict=True)})
    return state


def diffusers_config(model: DiT) -> dict[str, object]:
    c = model.config
    return {
        "_class_name": "DiTTransformer2DModel",
        "_diffusers_version": "0.42.1",
        "num_attention_heads": c.num_heads,
        "attention_head_dim": c.head_dim,
        "num_layers": c.depth,
        "sample_size": c.input_size,
        "patch_size": c.patch_size,
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "num_embeds_ada_norm": c.num_classes,
        "norm_type": "ada_norm_zero",
        "activation_fn": "gelu-approximate",
        "norm_eps": 1e-5,
    }


def write_folder(folder: Path, model: DiT, **extra: torch.Tensor) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(diffusers_config(model)))
    save_file({**diffusers_state(model), **extra}, folder / "diffusion_pytorch_model.safetensors")
    return folder


def assert_same_model(checkpoint: Checkpoint, model: DiT) -> None:
    assert checkpoint.config == model.config
    assert checkpoint.state.keys() == model.state_dict().keys()
    assert torch.equal(output(checkpoint.model()), output(model))


@pytest.mark.parametrize("routers", [Routers.FIRST_ON, Routers.ALL_ROUTED])
def test_the_models_of_these_tests_have_gates_of_both_kinds(routers: Routers) -> None:
    model = random_model(routers)
    gating = Recording(Masked(), model.config)
    with torch.no_grad():
        model(*inputs(model), gating)
    decisions = gating.decisions()
    shares = model.config.units.shares(decisions.units.numpy())
    assert shares.keys() == {"heads", "groups"}
    for share in (*shares.values(), decisions.tokens.mean()):
        assert 0 < share < 1


@pytest.mark.parametrize("routers", list(Routers))
def test_own_format_round_trip(tmp_path: Path, routers: Routers) -> None:
    model, path = random_model(routers, learn_sigma=False, in_channels=3), tmp_path / "deep" / "model.safetensors"
    save_checkpoint(path, model, model.config, {"step": "7", "note": "naïve ✓"})
    loaded = load_checkpoint(path)
    assert loaded.source == "dydit-safetensors" and loaded.path == path and loaded.sha256 == sha256_of(path)
    assert loaded.metadata == {"step": "7", "note": "naïve ✓"}
    assert_same_model(loaded, model)
    again = tmp_path / "again.safetensors"
    save_checkpoint(again, loaded.state, loaded.config, dict(reversed(loaded.metadata.items())))
    assert again.read_bytes() == path.read_bytes()


def test_own_format_is_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    model, path = random_model(), tmp_path / "model.safetensors"
    save_checkpoint(path, model, model.config, {"step": "7"})
    tensors = load_file(path)
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32} and "pos_embed" in tensors
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"], metadata["step"]) == ("dydit", "1", "7")
    assert DiTConfig.model_validate_json(metadata["config"]) == model.config
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_loaded_model_is_independent_fp32_and_in_eval_mode(tmp_path: Path) -> None:
    model, path = random_model(), tmp_path / "half.pt"
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    half["final_layer.linear.bias"] = half["final_layer.linear.bias"].bfloat16()
    torch.save(half, path)
    checkpoint = load_checkpoint(path)
    first = checkpoint.model()
    assert {tensor.dtype for tensor in first.state_dict().values()} == {torch.float32}
    assert not first.training and not any(tensor.is_meta for tensor in first.buffers())
    assert [name for name, parameter in first.named_parameters() if not parameter.requires_grad] == ["pos_embed"]
    save_checkpoint(tmp_path / "full.safetensors", model, model.config)
    for file in (path, tmp_path / "full.safetensors"):
        checkpoint = load_checkpoint(file)
        before = output(checkpoint.model())
        with torch.no_grad():
            checkpoint.model().final_layer.linear.weight.zero_()
        assert torch.equal(output(checkpoint.model()), before)


@pytest.mark.parametrize("legacy", [False, True])
def test_plain_dit(tmp_path: Path, legacy: bool) -> None:
    model, path = random_model(Routers.NONE), tmp_path / "DiT.pt"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    checkpoint = load_checkpoint(path, num_heads=4)
    assert checkpoint.source == "dit" and checkpoint.metadata == {} and checkpoint.sha256 == sha256_of(path)
    assert_same_model(checkpoint, model)


def training_file(path: Path, **entries: object) -> Path:
    """As DyDiT's training writes it, with optimiser state and arguments."""
    model = DiT(config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(*inputs(model)).sum().backward()
    optimizer.step()
    arguments = argparse.Namespace(model="DiT-XL/2", image_size=256, lr=1e-4, data_path="/data")
    torch.save({"opt": optimizer.state_dict(), "args": arguments, **entries}, path)
    return path


@pytest.mark.parametrize("routers", [Routers.FIRST_ON, Routers.ALL_ROUTED])
def test_training_file_gives_its_ema(tmp_path: Path, routers: Routers) -> None:
    model, ema = random_model(routers, seed=1), random_model(routers, seed=2)
    prefixed = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    path = training_file(tmp_path / "dydit.pt", model=prefixed, ema=ema.state_dict())
    checkpoint = load_checkpoint(path)
    assert checkpoint.source == "dydit" and checkpoint.metadata == {"weights": "ema"}
    assert_same_model(checkpoint, ema)
    assert not torch.equal(output(ema), output(model))


@pytest.mark.parametrize("empty", [{}, {"ema": None}, {"ema": {}}])
def test_training_file_without_ema_gives_its_model_without_the_prefix(tmp_path: Path, empty: dict[str, object]) -> None:
    model = random_model()
    prefixed = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoint = load_checkpoint(training_file(tmp_path / "dydit.pth", model=prefixed, **empty))
    assert checkpoint.metadata == {"weights": "model"}
    assert_same_model(checkpoint, model)


def test_state_dict_with_routers_and_no_wrapping(tmp_path: Path) -> None:
    model = random_model(Routers.ALL_ROUTED)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    save_file(model.state_dict(), tmp_path / "a.safetensors", metadata={"format": "pt"})
    for name in ("a.pt", "a.safetensors"):
        checkpoint = load_checkpoint(tmp_path / name)
        assert checkpoint.source == "dydit" and checkpoint.metadata == {}
        assert_same_model(checkpoint, model)


def test_the_format_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    model = random_model()
    save_checkpoint(tmp_path / "model.pt", model, model.config)
    assert load_checkpoint(str(tmp_path / "model.pt")).source == "dydit-safetensors"


def test_own_format_is_recognised_whatever_the_length_of_its_header(tmp_path: Path) -> None:
    # The file begins with that length, a multiple of 8, so its first byte takes 32 values; 0x80 also begins a pickle.
    model, path, first = random_model(depth=1), tmp_path / "model.safetensors", set()
    for length in range(0, 256, 8):
        save_checkpoint(path, model, model.config, {"note": "x" * length})
        first.add(path.read_bytes()[0])
        assert load_checkpoint(path).source == "dydit-safetensors"
    assert len(first) == 32 and 0x80 in first


@pytest.mark.parametrize("inner", ["", "transformer"])
@pytest.mark.parametrize("stored_positions", [False, True])
def test_diffusers_folder_gives_the_bits_of_the_plain_file(tmp_path: Path, inner: str, stored_positions: bool) -> None:
    model = random_model(Routers.NONE)
    extra = {"pos_embed.pos_embed": model.pos_embed.detach()} if stored_positions else {}
    folder = write_folder(tmp_path / "pipeline" / inner, model, **extra)
    checkpoint = load_checkpoint(tmp_path / "pipeline")
    assert checkpoint.source == "diffusers" and checkpoint.path == tmp_path / "pipeline"
    assert checkpoint.sha256 == sha256_of(folder / "diffusion_pytorch_model.safetensors")
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    plain = load_checkpoint(tmp_path / "plain.pt", num_heads=4)
    assert torch.equal(output(checkpoint.model()), output(plain.model()))
    assert_same_model(checkpoint, model)


def test_diffusers_folder_with_torch_weights(tmp_path: Path) -> None:
    model = random_model(Routers.NONE)
    folder = write_folder(tmp_path / "dit", model)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(diffusers_state(model), folder / "diffusion_pytorch_model.bin")
    assert_same_model(load_checkpoint(folder), model)


def test_diffusers_names_are_those_of_the_official_conversion() -> None:
    # From huggingface/diffusers, scripts/convert_dit_to_diffusers.py.
    shapes = expected_shapes(config(Routers.NONE))
    names = {name for published in shapes for name in diffusers_names(published, 2)}
    parts = ["norm1.emb.timestep_embedder.linear_1", "norm1.emb.timestep_embedder.linear_2", "norm1.linear"]
    parts += ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"]
    linear = [f"transformer_blocks.{block}.{part}" for block in (0, 1) for part in parts]
    linear += ["pos_embed.proj", "proj_out_1", "proj_out_2"]
    expected = {f"{name}.{kind}" for name in linear for kind in ("weight", "bias")} | {"pos_embed.pos_embed"}
    expected |= {f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight" for i in (0, 1)}
    assert names == expected
    in_order = {
        "x_embedder.proj.weight": ["pos_embed.proj.weight"],
        "final_layer.adaLN_modulation.1.weight": ["proj_out_1.weight"],
        "final_layer.linear.bias": ["proj_out_2.bias"],
        "t_embedder.mlp.2.bias": [f"transformer_blocks.{i}.{parts[1]}.bias" for i in (0, 1)],
        "blocks.1.adaLN_modulation.1.bias": ["transformer_blocks.1.norm1.linear.bias"],
        "blocks.1.attn.qkv.weight": [f"transformer_blocks.1.attn1.to_{part}.weight" for part in "qkv"],
        "blocks.1.attn.proj.bias": ["transformer_blocks.1.attn1.to_out.0.bias"],
        "blocks.1.mlp.fc1.weight": ["transformer_blocks.1.ff.net.0.proj.weight"],
        "blocks.1.mlp.fc2.weight": ["transformer_blocks.1.ff.net.2.weight"],
    }
    assert {name: diffusers_names(name, 2) for name in in_order} == in_order


def test_convert_keeps_the_model_and_names_the_origin(tmp_path: Path) -> None:
    ema = random_model()
    source = training_file(tmp_path / "dydit.pt", ema=ema.state_dict(), model=random_model(seed=3).state_dict())
    target = tmp_path / "out" / "model.safetensors"
    converted = convert(source, target)
    assert converted.path == target and converted.source == "dydit-safetensors"
    assumed = converted.metadata.pop("assumed")
    assert converted.metadata == {"weights": "ema", "source": "dydit", "source_sha256": sha256_of(source)}
    assert "also holds model" in assumed and "the last of the 11 rows" in assumed and len(converted.notes) == 2
    assert_same_model(converted, ema)
    copied = convert(target, tmp_path / "copy.safetensors")
    assert copied.sha256 == converted.sha256


def test_convert_refuses_an_existing_target(tmp_path: Path) -> None:
    model = random_model()
    save_checkpoint(tmp_path / "a.safetensors", model, model.config)
    (tmp_path / "b.safetensors").write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"b\.safetensors exists already"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == b"precious"


def test_convert_with_a_head_count(tmp_path: Path) -> None:
    model = random_model(Routers.NONE)
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    assert_same_model(convert(tmp_path / "plain.pt", tmp_path / "new.safetensors", num_heads=4), model)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "x"}, "metadata format, which is a reserved key or not text"),
        ({"step": 7}, "metadata step, which is a reserved key or not text"),
        ({"note": "\ud800"}, "not valid text"),
    ],
)
def test_save_refuses_metadata(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    model = random_model()
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path / "m.safetensors", model, model.config, metadata)
    assert not list(tmp_path.iterdir())


def test_save_refuses_what_it_could_not_read_again(tmp_path: Path) -> None:
    model, path = random_model(), tmp_path / "m.safetensors"
    save_checkpoint(path, model, model.config)
    before = path.read_bytes()
    other_heads = model.config.model_copy(update={"num_heads": 8})
    with pytest.raises(CheckpointError, match="not that of the model"):
        save_checkpoint(path, model, other_heads)
    state = model.state_dict()
    with pytest.raises(CheckpointError, match=r"2 missing \(pos_embed, x_embedder.proj.bias\)"):
        save_checkpoint(
            path, {k: v for k, v in state.items() if k not in ("pos_embed", "x_embedder.proj.bias")}, model.config
        )
    model.final_layer.linear.bias.data[0] = torch.nan
    with pytest.raises(CheckpointError, match=r"NaN or infinite values in 1 tensor \(final_layer.linear.bias\)"):
        save_checkpoint(path, model, model.config)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_width_routers_decide_as_the_model_does(make_checkpoint) -> None:
    import numpy as np

    from dydit.planning.masks import freeze_masks

    checkpoint, timesteps = make_checkpoint(), np.arange(0, 1000, 37)
    model = checkpoint.width_router_model()
    masks = freeze_masks(model, timesteps)
    assert 0 < masks.mean() < 1 and np.array_equal(masks, freeze_masks(checkpoint.model(), timesteps))
    held = sum(tensor.nbytes for tensor in model.parameters() if not tensor.is_meta)
    whole = sum(tensor.nbytes for tensor in checkpoint.model().parameters())
    assert held < whole / 3
    assert model.blocks[0].mlp.fc1.weight.is_meta and not model.blocks[0].mlp_rate.router.weight.is_meta
