"""A finished step on disk: `artifact.json`, written last, and the owner file of a step that is running.

`artifact.json` exists exactly when the step is done. It holds what the step read, the size and sha256 of every
file it left, its metrics, versions and timings. `own()` lets one process at a time write into a step's folder.
`find_checkpoint()` says which weights a folder holds, without loading them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core import slurm_client as slurm
from pipeline.core.errors import ArtifactError, DataError
from pipeline.core.files import read_json, write_json
from pipeline.core.hashing import file_sha256
from pipeline.core.records import OddFile, odd_file, read_mapping, read_record
from pipeline.workflow.jobs import Answers, is_live

if TYPE_CHECKING:
    import pyarrow as pa

ARTIFACT, OWNER, STEP, PROGRESS, STOP = "artifact.json", "owner.json", "step.json", "progress.json", "stop"
LOG, SCRIPT = "log.txt", "job.slurm"
HISTORY = "history.json"  # of a training stage: what its trainer logged, step by step
PROMPTS = "prompts.json"  # of an evaluation: the questions that are only shown, with their answers
NOT_PAYLOAD = {ARTIFACT, OWNER, PROGRESS, STOP, LOG, SCRIPT, slurm.JOB}  # of the folder, not of the result
TRANSIENT = {
    "checkpoints",
    "tensorboard",
    "wandb",
    "trackio",
    "submitit",
}  # folders that may change or go without hurting the result
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
ADAPTER = "adapter_config.json"
WARNINGS = "warnings"  # the key of `metrics` that lists them; absent where there are none


# of step.json and artifact.json. 2: `report:` beside `evaluate:`. Older records are read as if they were of this one
SCHEMA = 2


@dataclass(frozen=True)
class FileEntry:
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """The record of a finished step. `payload` is the identity its fingerprint was made of."""

    stage: str
    recipe: str
    fingerprint: str
    payload: dict[str, Any]
    inputs: dict[str, str]  # role -> folder of the input's step, relative to the runs folder
    files: dict[str, FileEntry]  # path inside the folder -> what it was when the step ended
    metrics: dict[str, Any]
    provenance: dict[str, Any]  # versions, machine, git commit, command, timings
    folder: Path = field(default=Path(), compare=False)
    schema: int = 1  # of the record

    @property
    def warnings(self) -> list[str]:
        """What `Runtime.warn` reported while the step ran."""
        return list(self.metrics.get(WARNINGS, ()))

    @property
    def figures(self) -> dict[str, Any]:
        """The metrics without the warnings: of an evaluation, the figures of each split."""
        return {name: value for name, value in self.metrics.items() if name != WARNINGS}


def inventory(folder: Path, *, leave_out: set[str] = NOT_PAYLOAD | TRANSIENT) -> dict[str, FileEntry]:
    """Every file below `folder` with its size and sha256, top-level names in `leave_out` left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and relative.parts[0] not in leave_out and not path.name.startswith("."):
            found[relative.as_posix()] = FileEntry(path.stat().st_size, file_sha256(path))
    return found


def commit(artifact: Artifact) -> Artifact:
    """Record the files of `artifact.folder` and make the step done. The last thing a step does."""
    record = asdict(artifact)
    del record["folder"]
    record["files"] = {name: asdict(entry) for name, entry in inventory(artifact.folder).items()}
    write_json(artifact.folder / ARTIFACT, record)
    return open_artifact(artifact.folder)


def is_done(folder: Path) -> bool:
    """Whether the step of this folder has ended well: whether it has an artifact that can be read.

    An artifact that is empty, half-written or of another shape is none, so the step runs again. OddFile where the
    file cannot be opened: then nobody knows.
    """
    path = folder / ARTIFACT
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:  # a stale handle, a folder that may not be searched
        if read_mapping(path) is None:  # which tries again
            raise odd_file(path, f"cannot be read ({error.strerror})") from error
        return artifact_problem(folder) is None
    seen = (status.st_mtime_ns, status.st_size, status.st_ino)
    if _checked.get(path, (None, False))[0] != seen:
        _checked[path] = (seen, artifact_problem(folder) is None)
    return _checked[path][1]


_checked: dict[Path, tuple[tuple[int, int, int], bool]] = {}  # artifacts as they were when they were read last


def artifact_problem(folder: Path) -> str | None:
    """What is wrong with a folder's artifact; None where there is none, or nothing. OddFile as `is_done`."""
    try:
        read_record(folder / ARTIFACT, Artifact, folder=folder)
    except OddFile as odd:
        if odd.problem.startswith("cannot be read"):
            raise
        return odd.problem
    return None


