"""Everything in this folder needs an NVIDIA GPU and PyCUDA or cuda-bindings, most of it TensorRT; it skips and says
what is missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from dydit.bundle.bundle import Bundle

HERE = Path(__file__).parent


def missing() -> str | None:
    """Why these tests cannot run here; None where they can."""
    from dydit.engines.flavour import present_gpu
    from dydit.errors import BackendError
    from dydit.runtime.device.driver import require_driver

    if present_gpu() is None:
        return "no NVIDIA GPU or driver on this machine"
    try:
        require_driver()
    except BackendError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if HERE in item.path.parents]
    reason = missing() if here else None
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def gpu_config() -> Any:
    """Three blocks of four heads of 16 channels, the least that attention is fused for, over 64 tokens."""
    from dydit.models.dit.config import DiTConfig

    return DiTConfig(hidden_size=64, depth=3, num_heads=4, patch_size=2, input_size=16, in_channels=4, num_classes=7)


@pytest.fixture(scope="session")
def built_bundle(
    tmp_path_factory: pytest.TempPathFactory, make_bundle: Callable[..., Bundle], make_checkpoint, gpu_config
) -> Callable[..., Bundle]:
    """`built_bundle(**export settings)`: a bundle with capacity routing, and its engines for this GPU.

    Shared: do not write into its folder.
    """
    from dydit.bundle.bundle import Bundle
    from dydit.engines.bundle_engines import build_engines
    from dydit.engines.fingerprint import make_request
    from dydit.engines.flavour import default_flavour, installed_version, present_gpu
    from dydit.errors import BackendError
    from dydit.runtime.backends.tensorrt import describe

    try:
        describe()
    except BackendError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("engines")
    made: dict[str, Bundle] = {}

    def make(**settings: Any) -> Bundle:
        values = {"routing": "capacity", "max_batch": 4, **settings}
        key = repr(sorted(values.items()))
        if key not in made:
            path = folder / str(len(made))
            shutil.copytree(make_bundle(make_checkpoint(gpu_config), **values).path, path)
            bundle, flavour = Bundle.open(path), default_flavour()
            request = make_request(bundle.manifest, flavour, installed_version(flavour), present_gpu())
            build_engines(bundle, request, jobs=4)
            made[key] = bundle
        return made[key]

    return make
