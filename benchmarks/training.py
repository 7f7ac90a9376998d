"""Steps of training beside a plain loop in PyTorch on the same model: images per second and peak memory.

    python benchmarks/training.py [--json training.json] [--contenders plain,static,dynamic]

Each contender trains in a process of its own, on the emoji (RGB, 32x32 pixels), and they take turns: a round is --steps
iterations of one after the other. The first round, which compiles, is not counted. A time is the median over rounds.
Peak memory is that of the process, or what PyTorch allocated on a GPU.

Contenders: `plain`, a loop of DiT's kind (MSE on the noise, AdamW, EMA) on one batch that stays; `static`, what dydit
train does for a static model, and `dynamic` for a dynamic one with its FLOPs and token losses. `plain`, `static` and
`dynamic` may be followed by `-bf16`, `-compile`, and but for `plain` by `-checkpointing`, in any number.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dydit.bench.scripts import finish, progress, random_checkpoint, script_parser, settings_of, static_checkpoint
from dydit.bench.timing import peak_bytes
from dydit.data.small_sets import Emoji
from dydit.models.config import Routers
from dydit.models.dit.config import preset
from dydit.models.registry import architecture_of
from dydit.training.draws import BatchSource
from dydit.training.objective import Inputs
from dydit.training.recipe import Recipe
from dydit.training.trainer import train

EMA_DECAY, LEARNING_RATE = 0.9999, 1e-4
CONTENDERS = (
    "plain,plain-bf16,plain-compile,static,static-bf16,static-compile,static-checkpointing,dynamic,dynamic-compile"
)
Report = Callable[[int], None]
"""Called after each iteration with how many are done."""


def recipe_of(kind: str, flags: list[str], settings: dict[str, Any]) -> Recipe:
    """The run of a contender."""
    model = preset(settings["preset"], input_size=32, in_channels=3, num_classes=Emoji().classes)
    values: dict[str, Any] = {
        "name": kind,
        "stage": "dynamic" if kind == "dynamic" else "static",
        "model": model if kind == "dynamic" else model.model_copy(update={"routers": Routers.NONE}),
        "data": "emoji",
        "init": settings["dynamic" if kind == "dynamic" else "static"],
        "iterations": settings["steps"] * (settings["repeats"] + 1) + 1,  # the last one, which saves, is not reached
        "batch_size": settings["batch"],
        "learning_rate": LEARNING_RATE,
        "ema_decay": EMA_DECAY,
        "precision": "bf16" if "bf16" in flags else "fp32",
        "compile": "compile" in flags,
        "checkpointing": "checkpointing" in flags,
        "log_every": 10**9,
        "save_every": 10**9,
    }
    return Recipe.model_validate(values | ({"token_weight": 1.0, "token_spread": 0.1} if kind == "dynamic" else {}))


def plain_loop(recipe: Recipe, report: Report) -> None:
    """Train as a short script would: one batch that stays on the device."""
    from dydit.checkpoints.checkpoint import load_checkpoint

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert recipe.init is not None
    model = architecture_of(recipe.model).masked(recipe.model)
    model.load_state_dict(load_checkpoint(Path(recipe.init)).state)
    model.train().to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    forward = torch.compile(model) if recipe.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    source = BatchSource(Emoji(), 0, recipe.batch_size, 0.1, recipe.model.classes.count, recipe.process)
    batch = Inputs.of(source.batch(0), device)
    remaining = torch.from_numpy(recipe.process.alphas_cumprod(np.arange(1000))).float().to(device)
    for iteration in range(recipe.iterations):
        t, noise = torch.randint(1000, batch.t.shape, device=device), torch.randn_like(batch.x0)
        share = remaining[t][:, None, None, None]
        x_t = share.sqrt() * batch.x0 + (1 - share).sqrt() * noise
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            output = forward(x_t, t, batch.y)
        loss = (output[:, :3].float() - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for average, value in zip(ema.parameters(), model.parameters(), strict=True):
                average.lerp_(value, 1 - EMA_DECAY)
        report(iteration + 1)


def work(connection: Connection, name: str, settings: dict[str, Any], out: Path) -> None:
    """Train a contender in this process. Each round waits for a message, and answers with seconds and peak bytes."""
    torch.set_num_threads(settings["threads"] or os.cpu_count() or 1)
    kind, *flags = name.split("-")
    connection.recv()
    start = time.perf_counter()

    def report(done: int) -> None:
        nonlocal start
        if done % settings["steps"]:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes()
        connection.send((seconds, peak))
        connection.recv()
        start = time.perf_counter()

    recipe = recipe_of(kind, flags, settings)
    if kind == "plain":
        plain_loop(recipe, report)
    else:
        train(recipe, out, progress=lambda done, total, entry: report(done))


def measure(names: list[str], settings: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Seconds of every counted round of every contender, and its peak memory."""
    context = multiprocessing.get_context("spawn")
    pipes, workers = {}, []
    for name in names:
        pipes[name], theirs = context.Pipe()
        workers.append(context.Process(target=work, args=(theirs, name, settings, folder / name), daemon=True))
        workers[-1].start()
        theirs.close()  # so that a worker that ended is noticed
    rounds: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    show, total = progress("rounds"), len(names) * (settings["repeats"] + 1)
    for number in range(settings["repeats"] + 1):
        for index, name in enumerate(names):
            pipes[name].send("go")
            rounds[name].append(pipes[name].recv())
            show(number * len(names) + index + 1, total)
    for worker in workers:
        worker.kill()
        worker.join()
    return {
        name: {"seconds": [seconds for seconds, _ in each[1:]], "peak_bytes": each[-1][1]}
        for name, each in rounds.items()
    }


def main() -> int:
    """Run, and print a table."""
    parser = script_parser(
        __doc__,
        {"steps": "iterations of a round", "contenders": "what to measure, with commas between them"},
        preset="S/2",
        batch=4,
        steps=2,
        repeats=5,
        threads=0,
        contenders=CONTENDERS,
    )
    options = parser.parse_args()
    names = options.contenders.split(",")
    with tempfile.TemporaryDirectory() as work_in:
        folder = Path(work_in)
        config = recipe_of("plain", [], {**vars(options), "static": None, "dynamic": None}).model
        dynamic = random_checkpoint(
            folder / "dynamic.safetensors", config.model_copy(update={"routers": Routers.FIRST_ON})
        )
        static = static_checkpoint(folder / "static.safetensors", dynamic)
        starts = {"static": str(static.path), "dynamic": str(dynamic.path)}
        figures = measure(names, {**vars(options), **starts}, folder)
    images = options.batch * options.steps
    base = np.array(figures["plain"]["seconds"]) if "plain" in figures else None
    print(f"{'contender':24} {'images/s':>9} {'of plain':>9} {'peak MB':>9}")
    for name, each in figures.items():
        seconds = np.array(each["seconds"])
        each["images_per_second"] = images / float(np.median(seconds))
        each["speed_of_plain"] = None if base is None else float(np.median(base / seconds))
        share = "-" if each["speed_of_plain"] is None else f"{each['speed_of_plain']:.2f}"
        print(f"{name:24} {each['images_per_second']:9.3g} {share:>9} {each['peak_bytes'] / 1e6:9.0f}")
    return finish(options, {"settings": settings_of(options), "torch": torch.__version__, "contenders": figures}, {})


if __name__ == "__main__":
    sys.exit(main())
