"""Stand-ins for Slurm's commands (tests/fakes/slurm), and a look at the jobs that they keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.config.cluster import Cluster, read_cluster
from pipeline.workflow import status
from pipeline.workflow.plan import Plan, make_plan

FAKE = Path(__file__).parents[1] / "fakes" / "slurm"
COMMANDS = ("sbatch", "squeue", "sacct", "scancel", "scontrol", "srun")


def jobs(fake: Path) -> dict[str, dict[str, Any]]:
    return dict(json.loads((fake / "jobs.json").read_text()))


def change(fake: Path, job: str, **values: str) -> None:
    known = jobs(fake)
    known[job] |= values
    (fake / "jobs.json").write_text(json.dumps(known))


def forget(fake: Path) -> None:
    """The day after: Slurm has forgotten every job."""
    (fake / "jobs.json").write_text("{}")


def plan_of(tmp_path: Path, *words: str, stages: tuple[str, ...] = ()) -> Plan:
    return make_plan(["tiny"], words, cluster="slurm", stages=stages, runs=tmp_path / "runs")


def cluster_of(*words: str) -> Cluster:
    cluster, problems = read_cluster("slurm", words)
    assert cluster is not None, problems
    return cluster


def states(runs: Path) -> dict[str, str]:
    rows, _ = status.table(runs)
    return {row.step.partition("/")[2].rpartition("-")[0]: row.state for row in rows}
