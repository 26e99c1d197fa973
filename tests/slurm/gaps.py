"""How long nothing ran between a step and the one that waited for it: scripts/bench gaps RUNS.

For each step: the seconds from the end of the last input's work (its artifact) to the start of its own work, and of
these the seconds from the end of the input's job to the start of its own, which are the scheduler's. A run of the
local launcher has the first figure only.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path

from pipeline.core.slurm_client import read_job, run_slurm


def work(folder: Path) -> tuple[float, float]:
    """Start and end of a step's own work, in seconds since the epoch."""
    provenance = json.loads((folder / "artifact.json").read_text())["provenance"]
    return provenance["started"], provenance["started"] + provenance["seconds"]


def jobs(folders: list[Path]) -> dict[Path, tuple[float, float]]:
    """Start and end of each step's job, as accounting has them (whole seconds)."""
    ids = {record.id: folder for folder in folders if (record := read_job(folder)) and record.id}
    if not ids:
        return {}
    told = run_slurm("sacct", "-X", "-n", "-P", "-j", ",".join(ids), "-o", "jobid,start,end").stdout.splitlines()
    spans = (line.split("|") for line in told)
    return {ids[job]: tuple(datetime.fromisoformat(t).timestamp() for t in span) for job, *span in spans}  # type: ignore[misc]


def main(runs: Path) -> None:
    folders = [path.parent for path in sorted(runs.glob("*/*/artifact.json"))]
    slurm = jobs(folders)
    print(f"{'step':<32} {'work to work':>13} {'job to job':>11}   seconds")
    for folder in sorted(folders, key=lambda folder: work(folder)[0]):
        inputs = [Path(where) for where in json.loads((folder / "step.json").read_text())["inputs"].values()]
        if inputs:
            last = max(inputs, key=lambda place: work(place)[1])
            whole = work(folder)[0] - work(last)[1]
            queue = f"{slurm[folder][0] - slurm[last][1]:11.0f}" if {folder, last} <= set(slurm) else ""
            print(f"{folder.parent.name + '/' + folder.name:<32} {whole:13.1f} {queue}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
