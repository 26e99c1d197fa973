"""Repeat finished steps whose task or reward code has changed (`run --refresh`).

    python -m pipeline run gsm8k --refresh preprocess,grpo   these, if their code has changed, and what depends on them
    python -m pipeline run gsm8k --refresh changed           every step whose code has changed

A repeated result is not deleted: its folder moves to `runs/.replaced/`, with every result that was made from it, also
of other recipes. A step whose recorded code is the present code stays, so the same command resumes after an
interruption.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.core.errors import PlanError, did_you_mean
from pipeline.core.records import InvalidRecord, read_mapping
from pipeline.core.slurm_client import is_installed
from pipeline.workflow.artifact import STEP
from pipeline.workflow.jobs import describe_job, live_jobs
from pipeline.workflow.lock import ensure_unlocked
from pipeline.workflow.plan import Plan, Step
from pipeline.workflow.task_code import recorded_code

CHANGED = "changed"  # the word for every step whose code has changed
REPLACED = ".replaced"


def code_notes(plan: Plan) -> list[str]:
    """Return a sentence for each finished step of the plan whose code has changed since."""
    return [f"{step.label} is {text}" for step in plan.steps if (text := step.outdated)]


def outdated_folders(plan: Plan, names: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return the results that `--refresh names` repeats, inputs first, and notes on those that stay.

    Raises PlanError for a name that is not a step of the plan, and where a requested step needs a result that is moved
    aside and not repeated.
    """
    steps = [step for step in plan.steps if step.label in plan.wanted]
    known = {CHANGED, *(step.name for step in steps), *(step.stage for step in steps)}
    if unknown := [name for name in names if name not in known]:
        raise PlanError(*(f"--refresh: got {name!r}; {did_you_mean(name, known)}" for name in unknown))
    first, notes = list[Step](), list[str]()
    for step in steps:
        named = step.name in names or step.stage in names
        unknown_code = step.done and recorded_code(step.folder) is None  # an earlier version made it
        if (step.outdated and (named or CHANGED in names)) or (named and unknown_code):
            first.append(step)
        elif named:
            notes.append(_why_kept(step))
    found = _with_dependents(plan.runs, first)
    problems = [
        f"--refresh: {needed.label} is made from what is made again, and {step.label} needs it; add {needed.stage} "
        "to --stages, or leave --stages out"
        for step in steps
        for needed in step.inputs.values()
        if needed.folder in found and needed.label not in plan.wanted
    ]
    if problems:
        raise PlanError(*dict.fromkeys(problems))
    return found, notes


def _why_kept(step: Step) -> str:
    if not step.done:
        return f"{step.label} is not done, so there is no result of it to make again"
    return f"{step.label} stays: its code has not changed since. To make it again all the same, delete {step.folder}"


def _with_dependents(runs: Path, first: Iterable[Step]) -> list[Path]:
    """Return the folders of these steps and of all that were made from them, of every recipe, inputs first."""
    steps = {path.parent: _fingerprints(path.parent) for path in sorted(runs.glob(f"*/*/{STEP}"))}
    found = {step.folder: step.fingerprint for step in first}
    queue = list(found)
    for made in queue:  # grows while it is walked
        for folder, (fingerprint, inputs) in steps.items():
            if found[made] in inputs and folder not in found:
                found[folder] = fingerprint
                queue.append(folder)
    return queue


def _fingerprints(folder: Path) -> tuple[str, set[str]]:
    """Return a step's fingerprint and those of its inputs."""
    try:
        record = read_mapping(folder / STEP) or {}
    except InvalidRecord:  # `status` shows it
        record = {}
    payload = record.get("payload")
    inputs = payload.get("inputs") if isinstance(payload, dict) else None
    made_from = {str(value) for value in inputs.values()} if isinstance(inputs, dict) else set()
    return str(record.get("fingerprint")), made_from


def move_aside(folders: Sequence[Path], runs: Path) -> list[str]:
    """Move results to `runs/.replaced/`, dependents first; return a sentence for each.

    Raises ArtifactError or PlanError, before anything moves, where a step or a job of Slurm holds one.
    """
    for folder in folders:
        ensure_unlocked(folder)
    if is_installed() and (queued := live_jobs(folders)):
        taken = [describe_job(folder, job) for folder, job in queued.items()]
        raise PlanError(*taken, "wait for it (python -m pipeline status), or end it with python -m pipeline cancel")
    stamp, sentences = time.strftime("%Y%m%d-%H%M%S"), list[str]()
    for folder in reversed(folders):
        place = runs / REPLACED / folder.parent.name / f"{folder.name}-{stamp}"
        place.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(place)
        sentences.append(f"{folder.parent.name}/{folder.name} is made again; its result is kept in {place}")
    return sentences[::-1]
