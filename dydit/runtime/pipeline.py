"""`DyDiTPipeline`: a bundle as a callable, like diffusers' `DiTPipeline`. It stays loaded between calls."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.errors import BackendError, ConfigError
from dydit.runtime.arguments import real_number, whole_number, whole_numbers
from dydit.runtime.backends.base import Backend, BackendOptions
from dydit.runtime.backends.registry import open_backend, require_torch
from dydit.runtime.images.image_files import to_pil, to_uint8
from dydit.runtime.images.pixels import ToPixels, picture_format
from dydit.runtime.images.vae_decoder import IMAGES_AT_ONCE
from dydit.runtime.loop import MemoryStore, Progress, StepRunner, default_residency, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import DEFAULT_CFG_SCALE, UINT64, check_labels, make_batches
from dydit.runtime.resident import ResidentSubnets

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
SEED_BITS = 53  # of a random seed: programs that read JSON numbers as doubles keep it exactly


@dataclass(frozen=True)
class PipelineOutput:
    """`images`: the images in the form of `output_type`.

    `pil`: a list of PIL pictures; `np`: an array f32 [B, side, side, 1 or 3] in 0..1; `pt`: a torch tensor f32
    [B, 1 or 3, side, side] in 0..1, on the CPU; `latent`: None. `latents`: f32 [B, C, S, S], what the sampler returned.
    `seed`: the seed of the noise, given or drawn; with it the call can be repeated.
    """

    images: Any
    latents: np.ndarray
    seed: int


class DyDiTPipeline:
    """Samples images of classes from a bundle.

    >>> pipe = DyDiTPipeline.from_bundle("bundle")
    >>> pipe(class_labels=[207, 360], guidance_scale=4.0, seed=0).images[0].save("dog.png")

    Threads may share a pipeline: their calls run one after another, and every call returns what it would return alone,
    bit for bit. Pass more labels in a call for more speed. A call may be interrupted at any moment (Ctrl-C, a
    notebook's stop button) without affecting the next one. A pipeline works in a forked child, which opens its own
    sessions when it first needs them. Call `close`, or use it as a context manager, to free everything.

    `owns_backend`: whether `close` closes the backend, too. `resident`: how many subnetworks stay loaded (None: all).
    """

    def __init__(self, backend: Backend, resident: int | None = None, owns_backend: bool = False):
        self.backend = backend
        self._subnets = ResidentSubnets(backend, resident)
        self._to_pixels: ToPixels | None = None
        self._owns_backend, self._open = owns_backend, True

    @classmethod
    def from_bundle(
        cls, path: Path | str, backend: str = "onnxruntime", device: Any = "cpu", threads: int = 0
    ) -> DyDiTPipeline:
        """Open a bundle and verify its files.

        `device`: "cpu", "cuda", or a `torch.device` of these. `threads`: CPU threads to use; 0 lets the backend choose.
        Raises `BundleError`, `BackendError` and `ConfigError`, each saying what to do.
        """
        options = BackendOptions(threads=whole_number(threads, "threads", 0, 1 << 12), device=str(device))
        bundle = Bundle.open(Path(path).expanduser().absolute())  # files are read later, perhaps from another folder
        resident = default_residency(bundle.manifest)
        return cls(open_backend(backend, bundle, options), resident, owns_backend=True)

    def __call__(
        self,
        class_labels: Sequence[int] | np.ndarray | int,
        guidance_scale: float = DEFAULT_CFG_SCALE,
        seed: int | None = None,
        output_type: str = "pil",
        num_inference_steps: int | None = None,
        image_indices: Sequence[int] | np.ndarray | int | None = None,
        progress: Progress | None = None,
    ) -> PipelineOutput:
        """Sample one image for each label. Up to its last bits, an image does not depend on the others of the call.

        `class_labels`: an integer, or a sequence, array or range of integers. `guidance_scale` 1 disables guidance, and
        0 ignores the labels. `seed`: of the noise; None draws a new one, which the output holds. `image_indices`, by
        default 0, 1, ..., key the images' noise together with `seed`. `num_inference_steps` is fixed in the bundle; it
        may be given to assert it. `progress(done, total)` counts steps of a batch. Raises `ConfigError` for what the
        bundle cannot do.
        """
        self._require_open()
        manifest = self.backend.bundle.manifest
        labels = whole_numbers(class_labels, "class label", 0, UINT64 - 1)
        if not labels:
            raise ConfigError("class_labels is empty; give at least one label")
        check_labels(labels, manifest)
        scale = real_number(guidance_scale, "guidance_scale", 0)
        seed = secrets.randbits(SEED_BITS) if seed is None else whole_number(seed, "seed", 0, UINT64 - 1)
        self._check_output(output_type)
        if num_inference_steps is not None:
            steps = whole_number(num_inference_steps, "num_inference_steps", 1, UINT64 - 1)
            if steps != manifest.sampling.steps:
                raise ConfigError(
                    f"this bundle was exported for {manifest.sampling.steps} steps, not {steps}; "
                    "export another bundle for that"
                )
        if progress is not None and not callable(progress):
            raise ConfigError(f"progress must be a function of (done, total), not {type(progress).__name__}")
        images = _indices(image_indices, labels)
        with self.backend.lock:
            self._require_open()
            to_pixels = self._decoder(output_type)  # before sampling: it raises if a package is missing
            latents = self._sample(labels, images, scale, seed, progress)
            return PipelineOutput(_pictures(to_pixels, latents, output_type), latents, seed)

    def _check_output(self, output_type: str) -> None:
        if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
            raise ConfigError(f"output_type {output_type!r} is not one of {', '.join(OUTPUT_TYPES)}")
        if output_type != "latent" and picture_format(self.backend.bundle.manifest) is None:
            raise ConfigError(
                "this bundle samples latents and has no VAE decoder; use output_type='latent', or add a decoder with "
                "`dydit attach-vae`"
            )
        if output_type == "pt":
            require_torch()

    def _decoder(self, output_type: str) -> ToPixels | None:
        if output_type == "latent":
            return None
        if self._to_pixels is None:
            self._to_pixels = ToPixels(self.backend)
        return self._to_pixels

    def _sample(
        self, labels: Sequence[int], images: Sequence[int], scale: float, seed: int, progress: Progress | None
    ) -> np.ndarray:
        manifest, model = self.backend.bundle.manifest, self.backend.bundle.manifest.model
        batches = make_batches(labels, images, manifest.max_batch)
        runner = StepRunner(self.backend, self._subnets, sorted(set(labels)), scale)
        noise = SeededNoise(seed, (model.in_channels, model.input_size, model.input_size))
        store = MemoryStore()
        sample(runner, batches, noise, store, progress)
        return np.concatenate([store.load(index).x for index in range(len(batches))])

    def close(self) -> None:
        """Free threads, sessions and memory maps after the current call. A second call does nothing."""
        with self.backend.lock:
            self._open, self._to_pixels = False, None
            self._subnets.close()
            if self._owns_backend:
                self.backend.close()

    def _require_open(self) -> None:
        if not self._open:
            raise BackendError("this pipeline was closed; open the bundle again with DyDiTPipeline.from_bundle")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _indices(given: Any, labels: Sequence[int]) -> list[int]:
    """The index of every image. Raises `ConfigError` if two images would be identical."""
    if given is None:
        return list(range(len(labels)))
    images = whole_numbers(given, "image index", 0, UINT64 - 1)
    if len(images) != len(labels):
        raise ConfigError(f"{len(images)} image indices for {len(labels)} labels; give one for each")
    seen: dict[tuple[int, int], int] = {}
    for place, key in enumerate(zip(images, labels, strict=True)):
        if key in seen:
            raise ConfigError(
                f"images {seen[key]} and {place} would be identical: both have label {key[1]} and image index {key[0]}"
            )
        seen[key] = place
    return images


def _pictures(to_pixels: ToPixels | None, latents: np.ndarray, output_type: str) -> Any:
    if to_pixels is None:
        return None
    parts = [latents[i : i + IMAGES_AT_ONCE] for i in range(0, len(latents), IMAGES_AT_ONCE)]
    pixels = np.concatenate([to_pixels(part) for part in parts])
    if output_type == "pil":
        return [to_pil(image) for image in to_uint8(pixels)]
    levels = np.clip(pixels / 2 + 0.5, 0, 1)
    if output_type == "np":
        return levels.transpose(0, 2, 3, 1)
    import torch

    return torch.from_numpy(levels)
