"""Numbers with their nouns and units."""

from __future__ import annotations

from dydit.words import counted, duration


def test_a_number_decides_between_singular_and_plural() -> None:
    assert counted(1, "image") == "1 image"
    assert [counted(count, "image") for count in (0, 2)] == ["0 images", "2 images"]
    assert counted(1_000, "step") == "1,000 steps"
    assert [counted(count, "class", "classes") for count in (1, 10)] == ["1 class", "10 classes"]


def test_durations() -> None:
    wanted = {0.4: "0 s", 59: "59 s", 59.4: "59 s", 59.6: "1:00 min", 187: "3:07 min", 7500: "2:05 h"}
    assert {seconds: duration(seconds) for seconds in wanted} == wanted
