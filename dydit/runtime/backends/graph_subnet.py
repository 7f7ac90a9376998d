"""A subnetwork whose graph a library runs as a whole: ONNX Runtime or OpenVINO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from dydit.bundle.io_spec import CONDITION, residual_name, token_mask_name
from dydit.runtime.backends.base import Arrays, Backend, StepResult, Subnet
from dydit.runtime.backends.batch_splitting import BatchSplitting
from dydit.runtime.dynamic_width import DynamicWidthWeights


class Graph(Protocol):
    """A loaded graph."""

    def run(self, feeds: Arrays, what: str) -> dict[str, np.ndarray]:
        """Every output by name. `what`: its name in errors."""


class GraphSubnet(Subnet):
    """A loaded subnetwork; with dynamic width, the graph of all subnetworks, and their weights.

    `load(apart)` loads the graph; `apart`: for parts of batches that run at once. `splitting`: None where batches are
    not split. `debug`: the graph also gives residual streams and token decisions.
    """

    def __init__(
        self,
        backend: Backend,
        index: int,
        load: Callable[[bool], Graph],
        splitting: BatchSplitting | None,
        debug: bool,
        weights: DynamicWidthWeights | None = None,
    ):
        super().__init__(backend, index)
        self._model, self._debug, self._weights = backend.bundle.manifest.model, debug, weights
        self._load, self._splitting = load, splitting
        self._graph: Graph | None = None
        self._apart = False
        self._ready()

    @property
    def graph(self) -> Graph:
        """The graph that it runs."""
        return self._ready()

    def _ready(self) -> Graph:
        """The graph; loaded again when it has changed whether batches are split."""
        apart = self._splitting is not None and self._splitting.apart
        if self._graph is None or apart != self._apart:
            # First: two would take twice the memory, and an interrupt must not leave the wrong kind.
            self._graph = None
            self._apart = apart
            self._graph = self._load(apart)
        return self._graph

    def _step(self, feeds: Arrays) -> StepResult:
        graph = self._ready()
        if self._weights is None:
            return self._run(graph, feeds)
        return self._weights.run(self.entry, lambda weights: self._run(graph, {**feeds, **weights}))

    def _run(self, graph: Graph, feeds: Arrays) -> StepResult:
        depth = self._model.depth
        if self._splitting is not None:
            state = self._splitting.run(feeds, lambda each: graph.run(each, self.what))
            return StepResult(*state, np.zeros(depth, np.int64))
        out = graph.run(feeds, self.what)
        overflow = out.get("token_overflow", np.zeros(depth, np.int64))
        if not self._debug:
            return StepResult(out["x_prev"], out["next_history"], overflow)
        rows = feeds[CONDITION].shape[0]
        everything = np.ones(rows * self._model.tokens, bool)
        tokens = np.stack([out.get(token_mask_name(b), everything).reshape(rows, -1) for b in range(depth)])
        residuals = np.stack([out[residual_name(b)] for b in range(depth)])
        return StepResult(out["x_prev"], out["next_history"], overflow, tokens.astype(bool, copy=False), residuals)

    def _free(self) -> None:
        self._graph = None
