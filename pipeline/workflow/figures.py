"""The metrics of an evaluation: counted by the stage, and again where the settings of the report have changed.

    count(predictions, task, recipe.report, recipe.seed)       {split: SplitMetrics}
    metrics_of(artifact, task, recipe.report, recipe.seed)     the same of a finished evaluation

Answers are never generated again for this: they are in predictions.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.config.recipe import Report as ReportSettings
from pipeline.core.errors import ArtifactError
from pipeline.scoring.metrics import Outcome, baseline_metrics, outcome_of, summarize
from pipeline.scoring.predictions import PREDICTIONS, Prediction, count_reasons, read_predictions
from pipeline.scoring.results import Metrics, SplitMetrics
from pipeline.tasks.task import Task
from pipeline.workflow.artifact import ARTIFACT, ENDPOINT, WARNINGS, Artifact
from pipeline.workflow.stage import read_spec


def count(
    predictions: Sequence[Prediction], task: Task, settings: ReportSettings, seed: int
) -> dict[str, SplitMetrics]:
    """Count by split, over all rows and by each of the task's breakdowns, with intervals and baselines."""
    splits = dict.fromkeys(prediction.split for prediction in predictions)
    return {name: _count_split([p for p in predictions if p.split == name], task, settings, seed) for name in splits}


def _count_split(predictions: Sequence[Prediction], task: Task, settings: ReportSettings, seed: int) -> SplitMetrics:
    outcomes = [outcome_of(prediction, task.positive) for prediction in predictions]
    tags = [prediction.tags or {} for prediction in predictions]

    def summary(some: Sequence[Outcome]) -> Metrics:
        return summarize(some, settings.bootstrap_samples, settings.confidence, seed)

    by_tag = {}
    for tag in task.breakdowns:
        values = sorted({of_row[tag] for of_row in tags if tag in of_row})
        by_tag[tag] = {
            str(value): summary([o for o, of_row in zip(outcomes, tags, strict=True) if of_row.get(tag) == value])
            for value in values
        }
    one_each = [prediction for prediction in predictions if prediction.sample == 0]
    baselines = baseline_metrics([outcome_of(one, task.positive) for one in one_each], _solver_outcomes(one_each, task))
    samples = len(predictions) // max(1, len(one_each))
    return SplitMetrics(summary(outcomes), baselines, count_reasons(predictions), by_tag, samples)


def _solver_outcomes(predictions: Sequence[Prediction], task: Task) -> list[Outcome]:
    """Score the task's exact program like a model; empty where it cannot answer every row: no ceiling then."""
    if not all(prediction.solved for prediction in predictions):
        return []
    return [
        outcome_of(replace(one, correct=one.solved == one.gold, answered=True, tokens=0), task.positive)
        for one in predictions
    ]


def metrics_of(artifact: Artifact, task: Task, settings: ReportSettings, seed: int) -> dict[str, SplitMetrics]:
    """The metrics of a finished evaluation: as recorded, or counted again where the report's settings differ."""
    before = read_spec(artifact.folder).recipe.report
    if (before.bootstrap_samples, before.confidence) == (settings.bootstrap_samples, settings.confidence):
        return recorded_metrics(artifact)
    return count(read_predictions(artifact.folder / PREDICTIONS), task, settings, seed)


def describe_calls(calls: Mapping[str, Any]) -> str:
    """Return a line on what the answers of a server took, as an evaluation's metrics record it."""
    counts = {name: calls.get(name, 0) for name in ("requests", "failed", "prompt_tokens", "completion_tokens")}
    return (
        f"the model {calls.get('model')} at {calls.get('url')}: {counts['requests']:,} requests of "
        f"{calls.get('seconds', 0):,.1f} s in all, {counts['prompt_tokens']:,} tokens of prompts and "
        f"{counts['completion_tokens']:,} of completions, {counts['failed']:,} rows without an answer"
    )


def recorded_metrics(artifact: Artifact) -> dict[str, SplitMetrics]:
    """The metrics that an evaluation has recorded, by split; ArtifactError where they cannot be read."""
    path = artifact.folder / ARTIFACT
    try:
        return {
            split: SplitMetrics.from_json(record, f"metrics.{split}")
            for split, record in artifact.metrics.items()
            if split not in (ENDPOINT, WARNINGS)
        }
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}. Fix: delete {path} and run the step again") from error
