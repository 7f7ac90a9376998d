"""Options about the VAE decoder of a latent model, and how its scaling is described."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from dydit.bundle.vae_entry import VaeEntry
from dydit.commands.options import Command, all_of

if TYPE_CHECKING:
    from dydit.export.vae_model import VaeOptions


def _expand_home(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    return None if value is None else os.path.expanduser(value)


def vae_options(*, required: bool) -> Callable[[Command], Command]:
    """`--vae`, how to decode with it, and its scaling where its configuration does not state it."""
    what = "The VAE to decode with" if required else "For a latent model: include the decoder of this VAE in the bundle"
    return all_of(
        click.option(
            "--vae",
            metavar="SOURCE",
            required=required,
            callback=_expand_home,
            help=f"{what}. SOURCE is a folder saved by diffusers, the folder of a diffusers pipeline, a file of "
            "weights, or a name on the Hugging Face hub, which is downloaded.",
        ),
        click.option(
            "--vae-tile",
            type=click.IntRange(min=1),
            metavar="N",
            help="Decode at most N x N latents at a time; larger latents are decoded in overlapping tiles.  [default: "
            "the size of the latents, at most 64]",
        ),
        click.option(
            "--vae-scale",
            type=click.FloatRange(min=0, min_open=True),
            metavar="NUMBER",
            help="Scaling factor: latents are divided by it before they are decoded. Required if the VAE does not "
            "state it, as in a file of weights alone: 0.18215 for Stable Diffusion 1 and 2, 0.13025 for SDXL.  "
            "[default: what the VAE states]",
        ),
        click.option(
            "--vae-shift",
            type=float,
            metavar="NUMBER",
            help="Shift factor: added to the latents after the division by the scaling factor.  [default: what the "
            "VAE states, otherwise 0]",
        ),
    )


def parse_vae_options(options: dict[str, Any]) -> VaeOptions:
    """`--vae-tile`, `--vae-scale` and `--vae-shift` as settings of a decoder."""
    from dydit.export.vae_model import VaeOptions
    from dydit.models.config import parse_config

    return parse_config(VaeOptions, {name.removeprefix("vae_"): value for name, value in options.items()})


def decoder_line(entry: VaeEntry) -> str:
    """A closing line: which decoder makes the images, and how latents are scaled for it."""
    return f"Decoder from {entry.source}: {entry.scaling_words}"
