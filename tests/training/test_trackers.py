from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dydit.errors import BackendError
from dydit.training.recipe import Recipe
from dydit.training.state import read_log
from dydit.training.trainer import train


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_missing_tracker_is_one_line(
    tmp_path: Path, small_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(BackendError, match=rf"logging to {tracker} needs {tracker}, .*dydit\[trackers\]") as caught:
        train(small_recipe(trackers=(tracker,)), tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_tensorboard_gets_the_lines_of_the_log(tmp_path: Path, small_recipe: Callable[..., Recipe]) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'dydit[trackers]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name, iterations in (("first", 6), ("again", 12)):  # the second time it is resumed, and made longer
        train(small_recipe(trackers=("tensorboard",), iterations=iterations), tmp_path / "run", resume=name == "again")
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "dydit"))
    events.Reload()
    log = read_log(tmp_path / "run")
    assert [entry["iteration"] for entry in log] == [3, 6, 9, 12]
    for key in ("mse", "probe_mse"):
        found = {event.step: event.value for event in events.Scalars(key)}
        assert found == pytest.approx({entry["iteration"]: entry[key] for entry in log}, rel=1e-5)
