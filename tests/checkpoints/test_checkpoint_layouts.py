"""What training scripts save: wrappers, entries, prefixes, other modules beside, storages shared and expanded."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dydit.checkpoints.checkpoint import Checkpoint, convert, load_checkpoint
from dydit.errors import CheckpointError
from dydit.files import sha256_of
from dydit.models.config import ModelConfig, Routers
from dydit.models.dit.config import DiTConfig
from dydit.models.dit.model import DiT
from dydit.models.synthetic import synthetic_model

State = dict[str, torch.Tensor]
CONFIG = DiTConfig(hidden_size=32, depth=2, num_heads=4, patch_size=2, input_size=8, num_classes=10)


def state_of(seed: int = 0, config: ModelConfig = CONFIG) -> State:
    return dict(synthetic_model(config, seed).state_dict())


def behind(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def assert_state(checkpoint: Checkpoint, expected: State, config: ModelConfig = CONFIG) -> None:
    assert checkpoint.config == config and checkpoint.state.keys() == expected.keys()
    assert all(torch.equal(checkpoint.state[name], tensor) for name, tensor in expected.items())


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.", "ema_model.", "a.b.c.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("entry", [None, "model", "state_dict"])
def test_names_behind_any_prefix(tmp_path: Path, prefix: str, entry: str | None) -> None:
    state = behind(prefix, state_of())
    path = saved(tmp_path / "a.pt", state if entry is None else {entry: state, "epoch": 3})
    assert_state(load_checkpoint(path), state_of())


def test_wrappers_in_the_middle_of_names(tmp_path: Path) -> None:
    state = {name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in state_of().items()}
    state = {name.replace(".attn.", "._checkpoint_wrapped_module.attn."): each for name, each in state.items()}
    assert_state(load_checkpoint(saved(tmp_path / "a.pt", state)), state_of())


@pytest.mark.parametrize(
    "entry", ["ema", "model", "state_dict", "model_state_dict", "state_dict_ema", "module", "anything"]
)
@pytest.mark.parametrize("outer", [None, "checkpoint"])
def test_the_entries_of_training_files(tmp_path: Path, entry: str, outer: str | None) -> None:
    content: dict[str, Any] = {entry: state_of(), "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "epoch": 7}
    checkpoint = load_checkpoint(saved(tmp_path / "a.pt", content if outer is None else {outer: content}))
    assert_state(checkpoint, state_of())
    assert checkpoint.metadata == {"weights": entry if outer is None else f"{outer}.{entry}"}


def test_a_state_dict_with_settings_beside_the_weights(tmp_path: Path) -> None:
    content = {**state_of(), "epoch": 3, "optimizer": {"lr": 1.0}, "note": "x", "args": argparse.Namespace(lr=1)}
    assert_state(load_checkpoint(saved(tmp_path / "a.pt", content)), state_of())


def lightning(**state: State) -> dict[str, Any]:
    """As Lightning saves: one state dict of all modules, their names before the tensors'."""
    joined = {name: tensor for module, each in state.items() for name, tensor in behind(f"{module}.", each).items()}
    hyper = {"lr": 1e-4, "sizes": [1, 2]}
    return {"state_dict": joined, "epoch": 1, "hyper_parameters": hyper, "optimizer_states": [], "callbacks": {}}


def test_lightning_with_other_modules_beside_the_model(tmp_path: Path) -> None:
    vae = {"encoder.conv.weight": torch.ones(3), "decoder.blocks.0.weight": torch.ones(3)}
    checkpoint = load_checkpoint(saved(tmp_path / "a.ckpt", lightning(model=state_of(), vae=vae)))
    assert_state(checkpoint, state_of())
    assert checkpoint.metadata["weights"] == "state_dict.model"
    assert "did not read 2 tensors of other modules (vae.encoder.conv.weight, vae.decoder" in checkpoint.notes[0]


def test_lightning_with_an_average_in_the_state_dict_or_in_a_callback(tmp_path: Path) -> None:
    inside = saved(tmp_path / "a.ckpt", lightning(net=state_of(1), net_ema=state_of(2)))
    assert_state(load_checkpoint(inside), state_of(2))
    assert_state(load_checkpoint(inside, weights="model"), state_of(1))
    content = lightning(model=state_of(1))
    content["callbacks"] = {"EMACallback": {"ema_state_dict": state_of(3)}, "ModelCheckpoint": {"best": "a.ckpt"}}
    callback = saved(tmp_path / "b.ckpt", content)
    assert_state(load_checkpoint(callback), state_of(3))
    assert load_checkpoint(callback).metadata["weights"] == "callbacks.EMACallback.ema_state_dict"


