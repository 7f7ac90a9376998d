"""What inspect says of a bundle or a checkpoint is what is in it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from dydit.bundle.manifest import MANIFEST, PlanKind, Routing
from dydit.bundle.measurements import GroupTimes, Measured, StepTimes
from dydit.bundle.stored_weights import Precision
from dydit.errors import BundleError, CheckpointError
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.inspection.inspect import inspect, inspect_bundle, inspect_checkpoint
from dydit.models.config import Routers
from dydit.models.macs import unit_costs
from dydit.reports.inspection_facts import BundleFacts, CheckpointFacts, routing_text


@pytest.fixture(scope="module")
def static(make_checkpoint, small_config):
    return make_checkpoint(small_config.without_routers())


def test_facts_of_a_bundle(make_bundle, make_checkpoint):
    bundle, checkpoint = make_bundle(), make_checkpoint()
    found = inspect_bundle(bundle.path)
    facts, manifest = found.facts, bundle.manifest
    plan = manifest.plan
    assert facts.model.parameters == sum(tensor.numel() for tensor in checkpoint.state.values())
    assert facts.model.static_macs == manifest.model.macs
    assert facts.width.flops_ratio == pytest.approx(plan.per_step_macs / plan.static_macs)
    assert facts.width.distinct_masks == len(set(manifest.masks)) and 0 < facts.width.toggling_units < facts.width.units
    assert facts.chosen.macs == plan.macs and facts.chosen.subnets == len(manifest.subnets)
    assert facts.chosen.segments == len(plan.segments)
    assert facts.chosen.versus_exact == pytest.approx(plan.macs / plan.per_step_macs)
    assert facts.bundle_bytes == sum(f.stat().st_size for f in bundle.path.rglob("*"))
    assert np.array_equal(found.masks, manifest.checkpoint_masks()) and found.timesteps == manifest.sampling.timesteps
    assert sum(subnet.steps for subnet in facts.subnets) == 12
    for subnet, entry in zip(facts.subnets, manifest.subnets, strict=True):
        assert (
            subnet.units["heads"] == sum(len(heads) for heads, _ in entry.units)
            and subnet.weight_bytes == entry.weight_bytes
        )


def test_the_plan_table_falls_in_cost_from_everything_to_the_exact_masks(make_bundle):
    facts = inspect_bundle(make_bundle().path).facts
    counts = [row.segments for row in facts.plans]
    costs = [row.macs for row in facts.plans]
    assert counts[0] == 1 and counts == sorted(set(counts)) and costs == sorted(costs, reverse=True)
    assert facts.plans[-1].versus_exact == 1 and facts.plans[0].versus_static <= 1
    assert min(costs) <= facts.chosen.macs <= max(costs)
    dense = facts.dense_bytes
    assert all(0 < subnet.weight_bytes <= dense for subnet in facts.subnets)
    row = next(row for row in facts.plans if row.segments == facts.chosen.segments)
    assert (row.macs, row.weight_bytes) == (pytest.approx(facts.chosen.macs), facts.chosen.weight_bytes)


@pytest.mark.parametrize(
    "settings", [{"plan": PlanKind.PER_STEP}, {"routing": Routing.CAPACITY, "capacities": (3, 5, 9)}]
)
def test_other_bundles(make_bundle, settings):
    found = inspect_bundle(make_bundle(**settings).path)
    assert found.facts.plan_kind == settings.get("plan", PlanKind.MAX_SUBNETS)
    if "plan" in settings:
        assert found.facts.chosen.versus_exact == 1
    assert set(found.pictures()) == {"masks.png", "plan.png"}


def test_token_slots_are_shown_by_segment(make_bundle):
    found = inspect_bundle(make_bundle(routing=Routing.CAPACITY, capacities=(3, 5, 9)).path)
    assert all(segment.slots == (3, 5, 9) for segment in found.facts.segments)
    lines = found.text().splitlines()
    (routing,) = (line for line in lines if line.startswith("routing"))
    assert "3 to 9 slots for 16 tokens, on average 35.4% of the tokens" in routing
    (head,) = (index for index, line in enumerate(lines) if line.endswith("slots: min  mean  max  of the tokens"))
    assert lines[head + 1].split()[-4:] == ["3", "5.7", "9", "35.4%"]
    every = inspect_bundle(make_bundle(routing=Routing.CAPACITY).path)
    assert "a slot for each of the 16 tokens, so routing saves nothing" in every.text()
    for routing in (Routing.DYNAMIC, Routing.DENSE):
        assert "slot" not in inspect_bundle(make_bundle(routing=routing).path).text()


def test_blocks_without_an_mlp_need_no_slots(make_bundle):
    facts = inspect_bundle(make_bundle(routing=Routing.CAPACITY, capacities=(3, 5, 9)).path).facts
    segment = facts.segments[0].model_copy(update={"blocks_with_mlp": (False, True, False)})
    assert segment.computed_slots == (5,)
    nothing = segment.model_copy(update={"blocks_with_mlp": (False,) * 3})
    assert routing_text(facts.model_copy(update={"segments": (nothing,)})) == "capacity: no block has an MLP"


def test_a_bundle_of_dynamic_width_holds_one_model_for_all_widths(make_bundle):
    facts = inspect_bundle(make_bundle(plan=PlanKind.DYNAMIC_WIDTH).path).facts
    exact = inspect_bundle(make_bundle(plan=PlanKind.PER_STEP).path).facts
    assert facts.chosen.versus_exact == 1 and facts.chosen.subnets == exact.chosen.subnets > 4
    assert facts.chosen.weight_bytes == facts.dense_bytes < exact.chosen.weight_bytes
    text = inspect_bundle(make_bundle(plan=PlanKind.DYNAMIC_WIDTH).path).text()
    assert f"one graph of {facts.chosen.subnets} widths" in text


def test_half_precision_is_half_the_bytes_of_the_units(make_bundle):
    single = inspect_bundle(make_bundle().path).facts
    half = inspect_bundle(make_bundle(precision=Precision.FP16).path).facts
    assert half.model.parameters == single.model.parameters
    assert half.stored_bytes < single.stored_bytes and half.dense_bytes < single.dense_bytes


def test_a_checkpoint_and_its_bundle_agree(make_bundle, make_checkpoint):
    checkpoint = make_checkpoint()
    ours = inspect_checkpoint(checkpoint.path, steps=12)
    bundle = inspect_bundle(make_bundle().path)
    assert np.array_equal(ours.masks, bundle.masks) and ours.facts.width == bundle.facts.width
    assert ours.facts.plans == bundle.facts.plans and ours.facts.model == bundle.facts.model
    assert ours.facts.model.parameters == sum(tensor.numel() for tensor in checkpoint.state.values())
    assert 0 < ours.facts.model.router_parameters < ours.facts.model.parameters
    assert set(ours.pictures()) == {"masks.png"}
    assert ours.facts.file_bytes == checkpoint.path.stat().st_size and ours.facts.sha256 == checkpoint.sha256


def test_a_static_model_has_no_routers_to_show(static, make_bundle):
    for found in (inspect_checkpoint(static.path, steps=12), inspect_bundle(make_bundle(static).path)):
        assert found.pictures() == {} and found.facts.model.router_parameters == 0
        assert found.facts.model.config.routers is Routers.NONE and found.facts.width.flops_ratio == 1
        assert "masks" not in found.text() and "static" in found.text()


def test_inspect_tells_what_it_is_given(make_bundle, make_checkpoint, tmp_path):
    assert isinstance(inspect(make_bundle().path).facts, BundleFacts)
    assert isinstance(inspect(str(make_checkpoint().path)).facts, CheckpointFacts)
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect(tmp_path / "nothing")
    broken = tmp_path / "broken"
    shutil.copytree(make_bundle().path, broken)
    (broken / MANIFEST).write_text("{")
    with pytest.raises(BundleError, match="export the bundle again"):
        inspect(broken)


def test_text_is_columns_and_json_goes_there_and_back(make_bundle, make_checkpoint):
    for path in (make_bundle().path, make_checkpoint().path):
        found = inspect(path)
        values = json.loads(json.dumps(found.to_json(), allow_nan=False))
        assert type(found.facts).parse(values) == found.facts
        text = found.text()
        lines = text.splitlines()
        assert max(map(len, lines[2:8])) <= 110 and all(line == line.rstrip() for line in lines)
        table = lines[lines.index("") + 1 :]
        assert table[0].split()[:2] == ["segments", "subnetworks"] and table[1].split()[0] == "1"
        assert len({line.index("iB") for line in table[1 : table.index("") if "" in table else None]}) == 1, "aligned"
    bundle = inspect(make_bundle().path)
    assert "<- chosen" in bundle.text() and f"{bundle.facts.width.distinct_masks} distinct in 12 steps" in bundle.text()


def test_every_number_of_segments_has_its_plan(make_bundle):
    facts = inspect_bundle(make_bundle().path).facts
    assert [row.segments for row in facts.plans] == list(range(1, len(facts.plans) + 1))
    assert all(row.ms is None for row in facts.plans) and facts.measured is None


def test_the_segments_are_those_of_the_plan(make_bundle):
    bundle = make_bundle()
    facts, manifest = inspect_bundle(bundle.path).facts, bundle.manifest
    assert [(each.first, each.steps, each.subnet) for each in facts.segments] == [
        (each.first, each.count, each.subnet) for each in manifest.plan.segments
    ]
    assert sum(each.cost_share for each in facts.segments) == pytest.approx(1)
    for each in facts.segments:
        entry, held = manifest.subnets[each.subnet], bundle.masks[each.first : each.first + each.steps].any(axis=0)
        assert each.units == manifest.model.units.total_counts(held)
        assert (each.gated, each.weight_bytes) == (entry.gated, entry.weight_bytes)
        share = each.steps * (held * unit_costs(manifest.model)).sum() / manifest.plan.macs
        assert each.cost_share == pytest.approx(share)


def test_a_plan_by_measured_times_is_shown_by_them(make_checkpoint, tmp_path):
    times = StepTimes(
        backend="onnxruntime",
        rows=2,
        threads=1,
        token_share=0.5,
        deviation=0.01,
        fixed=1.0,
        block=0.1,
        groups={"heads": GroupTimes(any=0.1, unit=5.0), "groups": GroupTimes(any=0.1, unit=0.5)},
    )
    config = ExportConfig(steps=12, max_subnets=4)
    found = inspect(export(make_checkpoint(), tmp_path / "bundle", config, measured=Measured(times=times)).path)
    facts = found.facts
    row = next(row for row in facts.plans if row.segments == facts.chosen.segments)
    assert (row.ms, row.macs) == (pytest.approx(facts.measured.ms), pytest.approx(facts.chosen.macs))
    costs = [row.ms for row in facts.plans]
    assert costs == sorted(costs, reverse=True) and costs[-1] == pytest.approx(facts.measured.per_step_ms)
    assert sum(each.cost_share for each in facts.segments) == pytest.approx(1)
    setting = "1 thread, batch of 2 rows (two per image with guidance), 50% of the tokens in the MLPs"
    assert f"According to a profile on onnxruntime ({setting}; largest error of the fit: " in found.text()
    assert "s a run" in found.text() and BundleFacts.parse(json.loads(json.dumps(found.to_json()))) == facts
    assert set(found.pictures()) == {"masks.png", "plan.png"}


def test_many_subnetworks_are_cut_in_the_text(make_bundle, monkeypatch):
    monkeypatch.setattr("dydit.reports.inspection_facts.ROWS_SHOWN", 2)
    found = inspect(make_bundle(plan=PlanKind.PER_STEP).path)
    assert len(found.facts.subnets) > 5 and f"... {len(found.facts.subnets) - 4} more" in found.text()


def test_pictures_are_written(make_bundle, tmp_path):
    paths = inspect(make_bundle().path).write_pictures(tmp_path / "out")
    assert [path.name for path in paths] == ["masks.png", "plan.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_a_bundle_is_inspected_without_torch_and_onnx(make_bundle):
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'onnx', 'onnx_ir', 'onnxruntime', 'matplotlib')))\n"
        "from dydit.inspection.inspect import inspect\n"
        f"print(inspect({str(make_bundle().path)!r}).text())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("bundle ")


def test_a_decoder_is_described_and_counts_apart(make_bundle, vae_bundle, vae_settings, autoencoder):
    found, plain = inspect_bundle(vae_bundle.path), inspect_bundle(make_bundle(**vae_settings).path)
    decoder = found.facts.decoder
    sizes = [vae_bundle.manifest.files[name].bytes for name in ("vae_decoder.onnx", "vae_weights.bin")]
    assert (decoder.source, decoder.tile, decoder.picture_side) == (str(autoencoder.folder), 8, 16)
    assert decoder.bytes == sum(sizes) and plain.facts.decoder is None
    assert found.facts.graph_bytes == plain.facts.graph_bytes and found.facts.stored_bytes == plain.facts.stored_bytes
    total = sum(file.stat().st_size for file in vae_bundle.path.rglob("*"))
    assert found.facts.bundle_bytes == total - decoder.bytes
    assert BundleFacts.parse(json.loads(json.dumps(found.to_json()))) == found.facts
    assert f"VAE from {autoencoder.folder}, 16x16 pixels; " in found.text()
    assert "none: samples stay latents" in plain.text()


def test_a_model_of_pixels_has_no_word_of_decoders(make_bundle, make_checkpoint, small_config):
    pixels = make_bundle(make_checkpoint(small_config.model_copy(update={"in_channels": 3})))
    assert "decoder" not in inspect_bundle(pixels.path).text()
