"""Return 1 if an unverifiable answer equals the gold answer in normalised words: a proxy, not correctness.

0 for another answer or none. None if the row has no gold words, or if the task verifies answers (see correctness).
"""

from __future__ import annotations

from pipeline.rewards.reward import Sample


def match(sample: Sample) -> float | None:
    return None if sample.grade.proxy is None else float(sample.grade.proxy)
