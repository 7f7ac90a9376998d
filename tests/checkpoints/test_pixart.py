"""Folders of diffusers and original files of PixArt-alpha, against diffusers' own model where that is installed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dydit.checkpoints.checkpoint import convert, load_checkpoint, save_checkpoint
from dydit.diffusion.process import Process
from dydit.errors import CheckpointError
from dydit.models.config import Space
from dydit.models.pixart.config import PixArtConfig
from dydit.models.pixart.diffusers import diffusers_names
from dydit.models.pixart.model import PixArt
from dydit.models.synthetic import synthetic_model
from dydit.models.text import TextRows
from dydit.models.transformer.modules import sine_positions

STEM = "diffusion_pytorch_model"
State = dict[str, torch.Tensor]
CONFIG = PixArtConfig(
    hidden_size=24, depth=2, num_heads=3, input_size=8, caption_channels=12, text_tokens=6, routers="none"
)


# diffusers' model

SETTINGS: dict[str, dict[str, Any]] = {
    "256": {"sample_size": 32, "patch_size": 4},
    "512": {"sample_size": 64, "patch_size": 8},
    "1024": {"sample_size": 128, "patch_size": 16},  # with micro-conditions and a scale of 2, which diffusers knows
    "128-plain": {"sample_size": 128, "patch_size": 16, "use_additional_conditions": False},
    "8-micro": {"sample_size": 8, "use_additional_conditions": True, "interpolation_scale": 3},
    "no-sigma": {"sample_size": 8, "out_channels": 4, "num_attention_heads": 5, "attention_head_dim": 12},
    "one-head": {"sample_size": 8, "num_attention_heads": 1, "attention_head_dim": 24, "in_channels": 3},
}


def reference_of(seed: int = 0, **settings: Any) -> Any:
    """A random model of diffusers."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (pip install 'dydit[vae]')")
    values = {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 2, "caption_channels": 12} | settings
    values |= {"out_channels": settings.get("out_channels", 2 * settings.get("in_channels", 4))}
    values |= {"cross_attention_dim": values["num_attention_heads"] * values["attention_head_dim"]}
    model = diffusers.PixArtTransformer2DModel(**values).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def masks(full: int) -> list[torch.Tensor]:
    """Masks of texts up to `full` tokens long: every length, one with holes, one of padding alone."""
    lengths = [torch.arange(full) < length for length in range(1, full + 1)]
    holes = torch.arange(full) % 3 != 1
    return [*lengths, holes, torch.zeros(full, dtype=torch.bool)]


def outputs(reference: Any, config: PixArtConfig, model: PixArt, full: int) -> tuple[torch.Tensor, torch.Tensor]:
    """diffusers' output and ours, for a batch with a row for each mask."""
    mask = torch.stack(masks(full))
    generator, rows = torch.Generator().manual_seed(1), len(mask)
    side, dtype = config.input_size, reference.dtype
    x = torch.randn(rows, config.in_channels, side, side, generator=generator).to(dtype)
    text = torch.randn(rows, full, config.caption_channels, generator=generator).to(dtype)
    t = torch.linspace(0, 999, rows).round().long()
    size = torch.tensor([8.0 * side, 8.0 * side]).expand(rows, 2)
    conditions = {"resolution": size, "aspect_ratio": torch.ones(rows, 1)}
    with torch.no_grad():
        expected = reference(
            x,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=t,
            added_cond_kwargs=conditions if config.micro_conditions else {"resolution": None, "aspect_ratio": None},
        ).sample
        return expected, model(x, t, TextRows(text, mask))


