"""Where the seconds of a step go: the parts of a process, and the sums over attempts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.core import stopwatch
from pipeline.core.slurm_client import JobRecord, write_job
from pipeline.workflow import faults
from pipeline.workflow.artifact import Artifact, finalize, open_artifact
from pipeline.workflow.progress import Progress, ProgressFile, earlier_time, read_progress
from pipeline.workflow.time_spent import add, between, queued_since, table


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that moves only when told to; counting began 3 seconds ago."""
    found = Clock()
    monkeypatch.setattr(stopwatch, "_watch", stopwatch.Stopwatch(97.0, found))
    return found


def test_every_moment_counts_in_one_part(clock: Clock) -> None:
    def fails() -> float:
        clock.now += 7
        return 1 / 0

    stopwatch.enter("rows")
    clock.now += 2
    with stopwatch.part("forward/backward"):
        clock.now += 5
        with pytest.raises(ZeroDivisionError):
            stopwatch.timed("generate", fails)()
        clock.now += 1
    clock.now += 0.5
    assert stopwatch.seconds() == {"start": 3, "rows": 2.5, "forward/backward": 6, "generate": 7}


def test_each_counts_what_items_take_to_come(clock: Clock) -> None:
    def answers() -> list[int]:
        found = []
        for number in stopwatch.each("generate", slow()):
            clock.now += 10  # graded
            found.append(number)
        return found

    def slow() -> Iterator[int]:
        for number in range(3):
            clock.now += 1
            yield number
        clock.now += 4

    stopwatch.enter("evaluate")
    assert answers() == [0, 1, 2]
    assert stopwatch.seconds() == {"start": 3, "generate": 7, "evaluate": 30}


def test_other_threads_change_nothing(clock: Clock) -> None:
    def work() -> None:
        stopwatch.enter("save")
        with stopwatch.part("generate"):
            clock.now += 1

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert stopwatch.seconds() == {"start": 4}


def test_nothing_counts_before_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "_watch", None)
    stopwatch.enter("rows")
    with stopwatch.part("save"):
        assert list(stopwatch.each("generate", [1, 2])) == [1, 2]
    assert (stopwatch.seconds(), stopwatch.began()) == ({}, 0.0)


def test_counting_begins_with_the_process() -> None:
    code = (
        "import time; time.sleep(0.4); from pipeline.core import stopwatch as s; s.begin(s.process_start()); "
        "s.enter('rows'); time.sleep(0.2); import json; print(json.dumps([s.seconds(), s.began()]))"
    )
    before = time.time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    spent, began = json.loads(done.stdout)
    assert spent["start"] >= 0.4
    assert spent["rows"] >= 0.2
    assert abs(began - before) < 0.3
    assert sum(spent.values()) <= time.time() - before + 0.05
    assert stopwatch.process_start(2**22 + 1) is None
    own = stopwatch.process_start(os.getpid())
    assert own is not None
    assert own < time.monotonic()


def test_a_part_costs_microseconds(clock: Clock) -> None:
    began = time.perf_counter()
    for _ in range(1000):
        with stopwatch.part("save"):
            pass
    assert time.perf_counter() - began < 0.1


# ---------------------------------------------------------------- attempts


def attempt(state: str, *, began: float = 1000.0, updated: float = 1060.0, command: int = 1) -> Progress:
    """An attempt that has recorded 50 seconds since it began."""
    return Progress(
        "sft",
        state,
        began=began,
        updated=updated,
        command=command,
        spent={"start": 10.0, "forward/backward": 40.0},
        earlier={"start": 5.0},
    )


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (attempt("stopped", updated=1050.0), {"start": 15, "forward/backward": 40, "wait": 150}),
        (attempt("failed"), {"start": 15, "forward/backward": 40, "wait": 140, "lost": 10}),  # killed, seen at 1060
        (attempt("running"), {"start": 15, "forward/backward": 40, "lost": 150}),  # without a last word
        (attempt("stopped", command=0), {"start": 15, "forward/backward": 40}),  # the user typed it again, later
        (attempt("done"), {}),
        (None, {}),
    ],
)
def test_attempts_add_up(before: Progress | None, expected: dict[str, float]) -> None:
    assert earlier_time(before, command=1, began=1200.0) == expected


