"""Figures and their intervals, from counts: accuracy, balanced accuracy, F1, MCC, unanswered.

Unanswered is never correct: it is a third prediction beside the positive and the negative one. Figures that mean
nothing are left out: F1 and its like for a task without a positive class, every one of correctness where no answer
can be verified. A proxy of correctness is counted apart, and never as accuracy. Intervals are
percentile bootstraps that draw whole groups (all rows of one premise), because rows of a group are not
independent; the difference of two models is drawn on the same groups for both, so it is paired.

Sources: Gorodkin 2004 (MCC of more than two predictions), Efron & Tibshirani 1993 (bootstrap), Cameron, Gelbach
& Miller 2008 (few clusters: percentile intervals are then a little too narrow).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# columns of a count table
TP, FN, UNANSWERED_POSITIVE, FP, TN, UNANSWERED_NEGATIVE, TOKENS = range(7)
UNVERIFIED, UNVERIFIED_UNANSWERED, PROXIED, MATCHED = range(7, 11)  # rows that nothing verifies; of them, by a proxy
THOUGHTS, COMPARED, PREFERRED = range(11, 14)  # rows with a thought; with a rejected answer; that prefer the wanted one
COLUMNS = 14


@dataclass(frozen=True)
class Outcome:
    """One graded row: what a prediction is reduced to."""

    id: str
    group: str
    positive: bool | None  # whether the gold is the class that F1 counts; None for tasks without one
    correct: bool | None  # None where it cannot be verified
    answered: bool
    tokens: int  # of the completion
    proxy: bool | None = None  # what stands in for `correct` where that is None
    thought: bool = False  # whether the completion thinks before it answers
    preferred: bool | None = None  # whether the wanted answer is likelier than the rejected one; None without one


def outcome_of(record: Mapping[str, Any], positive: str | None) -> Outcome:
    """A line of predictions.jsonl as what is counted; `positive` is the gold that F1 counts."""
    return Outcome(
        record["id"],
        record["group"],
        None if positive is None else record["gold"] == positive,
        None if record["correct"] is None else record["correct"] and record["answered"],
        record["answered"],
        record["tokens"],
        None if record.get("proxy") is None else record["proxy"] and record["answered"],
        bool(record.get("thought")),
        record.get("preferred"),
    )


def reasons_of(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many rows are unanswered for each reason, the commonest first.

    Lines that an earlier version wrote have no reason: `truncated` where they were cut off, else `not_recorded`.
    """
    found = Counter(
        record.get("reason") or ("truncated" if record.get("truncated") else "not_recorded")
        for record in records
        if not record["answered"]
    )
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def unanswered_rows(models: Sequence[Mapping[str, Any]], splits: Sequence[str]) -> list[dict[str, Any]]:
    """For each model and split with unanswered rows: how many, and the reasons; none for metrics without reasons."""
    found = []
    for model in models:
        for split in splits:
            reasons = model["splits"][split].get("reasons") or {}
            if reasons:
                told = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
                rows = int(model["splits"][split]["all"]["rows"]["value"])
                one = {"name": model["name"], "role": model["role"], "split": split, "rows": rows}
                found.append({**one, "count": sum(reasons.values()), "reasons": dict(reasons), "told": told})
    return found


def count_table(outcomes: Sequence[Outcome], groups: Sequence[str]) -> Array:
    """Counts by group, shape (groups, 14), columns TP … PREFERRED."""
    table = np.zeros((len(groups), COLUMNS))
    place = {group: i for i, group in enumerate(groups)}
    for outcome in outcomes:
        row = table[place[outcome.group]]
        positive = outcome.positive is not False
        if outcome.correct is None:
            row[UNVERIFIED if outcome.answered else UNVERIFIED_UNANSWERED] += 1
            row[PROXIED] += outcome.proxy is not None
            row[MATCHED] += outcome.proxy is True
        elif not outcome.answered:
            row[UNANSWERED_POSITIVE if positive else UNANSWERED_NEGATIVE] += 1
        elif positive:
            row[TP if outcome.correct else FN] += 1
        else:
            row[TN if outcome.correct else FP] += 1
        row[TOKENS] += outcome.tokens
        row[THOUGHTS] += outcome.thought
        row[COMPARED] += outcome.preferred is not None
        row[PREFERRED] += outcome.preferred is True
    return table


def _ratio(top: Array, bottom: Array) -> Array:
    """top / bottom, 0 where there is nothing to divide by."""
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)


def figures(counts: Array) -> dict[str, Array]:
    """Every figure of count tables of shape (…, 14): arrays of shape (…)."""
    columns = np.moveaxis(np.asarray(counts, dtype=float), -1, 0)
    tp, fn, up, fp, tn, un, tokens, uv, uu, proxied, matched, thoughts, compared, preferred = columns
    positives, negatives = tp + fn + up, fp + tn + un
    n = positives + negatives
    correct = tp + tn
    # MCC of a 2 × 3 table: gold yes/no against predicted yes/no/unanswered (Gorodkin's R_K)
    said_yes, said_no, unanswered = tp + fp, fn + tn, up + un
    covariance = correct * n - (positives * said_yes + negatives * said_no)
    spread_gold = n**2 - positives**2 - negatives**2
    spread_said = n**2 - said_yes**2 - said_no**2 - unanswered**2
    recall, specificity = _ratio(tp, positives), _ratio(tn, negatives)
    one_class = (positives == 0) | (negatives == 0)
    return {
        "f1": _ratio(2 * tp, 2 * tp + fp + fn + up),
        "balanced_accuracy": np.where(one_class, _ratio(correct, n), (recall + specificity) / 2),
        "mcc": _ratio(covariance, np.sqrt(spread_gold * spread_said)),
        "accuracy": _ratio(correct, n),
        "precision": _ratio(tp, tp + fp),
        "recall": recall,
        "proxy": _ratio(matched, proxied),
        "preference": _ratio(preferred, compared),
        "thoughts": _ratio(thoughts, n + uv + uu),
        "unanswered": _ratio(unanswered + uu, n + uv + uu),
        "tokens": _ratio(tokens, n + uv + uu),
        "verified": n,
        "rows": n + uv + uu,
    }


