"""U-ViT's published files and training folders: what is read, and what is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dydit.checkpoints.checkpoint import convert, load_checkpoint
from dydit.checkpoints.containers import looks_like_checkpoint
from dydit.checkpoints.diffusers_folder import STEM
from dydit.diffusion.process import Process
from dydit.errors import BundleError, CheckpointError
from dydit.models.config import Routers
from dydit.models.synthetic import synthetic_model
from dydit.models.uvit.config import UViTConfig, preset
from dydit.models.uvit.states import infer_config

SIZES = {"hidden_size": 32, "depth": 3, "num_heads": 4, "patch_size": 2, "input_size": 8, "in_channels": 3}
CONFIG = UViTConfig(**SIZES, routers=Routers.NONE)
CLASSES = UViTConfig(**SIZES, num_classes=6, null_class_row=True, routers=Routers.NONE)
VP_SDE, SCALED = Process(schedule="vp-sde"), Process(schedule="scaled-linear")
State = dict[str, torch.Tensor]


def state_of(config: UViTConfig = CONFIG, seed: int = 0) -> State:
    return dict(synthetic_model(config, seed).state_dict())


def saved(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def training_folder(folder: Path, **files: Any) -> Path:
    """`N.ckpt/` as U-ViT's training saves it; `files` replaces the content of some, or removes them with None."""
    contents = {"nnet_ema": state_of(seed=1), "nnet": state_of(seed=2), "step": 500, "lr_scheduler": {"last_epoch": 5}}
    contents["optimizer"] = {"state": {0: {"exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 2e-4}]}
    for name, content in {**contents, **files}.items():
        if content is not None:
            saved(folder / f"{name}.pth", content)
    return folder


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], each) for name, each in expected.items())


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 500
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("routers", list(Routers))
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_classes": 6, "null_class_row": True}, {"skip": False, "conv": False}, {"mlp_time_embed": True}],
)
def test_a_published_file_is_read(tmp_path, changes, routers):
    config = UViTConfig(**SIZES, **changes, routers=routers)
    state = state_of(config)
    checkpoint = load_checkpoint(saved(tmp_path / "a.pth", state), num_heads=4)
    assert checkpoint.config == config.model_copy(update={"process": VP_SDE}) and same(checkpoint.state, state)
    assert checkpoint.source == ("dydit" if config.dynamic else "uvit")


