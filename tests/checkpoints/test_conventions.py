"""What training arguments and metadata say about a model is honoured or refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dydit.checkpoints.checkpoint import convert, load_checkpoint
from dydit.checkpoints.fit import class_table
from dydit.diffusion.process import Process
from dydit.errors import CheckpointError, ConfigError
from dydit.models.dit.config import DiTConfig
from dydit.models.synthetic import synthetic_model

CONFIG = DiTConfig(hidden_size=32, depth=2, num_heads=4, patch_size=2, input_size=8, num_classes=10)
STATE = dict(synthetic_model(CONFIG).state_dict())
DIT = {"model": "DiT-XL/2", "image_size": 64, "num_classes": 10, "epochs": 1400, "vae": "ema", "global_seed": 0}

FLOW = {"schedule": "flow", "prediction": "velocity"}


def stating(**process: Any) -> DiTConfig:
    return CONFIG.model_copy(update={"process": Process(**process)})


def saved(path: Path, **arguments: object) -> Path:
    torch.save({"ema": STATE, "args": argparse.Namespace(**arguments)}, path)
    return path


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_arguments_of_a_dit_are_accepted(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(saved(tmp_path / "a.pt", **DIT))
    assert checkpoint.config == CONFIG and checkpoint.notes == ()
    more = {"diffusion_steps": 1000, "noise_schedule": "linear", "predict_xstart": False, "learn_sigma": True}
    more |= {"rescale_learned_sigmas": False, "class_dropout_prob": 0.1, "prediction": "epsilon", "path_type": None}
    checkpoint = load_checkpoint(saved(tmp_path / "b.pt", **DIT, **more))
    assert checkpoint.config == stating() and checkpoint.notes == ()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"path_type": "VP", "prediction": "velocity"}, "path_type VP"),
        ({"prediction": "score"}, "was trained in another way: its training arguments say prediction score"),
        ({"noise_schedule": "sigmoid"}, "noise_schedule sigmoid"),
        ({"diffusion_steps": 4000}, "diffusion_steps 4000"),
        ({"zero_terminal_snr": 1}, "zero_terminal_snr 1"),
        ({"use_rope": True}, "has other blocks than the models of dydit: its training arguments say use_rope True"),
        ({"qk_norm": "rms"}, "qk_norm rms"),
        ({"learn_sigma": False}, "contradicts itself: its training arguments say learn_sigma False"),
        (
            {"image_size": 96},
            "its training arguments say image_size 96, but its pos_embed is for inputs with a side of 8",
        ),
        (
            {"num_classes": 1000},
            "a class table of 11 rows, but its training arguments say 1000 classes",
        ),
        ({"num_classes": 11, "class_dropout_prob": 0.1}, "that labels were dropped (0.1), but its class table of 11"),
        ({"num_heads": 7}, "contradicts itself: its training arguments say 7 heads, but its tensors allow 4"),
    ],
)
def test_arguments_of_another_model_are_refused(tmp_path: Path, change: dict[str, object], expected: str) -> None:
    message = refusal(saved(tmp_path / "a.pt", **{**DIT, **change}))
    assert expected in message and len(message) < 400


@pytest.mark.parametrize("entry", ["args", "hyper_parameters", "config", "cfg"])
def test_arguments_are_found_in_the_entries_that_programs_use(tmp_path: Path, entry: str) -> None:
    nested = {"transport": {"path_type": "Linear", "prediction": "velocity"}, "data": {"workers": 3}}
    flow = stating(schedule="flow", prediction="velocity")
    for number, arguments in enumerate((nested, argparse.Namespace(**nested))):
        torch.save({"ema": STATE, entry: arguments}, tmp_path / f"{number}.pt")
        assert load_checkpoint(tmp_path / f"{number}.pt").config == flow
    torch.save({"ema": STATE, entry: {"path-type": "GVP"}}, tmp_path / "gvp.pt")
    assert "path_type GVP" in refusal(tmp_path / "gvp.pt")


def test_settings_beside_the_entries(tmp_path: Path) -> None:
    for number, content in enumerate(({"ema": STATE}, STATE)):
        torch.save({**content, "prediction": "v"}, tmp_path / f"{number}.pt")
        assert load_checkpoint(tmp_path / f"{number}.pt").config == stating(prediction="v")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"prediction_type": "v_prediction"}, {"prediction": "v"}),
        ({"modelspec.prediction_type": "v"}, {"prediction": "v"}),
        ({"config": json.dumps({"path_type": "Linear", "prediction": "velocity"})}, FLOW),
        ({"predict_xstart": "True"}, {"prediction": "x0"}),
        ({"beta_schedule": "linear", "beta_start": "0.00085", "beta_end": "0.012"}, {"betas": (0.00085, 0.012)}),
    ],
)
def test_metadata_of_a_safetensors_file(tmp_path: Path, metadata: dict[str, str], expected: dict[str, Any]) -> None:
    save_file(STATE, tmp_path / "a.safetensors", metadata)
    assert load_checkpoint(tmp_path / "a.safetensors").config == stating(**expected)


def test_metadata_that_is_refused_and_metadata_that_states_nothing(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors", {"num_train_timesteps": "500"})
    assert "its metadata say num_train_timesteps 500" in refusal(tmp_path / "a.safetensors")
    save_file(STATE, tmp_path / "b.safetensors", {"format": "pt", "num_classes": "10", "note": "v_prediction"})
    assert load_checkpoint(tmp_path / "b.safetensors").config == CONFIG


def test_a_file_that_says_nothing_is_taken_for_a_dit(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt").config == CONFIG


def test_a_sit_has_the_tensors_of_a_dit(tmp_path: Path) -> None:
    """Also the rows of a variance, which SiT trains to nothing and ignores."""
    arguments = {**DIT, "model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity", "loss_weight": None}
    checkpoint = load_checkpoint(saved(tmp_path / "a.pt", **arguments, train_eps=1e-5, sample_eps=1e-3))
    assert checkpoint.config == stating(**FLOW) and checkpoint.config.learn_sigma and checkpoint.notes == ()
    torch.save(STATE, tmp_path / "bare.pt")
    assert load_checkpoint(tmp_path / "bare.pt", prediction="velocity").config == stating(**FLOW)


def test_what_is_stated_goes_through_our_own_format(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.pt", prediction="v", noise_schedule="cosine")
    config = convert(source, tmp_path / "v.safetensors").config
    assert config == load_checkpoint(tmp_path / "v.safetensors").config == stating(prediction="v", schedule="cosine")
    message = refusal(tmp_path / "v.safetensors", prediction="x0")
    assert message == "was trained in another way than --prediction x0: it states prediction v; remove --prediction"
    torch.save(STATE, tmp_path / "bare.pt")
    assert convert(tmp_path / "bare.pt", tmp_path / "bare.safetensors").config == CONFIG
    given = convert(tmp_path / "bare.safetensors", tmp_path / "x0.safetensors", prediction="x0")
    assert given.config == stating(prediction="x0") and given.notes[0].startswith("assumed linear betas")
    assert "assumed linear betas" in given.metadata["assumed"]
    with pytest.raises(ConfigError, match="prediction must be"):
        load_checkpoint(tmp_path / "bare.pt", prediction="noise")
    with pytest.raises(ConfigError, match="schedule cosine cannot be combined with prediction velocity"):
        load_checkpoint(tmp_path / "bare.pt", prediction="velocity", schedule="cosine")


@pytest.mark.parametrize(
    ("rows", "stated", "given", "expected"),
    [
        (1001, {}, None, (1000, True, 0)),
        (1000, {}, None, (1000, False, 1)),  # ImageNet without the row for no class
        (1000, {}, 999, (999, True, 0)),
        (11, {}, None, (10, True, 1)),
        (11, {}, 11, (11, False, 0)),
        (11, {}, 10, (10, True, 0)),
        (11, {"num_classes": 10}, None, (10, True, 0)),
        (10, {"num_classes": 10}, None, (10, False, 0)),
        (10, {"num_classes": 10, "class_dropout_prob": 0.0}, None, (10, False, 0)),
        (10, {"class_dropout_prob": 0}, None, (10, False, 0)),
        (11, {"class_dropout_prob": 0.1}, None, (10, True, 0)),
        (11, {"num_classes": 10, "class_dropout_prob": 0}, None, (10, False, 1)),  # a row that was never trained
        (1, {}, None, (1, False, 0)),
    ],
)
def test_how_a_class_table_is_read(
    rows: int, stated: dict[str, Any], given: int | None, expected: tuple[int, bool, int]
) -> None:
    table = class_table(rows, stated, given)
    assert (table.count, table.null_row, len(table.notes)) == expected


@pytest.mark.parametrize(("rows", "given"), [(11, 12), (11, 9), (1, 2)])
def test_counts_that_do_not_go_with_the_rows(rows: int, given: int) -> None:
    with pytest.raises(CheckpointError, match=f"a class table of {rows} rows, but --num-classes says {given} classes"):
        class_table(rows, {}, given)


def test_a_row_that_was_never_trained_is_left_out(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(saved(tmp_path / "a.pt", num_classes=10, class_dropout_prob=0.0))
    assert checkpoint.config == CONFIG.model_copy(update={"null_class_row": False})
    assert checkpoint.state["y_embedder.embedding_table.weight"].shape == (10, 32)
    assert "row 10 of its class table, for no class, was removed" in checkpoint.notes[0]
