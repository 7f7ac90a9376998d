"""A sampling run that keeps its token decisions: what the routers saved, and where.

The graphs are those of sampling with more outputs (`debug`), so the images are the same up to rounding. Times of such a
run say nothing about sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import Manifest
from dydit.diffusion.steps import State, run_steps
from dydit.models.macs import flops_ratio
from dydit.planning.executed import computed_ratio
from dydit.runtime.backends.base import BackendOptions, StepResult
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.loop import StepRunner
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import check_batch_size, check_labels, make_batches
from dydit.runtime.resident import ResidentSubnets

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Trace:
    """`latents` f32 [B, C, S, S] after the last step; `tokens` bool [steps, L, rows, N]. Rows are the images with their
    labels and then, with guidance, the same images with the null class."""

    latents: np.ndarray
    tokens: np.ndarray

    @property
    def token_share(self) -> float:
        """Share of tokens that entered an MLP, over all steps, blocks and rows."""
        return float(self.tokens.mean())


def trace_tokens(
    bundle: Bundle,
    labels: Sequence[int],
    cfg_scale: float,
    seed: int = 0,
    options: BackendOptions | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Sample an image for each label in one batch on ONNX Runtime and keep every token decision.

    `progress(done, total)` counts steps. Raises `ConfigError` for labels that the bundle does not accept, and
    `BackendError` as backends do.
    """
    manifest, model = bundle.manifest, bundle.manifest.model
    check_labels(labels, manifest)
    model.guidance_scale(cfg_scale)
    check_batch_size(len(labels), manifest, len(labels))
    (batch,) = make_batches(labels, range(len(labels)), len(labels))
    noise = SeededNoise(seed, (model.in_channels, model.input_size, model.input_size))
    engine, steps = open_backend("onnxruntime", bundle, options), manifest.sampling.steps
    tokens = []

    def keep(step: int, result: StepResult) -> None:
        assert result.tokens is not None
        tokens.append(result.tokens)
        if progress:
            progress(step + 1, steps)

    with ResidentSubnets(engine, 2, debug=True) as subnets:
        runner = StepRunner(engine, subnets, batch.labels, cfg_scale)
        x = run_steps(runner.steps_of(batch, noise), State(noise.initial(batch)), range(steps), keep).x
    return Trace(x, np.stack(tokens))


def decided_ratio(manifest: Manifest, tokens: np.ndarray) -> float:
    """F_dyn / F_static of a run by the decisions of the model: exact masks, and `tokens` bool [steps, L, rows, N]."""
    counts, share = manifest.model.units.counts(manifest.step_masks()), tokens.mean(axis=(2, 3))
    return float(np.mean(flops_ratio(manifest.model, counts, share)))


def executed_ratio(manifest: Manifest, tokens: np.ndarray) -> float:
    """F_dyn / F_static of what is executed (`computed_ratio`): the widths of the subnetworks, and the tokens that their
    routing computes. Repeated steps, whose tokens overflowed, are not counted."""
    return float(computed_ratio(manifest, range(len(tokens)), tokens.mean(axis=(2, 3))).mean())
