"""The picture of a run says where the run came to, and shows every series that its log has."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from dydit.diffusion.process import Prediction
from dydit.training import curves

STATIC = [{"iteration": 10 * k, "mse": 1 / k, "probe_mse": 0.8 / k} for k in range(1, 9)]
DYNAMIC = [
    {**line, "target": 0.5, "ratio": 0.6, "probe_ratio": 0.51234, "probe_heads": 0.5, "probe_groups": 0.6}
    for line in STATIC
]


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ([], ("a recipe", "after 0 iterations")),
        (STATIC[:1], ("a recipe: error 0.8", "after 10 iterations")),
        (STATIC, ("a recipe: error 0.1", "after 80 iterations")),
        (DYNAMIC, ("a recipe: error 0.1, FLOPs ratio 0.512 (target 0.50)", "after 80 iterations")),
        ([*DYNAMIC, {"iteration": 90, "mse": 0.1}], ("a recipe: error 0.1, FLOPs ratio 0.512 (target 0.50)", None)),
    ],
    ids=["none", "one", "static", "dynamic", "no probe yet"],
)
def test_the_headline_says_where_the_run_came_to(log, words, monkeypatch) -> None:
    said, original = [], curves.headline
    monkeypatch.setattr(curves, "headline", lambda figure, *texts: (said.append(texts), original(figure, *texts)))
    with Image.open(io.BytesIO(curves.curves_png(log, "a recipe", Prediction.X0))) as picture:
        assert (picture.width > 1500) == any("ratio" in line for line in log), "a second panel for dynamic runs"
    ((finding, detail),) = said
    assert finding == words[0] and words[1] in (None, detail)


@pytest.mark.parametrize("steep", [False, True])
def test_losses_that_fall_far_are_on_a_logarithmic_axis(steep, monkeypatch) -> None:
    figures, original = [], curves.png
    monkeypatch.setattr(curves, "png", lambda figure: (figures.append(figure), original(figure))[1])
    curves.curves_png(STATIC if steep else STATIC[5:], "a recipe", Prediction.V)
    ((axis,),) = [figure.axes for figure in figures]
    assert axis.get_yscale() == ("log" if steep else "linear") and "error on v" in axis.get_title("left")


def test_the_series_of_a_log_have_their_lines(monkeypatch) -> None:
    figures, original = [], curves.png
    monkeypatch.setattr(curves, "png", lambda figure: (figures.append(figure), original(figure))[1])
    curves.curves_png(DYNAMIC, "a recipe", Prediction.X0)
    errors, ratios = figures[0].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in (*errors.lines, *ratios.lines)}
    keys = ("mse", "probe_mse", "target", "ratio", "probe_ratio", "probe_heads", "probe_groups")
    assert sorted(lines.values()) == sorted([line[key] for line in DYNAMIC] for key in keys), (
        "no tokens are in this log"
    )
    assert {text.get_text() for axis in (errors, ratios) for text in axis.get_legend().get_texts()} == set(lines)
