"""The state of every step, wherever it runs: the table of `status`, the logs, and cancelling.

    rows = table(Path("runs"), ["tiny"])        python -m pipeline status [--watch] [--json]
    follow(log_of(find_step(runs, "grpo")))     python -m pipeline logs grpo -f
    cancel(rows)                                python -m pipeline cancel tiny

A state follows from the step's own files (spec, progress, artifact, lock) and from Slurm, with accounting or without.
A folder with a file that cannot be used is a row that says so. A command that repeats reads the files each time and
queries Slurm at most every 30 s (`ThrottledQuery`).
"""

from __future__ import annotations

import codecs
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core import slurm_client as slurm
from pipeline.core.errors import LaunchError, PlanError, did_you_mean, explain_disk, printable
from pipeline.core.slurm_client import Job, JobRecord, cluster_option, error_text, run_slurm
from pipeline.core.slurm_words import end_reason, explain_exit_code, pending_reason
from pipeline.workflow.artifact import LOG, STEP, STOP, stage_and_role
from pipeline.workflow.attempts import describe_attempts, may_start_again
from pipeline.workflow.jobs import QueueSnapshot, query
from pipeline.workflow.lock import is_alive
from pipeline.workflow.progress import Progress, attempt_token, describe, format_duration, too_many_restarts
from pipeline.workflow.stage import STAGES
from pipeline.workflow.step_folders import (
    SpecSummary,
    StepFiles,
    read_step_files,
    read_summary,
    short_name,
    step_folders,
)
from pipeline.workflow.task_code import code_changes_of

CHUNK = 1 << 20  # bytes of a log that are read at once
SILENT_SECONDS = 900.0  # without progress, after which a step may hang: a long step of GRPO takes 8 minutes
QUERY_INTERVAL = 30.0  # seconds between two questions to Slurm of a command that repeats; sites forbid more

ACTIVE = ("starting", "running", "saving")
ALREADY_OVER = ("already completing or completed", "Invalid job id")  # scancel about a job that has just ended


@dataclass(frozen=True)
class Row:
    """A step. `state`: waiting, queued, starting, running, saving, ending, done, stopped, failed, cancelled, lost
    (exited without a final status), unknown (Slurm cannot be queried), odd (a file of its folder cannot be used)."""

    step: str  # tiny/grpo-1a2b3c4d5e
    recipe: str  # the folder of runs/ that it lies in: tiny, tiny+qwen1.5b, evaluations, exports
    name: str  # its folder's name without the fingerprint: grpo
    stage: str | None  # None: not known, because its step.json cannot be used
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
    cluster: str | None = None  # of the job, where it is not the one that is reached from here
    user: str | None = None  # of the job
    seconds_by_part: dict[str, float] = field(default_factory=dict)  # of all attempts: see core/stopwatch.py

    @property
    def label(self) -> str:
        """`tiny/grpo`"""
        return f"{self.recipe}/{self.name}"

    @property
    def live(self) -> bool:
        """Whether something may still happen without anybody typing."""
        return self.state in (*ACTIVE, "queued", "ending")


@dataclass
class ThrottledQuery:
    """Slurm's answers for a command that repeats: queried at most every `every` seconds."""

    every: float = QUERY_INTERVAL
    answers: QueueSnapshot = field(default_factory=QueueSnapshot)

    def __call__(self, records: Iterable[JobRecord], more: Iterable[tuple[str, str | None]]) -> QueueSnapshot:
        if time.time() - self.answers.at >= self.every:
            self.answers = query(records, more)
        return self.answers


