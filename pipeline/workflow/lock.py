"""The lock of a step's folder: `owner.json` names the one process that may write there.

    with lock(folder) as holder:       one process at a time; a dead holder is replaced, a live one is an ArtifactError
    ensure_unlocked(folder)            ArtifactError where a live process holds it
    holds_lock(folder, holder)         a zombie of an earlier attempt finds that it does not, and must not write

It works across the nodes of a cluster: a holder elsewhere is looked up in Slurm's queue.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.core import slurm_client as slurm
from pipeline.core.errors import ArtifactError
from pipeline.core.files import write_json
from pipeline.core.records import InvalidRecord, read_record
from pipeline.workflow.jobs import QueueSnapshot, is_live

OWNER = "owner.json"


@dataclass(frozen=True)
class LockHolder:
    """The process that may write into a step's folder; the content of `owner.json`."""

    token: str
    host: str
    pid: int
    started: float  # the process's start, in clock ticks since boot: a pid can be given again, this pair cannot
    since: float  # seconds since the epoch
    job: str | None  # a Slurm job id
    cluster: str | None = None  # the job's, where the site has several
    restart: int | None = None  # how often Slurm had started the job again; None: not recorded
    user: str | None = None
    retry: int = 0  # how often the job had started the step again by itself

    def __str__(self) -> str:
        who = f"Slurm job {self.job}" if self.job else f"process {self.pid}"
        who += f" of {self.user}" if self.user and self.user != slurm.this_user() else ""
        return f"{who} on {self.host} since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.since))}"


def _process_start(pid: int) -> float:
    """Start time of a live process in clock ticks since boot; 0 for none (Linux, /proc/PID/stat field 22)."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return 0.0 if state in "ZX" else float(rest[18])


def read_holder(folder: Path) -> LockHolder | None:
    """Read who writes into the folder: None without an owner file, InvalidRecord where the file cannot be used."""
    return read_record(folder / OWNER, LockHolder)


def is_alive(holder: LockHolder, jobs: QueueSnapshot | None = None) -> bool:
    """Return whether the holder still runs.

    A lock from the same Slurm job with a lower restart count belongs to an earlier attempt and is stale. On this host
    the process decides. For other hosts Slurm is queried (`jobs`: a recent answer); where that is impossible, the
    holder is assumed to be alive.
    """
    if holder.job and slurm.is_this_job(holder.job, holder.cluster):
        if holder.restart is None and holder.host != socket.gethostname():
            return False  # a record from before restarts were counted
        if holder.restart is not None and (holder.restart, holder.retry) < (slurm.this_restart(), slurm.this_retry()):
            return False
    same_site = not holder.cluster or not slurm.this_cluster() or holder.cluster == slurm.this_cluster()
    if holder.host == socket.gethostname() and same_site:
        return _process_start(holder.pid) == holder.started != 0.0
    if holder.job is None:
        return True
    if jobs is None:
        return is_live(holder.job, holder.cluster, holder.user, holder.since) is not False
    return jobs.is_live(holder.job, holder.cluster, holder.user, holder.since) is not False


def ensure_unlocked(folder: Path, jobs: QueueSnapshot | None = None) -> None:
    """Raise ArtifactError where a live process holds the folder's lock."""
    try:
        holder = read_holder(folder)
    except InvalidRecord as odd:
        raise ArtifactError(
            f"{odd}, so it is not known who writes there. Fix: if no process does (python -m pipeline status), "
            f"delete {odd.path}"
        ) from None
    if holder and is_alive(holder, jobs):
        raise ArtifactError(
            f"{folder} is being written by {holder}: wait for it (python -m pipeline status), or stop it first; "
            f"if it is surely gone, delete {folder / OWNER}"
        )


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[LockHolder]:
    """Lock the folder for this process: a stale lock is replaced, a live holder is an ArtifactError."""
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.getpid()
    token = f"{socket.gethostname()}-{pid}-{time.time_ns()}"
    job = slurm.this_job()
    holder = LockHolder(
        token,
        socket.gethostname(),
        pid,
        _process_start(pid),
        time.time(),
        job,
        slurm.this_cluster() if job else None,
        slurm.this_restart() if job else None,
        slurm.this_user(),
        slurm.this_retry() if job else 0,
    )
    path = folder / OWNER
    temporary = folder / f".{OWNER}.{token}"
    write_json(temporary, asdict(holder))
    try:
        while True:
            try:
                os.link(temporary, path)  # as exclusive as O_EXCL, and never seen half-written
                break
            except FileExistsError:
                ensure_unlocked(folder)
                path.unlink(missing_ok=True)
    finally:
        temporary.unlink(missing_ok=True)
    try:
        yield holder
    finally:
        if holds_lock(folder, holder):
            path.unlink(missing_ok=True)


def holds_lock(folder: Path, holder: LockHolder) -> bool:
    """Return whether `holder` still holds the lock: a zombie of an earlier attempt does not, and must not write."""
    try:
        current = read_holder(folder)
    except InvalidRecord as odd:
        if odd.problem.startswith("cannot be read"):
            raise
        return False
    return current is not None and current.token == holder.token