@pytest.mark.numerics
@pytest.mark.parametrize("name", SETTINGS)
def test_a_saved_diffusers_model_loads_and_computes_the_same(tmp_path: Path, name: str) -> None:
    reference = reference_of(**SETTINGS[name])
    reference.save_pretrained(tmp_path / "transformer")
    checkpoint = load_checkpoint(tmp_path)
    config = checkpoint.config
    assert checkpoint.source == "diffusers" and isinstance(config, PixArtConfig) and checkpoint.notes == ()
    assert config.micro_conditions == (name in ("1024", "8-micro"))
    assert config.interpolation_scale == {"1024": 2, "128-plain": 2, "8-micro": 3}.get(name, 1)
    assert config.learn_sigma == (name != "no-sigma")
    model = checkpoint.model()
    # In fp32, scores of padding alone are rounded to a thousandth, so texts of padding alone are compared in float64.
    expected, actual = outputs(reference, config, model, 5)
    assert (actual[:-1] - expected[:-1]).norm() < 1e-5 * expected[:-1].norm()
    model.double().set_derived()  # sinusoids are computed in fp32 in every precision
    expected, actual = outputs(reference.double(), config, model, 5)
    for row, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert (one - other).norm() < 1e-9 * other.norm(), f"row {row}"
    assert all((expected[0] - other).norm() > 1e-3 * other.norm() for other in expected[1:]), "rows differ"


@pytest.mark.parametrize("settings", [{"norm_type": "ada_norm_single"}, {"_class_name": "PixArtTransformer2DModel"}])
def test_folders_of_either_class(tmp_path: Path, settings: dict[str, str]) -> None:
    folder = written(tmp_path / "f", **{"_class_name": "Transformer2DModel", **settings})
    assert_read(folder)


def test_a_dit_in_a_folder_of_the_shared_class_is_no_pixart(tmp_path: Path) -> None:
    folder = written(tmp_path / "f", _class_name="Transformer2DModel", norm_type="ada_norm_zero")
    assert "cross_attention_dim must be null" in refusal(folder)
    folder = written(tmp_path / "g", _class_name="Transformer2DModel", norm_type="layer_norm")
    assert "norm_type must be 'ada_norm_zero', not 'layer_norm'" in refusal(folder)


# Folders


def published(seed: int = 0, config: PixArtConfig = CONFIG) -> State:
    return dict(synthetic_model(config, seed).state_dict())


def renamed(state: State) -> State:
    target: State = {}
    for name, tensor in state.items():
        names = diffusers_names(name)
        pieces = tensor.chunk(len(names)) if len(names) > 1 else [tensor]
        target.update({new: piece.clone() for new, piece in zip(names, pieces, strict=True)})
    return target


def settings_of(**changes: object) -> dict[str, object]:
    values: dict[str, object] = {"_class_name": "PixArtTransformer2DModel", "num_attention_heads": 3}
    values |= {"attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2, "in_channels": 4}
    values |= {"out_channels": 8, "caption_channels": 12, "cross_attention_dim": 24, "norm_type": "ada_norm_single"}
    return {**values, **changes}


def written(
    folder: Path, name: str = f"{STEM}.safetensors", dtype: torch.dtype = torch.float32, **changes: object
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings_of(**changes)))
    state = {key: tensor.to(dtype) for key, tensor in renamed(published()).items()}
    (save_file if name.endswith(".safetensors") else torch.save)(state, folder / name)
    return folder


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


