"""Options that several commands share, and how their values are parsed."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import BaseModel

from dydit.bundle.manifest import PlanKind
from dydit.commands.output import warn
from dydit.diffusion.process import TRAIN_STEPS, NoiseSchedule, Prediction
from dydit.diffusion.samplers import DEFAULT_STEPS, Sampler, SamplerChoice, Spacing
from dydit.errors import BackendError, ConfigError
from dydit.files import user_path
from dydit.models.config import Space, parse_config
from dydit.runtime.backends.registry import ALL_DEVICES, DEVICES, require_known
from dydit.validation import SettingsError

T = TypeVar("T", bound=BaseModel)
Command = Callable[..., Any]
"""The function of a command."""
DEFAULT_BACKEND = "onnxruntime"
AUTO = "auto"
"""In place of a backend's name: the fastest one is chosen."""
BYTE_UNITS = {
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("kMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}
_UNITS_BY_LOWER_CASE = {unit.lower(): size for unit, size in BYTE_UNITS.items()}


# Values


def parse_bytes(text: str) -> int:
    """A size in bytes, written with its unit: `8GiB`, `500MB`, `64kB`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text, re.ASCII | re.IGNORECASE)
    if not match or match[2].lower() not in _UNITS_BY_LOWER_CASE:
        raise click.BadParameter(
            f"{text!r} is not a size; write a number and a unit ({', '.join(BYTE_UNITS)}), for example 8GiB"
        )
    size = int(Fraction(match[1]) * _UNITS_BY_LOWER_CASE[match[2].lower()])
    if size < 1:
        raise click.BadParameter(f"{text!r} is less than one byte")
    return size


def parse_betas(text: str) -> tuple[float, float]:
    """The first and the last beta, written as `0.0001,0.02`."""
    numbers = text.split(",")
    try:
        first, last = map(float, numbers)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not two numbers; write START,END, for example 0.0001,0.02") from error
    return first, last


class PathType(click.Path):
    """A path. A leading `~` is expanded here as well, because shells leave `--out=~/x` as it is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return user_path(Path(os.fsdecode(super().convert(value, param, ctx))))


PATH = PathType(path_type=Path)


@contextmanager
def option_names() -> Iterator[None]:
    """In errors about settings that are raised in this block, replace the names of fields by those of options."""
    try:
        yield
    except SettingsError as error:
        parameters = click.get_current_context().command.params
        options = {
            str(each.name): max(each.opts, key=len)
            for each in parameters
            if isinstance(each, click.Option) and not each.hidden
        }
        texts = (problem.text(_option_of(problem.path, options)) for problem in error.problems)
        # Errors about several settings name fields in the middle of a sentence.
        fields = re.compile(rf"\b({'|'.join(sorted(filter(lambda name: '_' in name, options))) or '(?!)'})\b")
        raise ConfigError("; ".join(fields.sub(lambda match: options[match[0]], text) for text in texts)) from error


def _option_of(path: tuple[str | int, ...], options: Mapping[str, str]) -> str | None:
    """The option for a field: `search.target.psnr` is set by `--target-psnr`, `capacity.tile` by `--tile`."""
    names = [part for part in path if isinstance(part, str)]
    return next((options[key] for at in range(len(names)) if (key := "_".join(names[at:])) in options), None)


def parse_options(kind: type[T], values: dict[str, Any]) -> T:
    """A configuration from the values of a command's options. Errors name the options."""
    with option_names():
        return parse_config(kind, values)


def all_of(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order of the help."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


# Options of most commands

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else.")

seed_option = click.option("--seed", type=int, default=0, help="Seed for the initial and per-step noise.")


def cfg_scale_option(default: float | None = None) -> Callable[[Command], Command]:
    """`--cfg-scale`, by default that of the model (`ModelConfig.guidance_scale`), or the command's own."""
    shown = "  [default: 4; 1 for an unconditional model]" if default is None else ""
    return click.option(
        "--cfg-scale",
        type=float,
        default=default,
        help="Classifier-free guidance scale, at least 0. 1 disables guidance and halves the compute. The paper of "
        f"U-ViT counts from 0: its 0.4 is 1.4 here.{shown}",
    )


def renamed(old: str, new: str) -> Callable[[Command], Command]:
    """`old`, the name that the flag `new` had in the release before: it works, is hidden, and prints a warning."""
    old_name, new_name = (option.removeprefix("--").replace("-", "_") for option in (old, new))

    def decorate(command: Command) -> Command:
        @click.option(old, is_flag=True, hidden=True, help=f"The old name of {new}.")
        @functools.wraps(command)
        def with_old_name(**settings: Any) -> Any:
            if settings.pop(old_name):
                warn(f"{old} is now called {new}; the old name will be removed in the next release")
                settings[new_name] = True
            return command(**settings)

        return with_old_name

    return decorate


# Options about checkpoints

space_option = click.option(
    "--space",
    type=click.Choice([each.value for each in Space]),
    help="What the model generates: pixels (grey or RGB), or latents of an autoencoder. The weights do not say which.  "
    "[default: what the checkpoint states; otherwise pixels if the model has 1 or 3 channels and no VAE is given, else "
    "latents]",
)

TRAINING = ("prediction", "schedule", "betas")
READING = ("num_heads", "weights", "num_classes", "input_size", *TRAINING)


def checkpoint_options(command: Command) -> Command:
    """How to read a checkpoint that leaves something open; the command gets it as `reading`, for `load_checkpoint`."""

    @functools.wraps(command)
    def with_reading(**settings: Any) -> Any:
        return command(reading={name: settings.pop(name) for name in READING}, **settings)

    count = click.IntRange(min=1)
    options = all_of(
        click.option(
            "--num-heads",
            type=count,
            help="Number of attention heads. Needed only if the checkpoint does not contain it.",
        ),
        click.option(
            "--weights",
            metavar="ema|model|NAME",
            help="Which weights to read from a file that has several: ema, model, or the name of an entry or a "
            "variant.  [default: ema if the file has it]",
        ),
        click.option(
            "--num-classes",
            type=count,
            help="Number of classes, without the null class that guidance uses. Needed only if the checkpoint does not "
            "contain this number.",
        ),
        click.option(
            "--input-size",
            type=count,
            help="Height and width of the latents or, for a model of pixels, of the images. Needed only if the "
            "checkpoint does not contain this size.",
        ),
        click.option(
            "--prediction",
            type=click.Choice([each.value for each in Prediction]),
            help="What the model was trained to predict: epsilon (the noise), x0 (the image), v (a combination of the "
            "two, as in v-prediction), or velocity (image - noise, of flow matching). Needed only if the checkpoint "
            "does not state it.  [default: what the checkpoint states, otherwise epsilon; with --schedule flow, "
            "velocity]",
        ),
        click.option(
            "--schedule",
            type=click.Choice([each.value for each in NoiseSchedule]),
            help="How noise was added in training: over 1000 steps of linear, scaled-linear or cosine betas; in "
            "continuous time (vp-sde); or by flow matching on the linear path (flow), whose time is 0 for noise and 1 "
            "for the image, as in SiT. Needed only if the checkpoint does not state it.  [default: what the checkpoint "
            "states, otherwise that of the published models: linear for a DiT, vp-sde for a U-ViT, scaled-linear for "
            "its H sizes; with --prediction velocity, flow]",
        ),
        click.option(
            "--betas",
            type=parse_betas,
            metavar="START,END",
            help="First and last beta of the schedule. Needed only if the checkpoint does not state them.  [default: "
            "what the checkpoint states, otherwise 0.0001,0.02 for linear, 0.00085,0.012 for scaled-linear, 0.1,20 for "
            "vp-sde]",
        ),
    )
    return options(with_reading)


# Options about the plan of an export


def sampling_options(command: Command) -> Command:
    """The options of a run of a bundle that exists. The command gets them as `sampling`, a `SamplerChoice`."""

    @functools.wraps(command)
    def with_sampling(
        steps: int | None, sampler: str | None, spacing: str | None, eta: float | None, **rest: Any
    ) -> Any:
        chosen = {"steps": steps, "sampler": sampler, "spacing": spacing, "eta": eta}
        return command(sampling=parse_options(SamplerChoice, chosen), **rest)

    return sampler_options(as_exported=True)(with_sampling)


def sampler_options(as_exported: bool) -> Callable[[Command], Command]:
    """`--steps`, `--sampler`, `--timestep-spacing` and `--eta`. `as_exported`: whether a bundle has the defaults."""
    shown = "  [default: as exported]" if as_exported else ""
    return all_of(
        click.option(
            "--steps",
            type=click.IntRange(1, TRAIN_STEPS),
            help=f"Number of sampling steps.{shown or f'  [default: {DEFAULT_STEPS}; for PixArt, 20]'}",
        ),
        click.option(
            "--sampler",
            type=click.Choice([each.value for each in Sampler]),
            help="ddpm: ancestral sampling, with new noise in every step. ddim: deterministic, unless --eta is given. "
            "dpm-solver++: second order, for 10 to 50 steps. euler: for flow-matching models, deterministic. "
            "euler-maruyama: with new noise in every step, for flow matching and continuous time."
            + (shown or "  [default: ddpm; in continuous time, euler-maruyama; for PixArt, dpm-solver++]"),
        ),
        click.option(
            "--timestep-spacing",
            "spacing",
            type=click.Choice([each.value for each in Spacing]),
            help="Which of the training timesteps are visited, as diffusers computes them."
            + (shown or "  [default: linspace; for a flow, trailing]"),
        ),
        click.option(
            "--eta",
            type=click.FloatRange(0, 1),
            default=None if as_exported else 0.0,
            help="With --sampler ddim: amount of new noise, from 0 (none) to 1 (as much as ddpm)." + shown,
        ),
    )


def plan_options(command: Command) -> Command:
    """`--per-step`, `--max-subnets`, `--memory-budget` and `--dynamic-width`, of which one may be given.

    The command gets them as `plan`: settings of an export, empty where none is given.
    """

    @functools.wraps(command)
    def with_plan(
        per_step: bool, max_subnets: int | None, memory_budget: int | None, dynamic_width: bool, **settings: Any
    ) -> Any:
        if per_step + (max_subnets is not None) + (memory_budget is not None) + dynamic_width > 1:
            raise click.UsageError("give only one of --per-step, --max-subnets, --memory-budget and --dynamic-width")
        plan: dict[str, Any] = {}
        if dynamic_width:
            plan = {"plan": PlanKind.DYNAMIC_WIDTH}
        elif per_step:
            plan = {"plan": PlanKind.PER_STEP}
        elif memory_budget is not None:
            plan = {"plan": PlanKind.MEMORY_BUDGET, "memory_budget": memory_budget}
        elif max_subnets is not None:
            plan = {"plan": PlanKind.MAX_SUBNETS, "max_subnets": max_subnets}
        return command(plan=plan, **settings)

    options = all_of(
        click.option(
            "--per-step",
            is_flag=True,
            help="Use one subnetwork for each distinct mask: the lowest compute, the most subnetworks to load.",
        ),
        click.option(
            "--max-subnets",
            type=click.IntRange(min=1),
            metavar="K",
            help="Use at most K subnetworks. Consecutive steps share one, chosen so that the total compute is lowest. "
            "The images are the same as with --per-step.",
        ),
        click.option(
            "--memory-budget",
            type=parse_bytes,
            metavar="SIZE",
            help="Use the fastest plan whose subnetworks together fit in SIZE of memory, for example 8GiB or 500MB. "
            "Memory is measured with ONNX Runtime on this CPU; if that is not possible, the size of the weights is "
            "used instead.",
        ),
        click.option(
            "--dynamic-width",
            is_flag=True,
            help="Use one graph of dynamic width: each step runs exactly the heads and channel groups that it needs, "
            "and there is one copy of the weights in memory.",
        ),
        renamed("--sliding", "--dynamic-width"),
    )
    return options(with_plan)


# Options about running a bundle


def _known_backend(_: click.Context, option: click.Parameter, value: str) -> str:
    if value == option.default:  # with a default that names no backend, the command chooses one
        return value
    try:
        require_known(value)
    except BackendError as error:
        raise click.BadParameter(str(error)) from error
    return value


threads_option = click.option(
    "--threads", type=click.IntRange(min=0), default=0, help="Number of CPU threads. 0: the backend's default."
)
device_option = click.option("--device", type=click.Choice(DEVICES), default="cpu", help="Device to run on.")
npz_option = click.option(
    "--npz", is_flag=True, help="Also write samples.npz (array arr_0, uint8), which tools that compute the FID read."
)


def backend_options(command: Command) -> Command:
    """`--backend`, `--device` and `--threads`, for the commands that run a bundle."""
    return _backend_option(DEFAULT_BACKEND, "[onnxruntime|torch|openvino|tensorrt|tensorrt-rtx]", "")(
        _device_option(threads_option(command))
    )


def chosen_backend_options(command: Command) -> Command:
    """The same, for a command that chooses the backend where its user does not."""
    metavar, text = "[auto|onnxruntime|torch|openvino|tensorrt|tensorrt-rtx]", " auto: the fastest of them."
    return _backend_option(AUTO, metavar, text)(_device_option(threads_option(command)))


def _backend_option(default: str, metavar: str, more: str) -> Callable[[Command], Command]:
    return click.option(
        "--backend",
        default=default,
        callback=_known_backend,
        metavar=metavar,
        help=f"Library that runs the model.{more} `dydit doctor` shows which ones work on this machine. tensorrt and "
        "tensorrt-rtx need a GPU, and engines built by `dydit build`.",
    )


_device_option = click.option(
    "--device",
    type=click.Choice(ALL_DEVICES),
    default="cpu",
    help="Device to run on. cuda: an NVIDIA GPU, for onnxruntime and torch. gpu, npu: those of Intel, for openvino.",
)
