"""Query Slurm for jobs, with accounting or without, and read and write the job record of a step.

    jobs = query_jobs(["41", "42"])   one call of squeue for all, one of sacct for those it no longer lists
    record = read_job(folder)         job.json of a step: a token written before sbatch, the id after

launchers/slurm.py submits jobs. workflow/jobs.py decides which jobs belong to a step.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

from pipeline.core.errors import LaunchError, MissingDependency
from pipeline.core.files import write_json
from pipeline.core.records import read_record

JOB_FILE = "job.json"
RETRY = "THEREFORE_RETRY"  # in the environment of a job's step: how often its script has started it again
TIMEOUT = 60  # seconds that a Slurm command may take
FINAL_STATES = {
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
SQUEUE_FIELDS = ["JobID", "State", "NodeList", "TimeUsed", "TimeLimit", "Reason", "exit_code", "RestartCnt", "Comment"]
SQUEUE_FIELDS += ["UserName", "SubmitTime", "Name", "Dependency"]
SACCT_FIELDS = "jobid,state,nodelist,elapsed,timelimit,exitcode,user,submit,jobname"


@dataclass(frozen=True)
class Job:
    """A job as Slurm reports it. `state` is Slurm's name: PENDING, RUNNING, COMPLETED, …"""

    id: str
    state: str
    node: str = ""
    elapsed: str = ""
    limit: str = ""
    reason: str = ""
    exit_code: str = ""
    restarts: int = 0
    token: str = ""  # the job's comment
    user: str = ""
    submitted: float | None = None  # seconds since the epoch; of a requeued job the last time
    name: str = ""
    after: str = ""  # the jobs it still waits for, in Slurm's form: afterok:41(unfulfilled)
    cluster: str | None = None  # where a site has several; None: the local one
    from_accounting: bool = False  # listed by sacct alone, which keeps no comment

    @property
    def live(self) -> bool:
        """Return whether the job is pending, running or completing."""
        return self.state not in FINAL_STATES


def is_installed() -> bool:
    """Return whether this machine has Slurm's client commands."""
    return shutil.which("squeue") is not None


KEPT_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")  # the Slurm to contact, and the credentials
DROPPED_PREFIXES = ("SLURM", "PMI", "PALS_", "OMPI_", "SQUEUE_", "SACCT_", "SCANCEL_", "SCONTROL_", "SRUN_")


def client_environment() -> dict[str, str]:
    """Return the environment without variables of another job or step, and without those that change Slurm's output.

    A variable that an allocation sets (SLURM_MEM_PER_CPU) would become a request of a job that is submitted from it.
    SQUEUE_PARTITION would hide jobs. SBATCH_* stays: these are the user's own options for jobs.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name in KEPT_VARIABLES or not name.startswith(DROPPED_PREFIXES)
    }


def run_slurm(
    *command: str, stdin: str | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command in `client_environment`.

    Raises MissingDependency where it is not installed, LaunchError after TIMEOUT seconds.
    """
    if shutil.which(command[0]) is None:
        raise MissingDependency(
            f"{command[0]}: no such program on this machine. Fix: use a login node of the cluster "
            "(or load its Slurm module), or run here with --launcher local"
        )
    try:
        env = client_environment() | (env or {})
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=TIMEOUT, env=env)
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"{command[0]}: got no answer in {TIMEOUT} s; the controller is busy or down. "
            "Fix: try again when scontrol ping answers"
        ) from error


def query_jobs(ids: Iterable[str], cluster: str | None = None) -> dict[str, Job]:
    """Return the jobs of these ids that Slurm lists: from squeue, and ended jobs from sacct too where it exists."""
    wanted = sorted(set(ids))
    if not wanted:
        return {}
    jobs = _squeue(cluster, "--jobs", ",".join(wanted))
    ended = [number for number in wanted if number not in jobs or not jobs[number].live]
    return {**jobs, **_sacct(ended, jobs, cluster)}


def jobs_by_token(tokens: Iterable[str], cluster: str | None = None) -> dict[str, Job]:
    """Return this user's jobs with these tokens, keyed by token."""
    wanted = set(tokens)
    mine = jobs_of_user(cluster) if wanted else {}
    return {job.token: job for job in mine.values() if job.token in wanted}


