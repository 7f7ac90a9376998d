"""The example that docs/bundle.md refers to samples what dydit samples, and does not import it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dydit
from dydit.bundle.manifest import PlanKind, Routing
from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.models.config import Routers
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.pipeline import DyDiTPipeline
from dydit.runtime.request import Batch

ASSETS = Path(dydit.__file__).parent / "assets"
EXAMPLE = Path(__file__).parents[2] / "examples" / "sample_without_dydit.py"
WITHOUT_DYDIT = """
import runpy, sys
sys.modules["dydit"] = None  # importing it fails
import numpy as np
script, bundle, label, scale, noise, out = sys.argv[1:]
draws = np.load(noise)["draws"]
sample = runpy.run_path(script)["sample"]
from pathlib import Path
np.save(out, sample(Path(bundle), int(label), float(scale), lambda draw: draws[draw]))
"""


@pytest.mark.parametrize(
    ("plan", "scale"),
    [
        ({"plan": PlanKind.MAX_SUBNETS, "max_subnets": 3}, 2.0),
        ({"plan": PlanKind.PER_STEP}, 1.0),
        ({"plan": PlanKind.DYNAMIC_WIDTH}, 2.0),
        ({"plan": PlanKind.DYNAMIC_WIDTH}, 0.0),
        # One slot a token and block: steps overflow, and are repeated.
        ({"plan": PlanKind.PER_STEP, "routing": Routing.CAPACITY, "capacities": (1, 1, 1)}, 2.0),
        ({"plan": PlanKind.MAX_SUBNETS, "max_subnets": 3, "sampler": "dpm-solver++"}, 2.0),
        ({"plan": PlanKind.MAX_SUBNETS, "max_subnets": 3, "sampler": "ddim", "eta": 0.5, "spacing": "trailing"}, 2.0),
        (
            {
                "plan": PlanKind.DYNAMIC_WIDTH,
                "routing": Routing.CAPACITY,
                "capacities": (1, 1, 1),
                "sampler": "dpm-solver++",
            },
            1.0,
        ),
    ],
)
def test_the_example_samples_what_dydit_samples(make_checkpoint, small_config, tmp_path, plan, scale):
    checkpoint = make_checkpoint(small_config.model_copy(update={"routers": Routers.ALL_ROUTED}), flops_ratio=0.2)
    bundle, (label, seed) = export(checkpoint, tmp_path / "bundle", ExportConfig(steps=6, **plan)), (3, 11)
    model = bundle.manifest.model
    on = model.units.any(bundle.manifest.executed_masks())
    assert on.any(axis=1).all() and not on.all()  # some blocks have no head, or no channel group, on
    noise = SeededNoise(seed, (model.in_channels, model.input_size, model.input_size))
    batch = Batch(0, (0,), np.array([label]))
    draws = [noise.initial(batch), *(noise.step(batch, step) for step in range(6))]
    np.savez(tmp_path / "noise.npz", draws=np.stack(draws))
    arguments = (EXAMPLE, bundle.path, label, scale, tmp_path / "noise.npz", tmp_path / "out.npy")
    subprocess.run([sys.executable, "-c", WITHOUT_DYDIT, *map(str, arguments)], check=True)
    with DyDiTPipeline.from_bundle(bundle.path) as pipe:
        ours = pipe([label], guidance_scale=scale, seed=seed, output_type="latent").latents
    found = np.load(tmp_path / "out.npy")
    assert np.linalg.norm(found - ours) <= 1e-5 * np.linalg.norm(ours)


def test_the_example_writes_a_picture(tmp_path):
    out, settings = tmp_path / "three.png", ExportConfig(steps=10, max_subnets=4)
    bundle = export(load_checkpoint(ASSETS / "digits" / "dydit.safetensors"), tmp_path / "bundle", settings)
    subprocess.run([sys.executable, str(EXAMPLE), str(bundle.path), "3", str(out)], check=True)
    with Image.open(out) as picture:
        assert picture.size == (160, 160) and np.asarray(picture).std() > 10


def test_the_example_is_short_and_uses_no_dydit():
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) < 60 and "import dydit" not in text and "from dydit" not in text
