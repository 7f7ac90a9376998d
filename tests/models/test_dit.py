"""The DiT against a NumPy reference written from its definition, and the facts of its layout."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from dydit.models.config import ModelConfig, Routers
from dydit.models.dit.config import DiTConfig, preset
from dydit.models.dit.model import DiT, initialize
from dydit.models.routers import Masked, Recording, Static
from dydit.models.transformer.modules import (
    FREQUENCIES,
    initialize_routers,
    sine_frequencies,
    sine_positions,
    unpatchify,
)
from tests.fixtures.training import gumbel

pytestmark = pytest.mark.numerics

CONFIG = DiTConfig(hidden_size=32, depth=2, num_heads=4, patch_size=2, input_size=6, in_channels=3, num_classes=5)
VARIANTS = {
    "first-on": CONFIG,
    "all-routed": CONFIG.model_copy(update={"routers": Routers.ALL_ROUTED}),
    "static": CONFIG.without_routers(),
    "no-sigma": CONFIG.model_copy(update={"learn_sigma": False}),
}


def random_model(config: ModelConfig, seed: int = 0) -> DiT:
    """Random in every weight, output layers and routers included; float64."""
    model, generator = DiT(config).double(), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            scale = 0.3 if name.endswith("bias") else 2 * parameter.shape[-1] ** -0.5
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
    return model.requires_grad_(False).eval()


def random_inputs(config: ModelConfig, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, generator=generator).double()
    return x, torch.tensor([3, 480, 999])[:batch], torch.tensor([0, config.null_class, 2])[:batch]


class Reference:
    """One image through a DyDiT at inference, in float64 NumPy, with loops over heads and groups."""

    def __init__(self, model: DiT):
        self.config = model.config
        self.w = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        self.heads, self.groups, self.tokens = [], [], []

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    @staticmethod
    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    @staticmethod
    def norm(x: np.ndarray) -> np.ndarray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def on(self, block: int, router: str, t_emb: np.ndarray) -> list[int]:
        config = self.config
        if not config.dynamic:
            return list(range(config.num_heads))
        logits = self.linear(f"blocks.{block}.{router}.router", t_emb)
        skipped = 1 if config.routers is Routers.FIRST_ON else 0
        return [0] * skipped + [int(unit) + skipped for unit in np.flatnonzero(logits > 0)]

    def block(self, index: int, x: np.ndarray, c: np.ndarray, t_emb: np.ndarray) -> np.ndarray:
        config, name, w = self.config, f"blocks.{index}", self.w
        d, hd, gs = config.hidden_size, config.head_dim, config.group_dim
        modulation = self.linear(f"{name}.adaLN_modulation.1", self.silu(c))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.reshape(6, d)
        hidden = self.norm(x) * (1 + scale1) + shift1
        qkv = self.linear(f"{name}.attn.qkv", hidden)
        out = np.zeros_like(x) + w[f"{name}.attn.proj.bias"]
        heads = self.on(index, "attn_rate", t_emb)
        for head in heads:
            q, k, v = (qkv[:, part * d + head * hd : part * d + (head + 1) * hd] for part in range(3))
            scores = np.exp(q @ k.T / math.sqrt(hd))
            mixed = scores / scores.sum(1, keepdims=True) @ v
            out += mixed @ w[f"{name}.attn.proj.weight"][:, head * hd : (head + 1) * hd].T
        x = x + gate1 * out
        hidden = self.norm(x) * (1 + scale2) + shift2
        out = np.zeros_like(x) + w[f"{name}.mlp.fc2.bias"]
        groups = self.on(index, "mlp_rate", t_emb)
        for group in groups:
            rows = slice(group * gs, (group + 1) * gs)
            u = hidden @ w[f"{name}.mlp.fc1.weight"][rows].T + w[f"{name}.mlp.fc1.bias"][rows]
            u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
            out += u @ w[f"{name}.mlp.fc2.weight"][:, rows].T
        tokens = np.ones(len(x), bool)
        if config.dynamic:
            router = f"{name}.token_selection.mlp_head"
            tokens = self.linear(f"{router}.2", np.maximum(self.linear(f"{router}.0", x), 0))[:, 0] > 0
        self.heads.append(heads)
        self.groups.append(groups)
        self.tokens.append(tokens)
        x = x.copy()
        x[tokens] += (gate2 * out)[tokens]
        return x

    def run(self, image: np.ndarray, t: int, y: int) -> np.ndarray:
        config, w, p = self.config, self.w, self.config.patch_size
        side = config.input_size // p
        kernel = w["x_embedder.proj.weight"].reshape(config.hidden_size, -1)
        patches = [image[:, p * r : p * r + p, p * c : p * c + p].ravel() for r in range(side) for c in range(side)]
        x = np.stack(patches) @ kernel.T + w["x_embedder.proj.bias"] + w["pos_embed"][0]
        # The frequencies are single precision numbers by definition.
        angles = t * sine_frequencies(FREQUENCIES).double().numpy()
        sinusoid = np.concatenate([np.cos(angles), np.sin(angles)])
        t_emb = self.linear("t_embedder.mlp.2", self.silu(self.linear("t_embedder.mlp.0", sinusoid)))
        c = t_emb + w["y_embedder.embedding_table.weight"][y]
        for index in range(config.depth):
            x = self.block(index, x, c, t_emb)
        shift, scale = np.split(self.linear("final_layer.adaLN_modulation.1", self.silu(c)), 2)
        tokens = self.linear("final_layer.linear", self.norm(x) * (1 + scale) + shift)
        out = np.empty((config.out_channels, config.input_size, config.input_size))
        for token, values in enumerate(tokens):
            r, column = divmod(token, side)
            patch = values.reshape(p, p, config.out_channels)
            out[:, p * r : p * r + p, p * column : p * column + p] = patch.transpose(2, 0, 1)
        return out


@pytest.fixture(params=list(VARIANTS))
def model(request) -> DiT:
    return random_model(VARIANTS[request.param])


def test_is_the_reference(model):
    x, t, y = random_inputs(model.config)
    recording = Recording(Masked() if model.config.dynamic else Static(), model.config)
    out = model(x, t, y, recording)
    assert torch.equal(out, model(x, t, y)), "inference gating is the default"
    decisions, seen = recording.decisions(), []
    for image in range(3):
        reference = Reference(model)
        expected = reference.run(x[image].numpy(), int(t[image]), int(y[image]))
        slots = model.config.units.slots(decisions.units[image].numpy())
        np.testing.assert_allclose(out[image].numpy(), expected, rtol=1e-9, atol=1e-10)
        for block in range(model.config.depth):
            assert slots[block] == (tuple(reference.heads[block]), tuple(reference.groups[block]))
            assert decisions.tokens[block, image].bool().tolist() == reference.tokens[block].tolist()
        seen.append(reference)
    if model.config.dynamic:
        every = model.config.num_heads * 3 * model.config.depth
        assert 0 < sum(len(on) for each in seen for on in each.heads) < every
        assert 0 < sum(len(on) for each in seen for on in each.groups) < every
        assert 0 < np.mean([each.tokens for each in seen]) < 1


def test_masked_units_are_rows_of_zero_weights():
    """Closing a head is zeroing its value rows or projection columns; closing a group its fc1 rows or fc2 columns."""
    model = random_model(VARIANTS["all-routed"])
    x, t, y = random_inputs(model.config, batch=1)
    hd, gs = CONFIG.head_dim, CONFIG.group_dim

    class WidthOnly(Masked):
        def tokens(self, block, router, x):
            return None

    recording = Recording(WidthOnly(), CONFIG)
    expected = model(x, t, y, recording)
    axis = CONFIG.units
    closed = axis.slots(recording.decisions().units[0].numpy() == 0)
    for heads_or_groups in zip(*closed, strict=True):
        assert 0 < sum(map(len, heads_or_groups)) < CONFIG.depth * CONFIG.num_heads
    ways = []
    for inner in (True, False):
        static = random_model(CONFIG.without_routers())
        static.load_state_dict({name: model.state_dict()[name] for name in static.state_dict()})
        for index, block in enumerate(static.blocks):
            for head in closed[index][0]:
                if inner:
                    rows = slice(2 * 32 + head * hd, 2 * 32 + (head + 1) * hd)
                    block.attn.qkv.weight[rows], block.attn.qkv.bias[rows] = 0, 0
                else:
                    block.attn.proj.weight[:, head * hd : (head + 1) * hd] = 0
            for group in closed[index][1]:
                rows = slice(group * gs, (group + 1) * gs)
                if inner:
                    block.mlp.fc1.weight[rows], block.mlp.fc1.bias[rows] = 0, 0
                else:
                    block.mlp.fc2.weight[:, rows] = 0
        ways.append(static(x, t, y))
    for way in ways:
        assert torch.allclose(way, expected, rtol=1e-10, atol=1e-11)
    assert not torch.allclose(model(x, t, y, Static()), expected, rtol=1e-2)


def test_skipped_tokens_keep_their_residual_exactly():
    model = random_model(CONFIG)
    block = model.blocks[0]
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 9, 32), (2, 32), (2, 32))
    x, c, t_emb = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    kept: list[torch.Tensor] = []

    class Spy(Masked):
        def tokens(self, index, router, value):
            kept.append(value)
            return super().tokens(index, router, value)

    recording = Recording(Spy(), CONFIG.model_copy(update={"depth": 1}))
    out = block(x, c, t_emb, recording)
    mask = recording.decisions().tokens[0].bool()
    assert 0 < mask.sum() < mask.numel()
    assert torch.equal(out[~mask], kept[0][~mask])
    assert (out[mask] != kept[0][mask]).all(), "routed tokens all change"


def test_rows_of_a_batch_do_not_touch_each_other():
    model = random_model(CONFIG)
    x, t, y = random_inputs(CONFIG)
    together = model(x, t, y)
    for row in range(3):
        alone = model(x[row : row + 1], t[row : row + 1], y[row : row + 1])
        assert torch.allclose(together[row], alone[0], atol=1e-12)


def test_always_on_unit_of_a_closed_model():
    model = random_model(CONFIG)
    for block in model.blocks:
        block.attn_rate.router.bias.fill_(-1e4)
        block.mlp_rate.router.bias.fill_(-1e4)
    x, t, y = random_inputs(CONFIG)
    recording = Recording(Masked(), CONFIG)
    model(x, t, y, recording)
    first = torch.tensor([1.0, 0, 0, 0] * 4, dtype=torch.float64).expand(3, 16)
    assert torch.equal(recording.decisions().units, first)


@pytest.mark.parametrize(
    ("name", "parameters", "keys"), [("S/2", 33_120_740, 228), ("B/2", 131_158_964, 228), ("XL/2", 678_424_644, 516)]
)
def test_published_parameter_counts(name, parameters, keys):
    with torch.device("meta"):
        state = DiT(preset(name)).state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == parameters
    assert len(state) == keys


def test_published_names_and_shapes_of_xl():
    with torch.device("meta"):
        state = DiT(preset("XL/2")).state_dict()
    expected = {
        "pos_embed": (1, 256, 1152),
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "t_embedder.mlp.0.weight": (1152, 256),
        "t_embedder.mlp.2.weight": (1152, 1152),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "blocks.27.attn.qkv.weight": (3456, 1152),
        "blocks.27.attn.proj.weight": (1152, 1152),
        "blocks.0.mlp.fc1.weight": (4608, 1152),
        "blocks.0.mlp.fc2.weight": (1152, 4608),
        "blocks.0.adaLN_modulation.1.weight": (6912, 1152),
        "blocks.0.attn_rate.router.weight": (15, 1152),
        "blocks.0.mlp_rate.router.bias": (15,),
        "blocks.0.token_selection.mlp_head.0.weight": (72, 1152),
        "blocks.0.token_selection.mlp_head.2.weight": (1, 72),
        "final_layer.linear.weight": (32, 1152),
        "final_layer.adaLN_modulation.1.weight": (2304, 1152),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected


def test_static_model_lacks_only_the_routers():
    with torch.device("meta"):
        dynamic, static = DiT(CONFIG).state_dict(), DiT(CONFIG.without_routers()).state_dict()
    missing = dynamic.keys() - static.keys()
    assert missing and all(("_rate." in name or "token_selection" in name) for name in missing)
    assert static.keys() <= dynamic.keys()


def test_position_embedding():
    config = DiTConfig(hidden_size=16, depth=1, num_heads=1, patch_size=1, input_size=5)
    table = sine_positions(config)
    assert table.shape == (1, 25, 16) and table.dtype == torch.float32
    grid = table[0].view(5, 5, 2, 8)  # row, column, (column half, row half), (4 sines, 4 cosines)
    assert torch.equal(grid[0, 0, 0], torch.tensor([0.0] * 4 + [1.0] * 4))
    assert torch.equal(grid[:, :, 0], grid[:1, :, 0].expand(5, 5, 8)), "the first half depends on the column only"
    assert torch.equal(grid[:, :, 1], grid[:, :1, 1].expand(5, 5, 8)), "the second on the row only"
    assert torch.equal(grid[2, 3, 0], grid[3, 0, 1]), "rows and columns use one table"
    for i in range(4):
        assert grid[0, 3, 0, i].item() == pytest.approx(math.sin(3 * 10000 ** (-i / 4)), abs=1e-7)
        assert grid[0, 3, 0, 4 + i].item() == pytest.approx(math.cos(3 * 10000 ** (-i / 4)), abs=1e-7)
    assert torch.allclose(table.square().sum(-1), torch.tensor(8.0)), "a sine and a cosine of every frequency"


def test_timestep_embedding_input():
    frequencies = sine_frequencies(FREQUENCIES)
    assert frequencies.shape == (128,) and frequencies[0] == 1
    assert frequencies[64].item() == pytest.approx(0.01, rel=1e-5)
    model = random_model(CONFIG)
    seen: list[torch.Tensor] = []
    model.t_embedder.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.t_embedder(torch.tensor([0, 999]))
    assert seen[0].shape == (2, 256) and seen[0].dtype == torch.float64
    assert torch.equal(seen[0][0], torch.tensor([1.0] * 128 + [0.0] * 128).double()), "cosines, then sines"
    assert seen[0][1, 0].item() == pytest.approx(math.cos(999), abs=1e-6)
    assert seen[0][1, 128].item() == pytest.approx(math.sin(999), abs=1e-6)


def test_frequencies_are_no_part_of_a_checkpoint():
    assert "t_embedder.frequencies" not in DiT(CONFIG).state_dict()
    model = random_model(CONFIG).float()
    assert model.t_embedder.frequencies.dtype == torch.float32


def test_unpatchify_puts_each_value_at_its_pixel():
    """Token values are ordered (y, x, channel) within a patch."""
    side, p, c = 3, CONFIG.patch_size, CONFIG.out_channels
    tokens = torch.arange(2 * side * side * p * p * c).view(2, side * side, p * p * c)
    image = unpatchify(tokens, CONFIG)
    assert image.shape == (2, c, 6, 6)
    for channel, y, x in ((0, 0, 0), (5, 1, 0), (2, 3, 4), (1, 5, 5)):
        token, inner = (y // p) * side + x // p, (y % p) * p + x % p
        assert image[1, channel, y, x] == tokens[1, token, inner * c + channel]


def test_initialised_model_predicts_nothing_and_opens_every_gate():
    model = DiT(CONFIG)
    initialize(model, torch.Generator().manual_seed(0))
    x, t, y = random_inputs(CONFIG)
    recording = Recording(Masked(), CONFIG)
    assert not model(x.float(), t, y, recording).any()
    decisions = recording.decisions()
    assert (decisions.units == 1).all() and (decisions.tokens == 1).all()
    noisy = gumbel(CONFIG, len(x))
    model(x.float(), t, y, noisy)
    assert noisy.decisions().tokens.mean() == 1 and noisy.decisions().units.mean() > 0.99
    assert model.blocks[0].attn_rate.router.bias.tolist() == [15.0] * 3
    assert model.blocks[0].token_selection.mlp_head[2].bias.tolist() == [35.0]
    assert model.blocks[0].attn.qkv.weight.std() > 0
    again = DiT(CONFIG)
    initialize(again, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_initialize_routers_leaves_the_rest():
    model = random_model(CONFIG)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    initialize_routers(model.blocks, torch.Generator().manual_seed(1), token_bias=2.0, width_bias=1.0)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "_rate." in name or "token_selection" in name}


def test_one_head_that_is_always_on():
    """`Linear(D, 0)`: no logit at all, and the one unit is on."""
    config = CONFIG.model_copy(update={"num_heads": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of initialising no elements
        model = random_model(config)
    x, t, y = random_inputs(config)
    recording = Recording(Masked(), config)
    model(x, t, y, recording)
    assert recording.decisions().units.shape == (3, 4) and (recording.decisions().units == 1).all()
