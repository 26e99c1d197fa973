"""Run a plan's steps on this machine, with a progress bar each: one after another, or two beside each other.

A step begins when its inputs are done and what it needs is free (room.py): an evaluation of the base model runs beside
SFT where cores or GPUs are left. The first Ctrl-C requests a stop: the running steps save at their next optimizer step
and exit. The second ends them at once. In a Slurm job (sbatch --wrap, salloc) TERM, USR1 and the approaching time limit
request a stop too. A step's processes form a session of their own, so none is left behind. The same command resumes.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

from pipeline.core import cgroups
from pipeline.core.errors import LaunchError, PipelineError, PlanError, Stopped, explain_disk, printable
from pipeline.core.slurm_client import JOB_FILE, is_installed, job_end, this_job
from pipeline.launchers import debug
from pipeline.launchers.room import Room
from pipeline.launchers.stops import StopRequests
from pipeline.launchers.torchrun import command, environment, hang_timeout, is_single, single_rank
from pipeline.workflow import faults
from pipeline.workflow.artifact import STOP
from pipeline.workflow.attempts import HANG, decide
from pipeline.workflow.jobs import describe_job, live_jobs
from pipeline.workflow.lock import ensure_unlocked
from pipeline.workflow.plan import Plan, Step, spec_of
from pipeline.workflow.progress import ATTEMPT, Progress, describe, format_duration, read_progress
from pipeline.workflow.runtime import read_times
from pipeline.workflow.stage import STAGES, write_spec
from pipeline.workflow.watchdog import Watchdog, heartbeat_settings, heartbeats

POLL_SECONDS = 0.2  # seconds
TAIL_LINES = 15  # lines of a failed step's log that are shown
BAR_SECONDS = 30  # seconds between two progress lines without a terminal


def run_plan(plan: Plan) -> list[Step]:
    """Run the steps of a plan that are not done. Returns those that ran; raises after the last one if any failed.

    A step whose input failed is skipped; steps that do not depend on it still run.
    """
    todo = plan.to_run
    for step in todo:
        ensure_unlocked(step.folder)
    # a runs folder copied from a cluster to a machine without Slurm has no live jobs
    queued = live_jobs(step.folder for step in todo) if is_installed() else {}
    if queued:
        problems = [describe_job(folder, job) for folder, job in queued.items()]
        raise PlanError(*problems, "Fix: wait for it (python -m pipeline status), or end it: python -m pipeline cancel")
    if plan.cluster.launcher == "debug":
        return _Run(plan, todo, lambda step, title, _: _in_this_thread(step, plan, title)).run()
    with StopRequests() as stops, ThreadPoolExecutor(len(todo) or 1) as pool:
        return _Run(plan, todo, lambda *words: pool.submit(run_step, *words, plan=plan, stops=stops), stops).run()


def _in_this_thread(step: Step, plan: Plan, title: str) -> Future[None]:
    """Run a step at once, as a pool would: a debugger stops in the thread that has the terminal."""
    done: Future[None] = Future()
    try:
        debug.run_step(step, plan, title)
        done.set_result(None)
    except BaseException as error:
        done.set_exception(error)
    return done


class _Run:
    """The steps of a plan: those that wait, those that run, and how the others ended."""

    def __init__(
        self,
        plan: Plan,
        todo: Sequence[Step],
        start: Callable[[Step, str, Mapping[str, str]], Future[None]],
        stops: StopRequests | None = None,
    ) -> None:
        self.start, self.stops, self.room = start, stops, Room(plan.cluster)
        self.waiting = {f"[{number}/{len(todo)}] {step.label}": step for number, step in enumerate(todo, 1)}
        self.running: dict[Future[None], Step] = {}
        self.ran: list[Step] = []
        self.failed: dict[str, PipelineError] = {}
        self.stopped: Stopped | None = None

    def run(self) -> list[Step]:
        """Run all steps, each when its inputs are done and it has room. Raises Stopped or what failed at the end."""
        try:
            while self.waiting or self.running:
                self._start_what_can()
                for future in wait(self.running, return_when=FIRST_COMPLETED).done:
                    self._end(future)
        except BaseException:
            if self.stops:
                self.stops.end()  # the other steps: nobody waits for them any longer
            raise
        if self.stopped:
            for error in self.failed.values():
                tqdm.write("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
            raise self.stopped
        if self.failed:
            first = next(iter(self.failed.values()))
            combined = type(first)(*(problem for error in self.failed.values() for problem in error.problems))
            combined.exit_code = first.exit_code  # an invalid setting keeps code 2 where only the step's process
            raise combined  # detects it
        return self.ran

    def _start_what_can(self) -> None:
        for title, step in list(self.waiting.items()):
            coming = {one.label for one in (*self.waiting.values(), *self.running.values())}
            inputs = [needed for needed in step.inputs.values() if not needed.done or needed.label in self.failed]
            broken = [needed.label for needed in inputs if needed.label not in coming]
            if self.stopped:
                del self.waiting[title]
            elif broken:
                del self.waiting[title]
                self.failed[step.label] = LaunchError(f"{step.label}: skipped, because its input {broken[0]} failed")
                tqdm.write(f"{title}  skipped: {broken[0]} failed")
            elif not inputs and (more := self.room.take(step)) is not None:
                del self.waiting[title]
                self.running[self.start(step, title, more)] = step

    def _end(self, future: Future[None]) -> None:
        step = self.running.pop(future)
        self.room.leave(step)
        try:
            future.result()
            self.ran.append(step)
        except Stopped as error:
            self.stopped = self.stopped or error
        except PipelineError as error:
            self.failed[step.label] = error


def run_step(step: Step, title: str, more: Mapping[str, str], *, plan: Plan, stops: StopRequests) -> None:
    """Run a step, again after a failure that may pass. Raises Stopped or the step's failure.

    `more`: variables for its processes.
    """
    write_spec(step.folder, spec_of(step, plan.cluster))
    (step.folder / JOB_FILE).unlink(missing_ok=True)  # of an earlier attempt on Slurm
    while True:
        try:
            return _attempt(step, plan, title, stops, more)
        except Stopped:
            raise
        except LaunchError as error:
            decision = decide(step.folder, plan.cluster.max_failures, silent=error.problems[0])
            if not decision.again:
                failure = LaunchError(
                    *error.problems, *[f"{step.label}: {decision.sentence}"] * bool(decision.sentence)
                )
                failure.exit_code = error.exit_code
                raise failure from error
            tqdm.write(f"{error.problems[0]}\nnote: {decision.sentence}", file=sys.stderr)
            if stops.wait(decision.delay):
                raise Stopped(f"{step.label} was stopped. Fix: run the same command to resume") from error


def _attempt(step: Step, plan: Plan, title: str, stops: StopRequests, more: Mapping[str, str]) -> None:
    """Start a step's processes, show their progress, and wait for them. Raises Stopped or the step's failure."""
    if stops.count:
        raise Stopped(f"{step.label} did not begin. Fix: run the same command to resume")
    stage = step.runs_as
    if stage.processes == "all":
        check_port()
    started, attempt, kills = time.time(), uuid.uuid4().hex, cgroups.memory_kills()
    limit, stopping = _stop_at(step, plan), False
    log = step.folder / "log.txt"
    settings = {**environment(stage, plan.cluster, step.folder), **more, ATTEMPT: attempt}
    settings |= single_rank() if is_single(stage, plan.cluster) else {}
    with log.open("ab") as file, heartbeats() as signs:
        process = subprocess.Popen(
            command(stage, step.folder, plan.cluster),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**settings, **heartbeat_settings(signs)},
            start_new_session=True,
        )
        suspended = faults.StoppedProcesses(process.pid)
        watchdog, hangs = Watchdog(signs, hang_timeout(stage, plan.cluster), POLL_SECONDS), None
        with _stopping(process, step, plan.cluster.kill_timeout, attempt, stops) as obey, _Bar(title) as bar:
            while process.poll() is None:
                obey()
                if progress := _progress(step, attempt):
                    bar.show(progress)
                for warning in suspended.new():
                    tqdm.write(f"warning: {warning}", file=sys.stderr)
                if hangs := watchdog.look():
                    with log.open("a", encoding="utf-8") as text:
                        print(f"error: {hangs}", file=text, flush=True)
                        watchdog.dump(text)
                    watchdog.end(process)
                    faults.record_failure(step.folder, [hangs], attempt, kind=HANG)
                    break
                if time.time() > limit and not stopping:
                    stopping = True
                    (step.folder / STOP).touch()
                    tqdm.write("stopping: this Slurm job ends soon; the step saves and exits", file=sys.stderr)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
            seconds = time.time() - started
            last = _progress(step, attempt)
            if last is None:
                ensure_unlocked(step.folder)  # another run may have started this step at the same moment
            died = None
            if not stops.count:
                died = faults.record_death(step.folder, "its process", process.returncode, kills, attempt)
            bar.end(_progress(step, attempt) or last, seconds, step.done)
    if stopping:
        raise Stopped("stopped before the end of this Slurm job. Fix: run the same command in another job to resume")
    if not step.done:
        raise _failure(step, process.returncode, _progress(step, attempt), log, died)


def _progress(step: Step, attempt: str) -> Progress | None:
    """Return the step's progress; None where another attempt has written it, or none has."""
    progress = read_progress(step.folder)
    return progress if progress and progress.token == attempt else None


