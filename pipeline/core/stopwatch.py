"""Where the seconds of a stage's process go, by part.

    stopwatch.begin(process_start())         once: counts from the start of this process, its imports in `start`
    stopwatch.enter("rows")                  from here on, until the next `enter`
    with stopwatch.part("save"): …           inside only; afterwards the part before it continues
    for answer in stopwatch.each("generate", answers): …       while the next answer is waited for
    stopwatch.seconds()                      {"start": 3.1, "rows": 0.8, …}; the sum is the time since the beginning

Every moment counts in exactly one part, so nothing counts twice. It is the time of the main thread by the monotonic
clock; other threads change nothing, and neither does a process in which nothing has begun.

A GPU computes after the host has queued its work. Nothing is synchronized for this, so the time of a queue counts where
the host next waits for it: most of an optimizer's own time on a GPU is in `forward/backward`. With several processes
each measures itself, and rank 0's is recorded; gradients that are exchanged while backward runs are a part of it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

PARTS = {  # in the order in which tables show them
    "start": "the process starts: imports, checks of the devices",
    "load": "models and checkpoints are read, trainers and engines built",
    "rows": "rows are read, tokenized and put into batches",
    "generate": "completions are generated",
    "rewards": "GRPO's completions are graded",
    "forward/backward": "loss and gradients",
    "optimizer": "gradients are clipped, weights updated",
    "save": "checkpoints and results are written, as far as that holds up the work",
    "evaluate": "validation; in an evaluation grading and counting",
    "wait": "for other ranks, in the queue, between two attempts",
    "lost": "an attempt was killed: from its last record to its end",
    "other": "logs, callbacks, and what else comes between",
}


class Stopwatch:
    """Adds the time since `began`, by the monotonic clock, to one part after another."""

    def __init__(self, began: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.thread = threading.get_ident()
        self.began = time.time() - (clock() - began)  # seconds since the epoch
        self.since = began
        self.open = ["start"]  # the parts that are open, the inner one last
        self.spent: dict[str, float] = {}

    def charge(self) -> None:
        """Add the time since the last call to the inner part."""
        now = self.clock()
        self.spent[self.open[-1]] = self.spent.get(self.open[-1], 0.0) + now - self.since
        self.since = now


_watch: Stopwatch | None = None


def begin(began: float | None = None) -> None:
    """Count from `began` (by the monotonic clock; None: from now); what another stage of this process counted ends."""
    global _watch
    _watch = Stopwatch(time.monotonic() if began is None else began)


def enter(part: str) -> None:
    """Count in this part from here on, instead of the one before."""
    if watch := _mine():
        watch.charge()
        watch.open[-1] = part


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Count in this part inside."""
    watch = _mine()
    if watch is None:
        yield
        return
    watch.charge()
    watch.open.append(name)
    try:
        yield
    finally:
        watch.charge()
        watch.open.pop()


def timed(name: str, function: Callable[P, T]) -> Callable[P, T]:
    """Return the function with its calls counted in this part."""

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with part(name):
            return function(*args, **kwargs)

    return call


def each(name: str, items: Iterable[T]) -> Iterator[T]:
    """Yield the items; what each takes to come counts in this part, what is done with it does not."""
    iterator = iter(items)
    while True:
        with part(name):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def seconds() -> dict[str, float]:
    """Return the seconds of each part up to now; {} before `begin`."""
    if watch := _mine():
        watch.charge()
    return {name: round(spent, 3) for name, spent in _watch.spent.items()} if _watch else {}


def began() -> float:
    """Return when counting began, in seconds since the epoch; 0 before `begin`."""
    return _watch.began if _watch else 0.0


def process_start(pid: int | None = None) -> float | None:
    """Return when a process (None: this one) started, by the monotonic clock; None where that is not known."""
    try:
        ticks = int(Path(f"/proc/{pid or 'self'}/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return None
    return time.monotonic() - max(0.0, age)


def _mine() -> Stopwatch | None:
    return _watch if _watch and _watch.thread == threading.get_ident() else None
