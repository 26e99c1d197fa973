"""The progress of a running step: `progress.json` in its folder, written by rank 0, read by anyone.

The launcher draws its bar from it, `python -m pipeline status` its table, also on another machine or the day
after. States: starting, running, saving, done, stopped, failed.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.core import heartbeat, stopwatch
from pipeline.core import slurm_client as slurm
from pipeline.core.errors import DISK_FULL_ERRNOS
from pipeline.core.files import write_json
from pipeline.core.records import record_or_none
from pipeline.workflow.artifact import PROGRESS
from pipeline.workflow.time_spent import add, between

ATTEMPT = "THEREFORE_ATTEMPT"  # in the environment: a launcher's name for one start of a step
MIN_SECONDS = 0.5  # between two writes of a running step
MANY_ATTEMPTS = 10  # attempts that a step may still need without a word about its time limit


@dataclass(frozen=True)
class Shrink:
    """A setting that the next attempt makes smaller, because this one ran out of memory."""

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class BadBatch:
    """A step at which training was not finite, and the rows of its batch."""

    step: int
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Progress:
    stage: str
    state: str
    done: int = 0
    total: int = 0
    unit: str = "steps"
    started: float = 0.0  # seconds since the epoch, of this attempt
    updated: float = 0.0
    first: int = 0  # `done` when the work of this attempt began, so that a resumed run's speed is its own
    since: float = 0.0  # when that was
    figures: dict[str, float] = field(default_factory=dict)  # the last loss, reward, …
    note: str = ""  # what it is doing, in a few words
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()  # of this attempt: what the user should read before they trust the result
    exit_code: int | None = None
    kind: str = ""  # of a failure whose cause may pass: see attempts.MAY_PASS
    shrink: Shrink | None = None
    bad_batch: BadBatch | None = None
    attempt: int = 1
    command: int = 0  # counts the run commands: see attempts.py
    began: float = 0.0  # seconds since the epoch: when the process of this attempt started
    spent: dict[str, float] = field(default_factory=dict)  # seconds of this attempt by part: see core/stopwatch.py
    earlier: dict[str, float] = field(default_factory=dict)  # of the attempts before it, and between them
    host: str = ""
    pid: int = 0
    token: str = ""  # ATTEMPT of the launcher that started it: two that start one step at once tell theirs by it

    @property
    def seconds(self) -> float:
        return max(0.0, self.updated - self.started)

    @property
    def parts(self) -> dict[str, float]:
        """The seconds of all attempts so far, by part."""
        return add(self.earlier, self.spent)

    @property
    def eta(self) -> float | None:
        """Seconds that are left at the speed so far; None before there is one."""
        steps = self.done - self.first
        if steps <= 0 or not self.total:
            return None
        return (self.updated - (self.since or self.started)) / steps * max(0, self.total - self.done)


def read_progress(folder: Path) -> Progress | None:
    """Read the step's last progress; None where there is no file, or one that cannot be used."""
    return record_or_none(folder / PROGRESS, Progress)


