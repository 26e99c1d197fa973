"""Signs of life of a stage's processes, for the watchdog of their launcher (workflow/watchdog.py).

    beat()             work continues; call it as often as you like, in the main thread: it costs a look at the clock
    beat(long=True)    what comes now may take long without a sign: a first compilation, a save, a validation
    wait()             from here on this process waits for others, and its silence says nothing

Each process writes a small file on its node's own disk, in the folder that the launcher names; elsewhere nothing
happens.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.core.files import read_json, write_json

FOLDER = "THEREFORE_HEARTBEATS"  # in the environment: where the launcher reads them
MIN_SECONDS = 0.5  # between two writes
FAILURE = "failure-"  # and the rank: the name of a report
WORKING, LONG, WAITING = "working", "long", "waiting"
_last = (0.0, "")  # when a sign was written last, by the monotonic clock, and which


def beat(*, long: bool = False) -> None:
    """Report that this process works. Signs of threads other than the main one say nothing of it and do not count."""
    _write(LONG if long else WORKING)


def wait() -> None:
    """Report that this process waits for others until its next beat."""
    _write(WAITING)


@dataclass(frozen=True)
class Failure:
    """Why a process failed, as it saw it; the launcher's side finds the cause among those of all processes."""

    rank: int
    problems: list[str]
    kind: str
    exit_code: int
    shrink: tuple[str, float, float] | None = None


def report_failure(failure: Failure) -> None:
    """Leave word of why this process failed."""
    if folder := os.environ.get(FOLDER):
        with contextlib.suppress(OSError):
            write_json(Path(folder, f"{FAILURE}{failure.rank}"), asdict(failure))


def read_failures() -> list[Failure]:
    """Return what processes of this node have reported, by rank."""
    folder = os.environ.get(FOLDER)
    records = [read_json(path) for path in Path(folder).glob(f"{FAILURE}*")] if folder else []
    return sorted((Failure(**record) for record in records if record), key=lambda failure: failure.rank)


def _write(state: str) -> None:
    global _last
    folder, now = os.environ.get(FOLDER), time.monotonic()
    if folder is None or threading.current_thread() is not threading.main_thread():
        return
    if _last[1] == state and now - _last[0] < MIN_SECONDS:
        return
    _last = (now, state)
    with contextlib.suppress(OSError):  # a full disk: without signs the watchdog sees nothing
        Path(folder, os.environ.get("RANK", "0")).write_text(f"{os.getpid()} {state} {now}", encoding="ascii")