def _stop_at(step: Step, plan: Plan) -> float:
    """Return when the step must be stopped, in seconds since the epoch: before the end of this process's Slurm job.

    That is `signal_before_limit` before the end, or half of the remaining time where less remains. Infinite without a
    limit.
    """
    end = job_end() if this_job() and STAGES[step.stage].resumable else None
    if end is None:
        return math.inf
    now, times = time.time(), read_times(step.folder)
    before = plan.cluster.slurm.save_seconds(step.stage, times.needed if times else None)
    return max(end - before, now + (end - now) / 2)


def check_port(host: str = "127.0.0.1") -> None:
    """Raise LaunchError where no TCP port is free for the rendezvous."""
    try:
        with socket.socket() as probe:
            probe.bind((host, 0))
    except OSError as error:
        raise LaunchError(
            f"no TCP port of {host} is free for torchrun ({error.strerror}). "
            "Fix: close programs that hold ports, or check that the loopback interface is up"
        ) from error


def _failure(step: Step, code: int, progress: Progress | None, log: Path, died: str | None) -> PipelineError:
    if progress and progress.state == "stopped":
        return Stopped(f"{step.label} was stopped and has saved. Fix: run the same command to resume")
    again = f"see {log}. Fix: correct the cause, then run the same command to resume"
    if full := explain_disk(OSError(), step.folder):  # a full disk, so no process could record its failure
        return LaunchError(f"{step.label}: {full}")
    if progress and progress.state == "failed" and progress.problems:
        error = LaunchError(*(f"{step.label}: {problem}" for problem in progress.problems), again)
        error.exit_code = progress.exit_code or error.exit_code
        return error
    if died:
        return LaunchError(f"{step.label}: {died}", again)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-TAIL_LINES:]
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return LaunchError(f"{step.label} {how}; the end of its log:", *(f"  {line}" for line in lines), again)