def test_which_weights_to_take(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"model": state_of(1), "ema": state_of(2), "opt": {}})
    assert_state(load_checkpoint(path), state_of(2))
    assert_state(load_checkpoint(path, weights="ema"), state_of(2))
    assert_state(load_checkpoint(path, weights="model"), state_of(1))
    assert "weights: ema; the file also holds model (see --weights)" in load_checkpoint(path).notes
    message = refusal(path, weights="ema2")
    assert message.startswith("holds no weights ema2, only model, ema; change or remove --weights")
    bare = saved(tmp_path / "b.pt", state_of(1))
    assert_state(load_checkpoint(bare, weights="model"), state_of(1))
    assert "holds no weights ema, only one set of weights, without a name" in refusal(bare, weights="ema")


def test_weights_are_said_by_convert_and_kept(tmp_path: Path, run: Callable[..., Any]) -> None:
    path = saved(tmp_path / "a.pt", {"model": state_of(1), "ema": state_of(2)})
    result = run("convert", path, "--out", tmp_path / "m.safetensors", "--weights", "model")
    assert result.code == 0, result.err
    assert "read as dydit (model weights)" in result.out and "the file also holds ema" in result.out
    own = load_checkpoint(tmp_path / "m.safetensors")
    assert_state(own, state_of(1))
    assert own.metadata["weights"] == "model" and "also holds ema" in own.metadata["assumed"]
    assert_state(load_checkpoint(tmp_path / "m.safetensors", weights="model"), state_of(1))
    assert "holds no weights ema, only model" in refusal(tmp_path / "m.safetensors", weights="ema")
    refused = run("export", path, "--out", tmp_path / "b", "--weights", "best")
    assert refused.code == 2 and ", only model, ema;" in refused.err


@pytest.mark.parametrize(
    "weights", [{"x.weight": torch.ones(3, 3)}, {"shadow_params": [torch.ones(3, 3)], "decay": 0.9}]
)
def test_an_average_that_cannot_be_read_is_not_passed_over(tmp_path: Path, weights: dict[str, Any]) -> None:
    path = saved(tmp_path / "a.pt", {"model": state_of(1), "ema": weights, "loss_ema": {"step": torch.ones(3)}})
    assert refusal(path).startswith("has an average `ema` whose tensors do not have the names of a model")
    assert_state(load_checkpoint(path, weights="model"), state_of(1))
    for empty in ({}, None, {"decay": 0.9}):
        path = saved(tmp_path / "b.pt", {"model": state_of(1), "ema": empty})
        assert_state(load_checkpoint(path), state_of(1))


def test_each_choice_of_weights_has_a_hash_of_its_own(tmp_path: Path) -> None:
    """Calibrations and bundles of the one must not pass for those of the other."""
    path = saved(tmp_path / "a.pt", {"model": state_of(1), "ema": state_of(2)})
    default, chosen, other = (load_checkpoint(path, weights=each).sha256 for each in (None, "ema", "model"))
    assert default == chosen == sha256_of(path) != other
    assert len(other) == 64 and other == load_checkpoint(path, weights="model").sha256
    bare = saved(tmp_path / "b.pt", state_of(1))
    assert load_checkpoint(bare, weights="model").sha256 == sha256_of(bare)


def test_a_model_before_its_training_is_said_to_be_one(tmp_path: Path) -> None:
    state = {**state_of(), "final_layer.linear.weight": torch.zeros(32, 32)}
    checkpoint = load_checkpoint(saved(tmp_path / "a.pt", state))
    assert "its final layer is all zeros, as before training, so its output is always zero" in checkpoint.notes
    assert not any("zeros" in note for note in load_checkpoint(saved(tmp_path / "b.pt", state_of())).notes)


def test_several_models_are_not_chosen_from_by_chance(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"teacher": state_of(1), "student": state_of(2)})
    assert refusal(path).startswith("holds several models (teacher, student); choose one with --weights")
    assert_state(load_checkpoint(path, weights="student"), state_of(2))


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv.weight", "final_layer.linear.bias"])
def test_names_that_say_two_things_are_refused(tmp_path: Path, name: str) -> None:
    double = {**behind("module.", state_of()), name: torch.ones(3)}
    assert "has the same names with and without" in refusal(saved(tmp_path / "a.pt", double))
    stray = {**behind("model.", state_of()), name: torch.ones(3)}
    assert "has weights outside the prefix of the others" in refusal(saved(tmp_path / "b.pt", stray))


@pytest.mark.parametrize("entry", ["ema", "model"])
def test_weights_that_are_all_zero_are_refused(tmp_path: Path, entry: str) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state_of().items()}
    content = {"ema": state_of(1), "model": state_of(2), entry: zeros}
    path, other = saved(tmp_path / "a.pt", content), "model" if entry == "ema" else "ema"
    message = refusal(path, weights=entry)
    assert f"holds only zeros in the weights of its blocks under `{entry}`; read others with --weights" in message
    assert_state(load_checkpoint(path, weights=other), content[other])


