"""The sliced form is the masked model: same function, narrow matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.diffusion.coefficients import COEFFICIENTS, sampling_run
from dydit.diffusion.process import TRAIN_STEPS, Process
from dydit.diffusion.sampler_step import sampler_step
from dydit.diffusion.samplers import SamplerConfig
from dydit.models.config import ModelConfig, Routers
from dydit.models.dit.config import DiTConfig
from dydit.models.dit.layout import stored_tensors
from dydit.models.dit.model import DiT
from dydit.models.dit.sliced import SlicedDiT, conditioning
from dydit.models.pointwise import fused
from dydit.models.routers import Masked, Recording, Static

pytestmark = pytest.mark.numerics

CONFIG = DiTConfig(hidden_size=64, depth=3, num_heads=4, patch_size=2, input_size=8, in_channels=4, num_classes=7)
VARIANTS = [
    CONFIG,
    CONFIG.model_copy(update={"routers": Routers.ALL_ROUTED}),
    CONFIG.model_copy(update={"learn_sigma": False, "in_channels": 3}),
    CONFIG.model_copy(update={"routers": Routers.NONE}),
]


def random_model(config: ModelConfig, seed: int = 0) -> DiT:
    """Float64, random in every weight, with values that f32 holds exactly; gates are about half open."""
    model = DiT(config).double()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = 0.3 if name.endswith("bias") else parameter.shape[-1] ** -0.5
        if name != "pos_embed":
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
        parameter.data = parameter.data.float().double()
    return model.requires_grad_(False)


def width_mask(model: DiT, t: int) -> np.ndarray:
    """Units that are on at timestep t, bool [U]."""
    config = model.config
    if not config.dynamic:
        return np.ones(config.units.size, bool)
    t_emb = model.t_embedder(torch.tensor([t]))
    routers = [router for block in model.blocks for router in (block.attn_rate, block.mlp_rate)]
    return np.concatenate([(router(t_emb) > 0)[0].numpy() for router in routers])


class Step:
    """Random inputs of one step, in float64, for three images: DDPM's step, and a history beside it."""

    def __init__(self, model: DiT, t: int = 500, guided: bool = True, seed: int = 1):
        config, generator = model.config, torch.Generator().manual_seed(seed)
        self.shape = (3, config.in_channels, config.input_size, config.input_size)
        self.x, self.noise, self.history = (
            torch.randn(self.shape, generator=generator, dtype=torch.float64) for _ in range(3)
        )
        self.labels = torch.tensor([2, 6, 2] + [config.null_class] * 3 * guided)
        self.t, self.scale = t, 3.5
        self.weights = double_weights(model)
        run = sampling_run(Process(), SamplerConfig(steps=TRAIN_STEPS), config.learn_sigma)
        self.coefficients = run.coefficients[TRAIN_STEPS - 1 - t]
        for name, value in (("history", -0.3), ("history_of_x", 1.2), ("history_of_out", -0.7)):
            self.coefficients[COEFFICIENTS.index(name)] = value
        table = conditioning(config, self.weights, torch.tensor([t]), torch.arange(config.num_classes + 1))
        self.modulation = table[0, self.labels]

    def inputs(self) -> tuple[torch.Tensor, ...]:
        tensors = (torch.tensor(self.coefficients), torch.tensor(self.scale, dtype=torch.float64))
        return (self.x, self.history, self.noise, *tensors, self.modulation)

    def expected(self, model: DiT, cfg_channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x_prev, next_history and token decisions [L, R, N] by the masked model."""
        rows = len(self.labels)
        recording = Recording(Masked() if model.config.dynamic else Static(), model.config)
        out = model(self.x.repeat(rows // 3, 1, 1, 1), torch.full((rows,), self.t), self.labels, recording)
        row = torch.from_numpy(self.coefficients)
        state = sampler_step(self.x, self.history, out, self.noise, row, self.scale, cfg_channels)
        return *state, recording.decisions().tokens.bool()


def double_weights(model: DiT) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in stored_tensors(model.state_dict(), model.config)}


@pytest.fixture(params=range(len(VARIANTS)), ids=["first-on", "all-routed", "no-sigma", "static"])
def model(request) -> DiT:
    return random_model(VARIANTS[request.param])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("t", [0, 500, 999])
def test_sliced_equals_masked(model, t, guided):
    mask = width_mask(model, t)
    step = Step(model, t, guided)
    sliced = SlicedDiT(model.config, step.weights, model.config.units.slots(mask), cfg_channels=3)
    out = sliced.step(*step.inputs(), debug=True)
    x_prev, next_history, tokens = step.expected(model, 3)
    if model.config.dynamic:
        assert 0 < mask.mean() < 1 and 0 < tokens.float().mean() < 1
    assert torch.equal(out.tokens, tokens)
    assert relative(out.x_prev, x_prev) < 1e-12
    assert relative(out.next_history, next_history) < 1e-12
    assert out.overflow.tolist() == [0] * model.config.depth


def test_guidance_acts_on_the_asked_channels_only(model):
    step = Step(model)
    slots = model.config.units.slots(width_mask(model, step.t))
    results = {}
    for channels in (1, model.config.in_channels):
        out = SlicedDiT(model.config, step.weights, slots, channels).step(*step.inputs()).x_prev
        assert relative(out, step.expected(model, channels)[0]) < 1e-12
        results[channels] = out
    assert torch.equal(results[1][:, :1], results[model.config.in_channels][:, :1])
    assert not torch.allclose(results[1][:, 1:], results[model.config.in_channels][:, 1:])


def test_union_with_gates_equals_the_narrow_subnetwork(model):
    """The union over two timesteps: heads and groups of a block are different slots, and not all of them."""
    step, config = Step(model), model.config
    mask, axis = width_mask(model, step.t), config.units
    both = mask | width_mask(model, 100)
    gates = torch.tensor(mask, dtype=torch.float64)
    union = SlicedDiT(config, step.weights, axis.slots(both), 3)
    if config.dynamic:
        assert any(heads != groups for heads, groups in axis.slots(both)) and not both.all()
        assert all(axis.shares(both != mask).values()), "a head and a group at least are gated"
    narrow = SlicedDiT(config, step.weights, axis.slots(mask), 3)
    gated = union.step(*step.inputs(), gates=gates).x_prev
    assert relative(gated, narrow.step(*step.inputs()).x_prev) < 1e-12
    if config.dynamic:
        assert relative(union.step(*step.inputs()).x_prev, gated) > 1e-4


def test_empty_slot_sets_leave_the_biases(model):
    """Nothing on: attention adds gate1*proj.bias to every token, the MLP gate2*fc2.bias to the routed ones."""
    step, config = Step(model), model.config
    empty = config.units.slots(np.zeros(config.units.size, bool))
    none = SlicedDiT(config, step.weights, empty, 3).step(*step.inputs(), debug=True)
    gates = torch.zeros(config.units.size, dtype=torch.float64)
    closed = SlicedDiT(config, step.weights, config.units.every_unit, 3).step(*step.inputs(), gates=gates, debug=True)
    assert torch.equal(none.tokens, closed.tokens)
    assert relative(none.residuals, closed.residuals) < 1e-13
    gate, bias = step.modulation[:, 2, None], step.weights["blocks.0.proj.bias"]
    after = none.residuals[0] - torch.where(
        none.tokens[0, ..., None], step.modulation[:, 5, None] * step.weights["blocks.0.fc2.bias"], 0
    )
    patches = torch.nn.functional.unfold(step.x, 2, stride=2).transpose(1, 2)
    stream = patches @ step.weights["embed.weight"] + step.weights["embed.bias"] + step.weights["pos_embed"]
    assert relative(after, stream.repeat(2, 1, 1) + gate * bias) < 1e-13


def test_overflowing_tokens_keep_their_residual_and_are_counted():
    model = random_model(CONFIG)
    step = Step(model)
    slots = CONFIG.units.slots(width_mask(model, step.t))
    full = SlicedDiT(CONFIG, step.weights, slots, 3).step(*step.inputs(), debug=True)
    capacities = [3, CONFIG.tokens, CONFIG.tokens]
    tight = SlicedDiT(CONFIG, step.weights, slots, 3, capacities).step(*step.inputs(), debug=True)
    routed = int(full.tokens[0].sum())
    assert routed > 3 * 6
    assert tight.overflow.tolist() == [routed - 3 * 6, 0, 0]
    assert torch.equal(tight.tokens[0], full.tokens[0]), "decisions of the block itself do not depend on its capacity"
    served = full.tokens[0].flatten().nonzero()[: 3 * 6, 0]
    dropped = full.tokens[0].flatten().nonzero()[3 * 6 :, 0]
    a, b = tight.residuals[0].flatten(0, 1), full.residuals[0].flatten(0, 1)
    assert torch.equal(a[served], b[served]) or relative(a[served], b[served]) < 1e-13
    assert (a[dropped] - b[dropped]).abs().amax(1).min() > 1e-6
    roomy = SlicedDiT(CONFIG, step.weights, slots, 3, [CONFIG.tokens] * 3).step(*step.inputs())
    assert torch.equal(roomy.x_prev, full.x_prev)


def test_no_token_routed_at_all():
    model = random_model(CONFIG)
    for block in model.blocks:
        block.token_selection.mlp_head[2].bias.data.fill_(-1e3)
    step = Step(model)
    slots = CONFIG.units.slots(width_mask(model, step.t))
    out = SlicedDiT(CONFIG, step.weights, slots, 3).step(*step.inputs(), debug=True)
    assert not out.tokens.any()
    assert relative(out.x_prev, step.expected(model, 3)[0]) < 1e-12


def test_conditioning_is_what_the_blocks_compute(model):
    config, timesteps, labels = model.config, torch.tensor([0, 17, 999]), torch.tensor([3, model.config.null_class, 3])
    table = conditioning(config, double_weights(model), timesteps, labels)
    assert table.shape == (3, 3, 6 * config.depth + 2, config.hidden_size)
    for i, t in enumerate(timesteps):
        c = model.t_embedder(t[None]) + model.y_embedder(labels)
        for index, block in enumerate(model.blocks):
            expected = torch.stack(block.adaLN_modulation(c).chunk(6, -1), 1)
            expected[:, [1, 4]] += 1
            assert relative(table[i, :, 6 * index : 6 * index + 6], expected) < 1e-12
        expected = torch.stack(model.final_layer.adaLN_modulation(c).chunk(2, -1), 1)
        expected[:, 1] += 1
        assert relative(table[i, :, -2:], expected) < 1e-12


def test_from_model_and_float32(model):
    """The route without a bundle, at the precision that runs: one step within 1e-5 of the masked model."""
    model = model.float()
    double = random_model(model.config)
    step = Step(double)
    slots = model.config.units.slots(width_mask(model, step.t))
    out = SlicedDiT(model.config, dict(stored_tensors(model.state_dict(), model.config)), slots, 3).step(
        *(t.float() for t in step.inputs())
    )
    assert out.x_prev.dtype == torch.float32
    assert relative(out.x_prev.double(), step.expected(double, 3)[0]) < 1e-5


def test_consecutive_slots_share_memory_with_the_stored_weights():
    step = Step(random_model(CONFIG))
    sliced = SlicedDiT(CONFIG, step.weights, (((0, 1), (0,)), ((1, 2, 3), (0,)), ((0, 2), (0,))), 3)
    stored = [step.weights[f"blocks.{i}.qkv.weight"] for i in range(3)]
    cut = [block.layers["qkv"][0] for block in sliced.blocks]
    pointers = [
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for a, b in zip(cut, stored, strict=True)
    ]
    assert pointers == [True, True, False]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([0, 500, 999]),
    st.booleans(),
    st.none() | st.lists(st.integers(1, CONFIG.tokens), min_size=3, max_size=3),
    st.sampled_from([-1e3, -0.5, 0.0, 0.5, 1e3]),
    st.sets(st.integers(0, 23)),
)
def test_fixed_shapes_change_no_value_no_decision_and_no_count(t, guided, capacities, bias, off):
    """`off`: units that are off; parts may be empty. `bias`: no token is routed, some are, or all."""
    model = random_model(CONFIG)
    for block in model.blocks:
        block.token_selection.mlp_head[2].bias.data += bias
    step, mask = Step(model, t, guided), width_mask(model, t)
    mask[list(off)] = False
    ways = (CONFIG, step.weights, CONFIG.units.slots(mask), 3, capacities)
    gathered = SlicedDiT(*ways).step(*step.inputs(), debug=True)
    fixed = SlicedDiT(*ways).with_fixed_shapes().step(*step.inputs(), debug=True)
    assert torch.equal(fixed.tokens, gathered.tokens) and torch.equal(fixed.overflow, gathered.overflow)
    assert relative(fixed.residuals, gathered.residuals) < 1e-12
    assert relative(fixed.x_prev, gathered.x_prev) < 1e-12


@pytest.mark.parametrize("capacities", [None, [3, 9, 16]])
def test_functions_between_products_can_be_compiled(capacities):
    """Traced without a break, and without a fused kernel, which needs a compiler: the values stay, also in fp16."""
    model = random_model(CONFIG)
    step, slots = Step(model), CONFIG.units.slots(width_mask(model, 500))
    single = {name: tensor.float() for name, tensor in step.weights.items()}
    low = {
        name: each.half() if name in (*CONFIG.units.weights, *CONFIG.units.biases) else each
        for name, each in single.items()
    }
    inputs, gates = [each.float() for each in step.inputs()], torch.ones(CONFIG.units.size)
    for weights, bound in ((single, 1e-5), (low, 1e-2)):
        ways = (CONFIG, weights, slots, 3, capacities)
        plain = SlicedDiT(*ways).with_fixed_shapes().step(*inputs, gates=gates)
        traced = SlicedDiT(*ways).with_fixed_shapes(fused("eager", whole=True)).step(*inputs, gates=gates)
        assert relative(traced.x_prev, plain.x_prev) < bound
        assert torch.equal(traced.overflow, plain.overflow)


def test_tokens_without_a_slot_keep_their_residual_bit_for_bit_with_fixed_shapes():
    model = random_model(CONFIG)
    step = Step(model)
    slots = CONFIG.units.slots(width_mask(model, step.t))
    tight = SlicedDiT(CONFIG, step.weights, slots, 3, [3] * 3).with_fixed_shapes().step(*step.inputs(), debug=True)
    # The first block's MLP off: only the bias of fc2 is added, to all routed tokens.
    without = {**step.weights, "blocks.0.fc2.bias": torch.zeros(64, dtype=torch.float64)}
    none = (slots[0][0], ()), *slots[1:]
    before = SlicedDiT(CONFIG, without, none, 3).with_fixed_shapes().step(*step.inputs(), debug=True).residuals[0]
    dropped = tight.tokens[0].flatten().nonzero()[3 * 6 :, 0]
    assert len(dropped) == tight.overflow[0] > 0
    assert torch.equal(tight.residuals[0].flatten(0, 1)[dropped], before.flatten(0, 1)[dropped])
