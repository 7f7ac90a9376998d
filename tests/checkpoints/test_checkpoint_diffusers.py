"""Names and numbers against the real diffusers model; skipped where diffusers is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dydit.checkpoints.checkpoint import load_checkpoint

pytestmark = pytest.mark.numerics

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (pip install 'dydit[vae]')")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_a_saved_diffusers_model_loads_and_computes_the_same(tmp_path: Path) -> None:
    reference = diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_eps=1e-6,  # as in the DiT; diffusers has 1e-5 by default
    ).eval()
    generator = torch.Generator().manual_seed(0)
    shared = reference.transformer_blocks[0].norm1.emb
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for block in reference.transformer_blocks:
            block.norm1.emb.load_state_dict(shared.state_dict())
            block.norm1.emb.time_proj.downscale_freq_shift = 0  # as in the DiT; diffusers has 1
            block.norm1.emb.class_embedder.dropout_prob = 0.0
    reference.save_pretrained(tmp_path / "transformer")

    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.source == "diffusers" and checkpoint.config.num_heads == 4 and checkpoint.config.depth == 3
    x = torch.randn(3, 4, 8, 8, generator=generator)
    t, y = torch.tensor([0, 500, 999]), torch.tensor([0, 7, 10])
    with torch.no_grad():
        expected = reference(x, timestep=t, class_labels=y).sample
        assert relative(checkpoint.model()(x, t, y), expected) < 1e-5
        assert relative(checkpoint.model()(x, t.flip(0), y), expected) > 1e-2
        for block in reference.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 1
        # What diffusers computes by itself from the same weights; see dydit/checkpoints/diffusers_names.py.
        assert relative(reference(x, timestep=t, class_labels=y).sample, expected) > 1e-3
