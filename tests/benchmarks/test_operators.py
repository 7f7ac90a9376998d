"""Where the time of a step goes: every operator has a group, and the groups and the rest add up to a step."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from dydit.bundle.manifest import PlanKind


@pytest.fixture
def script(load_script):
    return load_script("operators")


def test_the_groups_add_up_to_a_step(script, make_bundle, make_checkpoint, small_config, tmp_path, capsys):
    static = make_bundle(make_checkpoint(small_config.without_routers()))
    dynamic = make_bundle(plan=PlanKind.PER_STEP)
    out, picture = tmp_path / "operators.json", tmp_path / "operators.png"
    words = ["--static", str(static.path), "--dynamic", str(dynamic.path), "--steps", "2", "--repeats", "2"]
    assert script.main([*words, "--json", str(out), "--plot", str(picture)]) == 0
    report = json.loads(out.read_text())
    sides = report["sides"]
    for side in sides.values():
        groups = side["groups"]
        assert sum(groups.values()) >= side["step_ms"] * 0.99 and min(groups.values()) >= 0
        operators = sum(side["operators"].values())
        assert operators == pytest.approx(sum(groups.values()) - groups[script.BETWEEN])
        assert script.OTHERS not in groups, [
            name for name in side["operators"] if script.group_of(name) == script.OTHERS
        ]
        assert {"products of layers", "products of attention", "softmax"} <= set(groups)
    assert "gathers and scatters" in sides["dynamic"]["groups"]
    assert sides["static"]["groups"].get("gathers and scatters", 0) == 0
    assert sides["dynamic"]["macs"] < sides["static"]["macs"] and sides["static"]["rows"] == 2
    printed = capsys.readouterr().out
    assert "products of layers" in printed and "Multiply-adds allow" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_rounds_are_medians_without_the_first(script):
    runs = [Counter({("Add", "a"): us, ("Mul", "m"): 1}) for us in (900, 900, 10, 20, 30, 22, 10, 24)]
    assert script.of_rounds(runs, 4) == {"Add": 10 + 22, "Mul": 2}


def test_one_bundle_alone_is_refused(script, make_bundle, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--static", str(make_bundle().path)])
    assert stop.value.code == 2 and "give both --static and --dynamic" in capsys.readouterr().err
