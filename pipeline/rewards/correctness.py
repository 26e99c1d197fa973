"""1 for the right verdict, 0 for a wrong one or none; None where the task cannot verify."""

from __future__ import annotations

from pipeline.rewards.reward import Sample


def correctness(sample: Sample) -> float | None:
    return None if sample.grade.correct is None else float(sample.grade.correct)
