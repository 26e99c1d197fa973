"""schema.parse: every problem at once, each with its full path, value and remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.schema import PositiveFloat, PositiveInt, parse


@dataclass(frozen=True)
class Inner:
    rate: PositiveFloat
    names: tuple[str, ...]


@dataclass(frozen=True)
class Outer:
    count: PositiveInt
    mode: Literal["fast", "slow"]
    inner: Inner
    limit: PositiveInt | None
    size: PositiveInt | Literal["auto"]
    extra: dict[str, float]
    note: str = "none"


GOOD = {
    "count": 3,
    "mode": "fast",
    "inner": {"rate": 1, "names": ["a"]},
    "limit": None,
    "size": "auto",
    "extra": {"x": 1},
}


def test_good_values_become_the_typed_object() -> None:
    made, problems = parse(Outer, GOOD)
    assert problems == []
    assert made == Outer(3, "fast", Inner(1.0, ("a",)), None, "auto", {"x": 1.0})
    assert isinstance(made.inner.rate, float)


def test_all_problems_are_found_at_once() -> None:
    bad = {**GOOD, "count": 0, "mode": "fas", "inner": {"rat": 1, "names": "a"}, "limit": True, "size": "big"}
    made, problems = parse(Outer, bad)
    assert made is None
    assert problems == [
        "count: got 0; expected a whole number ≥ 1",
        "mode: got 'fas'; expected one of its values; did you mean 'fast'?",
        "inner.rat: unknown setting; did you mean 'rate'?",
        "inner.rate: missing",
        "inner.names: got 'a'; expected a list. Fix: inner.names=[a]",
        "limit: got True; expected a whole number ≥ 1",
        "size: got 'big'; expected a whole number ≥ 1, or auto",
    ]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("fast", "expected a number > 0"),
        (-1.0, "expected a number > 0"),
        (None, "got null; expected a number > 0"),
        (True, "True"),
    ],
)
def test_a_wrong_value_is_shown_with_what_is_right(value: object, told: str) -> None:
    _, problems = parse(Inner, {"rate": value, "names": []}, "sft")
    assert len(problems) == 1
    assert problems[0].startswith("sft.rate: ")
    assert told in problems[0]


@given(st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.integers())))
def test_whatever_the_input_problems_are_told_and_nothing_is_raised(values: dict[str, object]) -> None:
    made, problems = parse(Outer, values)
    assert (made is None) == bool(problems)
