"""Instruction sets are read from what Linux says of the CPU."""

from __future__ import annotations

import pytest

from dydit.reports.results import Machine
from dydit.runtime.backends.instruction_sets import KNOWN, instruction_sets, multiplies

X86 = (
    "processor\t: 0\nmodel name\t: X\nflags\t\t: fpu sse avx2 avx512f {} avx512_vnni\n\nprocessor\t: 1\nflags : none\n"
)


@pytest.mark.parametrize(
    ("text", "names", "bf16"),
    [
        (X86.format("amx_bf16 avx512_bf16"), ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16"), True),
        (X86.format("avx512_bf160"), ("avx2", "avx512f", "avx512_vnni"), False),
        ("processor : 0\nFeatures : fp asimd i8mm bf16\n", ("asimd", "i8mm", "bf16"), True),
        ("nothing\n", (), False),
    ],
)
def test_they_are_those_of_the_first_processor(text, names, bf16, tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert instruction_sets(file) == names
    assert multiplies("bfloat16", names) is bf16 and not multiplies("float16", names)


def test_a_system_that_does_not_list_them_has_none(tmp_path):
    assert instruction_sets(tmp_path / "cpuinfo") == ()


def test_they_stand_in_reports():
    here = Machine.here().instruction_sets
    assert set(here) <= set(KNOWN) and here == instruction_sets()
