"""What a GPU does with PyTorch alone, in one process and nine minutes, on a machine without a network.

    PYTHONPATH=. python benchmarks/gpu/nine_minutes.py --out FILE [--reference FILE2] [--minutes 9]
    PYTHONPATH=. python benchmarks/gpu/nine_minutes.py --make-reference FILE2       # before, on a CPU
    PYTHONPATH=. python benchmarks/gpu/nine_minutes.py --out FILE --dry-run

It needs a CUDA build of PyTorch with Triton, cuda-bindings or PyCUDA, and what dydit itself needs: NumPy and pydantic.
It needs neither onnx, ONNX Runtime nor TensorRT, and no file of weights: models are made on the GPU. `run.py` is for
machines where packages can be installed; it measures other backends, too. Where pydantic is missing, bring its wheels,
12 MB for four versions of Python:

    for python in 3.11 3.12 3.13 3.14; do pip download --only-binary=:all: --platform manylinux2014_x86_64 \\
        --implementation cp --python-version $python --dest wheels pydantic; done
    pip install --no-index --find-links wheels --target site pydantic      # on the machine; then PYTHONPATH=.:site

Parts, each with its own time; FILE is complete after every measurement, so that a kill loses only the present one:

    launches   the launch lists of the device loop on the real driver, with small engines, against the CPU
    ceilings   large matrix products, copies, and the products and the attention of the model's blocks
    parity     single steps and whole runs in fp32, fp16 and bf16 against a file that was made on a CPU
    speed      DiT-XL/2 with random weights, routers at a FLOPs ratio near 0.5, guidance, batches of 8, 32 and 1: masked
               as in the public code and static, in PyTorch; static and dynamic in the device loop, under CUDA graphs
    profile    the kernels that take most of a step
    compiled   the static model by torch.compile in its mode max-autotune, beside the device loop

Contenders take turns in rounds; times are those between CUDA events. A round of the device loop replays the graphs of a
run. `run_ms` is that of a whole run, with conditioning, noise from the host, segments that are repeated because tokens
found no slot, and the latents' way back; images/s are computed from it. --dry-run runs everything on
the CPU with a tiny model and a simulated driver, in seconds; it says nothing about any GPU. Exit code 0 where the file
was written, however many parts failed; 2 for bad usage.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from budget import Context, NineSettings, run_parts
from contenders import COMPILED, LOOP_DYNAMIC, LOOP_STATIC, MASKED, STATIC
from sections import PARTS, write_reference
from tasks import asked_settings
from timing import macs_share

from dydit.bench.scripts import markdown_table
from dydit.errors import ConfigError, DyditError
from dydit.files import parents
from dydit.reports.text import bytes_text, exponent

DRY = NineSettings(
    model="tiny", precision="bf16", batches=(2, 1), steps=4, measured=2, repeats=2, loop_steps=4, subnets=2
)
"""What `--dry-run` measures."""


def rows(context: Context) -> Iterator[dict[str, Any]]:
    """A row for each contender and batch size: its figures, or a `reason` why it has none.

    `ms` per step; `images_per_second` of a run of `steps` steps, by `run_ms` where it was measured; `speedup` over the
    static model in the device loop; `macs_share`: of its time, what its blocks' multiply-adds alone would take at the
    speed of the large product;
    `roofline_ms`: the least time of a step by the GPU's datasheet.
    """
    settings, speed = context.settings, context.results("speed")
    macs = (speed.get("model") or context.results("compiled").get("model") or {}).get("macs")
    tflops = context.results("ceilings").get(f"product {settings.precision}", {}).get("tflops")
    for batch in settings.batches:
        timed, compiled = (context.results(part).get(f"batch {batch}", {}) for part in ("speed", "compiled"))
        figures = timed | ({COMPILED: compiled[COMPILED]} if COMPILED in compiled else {})
        baseline = figures.get(LOOP_STATIC, {}).get("ms")
        for name in (MASKED, STATIC, COMPILED, LOOP_STATIC, LOOP_DYNAMIC):
            row = {"batch": batch, "contender": name, **(figures.get(name) or {"reason": "not reached"})}
            if "ms" in row:
                row["images_per_second"] = 1e3 * batch / (row.get("run_ms", row["ms"]) * settings.steps)
                row["speedup"] = baseline / row["ms"] if baseline else None
                work = macs["dynamic" if name == LOOP_DYNAMIC else "static"] if macs else None
                row["macs_share"] = macs_share(batch, work, tflops, row["ms"]) if work and tflops else None
                row["roofline_ms"] = _least_ms(speed.get("roofline", {}), name, batch)
            yield row


def _least_ms(roofline: dict[str, Any], name: str, batch: int) -> float | None:
    facts = roofline.get(LOOP_DYNAMIC if name == LOOP_DYNAMIC else LOOP_STATIC, {})
    wanted = "executed" if name == LOOP_DYNAMIC else "static"
    return next(
        (row["step_ms"] for row in facts.get("rows", ()) if (row["batch"], row["model"]) == (batch, wanted)), None
    )


def markdown(context: Context) -> str:
    """The tables of a run."""
    settings = context.settings
    title = settings.gpu or "CPU (dry run: these are not figures of a GPU)"
    parts = [["part", "", "seconds", "why"]]
    parts += [
        [name, each["status"], f"{each['seconds']:.0f}", each.get("reason", "")] for name, each in context.parts.items()
    ]
    checks = [[kind, *_check(values)] for kind, values in _checks(context)]
    times = [_time_row(row) for row in rows(context)]
    head = [
        "batch",
        "contender",
        "ms/step",
        "whole run",
        "images/s",
        "speed-up",
        "of multiply-adds",
        "least ms",
        "memory",
        "rounds",
    ]
    text = (
        f"{settings.model}, {settings.precision}, guidance; images/s for {settings.steps} steps, extrapolated. "
        "Speed-up: over the static model in the device loop. Whole run: also ms/step. Least ms: by the datasheet."
    )
    tables = [f"## {title}", markdown_table(parts[0], parts[1:])]
    tables += [markdown_table(["against the CPU", "", "median", "worst"], checks)] if checks else []
    return "\n\n".join([*tables, text, markdown_table(head, times)]) + "\n"


def _checks(context: Context) -> Iterator[tuple[str, dict[str, Any]]]:
    for kind, values in context.results("launches").items():
        if isinstance(values, dict):
            yield f"launches: {kind}", values
    for precision, values in context.results("parity").items():
        for check in ("step", "run"):
            if check in values:
                yield f"{precision}: {check}", values[check]


def _check(values: dict[str, Any]) -> list[str]:
    equal = all(value for name, value in values.items() if name.endswith("_is_equal"))
    numbers = ["-" if values[name] is None else exponent(values[name]) for name in ("median", "worst")]
    return ["holds" if values["holds"] and equal else "DOES NOT HOLD", *numbers]


def _time_row(row: dict[str, Any]) -> list[str]:
    if "ms" not in row:
        return [str(row["batch"]), row["contender"], row.get("reason", "no round ended in time"), *[""] * 7]

    def shown(name: str, form: str) -> str:
        return "-" if row.get(name) is None else format(row[name], form)

    return [
        str(row["batch"]),
        row["contender"],
        *(
            shown(name, form)
            for name, form in (("ms", ".4g"), ("run_ms", ".4g"), ("images_per_second", ".3g"), ("speedup", ".2f"))
        ),
        *(shown(name, form) for name, form in (("macs_share", ".1%"), ("roofline_ms", ".3g"))),
        "-" if row["memory_bytes"] is None else bytes_text(row["memory_bytes"]),
        str(len(row["round_ms"])),
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the file of results, JSON; an older one is replaced")
    parser.add_argument("--reference", type=Path, help="what parity is held against  [made on this machine's CPU]")
    parser.add_argument("--make-reference", type=Path, help="write such a file, and measure nothing")
    parser.add_argument("--minutes", type=float, default=9.0, help="time budget  [%(default)s]")
    parser.add_argument("--model", choices=("XL/2", "S/2"), default="XL/2", help="what is timed  [%(default)s]")
    parser.add_argument("--precision", choices=("bf16", "fp16"), default="bf16", help="of what is timed  [%(default)s]")
    parser.add_argument("--batch", type=int, action="append", help="batch size; may be repeated  [8, 32, 1]")
    parser.add_argument("--dry-run", action="store_true", help="try the script on the CPU, with a tiny model")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, started: float | None = None) -> int:
    """Run, print and write. `started`: when the process began, on the monotonic clock."""
    started, options = time.monotonic() if started is None else started, parse(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            if options.make_reference is not None:
                write_reference(options.make_reference, Path(folder))
                return 0
            if options.out is None:
                raise ConfigError("--out FILE says where the results go")
            deadline = started + 60 * options.minutes
            context = Context(
                asked_settings(options, DRY, measured=10), options.out, Path(folder), deadline, options.reference
            )
            with parents(options.out):
                context.save()
            try:
                run_parts(context, PARTS)
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
            print(markdown(context))
    except DyditError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # print what there is, then end
    sys.exit(main())
