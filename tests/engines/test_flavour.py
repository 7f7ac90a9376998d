from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from dydit.engines import flavour as module
from dydit.engines.flavour import Flavour, Gpu, default_flavour, installed_version, load_polygraphy, present_gpu
from dydit.errors import BackendError, one_line


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    fake = ModuleType(name)
    fake.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, fake)


@pytest.mark.parametrize(
    ("flavour", "message"),
    [
        (Flavour.TENSORRT, "tensorrt is not installed: pip install 'dydit[tensorrt]'"),
        (Flavour.TENSORRT_RTX, "tensorrt_rtx is not installed: pip install 'dydit[tensorrt-rtx]'"),
    ],
)
def test_a_missing_package_is_named_with_what_to_install(monkeypatch, flavour: Flavour, message: str) -> None:
    monkeypatch.setitem(sys.modules, flavour.module, None)
    with pytest.raises(BackendError) as caught:
        installed_version(flavour)
    assert one_line(caught.value) == message


@pytest.mark.parametrize(
    ("flavour", "version", "known"),
    [
        (Flavour.TENSORRT, "8.6.1", "10.x or 11.x"),
        (Flavour.TENSORRT, "12.0", "10.x or 11.x"),
        (Flavour.TENSORRT_RTX, "2.0.0", "1.x"),
    ],
)
def test_an_unknown_version_is_refused(monkeypatch, flavour: Flavour, version: str, known: str) -> None:
    pretend(monkeypatch, flavour.module, version)
    with pytest.raises(BackendError) as caught:
        installed_version(flavour)
    assert one_line(caught.value) == (
        f"{flavour} {version} is not supported, only {known}: pip install 'dydit[{flavour}]'"
    )


@pytest.mark.parametrize(
    ("flavour", "version"),
    [(Flavour.TENSORRT, "10.16.0"), (Flavour.TENSORRT, "11.4.0"), (Flavour.TENSORRT_RTX, "1.7.1")],
)
def test_known_versions_are_taken(monkeypatch, flavour: Flavour, version: str) -> None:
    pretend(monkeypatch, flavour.module, version)
    assert installed_version(flavour) == version


@pytest.mark.parametrize(
    ("flavour", "version", "command"),
    [
        (Flavour.TENSORRT, "10.13.3.9", "10.14 or newer; pip install -U 'tensorrt>=10.14'"),
        (Flavour.TENSORRT_RTX, "1.3.0", "1.7 or newer; pip install -U 'tensorrt-rtx-cu13>=1.7'"),
    ],
)
def test_a_release_that_cannot_read_our_graphs_is_refused(monkeypatch, flavour, version: str, command: str) -> None:
    """Their parsers do not know the operator Attention."""
    pretend(monkeypatch, flavour.module, version)
    with pytest.raises(BackendError) as caught:
        installed_version(flavour)
    assert one_line(caught.value) == (f"{flavour.module} {version} is too old: the graphs of a bundle need {command}")


def test_the_targets_are_those_of_the_package(rtx) -> None:
    """But for 7.5, for which it has no fp32 matrix product."""
    names = {name for name in rtx.ComputeCapability.__members__ if name.startswith("SM")}
    assert names - {"SM75"} == {f"SM{each.replace('.', '')}" for each in Flavour.TENSORRT_RTX.traits.targets}


def test_without_any_tensorrt_both_are_offered(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        BackendError, match=r"TensorRT is not installed: pip install 'dydit\[tensorrt-rtx\]'.*tensorrt\]"
    ):
        default_flavour()


@pytest.mark.parametrize(
    ("installed", "gpu", "chosen"),
    [
        ({"tensorrt"}, None, Flavour.TENSORRT),
        ({"tensorrt_rtx"}, Gpu("any", "9.0"), Flavour.TENSORRT_RTX),
        ({"tensorrt", "tensorrt_rtx"}, Gpu("any", "9.0"), Flavour.TENSORRT),
        ({"tensorrt", "tensorrt_rtx"}, None, Flavour.TENSORRT_RTX),
    ],
)
def test_the_default_is_what_is_there(monkeypatch, installed: set[str], gpu: Gpu | None, chosen: Flavour) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in installed else None)
    monkeypatch.setattr(module, "present_gpu", lambda: gpu)
    assert default_flavour() is chosen


def test_no_driver_is_no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(module, "_CUDA_LIBRARY", "libthere-is-no-such.so.1")
    assert present_gpu() is None


def test_polygraphy_drives_one_flavour_in_a_process(monkeypatch, rtx) -> None:
    load_polygraphy(Flavour.TENSORRT_RTX)
    pretend(monkeypatch, "tensorrt", "11.4.0")
    with pytest.raises(BackendError, match="already uses the other TensorRT flavour in this process"):
        load_polygraphy(Flavour.TENSORRT)
