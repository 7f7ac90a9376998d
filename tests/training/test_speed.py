"""What saves time and memory in training changes nothing, or only rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dydit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from dydit.data.small_sets import Digits
from dydit.diffusion.process import Process
from dydit.errors import ConfigError, TrainingError
from dydit.models.config import ModelConfig
from dydit.models.dit.model import DiT
from dydit.models.routers import TokenRouter, WidthRouter
from dydit.models.synthetic import synthetic_model
from dydit.models.text import TextRows
from dydit.models.uvit.config import UViTConfig
from dydit.training.draws import BatchSource
from dydit.training.losses import ProcessTensors
from dydit.training.objective import Inputs, Objective, compile_model
from dydit.training.optimizer import make_optimizer
from dydit.training.prefetch import Prefetch
from dydit.training.recipe import Recipe
from dydit.training.state import read_log
from dydit.training.trainer import train

Make = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["dit", "uvit", "pixart"])
def config(request: pytest.FixtureRequest, small_config: ModelConfig, pixart_config: ModelConfig) -> ModelConfig:
    """A dynamic model of each architecture; U-ViT has long skips."""
    uvit = UViTConfig(hidden_size=48, depth=3, num_heads=3, input_size=8, patch_size=2, in_channels=4, num_classes=7)
    return {"dit": small_config, "uvit": uvit, "pixart": pixart_config}[request.param]


def objective_and_batch(make: Make, config: ModelConfig, **changes: object) -> tuple[Objective, Inputs]:
    recipe = make(
        **{"stage": "dynamic", "model": config, "batch_size": 4, "label_dropout": 0, "token_weight": 1, **changes}
    )
    generator = torch.Generator().manual_seed(4)
    x0, noise = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    y: Any = torch.tensor([0, 1, 2, 3])
    if config.text is not None:
        y = TextRows(torch.randn(4, 6, 16, generator=generator), torch.arange(6) < torch.tensor([[1], [3], [5], [6]]))
    model = synthetic_model(config)
    times = torch.tensor([3, 300, 600, 990])
    process = ProcessTensors.of(config.diffusion)
    return Objective(model, recipe, process), Inputs(
        x0, times if config.diffusion.discrete else times.float(), y, noise, 9, 0
    )


def gradients(objective: Objective, batch: Inputs) -> dict[str, Tensor]:
    objective.zero_grad()
    objective(batch, 5)["loss"].backward()
    return {name: value.grad.clone() for name, value in objective.named_parameters() if value.grad is not None}


def test_blocks_that_are_computed_again_have_the_same_gates_and_gradients(
    small_recipe: Make, config: ModelConfig
) -> None:
    objective, batch = objective_and_batch(small_recipe, config, warmup_iterations=9, token_spread=0.1)
    expected = gradients(objective, batch)
    passes: list[str] = []
    for block in objective.model.ordered_blocks():
        block.attn.register_forward_hook(lambda *_: passes.append("attention"))  # type: ignore[union-attr, arg-type]
    gradients(objective, batch)
    assert len(passes) == 2 * config.depth, "the dynamic and the complete model"
    objective.model.checkpointing = True
    found = gradients(objective, batch)
    assert len(passes) == 6 * config.depth, "and all of it again"
    assert found.keys() == expected.keys() and all(found[name].equal(value) for name, value in expected.items())


def test_in_mixed_precision_routers_stream_and_losses_are_fp32(small_recipe: Make, config: ModelConfig) -> None:
    seen: dict[str, list[Tensor]] = {}

    def watch(objective: Objective) -> None:
        def keep(kind: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            return lambda module, inputs, output: seen.setdefault(kind, []).extend((inputs[0], output))

        for block in objective.model.ordered_blocks():
            block.register_forward_hook(keep("stream"))
            block.mlp.fc1.register_forward_hook(keep("product"))  # type: ignore[union-attr]
        for module in objective.model.modules():
            if isinstance(module, WidthRouter | TokenRouter):
                module.register_forward_hook(keep(type(module).__name__))

    logits, losses = {}, {}
    for precision in ("fp32", "bf16"):
        objective, batch = objective_and_batch(small_recipe, config, precision=precision)
        seen.clear()
        watch(objective)
        losses[precision] = objective(batch, 5)
        logits[precision] = torch.stack(seen["WidthRouter"][1::2]).clone()
        products = {value.dtype for value in seen.pop("product")[1::2]}
        assert products == {torch.float32 if precision == "fp32" else torch.bfloat16}
        assert {value.dtype for values in seen.values() for value in values} == {torch.float32}
        assert {value.dtype for value in losses[precision].values()} == {torch.float32}
        assert {value.dtype for value in gradients(objective, batch).values()} == {torch.float32}
    assert logits["bf16"].equal(logits["fp32"]), "heads and groups are decided as at inference"
    mse = [float(losses[precision]["mse"].detach()) for precision in ("fp32", "bf16")]
    assert mse[0] != mse[1] == pytest.approx(mse[0], rel=0.05)


def test_a_batch_in_parts_is_the_whole_batch(tmp_path: Path, small_recipe: Make) -> None:
    """The same images, noise and dropped labels; the loss is a mean over images, so its gradient is the same."""
    for parts in (1, 2, 4):
        train(small_recipe(batch_size=16, accumulate=parts, iterations=20, log_every=5), tmp_path / str(parts))
    whole = read_log(tmp_path / "1")
    for parts in (2, 4):
        for entry, expected in zip(read_log(tmp_path / str(parts)), whole, strict=True):
            assert entry == pytest.approx(expected, rel=1e-5)


def test_parts_of_a_dynamic_batch_have_its_gates(
    tmp_path: Path, small_recipe: Make, dynamic_config: ModelConfig, randomised: Callable[..., DiT]
) -> None:
    """The FLOPs loss sees the mean ratio of a part, as documented; the ratio itself is that of the whole batch."""
    save_checkpoint(tmp_path / "start.safetensors", randomised(dynamic_config), dynamic_config)
    first = {}
    for parts in (1, 2):
        recipe = small_recipe(
            **{"stage": "dynamic", "model": dynamic_config, "init": str(tmp_path / "start.safetensors")},
            **{"accumulate": parts, "iterations": 1, "log_every": 1, "token_weight": 1.0},
        )
        train(recipe, tmp_path / str(parts))
        (first[parts],) = read_log(tmp_path / str(parts))
    for key in ("mse", "ratio"):
        assert first[2][key] == pytest.approx(first[1][key], rel=1e-5), key
    assert first[2]["flops"] > first[1]["flops"], "the mean of squares of the parts' means"


def test_batches_are_drawn_ahead_and_stay_the_same() -> None:
    source = BatchSource(Digits(), 0, 16, 0.1, 10, Process())
    with Prefetch(source, 2, 5) as batches:
        for iteration, part in ((0, 0), (0, 1), (1, 0), (3, 1), (4, 0), (4, 1)):  # in order, and with a jump
            batch, expected = batches.batch(iteration, part), source.batch(iteration, part, 2)
            assert np.array_equal(batch.x0, expected.x0) and np.array_equal(batch.noise, expected.noise)
            assert batch.first == 8 * part
        assert batches._ahead is None, "nothing is drawn after the end"


def test_an_error_of_the_data_ends_the_run(tmp_path: Path, small_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Digits.batch

    drawn: list[int] = []

    def damaged(self: Digits, indices: np.ndarray, generators: Any) -> Any:
        drawn.append(len(indices))
        if drawn.count(8) == 6:  # the probe has more images
            raise ConfigError("a shard is damaged")
        return original(self, indices, generators)

    monkeypatch.setattr(Digits, "batch", damaged)
    with pytest.raises(ConfigError, match="a shard is damaged"):
        train(small_recipe(), tmp_path / "run")
    monkeypatch.undo()
    train(small_recipe(), tmp_path / "run", resume=True)
    train(small_recipe(), tmp_path / "whole")
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_a_loss_that_is_not_finite_at_the_start_ends_the_run(
    tmp_path: Path, small_recipe: Make, static_config: ModelConfig, randomised: Callable[..., DiT]
) -> None:
    for precision in ("fp32", "bf16"):
        path = tmp_path / "start.safetensors"
        save_checkpoint(path, randomised(static_config, scale=1e18), static_config)
        with pytest.raises(
            TrainingError, match=r"the loss of the first iteration is (nan|inf), .* are finite$"
        ) as caught:
            train(small_recipe(init=str(path), precision=precision), tmp_path / precision)
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / precision).glob("state-*"))


def test_the_optimizer_has_the_settings_of_the_recipe(
    small_recipe: Make, static_config: ModelConfig, randomised: Callable[..., DiT]
) -> None:
    recipe = small_recipe(betas=(0.8, 0.95), adam_eps=1e-6, weight_decay=0.1)
    (group,) = make_optimizer(randomised(static_config), recipe).param_groups
    assert (group["betas"], group["eps"], group["weight_decay"], group["fused"]) == ((0.8, 0.95), 1e-6, 0.1, True)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_is_compiled_once_for_all_iterations(
    small_recipe: Make, config: ModelConfig, checkpointing: bool
) -> None:
    """Its graphs are counted, and run without code generation, which takes minutes: see below."""
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    settings = {"warmup_iterations": 3, "iterations": 10, "noise_anneal": 1.0}
    objective, batch = objective_and_batch(small_recipe, config, **settings)
    expected = [objective(batch, iteration) for iteration in range(5)]
    objective.model.checkpointing = checkpointing
    compile_model(objective.model, backend=count)
    names = list(objective.model.state_dict())
    found = [objective(batch, iteration) for iteration in range(5)]
    found[-1]["loss"].backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert len(graphs) == 2, "the dynamic and the complete model"
    assert names == list(synthetic_model(config).state_dict())
    torch._dynamo.reset()


@pytest.mark.release
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_run_is_the_same_up_to_rounding_and_resumes(
    tmp_path: Path, small_recipe: Make, dynamic_config: ModelConfig, randomised: Callable[..., DiT], checkpointing: bool
) -> None:
    save_checkpoint(tmp_path / "start.safetensors", randomised(dynamic_config), dynamic_config)
    settings: dict[str, Any] = {"stage": "dynamic", "model": dynamic_config, "checkpointing": checkpointing}
    settings |= {"init": str(tmp_path / "start.safetensors"), "warmup_iterations": 6, "token_weight": 1.0}
    eager = train(small_recipe(**settings), tmp_path / "eager")
    compiled = small_recipe(**settings, compile=True)

    def stop(done: int, total: int, entry: object) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(compiled, tmp_path / "compiled", progress=stop)
    result = train(compiled, tmp_path / "compiled", resume=True)
    for entry, expected in zip(read_log(tmp_path / "compiled"), read_log(tmp_path / "eager"), strict=True):
        assert entry == pytest.approx(expected, rel=1e-3)
    names = [load_checkpoint(each.model).state.keys() for each in (eager, result)]
    assert names[0] == names[1]
