"""`dydit attach-vae`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dydit.commands.group import Command
from dydit.commands.options import PATH, json_option
from dydit.commands.output import print_json, say
from dydit.commands.vae_options import decoder_line, parse_vae_options, vae_options
from dydit.extras import GRAPHS, VAES, require


@click.command(cls=Command)
@click.argument("bundle", type=PATH)
@vae_options(required=True)
@json_option
def command(bundle: Path, vae: str, as_json: bool, **scaling: Any) -> None:
    """Add a VAE decoder to a bundle of a latent model, so that it samples images instead of latents.

    The checkpoint is not needed, and engines that were built remain valid. If the command fails, the bundle is
    unchanged. For latents that were sampled before, use `dydit decode`.
    """
    require("dydit attach-vae", ("torch", *GRAPHS, *VAES, "onnxruntime"))
    from dydit.bundle.bundle import Bundle
    from dydit.export.attach import attach_vae
    from dydit.export.vae_model import require_source

    Bundle.open(bundle, verify=False)  # refuses what is not a bundle, before the VAE is read
    require_source(vae)
    entry = attach_vae(bundle, vae, parse_vae_options(scaling)).manifest.vae
    assert entry is not None
    if as_json:
        print_json({"bundle": str(bundle), "vae": entry.model_dump(mode="json")})
        return
    build = "; run `dydit build` again for the decoder's engine" if (bundle / "engines").is_dir() else ""
    say(f"{bundle}: now samples images{build}", decoder_line(entry))
