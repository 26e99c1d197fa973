"""What is known of jobs and steps, against stand-ins for Slurm's commands: whose it is, when Slurm is queried."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import change, jobs, plan_of, states
from running import ROOT, run_cli

from pipeline.core import slurm_client as slurm
from pipeline.core.errors import ArtifactError, LaunchError, PlanError, Stopped
from pipeline.launchers import local
from pipeline.launchers.slurm import run_plan, submissions_table
from pipeline.launchers.stops import StopRequests
from pipeline.workflow import status
from pipeline.workflow.lock import lock
from pipeline.workflow.plan import make_plan, spec_of
from pipeline.workflow.progress import ProgressFile, many_attempts, too_many_restarts
from pipeline.workflow.stage import write_spec

pytestmark = pytest.mark.slow  # most tests start several commands


def calls(fake: Path, *names: str) -> list[str]:
    """The calls of these commands so far."""
    file = fake / "calls.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    return [line for line in lines if line.split()[0] in names]


def forget_calls(fake: Path) -> None:
    (fake / "calls.txt").unlink(missing_ok=True)


def row_of(runs: Path, name: str) -> status.Row:
    return status.find_step(status.table(runs)[0], name)


# ---------------------------------------------------------------- whose job it is


def test_an_id_that_slurm_gave_again_is_not_ours(tmp_path: Path, fake: Path) -> None:
    """The counter of ids was reset: another project's jobs have the ids of our old ones. Before: cancel ended them."""
    old = run_plan(plan_of(tmp_path))
    known = jobs(fake)
    for job in known.values():
        job |= {"state": "RUNNING", "comment": "another project's"}
    (fake / "jobs.json").write_text(json.dumps(known))
    assert set(states(tmp_path / "runs").values()) <= {"lost", "cancelled"}
    done = run_cli("cancel", "--yes", "--runs", str(tmp_path / "runs"))
    assert "nothing to cancel" in done.stdout
    assert not calls(fake, "scancel")
    again = run_plan(plan_of(tmp_path))
    assert all(one.new for one in again)
    assert not {one.job for one in old} & {number for one in again for number in one.after}


