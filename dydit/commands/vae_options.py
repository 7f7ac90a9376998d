"""Options about pixels, latents and decoders, and what commands say of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

from dydit.bundle.manifest import Manifest
from dydit.bundle.vae_entry import VaeEntry
from dydit.models.config import Space

space_option = click.option(
    "--space",
    type=click.Choice([each.value for each in Space]),
    help="What the model samples: pixels, grey or RGB, or the latents of an autoencoder. The weights do not tell.  "
    "[default: what the checkpoint states; else pixels for 1 and 3 channels without --vae, and latents]",
)


def _expand_home(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    return None if value is None else os.path.expanduser(value)


def vae_options(*, required: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--vae`, how to decode with it, and its scaling where its configuration does not state it."""
    what = "The autoencoder." if required else "For a latent model: put the decoder of this autoencoder in."
    options = (
        click.option(
            "--vae",
            metavar="SOURCE",
            required=required,
            callback=_expand_home,
            help=f"{what} A folder saved by diffusers, a pipeline's folder, a file of weights, or a name on the "
            "Hugging Face hub, which is downloaded.",
        ),
        click.option(
            "--vae-tile",
            type=click.IntRange(min=1),
            metavar="N",
            help="Decode latents of at most N x N at once, larger ones in overlapping tiles.  [default: the latents' "
            "size, at most 64]",
        ),
        click.option(
            "--vae-scale",
            type=click.FloatRange(min=0, min_open=True),
            metavar="NUMBER",
            help="Scaling factor that latents are divided by before they are decoded. Needed where the autoencoder "
            "does not state it, as in a file of weights alone: 0.18215 for Stable Diffusion 1 and 2, 0.13025 for XL.",
        ),
        click.option(
            "--vae-shift",
            type=float,
            metavar="NUMBER",
            help="Shift factor of the latents, added after the scaling.  [default: what the autoencoder states, or 0]",
        ),
    )

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def space_lines(manifest: Manifest) -> list[str]:
    """What an export says of its decoder, or of what it took samples to be; nothing where that is plain."""
    if manifest.vae is not None:
        return [decoder_line(manifest.vae)]
    if manifest.model.space_is_assumed:
        return ["Samples are taken for RGB pixels, as they have 3 channels. If they are latents, add --space latents"]
    return []


def decoder_line(entry: VaeEntry) -> str:
    """Which decoder makes pictures, and how latents are scaled for it."""
    return f"Decoder from {entry.source}: {entry.scaling_words}"
