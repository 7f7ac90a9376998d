from __future__ import annotations

from typing import Any

import pytest

from dydit.bundle.stored_weights import Precision
from dydit.engines.fingerprint import (
    MARKED,
    RECIPE,
    EngineKey,
    EngineRequest,
    HardwareCompatibility,
    make_request,
    require_buildable,
    stale_key_reasons,
    stale_reasons,
)
from dydit.engines.flavour import Flavour, Gpu
from dydit.engines.profiles import ShapeExtent
from dydit.errors import BackendError, ConfigError

GPU = Gpu("NVIDIA H200", "9.0")
BASE = EngineRequest(
    flavour=Flavour.TENSORRT_RTX,
    version="1.7.1",
    precision=Precision.FP16,
    opt_batches=(4,),
    max_batch=8,
    tools={"a": "1"},
)
OTHERS: dict[str, tuple[Any, str]] = {
    "flavour": (Flavour.TENSORRT, "the flavour: tensorrt-rtx became tensorrt"),
    "version": ("1.8.0", "the version: 1.7.1 became 1.8.0"),
    "precision": (Precision.BF16, "the precision: fp16 became bf16"),
    "opt_batches": ((1, 5), "the batches it is tuned for: 4 became 1 5"),
    "max_batch": (16, "the largest batch: 8 became 16"),
    "compute_capabilities": (("8.9", "12.0"), "the compute capabilities: any became 8.9 12.0"),
    "gpu": ("NVIDIA L4", "the GPU: none became NVIDIA L4"),
    "hardware_compatibility": (HardwareCompatibility.AMPERE_PLUS, "hardware compatibility: none became ampere+"),
    "version_compatible": (True, "version compatibility: off became on"),
    "recipe": (99, f"how dydit builds engines: {RECIPE} became 99"),
}


def test_every_field_is_marked_or_known_not_to_change_an_engine() -> None:
    assert set(MARKED) == set(OTHERS)
    assert set(EngineRequest.model_fields) - set(MARKED) == {"tools"}


@pytest.mark.parametrize("name", OTHERS)
def test_a_marked_field_changes_the_fingerprints_and_is_given_as_the_reason(name: str) -> None:
    value, reason = OTHERS[name]
    changed = BASE.model_copy(update={name: value})
    assert stale_reasons(BASE, changed) == [reason]
    assert changed.folder != BASE.folder
    key = EngineKey(graph_sha256="a", weights_sha256="b", profiles=())
    assert key.fingerprint(changed) != key.fingerprint(BASE)


def test_the_rest_changes_nothing() -> None:
    changed = BASE.model_copy(update={"tools": {"a": "2"}})
    assert stale_reasons(BASE, changed) == []
    assert changed.folder == BASE.folder


def test_graph_weights_and_shapes_change_an_engines_fingerprint() -> None:
    shapes = {"x": ShapeExtent(min=(1, 4), opt=(2, 4), max=(8, 4))}
    key = EngineKey(graph_sha256="a", weights_sha256="b", profiles=(shapes,))
    wider = {"x": ShapeExtent(min=(1, 4), opt=(2, 4), max=(9, 4))}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"graph_sha256": "c"}, "the graph changed"),
        ({"weights_sha256": "c"}, "the weights changed"),
        ({"profiles": (wider,)}, "the shapes of x changed from [1, 4] [2, 4] [8, 4] to [1, 4] [2, 4] [9, 4]"),
        ({"profiles": ()}, "the shapes of x changed from [1, 4] [2, 4] [8, 4] to none"),
        (
            {"profiles": (shapes, wider)},
            "the shapes of x changed from [1, 4] [2, 4] [8, 4] to [1, 4] [2, 4] [8, 4] and [1, 4] [2, 4] [9, 4]",
        ),
    ]
    assert stale_key_reasons(key, key) == []
    for update, reason in changes:
        other = key.model_copy(update=update)
        assert stale_key_reasons(key, other) == [reason]
        assert other.fingerprint(BASE) != key.fingerprint(BASE)


def test_a_request_takes_what_is_not_said_from_the_bundle(capacity_bundle) -> None:
    manifest = capacity_bundle("bf16").manifest
    request = make_request(manifest, Flavour.TENSORRT_RTX, "1.7.1", None, opt_batches=[2])
    assert (request.precision, request.opt_batches, request.max_batch) == (Precision.BF16, (2,), manifest.max_batch)
    assert make_request(manifest, Flavour.TENSORRT_RTX, "1.7.1", None, max_batch=64).opt_batches == (1, 8, 64)
    assert make_request(manifest, Flavour.TENSORRT_RTX, "1.7.1", None, opt_batches=(4, 1, 4)).opt_batches == (1, 4)


def test_tensorrt_is_bound_to_the_gpu_it_builds_on(capacity_bundle) -> None:
    manifest = capacity_bundle().manifest
    request = make_request(manifest, Flavour.TENSORRT, "11.4.0", GPU)
    assert (request.gpu, request.compute_capabilities) == ("NVIDIA H200", ("9.0",))
    other = make_request(manifest, Flavour.TENSORRT, "11.4.0", Gpu("NVIDIA L4", "8.9"))
    assert stale_reasons(request, other) == [
        "the compute capabilities: 9.0 became 8.9",
        "the GPU: NVIDIA H200 became NVIDIA L4",
    ]


