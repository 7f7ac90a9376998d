"""A calibration from a checkpoint to its file and plots, which an interrupted run resumes from its work folder."""

from __future__ import annotations

from pathlib import Path

from dydit.calibrate.calibration import (
    CalibrationConfig,
    CalibrationResult,
    Progress,
    kept_if_begun,
    run_calibration,
    with_texts,
    work_name,
)
from dydit.calibrate.plots_calibration import calibration_png
from dydit.calibrate.plots_precision import sensitivity_png
from dydit.calibrate.precision_search import Announce
from dydit.checkpoints.checkpoint import Checkpoint
from dydit.errors import OutputError
from dydit.export.settings import ExportConfig
from dydit.files import claimed, explained, parents, remove, require_absent, write_new
from dydit.plot_style import write_picture
from dydit.runtime.backends.base import BackendOptions


def plot_path(out: Path) -> Path:
    """The plot of token capacities beside the calibration file `out`."""
    return out.with_suffix(".png")


def search_plot_path(out: Path) -> Path:
    """The plot of the search for layers in 8 bits beside the calibration file `out`."""
    return out.with_name(f"{out.stem}-search.png")


def require_free(out: Path, config: CalibrationConfig) -> None:
    """Raise `OutputError` if the calibration file or a plot of it exists, or if two of them have one name."""
    if plot_path(out) == out:
        raise OutputError(f"{out}: the plot would have the same name; give --out another ending, such as .json")
    require_absent(out)
    require_absent(plot_path(out))
    if config.search is not None:
        require_absent(search_plot_path(out))


def calibrate_to_file(
    checkpoint: Checkpoint,
    exported: ExportConfig,
    config: CalibrationConfig,
    out: Path,
    backend: str = "onnxruntime",
    options: BackendOptions | None = None,
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> CalibrationResult:
    """Calibrate a checkpoint for an export, and write the calibration file `out` and its plots.

    Finished batches are in a hidden work folder beside `out` until `out` is written; a call with the same settings
    resumes from it. The plots are drawn if matplotlib is installed. `progress(done, total)` counts steps of batches;
    `announce` gets a line about the duration of a search. Raises as `run_calibration` does, and `OutputError` as
    `require_free` does and if `out` cannot be written.
    """
    require_free(out, config)
    checkpoint = with_texts(checkpoint, config)
    work = out.parent / f".{out.name}.{work_name(checkpoint, exported, config)}"
    with explained(out), parents(out), claimed(out):
        with kept_if_begun(work):
            result = run_calibration(checkpoint, exported, config, work, backend, options, progress, announce)
        write_picture(calibration_png, result, plot_path(out))
        if config.search is not None:
            write_picture(sensitivity_png, result, search_plot_path(out))
        write_new(out, result.calibration.to_json().encode())
        remove(work)
    return result