def refuse_newer(path: Path, schema: int) -> None:
    """ArtifactError where a record is of a later version, whose meaning nobody here knows."""
    if schema > SCHEMA:
        raise ArtifactError(
            f"{path}: schema: got {schema}; expected at most {SCHEMA}. Fix: use the version that wrote it"
        )


def open_artifact(folder: Path, *, verify: bool = True, deep: bool = False) -> Artifact:
    """The artifact of a folder; ArtifactError where it is missing, half-written or no longer what it was.

    `verify` compares the size of every file, `deep` the sha256 too.
    """
    try:
        artifact = read_record(folder / ARTIFACT, Artifact, folder=folder)
    except OddFile as odd:
        raise ArtifactError(f"{odd}. Fix: run the step again; an artifact that cannot be used counts as none") from None
    if artifact is None:
        raise ArtifactError(f"{folder / ARTIFACT} does not exist: that step has not ended; run it again")
    refuse_newer(folder / ARTIFACT, artifact.schema)
    problems = []
    for name, entry in artifact.files.items() if verify else ():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != entry.size:
            problems.append(f"{path}: {path.stat().st_size} bytes, recorded as {entry.size}")
        elif deep and file_sha256(path) != entry.sha256:
            problems.append(f"{path}: its content is not what was recorded")
    if problems:
        raise ArtifactError(*problems, f"{folder} is damaged: delete {folder / ARTIFACT} and run the step again")
    return artifact


@dataclass(frozen=True)
class Owner:
    """Who is writing into a step's folder."""

    token: str
    host: str
    pid: int
    started: float  # the process's start, in clock ticks since boot: a pid can be given again, this pair cannot
    since: float  # seconds since the epoch
    job: str | None  # a Slurm job id
    cluster: str | None = None  # the job's, where the site has several
    restart: int | None = None  # how often Slurm had started the job again; None: not recorded
    user: str | None = None

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


def read_owner(folder: Path) -> Owner | None:
    """Who writes into the folder; None where nobody says so, OddFile where the file cannot be used."""
    return read_record(folder / OWNER, Owner)


def is_alive(owner: Owner, jobs: Answers | None = None) -> bool:
    """Whether the owner still runs.

    Of the same job, an owner with a lower restart count is an earlier attempt: gone with its node, or a zombie that
    must not write any more. On this host the process decides. On another one Slurm is queried (`jobs`: its answer of
    a moment ago); an owner that nobody can be queried about counts as alive.
    """
    if owner.job and slurm.is_this_job(owner.job, owner.cluster):
        if owner.restart is None and owner.host != socket.gethostname():
            return False  # a record from before restarts were counted
        if owner.restart is not None and owner.restart < slurm.this_restart():
            return False
    same_site = not owner.cluster or not slurm.this_cluster() or owner.cluster == slurm.this_cluster()
    if owner.host == socket.gethostname() and same_site:
        return _process_start(owner.pid) == owner.started != 0.0
    if owner.job is None:
        return True
    if jobs is None:
        return is_live(owner.job, owner.cluster, owner.user, owner.since) is not False
    return jobs.is_live(owner.job, owner.cluster, owner.user, owner.since) is not False


def refuse_if_owned(folder: Path, jobs: Answers | None = None) -> None:
    """ArtifactError when a live process owns the folder."""
    try:
        owner = read_owner(folder)
    except OddFile as odd:
        raise ArtifactError(
            f"{odd}, so it is not known who writes there. Fix: if no process does (python -m pipeline status), "
            f"delete {odd.path}"
        ) from None
    if owner and is_alive(owner, jobs):
        raise ArtifactError(
            f"{folder} is being written by {owner}: wait for it (python -m pipeline status), or stop it first; "
            f"if it is surely gone, delete {folder / OWNER}"
        )


@contextlib.contextmanager
def own(folder: Path) -> Iterator[Owner]:
    """Hold the folder's owner file (`O_EXCL`); a dead owner is replaced, a live one is an ArtifactError."""
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.getpid()
    token = f"{socket.gethostname()}-{pid}-{time.time_ns()}"
    job = slurm.this_job()
    owner = Owner(
        token,
        socket.gethostname(),
        pid,
        _process_start(pid),
        time.time(),
        job,
        slurm.this_cluster() if job else None,
        slurm.this_restart() if job else None,
        slurm.this_user(),
    )
    path = folder / OWNER
    temporary = folder / f".{OWNER}.{token}"
    write_json(temporary, asdict(owner))
    try:
        while True:
            try:
                os.link(temporary, path)  # as exclusive as O_EXCL, and never seen half-written
                break
            except FileExistsError:
                refuse_if_owned(folder)
                path.unlink(missing_ok=True)
    finally:
        temporary.unlink(missing_ok=True)
    try:
        yield owner
    finally:
        if is_owner(folder, owner):
            path.unlink(missing_ok=True)


