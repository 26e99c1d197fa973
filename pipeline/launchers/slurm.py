"""Submit a plan to Slurm: one job per step, each depending on the jobs of its inputs.

    scripts/render       writes slurm/*.slurm (python -m pipeline.launchers.slurm [CLUSTER] [FOLDER])

The script submitted for a step and the committed script of its stage differ only in the step. Before sbatch is called,
the step's `job.json` holds a token that becomes the job's comment; the id is written after. So the same command
completes a chain whose submission was interrupted, and never submits a step twice. Slurm is queried once about all
steps, and once more after the submission, to replace jobs that Slurm has cancelled meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config.cluster import read_cluster
from pipeline.config.site import Slurm
from pipeline.core.errors import EXIT_USAGE, LaunchError, PlanError, RecipeError, run_main
from pipeline.core.records import record_or_none
from pipeline.core.slurm_client import (
    Job,
    JobRecord,
    controller_answered,
    current_cluster,
    error_text,
    parse_submission,
    query_jobs,
    read_job,
    remote_cluster,
    run_slurm,
    this_user,
    write_job,
)
from pipeline.launchers.batch_script import SCRIPTS, check_path, render, resources, script
from pipeline.workflow.artifact import LOG, SCRIPT
from pipeline.workflow.jobs import add_dependency, is_ours, live_jobs, query
from pipeline.workflow.lock import OWNER, LockHolder, ensure_unlocked
from pipeline.workflow.plan import Plan, Step, spec_of
from pipeline.workflow.stage import write_spec

ENDING_TIMEOUT = 60  # seconds to wait for a job that is completing
SUBMISSION_ROUNDS = 3  # rounds of submission, where Slurm cancels jobs meanwhile
SETTLE_SECONDS = 1.5  # seconds in which Slurm cancels the dependents of a failed job

# ---------------------------------------------------------------- the chain


@dataclass(frozen=True)
class Submission:
    """A step to run, and the job that runs it."""

    step: Step
    job: str  # its id; where nothing is submitted, the step's label
    new: bool  # submitted now, not by an earlier command
    after: tuple[str, ...]  # the jobs it waits for
    user: str | None = None  # whose job it is, where another user has submitted it


Submit = Callable[[Step, Plan, Sequence[str], JobRecord], JobRecord]


def run_plan(
    plan: Plan, submit: Submit | None = None, *, dry_run: bool = False, typed: str | None = None
) -> list[Submission]:
    """Submit every step that is neither done nor submitted already, each after the jobs of its inputs.

    Returns all steps to run with their jobs. With `dry_run` nothing is written or submitted. `typed` is the user's
    command line, recorded for the user who has to run it again.
    """
    submit = submit or sbatch
    check_path(plan.runs)
    if not dry_run:
        _refuse_unset(plan.cluster.slurm)
        run_slurm("sbatch", "--version")  # before anything is written
    with contextlib.nullcontext() if dry_run else submission_lock(plan.runs):
        new: set[str] = set()
        for _ in range(SUBMISSION_ROUNDS):
            live = _kept(plan, _live(plan))
            _refuse_other_cluster(plan, live)
            submissions = _submit_missing(plan, live, submit, dry_run=dry_run, typed=typed)
            new |= {submission.step.label for submission in submissions if submission.new}
            if dry_run or _as_submitted(submissions):
                break
        return [replace(submission, new=submission.step.label in new) for submission in submissions]


def _submit_missing(
    plan: Plan, live: dict[Path, Job], submit: Submit, *, dry_run: bool, typed: str | None
) -> list[Submission]:
    missing = plan.missing(step.label for step in plan.steps if step.folder in live)
    if missing:
        raise PlanError(*missing)
    jobs = {step.label: live[step.folder].id for step in plan.steps if step.folder in live}
    if not dry_run:
        _refuse_owned([step.folder for step in plan.to_run if step.label not in jobs])
    submissions: list[Submission] = []
    for step in plan.to_run:
        after = tuple(jobs[needed.label] for needed in step.inputs.values() if needed.label in jobs)
        job, new = live.get(step.folder), step.label not in jobs
        if (
            job
            and not dry_run
            and _waits_for_others(job, after, submissions)
            and not add_dependency(job, f"afterok:{':'.join(after)}")
        ):
            new = _is_pending_or_gone(job)  # Slurm has cancelled it, or is about to
        if new and dry_run:
            jobs[step.label] = step.label
        elif new:
            jobs[step.label] = _submit(step, plan, after, submit, submissions, typed)
        other = job.user if job and not new and job.user != this_user() else None
        submissions.append(Submission(step, jobs[step.label], new, after, other or None))
    return submissions


def _live(plan: Plan) -> dict[Path, Job]:
    """Return the steps' jobs that are pending or running. Waits for a completing job, because its result decides.

    A completion takes seconds, so the first queries follow sooner than SLURM_EVERY. There are at most six. Raises
    LaunchError after ENDING_TIMEOUT.
    """
    until, pause = time.time() + ENDING_TIMEOUT, 1.0
    while True:
        live = live_jobs([step.folder for step in plan.steps if not step.done])
        ending = [job.id for job in live.values() if job.state == "COMPLETING"]
        if not ending:
            return live
        if time.time() > until:
            raise LaunchError(
                f"job {ending[0]} is still completing after {ENDING_TIMEOUT} s (squeue -j {ending[0]}). Fix: try again"
            )
        time.sleep(pause)
        pause *= 2


def _kept(plan: Plan, live: dict[Path, Job]) -> dict[Path, Job]:
    """Return the live jobs without those that can never start: a job they depend on does not exist and will not."""
    coming = {step.label for step in plan.to_run}
    kept: dict[Path, Job] = {}
    for step in plan.steps:
        job = live.get(step.folder)
        inputs = step.inputs.values()
        lost = any(not needed.done and needed.folder not in kept and needed.label not in coming for needed in inputs)
        if job and not (lost and job.state == "PENDING"):
            kept[step.folder] = job
    return kept


def _waits_for_others(job: Job, after: Sequence[str], submissions: Sequence[Submission]) -> bool:
    """Return whether a pending job depends on jobs that are gone, instead of the present jobs of its inputs."""
    if job.state != "PENDING" or not after:
        return False
    waits = set(re.findall(r"\d+", job.after))
    renewed = any(submission.new and submission.job in after for submission in submissions)
    return renewed or bool(waits and not waits <= set(after))


def _is_pending_or_gone(job: Job) -> bool:
    now = query_jobs([job.id], job.cluster).get(job.id)
    return now is None or now.token != job.token or now.state == "PENDING" or not now.live


def _refuse_other_cluster(plan: Plan, live: dict[Path, Job]) -> None:
    """Raise PlanError where a job of these steps is on another cluster than the new jobs would be."""
    target = remote_cluster(plan.cluster.slurm.clusters)
    others = [(folder, job) for folder, job in live.items() if remote_cluster(job.cluster) != target]
    if others:
        raise PlanError(
            *(
                f"{folder}: got job {job.id} ({job.state}) on cluster {job.cluster or current_cluster()}; expected no "
                "job on another cluster, because a job cannot depend on a job of another cluster"
                for folder, job in others
            ),
            "Fix: wait for it (python -m pipeline status), or end it: python -m pipeline cancel",
        )


def _refuse_owned(folders: Sequence[Path]) -> None:
    """Raise ArtifactError where a live process holds the lock of a folder. Queries Slurm once about all holders."""
    owners = [owner for folder in folders if (owner := record_or_none(folder / OWNER, LockHolder)) and owner.job]
    answers = query((), [(str(owner.job), owner.cluster) for owner in owners])
    for folder in folders:
        ensure_unlocked(folder, answers)


def _as_submitted(submissions: Sequence[Submission]) -> bool:
    """Return whether Slurm has cancelled no job of the chain. Queries Slurm once about all of them.

    An earlier job may have ended between the first query and the submission. Slurm then cancels its dependents within
    a second. A job whose comment the site has replaced is from now on identified by user, name and time.
    """
    if len({submission.new for submission in submissions}) > 1:  # new jobs that may depend on earlier ones
        time.sleep(SETTLE_SECONDS)
    folders = [submission.step.folder for submission in submissions]
    records = {folder: record for folder in folders if (record := read_job(folder))}
    answers = query(records.values())
    if answers.unreachable:  # the jobs were just submitted: the next command queries again
        return True
    for folder, record in records.items():
        job = answers.jobs.get((remote_cluster(record.cluster), record.id or ""))
        if job and not job.from_accounting and record.marked and job.token != record.token:
            unmarked = replace(record, marked=False)
            if is_ours(job, unmarked):
                write_job(folder, unmarked)
    jobs = [answers.job_of(read_job(folder) or record) for folder, record in records.items()]
    return not any(job and job.state == "CANCELLED" for job in jobs)


def _submit(
    step: Step, plan: Plan, after: Sequence[str], submit: Submit, before: list[Submission], typed: str | None
) -> str:
    """Write the spec and the token, submit, write the id. In this order, no job that Slurm has accepted is lost."""
    write_spec(step.folder, spec_of(step, plan.cluster))
    record = JobRecord(
        uuid.uuid4().hex,
        plan.cluster.launcher,
        time.time(),
        log=str(step.folder / LOG),
        cluster=plan.cluster.slurm.clusters or current_cluster(),
        user=this_user(),
        name=step.label,
        command=typed,
    )
    write_job(step.folder, record)
    try:
        submitted = submit(step, plan, after, record)
    except LaunchError as error:
        queued = sum(submission.new for submission in before)
        stay = f"{queued} steps before it stay queued (python -m pipeline cancel ends them); " if queued else ""
        combined = LaunchError(*error.problems, f"{stay}the same command submits the remaining steps")
        combined.exit_code = error.exit_code
        raise combined from error
    record = replace(submitted, cluster=submitted.cluster or record.cluster)
    write_job(step.folder, record)
    assert record.id is not None
    return record.id


def sbatch(step: Step, plan: Plan, after: Sequence[str], record: JobRecord) -> JobRecord:
    """Write the step's batch script and submit it. Returns the record with the id. Raises LaunchError if refused."""
    path = step.folder / SCRIPT
    path.write_text(script(step.runs_as, plan.cluster, step, sys.prefix), encoding="utf-8")
    done = run_slurm(*sbatch_line(path, after, record.token), env=exported(plan.cluster.slurm))
    if done.returncode:
        raise submission_error(step, plan, error_text(done.stderr))
    number, cluster = parse_submission(done.stdout)
    return replace(record, id=number, cluster=cluster)