def jobs_of_user(cluster: str | None = None) -> dict[str, Job]:
    """Return all jobs of this user, of any project, keyed by id."""
    return _squeue(cluster, "--user", this_user())


def is_preempted(job: str) -> bool:
    """Return whether Slurm is preempting a job."""
    return (
        _seconds(run_slurm("squeue", "--noheader", f"--jobs={job}", "--Format=PreemptTime:|").stdout.strip(" |\n"))
        is not None
    )


def cluster_option(cluster: str | None) -> list[str]:
    """Return the option that selects another cluster. The local cluster takes none: it would require accounting."""
    return [f"--clusters={cluster}"] if cluster else []


def _squeue(cluster: str | None, *which: str) -> dict[str, Job]:
    words = [*cluster_option(cluster), *which, "--Format", ",".join(f"{name}:|" for name in SQUEUE_FIELDS)]
    done = run_slurm("squeue", "--noheader", "--states=all", *words)
    if done.returncode and "Invalid job id" not in done.stderr:  # one unknown id is an error, several are not
        target = f"cluster {cluster}" if cluster else "Slurm"
        raise LaunchError(
            f"squeue: cannot query {target}: {_last_line(done.stderr)}. Fix: try again when scontrol ping answers"
        )
    jobs = {}
    for line in done.stdout.splitlines():
        parts = [part.strip() for part in line.split("|")]
        if len(parts) < 9:  # the heading `CLUSTER: west`
            continue
        number, state, node, elapsed, limit, reason, code, restarts, token = parts[:9]
        user, submitted, name, after = (parts[9:13] + [""] * 4)[:4]
        reason = "" if reason == "None" else reason
        after = "" if after == "(null)" else after
        count = int(restarts) if restarts.isdigit() else 0
        job = Job(number, state, node, elapsed, limit, reason, exit_code_of(code), count, token, user)
        jobs[number] = replace(job, submitted=_seconds(submitted), name=name, after=after, cluster=cluster)
    return jobs


def _seconds(text: str) -> float | None:
    """Return a time of Slurm's in seconds since the epoch; None where it is not a date."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return None


def _sacct(ids: Sequence[str], known: dict[str, Job], cluster: str | None) -> dict[str, Job]:
    """Return the jobs that squeue lists as ended or no longer lists, completed from accounting; {} without it."""
    if not ids or shutil.which("sacct") is None:
        return {}
    done = run_slurm("sacct", *cluster_option(cluster), "-X", "-n", "-P", "-j", ",".join(ids), "-o", SACCT_FIELDS)
    jobs = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        parts = line.split("|")
        if len(parts) < 6:
            continue
        number, state, node, elapsed, limit, code = parts[:6]
        user, submitted, name = (parts[6:9] + [""] * 3)[:3]
        before = known.get(number)
        if before:
            jobs[number] = replace(before, node=node, elapsed=elapsed, limit=limit, exit_code=code)
            continue
        state = state.split()[0]  # "CANCELLED by 0"; accounting lags behind squeue by seconds
        if state in FINAL_STATES:  # a job that squeue no longer lists cannot be running, even if sacct reports RUNNING
            job = Job(number, state, node, elapsed, limit, "", code, 0, "", user, _seconds(submitted), name)
            jobs[number] = replace(job, cluster=cluster, from_accounting=True)
    return jobs


def first_host(node_list: str) -> str:
    """Return the first name of `node[1-3,7],other2`, without scontrol, which nodes and containers may lack."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", node_list)
    return re.sub(r"\[([^\]\-,]*)[^\]]*\]", r"\1", first.group()) if first else node_list


def exit_code_of(status: str) -> str:
    """Return squeue's wait status in accounting's form, exit code and signal: 2:0 for 512, 0:9 for 9."""
    return f"{int(status) >> 8}:{int(status) & 127}" if status.isdigit() else status


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "no reason given"


def error_text(stderr: str) -> str:
    """Return sbatch's messages on one line, without its name before each and without repetitions."""
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in stderr.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or "no reason given"


def peak_memory(job: Job) -> str | None:
    """Return the peak host memory of one process tree of a job, such as `1.90 GiB`; None without accounting."""
    if shutil.which("sacct") is None:
        return None
    done = run_slurm("sacct", *cluster_option(job.cluster), "-n", "-P", "-j", job.id, "-o", "maxrss")
    sizes = [line.strip() for line in done.stdout.splitlines()] if done.returncode == 0 else []
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    peaks = [float(size[:-1]) * units[size[-1]] for size in sizes if re.fullmatch(r"[\d.]+[KMGT]", size)]
    return f"{max(peaks) / (1 << 30):.2f} GiB" if peaks else None