def assert_read(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    checkpoint = load_checkpoint(path, **options)
    sizes = checkpoint.config.sizes
    assert sizes == CONFIG.model_copy(update={"text_tokens": sizes.text_tokens})
    expected = published()
    assert checkpoint.state.keys() == expected.keys()
    assert all(torch.equal(checkpoint.state[name], tensor.to(dtype)) for name, tensor in expected.items())
    return checkpoint


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (f"{STEM}.safetensors", torch.bfloat16),
        (f"{STEM}.bin", torch.float32),
        (f"{STEM}.fp16.safetensors", torch.float16),
        (f"{STEM}.bf16.bin", torch.bfloat16),
    ],
)
def test_variants_and_types(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    assert (
        assert_read(written(tmp_path / "f", name, dtype), dtype).model().x_embedder.proj.weight.dtype == torch.float32
    )


def test_shards(tmp_path: Path) -> None:
    folder = written(tmp_path / "f")
    state = load_file(folder / f"{STEM}.safetensors")
    names, weight_map = sorted(state), {}
    for part in range(2):
        file = f"{STEM}-{part + 1:05}-of-00002.safetensors"
        save_file({name: state[name] for name in names[part::2]}, folder / file)
        weight_map |= dict.fromkeys(names[part::2], file)
    (folder / f"{STEM}.safetensors").unlink()
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_read(folder)


def test_a_whole_pipeline(tmp_path: Path) -> None:
    """The transformer is read, the scheduler states the process, and a VAE says that samples are latents."""
    written(tmp_path / "transformer")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    (tmp_path / "scheduler").mkdir()
    scheduler = {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "linear", "beta_start": 1e-4}
    scheduler |= {"beta_end": 0.02, "prediction_type": "epsilon", "num_train_timesteps": 1000}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    parts = {"transformer": ["diffusers", "Transformer2DModel"], "text_encoder": ["transformers", "T5EncoderModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtAlphaPipeline", **parts}))
    checkpoint = assert_read(tmp_path)
    assert checkpoint.config.space is Space.LATENTS and checkpoint.config.process == Process()
    scheduler["prediction_type"] = "flow_prediction"
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    assert "prediction_type flow_prediction" in refusal(tmp_path)


def test_the_embedding_of_no_text_in_older_folders(tmp_path: Path) -> None:
    folder = written(tmp_path / "f")
    file = folder / f"{STEM}.safetensors"
    save_file({**load_file(file), "caption_projection.y_embedding": torch.ones(6, 12)}, file)
    assert_read(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"_class_name": "PixArtSigma"},
            "_class_name PixArtSigma, which dydit does not have; expected one of: DiTTrans",
        ),
        ({"norm_type": "ada_norm_zero"}, "norm_type must be 'ada_norm_single', not 'ada_norm_zero'"),
        ({"activation_fn": "geglu"}, "activation_fn must be 'gelu-approximate'"),
        ({"caption_channels": None}, "caption_channels must be a whole number"),
        ({"cross_attention_dim": 32}, "has cross_attention_dim 32; expected 24"),
        ({"out_channels": 7}, "has 7 output channels for 4 input channels"),
        ({"norm_eps": 1e-5}, "has norm_eps 1e-05; a PixArt-alpha has 1e-06"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine must be False"),
        ({"attention_type": "gated"}, "attention_type must be 'default'"),
        ({"interpolation_scale": 0.5}, "interpolation_scale must be a whole number, not 0.5"),
        ({"quantization_config": {"bits": 8}}, "quantization_config must be null"),
        ({"use_additional_conditions": True}, "does not hold the tensors of the model it describes: 8 missing (adaln"),
        ({"num_layers": 3}, "does not hold the tensors of the model it describes"),
        ({"num_layers": 1}, "unknown (transformer_blocks.1"),
        ({"caption_channels": 13}, "has the wrong shape in 1 tensor (caption_projection.linear_1.weight)"),
        ({"caption_channels": 10**9}, "describes a model with caption_channels above"),
        ({"sample_size": 10**9}, "describes a model with tokens above"),
        ({"interpolation_scale": 10**400}, "describes a model with interpolation_scale above"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, changes: dict[str, object], expected: str) -> None:
    assert expected in refusal(written(tmp_path / "f", **changes))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.pop("adaln_single.linear.bias"), "1 missing (adaln_single.linear.bias)"),
        (lambda s: s.update({"pos_embed.pos_embed": torch.ones(1)}), "1 unknown (pos_embed.pos_embed)"),
        (lambda s: s["scale_shift_table"].fill_(torch.nan), "NaN or infinite values in 1 tensor (scale_shift_table)"),
        (
            lambda s: s.update({"transformer_blocks.1.attn2.to_k.weight": torch.ones(24, 12)}),
            "is [24, 12], expected [24,",
        ),
    ],
)
def test_weights_that_are_refused(tmp_path: Path, change: Callable[[State], Any], expected: str) -> None:
    folder = written(tmp_path / "f")
    state = load_file(folder / f"{STEM}.safetensors")
    change(state)
    save_file(state, folder / f"{STEM}.safetensors")
    assert expected in refusal(folder)


