"""How labels and sizes are written, and what the progress line shows."""

from __future__ import annotations

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.commands.export import parse_guided_channels
from dydit.commands.options import BYTE_UNITS, parse_bytes, parse_labels, recipe_settings
from dydit.commands.progress import ProgressLine, ProgressLog


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("207", (207,)),
        ("207,360", (207, 360)),
        ("0-3", (0, 1, 2, 3)),
        ("5-5", (5,)),
        ("3, 1-2 ,3", (3, 1, 2, 3)),
    ],
)
def test_labels(text: str, labels: tuple[int, ...]) -> None:
    assert parse_labels(text) == labels


@pytest.mark.parametrize("text", ["", ",", "1,", "a", "-1", "1-", "1--2", "3-1", "1.5", "0x1", "\u0661", "0-99999999"])
def test_labels_that_are_none(text: str) -> None:
    with pytest.raises(click.BadParameter):
        parse_labels(text)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=20))
def test_labels_come_back_as_written(labels: list[int]) -> None:
    assert parse_labels(",".join(map(str, labels))) == tuple(labels)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("500MB", 500_000_000), ("64kB", 64_000), ("64 KiB", 65_536), ("1.5gib", 3 << 29), ("12B", 12)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 10**6), st.sampled_from(sorted(BYTE_UNITS)))
def test_a_size_is_its_number_times_its_unit(number: int, unit: str) -> None:
    assert parse_bytes(f"{number}{unit}") == number * BYTE_UNITS[unit]


@pytest.mark.parametrize("text", ["", "8", "GiB", "8 G", "8XB", "-1GiB", "nanGB", "infGB", "1e3MB", "0GiB", "0.1B"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"size|less than a byte"):
        parse_bytes(text)


def test_guided_channels() -> None:
    assert (parse_guided_channels("3"), parse_guided_channels("all")) == (3, 0)
    for text in ("0", "-1", "most", "1.5"):
        with pytest.raises(click.BadParameter):
            parse_guided_channels(text)


def test_the_progress_line_ends_blank(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine("export")
    for done in range(1, 4):
        line(done, 3)
    line.close()
    err = capsys.readouterr().err
    assert "\rexport: 3/3 (100 %)" in err
    assert err.endswith("\r") and not err.rpartition("\r")[0].rpartition("\r")[2].strip()
    assert "\n" not in err


def test_the_progress_line_starts_anew_with_the_next_run(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 10.0, 11.0])
    monkeypatch.setattr("dydit.commands.progress.time.monotonic", lambda: next(clock))
    line = ProgressLine("train")
    for done, total in ((1, 5), (3, 5), (1, 3), (2, 3)):
        line(done, total)
    shown = capsys.readouterr().err.split("\r")[1:]
    assert [text.rstrip() for text in shown] == [
        "train: 1/5 (20 %)",
        "train: 3/5 (60 %), 1 s left",
        "train: 1/3 (33 %)",
        "train: 2/3 (66 %), 1 s left",
    ]


def logged(
    monkeypatch, capsys: pytest.CaptureFixture[str], times: list[float], calls: list[tuple[int, int]]
) -> list[str]:
    """What a log has of progress that is called at these times; the first is that of its creation."""
    clock = iter(times)
    monkeypatch.setattr("dydit.commands.progress.time.monotonic", lambda: next(clock))
    log = ProgressLog("train")
    for done, total in calls:
        log(done, total)
    log.close()
    err = capsys.readouterr().err
    assert "\r" not in err and (not err or err.endswith("\n"))
    return err.splitlines()


def test_a_log_has_a_line_at_the_start_and_at_every_tenth_of_the_work(monkeypatch, capsys) -> None:
    lines = logged(monkeypatch, capsys, [0.0, *(3.0 * n for n in range(1, 101))], [(n, 100) for n in range(1, 101)])
    assert lines[:3] == [
        "train: 1/100 (1 %)",
        "train: 10/100 (10 %), 4:30 min left",
        "train: 20/100 (20 %), 4:00 min left",
    ]
    assert lines[-1] == "train: 100/100 (100 %)" and len(lines) == 11


def test_a_log_has_a_line_every_half_minute_where_a_tenth_takes_long(monkeypatch, capsys) -> None:
    lines = logged(monkeypatch, capsys, [0.0, *(10.0 * n for n in range(1, 11))], [(n, 10**6) for n in range(1, 11)])
    assert [line.split()[1] for line in lines] == ["1/1000000", "4/1000000", "7/1000000", "10/1000000"]


def test_a_log_of_little_work_has_one_line(monkeypatch, capsys) -> None:
    assert logged(monkeypatch, capsys, [0.01 * n for n in range(7)], [(n, 6) for n in range(1, 7)]) == [
        "train: 1/6 (16 %)"
    ]


def test_each_stage_has_a_line_of_its_own_in_a_log(capsys) -> None:
    log = ProgressLog("quickstart")
    for title in ("export", "sample"):
        for done in range(4):
            log.stage(title, done, 3)
    assert capsys.readouterr().err == "export: 0/3 (0 %)\nsample: 0/3 (0 %)\n"


def test_recipe_settings_name_every_setting() -> None:
    from dydit.training.recipe import Recipe

    text = recipe_settings()
    assert all(f"  {name} " in text for name in Recipe.model_fields)
    assert "lambda_target 0.5: share of the blocks' multiply-adds to keep" in text