class ProgressFile:
    """The writer: `update(done=3, figures={"loss": 0.2})`. A folder of None writes nothing (ranks other than 0)."""

    def __init__(
        self, folder: Path | None, stage: str, command: int = 0, ready: Callable[[], float] = lambda: 0.0
    ) -> None:
        """`command` counts the run commands; `ready` returns when this one could have begun, 0 if it began at once."""
        self.folder = folder
        before = read_progress(folder) if folder else None
        now, began = time.time(), stopwatch.began()
        self.now = Progress(
            stage,
            "starting",
            started=now,
            updated=now,
            attempt=before.attempt + 1 if before and before.state != "done" else 1,
            command=command,
            began=began,
            spent=stopwatch.seconds(),
            earlier=earlier_time(before, command, began, ready) if folder else {},
            host=socket.gethostname(),
            pid=os.getpid(),
            token=this_attempt(),
        )
        self._written = 0.0
        heartbeat.beat(long=True)
        self._write()

    def update(self, *, figures: dict[str, float] | None = None, force: bool = False, **changes: Any) -> None:
        """Change fields and write, at most twice a second unless the state changes or `force` is given."""
        heartbeat.beat(long=changes.get("state", self.now.state) != "running")
        changed_state = changes.get("state", self.now.state) != self.now.state
        if "first" in changes:
            changes["since"] = time.time()
        merged = {**self.now.figures, **(figures or {})}
        self.now = replace(self.now, figures=merged, updated=time.time(), **changes)
        if "first" in changes and self.folder and (sentence := too_many_restarts(self.now)):
            print(f"note: {sentence}", flush=True)
        if changed_state or force or self.now.updated - self._written >= MIN_SECONDS:
            self._write()

    def warn(self, sentence: str) -> None:
        """Add a warning; the same sentence counts once."""
        if sentence not in self.now.warnings:
            self.update(warnings=(*self.now.warnings, sentence), force=True)

    def _write(self) -> None:
        if not self.folder:
            return
        self._written = time.time()
        self.now = replace(self.now, spent=stopwatch.seconds())
        try:
            write_json(self.folder / PROGRESS, asdict(self.now))
        except OSError as error:
            if self.now.state != "running" or error.errno not in DISK_FULL_ERRNOS:
                raise  # a step that trains goes on: it fails if a save finds no room, which may be there again by then


def earlier_time(
    before: Progress | None, command: int, began: float, ready: Callable[[], float] = lambda: 0.0
) -> dict[str, float]:
    """Return the seconds by part of the attempts before the one that `began`, and of the waiting between them.

    Between two run commands nothing waits but the user; a batch system's queue counts from `ready()` on.
    """
    before = before if before and before.state != "done" else None
    if not began:
        return before.parts if before else {}
    if before and before.command == command:
        counted = (before.began or before.updated) + sum(before.spent.values())
        noticed = before.updated if before.state in ("failed", "stopped") else began
        return add(before.parts, between(counted, noticed, began))
    queued = between(since, since, began) if (since := ready()) else {}
    return add(before.parts if before else {}, queued)


def attempt_token(job: str, restart: int, retry: int) -> str:
    """Return ATTEMPT of a start within a Slurm job: the restart that Slurm counts, the retry that its script counts."""
    return f"{job}-{restart}-{retry}"


def this_attempt() -> str:
    """Return the name of this start of a step, the same on every node of a job; empty where nobody has given one."""
    job = slurm.this_job()
    return os.environ.get(ATTEMPT) or (attempt_token(job, slurm.this_restart(), slurm.this_retry()) if job else "")


def too_many_restarts(progress: Progress) -> str | None:
    """A sentence where attempts are too short to get anywhere: more than `MANY` like those so far are needed."""
    before = progress.attempt - 1
    if before < 1 or not progress.total or not 0 < progress.first < progress.total:
        return None
    each = progress.first / before
    left = math.ceil((progress.total - progress.first) / each)
    if left <= MANY_ATTEMPTS:
        return None
    return (
        f"{each:.3g} {progress.unit} an attempt ({progress.first} of {progress.total} in {before}): about {left} more "
        "attempts are needed. Fix: raise cluster.slurm.time"
    )


def many_attempts(progress: Progress) -> str | None:
    """A sentence about a step that has ended after more than `MANY` attempts; None for fewer."""
    if progress.attempt <= MANY_ATTEMPTS:
        return None
    each = f"about {progress.total / progress.attempt:.3g} {progress.unit}"
    return (
        f"it took {progress.attempt} attempts of {each}, and each waits in the queue and loads the model. "
        "Fix: raise cluster.slurm.time"
    )


def describe(progress: Progress) -> str:
    """`loss 0.31, ETA 4:10` of a running step; the last figures of one that has ended."""
    parts = [progress.note] if progress.note else []
    parts += [f"{name} {_figure(value)}" for name, value in progress.figures.items()]
    if progress.state == "running" and progress.eta is not None:
        parts.append(f"ETA {format_duration(progress.eta)}")
    return ", ".join(parts)


def _figure(value: float) -> str:
    """`0.3142`, and a count as one: `14,930`."""
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def format_duration(seconds: float) -> str:
    """`0:07`, `12:30`, `3:04:05`"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
