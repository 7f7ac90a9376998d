"""`~/.cache/dydit/backends/<machine>.json`: which backend was fastest on a machine, measured by `dydit.bench.choice`.

    machine     processor, cores and instruction sets; their hash names the file
    choices     the newest last: what each is `of`, the backend, milliseconds a step by backend, the day

A home folder may serve several machines, so each has a file. The cache only saves time: a file that cannot be read or
written, or holds anything else, counts as empty, and nothing is reported.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Self

from pydantic import Field, FiniteFloat, ValidationError

from dydit.bundle.manifest import Manifest
from dydit.errors import OutputError
from dydit.files import user_cache, write_atomic
from dydit.reports.results import Machine
from dydit.validation import Strict

MOST = 200
"""Choices in a file; older ones go first."""
_PACKAGES = ("dydit", "onnxruntime", "onnxruntime-gpu", "torch", "openvino", "tensorrt", "tensorrt-rtx-cu13")


class MeasuredMachine(Strict):
    """What tells machines apart."""

    cpu: str
    cores: int
    instructions: tuple[str, ...]

    @property
    def key(self) -> str:
        """A hash, for the name of a file."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


class Subject(Strict):
    """What a choice was measured for. Another value of any field can have another fastest backend.

    `bundle`: the digest of its manifest, which covers weights, graphs and sampling steps. `batch`: images of a batch.
    `alone`: the run has one batch, which loads every subnetwork for itself. `packages`: versions. `candidates`: the
    backends to choose from.
    """

    bundle: str
    device: str
    threads: int
    batch: int
    guided: bool
    alone: bool
    packages: dict[str, str]
    candidates: tuple[str, ...]


class KeptChoice(Strict):
    """A choice: the backend, milliseconds a step of all that were timed, and the day, ISO 8601."""

    of: Subject
    backend: str
    ms: dict[str, FiniteFloat]
    day: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")


class _File(Strict):
    machine: MeasuredMachine
    choices: tuple[KeptChoice, ...]


class ChoiceCache:
    """The choices of one machine. `folder`: None keeps nothing."""

    def __init__(self, folder: Path | None, machine: Machine):
        self._machine = MeasuredMachine(cpu=machine.cpu, cores=machine.cores, instructions=machine.instruction_sets)
        self._packages = {name: machine.packages[name] for name in _PACKAGES if name in machine.packages}
        self.file = None if folder is None else folder / f"{self._machine.key}.json"

    @classmethod
    def of_user(cls) -> Self:
        """The choices of this user on this machine."""
        return cls(user_cache("backends"), Machine.here())

    def subject(
        self,
        manifest: Manifest,
        candidates: tuple[str, ...],
        device: str,
        threads: int,
        batch: int,
        guided: bool,
        alone: bool,
    ) -> Subject:
        """What a choice on this machine is for."""
        return Subject(
            bundle=manifest.digest,
            device=device,
            threads=threads,
            batch=batch,
            guided=guided,
            alone=alone,
            packages=self._packages,
            candidates=candidates,
        )

    def read(self, subject: Subject) -> KeptChoice | None:
        """The choice for a subject; None if there is none, or it names no candidate."""
        kept = next((each for each in reversed(self._choices()) if each.of == subject), None)
        return kept if kept is not None and kept.backend in subject.candidates else None

    def write(self, choice: KeptChoice) -> bool:
        """Keep a choice in place of an older one for the same; returns whether it was written."""
        if self.file is None:
            return False
        others = [each for each in self._choices() if each.of != choice.of]
        file = _File(machine=self._machine, choices=(*others, choice)[-MOST:])
        with contextlib.suppress(OSError, OutputError):
            write_atomic(self.file, (file.model_dump_json(indent=1) + "\n").encode())
            return True
        return False

    def _choices(self) -> tuple[KeptChoice, ...]:
        if self.file is None:
            return ()
        try:
            file = _File.model_validate_json(self.file.read_bytes())
        except (OSError, ValidationError):
            return ()
        return file.choices if file.machine == self._machine else ()