@pytest.mark.parametrize(
    ("name", "process"),
    [("cifar10-S/2", VP_SDE), ("imagenet64-M/4", VP_SDE), ("imagenet256-L/2", VP_SDE), ("imagenet256-H/2", SCALED)],
)
def test_published_models_show_all_that_they_are(name, process):
    from dydit.models.registry import architecture_of

    config = preset(name, routers=Routers.NONE)
    shapes = architecture_of(config).state_shapes(config)
    inferred = infer_config({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert inferred.config == config and inferred.config.usual_process == process
    assert ("without a row for no class" in "".join(inferred.notes)) == (config.num_classes and not config.null_class)


def test_a_class_table_may_be_read_otherwise(tmp_path):
    path = saved(tmp_path / "a.pth", state_of(CLASSES))
    assumed, stated = (load_checkpoint(path, 4, num_classes=count) for count in (None, 7))
    assert assumed.config.classes.null == 6 and "assumed 6 classes" in assumed.notes[0]
    assert stated.config.num_classes == 7 and stated.config.null_class is None


def test_a_note_says_which_process_is_assumed(tmp_path):
    path = saved(tmp_path / "a.pth", state_of())
    (note,) = load_checkpoint(path, 4).notes
    assert note == "assumed VP-SDE with beta from 0.1 to 20; if that is wrong, give --schedule"
    stated = load_checkpoint(path, 4, schedule="linear")
    assert stated.config.process == Process() and len(stated.notes) == 1 and "predicts epsilon" in stated.notes[0]
    v = load_checkpoint(path, 4, prediction="v")
    assert v.config.process == Process(schedule="vp-sde", prediction="v") and v.notes == (note,)
    assert "give --schedule, such as linear" in refusal(path, num_heads=4, betas=(0.0001, 0.02))


def test_a_training_folder_gives_the_average(tmp_path):
    folder = training_folder(tmp_path / "5000.ckpt")
    averaged, ema, trained = (load_checkpoint(folder, 4, weights) for weights in (None, "ema", "model"))
    assert averaged.path == folder and averaged.source == "uvit" and averaged.metadata == {"weights": "ema"}
    assert same(averaged.state, state_of(seed=1)) and same(trained.state, state_of(seed=2))
    assert averaged.notes[0] == "weights: ema (nnet_ema.pth); the folder also holds model (nnet.pth) (see --weights)"
    assert trained.notes[0] == "weights: model (nnet.pth); the folder also holds ema (nnet_ema.pth) (see --weights)"
    assert averaged.sha256 == ema.sha256 != trained.sha256
    assert averaged.sha256 == load_checkpoint(folder / "nnet_ema.pth", 4).sha256
    converted = convert(folder, tmp_path / "a.safetensors", 4)
    assert converted.metadata["weights"] == "ema" and same(converted.state, state_of(seed=1))


@pytest.mark.parametrize(("missing", "entry"), [("nnet_ema", "model"), ("nnet", "ema")])
def test_a_folder_with_one_of_the_two(tmp_path, missing, entry):
    folder = training_folder(tmp_path, **{missing: None})
    checkpoint = load_checkpoint(folder, 4)
    assert checkpoint.metadata == {"weights": entry} and checkpoint.notes[0].endswith("the folder holds no others")
    other = {"ema": "model", "model": "ema"}[entry]
    assert refusal(folder, weights=other).startswith(f"holds no weights '{other}', only {entry} (")
    assert "change or remove --weights" in refusal(folder, weights="step")


def test_a_folder_without_weights_is_no_checkpoint(tmp_path):
    folder = training_folder(tmp_path, nnet=None, nnet_ema=None)
    message = refusal(folder)
    assert message.startswith(f"is not a checkpoint folder: expected config.json and {STEM}.safetensors of diffusers")
    assert "or nnet_ema.pth or nnet.pth of U-ViT's training" in message and not looks_like_checkpoint(folder)


def test_the_folder_of_folders_names_them(tmp_path):
    training_folder(tmp_path / "5000.ckpt")
    assert refusal(tmp_path).endswith("if the checkpoint is one of these, give that: 5000.ckpt")


def test_a_fault_in_a_folder_names_the_file(tmp_path):
    folder = training_folder(tmp_path / "a.ckpt")
    (folder / "nnet_ema.pth").write_bytes((folder / "nnet_ema.pth").read_bytes()[:-200])
    assert refusal(folder).startswith("nnet_ema.pth is damaged or incomplete")
    assert load_checkpoint(folder, 4, "model").metadata == {"weights": "model"}
    assert "nnet.pth does not show its number of heads" in refusal(folder, weights="model")


def test_a_training_folder_is_no_bundle(tmp_path):
    from dydit.bundle.bundle import Bundle

    folder = training_folder(tmp_path / "5000.ckpt")
    assert looks_like_checkpoint(folder)
    with pytest.raises(BundleError, match="is a checkpoint, not a bundle; export it with `dydit export"):
        Bundle.open(folder)


Change = Callable[[State], Any]


def with_text(state: State) -> None:
    state["context_embed.weight"] = torch.ones(32, 768)


def without_last_block(state: State) -> None:
    for name in [name for name in state if name.startswith("out_blocks.")]:
        del state[name]


def with_another_token(state: State) -> None:
    state["pos_embed"] = torch.ones(1, 19, 32)


def without_a_name(state: State) -> None:
    del state["norm.weight"]


def with_another_name(state: State) -> None:
    state["mid_block.norm3.weight"] = torch.ones(32)


def with_a_narrow_matrix(state: State) -> None:
    state["out_blocks.0.skip_linear.weight"] = torch.ones(32, 63)


def with_nan(state: State) -> None:
    state["decoder_pred.bias"][0] = torch.nan


def with_zeros(state: State) -> None:
    for name in state:
        if "attn" in name or "mlp" in name:
            state[name].zero_()


def without_patches(state: State) -> None:
    del state["patch_embed.proj.weight"]


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (with_text, {}, "is a U-ViT that reads texts (it has context_embed), which dydit does not have"),
        (without_last_block, {}, "is not a whole U-ViT: it has 1 in_blocks, but 0 out_blocks"),
        (with_another_token, {}, "has a pos_embed of 18 patches besides the time; expected a square number"),
        (without_a_name, {}, "1 missing (norm.weight)"),
        (with_another_name, {}, "1 unknown (mid_block.norm3.weight)"),
        (with_a_narrow_matrix, {}, "out_blocks.0.skip_linear.weight is [32, 63], expected [32, 64]"),
        (with_nan, {}, "has NaN or infinite values in 1 tensor (decoder_pred.bias)"),
        (with_zeros, {}, "holds only zeros in the weights of its blocks: it is not a trained model"),
        (without_patches, {}, "is not a checkpoint of a U-ViT: it has no patch_embed.proj.weight"),
        (None, {"num_classes": 6}, "has no class table: it is unconditional; remove --num-classes"),
        (None, {"input_size": 16}, "of inputs with a side of 8, not 16; remove --input-size"),
        (None, {"num_heads": 5}, "cannot have 5 heads: its hidden size 32"),
        (None, {"num_heads": None}, "does not show its number of heads; give it with --num-heads"),
        (None, {"weights": "ema"}, "holds no weights ema, only one set of weights, without a name"),
    ],
)
def test_what_is_no_u_vit_or_contradicts_it_is_refused(tmp_path, change, options, words):
    state = state_of()
    if change is not None:
        change(state)
    assert words in refusal(saved(tmp_path / "a.pth", state), **{"num_heads": 4, **options})


def test_other_transformers_are_refused_with_what_is_expected(tmp_path):
    """A masked autoencoder has U-ViT's patch embedder, and blocks with other names."""
    state = {"cls_token": torch.ones(1, 1, 32), "pos_embed": torch.ones(1, 17, 32), "norm.weight": torch.ones(32)}
    state |= {"patch_embed.proj.weight": torch.ones(32, 3, 2, 2), "blocks.0.attn.qkv.weight": torch.ones(96, 32)}
    message = refusal(saved(tmp_path / "a.pth", state))
    assert "mid_block.attn.qkv.weight (of a U-ViT)" in message
    assert "none of x_embedder.proj.weight (of a DiT), " in message
    assert (
        "it holds cls_token, pos_embed, " in message
        and "an official DiT, PixArt-alpha or U-ViT, a training file" in message
    )


def test_wrappers_and_averages_in_a_file(tmp_path):
    prefixed = {f"module.{name}": tensor for name, tensor in state_of(seed=3).items()}
    path = saved(tmp_path / "a.pth", {"nnet": prefixed, "nnet_ema": state_of(seed=1)})
    assert same(load_checkpoint(path, 4).state, state_of(seed=1))
    assert same(load_checkpoint(path, 4, "model").state, state_of(seed=3))