def table(
    runs: Path,
    recipes: Sequence[str] = (),
    *,
    everything: bool = False,
    ask: Callable[[Iterable[JobRecord], Iterable[tuple[str, str | None]]], QueueSnapshot] = query,
) -> tuple[list[Row], list[str]]:
    """The newest step of each name (`everything`: all of them), and why Slurm could not be queried."""
    folders, unlisted = step_folders(runs, recipes)
    specs = {folder: read_summary(folder) for folder in folders}
    folders.sort(key=lambda folder: _place(folder, specs[folder]))
    if not everything:  # a step's folders differ in their fingerprints; sorted by time, so the newest wins
        newest = {(folder.parent, short_name(folder, specs[folder])): folder for folder in folders}
        folders = list(newest.values())
    files = {folder: read_step_files(folder) for folder in folders}
    records = [one.record for one in files.values() if one.record and not one.done]
    live_holders = [one.holder for one in files.values() if one.holder and not one.done]
    holders = [(holder.job, holder.cluster) for holder in live_holders if holder.job]
    answers = ask(records, holders) if records or holders else QueueSnapshot()
    rows: dict[Path, Row] = {}
    for folder in folders:
        rows[folder] = _row(folder, specs[folder], files[folder], answers, rows)
    problems = answers.problems if records or holders else []
    alone = ["the states below are from the steps' files alone"] if problems else []
    return list(rows.values()), [*unlisted, *problems, *alone]


def _place(folder: Path, spec: SpecSummary | None) -> tuple[str, int, str, float]:
    """Recipes by name, steps in the order of the pipeline, the newest last."""
    name = short_name(folder, spec)
    stage = spec.stage if spec else stage_and_role(name)[0]  # the name is all that is left where step.json is damaged
    place = list(STAGES).index(stage) if stage in STAGES else len(STAGES)
    try:
        written = (folder / STEP).stat().st_mtime
    except OSError:  # gone since, or a stale handle: `read_step_files` tells
        written = 0.0
    return str(folder.parent), place, name, written


def _row(
    folder: Path, spec: SpecSummary | None, files: StepFiles, answers: QueueSnapshot, before: dict[Path, Row]
) -> Row:
    progress, holder, record = files.progress, files.holder, files.record
    job = answers.job_of(record) if record and not files.done else None
    state, reasons = _state(folder, files, job, answers)
    wanted = {place.absolute() for place in files.inputs}
    inputs = [row for place, row in before.items() if place.absolute() in wanted]
    if state == "queued" and job and job.reason == "Dependency":
        waiting = [row.label for row in inputs if row.state != "done"]
        reasons = [f"waits for {', '.join(waiting)}"] if waiting else []
    broken = [row for row in inputs if row.state in ("failed", "cancelled", "lost", "stopped", "odd")]
    if state in ("cancelled", "lost") and broken and not progress:
        state = "cancelled"  # Slurm does that to what can never start
        reasons = [f"never started: {row.label} {row.state}" for row in broken]
    if job and job.live and job.user and job.user != slurm.this_user():
        reasons = [*reasons, f"a job of {job.user}"]
    if progress and state in (*ACTIVE, "queued") and (sentence := too_many_restarts(progress)):
        reasons = [*reasons, sentence]
    if state in ACTIVE and (sentence := describe_attempts(files.attempts)):
        reasons = [*reasons, sentence]
    command = record.command if record and record.command else "the run command that submitted it"
    if state == "stopped" and record and not (job and job.live):
        reasons = [*reasons, f"its job was not queued again. Fix: {command}"]
    elif state in ("failed", "cancelled") and job and not broken and not any("Fix: " in text for text in reasons):
        reasons = [*reasons, f"Fix: {command} resumes it"]
    running = state in ACTIVE and progress is not None
    if running and progress and (silent := time.time() - progress.updated) > SILENT_SECONDS:
        why = "a long step, or a process that hangs or was stopped; see its log"
        reasons = [*reasons, f"no progress written for {format_duration(silent)}: {why}"]
    return Row(
        step=f"{folder.parent.name}/{folder.name}",
        recipe=folder.parent.name,
        name=short_name(folder, spec),
        stage=spec.stage if spec else None,
        state=state,
        folder=str(folder),
        job=job.id if job else record.id if record else None,
        launcher=record.launcher if record else "local",
        node=(job.node if job and job.live else "") or (holder.host if holder else progress.host if progress else ""),
        seconds=progress.seconds if progress else 0.0,
        elapsed=job.elapsed
        if job and job.state == "RUNNING"
        else format_duration(progress.seconds)
        if progress
        else "",
        limit=job.limit if job else "",
        done=progress.done if progress else 0,
        total=progress.total if progress else 0,
        eta=progress.eta if progress and running else None,
        figures=progress.figures if progress else {},
        what=describe(progress) if progress else "",
        restarts=max(progress.attempt - 1 if progress else 0, job.restarts if job else 0),
        reasons=(*reasons, *(files.odd if state != "odd" else ())),
        warnings=files.warnings,
        log=record.log if record and record.log else str(folder / LOG),
        updated=progress.updated if progress else None,
        cluster=job.cluster if job else record.cluster if record else None,
        user=(job.user if job else "") or (record.user if record else None) or (holder.user if holder else None),
        seconds_by_part=progress.parts if progress else {},
    )


