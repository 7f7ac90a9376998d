from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.data.small_sets import Digits
from dydit.diffusion.process import NoiseSchedule, Prediction, Process
from dydit.diffusion.samplers import Sampler, SamplerConfig
from dydit.models.config import ModelConfig, Space
from dydit.models.dit.model import DiT
from dydit.parity.reference import Images, Reference
from dydit.training.draws import BatchSource
from dydit.training.recipe import Recipe
from dydit.training.samples import SIDE, STEPS, Conditions, sample, write_samples
from dydit.training.trainer import train

CPU = torch.device("cpu")
FLOW = Process(schedule=NoiseSchedule.FLOW, prediction=Prediction.VELOCITY)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def source(config: ModelConfig) -> BatchSource:
    return BatchSource(Digits(), 0, 16, 0.1, 10, config.diffusion)


@pytest.mark.parametrize("process", [Process(), Process(schedule=NoiseSchedule.VP_SDE), FLOW])
def test_samples_are_those_of_the_reference(
    dynamic_config: ModelConfig, randomised: Callable[..., DiT], process: Process
) -> None:
    config = dynamic_config.model_copy(update={"process": process})
    model = randomised(config)
    conditions = Conditions.of(config, source(config), CPU)
    images = sample(model, conditions, 5)
    labels = tuple(label % 10 for label in range(SIDE * SIDE))
    sampling = SamplerConfig(sampler=Sampler.EULER if process.flow else Sampler.DPM_SOLVER, steps=STEPS)
    run = Reference(model, sampling, config.guided_channels).run(Images(labels, 5, conditions.scale))
    assert conditions.scale == config.usual_guidance and run.tokens is not None and not run.tokens.all()
    assert np.abs(images - run.latents[-1]).max() < 1e-3 * np.abs(run.latents[-1]).max()
    assert np.abs(images[0] - images[1]).max() > 0.1


def test_pictures_show_every_image_at_its_place(
    tmp_path: Path, static_config: ModelConfig, randomised: Callable[..., DiT]
) -> None:
    latents = static_config.model_copy(update={"space": Space.LATENTS})
    for config, name, limit in (
        (static_config, "samples-00000007.png", 1),
        (latents, "samples-00000007-latents.png", 3),
    ):
        model = randomised(config)
        conditions = Conditions.of(config, source(config), CPU)
        images = sample(model, conditions, 0)
        write_samples(tmp_path, 7, images, config)
        with Image.open(tmp_path / name) as file:
            grid = np.asarray(file)
        assert grid.shape == (64, 64)
        for image in (0, 6, 15):
            row, column = divmod(image, SIDE)
            shown = grid[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] / 127.5 - 1
            assert np.abs(shown - np.clip(images[image, 0] / limit, -1, 1)).max() < 0.01


def test_an_interrupted_run_writes_the_pictures_of_a_whole_one(
    tmp_path: Path, small_recipe: Callable[..., Recipe]
) -> None:
    recipe = small_recipe(sample_every=4)

    def stop(done: int, total: int, entry: object) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", progress=stop)
    (tmp_path / "run" / "samples-00000008.png").unlink()  # as if it had been killed before
    shutil.rmtree(tmp_path / "run" / "state-00000008")
    train(recipe, tmp_path / "run", resume=True)
    result = train(recipe, tmp_path / "whole")
    pictures = sorted(path.name for path in (tmp_path / "whole").glob("samples-*"))
    assert pictures == ["samples-00000004.png", "samples-00000008.png", "samples-00000012.png"]
    for name in (*pictures, "model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # They are of the EMA weights, which are the result.
    conditions = Conditions.of(recipe.model, source(recipe.model), CPU)
    images = sample(load_checkpoint(result.model).model(), conditions, recipe.seed)
    write_samples(tmp_path, 12, images, recipe.model)
    assert (tmp_path / pictures[-1]).read_bytes() == (tmp_path / "whole" / pictures[-1]).read_bytes()
