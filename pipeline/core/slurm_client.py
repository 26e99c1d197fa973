"""What Slurm says of jobs, with accounting or without; and the record of the job that a step was given to.

    jobs = ask(["41", "42"])          one call of squeue for all, one of sacct for those it no longer knows
    record = read_job(folder)         job.json of a step: a token written before sbatch, the id after

Nothing here submits anything; that is launchers/slurm.py. Which jobs are ours is jobs.py.
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
TIMEOUT = 60  # seconds that a command of Slurm's may take
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
    """A job as Slurm tells it. `state` is Slurm's word: PENDING, RUNNING, COMPLETED, …"""

    id: str
    state: str
    node: str = ""
    elapsed: str = ""
    limit: str = ""
    reason: str = ""
    exit_code: str = ""
    restarts: int = 0
    token: str = ""  # its comment
    user: str = ""
    submitted: float | None = None  # seconds since the epoch; of a requeued job the last time
    name: str = ""
    after: str = ""  # the jobs it still waits for, as Slurm writes them: afterok:41(unfulfilled)
    cluster: str | None = None  # where a site has several; None: this one
    from_books: bool = False  # known to accounting alone, which keeps no comment

    @property
    def live(self) -> bool:
        """Whether it waits, runs or ends: whether it may still do something."""
        return self.state not in FINAL_STATES


def is_installed() -> bool:
    """Whether this machine can ask a Slurm."""
    return shutil.which("squeue") is not None


KEPT_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")  # which Slurm, and who asks
DROPPED_PREFIXES = ("SLURM", "PMI", "PALS_", "OMPI_", "SQUEUE_", "SACCT_", "SCANCEL_", "SCONTROL_", "SRUN_")


def client_environment() -> dict[str, str]:
    """The environment without the variables of another job or step, and without what changes Slurm's answers.

    What an allocation sets (SLURM_MEM_PER_CPU) would ask for something in a job that is submitted from it;
    SQUEUE_PARTITION would hide jobs. SBATCH_* stays: it holds the user's own wishes for jobs.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name in KEPT_VARIABLES or not name.startswith(DROPPED_PREFIXES)
    }


def run_slurm(
    *command: str, stdin: str | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm's in `client_environment`; MissingDependency where it is not installed."""
    if shutil.which(command[0]) is None:
        raise MissingDependency(
            f"{command[0]}: no such program on this machine; go to a login node of the cluster "
            "(or load its Slurm module), or run here with --launcher local"
        )
    try:
        env = client_environment() | (env or {})
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=TIMEOUT, env=env)
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"{command[0]} gave no answer in {TIMEOUT} s: the controller is busy or down (scontrol ping); try again"
        ) from error


def query_jobs(ids: Iterable[str], cluster: str | None = None) -> dict[str, Job]:
    """The jobs of these ids that Slurm knows: by squeue, and what has ended by sacct too where there is one."""
    wanted = sorted(set(ids))
    if not wanted:
        return {}
    found = _squeue(cluster, "--jobs", ",".join(wanted))
    over = [number for number in wanted if number not in found or not found[number].live]
    return {**found, **_sacct(over, found, cluster)}


def jobs_by_token(tokens: Iterable[str], cluster: str | None = None) -> dict[str, Job]:
    """This user's jobs by the token they were submitted with."""
    wanted = set(tokens)
    mine = jobs_of_user(cluster) if wanted else {}
    return {job.token: job for job in mine.values() if job.token in wanted}


def jobs_of_user(cluster: str | None = None) -> dict[str, Job]:
    """All jobs of this user, of whatever project."""
    return _squeue(cluster, "--user", this_user())


def is_preempted(job: str) -> bool:
    """Whether Slurm is ending a job to make way for another one."""
    return (
        _seconds(run_slurm("squeue", "--noheader", f"--jobs={job}", "--Format=PreemptTime:|").stdout.strip(" |\n"))
        is not None
    )


def cluster_option(cluster: str | None) -> list[str]:
    """The option that names another cluster to one of Slurm's commands. For this one it would need accounting."""
    return [f"--clusters={cluster}"] if cluster else []


def _squeue(cluster: str | None, *which: str) -> dict[str, Job]:
    words = [*cluster_option(cluster), *which, "--Format", ",".join(f"{name}:|" for name in SQUEUE_FIELDS)]
    done = run_slurm("squeue", "--noheader", "--states=all", *words)
    if done.returncode and "Invalid job id" not in done.stderr:  # one unknown id is an error, several are not
        where = f" about cluster {cluster}" if cluster else ""
        raise LaunchError(
            f"squeue cannot be asked{where}: {_last_line(done.stderr)}; try again when scontrol ping answers"
        )
    found = {}
    for line in done.stdout.splitlines():
        parts = [part.strip() for part in line.split("|")]
        if len(parts) < 9:  # CLUSTER: west
            continue
        job, state, node, elapsed, limit, reason, code, restarts, token = parts[:9]
        user, submitted, name, after = (parts[9:13] + [""] * 4)[:4]
        reason = "" if reason == "None" else reason
        after = "" if after == "(null)" else after
        count = int(restarts) if restarts.isdigit() else 0
        one = Job(
            job,
            state,
            node,
            elapsed,
            limit,
            reason,
            exit_code_of(code),
            count,
            token,
            user,
            _seconds(submitted),
            name,
            after,
        )
        found[job] = replace(one, cluster=cluster)
    return found


