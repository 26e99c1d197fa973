"""fingerprint: one written form for equal values, an error for anything without one, drift told field by field."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.hashing import canonical_json, describe_drift, file_identity, fingerprint, plain
from pipeline.core.schema import added, parse

leaves = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@given(values)
def test_equal_values_have_equal_text_whatever_the_order_of_keys(value: Any) -> None:
    def turned(v: Any) -> Any:
        if isinstance(v, dict):
            return {key: turned(v[key]) for key in reversed(list(v))}
        return [turned(item) for item in v] if isinstance(v, list) else v

    assert canonical_json(value) == canonical_json(turned(value))
    assert fingerprint(value) == fingerprint(turned(value))
    assert len(fingerprint(value)) == 10


@pytest.mark.parametrize("value", [math.nan, math.inf, {1, 2}, object(), {1: 2}, Path("x")])
def test_what_has_no_single_written_form_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"a\.b"):
        plain({"b": value}, "a")


@dataclass(frozen=True)
class Before:
    rate: float


@dataclass(frozen=True)
class After:
    rate: float
    limit: int | None = added(None)
    words: dict[str, int] = added({})


def test_a_field_added_later_changes_no_finished_step_and_old_records_are_read() -> None:
    assert plain(After(0.5)) == plain(Before(0.5))
    assert fingerprint(After(0.5)) == fingerprint(Before(0.5))
    assert parse(After, plain(Before(0.5))) == (After(0.5), [])


@pytest.mark.parametrize("changed", [After(0.5, limit=3), After(0.5, words={"a": 1})])
def test_a_field_added_later_counts_where_it_is_set(changed: After) -> None:
    assert fingerprint(changed) != fingerprint(Before(0.5))
    assert parse(After, plain(changed)) == (changed, [])


def test_a_known_fingerprint_stays() -> None:
    """A changed encoder would make every finished step run again: change it on purpose only."""
    assert fingerprint({"stage": "sft", "lr": 2e-5, "list": [1, 2.0, None, True]}) == "d987e310ad"


def test_drift_names_each_field() -> None:
    old = {"sft": {"learning_rate": 2e-5, "epochs": 1, "gone": 3}, "seed": 0}
    new = {"sft": {"learning_rate": 1e-5, "epochs": 1, "fresh": [1]}, "seed": 0}
    assert describe_drift(old, new) == [
        "sft.learning_rate: 2e-05 -> 1e-05",
        "sft.fresh: (new) -> [1]",
        "sft.gone: 3 -> (gone)",
    ]
    assert describe_drift(old, old) == []


@given(values, values)
def test_drift_is_empty_exactly_for_equal_values(one: Any, other: Any) -> None:
    old, new = plain({"v": one}), plain({"v": other})
    assert (describe_drift(old, new) == []) == (old == new)


def test_a_large_file_is_known_by_its_size_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.core.hashing.FULL_HASH_LIMIT", 10)
    monkeypatch.setattr("pipeline.core.hashing.EDGE_BYTES", 4)
    file = tmp_path / "weights"
    seen = set()
    for content in (b"0123456789abcdef", b"X123456789abcdef", b"0123456789abcdeX", b"0123456789abcdef0"):
        file.write_bytes(content)
        seen.add(file_identity(file))
    assert len(seen) == 4
