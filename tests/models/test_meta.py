"""Models without memory: every architecture has its names and shapes there, and nothing slow is imported for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dydit
from dydit.checkpoints.checkpoint import Checkpoint, load_checkpoint
from dydit.models.meta import without_memory
from dydit.models.registry import architecture_of
from dydit.models.transformer.modules import sine_frequencies

ROOT = Path(__file__).parents[2]
SHIPPED = (
    Path(dydit.__file__).parent / "assets" / "digits" / "dydit.safetensors",
    ROOT / "docs" / "models" / "emoji-uvit" / "dynamic.safetensors",
    ROOT / "docs" / "models" / "emoji-pixart" / "dynamic.safetensors",
)
LOAD = """
import sys
from dydit.checkpoints.checkpoint import load_checkpoint
for path in sys.argv[1:]:
    checkpoint = load_checkpoint(path)
    checkpoint.model(), checkpoint.width_router_model()
    print(checkpoint.config.architecture, *({"torch._dynamo", "sympy"} & set(sys.modules)))
"""


def test_checkpoints_become_models_without_the_compiler() -> None:
    """PyTorch imports it, for a second, where it draws a number or counts on the device "meta"."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LOAD, *map(str, SHIPPED)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["dit", "uvit", "pixart"]), done.stdout + done.stderr


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_shapes_are_those_of_a_model_with_memory(path: Path) -> None:
    config = load_checkpoint(path).config
    architecture = architecture_of(config)
    with without_memory():
        model = architecture.masked(config)
    made = architecture.masked(config).state_dict()
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in made.items()
    }
    assert all(value.is_meta for name, value in model.named_parameters() if name != "pos_embed")
    assert architecture.state_shapes(config) == {name: tuple(value.shape) for name, value in made.items()}


def test_tables_have_values_and_modules_are_initialised_again_after_the_block(
    make_checkpoint: Callable[..., Checkpoint],
) -> None:
    with without_memory():
        frequencies = sine_frequencies(8)
        weight = torch.nn.init.normal_(torch.empty(3))
        torch.nn.init.zeros_(tensor=weight)
    torch.testing.assert_close(frequencies, torch.tensor([1, 0.1, 0.01, 0.001]))
    assert weight.is_meta and weight.shape == (3,)
    assert torch.nn.init.ones_(torch.empty(2)).tolist() == [1, 1]
