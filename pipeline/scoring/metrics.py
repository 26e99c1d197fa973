"""Metrics and their intervals, from counts: accuracy, balanced accuracy, F1, MCC, unanswered.

Unanswered is never correct: it is a third prediction beside the positive and the negative one. Metrics that mean
nothing are left out: F1 and its like for a task without a positive class, every one of correctness where no answer
can be verified. A proxy of correctness is counted apart, and never as accuracy. Intervals are percentile bootstraps
that resample whole groups (all rows of one premise), because rows of a group are not independent; the difference of
two models is resampled on the same groups for both, so it is paired.

Of several samples of a row each has its share of the row's weight, so that every metric is the mean over samples.
pass@k is the chance that one of k samples is right, without bias; majority@k takes the answer that most samples give.

Sources: Chen et al. 2021 (pass@k), Wang et al. 2023 (majority), Gorodkin 2004 (MCC of more than two predictions),
Efron & Tibshirani 1993 (bootstrap), Cameron, Gelbach & Miller 2008 (few clusters: percentile intervals are then a
little too narrow).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from pipeline.scoring.predictions import Prediction
from pipeline.scoring.results import Baselines, Figure, Metrics, ModelResult, Unanswered

Array = NDArray[np.float64]

MAIN_METRICS = (
    "f1",
    "balanced_accuracy",
    "mcc",
    "accuracy",
    "valid_proofs",
    "proxy",
    "preference",
    "unanswered",
    "tokens",
)
CLASS_METRICS = ("f1", "balanced_accuracy", "mcc", "precision", "recall")  # only with a positive class
LOWER_IS_BETTER = ("unanswered",)
TITLES = {
    "f1": "F1",
    "balanced_accuracy": "balanced accuracy",
    "mcc": "MCC",
    "accuracy": "accuracy",
    "proxy": "match (proxy)",
    "precision": "precision",
    "recall": "recall",
    "valid_proofs": "valid proofs",
    "preference": "preference accuracy",
    "thoughts": "answers with a thought",
    "validation_loss": "validation loss",
    "validation_loss_gap": "validation loss − training loss",
    "unanswered": "unanswered",
    "tokens": "mean tokens",
}
SOLVER = "exact solver"  # among the baselines: the task's own program


@dataclass(frozen=True)
class Outcome:
    """What counts of one graded row."""

    id: str
    group: str
    positive: bool | None  # whether the gold is the class that F1 counts; None for tasks without one
    correct: bool | None  # None where it cannot be verified
    answered: bool
    tokens: int  # of the completion
    proxy: bool | None = None  # what stands in for `correct` where that is None
    thought: bool = False  # whether the completion thinks before it answers
    proved: bool | None = None  # whether the thought is a valid proof of the verdict; None without a checker
    preferred: bool | None = None  # whether the gold answer is likelier than the rejected one; None without one
    sample: int = 0
    answer: str | None = None  # as it was read


def outcome_of(prediction: Prediction, positive: str | None) -> Outcome:
    """Reduce a prediction to what is counted; `positive` is the gold that F1 counts."""
    answered = prediction.answered
    return Outcome(
        id=prediction.id,
        group=prediction.group,
        positive=None if positive is None else prediction.gold == positive,
        correct=None if prediction.correct is None else prediction.correct and answered,
        answered=answered,
        tokens=prediction.tokens,
        proxy=None if prediction.proxy is None else prediction.proxy and answered,
        thought=prediction.thought,
        proved=None if prediction.proof is None else prediction.proof == 1 and answered,
        preferred=prediction.preferred,
        sample=prediction.sample,
        answer=prediction.answer,
    )


def _zero() -> Array:
    return np.zeros(())


@dataclass(frozen=True)
class Counts:
    """Rows counted by outcome. Every field has the same shape: () of all rows, (groups,), or (resamples,)."""

    true_positive: Array = field(default_factory=_zero)
    false_negative: Array = field(default_factory=_zero)  # answered wrongly; gold positive
    unanswered_positive: Array = field(default_factory=_zero)
    false_positive: Array = field(default_factory=_zero)
    true_negative: Array = field(default_factory=_zero)
    unanswered_negative: Array = field(default_factory=_zero)
    unverified: Array = field(default_factory=_zero)  # answered rows whose correctness cannot be verified
    unverified_unanswered: Array = field(default_factory=_zero)
    with_proxy: Array = field(default_factory=_zero)  # unverified rows that a proxy judges
    proxy_matches: Array = field(default_factory=_zero)
    tokens: Array = field(default_factory=_zero)
    thoughts: Array = field(default_factory=_zero)  # rows with a thought
    checked: Array = field(default_factory=_zero)  # rows whose thought was checked step by step
    proved: Array = field(default_factory=_zero)  # of them, rows with a valid proof
    with_rejected: Array = field(default_factory=_zero)  # rows with a rejected answer
    preferred: Array = field(default_factory=_zero)  # of them, rows whose gold answer is likelier

    def total(self) -> Counts:
        """The counts of all groups together."""
        return Counts(**{f.name: getattr(self, f.name).sum(axis=0) for f in fields(self)})

    def resampled(self, weights: Array) -> Counts:
        """The counts of each bootstrap sample; `weights` has shape (resamples, groups)."""
        return Counts(**{f.name: weights @ getattr(self, f.name) for f in fields(self)})


def count_groups(outcomes: Sequence[Outcome], groups: Sequence[str]) -> Counts:
    """Count rows by group: every field has shape (groups,). Each sample of a row counts as its share of it."""
    counts = Counts(**{f.name: np.zeros(len(groups)) for f in fields(Counts)})
    place = {group: i for i, group in enumerate(groups)}
    samples = Counter(outcome.id for outcome in outcomes)
    for outcome in outcomes:
        group, share = place[outcome.group], 1 / samples[outcome.id]
        _cell(outcome, counts)[group] += share
        if outcome.correct is None:
            counts.with_proxy[group] += share * (outcome.proxy is not None)
            counts.proxy_matches[group] += share * (outcome.proxy is True)
        counts.tokens[group] += share * outcome.tokens
        counts.thoughts[group] += share * outcome.thought
        counts.checked[group] += share * (outcome.proved is not None)
        counts.proved[group] += share * (outcome.proved is True)
        counts.with_rejected[group] += share * (outcome.preferred is not None)
        counts.preferred[group] += share * (outcome.preferred is True)
    return counts


# ---------------------------------------------------------------- several samples of a row


def pass_at(k: int, samples: int, correct: int) -> float:
    """The chance that k of `samples` completions, drawn without replacement, hold one of the `correct` ones."""
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(row: Sequence[Outcome]) -> bool:
    """Whether the answer that most samples of a row give is correct; of equally many, the one that came first.

    A sample without an answer has no vote, and a row without votes is not correct.
    """
    votes: dict[str | None, list[Outcome]] = {}
    for outcome in sorted(row, key=lambda one: one.sample):
        if outcome.answered:
            votes.setdefault(outcome.answer, []).append(outcome)
    return bool(votes) and max(votes.values(), key=len)[0].correct is True


def count_samples(outcomes: Sequence[Outcome], groups: Sequence[str]) -> dict[str, tuple[Array, Array]]:
    """(hits, rows) by group of pass@k for each power of two, and of majority@k; {} for one sample a row.

    Rows that cannot be verified are left out; k is at most the samples of the row that has the fewest.
    """
    by_row: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_row.setdefault(outcome.id, []).append(outcome)
    rows = [row for row in by_row.values() if any(one.correct is not None for one in row)]
    least = min(map(len, rows), default=1)
    if least < 2:
        return {}
    place = {group: i for i, group in enumerate(groups)}
    names = [*(f"pass@{2**power}" for power in range(least.bit_length())), f"majority@{least}"]
    hits, total = {name: np.zeros(len(groups)) for name in names}, np.zeros(len(groups))
    for row in rows:
        group, correct = place[row[0].group], sum(one.correct is True for one in row)
        total[group] += 1
        for power in range(least.bit_length()):
            hits[f"pass@{2**power}"][group] += pass_at(2**power, len(row), correct)
        hits[f"majority@{least}"][group] += majority(row)
    return {name: (found, total) for name, found in hits.items()}


def sampled_metrics(figures: Iterable[str]) -> list[str]:
    """Those of some metrics that need several samples of a row."""
    return [name for name in figures if name.startswith(("pass@", "majority@"))]


def _of_samples(counts: Mapping[str, tuple[Array, Array]], weights: Array) -> dict[str, tuple[float, Array]]:
    """The value and the bootstrap values of each metric of several samples."""
    return {
        name: (float(_ratio(hits.sum(), rows.sum())), _ratio(weights @ hits, weights @ rows))
        for name, (hits, rows) in counts.items()
    }


def _cell(outcome: Outcome, counts: Counts) -> Array:
    """The one count of gold against prediction that a row belongs to; a task without a class is all positive."""
    if outcome.correct is None:
        return counts.unverified if outcome.answered else counts.unverified_unanswered
    positive = outcome.positive is not False
    if not outcome.answered:
        return counts.unanswered_positive if positive else counts.unanswered_negative
    if positive:
        return counts.true_positive if outcome.correct else counts.false_negative
    return counts.true_negative if outcome.correct else counts.false_positive


def _ratio(top: Array, bottom: Array) -> Array:
    """Divide, with 0 where there is nothing to divide by."""
    found: Array = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
    return found


def compute_metrics(c: Counts) -> dict[str, Array]:
    """Every metric of these counts, each of the counts' shape; `verified` and `rows` too."""
    positives = c.true_positive + c.false_negative + c.unanswered_positive
    negatives = c.false_positive + c.true_negative + c.unanswered_negative
    verified, correct = positives + negatives, c.true_positive + c.true_negative
    unanswered = c.unanswered_positive + c.unanswered_negative
    rows = verified + c.unverified + c.unverified_unanswered
    recall, specificity = _ratio(c.true_positive, positives), _ratio(c.true_negative, negatives)
    one_class = (positives == 0) | (negatives == 0)
    # MCC of a 2 × 3 table: gold yes/no against predicted yes/no/unanswered (Gorodkin's R_K)
    predicted_yes, predicted_no = c.true_positive + c.false_positive, c.false_negative + c.true_negative
    covariance = correct * verified - (positives * predicted_yes + negatives * predicted_no)
    gold_spread = verified**2 - positives**2 - negatives**2
    predicted_spread = verified**2 - predicted_yes**2 - predicted_no**2 - unanswered**2
    wrong = c.false_positive + c.false_negative + c.unanswered_positive
    return {
        "f1": _ratio(2 * c.true_positive, 2 * c.true_positive + wrong),
        "balanced_accuracy": np.where(one_class, _ratio(correct, verified), (recall + specificity) / 2),
        "mcc": _ratio(covariance, np.sqrt(gold_spread * predicted_spread)),
        "accuracy": _ratio(correct, verified),
        "precision": _ratio(c.true_positive, predicted_yes),
        "recall": recall,
        "proxy": _ratio(c.proxy_matches, c.with_proxy),
        "valid_proofs": _ratio(c.proved, c.checked),
        "preference": _ratio(c.preferred, c.with_rejected),
        "thoughts": _ratio(c.thoughts, rows),
        "unanswered": _ratio(unanswered + c.unverified_unanswered, rows),
        "tokens": _ratio(c.tokens, rows),
        "verified": verified,
        "rows": rows,
    }


