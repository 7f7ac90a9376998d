"""Guidance 0 is unconditional: labels do not matter, on any backend, and half the rows are computed."""

from __future__ import annotations

import numpy as np
import pytest

from dydit.bundle.manifest import PlanKind, Routing
from dydit.diffusion.guidance import Guidance
from dydit.errors import ConfigError
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.pipeline import DyDiTPipeline
from tests.fixtures.packages import OPENVINO
from tests.fixtures.simulated_device import SimulatedDeviceBackend

OPTIONS = BackendOptions(threads=1)
OPENERS = {
    "onnxruntime": lambda bundle: open_backend("onnxruntime", bundle, OPTIONS),
    "torch": lambda bundle: open_backend("torch", bundle, OPTIONS),
    "openvino": lambda bundle: open_backend("openvino", bundle, OPTIONS),
    "device": lambda bundle: SimulatedDeviceBackend(bundle, OPTIONS),
}


def test_which_rows_a_step_computes():
    labels = np.array([3, 1])
    for scale, rows, guided in (
        (4.0, [3, 1, 9, 9], True),
        (1, [3, 1], False),
        (0, [9, 9], False),
        (-0.0, [9, 9], False),
    ):
        guidance = Guidance(scale, 9)
        assert guidance.rows(labels).tolist() == rows and guidance.guided is guided
        assert guidance.rows(labels).dtype == labels.dtype
    assert Guidance(1, None).rows(labels) is labels
    for scale in (0, 4.0):
        with pytest.raises(ConfigError, match=f"guidance {scale:g} needs a null class, which this model does not have"):
            Guidance(scale, None)


@pytest.mark.parametrize("kind", [{"plan": PlanKind.DYNAMIC_WIDTH}, {"cfg_channels": 1, "routing": Routing.DENSE}])
@pytest.mark.parametrize("name", ["onnxruntime", "torch", OPENVINO, "device"])
def test_labels_do_not_matter_at_0(name, kind, make_bundle):
    with OPENERS[name](make_bundle(steps=3, **kind)) as backend:
        pipe = DyDiTPipeline(backend)
        ours, theirs = (pipe(labels, 0, seed=1, output_type="latent").latents for labels in ([1, 2], [6, 6]))
        assert np.array_equal(ours, theirs)
        with_class = pipe([1, 2], 1, seed=1, output_type="latent").latents
        near_zero = pipe([1, 2], 1e-6, seed=1, output_type="latent").latents
    assert not np.allclose(with_class, ours, rtol=1e-3)
    assert not np.array_equal(near_zero, ours), "the variance and further channels are of the class there"


@pytest.mark.parametrize("name", ["onnxruntime", "torch", OPENVINO, "device"])
def test_the_null_class_is_unconditional_with_any_guidance(name, make_bundle, relative):
    """null + scale * (null - null); and the variance is that of the null class."""
    with OPENERS[name](make_bundle(steps=3, plan=PlanKind.DYNAMIC_WIDTH)) as backend:
        pipe, null = DyDiTPipeline(backend), backend.bundle.manifest.model.null_class
        wanted = pipe([1, 2], 0, seed=1, output_type="latent").latents
        assert np.array_equal(pipe([null, null], 0, seed=1, output_type="latent").latents, wanted)
        assert np.array_equal(pipe([null, null], 1, seed=1, output_type="latent").latents, wanted)
        for scale in (4.0, 1e6):
            assert relative(pipe([null, null], scale, seed=1, output_type="latent").latents, wanted) < 1e-4
        beside = pipe([null, 2], 4.0, seed=1, output_type="latent").latents
        assert relative(beside[0], wanted[0]) < 1e-4 and relative(beside[1], wanted[1]) > 1e-2


@pytest.mark.parametrize("name", ["onnxruntime", "torch", OPENVINO])
def test_0_and_1_compute_one_row_an_image(name, make_bundle, monkeypatch):
    with OPENERS[name](make_bundle(steps=3)) as backend:
        rows, plain = [], type(backend.subnet(0)).step
        monkeypatch.setattr(
            type(backend.subnet(0)),
            "step",
            lambda self, feeds: rows.append(len(feeds["condition"])) or plain(self, feeds),
        )
        pipe = DyDiTPipeline(backend)
        for scale in (0, 1, 4.0):
            pipe([1, 2], scale, seed=1, output_type="latent")
    assert rows == [2] * 6 + [4] * 3


def test_so_does_a_device(make_bundle):
    shapes = []
    with OPENERS["device"](make_bundle(steps=3)) as backend:
        backend._sampler._fit = lambda shape, options: shapes.append(shape.guided) or options
        pipe = DyDiTPipeline(backend)
        for scale in (0, 1, 4.0):
            pipe([1, 2], scale, seed=1, output_type="latent")
    assert shapes == [False, False, True]
