"""The script of nine minutes on the CPU: its dry run without optional packages, what a failure or a kill costs, and
bundles without graphs, which are held to the exporter's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dydit.bundle.stored_weights import WEIGHTS
from dydit.errors import ConfigError
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.torch import TorchBackend

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "gpu"
MISSING = ("onnx", "onnx_ir", "onnxruntime", "onnxscript", "tensorrt", "tensorrt_rtx", "safetensors", "scipy", "pycuda")
MISSING += ("jinja2", "matplotlib", "diffusers", "accelerate", "sklearn", "datasets", "polygraphy", "tqdm", "click")
NOT_OF_A_MANIFEST = {"files", "tools", "checkpoint_sha256", "digest"}


@pytest.fixture
def nine(gpu_scripts):
    """The folder's modules by name."""
    return gpu_scripts


@pytest.fixture
def make_context(nine, tmp_path):
    """`make_context(**fields)`: the context of a dry run with an hour of time; `out` is its file."""

    def make(**fields):
        values = {"deadline": time.monotonic() + 3600, **fields}
        (tmp_path / "work").mkdir(exist_ok=True)
        return nine.budget.Context(nine.nine_minutes.DRY, tmp_path / "out.json", tmp_path / "work", **values)

    return make


def saved(context):
    return json.loads(context.out.read_text())["parts"]


