"""Export end to end: every kind of plan runs as the model does, and the bundle is what its manifest says."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from dydit.bundle.bundle import Bundle
from dydit.bundle.io_spec import token_mask_name
from dydit.bundle.manifest import PlanKind, Routing
from dydit.bundle.stored_weights import Precision
from dydit.diffusion.coefficients import sampling_run
from dydit.diffusion.process import Process
from dydit.diffusion.sampler_step import sampler_step
from dydit.diffusion.samplers import Sampler, SamplerConfig, Spacing
from dydit.errors import ConfigError, OutputError
from dydit.export.exporter import export, stale_reasons
from dydit.export.settings import ExportConfig
from dydit.models.architecture import WIDTH_ROUTER
from dydit.models.config import Routers, parse_config
from dydit.models.dit.config import DiTConfig
from dydit.models.macs import unit_costs
from dydit.models.routers import Masked, Recording, Static
from dydit.planning.masks import activity_order, freeze_masks
from dydit.planning.sizes import fixed_bytes, unit_bytes

# A sampler's own would let x drown what the model says: one step changes little.
COEFFICIENTS = (0.1, 1.0, 0.2, 0.3, 0.4, -0.5, 0.15, 0.9)
SCALE = 2.5
PLANS = {
    "per-step": {"plan": PlanKind.PER_STEP},
    "three": {"plan": PlanKind.MAX_SUBNETS, "max_subnets": 3},
    "one": {"plan": PlanKind.MAX_SUBNETS, "max_subnets": 1},
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def graph_of(bundle: Bundle, name: str) -> onnx.ModelProto:
    return onnx.load(bundle.path / name, load_external_data=False)


def run_every_step(bundle: Bundle, checkpoint, sessions, distance, full: bool = False) -> int:
    """Hold each step against the model; returns how many token decisions were compared."""
    open_session, run_session = sessions
    manifest, config = bundle.manifest, bundle.manifest.model
    model = checkpoint.model().double()
    conditioning = open_session(bundle.file("conditioning.onnx"))
    labels = np.array([1, 4, config.null_class, config.null_class])
    shape = (2, config.in_channels, config.input_size, config.input_size)
    rng, routed = np.random.default_rng(0), 0
    tokens = [token_mask_name(block) for block in range(config.depth)] if manifest.routing else []
    opened = {}
    for segment in manifest.plan.segments:
        entry = manifest.subnets[segment.subnet]
        if segment.subnet not in opened:
            opened[segment.subnet] = open_session(bundle.file(entry.full_file if full else entry.file), tokens)
        for step in segment.steps:
            t = manifest.sampling.timesteps[step]
            table = run_session(conditioning, {"timesteps": np.array([t], np.float32), "labels": labels})["condition"][
                0
            ]
            x, history, noise = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
            feeds = {"x": x, "history": history, "noise": noise, "condition": table, "gates": bundle.step_gates(step)}
            feeds |= {"coefficients": np.array(COEFFICIENTS, np.float32), "cfg_scale": np.array(SCALE, np.float32)}
            out = run_session(opened[segment.subnet], feeds)
            recording = Recording(Masked() if config.dynamic else Static(), config)
            rows = torch.tensor(x).double().repeat(2, 1, 1, 1)
            with torch.no_grad():
                out_of_model = model(rows, torch.full((4,), t), torch.tensor(labels), recording)
            known, drawn, row = (torch.tensor(feeds[name]).double() for name in ("history", "noise", "coefficients"))
            guided = manifest.sampling.cfg_channels
            expected = sampler_step(rows[:2], known, out_of_model, drawn, row, SCALE, guided)
            if tokens:
                decided = np.stack([out[name].reshape(4, -1) for name in tokens])
                np.testing.assert_array_equal(decided, recording.decisions().tokens.numpy() > 0)
                assert 0 < decided.mean() < 1
                routed += decided.size
            for name, values in zip(("x_prev", "next_history"), expected, strict=True):
                assert distance(out[name], values.numpy()) < 1e-5, f"step {step}"
    return routed


@pytest.mark.parametrize("routing", list(Routing))
@pytest.mark.parametrize("plan", PLANS)
def test_every_step_of_every_plan_is_the_models(make_bundle, make_checkpoint, sessions, distance, plan, routing):
    bundle = make_bundle(routing=routing, **PLANS[plan])
    assert run_every_step(bundle, make_checkpoint(), sessions, distance) == 12 * 3 * 4 * 16
    assert bundle.manifest.unit_order != bundle.manifest.model.units.every_unit, "units were reordered on the way"
    assert any(entry.gated for entry in bundle.manifest.subnets) == (plan != "per-step")


@pytest.mark.parametrize("routers", [Routers.ALL_ROUTED, Routers.NONE])
def test_other_models_run_too(make_bundle, make_checkpoint, small_config, sessions, distance, routers):
    checkpoint = make_checkpoint(small_config.model_copy(update={"routers": routers}), flops_ratio=0.3)
    bundle = make_bundle(checkpoint, plan=PlanKind.PER_STEP)
    run_every_step(bundle, checkpoint, sessions, distance)
    if routers is Routers.ALL_ROUTED:
        assert any(not slots for entry in bundle.manifest.subnets for block in entry.units for slots in block)
    else:
        assert bundle.manifest.routing is None and len(bundle.manifest.subnets) == 1
        assert bundle.manifest.plan.macs == bundle.manifest.plan.static_macs
        assert bundle.masks.all() and not any("router" in name for name in bundle.manifest.weights)


def test_plan_kinds(make_bundle, make_checkpoint):
    exact = make_bundle(plan=PlanKind.PER_STEP).manifest
    masks = exact.step_masks()
    changes = (masks[1:] != masks[:-1]).any(axis=1)
    assert [segment.first for segment in exact.plan.segments] == [0, *(np.flatnonzero(changes) + 1).tolist()]
    assert 3 < len(exact.plan.segments) <= 12
    assert (
        exact.plan.macs == exact.plan.per_step_macs == (masks * unit_costs(exact.model)).sum() < exact.plan.static_macs
    )
    costs = []
    for most in (1, 2, 3, 50):
        manifest = make_bundle(plan=PlanKind.MAX_SUBNETS, max_subnets=most).manifest
        assert len(manifest.subnets) <= len(manifest.plan.segments) <= most
        assert manifest.plan.kind is PlanKind.MAX_SUBNETS and manifest.plan.per_step_macs == exact.plan.macs
        union = 0.0
        for segment in manifest.plan.segments:
            steps = masks[segment.first : segment.first + segment.count]
            union += segment.count * (steps.any(0) * unit_costs(exact.model)).sum()
        assert manifest.plan.macs == pytest.approx(union)
        costs.append(manifest.plan.macs)
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1] == exact.plan.macs


def test_memory_budget(make_bundle, make_checkpoint):
    one = make_bundle(plan=PlanKind.MAX_SUBNETS, max_subnets=1).manifest.subnets[0].weight_bytes
    every = sum(entry.weight_bytes for entry in make_bundle(plan=PlanKind.PER_STEP).manifest.subnets)
    costs = []
    for budget in (one, 2 * one, 3 * one, every):
        manifest = make_bundle(plan=PlanKind.MEMORY_BUDGET, memory_budget=budget).manifest
        assert sum(entry.weight_bytes for entry in manifest.subnets) <= budget
        costs.append(manifest.plan.macs)
    assert costs == sorted(costs, reverse=True) and costs[-1] == manifest.plan.per_step_macs < costs[0]


def test_memory_budget_too_small(make_checkpoint, tmp_path):
    config = ExportConfig(steps=12, plan=PlanKind.MEMORY_BUDGET, memory_budget=1000)
    with pytest.raises(
        ConfigError, match=r"^memory budget 1000 bytes: the smallest plan needs \d+ bytes; raise the budget$"
    ):
        export(make_checkpoint(), tmp_path / "out", config)
    assert names(tmp_path) == []


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.INT8])
def test_weight_bytes_are_what_the_graph_reads(make_bundle, plan, precision):
    bundle = make_bundle(precision=precision, **PLANS[plan])
    for entry in bundle.manifest.subnets:
        windows = [t for t in graph_of(bundle, entry.file).graph.initializer if t.external_data]
        read = sum(int(each.value) for t in windows for each in t.external_data if each.key == "length")
        assert entry.weight_bytes == read


def test_unit_and_fixed_bytes_add_up_to_the_stored_step(make_bundle, small_config):
    for precision in (Precision.FP32, Precision.FP16, Precision.INT8):
        weights = make_bundle(precision=precision).manifest.weights
        step = sum(w.nbytes for name, w in weights.items() if not small_config.is_conditioning(name))
        assert unit_bytes(small_config, precision).sum() + fixed_bytes(small_config, precision) == step


def test_a_bundle_of_many_subnetworks_is_about_one_model(make_bundle, make_checkpoint):
    bundle, checkpoint = make_bundle(plan=PlanKind.PER_STEP), make_checkpoint()
    routers = sum(bundle.manifest.weights[name].nbytes // 4 for name in WIDTH_ROUTER)  # with a row for unit 0, too
    stored = sum(tensor.numel() for name, tensor in checkpoint.state.items() if "_rate." not in name) + 128 + routers
    entries = bundle.manifest.weights.values()
    assert sum(math.prod(entry.shape) for entry in entries) == stored, "every weight once"
    size = bundle.file("weights.bin").stat().st_size
    assert 4 * stored <= size < 4 * stored + 4096 * len(entries)
    graphs = [bundle.file(name).stat().st_size for name in bundle.manifest.files if name.endswith(".onnx")]
    assert len(graphs) > 4 and max(graphs) < 40_000


def test_manifest_lists_exactly_the_files(make_bundle):
    bundle = make_bundle()
    assert sorted([*bundle.manifest.files, "manifest.json"]) == names(bundle.path)
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in bundle.path.iterdir())
    Bundle.open(bundle.path)


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": Sampler.DDPM},
        {"sampler": Sampler.DDIM},
        {"sampler": Sampler.DDIM, "spacing": Spacing.TRAILING, "eta": 0.3},
        {"sampler": Sampler.DPM_SOLVER},
    ],
    ids=["ddpm", "ddim", "eta", "dpm-solver++"],
)
def test_manifest_describes_the_run(make_bundle, make_checkpoint, settings):
    manifest = make_bundle(**settings, steps=7, max_batch=5).manifest
    sampling, checkpoint = SamplerConfig(**settings, steps=7), make_checkpoint()
    times = sampling.times(Process())
    assert list(manifest.sampling.timesteps) == times.tolist() and manifest.sampling.steps == 7
    np.testing.assert_array_equal(
        np.array(manifest.sampling.coefficients, np.float32),
        sampling_run(Process(), sampling, True).coefficients.astype(np.float32),
    )
    assert manifest.sampling.config == sampling
    assert manifest.sampling.cfg_channels == 3 and manifest.max_batch == 5
    assert manifest.model == checkpoint.config and manifest.checkpoint_sha256 == checkpoint.sha256
    masks = freeze_masks(checkpoint.model(), times)
    assert manifest.unit_order == activity_order(masks, checkpoint.config.units)
    assert {"dydit", "onnx", "torch"} <= manifest.tools.keys()


def test_same_checkpoint_same_bytes(make_bundle, make_checkpoint, tmp_path):
    first = make_bundle(routing=Routing.CAPACITY, capacities=(9, 9, 9))
    config = ExportConfig(steps=12, max_subnets=4, routing=Routing.CAPACITY, capacities=(9, 9, 9))
    second = export(make_checkpoint(), tmp_path / "again", config)
    assert names(first.path) == names(second.path) and len(names(first.path)) > 6
    for name in names(first.path):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes(), name


class TestCapacity:
    def test_full_form_only_where_some_block_has_less(self, make_bundle):
        roomy = make_bundle(routing=Routing.CAPACITY).manifest
        assert all(entry.capacities == (16,) * 3 and entry.full_file is None for entry in roomy.subnets)
        same = make_bundle(routing=Routing.CAPACITY, capacities=(16, 16, 16)).manifest
        assert all(entry.full_file is None for entry in same.subnets)
        tight = make_bundle(routing=Routing.CAPACITY, capacities=(16, 2, 16)).manifest
        for index, entry in enumerate(tight.subnets):
            assert entry.capacities == (16, 2, 16) and entry.full_file == f"subnet-{index:04d}-full.onnx"
        assert all(entry.capacities is None for entry in make_bundle().manifest.subnets)

    def test_full_form_is_exact_and_the_tight_one_overflows(self, make_bundle, make_checkpoint, sessions, distance):
        bundle = make_bundle(routing=Routing.CAPACITY, capacities=(2, 2, 2))
        run_every_step(bundle, make_checkpoint(), sessions, distance, full=True)
        with pytest.raises(AssertionError):
            run_every_step(bundle, make_checkpoint(), sessions, distance)

    def test_a_static_model_has_no_tokens_to_route(self, make_bundle, make_checkpoint, small_config):
        checkpoint = make_checkpoint(small_config.without_routers())
        (entry,) = make_bundle(checkpoint, routing=Routing.CAPACITY, capacities=(2, 2, 2)).manifest.subnets
        assert entry.capacities is None and entry.full_file is None

    @pytest.mark.parametrize("capacities", [(16, 16), (0, 1, 1), (17, 1, 1), (1, 1, 1, 1)])
    def test_wrong_capacities(self, make_checkpoint, tmp_path, capacities):
        config = ExportConfig(steps=3, routing=Routing.CAPACITY, capacities=capacities)
        with pytest.raises(ConfigError, match=r"^capacities \(.*\): expected 3 numbers in 1..16$"):
            export(make_checkpoint(), tmp_path / "out", config)
        assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 1001}, "steps must be at most 1000"),
        ({"max_subnets": 0}, "max_subnets must be at least 1, not 0"),
        ({"plan": "memory-budget"}, "the plan memory-budget needs a memory budget, and no other plan takes one"),
        ({"memory_budget": 10}, "the plan memory-budget needs a memory budget, and no other plan takes one"),
        ({"capacities": (1,)}, "capacities can only be given with capacity routing"),
        ({"routing": "sparse"}, "routing must be 'dynamic', 'capacity' or 'dense'"),
        ({"sampler": "heun"}, "sampler must be 'ddpm', 'ddim', 'dpm-solver++', 'euler' or 'euler-maruyama'"),
        ({"spacing": "karras"}, "spacing must be 'linspace', 'leading' or 'trailing'"),
        ({"eta": 2}, "eta must be at most 1, not 2"),
        ({"max_batch": 0}, "max_batch must be at least 1, not 0"),
        ({"step": 5}, "step is not a known setting"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(ExportConfig, settings)
    assert message in str(caught.value)


def test_guidance_on_channels_that_are_not_there(make_checkpoint, tmp_path):
    with pytest.raises(ConfigError, match=r"^guidance on 5 channels: the model has only 4$"):
        export(make_checkpoint(), tmp_path / "out", ExportConfig(steps=3, cfg_channels=5))


def test_one_channel_models_are_guided_on_it(make_bundle, make_checkpoint, small_config):
    checkpoint = make_checkpoint(small_config.model_copy(update={"in_channels": 1}))
    assert make_bundle(checkpoint, steps=2).manifest.sampling.cfg_channels == 1
    assert make_bundle(steps=2, cfg_channels=4).manifest.sampling.cfg_channels == 4


def test_one_step(make_bundle, make_checkpoint, sessions, distance):
    bundle = make_bundle(steps=1)
    assert bundle.manifest.sampling.timesteps == (0,) and len(bundle.manifest.subnets) == 1
    run_every_step(bundle, make_checkpoint(), sessions, distance)


def test_what_exists_is_never_touched(make_checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(OutputError, match="exists already; choose another output or remove it first"):
        export(make_checkpoint(), out, ExportConfig(steps=3))
    assert names(tmp_path) == ["out"] and names(out) == ["mine"]


def test_failure_in_the_middle_leaves_nothing(make_checkpoint, tmp_path):
    def interrupt(done: int, total: int) -> None:
        assert [name for name in names(tmp_path) if name.endswith(".part")], "the temporary folder is beside the output"
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(make_checkpoint(), tmp_path / "out", ExportConfig(steps=12), interrupt)
    assert names(tmp_path) == []


def test_progress_counts_to_its_end(make_checkpoint, tmp_path):
    calls: list[tuple[int, int]] = []
    bundle = export(make_checkpoint(), tmp_path / "out", ExportConfig(steps=12), lambda *call: calls.append(call))
    total = len(bundle.manifest.plan.segments)
    assert calls == [(done, total) for done in range(1, total + 1)]


def test_stale_reasons(make_bundle, make_checkpoint, small_config):
    manifest = make_bundle().manifest
    assert stale_reasons(manifest, make_checkpoint()) == []
    other = make_checkpoint(seed=1)
    assert stale_reasons(manifest, other) == [
        f"the weights changed: the bundle was not exported from {other.path} as it is now"
    ]
    wider = make_checkpoint(DiTConfig.model_validate({**small_config.model_dump(), "depth": 2}))
    assert stale_reasons(manifest, wider)[1:] == ["the architecture differs"]


def test_a_tile_without_a_decoder_is_refused():
    with pytest.raises(ConfigError, match="a tile, scale or shift can only be given with a VAE decoder"):
        parse_config(ExportConfig, {"vae_tile": 8})


def test_a_decoder_changes_nothing_else_in_the_bundle(make_bundle, vae_bundle, vae_settings, autoencoder):
    plain = make_bundle(**vae_settings)
    assert names(vae_bundle.path) == sorted([*names(plain.path), "vae_decoder.onnx", "vae_weights.bin"])
    for name, entry in plain.manifest.files.items():
        assert vae_bundle.manifest.files[name] == entry, name
    vae = vae_bundle.manifest.vae
    assert (vae.source, vae.latent_channels, vae.tile, vae.upscale) == (str(autoencoder.folder), 4, 8, 2)
