"""Pictures are drawn, with nothing on standard error, whatever matplotlib has kept and is told for the user."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import font_manager
from PIL import Image

from dydit.diffusion.process import Prediction
from dydit.training.curves import curves_png

LOG = [{"iteration": k, "mse": 10.0**-k} for k in range(1, 5)]
DRAW = f"""
import sys, threading, types
from pathlib import Path
# matplotlib says after a while that it makes the list: here at once.
threading.Timer = lambda seconds, say: types.SimpleNamespace(start=say, cancel=lambda: None)
from dydit.diffusion.process import Prediction
from dydit.training.curves import curves_png
Path(sys.argv[1]).write_bytes(curves_png({LOG}, "a recipe", Prediction.X0))
"""


def drawn_where(folder: Path) -> bytes:
    """The picture that a process draws whose folder for matplotlib's files is this one."""
    out = folder / "picture.png"
    environment = {**os.environ, "MPLCONFIGDIR": str(folder)}
    command = [sys.executable, "-c", DRAW, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    return out.read_bytes()


@pytest.mark.parametrize("kept", ["none", "without matplotlib's own fonts", "cut off"])
def test_any_list_of_fonts(kept: str, tmp_path: Path) -> None:
    """As an environment leaves it that was removed while it made the list."""
    path = tmp_path / f"fontlist-v{font_manager.FontManager.__version__}.json"
    font_manager.json_dump(font_manager.fontManager, path)
    if kept == "none":
        path.unlink()
    elif kept == "cut off":
        path.write_text(path.read_text()[:1000])
    else:
        listed = json.loads(path.read_text())
        listed["ttflist"] = []
        path.write_text(json.dumps(listed))
    with Image.open(io.BytesIO(drawn_where(tmp_path))) as picture:
        picture.load()


def test_settings_of_the_user_are_not_those_of_reports(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("axes.facecolor: black\ntext.usetex: True\nfont.family: serif\n")
    assert drawn_where(tmp_path) == curves_png(LOG, "a recipe", Prediction.X0)
