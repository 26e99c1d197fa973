"""Return 1 for a completion in the task's format (one closed thought, then the answer), else 0."""

from __future__ import annotations

from pipeline.rewards.reward import Sample


def format(sample: Sample) -> float | None:
    return float(sample.well_formed)