def is_owner(folder: Path, owner: Owner) -> bool:
    """Whether the folder is still ours: a zombie of an old attempt finds that it is not, and must not write."""
    try:
        current = read_owner(folder)
    except OddFile as odd:
        if odd.problem.startswith("cannot be read"):
            raise
        return False
    return current is not None and current.token == owner.token


def step_of(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The step's folder that a path lies in, and its order."""
    for folder in [path, *path.parents][:4]:
        record = read_json(folder / STEP)
        if record and isinstance(record, dict):
            return folder, record
    return None


# ---------------------------------------------------------------- which weights


@dataclass(frozen=True)
class Checkpoint:
    """Weights that can be loaded: a full model (`base`), or an adapter on top of one."""

    base: str  # a hub id or a folder
    adapter: Path | None
    tokenizer: str  # where its tokenizer is


def find_checkpoint(where: str) -> Checkpoint:
    """What `where` is: a step's folder, a Trainer checkpoint, an adapter, a model folder or a hub id.

    Raises ArtifactError for a folder that is missing, empty or half-written, saying what was found in it.
    """
    folder = Path(where)
    try:
        there = folder.exists()
    except OSError as error:  # a name that is too long, a folder that may not be searched
        raise ArtifactError(f"checkpoint {where[:200]}: cannot be read ({error.strerror})") from error
    if not there:
        if where.count("/") == 1 and not where.startswith((".", "/", "~")) and not folder.parent.exists():
            return Checkpoint(where, None, where)  # a hub id: owner/name
        raise ArtifactError(f"checkpoint {where}: no such folder; give a step's folder, a checkpoint or a hub id")
    if not folder.is_dir():
        raise ArtifactError(f"checkpoint {where}: a file; give the folder that holds it ({folder.parent})")
    if (folder / ARTIFACT).exists():
        open_artifact(folder)
    elif (folder / STEP).exists():
        raise ArtifactError(
            f"checkpoint {where}: that step has not ended (no {ARTIFACT}); run it again, "
            f"or give one of its checkpoints: {_names(folder / 'checkpoints') or 'there is none yet'}"
        )
    for inside in ("model", "adapter"):  # a step's folder
        if (folder / inside).is_dir():
            folder = folder / inside
            break
    if (folder / ADAPTER).is_file():
        return _adapter(folder)
    if not (folder / "config.json").is_file():
        raise ArtifactError(
            f"checkpoint {folder}: neither config.json nor {ADAPTER} in it; it holds {_names(folder) or 'nothing'}"
        )
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ArtifactError(
            f"checkpoint {folder}: half-written, config.json without weights ({' or '.join(WEIGHTS[:2])})"
        )
    return Checkpoint(str(folder), None, str(folder))


def _adapter(folder: Path) -> Checkpoint:
    record = read_json(folder / ADAPTER)
    base = record.get("base_model_name_or_path") if isinstance(record, dict) else None
    if not base or not isinstance(base, str):
        raise ArtifactError(f"checkpoint {folder}: {ADAPTER} is half-written or does not name its base model")
    if not any((folder / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise ArtifactError(f"checkpoint {folder}: half-written, {ADAPTER} without adapter_model.safetensors")
    try:
        below = find_checkpoint(base) if not _is_adapter(Path(base)) else None
    except ArtifactError as error:
        raise ArtifactError(f"checkpoint {folder}: base_model_name_or_path: {error}") from error
    if below is None:  # also itself, and any circle of adapters
        raise ArtifactError(
            f"checkpoint {folder}: base_model_name_or_path: got {base!r}, an adapter itself; expected a whole model. "
            f"Fix: export {base} as merged16 first and name that"
        )
    return Checkpoint(below.base, folder, str(folder) if (folder / "tokenizer.json").is_file() else below.tokenizer)


def _is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter, or a step's folder with an adapter and no whole model."""
    with contextlib.suppress(OSError):  # `find_checkpoint` tells it
        return (folder / ADAPTER).exists() or (
            not (folder / "model").is_dir() and (folder / "adapter" / ADAPTER).exists()
        )
    return False


def _names(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def read_split(data: Artifact, split: str) -> pa.Table:
    """The rows that preprocess has written: `data/<split>.parquet` of its step."""
    import pyarrow.parquet as pq

    path = data.folder / "data" / f"{split}.parquet"
    if not path.is_file():
        raise DataError(f"{path} does not exist: the task has no rows for this stage; leave it out with --stages")
    return pq.read_table(path)
