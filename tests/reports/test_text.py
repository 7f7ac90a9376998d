"""Numbers and tables as people read them."""

from __future__ import annotations

import pytest

from dydit.reports.text import aligned, bytes_text, count_text, exponent


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1.00 KiB"),
        (3.8 * 2**20, "3.80 MiB"),
        (30 * 2**10, "30.0 KiB"),
        (128 * 2**20, "128 MiB"),
        (1.5 * 2**30, "1.50 GiB"),
        (5000 * 2**40, "5.00e+03 TiB"),
    ],
)
def test_bytes(size, text):
    assert bytes_text(size) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12, "12"), (999, "999"), (1000, "1 k"), (33_120_740, "33.1 M"), (6.07e9, "6.07 G"), (1.2e13, "12 T")],
)
def test_counts(value, text):
    assert count_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1e-5, "1e-5"), (3.14e-7, "3.1e-7"), (2.0, "2e0"), (1e-12, "1e-12")]
)
def test_exponents(value, text):
    assert exponent(value) == text


def test_columns_line_up_and_nothing_trails():
    text = aligned([["a", "1", "x"], ["bbb", "22"], ["c", "333", "yy"]], right=(1,), indent=" ")
    assert text == " a      1  x\n bbb   22\n c    333  yy"
    assert aligned([]) == ""