def _state(folder: Path, files: StepFiles, job: Job | None, answers: QueueSnapshot) -> tuple[str, list[str]]:
    """A step's state and why: what Slurm says of a job that lives, else what the step itself has said last."""
    progress, holder, record = files.progress, files.holder, files.record
    if files.done:
        changed = [] if files.odd else code_changes_of(folder)
        return "done", [f"its code has changed since: {', '.join(changed)}"] if changed else []
    working = progress.state if progress and progress.state in ACTIVE else None
    ended = progress.state if progress and progress.state in ("failed", "stopped") else None
    last_problems = list(progress.problems) if progress and ended else []
    where = record.cluster if record else holder.cluster if holder and holder.job else None
    if (record or (holder and holder.job and not ended)) and not answers.is_reachable(where):
        return "unknown", [f"its last word: {progress.state}" if progress else "given to Slurm"]
    again = job is not None and job.state == "RUNNING" and may_start_again(files.attempts, progress)
    if ended and progress and job and job.live and job.state != "COMPLETING" and _is_of_restart(progress, job):
        if again:
            return "starting", []
        if ended == "stopped":
            return "ending", last_problems  # its script queues it again
        return ended, last_problems  # Slurm does not know yet, or was queried before
    if job and job.state == "RUNNING":
        return (working if working and holder and holder.job == job.id else "starting"), []
    if job and job.live:
        if working and holder and holder.job == job.id and (holder.restart or 0) >= job.restarts:
            return working, []  # it has started since Slurm was queried
        return ("ending", last_problems) if job.state == "COMPLETING" else ("queued", [pending_reason(job)])
    if working and holder and is_alive(holder, answers if holder.job else None):
        return working, []
    if files.odd and not job and not ended:
        return "odd", list(files.odd)
    if ended and not (job and job.state == "CANCELLED"):
        return ended, last_problems
    full = _full_disk(folder)
    if job:
        code = f"; {how}" if (how := explain_exit_code(job.exit_code)) else ""
        log = Path(record.log) if record and record.log else folder / LOG
        why = f"{full or end_reason(job, log)} ({job.state}{code})"
        return "cancelled" if job.state == "CANCELLED" else "failed", [why, *last_problems]
    if record is None and progress is None:
        return "waiting", []
    who = f"Slurm job {record.id or '(not taken)'}" if record else str(holder) if holder else "its process"
    outcome = "exited without a final status (killed, out of memory or node failure)" if progress else "never started"
    return "lost", [full] if full else [f"{who} {outcome}. Fix: rerun the same command to resume"]


def _is_of_restart(progress: Progress, job: Job) -> bool:
    """Whether a step's progress is of the attempt that Slurm counts now; clocks of two machines are not compared."""
    return progress.token.startswith(attempt_token(job.id, job.restarts, 0)[:-1])


