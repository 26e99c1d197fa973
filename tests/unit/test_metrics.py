"""metrics: figures against their definitions, intervals by whole groups, differences that are paired."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.scoring.metrics import (
    MAIN_METRICS,
    Outcome,
    baseline_metrics,
    compare,
    compute_metrics,
    count_groups,
    outcome_of,
    resample_groups,
    summarize,
)
from pipeline.scoring.predictions import Prediction
from pipeline.scoring.results import Figure, Metrics, SplitMetrics, to_json


def outcomes(rows: list[tuple[bool, bool, bool]], groups: int = 5) -> list[Outcome]:
    return [Outcome(str(k), f"g{k % groups}", p, c and a, a, 10 + k) for k, (p, c, a) in enumerate(rows)]


rows = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=60)


@given(rows)
def test_figures_are_their_definitions(cells: list[tuple[bool, bool, bool]]) -> None:
    data = outcomes(cells)
    found = {
        k: float(v) for k, v in compute_metrics(count_groups(data, sorted({o.group for o in data})).total()).items()
    }
    n = len(data)
    tp = sum(o.positive is True and o.correct is True for o in data)
    fp = sum(o.positive is not True and o.answered and not o.correct for o in data)
    positives = sum(o.positive is True for o in data)
    tn = sum(o.positive is not True and o.correct is True for o in data)
    assert found["accuracy"] == pytest.approx(sum(o.correct is True for o in data) / n)
    assert found["unanswered"] == pytest.approx(sum(not o.answered for o in data) / n)
    assert found["tokens"] == pytest.approx(sum(o.tokens for o in data) / n)
    if tp:
        precision, recall = tp / (tp + fp), tp / positives
        assert found["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    else:
        assert found["f1"] == 0
    if 0 < positives < n:
        assert found["balanced_accuracy"] == pytest.approx((tp / positives + tn / (n - positives)) / 2)
    assert -1 <= found["mcc"] <= 1


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_mcc_is_the_correlation_where_all_is_answered(cells: list[tuple[bool, bool]]) -> None:
    data = outcomes([(p, c, True) for p, c in cells])
    gold = np.array([o.positive for o in data], dtype=float)
    said = np.array([o.positive == o.correct for o in data], dtype=float)
    found = float(compute_metrics(count_groups(data, sorted({o.group for o in data})).total())["mcc"])
    if gold.std() and said.std():
        assert found == pytest.approx(float(np.corrcoef(gold, said)[0, 1]))
    else:
        assert found == 0


def test_unanswered_is_never_correct() -> None:
    prediction = Prediction(split="test", id="1", group="g", gold="Yes", correct=True, answered=False, tokens=3)
    assert not outcome_of(prediction, "Yes").correct


def test_the_baselines_know_nothing() -> None:
    data = outcomes([(k % 2 == 0, True, True) for k in range(100)])
    found = baseline_metrics(data)
    assert found["always No"]["f1"] == 0
    assert found["always No"]["accuracy"] == 0.5
    assert found["always Yes"]["f1"] == pytest.approx(2 / 3)
    assert {found[name]["balanced_accuracy"] for name in found} == {0.5}
    assert {found[name]["mcc"] for name in found} == {0.0}


def test_intervals_widen_when_rows_of_a_group_agree() -> None:
    """200 rows in 10 groups that are right or wrong together tell as much as 10 rows."""
    clustered = [Outcome(str(k), f"g{k % 10}", True, k % 10 < 5, True, 1) for k in range(200)]
    independent = [Outcome(str(k), str(k), True, k % 10 < 5, True, 1) for k in range(200)]
    wide = summarize(clustered, 2000, 0.95, 0)["accuracy"]
    narrow = summarize(independent, 2000, 0.95, 0)["accuracy"]
    assert wide.value == narrow.value == 0.5
    expected = 1.96 * math.sqrt(0.25 / 10)
    assert (wide.high - wide.low) / 2 == pytest.approx(expected, rel=0.15)
    assert (narrow.high - narrow.low) / 2 == pytest.approx(expected / math.sqrt(20), rel=0.2)


def test_a_paired_difference_is_tighter_than_two_intervals_suggest() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(400) < 0.6
    better = base | (rng.random(400) < 0.1)
    before, after = (
        [Outcome(str(k), f"g{k % 40}", k % 2 == 0, bool(right), True, 1) for k, right in enumerate(rights)]
        for rights in (base, better)
    )
    found = compare(before, after, 2000, 0.95, 0)["accuracy"]
    assert found.value == pytest.approx(better.mean() - base.mean())
    assert found.low > 0
    overlap = summarize(before, 2000, 0.95, 0)["accuracy"].high - summarize(after, 2000, 0.95, 0)["accuracy"].low
    assert overlap > 0  # apart, the two intervals overlap


def test_models_that_were_asked_different_rows_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="same rows"):
        compare(outcomes([(True, True, True)] * 3), outcomes([(True, True, True)] * 4), 10, 0.95, 0)


@given(rows, st.integers(0, 5))
def test_the_same_seed_gives_the_same_intervals_that_hold_the_value_of_equal_models(
    cells: list[tuple[bool, bool, bool]], seed: int
) -> None:
    data = outcomes(cells)
    assert summarize(data, 50, 0.9, seed) == summarize(data, 50, 0.9, seed)
    same = compare(data, data, 50, 0.9, seed)
    assert list(same) == [name for name in MAIN_METRICS if name not in ("valid_proofs", "proxy", "preference")]
    for name in same:
        assert same[name] == Figure(0.0, 0.0, 0.0)


def test_every_bootstrap_sample_has_as_many_groups() -> None:
    drawn = resample_groups(7, 100, 1)
    assert drawn.shape == (100, 7)
    assert set(drawn.sum(axis=1)) == {7.0}


def test_no_rows_are_no_figures() -> None:
    assert summarize([], 10, 0.95, 0) == Metrics(rows=0, verified=0, groups=0, figures={})


def test_an_exact_program_stands_beside_the_baselines() -> None:
    data = [Outcome("1", "g", True, False, True, 9), Outcome("2", "g", False, True, True, 9)]
    right = [Outcome("1", "g", True, True, True, 0), Outcome("2", "g", False, True, True, 0)]
    assert "exact solver" not in baseline_metrics(data)
    assert baseline_metrics(data, right)["exact solver"]["f1"] == 1
    assert baseline_metrics(data, data)["exact solver"]["accuracy"] == 0.5


def test_a_task_without_a_positive_class_has_accuracy_and_no_f1() -> None:
    data = [Outcome(str(k), str(k), None, k < 6, k < 8, 10) for k in range(10)]
    found = summarize(data, 200, 0.95, 0)
    assert found["accuracy"].value == 0.6
    assert found["accuracy"].low < 0.6 < found["accuracy"].high
    assert found["unanswered"].value == 0.2
    assert not {"f1", "balanced_accuracy", "mcc", "precision", "recall", "proxy"} & set(found.figures)
    assert baseline_metrics(data) == {}
    assert set(compare(data, data, 50, 0.95, 0)) == {"accuracy", "unanswered", "tokens"}


def test_what_cannot_be_verified_has_no_accuracy_and_a_proxy_is_counted_apart() -> None:
    opened = [Outcome(str(k), str(k), None, None, k < 9, 10) for k in range(10)]
    found = summarize(opened, 50, 0.95, 0)
    assert (found.rows, found.verified) == (10, 0)
    assert found["unanswered"].value == 0.1
    assert not {"accuracy", "f1", "proxy"} & set(found.figures)
    short = [Outcome(f"s{k}", str(k), None, None, True, 10, proxy=k < 3) for k in range(4)]
    assert summarize(opened + short, 50, 0.95, 0)["proxy"].value == 0.75  # of the rows that have one
    verified = [Outcome(f"v{k}", str(k), None, k < 1, True, 10) for k in range(4)]
    mixed = summarize(opened + verified, 50, 0.95, 0)
    assert (mixed["accuracy"].value, mixed.verified) == (0.25, 4)  # of the rows that can be verified


def test_a_truncated_answer_matches_no_proxy() -> None:
    cut = Prediction(split="test", id="1", group="g", gold="x", correct=None, proxy=True, answered=False, tokens=3)
    assert outcome_of(cut, None).proxy is False
    assert outcome_of(replace(cut, answered=True), None) == Outcome("1", "g", None, None, True, 3, True)


def test_a_preference_is_counted_of_the_rows_that_have_a_rejected_answer() -> None:
    rows = [Outcome(str(k), str(k), None, None, True, 5, preferred=k < 3 if k < 4 else None) for k in range(6)]
    found = summarize(rows, 50, 0.95, 0)
    assert found["preference"].value == 0.75
    assert found["preference"].low <= 0.75 <= found["preference"].high
    assert "preference" not in summarize([Outcome("1", "g", True, True, True, 5)], 50, 0.95, 0)


def test_valid_proofs_are_a_share_of_the_thoughts_that_were_checked() -> None:
    line = Prediction(split="test", id="1", group="g", gold="Yes", correct=True, answered=True, tokens=3)
    assert [outcome_of(replace(line, proof=proof), "Yes").proved for proof in (None, 0.9, 1.0)] == [None, False, True]
    cut = replace(line, answered=False, proof=1.0)
    assert outcome_of(cut, "Yes").proved is False  # a proof that was cut off may have gone on
    rows = [Outcome(str(k), str(k), True, True, True, 5, proved=k < 1 if k < 4 else None) for k in range(6)]
    assert summarize(rows, 50, 0.95, 0)["valid_proofs"].value == 0.25
    assert "valid_proofs" not in summarize([Outcome("1", "g", True, True, True, 5)], 50, 0.95, 0)


def test_thoughts_are_a_share_of_all_answers() -> None:
    rows = [Outcome(str(k), str(k), True, True, True, 5, thought=k < 1) for k in range(4)]
    assert summarize(rows, 50, 0.95, 0)["thoughts"].value == 0.25


def test_metrics_survive_their_json() -> None:
    data = outcomes([(k % 2 == 0, k % 3 > 0, k < 18) for k in range(20)])
    summary = summarize(data, 20, 0.9, 0)
    split = SplitMetrics(summary, baseline_metrics(data), {"truncated": 2}, {"n": {"3": summary}})
    again = json.loads(json.dumps(to_json(split)))
    assert SplitMetrics.from_json(again, "metrics.test") == split
    assert again["all"]["rows"] == {"value": 20.0}
    assert again["all"]["groups"] == {"value": 5}
    del again["reasons"]  # as an earlier version wrote it
    assert SplitMetrics.from_json(again, "metrics.test") == replace(split, reasons=None)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (None, "metrics.test: got nothing; expected the metrics of a split"),
        ({"all": [1]}, "metrics.test.all: got a list; expected a mapping of figures"),
        ({"all": {"f1": {"low": 0.1}}}, "metrics.test.all.f1: got nothing; expected a number"),
        ({"all": {"f1": {"value": "high"}}}, "metrics.test.all.f1: got a str; expected a number"),
    ],
)
def test_metrics_that_cannot_be_read_name_their_place(record: object, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        SplitMetrics.from_json(record, "metrics.test")
