"""The training loop: one run of one recipe, on whatever `accelerate` finds (devices, mixed precision, processes).

Bit-exact when repeated, and when killed and resumed, on the same machine with the same number of threads and processes.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dydit.errors import ConfigError
from dydit.files import write_json
from dydit.models.checkpoint import load_checkpoint, save_checkpoint
from dydit.models.dit.model import DiT, initialize, initialize_routers
from dydit.models.routers import Masked, Recording, Static
from dydit.training.curves import draw_curves
from dydit.training.data import open_data
from dydit.training.draws import Batch, BatchSource, Purpose, stream
from dydit.training.importance import rank_and_permute
from dydit.training.losses import (
    AnnealedGumbelSigmoid,
    Process,
    achieved_ratio,
    add_noise,
    detail_loss,
    diffusion_loss,
    flops_loss,
    relative_detail,
    token_loss,
)
from dydit.training.recipe import LearningRateSchedule, Precision, Recipe, Stage
from dydit.training.state import (
    CURVES,
    MODEL,
    RECIPE,
    SUMMARY,
    Counters,
    append_log,
    claim_folder,
    load_state,
    read_log,
    save_state,
    states,
    truncate_log,
)

PROBE_IMAGES = 64
HOPELESS = 200  # skipped steps in a row after which a run is given up

Progress = Callable[[int, int, dict[str, Any] | None], None]  # iterations done, iterations, line of the log if any


@dataclass(frozen=True)
class TrainResult:
    """What a run left: the EMA weights, and the summary that is also in `train.json`."""

    model: Path
    summary: dict[str, Any]


class Objective(nn.Module):
    """The model together with its losses, as one module, so that one forward is one synchronised step everywhere."""

    def __init__(self, model: DiT, recipe: Recipe, process: Process):
        super().__init__()
        self.model, self.recipe, self.process = model, recipe, process

    def forward(
        self, x0: Tensor, t: Tensor, y: Tensor, noise: Tensor, gate_seed: int, iteration: int
    ) -> dict[str, Tensor]:
        """Scalars: `loss`, to be minimised, and its parts. x0, noise [b, C, S, S], t and y [b]."""
        x_t = add_noise(self.process, x0, t, noise)
        if self.recipe.stage is Stage.STATIC:
            mse, vb = (
                part.mean() for part in diffusion_loss(self.process, self.model(x_t, t, y, Static()), x0, x_t, t, noise)
            )
            return {"loss": mse + vb, "mse": mse, "vb": vb}
        generator = torch.Generator(x0.device).manual_seed(gate_seed)
        gumbel = AnnealedGumbelSigmoid(generator, self.recipe.temperature, self.recipe.gate_noise(iteration))
        gating = Recording(gumbel, self.model.config)
        mse, vb = (
            part.mean() for part in diffusion_loss(self.process, self.model(x_t, t, y, gating), x0, x_t, t, noise)
        )
        ratio = achieved_ratio(self.model.config, gating.decisions())
        flops = flops_loss(ratio, self.recipe.target(iteration), self.recipe.flops_weight)
        parts = {"loss": mse + vb + flops, "mse": mse, "vb": vb, "flops": flops, "ratio": ratio.mean()}
        if self.recipe.token_weight:
            parts["token"] = self._token_loss(gating.decisions().tokens, x0)
            parts["loss"] = parts["loss"] + parts["token"]
        if iteration < self.recipe.warmup_iterations:
            whole = diffusion_loss(self.process, self.model(x_t, t, y, Static()), x0, x_t, t, noise)
            parts["complete"] = (whole[0] + whole[1]).mean()
            parts["loss"] = parts["loss"] + parts["complete"]
        return parts

    def _token_loss(self, tokens: Tensor, x0: Tensor) -> Tensor:
        target, weight, spread = self.recipe.token_target, self.recipe.token_weight, self.recipe.token_spread
        loss = token_loss(tokens, target, weight)
        return loss + detail_loss(tokens, relative_detail(x0), target, spread, weight) if spread else loss


def starting_model(recipe: Recipe) -> DiT:
    """The model that a run starts from.

    Fresh weights without `init`; for a dynamic run a static checkpoint, reordered by importance, with fresh routers.
    A checkpoint with routers is taken as it is.
    """
    generator = torch.Generator().manual_seed(int(stream(recipe.seed, Purpose.INITIAL_WEIGHTS).integers(0, 2**62)))
    model = DiT(recipe.model)
    if recipe.init is None:
        if recipe.stage is not Stage.STATIC:
            kind = "static DiT" if recipe.stage is Stage.DYNAMIC else "dynamic DiT"
            raise ConfigError(f"recipe {recipe.name} starts from a {kind}: give its checkpoint with init=PATH")
        initialize(model, generator)
        return model
    start = load_checkpoint(Path(recipe.init))
    if start.config not in (recipe.model, recipe.model.without_routers()):
        raise ConfigError(
            f"init {recipe.init} is a model of other sizes ({start.config}) than the recipe's ({recipe.model})"
        )
    if start.config == recipe.model:
        model.load_state_dict(start.state)
        return model
    model.load_state_dict(rank_and_permute(start.state, start.config), strict=False)
    initialize_routers(model, generator, recipe.token_bias, recipe.width_bias)
    return model


def make_optimizer(model: DiT, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over two groups, the routers' with its own multiple of the learning rate (`multiple` in the group)."""
    routers: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            routed = any(part in name for part in (".attn_rate.", ".mlp_rate.", ".token_selection."))
            (routers if routed else rest).append(parameter)
    groups: list[dict[str, Any]] = [{"params": rest, "multiple": 1.0}]
    if routers:
        groups.append({"params": routers, "multiple": recipe.router_learning_rate})
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


