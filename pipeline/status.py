"""How far every step is, wherever it runs: the table of `status`, the logs, and the end of what still runs.

    rows = table(Path("runs"), ["tiny"])        python -m pipeline status [--watch] [--json]
    follow(log_of(find_step(runs, "grpo")))     python -m pipeline logs grpo -f
    cancel(rows)                                python -m pipeline cancel tiny

What is true is put together from what the step has written (order, progress, artifact, owner) and what Slurm says,
while it runs and the day after, with accounting or without.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifact import LOG, STEP, STOP, is_alive, is_done, read_owner
from pipeline.errors import LaunchError, MissingDependency, PlanError, did_you_mean
from pipeline.files import read_json
from pipeline.progress import Progress, clock, describe, read_progress
from pipeline.slurm import Job, JobRecord, ask, call, find, read_job, reason_of
from pipeline.stage import STAGES
from pipeline.task_code import code_changes_of

ACTIVE = ("starting", "running", "saving")

# what a job's end means, and how to go on
ENDS = {
    "TIMEOUT": "ran into its time limit before it could save: raise cluster.slurm.save_before or cluster.slurm.time",
    "OUT_OF_MEMORY": "was killed for using more memory than cluster.slurm.memory",
    "NODE_FAIL": "its node failed, and Slurm did not start it again",
    "PREEMPTED": "was preempted, and Slurm did not start it again",
    "CANCELLED": "was cancelled",
    "BOOT_FAIL": "its node did not start",
    "DEADLINE": "its deadline has passed",
}


@dataclass(frozen=True)
class Row:
    """A step. `state`: waiting, queued, starting, running, saving, ending, done, stopped, failed, cancelled, lost
    (gone without a word), unknown (Slurm cannot be asked)."""

    step: str  # tiny/grpo-1a2b3c4d5e
    state: str
    folder: str
    job: str | None
    launcher: str
    node: str
    seconds: float  # of this attempt
    elapsed: str  # the same as people read it; of a running job Slurm's own
    limit: str  # of the job
    done: int
    total: int
    eta: float | None  # seconds
    figures: dict[str, float]  # the last loss, reward, …
    what: str  # the same in words
    restarts: int
    reasons: tuple[str, ...]  # why it waits, or why it ended
    warnings: tuple[str, ...]  # what the step reported: rows left out, nothing learned
    log: str
    updated: float | None

    @property
    def live(self) -> bool:
        """Whether something may still happen without anybody typing."""
        return self.state in (*ACTIVE, "queued", "ending")


def table(runs: Path, recipes: Sequence[str] = (), *, everything: bool = False) -> tuple[list[Row], list[str]]:
    """The newest step of each name (`everything`: all of them), and what kept Slurm from being asked."""
    unknown = [name for name in recipes if not (runs / name).is_dir()]
    if unknown:
        there = [path.name for path in runs.glob("*") if path.is_dir()]
        raise PlanError(*(f"{runs}/{name}: nothing has run; {did_you_mean(name, there)}" for name in unknown))
    folders = [path.parent for path in runs.glob(f"*/*/{STEP}") if not recipes or path.parts[-3] in recipes]
    folders.sort(key=_place)
    if not everything:  # a step's folders differ in their fingerprints; sorted by time, so the newest wins
        folders = list({(folder.parent, folder.name.rpartition("-")[0]): folder for folder in folders}.values())
    records = {folder: record for folder in folders if not is_done(folder) and (record := read_job(folder))}
    jobs, troubles = _jobs(records)
    rows: dict[Path, Row] = {}
    for folder in folders:
        rows[folder] = _row(folder, jobs.get(folder), rows, asked=not troubles)
    return list(rows.values()), troubles


def _place(folder: Path) -> tuple[str, int, str, float]:
    """Recipes by name, steps in the order of the pipeline, the newest last."""
    stage = folder.name.rpartition("-")[0]
    place = list(STAGES).index(stage.partition("-")[0]) if stage.partition("-")[0] in STAGES else len(STAGES)
    return str(folder.parent), place, stage, (folder / STEP).stat().st_mtime


def _jobs(records: dict[Path, JobRecord]) -> tuple[dict[Path, Job], list[str]]:
    """What Slurm says of the steps' jobs. Where it cannot be asked, the files still tell much."""
    if not records:
        return {}, []
    try:
        known = ask(record.id for record in records.values() if record.id)
        lost = find(record.token for record in records.values() if not record.id)
    except (LaunchError, MissingDependency) as error:
        return {}, [*error.problems, "what follows is from the files of the steps alone"]
    found = {folder: known.get(r.id) if r.id else lost.get(r.token) for folder, r in records.items()}
    return {folder: job for folder, job in found.items() if job}, []