def _full_disk(folder: Path) -> str | None:
    """A sentence where the folder's disk is full: then a step could not even write why it ended."""
    try:
        return explain_disk(OSError(), folder)
    except OSError:
        return None


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
    return printable("\n".join(lines))


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
    folder = str(Path(wanted).absolute())
    full = [row for row in rows if wanted in (row.step, row.job) or folder == str(Path(row.folder).absolute())]
    label = [row for row in rows if row.label == wanted]
    short = [row for row in rows if row.name == wanted]
    found = full or label or short
    if not found:
        known = {row.label if "/" in name else row.name for row in rows}
        close = did_you_mean(name, known)
        raise PlanError(f"{name!r}: no such step; {close}")
    if len(found) > 1:
        raise PlanError(f"{name!r}: which one? {', '.join(row.step for row in found)}")
    return found[0]


def follow(path: Path, going: Callable[[], bool] | None = None, poll: float = 0.5) -> Iterator[str]:
    """A log's text; with `going` what is added to it too, until that says no."""
    if not path.is_file() and going is None:
        raise PlanError(f"{path}: nothing has been written yet; python -m pipeline status says what the step waits for")
    position, more = 0, True
    letters = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a letter may be cut by the end of a piece
    while more:
        more = going is not None and going()  # checked before the last read, so that the end is not missed
        try:
            for text in _pieces(path, position):
                position += len(text)
                shown = letters.decode(text).replace("\r\n", "\n").replace("\r", "\n")  # of progress bars
                yield printable(shown)
        except OSError as error:  # also a log that is not there yet
            if going is None:
                raise PlanError(f"{path}: cannot be read ({error.strerror}); try again") from error
        if more:
            time.sleep(poll)
    if rest := letters.decode(b"", final=True):
        yield rest


def _pieces(path: Path, position: int) -> Iterator[bytes]:
    """What a file holds from a position on, piece by piece: a log may be larger than the memory."""
    with path.open("rb") as file:
        file.seek(position)
        while piece := file.read(CHUNK):
            yield piece


def cancel(rows: Iterable[Row]) -> list[str]:
    """End these steps: Slurm jobs by scancel, all at once; a step of this machine is asked to save and leave.

    PlanError where one is another user's job: Slurm lets only its owner end it.
    """
    messages = []
    chosen = [row for row in rows if row.live]
    jobs = [row for row in chosen if row.job]
    others = [row for row in jobs if row.user and row.user != slurm.this_user()]
    if others and os.geteuid() != 0:
        raise PlanError(
            *(
                f"{row.step}: got job {row.job} of {row.user}, which only {row.user} can end; expected a job of yours. "
                f"Fix: ask {row.user} to run the same cancel command, or name other steps"
                for row in others
            )
        )
    for cluster in dict.fromkeys(row.cluster for row in jobs):
        ids = [str(row.job) for row in jobs if row.cluster == cluster]
        done = run_slurm("scancel", *cluster_option(slurm.remote_cluster(cluster)), *ids)
        wrong = [line for line in done.stderr.splitlines() if not any(text in line for text in ALREADY_OVER)]
        if done.returncode and wrong:
            raise LaunchError(f"scancel {' '.join(ids)}: {error_text(chr(10).join(wrong))}")
        messages.append(f"cancelled {len(ids)} jobs: {' '.join(ids)}")
    for row in chosen:
        if not row.job:
            messages.append(_ask_to_stop(row))
    return messages


def _ask_to_stop(row: Row) -> str:
    try:
        (Path(row.folder) / STOP).touch()
    except OSError as error:
        whose = row.user if row.user and row.user != slurm.this_user() else "its owner"
        raise PlanError(
            f"{row.step}: cannot be asked to stop: {row.folder}/{STOP} cannot be written ({error.strerror}). "
            f"Fix: ask {whose} to run the same cancel command, or to open the folder to the group (chmod g+w)"
        ) from error
    return f"{row.step}: asked to save and leave"


def as_record(row: Row) -> dict[str, Any]:
    return {**vars(row), "reasons": list(row.reasons), "warnings": list(row.warnings)}
