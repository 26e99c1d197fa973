"""watchdog, heartbeat: who hangs, who only waits, and that suspended time does not count."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from running import ROOT

from pipeline.core import heartbeat
from pipeline.workflow.faults import process_state
from pipeline.workflow.watchdog import AUTO_FACTOR, AUTO_SECONDS, LONG_FACTOR, Watchdog, heartbeats


class Clock:
    """Looks at a fixed pace: `tick(seconds)` counts for no more than two pauses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def sign(folder: Path, rank: int, state: str, when: float, pid: int | None = None) -> None:
    (folder / str(rank)).write_text(f"{pid or os.getpid()} {state} {when}")


def looks(watchdog: Watchdog, clock: Clock, seconds: float, pause: float = 5.0) -> str | None:
    """Look every `pause` seconds for so long. Returns the first sentence."""
    for _ in range(int(seconds / pause)):
        clock.now += pause
        if sentence := watchdog.look():
            return sentence
    return None


def test_a_silent_process_hangs_and_one_that_waits_does_not(tmp_path: Path, clock: Clock) -> None:
    watchdog = Watchdog(tmp_path, 60, 5.0)
    sign(tmp_path, 0, "waiting", 1)
    sign(tmp_path, 1, "working", 1)
    assert looks(watchdog, clock, 60) is None
    sentence = looks(watchdog, clock, 20)
    assert sentence is not None
    assert sentence.startswith(f"rank 1 on {os.uname().nodename} showed no sign of life for 1:")
    assert "raise cluster.hang_timeout" in sentence
    sign(tmp_path, 1, "working", 2)
    assert looks(watchdog, clock, 50) is None  # it goes on


def test_what_may_take_long_has_longer(tmp_path: Path, clock: Clock) -> None:
    watchdog = Watchdog(tmp_path, 60, 5.0)
    sign(tmp_path, 0, "long", 1)
    assert looks(watchdog, clock, 60 * LONG_FACTOR) is None
    assert looks(watchdog, clock, 20) is not None


def test_auto_follows_the_longest_silence_of_the_work(tmp_path: Path, clock: Clock) -> None:
    watchdog = Watchdog(tmp_path, "auto", 5.0)
    sign(tmp_path, 0, "working", 1)
    assert looks(watchdog, clock, AUTO_SECONDS - 20) is None
    sign(tmp_path, 0, "working", 2)  # a step of nearly ten minutes
    assert looks(watchdog, clock, AUTO_FACTOR * (AUTO_SECONDS - 30)) is None
    assert looks(watchdog, clock, AUTO_FACTOR * 30) is not None


def test_null_never_ends_anything(tmp_path: Path, clock: Clock) -> None:
    sign(tmp_path, 0, "working", 1)
    assert looks(Watchdog(tmp_path, None, 5.0), clock, 100_000) is None
    assert looks(Watchdog(None, 60, 5.0), clock, 1000) is None


def test_the_time_that_a_job_was_suspended_does_not_count(tmp_path: Path, clock: Clock) -> None:
    """Slurm stops all processes of a job, the launcher too; when it goes on, hours have passed by every clock."""
    watchdog = Watchdog(tmp_path, 60, 5.0)
    sign(tmp_path, 0, "working", 1)
    assert looks(watchdog, clock, 30) is None
    clock.now += 7200
    assert watchdog.look() is None
    assert looks(watchdog, clock, 15) is None
    assert looks(watchdog, clock, 30) is not None


CHILD = """
import sys, time
from pipeline.core import heartbeat
from pipeline.workflow.watchdog import dump_on_signal
dump_on_signal()
heartbeat.beat()
print("begun", flush=True)
def dig_forever():
    time.sleep(600)
dig_forever()
"""


def child(folder: Path) -> subprocess.Popen[bytes]:
    env = {**os.environ, heartbeat.FOLDER: str(folder), "RANK": "3"}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    return process


def test_a_process_that_hangs_shows_its_stack_and_is_ended(tmp_path: Path) -> None:
    with heartbeats() as folder:
        assert folder is not None
        process = child(folder)
        watchdog = Watchdog(folder, 1, 0.2)
        until = time.time() + 20
        while (sentence := watchdog.look()) is None:
            assert time.time() < until
            time.sleep(0.2)
        assert f"first rank 3 (process {process.pid})" in sentence
        with (tmp_path / "log").open("w+") as log:
            watchdog.dump(log)
            assert (tmp_path / "log").read_text() == f"rank 3 (process {process.pid}), what it does:\n"
        watchdog.end(process)
        assert process.returncode == -signal.SIGKILL
        assert b"in dig_forever" in process.communicate()[1]
    assert not folder.exists()


def test_a_stopped_process_is_named_and_ended(tmp_path: Path) -> None:
    process = child(tmp_path)
    os.kill(process.pid, signal.SIGSTOP)
    while process_state(process.pid) != "T":
        time.sleep(0.01)
    sign(tmp_path, 0, "working", 1)  # waits for it in a collective
    watchdog = Watchdog(tmp_path, 1, 0.2)
    until = time.time() + 20
    while (sentence := watchdog.look()) is None:
        assert time.time() < until
        time.sleep(0.2)
    assert sentence.startswith(f"rank 3 (process {process.pid} on {os.uname().nodename}) was stopped (SIGSTOP)")
    watchdog.end(process)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_only_the_main_thread_shows_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are hashed in a thread of their own, while the work itself may hang."""
    monkeypatch.setenv(heartbeat.FOLDER, str(tmp_path))
    monkeypatch.setattr(heartbeat, "_last", (0.0, ""))
    thread = threading.Thread(target=heartbeat.beat)
    thread.start()
    thread.join()
    assert list(tmp_path.iterdir()) == []
    heartbeat.beat()
    heartbeat.wait()
    assert (tmp_path / "0").read_text().split()[1] == "waiting"


def test_signs_cost_next_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(heartbeat.FOLDER, str(tmp_path))
    start = time.process_time()
    for _ in range(10_000):
        heartbeat.beat()
    assert time.process_time() - start < 0.5  # 50 µs each; measured: 2
