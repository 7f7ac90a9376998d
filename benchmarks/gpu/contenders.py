"""DiT with random weights made on the device, and what is timed of it: in PyTorch, and in the device loop.

Nothing is loaded from a file. The static model is that of the same weights with all units and tokens; so all contenders
share one model in PyTorch, and one `weights.bin` on the disk.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from budget import Context
from ceilings import Clock
from graphless import graphless_bundle, graphless_weights, plan_steps, static_form
from timing import CFG_SCALE, SEED, TYPES, Contender
from torch import Tensor

from dydit.bench.bench import spread_steps
from dydit.bench.timing import Round
from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import Routing
from dydit.diffusion.sampler_step import sampler_step
from dydit.export.settings import ExportConfig
from dydit.models.macs import flops_ratio, static_macs
from dydit.models.routers import Masked, Recording, Static
from dydit.models.synthetic import synthetic_model
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.torch_cuda import TorchDeviceBackend
from dydit.runtime.loop import MemoryStore, RunStats
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import make_batches

MASKED, STATIC, COMPILED = "eager masked", "eager static", "compiled static"
"""The whole model in PyTorch: masked as the public code runs it, static, and static by `torch.compile`."""
LOOP_STATIC, LOOP_DYNAMIC = "loop static", "loop dynamic"
"""The device loop on engines in PyTorch, captured as CUDA graphs."""
RECORDED = 8
"""Images of the run whose routed tokens decide how many token slots there are."""
Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`denoise(x [R, C, S, S], t [R], y [R])` is the output of a model in fp32."""


def opened(context: Context, bundle: Bundle, **settings: Any) -> TorchDeviceBackend:
    """The device loop on engines in PyTorch: on the GPU, in a dry run on a simulated driver."""
    if not context.dry:
        return TorchDeviceBackend(bundle, BackendOptions(device="cuda"), **settings)
    from tests.fixtures.host_torch import HostTorchBackend

    return HostTorchBackend(bundle, BackendOptions(threads=1), **settings | {"fuse": False})


class Walk:
    """Steps of the whole model in PyTorch on the latents of a batch, all on the device, with guidance."""

    def __init__(self, context: Context, bundle: Bundle, batch: int):
        self.device, manifest = context.settings.device, bundle.manifest
        model, sampling = manifest.model, manifest.sampling
        shape = (batch, model.in_channels, model.input_size, model.input_size)
        generator = torch.Generator(self.device).manual_seed(SEED)
        self.x, self.noise = (torch.randn(shape, generator=generator, device=self.device) for _ in range(2))
        labels = [index % model.num_classes for index in range(batch)]
        self.y = torch.tensor([*labels, *[model.null_class] * batch], device=self.device)
        self.times = torch.tensor(sampling.timesteps, device=self.device)[:, None].repeat(1, 2 * batch)
        self.coefficients = torch.tensor(sampling.coefficients, device=self.device)
        self.channels = sampling.cfg_channels

    def step(self, denoise: Denoise, k: int, x: Tensor) -> Tensor:
        """The latents after step k."""
        out = denoise(x.repeat(2, 1, 1, 1), self.times[k], self.y)
        zeros = torch.zeros_like(x)
        return sampler_step(x, zeros, out, self.noise, self.coefficients[k], CFG_SCALE, self.channels)[0]


