"""Bundles with one thing wrong whose hashes are right, as a fault of the exporter would leave them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import combinations
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


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Pictures made in a test must have no text that is cut off by their edge or that lies over another.

    Yields the texts of all pictures, as they are drawn; the pictures themselves are empty, which saves time.
    """
    from matplotlib.text import Text

    from dydit.verify import plots, plots_calibration, plots_masks, plots_sensitivity

    said: list[str] = []
    draw = Text.draw

    def checked(figure: Any) -> bytes:
        drawn: list[Text] = []

        def watch(text: Text, renderer: Any, *rest: Any, **settings: Any) -> None:
            if text.get_visible() and text.get_text().strip():
                drawn.append(text)
            draw(text, renderer, *rest, **settings)

        with monkeypatch.context() as patched:
            patched.setattr(Text, "draw", watch)
            figure.canvas.draw()
        renderer, edge = figure.canvas.get_renderer(), figure.bbox
        boxes = [(text.get_text(), Text.get_window_extent(text, renderer)) for text in drawn]
        said.extend(text for text, _ in boxes)
        for text, box in boxes:
            inside = box.x0 > -1 and box.y0 > -1 and box.x1 < edge.x1 + 1 and box.y1 < edge.y1 + 1
            assert inside, f"{text!r} is cut off: {box} in {edge}"
        for (one, a), (other, b) in combinations(boxes, 2):
            wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert wide < 2 or high < 2, f"{one!r} lies over {other!r}"
        return b""

    for module in (plots, plots_calibration, plots_masks, plots_sensitivity):
        monkeypatch.setattr(module, "png", checked)
    yield said
