"""DiT-S/2 on the CPU: how much of the multiply-adds that a DyDiT saves is saved in time?

    python benchmarks/cpu_dits2.py [--packed] [--plans] [--json docs/benchmarks/cpu_dits2.json]

It makes the figures for DiT-S/2 with one image (docs/benchmarks/cpu_dits2*.json).

One image with guidance, fp32, random weights with routers set to a FLOPs ratio near 0.5, 25 of 250 steps. The
contenders take turns in one run: the bundle with a subnetwork for each step, the masked PyTorch model (what the public
code does), the static model of the same weights as a bundle, and with --plans two more plans of the dynamic model: 16
merged subnetworks, and one graph of dynamic width. All bundles run on onnxruntime. Limits: 2.4 times as fast as the
masked model, and 0.85 of what the multiply-adds allow against the static one. Exit code 1 where one is missed. Nothing
else should run on the machine; the load average is in the report.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from dydit.bench.bench import BenchConfig, run_bench
from dydit.bench.scripts import bench_table, progress, random_checkpoint, script_parser, show_limits, static_checkpoint
from dydit.bench.timing import Latents
from dydit.bundle.manifest import PlanKind, Routing
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.files import write_json
from dydit.models.dit.config import preset
from dydit.reports.bench_report import Side, SideKind

MASKED_LIMIT, STATIC_LIMIT = 2.4, 0.85
STATIC, MASKED = "onnxruntime static", "pytorch masked"


def prepare(folder: Path, flops_ratio: float, routing: Routing, plans: bool, packed: bool) -> list[Side]:
    """Export the bundles into `folder`; returns the contenders."""
    dynamic = random_checkpoint(folder / "dynamic.safetensors", preset("S/2"), flops_ratio)
    exports = {
        "onnxruntime per step": (dynamic, ExportConfig(plan=PlanKind.PER_STEP, routing=routing)),
        STATIC: (static_checkpoint(folder / "static.safetensors", dynamic), ExportConfig()),
    }
    if plans:
        exports["onnxruntime 16 merged"] = dynamic, ExportConfig(max_subnets=16, routing=routing)
        exports["onnxruntime sliding"] = dynamic, ExportConfig(plan=PlanKind.DYNAMIC_WIDTH, routing=routing)
    sides = []
    for name, (checkpoint, config) in exports.items():
        bundle = export(checkpoint, folder / name.replace(" ", "-"), config)
        sides.append(Side(name=name, kind=SideKind.BUNDLE, path=str(bundle.path), packed=packed))
    sides.insert(1, Side(name=MASKED, kind=SideKind.TORCH_MASKED, path=str(dynamic.path)))
    return sides


def main() -> int:
    """Run, print, and tell by the exit code whether the limits hold."""
    parser = script_parser(__doc__, {"steps": "steps of a round"}, threads=2, repeats=7, steps=25, flops_ratio=0.5)
    parser.add_argument("--routing", default="dynamic", choices=[each.value for each in Routing])
    parser.add_argument("--packed", action="store_true", help="onnxruntime packs weights: faster steps, more memory")
    parser.add_argument("--plans", action="store_true", help="also time a merged plan and the one of dynamic width")
    options = parser.parse_args()
    config = BenchConfig(
        steps_measured=options.steps, repeats=options.repeats, threads=options.threads, latents=Latents.NOISE
    )
    with tempfile.TemporaryDirectory() as folder:
        routing = Routing(options.routing)
        sides = prepare(Path(folder), options.flops_ratio, routing, options.plans, options.packed)
        report = run_bench(sides, config, progress=progress("round"))
    print(bench_table(report, "DiT-S/2, fp32", MASKED, STATIC))
    first = report.sides[0]
    ratio, tokens = (sum(each) / len(each) for each in (first.flops_ratio, first.token_share))
    print(f"FLOPs ratio measured: {ratio:.3f} (tokens routed: {tokens:.3f})", *report.lines, sep="\n")
    over_masked, of_bound = report.comparison(MASKED).median, report.comparison(STATIC).achieved
    assert of_bound is not None, "both are bundles of one precision on one backend"
    limits = {
        f"{over_masked:.2f} times as fast as the masked model, at least {MASKED_LIMIT}": over_masked >= MASKED_LIMIT,
        f"{of_bound:.2f} of what multiply-adds allow, at least {STATIC_LIMIT}": of_bound >= STATIC_LIMIT,
    }
    if options.json:
        write_json(options.json, report.to_json())
    return show_limits(limits)


if __name__ == "__main__":
    sys.exit(main())
