"""Workers: processes, on one machine or several, that sample one run together.

They communicate only through the run's folder (`dydit.runtime.bulk.run_folder`). Two numbers decide which worker
samples which batch. A launcher (torchrun, accelerate launch) puts them into the environment, or a user writes them as
`2/8`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dydit.errors import ConfigError

RANK, WORLD_SIZE, LOCAL_RANK, GPUS = "RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Worker:
    """Worker `number`, from 0, of `count`. A single worker has the run to itself.

    `local`: its number among the workers of its machine, if a launcher gives it. Raises `ConfigError` if `number` is
    not below `count`.
    """

    number: int = 0
    count: int = 1
    local: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise ConfigError(f"there is no worker {self}: {self.count} workers are numbered from 0/{self.count}")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def share(self, batches: int) -> range:
        """The worker's batches of a run of `batches`; whole ones, whose size decides the last bits of images."""
        return range(self.number, batches, self.count)


def parse_worker(text: str) -> Worker:
    """`2/8`: worker 2 of eight. Raises `ConfigError`."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text, re.ASCII)
    if not match or int(match[2]) < 1:
        raise ConfigError(f"{text!r} is not a worker; write its number, from 0, and the number of workers, such as 2/8")
    return Worker(int(match[1]), int(match[2]))


def launched_worker(environment: Mapping[str, str]) -> Worker:
    """The worker that a launcher made of this process, by RANK, WORLD_SIZE and LOCAL_RANK; 0/1 without a launcher.

    Raises `ConfigError` if they contradict each other, one is missing, or one is not a number.
    """
    if RANK not in environment and WORLD_SIZE not in environment:
        return Worker()
    for name, other in ((RANK, WORLD_SIZE), (WORLD_SIZE, RANK)):
        if name not in environment:
            raise ConfigError(f"the environment has {other} without {name}; launchers set both: unset it, or set both")
    rank, size = _number(environment, RANK), _number(environment, WORLD_SIZE)
    if rank >= size:
        raise ConfigError(
            f"the environment has RANK={rank} and WORLD_SIZE={size}; a rank must be below the number of processes"
        )
    return Worker(rank, size, _number(environment, LOCAL_RANK) if LOCAL_RANK in environment else None)


def own_gpu(local: int, environment: Mapping[str, str]) -> str:
    """The GPU of a machine's worker `local`, as a value for CUDA_VISIBLE_DEVICES.

    One of those that the variable lists now, in turn; GPU `local` if it lists none.
    """
    visible = [gpu for gpu in environment.get(GPUS, "").split(",") if gpu.strip()]
    return visible[local % len(visible)] if visible else str(local)


def _number(environment: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d{1,9}", environment[name], re.ASCII):
        raise ConfigError(
            f"{name}={environment[name]!r} in the environment is not a number from 0; correct or unset it"
        )
    return int(environment[name])
