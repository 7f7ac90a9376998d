"""Where the time of a step goes, by operator: a static and a dynamic bundle on ONNX Runtime, on one thread.

    python benchmarks/operators.py --work DIR [--json docs/benchmarks/operators.json] [--plot docs/images/operators.png]
    python benchmarks/operators.py --static BUNDLE --dynamic BUNDLE

The default is DiT-S/2 with random weights and routers set to a FLOPs ratio near 0.5, a subnetwork for each step in fp32
with packed weights, one image with guidance. That is what each thread computes of a batch of as many images as threads.
Both bundles take turns, round by round. ONNX Runtime's own profiler times every node of the subnetworks; a node's time
is the median of the rounds after the first, which warms up. What conditioning takes, a share of a call for many steps,
lies between the nodes.

Products are compared with one large product, of 2048 x 2048 x 2048, on the same thread, in the same rounds. Profiling
itself takes time, so shares are better than milliseconds.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import numpy as np

from dydit.bench.bench import BenchConfig, job_of
from dydit.bench.scripts import (
    finish,
    kept_bundle,
    markdown_table,
    progress,
    random_checkpoint,
    require_settings,
    script_parser,
    settings_of,
    static_checkpoint,
    work_folder,
)
from dydit.bench.timing import Latents, MeasuredBundle
from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind
from dydit.diffusion.guidance import is_guided
from dydit.errors import ConfigError, DyditError
from dydit.export.settings import ExportConfig
from dydit.files import write_atomic
from dydit.models.dit.config import preset
from dydit.plot_style import in_few_colours
from dydit.reports.bench_report import Side, SideKind
from dydit.reports.plots_operators import operators_png
from dydit.runtime.backends import session
from dydit.runtime.resident import ResidentSubnets
from dydit.words import counted

PRODUCTS = ("products of layers", "products of attention")
GROUPS = {
    PRODUCTS[0]: ("Gemm", "FusedGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
    PRODUCTS[1]: ("MatMul", "FusedMatMul"),
    "softmax": ("Softmax",),
    "GELU": ("Gelu", "BiasGelu", "QuickGelu"),
    "layer norm": ("LayerNormalization",),
    "element by element": (
        *("Add", "Sub", "Mul", "Div", "Sqrt", "Exp", "Neg", "Sigmoid", "Tanh", "Cast", "Where", "Clip", "Max", "Min"),
        *("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "Not", "And", "Or", "ReduceSum", "ReduceMax"),
        *("Sin", "Cos", "CumSum"),
    ),
    "copies": (
        *("Transpose", "Split", "Concat", "Reshape", "Slice", "Squeeze", "Unsqueeze", "Expand", "Identity", "Tile"),
        *("Shape", "Size", "Range", "ConstantOfShape", "Pad", "Conv", "DepthToSpace"),
    ),
    "gathers and scatters": (
        *("Gather", "GatherND", "GatherElements", "ScatterND", "ScatterElements", "NonZero", "TopK", "Compress"),
    ),
    "quantization": ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
}
"""Operators as ONNX Runtime runs them, by what they do; all others are `OTHERS`."""
OTHERS, BETWEEN = "others", "between the nodes"
STATIC, DYNAMIC = "static", "dynamic"
LARGE = 2048
"""Rows, columns and depth of the large product."""


def group_of(operator: str) -> str:
    """The group of an operator."""
    return next((name for name, operators in GROUPS.items() if operator in operators), OTHERS)


@contextmanager
def profiled(folder: Path) -> Iterator[list[tuple[str, Any]]]:
    """The file and the ONNX Runtime session of all that is opened in the block; each writes its profile to `folder`."""
    opened: list[tuple[str, Any]] = []
    plain_options, plain_open = session.base_options, session.open_session

    def base_options(*arguments: Any) -> Any:
        made = plain_options(*arguments)
        made.enable_profiling = True
        made.profile_file_prefix = str(folder / f"session-{len(opened)}")
        return made

    def open_session(ort: Any, file: Path, *arguments: Any, **others: Any) -> Any:
        made, memory = plain_open(ort, file, *arguments, **others)
        opened.append((file.name, made))
        return made, memory

    with mock.patch.multiple(session, base_options=base_options, open_session=open_session):
        yield opened


Nodes = Mapping[tuple[str, str], float]
"""Microseconds of each node of a run, by operator and name."""


def runs_of(profile: Path) -> list[Nodes]:
    """The nodes of each run of a session, in order."""
    runs, nodes = [], Counter[tuple[str, str]]()
    for event in json.loads(profile.read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes[event["args"]["op_name"], event["name"]] += event["dur"]
        elif event["name"] == "model_run":
            runs.append(nodes)
            nodes = Counter()
    return runs


def of_rounds(runs: Sequence[Nodes], rounds: int) -> Counter[str]:
    """Microseconds by operator of a round: medians of each node over all rounds but the first, which warms up.

    A round has the same runs in the same order, with the same inputs.
    """
    steps = len(runs) // rounds
    operators = Counter[str]()
    for step in range(steps):
        same = runs[steps + step :: steps]
        for node in same[0]:
            operators[node[0]] += float(np.median([run[node] for run in same]))
    return operators


class Profiled:
    """A bundle whose rounds are profiled; all its subnetworks stay loaded."""

    def __init__(self, bundle: Bundle, options: Namespace, folder: Path):
        config = BenchConfig(
            labels=tuple(range(options.images)), steps_measured=options.steps, threads=1, latents=Latents.NOISE,
            cfg_scale=bundle.manifest.model.guidance_scale(None),
        )  # fmt: skip
        side = Side(name="", kind=SideKind.BUNDLE, path=str(bundle.path), packed=True)
        manifest = bundle.manifest
        self._files = {each.file for each in manifest.subnets}
        self._ms: list[tuple[float, ...]] = []
        with profiled(folder) as self._opened:
            self._measured = MeasuredBundle(job_of(side, config, manifest.model, manifest.sampling, ()))
            self._measured.subnets, self._measured.keep_all = ResidentSubnets(self._measured.backend), True
            self._measured.load()

    def round(self) -> None:
        """One round; the first one warms up."""
        self._ms.append(self._measured.round().ms)

    def figures(self) -> dict[str, Any]:
        """Milliseconds of a step by operator and by group, and the multiply-adds of its blocks; ends the profiles."""
        rounds, operators = len(self._ms), Counter[str]()
        for name, opened in self._opened:
            runs = runs_of(Path(opened.end_profiling()))
            if name in self._files:
                operators.update(of_rounds(runs, rounds))
        by_operator = {name: value / 1e3 / len(self._ms[0]) for name, value in operators.most_common()}
        groups = Counter[str]()
        for name, value in by_operator.items():
            groups[group_of(name)] += value
        step = float(np.median(np.mean(self._ms[1:], axis=1)))
        return {
            "step_ms": step,
            "groups": {**dict(groups.most_common()), BETWEEN: max(0.0, step - sum(groups.values()))},
            "operators": by_operator,
            "macs": self._measured.decided().macs,
            "rows": len(self._measured.labels) * (2 if is_guided(self._measured.job.cfg_scale) else 1),
        }


class LargeProduct:
    """One large product on one thread: what a CPU reaches at best. `seconds`: of each round."""

    def __init__(self) -> None:
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        weights = np.random.default_rng(0).standard_normal((LARGE, LARGE), np.float32)
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [LARGE, LARGE]) for name in "xy"]
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        graph = helper.make_graph([node], "product", ends[:1], ends[1:], [numpy_helper.from_array(weights, "w")])
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=onnx.IR_VERSION_2024_3_25
        )
        ort = session.runtime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self._x, self.seconds = weights.T.copy(), list[float]()

    def round(self) -> None:
        """Multiply once."""
        start = perf_counter()
        self._session.run(None, {"x": self._x})
        self.seconds.append(perf_counter() - start)

    @property
    def macs_per_second(self) -> float:
        """Of the median round, the first not counted."""
        return float(LARGE**3 / np.median(self.seconds[1:]))


def prepared(folder: Path, options: Namespace) -> dict[str, Bundle]:
    """Both bundles: those that are given, or those of a model with random weights, made in `folder`."""
    if options.static and options.dynamic:
        given = {STATIC: Bundle.open(options.static), DYNAMIC: Bundle.open(options.dynamic)}
        models = [each.manifest.model.sizes.without_routers() for each in given.values()]
        if models[0] != models[1]:
            raise ConfigError(f"{options.static} and {options.dynamic} are models of other sizes; give two of one size")
        if (most := min(each.manifest.max_batch for each in given.values())) < options.images:
            raise ConfigError(f"{options.images} images, but a bundle was exported for batches up to {most}")
        return given
    paths = {STATIC: folder / "static.safetensors", DYNAMIC: folder / "dynamic.safetensors"}
    if not all(path.exists() for path in paths.values()):
        static_checkpoint(paths[STATIC], random_checkpoint(paths[DYNAMIC], preset(options.preset), options.flops_ratio))
    config = ExportConfig(max_batch=options.images)
    exports = {STATIC: config, DYNAMIC: config.model_copy(update={"plan": PlanKind.PER_STEP})}
    return {name: kept_bundle(paths[name], folder / name, exports[name]) for name in paths}


def measure(options: Namespace) -> dict[str, Any]:
    """The figures of both bundles."""
    settings = settings_of(options)
    if options.static:
        settings |= {"static": str(options.static), "dynamic": str(options.dynamic), "preset": "", "flops_ratio": 0.0}
    with work_folder(options.work) as folder:
        require_settings(folder, settings)
        bundles = prepared(folder, options)
        profiles = folder / "profiles"
        profiles.mkdir(exist_ok=True)
        sides = {name: Profiled(bundle, options, profiles) for name, bundle in bundles.items()}
        large, show = LargeProduct(), progress("round")
        for turn in range(1 + options.repeats):
            for each in (large, *sides.values()):
                each.round()
            show(turn + 1, 1 + options.repeats)
        figures = {name: each.figures() for name, each in sides.items()}
    best = large.macs_per_second
    for each in figures.values():
        each["products_of_best"] = each["macs"] * each["rows"] / (_products(each) / 1e3) / best
    return {"settings": settings, "large_product_gmacs": best / 1e9, "sides": figures}


def table(report: Mapping[str, Any]) -> str:
    """The figures of a report as Markdown."""
    static, dynamic = (report["sides"][name] for name in (STATIC, DYNAMIC))
    names = list(dict.fromkeys([*dynamic["groups"], *static["groups"]]))
    rows = []
    for name in names:
        both = [side["groups"].get(name, 0.0) for side in (static, dynamic)]
        rows.append(
            [
                name,
                *(f"{ms:.1f} ({ms / side['step_ms']:.1%})" for ms, side in zip(both, (static, dynamic), strict=True)),
            ]
        )
    rows.append(["a step", *(f"{side['step_ms']:.1f}" for side in (static, dynamic))])
    allowed = static["macs"] / dynamic["macs"]
    best = report["large_product_gmacs"]
    lines = [
        f"Multiply-adds allow {allowed:.2f}; the products are {_products(static) / _products(dynamic):.2f} times as "
        f"fast, and a step {static['step_ms'] / dynamic['step_ms']:.2f} times.",
        f"A product of {LARGE} x {LARGE} x {LARGE} reaches {best:.1f} G multiply-adds a second on one thread; those of "
        f"the static model {static['products_of_best']:.0%} of that, of the dynamic one "
        f"{dynamic['products_of_best']:.0%}.",
    ]
    head = ["milliseconds of a step (share)", STATIC, DYNAMIC]
    return "\n\n".join([markdown_table(head, rows), *lines])


def _products(side: Mapping[str, Any]) -> float:
    """Milliseconds of a step in products."""
    return float(sum(side["groups"].get(name, 0.0) for name in PRODUCTS))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write and draw."""
    parser = script_parser(
        __doc__, {"steps": "sampling steps of a round"}, images=1, steps=6, repeats=5, preset="S/2", flops_ratio=0.5
    )
    parser.add_argument("--work", type=Path, help="keep the models and bundles here")
    parser.add_argument("--static", type=Path, metavar="BUNDLE", help="a static bundle, in place of random weights")
    parser.add_argument("--dynamic", type=Path, metavar="BUNDLE", help="and a dynamic one")
    parser.add_argument("--plot", type=Path, help="draw the figures into this PNG file")
    options = parser.parse_args(arguments)
    if bool(options.static) != bool(options.dynamic):
        parser.error("give both --static and --dynamic, or neither")
    try:
        report = measure(options)
    except DyditError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(report))
    if options.plot:
        groups = {name: side["groups"] for name, side in report["sides"].items()}
        model = f"{options.static}, {options.dynamic}" if options.static else f"DiT-{options.preset}, random weights"
        detail = f"{model}, {counted(options.images, 'image')} with guidance, ONNX Runtime, one thread"
        write_atomic(options.plot, in_few_colours(operators_png(groups, detail)))
    return finish(options, report, {})


if __name__ == "__main__":
    sys.exit(main())
