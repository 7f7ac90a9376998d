"""Inception features of images: the network of torch-fidelity, with weights from a file.

torch-fidelity's network computes what the TensorFlow graph "inception-2015-12-05" computes, on which published FIDs are
based, and resizes images as TensorFlow does. The weights are `weights-inception-2015-12-05-6726825d.pth` of that
project, or the same file under pytorch-fid's name. Nothing is downloaded, and nothing in the file is executed.
"""

from __future__ import annotations

import importlib
import io
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from dydit.checkpoints.containers import Container, container_of
from dydit.checkpoints.safe_load import listed, read_safetensors, read_torch
from dydit.errors import BackendError, CheckpointError, ConfigError
from dydit.evaluation.images import ImageSet
from dydit.extras import require
from dydit.files import sha256_of

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
POOL = 2048
SPATIAL_CHANNELS = 7
SPATIAL = SPATIAL_CHANNELS * 17 * 17
_ROWS = 4096
_POOL_NAME = "2048"
_LIBRARY = "torch_fidelity"
_SCRIPT_ENTRIES = ("constants.pkl", "code/")


@dataclass(frozen=True, eq=False)
class Features:
    """Features of images in their order, float32 on the CPU.

    `pool` [N, 2048]: of the last pooling layer. `spatial` [N, 2023]: the first seven channels of the convolution
    `mixed_6/conv`, 17x17 each, channels last, as the ADM evaluator takes them for the sFID; None if not asked for.
    """

    pool: np.ndarray
    spatial: np.ndarray | None


class Inception:
    """The network with the weights of a file, on a device. `sha256`: of the file."""

    def __init__(self, network: Any, sha256: str, device: str):
        self.sha256, self._device = sha256, device
        self._network = network.to(device)
        self._spatial: Tensor | None = None
        # mixed_6/conv of the TensorFlow graph, after its ReLU.
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> Self:
        """Read weights. Raises `CheckpointError` for a file that is something else, or holds more than tensors, and
        `BackendError` if there is no such device.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise BackendError("this PyTorch has no CUDA device; use --device cpu")
        state = _read_state(path)
        data = io.BytesIO()
        torch.save(state, data)  # the library unpickles whatever it is given, so it is given what was read safely
        data.seek(0)
        try:
            network = network_class()("inception", [_POOL_NAME], feature_extractor_weights_path=data)
        except RuntimeError as error:  # of load_state_dict, a line for each kind of problem
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{path} has other layers than the Inception network of the FID ({reason[:160]}...); expected {WEIGHTS}"
            ) from error
        return cls(network, sha256_of(path), device)

    def features(
        self, images: ImageSet, batch_size: int, spatial: bool, progress: Callable[[int, int], None] | None = None
    ) -> Features:
        """Features of all images. Raises `ConfigError` if they are not finite, or the same for all images."""
        count = images.shape[0]
        pool = np.empty((count, POOL), np.float32)
        places = np.empty((count, SPATIAL), np.float32) if spatial else None
        done = 0
        for batch in images.batches(batch_size):
            rows = slice(done, done + len(batch))
            pool[rows], own = self._run(batch)
            if places is not None:
                places[rows] = own
            done = rows.stop
            if progress is not None:
                progress(done, count)
        for each in (pool, places):
            if each is not None and not np.isfinite(each).all():
                raise ConfigError(f"{images.path}: the Inception features are not finite; are the weights {WEIGHTS}?")
        if count > 1 and (pool == pool[0]).all():
            raise ConfigError(f"{images.path}: all images have the same Inception features, so nothing can be measured")
        return Features(pool, places)

    def logits(self, pool: np.ndarray) -> Tensor:
        """Logits [N, 1008] on the CPU, without the bias of the last layer: the ADM evaluator leaves it out, too."""
        weight = self._network.fc.weight
        parts = torch.from_numpy(pool).split(_ROWS)
        with torch.inference_mode():
            return torch.cat([(part.to(self._device) @ weight.T).cpu() for part in parts])

    def _run(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))).to(self._device)
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            (pool,) = self._network(pixels)
        assert self._spatial is not None
        spatial = self._spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).reshape(len(batch), -1)
        return pool.cpu().numpy(), spatial.cpu().numpy()

    def _keep_spatial(self, module: Any, inputs: Any, output: Tensor) -> None:
        self._spatial = output


def _read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, float32 except for counters."""
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; expected {WEIGHTS} of the project torch-fidelity")
    try:
        container = container_of(path)
        if container is Container.TORCH_ZIP and _is_script(path):
            raise CheckpointError(
                f"is a TorchScript program, which would be executed; use {WEIGHTS} of the project torch-fidelity"
            )
        state = read_safetensors(path)[0] if container is Container.SAFETENSORS else read_torch(path, container)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if not isinstance(state, dict) or not state or not all(isinstance(each, Tensor) for each in state.values()):
        raise CheckpointError(f"{path} holds something else than the tensors of a network; expected {WEIGHTS}")
    if bad := [str(name) for name, each in state.items() if not torch.isfinite(each).all()]:
        raise CheckpointError(f"{path} holds NaN or infinite values in {listed(bad)}; copy or download it again")
    return state


def _is_script(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile):
        return False
    return any(name.startswith(_SCRIPT_ENTRIES) for name in names)


@lru_cache(maxsize=1)
def network_class() -> Any:
    """The class of torch-fidelity's network.

    The `__init__` of the package imports all of its metrics, and with them torchvision, which the network does not need
    and which fails to import beside some builds of PyTorch. So the network's module is imported without it.
    """
    require("Inception features", [_LIBRARY])
    spec = find_spec(_LIBRARY)
    assert spec is not None
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == _LIBRARY}
    for name in before:
        del sys.modules[name]
    sys.modules[_LIBRARY] = module_from_spec(spec)
    try:
        return importlib.import_module(f"{_LIBRARY}.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == _LIBRARY]:
            del sys.modules[name]
        sys.modules.update(before)
