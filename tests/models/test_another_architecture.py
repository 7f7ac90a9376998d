"""A second architecture, defined here alone, goes through the ordinary commands: export, sample, parity.

It differs from a DiT wherever an architecture may: no attention, no modulation, two unit groups of different sizes, and
a condition of one vector that is added to the tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydit.bundle.bundle import Bundle
from dydit.bundle.io_spec import CONDITION, conditioning_inputs, conditioning_outputs, residual_name, token_mask_name
from dydit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from dydit.graph.ops import Ops
from dydit.graph.sources import graph_value
from dydit.graph.writer import conditioning_model, typed
from dydit.models import registry
from dydit.models.architecture import WIDTH_ROUTER, BlockSpec, Side, Slots, UnitGroup, UnitLayer, stored_name
from dydit.models.config import ClassLabels, ModelConfig
from dydit.models.dynamic import DynamicModel
from dydit.models.registry import Architecture
from dydit.models.routers import TOKEN_ROUTER, Gating, TokenRouter, WidthRouter, width_router_rows
from dydit.models.sliced import SlicedBlock, SlicedModel

GROUPS = {"filters": (3, 4), "experts": (5, 2)}  # units, and channels of one
ENDS = ("embed.weight", "output.weight", "time.weight", "label.weight")


class ToyConfig(ModelConfig):
    architecture: Literal["toy"] = "toy"

    @property
    def tokens(self) -> int:
        return self.input_size**2

    @property
    def classes(self) -> ClassLabels:
        return ClassLabels(3, null=3)

    @property
    def condition_shape(self) -> tuple[int, ...]:
        return (self.hidden_size,)

    def block_specs(self) -> Sequence[BlockSpec]:
        d = self.hidden_size
        groups = [
            UnitGroup(
                name,
                units,
                (
                    UnitLayer(f"{name}_in", Side.OUTPUT, channels, d),
                    UnitLayer(f"{name}_out", Side.INPUT, channels, d),
                ),
                macs=2.0 * self.tokens * channels * d,
                routed=name == "experts",
            )
            for name, (units, channels) in GROUPS.items()
        ]
        return [BlockSpec(tuple(groups))] * self.depth

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        d, c = self.hidden_size, self.in_channels
        block: dict[str, tuple[int, ...]] = {}
        for group in self.block_specs()[0].groups:
            for layer in group.layers:
                block[layer.weight] = (group.count, layer.unit_features, d)
                block[layer.bias] = (group.count, layer.unit_features) if layer.out_major else (d,)
        block |= dict(zip(TOKEN_ROUTER, ((1, d), (1,), (1, 1), (1,)), strict=True))
        shapes = {stored_name(index, name): shape for index in range(self.depth) for name, shape in block.items()}
        ends: tuple[tuple[int, ...], ...] = ((d, c), (c, d), (d, 2), (4, d))
        width = dict(zip(WIDTH_ROUTER, ((self.units.size, d), (self.units.size,)), strict=True))
        return {**dict(zip(ENDS, ends, strict=True)), **shapes, **width}

    @property
    def low_precision(self) -> tuple[str, ...]:
        return ()

    @property
    def fp32_products(self) -> frozenset[str]:
        return frozenset(ENDS)

    def is_conditioning(self, tensor: str) -> bool:
        return tensor.startswith(("time.", "label.", "width."))

    @property
    def macs(self) -> int:
        return int(self.units.per_unit().sum())

    @property
    def summary(self) -> str:
        return f"hidden {self.hidden_size}, {self.depth} blocks"


class ToyBlock(nn.Module):
    def __init__(self, config: ToyConfig, index: int):
        super().__init__()
        self.index = index
        self.layers = nn.ModuleDict()
        self.width = nn.ModuleDict()
        for name, (units, channels) in GROUPS.items():
            self.layers[f"{name}_in"] = nn.Linear(config.hidden_size, units * channels)
            self.layers[f"{name}_out"] = nn.Linear(units * channels, config.hidden_size)
            self.width[name] = WidthRouter(config, units)
        self.token = TokenRouter(config)

    def forward(self, x: Tensor, t_emb: Tensor, gating: Gating) -> Tensor:
        for place, (name, (_, channels)) in enumerate(GROUPS.items()):
            hidden = F.relu(self.layers[f"{name}_in"](x))
            gates = gating.units(self.index, place, self.width[name], t_emb)
            if gates is not None:
                hidden = hidden * gates.repeat_interleave(channels, 1)[:, None]
            branch = self.layers[f"{name}_out"](hidden)
            tokens = gating.tokens(self.index, self.token, x) if name == "experts" else None
            x = x + (branch if tokens is None else branch * tokens[..., None])
        return x


class ToyModel(DynamicModel):
    def __init__(self, config: ToyConfig):
        super().__init__(config)
        d, c = config.hidden_size, config.in_channels
        self.embed, self.output = nn.Linear(c, d, bias=False), nn.Linear(d, c, bias=False)
        self.time, self.label = nn.Linear(2, d, bias=False), nn.Embedding(4, d)
        self.blocks = nn.ModuleList(ToyBlock(config, index) for index in range(config.depth))

    def embed_timestep(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] / 160
        return self.time(torch.cat([angles.sin(), angles.cos()], 1))

    def width_routers(self) -> list[WidthRouter]:
        return [router for block in self.blocks for router in block.width.values()]

    def forward(self, x: Tensor, t: Tensor, y: Tensor, gating: Gating | None = None) -> Tensor:
        gating = gating or self.inference_gating()
        t_emb = self.embed_timestep(t)
        tokens = self.embed(x.flatten(2).transpose(1, 2)) + (t_emb + self.label(y))[:, None]
        for block in self.blocks:
            tokens = block(tokens, t_emb, gating)
        return self.output(tokens).transpose(1, 2).view_as(x)


class SlicedToy(SlicedModel):
    def _take(self, weights: Mapping[str, Tensor]) -> None:
        self._embed, self._final = weights["embed.weight"], weights["output.weight"]

    def _output(self, x: Tensor, condition: Tensor, gates: Sequence[Tensor] | None) -> Tensor:
        rows = len(condition)
        image = x.repeat(rows // len(x), 1, 1, 1)
        tokens = F.linear(image.flatten(2).transpose(1, 2), self._embed) + condition[:, None]
        for block in self.blocks:
            of_block = None if gates is None else gates[2 * block.index : 2 * block.index + 2]
            tokens = tokens + self._branch(block, 0, tokens, of_block)
            held = len(block.slots[1]) > 0
            tokens = self.route(block, tokens, lambda x, _, b=block, g=of_block: self._branch(b, 1, x, g), held)
            self.finish_block(tokens)
        return F.linear(tokens, self._final).transpose(1, 2).view_as(image)

    def _branch(self, block: SlicedBlock, place: int, x: Tensor, gates: Sequence[Tensor] | None) -> Tensor:
        name, (_, channels) = list(GROUPS.items())[place]
        if not len(block.slots[place]):
            return block.bias(f"{name}_out").expand_as(x)
        hidden = F.relu(self.linear(block, f"{name}_in", x))
        if gates is not None:
            hidden = hidden * gates[place][block.slots[place]].repeat_interleave(channels)
        return self.linear(block, f"{name}_out", hidden)


class ToyArchitecture(Architecture):
    name, title, config = "toy", "Toy", ToyConfig

    def masked(self, config: ToyConfig) -> ToyModel:
        return ToyModel(config)

    def sliced(self, config, weights, slots, cfg_channels, capacities=None, linear=None) -> SlicedToy:
        return SlicedToy(config, weights, slots, cfg_channels, capacities, linear)

    def conditioning(self, config, weights, timesteps: Tensor, labels: Tensor) -> Tensor:
        angles = timesteps.float()[:, None] / 160
        time = F.linear(torch.cat([angles.sin(), angles.cos()], 1), weights["time.weight"])
        return time[:, None] + weights["label.weight"][labels]

    def stored_tensors(self, state, config, order: Slots | None = None, smoothing=None) -> Iterator[tuple[str, Tensor]]:
        for name in ENDS:
            yield name, state[name].float().contiguous()
        for part, units in config.units.zip(order or config.units.every_unit):
            for layer in part.group.layers:
                published = f"blocks.{part.block}.layers.{layer.name}"
                weight, bias = state[f"{published}.weight"].float(), state[f"{published}.bias"].float()
                rows = weight if layer.out_major else weight.T
                yield part.stored(layer.weight), rows.unflatten(0, (part.group.count, -1))[list(units)].contiguous()
                of_units = bias.unflatten(0, (part.group.count, -1))[list(units)] if layer.out_major else bias
                yield part.stored(layer.bias), of_units.contiguous()
        for block in range(config.depth):
            for name in TOKEN_ROUTER:
                published = name.replace("router", f"blocks.{block}.token.mlp_head")
                yield stored_name(block, name), state[published].float().contiguous()
        names = [f"blocks.{part.block}.width.{part.group.name}.router" for part in config.units.parts]
        routers = [(state[f"{name}.weight"], state[f"{name}.bias"]) for name in names]
        yield from zip(WIDTH_ROUTER, width_router_rows(config, routers, order or config.units.every_unit), strict=True)

    def timestep_embedding(self, config, weights, times: np.ndarray) -> np.ndarray:
        angles = np.asarray(times, np.float64)[:, None] / 160
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1) @ weights["time.weight"].T

    def write_step(self, writer) -> tuple[ir.Value, list[ir.Value]]:
        ops, weights, config = writer.ops, writer.weights, writer.config
        c, n, d, side = config.in_channels, config.tokens, config.hidden_size, config.input_size
        pixels = ops.Transpose(ops.Reshape(writer.inputs["x"], ops.constant([-1, c, n])), perm=[0, 2, 1])
        twice = ops.Concat(pixels, pixels, axis=0)
        condition = writer.inputs[CONDITION]
        rows = ops.Shape(condition, start=0, end=1)
        tokens = ops.Slice(twice, ops.constant([0]), rows, ops.constant([0]))
        embedded = ops.MatMul(tokens, ops.Transpose(weights.whole("embed.weight"), perm=[1, 0]))
        x = ops.Add(embedded, ops.Unsqueeze(condition, ops.constant([1])))
        for block in range(config.depth):
            x = ops.Add(x, self._branch(writer, block, 0, x))
            flat = ops.Reshape(x, ops.constant([-1, d]))
            first, first_bias, last, last_bias = (weights.whole(stored_name(block, name)) for name in TOKEN_ROUTER)
            logits = ops.Gemm(ops.Relu(ops.Gemm(flat, first, first_bias, transB=1)), last, last_bias, transB=1)
            on = ops.Greater(logits, ops.constant(0, np.float32))
            (mask,) = ops.call("", "Reshape", (on, ops.constant([-1])), [token_mask_name(block)])
            chosen = ops.Transpose(ops.NonZero(mask), perm=[1, 0])
            entering = ops.GatherND(flat, chosen)
            left = ops.Add(entering, self._branch(writer, block, 1, entering))
            joined = ops.ScatterND(flat, chosen, left)
            (x,) = ops.call("", "Reshape", (joined, ops.constant([-1, n, d])), [residual_name(block)])
        out = ops.MatMul(x, ops.Transpose(weights.whole("output.weight"), perm=[1, 0]))
        return ops.Reshape(ops.Transpose(out, perm=[0, 2, 1]), ops.constant([-1, c, side, side])), []

    def _branch(self, writer, block: int, place: int, x: ir.Value) -> ir.Value:
        ops, (part, slots) = writer.ops, writer.part(block, place)
        if not slots:
            return writer.weights.whole(part.stored(part.group.layers[1].bias))
        first, first_bias, last, last_bias = writer.layers(part, slots)
        hidden = ops.Relu(ops.Add(ops.MatMul(x, ops.Transpose(first, perm=[1, 0])), first_bias))
        for gates in writer.gates(part, slots):
            wide = ops.Expand(ops.Unsqueeze(gates, ops.constant([1])), ops.constant([1, GROUPS[part.group.name][1]]))
            hidden = ops.Mul(hidden, ops.Reshape(wide, ops.constant([-1])))
        return ops.Add(ops.MatMul(hidden, last), last_bias)

    def conditioning_graph(self, config, weights, precision, smoothing=None) -> ir.Model:
        ops = Ops()
        timesteps, labels = (graph_value(spec) for spec in conditioning_inputs())
        time = ops.Unsqueeze(timesteps, ops.constant([1]))
        angles = ops.Div(time, ops.constant(160, np.float32))
        waves = ops.Concat(ops.Sin(angles), ops.Cos(angles), axis=1)
        embedded = ops.MatMul(waves, ops.Transpose(weights.whole("time.weight"), perm=[1, 0]))
        classes = ops.Gather(weights.whole("label.weight"), labels, axis=0)
        (out,) = ops.call("", "Add", (ops.Unsqueeze(embedded, ops.constant([1])), classes), [CONDITION])
        typed(out, graph_value(conditioning_outputs(config)[0]))
        return conditioning_model([timesteps, labels], [out], ops, weights)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random model whose routers are open and closed, in a file."""
    monkeypatch.setattr(registry, "_known", dict(registry._known))
    registry.register(ToyArchitecture())
    config = ToyConfig(hidden_size=16, depth=2, input_size=6, in_channels=3, learn_sigma=False)
    torch.manual_seed(5)
    model = ToyModel(config)
    for router in model.width_routers():
        nn.init.normal_(router.router.weight)
    path = tmp_path / "toy.safetensors"
    save_checkpoint(path, model, config)
    return path


