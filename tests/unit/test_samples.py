"""Several samples of a row: pass@k and majority@k against their definitions, weights, intervals, pairs, records."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipes import recipe_of

from pipeline.config.recipe import Report, read
from pipeline.core.hashing import plain
from pipeline.evaluate import Missing, unanswered_samples
from pipeline.scoring.metrics import (
    Outcome,
    baseline_metrics,
    compare,
    count_groups,
    majority,
    pass_at,
    resample_groups,
    sampled_metrics,
    summarize,
)
from pipeline.scoring.predictions import Prediction, read_predictions
from pipeline.scoring.results import SplitMetrics
from pipeline.tasks.task import task_of
from pipeline.workflow.figures import count


def sample(row: int, number: int, answer: str | None, gold: str = "Yes", group: str | None = None) -> Outcome:
    return Outcome(
        id=f"r{row}",
        group=group or f"g{row % 7}",
        positive=gold == "Yes",
        correct=answer == gold,
        answered=answer is not None,
        tokens=10 + number,
        sample=number,
        answer=answer,
    )


def test_pass_at_k_is_the_share_of_all_choices_that_hold_a_right_one() -> None:
    for samples in range(1, 8):
        for correct in range(samples + 1):
            marks = [True] * correct + [False] * (samples - correct)
            for k in range(1, samples + 1):
                chosen = [any(choice) for choice in combinations(marks, k)]
                assert pass_at(k, samples, correct) == pytest.approx(sum(chosen) / len(chosen), abs=1e-12)


@given(st.integers(1, 64), st.data())
def test_pass_at_k_grows_with_k_and_with_what_is_right(samples: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, samples))
    values = [pass_at(k, samples, correct) for k in range(1, samples + 1)]
    assert values[0] == pytest.approx(correct / samples)
    assert values == sorted(values)
    assert values[-1] == (1.0 if correct else 0.0)
    assert all(0 <= value <= 1 for value in values)
    assert pass_at(1, samples, min(samples, correct + 1)) >= values[0]


@pytest.mark.parametrize(
    ("answers", "right"),
    [
        (["Yes", "No", "Yes"], True),
        (["No", "Yes", "No"], False),
        (["No", "Yes"], False),  # a tie: the first
        (["Yes", "No"], True),
        ([None, None, "Yes"], True),  # no vote without an answer
        ([None, None, None], False),
        (["No", "Yes", "Yes", "No", None], False),
    ],
)
def test_the_majority_of_a_row(answers: list[str | None], right: bool) -> None:
    row = [sample(0, k, answer) for k, answer in enumerate(answers)]
    assert majority(row) is right
    assert majority(row[::-1]) is right  # the order of the samples, not of the list


rows_of_samples = st.integers(2, 6).flatmap(
    lambda k: st.lists(
        st.tuples(
            st.sampled_from(["Yes", "No"]), st.lists(st.sampled_from(["Yes", "No", None]), min_size=k, max_size=k)
        ),
        min_size=1,
        max_size=20,
    )
)


def outcomes(rows: list[tuple[str, list[str | None]]]) -> list[Outcome]:
    return [sample(r, k, answer, gold) for r, (gold, answers) in enumerate(rows) for k, answer in enumerate(answers)]


@given(rows_of_samples, st.randoms())
def test_figures_of_samples_are_their_definitions(
    rows: list[tuple[str, list[str | None]]], order: random.Random
) -> None:
    samples, data = len(rows[0][1]), outcomes(rows)
    order.shuffle(data)
    found = summarize(data, 20, 0.9, 0)
    assert (found.rows, found.verified) == (len(rows), len(rows))
    right = [[answer == gold for answer in answers] for gold, answers in rows]
    assert found["accuracy"].value == pytest.approx(np.mean(right))
    assert found["unanswered"].value == pytest.approx(np.mean([a is None for _, answers in rows for a in answers]))
    assert found["tokens"].value == pytest.approx(10 + (samples - 1) / 2)
    ks = [k for k in (1, 2, 4, 8) if k <= samples]
    assert sampled_metrics(found.figures) == [*(f"pass@{k}" for k in ks), f"majority@{samples}"]
    for k in ks:
        shares = [np.mean([any(choice) for choice in combinations(row, k)]) for row in right]
        assert found[f"pass@{k}"].value == pytest.approx(np.mean(shares))
    assert found["pass@1"].value == pytest.approx(found["accuracy"].value)
    votes = []
    for gold, answers in rows:
        given_answers = [answer for answer in answers if answer is not None]
        counted = Counter(given_answers)  # the most common; of equally many, the first
        votes.append(bool(counted) and counted.most_common(1)[0][0] == gold)
    assert found[f"majority@{samples}"].value == pytest.approx(np.mean(votes))


@given(rows_of_samples)
def test_the_same_sample_again_changes_no_figure(rows: list[tuple[str, list[str | None]]]) -> None:
    one = [outcome for outcome in outcomes(rows) if outcome.sample == 0]
    four = [replace(outcome, sample=k) for outcome in one for k in range(4)]
    before, after = summarize(one, 50, 0.9, 3), summarize(four, 50, 0.9, 3)
    for name, figure in before.figures.items():
        other = after[name]
        assert (other.value, other.low, other.high) == pytest.approx((figure.value, figure.low, figure.high)), name
    for name in ("pass@1", "pass@2", "pass@4", "majority@4"):
        assert after[name].value == pytest.approx(before["accuracy"].value)
    assert not sampled_metrics(before.figures)
    assert count_groups(one, ["g0", *{f"g{k}" for k in range(1, 7)}]).total().tokens == 10 * len(one)


def test_intervals_draw_whole_groups_with_all_samples_of_their_rows() -> None:
    draw = np.random.default_rng(1)
    data = [
        sample(r, k, "Yes" if draw.random() < (0.9 if r % 10 < 5 else 0.1) else "No", group=f"g{r % 10}")
        for r in range(100)
        for k in range(4)
    ]
    found = summarize(data, 300, 0.9, 5)
    groups = sorted({one.group for one in data})
    weights = resample_groups(len(groups), 300, 5)
    by_row = {one.id: [other for other in data if other.id == one.id] for one in data}
    for name, of_row in (
        ("pass@2", lambda row: pass_at(2, 4, sum(one.correct for one in row))),
        ("majority@4", majority),
        ("accuracy", lambda row: np.mean([one.correct for one in row])),
    ):
        values = []
        for weight in weights:  # the bootstrap written out
            times = dict(zip(groups, weight, strict=True))
            total = sum(times[row[0].group] for row in by_row.values())
            values.append(sum(times[row[0].group] * of_row(row) for row in by_row.values()) / total)
        low, high = np.quantile(values, [0.05, 0.95])
        assert (found[name].low, found[name].high) == pytest.approx((low, high))
        assert high - low > 0.3  # ten groups, not 400 rows


def test_differences_are_paired_by_row_and_by_metric() -> None:
    before = [sample(r, k, "No") for r in range(30) for k in range(4)]
    after = [sample(r, k, "Yes" if k == 0 else "No") for r in range(30) for k in range(4)]
    found = compare(before, after, 100, 0.95, 0)
    assert found["accuracy"].value == pytest.approx(0.25)
    assert found["pass@4"].value == pytest.approx(1.0)
    assert found["pass@2"].value == pytest.approx(0.5)
    assert (found["majority@4"].value, found["majority@4"].low) == (0.0, 0.0)
    assert found["pass@4"].low == pytest.approx(1.0)
    one = [outcome for outcome in after if outcome.sample == 0]
    assert not sampled_metrics(compare(before, one, 100, 0.95, 0))  # only what both have
    with pytest.raises(ValueError, match="not given the same rows"):
        compare(before[4:], after, 100, 0.95, 0)


def test_rows_that_cannot_be_verified_have_no_pass_at_k() -> None:
    data = [replace(sample(r, k, "x"), correct=None, positive=None) for r in range(4) for k in range(4)]
    assert not sampled_metrics(summarize(data, 20, 0.9, 0).figures)
    mixed = summarize([*data, *(sample(9, k, "Yes") for k in range(4))], 20, 0.9, 0)
    assert mixed["pass@4"].value == 1.0
    assert (mixed.rows, mixed.verified) == (5, 1)


def predictions(samples: int) -> list[Prediction]:
    return [
        Prediction(
            split="test",
            id=f"r{r}",
            sample=k,
            group=f"g{r}",
            tags={"n": 3 + r % 2, "relation": "parent"},
            gold="Yes" if r % 2 else "No",
            answer="Yes",
            correct=bool(r % 2),
            answered=k != 1,
            reason="truncated" if k == 1 else None,
            solved="Yes" if r % 2 else "No",
            tokens=5,
        )
        for r in range(6)
        for k in range(samples)
    ]


def test_counts_of_a_split_are_of_rows_and_baselines_do_not_depend_on_samples() -> None:
    recipe = recipe_of("tiny")
    task = task_of(recipe.task, recipe.seed)
    one, four = (count(predictions(k), task, Report(20, 0.9, {}), 0)["test"] for k in (1, 4))
    assert (one.overall.rows, four.overall.rows) == (6, 6)
    assert (
        one.baselines
        == four.baselines
        == baseline_metrics(
            [Outcome(f"r{r}", f"g{r}", r % 2 == 1, r % 2 == 1, True, 5) for r in range(6)],
            [Outcome(f"r{r}", f"g{r}", r % 2 == 1, True, True, 0) for r in range(6)],
        )
    )
    assert {name: found.rows for name, found in four.by_tag["n"].items()} == {"3": 3, "4": 3}
    assert four.reasons == {"truncated": 6}
    assert (one.samples, four.samples) == (1, 4)
    assert "samples" not in one.to_json()
    assert SplitMetrics.from_json(four.to_json(), "test") == four
    assert SplitMetrics.from_json(one.to_json(), "test") == one


def test_lines_of_one_sample_are_as_before_and_old_lines_are_read(tmp_path: Path) -> None:
    first, second = predictions(2)[:2]
    assert "sample" not in first.to_json()
    assert "call" not in first.to_json()
    assert second.to_json()["sample"] == 1
    lines = tmp_path / "predictions.jsonl"
    lines.write_text("".join(json.dumps(one.to_json()) + "\n" for one in (first, second)))
    assert read_predictions(lines) == [first, second]


def test_only_missing_samples_are_asked_again() -> None:
    cases = [("test", {"id": "a"}), ("test", {"id": "b"}), ("test", {"id": "c"})]
    kept = [("test", "a", 1), ("test", "a", 2), *(("test", "b", k) for k in range(5))]
    a, c = cases[0][1], cases[2][1]
    assert unanswered_samples(cases, 5, kept) == [
        Missing("test", a, 0, 1),
        Missing("test", a, 3, 2),
        Missing("test", c, 0, 5),
    ]


def test_samples_need_a_temperature_and_one_is_no_part_of_an_identity() -> None:
    _, problems = read("tiny", ["evaluate.samples=4", "evaluate.temperature=0"])
    assert len(problems) == 1
    assert "evaluate.samples: got 4 with evaluate.temperature 0" in problems[0]
    _, problems = read("tiny", ["evaluate.samples=0"])
    assert "evaluate.samples: got 0; expected a whole number from 1 to 1024" in problems[0]
    assert "samples" not in plain(recipe_of("tiny").evaluate)
    assert plain(recipe_of("tiny", "evaluate.samples=4", "evaluate.temperature=1").evaluate)["samples"] == 4