def _seconds(text: str) -> float | None:
    """A time of Slurm's in seconds since the epoch; None where it is not known."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return None


def _sacct(ids: Sequence[str], known: dict[str, Job], cluster: str | None) -> dict[str, Job]:
    """What accounting adds about jobs that squeue calls ended or has forgotten; nothing without accounting."""
    if not ids or shutil.which("sacct") is None:
        return {}
    done = run_slurm("sacct", *cluster_option(cluster), "-X", "-n", "-P", "-j", ",".join(ids), "-o", SACCT_FIELDS)
    found = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        parts = line.split("|")
        if len(parts) < 6:
            continue
        number, state, node, elapsed, limit, code = parts[:6]
        user, submitted, name = (parts[6:9] + [""] * 3)[:3]
        before = known.get(number)
        if before:
            found[number] = replace(before, node=node, elapsed=elapsed, limit=limit, exit_code=code)
            continue
        state = state.split()[0]  # "CANCELLED by 0"; it lags behind squeue by seconds
        if state in FINAL_STATES:  # one that squeue has forgotten cannot be running, whatever the books say
            one = Job(number, state, node, elapsed, limit, "", code, 0, "", user, _seconds(submitted), name)
            found[number] = replace(one, cluster=cluster, from_books=True)
    return found


def first_host(node_list: str) -> str:
    """The first name of `node[1-3,7],other2`. Nodes and containers without scontrol know it too."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])+", node_list)
    return re.sub(r"\[([^\]\-,]*)[^\]]*\]", r"\1", found.group()) if found else node_list


def exit_code_of(status: str) -> str:
    """squeue's wait status as accounting writes it, exit code and signal: 512 is 2:0, 9 is 0:9."""
    return f"{int(status) >> 8}:{int(status) & 127}" if status.isdigit() else status


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "no reason given"


def error_text(stderr: str) -> str:
    """What sbatch said, without its own name before each line and without saying it twice."""
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in stderr.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or "no reason given"


def peak_memory(job: Job) -> str | None:
    """The most host memory that one process tree of a job has held, such as 1.9G; None without accounting."""
    if shutil.which("sacct") is None:
        return None
    done = run_slurm("sacct", *cluster_option(job.cluster), "-n", "-P", "-j", job.id, "-o", "maxrss")
    sizes = [line.strip() for line in done.stdout.splitlines()] if done.returncode == 0 else []
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    found = [(float(size[:-1]) * units[size[-1]], size) for size in sizes if re.fullmatch(r"[\d.]+[KMGT]", size)]
    return f"{max(found)[0] / (1 << 30):.2f} GiB" if found else None


def controller_answered(text: str) -> bool:
    """Whether Slurm's message is an answer of the controller, not the lack of one."""
    away = ("contact slurm controller", "Socket timed out", "Connection refused", "Zero Bytes", "gave no answer")
    return not any(words.lower() in text.lower() for words in away)


# ---------------------------------------------------------------- this process


def this_job() -> str | None:
    """The id of the job this process runs in."""
    return os.environ.get("SLURM_JOB_ID")


def this_cluster() -> str | None:
    """The cluster of the job this process runs in."""
    return os.environ.get("SLURM_CLUSTER_NAME")


def this_restart() -> int:
    """How often Slurm has started this job again."""
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdigit() else 0


def this_user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def job_end() -> float | None:
    """When this job has to end, in seconds since the epoch; None outside of one or where it has no limit."""
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
    """Whether this process runs in that job; another cluster's job of the same id is another one."""
    return number == this_job() and (not cluster or not this_cluster() or cluster == this_cluster())


@lru_cache(maxsize=1)
def current_cluster() -> str | None:
    """The name of the cluster that Slurm's commands reach from here without `--clusters`; None where unknown."""
    if this_job() and this_cluster() and "SLURM_CLUSTERS" not in os.environ:
        return this_cluster()
    if shutil.which("scontrol") is None:
        return None
    found = re.search(r"^ClusterName\s*=\s*(\S+)", run_slurm("scontrol", "show", "config").stdout, re.MULTILINE)
    return found.group(1) if found else None


def remote_cluster(cluster: str | None) -> str | None:
    """The name to query a cluster by: None for the one that Slurm's commands reach from here anyway."""
    return cluster if cluster and cluster != current_cluster() else None


# ---------------------------------------------------------------- the job of a step


@dataclass(frozen=True)
class JobRecord:
    """`job.json` of a step. Without an id the submission was cut off: the token tells whether Slurm took it."""

    token: str
    launcher: str
    submitted: float  # seconds since the epoch
    id: str | None = None
    log: str | None = None
    cluster: str | None = None  # the job's; None: not known, so the one that is reached from here
    user: str | None = None  # who submitted it
    name: str | None = None  # the job's
    marked: bool = True  # whether the job carries the token as its comment; some sites replace comments
    command: str | None = None  # what the user typed to submit it


def read_job(folder: Path) -> JobRecord | None:
    """The job that the step was given to; InvalidRecord where the file cannot be used."""
    return read_record(folder / JOB_FILE, JobRecord)


def write_job(folder: Path, record: JobRecord) -> None:
    write_json(folder / JOB_FILE, asdict(record))


def parse_submission(answer: str) -> tuple[str, str | None]:
    """The job's id and its cluster in what `sbatch --parsable` printed: `41`, or `41;cluster` with `--clusters`.

    LaunchError where there is no id: the job's token tells whether Slurm has taken it.
    """
    number, _, cluster = (answer.strip().splitlines() or [""])[-1].partition(";")
    if not number.isdigit():
        raise LaunchError(
            f"sbatch printed {answer.strip()!r}; expected the id of a job. Fix: run the same command again"
        )
    return number, cluster or None
