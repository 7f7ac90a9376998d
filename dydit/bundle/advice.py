"""Advice that several messages give: the commands that make a bundle with enough token slots."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dydit.bundle.manifest import Manifest, PlanKind
from dydit.bundle.stored_weights import Precision
from dydit.diffusion.samplers import SamplerConfig
from dydit.models.config import ModelConfig


def quoted(path: Path | str) -> str:
    """A path, quoted for a shell."""
    return shlex.quote(str(path))


def options_text(words: Sequence[str]) -> str:
    """Words of a command line, quoted for a shell, each with a space before it."""
    return "".join(f" {shlex.quote(word)}" for word in words)


def sampler_words(sampling: SamplerConfig, model: ModelConfig | None = None) -> list[str]:
    """The options of a sampler. `model`: leave out the steps and the sampler if they are its usual ones, the default of
    `dydit export`.
    """
    usual = None if model is None else model.usual_run
    same = usual is not None and sampling.sampler is usual.sampler
    words = [] if same and usual is not None and sampling.steps == usual.steps else [f"--steps {sampling.steps}"]
    words += [] if same else [f"--sampler {sampling.sampler}"]
    words += [] if sampling.spacing is None else [f"--timestep-spacing {sampling.spacing}"]
    return words + ([f"--eta {sampling.eta:g}"] if sampling.eta else [])


def run_options(plan: dict[str, Any], sampling: SamplerConfig, model: ModelConfig) -> str:
    """The options of `dydit calibrate` and `dydit export` for a run and its plan, without those that are the default
    for the model.

    Each option has a space before it.
    """
    words = sampler_words(sampling, model)
    words += {"per-step": ["--per-step"], "sliding": ["--dynamic-width"]}.get(plan.get("plan", ""), [])
    words += [f"--max-subnets {plan['max_subnets']}"] if "max_subnets" in plan else []
    words += [f"--memory-budget {plan['memory_budget']}B"] if "memory_budget" in plan else []
    return "".join(f" {word}" for word in words)


def capacity_chain(
    checkpoint: Path | str,
    calibration: Path | str,
    bundle: Path | str,
    run: str = "",
    precision: Precision = Precision.FP32,
    more: str = "",
) -> str:
    """The commands that calibrate token slots, export a bundle with them, and build engines if the precision has any.

    `run`: options that calibration and export must share. `more`: options of the export only. Each option has a space
    before it.
    """
    source, slots, target = quoted(checkpoint), quoted(calibration), quoted(bundle)
    ranges = " --activations minmax" if precision.is_calibrated else ""
    kind = "" if precision is Precision.FP32 else f" --precision {precision}"
    commands = [
        f"dydit calibrate {source}{run}{ranges} --out {slots}",
        f"dydit export {source}{run}{kind}{more} --routing capacity --calibration {slots} --out {target}",
        *([] if precision is Precision.INT8 else [f"dydit build {target}"]),  # int8 has no engines
    ]
    return ", then ".join(f"`{command}`" for command in commands)


def capacity_chain_of(manifest: Manifest) -> str:
    """`capacity_chain` for the run, plan and precision of a bundle, with names in place of paths."""
    plan: dict[str, Any] = {"max_subnets": len(manifest.plan.segments)}
    if manifest.plan.kind in (PlanKind.PER_STEP, PlanKind.DYNAMIC_WIDTH):
        plan = {"plan": manifest.plan.kind.value}
    run = run_options(plan, manifest.sampling.config, manifest.model)
    return capacity_chain("CHECKPOINT", "CAL.json", "BUNDLE", run, manifest.precision)
