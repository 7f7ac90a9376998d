"""What the rivals have in common. How one runs the model stands in a file of its own.

Each of those files is a process that `run.py` starts, gives a job and asks for rounds of sampling steps
(`dydit.bench.bench_worker`). A step is the whole of it: the model on B images with their labels and again without,
guidance, and the sampler's formula, from latents f32 [B, C, S, S] to the next ones. No PyTorch here, so that the
process of a rival that runs without it does not carry it.
"""

from __future__ import annotations

import importlib.util
import time
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from dydit.bench.timing import Job, Loaded, Measured
from dydit.diffusion.guidance import Guidance
from dydit.diffusion.schedule import Schedule
from dydit.errors import UnavailableError


class Rival(Measured):
    """A side that loads the checkpoint at `path` in `build` and runs the whole model in every `step`.

    `rows`: labels of the model's rows, int64 [2B], the null class in the second half (without guidance [B]).
    `timesteps`: int64 [K], of each measured step.
    """

    def __init__(self, job: Job):
        super().__init__(job, job.sizes)
        assert job.side.checkpoint is not None
        self.path = Path(job.side.checkpoint)
        self.rows = Guidance(job.cfg_scale, self.config.null_class).rows(self.labels)
        self.timesteps = Schedule.respaced(job.of).timesteps[::-1][list(job.steps)]

    @abstractmethod
    def build(self) -> None:
        """Load the model, and whatever happens once. Raises `UnavailableError` where this machine cannot run it."""

    def load(self) -> Loaded:
        start = time.perf_counter()
        self.build()
        return Loaded(seconds=time.perf_counter() - start, subnets=1)


def require(*packages: str) -> None:
    """Raise `UnavailableError` for the first of the packages that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UnavailableError(f"{package} is not installed: pip install {package}")


def in_another_process(work: Callable[..., None], *arguments: object) -> None:
    """Call `work(*arguments)` in a new process, so that the memory it takes is not counted as the rival's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(work, *arguments).result()