def test_a_site_that_replaces_comments_is_known_by_user_name_and_time(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COMMENT", "1")
    first = run_plan(plan_of(tmp_path))
    assert not any(one.new for one in run_plan(plan_of(tmp_path)))
    job = first[1].job
    for differs in ({"user": "anna"}, {"job-name": "other/sft"}, {"submitted": "2030-01-01T00:00:00"}):
        before = jobs(fake)[job]
        change(fake, job, **{"user": slurm.this_user(), **differs})
        assert row_of(tmp_path / "runs", "sft").state == "lost", differs
        change(fake, job, **{"user": "", **before})
    assert row_of(tmp_path / "runs", "sft").state == "queued"


@pytest.mark.parametrize("user", ["anna", None])
def test_another_members_job_is_shown_and_not_cancelled(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch, user: str | None
) -> None:
    found = run_plan(plan_of(tmp_path, stages=("preprocess",)))
    change(fake, found[0].job, user=user or slurm.this_user())
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    row = row_of(tmp_path / "runs", "preprocess")
    assert ("a job of anna" in row.reasons) == bool(user)
    if user is None:
        assert "cancelled 1 jobs" in status.cancel([row])[0]
        return
    with pytest.raises(PlanError, match=r"job 41 of anna, which only anna can end.*Fix: ask anna"):
        status.cancel([row])
    assert not calls(fake, "scancel")


def test_a_run_of_another_members_steps_says_whose_they_are(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: "submitted before", "is with Slurm", and for a step that runs without Slurm the error of a file."""
    first = run_plan(plan_of(tmp_path, stages=("preprocess",)))
    change(fake, first[0].job, user="anna")
    assert submissions_table(run_plan(plan_of(tmp_path, stages=("preprocess",)))).endswith("submitted before by anna")
    with pytest.raises(PlanError, match=r"is with Slurm, as job 41 of anna \(PENDING\)"):
        local.run_plan(make_plan(["tiny"], stages=("preprocess",), runs=tmp_path / "runs"))
    folder = first[0].step.folder
    change(fake, first[0].job, state="CANCELLED")
    (folder / "job.json").unlink()
    with lock(folder):
        ProgressFile(folder, "preprocess").update(state="running")
        owner = json.loads((folder / "owner.json").read_text())
        (folder / "owner.json").write_text(json.dumps({**owner, "user": "anna"}))
        row = row_of(tmp_path / "runs", "preprocess")
        assert (row.state, row.user) == ("running", "anna")
        with pytest.raises(ArtifactError, match=r"is being written by process \d+ of anna on "):
            local.run_plan(make_plan(["tiny"], stages=("preprocess",), runs=tmp_path / "runs"))
        (folder / "stop").mkdir()
        assert status.cancel([row]) == [f"{row.step}: asked to save and leave"]
        gone = replace(row, folder=str(tmp_path / "not" / "there"))
        with pytest.raises(PlanError, match=r"cannot be asked to stop: .*Fix: ask anna to run the same cancel command"):
            status.cancel([gone])


def test_a_job_that_has_ended_meanwhile_is_no_error_of_cancel(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_plan(plan_of(tmp_path, stages=("preprocess",)))
    row = row_of(tmp_path / "runs", "preprocess")
    said = "scancel: error: Kill job error on job id 41: Job/step already completing or completed\n"
    monkeypatch.setattr(status, "run_slurm", lambda *words: subprocess.CompletedProcess(words, 1, "", said))
    assert status.cancel([row]) == ["cancelled 1 jobs: 41"]
    said = "scancel: error: Kill job error on job id 41: Access/permission denied\n"
    with pytest.raises(LaunchError, match="Access/permission denied"):
        status.cancel([row])


# ---------------------------------------------------------------- several clusters


def test_a_job_is_queried_and_cancelled_on_its_own_cluster(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: status said lost, and the same command submitted everything again."""
    monkeypatch.setenv("CLUSTER", "east")
    (fake / "up-west").touch()
    plan = make_plan(["tiny"], ["cluster.slurm.clusters=west"], cluster="slurm", runs=tmp_path / "runs")
    run_plan(plan)
    assert set(states(tmp_path / "runs").values()) == {"queued"}
    assert not any(one.new for one in run_plan(plan))
    assert "cancelled 7 jobs" in run_cli("cancel", "--yes", "--runs", str(tmp_path / "runs")).stdout
    (call,) = calls(fake, "scancel")
    assert call.split()[1] == "--clusters=west"
    assert set(call.split()[2:]) == {"41", "42", "43", "44", "45", "46", "47"}


def test_what_cannot_be_queried_is_neither_gone_nor_submitted_again(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The accounting that -M needs is down, or the other cluster is; the steps of this one are still known."""
    monkeypatch.setenv("CLUSTER", "east")
    (fake / "up-west").touch()
    west = make_plan(["tiny"], ["cluster.slurm.clusters=west"], cluster="slurm", runs=tmp_path / "runs")
    run_plan(west)
    run_plan(make_plan(["tiny"], ["seed=5"], cluster="slurm", runs=tmp_path / "runs"))
    (fake / "up-west").unlink()
    before = len(jobs(fake))
    with pytest.raises(LaunchError, match="squeue: cannot query cluster west"):
        run_plan(west)
    with pytest.raises(LaunchError, match="squeue: cannot query cluster west"):
        run_plan(make_plan(["tiny"], cluster="slurm", runs=tmp_path / "runs"))  # from the other cluster's login node
    assert len(jobs(fake)) == before
    rows, troubles = status.table(tmp_path / "runs", everything=True)
    assert sorted(row.state for row in rows) == ["queued"] * 7 + ["unknown"] * 7
    assert "cannot query cluster west" in troubles[0]


def test_a_step_of_one_cluster_is_not_started_on_another(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLUSTER", "east")
    (fake / "up-west").touch()
    (fake / "up-east").touch()
    run_plan(make_plan(["tiny"], cluster="slurm", runs=tmp_path / "runs"))  # on east, which the record names
    record = slurm.read_job(plan_of(tmp_path).steps[0].folder)
    assert record is not None
    assert record.cluster == "east"
    monkeypatch.setenv("CLUSTER", "west")  # the login node of west
    slurm.current_cluster.cache_clear()
    with pytest.raises(PlanError, match=r": got job 41 \(PENDING\) on cluster east; expected no job on another"):
        run_plan(plan_of(tmp_path))
    assert set(states(tmp_path / "runs").values()) == {"queued"}


# ---------------------------------------------------------------- a chain whose jobs end meanwhile


def test_what_waits_for_a_job_that_is_gone_waits_for_its_successor(tmp_path: Path, fake: Path) -> None:
    """Before: the dependents counted as submitted before, and Slurm cancelled them a moment later."""
    first = {one.step.name: one for one in run_plan(plan_of(tmp_path))}
    change(fake, first["sft"].job, state="CANCELLED")
    again = {one.step.name: one for one in run_plan(plan_of(tmp_path))}
    assert [name for name, one in again.items() if one.new] == ["sft"]
    told = jobs(fake)
    for name in ("grpo", "evaluate-sft", "report"):
        assert again["sft"].job in told[again[name].job]["dependency"]
        assert first["sft"].job not in told[again[name].job]["dependency"]


def test_dependents_that_slurm_cancels_after_the_submission_are_replaced(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {one.step.name: one for one in run_plan(plan_of(tmp_path))}
    change(fake, first["sft"].job, state="CANCELLED")
    late = ["grpo", "evaluate-sft", "evaluate-grpo", "report"]

    def slurm_cancels(_: float) -> None:
        for name in late:
            change(fake, first[name].job, state="CANCELLED")

    monkeypatch.setattr("pipeline.launchers.slurm.time.sleep", slurm_cancels)
    again = {one.step.name: one for one in run_plan(plan_of(tmp_path))}
    assert [name for name, one in again.items() if one.new] == ["sft", "grpo", *late[1:]]
    alive = {number for number, job in jobs(fake).items() if job["state"] == "PENDING"}
    assert {one.job for one in again.values()} == alive
    assert jobs(fake)[again["grpo"].job]["dependency"] == f"afterok:{again['preprocess'].job}:{again['sft'].job}"


def test_what_can_never_start_is_no_input(tmp_path: Path, fake: Path) -> None:
    """GRPO still queued, its SFT cancelled a moment ago: what is to run next cannot count on it."""
    first = {one.step.name: one for one in run_plan(plan_of(tmp_path))}
    change(fake, first["sft"].job, state="CANCELLED")
    with pytest.raises(PlanError, match="tiny/sft is not done, and grpo needs it"):
        run_plan(plan_of(tmp_path, stages=("grpo",)))


# ---------------------------------------------------------------- a job that is queued again


def stopped(tmp_path: Path, fake: Path, **env: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """A chain whose SFT has saved: the last act of its batch script. Returns what that did, and the chain by name."""
    found = {one.step.name: one for one in run_plan(plan_of(tmp_path), typed="python -m pipeline run tiny")}
    if not env.pop("CANCELLED", None):
        change(fake, found["sft"].job, state="RUNNING")
    words = [sys.executable, "-m", "pipeline.launchers.requeue", str(found["sft"].step.folder)]
    given = {**os.environ, "SLURM_JOB_ID": found["sft"].job, "SLURM_MEM_PER_NODE": "7", **env}
    return subprocess.run(words, cwd=ROOT, env=given, capture_output=True, text=True, timeout=60), found


def test_a_refused_requeue_is_a_new_job_that_the_dependents_wait_for(tmp_path: Path, fake: Path) -> None:
    """JobRequeue=0: before, the step was saved and the whole chain cancelled."""
    done, found = stopped(tmp_path, fake, REFUSE_REQUEUE="Requested operation is presently disabled")
    assert done.returncode == 0, done.stderr
    old, told = found["sft"].job, jobs(fake)
    record = slurm.read_job(found["sft"].step.folder)
    assert record is not None
    assert told[str(record.id)]["dependency"] == f"afterany:{old}"
    assert told[str(record.id)]["comment"] == record.token
    for name in ("grpo", "evaluate-sft", "report"):
        waits = told[found[name].job]["dependency"]
        assert str(record.id) in waits
        assert old not in waits.partition(":")[2].split(":")
    assert told[found["evaluate-base"].job]["dependency"] == f"afterok:{found['preprocess'].job}"
    change(fake, old, state="FAILED")
    again = {one.step.name: one for one in run_plan(plan_of(tmp_path))}
    assert not any(one.new for one in again.values())


REFUSED = {"REFUSE_REQUEUE": "Requested operation is presently disabled"}


def check_handed_over(fake: Path, found: dict[str, Any]) -> str:
    """One successor, for which everything waits. Returns its id."""
    old, told = found["sft"].job, jobs(fake)
    (new,) = [number for number, job in told.items() if job.get("dependency") == f"afterany:{old}"]
    record = slurm.read_job(found["sft"].step.folder)
    assert record is not None
    assert (record.id, record.token) == (new, told[new]["comment"])
    for name in ("grpo", "evaluate-sft", "report"):
        waits = told[found[name].job]["dependency"].partition(":")[2].split(":")
        assert new in waits
        assert old not in waits
    return new


@pytest.mark.parametrize("hole", ["away-update", "lose-sbatch"])
def test_a_successor_is_submitted_once_and_gets_all_that_waits(tmp_path: Path, fake: Path, hole: str) -> None:
    """The controller goes away while dependents are moved (before: they were cancelled), or its answer is lost."""
    (fake / hole).write_text("2")
    done, found = stopped(tmp_path, fake, **REFUSED)
    assert done.returncode == 0, done.stderr
    assert "trying again" in done.stdout
    check_handed_over(fake, found)


def test_a_requeue_whose_answer_is_lost_has_no_successor(tmp_path: Path, fake: Path) -> None:
    (fake / "lose-requeue").touch()
    done, found = stopped(tmp_path, fake)
    assert done.returncode == 0, done.stderr
    assert len(jobs(fake)) == len(found)
    assert jobs(fake)[found["sft"].job]["state"] == "PENDING"


def test_a_job_that_is_killed_before_it_hands_over_leaves_a_chain_that_one_command_completes(
    tmp_path: Path, fake: Path
) -> None:
    """The successor runs; what waited for the old job is cancelled by Slurm, and status says how it goes on."""
    found = {one.step.name: one for one in run_plan(plan_of(tmp_path), typed="python -m pipeline run tiny")}
    (fake / "cut-sbatch").touch()
    change(fake, found["sft"].job, state="RUNNING")
    words = [sys.executable, "-m", "pipeline.launchers.requeue", str(found["sft"].step.folder)]
    env = {**os.environ, "SLURM_JOB_ID": found["sft"].job, **REFUSED}
    assert subprocess.run(words, cwd=ROOT, env=env, timeout=60).returncode == -9
    ProgressFile(found["sft"].step.folder, "sft").update(state="stopped", exit_code=75)
    old, known = found["sft"].job, jobs(fake)
    cancelled = {name for name in found if old in known[found[name].job].get("dependency", "")}
    assert cancelled == {"grpo", "evaluate-sft", "report"}
    for name in (*cancelled, "evaluate-grpo"):
        change(fake, found[name].job, state="CANCELLED")
    change(fake, old, state="FAILED")
    assert row_of(tmp_path / "runs", "sft").state == "queued"  # found by its token
    row = row_of(tmp_path / "runs", "grpo")
    assert (row.state, row.reasons[-1]) == ("cancelled", "Fix: python -m pipeline run tiny resumes it")
    again = {one.step.name: one for one in run_plan(plan_of(tmp_path))}
    assert {name for name, one in again.items() if one.new} == {*cancelled, "evaluate-grpo"}
    assert again["sft"].job in again["grpo"].after


@pytest.mark.parametrize("state", ["PREEMPTED", "NODE_FAIL"])
def test_a_job_that_slurm_does_not_start_again_is_resumed_by_the_command_that_status_names(
    tmp_path: Path, fake: Path, state: str
) -> None:
    """Preemption by CANCEL without grace, a dead node with JobRequeue=0: nothing of the job could act any more."""
    found = {one.step.name: one for one in run_plan(plan_of(tmp_path), typed="python -m pipeline run tiny")}
    ProgressFile(found["sft"].step.folder, "sft").update(state="running", done=4, total=9)
    change(fake, found["sft"].job, state=state)
    row = row_of(tmp_path / "runs", "sft")
    assert row.state == "failed"
    assert f"({state})" in row.reasons[0]
    assert "Fix: python -m pipeline run tiny" in " ".join(row.reasons)
    again = {one.step.name: one for one in run_plan(plan_of(tmp_path))}
    assert again["sft"].new


def test_nodes_without_scontrol_submit_a_successor(tmp_path: Path, fake: Path) -> None:
    found = {one.step.name: one for one in run_plan(plan_of(tmp_path))}
    change(fake, found["sft"].job, state="RUNNING")
    path = tmp_path / "bin"
    path.mkdir()
    for name in ("sbatch", "squeue", "sacct", "env", "python3"):
        (path / name).symlink_to(str(shutil.which(name)))
    words = [sys.executable, "-m", "pipeline.launchers.requeue", str(found["sft"].step.folder)]
    env = {**os.environ, "SLURM_JOB_ID": found["sft"].job, "PATH": str(path)}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert "cannot be requeued (scontrol: no such program on this machine)" in done.stdout, done.stderr
    told = jobs(fake)
    assert [job["state"] for job in told.values() if job.get("dependency") == f"afterany:{found['sft'].job}"]


def test_a_controller_that_is_away_is_waited_for(tmp_path: Path, fake: Path) -> None:
    (fake / "away").write_text("1")
    done, found = stopped(tmp_path, fake)
    assert done.returncode == 0, done.stderr
    assert "trying again" in done.stdout
    assert calls(fake, "scontrol")[-1] == f"scontrol requeue {found['sft'].job}"


def test_a_chain_that_cannot_be_queued_again_is_resubmitted_by_the_command_that_status_names(
    tmp_path: Path, fake: Path
) -> None:
    refused = {"REFUSE_REQUEUE": "Requested operation is presently disabled", "REFUSE": "Invalid qos"}
    found = run_plan(plan_of(tmp_path), typed="python -m pipeline run tiny")
    sft = found[1].step
    change(fake, found[1].job, state="RUNNING")
    words = [sys.executable, "-m", "pipeline.launchers.requeue", str(sft.folder)]
    env = {**os.environ, "SLURM_JOB_ID": found[1].job, **refused}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "refused a new one: Invalid qos. Fix: python -m pipeline run tiny" in done.stderr
    ProgressFile(sft.folder, "sft").update(state="stopped")
    known = jobs(fake)
    for number, job in known.items():
        job["state"] = "FAILED" if number == found[1].job else "CANCELLED" if int(number) > 42 else "COMPLETED"
    (fake / "jobs.json").write_text(json.dumps(known))
    row = row_of(tmp_path / "runs", "sft")
    assert row.state == "stopped"
    assert row.reasons[-1] == "its job was not queued again. Fix: python -m pipeline run tiny"
    again = {one.step.name: one for one in run_plan(plan_of(tmp_path))}
    assert {"sft", "grpo", "evaluate-sft", "report"} <= {name for name, one in again.items() if one.new}


def test_a_job_that_somebody_cancels_is_not_queued_again(tmp_path: Path, fake: Path) -> None:
    done, found = stopped(tmp_path, fake, CANCELLED="1")  # no state but RUNNING is one to start again from
    assert done.returncode == 1
    assert "is being cancelled" in done.stderr
    assert not [call for call in calls(fake, "scontrol") if "requeue" in call]
    assert len(jobs(fake)) == len(found)


# ---------------------------------------------------------------- how often Slurm is queried


def test_a_submission_queries_slurm_twice_whatever_its_size(tmp_path: Path, fake: Path) -> None:
    """Once about all steps, and once more after the fact. Before: once a step that had an owner file."""
    plan = plan_of(tmp_path)
    for step in plan.steps:
        step.folder.mkdir(parents=True)
        record = {"token": "t", "host": "elsewhere", "pid": 1, "started": 1.0, "since": 1.0, "job": "9"}
        (step.folder / "owner.json").write_text(json.dumps(record))
    run_plan(plan)
    assert len(calls(fake, "squeue")) == 2
    forget_calls(fake)
    run_plan(plan)
    assert len(calls(fake, "squeue")) == 2
    forget_calls(fake)
    run_cli("status", "--runs", str(tmp_path / "runs"))
    assert len(calls(fake, "squeue")) == 1
    forget_calls(fake)
    run_cli("cancel", "--yes", "--runs", str(tmp_path / "runs"))
    assert len(calls(fake, "squeue")) == 1
    assert len(calls(fake, "scancel")) == 1


@pytest.mark.parametrize("words", [["status", "--watch"], ["logs", "preprocess", "-f"]])
def test_what_repeats_queries_slurm_every_thirty_seconds(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """Sites forbid more. Before: 49 calls of squeue in 30 s by logs -f."""
    (one,) = run_plan(plan_of(tmp_path, stages=("preprocess",)))
    change(fake, one.job, state="RUNNING")
    forget_calls(fake)
    command = [sys.executable, "-m", "pipeline", *words, "--runs", str(tmp_path / "runs")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.time() + 20
    while not calls(fake, "squeue"):
        assert time.time() < until
        time.sleep(0.1)
    time.sleep(3)
    assert process.poll() is None
    assert len(calls(fake, "squeue")) == 1
    assert len(calls(fake, "sacct")) <= 1
    monkeypatch.setenv("SLURM_JOB_ID", one.job)
    progress = ProgressFile(one.step.folder, "preprocess")
    progress.update(state="failed", problems=("rows are missing",))
    process.communicate(timeout=20)  # the step's own word is enough
    assert process.returncode == 0
    assert len(calls(fake, "squeue")) == 1


def test_between_two_questions_the_files_are_believed(tmp_path: Path, fake: Path) -> None:
    found = {one.step.name: one for one in run_plan(plan_of(tmp_path, stages=("preprocess", "sft")))}
    ask = status.ThrottledQuery()

    def state(name: str) -> str:
        return status.find_step(status.table(tmp_path / "runs", ask=ask)[0], name).state

    assert (state("preprocess"), state("sft")) == ("queued", "queued")
    folder = found["preprocess"].step.folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_JOB_ID", found["preprocess"].job)
        with lock(folder):
            progress = ProgressFile(folder, "preprocess")
            progress.update(state="running")
            assert state("preprocess") == "running"
            progress.update(state="failed", problems=("no rows",))
            assert state("preprocess") == "failed"
    assert state("sft") == "queued"
    change(fake, found["sft"].job, state="CANCELLED")
    ask.every = 0
    assert state("sft") == "cancelled"


# ---------------------------------------------------------------- in an allocation


def test_a_local_run_in_a_job_is_seen_from_outside(tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch --wrap 'python -m pipeline run …': no job.json, and its owner is on a node. Before: lost, no cancel."""
    step = plan_of(tmp_path).steps[0]
    write_spec(step.folder, spec_of(step, plan_of(tmp_path).cluster))
    (fake / "jobs.json").write_text(json.dumps({"7": {"state": "RUNNING", "reason": ""}}))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with lock(step.folder) as owner:
        there = {**vars(owner), "host": "node3"}
        (step.folder / "owner.json").write_text(json.dumps(there))
        ProgressFile(step.folder, "preprocess").update(state="running")
        monkeypatch.delenv("SLURM_JOB_ID")
        row = row_of(tmp_path / "runs", "preprocess")
        assert (row.state, row.node, row.live) == ("running", "node3", True)
        assert status.cancel([row]) == [f"{row.step}: asked to save and leave"]
        assert (step.folder / "stop").exists()
        change(fake, "7", state="TIMEOUT")
        assert row_of(tmp_path / "runs", "preprocess").state == "lost"
        (fake / "up").unlink()
        assert row_of(tmp_path / "runs", "preprocess").state == "unknown"


def test_a_local_run_saves_before_its_job_ends(tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = plan_of(tmp_path).steps[1]
    plan = make_plan(["tiny"], runs=tmp_path / "runs")
    now = time.time()
    assert local._stop_at(step, plan) == float("inf")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    ends = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now + 3600))
    (fake / "jobs.json").write_text(json.dumps({"7": {"state": "RUNNING", "reason": "", "end": ends}}))
    signal_before_limit = 3600 - (local._stop_at(step, plan) - now)
    assert 60 <= signal_before_limit <= 1800
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now) + 60))  # later versions of Slurm
    assert 25 <= local._stop_at(step, plan) - now <= 31  # a short job: half of what is left
    change(fake, "7", end="Unknown")
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert local._stop_at(step, plan) == float("inf")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_batch_systems_signals_to_a_local_run_are_one_wish_to_stop(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """sbatch --signal, scancel, the time limit, each of them repeated. Before: the step ended and nothing was saved."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    step = plan_of(tmp_path).steps[1]
    step.folder.mkdir(parents=True)
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)

    def signalled() -> None:
        with StopRequests() as stops, local._stopping(process, step, 5, "attempt", stops) as obey:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            obey()
            assert stops.count == 1
            assert (step.folder / "stop").exists()
            assert process.poll() is None  # it saves, and leaves by itself

    with pytest.raises(Stopped, match="was stopped"):
        signalled()
    assert process.poll() is not None  # nothing stays behind


# ---------------------------------------------------------------- why a job ended


@pytest.mark.parametrize(
    ("state", "code", "words"),
    [
        ("FAILED", "0:53", "Slurm could not start it on its node, most likely because its log cannot be written"),
        ("OUT_OF_MEMORY", "0:125", "out of host memory: it needs more memory than cluster.slurm.memory"),
        ("FAILED", "0:9", "was killed, most likely because the host's memory ran out"),
    ],
)
def test_why_a_job_ended_is_told(tmp_path: Path, fake: Path, state: str, code: str, words: str) -> None:
    found = {one.step.name: one for one in run_plan(plan_of(tmp_path, stages=("preprocess", "sft")))}
    change(fake, found["sft"].job, state=state, exit_code=code)
    row = row_of(tmp_path / "runs", "sft")
    assert row.state == "failed"
    assert words in row.reasons[0]
    if code == "0:53":
        assert str(found["sft"].step.folder) in row.reasons[0]


def test_the_peak_of_memory_is_what_accounting_counted(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACCT", "\n1024K\n2.50G\n\n100M")
    assert slurm.peak_memory(slurm.Job("41", "OUT_OF_MEMORY")) == "2.50 GiB"
    monkeypatch.delenv("SACCT")
    assert slurm.peak_memory(slurm.Job("41", "OUT_OF_MEMORY")) is None


def test_attempts_that_get_nowhere_are_told(tmp_path: Path, fake: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (one,) = [one for one in run_plan(plan_of(tmp_path, stages=("preprocess", "sft"))) if one.step.name == "sft"]
    for attempt in range(3):
        progress = ProgressFile(one.step.folder, "sft")
        progress.update(state="running", first=2 * attempt, done=2 * attempt, total=60)
        progress.update(state="stopped", done=2 * attempt + 2)
    words = "2 steps an attempt (4 of 60 in 2): about 28 more attempts are needed. Fix: raise cluster.slurm.time"
    assert f"note: {words}" in capfd.readouterr().out
    assert words in row_of(tmp_path / "runs", "sft").reasons
    assert too_many_restarts(replace(progress.now, first=30)) is None
    assert many_attempts(progress.now) is None


def test_a_step_that_took_many_attempts_says_so_when_it_is_done(tmp_path: Path) -> None:
    """A warning of the step, so that status and the report show it."""
    for attempt in range(30):
        progress = ProgressFile(tmp_path, "sft")
        progress.update(state="running", first=2 * attempt, done=2 * attempt, total=60)
        progress.update(state="stopped", done=2 * attempt + 2)
    told = many_attempts(progress.now)
    assert told is not None
    assert told.startswith("it took 30 attempts of about 2 steps")
    assert "Fix: raise cluster.slurm.time" in told


def test_a_silent_step_is_told(tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that hangs, or was stopped: before, the last words of hours ago looked like those of now."""
    step = plan_of(tmp_path).steps[0]
    write_spec(step.folder, spec_of(step, plan_of(tmp_path).cluster))
    with lock(step.folder):
        ProgressFile(step.folder, "preprocess").update(state="running")
        assert row_of(tmp_path / "runs", "preprocess").reasons == ()
        record = json.loads((step.folder / "progress.json").read_text())
        (step.folder / "progress.json").write_text(json.dumps({**record, "updated": record["updated"] - 3600}))
        (reason,) = row_of(tmp_path / "runs", "preprocess").reasons
    assert reason.startswith("no progress written for 1:00:0")


def test_warnings_of_a_finished_step_are_shown_whatever_became_of_its_progress(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(ROOT / "tests" / "fixtures" / "records-v1" / "tiny-rehearsal", runs / "tiny-rehearsal")
    (folder,) = runs.glob("*/sft-*")
    record = json.loads((folder / "artifact.json").read_text())
    record["metrics"]["warnings"] = ["3 of 9 rows were left out"]
    (folder / "artifact.json").write_text(json.dumps(record))
    for damage in ("", "{}"):
        (folder / "progress.json").write_text(damage)
        assert row_of(runs, "sft").warnings == ("3 of 9 rows were left out",)


def test_a_full_disk_is_called_a_full_disk(tmp_path: Path, fake: Path) -> None:
    """Really full: then no process can write why it ended."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system takes root")
    try:
        plan = make_plan(["tiny"], runs=disk / "runs")
        step = plan.steps[1]
        write_spec(step.folder, spec_of(step, plan.cluster))
        ProgressFile(step.folder, "sft").update(state="running")
        (step.folder / "log.txt").write_text("RuntimeError: gloo: Connection reset by peer\n")
        with pytest.raises(OSError, match="No space left"), (step.folder / "weights").open("wb") as file:
            file.write(b"x" * (4 << 20))
        row = row_of(disk / "runs", "sft")
        assert row.state == "lost"
        assert row.reasons == (
            f"no space left to write {step.folder}. Fix: free space or quota, then run the same command again",
        )
        error = local._failure(step, 1, None, step.folder / "log.txt", None)
        assert f"no space left to write {step.folder}" in str(error)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
