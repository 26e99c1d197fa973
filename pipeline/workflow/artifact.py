"""A finished step on disk: `artifact.json`, written last, so that it exists exactly when the step is done.

It holds what the step read, the size and sha256 of every file it left, its metrics, versions and timings. Who may
write into a running step's folder: lock.py. Which weights a folder holds: weights.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core import slurm_client as slurm
from pipeline.core.errors import ArtifactError, DataError
from pipeline.core.files import read_json, sync, write_json
from pipeline.core.hashing import file_sha256, files_sha256
from pipeline.core.records import InvalidRecord, invalid_record, read_mapping, read_record
from pipeline.workflow.lock import OWNER

if TYPE_CHECKING:
    import pyarrow as pa

ARTIFACT, STEP, PROGRESS, STOP = "artifact.json", "step.json", "progress.json", "stop"
LOG, SCRIPT = "log.txt", "job.slurm"
ATTEMPTS = "attempts.json"  # how the attempts of the step ended that did not finish it
DRAWS = "draws.jsonl"  # of GRPO that draws some prompts less often: a line for each prompt and epoch
HISTORY = "history.json"  # of a training stage: what its trainer logged, step by step
PROMPTS = "prompts.json"  # of an evaluation: the questions that are only shown, with their answers
TOKENS = "tokens"  # of a preprocess step: the folder of its rows' tokens, which training makes and can make again
NOT_PAYLOAD = {ARTIFACT, ATTEMPTS, OWNER, PROGRESS, STOP, LOG, SCRIPT, slurm.JOB_FILE}  # not of the result
TRANSIENT = {
    "checkpoints",
    "tensorboard",
    "wandb",
    "trackio",
    "submitit",
    TOKENS,
}  # folders that may change or go without hurting the result
ENDPOINT = "endpoint"  # the key of an evaluation's `metrics` that says what a server's answers took
SECONDS = "seconds_by_part"  # the key of `provenance` that says where the time went
WARNINGS = "warnings"  # the key of `metrics` that lists them; absent where there are none


# of step.json and artifact.json. 2: `report:` beside `evaluate:`. 3: a step's name, stage and role, and typed options.
# Older records are read as if they were of this one
SCHEMA = 3


@dataclass(frozen=True)
class FileEntry:
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """The record of a finished step. `payload` is the identity its fingerprint was made of."""

    step: str  # its name, such as evaluate-sft
    stage: str
    recipe: str
    fingerprint: str
    payload: dict[str, Any]
    inputs: dict[str, str]  # role -> folder of the input's step, relative to the runs folder
    files: dict[str, FileEntry]  # path inside the folder -> what it was when the step ended
    metrics: dict[str, Any]
    provenance: dict[str, Any]  # versions, machine, git commit, command, timings
    folder: Path = field(default=Path(), compare=False)
    role: str | None = None  # of an evaluation of a run: base, or the stage whose model it is of
    schema: int = 1  # of the record

    @property
    def warnings(self) -> list[str]:
        """What `Runtime.warn` reported while the step ran."""
        return list(self.metrics.get(WARNINGS, ()))

    @property
    def seconds_by_part(self) -> dict[str, float]:
        """Where the time of rank 0 went, over all attempts: see core/stopwatch.py; {} of an earlier version."""
        found = self.provenance.get(SECONDS)
        known = found.items() if isinstance(found, dict) else ()
        return {name: float(one) for name, one in known if isinstance(one, int | float)}


def hash_files(
    folder: Path, *, leave_out: set[str] = NOT_PAYLOAD | TRANSIENT, at_once: bool = False
) -> dict[str, FileEntry]:
    """Every file below `folder` with its size and sha256, top-level names in `leave_out` left out.

    Files and folders are on the disk when this returns, so a record written after it is never there without them.
    `at_once`: many files are read together, while nothing else runs.
    """
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in leave_out and not path.name.startswith(".")
    ]
    digests = files_sha256(found) if at_once else [file_sha256(path) for path in found]
    for path in (*found, *{folder, *(path.parent for path in found)}):
        sync(path)
    return {
        path.relative_to(folder).as_posix(): FileEntry(path.stat().st_size, digest)
        for path, digest in zip(found, digests, strict=True)
    }


def finalize(artifact: Artifact, seconds: Callable[[], dict[str, float]] = dict) -> Artifact:
    """Record the files of `artifact.folder` and make the step done. The last thing a step does.

    `seconds` returns the step's time by part, which is recorded too; hashing the files is the last of it.
    """
    record = asdict(artifact)
    del record["folder"]
    record["files"] = {name: asdict(entry) for name, entry in hash_files(artifact.folder, at_once=True).items()}
    if spent := seconds():
        record["provenance"] = {**artifact.provenance, SECONDS: spent}
    write_json(artifact.folder / ARTIFACT, record, durable=True)
    return open_artifact(artifact.folder)


def is_done(folder: Path) -> bool:
    """Whether the step of this folder has ended well: whether it has an artifact that can be read.

    An artifact that is empty, half-written or of another shape is none, so the step runs again. InvalidRecord where the
    file cannot be opened.
    """
    path = folder / ARTIFACT
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:  # a stale handle, a folder that may not be searched
        if read_mapping(path) is None:  # which tries again
            raise invalid_record(path, f"cannot be read ({error.strerror})") from error
        return artifact_problem(folder) is None
    seen = (status.st_mtime_ns, status.st_size, status.st_ino)
    if _checked.get(path, (None, False))[0] != seen:
        _checked[path] = (seen, artifact_problem(folder) is None)
    return _checked[path][1]


_checked: dict[Path, tuple[tuple[int, int, int], bool]] = {}  # artifacts as they were when they were read last


def read_artifact(folder: Path) -> Artifact | None:
    """Read the record of a folder, unverified; None where there is none, InvalidRecord where it cannot be used."""
    return read_record(folder / ARTIFACT, Artifact, _upgrade, folder=folder)


def _upgrade(record: dict[str, Any]) -> dict[str, Any]:
    """An artifact.json of schema 1 or 2 as one of schema 3: its `stage` was the name of the step."""
    if "step" in record or not isinstance(record.get("stage"), str):
        return record
    stage, role = stage_and_role(record["stage"])
    return {**record, "step": record["stage"], "stage": stage, "role": role}


def stage_and_role(step: str) -> tuple[str, str | None]:
    """The stage and the role in the name of a step, which is all that records of schema 1 and 2 tell of them."""
    stage, _, role = step.partition("-")
    return stage, role if role and role != "checkpoint" else None


def artifact_problem(folder: Path) -> str | None:
    """What is wrong with a folder's artifact; None where there is none, or nothing. InvalidRecord as `is_done`."""
    try:
        read_artifact(folder)
    except InvalidRecord as odd:
        if odd.problem.startswith("cannot be read"):
            raise
        return odd.problem
    return None


