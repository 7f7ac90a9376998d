"""DiT-S/2 on the CPU: are the multiply-adds that a DyDiT saves saved on the clock?

    python benchmarks/cpu_dits2.py [--json docs/benchmarks/cpu_dits2.json]

One image with guidance, fp32, random weights with routers set to a FLOPs ratio near 0.5, 25 of 250 steps. The sides
take turns in one run: the bundle with a subnetwork for each step, the masked PyTorch model (what the public code does),
the static model of the same weights as a bundle, and with --plans the other two plans of the dynamic one, on 16 merged
subnetworks and on one graph for every width; all bundles on onnxruntime. Bars: 2.4 times as fast as the
masked model, and 0.85 of what the measured multiply-adds allow against the static one. Exit code 1 where one is missed.
Run it on a machine that does nothing else; the load average is in the report.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from dydit.bench.bench import BenchConfig, run_bench
from dydit.bench.timing import Latents
from dydit.bundle.manifest import PlanKind, Routing
from dydit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.files import write_json
from dydit.models.dit.config import preset
from dydit.models.synthetic import synthetic_model
from dydit.reports.bench_report import BenchReport, Side, SideKind, bound_text, repeats_text, speed_up_text

MASKED_BAR, STATIC_BAR = 2.4, 0.85
STATIC, MASKED = "onnxruntime static", "pytorch masked"


def prepare(folder: Path, flops_ratio: float, routing: Routing, plans: bool) -> list[Side]:
    """Export the bundles into `folder`; returns the sides."""
    config = preset("S/2")
    model = synthetic_model(config, seed=0, flops_ratio=flops_ratio)
    save_checkpoint(folder / "dynamic.safetensors", model, config)
    checkpoint = load_checkpoint(folder / "dynamic.safetensors")
    kept = {name: value for name, value in checkpoint.state.items() if "_rate." not in name and "token_sel" not in name}
    save_checkpoint(folder / "static.safetensors", kept, config.without_routers())
    export(checkpoint, folder / "dynamic", ExportConfig(plan=PlanKind.PER_STEP, routing=routing))
    export(load_checkpoint(folder / "static.safetensors"), folder / "static", ExportConfig())
    sides = [
        Side(name="onnxruntime per step", kind=SideKind.BUNDLE, path=str(folder / "dynamic")),
        Side(name=MASKED, kind=SideKind.TORCH_MASKED, path=str(folder / "dynamic.safetensors")),
        Side(name=STATIC, kind=SideKind.BUNDLE, path=str(folder / "static")),
    ]
    if plans:
        export(checkpoint, folder / "merged", ExportConfig(max_subnets=16, routing=routing))
        export(checkpoint, folder / "sliding", ExportConfig(plan=PlanKind.SLIDING, routing=routing))
        for name, title in (("merged", "onnxruntime 16 merged"), ("sliding", "onnxruntime sliding")):
            sides.append(Side(name=title, kind=SideKind.BUNDLE, path=str(folder / name)))
    return sides


def table(report: BenchReport) -> str:
    """The sides and their comparisons, for a terminal."""
    lines = [
        f"DiT-S/2, {report.batch} image, guidance {report.cfg_scale:g}, fp32, {report.threads} threads",
        f"{report.machine.cpu}, load average {report.load_average[0]:.1f}, then {report.load_average[1]:.1f}",
        f"steps measured: {len(report.steps_measured)} of {report.steps}, {report.repeats} times after {report.warmup}",
        "",
        "side".ljust(24) + "  ms/step     min     max   GMACs  peak MB  load s  img/s*",
    ]
    for side in report.sides:
        lines.append(
            f"{side.side.name:24}{side.median_ms:9.1f}{side.min_ms:8.1f}{side.max_ms:8.1f}{side.macs / 1e9:8.2f}"
            f"{side.peak_bytes / 1e6:9.0f}{side.load_seconds:8.1f}{side.images_per_second:8.3f}"
        )
    lines += ["* extrapolated from the steps measured to all; loading apart", ""]
    first = report.sides[0]
    ratio, tokens = (sum(each) / len(each) for each in (first.flops_ratio, first.token_share))
    lines.append(f"FLOPs ratio measured: {ratio:.3f} (tokens routed: {tokens:.3f})")
    for pair in report.comparisons:
        lines.append(
            f"{speed_up_text(pair)} ({pair.min:.2f} to {pair.max:.2f}); {bound_text(pair)}"
            + ("" if pair.achieved is None else f", of which {pair.achieved:.2f} is reached")
        )
    lines += [f"{side.side.name}: {repeats_text(side)}" for side in report.sides if side.overflows]
    return "\n".join(lines)


def main() -> int:
    """Run, print, and say whether the bars are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the raw report here")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=25, help="sampling steps of a round")
    parser.add_argument("--flops-ratio", type=float, default=0.5)
    parser.add_argument("--routing", default="dynamic", choices=[each.value for each in Routing])
    parser.add_argument("--packed", action="store_true", help="onnxruntime packs weights: faster steps, more memory")
    parser.add_argument(
        "--plans", action="store_true", help="time a merged and the sliding plan beside the per-step one"
    )
    options = parser.parse_args()
    config = BenchConfig(
        steps_measured=options.steps, repeats=options.repeats, threads=options.threads, latents=Latents.NOISE
    )
    with tempfile.TemporaryDirectory() as name:
        sides = prepare(Path(name), options.flops_ratio, Routing(options.routing), options.plans)
        sides = [side.model_copy(update={"packed": options.packed}) for side in sides]
        report = run_bench(
            sides, config, progress=lambda done, total: print(f"\rround {done}/{total}", end="", flush=True)
        )
    print(f"\r{table(report)}")
    if options.json:
        write_json(options.json, report.to_json())
    against_masked, against_static = report.comparison(MASKED).median, report.comparison(STATIC).achieved
    assert against_static is not None, "both are bundles of one precision on one backend"
    verdicts = [
        (
            f"{against_masked:.2f} times as fast as the masked model, the bar is {MASKED_BAR}",
            against_masked >= MASKED_BAR,
        ),
        (f"{against_static:.2f} of what multiply-adds allow, the bar is {STATIC_BAR}", against_static >= STATIC_BAR),
    ]
    for text, met in verdicts:
        print(f"{'met' if met else 'MISSED'}: {text}")
    return 0 if all(met for _, met in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
