"""The jobs of steps: which of Slurm's jobs are ours, and one question about all of them.

    answers = query(records)          one call of squeue and one of sacct for each cluster
    answers.job_of(record)            the job of a step, if it is ours: an id that Slurm gave again is not
    live_jobs(folders)                raises where Slurm cannot be queried
    make_wait(job, "afterok:43")      a queued job waits for other jobs from now on

Nothing here submits anything; that is launchers/slurm.py.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.core.errors import LaunchError, MissingDependency, PlanError
from pipeline.core.records import InvalidRecord
from pipeline.core.slurm_client import (
    Job,
    JobRecord,
    cluster_option,
    is_installed,
    jobs_by_token,
    query_jobs,
    read_job,
    remote_cluster,
    run_slurm,
    this_cluster,
    this_user,
    write_job,
)

CLOCK_SKEW = 300  # seconds by which the clocks of two machines may differ


def is_live(
    number: str, cluster: str | None = None, user: str | None = None, since: float | None = None
) -> bool | None:
    """Return whether a job may still do something; None where Slurm cannot be queried.

    `user` and `since` (when it was seen to run) tell it from a later job that was given the same id.
    """
    return query((), [(number, cluster)]).is_live(number, cluster, user, since)


def is_ours(job: Job, record: JobRecord) -> bool:
    """Return whether this is the job of that record, and not a later one with the same id.

    The token in its comment decides. Without one (a site that replaces comments, accounting that keeps none) user,
    name and time of submission have to fit. A requeued job's time is that of its last requeue.
    """
    if record.token and record.marked and not job.from_accounting:
        return job.token == record.token
    if record.user and job.user and record.user != job.user:
        return False
    if record.name and job.name and record.name != job.name:
        return False
    if job.submitted is None:
        return True
    if record.name and job.submitted < record.submitted - CLOCK_SKEW:
        return False
    return job.submitted <= record.submitted + CLOCK_SKEW or job.restarts > 0 or job.from_accounting


@dataclass(frozen=True)
class QueueSnapshot:
    """Slurm's queue at one moment, and the clusters that could not be queried."""

    jobs: Mapping[tuple[str | None, str], Job] = field(default_factory=dict)  # by cluster and id
    by_token: Mapping[str, Job] = field(default_factory=dict)
    unreachable: Mapping[str | None, tuple[str, ...]] = field(default_factory=dict)  # cluster -> why
    at: float = 0.0  # seconds since the epoch

    def job_of(self, record: JobRecord) -> Job | None:
        """The job of a step; None where Slurm does not know it, or has given its id to another one."""
        if record.id is None:
            return self.by_token.get(record.token)
        job = self.jobs.get((remote_cluster(record.cluster), record.id))
        return job if job and is_ours(job, record) else None

    def is_live(self, number: str, cluster: str | None, user: str | None, since: float | None) -> bool | None:
        """As the function of this name."""
        if remote_cluster(cluster) in self.unreachable:
            return None
        job = self.jobs.get((remote_cluster(cluster), number))
        if job is None or not job.live or (user and job.user and user != job.user):
            return False
        return since is None or job.submitted is None or job.submitted <= since + CLOCK_SKEW or job.restarts > 0

    def is_reachable(self, cluster: str | None) -> bool:
        return remote_cluster(cluster) not in self.unreachable

    @property
    def problems(self) -> list[str]:
        return [problem for why in self.unreachable.values() for problem in why]


def query(records: Iterable[JobRecord], more: Iterable[tuple[str, str | None]] = ()) -> QueueSnapshot:
    """Query Slurm about these jobs at once, `more` by id and cluster. Never raises: see `QueueSnapshot.unreachable`."""
    ids: dict[str | None, set[str]] = {}
    tokens: dict[str | None, set[str]] = {}
    for record in records:
        if record.id:
            ids.setdefault(remote_cluster(record.cluster), set()).add(record.id)
        else:
            tokens.setdefault(remote_cluster(record.cluster), set()).add(record.token)
    for number, cluster in more:
        ids.setdefault(remote_cluster(cluster), set()).add(number)
    jobs: dict[tuple[str | None, str], Job] = {}
    by_token: dict[str, Job] = {}
    unreachable: dict[str | None, tuple[str, ...]] = {}
    for cluster in {*ids, *tokens}:
        try:
            jobs |= {(cluster, number): job for number, job in query_jobs(ids.get(cluster, ()), cluster).items()}
            by_token |= jobs_by_token(tokens.get(cluster, ()), cluster)
        except (LaunchError, MissingDependency) as error:
            unreachable[cluster] = error.problems
    return QueueSnapshot(jobs, by_token, unreachable, time.time())


def live_jobs(folders: Iterable[Path]) -> dict[Path, Job]:
    """Return the live jobs of these steps, each really queried.

    A job that Slurm took while its submission was cut off is found by its token, and its id is written down.
    LaunchError where one cannot be queried, because it may still run.
    """
    records, odd = {}, []
    for folder in folders:
        try:
            records[folder] = read_job(folder)
        except InvalidRecord as error:
            odd.append(
                f"{error}, so it is not known whether a job runs this step. Fix: if squeue --me shows none, "
                f"delete {error.path}"
            )
    if odd:
        raise PlanError(*odd)
    given = {folder: record for folder, record in records.items() if record}
    answers = query(given.values())
    if answers.problems:
        error_ = MissingDependency if not is_installed() else LaunchError
        raise error_(*answers.problems)
    found = {}
    for folder, record in given.items():
        job = answers.job_of(record)
        if job and job.live:
            found[folder] = job
            if record.id is None:
                write_job(folder, replace(record, id=job.id))
    return found


def describe_job(folder: Path, job: Job) -> str:
    """`FOLDER is with Slurm, as job 41 of anna (RUNNING)`; the user where it is another one."""
    whose = f" of {job.user}" if job.user and job.user != this_user() else ""
    return f"{folder} is with Slurm, as job {job.id}{whose} ({job.state})"


def add_dependency(job: Job, after: str) -> bool:
    """Give a queued job another dependency, such as afterok:43. Whether Slurm accepts it; not for an ended one."""
    words = ["scontrol", *cluster_option(job.cluster), "update", f"JobId={job.id}", f"Dependency={after}"]
    return run_slurm(*words).returncode == 0


def record_job(folders: Iterable[Path], job: str) -> None:
    """Record that this job runs these steps; PlanError where another job is to run one of them."""
    folders = list(folders)
    others = [(folder, other) for folder, other in live_jobs(folders).items() if other.id != job]
    if others:
        taken = [describe_job(folder, other) for folder, other in others]
        raise PlanError(*taken, "wait for it (python -m pipeline status), or end it with python -m pipeline cancel")
    if not folders:
        return
    token = uuid.uuid4().hex
    run_slurm("scontrol", "update", f"JobId={job}", f"Comment={token}")
    shown = run_slurm("scontrol", "show", "job", "--oneliner", job).stdout
    log = re.search(r"StdOut=(\S+)", shown)
    marked = f"Comment={token}" in shown
    record = JobRecord(token, "slurm", time.time(), job, log.group(1) if log else None, this_cluster(), this_user())
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        write_job(folder, replace(record, marked=marked))
