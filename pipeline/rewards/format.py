"""1 for a completion in the task's form (one closed thought, then the verdict alone), 0 for any other."""

from __future__ import annotations

from pipeline.rewards.reward import Sample


def format(sample: Sample) -> float | None:
    return float(sample.well_formed)
