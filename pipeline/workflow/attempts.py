"""The attempts of a step, and whether a failed one is made again: `attempts.json` in its folder.

    begin_count(folder)            a run command starts a new count of failures
    decide(folder, limit)          after an attempt: whether the launcher starts the step again, and the sentence for it
    verdict(attempts, limit)       the rule, as a function of the attempts alone

An attempt is made again where its cause may pass: a rank that was killed, a lost connection, a rank that hangs, memory
that ran out, a node that is gone. Another failure is not. The same failure at the same step ends the restarts when it
has come `limit` times without progress in between, and so do `MAX_WITHOUT_PROGRESS` failures of any kind. The count
lasts over Slurm's requeues. Clocks of different nodes are never compared.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.core.errors import write_problem
from pipeline.core.files import write_json
from pipeline.core.records import record_or_none
from pipeline.workflow.artifact import ATTEMPTS, PROGRESS, is_done
from pipeline.workflow.progress import BadBatch, Progress, Shrink, read_progress

# why an attempt ended, where the cause may pass
KILLED, CONNECTION, HANG, MEMORY, LOST, LAUNCH = "killed", "connection", "hang", "memory", "lost", "launch"
DIVERGED = "diverged"  # where the recipe allows one more batch to be skipped
MAY_PASS = (KILLED, CONNECTION, HANG, MEMORY, LOST, LAUNCH, DIVERGED)
SAME_FAILURES = 3  # that end the restarts which come from outside, at least
MAX_WITHOUT_PROGRESS = 10  # failures in a row of any kind, none of which began at a later checkpoint
KEPT = 100  # attempts that the file holds
NOT_BEGUN = -1  # `last` of an attempt that ended before its first step
LOST_SENTENCE = "exited without a final status (killed, or its node failed)"
LINK_ERRNOS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH)
LINK_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError", "AcceleratorError")  # torch's, not imported
LINK_WORDS = re.compile(r"gloo|nccl|connection (reset|closed|refused)|broken pipe|socket|cuda error", re.IGNORECASE)


@dataclass(frozen=True)
class Attempt:
    """One start of a step, after its end. `last` is the step that it had reached, `first` the one it resumed from."""

    number: int
    command: int  # counts the run commands
    started: float  # seconds since the epoch, by the clock of `host`
    seconds: float
    first: int
    last: int
    state: str  # failed, stopped, or lost: ended without a word
    kind: str  # why, where the cause may pass; else empty
    problem: str
    host: str
    shrink: Shrink | None = None
    bad_batch: BadBatch | None = None  # that the next attempt skips


@dataclass(frozen=True)
class Attempts:
    """The content of `attempts.json`: the latest attempts, the oldest first."""

    attempts: tuple[Attempt, ...] = ()
    command: int = 0
    gave_up: str = ""  # the sentence that ended the restarts of this command

    @property
    def counted(self) -> tuple[Attempt, ...]:
        """The attempts of the last run command."""
        return tuple(one for one in self.attempts if one.command == self.command)


@dataclass(frozen=True)
class Decision:
    """Whether a step is started again, a sentence about it, and the seconds to wait before."""

    again: bool
    sentence: str = ""
    delay: float = 0.0


def kind_of(error: Exception) -> str:
    """Return CONNECTION for a lost peer, network or device; empty for an error that would come again."""
    if isinstance(error, ConnectionError | TimeoutError | EOFError) or type(error).__name__ in LINK_ERRORS:
        return CONNECTION
    if isinstance(error, OSError):
        return CONNECTION if error.errno in LINK_ERRNOS else ""
    return CONNECTION if isinstance(error, RuntimeError) and LINK_WORDS.search(str(error)) else ""


def read_attempts(folder: Path) -> Attempts:
    """Read the attempts of a step that have ended; without any where the file is missing or cannot be used."""
    return record_or_none(folder / ATTEMPTS, Attempts) or Attempts()


def shrinks(folder: Path) -> list[Shrink]:
    """Return the settings that attempts found too large, in their order."""
    known = settle(read_attempts(folder), read_progress(folder))
    return [one.shrink for one in known.attempts if one.shrink]


def bad_batches(folder: Path) -> list[BadBatch]:
    """Return the batches that a step skips, because training diverged at them."""
    return [one.bad_batch for one in read_attempts(folder).attempts if one.bad_batch]


def begin_count(folder: Path) -> None:
    """Start a new count of failures: someone has typed the run command again. The attempts so far stay on record."""
    known = read_attempts(folder)
    settled = settle(known, read_progress(folder))
    if settled.attempts:
        _write(folder, replace(settled, command=known.command + 1, gave_up=""))


def settle(known: Attempts, progress: Progress | None) -> Attempts:
    """Return the attempts with the one that `progress` is of, if that has ended badly and is not among them."""
    if progress is None or progress.state == "done" or any(one.started == progress.started for one in known.attempts):
        return known
    begun = bool(progress.since or progress.done)
    ended = progress.state in ("failed", "stopped")
    attempt = Attempt(
        number=progress.attempt,
        command=known.command,
        started=progress.started,
        seconds=round(progress.seconds, 1),
        first=progress.first if begun else NOT_BEGUN,
        last=progress.done if begun else NOT_BEGUN,
        state=progress.state if ended else "lost",
        kind=progress.kind if ended else LOST,
        problem="; ".join(progress.problems) if ended else LOST_SENTENCE,
        host=progress.host,
        shrink=progress.shrink if ended else None,
        bad_batch=progress.bad_batch if ended and progress.kind == DIVERGED else None,
    )
    return replace(known, attempts=(*known.attempts, attempt)[-KEPT:])


def keep(folder: Path, progress: Progress | None) -> None:
    """Write down how the attempt before ended, where no launcher did: its node failed, or it was stopped."""
    known = read_attempts(folder)
    settled = settle(known, progress)
    if settled is not known:
        _write(folder, settled)


def decide(
    folder: Path, limit: int, *, silent: str | None = None, silent_kind: str = "", restarted: bool = False
) -> Decision:
    """Write down how a step's attempt ended, and decide whether it is made again.

    `silent` describes the end of an attempt that kept no progress file; None where there may have been none.
    `restarted`: the job was started again from outside, so only a crash loop ends it. What ends the restarts stands in
    the step's progress too.
    """
    if is_done(folder):
        return Decision(again=True)  # which finds it done
    known, progress = read_attempts(folder), read_progress(folder)
    settled = settle(known, progress)
    if settled is known and silent is not None:
        number = max([one.number for one in known.attempts[-1:]], default=0) + 1
        ended = Attempt(number, known.command, time.time(), 0, -1, NOT_BEGUN, "failed", silent_kind, silent, "")
        settled = replace(known, attempts=(*known.attempts, ended)[-KEPT:])
    if settled.gave_up:
        _write(folder, settled)
        return Decision(again=False, sentence=settled.gave_up)
    least = SAME_FAILURES if restarted else 1  # Slurm's own restarts go on where the script's are switched off
    decision = verdict(settled.counted, max(limit, least), any_kind=restarted)
    if write_problem(folder):  # nothing can be saved, and nobody frees it by trying again
        return Decision(again=False)
    gave_up = "" if decision.again else decision.sentence
    _write(folder, replace(settled, gave_up=gave_up))
    if gave_up and progress:
        problems = (*progress.problems, gave_up)
        write_json(folder / PROGRESS, asdict(replace(progress, state="failed", problems=problems, exit_code=1)))
    return decision


def verdict(attempts: Sequence[Attempt], limit: int, *, any_kind: bool = False) -> Decision:
    """Decide about the last of these attempts. An attempt that was stopped on request is always made again."""
    if not attempts or attempts[-1].state == "stopped":
        return Decision(again=True)
    newest = attempts[-1]
    if not any_kind and (newest.kind not in MAY_PASS or limit == 1):
        return Decision(again=False)
    if newest.shrink:
        name, before, after = newest.shrink.name, newest.shrink.before, newest.shrink.after
        return Decision(
            again=True, sentence=f"out of memory with {name}={before:g}; the step starts again with {after:g}"
        )
    if newest.bad_batch:
        sentence = f"training diverged at step {newest.bad_batch.step}; the step starts again without that batch"
        return Decision(again=True, sentence=sentence)
    same = same_failures(attempts)
    where = f"at step {newest.last}" if newest.last != NOT_BEGUN else "before the first step"
    # a job that is preempted while it loads is lost each time at the same place, and nothing is wrong with it
    if same >= limit and not (newest.kind == LOST and newest.last == NOT_BEGUN):
        return Decision(
            again=False,
            sentence=f"gave up: the same failure came {same} times {where}. Fix: correct its cause, then run the same "
            "command to resume",
        )
    if (stuck := without_progress(attempts)) >= max(limit, MAX_WITHOUT_PROGRESS):
        return Decision(
            again=False,
            sentence=f"gave up: {stuck} attempts in a row failed and left no later checkpoint. Fix: lower "
            "cluster.save_steps, or correct the cause, then run the same command to resume",
        )
    times = f"failed {same} times {where}" if same > 1 else f"failed {where}"
    return Decision(again=True, sentence=f"the step {times}; it starts again", delay=5.0 * (same - 1))


def same_failures(attempts: Sequence[Attempt]) -> int:
    """Return how often the newest failure has come at its step, since an attempt got further."""
    newest, count = attempts[-1], 0
    for one in reversed(attempts):
        if one.last > newest.last:
            break
        count += one.last == newest.last and _pattern(one.problem) == _pattern(newest.problem)
    return count


def without_progress(attempts: Sequence[Attempt]) -> int:
    """Return how many of the newest attempts failed since one began at an earlier checkpoint, or was stopped."""
    furthest = max(one.first for one in attempts)
    count = 0
    for one in reversed(attempts):
        if one.state == "stopped" or NOT_BEGUN < one.first < furthest:
            break
        count += 1
    return count


def _pattern(problem: str) -> str:
    """A sentence without what differs between two failures of one cause: numbers, addresses, names of hosts."""
    return re.sub(r"\b(?:0x)?[0-9a-f]*\d[0-9a-f]*\b|\d+", "#", re.sub(r"\bon [\w.-]+", "on a host", problem))


def may_start_again(known: Attempts, progress: Progress | None) -> bool:
    """Return whether the script of a running job may start its step again after the failure that `progress` is of."""
    return progress is not None and progress.state == "failed" and progress.kind in MAY_PASS and not known.gave_up


def describe_attempts(known: Attempts) -> str | None:
    """Return a sentence about the failures of the present command; None without any."""
    failed = [one for one in known.counted if one.state != "stopped"]
    if not failed:
        return None
    newest = failed[-1]
    where = f"at step {newest.last}" if newest.last != NOT_BEGUN else "before the first step"
    count = f"{len(failed)} attempts have failed" if len(failed) > 1 else "1 attempt has failed"
    return f"{count}, the last {where}: {newest.problem.partition('. Fix:')[0][:300]}"


def _write(folder: Path, attempts: Attempts) -> None:
    write_json(folder / ATTEMPTS, asdict(attempts))
