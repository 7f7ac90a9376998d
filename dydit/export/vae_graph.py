"""The decoder of diffusers' `AutoencoderKL` or `VQModel` as a graph: `vae_decoder.onnx`, weights in `vae_weights.bin`.

The graph is traced, not written, because there is only one. It scales the latents, and everything is fp32, because
these autoencoders overflow in fp16. Attention is written out as products and a softmax, because no compiler fuses its
single wide head. Every convention that the autoencoder's configuration can state is followed or refused.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from dydit.bundle.io_spec import BATCH
from dydit.bundle.vae_entry import VAE_DECODER, VAE_WEIGHTS, VaeEntry, vae_inputs, vae_outputs
from dydit.checkpoints.fit import require_fit
from dydit.errors import CheckpointError, ConfigError, one_line
from dydit.export import vae_source
from dydit.export.vae_source import VaeFiles, find_vae, read_json, require_packages
from dydit.export.vae_weights import infer_config, read_decoder
from dydit.graph.ops import IR_VERSION, OPSET
from dydit.models.config import ModelConfig, parse_config
from dydit.validation import Strict

LARGEST_TILE = 64
"""The largest side of latents that are decoded without tiles: 512 pixels with the usual autoencoders."""
KINDS = ("AutoencoderKL", "VQModel")
_DECODER_PARTS = ("decoder.", "post_quant_conv.", "quantize.")


class VaeOptions(Strict):
    """How to export an autoencoder's decoder; `VaeEntry` says how the factors are used.

    `tile`: side of the latents that are decoded at once; by default the side of the model's latents, at most 64.
    `scale`, `shift`: replace those of the autoencoder's configuration, which a file of weights does not have.
    """

    tile: int | None = None
    scale: float | None = None
    shift: float | None = None


@dataclass(frozen=True)
class LoadedVae:
    """A diffusers autoencoder whose decoder has its weights.

    `config`: its settings, with defaults. `stated`: names of the settings in its configuration file; None if there is
    no such file and the settings come from the shapes of weights.
    """

    module: Any
    config: Mapping[str, Any]
    stated: frozenset[str] | None

    @property
    def quantised(self) -> bool:
        """Whether latents are replaced by vectors of a codebook."""
        return "num_vq_embeddings" in self.config

    @property
    def latent_channels(self) -> int:
        """Channels of the latents; with a codebook, channels of its vectors."""
        width: int = self.config.get("vq_embed_dim") or self.config["latent_channels"]
        return width

    def scaling_factor(self) -> tuple[float | None, bool]:
        """The scaling factor, and whether it is diffusers' default; None if it is not known.

        The autoencoders of Stable Diffusion 1 do not state it, and theirs became diffusers' default. The default is
        assumed only for them: later autoencoders, and those with a codebook, have other factors.
        """
        stated = self.stated or frozenset()
        if "scaling_factor" in stated:
            return self.config["scaling_factor"], False
        if self.stated is not None and not self.quantised and self.latent_channels == 4:
            return self.config["scaling_factor"], True
        return None, False


def export_vae(source: str, folder: Path, model: ModelConfig, options: VaeOptions | None = None) -> VaeEntry:
    """Write the decoder for a model's latents into `folder`. Raises what `export_decoder` raises."""
    if model.samples_pixels:
        raise ConfigError(
            f"the model samples pixels of {model.in_channels} channels and has no latents to decode; remove the VAE"
        )
    return export_decoder(source, folder, model.in_channels, model.input_size, options)


def export_decoder(
    source: str, folder: Path, channels: int, side: int, options: VaeOptions | None = None, whose: str = "the model has"
) -> VaeEntry:
    """Write the decoder for latents [channels, side, side] into `folder`.

    `source`: a source for `find_vae`, such as a folder that diffusers saved or `stabilityai/sd-vae-ft-mse`. `whose`:
    see `VaeEntry.unfit_latents`. Raises `BackendError` if diffusers is not installed, `CheckpointError` if the source
    is not a supported autoencoder, `ConfigError` if it does not fit the latents.
    """
    options = options or VaeOptions()
    vae = load_vae(source)
    entry = _entry(source, vae, options, min(side, LARGEST_TILE) if options.tile is None else options.tile)
    if reason := entry.unfit_latents(channels, side, whose):
        raise ConfigError(reason)
    if vae.config["out_channels"] != 3:
        raise ConfigError(f"{source} decodes to {vae.config['out_channels']} channels; expected 3, for RGB")
    _save(_trace(_Decoder(vae, entry), entry), folder)
    return entry


