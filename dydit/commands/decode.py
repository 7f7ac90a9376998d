"""`dydit decode` and `dydit attach-vae`: pictures of latents that were sampled without a decoder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from dydit.commands.options import PATH, CommandGroup, json_option, print_json, progress_line, say
from dydit.commands.vae_options import decoder_line, vae_options
from dydit.extras import GRAPHS, VAES, require

NEEDED = ("torch", *GRAPHS, *VAES, "onnxruntime")


def add_decode(group: CommandGroup) -> None:
    """Add the commands to `dydit`."""
    group.add("decode", "Make pictures of sampled latents.")(decode_command)
    group.add("attach-vae", "Add a decoder to a bundle of latents.")(attach_command)


@click.argument("latents", metavar="LATENTS.npz|RUN_FOLDER", type=PATH)
@vae_options(required=True)
@click.option(
    "--out", type=PATH, required=True, help="Folder for the pictures; the same command goes on with a killed run."
)
@click.option("--npz", is_flag=True, help="Also write samples.npz (arr_0, uint8), which FID evaluators read.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where to run the decoder.")
@click.option(
    "--threads", type=click.IntRange(min=0), default=0, help="CPU threads; 0 leaves the choice to ONNX Runtime."
)
@json_option
def decode_command(
    latents: Path,
    out: Path,
    vae: str,
    npz: bool,
    device: str,
    threads: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Make pictures of latents, as a bundle with this decoder would have.

    LATENTS.npz holds `latents`, [images, channels, side, side] as the sampler returned them, and may hold `labels` and
    `images`, the numbers of the pictures: `dydit sample` leaves such a file, latents.npz, in the folder of a run whose
    bundle has no decoder. Writes numbered PNGs, grid.png and samples.json.
    """
    require("dydit decode", NEEDED)
    from dydit.export.vae_graph import export_decoder, require_source
    from dydit.runtime.backends.base import BackendOptions
    from dydit.runtime.backends.session import runtime
    from dydit.runtime.images.decode import SavedLatents, decode_to_folder

    runtime()  # an onnxruntime that is too old
    saved = SavedLatents.read(latents)
    require_source(vae)
    channels, side = saved.latents.shape[1:3]
    with tempfile.TemporaryDirectory(prefix="dydit-decoder-") as folder:
        made = Path(folder)
        entry = export_decoder(vae, made, channels, side, _decoding(options), f"{saved.path} has")
        with progress_line("pictures") as progress:
            settings = BackendOptions(threads=threads, device=device)
            done = decode_to_folder(saved, made, entry, out, npz, settings, progress)
    if as_json:
        print_json({**vars(done), "out": str(done.out), "vae": entry.model_dump(mode="json")})
        return
    took = "were there already" if done.finished_before else f"in {done.seconds:.3g} s"
    pictures = f"{done.images} picture{'' if done.images == 1 else 's'} of {done.side}x{done.side} pixels"
    say(f"{out}: {pictures} {took}; look at {', '.join(done.files)}", decoder_line(entry))


@click.argument("bundle", type=PATH)
@vae_options(required=True)
@json_option
def attach_command(bundle: Path, vae: str, as_json: bool, **options: Any) -> None:
    """Add a decoder to a bundle that samples latents, so that its samples are pictures.

    The checkpoint is not needed, and engines that were built stay. The bundle is as it was until the decoder is
    complete. Runs that it sampled before hold latents: `dydit decode` makes pictures of them.
    """
    require("dydit attach-vae", NEEDED)
    from dydit.bundle.bundle import Bundle
    from dydit.export.attach import attach_vae
    from dydit.export.vae_graph import require_source

    Bundle.open(bundle, verify=False)  # what is no bundle says so before the autoencoder is read
    require_source(vae)
    done = attach_vae(bundle, vae, _decoding(options))
    entry = done.manifest.vae
    assert entry is not None
    if as_json:
        print_json({"bundle": str(bundle), "vae": entry.model_dump(mode="json")})
        return
    built = "; `dydit build` again makes its engine, too" if (bundle / "engines").is_dir() else ""
    say(f"{bundle}: samples are pictures now{built}", decoder_line(entry))


def _decoding(options: dict[str, Any]) -> Any:
    from dydit.export.vae_graph import VaeOptions
    from dydit.models.config import parse_config

    return parse_config(VaeOptions, {name.removeprefix("vae_"): value for name, value in options.items()})
