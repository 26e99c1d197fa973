"""Queue the job of a step again that has saved: the last act of its batch script, before it ends with code 75.

    python -m pipeline.launchers.requeue runs/tiny/sft-1a2b3c4d5e      exit code 0: it is queued; 1: it is not

Slurm starts the same job again (`scontrol requeue`). Where it refuses (JobRequeue=0, preemption by cancelling), the
step gets a new job, and what waits for this one waits for the new one: before this one ends, because
`--kill-on-invalid-dep=yes` cancels what waits for a job that has failed. While the controller is away this process
waits for it. A job that somebody cancels is not queued again.
"""

from __future__ import annotations

import re
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

from pipeline.core.errors import EXIT_FAILURE, LaunchError, PlanError, run_main
from pipeline.core.slurm_client import (
    controller_answered,
    error_text,
    is_preempted,
    jobs_by_token,
    jobs_of_user,
    parse_submission,
    query_jobs,
    read_job,
    run_slurm,
    this_job,
    write_job,
)
from pipeline.launchers.slurm import exported, sbatch_line
from pipeline.workflow.artifact import SCRIPT
from pipeline.workflow.jobs import add_dependency
from pipeline.workflow.stage import read_spec

CONTROLLER_TIMEOUT = 600  # seconds to wait for a controller that does not answer; Slurm's time limit may be sooner
RETRY_DELAYS = (
    2.0,
    5.0,
    10.0,
    20.0,
    30.0,
)  # seconds between the tries; the first are short, because a time limit is near
REQUEUED = "pending execution"  # scontrol about a job that Slurm itself is queueing again


def requeue(job: str, folder: Path) -> None:
    """Queue this job or its successor. LaunchError where it cannot be, or where somebody is cancelling it."""
    reason = _same_job(job)
    if reason is not None:
        new = _successor(job, folder, reason)
        print(f"job {job} cannot be queued again ({reason}): job {new} resumes the step", flush=True)
        _hand_over(job, new)


def _same_job(job: str) -> str | None:
    """None where Slurm starts the job again; otherwise why it refuses."""
    known = query_jobs([job]).get(job)
    if known is None or not known.live:
        raise LaunchError(f"job {job} has ended")
    if known.state != "RUNNING" and not is_preempted(job):
        raise LaunchError(f"job {job} is being cancelled ({known.state}), so it is not queued again")
    done = run_slurm("scontrol", "requeue", job)
    said = error_text(done.stderr)
    if done.returncode == 0 or REQUEUED in said:
        return None
    if not controller_answered(said):
        raise ControllerUnreachable(said)
    return said


class ControllerUnreachable(LaunchError):
    """The controller does not answer."""


def _successor(job: str, folder: Path, reason: str) -> str:
    """Submit the step's batch script again, to start when this job has ended. Returns the new job's id."""
    record, script = read_job(folder), folder / SCRIPT
    if record is None or record.id not in (job, None) or not script.is_file():
        raise LaunchError(
            f"{folder}: saved, but Slurm does not queue job {job} again: {reason}. Fix: submit the same again"
        )
    taken = jobs_by_token([record.token]).get(record.token) if record.id is None else None
    if taken:  # by an earlier try, whose answer was lost
        write_job(folder, replace(record, id=taken.id))
        return taken.id
    new = replace(record, token=uuid.uuid4().hex, submitted=time.time(), id=None)
    write_job(folder, new)  # as with every submission: first the token, then the job, then its id
    env = exported(read_spec(folder).cluster.slurm)
    done = run_slurm(*sbatch_line(script, [job], new.token, "afterany"), env=env)
    said = error_text(done.stderr)
    if done.returncode and not controller_answered(said):
        raise ControllerUnreachable(said)
    if done.returncode:
        write_job(folder, replace(record, id=job))
        raise LaunchError(
            f"{folder}: saved, but Slurm does not queue job {job} again ({reason}), and refused a new one: {said}. "
            f"Fix: {record.command or 'run the same command again'}"
        )
    number, cluster = parse_submission(done.stdout)
    write_job(folder, replace(new, id=number, cluster=cluster or record.cluster))
    return number


def _hand_over(old: str, new: str) -> None:
    """Have this user's jobs that wait for the old job wait for the new one."""
    for job in jobs_of_user().values():
        waits = re.sub(r"\([^)]*\)", "", job.after)  # afterok:41(unfulfilled)
        changed = re.sub(rf"(?<=:){old}\b", new, waits)
        waits_for_it = job.state == "PENDING" and job.id != new and changed != waits
        if waits_for_it and not add_dependency(job, changed):
            print(f"job {job.id} waits for job {old} and could not be handed over to job {new}", file=sys.stderr)


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        raise PlanError("usage: python -m pipeline.launchers.requeue DIR, the folder of a step")
    job, folder = this_job(), Path(argv[0])
    if job is None:
        raise PlanError("SLURM_JOB_ID is not set: this queues the Slurm job again that it runs in")
    until, pauses = time.time() + CONTROLLER_TIMEOUT, iter(RETRY_DELAYS)
    while True:
        try:
            requeue(job, folder)
            return 0
        except LaunchError as error:
            if (
                not isinstance(error, ControllerUnreachable) and controller_answered(str(error))
            ) or time.time() > until:
                print("\n".join(error.problems), file=sys.stderr)
                return EXIT_FAILURE
            print(f"{error.problems[0]}; trying again", flush=True)
        time.sleep(next(pauses, RETRY_DELAYS[-1]))


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
