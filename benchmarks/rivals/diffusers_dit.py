"""diffusers' `DiTTransformer2DModel`, eager: a static DiT from the same weights under diffusers' names.

The weights are saved as a diffusers folder before the contenders start; the timed process loads that folder as a user
would. Two settings make diffusers compute what the original DiT computes, at no cost in time: `norm_eps` 1e-6, and a
sinusoid that divides by 128 (`dydit/models/dit/diffusers.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exported import require_packages
from torch import Tensor, nn

from dydit.bench.bench_worker import serve
from dydit.bench.timing import Job
from dydit.bench.timing_torch import MeasuredTorch
from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.models.config import ModelConfig
from dydit.models.dit.diffusers import diffusers_names
from dydit.models.transformer.modules import NORM_EPS


class Diffusers(MeasuredTorch):
    """The model that `from_pretrained` gives."""

    def build(self, job: Job):
        require_packages(["diffusers"])
        model = load_from_diffusers(Path(job.side.checkpoint or ""))
        return lambda x, t, y, gating: model(x, timestep=t, class_labels=y).sample, job.sizes


def dit_class() -> Any:
    """diffusers' class, which has no types and is slow to import."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel


def load_from_diffusers(folder: Path) -> nn.Module:
    """The model in a folder that diffusers saved, with the sinusoid of the original DiT."""
    model: nn.Module = dit_class().from_pretrained(folder).eval()
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


def save_for_diffusers(folder: Path, path: Path) -> None:
    """Save a static checkpoint as a diffusers DiT."""
    require_packages(["diffusers"])
    checkpoint = load_checkpoint(path)
    config = checkpoint.config
    model = dit_class()(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        num_layers=config.depth,
        sample_size=config.input_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=NORM_EPS,
    )
    model.load_state_dict(to_diffusers(checkpoint.state, config))
    model.save_pretrained(folder)


def to_diffusers(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a static DiT under diffusers' names: q, k and v apart, and the embedders once for each block.

    The position embedding is left out, because diffusers computes it.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "pos_embed":
            continue
        names = diffusers_names(name, config.depth)
        if ".attn.qkv." in name:
            renamed.update(zip(names, tensor.chunk(3), strict=True))
        else:
            renamed.update(dict.fromkeys(names, tensor))
    return renamed


if __name__ == "__main__":
    sys.exit(serve(Diffusers))