def exported(slurm: Slurm) -> dict[str, str]:
    """Return SBATCH_EXPORT for sbatch, so that `pass_environment` reaches the job even with --export=NONE; else {}.

    Only Slurm stores the values, as it stores the whole environment by default.
    """
    options = [option.partition("=")[2] for option in slurm.extra_sbatch_args if option.startswith("--export=")]
    export = os.environ.get("SBATCH_EXPORT") or (options or ["ALL"])[-1]
    if not slurm.pass_environment or "ALL" in export.upper().split(","):
        return {}
    named = [] if export.upper() in ("NONE", "NIL") else [export]
    return {"SBATCH_EXPORT": ",".join([*named, *slurm.pass_environment])}


def _refuse_unset(slurm: Slurm) -> None:
    if unset := [name for name in slurm.pass_environment if name not in os.environ]:
        raise PlanError(
            *(
                f"cluster.slurm.pass_environment: got {name}; expected a variable of this shell. Fix: export {name}=…"
                for name in unset
            )
        )


def sbatch_line(path: Path, after: Sequence[str], token: str, kind: str = "afterok") -> list[str]:
    """Return the sbatch command that submits a script after other jobs."""
    waits = [f"--dependency={kind}:{':'.join(after)}"] if after else []
    return ["sbatch", "--parsable", *waits, f"--comment={token}", str(path)]


