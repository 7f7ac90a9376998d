"""GPUs for estimates: memory bandwidth and dense throughput, as NVIDIA's datasheets state them.

Where a datasheet gives throughput with sparsity, half of it is written here. Tensor cores accumulate in fp32; GeForce
cards are faster where they accumulate in fp16, which no product here does. fp32 is that of the ordinary cores, because
fp32 products are not computed in TF32. No figure was measured by dydit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dydit.bundle.stored_weights import StoredType
from dydit.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One GPU. `bandwidth`: of its memory, bytes per second. Throughput in operations per second; 0: not supported."""

    name: str
    bandwidth: float
    fp16: float
    int8: float
    fp8: float
    fp32: float

    def rate(self, dtype: StoredType) -> float:
        """Operations per second of products whose inputs have a type.

        Raises `ConfigError` if the GPU's tensor cores do not have that type.
        """
        rates: Mapping[str, float] = {
            "float32": self.fp32,
            "float16": self.fp16,
            "bfloat16": self.fp16,
            "int8": self.int8,
            "float8_e4m3fn": self.fp8,
        }
        if not rates[dtype]:
            able = ", ".join(gpu.name for gpu in GPUS.values() if gpu.fp8)
            raise ConfigError(f"{self.name} has no fp8 products; choose one of: {able}; or export in another precision")
        return rates[dtype]


_TERA = 1e12
GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA A100 Tensor Core GPU datasheet (2021), A100 80GB SXM.
        Gpu("A100", 2.039 * _TERA, 312 * _TERA, 624 * _TERA, 0, 19.5 * _TERA),
        # NVIDIA H100 Tensor Core GPU datasheet, H100 SXM; with sparsity 1979 and 3958.
        Gpu("H100", 3.35 * _TERA, 989.5 * _TERA, 1979 * _TERA, 1979 * _TERA, 67 * _TERA),
        # NVIDIA H200 Tensor Core GPU datasheet, H200 SXM: the H100's chip with other memory.
        Gpu("H200", 4.8 * _TERA, 989.5 * _TERA, 1979 * _TERA, 1979 * _TERA, 67 * _TERA),
        # NVIDIA L40S datasheet; with sparsity 733 and 1466.
        Gpu("L40S", 0.864 * _TERA, 362 * _TERA, 733 * _TERA, 733 * _TERA, 91.6 * _TERA),
        # NVIDIA Ada GPU architecture whitepaper, appendix on the GeForce RTX 4090.
        Gpu("RTX4090", 1.008 * _TERA, 165.2 * _TERA, 660.6 * _TERA, 330.3 * _TERA, 82.6 * _TERA),
        # NVIDIA RTX Blackwell GPU architecture whitepaper, appendix on the GeForce RTX 5090.
        Gpu("RTX5090", 1.792 * _TERA, 209.5 * _TERA, 838 * _TERA, 419 * _TERA, 104.8 * _TERA),
    )
}
"""The known GPUs by name."""
