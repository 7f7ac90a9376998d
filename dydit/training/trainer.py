"""The training loop: one run of one recipe, on whatever `accelerate` finds (devices, mixed precision, processes).

A repeated run gives the same bits, and so does a killed and resumed one, on the same machine with the same number of
threads and processes.
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

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from dydit.checkpoints.checkpoint import save_checkpoint
from dydit.data.opened import data_for
from dydit.errors import CheckpointError, ConfigError, TrainingError, one_line
from dydit.files import sha256_of, user_path, write_atomic, write_json
from dydit.training.curves import curves_png
from dydit.training.draws import Batch, BatchSource
from dydit.training.losses import ProcessTensors
from dydit.training.objective import Inputs, Objective, compile_model, probe
from dydit.training.optimizer import learning_rate, make_optimizer
from dydit.training.prefetch import Prefetch
from dydit.training.processes import agreed, leave_group_at_exit, stopped_by_sigterm
from dydit.training.recipe import Recipe, Stage
from dydit.training.samples import Conditions, sample, write_samples
from dydit.training.spread import Whole, local, spread_of, whole
from dydit.training.start import model_to_resume, starting_model, with_process_of_start
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
    state_tensors,
    states,
    truncate_log,
)
from dydit.training.teacher import Teacher
from dydit.training.trackers import FOLDER as TRACKERS
from dydit.training.trackers import finish_trackers, require_trackers, start_trackers, track
from dydit.training.training_folder import check_folder, finished_summary, held_folder, identity

PROBE_IMAGES = 64
HOPELESS = 200  # a run ends with an error after this many skipped steps in a row

Progress = Callable[
    [int, int, dict[str, Any] | None], None
]  # iterations done, iterations in all, entry of the log or None


@dataclass(frozen=True)
class TrainResult:
    """The result of a run: the EMA weights, and the summary that is also in `train.json`.

    `note`: a remark in one sentence, if the run was finished before or made longer.
    """

    model: Path
    summary: dict[str, Any]
    note: str = field(default="", compare=False)


def train(recipe: Recipe, out: Path, resume: bool = False, progress: Progress | None = None) -> TrainResult:
    """Run `recipe` in the folder `out`; with `resume`, from the last state in it.

    A run may be resumed with more iterations, even a finished one. Raises `OutputError` if `out` is not empty,
    `ConfigError` if it holds the run of another recipe or a setting does not fit the data or `init`, `CheckpointError`
    if `init`, the teacher or a state cannot be used, and `TrainingError` if the run diverges. A run that is refused
    leaves nothing behind.
    """
    require_trackers(recipe.trackers)  # before accelerate looks for them
    from accelerate import Accelerator

    out = user_path(out)
    data = data_for(recipe.data, recipe.model)
    recipe = with_process_of_start(recipe)
    # The objective sets the precision itself: accelerate has one for each process, but a sequence may have several.
    accelerator = Accelerator(
        mixed_precision="no", log_with=[each.value for each in recipe.trackers] or None, project_dir=str(out / TRACKERS)
    )
    leave_group_at_exit()
    spread = spread_of(accelerator, recipe.compile)
    if recipe.batch_size % (accelerator.num_processes * recipe.accumulate):
        parts = f" in {recipe.accumulate} parts (accumulate)" if recipe.accumulate > 1 else ""
        raise ConfigError(
            f"batch_size {recipe.batch_size} is not a multiple of the {accelerator.num_processes} processes{parts}"
        )
    source = BatchSource(
        data=data,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
        label_dropout=recipe.label_dropout,
        null_class=recipe.model.classes.count,
        diffusion=recipe.process,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    with contextlib.ExitStack() as stack:
        agreed(accelerator, lambda: stack.enter_context(held_folder(out)))
        agreed(accelerator, lambda: check_folder(out, recipe, resume))
        finished = agreed(accelerator, lambda: finished_summary(out, recipe))
        if finished is not None:
            note = (
                f"it was finished already; use --resume with more iterations than {recipe.iterations} to make it longer"
            )
            return TrainResult(out / MODEL, finished, note)
        return _Run(recipe, out, source, accelerator, spread, progress).run()


class _Run:
    """A run: its modules, optimizer and counters."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        source: BatchSource,
        accelerator: Any,
        spread: Whole,
        progress: Progress | None,
    ):
        self.recipe, self.out, self.source, self.progress = recipe, out, source, progress
        self.accelerator, self.spread = accelerator, spread
        saved = states(out)
        if not saved and (out / SUMMARY).is_file():
            raise CheckpointError(
                f"{out} holds a finished run, but not its last state, so it cannot be resumed; start a new run in "
                f"another folder, for example with init={out / MODEL}"
            )
        model = model_to_resume(recipe) if saved else starting_model(recipe)
        model.train().to(accelerator.device)
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        model.checkpointing = recipe.checkpointing
        for each in (model, self.ema):
            spread.place(each)
        optimizer = make_optimizer(model, recipe)
        self.counters = load_state(saved[-1], model, self.ema, optimizer) if saved else Counters()
        self.process = ProcessTensors.of(recipe.process, accelerator.device)
        self.model, self.plain_optimizer = model, optimizer
        if recipe.compile:
            compile_model(model)
        objective = Objective(model, recipe, self.process, Teacher.of(recipe, accelerator.device))
        self.objective, self.optimizer = spread.prepared(objective, optimizer)
        if 0 < self.counters.planned < recipe.iterations:
            self.counters.made_longer_at.append(self.counters.iteration)
        self.counters.planned = recipe.iterations
        self.averages, self.weights = list(self.ema.parameters()), list(model.parameters())
        self.sums = {key: self.number(value) for key, value in self.counters.sums.items()}
        if self.evaluates:
            self.probe = self.inputs(source.probe(PROBE_IMAGES))
            self.conditions = Conditions.of(recipe.model, source, accelerator.device) if recipe.sample_every else None
        if accelerator.is_main_process:
            truncate_log(out, self.counters.iteration, recipe.log_every)
            write_json(
                out / RECIPE, identity(recipe)
            )  # last, after all checks: from here on this is the folder of the run
        start_trackers(accelerator, recipe, out)

    @property
    def evaluates(self) -> bool:
        """Whether this process runs the EMA model: the main one, or all of them, if each has a part of the weights."""
        return self.spread.split or bool(self.accelerator.is_main_process)

    def inputs(self, batch: Batch) -> Inputs:
        """A batch on the device."""
        return Inputs.of(batch, self.accelerator.device, self.recipe.model.text is not None)

    def number(self, value: float | Tensor) -> Tensor:
        """A number on the device, in fp64 where it has that."""
        device = self.accelerator.device
        return torch.as_tensor(value, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)

    def run(self) -> TrainResult:
        """Run to the end. An interrupt is raised again with a message that says how to resume."""
        try:
            with stopped_by_sigterm():
                with Prefetch(self.source, self.recipe.accumulate, self.recipe.iterations) as batches:
                    self.iterate(batches)
                return self.finish()
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(
                f"interrupted after {self.counters.iteration} of {self.recipe.iterations} iterations; the same command "
                f"with --resume continues {self.last_state()}"
            ) from stop
        except TorchDynamoException as error:
            reason = one_line(error)
            raise TrainingError(f"the model cannot be compiled ({reason}); train it with compile=false") from error
        finally:
            finish_trackers(self.accelerator)

    def iterate(self, batches: Prefetch) -> None:
        """Run the iterations that are left, and write the log and the states."""
        recipe, counters = self.recipe, self.counters
        before, started = counters.seconds, time.monotonic()
        while counters.iteration < recipe.iterations:
            self.step(counters.iteration, batches)
            counters.iteration += 1
            counters.seconds = before + time.monotonic() - started
            entry, last = None, counters.iteration == recipe.iterations
            if counters.iteration % recipe.log_every == 0:
                entry = self.log()
            if recipe.sample_every and counters.iteration % recipe.sample_every == 0:
                self.sample()
            if counters.iteration % recipe.save_every == 0 or last:
                self.save()
            if last and counters.summed:  # after the state: the log of a longer run has no line here
                entry = self.log()
            if self.progress is not None and self.accelerator.is_main_process:
                self.progress(counters.iteration, recipe.iterations, entry)

    def last_state(self) -> str:
        """Where a resumed run would continue, in words."""
        saved = states(self.out)
        return f"from its last state, iteration {int(saved[-1].name[6:])}" if saved else "from the beginning"

    def require_finite(self, loss: float | None = None) -> None:
        """Raise `TrainingError` if weights are not finite: no state, log or result may be written with them."""
        parameters = [*self.model.named_parameters(), *self.ema.named_parameters()]
        own = torch.stack([local(value).isfinite().all() for _, value in parameters])
        finite = self.spread.everywhere(own).tolist()
        bad = next((name for (name, _), each in zip(parameters, finite, strict=True) if not each), None)
        if bad is not None or (loss is not None and not math.isfinite(loss)):
            what = f"{bad} holds values that are not finite" if bad else f"the probe's error is {loss}"
            raise self.failure(f"the run diverged: {what} after iteration {self.counters.iteration}")

    def failure(self, reason: str) -> TrainingError:
        """The error that ends a run; resuming would only repeat it."""
        saved = states(self.out)
        state = f"the last good state of the run is {saved[-1]}" if saved else "no state was saved before"
        return TrainingError(
            f"{reason}; {state}, and no weights were written. Resuming would repeat the failure: start again in "
            f"another folder, with learning_rate below {self.recipe.learning_rate:g} or with a lower clip_norm"
        )

    def backward(self, iteration: int, batches: Prefetch) -> dict[str, Tensor]:
        """Add the gradients of all parts of a batch; returns the metrics, means over the parts.

        The loss is the mean of those of the parts. Where it squares a mean over images (the FLOPs and token losses),
        that mean is over the images of the part, of all processes.
        """
        parts = self.recipe.accumulate
        means: dict[str, Tensor] = {}
        for part in range(parts):
            last = part == parts - 1
            with contextlib.nullcontext() if last else self.spread.without_exchange(self.objective):
                losses = self.objective(self.inputs(batches.batch(iteration, part)), iteration)
                self.accelerator.backward(losses["loss"] / parts)
            for key, value in losses.items():
                means[key] = means.get(key, 0) + value.detach() / parts
        return means

    def step(self, iteration: int, batches: Prefetch) -> None:
        """One iteration: exactly one optimizer step, or none if the gradient norm is above the limit.

        It waits for the device once, for that decision.
        """
        recipe, counters = self.recipe, self.counters
        rate = learning_rate(recipe, iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["multiple"]
        parts = self.backward(iteration, batches)
        limit = recipe.grad_norm_limit or math.inf
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norm = self.spread.clip(parameters, recipe.clip_norm or math.inf)
        if math.isfinite(norm) and norm <= limit:
            self.optimizer.step()
            counters.skipped_in_a_row = 0
        else:
            counters.skipped, counters.skipped_in_a_row = counters.skipped + 1, counters.skipped_in_a_row + 1
            if not math.isfinite(norm):
                self.require_finite()
                if iteration == 0:
                    raise TrainingError(
                        f"the loss of the first iteration is {float(parts['loss']):g}, and the norm of its gradient "
                        f"{norm:g}; check that the data, and the weights of init, are finite"
                    )
            if counters.skipped_in_a_row >= HOPELESS:
                skipped = f"{HOPELESS} steps in a row were skipped, the last at iteration {iteration}"
                if not math.isfinite(norm):
                    raise self.failure(f"{skipped}, because the gradient norm is {norm:g}")
                raise self.failure(
                    f"{skipped}, because the gradient norm ({norm:.3g}) stays above grad_norm_limit ({limit:g}; a "
                    "higher limit may help)"
                )
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.weights, 1 - recipe.ema_decay)
        self.count({**parts, "grad_norm": self.number(norm)})

    def count(self, parts: dict[str, Tensor]) -> None:
        """Add an iteration's metrics, averaged over processes, to the sums since the last line of the log."""
        values = self.accelerator.reduce(torch.stack([self.number(part) for part in parts.values()]), "mean")
        for key, value in zip(parts, torch.where(values.isfinite(), values, 0), strict=True):
            self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.counters.summed += 1

    def read_sums(self) -> None:
        """Read the sums from the device into the counters."""
        self.counters.sums = {key: float(value) for key, value in self.sums.items()}

    def log(self) -> dict[str, Any]:
        """Write a line of the log: means since the last line, and the probe of the EMA model."""
        recipe, counters = self.recipe, self.counters
        self.read_sums()
        entry: dict[str, Any] = {"iteration": counters.iteration}
        entry |= {key: total / counters.summed for key, total in counters.sums.items()}
        entry |= {"learning_rate": learning_rate(recipe, counters.iteration - 1), "skipped": counters.skipped}
        if recipe.stage is not Stage.STATIC:
            entry["target"] = recipe.target(counters.iteration - 1)
        self.require_finite()
        if self.evaluates:
            entry |= probe(self.ema, self.probe, self.process)
            self.require_finite(entry["probe_mse"])
        if self.accelerator.is_main_process:
            append_log(self.out, entry)
            track(self.accelerator, entry)
        self.sums, counters.sums, counters.summed = {}, {}, 0
        return entry

    def sample(self) -> None:
        """Write a picture of samples of the EMA weights."""
        self.require_finite()
        if self.evaluates:
            assert self.conditions is not None
            images = sample(self.ema, self.conditions, self.recipe.seed)
            if self.accelerator.is_main_process:
                write_samples(self.out, self.counters.iteration, images, self.recipe.model)

    def save(self) -> None:
        """Write the state of this iteration, which replaces the one before."""
        self.require_finite()
        self.read_sums()
        tensors = state_tensors(self.model, self.ema, self.plain_optimizer, keep=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            save_state(self.out, self.counters, tensors)
        self.accelerator.wait_for_everyone()

    def finish(self) -> TrainResult:
        """Write the EMA weights, the curves and, last, the summary. The last state stays, for a longer run."""
        recipe, counters, out = self.recipe, self.counters, self.out
        if counters.summed:  # a resumed run that was killed between its last state and its last line
            self.log()
        self.require_finite()
        log = read_log(out)
        stored_recipe = json.loads((out / RECIPE).read_text())
        summary = {
            "recipe": stored_recipe,
            "iterations": counters.iteration,
            "skipped": counters.skipped,
            "seconds": round(counters.seconds, 1),
            **({"made_longer_at": counters.made_longer_at} if counters.made_longer_at else {}),
            "processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
            "torch": torch.__version__,
            "last": log[-1] if log else {},
        }
        weights = {name: whole(value) for name, value in self.ema.state_dict().items()}
        if self.accelerator.is_main_process:
            save_checkpoint(out / MODEL, weights, recipe.model, {"recipe": json.dumps(stored_recipe)})
            write_atomic(out / CURVES, curves_png(log, recipe.name, recipe.process.prediction))
            summary["model_sha256"] = sha256_of(out / MODEL)
            write_json(out / SUMMARY, summary)
        self.accelerator.wait_for_everyone()
        return TrainResult(out / MODEL, summary, recipe.made_longer(counters.made_longer_at))
