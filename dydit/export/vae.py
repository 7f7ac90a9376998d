"""The decoder of diffusers' `AutoencoderKL` as a graph: `vae_decoder.onnx` with its weights in `vae_weights.bin`.

Traced, not written: it is one graph, exported once. Scaling of latents is inside, in fp32 like everything else, because
these autoencoders overflow in fp16. Attention is written out as products and a softmax, whose single wide head no
compiler fuses. Weights are read from safetensors alone.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from dydit.bundle.graph_io import BATCH
from dydit.bundle.vae import VAE_DECODER, VAE_WEIGHTS, VaeEntry, vae_inputs, vae_outputs
from dydit.errors import BackendError, CheckpointError, ConfigError, one_line
from dydit.graph.ops import IR_VERSION, OPSET
from dydit.models.config import ModelConfig, parse_config

LARGEST_TILE = 64
"""Side of latents that are decoded whole: 512 pixels with the usual autoencoders."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def export_vae(source: str, folder: Path, model: ModelConfig, tile: int | None = None) -> VaeEntry:
    """Write the decoder for a model's latents into `folder`.

    `source`: a folder that diffusers saved, or a hub name such as `stabilityai/sd-vae-ft-mse`: only that downloads.
    `tile`: side of the latents that are decoded at once, by default all of them up to 64. Raises `BackendError` where
    diffusers is missing, `CheckpointError` for what is no such autoencoder, `ConfigError` where it does not fit.
    """
    if model.samples_pixels:
        raise ConfigError(f"the model samples pixels of {model.in_channels} channels itself; leave the VAE away")
    side = min(model.input_size, LARGEST_TILE) if tile is None else tile
    vae = load_vae(source)
    config = vae.config
    values = {
        "latent_channels": config.latent_channels,
        "tile": side,
        "upscale": 2 ** (len(config.block_out_channels) - 1),
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.get("shift_factor") or 0.0,
        "source": str(source),
    }
    entry = parse_config(VaeEntry, values)
    if reason := entry.unfit_reason(model):
        raise ConfigError(reason)
    if config.out_channels != 3:
        raise ConfigError(f"{source} decodes to {config.out_channels} channels; expected 3, for RGB")
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise ConfigError(f"{source} scales each latent channel by itself, which is not supported")
    _save(_trace(_Decoder(vae, entry), entry), folder)
    return entry


def load_vae(source: str) -> Any:
    """A diffusers `AutoencoderKL` in fp32, attention written out. Local files only, unless a hub name is given."""
    try:
        import onnxscript  # noqa: F401  (PyTorch's exporter needs it; better said now than after a download)
        from diffusers import AutoencoderKL
        from diffusers.models.attention_processor import AttnProcessor
    except ImportError as error:
        package = (error.name or "diffusers").partition(".")[0]
        raise BackendError(f"{package} cannot be imported ({one_line(error)}): pip install 'dydit[vae]'") from error
    autoencoder: Any = AutoencoderKL  # diffusers has types for a part of it only
    local = Path(source).exists()
    if not local and not _HUB_NAME.fullmatch(source):
        raise CheckpointError(f"{source} does not exist; give a folder that diffusers saved, or a hub name OWNER/NAME")
    try:
        kind = autoencoder.load_config(source, local_files_only=local).get("_class_name")
        if kind != "AutoencoderKL":
            raise ValueError(f"it is of class {kind}")
        loaded, found = autoencoder.from_pretrained(
            source, local_files_only=local, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True
        )
        if missing := found["missing_keys"]:  # diffusers would fill them with noise
            raise ValueError(f"weight {missing[0]} is missing")
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        trouble = "is no" if local else "was not found as an"
        raise CheckpointError(f"{source} {trouble} AutoencoderKL in safetensors: {one_line(error)[:300]}") from error
    loaded.set_attn_processor(AttnProcessor())
    return loaded.eval()


class _Decoder(nn.Module):
    """Latents as the sampler returns them to pixels in [-1, 1]."""

    def __init__(self, vae: Any, entry: VaeEntry):
        super().__init__()
        self.decoder, self.post_quant = vae.decoder, vae.post_quant_conv
        self.scale, self.shift = entry.scaling_factor, entry.shift_factor

    def forward(self, latents: Tensor) -> Tensor:
        hidden = latents / self.scale + self.shift
        if self.post_quant is not None:
            hidden = self.post_quant(hidden)
        images: Tensor = self.decoder(hidden)
        return images


def _trace(decoder: _Decoder, entry: VaeEntry) -> ir.Model:
    (latents,), (images,) = vae_inputs(entry), vae_outputs(entry)
    example = torch.zeros(latents.concrete({BATCH: 2}))
    with torch.no_grad(), _quiet():
        shape = tuple(decoder.eval()(example).shape)
        if shape != images.concrete({BATCH: 2}):
            raise ConfigError(f"{entry.source} decodes {tuple(example.shape)} to {shape}, expected {images.shape}")
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
    for node in model.graph.all_nodes():  # where in whose files each came from
        node.metadata_props.clear()
    return model


def _save(model: ir.Model, folder: Path) -> None:
    ir.save(model, folder / VAE_DECODER, external_data=VAE_WEIGHTS)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