def test_dynamic_routing_is_refused_where_there_is_no_nonzero(make_bundle) -> None:
    manifest = make_bundle(routing="dynamic").manifest
    with pytest.raises(BackendError) as caught:
        make_request(manifest, Flavour.TENSORRT_RTX, "1.7.1", None)
    assert str(caught.value) == (
        "tensorrt-rtx has no NonZero, which dynamic routing needs; export a bundle with a fixed token capacity: `dydit "
        "calibrate CHECKPOINT --steps 12 --max-subnets 4 --out CAL.json`, then `dydit export CHECKPOINT --steps 12 "
        "--max-subnets 4 --routing capacity --calibration CAL.json --out BUNDLE`, then `dydit build BUNDLE`; or build "
        "with --flavour tensorrt on the machine with the GPU"
    )
    make_request(manifest, Flavour.TENSORRT, "11.4.0", GPU)


REFUSALS: list[tuple[Flavour, Gpu | None, dict[str, Any], str]] = [
    (Flavour.TENSORRT, None, {}, "tensorrt builds on the GPU that runs the engines, but there is no NVIDIA driver"),
    (Flavour.TENSORRT, GPU, {"compute_capabilities": ("8.9",)}, "tensorrt builds for the GPU that it builds on"),
    (
        Flavour.TENSORRT_RTX,
        None,
        {"compute_capabilities": ("9.0",)},
        "cannot build for compute capability 9.0, only for 8.0, 8.6, 8.9, 12.0, 12.1; remove --compute-capability",
    ),
    (Flavour.TENSORRT_RTX, None, {"compute_capabilities": ("7.5",)}, "has no fp32 matrix product for compute cap"),
    (
        Flavour.TENSORRT_RTX,
        None,
        {"compute_capabilities": ("8.9", "8.9")},
        "compute capability is given twice: 8.9, 8.9",
    ),
    (
        Flavour.TENSORRT_RTX,
        None,
        {"hardware_compatibility": HardwareCompatibility.AMPERE_PLUS},
        "--hardware-compatibility is for tensorrt; engines of tensorrt-rtx run on all GPUs of compute capability "
        "8.0, 8.6, 8.9, 12.0, 12.1, unless",
    ),
    (Flavour.TENSORRT_RTX, None, {"version_compatible": True}, "run only with the version that built them"),
    *(
        (
            Flavour.TENSORRT_RTX,
            gpu,
            {},
            f"8.0, 8.6, 8.9, 12.0 and 12.1, but not on the {gpu} here; build with --flavour",
        )
        for gpu in (GPU, Gpu("NVIDIA B200", "10.0"), Gpu("NVIDIA B300", "10.3"), Gpu("NVIDIA T4", "7.5"))
    ),
]


@pytest.mark.parametrize(("flavour", "gpu", "settings", "message"), REFUSALS)
def test_what_cannot_be_built_is_refused_before_any_build(
    capacity_bundle, flavour: Flavour, gpu: Gpu | None, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(BackendError) as caught:
        make_request(capacity_bundle().manifest, flavour, "1.7.1", gpu, **settings)
    assert message in str(caught.value)


@pytest.mark.parametrize("capability", ["8.0", "8.6"])
def test_fp8_is_not_built_for_gpus_that_do_not_have_it(capacity_bundle, capability: str) -> None:
    manifest = capacity_bundle().manifest.model_copy(update={"precision": Precision.FP8})
    message = f"GPUs of compute capability {capability} have no matrix products in fp8, only those of 8.9, 12.0, 12.1; "
    for gpu, targets in ((Gpu("NVIDIA A10", capability), ()), (None, ("8.9", capability))):
        with pytest.raises(BackendError, match=message):
            make_request(manifest, Flavour.TENSORRT_RTX, "1.7.1", gpu, compute_capabilities=targets)
    make_request(manifest, Flavour.TENSORRT_RTX, "1.7.1", Gpu("NVIDIA L4", "8.9"))
    int8 = manifest.model_copy(update={"precision": Precision.INT8_STATIC})
    make_request(int8, Flavour.TENSORRT_RTX, "1.7.1", None, compute_capabilities=(capability,))


def test_a_machine_whose_gpu_is_no_target_builds_for_others(capacity_bundle) -> None:
    """Where the GPU does not matter, or where the target is named."""
    manifest = capacity_bundle().manifest
    make_request(manifest, Flavour.TENSORRT_RTX, "1.7.1", None)
    make_request(manifest, Flavour.TENSORRT_RTX, "1.7.1", Gpu("NVIDIA L4", "8.9"))
    request = make_request(manifest, Flavour.TENSORRT_RTX, "1.7.1", GPU, compute_capabilities=("8.9",))
    assert request.compute_capabilities == ("8.9",)


def test_a_batch_beyond_the_largest_is_refused(capacity_bundle) -> None:
    with pytest.raises(ConfigError, match="opt_batches 8 is larger than max_batch 4"):
        make_request(capacity_bundle().manifest, Flavour.TENSORRT_RTX, "1.7.1", None, opt_batches=[8], max_batch=4)


def test_a_static_model_is_built_by_either(capacity_bundle) -> None:
    static = capacity_bundle().manifest.model_copy(update={"routing": None})
    require_buildable(static, BASE, None)
