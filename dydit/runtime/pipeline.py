"""`DyDiTPipeline`: a bundle as a callable, in the manner of diffusers' `DiTPipeline`; it stays loaded between calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.errors import ConfigError
from dydit.models.config import parse_config
from dydit.runtime.backends.base import Backend, BackendOptions
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.images import to_pil, to_uint8
from dydit.runtime.loop import MemoryStore, Progress, StepRunner, default_residency, sample
from dydit.runtime.noise import SeededNoise
from dydit.runtime.pixels import ToPixels, picture_format
from dydit.runtime.request import DEFAULT_CFG_SCALE, SampleRequest, check_labels, make_batches
from dydit.runtime.resident import ResidentSubnets

OUTPUT_TYPES = ("pil", "np", "latent")


@dataclass(frozen=True)
class PipelineOutput:
    """`images`: PIL pictures, or for `np` an array f32 [B, side, side, 1 or 3] in 0..1, or None for `latent`.

    `latents`: f32 [B, C, S, S], what the sampler returned.
    """

    images: Any
    latents: np.ndarray


class DyDiTPipeline:
    """Samples images of classes from a bundle.

    >>> pipe = DyDiTPipeline.from_bundle("bundle")
    >>> pipe(class_labels=[207, 360], guidance_scale=4.0, seed=0).images[0].save("dog.png")
    """

    def __init__(self, backend: Backend, resident: int | None = None):
        self.backend = backend
        self._subnets = ResidentSubnets(backend, resident)

    @classmethod
    def from_bundle(
        cls, path: Path | str, backend: str = "onnxruntime", device: str = "cpu", threads: int = 0
    ) -> DyDiTPipeline:
        """Open a bundle and verify its files. Raises `BundleError` and `BackendError`, each saying what to do."""
        bundle = Bundle.open(path)
        engine = open_backend(backend, bundle, BackendOptions(threads=threads, device=device))
        return cls(engine, default_residency(bundle.manifest))

    def __call__(
        self,
        class_labels: Sequence[int] | int,
        guidance_scale: float = DEFAULT_CFG_SCALE,
        seed: int = 0,
        output_type: str = "pil",
        num_inference_steps: int | None = None,
        image_indices: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> PipelineOutput:
        """One image for each label, the same whatever else is in the call.

        `guidance_scale` 1 is no guidance. `image_indices`, by default 0, 1, ..., key the images' noise together with
        `seed`. `num_inference_steps` is fixed in the bundle, and may be given to assert it. `progress(done, total)`
        counts steps of a batch. Raises `ConfigError` for what the bundle cannot do.
        """
        manifest = self.backend.bundle.manifest
        labels = [class_labels] if isinstance(class_labels, int) else list(class_labels)
        values = {"labels": tuple(labels), "seed": seed, "cfg_scale": guidance_scale}
        request = parse_config(SampleRequest, values)
        check_labels(request.labels, manifest)
        if output_type not in OUTPUT_TYPES:
            raise ConfigError(f"output_type {output_type!r} is not one of {', '.join(OUTPUT_TYPES)}")
        if output_type != "latent" and picture_format(manifest) is None:
            raise ConfigError(
                "this bundle samples latents and has no VAE decoder; ask for output_type='latent', or add a decoder "
                "with `dydit attach-vae`"
            )
        to_pixels = None if output_type == "latent" else self._to_pixels  # what it needs is asked for before sampling
        if num_inference_steps not in (None, manifest.sampling.steps):
            raise ConfigError(
                f"this bundle was exported for {manifest.sampling.steps} steps, not {num_inference_steps}; "
                "export another one for that"
            )
        images = list(range(len(labels)) if image_indices is None else image_indices)
        if len(images) != len(labels):
            raise ConfigError(f"{len(images)} image indices for {len(labels)} labels; give one for each")
        latents = self._sample(request, images, progress)
        if to_pixels is None:
            return PipelineOutput(None, latents)
        few = to_pixels.at_once
        pixels = np.concatenate([to_pixels(latents[i : i + few]) for i in range(0, len(latents), few)])
        return PipelineOutput(_pictures(pixels, output_type), latents)

    @cached_property
    def _to_pixels(self) -> ToPixels:
        return ToPixels(self.backend)

    def _sample(self, request: SampleRequest, images: Sequence[int], progress: Progress | None) -> np.ndarray:
        manifest, model = self.backend.bundle.manifest, self.backend.bundle.manifest.model
        batches = make_batches(request.labels, images, manifest.max_batch)
        runner = StepRunner(self.backend, self._subnets, sorted(set(request.labels)), request.cfg_scale)
        noise = SeededNoise(request.seed, (model.in_channels, model.input_size, model.input_size))
        store = MemoryStore()
        sample(runner, batches, noise, store, progress)
        return np.concatenate([store.load(index) for index in range(len(batches))])

    def close(self) -> None:
        """Free the loaded subnetworks."""
        self._subnets.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _pictures(pixels: np.ndarray, output_type: str) -> Any:
    if output_type == "np":
        return np.clip(pixels.transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1)
    return [to_pil(image) for image in to_uint8(pixels)]