# Original files


def original(seed: int = 0, config: PixArtConfig = CONFIG) -> State:
    """A state dict as the original code saves it."""
    positions = sine_positions(config, config.interpolation_scale)
    no_text = torch.ones(config.text_tokens, config.caption_channels)
    return {"pos_embed": positions, "y_embedder.y_embedding": no_text, **published(seed, config)}


def training_file(path: Path, average: bool = True) -> Path:
    training = {"optimizer": {"state": {}, "param_groups": []}, "scheduler": {"last_epoch": 3}, "epoch": 7}
    averages = {"state_dict_ema": original(0)} if average else {}
    torch.save({"state_dict": original(1 if average else 0), **averages, **training}, path)
    return path


def test_original_files(tmp_path: Path) -> None:
    torch.save(original(), tmp_path / "bare.pth")
    bare = assert_read(tmp_path / "bare.pth", num_heads=3)
    assert bare.source == "pixart" and bare.config.text_tokens == 6
    assert [note for note in bare.notes if note.startswith("did not read y_embedder.y_embedding, which the original")]
    assert_read(training_file(tmp_path / "plain.pth", average=False), num_heads=3)
    average = assert_read(training_file(tmp_path / "ema.pth"), num_heads=3)
    assert average.metadata == {"weights": "state_dict_ema"}
    other = load_checkpoint(tmp_path / "ema.pth", num_heads=3, weights="model")
    assert torch.equal(other.state["t_block.1.weight"], published(1)["t_block.1.weight"])


def test_original_files_and_folders_hold_the_same_model(tmp_path: Path) -> None:
    micro = CONFIG.model_copy(update={"micro_conditions": True})
    torch.save(original(config=micro), tmp_path / "o.pth")
    folder = written(tmp_path / "f", use_additional_conditions=True)
    save_file(renamed(published(config=micro)), folder / f"{STEM}.safetensors")
    file, other = load_checkpoint(tmp_path / "o.pth", num_heads=3), load_checkpoint(folder)
    assert file.config == micro and other.config == micro.model_copy(update={"text_tokens": 120})
    assert file.state.keys() == other.state.keys() and len(file.state) == 2 * 15 + 23
    assert all(torch.equal(file.state[name], tensor) for name, tensor in other.state.items())


def test_the_published_size_has_16_heads() -> None:
    from dydit.models.pixart.config import preset
    from dydit.models.pixart.states import infer_config

    config = preset("XL/2", 128).without_routers()
    with torch.device("meta"):
        state = PixArt(config).state_dict() | {"pos_embed": torch.zeros(1, 4096, 1152)}
    inferred = infer_config(state).config
    assert inferred == config and inferred.num_heads == 16 and inferred.interpolation_scale == 2


def test_a_file_without_positions_needs_the_input_size(tmp_path: Path) -> None:
    state = original()
    del state["pos_embed"]
    torch.save(state, tmp_path / "o.pth")
    assert "does not show the side of its inputs" in refusal(tmp_path / "o.pth", num_heads=3)
    assert_read(tmp_path / "o.pth", num_heads=3, input_size=8)


