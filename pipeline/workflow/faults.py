"""Processes that die: they take their children with them, and one sentence says which one died and why.

    die_with_parent()                    at the start of a process that a launcher or torchrun starts
    before = memory_kills()              then, when a process has ended:
    explain_death("rank 1", -9, before)  -> "rank 1 was killed by SIGKILL: …; Fix: …"
    record_failure(folder, [sentence], token)   the step's progress file says it, in place of what its peers saw of it
    StoppedProcesses(pid).new()          sentences about processes that SIGSTOP has stopped

Reads /proc and the cgroup file system (versions 1 and 2) only; imports no torch. Does not restart anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from pipeline.core.cgroups import memory_kills, memory_limit
from pipeline.core.errors import EXIT_FAILURE
from pipeline.core.files import write_json
from pipeline.core.heartbeat import read_failures
from pipeline.workflow.artifact import PROGRESS, is_done
from pipeline.workflow.attempts import CONNECTION, HANG, KILLED
from pipeline.workflow.progress import Progress, Shrink, read_progress
from pipeline.workflow.step_folders import read_summary, short_name

PARENT = "THEREFORE_PARENT"  # the pid of the process that starts this one, in its environment
PR_SET_PDEATHSIG = 1  # prctl(2)
PEER_WAIT = 5.0  # seconds that rank 0 on another node has to write what it saw, before it is replaced
POLL_SECONDS = 5.0  # seconds between two looks for stopped processes


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that ends (Linux; elsewhere nothing happens).

    Exits at once where the parent that `PARENT` names has ended before the kernel knew of it.
    """
    if sys.platform != "linux":
        return
    parent = os.environ.get(PARENT, "")
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if parent.isdigit() and os.getppid() != int(parent) and not _same_process_tree(int(parent)):
        os._exit(EXIT_FAILURE)


