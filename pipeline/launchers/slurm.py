"""Submit a plan to Slurm: one job a step, each waiting for its inputs. And the batch scripts, from one renderer.

    scripts/render       writes slurm/*.slurm (python -m pipeline.launchers.slurm [CLUSTER] [FOLDER])

The script that the launcher submits for a step and the committed one of its stage differ in one thing: which step it
is. Before sbatch is called, the step's `job.json` holds a token that goes with the job as its comment; the id is
written after. So a chain whose submission was cut off is completed by the same command, and never doubled. Slurm is
queried once about all steps, and once more after the submission: a job that it cancelled meanwhile is replaced.
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
from pipeline.workflow.stage import STAGES, write_spec

ENDING_TIMEOUT = 60  # seconds to wait for a job that is ending
SUBMISSION_ROUNDS = 3  # of submission, where Slurm cancels jobs meanwhile
SETTLE_SECONDS = 1.5  # seconds in which Slurm cancels what waits for a job that has failed

# ---------------------------------------------------------------- the chain


@dataclass(frozen=True)
class Submission:
    """A step that is to run, and the job that runs it."""

    step: Step
    job: str  # its id; where nothing is submitted, the step's label
    new: bool  # submitted now, not by an earlier command
    after: tuple[str, ...]  # the jobs it waits for
    user: str | None = None  # whose job it is, where another user has submitted it


Submit = Callable[[Step, Plan, Sequence[str], JobRecord], JobRecord]


def run_plan(
    plan: Plan, submit: Submit | None = None, *, dry_run: bool = False, typed: str | None = None
) -> list[Submission]:
    """Submit every step that is neither done nor with Slurm already, each after the jobs of its inputs.

    With `dry_run` nothing is written; what would be submitted is returned. `typed` is the user's command, for whoever
    has to run it again.
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
            found = _submit_missing(plan, live, submit, dry_run=dry_run, typed=typed)
            new |= {one.step.label for one in found if one.new}
            if dry_run or _as_submitted(found):
                break
        return [replace(one, new=one.step.label in new) for one in found]


def _submit_missing(
    plan: Plan, live: dict[Path, Job], submit: Submit, *, dry_run: bool, typed: str | None
) -> list[Submission]:
    missing = plan.missing(step.label for step in plan.steps if step.folder in live)
    if missing:
        raise PlanError(*missing)
    jobs = {step.label: live[step.folder].id for step in plan.steps if step.folder in live}
    if not dry_run:
        _refuse_owned([step.folder for step in plan.to_run if step.label not in jobs])
    found: list[Submission] = []
    for step in plan.to_run:
        after = tuple(jobs[needed.label] for needed in step.inputs.values() if needed.label in jobs)
        job, new = live.get(step.folder), step.label not in jobs
        if (
            job
            and not dry_run
            and _waits_for_others(job, after, found)
            and not add_dependency(job, f"afterok:{':'.join(after)}")
        ):
            new = _is_waiting_or_gone(job)  # Slurm has cancelled it, or is about to
        if new and dry_run:
            jobs[step.label] = step.label
        elif new:
            jobs[step.label] = _submit(step, plan, after, submit, found, typed)
        other = job.user if job and not new and job.user != this_user() else None
        found.append(Submission(step, jobs[step.label], new, after, other or None))
    return found


def _live(plan: Plan) -> dict[Path, Job]:
    """The steps' jobs that wait or run. One that is ending is waited for: what becomes of it decides.

    An end takes seconds, so the first questions come sooner than SLURM_EVERY; there are at most six.
    """
    until, pause = time.time() + ENDING_TIMEOUT, 1.0
    while True:
        live = live_jobs([step.folder for step in plan.steps if not step.done])
        ending = [job.id for job in live.values() if job.state == "COMPLETING"]
        if not ending:
            return live
        if time.time() > until:
            raise LaunchError(
                f"job {ending[0]} is still ending after {ENDING_TIMEOUT} s (squeue -j {ending[0]}); try again"
            )
        time.sleep(pause)
        pause *= 2


def _kept(plan: Plan, live: dict[Path, Job]) -> dict[Path, Job]:
    """The live jobs without those that can never start: what they wait for has no job, and gets none now."""
    coming = {step.label for step in plan.to_run}
    kept: dict[Path, Job] = {}
    for step in plan.steps:
        job = live.get(step.folder)
        lost = [
            one for one in step.inputs.values() if not one.done and one.folder not in kept and one.label not in coming
        ]
        if job and not (lost and job.state == "PENDING"):
            kept[step.folder] = job
    return kept


def _waits_for_others(job: Job, after: Sequence[str], found: Sequence[Submission]) -> bool:
    """Whether a queued job waits for jobs that are gone, instead of those that run its inputs now."""
    if job.state != "PENDING" or not after:
        return False
    waits = set(re.findall(r"\d+", job.after))
    return any(one.new and one.job in after for one in found) or bool(waits and not waits <= set(after))


def _is_waiting_or_gone(job: Job) -> bool:
    now = query_jobs([job.id], job.cluster).get(job.id)
    return now is None or now.token != job.token or now.state == "PENDING" or not now.live


