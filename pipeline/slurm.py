"""What Slurm says of jobs, with accounting or without; and the record of the job that a step was given to.

    jobs = ask(["41", "42"])          one call of squeue for all, one of sacct for those it no longer knows
    record = read_job(folder)         job.json of a step: a token written before sbatch, the id after

Nothing here submits anything; that is launchers/slurm.py.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.errors import LaunchError, MissingDependency, PlanError
from pipeline.files import read_json, write_json

JOB = "job.json"
TIMEOUT = 60  # seconds that a command of Slurm's may take
ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
FIELDS = ("JobID", "State", "NodeList", "TimeUsed", "TimeLimit", "Reason", "exit_code", "RestartCnt", "Comment")


@dataclass(frozen=True)
class Job:
    """A job as Slurm tells it. `state` is Slurm's word: PENDING, RUNNING, COMPLETED, …"""

    id: str
    state: str
    node: str = ""
    elapsed: str = ""
    limit: str = ""
    reason: str = ""
    exit_code: str = ""
    restarts: int = 0
    token: str = ""

    @property
    def live(self) -> bool:
        """Whether it waits, runs or ends: whether it may still do something."""
        return self.state not in ENDED


def is_here() -> bool:
    """Whether this machine can ask a Slurm."""
    return shutil.which("squeue") is not None


def call(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm's; MissingDependency where it is not installed."""
    if shutil.which(command[0]) is None:
        raise MissingDependency(
            f"{command[0]}: no such program on this machine; go to a login node of the cluster "
            "(or load its Slurm module), or run here with --launcher local"
        )
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"{command[0]} gave no answer in {TIMEOUT} s: the controller is busy or down (scontrol ping); try again"
        ) from error


def ask(ids: Iterable[str]) -> dict[str, Job]:
    """The jobs of these ids that Slurm knows: by squeue, and what has ended by sacct too where there is one."""
    wanted = sorted(set(ids))
    if not wanted:
        return {}
    found = _squeue("--jobs", ",".join(wanted))
    over = [number for number in wanted if number not in found or not found[number].live]
    return {**found, **_sacct(over, found)}


def find(tokens: Iterable[str]) -> dict[str, Job]:
    """This user's jobs by the token they were submitted with."""
    wanted = set(tokens)
    mine = _squeue("--user", getpass.getuser()) if wanted else {}
    return {job.token: job for job in mine.values() if job.token in wanted}


def _squeue(*which: str) -> dict[str, Job]:
    done = call("squeue", "--noheader", "--states=all", *which, "--Format", ",".join(f"{name}:|" for name in FIELDS))
    if done.returncode and "Invalid job id" not in done.stderr:  # one unknown id is an error, several are not
        raise LaunchError(f"squeue cannot be asked: {_last_line(done.stderr)}; try again when scontrol ping answers")
    found = {}
    for line in done.stdout.splitlines():
        job, state, node, elapsed, limit, reason, code, restarts, token = (part.strip() for part in line.split("|")[:9])
        reason = "" if reason == "None" else reason
        found[job] = Job(job, state, node, elapsed, limit, reason, code, int(restarts or 0), token)
    return found


def _sacct(ids: Sequence[str], known: dict[str, Job]) -> dict[str, Job]:
    """What accounting adds about jobs that squeue calls ended or has forgotten; nothing without accounting."""
    if not ids or shutil.which("sacct") is None:
        return {}
    fields = "jobid,state,nodelist,elapsed,timelimit,exitcode"
    done = call("sacct", "-X", "-n", "-P", "-j", ",".join(ids), "-o", fields)
    found = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        number, state, node, elapsed, limit, code = line.split("|")
        before = known.get(number)
        state = before.state if before else state.split()[0]  # "CANCELLED by 0"; it lags behind squeue by seconds
        if state in ENDED:  # one that squeue has forgotten cannot be running, whatever the books say
            reason, restarts = (before.reason, before.restarts) if before else ("", 0)
            found[number] = Job(number, state, node, elapsed, limit, reason, code, restarts)
    return found


def is_live(number: str) -> bool | None:
    """Whether a job may still do something; None where no Slurm can be asked."""
    if not is_here():
        return None
    job = ask([number]).get(number)
    return job is not None and job.live


def hosts(node_list: str) -> list[str]:
    """`node[1-3,7]` as names."""
    done = call("scontrol", "show", "hostnames", node_list)
    if done.returncode:
        raise LaunchError(f"scontrol show hostnames {node_list}: {_last_line(done.stderr)}")
    return done.stdout.split()


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "no reason given"


def reason_of(stderr: str) -> str:
    """What sbatch said, without its own name before each line and without saying it twice."""
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in stderr.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or "no reason given"


# ---------------------------------------------------------------- the job of a step


@dataclass(frozen=True)
class JobRecord:
    """`job.json` of a step. Without an id the submission was cut off: the token tells whether Slurm took it."""

    token: str
    launcher: str
    submitted: float  # seconds since the epoch
    id: str | None = None
    log: str | None = None
    cluster: str | None = None  # the cluster of a site with several, as sbatch answered it; None: the default


def read_job(folder: Path) -> JobRecord | None:
    record = read_json(folder / JOB)
    return JobRecord(**record) if record else None


def write_job(folder: Path, record: JobRecord) -> None:
    write_json(folder / JOB, asdict(record))


def live_jobs(folders: Iterable[Path]) -> dict[Path, Job]:
    """The jobs that these steps were given to and that may still do something; each really asked for.

    A job that Slurm took while its submission was cut off is found by its token, and its id is written down.
    """
    records = {folder: record for folder in folders if (record := read_job(folder))}
    if not records:
        return {}
    known = ask(record.id for record in records.values() if record.id)
    lost = find(record.token for record in records.values() if not record.id)
    found = {}
    for folder, record in records.items():
        job = known.get(record.id) if record.id else lost.get(record.token)
        if job and job.live:
            found[folder] = job
            if record.id is None:
                write_job(folder, replace(record, id=job.id))
    return found


def this_job() -> str | None:
    """The id of the job this process runs in."""
    return os.environ.get("SLURM_JOB_ID")


def submitted_as(answer: str) -> tuple[str, str | None]:
    """The job's id and its cluster in what `sbatch --parsable` printed: `41`, or `41;cluster` with `--clusters`.

    LaunchError where there is no id: the job's token tells whether Slurm has taken it.
    """
    number, _, cluster = (answer.strip().splitlines() or [""])[-1].partition(";")
    if not number.isdigit():
        raise LaunchError(
            f"sbatch printed {answer.strip()!r}; expected the id of a job. Fix: run the same command again"
        )
    return number, cluster or None


def claim(folders: Iterable[Path], job: str) -> None:
    """Write down that this job runs these steps; PlanError where another one is to run one of them."""
    folders = list(folders)
    others = [(folder, other) for folder, other in live_jobs(folders).items() if other.id != job]
    if others:
        told = [f"{folder} is with Slurm already, as job {other.id} ({other.state})" for folder, other in others]
        raise PlanError(*told, "wait for it (python -m pipeline status), or end it with python -m pipeline cancel")
    log = re.search(r"StdOut=(\S+)", call("scontrol", "show", "job", "--oneliner", job).stdout)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        write_job(folder, JobRecord("", "slurm", time.time(), job, log.group(1) if log else None))
