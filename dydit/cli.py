"""The map of the command line: one line for each command, and the entry point `dydit`.

Each command stands in a file of `dydit.commands`, which is imported when the command is asked for. This module itself
imports next to nothing, so that Ctrl-C while the rest is being imported ends in one line, too.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as in `typing`, whose import takes longer than all of this module
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from dydit.commands.group import CommandGroup

# Name of the command: (its module, its line in `dydit --help`).
COMMANDS = {
    "quickstart": ("dydit.commands.quickstart", "Export, sample, check and time the models that come with dydit."),
    "prepare": ("dydit.commands.prepare", "Turn images into training data."),
    "train": ("dydit.commands.train", "Train a model with a recipe."),
    "convert": ("dydit.commands.convert", "Convert a checkpoint to dydit's own format."),
    "encode": ("dydit.commands.encode", "Encode prompts for a model that texts condition."),
    "calibrate": ("dydit.commands.calibrate", "Choose token capacities and activation ranges for an export."),
    "export": ("dydit.commands.export", "Compile a checkpoint into a bundle."),
    "build": ("dydit.commands.build", "Build the TensorRT engines of a bundle."),
    "sample": ("dydit.commands.sample", "Sample images with a bundle."),
    "decode": ("dydit.commands.decode", "Decode sampled latents into images."),
    "attach-vae": ("dydit.commands.attach_vae", "Add a VAE decoder to a bundle of a latent model."),
    "parity": ("dydit.commands.parity", "Compare a bundle with its checkpoint."),
    "bench": ("dydit.commands.bench", "Measure the speed of a bundle, and of another one or PyTorch for comparison."),
    "evaluate": ("dydit.commands.evaluate", "Measure the quality of sampled images: FID and others."),
    "inspect": ("dydit.commands.inspect", "Show what a checkpoint or a bundle contains."),
    "doctor": ("dydit.commands.doctor", "Test which backends work on this machine."),
}

HELP = """Train dynamic Diffusion Transformers (DyDiT), compile them into ONNX graphs, and sample with them.

The usual order is train or convert, then export, then sample. To train on your own images, run prepare first. Use
parity to compare a bundle with PyTorch, bench to measure its speed, evaluate to measure the quality of samples, and
inspect to see what it contains. Run calibrate before an export with int8-static, fp8 or --routing capacity. For
TensorRT, run build after the export.
"""


def command_group() -> CommandGroup:
    """The click group `dydit`. Its commands are imported when they are asked for."""
    from dydit.commands.group import CommandGroup

    return CommandGroup(COMMANDS, HELP)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors become one line on standard error."""
    try:
        from dydit.commands.exit_codes import run_command

        return run_command(command_group(), sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:  # before or after `run_command` handles it
        print("dydit: error: interrupted", file=sys.stderr)
        return 130


def __getattr__(name: str) -> Any:
    # `from dydit.cli import cli`, as tools for click expect it; made on demand, because click is not imported above.
    if name == "cli":
        return command_group()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
