"""Bundles with one thing wrong whose hashes are right, as a fault of the exporter would leave them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import MANIFEST, FileEntry
from dydit.bundle.stored import WEIGHTS
from dydit.files import sha256_of

Spoil = Callable[[np.ndarray], None]


def reseal(folder: Path, manifest: Any, **changes: Any) -> Bundle:
    """Write the manifest with new hashes for whatever is in the folder."""
    files = {
        name: FileEntry(bytes=(folder / name).stat().st_size, sha256=sha256_of(folder / name))
        for name in manifest.files
    }
    (folder / MANIFEST).write_text(manifest.model_copy(update={"files": files, **changes}).to_json())
    return Bundle.open(folder)


@pytest.fixture
def spoil_weight(tmp_path: Path) -> Callable[[Bundle, str, Spoil], Bundle]:
    """`spoil_weight(bundle, name, change)`: a copy with one stored tensor changed in place (flat, f32)."""

    def spoil(bundle: Bundle, name: str, change: Spoil) -> Bundle:
        folder = tmp_path / f"spoilt-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(bundle.path, folder)
        entry = bundle.manifest.weights[name]
        count = int(np.prod(entry.shape))
        values = np.memmap(folder / WEIGHTS, np.float32, "r+", entry.offset, (count,))
        change(values)
        values.flush()
        return reseal(folder, bundle.manifest)

    return spoil


@pytest.fixture
def spoil_manifest(tmp_path: Path) -> Callable[..., Bundle]:
    """`spoil_manifest(bundle, **fields)`: a copy with some fields of its manifest replaced."""

    def spoil(bundle: Bundle, **changes: Any) -> Bundle:
        folder = tmp_path / f"spoilt-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(bundle.path, folder)
        return reseal(folder, bundle.manifest, **changes)

    return spoil


@pytest.fixture
def spoil_graphs(tmp_path: Path) -> Callable[[Bundle, Callable[[onnx.ModelProto], None]], Bundle]:
    """`spoil_graphs(bundle, change)`: a copy with every subnetwork's graph changed in place."""

    def spoil(bundle: Bundle, change: Callable[[onnx.ModelProto], None]) -> Bundle:
        folder = tmp_path / f"spoilt-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(bundle.path, folder)
        for subnet in bundle.manifest.subnets:
            graph = onnx.load(folder / subnet.file, load_external_data=False)
            change(graph)
            (folder / subnet.file).write_bytes(graph.SerializeToString())
        return reseal(folder, bundle.manifest)

    return spoil
