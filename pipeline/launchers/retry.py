"""Decide whether a job starts its step again. A batch script runs this after a failed attempt, and after a requeue.

    python -m pipeline.launchers.retry runs/tiny/sft-1a2b3c4d5e 137     exit code 0: start again; 1: the step has failed
    python -m pipeline.launchers.retry runs/tiny/sft-1a2b3c4d5e         the same, where Slurm has started the job again

It runs once for all nodes of a job, so they agree. workflow/attempts.py has the rule.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from pipeline.core.errors import EXIT_FAILURE, PlanError, run_main
from pipeline.workflow.attempts import LAUNCH, decide
from pipeline.workflow.stage import read_spec


def starts_again(folder: Path, code: int | None) -> bool:
    """Return whether the step of `folder` starts again after an attempt that ended with `code`; print why.

    Without a code the attempt ended with its node, or saved before Slurm started the job again.
    """
    silent = None if code is None else f"srun ended with exit code {code}"
    limit = read_spec(folder).cluster.max_failures
    decision = decide(folder, limit, silent=silent, silent_kind=LAUNCH, restarted=code is None)
    if decision.sentence:
        print(f"{'note' if decision.again else 'error'}: {decision.sentence}", file=sys.stderr, flush=True)
    if decision.again:
        time.sleep(decision.delay)
    return decision.again


def main(argv: list[str]) -> int:
    if len(argv) not in (1, 2) or not all(word.isdigit() for word in argv[1:]):
        raise PlanError("usage: python -m pipeline.launchers.retry DIR [CODE], where DIR is the folder of a step")
    return 0 if starts_again(Path(argv[0]), int(argv[1]) if argv[1:] else None) else EXIT_FAILURE


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