def submission_error(step: Step, plan: Plan, reason: str) -> LaunchError:
    """Return the error for a job that Slurm refused (exit code 2), or for a Slurm that cannot be reached (1)."""
    if not controller_answered(reason):
        return LaunchError(
            f"{step.label}: Slurm cannot be reached: {reason}. Fix: try again when scontrol ping answers"
        )
    requested = " ".join(resources(step.runs_as, plan.cluster))
    error = LaunchError(
        f"{step.label}: Slurm refused the job: {reason}",
        f"the job requested {requested}",
        f"Fix: edit configs/clusters/{plan.cluster.name}.yaml, or set cluster.slurm.partition=… cluster.gpus=… "
        "(sinfo -o '%P %G %c %m %l' lists the partitions and their limits)",
    )
    error.exit_code = EXIT_USAGE
    return error


@contextlib.contextmanager
def submission_lock(runs: Path) -> Iterator[None]:
    """Hold the lock of a runs folder: a second submission waits, and then finds the jobs of the first."""
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / ".submitting").open("w") as file:
        with contextlib.suppress(OSError):  # some network file systems cannot lock; the tokens still prevent duplicates
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def submissions_table(submissions: list[Submission]) -> str:
    """Return one line per step: its job, and the jobs it waits for."""
    width = max((len(submission.step.label) for submission in submissions), default=0)
    lines = []
    for submission in submissions:
        waits = f"after {', '.join(submission.after)}" if submission.after else "can start"
        earlier = f"submitted before{f' by {submission.user}' if submission.user else ''}"
        state = waits if submission.new else earlier
        lines.append(f"{submission.step.label:<{width}}  job {submission.job}  {state}")
    return "\n".join(lines)


def dry_run_text(submissions: list[Submission], plan: Plan) -> str:
    """Return every script with its sbatch command. The step's label stands for the id that a new job will get."""
    parts = []
    for submission in submissions:
        step = submission.step
        if not submission.new:
            parts.append(f"# {step.label}: submitted before, as job {submission.job}\n")
            continue
        path = step.folder / SCRIPT
        text = script(step.runs_as, plan.cluster, step, sys.prefix)
        parts.append(f"# ---- {path}\n{text}\n{shlex.join(sbatch_line(path, submission.after, 'TOKEN'))}\n")
    return "\n".join(parts)


def main(argv: list[str]) -> int:
    cluster, problems = read_cluster(argv[0] if argv else "slurm")
    if cluster is None:
        raise RecipeError(*problems)
    if not cluster.submits:
        raise RecipeError(
            f"cluster {cluster.name}: got launcher {cluster.launcher}; expected slurm or submitit, whose jobs have "
            "batch scripts. Fix: name another cluster"
        )
    print("\n".join(str(path) for path in render(cluster, Path(argv[1]) if argv[1:] else SCRIPTS)))
    return 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
