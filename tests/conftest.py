"""Small synthetic checkpoints and bundles, made once per session: gates open and closed, tokens routed and skipped."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from dydit.bundle.bundle import Bundle
    from dydit.checkpoints.checkpoint import Checkpoint
    from dydit.models.architecture import UnitAxis
    from dydit.models.config import ModelConfig

pytest_plugins = (
    "tests.fixtures.counts",
    "tests.fixtures.decoders",
    "tests.fixtures.engines",
    "tests.fixtures.fidelity",
    "tests.fixtures.graphs",
    "tests.fixtures.spoilt",
    "tests.fixtures.texts",
    "tests.fixtures.training",
)

settings.register_profile("dydit", deadline=None)  # times of a busy machine say nothing
settings.load_profile("dydit")
STEPS = 12
VAE_SCALE = 0.18215
VAE_SETTINGS: dict[str, Any] = {"steps": 6, "max_subnets": 2, "max_batch": 8, "routing": "capacity"}


def pytest_collection_finish() -> None:
    """Thousands of collected tests stay to the end: looking through them again and again is a twentieth of the time."""
    gc.collect()
    gc.freeze()


def without_log(err: str) -> str:
    """Standard error without the progress that a command logs where there is no terminal."""
    return re.sub(r"^[^\n\r]*: \d+/\d+ \(\d+ %\)[^\n\r]*\n", "", err, flags=re.MULTILINE)


class Run(NamedTuple):
    """What a command left: exit code, standard output, standard error without logged progress."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """`run(*arguments)`: the command `dydit` with these arguments, in this process."""
    from dydit.cli import main

    monkeypatch.delenv("DYDIT_DEBUG", raising=False)

    def call(*arguments: object) -> Run:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Run(code, out, without_log(err))

    return call


@pytest.fixture(scope="session", autouse=True)
def compiled_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What OpenVINO compiles is cached for the session, in this process and those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYDIT_OPENVINO_CACHE", str(tmp_path_factory.mktemp("openvino")))
        yield


@pytest.fixture(scope="session")
def small_config() -> ModelConfig:
    """Three blocks of four heads over 16 tokens, with routers whose unit 0 is always on."""
    from dydit.models.dit.config import DiTConfig

    return DiTConfig(hidden_size=64, depth=3, num_heads=4, patch_size=2, input_size=8, in_channels=4, num_classes=7)


@pytest.fixture(scope="session")
def make_axis() -> Callable[[Sequence[Sequence[int]]], UnitAxis]:
    """`make_axis(counts)`: an axis whose blocks have unit groups of `counts[block][group]` units, each of two layers.

    What no DiT has, but an axis allows: groups of different sizes, in a block and among blocks.
    """
    from dydit.models.architecture import BlockSpec, Side, UnitAxis, UnitGroup, UnitLayer

    def group(index: int, count: int) -> UnitGroup:
        enters = UnitLayer(f"in{index}", Side.OUTPUT, 2 + index, 8)
        leaves = UnitLayer(f"out{index}", Side.INPUT, 2 + index, 8, scaled_inputs=bool(index % 2))
        return UnitGroup(f"kind{index}", count, (enters, leaves), 10.0 + index, routed=bool(index % 2))

    def make(counts: Sequence[Sequence[int]]) -> UnitAxis:
        return UnitAxis([BlockSpec(tuple(group(*each) for each in enumerate(block))) for block in counts])

    return make


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory, small_config: ModelConfig) -> Callable[..., Checkpoint]:
    """`make_checkpoint(config=None, seed=0, flops_ratio=0.5)`: a checkpoint on disk. Shared: do not write to it."""
    from dydit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
    from dydit.models.synthetic import synthetic_model

    folder = tmp_path_factory.mktemp("checkpoints")
    made: dict[tuple[ModelConfig, int, float], Checkpoint] = {}

    def make(config: ModelConfig | None = None, seed: int = 0, flops_ratio: float = 0.5) -> Checkpoint:
        key = (config or small_config, seed, flops_ratio)
        if key not in made:
            path = folder / f"{len(made)}.safetensors"
            save_checkpoint(path, synthetic_model(*key), key[0])
            made[key] = load_checkpoint(path)
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_bundle(
    tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Checkpoint]
) -> Callable[..., Bundle]:
    """`make_bundle(checkpoint=None, **export settings)`: an exported bundle of 12 steps unless told otherwise.

    Shared: do not write into its folder.
    """
    from dydit.export.exporter import export
    from dydit.export.settings import ExportConfig

    folder: Path = tmp_path_factory.mktemp("bundles")
    made: dict[tuple[Path, str], Bundle] = {}

    def make(checkpoint: Checkpoint | None = None, **settings: object) -> Bundle:
        chosen = checkpoint or make_checkpoint()
        config = ExportConfig.model_validate({"steps": STEPS, "max_subnets": 4, **settings})
        key = chosen.path, config.model_dump_json()
        if key not in made:
            made[key] = export(chosen, folder / f"bundle-{len(made)}", config)
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_smoothing() -> Callable[..., Any]:
    """`make_smoothing(config, seed=0, share=1)`: exponents from all over their range, for such a share of layers."""
    from dydit.quantization.smoothing import MOST, Smoothing, as_digits, input_channels

    def make(config: ModelConfig, seed: int = 0, share: float = 1) -> Smoothing:
        rng, blocks = np.random.default_rng(seed), []
        for _ in range(config.depth):
            chosen = [layer for layer in config.units.layer_names if rng.random() < share]
            digits = {layer: as_digits(rng.integers(0, MOST + 1, input_channels(config, layer))) for layer in chosen}
            blocks.append(digits)
        return Smoothing(blocks=tuple(blocks))

    return make


@dataclass(frozen=True)
class SavedVae:
    """An autoencoder of diffusers: the folder that it was saved to, and the module."""

    folder: Path
    module: Any

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pixels f32 [B, 3, S, S] of latents as the sampler returns them, by PyTorch."""
        import torch

        with torch.no_grad():
            pixels: np.ndarray = self.module.decode(torch.from_numpy(latents) / VAE_SCALE, return_dict=False)[0].numpy()
        return pixels


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory: pytest.TempPathFactory, traces: dict[str, Any]) -> SavedVae:
    """A random one of two levels, 4 latent channels, whose pictures have contrast. Shared: do not write to it.

    Its decoder is traced once for each choice of settings.
    """
    diffusers, _ = (
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'dydit[vae]'")
        for name in ("diffusers", "onnxscript")
    )
    import torch

    torch.manual_seed(3)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=VAE_SCALE,
    )
    folder = tmp_path_factory.mktemp("vae") / "autoencoder"
    vae.save_pretrained(folder)
    return SavedVae(folder, vae.eval())


@pytest.fixture(scope="session")
def vae_settings() -> dict[str, Any]:
    """The export settings of `vae_bundle`, but for its decoder."""
    return VAE_SETTINGS


@pytest.fixture(scope="session")
def vae_bundle(make_bundle: Callable[..., Bundle], autoencoder: SavedVae) -> Bundle:
    """Latents 4x8x8 that become pictures of 16x16 pixels, six steps. Shared: do not write into its folder."""
    return make_bundle(**VAE_SETTINGS, vae=str(autoencoder.folder))
