"""What commands show of their progress: a bar on a terminal, a few lines elsewhere."""

from __future__ import annotations

import pytest

from dydit.commands.progress import Progress, ProgressBar, ProgressLines


def bars(text: str) -> list[str]:
    """The counts that a bar showed, one after another, without what erased them."""
    return [part.split("|")[2].split()[0] for part in text.split("\r") if "|" in part]


def test_a_bar_is_removed_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressBar("export")
    for done in range(1, 4):
        progress(done, 3)
    progress.close()
    err = capsys.readouterr().err
    assert "\rexport: 100 %|" in err and bars(err)[-1] == "3/3"
    assert err.endswith("\r") and not err.rpartition("\r")[0].rpartition("\r")[2].strip()
    assert "\n" not in err


def test_a_bar_starts_again_where_fewer_are_done(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressBar("train")
    for done, total in ((5, 5), (1, 3), (3, 3)):
        progress(done, total)
    assert list(dict.fromkeys(bars(capsys.readouterr().err))) == ["5/5", "1/3", "3/3"]


def test_a_bar_takes_a_new_total(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressBar("calibrate")
    for done, total in ((1, 50), (2, 4), (4, 4)):
        progress(done, total)
    assert bars(capsys.readouterr().err)[-1] == "4/4"


def test_a_note_stands_on_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressBar("calibrate")
    progress(1, 4)
    progress.note("about 3 min")
    progress(2, 4)
    progress.close()
    before, _, after = capsys.readouterr().err.partition("about 3 min\n")
    assert before.endswith("\r") and bars(after) == ["2/4"]


def lines(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seconds: list[float],
    calls: list[tuple[int, int]],
) -> list[str]:
    """What a log has of progress that is called at these times."""
    clock = iter(seconds)
    monkeypatch.setattr("dydit.commands.progress.time.monotonic", lambda: next(clock))
    progress = ProgressLines("train")
    for done, total in calls:
        progress(done, total)
    progress.complete()
    progress.close()
    err = capsys.readouterr().err
    assert "\r" not in err and err.endswith("\n")
    return err.splitlines()


def test_a_log_has_a_line_every_half_minute(monkeypatch, capsys) -> None:
    calls = [(n, 100) for n in range(1, 101)]
    assert lines(monkeypatch, capsys, [3.0 * n for n in range(1, 101)], calls)[:3] == [
        "train: 1/100 (1 %)",
        "train: 11/100 (11 %), 4:27 min left",
        "train: 21/100 (21 %), 3:57 min left",
    ]


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([(n, 6) for n in range(1, 7)], ["1/6 (16 %)", "6/6 (100 %)"]),
        ([(1, 6), (2, 6)], ["1/6 (16 %)", "6/6 (100 %)"]),  # fewer than were expected
        ([(1, 1), (1, 1)], ["1/1 (100 %)"]),
        ([(0, 1)], ["0/1 (0 %)", "1/1 (100 %)"]),
        ([(1, 9), (2, 4), (4, 4)], ["1/9 (11 %)", "4/4 (100 %)"]),  # a new estimate
        ([(1, 2), (2, 2), (1, 3), (3, 3)], ["1/2 (50 %)", "2/2 (100 %)", "1/3 (33 %)", "3/3 (100 %)"]),  # two runs
        ([(3, 3), (3, 5), (5, 5)], ["3/3 (100 %)", "3/5 (60 %)", "5/5 (100 %)"]),
    ],
)
def test_the_last_line_of_a_stage_says_100_percent(monkeypatch, capsys, calls, expected) -> None:
    times = [0.01 * n for n in range(len(calls))]
    assert lines(monkeypatch, capsys, times, calls) == [f"train: {text}" for text in expected]


def test_each_stage_has_its_lines_in_a_log(capsys) -> None:
    progress = ProgressLines("quickstart")
    for title in ("export", "sample"):
        for done in range(4):
            progress.stage(title, done, 3)
    progress.complete()
    expected = [f"{title}: {count}" for title in ("export", "sample") for count in ("0/3 (0 %)", "3/3 (100 %)")]
    assert capsys.readouterr().err.splitlines() == expected


def test_stages_that_take_turns_are_complete_once(capsys) -> None:
    """As a long sampling run, which makes images now and then."""
    progress = ProgressLines("sample")
    for title, done, total in (
        ("sample", 1, 4),
        ("sample", 2, 4),
        ("images", 1, 2),
        ("sample", 4, 4),
        ("images", 2, 2),
    ):
        progress.stage(title, done, total)
    progress.complete()
    expected = ["sample: 1/4 (25 %)", "images: 1/2 (50 %)", "sample: 4/4 (100 %)", "images: 2/2 (100 %)"]
    assert capsys.readouterr().err.splitlines() == expected


def test_what_fails_does_not_say_100_percent(capsys) -> None:
    progress = ProgressLines("export")
    progress(1, 3)
    progress.close()
    assert capsys.readouterr().err == "export: 1/3 (33 %)\n"


def test_progress_that_is_not_shown_prints_nothing(capsys) -> None:
    progress = Progress()
    progress(1, 2)
    progress.stage("sample", 1, 1)
    progress.note("a line")
    progress.close()
    assert capsys.readouterr() == ("", "")
