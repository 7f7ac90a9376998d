"""Copies between GPU and host that ONNX Runtime adds to a graph are found, and said once.

`optimised_with_copies.onnx` is what onnxruntime-gpu 1.31.1 made, with stand-ins for CUDA's libraries
(`scripts/cuda_kernels.py`), of a graph that reads a value of its shape on the GPU and has a node without a kernel.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from dydit.bundle.manifest import Routing
from dydit.errors import BackendError
from dydit.runtime.backends import session
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.device_copies import Copy, copies
from dydit.runtime.backends.session import base_options, open_session

WITH_COPIES = Path(__file__).with_name("optimised_with_copies.onnx")


def test_every_copy_is_found_with_the_nodes_on_both_sides():
    assert copies(WITH_COPIES) == [
        Copy(False, "the input x", ("Shape sizes", "Abs magnitude")),
        Copy(False, "the output of Cast as_float", ("Sub difference",)),
        Copy(True, "the output of Sub difference", ("Det determinant",)),
        Copy(False, "the output of Det determinant", ("Neg negated",)),
    ]
    assert str(copies(WITH_COPIES)[2]) == (
        "the output of Sub difference is copied from the GPU to the host for Det determinant"
    )


def test_they_are_those_that_the_package_onnx_reads():
    nodes = onnx.load(WITH_COPIES).graph.node
    read = [node.op_type == "MemcpyToHost" for node in nodes if node.op_type.startswith("Memcpy")]
    assert [each.to_host for each in copies(WITH_COPIES)] == read


def test_what_is_no_graph_is_refused(tmp_path):
    (tmp_path / "text").write_bytes(b"this is not a graph")
    with pytest.raises(ValueError, match="not an ONNX graph"):
        copies(tmp_path / "text")
    with pytest.raises(OSError, match="No such file"):
        copies(tmp_path / "missing")


def test_a_graph_that_runs_on_one_device_has_none(make_bundle, tmp_path):
    bundle = make_bundle(routing=Routing.CAPACITY, steps=3)
    options = base_options(onnxruntime, BackendOptions(threads=1))
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    open_session(onnxruntime, bundle.file("subnet-0000.onnx"), "cpu", options)
    assert len(onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node) > 50
    assert copies(tmp_path / "optimised.onnx") == []
    assert (tmp_path / "optimised.onnx").stat().st_size < 200_000, "weights stay where they are"


@pytest.fixture
def with_copies(monkeypatch):
    """An onnxruntime whose sessions run on the CPU, and save an optimised graph with copies where asked to save one."""
    real, saved = session.runtime(), []
    start = real.InferenceSession

    def opened(file, options, providers, **more):
        if path := options.optimized_model_filepath:
            saved.append(path)
            options.optimized_model_filepath = ""
            Path(path).write_bytes(WITH_COPIES.read_bytes())
        return start(file, options, providers=["CPUExecutionProvider"], **more)

    monkeypatch.setattr(real, "InferenceSession", opened)
    return real, saved


def test_copies_on_a_gpu_are_said_with_the_node(make_bundle, with_copies):
    ort, saved = with_copies
    file = make_bundle(steps=3).file("conditioning.onnx")
    with pytest.warns(UserWarning) as caught:
        open_session(ort, file, "cuda", base_options(ort, BackendOptions(threads=1)))
    (warning,) = caught
    assert str(warning.message).startswith(
        "conditioning.onnx is slow, and cannot be captured in a CUDA graph, because in each run the input x is copied "
        "from the host to the GPU for Shape sizes, Abs magnitude, and 3 more values; this onnxruntime"
    )
    (path,) = saved
    assert not Path(path).parent.exists(), "nothing is left"


@pytest.mark.parametrize(("device", "options"), [("cpu", {}), ("cuda", {"enable_cuda_graph": "1"})])
def test_no_graph_is_saved_where_there_can_be_no_copies(make_bundle, with_copies, device, options):
    """On the CPU, and with CUDA graphs, with which ONNX Runtime itself refuses copies."""
    ort, saved = with_copies
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_session(
            ort, make_bundle(steps=3).file("conditioning.onnx"), device, base_options(ort, BackendOptions()), options
        )
    assert saved == []


def test_a_graph_that_cannot_be_saved_runs_unwatched(make_bundle, monkeypatch):
    ort = session.runtime()
    start, asked = ort.InferenceSession, []

    def opened(file, options, providers, **more):
        asked.append(options.optimized_model_filepath)
        if asked[-1]:
            raise RuntimeError("no space left on device")
        return start(file, options, providers=["CPUExecutionProvider"], **more)

    monkeypatch.setattr(ort, "InferenceSession", opened)
    file = make_bundle(steps=3).file("conditioning.onnx")
    made, _ = open_session(ort, file, "cuda", base_options(ort, BackendOptions(threads=1)))
    out = made.run(None, {"timesteps": np.array([3.0], np.float32), "labels": np.array([1])})
    assert np.isfinite(out[0]).all() and asked[1:] == [""]
    monkeypatch.setattr(ort, "InferenceSession", lambda *arguments, **more: (_ for _ in ()).throw(RuntimeError("bad")))
    with pytest.raises(BackendError, match=r"cannot load .*conditioning\.onnx: bad"):
        open_session(ort, file, "cuda", base_options(ort, BackendOptions(threads=1)))
