"""Reads the weights of an autoencoder's decoder or encoder, under the names that diffusers gives them.

Supported are diffusers' files, also with the names of attention in its first releases, and original files of latent
diffusion (`kl-f8`, `vq-f4`), also inside a checkpoint of the whole model. The half that is not asked for is not read.
No code in a file is executed. Errors do not name the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dydit.checkpoints.containers import Container, container_of
from dydit.checkpoints.safe_load import listed, read_safetensors, read_torch, shown
from dydit.errors import CheckpointError

ANCHOR = "decoder.conv_in.weight"  # in every supported file
ENCODER_ANCHOR = "encoder.conv_in.weight"
CODEBOOK = "quantize.embedding.weight"
_DECODER_PARTS = ("decoder.", "post_quant_conv.", CODEBOOK)
_ENCODER_PARTS = ("encoder.", "quant_conv.")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LDM_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_LDM_LEVEL = re.compile(r"decoder\.up\.(\d{1,3})\.")
_LDM_DOWN = re.compile(r"encoder\.down\.(\d{1,3})\.")
_UP_BLOCK = re.compile(r"decoder\.up_blocks\.(\d{1,3})\.resnets\.(\d{1,3})\.conv2\.weight")


def read_decoder(files: Sequence[Path]) -> dict[str, Tensor]:
    """The decoder's tensors in fp32, under diffusers' names: `decoder.*`, `post_quant_conv.*` and the codebook."""
    return _read_half(files, ANCHOR, _DECODER_PARTS, "decoder")


def read_encoder(files: Sequence[Path]) -> dict[str, Tensor]:
    """The encoder's tensors in fp32, under diffusers' names: `encoder.*` and `quant_conv.*`."""
    return _read_half(files, ENCODER_ANCHOR, _ENCODER_PARTS, "encoder")


def _read_half(files: Sequence[Path], anchor: str, parts: tuple[str, ...], half: str) -> dict[str, Tensor]:
    state: dict[Any, Any] = {}
    for path in files:
        state |= _read(path)
    starts = [name.removesuffix(anchor) for name in state if isinstance(name, str) and name.endswith(anchor)]
    prefixes = [prefix for prefix in starts if not prefix or prefix.endswith(".")]
    if not prefixes:
        raise CheckpointError(f"holds no {half} of an autoencoder: no {anchor}; it holds {listed(map(str, state))}")
    if len(prefixes) > 1 and "" not in prefixes:
        raise CheckpointError(f"holds several autoencoders ({listed(prefixes)}); give a file with one")
    prefix = "" if "" in prefixes else prefixes[0]
    names = [name for name in state if isinstance(name, str) and name.startswith(prefix)]
    inner = {name.removeprefix(prefix): state[name] for name in names}
    return _diffusers_names({name: _fp32(name, value) for name, value in inner.items() if name.startswith(parts)})


def infer_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings of diffusers' `config.json`, from the shapes of the tensors that `read_decoder` returns.

    Shapes do not show the groups of normalization. They are taken to be 32, as in every release of latent diffusion
    and as diffusers' default.
    """
    blocks = {int(match[1]): state[match[0]].shape[0] for match in map(_UP_BLOCK.fullmatch, state) if match}
    layers = {int(match[2]) for match in map(_UP_BLOCK.fullmatch, state) if match}
    if not blocks or sorted(blocks) != list(range(len(blocks))) or "decoder.conv_out.weight" not in state:
        raise CheckpointError("holds an unknown kind of decoder; give the folder with its config.json")
    count = len(blocks)
    attends = [f"decoder.up_blocks.{block}.attentions.0.to_q.weight" in state for block in range(count)]
    values: dict[str, Any] = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [blocks[block] for block in reversed(range(count))],
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["AttnUpDecoderBlock2D" if attention else "UpDecoderBlock2D" for attention in attends],
        "layers_per_block": max(layers),
        "latent_channels": state[ANCHOR].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "norm_num_groups": 32,
        "mid_block_add_attention": "decoder.mid_block.attentions.0.to_q.weight" in state,
    }
    if CODEBOOK not in state:
        return {**values, "use_post_quant_conv": "post_quant_conv.weight" in state}
    size, width = state[CODEBOOK].shape
    return {**values, "_class_name": "VQModel", "num_vq_embeddings": size, "vq_embed_dim": width}


def _read(path: Path) -> Mapping[Any, Any]:
    container = container_of(path)
    if container is Container.SAFETENSORS:
        return read_safetensors(path)[0]
    loaded = read_torch(path, container)
    inner = loaded.get("state_dict") if isinstance(loaded, Mapping) else None
    state = inner if isinstance(inner, Mapping) else loaded
    if not isinstance(state, Mapping):
        raise CheckpointError(f"holds {type(state).__name__}, not a state dict")
    return state


def _fp32(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.layout is not torch.strided or not value.is_floating_point():
        raise CheckpointError(f"has {shown(name)}, which is not a dense floating-point tensor")
    return value.detach().to(torch.float32)


def _diffusers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    levels = [int(match[1]) for match in map(_LDM_LEVEL.match, state) if match]
    is_ldm = bool(levels) or any(map(_LDM_DOWN.match, state))
    renamed = {}
    for name, tensor in state.items():
        new = _from_ldm(name, max(levels, default=0)) if is_ldm else name
        if ".attentions." in new:
            new = _renamed_part(new, _OLD_ATTENTION)
            if (
                ".to_" in new and tensor.ndim == 4 and tensor.shape[2:] == (1, 1)
            ):  # a linear layer, stored as a convolution
                tensor = tensor[:, :, 0, 0]
        renamed[new] = tensor
    return renamed


def _from_ldm(name: str, last: int) -> str:
    """diffusers' name for a tensor of latent diffusion, which numbers the decoder's levels from the finest one, too."""
    name = re.sub(r"\.mid\.block_([12])\.", lambda match: f".mid_block.resnets.{int(match[1]) - 1}.", name)
    name = name.replace(".mid.attn_1.", ".mid_block.attentions.0.").replace(".upsample.", ".upsamplers.0.")
    name = name.replace(".downsample.", ".downsamplers.0.")
    name = _LDM_LEVEL.sub(lambda match: f"decoder.up_blocks.{last - int(match[1])}.", name)
    name = _LDM_DOWN.sub(r"encoder.down_blocks.\1.", name)
    name = re.sub(r"((?:up|down)_blocks\.\d+)\.block\.", r"\1.resnets.", name)
    name = re.sub(r"((?:up|down)_blocks\.\d+)\.attn\.", r"\1.attentions.", name)
    name = re.sub(r"coder\.norm_out\.", "coder.conv_norm_out.", name).replace(".nin_shortcut.", ".conv_shortcut.")
    return _renamed_part(name, _LDM_ATTENTION) if ".attentions." in name else name


def _renamed_part(name: str, parts: Mapping[str, str]) -> str:
    """`name` with the part before the final `weight` or `bias` renamed."""
    head, part, kind = name.rsplit(".", 2)
    return f"{head}.{parts.get(part, part)}.{kind}"
