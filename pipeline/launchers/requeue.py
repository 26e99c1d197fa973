"""Requeue the job of a step that has saved. A batch script runs this last, before it ends with code 75.

    python -m pipeline.launchers.requeue runs/tiny/sft-1a2b3c4d5e      exit code 0: requeued; 1: not

Slurm restarts the same job (`scontrol requeue`). Where Slurm refuses (JobRequeue=0, preemption by cancelling), the step
gets a new job, and the dependents of this job are moved to the new one. That happens before this job ends, because
`--kill-on-invalid-dep=yes` cancels the dependents of a failed job. While the controller is unreachable, this process
waits for it. A job that is being cancelled is not requeued. Each part can be repeated: a successor that was submitted
before, or whose submission was not answered, is found by its token.
"""

from __future__ import annotations

import re
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

from pipeline.core.errors import EXIT_FAILURE, LaunchError, MissingDependency, PlanError, run_main
from pipeline.core.slurm_client import (
    Job,
    cluster_option,
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
from pipeline.workflow.jobs import live_jobs
from pipeline.workflow.stage import read_spec

CONTROLLER_TIMEOUT = 600  # seconds to wait for a controller that does not answer; Slurm's time limit may be sooner
RETRY_DELAYS = (2.0, 5.0, 10.0, 20.0, 30.0)  # seconds between attempts; short at first, because a time limit is near
REQUEUED_STATES = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD")
REQUEUED = "pending execution"  # scontrol's message for a job that Slurm itself is requeueing


def requeue(job: str, folder: Path, *, again: bool = False) -> None:
    """Requeue this job, or submit its successor. Raises LaunchError where both fail or the job is being cancelled.

    `again`: this was tried before, and the answer did not arrive; Slurm may have acted all the same.
    """
    reason = _same_job(job, again=again)
    if reason is not None:
        new = _successor(job, folder, reason)
        print(f"job {job} cannot be requeued ({reason}); job {new} resumes the step", flush=True)
        _hand_over(job, new)


def _same_job(job: str, *, again: bool) -> str | None:
    """Requeue the job itself. Returns None where Slurm accepts, otherwise its reason to refuse."""
    known = query_jobs([job]).get(job)
    if known is None or not known.live:
        raise LaunchError(f"job {job} has ended")
    if again and known.state in REQUEUED_STATES:
        return None
    if known.state != "RUNNING" and not is_preempted(job):
        raise LaunchError(f"job {job} is being cancelled ({known.state}), so it is not requeued")
    try:
        done = run_slurm("scontrol", "requeue", job)
    except MissingDependency as error:  # of the nodes; sbatch may be there
        return error.problems[0].partition(". Fix:")[0]
    message = error_text(done.stderr)
    if done.returncode == 0 or REQUEUED in message:
        return None
    if not controller_answered(message):
        raise ControllerUnreachable(message)
    return message


class ControllerUnreachable(LaunchError):
    """The controller does not answer."""


def _successor(job: str, folder: Path, reason: str) -> str:
    """Submit the step's batch script as a new job that starts when this one has ended. Returns its id."""
    record, script = read_job(folder), folder / SCRIPT
    if record and record.id not in (job, None) and live_jobs([folder]):
        return str(record.id)  # submitted before, and not all that waits has been handed over to it
    if record is None or record.id not in (job, None) or not script.is_file():
        raise LaunchError(
            f"{folder}: saved, but Slurm does not requeue job {job}: {reason}. Fix: run the same command again"
        )
    submitted = jobs_by_token([record.token]).get(record.token) if record.id is None else None
    if submitted:  # by an earlier attempt, whose answer was lost
        write_job(folder, replace(record, id=submitted.id))
        return submitted.id
    new = replace(record, token=uuid.uuid4().hex, submitted=time.time(), id=None)
    write_job(folder, new)  # as for every submission: first the token, then the job, then its id
    env = exported(read_spec(folder).cluster.slurm)
    done = run_slurm(*sbatch_line(script, [job], new.token, "afterany"), env=env)
    message = error_text(done.stderr)
    if done.returncode and not controller_answered(message):
        raise ControllerUnreachable(message)
    if done.returncode:
        write_job(folder, replace(record, id=job))
        raise LaunchError(
            f"{folder}: saved, but Slurm does not requeue job {job} ({reason}), and refused a new one: {message}. "
            f"Fix: {record.command or 'run the same command again'}"
        )
    number, cluster = parse_submission(done.stdout)
    write_job(folder, replace(new, id=number, cluster=cluster or record.cluster))
    return number


def _hand_over(old: str, new: str) -> None:
    """Move the dependencies of this user's jobs from the old job to the new one."""
    for job in jobs_of_user().values():
        waits = re.sub(r"\([^)]*\)", "", job.after)  # afterok:41(unfulfilled)
        changed = re.sub(rf"(?<=:){old}\b", new, waits)
        waits_for_it = job.state == "PENDING" and job.id != new and changed != waits
        if waits_for_it and (problem := _move(job, changed)):
            print(f"job {job.id}: its dependency on job {old} is not moved to job {new}: {problem}", file=sys.stderr)


def _move(job: Job, after: str) -> str | None:
    """Give a queued job other jobs to wait for. Returns Slurm's reason to refuse; raises ControllerUnreachable."""
    done = run_slurm("scontrol", *cluster_option(job.cluster), "update", f"JobId={job.id}", f"Dependency={after}")
    message = error_text(done.stderr)
    if done.returncode and not controller_answered(message):
        raise ControllerUnreachable(message)
    return message if done.returncode else None


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        raise PlanError("usage: python -m pipeline.launchers.requeue DIR, where DIR is the folder of a step")
    job, folder = this_job(), Path(argv[0])
    if job is None:
        raise PlanError("SLURM_JOB_ID: not set; expected the id of the job to requeue. Fix: run this in a Slurm job")
    until, pauses, again = time.time() + CONTROLLER_TIMEOUT, iter(RETRY_DELAYS), False
    while True:
        try:
            requeue(job, folder, again=again)
            return 0
        except LaunchError as error:
            if (
                not isinstance(error, ControllerUnreachable) and controller_answered(str(error))
            ) or time.time() > until:
                print("\n".join(error.problems), file=sys.stderr)
                return EXIT_FAILURE
            print(f"{error.problems[0]}; trying again", flush=True)
        again = True
        time.sleep(next(pauses, RETRY_DELAYS[-1]))


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