def test_a_queue_is_waited_in() -> None:
    assert earlier_time(None, 1, 1200.0, lambda: 900.0) == {"wait": 300}
    assert earlier_time(attempt("stopped", command=0), 1, 1200.0, lambda: 1150.0)["wait"] == 50
    assert earlier_time(attempt("stopped", updated=1050.0), 1, 1200.0, lambda: 900.0)["wait"] == 150  # queued again
    assert earlier_time(None, 1, 1200.0, lambda: 1300.0) == {}  # another node's clock is ahead


def test_a_job_is_queued_since_its_submission_and_the_end_of_its_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, data = tmp_path / "sft", tmp_path / "data"
    for folder in (step, data):
        folder.mkdir()
    write_job(step, JobRecord("token", "slurm", 900.0, "7"))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert queued_since(step, {}) == 0.0
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert queued_since(step, {}) == 900.0
    (data / "artifact.json").touch()
    os.utime(data / "artifact.json", (1100.0, 1100.0))
    assert queued_since(step, {"data": str(data)}) == 1100.0
    (step / "job.json").write_text("{")
    assert queued_since(step, {}) == 0.0


def test_clocks_of_two_nodes_make_no_part_negative() -> None:
    assert between(counted=1000, noticed=1010, began=990) == {}
    assert between(counted=1000, noticed=990, began=1020) == {"wait": 20}


def test_the_record_survives_an_attempt_that_is_killed(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "PEER_WAIT", 0.0)  # its process lives: it is this one
    first = ProgressFile(tmp_path, "sft", command=1)
    clock.now += 6
    first.update(state="running", force=True)
    known = read_progress(tmp_path)
    assert known is not None
    assert known.parts == {"start": 9}
    faults.record_failure(tmp_path, ["rank 0 was killed"], known.token)
    faults.record_failure(tmp_path, ["its launcher could not start it"], "another start")
    second = ProgressFile(tmp_path, "sft", command=1)
    assert second.now.attempt == 3
    assert second.now.earlier["start"] == 9  # those of the killed attempt, though one without any followed
    assert second.now.parts["start"] == 18


def test_an_old_record_has_no_times(tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text('{"stage": "sft", "state": "stopped", "updated": 5.0, "started": 1.0}')
    known = read_progress(tmp_path)
    assert known is not None
    assert known.parts == {}
    assert ProgressFile(tmp_path, "sft", command=0).now.parts.keys() <= {*stopwatch.PARTS}


def test_times_are_in_the_artifact_and_not_in_its_identity(tmp_path: Path) -> None:
    artifact = Artifact("sft", "sft", "tiny", "1a2b", {"seed": 0}, {}, {}, {}, {"seconds": 3.0}, folder=tmp_path)
    assert finalize(artifact).seconds_by_part == {}
    timed = finalize(artifact, lambda: {"start": 1.0, "save": 2.0})
    assert timed.seconds_by_part == {"start": 1.0, "save": 2.0}
    assert timed.provenance["seconds"] == 3.0
    assert (timed.fingerprint, timed.payload, timed.files) == (artifact.fingerprint, artifact.payload, {})
    odd = replace(open_artifact(tmp_path), provenance={"seconds_by_part": {"start": "long", "save": 2}})
    assert odd.seconds_by_part == {"save": 2.0}
    assert replace(odd, provenance={"seconds_by_part": "long"}).seconds_by_part == {}


# ---------------------------------------------------------------- shown


def test_the_table_has_a_line_a_step() -> None:
    rows = {"sft": {"forward/backward": 30.0, "start": 10.0}, "report": {"start": 0.5, "wait": 0.001}, "old": {}}
    assert table(rows).splitlines() == [
        "step    seconds     start  forward/backward     wait",
        "sft        40.0  10.0 25%          30.0 75%",
        "report      0.5  0.5 100%                    0.0  0%",
    ]
    assert table({"old": {}}) == ""


def test_sums_are_in_the_order_of_the_parts() -> None:
    found = add({"wait": 1.0, "start": 0.5}, {"start": 0.25, "save": 0.0, "unknown": 2.0})
    assert list(found.items()) == [("start", 0.75), ("wait", 1.0), ("unknown", 2.0)]