class Made:
    """The model, its bundle, and that of the static form. `macs`: multiply-adds of an image's blocks with guidance."""

    @torch.no_grad()
    def __init__(self, context: Context):
        settings, device, start = context.settings, context.settings.device, time.monotonic()
        config = ExportConfig(
            steps=settings.loop_steps,
            max_subnets=settings.subnets,
            routing=Routing.CAPACITY,
            precision=settings.precision,
            max_batch=max(settings.batches),
        )
        folder = context.folder / "timed"
        folder.mkdir()
        with torch.device(device):
            self.model = synthetic_model(settings.config)
            self.dtype = getattr(torch, TYPES[settings.precision])
            planned = plan_steps(self.model, config)
            weights = graphless_weights(folder, self.model.state_dict(), planned)
            self.bundle = graphless_bundle(folder, weights, planned)  # with a slot for every token
            most, mean = self._tokens(context)
            self.bundle = graphless_bundle(folder, weights, planned, planned.slots(most))
            self.model.to(self.dtype)
        self.static = static_form(self.bundle)
        static = 2 * static_macs(settings.config)
        ratio = flops_ratio(settings.config, settings.config.units.counts(planned.masks), mean)
        self.macs = {"static": static, "dynamic": float(np.mean(ratio)) * static}
        self.facts = {
            "seconds": time.monotonic() - start,
            "parameters": sum(each.numel() for each in self.model.parameters()),
            "weight_bytes": self.bundle.mapped_weights().nbytes,
            "subnets": len(self.bundle.manifest.subnets),
            "token_share": float(mean.mean()),
            "flops_ratio": float(np.mean(ratio)),
            "plan_ratio": self.bundle.manifest.plan.macs / self.bundle.manifest.plan.static_macs,
            "macs": self.macs,
        }

    def _tokens(self, context: Context) -> tuple[np.ndarray, np.ndarray]:
        """Shares of routed tokens of each step and block, [S, L]: the largest of any row, and the mean."""
        walk = Walk(context, self.bundle, min(RECORDED, max(context.settings.batches)))
        x, most, mean = walk.x, [], []
        for k in range(context.settings.loop_steps):
            recording = Recording(Masked(), self.model.config)
            x = walk.step(lambda x, t, y, gating=recording: self.model(x, t, y, gating), k, x)
            shares = recording.decisions().tokens.float().mean(-1)
            most.append(shares.amax(1).cpu().numpy())
            mean.append(shares.mean(1).cpu().numpy())
        return np.stack(most), np.stack(mean)

    def denoise(self, name: str, dry: bool) -> Denoise:
        """A form of the whole model in PyTorch."""
        gating = Masked() if name == MASKED else Static()

        def run(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return self.model(x.to(self.dtype), t, y, gating).float()

        if name != COMPILED:
            return run
        # On the CPU only what can be compiled is tried, not how: that would take minutes.
        how: dict[str, Any] = {"backend": "eager"} if dry else {"mode": "max-autotune"}
        compiled = torch.compile(run, dynamic=False, fullgraph=True, **how)

        def step(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(x, t, y).clone()

        return step


class WholeModel(Contender):
    """A form of the whole model in PyTorch: steps spread over the run, timed together."""

    def __init__(self, context: Context, made: Made, name: str, batch: int):
        self._clock, self._denoise = context.clock, made.denoise(name, context.dry)
        self._walk = Walk(context, made.bundle, batch)
        self.steps = spread_steps(context.settings.loop_steps, context.settings.measured)

    @torch.no_grad()
    def once(self) -> None:
        """The steps of a round."""
        x = self._walk.x
        for k in self.steps:
            x = self._walk.step(self._denoise, k, x)

    def round(self) -> Round:
        ms = self._clock.ms(self.once) / len(self.steps)
        return Round(ms=(ms,) * len(self.steps))

    def close(self) -> None:
        """Nothing to free."""


class DeviceLoop(Contender):
    """Whole runs in the device loop. A round replays the graphs of a run, without the host's part of it.

    `stats`: of the first run. `warnings`: what it said, for example that graphs cannot be captured; then a round is a
    whole run.
    """

    def __init__(self, context: Context, bundle: Bundle, batch: int):
        model, self._batch = bundle.manifest.model, batch
        self._clock: Clock = context.clock
        self._backend = opened(context, bundle)
        self._batches = make_batches([index % model.num_classes for index in range(batch)], range(batch), batch)
        self._noise = SeededNoise(SEED, (model.in_channels, model.input_size, model.input_size))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self.stats = self.run()
            except BaseException:
                self.close()
                raise
        self.warnings = sorted({str(each.message)[:300] for each in caught})

    def run(self) -> RunStats:
        """One whole run, with the host's noise and the latents' way back."""
        return self._backend.sample_run(self._batches, self._noise, MemoryStore(), CFG_SCALE)

    def replay(self) -> int:
        """Queue a run's graphs; returns the number of steps, 0 where none were captured."""
        return self._backend.replay(self._batch, 2 * self._batch)

    def round(self) -> Round:
        steps = 0

        def work() -> None:
            nonlocal steps
            steps = self.replay()

        device = self._backend.executor.device
        ms = self._clock.ms(work, device.stream, self.wait)
        if not steps:
            steps, ms = self.stats.steps, self.run_ms() * self.stats.steps
        return Round(ms=(ms / steps,) * steps)

    def wait(self) -> None:
        """Wait for what was queued."""
        device = self._backend.executor.device
        with device.activate():
            device.idle()

    def run_ms(self) -> float:
        """Milliseconds per step of a whole run, of which the host waits for the end."""
        return self._clock.ms(self.run) / self.stats.steps

    def close(self) -> None:
        """Free what it has on the device."""
        self._backend.close()


def open_timed(context: Context, made: Made, name: str, batch: int) -> WholeModel | DeviceLoop:
    """Load a contender."""
    if name in (LOOP_STATIC, LOOP_DYNAMIC):
        return DeviceLoop(context, made.static if name == LOOP_STATIC else made.bundle, batch)
    return WholeModel(context, made, name, batch)
