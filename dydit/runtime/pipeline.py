"""`DyDiTPipeline`: a bundle as a callable, like diffusers' `DiTPipeline`. It stays loaded between calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, Self, Unpack, overload

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.diffusion.process import TRAIN_STEPS
from dydit.diffusion.samplers import Sampler, SamplerChoice, Spacing
from dydit.errors import BackendError, ConfigError
from dydit.planning.resampling import resampled
from dydit.runtime.arguments import named, real_number, whole_number, whole_numbers
from dydit.runtime.backends.base import Backend, BackendOptions
from dydit.runtime.backends.registry import open_backend, require_torch
from dydit.runtime.call_noise import CallNoise, noise_of_call
from dydit.runtime.call_texts import TextArguments, texts_of_call
from dydit.runtime.class_labels import labels_of, names_of
from dydit.runtime.images.image_files import to_pil, to_uint8
from dydit.runtime.images.pixels import ToPixels, picture_format
from dydit.runtime.images.vae_decoder import IMAGES_AT_ONCE
from dydit.runtime.loop import MemoryStore, Progress, StepRunner, packing_pays, sample
from dydit.runtime.prompts import TextEncoder
from dydit.runtime.request import UINT64, Batch, make_batches
from dydit.runtime.resident import ResidentSubnets, host_residency
from dydit.runtime.together import OnStep, sample_together, step_callback

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
KEPT_RUNS = 8
"""How many choices of steps and sampler a pipeline remembers the masks of."""
StepCallback = Callable[..., Any]
"""`callback(pipe, step, timestep, callback_kwargs)`; returns a dictionary (`dydit.runtime.together.step_callback`)."""


@dataclass(frozen=True)
class PipelineOutput:
    """`images`: the images in the form of `output_type`.

    `pil`: a list of PIL pictures; `np`: an array f32 [B, side, side, 1 or 3] in 0..1; `pt`: a torch tensor f32
    [B, 1 or 3, side, side] in 0..1, on the CPU; `latent`: `latents`. `latents`: a NumPy array f32 [B, C, S, S], what
    the sampler returned. `seed`: the seed of the noise, given or drawn; with it the call can be repeated. None if the
    noise did not come from a seed.
    """

    images: Any
    latents: np.ndarray
    seed: int | None


@dataclass(frozen=True)
class _Call:
    """The checked arguments of a call, whose steps are those of `bundle`."""

    bundle: Bundle
    labels: list[int]
    images: list[int]
    scale: float
    noise: CallNoise
    output_type: str
    progress: Progress | None
    on_step: OnStep | None

    @property
    def batches(self) -> list[Batch]:
        return make_batches(self.labels, self.images, self.bundle.manifest.max_batch)


class DyDiTPipeline:
    """Samples images of classes or texts from a bundle.

    >>> pipe = DyDiTPipeline.from_bundle("bundle")
    >>> pipe(class_labels=[207, 360], guidance_scale=4.0, seed=0).images[0].save("dog.png")

    Threads may share a pipeline: their calls run one after another, and every call returns what it would return alone,
    bit for bit. Pass more labels in a call for more speed. A call may be interrupted at any moment (Ctrl-C, a
    notebook's stop button) without affecting the next one. Calls with other steps share the loaded weights. A pipeline
    works in a forked child, which opens its own sessions when it first needs them. Call `close`, or use it as a context
    manager, to free everything.

    `owns_backend`: whether `close` closes the backend, too. `resident`: how many subnetworks stay loaded (None: all).
    """

    def __init__(
        self,
        backend: Backend,
        resident: int | None = None,
        owns_backend: bool = False,
        text_encoder: TextEncoder | Path | str | None = None,
    ):
        self.backend = backend
        self._subnets = ResidentSubnets(backend, resident)
        self._resampled = lru_cache(KEPT_RUNS)(partial(resampled, backend.opened))
        self._to_pixels: ToPixels | None = None
        self._text_encoder = text_encoder
        self._owns_backend, self._open = owns_backend, True

    @classmethod
    def from_bundle(
        cls,
        path: Path | str,
        backend: str = "onnxruntime",
        device: Any = "cpu",
        threads: int = 0,
        text_encoder: Path | str | None = None,
    ) -> DyDiTPipeline:
        """Open a bundle and verify its files.

        `device`: "cpu", "cuda", or a `torch.device` of these; for openvino "cpu", "gpu" or "npu". `threads`: CPU
        threads to use; 0 lets the backend choose.
        Weights are packed (`BackendOptions`) where a call runs each subnetwork for a dozen steps or more. What stays
        loaded between calls: `dydit.runtime.resident.host_residency`.
        `text_encoder`: of prompts, see `TextEncoder`; it is loaded when it is first needed. Raises `BundleError`,
        `BackendError` and `ConfigError`, each saying what to do.
        """
        bundle = Bundle.open(Path(path).expanduser().absolute())  # files are read later, perhaps from another folder
        used = whole_number(threads, "threads", 0, 1 << 12)
        options = BackendOptions(threads=used, device=str(device), packed=packing_pays(bundle.manifest, 1))
        opened = open_backend(backend, bundle, options)
        return cls(opened, host_residency(opened), owns_backend=True, text_encoder=text_encoder)

    @property
    def labels(self) -> dict[str, int]:
        """The names of the classes and their numbers, as in diffusers; empty if the bundle states no names.

        Names that several classes have are left out.
        """
        names = names_of(self.backend.opened.manifest.model)
        return {name: labels[0] for name, labels in sorted(names.items()) if len(labels) == 1}

    def get_label_ids(self, label: Any) -> list[int]:
        """The numbers of classes: of one name, or of a list of names or numbers. Raises `ConfigError`."""
        return labels_of(label, self.backend.opened.manifest.model)

    @overload
    def __call__(
        self,
        class_labels: Sequence[int | str] | np.ndarray | int | str | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        output_type: str = "pil",
        num_inference_steps: int | None = None,
        image_indices: Sequence[int] | np.ndarray | int | None = None,
        progress: Progress | None = None,
        *,
        sampler: Sampler | str | None = None,
        timestep_spacing: Spacing | str | None = None,
        eta: float | None = None,
        generator: Any = None,
        latents: Any = None,
        noise: Any = None,
        return_dict: Literal[True] = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **texts: Unpack[TextArguments],
    ) -> PipelineOutput: ...

    @overload
    def __call__(
        self,
        class_labels: Sequence[int | str] | np.ndarray | int | str | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        output_type: str = "pil",
        num_inference_steps: int | None = None,
        image_indices: Sequence[int] | np.ndarray | int | None = None,
        progress: Progress | None = None,
        *,
        sampler: Sampler | str | None = None,
        timestep_spacing: Spacing | str | None = None,
        eta: float | None = None,
        generator: Any = None,
        latents: Any = None,
        noise: Any = None,
        return_dict: Literal[False],
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **texts: Unpack[TextArguments],
    ) -> tuple[Any]: ...

    def __call__(
        self,
        class_labels: Any = None,
        guidance_scale: Any = None,
        seed: Any = None,
        output_type: str = "pil",
        num_inference_steps: Any = None,
        image_indices: Any = None,
        progress: Progress | None = None,
        *,
        sampler: Any = None,
        timestep_spacing: Any = None,
        eta: Any = None,
        generator: Any = None,
        latents: Any = None,
        noise: Any = None,
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **texts: Unpack[TextArguments],
    ) -> PipelineOutput | tuple[Any]:
        """Sample one image for each label. Up to its last bits, an image does not depend on the others of the call.

        `class_labels`: a label, or a sequence, array or range of them: numbers, or names where the bundle has them (see
        `labels`). The model's label for "no class" is one, too. An unconditional model takes the label 0 only.
        `guidance_scale`: 1 disables guidance, and 0 ignores the labels; by default 4, or 1 for an unconditional model.

        A model that texts condition takes `texts` in place of labels: see `TextArguments`.

        `num_inference_steps`, `sampler`, `timestep_spacing`, `eta`: by default those of the export. Bundles of dynamic
        width and of static models run any others; other bundles were made for their own timesteps.

        `seed`: of the noise; None draws a new one, which the output holds. `image_indices`, by default 0, 1, ..., key
        the images' noise together with it. `generator`, in place of a seed: a `torch.Generator` on the CPU, a
        `numpy.random.Generator`, or a list with one for each image. It gives standard normals f32 [B, C, S, S]: the
        starting latents, then one such array for each step that adds noise, in the order of the steps. A list gives
        each array image by image, [1, C, S, S] of each generator. They are `torch.randn(shape, generator=generator)`,
        or NumPy's `generator.standard_normal(shape, np.float32)`. `latents` [B, C, S, S] and `noise`
        [steps, B, C, S, S], arrays of NumPy or PyTorch, replace the starting latents and the noise of the steps, which
        are not drawn then.

        `callback_on_step_end(pipe, step, timestep, callback_kwargs)` is called after every step, with a copy of the
        latents of all images, f32 [B, C, S, S], in `callback_kwargs["latents"]`. The sampler goes on with the "latents"
        of the dictionary that it returns. All images do a step before any does the next, and `step` counts from 0.

        `progress(done, total)` counts steps of a batch. With `return_dict` False, returns `(images,)`. Raises
        `ConfigError` for what the bundle cannot do.
        """
        self._require_open()
        bundle = self._resampled(
            SamplerChoice(
                steps=_optional(num_inference_steps, whole_number, "num_inference_steps", 1, TRAIN_STEPS),
                sampler=_optional(sampler, named, "sampler", Sampler),
                spacing=_optional(timestep_spacing, named, "timestep_spacing", Spacing),
                eta=_optional(eta, real_number, "eta", 0, 1),
            )
        )
        bundle, labels = self._conditioned(bundle, class_labels, texts)
        self._check_output(output_type)
        if progress is not None and not callable(progress):
            raise ConfigError(f"progress must be a function of (done, total), not {type(progress).__name__}")
        if generator is not None and image_indices is not None:
            raise ConfigError("image_indices key the noise of a seed; remove them, or generator")
        names = callback_on_step_end_tensor_inputs
        call = _Call(
            bundle=bundle,
            labels=labels,
            images=_indices(image_indices, labels),
            scale=bundle.manifest.model.guidance_scale(_optional(guidance_scale, real_number, "guidance_scale", 0)),
            noise=noise_of_call(bundle.manifest, len(labels), seed, generator, latents, noise),
            output_type=output_type,
            progress=progress,
            on_step=_optional(callback_on_step_end, partial(step_callback, self), names, bundle.manifest),
        )
        output = self._run(call)
        return output if return_dict else (output.images,)

    def _conditioned(self, bundle: Bundle, labels: Any, texts: TextArguments) -> tuple[Bundle, list[int]]:
        """The bundle for the texts of a call, if there are any, and the label or the text of each image."""
        if unknown := texts.keys() - TextArguments.__annotations__.keys():
            raise TypeError(f"unexpected argument {min(unknown)!r}")
        model = bundle.manifest.model
        if model.text is None:
            if texts:
                raise ConfigError(f"this model takes class labels, not texts; remove {min(texts)}")
            if labels is None and not model.classes.unconditional:
                raise ConfigError("class_labels is missing; give at least one label")
            return bundle, labels_of(0 if labels is None else labels, model)
        if labels is not None:
            raise ConfigError("this model takes texts, not class labels; give prompt=, or prompt_embeds=")
        chosen, numbers = texts_of_call(model, texts, self._encoder)
        return bundle.with_texts(chosen), numbers

    def _encoder(self) -> TextEncoder:
        if self._text_encoder is None:
            raise ConfigError(
                "prompts need a language model; open the bundle with text_encoder=, the folder of a diffusers pipeline "
                "or of a text encoder, or give prompt_embeds"
            )
        if not isinstance(self._text_encoder, TextEncoder):
            self._text_encoder = TextEncoder(self._text_encoder)
        return self._text_encoder

    def _run(self, call: _Call) -> PipelineOutput:
        with self.backend.lock:
            self._require_open()
            self.backend.use(call.bundle)
            to_pixels = self._decoder(call.output_type)  # before sampling: it raises if a package is missing
            latents = self._sample(call)
            return PipelineOutput(_pictures(to_pixels, latents, call.output_type), latents, call.noise.seed)

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

    def _sample(self, call: _Call) -> np.ndarray:
        runner, batches = StepRunner(self.backend, self._subnets, sorted(set(call.labels)), call.scale), call.batches
        if call.on_step is not None:
            return sample_together(runner, batches, call.noise, call.on_step, call.progress)
        store = MemoryStore()
        sample(runner, batches, call.noise, store, call.progress)
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
    images = whole_numbers(given, "image_indices", 0, UINT64 - 1)
    if len(images) != len(labels):
        raise ConfigError(f"image_indices has {len(images)} for {len(labels)} labels; give one for each")
    seen: dict[tuple[int, int], int] = {}
    for place, key in enumerate(zip(images, labels, strict=True)):
        if key in seen:
            raise ConfigError(
                f"images {seen[key]} and {place} would be identical: both have label {key[1]} and index {key[0]} of "
                "image_indices"
            )
        seen[key] = place
    return images


def _optional(value: Any, check: Callable[..., Any], *about: Any) -> Any:
    """`check(value, *about)`, or None if the argument was not given."""
    return None if value is None else check(value, *about)


def _pictures(to_pixels: ToPixels | None, latents: np.ndarray, output_type: str) -> Any:
    if to_pixels is None:
        return latents
    parts = [latents[i : i + IMAGES_AT_ONCE] for i in range(0, len(latents), IMAGES_AT_ONCE)]
    pixels = np.concatenate([to_pixels(part) for part in parts])
    if output_type == "pil":
        return [to_pil(image) for image in to_uint8(pixels)]
    levels = np.clip(pixels / 2 + 0.5, 0, 1)
    if output_type == "np":
        return levels.transpose(0, 2, 3, 1)
    import torch

    return torch.from_numpy(levels)
