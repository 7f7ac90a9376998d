"""`dydit prepare`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dydit.commands.group import Command
from dydit.commands.options import PATH, device_option, option_names
from dydit.commands.output import say
from dydit.commands.progress import show_progress
from dydit.commands.suggestions import after_prepare
from dydit.extras import require
from dydit.words import counted

if TYPE_CHECKING:
    from dydit.data.dataset_folder import DatasetInfo
    from dydit.data.prepare import Prepared

SHOWN = 5
"""Images that are named of those that were skipped."""
KINDS = ("built-in", "folder", "huggingface", "cifar10", "coco", "npz")
NUMBER = click.IntRange(min=1)

EXAMPLES = """\b
Examples:
  dydit prepare photos/ --size 64 --out data                    # photos/CLASS/*.jpg, pixels
  dydit prepare imagenet/train --size 256 --vae stabilityai/sd-vae-ft-ema --out data
  dydit prepare coco/ --split train2017 --size 256 --vae VAE --text-encoder T5 --out data
  dydit prepare uoft-cs/cifar10 --split train --out data --size 32
  dydit prepare --check data
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("source")
@click.option("--out", type=PATH, help="Folder for the data. An unfinished one is continued.")
@click.option(
    "--kind",
    type=click.Choice(KINDS),
    help="What SOURCE is.  [default: recognised from its name and what lies there]",
)
@click.option("--split", metavar="NAME", help="Part of the source, where it has several, such as train.")
@click.option("--image-column", metavar="NAME", help="Column of images in a Hugging Face data set.")
@click.option("--label-column", metavar="NAME", help="Column of class labels in a Hugging Face data set.")
@click.option("--caption-column", metavar="NAME", help="Column of captions in a data set, or in metadata.jsonl.")
@click.option("--limit", type=NUMBER, metavar="N", help="Take the first N images only.")
@click.option(
    "--size",
    type=NUMBER,
    metavar="PIXELS",
    help="Side of the square that each image becomes.  [default: that of the images, if all have the same]",
)
@click.option(
    "--channels",
    type=click.Choice(["1", "3"]),
    help="1: grey; 3: RGB. What is transparent becomes white.  [default: that of arrays; otherwise 3]",
)
@click.option(
    "--crop",
    type=click.Choice(["center", "resize"]),
    default="center",
    help="center: scale the short side to --size and cut the middle out, as ADM and DiT do; resize: scale both sides.",
)
@click.option(
    "--mirror/--no-mirror",
    default=None,
    help="Mirror half of the images at random when they are read in training. Latents of both forms are then stored, "
    "which doubles the time and the size.  [default: --mirror, but for digits, and for flags and symbols of emoji]",
)
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    help="What to do about an image that cannot be read. Skipped ones are listed in dataset.json.",
)
@click.option(
    "--vae",
    metavar="SOURCE",
    help="Store latents: the moments that this autoencoder (diffusers' AutoencoderKL) encodes. SOURCE is as for "
    "`dydit export --vae`.  [default: store pixels]",
)
@click.option(
    "--vae-scale",
    type=click.FloatRange(min=0, min_open=True),
    metavar="NUMBER",
    help="Scaling factor of the latents.  [default: what the autoencoder states]",
)
@click.option(
    "--vae-shift",
    type=float,
    metavar="NUMBER",
    help="Shift of the latents.  [default: what the autoencoder states, otherwise 0]",
)
@click.option(
    "--text-encoder",
    metavar="SOURCE",
    help="Encode captions with this text encoder (T5, CLIP, BERT or another one of transformers): a folder with it and "
    "its tokenizer, the folder of a diffusers pipeline, or a name on the Hugging Face hub.",
)
@click.option("--text-tokens", type=NUMBER, default=120, metavar="N", help="Longest caption; longer ones are cut.")
@click.option(
    "--shard-size",
    type=NUMBER,
    metavar="N",
    help="Images in a file.  [default: 10,000, fewer of large images, 1,000 with captions]",
)
@click.option("--batch-size", type=NUMBER, default=32, metavar="N", help="Images or captions encoded at once.")
@click.option("--workers", type=NUMBER, metavar="N", help="Processes that decode images.  [default: one a CPU]")
@device_option
@click.option("--check", is_flag=True, help="Compare every file of the prepared folder SOURCE with its hash.")
def command(source: str, out: Path | None, check: bool, workers: int | None, **settings: Any) -> None:
    """Turn images into training data: a folder for `dydit train`.

    SOURCE is a folder of images, whose sub-folders are classes; a data set of Hugging Face (saved to a folder, a folder
    of parquet files, or a name on the hub); COCO with its captions; CIFAR-10's binary files; an .npz file with arr_0
    [n, H, W, C] and labels in arr_1; or digits or emoji, which come with dydit.

    An interrupted run is continued by the same command, and ends with the same bytes.
    """
    if check:
        _check(Path(os.path.expanduser(source)))
        return
    if out is None:
        raise click.UsageError("dydit prepare needs --out", click.get_current_context())
    require("dydit prepare", ("safetensors",))
    from dydit.data.prepare import prepare
    from dydit.data.prepare_settings import PrepareSettings
    from dydit.models.config import parse_config
    from dydit.runtime.backends.cores import available_cores

    settings["channels"] = None if settings["channels"] is None else int(settings["channels"])
    with option_names():
        parsed = parse_config(PrepareSettings, {"source": source, **settings})
    with show_progress("prepare") as progress:
        prepared = prepare(parsed, out, workers or available_cores(), progress)
    say(*_lines(prepared, out), *after_prepare(prepared.info, out))


def _lines(prepared: Prepared, out: Path) -> list[str]:
    info = prepared.info
    lines = [f"{out}{' was complete already' if prepared.before else ''}: {_summary(info)}"]
    if prepared.cut:
        assert info.captions is not None
        lines.append(f"{counted(prepared.cut, 'caption')} of more than {info.captions.tokens} tokens lost the end")
    if prepared.captions_left:
        lines.append(
            "The captions of the source were not encoded: give --text-encoder for a model that texts condition"
        )
    if info.skipped:
        lines.append(f"Skipped {counted(len(info.skipped), 'image')}:")
        lines += [f"  {name}: {reason}" for name, reason in info.skipped[:SHOWN]]
        lines += ["  ... (dataset.json lists all)"] if len(info.skipped) > SHOWN else []
    return lines


def _summary(info: DatasetInfo) -> str:
    what = "image" if info.autoencoder is None else "latent"
    shape = "x".join(map(str, info.shape))
    classes = counted(info.classes, "class", "classes")
    captions = "" if info.captions is None else f", with captions of up to {info.captions.tokens} tokens"
    return f"{counted(info.images, what)} of {shape} in {classes}{captions}, in {counted(len(info.shards), 'shard')}"


def _check(folder: Path) -> None:
    require("dydit prepare", ("safetensors",))
    from dydit.data.dataset_folder import check_files, read_info
    from dydit.data.prepared import PreparedData

    info = read_info(folder)
    with show_progress("check") as progress:
        check_files(folder, info, progress)
    PreparedData(folder)
    say(f"{folder} is as it was written: {_summary(info)}")
