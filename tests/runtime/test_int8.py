"""int8 bundles: where they run, where they are refused, and that images stay apart."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from dydit.bundle.manifest import PlanKind
from dydit.bundle.stored_weights import Precision
from dydit.errors import BackendError, ConfigError
from dydit.models.config import parse_config
from dydit.runtime.backends import int8_exactness as int8
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.pipeline import DyDiTPipeline
from tests.fixtures.cpu import needs_exact_int8

pytestmark = pytest.mark.numerics


@pytest.fixture(scope="module")
def bundle(make_bundle):
    return make_bundle(precision=Precision.INT8, plan=PlanKind.PER_STEP)


@needs_exact_int8
def test_images_are_near_those_of_fp32_and_do_not_depend_on_the_batch(bundle, make_bundle, relative):
    labels = [1, 2, 3]
    with DyDiTPipeline.from_bundle(bundle.path, threads=1) as pipe:
        together = pipe(labels, seed=3, output_type="latent").latents
        alone = pipe(2, seed=3, image_indices=[1], output_type="latent").latents
    with DyDiTPipeline.from_bundle(make_bundle(plan=PlanKind.PER_STEP).path, threads=1) as pipe:
        exact = pipe(labels, seed=3, output_type="latent").latents
    assert relative(alone[0], together[1]) < 1e-4
    assert 1e-6 < relative(together, exact) < 5e-2


def test_weights_are_a_quarter(bundle, make_bundle):
    wide, narrow = make_bundle(plan=PlanKind.PER_STEP).manifest.weights, bundle.manifest.weights
    scales = narrow.keys() - wide.keys()
    assert {name.split(".", 2)[2] for name in scales} == {"qkv.scale", "proj.scale", "fc1.scale", "fc2.scale"}
    for name, entry in wide.items():
        eighth = name.startswith("blocks.") and name.endswith("weight") and "router" not in name
        assert narrow[name].dtype == ("int8" if eighth else "float32")
        assert narrow[name].shape == entry.shape


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("torch", {}, "int8 bundles run on onnxruntime; use backend='onnxruntime'"),
        ("onnxruntime", {"device": "cuda"}, r"CUDAExecutionProvider|int8 bundles run on the CPU, not on cuda"),
    ],
)
def test_where_they_do_not_run(bundle, backend, options, message):
    with pytest.raises(BackendError, match=message):
        open_backend(backend, bundle, BackendOptions(**options))


def test_a_cpu_whose_products_saturate_is_refused(bundle, monkeypatch):
    monkeypatch.setattr(int8, "products_are_exact", lambda ort: False)
    with pytest.raises(
        BackendError, match=r"8-bit products .* saturate on this CPU, which has no VNNI; use a bundle of"
    ):
        open_backend("onnxruntime", bundle)


def test_the_probe_sees_what_is_cut_off(monkeypatch):
    class Saturating:
        """A runtime that adds pairs in 16 bits, as CPUs without VNNI do."""

        SessionOptions = onnxruntime.SessionOptions

        def InferenceSession(self, *_, **__):
            return self

        def run(self, _, feeds):
            pairs = feeds["a"].astype(np.int32)[:, :, None] * feeds["b"].astype(np.int32)[None]
            pairs = pairs.reshape(1, 32, 2, -1).sum(2)
            return [np.clip(pairs, -(2**15), 2**15 - 1).sum(1)]

    assert not int8.products_are_exact(Saturating())


def test_dynamic_width_is_refused():
    from dydit.export.settings import ExportConfig

    with pytest.raises(ConfigError, match="dynamic width does not support int8: its weights are inputs"):
        parse_config(ExportConfig, {"plan": "sliding", "precision": "int8"})


def test_no_engine_is_built_of_it(bundle):
    from dydit.engines.fingerprint import make_request
    from dydit.engines.flavour import Flavour

    with pytest.raises(BackendError, match="int8 bundles run only on onnxruntime on the CPU"):
        make_request(bundle.manifest, Flavour.TENSORRT_RTX, "1.7.1", None)