def test_an_average_whose_blocks_are_zero_is_refused(tmp_path: Path) -> None:
    state = state_of()
    for name in state:
        if ".attn." in name or ".mlp." in name:
            state[name] = torch.zeros_like(state[name])
    assert "holds only zeros in the weights of its blocks" in refusal(saved(tmp_path / "a.pt", {"ema": state}))
    one = {name: tensor if "blocks.1." in name else state[name] for name, tensor in state_of().items()}
    assert_state(load_checkpoint(saved(tmp_path / "b.pt", {"ema": one})), one)  # a block may be pruned


def test_a_position_embedding_that_was_not_saved_is_computed(tmp_path: Path) -> None:
    state = state_of()
    positions = state.pop("pos_embed")
    path = saved(tmp_path / "a.pt", state)
    assert "does not show the side of its inputs, because it has no pos_embed; give it with --input-size" in refusal(
        path
    )
    assert_state(load_checkpoint(path, input_size=8), {**state, "pos_embed": positions})
    arguments = argparse.Namespace(image_size=64, vae="ema")
    stated = load_checkpoint(saved(tmp_path / "b.pt", {"ema": state, "args": arguments}))
    assert_state(stated, {**state, "pos_embed": positions})
    assert any("input size 8" in note for note in stated.notes)
    whole = saved(tmp_path / "c.pt", state_of())
    assert "has a pos_embed of inputs with a side of 8, not 16" in refusal(whole, input_size=16)
    moved = {**state, "pos_embed": positions + 1}  # not the sine: what the file says counts
    assert_state(load_checkpoint(saved(tmp_path / "d.pt", moved)), moved)


def test_a_computed_position_embedding_cannot_fill_the_memory(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in state_of().items() if name != "pos_embed"}
    assert "tokens above" in refusal(saved(tmp_path / "a.pt", state), input_size=1 << 20)


def test_tensors_that_are_windows_into_one_storage(tmp_path: Path) -> None:
    state = state_of()
    flat = torch.cat([tensor.reshape(-1) for tensor in state.values()])
    windows, offset = {}, 0
    for name, tensor in state.items():
        windows[name] = flat[offset : offset + tensor.numel()].view(tensor.shape)
        offset += tensor.numel()
    for legacy in (False, True):
        path = tmp_path / f"{legacy}.pt"
        torch.save(windows, path, _use_new_zipfile_serialization=not legacy)
        assert_state(load_checkpoint(path), state)


def test_tensors_that_share_or_repeat_and_are_not_contiguous(tmp_path: Path) -> None:
    state = state_of(config=CONFIG.model_copy(update={"depth": 40}))
    for name in state:
        if name.startswith("blocks.") and (
            ".mlp." in name or ".attn." in name
        ):  # all blocks share the storages of the first
            state[name] = state[f"blocks.0.{name.split('.', 2)[2]}"]
    state["blocks.3.mlp.fc1.bias"] = torch.zeros(()).expand(128)
    state["blocks.3.mlp.fc1.weight"] = torch.zeros(1, 1).expand(128, 32)
    state["blocks.2.attn.proj.weight"] = state["blocks.2.attn.proj.weight"].clone().t()
    state["y_embedder.embedding_table.weight"] = torch.randn(11, 64)[:, ::2]
    path = saved(tmp_path / "a.pt", state)
    held = sum(tensor.numel() * 4 for tensor in state.values())
    assert path.stat().st_size < held / 2
    checkpoint = load_checkpoint(path)
    assert_state(checkpoint, state, CONFIG.model_copy(update={"depth": 40}))
    made = checkpoint.model().state_dict()
    for name, tensor in state.items():
        assert torch.equal(made[name], tensor) and made[name].is_contiguous()
    copy = convert(path, tmp_path / "copy.safetensors")
    assert_state(copy, state, CONFIG.model_copy(update={"depth": 40}))


def test_a_static_model_behind_a_prefix(tmp_path: Path) -> None:
    config = CONFIG.without_routers()
    assert config.routers is Routers.NONE
    state = state_of(config=config)
    assert_state(load_checkpoint(saved(tmp_path / "a.pt", behind("model.", state)), num_heads=4), state, config)


def test_an_averaged_model_of_pytorch(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(DiT(CONFIG))
    averaged.module.load_state_dict(state_of())
    assert_state(load_checkpoint(saved(tmp_path / "a.pt", {"ema": averaged.state_dict()})), state_of())