def test_a_dry_run_needs_no_optional_package_and_measures_everything(tmp_path):
    code = f"import sys\nsys.modules.update(dict.fromkeys({MISSING}))\nsys.path.insert(0, {str(FOLDER)!r})\n"
    code += "import nine_minutes\nsys.exit(nine_minutes.main())\n"
    out = tmp_path / "new" / "nine.json"
    words = [sys.executable, "-c", code, "--dry-run", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    values = json.loads(out.read_text())
    assert values["dry_run"] and values["settings"]["gpu"] is None
    parts = values["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(
        ("launches", "ceilings", "parity", "speed", "profile", "compiled"), "done"
    )
    launches = parts["launches"]["results"]
    for each in launches.values():
        assert each["holds"] and each["graphs"] and each["replayed_is_equal"] and each["without_graphs_is_equal"]
        assert each["other_batch_size"]["holds"]
    assert launches["capacity"]["repeated_steps"] > 0 < launches["dynamic width"]["repeated_steps"]
    for precision in ("fp32", "fp16", "bf16"):
        checks = parts["parity"]["results"][precision]
        assert checks["step"]["holds"] and checks["run"]["holds"]
    assert parts["ceilings"]["results"]["product bf16"]["tflops"] > 0
    model = parts["speed"]["results"]["model"]
    assert 0.2 < model["flops_ratio"] < 0.8 and 0 < model["token_share"] < 1
    for batch in ("batch 2", "batch 1"):
        timed, compiled = (parts[part]["results"][batch] for part in ("speed", "compiled"))
        assert set(timed) == {"eager masked", "eager static", "loop static", "loop dynamic"}
        assert set(compiled) == {"compiled static", "loop static", "loop dynamic"}
        for each in (*timed.values(), *compiled.values()):
            assert each["ms"] > 0 and len(each["round_ms"]) == 2
        assert timed["loop dynamic"]["graphs"] and timed["loop dynamic"]["run_ms"] > 0
    for table in parts["profile"]["results"].values():
        assert table["us"] > 0 and sum(row["share"] for row in table["rows"]) == pytest.approx(1, abs=0.2)
    text = done.stdout
    assert text.startswith("## CPU (dry run: these are not figures of a GPU)")
    assert "None" not in text and "DOES NOT HOLD" not in text and "not reached" not in text


def test_a_part_that_fails_or_hangs_costs_no_other(nine, make_context):
    context, Part, seen = make_context(), nine.budget.Part, []

    def first(context):
        context.emit("a", 1)
        seen.append(saved(context)["first"])
        raise MemoryError("out of\nmemory")

    def second(context):
        context.emit("b", 2)
        while True:
            time.sleep(0.01)

    def third(context):
        context.emit("c", context.left > 0)

    parts = [Part("first", first, 60), Part("second", second, 0.05, grace=0.05), Part("third", third, 60)]
    nine.budget.run_parts(context, parts)
    values = saved(context)
    assert seen == [{"status": "running", "seconds": 0.0, "results": {"a": 1}}], "in the file as it was measured"
    assert (values["first"]["status"], values["first"]["reason"]) == ("failed", "MemoryError: out of memory")
    assert values["second"]["status"] == "cut off" and values["second"]["results"] == {"b": 2}
    assert values["third"] == {"status": "done", "seconds": values["third"]["seconds"], "results": {"c": True}}
    assert "cut off after 0 s" in nine.nine_minutes.markdown(context)


def test_without_time_parts_are_left(nine, make_context):
    context = make_context(deadline=time.monotonic())
    nine.budget.run_parts(context, nine.sections.PARTS)
    assert {part["status"] for part in saved(context).values()} == {"left"}
    text = nine.nine_minutes.markdown(context)
    assert text.count("not reached") == len(nine.nine_minutes.DRY.batches) * 5 and "None" not in text


def test_what_was_timed_becomes_rows(nine, make_context):
    context = make_context()
    figures = {"round_ms": [10.0], "memory_bytes": 1 << 30}
    results = {
        "model": {"macs": {"static": 2e11, "dynamic": 1e11}},
        "batch 2": {"loop static": {"ms": 20.0, **figures}, "loop dynamic": {"ms": 10.0, "run_ms": 16.0, **figures}},
    }
    context.parts = {
        "ceilings": {"results": {"product bf16": {"tflops": 1000.0}}},
        "speed": {"results": results},
        "compiled": {"results": {"batch 2": {"compiled static": {"reason": "failed: x"}}}},
    }
    rows = {(row["batch"], row["contender"]): row for row in nine.nine_minutes.rows(context)}
    dynamic, static = rows[2, "loop dynamic"], rows[2, "loop static"]
    assert (dynamic["speedup"], static["speedup"]) == (2.0, 1.0)
    assert dynamic["images_per_second"] == pytest.approx(2 / (4 * 0.016)), "with what the host does"
    assert static["images_per_second"] == pytest.approx(2 / (4 * 0.020))
    assert dynamic["macs_share"] == pytest.approx(0.4 / 10) and static["macs_share"] == pytest.approx(0.8 / 20)
    assert rows[2, "compiled static"]["reason"] == "failed: x" and rows[1, "loop static"]["reason"] == "not reached"


def test_parity_finds_a_model_that_differs(nine, make_context, tmp_path):
    """The reference is of other weights than those that it states."""
    path = tmp_path / "reference.npz"
    assert nine.nine_minutes.main(["--make-reference", str(path)]) == 0
    assert path.stat().st_size < 2 << 20
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    name = next(name for name in arrays if name.endswith("mlp.fc2.weight"))
    arrays[name] = arrays[name] * 1.01
    path.unlink()
    np.savez(path, **arrays)
    context = make_context(reference=path)
    nine.budget.run_parts(context, [nine.budget.Part("parity", nine.sections.parity, 60)])
    results = saved(context)["parity"]["results"]
    assert not results["reference"]["made_here"] and torch.__version__ in results["reference"]["machine"]
    assert not results["fp32"]["step"]["holds"]
    assert "| fp32: step | DOES NOT HOLD |" in nine.nine_minutes.markdown(context)


def test_what_is_no_reference_is_refused(nine, tmp_path, capsys):
    path = tmp_path / "reference.npz"
    for write in (
        lambda: path.write_bytes(b"PK nothing"),
        lambda: np.savez(path, latents=np.zeros((13, 4, 4, 16, 16)), machine=np.array("x")),
        lambda: np.savez(path, latents=np.array({"a": 1}, object)),
    ):
        write()
        with pytest.raises(ConfigError, match=r"is no reference: .*; write one with --make-reference") as caught:
            nine.sections.read_reference(path)
        assert "\n" not in str(caught.value)
    assert nine.nine_minutes.main(["--make-reference", str(path)]) == 2, "what is there is not replaced"
    assert str(path) in capsys.readouterr().err


def test_without_a_gpu_it_says_so(nine, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(nine.tasks, "present_gpu", lambda: None)
    out = tmp_path / "nine.json"
    assert nine.nine_minutes.main(["--out", str(out)]) == 2
    assert "no NVIDIA GPU or driver on this machine; --dry-run" in capsys.readouterr().err and not out.exists()
    assert nine.nine_minutes.main(["--dry-run"]) == 2
    assert "--out FILE" in capsys.readouterr().err


def test_a_gpu_is_found_among_the_datasheets(nine, make_context):
    for name, entry in (
        ("NVIDIA H200 (compute capability 9.0)", "H200"),
        ("NVIDIA A100-SXM4-80GB (compute capability 8.0)", "A100"),
        ("NVIDIA GeForce RTX 4090 (compute capability 8.9)", "RTX4090"),
        ("NVIDIA H2000 (compute capability 9.0)", None),
    ):
        settings = nine.nine_minutes.DRY.model_copy(update={"gpu": name})
        context = make_context()
        context.settings = settings
        gpu = nine.sections.named_gpu(context)
        assert (None if gpu is None else gpu.name) == entry


class TestGraphless:
    @pytest.fixture
    def both(self, nine, make_checkpoint, tmp_path):
        """`both(**settings)`: a bundle without graphs, and the exporter's of the same model."""

        def make(**settings):
            checkpoint, config = make_checkpoint(), ExportConfig.model_validate({"steps": 6, **settings})
            theirs = export(checkpoint, tmp_path / "exported", config)
            folder = tmp_path / "graphless"
            folder.mkdir()
            planned = nine.graphless.plan_steps(checkpoint.model(), config)
            weights = nine.graphless.graphless_weights(folder, checkpoint.state, planned)
            return nine.graphless.graphless_bundle(folder, weights, planned), theirs

        return make

    @pytest.mark.parametrize(
        "settings",
        [
            {"max_subnets": 3, "routing": "capacity", "capacities": (12, 14, 16), "precision": "bf16"},
            {"plan": "sliding", "routing": "capacity", "capacities": (12, 14, 14)},
            {"plan": "per-step", "routing": "dense", "precision": "fp16"},
            {"max_subnets": 2, "routing": "capacity"},
        ],
    )
    def test_it_is_what_the_exporter_writes(self, both, settings):
        ours, theirs = both(**settings)
        ours_fields, their_fields = (
            {name: value for name, value in each.manifest if name not in NOT_OF_A_MANIFEST} for each in (ours, theirs)
        )
        # Measurements of the plan are for reports: no backend reads them.
        their_fields["plan"] = their_fields["plan"].model_copy(update={"measured": None})
        assert ours_fields == their_fields
        assert (ours.path / WEIGHTS).read_bytes() == (theirs.path / WEIGHTS).read_bytes()
        assert sorted(each.name for each in ours.path.iterdir()) == [WEIGHTS]
        named = {name for each in theirs.manifest.subnets for name in (each.file, each.full_file) if name is not None}
        assert named < set(ours.manifest.files)

    def test_the_static_form_has_everything_on(self, nine, both, make_checkpoint, small_config):
        """A step of it is the model with nothing gated."""
        from dydit.models.routers import Static

        ours, _ = both(max_subnets=3, routing="capacity", capacities=(12, 14, 16))
        static, model = nine.graphless.static_form(ours), make_checkpoint().model()
        assert not static.manifest.model.dynamic and len(static.manifest.plan.segments) == 1
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 4, 8, 8, generator=generator)
        labels, sampling = np.array([3, 1, 7, 7]), static.manifest.sampling
        with torch.no_grad():
            t = torch.full((4,), float(sampling.timesteps[2]))
            walk = nine.contenders.Walk(SimpleNamespace(settings=SimpleNamespace(device="cpu")), static, 2)
            walk.y = torch.tensor(labels)
            expected = walk.step(lambda x, _, y: model(x, t, y, Static()), 2, x).numpy()
        with TorchBackend(static, BackendOptions(threads=1)) as backend:
            condition = backend.conditioning(np.array(sampling.timesteps[2:3], np.float32), labels)[0]
            feeds = {"x": x.numpy(), "history": np.zeros_like(x), "noise": walk.noise.numpy(), "condition": condition}
            feeds |= {"coefficients": np.array(sampling.coefficients[2], np.float32)}
            feeds |= {"cfg_scale": np.array(nine.timing.CFG_SCALE, np.float32)}
            got = backend.subnet(0).step(feeds).x_prev
        assert np.linalg.norm(got - expected) < 1e-5 * np.linalg.norm(expected)

    def test_slots_hold_the_steps_of_their_segment(self, nine, make_checkpoint):
        config = ExportConfig(steps=6, max_subnets=2)
        planned = nine.graphless.plan_steps(make_checkpoint().model(), config)
        tokens = np.linspace(0, 1, 18).reshape(6, 3)
        slots = planned.slots(tokens)
        assert len(slots) == 2
        for (first, end), each in zip(planned.plan.segments, slots, strict=True):
            assert min(each) >= 1 and (np.array(each) >= planned.model.tokens * tokens[first:end]).all()
            assert max(each) <= planned.model.tokens
