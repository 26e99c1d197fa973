"""Signs of life of a stage's processes, for the watchdog of their launcher (workflow/watchdog.py).

    beat()             work goes on; call it as often as you like, in the main thread: it costs a look at the clock
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
from pathlib import Path

FOLDER = "THEREFORE_HEARTBEATS"  # in the environment: where the launcher reads them
MIN_SECONDS = 0.5  # between two writes
WORKING, LONG, WAITING = "working", "long", "waiting"
_last = (0.0, "")  # when a sign was written last, by the monotonic clock, and which


def beat(*, long: bool = False) -> None:
    """Report that this process works. Signs of threads other than the main one say nothing of it and do not count."""
    _write(LONG if long else WORKING)


def wait() -> None:
    """Report that this process waits for others until its next beat."""
    _write(WAITING)


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
