"""Pictures of samples. Images are f32 [C, S, S] in [-1, 1]; each function returns the bytes of a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np

from dydit.plot_style import drawing, png

_WORDS_WIDTH = 12  # characters in a line above a column


def picture_cell(axis: Any, image: np.ndarray) -> None:
    """Draw one image, f32 [C, S, S] in [-1, 1], C = 1 or at least 3, over all of an axis."""
    pixels = np.clip((image[:3] + 1) / 2, 0, 1)
    pixels = pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0]
    size = image.shape[-1]
    axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=(0, size, size, 0), interpolation="nearest")
    bare(axis)


def bare(axis: Any) -> None:
    """Remove ticks and frame."""
    axis.set(xticks=(), yticks=())
    axis.spines[:].set_visible(False)


def samples_png(images: np.ndarray, labels: Sequence[int]) -> bytes:
    """A sheet of samples with a column for each class: images f32 [n, C, S, S] in [-1, 1], C = 1 or 3; labels [n]."""
    classes = sorted(set(labels))
    columns = [[image for image, label in zip(images, labels, strict=True) if label == wanted] for wanted in classes]
    rows = max(map(len, columns))
    cell = min(0.95, 9.8 / len(classes))
    with drawing(len(classes) * cell + 0.2, rows * cell + 0.35) as figure:
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
        axes = figure.subplots(rows, len(classes), squeeze=False)
        for column, (label, pictures) in enumerate(zip(classes, columns, strict=True)):
            axes[0, column].set_title(str(label), loc="center", fontsize=9.5)
            for row in range(rows):
                if row < len(pictures):
                    picture_cell(axes[row, column], pictures[row])
                else:
                    axes[row, column].set_axis_off()
        return png(figure)


def side_by_side_png(groups: Mapping[str, np.ndarray], columns: Sequence[str]) -> bytes:
    """The same columns for several models, with a group of rows for each.

    `groups`: by name, images f32 [rows, columns, C, S, S]. `columns`: a text above each column, broken into lines.
    """
    titles = [fill(text, _WORDS_WIDTH) for text in columns]
    lines = max(title.count("\n") + 1 for title in titles)
    cell = min(0.95, 9.0 / len(columns))
    heights = [cell * len(images) + 0.12 for images in groups.values()]
    heights[0] += 0.17 * lines + 0.15  # so that all images have one size
    with drawing(len(columns) * cell + 1.1, sum(heights)) as figure:
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
        parts = figure.subfigures(len(groups), 1, height_ratios=heights)
        for place, (part, (name, images)) in enumerate(zip(np.atleast_1d(parts), groups.items(), strict=True)):
            axes = part.subplots(len(images), len(columns), squeeze=False)
            for row, pictures in enumerate(images):
                for column, picture in enumerate(pictures):
                    picture_cell(axes[row, column], picture)
            for column, title in enumerate(titles if place == 0 else ()):
                axes[0, column].set_title(title, loc="center", fontsize=8)
            part.supylabel(name, fontsize=9.5)
        return png(figure)
