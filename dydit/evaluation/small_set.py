"""Measures samples of a small set of real images with a classifier that is trained on that set.

The FID needs thousands of images, and its network knows photographs. For a small set, a small convolutional network is
trained on the real images. Whether it recognizes the requested class of a sample, and the Fréchet distance in its last
hidden layer (64 features), tell better samples from worse ones. The figures of different sets cannot be compared.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from dydit.checkpoints.safe_load import read_safetensors
from dydit.errors import CheckpointError, ConfigError
from dydit.evaluation.frechet import Normal
from dydit.files import new_file

FEATURES = 64
LEAST_IMAGES = FEATURES + 1
"""The smallest set of which the covariance of the features has full rank."""
EPOCHS = 12
_BATCH = 64
_HELD_OUT = 5  # one image of so many
_FORMAT = "dydit small set 1"


@dataclass(frozen=True)
class SmallSetMetrics:
    """Quality of a sample set. `real_consistency`: class consistency of real images that were not trained on."""

    class_consistency: float  # share of images that are classified as their label, 0..1
    frechet_distance: float  # to all real images
    samples: int
    real_consistency: float


class Classifier(nn.Module):
    """Three convolutions that halve the image, a mean over it, and two linear layers. Any image size from 8x8."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((channels, 32), (32, 64), (64, 64)):
            convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, FEATURES), nn.ReLU())
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, C, S, S] to features [B, 64] and logits [B, classes]."""
        features = self.body(images)
        return features, self.head(features)


@dataclass(frozen=True, eq=False)
class SmallSetMeasure:
    """A trained classifier, and the statistics of the real images' features. `shape`: of an image, [C, S, S]."""

    network: Classifier
    shape: tuple[int, ...]
    classes: int
    real: Normal
    real_consistency: float

    @classmethod
    def fit(
        cls, images: np.ndarray, labels: np.ndarray, classes: int, seed: int = 0, cache: Path | None = None
    ) -> Self:
        """Train on real images, float32 [n, C, S, S] in [-1, 1], and labels int [n] below `classes`; takes seconds.

        One image of five is held out. Deterministic for a seed on one machine. `cache`: a file that keeps the
        classifier; it is read if it exists. Raises `ConfigError` for data that do not fit, or for a file of other data.
        """
        _require_images(images, labels, classes)
        key = _fingerprint(images, labels, classes, seed)
        network = Classifier(images.shape[1], classes)
        order = np.random.default_rng(seed).permutation(len(images))
        held_out, trained = order[::_HELD_OUT], np.delete(order, np.s_[::_HELD_OUT])
        if cache is not None and cache.exists():
            _read(network, cache, key)
        else:
            network = _trained(images[trained], labels[trained], classes, seed)
            if cache is not None:
                _write(network, cache, key)
        network.eval()
        features, predicted = _run(network, images)
        consistency = float((predicted[held_out] == labels[held_out]).mean())
        return cls(network, images.shape[1:], classes, Normal.fit(features), consistency)

    def evaluate(self, images: np.ndarray, labels: np.ndarray) -> SmallSetMetrics:
        """Measure samples, float32 [n, C, S, S] in [-1, 1], of `labels`, int [n]. Raises `ConfigError`."""
        images, labels = np.asarray(images), np.asarray(labels)
        _require_images(images, labels, self.classes)
        if images.shape[1:] != self.shape:
            raise ConfigError(f"samples are {list(images.shape[1:])}, but the real images are {list(self.shape)}")
        features, predicted = _run(self.network, np.clip(images, -1, 1))
        return SmallSetMetrics(
            class_consistency=float((predicted == labels).mean()),
            frechet_distance=max(0.0, Normal.fit(features).distance(self.real)),
            samples=len(images),
            real_consistency=self.real_consistency,
        )


def _require_images(images: np.ndarray, labels: np.ndarray, classes: int) -> None:
    if images.ndim != 4 or not np.issubdtype(images.dtype, np.floating):
        raise ConfigError(f"images are {images.dtype.name} {list(images.shape)}, expected floating point [n, C, S, S]")
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise ConfigError(
            f"{len(images)} images need {len(images)} labels; got {labels.dtype.name} of shape {list(labels.shape)}"
        )
    if len(images) < LEAST_IMAGES:
        raise ConfigError(
            f"the Fréchet distance of {FEATURES} features needs at least {LEAST_IMAGES} images; got {len(images)}"
        )
    if min(images.shape[2:]) < 8:
        raise ConfigError(f"images of {list(images.shape[2:])} pixels are too small; at least 8x8 are needed")
    if labels.min() < 0 or labels.max() >= classes:
        raise ConfigError(f"labels are {labels.min()}..{labels.max()}, expected 0..{classes - 1}")
    if not np.isfinite(images).all():
        raise ConfigError("the images hold values that are not finite")


def _trained(images: np.ndarray, labels: np.ndarray, classes: int, seed: int) -> Classifier:
    order = torch.Generator().manual_seed(seed)
    pixels, targets = torch.from_numpy(np.array(images, np.float32)), torch.from_numpy(labels.astype(np.int64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier(images.shape[1], classes)
    batches = -(-len(pixels) // _BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=EPOCHS * batches)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(pixels), generator=order).chunk(batches):
            loss = nn.functional.cross_entropy(network(pixels[chosen])[1], targets[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network


def _run(network: Classifier, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, 64] and classes [n]."""
    with torch.inference_mode():
        parts = [network(part) for part in torch.from_numpy(np.array(images, np.float32)).split(1024)]
    features, logits = (torch.cat(each) for each in zip(*parts, strict=True))
    return features.numpy(), logits.argmax(1).numpy()


def _fingerprint(images: np.ndarray, labels: np.ndarray, classes: int, seed: int) -> str:
    settings = f"{_FORMAT} {images.shape} {classes} {seed} {EPOCHS}"
    digest = hashlib.sha256(settings.encode())
    for array in (images.astype(np.float32), labels.astype(np.int64)):
        digest.update(array.tobytes())
    return digest.hexdigest()


def _write(network: Classifier, path: Path, key: str) -> None:
    from safetensors.torch import save

    with new_file(path) as file:
        file.write(save({name: each.contiguous() for name, each in network.state_dict().items()}, {"data": key}))


def _read(network: Classifier, path: Path, key: str) -> None:
    try:
        state, header = read_safetensors(path)
    except CheckpointError as error:
        raise ConfigError(f"{path} {error}") from error
    if header.get("data") != key:
        raise ConfigError(f"{path} holds a classifier of other data or of another seed; choose another file")
    network.load_state_dict(state)


def as_model_images(batch: np.ndarray, channels: int) -> np.ndarray:
    """8-bit images [n, H, W, 3] as a model samples them: float32 [n, channels, H, W] in [-1, 1].

    Grey models write three equal channels. Raises `ConfigError` if a grey model's images have colours.
    """
    if channels == 1 and not (batch == batch[..., :1]).all():
        raise ConfigError("the samples have colours, but the real images are grey")
    values: Any = batch[..., :channels].astype(np.float32) / 127.5 - 1
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))