def test_the_scale_of_positions_is_read_from_them(tmp_path: Path) -> None:
    wide = CONFIG.model_copy(update={"interpolation_scale": 2})
    torch.save({name: tensor.half() for name, tensor in original(config=wide).items()}, tmp_path / "o.pth")
    assert load_checkpoint(tmp_path / "o.pth", num_heads=3).config == wide
    torch.save({**original(), "pos_embed": torch.rand(1, 16, 24)}, tmp_path / "learned.pth")
    assert "has a pos_embed that is not the sine embedding" in refusal(tmp_path / "learned.pth", num_heads=3)


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        (lambda s: None, {}, "does not show its number of heads; give it with --num-heads"),
        (lambda s: None, {"num_heads": 5}, "cannot have 5 heads"),
        (lambda s: None, {"input_size": 16}, "has a pos_embed of inputs with a side of 8, not 16"),
        (lambda s: None, {"num_classes": 10}, "has no classes; remove --num-classes"),
        (lambda s: s.update(pos_embed=torch.ones(1, 15, 24)), {}, "has a pos_embed of 15 tokens; expected a square"),
        (lambda s: s.update(pos_embed=torch.ones(1, 16, 1)), {}, "has a pos_embed that is not the sine embedding"),
        (lambda s: s.update(pos_embed=torch.full((1, 16, 24), torch.nan)), {}, "not the sine embedding"),
        (lambda s: s.pop("t_block.1.weight"), {}, "1 missing (t_block.1.weight)"),
        (lambda s: s.pop("y_embedder.y_proj.fc1.weight"), {}, "a PixArt-alpha: it has no y_embedder.y_proj.fc1.weight"),
        (lambda s: s.update({"blocks.0.attn.sr.weight": torch.ones(2)}), {}, "1 unknown (blocks.0.attn.sr.weight)"),
        (lambda s: s.pop("blocks.1.cross_attn.kv_linear.bias"), {}, "1 missing (blocks.1.cross_attn.kv_linear.bias)"),
        (lambda s: s.update({"final_layer.linear.weight": torch.ones(17, 24)}), {}, "has a final layer of 17 rows"),
        (lambda s: s.update({"csize_embedder.mlp.0.bias": torch.ones(8)}), {}, "missing (csize_embedder.mlp.0.weight"),
    ],
)
def test_original_files_that_are_refused(
    tmp_path: Path, change: Callable[[State], Any], options: dict[str, int], expected: str
) -> None:
    state = original()
    change(state)
    torch.save(state, tmp_path / "o.pth")
    heads = {} if "number of heads" in expected else {"num_heads": 3}
    assert expected in refusal(tmp_path / "o.pth", **{**heads, **options})


def test_folder_weights_without_their_configuration(tmp_path: Path) -> None:
    folder = written(tmp_path / "f")
    shutil.move(folder / f"{STEM}.safetensors", tmp_path / "alone.safetensors")
    assert "give the folder that holds both" in refusal(tmp_path / "alone.safetensors")
    assert refusal(folder).startswith("is not a diffusers folder: expected")


# Our own format


@pytest.mark.parametrize("routers", ["none", "first-on", "all-routed"])
def test_own_format(tmp_path: Path, routers: str) -> None:
    config = PixArtConfig(**{**CONFIG.model_dump(), "routers": routers, "micro_conditions": True})
    model = synthetic_model(config)
    save_checkpoint(tmp_path / "own.safetensors", model, config)
    checkpoint = load_checkpoint(tmp_path / "own.safetensors")
    assert checkpoint.config == config
    assert all(torch.equal(checkpoint.state[name], tensor) for name, tensor in model.state_dict().items())
    again = checkpoint.model()
    assert torch.equal(again.pos_embed, model.pos_embed)
    times = torch.tensor([3, 900])
    assert torch.equal(again.embed_timestep(times), model.embed_timestep(times))
    assert torch.equal(checkpoint.width_router_model().embed_timestep(times), model.embed_timestep(times))


def test_conversion(tmp_path: Path) -> None:
    torch.save(original(), tmp_path / "o.pth")
    converted = convert(tmp_path / "o.pth", tmp_path / "own.safetensors", num_heads=3)
    assert converted.config == CONFIG and converted.metadata["source"] == "pixart"
    assert "y_embedder.y_embedding" in converted.metadata["assumed"]


def test_routers_show_the_number_of_heads(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"routers": "first-on"})
    dynamic = PixArtConfig(**config.model_dump())
    torch.save({"model": published(config=dynamic) | {"pos_embed": sine_positions(dynamic)}}, tmp_path / "o.pt")
    checkpoint = load_checkpoint(tmp_path / "o.pt", num_heads=3)
    assert checkpoint.source == "dydit"
    assert checkpoint.config == dynamic.model_copy(update={"text_tokens": 120})
    assert "--num-heads" in refusal(tmp_path / "o.pt"), "2 rows are of 2 heads, or of 3"
