"""`dydit sample`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dydit.commands.backend_choice import chooser, require_backend
from dydit.commands.encode import cut_lines, encode
from dydit.commands.group import Command
from dydit.commands.label_options import Label, labels_option
from dydit.commands.options import (
    AUTO,
    PATH,
    cfg_scale_option,
    chosen_backend_options,
    json_option,
    npz_option,
    parse_options,
    sampling_options,
)
from dydit.commands.output import print_json, say, warn
from dydit.commands.progress import Progress, show_progress
from dydit.commands.text_options import prompt_options, texts_option
from dydit.diffusion.samplers import SamplerChoice
from dydit.errors import ConfigError
from dydit.runtime.bulk.workers import GPUS, Worker, launched_worker, own_gpu, parse_worker
from dydit.runtime.class_labels import names_of, number_of
from dydit.words import counted, duration

if TYPE_CHECKING:
    from dydit.bundle.texts import Texts
    from dydit.models.config import ModelConfig
    from dydit.runtime.bulk.run import ChooseBackend, SampleSummary


def _parse_worker(_: click.Context, __: click.Parameter, value: str | None) -> Worker:
    if value is not None:
        try:
            return parse_worker(value)
        except ConfigError as error:
            raise click.BadParameter(str(error)) from error
    worker = launched_worker(os.environ)
    if worker.local is not None:
        os.environ[GPUS] = own_gpu(worker.local, os.environ)
    return worker


@click.command(cls=Command)
@click.argument("bundle", type=PATH)
@labels_option(
    names=True,
    help="Classes, one image for each: numbers (207,360 or 0-9), or names (cat,dog) if the model has any. The number "
    "after the last class stands for no class. Repeatable. Not needed if --noise-from contains labels, or the model is "
    "unconditional.",
)
@texts_option("All of them are sampled, unless --labels chooses some by their number.")
@prompt_options(required=False)
@click.option(
    "--out",
    type=PATH,
    required=True,
    help="Folder for the images. Run the same command again to resume an interrupted run.",
)
@click.option(
    "--num",
    type=click.IntRange(min=1),
    help="Total number of images. The labels are repeated in order.  [default: one image per label]",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    help="Seed for the initial and per-step noise. The noise of an image depends only on the seed and on its index.",
)
@click.option(
    "--first-image",
    type=int,
    default=0,
    help="Index of the first image. The index decides the noise and the file name of an image.",
)
@cfg_scale_option()
@sampling_options
@click.option("--batch-size", type=int, help="Number of images per batch.  [default: as many as the bundle allows]")
@chosen_backend_options
@npz_option
@click.option(
    "--noise-from",
    type=PATH,
    metavar="FILE.npz",
    help="Read the starting latents x_T, the noise of the steps, and the class numbers from the arrays x_T, noise and "
    "labels of this file. noise is not needed if the sampler adds none (ddim, dpm-solver++, euler). --seed is not used "
    "then.",
)
@click.option("--latents-out", type=PATH, metavar="FILE.npz", help="Also write the latents to this file.")
@click.option(
    "--worker",
    metavar="I/N",
    callback=_parse_worker,
    help="Sample part I of N, counted from 0. N processes with the same --out and the same options share one run. "
    "Divide the cores between them with --threads, the same number for each.  [default: as set by torchrun or "
    "accelerate launch, otherwise 0/1]",
)
@json_option
def command(
    bundle: Path,
    out: Path,
    backend: str,
    device: str,
    threads: int,
    npz: bool,
    latents_out: Path | None,
    worker: Worker,
    labels: tuple[Label, ...],
    sampling: SamplerChoice,
    texts: Path | None,
    prompt: Sequence[str],
    prompts: Path | None,
    negative_prompt: str,
    text_encoder: str | None,
    as_json: bool,
    **request: Any,
) -> None:
    """Sample images with a bundle. The same settings give the same images, byte for byte.

    With another batch size or another number of threads, the images are the same up to rounding.

    Writes numbered PNG files, grid.png and samples.json. For a latent model without a VAE decoder it writes latents.npz
    instead of images.

    Without --backend, or with --backend auto, a long run begins with a short trial of the backends that work here. It
    takes the fastest, says which, and keeps the result for the next run. Short runs use onnxruntime. The images are the
    same up to rounding. A run that is resumed keeps its backend.

    --steps, --sampler, --timestep-spacing and --eta change the run of a bundle that was exported with --dynamic-width,
    or of a static model. Other bundles are made for their own timesteps.

    To share a run between several processes, start them with torchrun or accelerate launch
    (`torchrun --nproc-per-node 2 -m -- dydit sample ...`), or start each process with its own --worker I/N.
    """
    require_backend("dydit sample", backend)
    from dydit.bundle.bundle import Bundle
    from dydit.planning.resampling import resampled
    from dydit.runtime.backends.base import BackendOptions
    from dydit.runtime.bulk.run import OutputOptions, sample_to_folder
    from dydit.runtime.request import SampleRequest

    # Names of classes are numbers once the bundle is open; everything else is checked before.
    unnamed = tuple(0 if isinstance(each, str) else each for each in labels)
    config = parse_options(SampleRequest, {**request, "labels": unnamed})
    outputs, options = OutputOptions(npz=npz, latents_out=latents_out), BackendOptions(threads=threads, device=device)
    opened = resampled(Bundle.open(bundle), sampling)
    config = config.model_copy(update={"labels": _numbers(labels, opened.manifest.model)})
    given = _texts(opened.manifest.model, texts, prompt, prompts, negative_prompt, text_encoder)
    opened = opened if given is None else opened.with_texts(given)
    with _progress(worker) as (progress, steps, images):
        chosen: str | ChooseBackend = chooser(opened, options, worker, progress) if backend == AUTO else backend
        done = sample_to_folder(
            opened, config, out, outputs, chosen, options, steps, images, worker, announce=progress.note
        )
    if as_json:
        print_json({**vars(done), "out": str(done.out)})
    else:
        _say_sampled(done)


def _numbers(labels: tuple[Label, ...], model: ModelConfig) -> tuple[int, ...]:
    """The labels with numbers in place of names. Raises `ConfigError` for a name that stands for no class."""
    known = names_of(model)
    return tuple(number_of(each, known, "--labels") if isinstance(each, str) else each for each in labels)


def _texts(
    model: ModelConfig,
    file: Path | None,
    prompt: Sequence[str],
    prompts: Path | None,
    negative: str,
    text_encoder: str | None,
) -> Texts | None:
    """The texts of a command line; None if there are none."""
    from dydit.runtime.text_files import read_texts

    if not prompt and prompts is None:
        if text_encoder is not None:
            raise click.UsageError("--text-encoder has no effect without --prompt or --prompts")
        return None if file is None else read_texts(file, model)
    if file is not None:
        raise click.UsageError("--texts cannot be combined with prompts; give one of them")
    if text_encoder is None:
        raise click.UsageError("prompts need --text-encoder FOLDER; or encode them once with dydit encode")
    encoded = encode(model, prompt, prompts, negative, text_encoder)
    for line in cut_lines(encoded):
        warn(line)
    return encoded.texts


@contextmanager
def _progress(worker: Worker) -> Iterator[tuple[Progress, Callable[[int, int], None], Callable[[int, int], None]]]:
    """The progress, its part for steps, and its part for images.

    Where a launcher started several workers on a machine, only the first one shows progress.
    """
    if worker.local:
        silent = Progress()
        yield silent, silent, silent
        return
    suffix = "" if worker.count == 1 else f" (worker {worker})"
    with show_progress(f"sample{suffix}") as progress:
        yield progress, partial(progress.stage, f"sample{suffix}"), partial(progress.stage, f"images{suffix}")


def _say_sampled(done: SampleSummary) -> None:
    took = "already complete" if done.finished_before else f"in {duration(done.seconds + done.picture_seconds)}"
    look = f"; look at {', '.join(done.files)}" if done.finished else ""
    say(f"{done.out}: {counted(done.images, 'image')} {took}{look}")
    if done.repeated_steps:
        say(
            f"{counted(done.repeated_steps, 'step')} of a batch ran again at full capacity, because more tokens were "
            "routed than the bundle has slots for. The images are complete"
        )
    if done.note:
        say(done.note)
