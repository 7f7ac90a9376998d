"""The U-ViT against a NumPy reference written from its definition, and the facts of its parts."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from dydit.diffusion.process import NoiseSchedule, Process
from dydit.errors import ConfigError
from dydit.models.config import Routers
from dydit.models.macs import flops_ratio, static_macs
from dydit.models.registry import architecture_of
from dydit.models.routers import Masked, Recording, Static
from dydit.models.synthetic import recorded_pass, synthetic_model
from dydit.models.transformer.importance import rank_and_permute
from dydit.models.uvit.config import PRESETS, UViTConfig, preset
from dydit.models.uvit.model import UViT, initialize
from dydit.models.uvit.states import state_shapes
from dydit.runtime.pipeline import DyDiTPipeline
from tests.fixtures.packages import OPENVINO
from tests.fixtures.uvit_reference import Reference, reverse_sde

pytestmark = pytest.mark.numerics

CONFIG = UViTConfig(
    hidden_size=48,
    depth=5,
    num_heads=3,
    patch_size=2,
    input_size=8,
    in_channels=3,
    num_classes=5,
    null_class_row=True,
)
UNCONDITIONAL = {"num_classes": 0, "null_class_row": False}
DISCRETE = {"process": Process(schedule=NoiseSchedule.SCALED_LINEAR)}
STATIC = {"routers": Routers.NONE}
TIMES = [0.999, 480.0, 999.0]
DISCRETE_TIMES = [0.0, 479.0, 999.0]


def changed(**changes: Any) -> UViTConfig:
    return UViTConfig.model_validate({**dict(CONFIG), **changes})


def relative(found: Any, expected: np.ndarray) -> float:
    """Relative L2 distance."""
    return float(np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected))


def inputs(config: UViTConfig, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, generator=seeded(9))
    times = DISCRETE_TIMES if config.diffusion.discrete else TIMES
    labels = torch.tensor([0, config.classes.rows - 1, config.classes.rows // 2])
    return x, torch.tensor(times)[:batch], labels[:batch]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


OPTIONAL = [dict(zip(("mlp_time_embed", "conv", "skip"), on, strict=True)) for on in product((False, True), repeat=3)]


@pytest.mark.parametrize("parts", OPTIONAL, ids=lambda parts: "+".join(name for name in parts if parts[name]) or "bare")
@pytest.mark.parametrize("process", [{}, DISCRETE], ids=["vp-sde", "discrete"])
@pytest.mark.parametrize("classes", [{}, UNCONDITIONAL], ids=["classes", "unconditional"])
def test_is_the_reference_with_everything_on(parts, process, classes):
    """Of a static model; of a dynamic one, whose routers are ignored; and of one whose routers open every gate."""
    dynamic = changed(**parts, **process, **classes)
    model = synthetic_model(dynamic, 3)
    x, t, y = inputs(dynamic)
    network_times = t.double().numpy() + (1 if process else 0)
    expected = Reference(dynamic, model.state_dict(), routed=False)(x.double().numpy(), network_times, y.numpy())
    static = UViT(dynamic.without_routers())
    static.load_state_dict({name: model.state_dict()[name] for name in static.state_dict()})
    with torch.no_grad():
        assert relative(model(x, t, y, Static()), expected) < 1e-5
        assert relative(static(x, t, y), expected) < 1e-5
        assert relative(model(x, t, y), expected) > 0.01
        architecture_of(dynamic).initialize_routers(model, seeded(0), 35.0, 15.0)
        assert relative(model(x, t, y), expected) < 1e-5


@pytest.mark.parametrize("routers", [Routers.FIRST_ON, Routers.ALL_ROUTED])
@pytest.mark.parametrize("heads", [3, 4])
@pytest.mark.parametrize("changes", [{}, UNCONDITIONAL | DISCRETE])
def test_routers_decide_as_in_the_reference(heads, routers, changes):
    config = changed(num_heads=heads, routers=routers, **changes)
    model = synthetic_model(config, 1).double()
    x, t, y = inputs(config)
    out, recording = recorded_pass(model, x.double(), t, y)
    decisions, kept = recording.decisions(), []
    for image in range(3):
        reference = Reference(config, model.state_dict())
        time = float(t[image]) + (1 if config.diffusion.discrete else 0)
        expected = reference.run(x[image].double().numpy(), time, int(y[image]))
        assert relative(out[image], expected) < 1e-5
        slots = config.units.slots(decisions.units[image].numpy())
        assert slots == tuple(zip(map(tuple, reference.heads), map(tuple, reference.groups), strict=True))
        assert np.array_equal(decisions.tokens[:, image].bool().numpy(), np.array(reference.tokens))
        kept.append(reference)
    on = [len(units) for each in kept for units in (*each.heads, *each.groups)]
    tokens = np.array([each.tokens for each in kept])
    assert 0 < sum(on) < len(on) * heads
    extra = config.extra_tokens
    assert tokens[..., :extra].all() and 0 < tokens[..., extra:].mean() < 1
    rows = heads - (routers is Routers.FIRST_ON)
    assert model.mid_block.attn_rate.router.weight.shape == (rows, 48)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch", OPENVINO])
@pytest.mark.parametrize(("classes", "guidance"), [({}, 0.4), ({}, 0.0), (UNCONDITIONAL, 0.0)])
def test_the_pipeline_walks_the_reverse_sde(make_checkpoint, make_bundle, backend, classes, guidance):
    """As the published program does, whose guidance s is our scale 1 + s, on all channels."""
    config = changed(**classes)
    checkpoint = make_checkpoint(config)
    bundle = make_bundle(checkpoint)
    rng, labels = np.random.default_rng(4), np.array([0, 4, 2]) * bool(config.num_classes)
    latents, noise = (rng.standard_normal((*shape, 3, 8, 8), np.float32) for shape in ((3,), (12, 3)))
    with DyDiTPipeline.from_bundle(bundle.path, backend, threads=1) as pipe:
        found = pipe(labels, 1 + guidance, latents=latents, noise=noise, output_type="latent").latents
    reference = Reference(config, checkpoint.state)
    expected = reverse_sde(reference, latents, labels, noise, guidance, config.null_class)
    assert relative(found, expected) < 1e-4
    assert 0 < np.mean([each[config.extra_tokens :].mean() for each in reference.tokens]) < 1


@pytest.mark.parametrize(
    ("name", "parameters", "keys", "of_all_tokens"),  # multiply-adds of the blocks, in G
    [
        ("cifar10-S/2", 44_255_328, 164, 11.389),
        ("celeba64-S/4", 44_292_228, 164, 11.389),
        ("imagenet64-M/4", 130_940_292, 213, 32.78),
        ("imagenet64-L/4", 286_827_652, 261, 71.04),
        ("imagenet256-L/2", 286_763_172, 261, 71.04),
        ("imagenet256-H/2", 500_832_016, 355, 123.6),
    ],
)
def test_published_sizes(name, parameters, keys, of_all_tokens):
    config = preset(name, routers=Routers.NONE)
    with torch.device("meta"):
        state = UViT(config).state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == parameters and len(state) == keys
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == state_shapes(config)
    d = config.hidden_size
    everything, patches = (config.depth * (12 * n * d**2 + 2 * n**2 * d) for n in (config.tokens, 256))
    assert everything / 1e9 == pytest.approx(of_all_tokens, rel=4e-4)
    assert config.macs == static_macs(config) == patches
    assert config.diffusion.discrete == ("H/" in name)


def test_presets():
    assert all(preset(name).dynamic for name in PRESETS)
    assert preset("cifar10-S/2").macs == 11_341_398_016
    with pytest.raises(ConfigError, match="unknown preset 'S/2'; expected one of: cifar10-S/2, "):
        preset("S/2")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 4}, "an odd number of blocks"),
        ({"hidden_size": 45}, "not a multiple of 2"),
        ({"num_classes": 0}, "an unconditional model has no class table"),
        ({"learn_sigma": True}, "learn_sigma"),
        ({"num_heads": 5}, "not a multiple of num_heads"),
    ],
)
def test_sizes_that_no_u_vit_has_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        changed(**changes)


VARIANTS = [{}, STATIC, UNCONDITIONAL, UNCONDITIONAL | STATIC, {"skip": False}, {"conv": False, "mlp_time_embed": True}]


@pytest.mark.parametrize("changes", VARIANTS)
def test_what_is_stored_has_the_stored_shapes(changes):
    config = changed(**changes)
    model, architecture = synthetic_model(config), architecture_of(config)
    stored = dict(architecture.stored_tensors(model.state_dict(), config))
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == config.stored_shapes()
    weights = sum(tensor.numel() for name, tensor in stored.items() if name not in config.derived)
    always_on = 2 * config.depth * (config.hidden_size + 1) * config.dynamic  # a row for unit 0, which has no logit
    assert weights == sum(each.numel() for each in model.parameters()) + always_on
    assert not any(stored[f"blocks.{block}.qkv.bias"].any() for block in range(config.depth))


@pytest.mark.parametrize("changes", [{}, DISCRETE, {"mlp_time_embed": True}])
def test_the_embedding_of_times_is_the_same_in_numpy(changes):
    config = changed(**changes)
    model, architecture = synthetic_model(config), architecture_of(config)
    stored = architecture.stored_tensors(model.state_dict(), config)
    weights = {name: tensor.numpy() for name, tensor in stored}
    times = np.array([0, 3, 480, 999], np.float64)
    with torch.no_grad():
        expected = model.embed_timestep(torch.from_numpy(times))
        assert relative(expected, architecture.timestep_embedding(config, weights, times)) < 1e-5


def test_the_order_of_importance_leaves_the_function_alone():
    config = changed(**STATIC)
    model, permuted = synthetic_model(config).double(), UViT(config).double()
    permuted.load_state_dict(rank_and_permute(model.state_dict(), config))
    x, t, y = inputs(config)
    with torch.no_grad():
        expected = model(x.double(), t, y)
        assert relative(permuted(x.double(), t, y), expected.numpy()) < 1e-12
    moved = {
        name.rpartition("attn.")[2].rpartition("mlp.")[2]
        for name, value in model.state_dict().items()
        if not value.equal(permuted.state_dict()[name])
    }
    assert moved == {"qkv.weight", "proj.weight", "fc1.weight", "fc1.bias", "fc2.weight"}


def test_initialisation_opens_every_gate():
    model = UViT(CONFIG)
    initialize(model, seeded(0))
    recording = Recording(Masked(), CONFIG)
    with torch.no_grad():
        out = model(*inputs(CONFIG), recording)
    assert torch.isfinite(out).all() and out.std() > 0
    decisions = recording.decisions()
    assert decisions.units.all() and decisions.tokens.all()
    assert model.mid_block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("changes", [{}, UNCONDITIONAL | DISCRETE])
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_a_synthetic_model_has_its_flops_ratio(ratio, changes):
    config = changed(hidden_size=128, num_heads=8, input_size=16, **changes)
    model, ratios = synthetic_model(config, 1, ratio), []
    for time in np.linspace(0, 999, 12).round():
        x = torch.randn(2, 3, 16, 16, generator=seeded(int(time)))
        _, recording = recorded_pass(model, x, torch.full((2,), time), torch.zeros(2, dtype=torch.int64))
        decisions = recording.decisions()
        counts = config.units.counts(decisions.units.numpy() > 0)
        ratios.append(flops_ratio(config, counts, decisions.tokens.mean(-1).T.numpy()).mean())
    assert np.mean(ratios) == pytest.approx(ratio, abs=0.04)


@pytest.mark.parametrize("share", [0.25, 0.6])
@pytest.mark.parametrize("changes", [{}, UNCONDITIONAL | {"skip": False}])
def test_exactly_a_share_of_tokens_is_routed(share, changes):
    config = changed(**changes)
    model = synthetic_model(config)
    state = model.state_dict()
    architecture_of(config).route_share(state, config, share)
    model.load_state_dict(state)
    _, recording = recorded_pass(model, *inputs(config))
    counts = recording.decisions().tokens.sum(-1)
    assert (counts == round(share * config.tokens)).all()


def test_the_output_depends_on_everything():
    model = synthetic_model(CONFIG)
    x, t, y = inputs(CONFIG, 1)
    with torch.no_grad():
        base = model(x, t, y)
        assert 0.05 < base.std() < 20
        for other in (model(x + 0.1, t, y), model(x, t + 300, y), model(x, t, y + 1)):
            assert relative(other, base.numpy()) > 1e-3
