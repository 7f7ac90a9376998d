"""How the builder is configured: by Polygraphy's own loaders, for both flavours; only that of `tensorrt-rtx` is run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dydit.bundle.stored_weights import Precision
from dydit.engines.builder import Job, builder_config, set_flags
from dydit.engines.fingerprint import EngineRequest, HardwareCompatibility
from dydit.engines.flavour import Flavour, load_polygraphy
from dydit.engines.profiles import ShapeExtent
from dydit.errors import BackendError
from dydit.models.dit.config import preset

PROFILE = {"x": ShapeExtent(min=(1, 4), opt=(2, 4), max=(8, 4))}
LARGER = {"x": ShapeExtent(min=(9, 4), opt=(32, 4), max=(32, 4))}
MODEL = preset("S/2")
LEVELS = SimpleNamespace(AMPERE_PLUS="ampere plus", SAME_COMPUTE_CAPABILITY="same")


def job(flavour: Flavour, cache: Path | None = None, **settings: Any) -> Job:
    request = EngineRequest(
        flavour=flavour, version="1.0", precision=Precision.FP16, opt_batches=(2,), max_batch=8, **settings
    )
    paths = {"graph": Path("g.onnx"), "engine": Path("g.engine"), "log": Path("build.log"), "timing_cache": cache}
    return Job(**paths, request=request, model=MODEL, inputs=None, ranges=())


def configured(polygraphy: Any, wanted: Job, levels: Any = LEVELS) -> Any:
    trt = SimpleNamespace(__name__="tensorrt", __version__="11.4.0", HardwareCompatibilityLevel=levels)
    return builder_config(trt, polygraphy, wanted, [PROFILE])


@pytest.fixture
def polygraphy(rtx: Any) -> Any:
    return load_polygraphy(Flavour.TENSORRT_RTX)


def test_shapes_are_those_of_the_profile(polygraphy) -> None:
    for flavour in Flavour:
        (profile,) = configured(polygraphy, job(flavour)).profiles
        assert profile["x"].min == (1, 4) and profile["x"].opt == (2, 4) and profile["x"].max == (8, 4)


def test_a_timing_cache_is_read_where_there_is_one(polygraphy, tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    assert configured(polygraphy, job(Flavour.TENSORRT, cache)).timing_cache_path is None
    cache.write_bytes(b"tactics")
    assert configured(polygraphy, job(Flavour.TENSORRT, cache)).timing_cache_path == str(cache)


@pytest.mark.parametrize(
    ("wanted", "level"),
    [
        (HardwareCompatibility.NONE, None),
        (HardwareCompatibility.AMPERE_PLUS, "ampere plus"),
        (HardwareCompatibility.SAME_CAPABILITY, "same"),
    ],
)
def test_compatibility_reaches_the_builder(polygraphy, wanted: HardwareCompatibility, level: str | None) -> None:
    settings = {"hardware_compatibility": wanted, "version_compatible": level is not None}
    made = configured(polygraphy, job(Flavour.TENSORRT, **settings))
    assert made.hardware_compatibility_level == level
    assert made.version_compatible == (level is not None)


def test_a_compatibility_that_this_version_does_not_have_is_refused(polygraphy) -> None:
    wanted = job(Flavour.TENSORRT, hardware_compatibility=HardwareCompatibility.SAME_CAPABILITY)
    with pytest.raises(BackendError) as caught:
        configured(polygraphy, wanted, levels=SimpleNamespace(AMPERE_PLUS=1))
    assert str(caught.value) == "tensorrt 11.4.0 has no hardware compatibility 'same-capability'"


def test_targets_reach_the_builder_of_tensorrt_rtx(rtx, polygraphy) -> None:
    builder = rtx.Builder(rtx.Logger(rtx.Logger.ERROR))
    network = builder.create_network(0)
    network.add_input("x", rtx.float32, (-1, 4))
    wanted = job(Flavour.TENSORRT_RTX, compute_capabilities=("8.9", "12.0"))
    config = builder_config(rtx, polygraphy, wanted, [PROFILE, LARGER])(builder, network)
    assert config.num_optimization_profiles == 2
    targets = [config.get_compute_capability(index) for index in range(config.num_compute_capabilities)]
    assert targets == [rtx.ComputeCapability.SM89, rtx.ComputeCapability.SM120]


def test_engines_of_tensorrt_rtx_round_nothing_and_allocate_nothing(rtx) -> None:
    config = rtx.Builder(rtx.Logger(rtx.Logger.ERROR)).create_builder_config()
    config.set_flag(rtx.BuilderFlag.TF32)
    set_flags(rtx, config, Flavour.TENSORRT_RTX)
    assert not config.get_flag(rtx.BuilderFlag.TF32)
    assert config.get_flag(rtx.BuilderFlag.REQUIRE_USER_ALLOCATION)
    other = rtx.Builder(rtx.Logger(rtx.Logger.ERROR)).create_builder_config()
    set_flags(rtx, other, Flavour.TENSORRT)
    assert not other.get_flag(rtx.BuilderFlag.REQUIRE_USER_ALLOCATION), "dynamic routing has to allocate"


def test_a_version_without_the_flags_is_configured_without_them() -> None:
    set_flags(SimpleNamespace(BuilderFlag=object()), object(), Flavour.TENSORRT_RTX)
