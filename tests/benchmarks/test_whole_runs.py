"""Whole runs of pipelines in turns: every contender is called as often, and compared with the first."""

from __future__ import annotations

import json

import pytest

from dydit.bundle.manifest import PlanKind


@pytest.fixture
def script(load_script):
    return load_script("whole_runs")


def test_bundles_take_turns(script, make_bundle, make_checkpoint, small_config, tmp_path, capsys):
    static = make_bundle(make_checkpoint(small_config.without_routers()))
    dynamic = make_bundle(plan=PlanKind.PER_STEP)
    out = tmp_path / "whole_runs.json"
    words = [str(static.path), str(dynamic.path), "--repeats", "2", "--images", "2", "--json", str(out)]
    assert script.main(words) == 0
    report = json.loads(out.read_text())
    calls = report["calls"]
    assert list(calls) == [static.path.name, dynamic.path.name]
    for each in calls.values():
        assert len(each["seconds"]) == 2 and min(each["seconds"]) > 0 and each["peak_bytes"] > 1e6
        assert each["first_seconds"] > 0
    assert list(report["faster_than_first"]) == [dynamic.path.name]
    assert dynamic.path.name in capsys.readouterr().out


def test_ratios_are_those_within_rounds(script):
    found = {
        "static": {"first_seconds": 4.0, "seconds": [2.0, 4.0, 3.0]},
        "dynamic": {"first_seconds": 5.0, "seconds": [1.0, 1.0, 3.0]},
    }
    ratios = script.compared(found)
    assert ratios == {"dynamic": {"first": 0.8, "median": 2.0, "min": 1.0, "max": 4.0}}


def test_what_cannot_be_compared_is_refused(script, make_bundle, tmp_path, capsys):
    for bundles in ([str(make_bundle().path)], [str(make_bundle().path)] * 2):
        with pytest.raises(SystemExit):
            script.main(bundles)
    assert script.main([str(make_bundle().path), str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
