"""attempts: which failures are tried again, when the restarts end, and what stays on record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from fake_slurm import change, plan_of
from running import ROOT

from pipeline.core.files import read_json, write_json
from pipeline.core.heartbeat import FOLDER, Failure, report_failure
from pipeline.launchers.slurm import run_plan
from pipeline.workflow import status
from pipeline.workflow.artifact import ARTIFACT
from pipeline.workflow.attempts import (
    CONNECTION,
    HANG,
    KEPT,
    KILLED,
    LAUNCH,
    LOST,
    MAX_WITHOUT_PROGRESS,
    NOT_BEGUN,
    Attempt,
    Attempts,
    begin_count,
    decide,
    describe_attempts,
    keep,
    kind_of,
    read_attempts,
    verdict,
)
from pipeline.workflow.faults import record_report
from pipeline.workflow.plan import spec_of
from pipeline.workflow.progress import ATTEMPT, ProgressFile, attempt_token, read_progress
from pipeline.workflow.stage import write_spec

KILL = "rank {} (process {} on node{}) was killed by SIGKILL: most likely the host's memory ran out"


def attempts_of(*ends: tuple[int, int, str, str]) -> list[Attempt]:
    """Attempts by (first, last, kind, problem)."""
    return [
        Attempt(
            number, 0, float(number), 1.0, first, last, "lost" if kind == LOST else "failed", kind, problem, "node1"
        )
        for number, (first, last, kind, problem) in enumerate(ends, 1)
    ]


def kill(first: int, last: int, rank: int = 1) -> tuple[int, int, str, str]:
    return first, last, KILLED, KILL.format(rank, 4000 + rank, rank)


@pytest.mark.parametrize(
    ("ends", "again"),
    [
        ([kill(0, 7)], True),
        ([kill(0, 7), kill(4, 7, 2)], True),
        ([kill(0, 7), kill(4, 7, 2), kill(4, 7, 3)], False),  # other ranks, processes and nodes: the same failure
        ([kill(0, 7), kill(4, 7), kill(4, 9), kill(8, 9)], True),  # it got further in between
        ([kill(0, 7), kill(4, 7), kill(4, 9), kill(4, 7)], True),
        ([kill(0, 7), kill(4, 6), kill(4, 5), kill(4, 8)], True),  # not at the same step: a cause from outside
        ([kill(0, 7), (4, 7, CONNECTION, "Connection closed by peer"), kill(4, 7)], True),
        ([kill(NOT_BEGUN, NOT_BEGUN)] * 3, False),
        ([(NOT_BEGUN, NOT_BEGUN, LOST, "gone")] * 9, True),  # a job that is preempted while it loads
        ([(NOT_BEGUN, NOT_BEGUN, LOST, "gone")] * 10, False),
        ([(4, 7, LOST, "gone")] * 3, False),  # a node that fails at one step
        ([(0, 0, "", "ValueError: 3")], False),  # would come again
        ([(0, 3, HANG, "rank 1 hangs")], True),
        ([], True),
    ],
)
def test_the_rule(ends: list[tuple[int, int, str, str]], again: bool) -> None:
    decision = verdict(attempts_of(*ends), 3)
    assert decision.again is again
    if not again and ends[-1][2]:
        assert decision.sentence.startswith("gave up: ")
        assert "Fix: " in decision.sentence


def test_attempts_that_leave_no_later_checkpoint_end() -> None:
    ends = [kill(4, 5 + k) for k in range(MAX_WITHOUT_PROGRESS)]
    assert verdict(attempts_of(*ends[:-1]), 3).again
    decision = verdict(attempts_of(*ends), 3)
    assert (decision.again, decision.sentence.partition(".")[0]) == (
        False,
        f"gave up: {MAX_WITHOUT_PROGRESS} attempts in a row failed and left no later checkpoint",
    )
    assert verdict(attempts_of(*ends, kill(8, 9)), 3).again  # one began later


def test_a_limit_of_one_never_starts_a_step_again() -> None:
    assert not verdict(attempts_of(kill(0, 7)), 1).again


def test_the_second_failure_of_a_kind_waits() -> None:
    assert [verdict(attempts_of(*[kill(0, 7)] * count), 4).delay for count in (1, 2, 3)] == [0, 5, 10]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionResetError("peer"), CONNECTION),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:43"), CONNECTION),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:2356, unhandled system error"), CONNECTION),
        (OSError(116, "Stale file handle"), CONNECTION),
        (OSError(28, "No space left on device"), ""),
        (RuntimeError("shapes (3,4) and (5,6) cannot be multiplied"), ""),
        (KeyError("gloo"), ""),
    ],
)
def test_only_what_may_pass_is_a_lost_connection(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind


def fail(folder: Path, step: int, problem: str = "rank 1 was killed", kind: str = KILLED) -> ProgressFile:
    progress = ProgressFile(folder, "sft")
    progress.update(state="running", first=0, done=0, total=9)
    progress.update(done=step)
    progress.update(state="failed", problems=(problem,), exit_code=1, kind=kind)
    return progress


def test_three_failures_at_one_step_are_told_once_and_a_new_command_counts_anew(tmp_path: Path) -> None:
    for _ in range(2):
        fail(tmp_path, 4)
        assert decide(tmp_path, 3).again
    fail(tmp_path, 4)
    decision = decide(tmp_path, 3)
    assert (decision.again, decision.sentence.partition(".")[0]) == (
        False,
        "gave up: the same failure came 3 times at step 4",
    )
    progress = read_progress(tmp_path)
    assert progress is not None
    assert progress.problems == ("rank 1 was killed", decision.sentence)
    assert decide(tmp_path, 3, restarted=True) == decision  # Slurm, or a site, starts the job again: it ends at once
    assert read_progress(tmp_path) == progress
    begin_count(tmp_path)
    assert [one.last for one in read_attempts(tmp_path).attempts] == [4, 4, 4]  # they stay on record
    fail(tmp_path, 4)
    assert decide(tmp_path, 3).again


def test_an_attempt_whose_node_failed_counts_when_the_job_starts_again(tmp_path: Path) -> None:
    for number in range(3):
        progress = ProgressFile(tmp_path, "sft")
        progress.update(state="running", first=0, done=0, total=9)
        progress.update(done=4, force=True)
        assert decide(tmp_path, 3, restarted=True).again is (number < 2)
    assert [(one.state, one.kind, one.last) for one in read_attempts(tmp_path).attempts] == [("lost", LOST, 4)] * 3


def test_a_stop_is_no_failure_and_an_attempt_counts_once(tmp_path: Path) -> None:
    progress = ProgressFile(tmp_path, "sft")
    progress.update(state="running", first=0, done=5, total=9)
    progress.update(state="stopped", exit_code=75)
    for _ in range(3):
        assert decide(tmp_path, 3, restarted=True).again
    keep(tmp_path, read_progress(tmp_path))
    assert [one.state for one in read_attempts(tmp_path).attempts] == ["stopped"]
    assert describe_attempts(read_attempts(tmp_path)) is None


def test_an_attempt_without_a_word_is_what_the_launcher_says(tmp_path: Path) -> None:
    fail(tmp_path, 4)
    assert decide(tmp_path, 3, silent="srun ended with exit code 1", silent_kind=LAUNCH).again
    assert decide(tmp_path, 3, silent="srun ended with exit code 1", silent_kind=LAUNCH).again
    assert [one.problem for one in read_attempts(tmp_path).attempts] == [
        "rank 1 was killed",
        "srun ended with exit code 1",
    ]
    assert not decide(tmp_path, 3, silent="exit code 1").again  # an import that fails, on this machine


def test_a_mistake_is_not_tried_again_and_a_step_that_is_done_goes_on(tmp_path: Path) -> None:
    fail(tmp_path, 0, "task.source: got 'x'", "")
    decision = decide(tmp_path, 3)
    assert (decision.again, decision.sentence) == (False, "")
    write = replace(read_attempts(tmp_path), gave_up="gave up")
    assert write.counted[-1].problem == "task.source: got 'x'"


def test_the_file_is_bounded(tmp_path: Path) -> None:
    before = attempts_of(*[kill(0, step) for step in range(KEPT)])
    write_json(tmp_path / "attempts.json", asdict(Attempts(tuple(before))))
    fail(tmp_path, KEPT)
    decide(tmp_path, 3)
    assert [one.last for one in read_attempts(tmp_path).attempts] == list(range(1, KEPT + 1))
    assert (tmp_path / "attempts.json").stat().st_size < 50_000


def retry(folder: Path, *code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.launchers.retry", str(folder), *code],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "SLURM_JOB_ID": "7"},
    )  # fmt: skip


def test_a_batch_script_gets_the_decision_as_an_exit_code(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    step = plan.steps[1]
    write_spec(step.folder, spec_of(step, plan.cluster))
    fail(step.folder, 4)
    done = retry(step.folder, "137")
    assert (done.returncode, done.stderr) == (0, "note: the step failed at step 4; it starts again\n")
    fail(step.folder, 5, "ValueError: 3", "")
    done = retry(step.folder, "1")
    assert (done.returncode, done.stderr) == (1, "")
    assert retry(step.folder).returncode == 0  # someone has requeued the job
    assert retry(step.folder, "x").returncode == 2


def test_status_shows_the_failures_of_a_running_step_and_why_the_restarts_ended(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    step = plan.steps[1]
    write_spec(step.folder, spec_of(step, plan.cluster))
    for _ in range(3):
        fail(step.folder, 4, "rank 1 was killed. Fix: more memory")
        decide(step.folder, 3)
    (row,) = status.table(tmp_path / "runs")[0]
    assert row.state == "failed"
    assert row.restarts == 2
    assert row.reasons[1].startswith("gave up: the same failure came 3 times at step 4")
    assert describe_attempts(read_attempts(step.folder)) == (
        "3 attempts have failed, the last at step 4: rank 1 was killed"
    )
    assert read_json(step.folder / ARTIFACT) is None
    assert json.loads((step.folder / "attempts.json").read_text())["gave_up"] == row.reasons[1]


@pytest.mark.parametrize(
    ("seen", "reports", "told"),
    [
        (
            ("Connection closed by peer", CONNECTION),
            [Failure(1, ["ValueError: 3"], "", 1)],
            ("rank 1: ValueError: 3", ""),
        ),
        (("ValueError: 4", ""), [Failure(1, ["ValueError: 3"], "", 1)], ("ValueError: 4", "")),
        (
            ("Connection reset", CONNECTION),
            [Failure(2, ["rank 0 ended"], CONNECTION, 1)],
            ("Connection reset", CONNECTION),
        ),
        (
            ("Connection reset", CONNECTION),
            [
                Failure(0, ["Connection reset"], CONNECTION, 1),
                Failure(3, ["out of memory"], "memory", 1, ("rows", 4, 2)),
            ],
            ("rank 3: out of memory", "memory"),
        ),
    ],
)
def test_the_rank_that_failed_first_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seen: tuple[str, str],
    reports: list[Failure],
    told: tuple[str, str],
) -> None:
    """And not what rank 0 saw of it. Before: a ValueError of rank 1 was a lost connection."""
    folder = tmp_path / "step"
    folder.mkdir()
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv(ATTEMPT, "mine")
    for report in reports:
        report_failure(report)
    progress = ProgressFile(folder, "sft")
    progress.update(state="failed", problems=(seen[0],), exit_code=1, kind=seen[1])
    record_report(folder, "mine")
    found = read_progress(folder)
    assert found is not None
    assert (found.problems, found.kind) == ((told[0],), told[1])
    assert (found.shrink is not None) == (told[1] == "memory")


def test_restarts_from_outside_go_on_where_the_scripts_are_switched_off(tmp_path: Path) -> None:
    for number in range(3):
        progress = ProgressFile(tmp_path, "sft")
        progress.update(state="running", first=0, done=4, total=9, force=True)
        assert decide(tmp_path, 1, restarted=True).again is (number < 2)


def test_a_running_job_between_two_attempts_has_not_failed(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: status said failed while the script was about to start the step again, and --watch ended."""
    plan = plan_of(tmp_path)
    one = run_plan(plan)[1]
    change(fake, one.job, state="RUNNING")
    monkeypatch.setenv(ATTEMPT, attempt_token(one.job, 0, 0))
    fail(one.step.folder, 4)
    row = next(row for row in status.table(tmp_path / "runs")[0] if row.name == "sft")
    assert row.state == "starting"
    ProgressFile(one.step.folder, "sft").update(state="stopped", exit_code=75)
    row = next(row for row in status.table(tmp_path / "runs")[0] if row.name == "sft")
    assert row.state == "ending"  # the script is about to queue its job again
    fail(one.step.folder, 4, "ValueError: 3", "")
    row = next(row for row in status.table(tmp_path / "runs")[0] if row.name == "sft")
    assert row.state == "failed"