def _refuse_other_cluster(plan: Plan, live: dict[Path, Job]) -> None:
    """PlanError where a job of these steps lives on another cluster than the new ones would."""
    target = remote_cluster(plan.cluster.slurm.clusters)
    others = [(folder, job) for folder, job in live.items() if remote_cluster(job.cluster) != target]
    if others:
        raise PlanError(
            *(
                f"{folder} is with Slurm on cluster {job.cluster or current_cluster()}, as job {job.id} ({job.state}); "
                "expected none on another cluster, because a job cannot wait for another cluster's"
                for folder, job in others
            ),
            "wait for it (python -m pipeline status), or end it with python -m pipeline cancel",
        )


def _refuse_owned(folders: Sequence[Path]) -> None:
    """ArtifactError where a live process owns one of them; Slurm is queried once about all owners."""
    owners = [owner for folder in folders if (owner := record_or_none(folder / OWNER, LockHolder)) and owner.job]
    answers = query((), [(str(owner.job), owner.cluster) for owner in owners])
    for folder in folders:
        ensure_unlocked(folder, answers)


def _as_submitted(found: Sequence[Submission]) -> bool:
    """Whether every job of the chain is still there. One question to Slurm about all of them.

    A job that was there before may have ended between the first question and the submission, and Slurm cancels what
    waits for it within a second. A job without our comment is known by user, name and time from now on.
    """
    if len({one.new for one in found}) > 1:  # new jobs and old ones
        time.sleep(SETTLE_SECONDS)
    records = {one.step.folder: record for one in found if (record := read_job(one.step.folder))}
    answers = query(records.values())
    if answers.unreachable:  # they were submitted a moment ago: the next command looks again
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
    """Order, token, job, id: in this sequence, so that nothing that Slurm has taken can be forgotten."""
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
        taken = submit(step, plan, after, record)
    except LaunchError as error:
        waiting = [one for one in before if one.new]
        stay = f"{len(waiting)} steps before it are queued and stay (python -m pipeline cancel ends them); "
        together = LaunchError(*error.problems, f"{stay if waiting else ''}the same command submits what is left")
        together.exit_code = error.exit_code
        raise together from error
    record = replace(taken, cluster=taken.cluster or record.cluster)
    write_job(step.folder, record)
    assert record.id is not None
    return record.id


def sbatch(step: Step, plan: Plan, after: Sequence[str], record: JobRecord) -> JobRecord:
    """Write the step's batch script and submit it. LaunchError with Slurm's reason where it refuses."""
    path = step.folder / SCRIPT
    path.write_text(script(STAGES[step.stage], plan.cluster, step, sys.prefix), encoding="utf-8")
    done = run_slurm(*sbatch_line(path, after, record.token), env=exported(plan.cluster.slurm))
    if done.returncode:
        raise submission_error(step, plan, error_text(done.stderr))
    number, cluster = parse_submission(done.stdout)
    return replace(record, id=number, cluster=cluster)


def exported(slurm: Slurm) -> dict[str, str]:
    """For the environment of sbatch: `pass_environment` goes with the job, whatever else of the shell does.

    The values are in Slurm's own keeping, as is all of the environment where nobody asks for less (--export=NONE).
    """
    options = [option.partition("=")[2] for option in slurm.extra_sbatch_args if option.startswith("--export=")]
    wish = os.environ.get("SBATCH_EXPORT") or (options or ["ALL"])[-1]
    if not slurm.pass_environment or "ALL" in wish.upper().split(","):
        return {}
    named = [] if wish.upper() in ("NONE", "NIL") else [wish]
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
    waits = [f"--dependency={kind}:{':'.join(after)}"] if after else []
    return ["sbatch", "--parsable", *waits, f"--comment={token}", str(path)]


def submission_error(step: Step, plan: Plan, reason: str) -> LaunchError:
    """What Slurm said against a job; a user's mistake, unless Slurm itself could not be reached."""
    if not controller_answered(reason):
        return LaunchError(f"{step.label}: Slurm cannot be reached: {reason}; try again when scontrol ping answers")
    asked = " ".join(resources(STAGES[step.stage], plan.cluster))
    error = LaunchError(
        f"{step.label}: Slurm refused the job: {reason}",
        f"it asked for {asked}",
        f"change configs/clusters/{plan.cluster.name}.yaml, or say cluster.slurm.partition=… cluster.gpus=… "
        "(sinfo -o '%P %G %c %m %l' shows what there is)",
    )
    error.exit_code = EXIT_USAGE
    return error


@contextlib.contextmanager
def submission_lock(runs: Path) -> Iterator[None]:
    """One submission at a time in a runs folder: a second one waits, and then finds the first one's jobs."""
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / ".submitting").open("w") as file:
        with contextlib.suppress(OSError):  # some network file systems lock nothing; the tokens still hold
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def submissions_table(submissions: list[Submission]) -> str:
    """One line a step: its job, and what it waits for."""
    width = max((len(one.step.label) for one in submissions), default=0)
    lines = []
    for one in submissions:
        waits = f"after {', '.join(one.after)}" if one.after else "can start"
        state = waits if one.new else f"submitted before{f' by {one.user}' if one.user else ''}"
        lines.append(f"{one.step.label:<{width}}  job {one.job}  {state}")
    return "\n".join(lines)


def dry_run_text(submissions: list[Submission], plan: Plan) -> str:
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
    if not cluster.submits:
        raise RecipeError(
            f"cluster {cluster.name}: its launcher is {cluster.launcher}, so it has no batch scripts; name another"
        )
    print("\n".join(str(path) for path in render(cluster, Path(argv[1]) if argv[1:] else SCRIPTS)))
    return 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
