"""The operations of a run on a device: one small frozen dataclass for each.

Memory is named: an `Address` is a buffer and a byte offset, so lists of operations can be made, compared and tested
without a device. Work is queued on one of two streams, `COMPUTE` and `COPY`, each of which runs in order. The host does
not wait, except in `Synchronize`, `ReadOverflow` and `Download`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dydit.dtypes import DTYPES

COMPUTE, COPY = "compute", "copy"
ALIGNMENT = 256  # bytes; what TensorRT asks of device memory


def aligned(nbytes: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class EngineId:
    """An engine of the bundle: a subnetwork (`full`: its form at full capacity), or with None the conditioning, the
    graph of `texts`, or the VAE `decoder`.

    With dynamic width, one engine serves all subnetworks; it has the number of the first.
    """

    subnet: int | None
    full: bool = False
    decoder: bool = False
    texts: bool = False

    def __str__(self) -> str:
        if self.decoder:
            return "VAE decoder"
        if self.texts:
            return "text graph"
        if self.subnet is None:
            return "conditioning"
        return f"subnetwork {self.subnet}{' at full capacity' if self.full else ''}"


CONDITIONER = EngineId(None)
TEXT_CONDITIONER = EngineId(None, texts=True)
DECODER = EngineId(None, decoder=True)


@dataclass(frozen=True)
class GraphKey:
    """A captured graph: a step of a subnetwork, at one batch size and number of the condition rows.

    Where the model takes texts, also at one number of `texts` and of tokens in each.
    """

    subnet: int
    batch: int
    rows: int
    texts: int = 0
    text_tokens: int = 0


@dataclass(frozen=True)
class Address:
    """An address in device memory: a named buffer and an offset in bytes."""

    buffer: str
    offset: int = 0


@dataclass(frozen=True)
class Binding:
    """An input or output of an engine: its name, and the contiguous array that it reads or writes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    address: Address

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return DTYPES[self.dtype].bytes * math.prod(self.shape)


@dataclass(frozen=True)
class Allocate:
    """Allocate a buffer; its content is undefined."""

    buffer: str
    nbytes: int


@dataclass(frozen=True)
class Free:
    """Free a buffer."""

    buffer: str


@dataclass(frozen=True)
class Clear:
    """Fill with zero bytes, on the compute stream."""

    to: Address
    nbytes: int


@dataclass(frozen=True)
class HostArray:
    """Data that the host provides (`dydit.runtime.device.inputs`): what it is, and of which batch and segment.

    `name`: that of a stored tensor.
    """

    kind: str
    batch: int | None = None
    segment: int | None = None
    name: str | None = None


@dataclass(frozen=True)
class Upload:
    """Copy data of the host to the device. The host may change it as soon as this returns."""

    to: Address
    source: HostArray
    nbytes: int
    stream: str = COMPUTE


@dataclass(frozen=True)
class Copy:
    """Copy within the device, on the compute stream."""

    to: Address
    source: Address
    nbytes: int


UnitOrder = tuple[tuple[tuple[int, ...], ...], ...]
"""The unit in each storage slot, by block and unit group; see `dydit.runtime.device.unit_weights`."""


@dataclass(frozen=True)
class Arranged:
    """Note in which order the unit weights lie. None: unknown, while they move."""

    order: UnitOrder | None


@dataclass(frozen=True)
class Launch:
    """Run an engine once, on the compute stream. `step`: the sampling step (execution order).

    None: no step, or one that depends on what lies at the addresses (`Replay.step`).
    """

    engine: EngineId
    step: int | None
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]


@dataclass(frozen=True)
class WarmUp:
    """Launch once with results that are overwritten later: TensorRT needs it at these shapes before a capture."""

    launch: Launch


@dataclass(frozen=True)
class Capture:
    """Record work into a graph, without running it."""

    graph: GraphKey
    body: tuple[Launch | Copy, ...]


@dataclass(frozen=True)
class Replay:
    """Run a captured graph, on the compute stream, as a sampling step (execution order)."""

    graph: GraphKey
    step: int


@dataclass(frozen=True)
class DropGraph:
    """Free a captured graph that is not running."""

    graph: GraphKey


@dataclass(frozen=True)
class LoadEngine:
    """Load an engine. The host is busy meanwhile; the device goes on with what is queued."""

    engine: EngineId


@dataclass(frozen=True)
class UnloadEngine:
    """Free an engine that nothing queued uses."""

    engine: EngineId


@dataclass(frozen=True)
class Record:
    """Record an event at the present end of a stream."""

    event: str
    stream: str


@dataclass(frozen=True)
class Wait:
    """Make a stream wait for the last event of that name."""

    stream: str
    event: str


@dataclass(frozen=True)
class Synchronize:
    """Make the host wait for the last event of that name."""

    event: str


@dataclass(frozen=True)
class ReadOverflow:
    """Read a segment's overflow counters, int64 [blocks] at `source + (i*steps + step)*stride` for `batches[i]`.

    The host waits for it. A batch with a counter above zero is repeated at full capacity; with `strict` it is an error.
    """

    source: Address
    segment: int
    batches: tuple[int, ...]
    steps: int
    stride: int
    blocks: int
    strict: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return len(self.batches) * self.steps * self.stride


@dataclass(frozen=True)
class Download:
    """Copy the latents of a batch, after `segments` segments, to the host, which waits for them."""

    batch: int
    segments: int
    source: Address
    nbytes: int


Operation = (
    Allocate
    | Free
    | Clear
    | Upload
    | Copy
    | Arranged
    | Launch
    | WarmUp
    | Capture
    | Replay
    | DropGraph
    | LoadEngine
    | UnloadEngine
    | Record
    | Wait
    | Synchronize
    | ReadOverflow
    | Download
)