def refuse_newer(path: Path, schema: int) -> None:
    """Raise ArtifactError where a record is of a later version, whose meaning is not known here."""
    if schema > SCHEMA:
        raise ArtifactError(
            f"{path}: schema: got {schema}; expected at most {SCHEMA}. Fix: use the version that wrote it"
        )


def open_artifact(folder: Path, *, verify: bool = True, deep: bool = False) -> Artifact:
    """The artifact of a folder; ArtifactError where it is missing, half-written or no longer what it was.

    `verify` compares the size of every file, `deep` the sha256 too.
    """
    try:
        artifact = read_artifact(folder)
    except InvalidRecord as odd:
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


def step_of(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The step's folder that a path lies in, and its order."""
    for folder in [path, *path.parents][:4]:
        record = read_json(folder / STEP)
        if record and isinstance(record, dict):
            return folder, record
    return None


def read_split(data: Artifact, split: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows that preprocess has written, or some of their columns: `data/<split>.parquet` of its step."""
    import pyarrow.parquet as pq

    return pq.read_table(split_file(data.folder, split), columns=list(columns) if columns else None)


def split_file(data: Path, split: str) -> Path:
    """The file of a split in the folder of a preprocess step; DataError where the task has no such rows."""
    path = data / "data" / f"{split}.parquet"
    if not path.is_file():
        raise DataError(f"{path} does not exist: the task has no rows for this stage; leave it out with --stages")
    return path
