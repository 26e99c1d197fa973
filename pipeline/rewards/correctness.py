"""Return 1 for a correct answer, 0 for a wrong or missing one; None if the task cannot verify it."""

from __future__ import annotations

from pipeline.rewards.reward import Sample


def correctness(sample: Sample) -> float | None:
    return None if sample.grade.correct is None else float(sample.grade.correct)
