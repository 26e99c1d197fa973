"""The steps of a runs folder as they lie on the disk: which folders are steps, and every record that one holds.

    folders, unlisted = step_folders(Path("runs"), ["tiny"])
    files = read_step_files(folder)  progress, holder, job and inputs; `odd`: a sentence for each file that is of no use

A file that cannot be used costs only itself, a folder that cannot be searched is still a step. What the records mean
together is status.py; how one is read records.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core import slurm_client as slurm
from pipeline.core.errors import ArtifactError, PlanError, did_you_mean
from pipeline.core.hashing import FINGERPRINT_LENGTH
from pipeline.core.records import read_record, record_or_none
from pipeline.core.slurm_client import JobRecord, read_job
from pipeline.workflow.artifact import ARTIFACT, PROGRESS, STEP, artifact_problem, is_done, open_artifact
from pipeline.workflow.attempts import Attempts, read_attempts
from pipeline.workflow.lock import OWNER, LockHolder, read_holder
from pipeline.workflow.progress import Progress

RECORDS = {ARTIFACT, PROGRESS, OWNER, slurm.JOB_FILE}
STEP_FOLDER = re.compile(rf".+-[0-9a-f]{{{FINGERPRINT_LENGTH}}}")  # sft-1a2b3c4d5e


@dataclass(frozen=True)
class SpecSummary:
    """The part of a step's spec that tables and messages need; read without the recipe's checks."""

    name: str
    stage: str
    fingerprint: str
    inputs: dict[str, str]  # role -> folder


@dataclass(frozen=True)
class StepFiles:
    """What a step's folder holds; `odd` are its files that cannot be used."""

    done: bool = False
    progress: Progress | None = None
    holder: LockHolder | None = None
    record: JobRecord | None = None
    inputs: tuple[Path, ...] = ()
    odd: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()  # that the step reported
    attempts: Attempts = field(default_factory=Attempts)


def step_folders(runs: Path, recipes: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Every step's folder, also one that cannot be searched; and which folders above them cannot be listed.

    PlanError for a recipe without a folder.
    """
    problems: list[str] = []
    there = _listed(runs, problems)
    names = [place.name for place in there]
    if unknown := [name for name in recipes if name not in names and not problems]:
        raise PlanError(*(f"{runs}/{name}: nothing has run; {did_you_mean(name, names)}" for name in unknown))
    inside = [folder for place in there if not recipes or place.name in recipes for folder in _listed(place, problems)]
    return [folder for folder in inside if _is_step(folder)], problems


def _is_step(folder: Path) -> bool:
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError:
        return True  # `read_step_files` tells
    return STEP in names or bool(names & RECORDS and STEP_FOLDER.fullmatch(folder.name))


def read_summary(folder: Path) -> SpecSummary | None:
    """Read which step a folder is of; None where its step.json cannot be used, which `read_step_files` reports."""
    return record_or_none(folder / STEP, SpecSummary)


def short_name(folder: Path, spec: SpecSummary | None) -> str:
    """The folder's name without the fingerprint at its end: `grpo`."""
    name = folder.name.removesuffix(f"-{spec.fingerprint}") if spec else folder.name
    return name[: -FINGERPRINT_LENGTH - 1] if name == folder.name and STEP_FOLDER.fullmatch(name) else name


def _listed(folder: Path, problems: list[str]) -> list[Path]:
    """The folders in a folder, hidden ones left out; a sentence in `problems` where it cannot be listed."""
    try:
        return [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"{folder}: cannot be listed ({error.strerror}), so what it holds is not shown")
        return []


def read_step_files(folder: Path) -> StepFiles:
    """Every record of a folder. A file that cannot be used costs only itself."""
    try:
        next(folder.iterdir(), None)
    except OSError as error:
        return StepFiles(odd=(f"{folder}: cannot be listed ({error.strerror}). Fix: chmod u+rwx, or ask whose it is",))
    odd: list[str] = []

    def tried(read: Callable[[Path], Any]) -> Any:
        try:
            return read(folder)
        except ArtifactError as error:
            odd.extend(error.problems)
            return None

    done = tried(is_done)
    if not done and (problem := tried(artifact_problem)):
        odd.append(f"{folder / ARTIFACT}: {problem}; it counts as none, so the same run command runs the step")
    progress = tried(lambda place: read_record(place / PROGRESS, Progress))
    holder, record, spec = (
        tried(read_holder),
        tried(read_job),
        tried(lambda place: read_record(place / STEP, SpecSummary)),
    )
    if spec is None and not odd:
        odd.append(f"{folder / STEP}: missing; expected the spec that the step runs by")
    inputs = tuple(Path(place) for place in spec.inputs.values()) if spec else ()
    warnings = progress.warnings if progress else tried(_recorded_warnings) if done else ()
    odd_files = tuple(dict.fromkeys(odd))
    return StepFiles(bool(done), progress, holder, record, inputs, odd_files, warnings or (), read_attempts(folder))


def _recorded_warnings(folder: Path) -> tuple[str, ...]:
    return tuple(str(sentence) for sentence in open_artifact(folder, verify=False).warnings)
