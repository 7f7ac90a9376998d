"""A workbench for graphs: write one, run it in onnxruntime, and work out in float64 PyTorch what it should give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from dydit.diffusion.coefficients import apply_step
from dydit.export.graph import save_graph
from dydit.export.weights import write_weights
from dydit.graph.library import FunctionLibrary
from dydit.graph.sources import Windows
from dydit.graph.writer import SubnetSpec, subnet_graph
from dydit.models.architecture import Slots as Units
from dydit.models.config import ModelConfig
from dydit.models.dit.graph import write_step
from dydit.models.dit.layout import stored_tensors
from dydit.models.dit.model import DiT
from dydit.models.routers import Masked, Recording
from dydit.models.synthetic import synthetic_model

CFG_SCALE = 2.5
# A sampler's own would let x drown what the model says: one step changes little.
COEFFICIENTS = (0.1, 1.0, 0.3, 0.4, -0.5)
Feeds = dict[str, np.ndarray]
Slots = Sequence[Sequence[int]]


def open_session(path: Path, extra: Sequence[str] = ()) -> onnxruntime.InferenceSession:
    """A single-threaded session; `extra`: values inside the graph to return besides its outputs."""
    proto = onnx.load(path, load_external_data=False)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_session(session: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray]) -> Feeds:
    wanted = {each.name for each in session.get_inputs()}
    values = session.run(None, {name: array for name, array in feeds.items() if name in wanted})
    return dict(zip([each.name for each in session.get_outputs()], values, strict=True))


class FixedWidth(Masked):
    """The model at a width that no router chose; tokens are routed as at inference."""

    def __init__(self, config: ModelConfig, on: Units, route: bool = True):
        self.config, self.on, self.route = config, on, route

    def units(self, block, group, router, t_emb):
        gate = torch.zeros(self.config.units.blocks[block].groups[group].count, dtype=t_emb.dtype)
        gate[list(self.on[block][group])] = 1
        return gate.expand(len(t_emb), -1)

    def tokens(self, block, router, x):
        return super().tokens(block, router, x) if self.route else None


@dataclass
class Expected:
    """One step in float64: x_prev [B, C, S, S], token decisions [L, rows, N]."""

    x_prev: np.ndarray
    tokens: np.ndarray


class Bench:
    """A model's `weights.bin` in a folder, and graphs on it. Slots are the checkpoint's units."""

    def __init__(self, folder: Path, model: DiT, cfg_channels: int = 3):
        self.folder, self.config, self.cfg_channels = folder, model.config, cfg_channels
        self.stored = dict(stored_tensors(model.state_dict(), model.config))
        self.entries = write_weights(folder / "weights.bin", self.stored.items(), model.config)
        self.library = FunctionLibrary(model.config, cfg_channels)
        self.model = model.double()
        self.count = 0

    def spec(self, heads: Slots, groups: Slots, routing=None, gated=frozenset(), capacities=None) -> SubnetSpec:
        """`heads` and `groups` by block."""
        units = zip(map(tuple, heads), map(tuple, groups), strict=True)
        return SubnetSpec(tuple(units), frozenset(gated), routing, capacities)

    def write(self, spec: SubnetSpec, source: type[Windows] = Windows) -> Path:
        path = self.folder / f"graph-{self.count}.onnx"
        self.count += 1
        save_graph(subnet_graph(self.config, spec, self.library, source(self.entries), write_step), path)
        return path

    def run(self, spec: SubnetSpec, feeds: Feeds, extra: Sequence[str] = ()) -> Feeds:
        return run_session(open_session(self.write(spec), extra), feeds)

    def feeds(self, batch: int = 2, guided: bool = True, t: int = 500, seed: int = 0) -> Feeds:
        config, rng = self.config, np.random.default_rng(seed)
        shape = (batch, config.in_channels, config.input_size, config.input_size)
        labels = torch.tensor([i % config.num_classes for i in range(batch)] + [config.null_class] * batch * guided)
        with torch.no_grad():
            c = self.model.t_embedder(torch.tensor([t])) + self.model.y_embedder(labels)
            layers = [block.adaLN_modulation for block in self.model.blocks] + [self.model.final_layer.adaLN_modulation]
            vectors = torch.cat([layer(c).unflatten(-1, (-1, config.hidden_size)) for layer in layers], 1)
        vectors[:, [*(6 * b + k for b in range(config.depth) for k in (1, 4)), -1]] += 1
        return {
            "x": rng.normal(size=shape).astype(np.float32),
            "noise": rng.normal(size=shape).astype(np.float32),
            "coefficients": np.array(COEFFICIENTS, np.float32),
            "cfg_scale": np.array(CFG_SCALE, np.float32),
            "modulation": vectors.float().numpy(),
            "labels": labels.numpy(),
            "t": np.int64(t),
        }

    @torch.no_grad()
    def expected(self, spec: SubnetSpec, feeds: Feeds) -> Expected:
        config, batch, rows = self.config, len(feeds["x"]), len(feeds["labels"])
        gating = FixedWidth(config, spec.units, spec.routing is not None)
        recording = Recording(gating, config)
        x = torch.tensor(feeds["x"]).double().repeat(rows // batch, 1, 1, 1)
        labels, t = torch.tensor(feeds["labels"]), torch.full((rows,), int(feeds["t"]))
        out = self.model(x, t, labels, recording).numpy()
        eps, v = out[:batch, : config.in_channels].copy(), out[:batch, config.in_channels :]
        if rows > batch:
            c, u = out[:batch, : self.cfg_channels], out[batch:, : self.cfg_channels]
            eps[:, : self.cfg_channels] = u + CFG_SCALE * (c - u)
        coefficients, noise = feeds["coefficients"].astype(np.float64), feeds["noise"].astype(np.float64)
        x_prev = apply_step(coefficients, x[:batch].numpy(), eps, v if config.learn_sigma else 0.0, noise)
        return Expected(x_prev, recording.decisions().tokens.numpy() > 0)

    def weight_feeds(self, heads: Slots, groups: Slots) -> Feeds:
        """What a graph with weights as inputs takes for these slots."""
        feeds = {}
        for part, slots in self.config.units.zip(zip(heads, groups, strict=True)):
            for name in map(part.stored, part.group.unit_tensors):
                feeds[name] = self.stored[name][list(slots)].flatten(0, 1).numpy()
        return feeds


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Relative L2 distance."""
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))


@pytest.fixture(scope="session")
def make_bench(tmp_path_factory: pytest.TempPathFactory, small_config: ModelConfig) -> Callable[..., Bench]:
    """`make_bench(token_bias=0, **config changes)`: a synthetic model's bench; the bias goes to its token routers."""
    made: dict[str, Bench] = {}

    def make(token_bias: float = 0.0, **changes: object) -> Bench:
        key = repr((token_bias, changes))
        if key not in made:
            model = synthetic_model(ModelConfig.model_validate({**small_config.model_dump(), **changes}))
            if token_bias:
                for block in model.blocks:
                    block.token_selection.mlp_head[2].bias.data += token_bias
            made[key] = Bench(tmp_path_factory.mktemp("bench"), model)
        return made[key]

    return make


@pytest.fixture(scope="session")
def sessions() -> tuple[Callable, Callable]:
    """`open_session(path, extra=())` and `run_session(session, feeds)`."""
    return open_session, run_session


@pytest.fixture(scope="session")
def distance() -> Callable[[np.ndarray, np.ndarray], float]:
    """Relative L2 distance of two arrays."""
    return relative
