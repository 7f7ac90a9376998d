"""How engines and contexts are used: by a stand-in that notes every call, and by the names of the real module."""

from __future__ import annotations

import importlib
import logging
from enum import IntFlag
from types import SimpleNamespace

import pytest

from dydit.errors import BackendError
from dydit.runtime.device.engine_runtime import _REASONS, Runtime
from dydit.runtime.device.execute import CaptureError, Tensor
from dydit.runtime.device.launches import EngineMemory
from dydit.runtime.device.operations import CONDITIONER, EngineId

X, OTHER, OUT = (
    Tensor("x", "float32", (2, 4), 1024),
    Tensor("x", "float32", (3, 4), 1024),
    Tensor("y", "float32", (2, 4), 2048),
)
WORK = (4096, 500)


class StandIn:
    """As much of TensorRT as is used. `refuse`: calls that return False or None; `rtx`: which flavour.

    `invalid`: the diagnostics of every engine. `profiles`: of each profile, the extents of inputs that have one.
    """

    def __init__(self, rtx=False, refuse=(), capturable=True, invalid=0, profiles=({"timesteps": ((1,), (4,), (9,))},)):
        self.calls, self.refuse, self.capturable = [], set(refuse), capturable
        self.capturing = False
        self.__name__, self.__version__ = ("tensorrt_rtx", "1.7.1") if rtx else ("tensorrt", "11.4.0")
        self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
        if rtx:
            self.CudaGraphStrategy = SimpleNamespace(DISABLED="disabled")
            self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
            self.EngineValidity = SimpleNamespace(INVALID=2)
            self.EngineInvalidityDiagnostics = IntFlag("EngineInvalidityDiagnostics", {"UNSUPPORTED_CC": 2, "NEW": 128})
        stand_in = self

        class ILogger:
            Severity = SimpleNamespace(ERROR=1, WARNING=2, INFO=3)

            def __init__(self):
                pass

        class Runtime:
            def __init__(self, logger):
                self.logger = stand_in.logger = logger

            def deserialize_cuda_engine(self, data):
                return stand_in.say("deserialize", data) and Engine()

        if rtx:
            Runtime.get_engine_validity = lambda self, data: (2 if invalid else 0, invalid)

        class Config(SimpleNamespace):
            def set_execution_context_allocation_strategy(self, strategy):
                self.strategy = strategy

            def create_runtime_cache(self):
                stand_in.say("create cache")
                return SimpleNamespace(
                    deserialize=lambda data: stand_in.say("fill cache", data),
                    serialize=lambda: stand_in.say("save cache") and bytearray(b"compiled"),
                )

            def set_runtime_cache(self, cache):
                self.cache = cache
                return stand_in.say("set cache")

        class Engine:
            device_memory_size_v2 = 500

            def create_runtime_config(self):
                return Config()

            def create_execution_context(self, how):
                stand_in.how = how
                return stand_in.say("context") and Context()

            num_optimization_profiles = len(profiles)

            def get_tensor_profile_shape(self, name, profile):
                return list(profiles[profile].get(name, ()))

        class Context:
            def __getattr__(self, name):
                if name == "is_stream_capturable":
                    raise AttributeError(name)
                return lambda *arguments: stand_in.say(name, *arguments)

        if rtx:

            def is_stream_capturable(self, stream):
                assert not stand_in.capturing, "it may not be asked while a stream is captured"
                return stand_in.say("is_stream_capturable", stream) and stand_in.capturable

            Context.is_stream_capturable = is_stream_capturable

        self.ILogger, self.Runtime = ILogger, Runtime

    def say(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name in self.refuse:
            self.logger.log(1, f"[E] {name} is\nimpossible")
            self.logger.log(3, "chatter")
            return None
        return True

    def took(self):
        calls, self.calls = self.calls, []
        return calls


def loaded(stand_in, engine=CONDITIONER, cache=None):
    runtime = Runtime(stand_in, lambda each: f"bytes of {each}".encode(), cache)
    return runtime, runtime.load(engine)


def test_a_launch_sets_shapes_memory_addresses_and_nothing_twice():
    trt = StandIn()
    _, engine = loaded(trt, EngineId(2))
    assert engine.memory == EngineMemory(500, len("bytes of subnetwork 2"))
    assert trt.took() == [("deserialize", b"bytes of subnetwork 2")]
    engine.launch([X], [OUT], WORK, 77, capturing=False)
    assert trt.took() == [
        ("context",),
        ("set_input_shape", "x", (2, 4)),
        ("set_device_memory", 4096, 500),
        ("set_tensor_address", "x", 1024),
        ("set_tensor_address", "y", 2048),
        ("execute_async_v3", 77),
    ]
    assert trt.how == "user managed"
    engine.launch([X], [OUT], WORK, 77, capturing=True)
    assert trt.took() == [("execute_async_v3", 77)]
    engine.launch([X], [OUT._replace(address=512)], WORK, 77, capturing=False)
    assert trt.took() == [("set_tensor_address", "y", 512), ("execute_async_v3", 77)]
    engine.launch([X], [OUT._replace(address=512)], (8192, 600), 77, capturing=False)
    assert trt.took() == [("set_device_memory", 8192, 600), ("execute_async_v3", 77)]


def test_other_shapes_get_a_context_of_their_own():
    """So that a graph captured from the first is not touched."""
    trt = StandIn()
    runtime, engine = loaded(trt)
    for x in (X, OTHER, X, OTHER):
        engine.launch([x], [OUT], WORK, 1, capturing=False)
    calls = [call[0] for call in trt.took()]
    assert calls.count("context") == calls.count("set_input_shape") == runtime.contexts == 2
    assert calls.count("execute_async_v3") == 4
    assert engine.longest("timesteps") == (9,)
    engine.close()


def test_rtx_compiles_at_once_keeps_its_kernels_and_leaves_graphs_to_us():
    trt = StandIn(rtx=True)
    runtime, engine = loaded(trt, cache=b"kernels of before")
    assert runtime.compiled() is None
    engine.launch([X], [OUT], WORK, 1, capturing=False)
    engine.launch([OTHER], [OUT], WORK, 1, capturing=False)
    calls = trt.took()
    assert calls.count(("create cache",)) == 1 and ("fill cache", b"kernels of before") in calls
    assert (trt.how.strategy, trt.how.cuda_graph_strategy) == ("user managed", "disabled")
    assert trt.how.dynamic_shapes_kernel_specialization_strategy == "eager" and trt.how.cache is not None
    assert runtime.compiled() == b"compiled"
    again, engine = loaded(StandIn(rtx=True), cache=b"compiled")
    engine.launch([X], [OUT], WORK, 1, capturing=False)
    assert again.compiled() is None, "nothing new"


@pytest.mark.parametrize(
    ("call", "trouble"),
    [
        ("context", "cannot make an execution context"),
        ("set_input_shape", r"does not take x of shape \(2, 4\)"),
        ("set_tensor_address", "has no input or output x"),
        ("execute_async_v3", "failed"),
    ],
)
def test_what_tensorrt_refuses_is_one_line_with_its_reason(call, trouble):
    _, engine = loaded(StandIn(refuse=[call]))
    with pytest.raises(BackendError, match=rf"^tensorrt 11.4.0: conditioning {trouble}: \[E\] {call} is impossible$"):
        engine.launch([X], [OUT], WORK, 1, capturing=False)


def test_an_engine_that_cannot_be_loaded_says_why():
    with pytest.raises(
        BackendError, match=r"^tensorrt 11.4.0 cannot load subnetwork 3: \[E\] deserialize is impossible$"
    ):
        loaded(StandIn(refuse=["deserialize"]), EngineId(3))


def test_too_little_memory_to_work_in_is_noticed():
    _, engine = loaded(StandIn())
    with pytest.raises(BackendError, match=r"needs a workspace of 500 bytes, but got 400; remove memory.json"):
        engine.launch([X], [OUT], (4096, 400), 1, capturing=False)


def test_a_context_that_cannot_be_captured_says_so():
    """It was asked when it first ran, because it may not be asked in a capture."""
    trt = StandIn(rtx=True, capturable=False)
    _, engine = loaded(trt)
    engine.launch([X], [OUT], WORK, 1, capturing=False)
    engine.launch([X], [OUT], WORK, 1, capturing=False)
    assert [call[0] for call in trt.took()].count("is_stream_capturable") == 1
    trt.capturing = True
    with pytest.raises(CaptureError, match="conditioning cannot be captured in a CUDA graph"):
        engine.launch([X], [OUT], WORK, 1, capturing=True)
    assert trt.took() == [], "nothing is queued"


@pytest.mark.parametrize("rtx", [True, False])
def test_a_context_that_ran_is_captured_without_being_asked(rtx):
    """Full TensorRT cannot be asked at all."""
    trt = StandIn(rtx)
    _, engine = loaded(trt)
    engine.launch([X], [OUT], WORK, 1, capturing=False)
    asked = [call for call in trt.took() if call[0] == "is_stream_capturable"]
    assert asked == ([("is_stream_capturable", 1)] if rtx else [])
    trt.capturing = True
    engine.launch([X], [OUT], WORK, 1, capturing=True)
    assert trt.took() == [("execute_async_v3", 1)]


def test_shapes_that_never_ran_are_not_captured():
    """Their context would be made in the capture, which allocates."""
    trt = StandIn(rtx=True)
    _, engine = loaded(trt)
    engine.launch([X], [OUT], WORK, 1, capturing=False)
    trt.took()
    with pytest.raises(CaptureError, match="conditioning was not run with these shapes before it was captured"):
        engine.launch([OTHER], [OUT], WORK, 1, capturing=True)
    assert trt.took() == []


@pytest.mark.parametrize("rtx", [True, False])
def test_an_execution_that_is_refused_in_a_capture_ends_only_the_capture(rtx):
    trt = StandIn(rtx)
    _, engine = loaded(trt)
    engine.launch([X], [OUT], WORK, 1, capturing=False)
    trt.refuse = {"execute_async_v3"}
    with pytest.raises(CaptureError, match=r"conditioning failed in a CUDA graph: .*execute_async_v3 is impossible"):
        engine.launch([X], [OUT], WORK, 1, capturing=True)
    trt.refuse = set()
    engine.launch([X], [OUT], WORK, 1, capturing=False)


@pytest.mark.parametrize("refused", ["fill cache", "set cache", "save cache"])
def test_a_runtime_cache_that_is_refused_is_left_alone(refused, caplog):
    """One of another GPU, say: the run goes on without it, and only a log says so."""
    trt = StandIn(rtx=True, refuse=[refused])
    runtime, engine = loaded(trt, cache=b"kernels of another machine")
    with caplog.at_level(logging.INFO):
        engine.launch([X], [OUT], WORK, 1, capturing=False)
        engine.launch([OTHER], [OUT], WORK, 1, capturing=False)
    said = [record.message for record in caplog.records]
    assert len(said) == (refused == "fill cache") and all("of another GPU, driver or version" in each for each in said)
    assert runtime.compiled() == (b"compiled" if refused == "fill cache" else None)


@pytest.mark.parametrize(
    ("diagnostics", "reason"),
    [(2, "this GPU's compute capability is not supported"), (128, "its diagnostics are 0x80")],
)
def test_an_engine_that_is_not_for_here_is_refused_before_it_is_loaded(diagnostics, reason):
    trt = StandIn(rtx=True, invalid=diagnostics)
    with pytest.raises(BackendError, match=rf"^tensorrt_rtx 1\.7\.1 cannot load conditioning: {reason}$"):
        loaded(trt)
    assert trt.took() == []


def test_tensorrt_itself_says_what_is_wrong_with_an_engine(rtx):
    """No GPU is needed for that."""
    with pytest.raises(BackendError) as caught:
        Runtime(rtx, lambda engine: b"no engine at all" * 64).load(CONDITIONER)
    assert f"tensorrt_rtx {rtx.__version__} cannot load conditioning: it is not an engine; run `dydit build`" in str(
        caught.value
    )
    assert set(_REASONS) == set(rtx.EngineInvalidityDiagnostics.__members__)


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_the_names_that_are_used_exist(name):
    """No GPU is needed for that."""
    trt = pytest.importorskip(name, exc_type=ImportError)
    used = {
        trt.Runtime: ["deserialize_cuda_engine"],
        trt.ICudaEngine: ["device_memory_size_v2", "get_tensor_profile_shape", "num_optimization_profiles"],
        trt.IExecutionContext: ["set_input_shape", "set_tensor_address", "set_device_memory", "execute_async_v3"],
        trt.ExecutionContextAllocationStrategy: ["USER_MANAGED"],
        trt.ILogger: ["Severity"],
    }
    used[trt.ICudaEngine].append("create_execution_context")
    used[trt.IExecutionContext].append("set_optimization_profile_async")
    if name == "tensorrt_rtx":
        used |= {
            trt.Runtime: [*used[trt.Runtime], "get_engine_validity"],
            trt.ICudaEngine: [*used[trt.ICudaEngine], "create_runtime_config"],
            trt.IExecutionContext: [*used[trt.IExecutionContext], "is_stream_capturable"],
            trt.EngineValidity: ["INVALID"],
            trt.IRuntimeConfig: [
                "cuda_graph_strategy",
                "dynamic_shapes_kernel_specialization_strategy",
                "set_execution_context_allocation_strategy",
                "create_runtime_cache",
                "set_runtime_cache",
            ],
            trt.IRuntimeCache: ["serialize", "deserialize"],
            trt.CudaGraphStrategy: ["DISABLED"],
            trt.DynamicShapesKernelSpecializationStrategy: ["EAGER"],
        }
    missing = [
        f"{owner.__name__}.{each}" for owner, names in used.items() for each in names if not hasattr(owner, each)
    ]
    assert not missing
    assert importlib.import_module(name).ILogger.Severity.ERROR <= trt.ILogger.Severity.WARNING
    runtime = Runtime(trt, lambda engine: b"this is no engine")
    assert runtime.compiled() is None


SEVERAL = tuple(
    {"x": ((low, 4), (high, 4), (high, 4)), "timesteps": ((1,), (4,), (low + 4,))}
    for low, high in ((1, 1), (2, 3), (4, 8))
)


def of_batch(size):
    return Tensor("x", "float32", (size, 4), 1024), Tensor("one", "float32", (2, 4), 2048)


@pytest.mark.parametrize("rtx", [False, True])
def test_a_batch_runs_on_the_profile_that_is_tuned_for_it(rtx):
    """Chosen on the stream of the launches, before the shapes are set; each context keeps its own."""
    trt = StandIn(rtx, profiles=SEVERAL)
    _, engine = loaded(trt)
    for size, profile in ((1, 0), (2, 1), (3, 1), (4, 2), (8, 2)):
        trt.took()
        engine.launch(of_batch(size), [OUT], WORK, 77, capturing=False)
        calls = [call for call in trt.took() if call[0] in ("set_optimization_profile_async", "set_input_shape")]
        assert calls[0] == ("set_optimization_profile_async", profile, 77) and calls[1][0] == "set_input_shape"
        engine.launch(of_batch(size), [OUT], WORK, 77, capturing=True)
        assert [call[0] for call in trt.took()] == ["execute_async_v3"]
    assert engine.longest("timesteps") == (8,), "the largest of all profiles"
    assert loaded(StandIn(rtx))[1].longest("timesteps") == (9,)


@pytest.mark.parametrize(("size", "profile"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (9, 2)])
def test_of_profiles_that_take_the_same_the_one_that_is_tuned_for_it_is_chosen(size, profile):
    """As those of a text graph do: all batches of a run have as many texts as the one with the most."""
    trt = StandIn(profiles=[{"mask": ((1, 1), (opt, 6), (9, 6))} for opt in (2, 4, 9)])
    _, engine = loaded(trt)
    engine.launch([Tensor("mask", "int64", (size, 5), 1024)], [OUT], WORK, 77, capturing=False)
    assert ("set_optimization_profile_async", profile, 77) in trt.took()


def test_an_engine_of_one_profile_is_not_asked_for_another():
    trt = StandIn()
    _, engine = loaded(trt)
    engine.launch([X], [OUT], WORK, 1, capturing=False)
    assert "set_optimization_profile_async" not in [call[0] for call in trt.took()]


@pytest.mark.parametrize(
    ("refuse", "problem"),
    [("set_optimization_profile_async", "has no profile 2"), ("set_input_shape", "does not take x of shape (9, 4)")],
)
def test_a_batch_that_no_profile_takes_is_refused(refuse, problem):
    _, engine = loaded(StandIn(refuse=[refuse], profiles=SEVERAL), EngineId(1))
    with pytest.raises(BackendError) as caught:
        engine.launch(of_batch(9), [OUT], WORK, 1, capturing=False)
    assert f"subnetwork 1 {problem}" in str(caught.value) and "\n" not in str(caught.value)