def controller_answered(text: str) -> bool:
    """Return whether an error message comes from the controller, not from the failure to reach it."""
    unreachable = ("contact slurm controller", "Socket timed out", "Connection refused", "Zero Bytes", "got no answer")
    return not any(words.lower() in text.lower() for words in unreachable)


# ---------------------------------------------------------------- this process


def this_job() -> str | None:
    """Return the id of the job this process runs in; None outside of a job."""
    return os.environ.get("SLURM_JOB_ID")


def this_cluster() -> str | None:
    """Return the cluster of the job this process runs in; None outside of a job."""
    return os.environ.get("SLURM_CLUSTER_NAME")


def this_restart() -> int:
    """Return how often Slurm has restarted this job."""
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdigit() else 0


def this_retry() -> int:
    """Return how often this job's script has started the step again since Slurm started the job."""
    count = os.environ.get(RETRY, "")
    return int(count) if count.isdigit() else 0


def this_user() -> str:
    """Return this user's name, or the numeric id where it has none."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def job_end() -> float | None:
    """Return when this job reaches its time limit, in seconds since the epoch; None without a job or a limit."""
    given, job = os.environ.get("SLURM_JOB_END_TIME", ""), this_job()  # Slurm 23 and later
    if given.isdigit() or job is None or not is_installed():
        return float(given) if given.isdigit() else None
    try:
        return _seconds(
            run_slurm("squeue", "--noheader", "--jobs", job, "--Format", "EndTime:|").stdout.strip().rstrip("|")
        )
    except LaunchError:
        return None


def is_this_job(number: str, cluster: str | None) -> bool:
    """Return whether this process runs in that job. The same id on another cluster is another job."""
    return number == this_job() and (not cluster or not this_cluster() or cluster == this_cluster())


@lru_cache(maxsize=1)
def current_cluster() -> str | None:
    """Return the name of the cluster that Slurm commands reach without `--clusters`; None where unknown."""
    if this_job() and this_cluster() and "SLURM_CLUSTERS" not in os.environ:
        return this_cluster()
    if shutil.which("scontrol") is None:
        return None
    name = re.search(r"^ClusterName\s*=\s*(\S+)", run_slurm("scontrol", "show", "config").stdout, re.MULTILINE)
    return name.group(1) if name else None


def remote_cluster(cluster: str | None) -> str | None:
    """Return a cluster's name for `--clusters`; None for the cluster that Slurm commands reach by default."""
    return cluster if cluster and cluster != current_cluster() else None


# ---------------------------------------------------------------- the job of a step


@dataclass(frozen=True)
class JobRecord:
    """`job.json` of a step. Without an id the submission was interrupted: the token finds the job, if there is one."""

    token: str
    launcher: str
    submitted: float  # seconds since the epoch
    id: str | None = None
    log: str | None = None
    cluster: str | None = None  # the job's; None: unknown, so the default cluster
    user: str | None = None  # who submitted it
    name: str | None = None  # the job's
    marked: bool = True  # whether the job carries the token as its comment; some sites replace comments
    command: str | None = None  # the user's command line


def read_job(folder: Path) -> JobRecord | None:
    """Return the job record of a step; None without one. Raises InvalidRecord where the file cannot be used."""
    return read_record(folder / JOB_FILE, JobRecord)


def write_job(folder: Path, record: JobRecord) -> None:
    """Write the job record of a step."""
    write_json(folder / JOB_FILE, asdict(record))


def parse_submission(answer: str) -> tuple[str, str | None]:
    """Return the job's id and cluster from the output of `sbatch --parsable`: `41`, or `41;cluster` with `--clusters`.

    Raises LaunchError without an id. The next command finds the job, if there is one, by its token.
    """
    number, _, cluster = (answer.strip().splitlines() or [""])[-1].partition(";")
    if not number.isdigit():
        raise LaunchError(f"sbatch: got {answer.strip()!r}; expected the id of a job. Fix: run the same command again")
    return number, cluster or None
