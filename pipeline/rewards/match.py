"""A declared proxy, not correctness: 1 where an answer nobody can verify equals the gold one in normalised words.

0 for another answer or none; None where the row has no gold words, and where the task verifies (see correctness).
"""

from __future__ import annotations

from pipeline.rewards.reward import Sample


def match(sample: Sample) -> float | None:
    return None if sample.grade.proxy is None else float(sample.grade.proxy)
