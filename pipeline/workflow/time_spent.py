"""The seconds of a step by part, over all of its attempts: the sums, and the table that commands show.

    add(progress.earlier, progress.spent)           seconds by part of all attempts so far
    print(table({"sft": artifact.seconds_by_part})) a line a step

The parts of one attempt are those of core/stopwatch.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path

from pipeline.core.errors import ArtifactError
from pipeline.core.slurm_client import read_job, this_job
from pipeline.core.stopwatch import PARTS
from pipeline.workflow.artifact import ARTIFACT

Seconds = Mapping[str, float]  # by part
TIME_NOTE = (
    "of rank 0, all attempts together, until the step was recorded; on a GPU forward/backward includes the optimizer"
)


def add(*some: Seconds) -> dict[str, float]:
    """Return the sums, in the order of PARTS; what cannot be a duration (a damaged record) is left out."""
    names = dict.fromkeys([*PARTS, *(name for one in some for name in one)])
    sums = {name: round(sum(one.get(name, 0.0) for one in some), 3) for name in names}
    return {name: seconds for name, seconds in sums.items() if 0 < seconds < math.inf}


def between(counted: float, noticed: float, began: float) -> dict[str, float]:
    """Return what passed between two attempts, by part.

    The first has recorded its time up to `counted`; its end was noticed at `noticed`, and the second `began`. All are
    seconds since the epoch. Two nodes' clocks may differ, so no part is negative.
    """
    lost = max(0.0, min(noticed, began) - counted)
    return add({"lost": lost, "wait": max(0.0, began - max(counted, noticed))})


def queued_since(folder: Path, inputs: Mapping[str, str]) -> float:
    """Return since when a step waits for its Slurm job, in seconds since the epoch: submitted, and its inputs done.

    0 outside of a job. `inputs` are the folders of other steps, by role.
    """
    found = []
    with contextlib.suppress(OSError, ArtifactError):
        if this_job() and (record := read_job(folder)):
            found.append(record.submitted)
            found += [(Path(where) / ARTIFACT).stat().st_mtime for where in inputs.values()]
    return max(found, default=0.0)


def table(rows: Mapping[str, Seconds]) -> str:
    """Return the table: for each step its seconds, and by part the seconds and their share; "" without any."""
    rows = {label: add(seconds) for label, seconds in rows.items() if seconds}
    used = [name for name in PARTS if any(name in seconds for seconds in rows.values())]
    lines = [["step", "seconds", *used]]
    for label, seconds in rows.items():
        total = sum(seconds.values())
        lines.append([label, f"{total:.1f}", *(_cell(seconds.get(name, 0.0), total) for name in used)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    shown = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in shown) if rows else ""


def _cell(seconds: float, total: float) -> str:
    """`25.1 61%`; empty for no time, and `0%` for less than half a percent."""
    return f"{seconds:.1f} {100 * seconds / total:2.0f}%" if seconds else ""
