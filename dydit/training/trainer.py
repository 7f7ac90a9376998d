"""The training loop: one run of one recipe, on whatever `accelerate` finds (devices, mixed precision, processes).

Bit-exact when repeated, and when killed and resumed, on the same machine with the same number of threads and processes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dydit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from dydit.errors import CheckpointError, ConfigError, TrainingError
from dydit.files import sha256_of, user_path, write_json
from dydit.models.dynamic import DynamicModel
from dydit.models.registry import architecture_of
from dydit.models.routers import Masked, Recording, Static
from dydit.training.curves import draw_curves
from dydit.training.data import open_data
from dydit.training.draws import Batch, BatchSource, Purpose, stream
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
from dydit.training.processes import agreed, stopped_by_sigterm
from dydit.training.recipe import LearningRateSchedule, Precision, Recipe, Stage
from dydit.training.state import (
    CURVES,
    MODEL,
    RECIPE,
    SUMMARY,
    Counters,
    append_log,
    load_state,
    read_log,
    save_state,
    states,
    truncate_log,
)
from dydit.training.training_folder import check_folder, finished_summary, held_folder, identity

PROBE_IMAGES = 64
HOPELESS = 200  # skipped steps in a row after which a run is given up

Progress = Callable[[int, int, dict[str, Any] | None], None]  # iterations done, iterations, line of the log if any


@dataclass(frozen=True)
class TrainResult:
    """What a run left: the EMA weights, and the summary that is also in `train.json`.

    `note`: what there is to say about it in one sentence, where it was finished before or made longer.
    """

    model: Path
    summary: dict[str, Any]
    note: str = field(default="", compare=False)


class Objective(nn.Module):
    """The model together with its losses, as one module, so that one forward is one synchronised step everywhere."""

    def __init__(self, model: DynamicModel, recipe: Recipe, process: Process):
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


def starting_model(recipe: Recipe) -> DynamicModel:
    """The model that a run starts from.

    Fresh weights without `init`; for a dynamic run a static checkpoint, reordered by importance, with fresh routers.
    A checkpoint with routers is taken as it is.
    """
    generator = torch.Generator().manual_seed(int(stream(recipe.seed, Purpose.INITIAL_WEIGHTS).integers(0, 2**62)))
    known = architecture_of(recipe.model)
    model = known.masked(recipe.model)
    if recipe.init is None:
        if recipe.stage is not Stage.STATIC:
            kind = "static DiT" if recipe.stage is Stage.DYNAMIC else "dynamic DiT"
            raise ConfigError(f"recipe {recipe.name} starts from a {kind}: give its checkpoint with init=PATH")
        known.initialize(model, generator)
        return model
    start = load_checkpoint(Path(recipe.init))
    sizes, wanted = start.config.sizes, recipe.model.sizes
    if sizes not in (wanted, wanted.without_routers()):
        raise ConfigError(
            f"init {recipe.init} is a model of other sizes ({start.config}) than the recipe's ({recipe.model})"
        )
    if sizes == wanted:
        model.load_state_dict(start.state)
        return model
    model.load_state_dict(known.ordered_by_importance(start.state, start.config), strict=False)
    known.initialize_routers(model, generator, recipe.token_bias, recipe.width_bias)
    return model


def make_optimizer(model: DynamicModel, recipe: Recipe) -> torch.optim.AdamW:
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

    A run may be resumed with more iterations, a finished one too. Raises `OutputError` where `out` is taken,
    `ConfigError` where it is another recipe's run or a setting does not fit the data, `CheckpointError` where `init` or
    a state cannot be used, and `TrainingError` where the run diverges. A start that is refused leaves nothing behind.
    """
    from accelerate import Accelerator

    out = user_path(out)
    data = open_data(recipe.data, recipe.model)
    accelerator = Accelerator(mixed_precision="bf16" if recipe.precision is Precision.BF16 else "no")
    if recipe.batch_size % accelerator.num_processes:
        raise ConfigError(f"batch_size {recipe.batch_size} does not divide over {accelerator.num_processes} processes")
    source = BatchSource(
        data=data,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
        label_dropout=recipe.label_dropout,
        null_class=recipe.model.classes.count,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    with contextlib.ExitStack() as held:
        agreed(accelerator, lambda: held.enter_context(held_folder(out)))
        agreed(accelerator, lambda: check_folder(out, recipe, resume))
        finished = agreed(accelerator, lambda: finished_summary(out, recipe))
        if finished is not None:
            note = f"it was finished already; --resume with more iterations than {recipe.iterations} makes it longer"
            return TrainResult(out / MODEL, finished, note)
        return _Run(recipe, out, source, accelerator, progress).run()


class _Run:
    """One run under way: the modules, the optimiser and the counters."""

    def __init__(self, recipe: Recipe, out: Path, source: BatchSource, accelerator: Any, progress: Progress | None):
        self.recipe, self.out, self.source, self.accelerator, self.progress = recipe, out, source, accelerator, progress
        saved = states(out)
        if not saved and (out / SUMMARY).is_file():
            raise CheckpointError(
                f"{out} holds a finished run without its last state, from which it could go on; start a new run in "
                f"another folder, for instance with init={out / MODEL}"
            )
        model = architecture_of(recipe.model).masked(recipe.model) if saved else starting_model(recipe)
        model.train().to(accelerator.device)
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        optimizer = make_optimizer(model, recipe)
        self.counters = load_state(saved[-1], model, self.ema, optimizer) if saved else Counters()
        self.process = Process.training(accelerator.device)
        self.model, self.plain_optimizer = model, optimizer
        self.objective, self.optimizer = accelerator.prepare(Objective(model, recipe, self.process), optimizer)
        if 0 < self.counters.planned < recipe.iterations:
            self.counters.made_longer_at.append(self.counters.iteration)
        self.counters.planned = recipe.iterations
        if accelerator.is_main_process:
            truncate_log(out, self.counters.iteration, recipe.log_every)
            write_json(out / RECIPE, identity(recipe))  # all is known to be right: from here on it is this recipe's run

    def run(self) -> TrainResult:
        """Run to the end. An interrupt becomes one that says how to go on."""
        try:
            with stopped_by_sigterm():
                self.iterate()
                return self.finish()
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(
                f"interrupted after {self.counters.iteration} of {self.recipe.iterations} iterations; the same command "
                f"with --resume goes on {self.last_state()}"
            ) from stop

    def iterate(self) -> None:
        """All iterations that are left, with their lines of the log and their states."""
        recipe, counters = self.recipe, self.counters
        before, started = counters.seconds, time.monotonic()
        while counters.iteration < recipe.iterations:
            self.step(counters.iteration)
            counters.iteration += 1
            counters.seconds = before + time.monotonic() - started
            entry, last = None, counters.iteration == recipe.iterations
            if counters.iteration % recipe.log_every == 0:
                entry = self.log()
            if counters.iteration % recipe.save_every == 0 or last:
                self.save()
            if last and counters.summed:  # after the state: a longer run has no line here
                entry = self.log()
            if self.progress is not None and self.accelerator.is_main_process:
                self.progress(counters.iteration, recipe.iterations, entry)

    def last_state(self) -> str:
        """Where a resumed run would go on, in words."""
        saved = states(self.out)
        return f"from its last state, iteration {int(saved[-1].name[6:])}" if saved else "from the beginning"

    def require_finite(self, loss: float | None = None) -> None:
        """Raise `TrainingError` where weights are not finite any more: no state, log or result is made of such."""
        named = [*self.model.named_parameters(), *self.ema.named_parameters()]
        bad = next((name for name, value in named if not bool(value.isfinite().all())), None)
        if bad is not None or (loss is not None and not math.isfinite(loss)):
            what = f"{bad} holds values that are not finite" if bad else f"the probe's error is {loss}"
            raise self.given_up(f"the run diverged: {what} after iteration {self.counters.iteration}")

    def given_up(self, reason: str) -> TrainingError:
        """The error that ends a run which resuming would only repeat."""
        saved = states(self.out)
        kept = f"its last good state is {saved[-1]}" if saved else "no state was saved before"
        return TrainingError(
            f"{reason}; {kept}, and no weights were written as a result. To resume would repeat it: start again in "
            f"another folder, with learning_rate below {self.recipe.learning_rate:g} or with a lower clip_norm"
        )

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
            if not math.isfinite(norm):
                self.require_finite()
            if counters.skipped_in_a_row >= HOPELESS:
                raise self.given_up(
                    f"{HOPELESS} steps in a row were skipped, the last after iteration {iteration}: the gradient norm "
                    f"({norm:.3g}) stays above grad_norm_limit {limit:g}, which may be raised, too"
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
        self.require_finite()
        if self.accelerator.is_main_process:
            entry |= probe(self.ema, self.source.probe(PROBE_IMAGES), self.process)
            self.require_finite(entry["probe_mse"])
            append_log(self.out, entry)
        counters.sums, counters.summed = {}, 0
        return entry

    def save(self) -> None:
        """Write the state of this iteration in place of the one before."""
        self.require_finite()
        if self.accelerator.is_main_process:
            save_state(self.out, self.counters, self.model, self.ema, self.plain_optimizer)
        self.accelerator.wait_for_everyone()

    def finish(self) -> TrainResult:
        """Write the EMA weights, the curves and, last, the summary. The last state stays: the run may become longer."""
        recipe, counters, out = self.recipe, self.counters, self.out
        if counters.summed:  # of a run that was killed between its last state and its last line
            self.log()
        self.require_finite()
        log = read_log(out)
        described = json.loads((out / RECIPE).read_text())
        summary = {
            "recipe": described,
            "iterations": counters.iteration,
            "skipped": counters.skipped,
            "seconds": round(counters.seconds, 1),
            **({"made_longer_at": counters.made_longer_at} if counters.made_longer_at else {}),
            "processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
            "torch": torch.__version__,
            "last": log[-1] if log else {},
        }
        if self.accelerator.is_main_process:
            save_checkpoint(out / MODEL, self.ema, recipe.model, {"recipe": json.dumps(described)})
            draw_curves(log, out / CURVES, recipe.name)
            summary["model_sha256"] = sha256_of(out / MODEL)
            write_json(out / SUMMARY, summary)
        self.accelerator.wait_for_everyone()
        return TrainResult(out / MODEL, summary, recipe.made_longer(counters.made_longer_at))


def _tensors(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arrays = (batch.x0, batch.timesteps, batch.labels, batch.noise)
    x0, t, y, noise = (torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays)
    return x0, t, y, noise


@torch.no_grad()
def probe(model: DynamicModel, batch: Batch, process: Process) -> dict[str, float]:
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
