"""PixArt-alpha: laws of its masked form, and the facts of its configuration and layout.

`tests/checkpoints/test_pixart.py` compares it with diffusers.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dydit.errors import ConfigError
from dydit.models.config import Routers, parse_config, parse_model
from dydit.models.pixart.config import PixArtConfig, preset
from dydit.models.pixart.model import PixArt, initialize
from dydit.models.registry import architecture_of
from dydit.models.routers import Masked, Recording, Static
from dydit.models.synthetic import recorded_pass, synthetic_model
from dydit.models.text import TextRows
from dydit.models.transformer.modules import sine_positions
from tests.fixtures.training import gumbel

pytestmark = pytest.mark.numerics

CONFIG = PixArtConfig(hidden_size=48, depth=3, num_heads=3, input_size=12, caption_channels=10, text_tokens=7)
MICRO = CONFIG.model_copy(update={"micro_conditions": True, "interpolation_scale": 2})
STATIC = CONFIG.without_routers()
VARIANTS = {"first-on": CONFIG, "micro-conditions": MICRO, "static": STATIC}


def a_model(config: PixArtConfig, seed: int = 0) -> PixArt:
    return synthetic_model(config, seed).double().requires_grad_(False)


def inputs(config: PixArtConfig, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, TextRows]:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, generator=generator).double()
    embeddings = torch.randn(batch, config.text_tokens, config.caption_channels, generator=generator).double()
    lengths = torch.tensor([1, config.text_tokens, 4])[:batch]
    mask = torch.arange(config.text_tokens) < lengths[:, None]
    return x, torch.tensor([3, 480, 999])[:batch], TextRows(embeddings, mask)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# The masked form


@pytest.mark.parametrize("config", [CONFIG, MICRO], ids=["plain", "micro-conditions"])
def test_with_every_gate_open_it_is_the_static_model(config: PixArtConfig) -> None:
    model, static = a_model(config), PixArt(config.without_routers()).double().requires_grad_(False)
    static.load_state_dict({name: model.state_dict()[name] for name in static.state_dict()})
    x, t, y = inputs(config)
    expected = static(x, t, y)
    assert torch.equal(model(x, t, y, Static()), expected)
    assert relative(model(x, t, y), expected) > 1e-2, "some gates are closed"
    for block in model.blocks:
        for router in (block.attn_rate.router, block.mlp_rate.router, block.token_selection.mlp_head[2]):
            router.bias.fill_(1e4)
    assert torch.allclose(model(x, t, y), expected, rtol=0, atol=1e-12)


def test_gates_of_a_synthetic_model_are_mixed() -> None:
    x, t, y = inputs(CONFIG)
    _, recording = recorded_pass(a_model(CONFIG), x, t, y)
    decisions = recording.decisions()
    assert decisions.units.shape == (3, 18) and decisions.tokens.shape == (3, 3, 36)
    assert 0 < decisions.units[:, 1:].mean() < 1 and 0 < decisions.tokens.mean() < 1
    assert (decisions.units[0] != decisions.units[2]).any(), "masks depend on the timestep"


def test_skipped_tokens_keep_the_stream_after_cross_attention() -> None:
    block = a_model(CONFIG).blocks[1]
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 36, 48), (2, 6, 48), (2, 7, 48), (2, 7), (2, 48))
    arguments = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    seen: list[torch.Tensor] = []

    class Half(Masked):
        def tokens(self, index, router, value):
            seen.append(value)
            return (torch.arange(36) % 2).double().expand(2, 36)

    out = block(*arguments, Half())
    joined = seen[0]
    assert torch.equal(out[:, ::2], joined[:, ::2])
    assert (out[:, 1::2] != joined[:, 1::2]).any(-1).all(), "routed tokens all change"
    block.cross_attn.proj.weight.zero_()
    block.cross_attn.proj.bias.zero_()
    block(*arguments, Half())
    assert relative(seen[1], joined) > 1e-2, "the router reads what cross-attention added"


def test_rows_of_a_batch_do_not_touch_each_other() -> None:
    model = a_model(CONFIG)
    x, t, y = inputs(CONFIG)
    together = model(x, t, y)
    for row in range(3):
        alone = model(x[row : row + 1], t[row : row + 1], y[torch.tensor([row])])
        assert torch.allclose(together[row], alone[0], atol=1e-10)


def test_padding_is_not_read() -> None:
    model = a_model(CONFIG)
    x, t, y = inputs(CONFIG)
    other = TextRows(torch.where(y.mask[..., None], y.embeddings, 3.0), y.mask)
    assert torch.allclose(model(x, t, other), model(x, t, y), atol=1e-10)
    longer = TextRows(
        torch.cat([y.embeddings, torch.ones(3, 5, 10)], 1), torch.cat([y.mask, torch.zeros(3, 5).bool()], 1)
    )
    assert torch.allclose(model(x, t, longer), model(x, t, y), atol=1e-10)
    holes = TextRows(y.embeddings, y.mask & (torch.arange(7) != 2))
    difference = (model(x, t, holes) - model(x, t, y)).flatten(1).norm(dim=1)
    assert difference[0] < 1e-10 and (difference[1:] > 1e-3).all(), "the first text has one token, the others more"


def test_a_text_of_padding_alone_is_read_whole() -> None:
    model = a_model(CONFIG)
    x, t, y = inputs(CONFIG)
    none, every = (TextRows(y.embeddings, torch.full_like(y.mask, value)) for value in (False, True))
    assert relative(model(x, t, none), model(x, t, every)) < 1e-9


def test_the_order_of_a_text_does_not_matter_but_its_content_does() -> None:
    model = a_model(CONFIG)
    x, t, y = inputs(CONFIG)
    flipped = TextRows(y.embeddings.flip(1), y.mask.flip(1))
    assert torch.allclose(model(x, t, flipped), model(x, t, y), atol=1e-10)
    assert relative(model(x, t, y[torch.tensor([1, 2, 0])]), model(x, t, y)) > 1e-2


def test_an_initialised_model_predicts_nothing_and_opens_every_gate() -> None:
    model = PixArt(MICRO)
    initialize(model, torch.Generator().manual_seed(0))
    x, t, y = inputs(MICRO)
    recording = Recording(Masked(), MICRO)
    assert not model(x.float(), t, y, recording).any()
    decisions = recording.decisions()
    assert (decisions.units == 1).all() and (decisions.tokens == 1).all()
    noisy = gumbel(MICRO, len(x))
    model(x.float(), t, y, noisy)
    assert noisy.decisions().tokens.mean() == 1 and noisy.decisions().units.mean() > 0.95
    again = PixArt(MICRO)
    initialize(again, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert all(parameter.isfinite().all() and parameter.requires_grad for parameter in model.parameters())


def test_order_by_importance_keeps_the_function() -> None:
    model, (x, t, y) = a_model(STATIC), inputs(STATIC)
    expected = model(x, t, y)
    model.load_state_dict(architecture_of(STATIC).ordered_by_importance(model.state_dict(), STATIC))
    assert torch.allclose(model(x, t, y), expected, atol=1e-10)


@pytest.mark.parametrize("share", [0.0, 1 / 36, 0.5, 1.0])
@pytest.mark.parametrize("config", [CONFIG, MICRO], ids=["scale-1", "scale-2"])
def test_a_share_of_tokens(config: PixArtConfig, share: float) -> None:
    model = a_model(config).float()
    architecture_of(config).route_share(model.state_dict(), config, share)
    x, t, y = inputs(config)
    _, recording = recorded_pass(model, x.float() * 5, t, y)
    first = torch.arange(36) < round(36 * share)
    assert torch.equal(recording.decisions().tokens.bool(), first.expand(3, 3, 36))


# Positions and timesteps


def test_positions_of_a_scale() -> None:
    small, large = (PixArtConfig(hidden_size=16, depth=1, num_heads=2, input_size=side) for side in (8, 16))
    one, two = sine_positions(small).view(4, 4, 16), sine_positions(large, 2).view(8, 8, 16)
    assert torch.equal(two[::2, ::2], one)
    assert not torch.allclose(sine_positions(large, 2), sine_positions(large))
    model = PixArt(large.model_copy(update={"interpolation_scale": 2}))
    assert torch.equal(model.pos_embed, sine_positions(large, 2)) and "pos_embed" not in model.state_dict()
    model.pos_embed.zero_()
    model.set_derived()
    assert torch.equal(model.pos_embed, sine_positions(large, 2))


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_timestep_embedding_in_numpy(config: PixArtConfig) -> None:
    model, times = a_model(config), torch.tensor([0, 1, 500, 999])
    weights = {
        name: value.numpy() for name, value in architecture_of(config).stored_tensors(model.state_dict(), config)
    }
    embedded = architecture_of(config).timestep_embedding(config, weights, times.numpy())
    assert embedded.shape == (4, 48) and embedded.dtype == np.float64
    np.testing.assert_allclose(embedded, model.embed_timestep(times).numpy(), rtol=0, atol=1e-4)  # fp32 sinusoids


def test_micro_conditions_depend_on_the_size_alone() -> None:
    model, larger = a_model(MICRO), MICRO.model_copy(update={"input_size": 24})
    times, other = torch.tensor([3, 700]), PixArt(larger).double()
    other.load_state_dict(model.state_dict())
    added = model.embed_timestep(times) - model.t_embedder(times)
    assert torch.allclose(added[0], added[1]) and torch.allclose(added[0, :16], added[0, 16:32])
    change = other.embed_timestep(times) - model.embed_timestep(times)
    assert (change[:, :32].abs() > 0).any() and (change[:, 32:].abs() < 1e-12).all(), "the aspect ratio stays 1"


# Configuration and layout


@pytest.mark.parametrize(("side", "parameters", "keys"), [(32, 610_856_096, 435), (128, 611_349_152, 443)])
def test_published_parameter_counts(side: int, parameters: int, keys: int) -> None:
    with torch.device("meta"):
        state = PixArt(preset("XL/2", side).without_routers()).state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == parameters and len(state) == keys


def test_published_sizes() -> None:
    published = {side: preset("XL/2", side) for side in (32, 64, 128)}
    assert {side: config.interpolation_scale for side, config in published.items()} == {32: 1, 64: 1, 128: 2}
    assert [side for side, config in published.items() if config.micro_conditions] == [128]
    assert published[128].pixels == 1024 and published[32].guided_channels == 4
    assert published[32].condition_shape == (170, 1152)
    with pytest.raises(ConfigError, match="unknown preset 'S/2'; expected one of: XL/2"):
        preset("S/2")


def test_the_model_costs_what_the_paper_counts() -> None:
    config = preset("XL/2")
    assert round(config.macs / 1e9, 2) == 141.04 and round(config.macs_with(120) / 1e9, 2) == 148.31
    n, d, tokens = CONFIG.tokens, CONFIG.hidden_size, 5
    products = n * d * d + tokens * d * 2 * d + n * d * tokens + n * tokens * d + n * d * d  # q, kv, scores, mix, proj
    assert CONFIG.macs_with(tokens) == CONFIG.units.per_unit().sum() + CONFIG.depth * products


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_stored_tensors_hold_every_weight_once(config: PixArtConfig) -> None:
    state = synthetic_model(config).state_dict()
    stored = dict(architecture_of(config).stored_tensors(state, config))
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == config.stored_shapes()
    assert list(stored) == list(config.stored_shapes())
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in stored.values())
    assert config.derived <= stored.keys()
    assert torch.equal(stored["pos_embed"], PixArt(config).pos_embed[0])

    def values(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensor.flatten() for tensor in tensors]).sort().values

    kept = [tensor for name, tensor in stored.items() if name not in {*config.derived, "width.weight", "width.bias"}]
    width = [tensor for name, tensor in state.items() if "_rate." not in name]
    assert torch.equal(values(kept), values(width))
    for block in range(config.depth):
        published = f"blocks.{block}.cross_attn."
        assert torch.equal(stored[f"blocks.{block}.cross_kv.weight"], state[f"{published}kv_linear.weight"])
        assert torch.equal(stored[f"blocks.{block}.cross_proj.bias"], state[f"{published}proj.bias"])
        table = stored["adaln.tables"][6 * block : 6 * block + 6]
        assert torch.equal(table, state[f"blocks.{block}.scale_shift_table"])
    assert torch.equal(stored["adaln.tables"][-2:], state["final_layer.scale_shift_table"])
    assert torch.equal(stored["text.0.weight"], state["y_embedder.y_proj.fc1.weight"])


def test_what_steps_do_not_read() -> None:
    names = MICRO.stored_shapes()
    step = {name for name in names if not MICRO.is_conditioning(name)}
    block = {name.removeprefix("blocks.2.") for name in step if name.startswith("blocks.2.")}
    cross = {f"cross_{layer}.{part}" for layer in ("q", "proj") for part in ("weight", "bias")}
    assert {name for name in block if name.startswith("cross_")} == cross and "qkv.weight" in block
    outside = {name for name in step if not name.startswith("blocks.")}
    assert outside == {"embed.weight", "embed.bias", "pos_embed", "final.weight", "final.bias"}
    assert set(MICRO.low_precision) | MICRO.fp32_products | MICRO.derived <= names.keys()
    assert not set(MICRO.low_precision) & MICRO.fp32_products
    assert {"size.0.weight", "ratio.2.weight", "time.2.weight"} <= MICRO.fp32_products
    assert not any(name.startswith(("size.", "ratio.")) for name in CONFIG.fp32_products)


@pytest.mark.parametrize(("side", "scale"), [(8, 1), (63, 1), (64, 1), (128, 2), (256, 4)])
def test_the_usual_scale_of_positions(side: int, scale: int) -> None:
    values = {"architecture": "pixart", "hidden_size": 48, "depth": 1, "num_heads": 3, "patch_size": 1}
    config = parse_model({**values, "input_size": side})
    assert isinstance(config, PixArtConfig) and config.interpolation_scale == scale
    assert parse_model(config.model_dump(mode="json")) == config
    other = parse_model({**values, "input_size": side, "interpolation_scale": 3})
    assert parse_model(other.model_dump(mode="json")) == other and other != config


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": 42}, "hidden_size 42 is not a multiple of 4"),
        ({"hidden_size": 40, "num_heads": 2, "micro_conditions": True}, "hidden_size 40 is not a multiple of 3"),
        ({"interpolation_scale": 0.5}, "interpolation_scale must be a whole number, not 0.5"),
        ({"interpolation_scale": 0}, "interpolation_scale must be greater than 0"),
        ({"text_tokens": 0}, "text_tokens must be greater than 0"),
        ({"caption_channels": -1}, "caption_channels must be greater than 0"),
        ({"num_classes": 10}, "num_classes is not a known setting"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(PixArtConfig, {**CONFIG.model_dump(), **changes})
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_router_layouts() -> None:
    every = CONFIG.model_copy(update={"routers": Routers.ALL_ROUTED})
    x, t, y = inputs(every)
    model = a_model(every)
    assert model.blocks[0].attn_rate.router.weight.shape == (3, 48)
    assert [router.router.weight.shape[0] for router in a_model(CONFIG).width_routers()] == [2] * 6
    assert model(x, t, y).shape == (3, 8, 12, 12)