def _row(folder: Path, job: Job | None, before: dict[Path, Row], *, asked: bool) -> Row:
    progress, owner, record = read_progress(folder), read_owner(folder), read_job(folder)
    if record and not asked and not is_done(folder):
        state, reasons = "unknown", [f"its last word: {progress.state}" if progress else "given to Slurm"]
    else:
        state, reasons = _state(folder, progress, job, record)
    inputs = _inputs(folder, before)
    if state == "queued" and job and job.reason == "Dependency":
        waiting = [_label(row) for row in inputs if row.state != "done"]
        reasons = [f"waits for {', '.join(waiting)}"] if waiting else []
    broken = [row for row in inputs if row.state in ("failed", "cancelled", "lost", "stopped")]
    if state in ("cancelled", "lost") and broken and not progress:
        state = "cancelled"  # Slurm does that to what can never start
        reasons = [f"never started: {_label(row)} {row.state}" for row in broken]
    running = state in ACTIVE and progress is not None
    return Row(
        step=f"{folder.parent.name}/{folder.name}",
        state=state,
        folder=str(folder),
        job=job.id if job else record.id if record else None,
        launcher=record.launcher if record else "local",
        node=(job.node if job and job.live else "") or (owner.host if owner else progress.host if progress else ""),
        seconds=progress.seconds if progress else 0.0,
        elapsed=job.elapsed if job and job.state == "RUNNING" else clock(progress.seconds) if progress else "",
        limit=job.limit if job else "",
        done=progress.done if progress else 0,
        total=progress.total if progress else 0,
        eta=progress.eta if progress and running else None,
        figures=progress.figures if progress else {},
        what=describe(progress) if progress else "",
        restarts=max(progress.attempt - 1 if progress else 0, job.restarts if job else 0),
        reasons=tuple(reasons),
        warnings=progress.warnings if progress else (),
        log=record.log if record and record.log else str(folder / LOG),
        updated=progress.updated if progress else None,
    )


def _state(folder: Path, progress: Progress | None, job: Job | None, record: JobRecord | None) -> tuple[str, list[str]]:
    """A step's state and why: what Slurm says of a job that lives, else what the step itself has said last."""
    if is_done(folder):
        changed = code_changes_of(folder)
        return "done", [f"its code has changed since: {', '.join(changed)}"] if changed else []
    owner = read_owner(folder)
    working = progress.state if progress and progress.state in ACTIVE else None
    ended = progress.state if progress and progress.state in ("failed", "stopped") else None
    told = list(progress.problems) if progress and ended else []
    if job and job.state == "RUNNING":
        return (working if working and owner and owner.job == job.id else "starting"), []
    if job and job.live:
        return ("ending", told) if job.state == "COMPLETING" else ("queued", [_pending(job)])
    if working and owner and not owner.job and is_alive(owner):
        return working, []
    if ended and not (job and job.state == "CANCELLED"):
        return ended, told
    if job:
        code = f"; exit code {job.exit_code}" if job.exit_code not in ("", "0:0", "0") else ""
        why = f"{ENDS.get(job.state, 'ended without a word, see its log')} ({job.state}{code})"
        return "cancelled" if job.state == "CANCELLED" else "failed", [why, *told]
    if record is None and progress is None:
        return "waiting", []
    who = f"Slurm job {record.id or '(not taken)'}" if record else str(owner) if owner else "its process"
    gone = "without a word: killed, out of memory, or its node is off" if progress else "and it never started"
    return "lost", [f"{who} is gone {gone}; the same run command goes on"]


def _pending(job: Job) -> str:
    """Slurm's reason for a job that waits, and what the usual ones mean."""
    words = {
        "Priority": "others are before it",
        "Resources": "waits for free nodes",
        "BeginTime": "starts again in a moment",
        "DependencyNeverSatisfied": "what it waits for has failed",
        "ReqNodeNotAvail": "its nodes are down or reserved",
        "PartitionTimeLimit": "asks for more time than its partition allows: lower cluster.slurm.time",
        "JobHeldUser": "held: scontrol release",
        "JobHeldAdmin": "held by an administrator",
    }
    meaning = words.get(job.reason.partition(",")[0].strip("()"), "")
    return f"{meaning} ({job.reason})" if meaning else job.reason


def _label(row: Row) -> str:
    return row.step.rpartition("-")[0]


def _inputs(folder: Path, before: dict[Path, Row]) -> list[Row]:
    wanted = {Path(where) for where in (read_json(folder / STEP) or {}).get("inputs", {}).values()}
    return [row for place, row in before.items() if place in wanted]


