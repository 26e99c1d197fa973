"""Submit a plan to Slurm: one job a step, each waiting for its inputs. And the batch scripts, from one renderer.

    scripts/render       writes slurm/*.slurm (python -m pipeline.launchers.slurm [CLUSTER] [FOLDER])

The script that the launcher submits for a step and the committed one of its stage differ in one thing: which step it
is. Before sbatch is called, the step's `job.json` holds a token that goes with the job as its comment; the id is
written after. So a chain whose submission was cut off is completed by the same command, and never doubled.
"""

from __future__ import annotations

import contextlib
import fcntl
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.artifact import LOG, SCRIPT, refuse_if_owned
from pipeline.cluster import read_cluster
from pipeline.errors import EXIT_MISTAKE, LaunchError, PlanError, RecipeError, run_main
from pipeline.launchers.batch_script import FOLDER, render, resources, script
from pipeline.plan import Plan, Step, order_of
from pipeline.slurm import Job, JobRecord, call, live_jobs, reason_of, submitted_as, write_job
from pipeline.stage import STAGES, write_order

ENDING = 60  # seconds to wait for a job that is ending

# ---------------------------------------------------------------- the chain


@dataclass(frozen=True)
class Submission:
    """A step that is to run, and the job that runs it."""

    step: Step
    job: str  # its id; where nothing is submitted, the step's label
    new: bool  # submitted now, not by an earlier command
    after: tuple[str, ...]  # the jobs it waits for


Submit = Callable[[Step, Plan, Sequence[str], JobRecord], JobRecord]


def run_plan(plan: Plan, submit: Submit | None = None, *, dry_run: bool = False) -> list[Submission]:
    """Submit every step that is neither done nor with Slurm already, each after the jobs of its inputs.

    With `dry_run` nothing is written; what would be submitted is returned.
    """
    submit = submit or sbatch
    if not dry_run:
        call("sbatch", "--version")  # before anything is written
    with contextlib.nullcontext() if dry_run else _alone(plan.runs):
        live = _live(plan)
        missing = plan.missing(step.label for step in plan.steps if step.folder in live)
        if missing:
            raise PlanError(*missing)
        jobs = {step.label: live[step.folder].id for step in plan.steps if step.folder in live}
        found: list[Submission] = []
        for step in plan.to_run:
            after = tuple(jobs[needed.label] for needed in step.inputs.values() if not needed.done)
            new = step.label not in jobs
            if new and dry_run:
                jobs[step.label] = step.label
            elif new:
                refuse_if_owned(step.folder)
                jobs[step.label] = _submit(step, plan, after, submit, found)
            found.append(Submission(step, jobs[step.label], new, after))
        return found


def _live(plan: Plan) -> dict[Path, Job]:
    """The steps' jobs that wait or run. One that is ending is waited for: what becomes of it decides."""
    until = time.time() + ENDING
    while True:
        live = live_jobs([step.folder for step in plan.steps if not step.done])
        ending = [job.id for job in live.values() if job.state == "COMPLETING"]
        if not ending:
            return live
        if time.time() > until:
            raise LaunchError(f"job {ending[0]} is still ending after {ENDING} s (squeue -j {ending[0]}); try again")
        time.sleep(1)


def _submit(step: Step, plan: Plan, after: Sequence[str], submit: Submit, before: list[Submission]) -> str:
    """Order, token, job, id: in this sequence, so that nothing that Slurm has taken can be forgotten."""
    write_order(step.folder, order_of(step, plan.cluster))
    record = JobRecord(uuid.uuid4().hex, plan.cluster.launcher, time.time(), log=str(step.folder / LOG))
    write_job(step.folder, record)
    try:
        record = submit(step, plan, after, record)
    except LaunchError as error:
        waiting = [one for one in before if one.new]
        stay = f"{len(waiting)} steps before it are queued and stay (python -m pipeline cancel ends them); "
        together = LaunchError(*error.problems, f"{stay if waiting else ''}the same command submits what is left")
        together.exit_code = error.exit_code
        raise together from error
    write_job(step.folder, record)
    assert record.id is not None
    return record.id


def sbatch(step: Step, plan: Plan, after: Sequence[str], record: JobRecord) -> JobRecord:
    """Write the step's batch script and submit it. LaunchError with Slurm's reason where it refuses."""
    path = step.folder / SCRIPT
    path.write_text(script(STAGES[step.stage], plan.cluster, step, sys.prefix), encoding="utf-8")
    done = call(*sbatch_line(path, after, record.token))
    if done.returncode:
        raise refused(step, plan, reason_of(done.stderr))
    number, cluster = submitted_as(done.stdout)
    return replace(record, id=number, cluster=cluster)


def sbatch_line(path: Path, after: Sequence[str], token: str) -> list[str]:
    waits = [f"--dependency=afterok:{':'.join(after)}"] if after else []
    return ["sbatch", "--parsable", *waits, f"--comment={token}", str(path)]


def refused(step: Step, plan: Plan, reason: str) -> LaunchError:
    """What Slurm said against a job; a user's mistake, unless Slurm itself could not be reached."""
    if "contact slurm controller" in reason or "Socket timed out" in reason:
        return LaunchError(f"{step.label}: Slurm cannot be reached: {reason}; try again when scontrol ping answers")
    asked = " ".join(resources(STAGES[step.stage], plan.cluster))
    error = LaunchError(
        f"{step.label}: Slurm refused the job: {reason}",
        f"it asked for {asked}",
        f"change configs/clusters/{plan.cluster.name}.yaml, or say cluster.slurm.partition=… cluster.gpus=… "
        "(sinfo -o '%P %G %c %m %l' shows what there is)",
    )
    error.exit_code = EXIT_MISTAKE
    return error


@contextlib.contextmanager
def _alone(runs: Path) -> Iterator[None]:
    """One submission at a time in a runs folder: a second one waits, and then finds the first one's jobs."""
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / ".submitting").open("w") as file:
        with contextlib.suppress(OSError):  # some network file systems lock nothing; the tokens still hold
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def show(submissions: list[Submission]) -> str:
    """One line a step: its job, and what it waits for."""
    width = max((len(one.step.label) for one in submissions), default=0)
    lines = []
    for one in submissions:
        waits = f"after {', '.join(one.after)}" if one.after else "can start"
        state = waits if one.new else "submitted before"
        lines.append(f"{one.step.label:<{width}}  job {one.job}  {state}")
    return "\n".join(lines)


def show_dry_run(submissions: list[Submission], plan: Plan) -> str:
    """Every script and the line that would submit it; a job that has no id yet is called by its step."""
    parts = []
    for one in submissions:
        if not one.new:
            parts.append(f"# {one.step.label}: with Slurm already, as job {one.job}\n")
            continue
        path = one.step.folder / SCRIPT
        text = script(STAGES[one.step.stage], plan.cluster, one.step, sys.prefix)
        parts.append(f"# ---- {path}\n{text}\n{shlex.join(sbatch_line(path, one.after, 'TOKEN'))}\n")
    return "\n".join(parts)


def main(argv: list[str]) -> int:
    cluster, problems = read_cluster(argv[0] if argv else "slurm")
    if cluster is None:
        raise RecipeError(*problems)
    if cluster.launcher == "local":
        raise RecipeError(f"cluster {cluster.name}: its launcher is local, so it has no batch scripts; name another")
    print("\n".join(str(path) for path in render(cluster, Path(argv[1]) if argv[1:] else FOLDER)))
    return 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