def _same_process_tree(pid: int) -> bool:
    """Whether a wrapper (a shell, numactl, a profiler) stands between this process and `pid`, which still runs."""
    here = os.getppid()
    while here > 1:
        if here == pid:
            return True
        try:
            here = int(Path(f"/proc/{here}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return False
    return False


# ---------------------------------------------------------------- the sentence


def explain_death(who: str, code: int, kills_before: int | None = None) -> str | None:
    """One sentence for a process that a signal has ended: which signal, the likely cause, what to change.

    `code` is as `Popen.returncode` has it (-9) or as a shell does (137); None for an ordinary exit code.
    `kills_before` is `memory_kills()` from before the process started: a higher count now proves the cause.
    """
    number = -code if code < 0 else code - 128 if code > 128 else 0
    if number not in signal.valid_signals():
        return None
    name = signal.Signals(number).name
    return f"{who} was killed by {name}: {_cause(number, kills_before)}"


def _cause(number: int, kills_before: int | None) -> str:
    if number == signal.SIGKILL:
        kills, (limit, peak) = memory_kills(), memory_limit()
        held = f", limit {limit / 2**30:.1f} GiB" if limit else ""
        held += f", peak {peak / 2**30:.1f} GiB" if limit and peak else ""
        remedy = (
            "Fix: raise cluster.slurm.memory (or the machine's memory), or lower cluster.processes and "
            "per_device_batch_size"
        )
        if kills is not None and kills_before is not None and kills > kills_before:
            return f"out of host memory (the kernel counts {kills - kills_before} such kills{held}). {remedy}"
        return f"most likely the host's memory ran out{held}, or someone killed it. {remedy}"
    if number == signal.SIGBUS:
        return "a memory-mapped file cannot be read, most likely because /dev/shm or a disk is full. Fix: free some"
    if number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL):
        return "compiled code crashed. Fix: see its log; scripts/setup installs the versions that were tested together"
    return "someone, or the batch system, ended it. Fix: run the same command again to resume"


def record_death(folder: Path, who: str, code: int, kills_before: int | None, token: str) -> str | None:
    """Explain how a step's process ended, and write it down. Returns the sentence.

    None where no signal ended it, or where the step is done or has said why it ended.
    """
    sentence = explain_death(who, code, kills_before)
    progress = read_progress(folder)
    own_words = progress and progress.token == token and progress.state in ("failed", "stopped", "done")
    if sentence is None or own_words or is_done(folder):
        return None
    record_failure(folder, [sentence], token)
    return sentence


def record_failure(
    folder: Path,
    problems: Sequence[str],
    token: str,
    state: str = "failed",
    kind: str = KILLED,
    *,
    code: int = EXIT_FAILURE,
    shrink: Shrink | None = None,
) -> None:
    """Write why a step ended into its progress file, when none of its processes can any more.

    What a peer of a dead process saw of it (a reset connection) is replaced. Rank 0 may run on another node: it gets
    `PEER_WAIT` seconds to write its own view first. `token`: the launcher's name for
    this start (progress.ATTEMPT); the file of another one is not its own. Clocks of two nodes may differ by minutes, so
    they are not compared.
    """
    progress = _last_word(folder, token)
    if (
        progress and progress.token == token and progress.kind == kind == HANG
    ):  # another node's watchdog has seen it too
        problems = tuple(dict.fromkeys((*progress.problems, *problems)))
    if is_done(folder):
        return
    if progress is None or progress.token != token:  # rank 0 has not begun to keep this attempt's
        attempt = progress.attempt + 1 if progress and progress.state != "done" else 1
        earlier = progress.parts if progress and progress.state != "done" else {}
        host = os.uname().nodename
        spec = read_summary(folder)
        name = spec.name if spec else short_name(folder, None)
        progress = Progress(name, state, started=time.time(), attempt=attempt, earlier=earlier, host=host, token=token)
    failed = state == "failed"
    ended = replace(progress, state=state, note="", problems=tuple(problems), updated=time.time())
    ended = replace(ended, kind=kind if failed else "", exit_code=code if failed else None, shrink=shrink)
    with contextlib.suppress(OSError):  # a full disk, which the launcher reports itself
        write_json(folder / PROGRESS, asdict(ended))


def _last_word(folder: Path, token: str) -> Progress | None:
    """Read the step's progress, after `PEER_WAIT` at most in which rank 0 of this attempt may still write to it."""
    until = time.time() + PEER_WAIT
    while (progress := read_progress(folder)) and progress.token == token and _may_still_write(progress):
        if time.time() > until:
            break
        time.sleep(0.2)
    return progress


def record_report(folder: Path, token: str) -> None:
    """Write why a step failed as the process saw it that failed first, where rank 0 saw only that it was gone."""
    causes = [failure for failure in read_failures() if failure.kind != CONNECTION]
    if not causes or any(failure.rank == 0 for failure in causes):
        return
    first, progress = causes[0], _last_word(folder, token)
    own = progress and progress.token == token and progress.state in ("failed", "stopped")
    if own and progress and progress.kind != CONNECTION:
        return
    problems = [f"rank {first.rank}: {problem}" for problem in first.problems]
    shrink = Shrink(*first.shrink) if first.shrink else None
    record_failure(folder, problems, token, kind=first.kind, code=first.exit_code, shrink=shrink)


def _may_still_write(progress: Progress) -> bool:
    """Whether the process that keeps the file may write to it once more: it runs here, or on a node not seen here."""
    if progress.state in ("failed", "stopped", "done"):
        return False
    if progress.host != os.uname().nodename:
        return True
    return process_state(progress.pid) not in "ZX"


# ---------------------------------------------------------------- processes that stand still


class StoppedProcesses:
    """The processes below one that a signal (SIGSTOP, SIGTSTP) has stopped: the others wait for them without end."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.known: set[int] = set()
        self.next = 0.0  # seconds since the epoch

    def new(self) -> list[str]:
        """A sentence for each that was not stopped when they were looked at last, `LOOK` seconds ago or more."""
        if time.time() < self.next:
            return []
        self.next = time.time() + POLL_SECONDS
        now = {pid for pid in processes_below(self.pid) if process_state(pid) == "T"}
        stopped, self.known = sorted(now - self.known), now
        return [
            f"{_rank_of(pid)}process {pid} on {os.uname().nodename} is stopped (SIGSTOP), and the others wait for it. "
            f"Fix: kill -CONT {pid}"
            for pid in stopped
        ]


def processes_below(pid: int) -> list[int]:
    """The processes that a process has started, and theirs (Linux; elsewhere none)."""
    found = []
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in file.read_text().split():
                found += [int(child), *processes_below(int(child))]
    return found


def process_state(pid: int) -> str:
    """R, S, D, T, Z, X of /proc/PID/stat; X where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _rank_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                return f"rank {entry[5:].decode()}, "
    return ""
