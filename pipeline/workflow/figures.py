"""The figures of an evaluation: counted by the stage, and again where the settings of the report have changed.

    count(records, task, recipe.report, recipe.seed)       {split: {"all": figures, "baselines": …, "reasons": …, …}}
    figures_of(artifact, task, recipe.report, recipe.seed)    the same of a finished evaluation

Answers are never made again for this: they are in predictions.jsonl.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.config.recipe import Report
from pipeline.core.files import read_lines
from pipeline.scoring.metrics import baseline_figures, outcome_of, reasons_of, summarize
from pipeline.tasks.task import Task
from pipeline.workflow.artifact import Artifact
from pipeline.workflow.stage import read_spec


def count(records: Sequence[dict[str, Any]], task: Task, settings: Report, seed: int) -> dict[str, Any]:
    """Figures with intervals: by split, over all rows and by each of the task's breakdowns; and the baselines."""
    draws, confidence = settings.bootstrap_samples, settings.confidence
    found: dict[str, Any] = {}
    for split in dict.fromkeys(record["split"] for record in records):
        mine = [record for record in records if record["split"] == split]
        outcomes = [outcome_of(record, task.positive) for record in mine]
        exact = [
            {**record, "correct": record["solved"] == record["gold"], "answered": True, "tokens": 0}
            for record in mine
            if record.get("solved")
        ]
        # a program that does not know every row is no ceiling
        solved = [outcome_of(record, task.positive) for record in exact] if len(exact) == len(mine) else []
        found[split] = {
            "all": summarize(outcomes, draws, confidence, seed),
            "baselines": baseline_figures(outcomes, solved),
            "reasons": reasons_of(mine),
        }
        for tag in task.breakdowns:
            values = sorted({record["tags"][tag] for record in mine if tag in (record["tags"] or {})})
            found[split][tag] = {
                str(value): summarize(
                    [o for o, record in zip(outcomes, mine, strict=True) if record["tags"][tag] == value],
                    draws,
                    confidence,
                    seed,
                )
                for value in values
            }
    return found


def figures_of(artifact: Artifact, task: Task, settings: Report, seed: int) -> dict[str, Any]:
    """The figures of a finished evaluation under these settings: as recorded, where they are what it was counted by."""
    before = read_spec(artifact.folder).recipe.report
    if (before.bootstrap_samples, before.confidence) == (settings.bootstrap_samples, settings.confidence):
        return artifact.figures
    return count(read_lines(artifact.folder / "predictions.jsonl"), task, settings, seed)
