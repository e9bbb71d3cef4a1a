"""The accepted versions, and that pyproject.toml says the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutemoe.commands.matrix import FAIL, MATRIX, OK, WARN, Requirement, release

BY_NAME = {r.name: r for r in MATRIX}
ANY = Requirement("x", "2.10", "4", tested=("2.11.0", "3.1.2"), forbidden=(("3.0.1", "broken"),))


@pytest.mark.parametrize(
    ("version", "level"),
    [
        ("2.9.1", FAIL),
        ("2.10", OK),
        ("2.11.0+cu130", OK),
        ("2.12.1", OK),
        ("3.0.0", OK),
        ("3.0.1", FAIL),
        ("3.1.2.post1", OK),
        ("3.2", WARN),
        ("4.0.0", FAIL),
    ],
)
def test_levels(version: str, level: str) -> None:
    found, text = ANY.judge(version)
    assert found == level and version in text


@pytest.mark.parametrize("version", ["4.6.0", "4.6.1"])
def test_the_two_deadlocking_dsl_versions_are_refused_with_the_reason(version: str) -> None:
    level, text = BY_NAME["nvidia-cutlass-dsl"].judge(version)
    assert level == FAIL and "deadlock" in text


@pytest.mark.parametrize("requirement", MATRIX, ids=lambda r: r.name)
def test_every_tested_version_is_accepted(requirement: Requirement) -> None:
    assert requirement.tested
    assert all(requirement.judge(version)[0] == OK for version in requirement.tested)


def test_pyproject_asks_for_the_same_ranges() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    block = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    asked = dict(re.findall(r'"([\w-]+)(?:\[\w+\])?([^"]*)"', block))
    assert asked == {r.name: r.range for r in MATRIX if r.name != "python"}
    assert f'requires-python = "{BY_NAME["python"].range}"' in text


numbers = st.lists(st.integers(0, 99), min_size=1, max_size=4)


@given(numbers, st.sampled_from(["", "+cpu", ".post2", "rc1", ".dev3", "a0"]))
def test_release_reads_the_leading_numbers(parts: list[int], tail: str) -> None:
    assert release(".".join(map(str, parts)) + tail) == tuple(parts)


@given(numbers, numbers)
def test_order_is_that_of_packaging(a: list[int], b: list[int]) -> None:
    version = pytest.importorskip("packaging.version").Version
    a, b = (a + [0] * 4)[:4], (b + [0] * 4)[:4]
    left, right = (".".join(map(str, part)) for part in (a, b))
    assert (release(left) < release(right)) == (version(left) < version(right))
