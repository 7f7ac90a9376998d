"""Where a run's data lies in device memory: buffers, their sizes, and addresses in them.

Shapes and types of what an engine reads and writes come from `io_spec`.

Every address that an engine reads or writes is 256-byte aligned, so rows of a table are padded to that. The inputs of
a segment are at the same addresses for every batch, so that a captured graph serves all batches of one size.

    latents.0, latents.1   every batch between segments: even segments read .0 and write .1, odd ones read .1
    x.0, x.1               the current batch: a step reads one and writes the other; at fixed addresses, each step reads
                           x.0, and what it wrote to x.1 is copied back
                           (of a multistep sampler, each of these four holds the history behind the latents)
    next_history           written and never read, if the sampler has no history
    records                a record for each step, of the whole run: its coefficients, and its gates if there are any.
                           If steps add noise, a segment's records for the current batch, with the noise behind them
    records.next           with noise: of the batch that runs next, uploaded meanwhile
    condition              of consecutive steps of the segment, computed on the device
    labels, labels.all     of the current rows; of all batches
    text_values, text_bias      of the current batch's texts, if the model takes texts; computed on the device
    embeddings, mask            the texts of the current batch, from which these are computed
    embeddings.next, mask.next  the texts of the batch that runs next, uploaded meanwhile
    text_rows, text_rows.all    which of its batch's texts each row has; of all batches
    cfg_scale, timesteps        of the whole run
    overflow, overflow.visit    counters of a segment, for all its batches; for the current batch
    zeros                  noise, if no step adds any; history, if the sampler has none
    step.*                 a step's record, condition and counters at fixed addresses, where graphs are captured
    units, units.scratch   unit weights with dynamic width (`dydit.runtime.device.unit_weights`)
    workspace              activations, shared by all engines
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from dydit.bundle.io_spec import (
    BATCH,
    LABELS,
    ROWS,
    STEPS,
    TEXT_BIAS,
    TEXT_ROWS,
    TEXT_TOKENS,
    TEXT_VALUES,
    TEXTS,
    TensorSpec,
    conditioning_inputs,
    conditioning_outputs,
    subnet_inputs,
    subnet_outputs,
    text_inputs,
    text_outputs,
)
from dydit.bundle.manifest import Manifest, Routing
from dydit.errors import ConfigError
from dydit.runtime.device.operations import ALIGNMENT, Address, Binding, aligned
from dydit.runtime.device.unit_weights import UnitWeights


@dataclass(frozen=True)
class RunShape:
    """The sizes of a run: images per batch, whether it is guided, segments that each batch has already passed.

    Of a model that texts condition also `texts`, the most different texts of a batch, and the tokens of each text.
    """

    sizes: tuple[int, ...]
    guided: bool
    done: tuple[int, ...] = ()
    texts: int = 0
    text_tokens: int = 0

    def rows(self, size: int) -> int:
        """Rows of the condition of a batch of `size` images."""
        return 2 * size if self.guided else size

    @property
    def text_symbols(self) -> dict[str, int]:
        """The values of the symbols of texts."""
        return {TEXTS: self.texts, TEXT_TOKENS: self.text_tokens}

    def behind(self, batch: int) -> int:
        """How many segments a batch has passed already."""
        return self.done[batch] if self.done else 0


@dataclass(frozen=True)
class LaunchOptions:
    """How to run. No option changes what is computed.

    `graphs`: capture steps as CUDA graphs (dynamic routing cannot be captured and runs without, unless engines have
    `fixed_shapes`: they compute all tokens then). `fixed`: steps read their inputs at fixed addresses even without
    graphs. `resident`: subnetworks that are loaded at a time, at least 2 (None: all). `condition_bytes`,
    `conditioning_steps`: how much condition is computed ahead, at most; the latter is what the engine's profile allows.
    `save_segments`: download latents after every segment, not only the last.
    """

    graphs: bool = True
    fixed: bool = False
    fixed_shapes: bool = False
    resident: int | None = None
    condition_bytes: int = 1 << 30
    conditioning_steps: int = 1 << 30
    save_segments: bool = False

    def __post_init__(self) -> None:
        if self.resident is not None and self.resident < 2:
            raise ConfigError(
                f"resident is {self.resident}, but at least 2 subnetworks have to be loaded: the present and the next"
            )


class Layout:
    """Buffers of a run and addresses in them, from a manifest, the run's shape and options."""

    def __init__(self, manifest: Manifest, shape: RunShape, options: LaunchOptions):
        self.manifest, self.shape, self.options = manifest, shape, options
        model, self.segments = manifest.model, manifest.plan.segments
        self.unit_weights = UnitWeights(manifest) if manifest.dynamic_width else None
        if not shape.sizes or not 1 <= min(shape.sizes) <= max(shape.sizes) <= manifest.max_batch:
            raise ConfigError(
                f"batch sizes {shape.sizes} are outside 1..{manifest.max_batch}, for which the bundle was exported"
            )
        self.largest = max(shape.sizes)
        self.capacity = manifest.routing is Routing.CAPACITY
        self.capturing = options.graphs and (options.fixed_shapes or manifest.routing is not Routing.DYNAMIC)
        self.image_bytes = 4 * model.in_channels * model.input_size**2
        self.multistep, self._noisy = manifest.sampling.multistep, frozenset(manifest.sampling.noisy_steps)
        # A graph serves other runs, too, so records are laid out for all steps and subnetworks, not only those to come.
        self.noisy, self.gated = bool(self._noisy), any(subnet.gated for subnet in manifest.subnets)
        self._noise_offset = ALIGNMENT + self.gated * aligned(4 * model.units.size)
        self.condition_row = 4 * math.prod(model.condition_shape)
        self.overflow_bytes = 8 * model.depth
        self.overflow_stride = aligned(self.overflow_bytes)
        self.labels_stride = aligned(8 * shape.rows(self.largest))
        self.has_texts = model.text is not None

    def history_offset(self, size: int) -> int:
        """Where the history begins in the state of a batch of `size`, in bytes."""
        return aligned(size * self.image_bytes)

    def state_bytes(self, size: int) -> int:
        """Bytes of the state of a batch of `size`: its latents and, of a multistep sampler, its history."""
        return size * self.image_bytes + (self.history_offset(size) if self.multistep else 0)

    @cached_property
    def visited(self) -> tuple[int, ...]:
        """The segments that some batch still has to pass, in order."""
        first = min(self.shape.behind(batch) for batch in range(len(self.shape.sizes)))
        return tuple(range(first, len(self.segments)))

    def waiting(self, segment: int) -> tuple[int, ...]:
        """The batches that pass a segment."""
        return tuple(batch for batch in range(len(self.shape.sizes)) if self.shape.behind(batch) <= segment)

    def adds_noise(self, step: int) -> bool:
        """Whether a step adds noise."""
        return step in self._noisy

    @cached_property
    def staged(self) -> bool:
        """Whether steps read their inputs at fixed addresses: for graphs, or because a table cannot be padded."""
        rows = {self.shape.rows(size) for size in self.shape.sizes}
        return self.capturing or self.options.fixed or any(count * self.condition_row % ALIGNMENT for count in rows)

    @cached_property
    def chunk_steps(self) -> int:
        """The number of steps whose condition is computed at once."""
        fits = self.options.condition_bytes // (self.condition_row * self.shape.rows(self.largest))
        longest = max(self.segments[index].count for index in self.visited)
        return max(1, min(longest, fits, self.options.conditioning_steps))

    def chunks(self, segment: int) -> tuple[range, ...]:
        """The segment's steps, in parts whose condition is computed at once."""
        steps = self.segments[segment].steps
        return tuple(steps[i : i + self.chunk_steps] for i in range(0, len(steps), self.chunk_steps))

    @cached_property
    def all_chunks(self) -> tuple[range, ...]:
        """The parts of all visited segments; `timesteps` has a row for each."""
        return tuple(chunk for segment in self.visited for chunk in self.chunks(segment))

    @property
    def timesteps_stride(self) -> int:
        """Bytes of a row of `timesteps`."""
        return aligned(4 * self.chunk_steps)

    def record_bytes(self, size: int) -> int:
        """Bytes of a step's record, for batches of `size`; without noise it is the same for all."""
        return self._noise_offset + self.noisy * aligned(size * self.image_bytes)

    def record(self, segment: int, step: int, size: int) -> Address:
        """One step's record."""
        first = self.segments[segment].first if self.noisy else 0
        return Address("records", (step - first) * self.record_bytes(size))

    def record_parts(self, record: Address) -> dict[str, Address]:
        """The inputs of a step that a record at this address holds; noise is zeros where no step adds any."""
        gates, noise = (Address(record.buffer, record.offset + more) for more in (ALIGNMENT, self._noise_offset))
        return {"coefficients": record, "gates": gates, "noise": noise if self.noisy else Address("zeros")}

    def condition_bytes(self, size: int) -> int:
        """Bytes of one step's condition."""
        return self.shape.rows(size) * self.condition_row

    @cached_property
    def buffers(self) -> dict[str, int]:
        """Bytes of every buffer but the workspace."""
        shape = self.shape
        batches, steps, rows = len(shape.sizes), self.manifest.sampling.steps, shape.rows(self.largest)
        longest = max(self.segments[index].count for index in self.visited)
        batch_bytes, record_bytes = self.largest * self.image_bytes, self.record_bytes(self.largest)
        sizes = {
            "latents.0": sum(map(self.state_bytes, shape.sizes)),
            "latents.1": sum(map(self.state_bytes, shape.sizes)),
            "x.0": self.state_bytes(self.largest),
            "x.1": self.state_bytes(self.largest),
            "next_history": batch_bytes * (not self.multistep),
            "records": (longest if self.noisy else steps) * record_bytes,
            "records.next": self.noisy * longest * record_bytes,
            "zeros": batch_bytes * (not self.noisy or not self.multistep),
            "condition": self.chunk_steps * self.condition_bytes(self.largest),
            "labels": 8 * rows,
            "labels.all": batches * self.labels_stride,
            "cfg_scale": 4,
            "timesteps": len(self.all_chunks) * self.timesteps_stride,
            "overflow": self.capacity * batches * longest * self.overflow_stride,
            "overflow.visit": self.capacity * longest * self.overflow_stride,
        }
        if self.staged:
            sizes |= {
                "step.record": record_bytes,
                "step.condition": self.condition_bytes(self.largest),
                "step.overflow": self.capacity * self.overflow_stride,
            }
        if self.has_texts:
            inputs, outputs = self.text_bindings()
            sizes |= {each.name: each.nbytes for each in (*inputs, *outputs)}
            sizes |= {f"{each.name}.next": each.nbytes for each in inputs}
            sizes |= {TEXT_ROWS: 8 * rows, f"{TEXT_ROWS}.all": batches * self.labels_stride}
        if self.unit_weights is not None:
            sizes |= self.unit_weights.buffers
        return {name: aligned(nbytes) for name, nbytes in sizes.items() if nbytes}

    def latents(self, segment: int, batch: int) -> Address:
        """A batch's state before a segment."""
        return Address(f"latents.{segment % 2}", sum(map(self.state_bytes, self.shape.sizes[:batch])))

    def step_state(self, reads: int, size: int) -> dict[str, Address]:
        """The addresses of a step's state, before and after it, where it reads buffer x.0 or x.1."""
        before, after = f"x.{reads}", f"x.{1 - reads}"
        state = {"x": Address(before), "x_prev": Address(after)}
        if not self.multistep:
            return state | {"history": Address("zeros"), "next_history": Address("next_history")}
        offset = self.history_offset(size)
        return state | {"history": Address(before, offset), "next_history": Address(after, offset)}

    def timesteps(self, chunk: range) -> Address:
        """The timesteps of a part of a segment."""
        return Address("timesteps", self.all_chunks.index(chunk) * self.timesteps_stride)

    def condition(self, chunk: range, step: int, size: int) -> Address:
        """One step's condition."""
        return Address("condition", (step - chunk.start) * self.condition_bytes(size))

    def overflow(self, segment: int, step: int) -> Address:
        """One step's counters."""
        return Address("overflow.visit", (step - self.segments[segment].first) * self.overflow_stride)

    def step_bindings(
        self, subnet: int, size: int, reads: int, record: Address, condition: Address, overflow: Address
    ) -> tuple[tuple[Binding, ...], tuple[Binding, ...]]:
        """Inputs and outputs of a subnetwork's engine that reads x.0 or x.1; with dynamic width, unit weights too.

        `record`, `condition`, `overflow`: where the step finds them, and where its counters go.
        """
        model, entry = self.manifest.model, self.manifest.subnets[subnet]
        more = {"cfg_scale": Address("cfg_scale"), "condition": condition, "token_overflow": overflow}
        addresses = {**self.step_state(reads, size), **self.record_parts(record), **more}
        symbols = {BATCH: size, ROWS: self.shape.rows(size), **self.shape.text_symbols}
        of_texts = {name: Address(name) for name in (TEXT_VALUES, TEXT_BIAS, TEXT_ROWS)}
        inputs = _bind(subnet_inputs(model, entry.gated), symbols, {**addresses, **of_texts})
        inputs += self.unit_weights.bindings(subnet) if self.unit_weights is not None else ()
        return inputs, _bind(subnet_outputs(model, self.capacity), symbols, addresses)

    def conditioning_bindings(self, chunk: range, size: int) -> tuple[tuple[Binding, ...], tuple[Binding, ...]]:
        """Inputs and outputs of the conditioning's engine for a part of a segment."""
        symbols = {STEPS: len(chunk), LABELS: self.shape.rows(size)}
        addresses = {
            "timesteps": self.timesteps(chunk),
            "labels": Address("labels"),
            "condition": Address("condition"),
        }
        model = self.manifest.model
        return _bind(conditioning_inputs(), symbols, addresses), _bind(conditioning_outputs(model), symbols, addresses)

    def text_bindings(self) -> tuple[tuple[Binding, ...], tuple[Binding, ...]]:
        """Inputs and outputs of the text graph's engine. Batches with fewer texts repeat some (`HostInputs`)."""
        inputs, outputs, symbols = (
            text_inputs(self.manifest.model),
            text_outputs(self.manifest.model),
            self.shape.text_symbols,
        )
        addresses = {spec.name: Address(spec.name) for spec in (*inputs, *outputs)}
        return _bind(inputs, symbols, addresses), _bind(outputs, symbols, addresses)


def _bind(
    specs: tuple[TensorSpec, ...], symbols: Mapping[str, int], addresses: Mapping[str, Address]
) -> tuple[Binding, ...]:
    return tuple(Binding(spec.name, spec.dtype, spec.concrete(symbols), addresses[spec.name]) for spec in specs)