@pytest.mark.parametrize("plan", [[], ["--max-subnets", "2"], ["--per-step"]])
def test_it_is_exported_sampled_and_held_to_pytorch(
    checkpoint: Path, plan: list[str], tmp_path: Path, run: Callable[..., Any]
) -> None:
    bundle, out = tmp_path / "bundle", tmp_path / "images"
    done = run("export", checkpoint, "--steps", 6, *plan, "--out", bundle)
    assert done.code == 0, done.err
    manifest = Bundle.open(bundle).manifest
    masks = manifest.step_masks()
    assert masks.shape == (6, 16) and 0 < masks.mean() < 1 and (masks != masks[0]).any(), "widths differ over the steps"
    assert manifest.model.architecture == "toy" and set(manifest.model.units.group_names) == set(GROUPS)

    done = run("sample", bundle, "--labels", "0,1,2", "--out", out)
    assert done.code == 0 and len(list(out.glob("0*.png"))) == 3, done.err
    done = run("parity", bundle, "--against", checkpoint, "--labels", "0,2", "--out", tmp_path / "p", "--json")
    assert done.code == 0, done.out + done.err
    checks = json.loads(done.out)["hops"]
    assert checks and {check["status"] for check in checks} == {"passed"}, checks
    assert "Toy" in run("inspect", bundle).out


