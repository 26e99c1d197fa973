"""Ends an attempt one of whose processes hangs: without a sign of life for longer than its work can take.

    with heartbeats() as folder: …                        the processes write their signs there (core/heartbeat.py)
    watchdog = Watchdog(folder, cluster.hang_timeout)
    sentence = watchdog.look()                            every few seconds: None, or who hangs, for how long
    watchdog.dump(); watchdog.end(process)                the ranks' Python stacks into the log; then their end

Time is counted in the launcher's own looks, never by the clock: a job that Slurm has suspended as a whole, launcher
and all, is not taken for one that hangs when it resumes. A process that waits for others is not watched: the one that
they wait for is. Each node watches its own processes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from pipeline.core.heartbeat import FOLDER, LONG, WAITING
from pipeline.workflow.faults import process_state, processes_below
from pipeline.workflow.progress import format_duration

AUTO_SECONDS = 600.0  # of silence, at least, before a process hangs
AUTO_FACTOR = 20  # and at least this many times the longest silence of its work so far
LONG_FACTOR = 6  # the same for what may take long: loading, the first step, saves
LONGEST_LOOK = 2.0  # a look counts for no more than this many times the usual pause between two
DUMP_SIGNAL = signal.SIGQUIT  # a stage process then writes its stacks to the log
DUMP_SECONDS = 1.0  # that the processes have to write them


def dump_on_signal() -> None:
    """Have this process write the Python stacks of its threads to stderr at `kill -QUIT`."""
    faulthandler.register(DUMP_SIGNAL, all_threads=True)


@contextlib.contextmanager
def heartbeats() -> Iterator[Path | None]:
    """A folder on this node's disk for the signs of life of one attempt; None where the disk is full."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="therefore-"))
    except OSError:
        yield None
        return
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def heartbeat_settings(folder: Path | None) -> dict[str, str]:
    """Return the environment by which the processes find the folder of their signs."""
    return {FOLDER: str(folder)} if folder else {}


@dataclass
class _Rank:
    pid: int
    state: str
    content: str
    silent: float = 0.0  # seconds


class Watchdog:
    """Watches the processes of one attempt on this node. `timeout`: seconds, auto, or None for never."""

    def __init__(self, folder: Path | None, timeout: float | Literal["auto"] | None, pause: float) -> None:
        self.folder, self.timeout, self.pause = folder, timeout if folder else None, pause
        self.ranks: dict[int, _Rank] = {}
        self.longest = 0.0  # silence of a working process so far
        self.last = time.monotonic()

    def look(self) -> str | None:
        """Read the signs of life. Returns a sentence about processes that hang; None while all live."""
        if self.timeout is None:
            return None
        now = time.monotonic()
        passed, self.last = min(now - self.last, LONGEST_LOOK * self.pause), now
        self._read(passed)
        hanging = {number: rank for number, rank in self.ranks.items() if rank.silent > self._allowed(rank)}
        return self._sentence(hanging) if hanging else None

    def _read(self, passed: float) -> None:
        for path in self.folder.glob("[0-9]*") if self.folder else ():
            try:
                content = path.read_text(encoding="ascii")
                pid, state, _ = content.split()
            except (OSError, ValueError):  # it is being written
                content = pid = state = ""
            before = self.ranks.get(int(path.name))
            if pid and (before is None or before.content != content):
                if before and before.state not in (LONG, WAITING):
                    self.longest = max(self.longest, before.silent)
                self.ranks[int(path.name)] = _Rank(int(pid), state, content)
            elif before:
                before.silent += passed

    def _allowed(self, rank: _Rank) -> float:
        """Return the seconds that a process may be silent."""
        if rank.state == WAITING or self.timeout is None:
            return float("inf")
        if self.timeout == "auto":
            short = max(AUTO_SECONDS, AUTO_FACTOR * self.longest)
            return max(short, LONG_FACTOR * AUTO_SECONDS) if rank.state == LONG else short
        return self.timeout * (LONG_FACTOR if rank.state == LONG else 1)

    def _sentence(self, hanging: dict[int, _Rank]) -> str:
        host = os.uname().nodename
        stopped = {number: rank for number, rank in self.ranks.items() if process_state(rank.pid) == "T"}
        silent = format_duration(max(rank.silent for rank in hanging.values()))
        if stopped:
            who = ", ".join(f"rank {number} (process {rank.pid} on {host})" for number, rank in sorted(stopped.items()))
            return (
                f"{who} was stopped (SIGSTOP), so nothing has moved for {silent}; the attempt was ended. Fix: "
                "find who stops processes there"
            )
        oldest = max(hanging.items(), key=lambda item: item[1].silent)
        ranks = ", ".join(map(str, sorted(hanging)))
        return (
            f"rank{'s' * (len(hanging) > 1)} {ranks} on {host} showed no sign of life for {silent}, first rank "
            f"{oldest[0]} (process {oldest[1].pid}); the attempt was ended. Fix: see the stacks in its log; if this "
            "was work, raise cluster.hang_timeout"
        )

    def dump(self, log: IO[str]) -> None:
        """Have every process that can write its Python stacks to the log, where their own output goes."""
        for number, rank in sorted(self.ranks.items()):
            state = process_state(rank.pid)
            if state in "TZX":
                continue
            print(f"rank {number} (process {rank.pid}), what it does:", file=log, flush=True)
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, DUMP_SIGNAL)
            time.sleep(DUMP_SECONDS / max(1, len(self.ranks)))

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Kill the attempt's processes on this node, a process that is stopped too, and wait for the first of them."""
        pids = processes_below(process.pid)
        process.kill()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
