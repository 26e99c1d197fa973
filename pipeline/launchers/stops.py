"""Requests to stop a local run, for all the steps that run: Ctrl-C, and the signals of a batch system."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from pipeline.core.slurm_client import this_job


class StopRequests:
    """Stop requests to a run: Ctrl-C, and TERM and USR1, which a batch system repeats. Entered in the main thread."""

    def __init__(self) -> None:
        self.count = 0
        self.by_user = False  # the first one was a Ctrl-C
        self._given = threading.Event()
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.count and signum != signal.SIGINT and this_job():
            return
        self.by_user = signum == signal.SIGINT if not self.count else self.by_user
        self.count += 1
        self._given.set()

    def end(self) -> None:
        """Have every step end at once, as after a second Ctrl-C."""
        self.count += 2
        self._given.set()

    def wait(self, seconds: float) -> bool:
        """Wait for a stop request. Returns whether there is one."""
        return self._given.wait(seconds)