def learning_rate(recipe: Recipe, iteration: int) -> float:
    """Linear warm-up, then constant or half a cosine down to 1/20 of the peak."""
    peak = recipe.learning_rate * min(1.0, (iteration + 1) / max(1, recipe.learning_rate_warmup))
    if recipe.learning_rate_schedule is LearningRateSchedule.CONSTANT:
        return peak
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * iteration / recipe.iterations)))


def train(recipe: Recipe, out: Path, resume: bool = False, progress: Progress | None = None) -> TrainResult:
    """Run `recipe` in the folder `out`; with `resume`, from the last state in it.

    Raises `OutputError` where `out` is taken, `ConfigError` where it is another recipe's run or a setting does not fit
    the data, and `CheckpointError` where `init` cannot be used.
    """
    from accelerate import Accelerator

    out = Path(out)
    data = open_data(recipe.data, recipe.model)
    accelerator = Accelerator(mixed_precision="bf16" if recipe.precision is Precision.BF16 else "no")
    if recipe.batch_size % accelerator.num_processes:
        raise ConfigError(f"batch_size {recipe.batch_size} does not divide over {accelerator.num_processes} processes")
    if accelerator.is_main_process:
        claim_folder(out, recipe, resume)
    accelerator.wait_for_everyone()
    if (out / SUMMARY).is_file():
        return TrainResult(out / MODEL, json.loads((out / SUMMARY).read_text()))
    source = BatchSource(
        data=data,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
        label_dropout=recipe.label_dropout,
        null_class=recipe.model.null_class,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    return _Run(recipe, out, source, accelerator, progress).run()


class _Run:
    """One run under way: the modules, the optimiser and the counters."""

    def __init__(self, recipe: Recipe, out: Path, source: BatchSource, accelerator: Any, progress: Progress | None):
        self.recipe, self.out, self.source, self.accelerator, self.progress = recipe, out, source, accelerator, progress
        saved = states(out)
        model = DiT(recipe.model) if saved else starting_model(recipe)
        model.train().to(accelerator.device)
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        optimizer = make_optimizer(model, recipe)
        self.counters = load_state(saved[-1], model, self.ema, optimizer) if saved else Counters()
        self.process = Process.training(accelerator.device)
        self.model, self.plain_optimizer = model, optimizer
        self.objective, self.optimizer = accelerator.prepare(Objective(model, recipe, self.process), optimizer)
        if accelerator.is_main_process:
            truncate_log(out, self.counters.iteration)

    def run(self) -> TrainResult:
        recipe, counters = self.recipe, self.counters
        before, started = counters.seconds, time.monotonic()
        while counters.iteration < recipe.iterations:
            self.step(counters.iteration)
            counters.iteration += 1
            counters.seconds = before + time.monotonic() - started
            entry = None
            if counters.iteration % recipe.log_every == 0 or counters.iteration == recipe.iterations:
                entry = self.log()
            if counters.iteration % recipe.save_every == 0 and counters.iteration < recipe.iterations:
                self.save()
            if self.progress is not None and self.accelerator.is_main_process:
                self.progress(counters.iteration, recipe.iterations, entry)
        return self.finish()

    def step(self, iteration: int) -> None:
        """One iteration: exactly one optimiser step, or none where the gradient norm is over the limit."""
        recipe, counters = self.recipe, self.counters
        rate = learning_rate(recipe, iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["multiple"]
        batch = self.source.batch(iteration)
        parts = self.objective(*_tensors(batch, self.accelerator.device), batch.gate_seed, iteration)
        self.accelerator.backward(parts["loss"])
        limit = recipe.grad_norm_limit or math.inf
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norm = float(self.accelerator.clip_grad_norm_(parameters, recipe.clip_norm or math.inf))
        if math.isfinite(norm) and norm <= limit:
            self.optimizer.step()
            counters.skipped_in_a_row = 0
        else:
            counters.skipped, counters.skipped_in_a_row = counters.skipped + 1, counters.skipped_in_a_row + 1
            if counters.skipped_in_a_row >= HOPELESS:
                raise ConfigError(
                    f"{HOPELESS} steps in a row were skipped at iteration {iteration}: the gradient norm ({norm:.3g}) "
                    f"stays above grad_norm_limit {limit}; lower learning_rate or raise the limit"
                )
        self.optimizer.zero_grad()
        with torch.no_grad():
            for average, value in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                average.lerp_(value, 1 - recipe.ema_decay)
        self.count({**{key: value.detach() for key, value in parts.items()}, "grad_norm": torch.tensor(norm)})

    def count(self, parts: dict[str, Tensor]) -> None:
        """Add an iteration's metrics, averaged over processes, to the sums since the last line of the log."""
        values = torch.stack([part.float().to(self.accelerator.device) for part in parts.values()])
        values = self.accelerator.reduce(values, "mean")
        for key, value in zip(parts, values.tolist(), strict=True):
            if math.isfinite(value):
                self.counters.sums[key] = self.counters.sums.get(key, 0.0) + value
        self.counters.summed += 1

    def log(self) -> dict[str, Any]:
        """Write the line of this iteration: means since the last one, and the probe of the EMA model."""
        recipe, counters = self.recipe, self.counters
        entry: dict[str, Any] = {"iteration": counters.iteration}
        entry |= {key: total / counters.summed for key, total in counters.sums.items()}
        entry |= {"learning_rate": learning_rate(recipe, counters.iteration - 1), "skipped": counters.skipped}
        if recipe.stage is not Stage.STATIC:
            entry["target"] = recipe.target(counters.iteration - 1)
        if self.accelerator.is_main_process:
            entry |= probe(self.ema, self.source.probe(PROBE_IMAGES), self.process)
            append_log(self.out, entry)
        counters.sums, counters.summed = {}, 0
        return entry

    def save(self) -> None:
        if self.accelerator.is_main_process:
            save_state(self.out, self.counters, self.model, self.ema, self.plain_optimizer)
        self.accelerator.wait_for_everyone()

    def finish(self) -> TrainResult:
        """Write the EMA weights, the curves and, last, the summary; the states are no longer needed."""
        recipe, counters, out = self.recipe, self.counters, self.out
        log = read_log(out)
        described = json.loads((out / RECIPE).read_text())
        summary = {
            "recipe": described,
            "iterations": counters.iteration,
            "skipped": counters.skipped,
            "seconds": round(counters.seconds, 1),
            "processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
            "torch": torch.__version__,
            "last": log[-1] if log else {},
        }
        if self.accelerator.is_main_process:
            save_checkpoint(out / MODEL, self.ema, recipe.model, {"recipe": json.dumps(described)})
            draw_curves(log, out / CURVES, recipe.name)
            write_json(out / SUMMARY, summary)
            for path in states(out):
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()
        return TrainResult(out / MODEL, summary)


def _tensors(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arrays = (batch.x0, batch.timesteps, batch.labels, batch.noise)
    x0, t, y, noise = (torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays)
    return x0, t, y, noise


@torch.no_grad()
def probe(model: DiT, batch: Batch, process: Process) -> dict[str, float]:
    """The model as at inference (no gate noise) on a fixed batch: mean squared error, FLOPs ratio, token ratio."""
    x0, t, y, noise = _tensors(batch, process.sqrt_alpha.device)
    gating = Recording(Masked() if model.config.dynamic else Static(), model.config)
    output = model(add_noise(process, x0, t, noise), t, y, gating)
    out = {"probe_mse": float((output[:, : x0.shape[1]] - noise).square().mean())}
    if model.config.dynamic:
        decisions = gating.decisions()
        per_image = decisions.tokens.mean((0, 2))
        out |= {
            "probe_ratio": float(achieved_ratio(model.config, decisions).mean()),
            **{f"probe_{name}": share for name, share in model.config.units.shares(decisions.units.numpy()).items()},
            "probe_tokens": float(per_image.mean()),
            "probe_tokens_std": float(per_image.std()),
        }
    return out


def train_sequence(
    recipes: Sequence[Recipe], out: Path, resume: bool = False, progress: Progress | None = None
) -> list[TrainResult]:
    """Run recipes one after another, each in `out/<stage>`, each starting from the weights of the one before.

    A single recipe runs in `out` itself. With `resume`, finished runs are kept as they are.
    """
    if len(recipes) == 1:
        return [train(recipes[0], out, resume, progress)]
    results: list[TrainResult] = []
    for recipe in recipes:
        if results:
            recipe = recipe.model_copy(update={"init": str(results[-1].model)})
        results.append(train(recipe, Path(out) / recipe.stage.value, resume, progress))
    return results