def _entry(source: str, vae: LoadedVae, options: VaeOptions, tile: int) -> VaeEntry:
    config = vae.config
    scale, assumed = vae.scaling_factor() if options.scale is None else (options.scale, False)
    if scale is None:
        raise ConfigError(
            f"{source} states no scaling factor, which decoding needs; give --vae-scale (0.18215 "
            "for Stable Diffusion 1 and 2, 0.13025 for XL, 1 for most autoencoders with a codebook)"
        )
    values = {
        "latent_channels": vae.latent_channels,
        "tile": tile,
        "upscale": 2 ** (len(config["block_out_channels"]) - 1),
        "scaling_factor": scale,
        "shift_factor": (config.get("shift_factor") or 0.0) if options.shift is None else options.shift,
        "source": source,
        "latents_mean": config.get("latents_mean"),
        "latents_std": config.get("latents_std"),
        "codebook": config["num_vq_embeddings"] if vae.quantised else None,
        "scale_assumed": assumed,
    }
    try:
        return parse_config(VaeEntry, values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def require_source(source: str) -> None:
    """Check without a download that `source` can be what `export_vae` needs. Raises what `export_vae` raises."""
    require_packages()
    with _named(source):
        vae_source.require_source(source)


def load_vae(source: str) -> LoadedVae:
    """An autoencoder's decoder in fp32, with attention written out. The encoder takes no memory."""
    require_packages()
    with _named(source):
        return _load(find_vae(source))


@contextlib.contextmanager
def _named(source: str) -> Iterator[None]:
    """Put the name of a source before errors about its files."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"--vae {source}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"--vae {source}: cannot be read: {error.strerror or error}") from error


def _load(files: VaeFiles) -> LoadedVae:
    values = None if files.config is None else read_json(files.config)
    module = None if values is None else _build(values)  # refuses another class before its weights are read
    state = read_decoder(files.weights)
    if module is None or values is None:
        values = infer_config(state)
        module = _build(values)
    shapes = {name: tuple(each.shape) for name, each in module.state_dict().items()}
    require_fit(state, {name: shape for name, shape in shapes.items() if name.startswith(_DECODER_PARTS)})
    module.load_state_dict(state, strict=False, assign=True)
    return LoadedVae(module.eval(), dict(module.config), frozenset(values) if files.config else None)


def _build(values: Mapping[str, Any]) -> Any:
    """The module that a configuration describes, without memory for its weights."""
    import diffusers
    from diffusers.models.attention_processor import Attention, AttnProcessor

    kind = values.get("_class_name")
    if kind not in KINDS:
        raise CheckpointError(f"is of class {kind}; expected {' or '.join(KINDS)}, diffusers' autoencoders")
    build = getattr(diffusers, kind)
    settings = {name: value for name, value in values.items() if not name.startswith("_")}
    known = inspect.signature(build.__init__).parameters
    if unknown := [name for name, value in settings.items() if name not in known and value is not None]:
        raise CheckpointError(
            f"states {unknown[0]}, which {kind} of diffusers {diffusers.__version__} does not know; a newer one may"
        )
    if settings.get("lookup_from_codebook"):
        raise CheckpointError("decodes indices of its codebook, which is not supported; expected latents")
    try:
        with torch.device("meta"), _quiet():
            module = build(**{name: value for name, value in settings.items() if name in known})
    except Exception as error:  # settings from a file can make the constructors raise anything
        raise CheckpointError(f"has a configuration that {kind} refuses: {one_line(error)[:300]}") from error
    for part in module.modules():
        if isinstance(part, Attention):
            part.set_processor(AttnProcessor())
    return module


class _Decoder(nn.Module):
    """Decodes latents, as the sampler returns them, to pixels in [-1, 1]."""

    def __init__(self, vae: LoadedVae, entry: VaeEntry):
        super().__init__()
        self.decoder, self.post_quant = vae.module.decoder, vae.module.post_quant_conv
        self.scale, self.shift = entry.scaling_factor, entry.shift_factor
        self.codes = vae.module.quantize.embedding if entry.codebook else None
        # Its normalization layers also take the vectors of the codebook.
        self.spatial = vae.config.get("norm_type") == "spatial"
        self.each: tuple[Tensor, Tensor] | None = None
        if entry.latents_mean is not None and entry.latents_std is not None:
            mean, std = (torch.tensor(each)[:, None, None] for each in (entry.latents_mean, entry.latents_std))
            self.each = mean, std

    def forward(self, latents: Tensor) -> Tensor:
        if self.each is None:
            hidden = latents / self.scale + self.shift
        else:
            mean, std = self.each
            hidden = latents * std / self.scale + mean
        quantized = hidden = hidden if self.codes is None else self._nearest(hidden, self.codes.weight)
        if self.post_quant is not None:
            hidden = self.post_quant(hidden)
        images: Tensor = self.decoder(hidden, quantized) if self.spatial else self.decoder(hidden)
        return images

    @staticmethod
    def _nearest(latents: Tensor, codes: Tensor) -> Tensor:
        """Latents [B, C, H, W] with each vector replaced by the nearest of the codes [K, C]."""
        vectors = latents.permute(0, 2, 3, 1)
        # Without |vector|^2, which is the same for all codes.
        distances = (codes * codes).sum(1) - 2 * (vectors @ codes.T)
        return nn.functional.embedding(distances.argmin(-1), codes).permute(0, 3, 1, 2)


def _trace(decoder: _Decoder, entry: VaeEntry) -> ir.Model:
    (latents,), (images,) = vae_inputs(entry), vae_outputs(entry)
    example = torch.zeros(latents.concrete({BATCH: 2}))
    with torch.no_grad(), _quiet():
        decoded = decoder.eval()(torch.randn(example.shape, generator=torch.Generator().manual_seed(0)))
        if tuple(decoded.shape) != images.concrete({BATCH: 2}):
            raise ConfigError(
                f"{entry.source} decodes {list(example.shape)} to {list(decoded.shape)}; expected {list(images.shape)}"
            )
        if not decoded.isfinite().all():
            raise ConfigError(f"{entry.source} decodes random latents to NaN or infinite pixels; use another VAE")
        program = torch.onnx.export(
            decoder,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[latents.name],
            output_names=[images.name],
            dynamic_shapes={latents.name: {0: torch.export.Dim(BATCH)}},
            verbose=False,
        )
    assert program is not None
    model: ir.Model = program.model
    model.ir_version, model.producer_name = IR_VERSION, "dydit"
    for node in model.graph.all_nodes():  # they name source files of this machine
        node.metadata_props.clear()
    return model


def _save(model: ir.Model, folder: Path) -> None:
    ir.save(model, folder / VAE_DECODER, external_data=VAE_WEIGHTS)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's messages about packages that are not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