def test_what_needs_synthetic_models_says_so_or_does_without(
    checkpoint: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    done = run("export", checkpoint, "--steps", 6, "--memory-budget", "1MB", "--out", tmp_path / "bundle")
    assert done.code == 0, done.err
    assert "size of the weights, not with measured memory: Toy: there are no synthetic models" in done.out
    assert "Its filters and experts take " in done.out
    done = run("export", checkpoint, "--steps", 6, "--cost", "measured", "--out", tmp_path / "measured")
    assert done.code == 2 and "there are no synthetic models of this architecture; use --cost macs" in done.err
    assert not (tmp_path / "measured").exists()


def test_a_masked_form_that_lacks_something_cannot_be_made() -> None:
    class Forgetful(ToyModel):
        embed_timestep = DynamicModel.embed_timestep

    with pytest.raises(TypeError, match="embed_timestep"):
        Forgetful(ToyConfig(hidden_size=16, depth=2, input_size=6))


def test_a_checkpoint_of_an_architecture_that_is_not_known_is_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]
) -> None:
    assert load_checkpoint(checkpoint).config.architecture == "toy"
    monkeypatch.setattr(registry, "_known", {})
    done = run("inspect", checkpoint)
    assert done.code == 2 and "unknown architecture 'toy'; expected one of: dit" in done.err, done.err
