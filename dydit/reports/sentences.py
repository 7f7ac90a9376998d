"""What parity and bench found, in words: the sentences that terminals, pictures and the HTML report share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dydit.bundle.stored_weights import Precision
from dydit.reports.text import exponent
from dydit.words import counted

if TYPE_CHECKING:
    from dydit.reports.results import BenchReport, Comparison, Hop, ParityReport, SideResult

BUSY = "the machine was busy, so take times with care"


def guidance_text(cfg_scale: float) -> str:
    """`no guidance` or `guidance 4`."""
    return "no guidance" if cfg_scale == 1 else f"guidance {cfg_scale:g}"


def bound_text(pair: Comparison) -> str:
    """What multiply-adds say of a speed-up, or why they say nothing."""
    if pair.allowed is None:
        return f"no bound by multiply-adds{f', as {pair.no_bound}' if pair.no_bound else ''}"
    return f"multiply-adds alone would give {pair.allowed:.2f}\u00d7"


def speed_up_text(pair: Comparison) -> str:
    """The median ratio of times of a comparison."""
    return f"{pair.median:.2f}\u00d7 speed-up over {pair.other}"


def repeats_text(side: SideResult) -> str:
    """How many steps of a side ran twice because their tokens overflowed; empty where none did."""
    if not side.overflows:
        return ""
    return f"{side.overflows:,} of {counted(side.steps_timed, 'timed step')} ran again at full capacity"


def busy(bench: BenchReport) -> bool:
    """Whether others' work shows in the load average: more than twice as many wanted to run as there are cores."""
    return max(bench.load_average) > 2 * bench.machine.cores


def bench_lines(report: BenchReport) -> list[str]:
    """Times, with how much of the run was measured; speed-ups; steps that were repeated; sides that did not run."""
    first, *others = report.sides
    return [
        f"{first.side.name}: {first.median_ms:.1f} ms a step (steps measured: {len(report.steps_measured)} of "
        f"{report.steps})",
        *(f"{side.side.name}: {side.median_ms:.1f} ms a step" for side in others),
        *(
            f"{speed_up_text(pair)}, median of pairs of rounds, {pair.min:.2f} to {pair.max:.2f} ({bound_text(pair)})"
            for pair in report.comparisons
        ),
        *[BUSY.capitalize()] * busy(report),
        *(f"{side.side.name}: {repeats_text(side)}" for side in report.sides if side.overflows),
        *(f"{each.name} was not run: {each.reason}" for each in report.not_run),
    ]


def decisions_text(flips: int, decisions: int) -> str:
    """How many routing decisions differ, as part of a sentence."""
    if not decisions:
        return "no token decisions to compare"
    return f"{flips:,} of {counted(decisions, 'token decision')} differ{'s' if flips == 1 else ''}"


def flips_text(parity: ParityReport) -> str:
    """`decisions_text` of all hops."""
    return decisions_text(sum(hop.flips for hop in parity.hops), sum(hop.decisions for hop in parity.hops))


def psnr_text(error: float) -> str:
    """The peak signal-to-noise ratio that belongs to a picture's error, as a lower bound."""
    return f"PSNR at least {-20 * math.log10(error):.1f} dB" if error else "no difference"


def parity_lines(parity: ParityReport) -> list[str]:
    """The verdict; for a passed bundle below fp32 what it was measured to keep; and steps that were repeated."""
    failed, run = parity.first_failure, next((hop for hop in parity.hops if hop.name == "run"), None)
    lines = []
    if failed is not None:
        at = f": {failed.departure.where}" if failed.departure else ""
        lines.append(f"parity fails at {failed.name}: {failed.detail}{at}")
    else:
        within = f" within the bars of {parity.precision}" if _rounded(parity) and parity.precision else ""
        lines.append(f"parity holds{within}: {', '.join(hop.name for hop in parity.hops)}")
        if run is not None and run.decibels and run.worst is not None:
            lines.append(f"{psnr_text(run.worst)} against fp32, {flips_text(parity)}")
    if parity.repeated_steps:
        lines.append(
            f"{parity.repeated_steps:,} of {counted(parity.evaluations, 'evaluated step')} ran again at full capacity"
        )
    return lines


def parity_headline(parity: ParityReport) -> tuple[str, str]:
    """Title and subtitle of the picture: no more than what the verdict says of this precision."""
    failed = parity.first_failure
    if failed is not None:
        return f"Parity fails at \u201c{failed.title}\u201d", failed.detail
    run = next((hop for hop in parity.hops if hop.name == "run"), None)
    flips = sum(hop.flips for hop in parity.hops)
    if parity.precision is None:
        title = f"{parity.backend} stays within its bars of PyTorch"
    elif _rounded(parity):
        kept = psnr_text(run.worst) if run and run.decibels and run.worst is not None else "within its bars"
        title = f"{parity.precision} on {parity.backend}: {kept} against fp32 in PyTorch"
    elif flips:
        title = f"{parity.backend} computes what PyTorch computes, but for {counted(flips, 'token decision')} at a tie"
    else:
        title = f"{parity.backend} computes what PyTorch computes, to within rounding"
    worst = [
        f"{hop.name} {exponent(hop.worst)}{_jump(hop)}"
        for hop in parity.hops
        if hop.name in ("sliced", "step", "run") and hop.worst is not None
    ]
    details = [
        f"{counted(len(parity.labels), 'image')}, {counted(parity.steps, 'step')}",
        *([f"worst: {', '.join(worst)}"] if worst else []),
        flips_text(parity),
        *([f"{parity.repeated_steps:,} steps ran again at full capacity"] if parity.repeated_steps else []),
    ]
    return title, "; ".join(details)


def _rounded(parity: ParityReport) -> bool:
    """Whether the bundle stores or computes less than fp32, so that nothing is judged to within rounding of that."""
    return parity.precision != Precision.FP32


def _jump(hop: Hop) -> str:
    """What images came to that routed a token differently, where such are set aside."""
    if hop.sets_aside:
        values = [image.value for image in hop.flipped_images if image.value is not None]
        return f" (with a flipped token {exponent(max(values))})" if values else ""
    return ""


def extra_text(ratio: float) -> str:
    """`9.7% more` for 1.097, `2.0% less` for 0.98."""
    return f"{abs(ratio - 1):.1%} {'less' if ratio < 1 else 'more'}"
