"""Arguments from Python: every type of integer that people have, and nothing that only looks like one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest

from dydit.errors import ConfigError
from dydit.runtime import arguments
from dydit.runtime.arguments import real_number, whole_number, whole_numbers

torch = pytest.importorskip("torch", reason="its integers are among those that are taken")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (20, [20]),
        (np.int32(20), [20]),
        (np.array(20), [20]),
        (torch.tensor(20), [20]),
        ([2, np.uint8(0)], [2, 0]),
        ((2, torch.tensor(0)), [2, 0]),
        (range(3), [0, 1, 2]),
        (np.array([2, 0], np.uint16), [2, 0]),
        (torch.tensor([2, 0], dtype=torch.int32), [2, 0]),
        ((n for n in (1, 2)), [1, 2]),
        ([], []),
    ],
)
def test_integers_of_every_kind(given, wanted):
    made = whole_numbers(given, "class label", 0, 999)
    assert made == wanted and all(type(each) is int for each in made)


@pytest.mark.parametrize(
    "given",
    [
        *("20", b"20", "", ["20"], ["cat"], {1: 2}, {1, 2}, True, np.True_, [True], torch.tensor(True), 1.0, [1.0]),
        *(np.array([1.0]), torch.tensor([1.0]), [[1, 2]], np.array([[1]]), None, [None], float("nan"), object()),
        *(np.array([True]), np.array(["20"]), complex(1)),
    ],
)
def test_what_only_looks_like_an_integer_is_refused_in_one_line(given):
    with pytest.raises(ConfigError, match=r"^class label must be an integer") as caught:
        whole_numbers(given, "class label", 0, 999)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 160


@pytest.mark.parametrize("given", [-1, 1000, [0, -1], np.array([1000]), 1 << 80])
def test_numbers_out_of_range(given):
    with pytest.raises(ConfigError, match=re.escape("outside 0..999")):
        whole_numbers(given, "class label", 0, 999)


def test_numbers():
    assert [real_number(each, "scale", 0) for each in (4, 1.5, np.float32(2), torch.tensor(3.0), np.int8(4))] == [
        *(4.0, 1.5, 2.0, 3.0, 4.0)
    ]
    for wrong in ("4", True, None, [4.0], np.array([4.0]), float("nan"), float("inf"), -1, complex(1)):
        with pytest.raises(ConfigError, match=r"^scale must be a (finite )?number") as caught:
            real_number(wrong, "scale", 0)
        assert "\n" not in str(caught.value)
    assert whole_number(np.int64(7), "seed", 0, 9) == 7


def test_errors_that_python_reaches_speak_python_first():
    """An option of the command stands in brackets behind what is given from Python, or in a command that is quoted."""
    package, wrong = Path(arguments.__file__).parent, []
    # The folder of a run is the command's own; Python's callers have `DyDiTPipeline`.
    for file in set(package.rglob("*.py")) - {
        package / "bulk" / f"{name}.py" for name in ("run", "run_folder", "workers")
    }:
        tree = ast.parse(file.read_text())
        for node in (each for each in ast.walk(tree) if isinstance(each, ast.Raise)):
            text = "".join(
                each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)
            )
            bare = re.sub(r"`dydit [^`]*`|\(--[^)]*\)", "", text)
            wrong += [f"{file.name}: {text}"] * ("--" in bare)
    assert not wrong
