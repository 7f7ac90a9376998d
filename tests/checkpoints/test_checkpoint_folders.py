"""Folders of diffusers models: variants, shards, and what a pipeline's scheduler says."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.checkpoints.diffusers_scheduler import SCHEDULERS, scheduler_claims
from dydit.checkpoints.stated_process import read_process
from dydit.diffusion.process import Process
from dydit.errors import BundleError, CheckpointError
from dydit.models.config import Routers
from dydit.models.dit.config import DiTConfig
from dydit.models.dit.diffusers import diffusers_names
from dydit.models.synthetic import synthetic_model

CONFIG = DiTConfig(
    hidden_size=32, depth=2, num_heads=4, patch_size=2, input_size=8, num_classes=10, routers=Routers.NONE
)
STEM = "diffusion_pytorch_model"
State = dict[str, torch.Tensor]


def published(seed: int = 0) -> State:
    return dict(synthetic_model(CONFIG, seed).state_dict())


def renamed(seed: int = 0) -> State:
    state: State = {}
    for name, tensor in published(seed).items():
        names = diffusers_names(name, CONFIG.depth)
        pieces = tensor.chunk(3) if ".attn.qkv." in name else [tensor] * len(names)
        state.update({target: piece.clone() for target, piece in zip(names, pieces, strict=True)})
    return state


def transformer(folder: Path, **settings: object) -> Path:
    """A folder with the configuration alone."""
    values = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 4, "attention_head_dim": 8}
    values |= {"num_layers": 2, "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values | {"num_embeds_ada_norm": 10} | settings))
    return folder


def whole(folder: Path, name: str = f"{STEM}.safetensors", seed: int = 0, **settings: object) -> Path:
    if not folder.exists():
        transformer(folder, **settings)
    (save_file if name.endswith(".safetensors") else torch.save)(renamed(seed), folder / name)
    return folder


def in_shards(folder: Path, kind: str = "safetensors", index: str | None = None) -> Path:
    transformer(folder)
    state = renamed()
    names, weight_map = sorted(state), {}
    for part in range(3):
        file = f"{STEM}-{part + 1:05}-of-00003.{kind}"
        chosen = {name: state[name] for name in names[part::3]}
        (save_file if kind == "safetensors" else torch.save)(chosen, folder / file)
        weight_map |= dict.fromkeys(chosen, file)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / (index or f"{STEM}.{kind}.index.json")).write_text(text)
    return folder


def assert_whole(path: Path, seed: int = 0, process: Process | None = None, **options: Any) -> None:
    checkpoint = load_checkpoint(path, **options)
    assert checkpoint.config == CONFIG.model_copy(update={"process": process}) and checkpoint.source == "diffusers"
    expected = published(seed)
    assert checkpoint.state.keys() == expected.keys()
    assert all(torch.equal(checkpoint.state[name], tensor) for name, tensor in expected.items())


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", [f"{STEM}.fp16.safetensors", f"{STEM}.fp16.bin", f"{STEM}.non_ema.safetensors"])
def test_weights_saved_as_a_variant(tmp_path: Path, name: str) -> None:
    assert_whole(whole(tmp_path / "f", name))
    assert load_checkpoint(tmp_path / "f").metadata["weights"] in ("fp16", "non_ema")


def test_which_variant(tmp_path: Path) -> None:
    folder = whole(tmp_path / "f", f"{STEM}.fp16.safetensors", 1)
    whole(folder, f"{STEM}.non_ema.safetensors", 2)
    assert refusal(folder).startswith(
        "holds its weights in several variants (fp16, non_ema); choose one with --weights"
    )
    assert_whole(folder, 1, weights="fp16")
    assert_whole(folder, 2, weights="model")
    whole(folder, f"{STEM}.bin", 3)
    assert_whole(folder, 3)
    assert "also holds fp16, non_ema" in load_checkpoint(folder).notes[0]
    assert "holds no weights int4; its variants are: fp16, non_ema" in refusal(folder, weights="int4")
    assert refusal(folder, weights="ema").startswith("holds no weights ema")


def test_an_average_in_a_folder_of_its_own(tmp_path: Path) -> None:
    whole(tmp_path / "transformer", seed=1)
    whole(tmp_path / "transformer_ema", seed=2)
    assert_whole(tmp_path, 1)
    assert_whole(tmp_path, 2, weights="ema")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_shards(tmp_path: Path, kind: str) -> None:
    assert_whole(in_shards(tmp_path / "f", kind))
    assert load_checkpoint(tmp_path / "f").sha256 == load_checkpoint(tmp_path / "f").sha256


@pytest.mark.parametrize("name", [f"{STEM}.safetensors.index.fp16.json", f"{STEM}.fp16.safetensors.index.json"])
def test_weights_in_shards_of_a_variant(tmp_path: Path, name: str) -> None:
    assert_whole(in_shards(tmp_path / "f", index=name))


def test_the_hash_covers_every_shard(tmp_path: Path) -> None:
    folder = in_shards(tmp_path / "f")
    before = load_checkpoint(folder).sha256
    file = folder / f"{STEM}-00003-of-00003.safetensors"
    from safetensors.torch import load_file

    save_file(
        {name: tensor + 1 for name, tensor in load_file(file).items() if "embedder" not in name}
        | {name: tensor for name, tensor in load_file(file).items() if "embedder" in name},
        file,
    )
    assert load_checkpoint(folder).sha256 != before


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = in_shards(tmp_path / "f")
    (folder / f"{STEM}-00002-of-00003.safetensors").unlink()
    assert refusal(folder).startswith(f"lacks 1 of its 3 shards ({STEM}-00002-of-00003.safetensors)")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", 3, None])
def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, name: object) -> None:
    folder = in_shards(tmp_path / "f")
    save_file(renamed(), tmp_path / "secret.safetensors")
    index = folder / f"{STEM}.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["proj_out_1.weight"] = name
    index.write_text(json.dumps(values))
    assert "which is not in the same folder" in refusal(folder)


def test_an_index_that_is_not_of_its_shards(tmp_path: Path) -> None:
    folder = in_shards(tmp_path / "f")
    index = folder / f"{STEM}.safetensors.index.json"
    values = json.loads(index.read_text())
    name, file = next(iter(values["weight_map"].items()))
    del values["weight_map"][name]
    index.write_text(json.dumps(values))
    assert f"does not match the tensors in {file} ({name})" in refusal(folder)
    index.write_text("[1]")
    assert "that is not a JSON object" in refusal(folder)


def test_shards_behind_links_as_a_hub_caches_them(tmp_path: Path) -> None:
    folder = in_shards(tmp_path / "f")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.move(file, blobs / str(number))
        file.symlink_to(blobs / str(number))
    assert_whole(folder)


DDPM = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}
PLAIN = {**DDPM, "trained_betas": None, "prediction_type": "epsilon"}


def pipeline(folder: Path, **scheduler: object) -> Path:
    whole(folder / "transformer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


@pytest.mark.parametrize(
    "kind", ["DDPM", "DDIM", "PNDM", "DPMSolverMultistep", "EulerDiscrete", "HeunDiscrete", "UniPCMultistep"]
)
def test_how_a_scheduler_samples_does_not_matter(tmp_path: Path, kind: str) -> None:
    more = {"rescale_betas_zero_snr": False, "thresholding": True, "predict_x0": True, "timestep_spacing": "trailing"}
    folder = pipeline(tmp_path / "p", **PLAIN, _class_name=f"{kind}Scheduler", **more)
    assert_whole(folder, process=Process())
    assert_whole(folder / "transformer", process=Process())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {}),
        ({"prediction_type": "v_prediction"}, {"prediction": "v"}),
        ({"prediction_type": "sample"}, {"prediction": "x0"}),
        ({"beta_start": 0.00085}, {"betas": (0.00085, 0.02)}),
        ({"beta_end": 0.012}, {"betas": (0.0001, 0.012)}),
        ({"beta_schedule": "scaled_linear"}, {"schedule": "scaled-linear", "betas": (0.0001, 0.02)}),
        (
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
            {"schedule": "scaled-linear", "betas": None},
        ),
        (
            {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
            {"schedule": "cosine", "prediction": "v"},
        ),
        ({"_class_name": "HeunDiscreteScheduler", "beta_start": None, "beta_end": None}, {"betas": (0.00085, 0.012)}),
    ],
)
def test_what_a_scheduler_says_about_the_training(
    tmp_path: Path, change: dict[str, object], expected: dict[str, Any]
) -> None:
    folder = pipeline(tmp_path / "p", **{**PLAIN, "_class_name": "DDIMScheduler", **change})
    for place in (folder, folder / "transformer"):
        assert load_checkpoint(place).config.process == Process(**expected)
        assert load_checkpoint(place).notes == ()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"beta_schedule": "exp"}, "the scheduler of its pipeline says beta_schedule exp"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"num_train_timesteps": 4000}, "num_train_timesteps 4000"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
        ({"beta_start": "x"}, "beta_start x"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type continuous"),
        ({"_class_name": "LCMScheduler"}, "scheduler is LCMScheduler"),
        ({"_class_name": None}, "scheduler is None"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "is FlowMatchEulerDiscreteScheduler: such a model gets 10",
        ),
        (
            {"use_flow_sigmas": True},
            "has use_flow_sigmas: such a model gets 1000 * sigma as its time and predicts noise",
        ),
        ({"prediction_type": "flow_prediction"}, "has prediction_type flow_prediction: such a model gets 1000 * sigma"),
    ],
)
def test_schedulers_of_another_training_are_refused(tmp_path: Path, change: dict[str, object], expected: str) -> None:
    folder = pipeline(tmp_path / "p", **{**PLAIN, "_class_name": "DDIMScheduler", **change})
    for place in (folder, folder / "transformer"):
        message = refusal(place)
        assert expected in message and len(message) < 400
        assert refusal(place, schedule="flow") == message, "no option overrules it"


def test_betas_that_no_training_has(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "p", **PLAIN | {"beta_start": 0.5, "beta_end": 0.1}, _class_name="DDIMScheduler")
    assert refusal(folder).startswith(
        "cannot have been trained with its betas (the scheduler of its pipeline says beta_st"
    )


def test_the_scheduler_the_metadata_and_the_user_must_agree(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "p", **PLAIN, _class_name="DDIMScheduler")
    assert refusal(folder, prediction="v") == (
        "was trained in another way than --prediction v: the scheduler of its pipeline says prediction_type epsilon; "
        "remove --prediction"
    )
    assert "--betas 0.001,0.02: the scheduler of its pipeline says beta_start 0.0001" in refusal(
        folder, betas=(0.001, 0.02)
    )
    assert_whole(folder, process=Process(), prediction="epsilon", schedule="linear", betas=(0.0001, 0.02))
    save_file(renamed(), folder / "transformer" / f"{STEM}.safetensors", {"prediction_type": "v"})
    assert refusal(folder).startswith(
        "contradicts itself: the scheduler of its pipeline says prediction_type epsilon, but its metadata say "
        "prediction_type v; "
    )
    assert refusal(folder, prediction="v").startswith("contradicts itself")


def test_a_pipeline_whose_scheduler_is_named_but_not_there(tmp_path: Path) -> None:
    folder = whole(tmp_path / "p" / "transformer").parent
    index = folder / "model_index.json"
    index.write_text(json.dumps({"_class_name": "DiTPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}))
    assert_whole(folder, process=Process())
    index.write_text(json.dumps({"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}))
    assert "scheduler is FlowMatchEulerDiscreteScheduler" in refusal(folder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_schedulers_of_diffusers_have_the_defaults_that_we_think(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (pip install 'dydit[vae]')")
    checked = 0
    for name in (f"{each}Scheduler" for each in SCHEDULERS):
        with contextlib.suppress(ImportError):  # which needs another package
            full = dict(getattr(diffusers, name)().config) | {"_class_name": name}
            short = {"_class_name": name}  # a file that leaves the defaults out
            assert read_process(scheduler_claims(full)) == read_process(scheduler_claims(short))
            checked += 1
    assert checked >= len(SCHEDULERS) - 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"norm_eps": 1e-3}, "norm_eps 0.001"),
        ({"attention_type": "gated"}, "attention_type"),
        ({"only_cross_attention": True}, "only_cross_attention"),
        ({"interpolation_scale": 2.0}, "interpolation_scale"),
        ({"positional_embeddings": "sinusoidal"}, "positional_embeddings"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
    ],
)
def test_settings_of_another_network_are_refused(tmp_path: Path, settings: dict[str, object], expected: str) -> None:
    assert expected in refusal(whole(tmp_path / "f", **settings))


def test_settings_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    assert_whole(
        whole(
            tmp_path / "f",
            **{
                "dropout": 0.1,
                "norm_num_groups": 32,
                "upcast_attention": True,
                "norm_eps": 1e-5,
                "num_vector_embeds": None,
            },
            **{"cross_attention_dim": None, "only_cross_attention": False, "use_linear_projection": False},
        )
    )


def test_a_bundle_is_called_a_bundle_and_a_checkpoint_a_checkpoint(
    tmp_path: Path, make_bundle: Callable[..., Any], make_checkpoint: Callable[..., Any]
) -> None:
    from dydit.bundle.bundle import Bundle

    assert refusal(make_bundle().path).startswith("is a bundle, not a checkpoint; give the checkpoint")
    for path in (make_checkpoint().path, whole(tmp_path / "f"), pipeline(tmp_path / "p")):
        with pytest.raises(BundleError, match="is a checkpoint, not a bundle; export it with `dydit export"):
            Bundle.open(path)
    torch.save(published(), tmp_path / "a.pt")
    with pytest.raises(BundleError, match="is a checkpoint, not a bundle"):
        Bundle.open(tmp_path / "a.pt")


def test_a_folder_with_a_file_of_another_kind_says_which(tmp_path: Path) -> None:
    torch.save(published(), tmp_path / "0400000.pt")
    assert "if the checkpoint is one of these, give that: 0400000.pt" in refusal(tmp_path)