METRICS = tuple(name for name in compute_metrics(Counts()) if name not in ("verified", "rows"))


def applicable_metrics(outcomes: Sequence[Outcome]) -> list[str]:
    """The metrics that mean something for these rows."""
    verified = any(outcome.correct is not None for outcome in outcomes)
    classes = verified and any(outcome.positive is not None for outcome in outcomes)
    left_out = {name for name in CLASS_METRICS if not classes}
    left_out |= set() if verified else {"accuracy"}
    left_out |= set() if any(outcome.proxy is not None for outcome in outcomes) else {"proxy"}
    left_out |= set() if any(outcome.proved is not None for outcome in outcomes) else {"valid_proofs"}
    left_out |= set() if any(outcome.preferred is not None for outcome in outcomes) else {"preference"}
    return [name for name in METRICS if name not in left_out]


def resample_groups(groups: int, samples: int, seed: int) -> Array:
    """How often each bootstrap sample holds each group: shape (samples, groups), rows sum to `groups`."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(groups, np.full(groups, 1 / groups), size=samples).astype(float)


def percentile_interval(values: Array, confidence: float) -> tuple[float, float]:
    """The central interval of bootstrap values."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def summarize(outcomes: Sequence[Outcome], samples: int, confidence: float, seed: int) -> Metrics:
    """Each metric that applies, with its interval from `samples` bootstrap samples of whole groups."""
    groups = sorted({outcome.group for outcome in outcomes})
    if not groups:
        return Metrics(rows=0, verified=0, groups=0, figures={})
    counts, weights = count_groups(outcomes, groups), resample_groups(len(groups), samples, seed)
    point = compute_metrics(counts.total())
    resampled = compute_metrics(counts.resampled(weights))
    figures = {
        name: Figure(float(point[name]), *percentile_interval(resampled[name], confidence))
        for name in applicable_metrics(outcomes)
    }
    for name, (value, values) in _of_samples(count_samples(outcomes, groups), weights).items():
        figures[name] = Figure(value, *percentile_interval(values, confidence))
    return Metrics(round(float(point["rows"])), round(float(point["verified"])), len(groups), figures)


