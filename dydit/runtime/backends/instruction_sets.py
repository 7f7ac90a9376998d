"""Which instructions of this CPU decide how fast it multiplies in each precision.

Libraries choose their kernels by these. PyTorch, for example, multiplies bf16 with a slow loop where the CPU has no
instructions for it.
"""

from __future__ import annotations

from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
KNOWN = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimddp", "asimdhp", "sve", "i8mm", "bf16"),
)
"""As Linux names them, slower ones first: x86, then Arm."""
MULTIPLY = {
    "bfloat16": ("avx512_bf16", "amx_bf16", "bf16"),
    "float16": ("avx512_fp16", "amx_fp16", "asimdhp"),
}
"""By type: those of which each multiplies it."""


def instruction_sets(cpu_info: Path = CPU_INFO) -> tuple[str, ...]:
    """Those of `KNOWN` that this CPU has; none where the system does not list them."""
    try:
        lines = cpu_info.read_text(errors="replace").splitlines()
    except OSError:
        return ()
    words = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return tuple(name for name in KNOWN if name in words)


def multiplies(dtype: str, sets: tuple[str, ...] | None = None) -> bool:
    """Whether a CPU with these instructions, by default this one, has some for products of a type of `MULTIPLY`."""
    return any(name in MULTIPLY[dtype] for name in (instruction_sets() if sets is None else sets))
