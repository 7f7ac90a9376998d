"""Random DyDiTs that behave like trained ones: mixed gates, masks that drift with the timestep, tokens that differ.

For benchmarks at sizes whose weights are not at hand, and for tests. A freshly initialised DiT serves neither: its
output layers are zero and its gates all open, so that everything would pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dydit.errors import ConfigError
from dydit.models.config import ModelConfig, Routers
from dydit.models.dit.model import DiT
from dydit.models.dit.units import attention_macs, mlp_macs
from dydit.models.routers import Masked, Recording, TokenRouter

PROBE_STEPS = 50


@torch.no_grad()
def synthetic_model(config: ModelConfig, seed: int = 0, flops_ratio: float = 0.5) -> DiT:
    """A model with random weights whose routers are set so that its FLOPs ratio comes near `flops_ratio`.

    Heads and groups share one density, tokens another; both solve `p*(attn + q*mlp) = ratio*(attn + mlp)` with q = p.
    The ratio is that over uniformly spread timesteps, on standard normal latents; measure it where the figure matters.
    Raises `ConfigError` for a ratio outside (0, 1].
    """
    if not 0 < flops_ratio <= 1:
        raise ConfigError(f"FLOPs ratio {flops_ratio} is outside 0..1")
    generator = torch.Generator().manual_seed(seed)
    model = DiT(config).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight.shape[1:].numel()
            module.weight.normal_(std=fan_in**-0.5, generator=generator)
            module.bias.normal_(std=0.05, generator=generator)
    model.y_embedder.embedding_table.weight.normal_(std=0.5, generator=generator)
    for block in model.blocks:
        block.adaLN_modulation[1].weight.mul_(0.3)
    model.final_layer.linear.weight.mul_(0.5)
    if config.dynamic:
        density = _density(config, flops_ratio)
        _set_width_routers(model, density, generator)
        _set_token_routers(model, density, generator)
    return model


def _density(config: ModelConfig, ratio: float) -> float:
    """p of `p*attn + p*p*mlp = ratio*(attn + mlp)`."""
    a, m = attention_macs(config), mlp_macs(config)
    return float((-a + (a * a + 4 * m * ratio * (a + m)) ** 0.5) / (2 * m))


def _set_width_routers(model: DiT, density: float, generator: torch.Generator) -> None:
    """Standardise each unit's logit over the timesteps, then shift all so that a share `density` of all is above 0."""
    config = model.config
    t_emb = model.t_embedder(torch.linspace(0, 999, PROBE_STEPS).round())
    always = 1 if config.routers is Routers.FIRST_ON else 0
    routed = config.routed_rows
    if not routed:
        return
    share = min(max((density * config.num_heads - always) / routed, 0.0), 1.0)
    for block in model.blocks:
        for router in (block.attn_rate.router, block.mlp_rate.router):
            logits = router(t_emb) - router.bias
            spread = logits.std(0) + 1e-6
            router.weight.div_(spread[:, None])
            logits = logits / spread
            # Half of the spread between units is their own, so that some are nearly always on and others rarely; which
            # ones is drawn, because in a trained model the busiest units do not come first.
            own = torch.linspace(1.5, -1.5, routed)[torch.randperm(routed, generator=generator)]
            centred = logits - logits.mean(0) + own
            router.bias.copy_(own - logits.mean(0) - _quantile(centred, 1 - share))


def _set_token_routers(model: DiT, density: float, generator: torch.Generator) -> None:
    """Block by block, in the order of execution: set the bias so that a share `density` of probe tokens passes."""
    config = model.config
    x = torch.randn(4, config.in_channels, config.input_size, config.input_size, generator=generator)
    model(x, torch.tensor([50, 350, 650, 950]), torch.arange(4) % config.num_classes, _Calibrating(density))


class _Calibrating(Masked):
    """Sets each token router's bias when its logits are first seen, then gates by it."""

    def __init__(self, density: float):
        self.density = density

    def tokens(self, block: int, router: TokenRouter | None, x: Tensor) -> Tensor | None:
        assert router is not None
        logits = router(x)
        router.mlp_head[2].bias -= _quantile(logits, 1 - self.density)
        return super().tokens(block, router, x)


def _quantile(values: Tensor, share: float) -> Tensor:
    ordered = values.flatten().sort().values
    last = len(ordered) - 1
    position = min(int(share * len(ordered)), last)
    if position == 0:
        return ordered[0] - 1
    return (ordered[position - 1] + ordered[position]) / 2


@torch.no_grad()
def recorded_pass(model: DiT, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Recording]:
    """One inference pass with its decisions kept."""
    recording = Recording(Masked(), model.config)
    return model(x, t, y, recording), recording