# ---------------------------------------------------------------- shown

HEADINGS = ("state", "step", "job", "node", "time", "limit", "progress", "restarts", "")


def show(rows: Sequence[Row], troubles: Sequence[str] = ()) -> str:
    """The table as text: a line a step; under it why it waits or failed, and the log of what has begun."""
    lines = [f"note: {text}" for text in troubles]
    cells = [
        (
            row.state,
            row.step,
            row.job or "",
            row.node,
            row.elapsed,
            row.limit,
            f"{row.done}/{row.total}" if row.total else "",
            str(row.restarts) if row.restarts else "",
            row.what,
        )
        for row in rows
    ]
    used = [any(line[column] for line in cells) for column in range(len(HEADINGS))]
    widths = [max(len(line[column]) for line in [HEADINGS, *cells]) for column in range(len(HEADINGS))]
    for number, line in enumerate([HEADINGS, *cells]):
        shown = [text.ljust(width) for text, width, use in zip(line, widths, used, strict=True) if use]
        lines.append("  ".join(shown).rstrip())
        row = rows[number - 1] if number else None
        if row:
            lines += [f"{'':<{widths[0]}}  {reason}" for reason in row.reasons if reason]
            lines += [f"{'':<{widths[0]}}  warning: {warning}" for warning in row.warnings]
            if row.state in (*ACTIVE, "failed", "lost", "stopped", "ending"):
                lines.append(f"{'':<{widths[0]}}  log: {row.log}")
    return "\n".join(lines)


def watch(read: Callable[[], tuple[list[Row], list[str]]], seconds: float = 2.0) -> Iterator[str]:
    """The table again and again until nothing is under way any more; on a terminal each takes the last one's place."""
    clear = "\x1b[H\x1b[J" if sys.stdout.isatty() else ""
    while True:
        rows, troubles = read()
        going = sum(row.live for row in rows)
        foot = (
            f"{going} step{'s' * (going > 1)} under way; Ctrl-C leaves what runs running"
            if going
            else "nothing is under way"
        )
        yield f"{clear}{show(rows, troubles)}\n\n{time.strftime('%H:%M:%S')}  {foot}"
        if not going:
            return
        time.sleep(seconds)


# ---------------------------------------------------------------- one step


def find_step(rows: Sequence[Row], name: str) -> Row:
    """The step that `name` means: grpo, tiny/grpo, tiny/grpo-1a2b3c4d5e, its folder, or a job's id."""
    wanted = name.rstrip("/")
    full = [row for row in rows if wanted in (row.step, row.folder, row.job)]
    label = [row for row in rows if _label(row) == wanted]
    short = [row for row in rows if row.step.partition("/")[2].rpartition("-")[0] == wanted]
    found = full or label or short
    if not found:
        known = {_label(row) for row in rows}
        close = did_you_mean(name, known if "/" in name else {label.partition("/")[2] for label in known})
        raise PlanError(f"{name!r}: no such step; {close}")
    if len(found) > 1:
        raise PlanError(f"{name!r}: which one? {', '.join(row.step for row in found)}")
    return found[0]


def follow(path: Path, going: Callable[[], bool] | None = None, poll: float = 0.5) -> Iterator[str]:
    """A log's text; with `going` what is added to it too, until that says no."""
    if not path.is_file() and going is None:
        raise PlanError(f"{path}: nothing has been written yet; python -m pipeline status says what the step waits for")
    position, more = 0, True
    while more:
        more = going is not None and going()  # asked before the last read, so that the end is not missed
        if path.is_file():
            with path.open("rb") as file:
                file.seek(position)
                text = file.read()
            position += len(text)
            if text:
                yield text.decode(errors="replace")
        if more:
            time.sleep(poll)


def cancel(rows: Iterable[Row]) -> list[str]:
    """End these steps: Slurm jobs by scancel, all at once; a step of this machine is asked to save and leave."""
    told = []
    chosen = [row for row in rows if row.live]
    jobs = [row.job for row in chosen if row.job]
    if jobs:
        done = call("scancel", *jobs)
        if done.returncode:
            raise LaunchError(f"scancel {' '.join(jobs)}: {reason_of(done.stderr)}")
        told.append(f"cancelled {len(jobs)} jobs: {' '.join(jobs)}")
    for row in chosen:
        if not row.job:
            (Path(row.folder) / STOP).touch()
            told.append(f"{row.step}: asked to save and leave")
    return told


def as_record(row: Row) -> dict[str, Any]:
    return {**vars(row), "reasons": list(row.reasons), "warnings": list(row.warnings)}
