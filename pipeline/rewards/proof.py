"""Return 1 for a thought that proves its verdict; otherwise half the share of its steps before the first wrong one.

The task's checker verifies each step (`Task.check_thought`). A thought without a verdict earns 0. None where the task
has no checker. `find_rewards` rejects weights with which the other rewards could outweigh correctness.
"""

from __future__ import annotations

from pipeline.rewards.reward import Sample


def proof(sample: Sample) -> float | None:
    share = sample.check()
    if share is None:
        return None
    if not sample.grade.answered:
        return 0.0
    return 1.0 if share == 1 else share / 2