def compare(
    before: Sequence[Outcome], after: Sequence[Outcome], samples: int, confidence: float, seed: int
) -> dict[str, Figure]:
    """The paired difference after − before of each main metric that applies to both.

    Raises ValueError when the two models were not given the same rows.
    """
    if {o.id for o in before} != {o.id for o in after}:
        raise ValueError("the two models were not given the same rows")
    groups = sorted({outcome.group for outcome in before})
    weights = resample_groups(len(groups), samples, seed)
    counts = [count_groups(outcomes, groups) for outcomes in (before, after)]
    old, new = (compute_metrics(one.total()) for one in counts)
    old_samples, new_samples = (compute_metrics(one.resampled(weights)) for one in counts)
    both = set(applicable_metrics(before)) & set(applicable_metrics(after))
    found = {
        name: Figure(
            float(new[name] - old[name]), *percentile_interval(new_samples[name] - old_samples[name], confidence)
        )
        for name in MAIN_METRICS
        if name in both
    }
    first, second = (_of_samples(count_samples(outcomes, groups), weights) for outcomes in (before, after))
    for name, (value, values) in second.items():
        if name in first:
            interval = percentile_interval(values - first[name][1], confidence)
            found[name] = Figure(value - first[name][0], *interval)
    return found


def baseline_metrics(outcomes: Sequence[Outcome], solved: Sequence[Outcome] = ()) -> Baselines:
    """The metrics of what needs no model: always the negative answer, always the positive one, a coin (expected).

    `solved` are the outcomes of the task's exact program, where it has one: on labels that are right it is always
    right, and on others it shows how high any model can get. Empty for tasks without a positive class.
    """
    if not any(outcome.positive is not None for outcome in outcomes):
        return {}
    positives = np.array(float(sum(outcome.positive is True for outcome in outcomes)))
    negatives = len(outcomes) - positives
    half, other = positives / 2, negatives / 2
    counts = {
        "always No": Counts(false_negative=positives, true_negative=negatives),
        "always Yes": Counts(true_positive=positives, false_positive=negatives),
        "coin": Counts(true_positive=half, false_negative=half, false_positive=other, true_negative=other),
    }
    if solved:
        counts[SOLVER] = count_groups(solved, sorted({one.group for one in solved})).total()
    return {
        name: {metric: float(value) for metric, value in compute_metrics(one).items()} for name, one in counts.items()
    }


def unanswered_rows(models: Sequence[ModelResult], splits: Sequence[str]) -> list[Unanswered]:
    """Each model and split with unanswered rows; none where the reasons were not recorded."""
    found = []
    for model in models:
        for split in splits:
            metrics = model.splits[split]
            if reasons := metrics.reasons:
                rows, count = metrics.overall.rows * metrics.samples, sum(reasons.values())
                found.append(Unanswered(model.name, model.role, split, rows, count, reasons))
    return found