MAIN_METRICS = ("f1", "balanced_accuracy", "mcc", "accuracy", "proxy", "preference", "unanswered", "tokens")
CLASS_METRICS = ("f1", "balanced_accuracy", "mcc", "precision", "recall")  # figures that a positive class gives sense
COUNTS = ("verified", "rows")  # not figures of a sample
LOWER_IS_BETTER = ("unanswered",)


def applicable_metrics(outcomes: Sequence[Outcome]) -> list[str]:
    """The figures that mean something for these rows."""
    verified = any(outcome.correct is not None for outcome in outcomes)
    classes = verified and any(outcome.positive is not None for outcome in outcomes)
    left_out = {name for name in CLASS_METRICS if not classes}
    left_out |= set() if verified else {"accuracy"}
    left_out |= set() if any(outcome.proxy is not None for outcome in outcomes) else {"proxy"}
    left_out |= set() if any(outcome.preferred is not None for outcome in outcomes) else {"preference"}
    return [name for name in figures(np.zeros(COLUMNS)) if name not in left_out]


def resample_groups(groups: int, draws: int, seed: int) -> Array:
    """How often each group is drawn in each bootstrap sample: shape (draws, groups), rows sum to `groups`."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(groups, np.full(groups, 1 / groups), size=draws).astype(float)


def percentile_interval(values: Array, confidence: float) -> tuple[float, float]:
    """The central interval of bootstrap values."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def summarize(outcomes: Sequence[Outcome], draws: int, confidence: float, seed: int) -> dict[str, dict[str, float]]:
    """Each figure that means something as {value, low, high}, with `rows`, `verified` and `groups` as values."""
    groups = sorted({outcome.group for outcome in outcomes})
    if not groups:
        return {"verified": {"value": 0}, "rows": {"value": 0}, "groups": {"value": 0}}
    table = count_table(outcomes, groups)
    point = figures(table.sum(axis=0))
    drawn = figures(resample_groups(len(groups), draws, seed) @ table)
    found: dict[str, dict[str, float]] = {}
    for name in applicable_metrics(outcomes):
        found[name] = {"value": float(point[name])}
        if name not in COUNTS:
            low, high = percentile_interval(drawn[name], confidence)
            found[name] |= {"low": low, "high": high}
    found["groups"] = {"value": len(groups)}
    return found


def compare(
    before: Sequence[Outcome], after: Sequence[Outcome], draws: int, confidence: float, seed: int
) -> dict[str, dict[str, float]]:
    """The paired difference after − before of each headline figure that means something, on the rows both were asked.

    Raises ValueError when the two were not asked the same rows.
    """
    if {o.id for o in before} != {o.id for o in after}:
        raise ValueError("the two models were not asked the same rows")
    groups = sorted({outcome.group for outcome in before})
    drawn = resample_groups(len(groups), draws, seed)
    tables = [count_table(outcomes, groups) for outcomes in (before, after)]
    points = [figures(table.sum(axis=0)) for table in tables]
    samples = [figures(drawn @ table) for table in tables]
    found = {}
    for name in [
        name for name in MAIN_METRICS if name in applicable_metrics(before) and name in applicable_metrics(after)
    ]:
        low, high = percentile_interval(samples[1][name] - samples[0][name], confidence)
        found[name] = {"value": float(points[1][name] - points[0][name]), "low": low, "high": high}
    return found


SOLVER = "exact solver"


def baseline_figures(outcomes: Sequence[Outcome], solved: Sequence[Outcome] = ()) -> dict[str, dict[str, float]]:
    """What needs no model: always the negative answer, always the positive one, a fair coin (in expectation).

    `solved` are the outcomes of the task's exact program, where it has one: on labels that are right it is always
    right, and on others it shows how high any model can get. Nothing for tasks without a positive class.
    """
    if not any(outcome.positive is not None for outcome in outcomes):
        return {}
    positives = sum(outcome.positive is True for outcome in outcomes)
    negatives = len(outcomes) - positives
    tables: dict[str, list[float]] = {
        "always No": [0, positives, 0, 0, negatives, 0, 0],
        "always Yes": [positives, 0, 0, negatives, 0, 0, 0],
        "coin": [positives / 2, positives / 2, 0, negatives / 2, negatives / 2, 0, 0],
    }
    found = {
        name: _floats(figures(np.array(counts + [0.0] * (COLUMNS - len(counts))))) for name, counts in tables.items()
    }
    if solved:
        found[SOLVER] = _floats(figures(count_table(solved, sorted({one.group for one in solved})).sum(axis=0)))
    return found


def _floats(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
