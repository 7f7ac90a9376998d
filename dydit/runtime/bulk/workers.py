"""Workers: processes, on one machine or on many, that make one run together.

Nothing connects them but the run's folder (`dydit.runtime.bulk.run_folder`). Who makes which batch follows from two
numbers, which a launcher puts into the environment (torchrun, accelerate launch) or a user writes as `2/8`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dydit.errors import ConfigError

RANK, WORLD_SIZE, LOCAL_RANK, GPUS = "RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Worker:
    """Worker `number`, from 0, of `count`; the one of 1 has the run to itself.

    `local`: its place among the workers of its machine, where a launcher tells. Raises `ConfigError` for numbers that
    are none of a worker.
    """

    number: int = 0
    count: int = 1
    local: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise ConfigError(f"there is no worker {self}: {self.count} workers are 0/{self.count} and so on, from 0")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def share(self, batches: int) -> range:
        """Its batches of a run of so many. Whole ones: cut differently, their images would have other last bits."""
        return range(self.number, batches, self.count)


def parse_worker(text: str) -> Worker:
    """`2/8`: worker 2 of eight. Raises `ConfigError`."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text, re.ASCII)
    if not match or int(match[2]) < 1:
        raise ConfigError(f"{text!r} is no worker; write its number, from 0, and how many there are: 2/8")
    return Worker(int(match[1]), int(match[2]))


def launched_worker(environment: Mapping[str, str]) -> Worker:
    """The worker that a launcher made this process, by RANK, WORLD_SIZE and LOCAL_RANK; 0/1 where none did.

    Raises `ConfigError` where they contradict each other, one is missing, or one is no number.
    """
    if RANK not in environment and WORLD_SIZE not in environment:
        return Worker()
    for name, other in ((RANK, WORLD_SIZE), (WORLD_SIZE, RANK)):
        if name not in environment:
            raise ConfigError(f"the environment has {other} without {name}; launchers set both: unset it, or give both")
    rank, size = _number(environment, RANK), _number(environment, WORLD_SIZE)
    if rank >= size:
        raise ConfigError(
            f"the environment has RANK={rank} and WORLD_SIZE={size}; ranks of {size} processes are below it"
        )
    return Worker(rank, size, _number(environment, LOCAL_RANK) if LOCAL_RANK in environment else None)


def own_gpu(local: int, environment: Mapping[str, str]) -> str:
    """The GPU of a machine's worker `local`, as a value for CUDA_VISIBLE_DEVICES.

    One of those that the variable names, in turn; GPU `local` where it names none.
    """
    visible = [gpu for gpu in environment.get(GPUS, "").split(",") if gpu.strip()]
    return visible[local % len(visible)] if visible else str(local)


def _number(environment: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d{1,9}", environment[name], re.ASCII):
        raise ConfigError(f"{name}={environment[name]!r} in the environment is no number from 0; correct or unset it")
    return int(environment[name])
