"""Pictures are drawn, with nothing on standard error, whatever list of fonts matplotlib has kept for the user."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import font_manager
from PIL import Image

DRAW = """
import sys
from pathlib import Path
from dydit.diffusion.process import Prediction
from dydit.training.curves import curves_png
log = [{"iteration": k, "mse": 10.0 ** -k} for k in range(1, 5)]
Path(sys.argv[1]).write_bytes(curves_png(log, "a recipe", Prediction.X0))
"""


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
    out = tmp_path / "picture.png"
    environment = {**os.environ, "MPLCONFIGDIR": str(tmp_path)}
    command = [sys.executable, "-c", DRAW, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    with Image.open(out) as picture:
        picture.load()
