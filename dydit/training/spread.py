"""How the weights of a run are spread over its processes: whole in each, or split, as `accelerate` is configured.

Whole (DDP), every process has all weights, and the gradients are averaged. Split (FSDP, version 2), a process has a
part of every weight, and of its gradient, its moments and its moving average; a block gathers its weights when it runs.
States and checkpoints hold whole tensors, so a run can be resumed the other way, and on another number of processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dydit.errors import ConfigError
from dydit.models.dynamic import DynamicModel

UNSUPPORTED = ("DEEPSPEED", "MEGATRON_LM", "TP")


class Whole:
    """Every process has all weights."""

    split = False

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator

    def place(self, model: DynamicModel) -> None:
        """Spread the weights of a model that is on the device."""

    def prepared(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """The objective and the optimizer of the steps."""
        objective, optimizer = self.accelerator.prepare(objective, optimizer)
        return objective, optimizer

    def without_exchange(self, objective: nn.Module) -> contextlib.AbstractContextManager[None]:
        """A context in which backward passes only add gradients up, because another part of the batch follows."""
        context: contextlib.AbstractContextManager[None] = self.accelerator.no_sync(objective)
        return context

    def clip(self, parameters: Sequence[Tensor], limit: float) -> float:
        """Scale gradients of a larger norm down to the norm `limit`; returns their norm."""
        return float(self.accelerator.clip_grad_norm_(parameters, limit))

    def everywhere(self, flags: Tensor) -> Tensor:
        """Flags that hold in all processes, bool [n]."""
        return flags


class Split(Whole):
    """A process has a part of every weight."""

    split = True

    def __init__(self, accelerator: Any, reshard: bool):
        super().__init__(accelerator)
        self._reshard = reshard

    def place(self, model: DynamicModel) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        for module in (*model.ordered_blocks(), model):
            fully_shard(module, mesh=mesh, reshard_after_forward=self._reshard)

    def prepared(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        return objective, optimizer

    @contextlib.contextmanager
    def without_exchange(self, objective: nn.Module) -> Iterator[None]:
        model: Any = objective.model
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    def clip(self, parameters: Sequence[Tensor], limit: float) -> float:
        return float(whole(torch.nn.utils.clip_grad_norm_(parameters, limit)))

    def everywhere(self, flags: Tensor) -> Tensor:
        held: Tensor = self.accelerator.reduce(flags.int(), "sum") == self.accelerator.num_processes
        return held


def spread_of(accelerator: Any, compiled: bool) -> Whole:
    """What `accelerate` is configured for. Raises `ConfigError` for what is not supported."""
    from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env

    kind = accelerator.distributed_type.value
    if kind in UNSUPPORTED:
        raise ConfigError(
            f"accelerate is configured for {kind}, which is not supported; use FSDP (accelerate launch --use_fsdp "
            "--fsdp_version 2), or let every process have all weights (accelerate launch --multi_gpu)"
        )
    if not parse_flag_from_env("ACCELERATE_USE_FSDP") or accelerator.num_processes == 1:
        return Whole(accelerator)
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ConfigError(
            "accelerate is configured for version 1 of FSDP; use version 2 (accelerate launch --use_fsdp "
            "--fsdp_version 2)"
        )
    if _offloads(plugin):
        raise ConfigError(
            "accelerate is configured to keep weights on the CPU (fsdp_offload_params), which is not supported; turn "
            "it off, and use checkpointing=true and accumulate=N to save memory"
        )
    if compiled:
        raise ConfigError("compile=true does not work with FSDP; leave one of them out")
    return Split(accelerator, bool(plugin.reshard_after_forward))


def _offloads(plugin: Any) -> bool:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return isinstance(plugin.cpu_offload, CPUOffloadPolicy) or plugin.cpu_offload is True


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all of its elements. All processes have to call it, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, on the device of another one and spread as that is."""
    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements) if isinstance(other, DTensor) else tensor