@contextlib.contextmanager
def _stopping(
    process: subprocess.Popen[bytes], step: Step, grace: int, attempt: str, stops: StopRequests
) -> Iterator[Callable[[], None]]:
    """Turn the first stop request into a save, and the second into the end; leave no process behind.

    A Ctrl-C before a step has started its work, or in a step that cannot save, ends it at once. Yields a function that
    is called again and again, and does what was requested since the last call.
    """
    obeyed = 0

    def obey() -> None:
        nonlocal obeyed
        if stops.count == obeyed:
            return
        first, obeyed = not obeyed and stops.count == 1, stops.count
        progress = _progress(step, attempt)
        begun = not stops.by_user or (progress is not None and progress.state != "starting")
        if first and STAGES[step.stage].resumable and begun:
            (step.folder / STOP).touch()
            saves = f"{step.label} saves at its next optimizer step and exits"
            tqdm.write(f"stopping: {saves}; Ctrl-C again ends it at once", file=sys.stderr)
        else:
            end(process, grace)

    try:
        yield obey
    finally:
        end(process, grace)
        if stops.count:
            _mark_stopped(step, attempt)
    if stops.count:
        state = f"stopped after {step.label}" if step.done else f"{step.label} was stopped"
        raise Stopped(f"{state}. Fix: run the same command to resume")


def _mark_stopped(step: Step, attempt: str) -> None:
    """Record that a step was stopped, where its processes ended before they recorded it."""
    progress = _progress(step, attempt)
    if progress and progress.state not in ("stopped", "failed", "done"):
        faults.record_failure(step.folder, [], attempt, state="stopped")


def end(process: subprocess.Popen[bytes], grace: int) -> None:
    """End a step's whole session: TERM, then KILL after `grace` seconds."""
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        until = time.time() + seconds
        while time.time() < until:
            process.poll()
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)


class _Bar:
    """A step's progress bar; without a terminal, a line every BAR_SECONDS."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: tqdm[None] | None = None
        self.live = sys.stderr.isatty()
        self.printed_at = time.time()

    def __enter__(self) -> _Bar:
        if not self.live:
            print(f"{self.title} …\n", end="", file=sys.stderr, flush=True)  # one write: another step may write too
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, progress: Progress) -> None:
        text = printable(describe(progress))
        if not self.live:
            if time.time() - self.printed_at >= BAR_SECONDS:
                self.printed_at = time.time()
                where = f"{self.title} {progress.done}/{progress.total or '?'}"
                print(f"  {where} {text}\n", end="", file=sys.stderr, flush=True)
            return
        if self.bar is None:
            self.bar = tqdm(desc=self.title, unit=f" {progress.unit}", leave=False, dynamic_ncols=True)
        if progress.total and self.bar.total != progress.total:
            self.bar.reset(total=progress.total)
            self.bar.initial = progress.first
        self.bar.n = progress.done
        self.bar.set_postfix_str(text, refresh=True)

    def end(self, progress: Progress | None, seconds: float, done: bool) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        ended = progress.state if progress and progress.state in ("failed", "stopped") else "failed"
        mark = "done" if done else ended
        text = printable(describe(progress)) if progress else ""
        tqdm.write(f"{self.title}  {mark} in {format_duration(seconds)}  {text}".rstrip(), file=sys.stderr)
        for warning in progress.warnings if progress else ():
            tqdm.write(f"  warning: {printable(warning)}", file=sys.stderr)
