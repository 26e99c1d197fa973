"""A bound for code that may not take hours: on work, and not on the speed of the machine."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

MUCH = 60  # seconds of processor time; what is right takes a thousandth of it, what is wrong hours, or never ends
CLOCK = 0.002  # seconds below which a measured time says nothing


@contextmanager
def ends() -> Iterator[None]:
    """Fail where the block does not end, instead of waiting for it."""

    def fail(signum: int, frame: FrameType | None) -> None:
        raise AssertionError(f"not ended after {MUCH} s of processor time")

    before = signal.signal(signal.SIGVTALRM, fail)
    signal.setitimer(signal.ITIMER_VIRTUAL, MUCH)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def is_linear(work: Callable[[int], Callable[[], object]], size: int) -> bool:
    """Whether `work(16 * size)` takes less than 64 times as long as `work(size)`; what is quadratic takes 256 times.

    The better of three tries counts: other programs share the machine.
    """
    short, long = work(size), work(16 * size)
    with ends():
        return any(_seconds(long) < 64 * max(_seconds(short), CLOCK) for _ in range(3))


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started
