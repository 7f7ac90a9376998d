"""`dydit decode`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from dydit.commands.group import Command
from dydit.commands.options import PATH, device_option, json_option, npz_option, threads_option
from dydit.commands.output import print_json, say
from dydit.commands.progress import show_progress
from dydit.commands.vae_options import decoder_line, parse_vae_options, vae_options
from dydit.extras import GRAPHS, VAES, require
from dydit.words import counted, duration


@click.command(cls=Command)
@click.argument("latents", metavar="LATENTS.npz|RUN_FOLDER", type=PATH)
@vae_options(required=True)
@click.option(
    "--out",
    type=PATH,
    required=True,
    help="Folder for the images. Run the same command again to resume an interrupted run.",
)
@npz_option
@device_option
@threads_option
@json_option
def command(
    latents: Path, out: Path, vae: str, npz: bool, device: str, threads: int, as_json: bool, **scaling: Any
) -> None:
    """Decode sampled latents into images, the same images that a bundle with this decoder would give.

    LATENTS.npz contains the array `latents` of shape [images, channels, height, width], and optionally the arrays
    `labels` (the class of each image) and `images` (the index of each image). `dydit sample` writes such a file,
    latents.npz, for a bundle without a decoder; RUN_FOLDER is the folder that contains it. Writes numbered PNG files,
    grid.png and samples.json.
    """
    require("dydit decode", ("torch", *GRAPHS, *VAES, "onnxruntime"))
    from dydit.export.vae_graph import export_decoder
    from dydit.export.vae_model import require_source
    from dydit.runtime.backends.base import BackendOptions
    from dydit.runtime.backends.session import runtime
    from dydit.runtime.images.decode import SavedLatents, decode_to_folder

    runtime()  # refuses an onnxruntime that is too old, before the VAE is read
    saved = SavedLatents.read(latents)
    require_source(vae)
    channels, side = saved.latents.shape[1:3]
    with tempfile.TemporaryDirectory(prefix="dydit-decoder-") as name, show_progress("images") as progress:
        folder = Path(name)
        entry = export_decoder(vae, folder, channels, side, parse_vae_options(scaling), f"{saved.path} has")
        options = BackendOptions(threads=threads, device=device)
        done = decode_to_folder(saved, folder, entry, out, npz, options, progress)
    if as_json:
        print_json({**vars(done), "out": str(done.out), "vae": entry.model_dump(mode="json")})
        return
    took = "already complete" if done.finished_before else f"in {duration(done.seconds)}"
    images = f"{counted(done.images, 'image')} of {done.side}x{done.side} pixels"
    say(f"{out}: {images} {took}; look at {', '.join(done.files)}", decoder_line(entry))
