"""`dydit evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dydit.commands.group import Command
from dydit.commands.options import PATH, device_option, json_option, parse_options
from dydit.commands.output import print_json, say, warn
from dydit.commands.progress import show_progress
from dydit.errors import ConfigError
from dydit.extras import CLASSIFIERS, INCEPTION, require
from dydit.files import new_file, require_absent
from dydit.reports.text import aligned
from dydit.words import counted

if TYPE_CHECKING:
    from dydit.evaluation.evaluate import Evaluation
    from dydit.evaluation.known_set import SmallSetEvaluation

METRICS = ("fid", "sfid", "is", "precision", "recall")


def _parse_metrics(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = tuple(name.strip() for name in value.split(","))
    if unknown := [name for name in names if name not in METRICS]:
        raise click.BadParameter(f"{unknown[0]!r} is not a metric; known: {', '.join(METRICS)}")
    return names


@click.command(cls=Command)
@click.argument("samples", metavar="SAMPLES.npz|FOLDER", type=PATH)
@click.option(
    "--reference",
    metavar="REFERENCE.npz|FOLDER|DATA",
    help="What to compare with: a reference of the ADM evaluator (VIRTUAL_imagenet256_labeled.npz), images like "
    "SAMPLES, or the name of a small data set (digits, emoji).",
)
@click.option(
    "--inception",
    type=PATH,
    metavar="WEIGHTS.pth",
    help="The weights of Inception: weights-inception-2015-12-05-6726825d.pth from the releases of the project "
    "torch-fidelity. Nothing is downloaded. Not needed for a small data set.",
)
@click.option(
    "--metrics",
    callback=_parse_metrics,
    help="Some of fid,sfid,is,precision,recall.  [default: all of them; only is, where there is no reference]",
)
@click.option("--out", type=PATH, metavar="REPORT.json", help="Write the figures to this file. Must not exist.")
@click.option(
    "--write-reference",
    type=PATH,
    metavar="REFERENCE.npz",
    help="Write SAMPLES as a reference in the ADM evaluator's format: the statistics of their features, and up to "
    "10,000 of the images.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, help="Number of images per batch.")
@device_option
@click.option(
    "--allow-few",
    is_flag=True,
    help="Also compute FID and sFID of fewer than 2,049 images. Such a figure can only be compared with those of "
    "equally many images.",
)
@click.option(
    "--classifier",
    type=PATH,
    metavar="FILE.safetensors",
    help="Keep the classifier of a small data set in this file, and use it again.",
)
@json_option
def command(
    samples: Path,
    reference: str | None,
    out: Path | None,
    write_reference: Path | None,
    classifier: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure the quality of sampled images: FID, sFID, Inception Score, precision and recall.

    SAMPLES.npz contains the images as arr_0, uint8 [images, height, width, 3]; `dydit sample --npz` writes it as
    samples.npz. FOLDER contains PNG files of one size. The definitions are those of the ADM evaluator.

    With the name of a small data set as reference, the measures are the share of images that a classifier recognizes as
    the requested class, and the Fréchet distance of features that need no Inception.
    """
    for path in (out, write_reference):
        if path is not None:
            require_absent(path)
    result: Evaluation | SmallSetEvaluation
    if _is_data(reference):
        result = _small_set(samples, str(reference), classifier, write_reference, settings)
    else:
        result = _inception(samples, reference, classifier, write_reference, settings)
    if as_json:  # before the file, so that a full disk does not cost the figures
        print_json(result.to_json())
    elif result.metrics:
        say(aligned([[name, f"{value:.4f}"] for name, value in result.metrics.items()]))
    if out is not None:
        with new_file(out) as file:
            file.write((json.dumps(result.to_json(), indent=2, allow_nan=False) + "\n").encode())
    if as_json:
        return
    written = " and ".join(str(path) for path in (out, write_reference) if path is not None)
    say(f"{samples}: {counted(result.samples['images'], 'image')}{f'; wrote {written}' if written else ''}")


def _is_data(reference: str | None) -> bool:
    """Whether a reference is the name of data. A file or folder of that name comes first."""
    if reference is None or Path(reference).exists():
        return False
    from dydit.data.opened import SMALL_SETS

    return reference in SMALL_SETS


def _inception(
    samples: Path,
    reference: str | None,
    classifier: Path | None,
    write_reference: Path | None,
    settings: dict[str, Any],
) -> Evaluation:
    if classifier is not None:
        raise click.UsageError("--classifier needs the name of a small data set as --reference")
    require("dydit evaluate", INCEPTION)
    from dydit.evaluation.evaluate import EvaluateConfig, evaluate, missing_weights

    if settings["inception"] is None:
        raise missing_weights()
    config = parse_options(EvaluateConfig, settings)
    against = None if reference is None else Path(PATH.convert(reference, None, None))
    with show_progress("evaluate") as progress:
        result = evaluate(samples, against, config, progress, write_reference)
    for note in result.notes:
        warn(note)
    return result


def _small_set(
    samples: Path, name: str, classifier: Path | None, write_reference: Path | None, settings: dict[str, Any]
) -> SmallSetEvaluation:
    if write_reference is not None or settings["metrics"] is not None or settings["inception"] is not None:
        raise ConfigError(f"{name} is measured without Inception; leave out --inception, --metrics, --write-reference")
    require("dydit evaluate", CLASSIFIERS)
    from dydit.evaluation.known_set import evaluate_small_set

    return evaluate_small_set(samples, name, classifier)
