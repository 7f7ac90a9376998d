"""The decoder of diffusers' `AutoencoderKL` or `VQModel` as a graph: `vae_decoder.onnx`, weights in `vae_weights.bin`.

The graph is traced, not written, because there is only one. It scales the latents, and everything is fp32, because
these autoencoders overflow in fp16. Attention is written out as products and a softmax, because no compiler fuses its
single wide head. Every convention that the autoencoder's configuration can state is followed or refused.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from dydit.bundle.io_spec import BATCH
from dydit.bundle.vae_entry import VAE_DECODER, VAE_WEIGHTS, VaeEntry, vae_inputs, vae_outputs
from dydit.errors import ConfigError
from dydit.export.vae_model import LoadedVae, VaeOptions, load_vae, quiet, vae_entry
from dydit.graph.ops import IR_VERSION, OPSET
from dydit.models.config import ModelConfig

LARGEST_TILE = 64
"""The largest side of latents that are decoded without tiles: 512 pixels with the usual autoencoders."""


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
    entry = vae_entry(source, vae, options, min(side, LARGEST_TILE) if options.tile is None else options.tile)
    if reason := entry.unfit_latents(channels, side, whose):
        raise ConfigError(reason)
    if vae.config["out_channels"] != 3:
        raise ConfigError(f"{source} decodes to {vae.config['out_channels']} channels; expected 3, for RGB")
    _save(_trace(_Decoder(vae, entry), entry), folder)
    return entry


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
    with torch.no_grad(), quiet():
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
