"""How many mutants the fuzzers make: `python -m pytest tests/fuzz --mutants 1000 --fuzz-seed 7`.

The suite makes a small share of them, which takes seconds. A mutant is told by its number and the seed alone.
"""

from __future__ import annotations

import random

import pytest

QUICK = 150


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz")
    group.addoption("--mutants", type=int, default=None, metavar="N", help=f"mutants of each fuzzer (default: {QUICK})")
    group.addoption("--fuzz-seed", type=int, default=None, metavar="N", help="seed of the mutants (default: 0)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `mutant` is run once for each number."""
    if "mutant" in metafunc.fixturenames:
        metafunc.parametrize("mutant", range(metafunc.config.getoption("--mutants", None) or QUICK))


@pytest.fixture
def rng(request: pytest.FixtureRequest, mutant: int) -> random.Random:
    """The random numbers of one mutant, apart from those of the other fuzzers."""
    seed = request.config.getoption("--fuzz-seed", None) or 0
    return random.Random(f"{seed} {request.path.name} {mutant}")
