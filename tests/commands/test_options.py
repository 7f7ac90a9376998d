"""How labels, sizes and channels are written, old names of options, and the settings of a recipe."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.commands.export import parse_guided_channels
from dydit.commands.label_options import parse_labels, parse_named_labels
from dydit.commands.options import BYTE_UNITS, parse_bytes
from dydit.commands.train import recipe_settings


@pytest.mark.parametrize(
    ("text", "labels"),
    [("207", (207,)), ("207,360", (207, 360)), ("0-3", (0, 1, 2, 3)), ("5-5", (5,)), ("3, 1-2 ,3", (3, 1, 2, 3))],
)
def test_labels(text: str, labels: tuple[int, ...]) -> None:
    assert parse_labels(text) == labels


@pytest.mark.parametrize("text", ["", ",", "1,", "a", "-1", "1-", "1--2", "3-1", "1.5", "0x1", "\u0661", "0-99999999"])
def test_labels_that_are_none(text: str) -> None:
    with pytest.raises(click.BadParameter):
        parse_labels(text)


@pytest.mark.parametrize("text", ["", ",", "cat,", "-1", "cat,3-1", "1.5", "cat,0-1000000", "0,0-999999"])
def test_named_labels_that_are_none(text: str) -> None:
    with pytest.raises(click.BadParameter):
        parse_named_labels(text)


def test_named_labels() -> None:
    assert parse_named_labels("cat, 3,0-1 ,tabby cat,a-b,7up") == ("cat", 3, 0, 1, "tabby cat", "a-b", "7up")
    assert parse_named_labels("0-999999") == tuple(range(1_000_000))


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
    with pytest.raises(click.BadParameter, match=r"size|less than one byte"):
        parse_bytes(text)


def test_guided_channels() -> None:
    assert (parse_guided_channels("3"), parse_guided_channels("all")) == (3, 0)
    for text in ("0", "-1", "most", "1.5"):
        with pytest.raises(click.BadParameter):
            parse_guided_channels(text)


def test_recipe_settings_name_every_setting() -> None:
    from dydit.training.recipe import Recipe

    text = recipe_settings()
    assert all(f"  {name} " in text for name in Recipe.model_fields)
    assert "lambda_target 0.5: share of the blocks' multiply-adds to keep" in text


def test_an_old_name_of_an_option_does_the_same_with_a_warning(run, make_checkpoint, tmp_path: Path) -> None:
    call = ["export", make_checkpoint().path, "--steps", 2, "--out"]
    done = run(*call, tmp_path / "new", "--dynamic-width")
    old = run(*call, tmp_path / "old", "--sliding")
    assert (done.code, done.err, old.code) == (0, "", 0)
    assert old.err == (
        "Warning: --sliding is now called --dynamic-width; the old name will be removed in the next release\n"
    )
    assert old.out.replace("/old", "/new") == done.out
    for file in (tmp_path / "new").iterdir():
        assert file.read_bytes() == (tmp_path / "old" / file.name).read_bytes()


@pytest.mark.parametrize(("old", "new"), [("--sliding", "--dynamic-width"), ("--migrate", "--smooth")])
def test_old_and_new_names_of_calibrate_are_judged_alike(run, tmp_path: Path, old: str, new: str) -> None:
    extra = ["--per-step"] if old == "--sliding" else []
    for option in (old, new):
        done = run("calibrate", "x", "--out", tmp_path / "c.json", *extra, option)
        *warnings, error = done.err.splitlines()
        assert done.code == 2 and len(warnings) == (option == old)
        assert "give only one of" in error if extra else "--smooth needs activation ranges" in error


def test_old_names_are_not_in_the_help(run) -> None:
    for name in ("export", "calibrate"):
        text = run(name, "--help").out
        assert "--dynamic-width" in text and "--sliding" not in text and "--migrate" not in text
