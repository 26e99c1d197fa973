"""Batch scripts, chains, status: against stand-ins for Slurm's commands. tests/slurm/ has the real ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fake_slurm import change, cluster_of, forget, jobs, plan_of, states
from hypothesis import given
from hypothesis import strategies as st
from running import NANO, ROOT, run_cli

from pipeline.config.cluster import read_cluster
from pipeline.config.site import minutes
from pipeline.core import slurm_client as slurm
from pipeline.core.errors import ArtifactError, LaunchError, PlanError
from pipeline.launchers.batch_script import render, script
from pipeline.launchers.slurm import run_plan
from pipeline.launchers.torchrun import PORTS, Rendezvous, command, exit_code, port_of, rendezvous
from pipeline.workflow import status
from pipeline.workflow.lock import LockHolder, is_alive, lock, read_holder
from pipeline.workflow.plan import make_plan, spec_of
from pipeline.workflow.progress import ATTEMPT, ProgressFile, this_attempt
from pipeline.workflow.stage import STAGES, write_spec

pytestmark = pytest.mark.slow  # most tests start several commands

FIXTURES = Path(__file__).parents[1] / "fixtures"


# ---------------------------------------------------------------- the batch script


def test_the_committed_scripts_are_what_the_launcher_renders(tmp_path: Path) -> None:
    """Run scripts/render after a change."""
    written = render(cluster_of(), tmp_path)
    assert {path.name for path in written} == {path.name for path in (ROOT / "slurm").iterdir()}
    for path in written:
        assert path.read_text() == (ROOT / "slurm" / path.name).read_text(), path.name


def test_everything_that_a_cluster_can_ask_for_in_full() -> None:
    """The golden file: tests/fixtures/job.slurm."""
    asked = [
        "nodes=2",
        "gpus=4",
        *("slurm.partition=gpu", "slurm.account=lab", "slurm.qos=long", "slurm.constraint=ib", "slurm.gpu_type=a100"),
        *("slurm.cpus=32", "slurm.memory=250G", "slurm.time.grpo=1d12h", "slurm.signal_before_limit=300"),
        *("slurm.extra_sbatch_args=[--exclude=node7, --comment=my job]", "slurm.modules=[cuda/12.4, '2023.10']"),
        *("slurm.setup=[module purge]", "slurm.venv=$HOME/venv", "slurm.environment={HF_HOME: $SCRATCH/my cache}"),
        *("slurm.srun=[--mpi=pmix]", "slurm.wrapper=[apptainer, exec, --nv, ~/therefore.sif]", "slurm.interface=ib0"),
        *("slurm.pass_environment=[HF_TOKEN]", "slurm.gpu_request=gpus-per-node"),
    ]
    assert script(STAGES["grpo"], cluster_of(*asked)) == (FIXTURES / "job.slurm").read_text()


def test_a_stage_of_one_process_asks_for_one_node_and_no_gpu() -> None:
    text = script(STAGES["report"], cluster_of("nodes=4", "gpus=8"))
    assert "--nodes=1\n" in text
    assert "gpu" not in text


def test_every_script_is_bash_of_a_screen_and_parses_no_yaml() -> None:
    for path in (ROOT / "slurm").iterdir():
        assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
        text = path.read_text()
        assert len(text.splitlines()) <= 50
        assert not re.search(r"\b(grep|awk|sed|yq)\b", text)


@pytest.fixture
def job(fake: Path, tmp_path: Path) -> tuple[list[str], Path]:
    """The command that runs a step's batch script, and the step's folder."""
    step = plan_of(tmp_path).steps[1]
    step.folder.mkdir(parents=True)
    path = step.folder / "job.slurm"
    path.write_text(script(STAGES["sft"], cluster_of(), step, sys.prefix))
    (fake / "jobs.json").write_text(json.dumps({"7": {"state": "RUNNING", "reason": ""}}))
    return [
        "env",
        "SLURM_JOB_ID=7",
        "SLURM_CPUS_PER_TASK=2",
        f"SLURM_SUBMIT_DIR={ROOT}",
        "bash",
        str(path),
    ], step.folder


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        (75, "RUNNING", True),
        (75, "COMPLETING", False),
        (2, "RUNNING", False),
        (143, "RUNNING", True),  # TERM ended Python before it listened; before: failed, and the chain with it
        (138, "RUNNING", True),
        (143, "COMPLETING", False),
        (137, "RUNNING", False),
    ],
)
def test_only_an_agreed_stop_of_a_running_job_starts_it_again(
    job: tuple[list[str], Path], fake: Path, monkeypatch: pytest.MonkeyPatch, code: int, state: str, requeued: bool
) -> None:
    """A job that is being cancelled ends as COMPLETING: starting it again would undo the cancelling."""
    change(fake, "7", state=state)
    monkeypatch.setenv("SRUN_CODE", str(code))
    assert subprocess.run(job[0]).returncode == code
    assert (fake / "scontrol.txt").exists() == requeued
    if requeued:
        assert (fake / "scontrol.txt").read_text() == "requeue 7\n"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_script_writes_the_stop_file_and_the_step_ends_by_itself(
    job: tuple[list[str], Path], fake: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    words, folder = job
    (folder / "stop").touch()  # of the attempt before
    monkeypatch.setenv("SRUN_UNTIL", str(fake / "end"))
    monkeypatch.setenv("SRUN_CODE", "75")
    process = subprocess.Popen(words)
    until = time.time() + 20
    while not (fake / "srun.txt").exists():
        assert time.time() < until
        time.sleep(0.05)
    assert not (folder / "stop").exists()
    for _ in range(2):  # a second one is no different
        process.send_signal(number)
        time.sleep(0.2)
    assert (folder / "stop").exists()
    assert process.poll() is None
    (fake / "end").touch()
    assert process.wait(20) == 75
    assert f"--step {folder}" in (fake / "srun.txt").read_text()


def test_without_a_recipe_a_script_says_what_it_needs() -> None:
    done = subprocess.run(["bash", "slurm/grpo.slurm"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "expected a recipe. Fix: sbatch slurm/grpo.slurm RECIPE [key=value …]" in done.stderr


# ---------------------------------------------------------------- processes


def test_the_processes_of_a_job_meet_at_its_first_host() -> None:
    cluster = cluster_of("nodes=2", "gpus=4")
    words = command(STAGES["sft"], Path("runs/x"), cluster, Rendezvous(2, "node3", 15_041, "41"))
    for word in ("--nnodes=2", "--nproc-per-node=4", "--rdzv-endpoint=node3:15041", "--rdzv-id=41"):
        assert word in words
    assert words[-4:] == ["-m", "pipeline.sft", "--step", "runs/x"]
    alone = command(STAGES["sft"], Path("runs/x"), cluster)
    assert "--standalone" in alone
    assert "torch" not in " ".join(command(STAGES["report"], Path("runs/x"), cluster))
    assert "torch" not in " ".join(command(STAGES["sft"], Path("runs/x"), replace(cluster, processes=1)))


@given(st.integers(1, 10**8), st.integers(1, len(PORTS) - 1))
def test_jobs_that_can_meet_on_a_node_have_different_ports(job: int, later: int) -> None:
    assert port_of(str(job)) in PORTS
    assert port_of(str(job)) != port_of(str(job + later))
    attempts = [port_of(str(job), attempt) for attempt in range(20)]
    assert len(set(attempts)) == 20
    assert set(attempts) <= set(PORTS)


def test_attempts_of_a_job_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A zombie of the first attempt would let the second one in."""
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node1")
    first = rendezvous()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second = rendezvous()
    assert first is not None
    assert second is not None
    assert first.id != second.id
    assert first.port != second.port


@pytest.mark.parametrize(
    ("state", "own_code", "code", "told"),
    [
        ("stopped", 75, 1, 75),
        ("failed", 2, 1, 2),
        ("failed", 1, 143, 1),
        ("running", None, 9, 9),
        ("running", None, -9, 1),
    ],
)
def test_a_step_ends_with_its_own_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, own_code: int | None, code: int, told: int
) -> None:
    monkeypatch.setenv(ATTEMPT, "41-0-0")
    ProgressFile(tmp_path, "sft").update(state=state, exit_code=own_code)
    assert exit_code(tmp_path, code, "41-0-0") == told


def test_the_word_of_an_earlier_attempt_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clocks say: the node of the earlier attempt may be an hour ahead."""
    monkeypatch.setenv(ATTEMPT, "41-0-0")
    ProgressFile(tmp_path, "sft").update(state="stopped", exit_code=75)
    record = json.loads((tmp_path / "progress.json").read_text())
    for hours in (-1, 1):
        shifted = {**record, "started": record["started"] + 3600 * hours, "updated": record["updated"] + 3600 * hours}
        (tmp_path / "progress.json").write_text(json.dumps(shifted))
        assert exit_code(tmp_path, 137, "41-1-0") == 137
        assert exit_code(tmp_path, 137, "41-0-0") == 75


def test_a_result_that_another_node_shows_late_is_waited_for(tmp_path: Path) -> None:
    """Rank 0 has committed, and this node's file system still says that there is nothing."""
    fixture = next((FIXTURES / "records-v1").glob("*/sft-*/artifact.json"))
    late = threading.Timer(0.6, lambda: (tmp_path / "artifact.json").write_bytes(fixture.read_bytes()))
    late.start()
    assert exit_code(tmp_path, 0, "41-0-0") == 0
    late.join()


def test_an_attempt_has_one_name_on_every_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    names = [this_attempt()]
    for name, value in (("SLURM_NODEID", "1"), ("SLURM_RESTART_COUNT", "2"), ("THEREFORE_RETRY", "1")):
        monkeypatch.setenv(name, value)
        names.append(this_attempt())
    assert names == ["41-0-0", "41-0-0", "41-2-0", "41-2-1"]


# ---------------------------------------------------------------- times


@pytest.mark.parametrize(
    ("text", "number"),
    [("90m", 90), ("12h", 720), ("1d6h", 1800), ("12:00:00", 720), ("1-06:30:00", 1830), ("0:00:30", 1)],
)
def test_times_are_read_as_people_write_them(text: str, number: int) -> None:
    assert minutes(text) == number


@pytest.mark.parametrize("text", ["", "12", "h", "0h", "12:00", "-1h", "1.5h", "soon"])
def test_what_is_no_time_is_refused(text: str) -> None:
    _, problems = read_cluster("slurm", [f"slurm.time.sft='{text}'"])
    assert any("expected a time such as 12h" in problem for problem in problems)


@given(st.integers(1, 100_000))
def test_slurm_is_told_the_time_that_was_meant(number: int) -> None:
    text = script(STAGES["sft"], cluster_of(f"slurm.time.sft={number}m", "slurm.signal_before_limit=1"))
    found = re.search(r"--time=(\S+)", text)
    assert found
    assert minutes(found.group(1)) == number


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["cluster.slurm.time.sft=12:00:00"], "cluster.slurm.time.sft: got 43200; expected a time such as 12h"),
        (["cluster.gpus=auto"], "cluster.gpus: got 'auto', which counts the GPUs of this"),
        (
            ["cluster.slurm.signal_before_limit=7200"],
            "cluster.slurm.signal_before_limit: got 7200 seconds; expected less than the 1800",
        ),
        (
            ["cluster.slurm.gpu_type=a100", "cluster.gpus=0"],
            "cluster.slurm.gpu_type: got 'a100' with cluster.gpus 0; expected GPUs",
        ),
        (["cluster.slurm.partion=x"], "cluster.slurm.partion: unknown setting; did you mean 'partition'?"),
        (["--launcher", "local", "--nodes", "2"], "cluster.nodes: got 2; expected 1 with the launcher local"),
    ],
)
def test_a_cluster_that_cannot_be_is_told_before_anything_is_queued(
    tmp_path: Path, words: list[str], told: str
) -> None:
    done = run_cli("run", "tiny", "--launcher", "slurm", *words, "--runs", str(tmp_path / "runs"))
    assert done.returncode == 2
    assert told in done.stderr
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- the chain


def test_each_job_waits_for_the_jobs_of_its_inputs(tmp_path: Path, fake: Path) -> None:
    found = run_plan(plan_of(tmp_path))
    job = {one.step.name: one.job for one in found}
    told = jobs(fake)
    assert len(told) == 7
    waits = {name: told[number].get("dependency") for name, number in job.items()}
    assert waits["preprocess"] is None
    assert waits["evaluate-base"] == f"afterok:{job['preprocess']}"
    assert waits["grpo"] == f"afterok:{job['preprocess']}:{job['sft']}"
    assert waits["report"] == "afterok:" + ":".join(job[name] for name in job if name != "report")
    for one in found:
        asked = told[one.job]
        assert asked["job-name"] == one.step.label
        assert asked["output"] == str(one.step.folder / "log.txt")
        assert asked["kill-on-invalid-dep"] == "yes"
        assert {"parsable", "requeue", "open-mode", "signal"} <= set(asked)
        record = slurm.read_job(one.step.folder)
        assert record is not None
        assert (record.id, record.token) == (one.job, asked["comment"])
        assert (one.step.folder / "step.json").is_file()


def test_what_is_with_slurm_already_is_not_submitted_again(tmp_path: Path, fake: Path) -> None:
    first = run_plan(plan_of(tmp_path))
    again = run_plan(plan_of(tmp_path))
    assert len(jobs(fake)) == 7
    assert [one.job for one in again] == [one.job for one in first]
    assert not any(one.new for one in again)


def test_an_id_that_slurm_has_forgotten_is_never_depended_on(tmp_path: Path, fake: Path) -> None:
    """afterok on an unknown id would start at once; its step is submitted again instead."""
    old = {one.job for one in run_plan(plan_of(tmp_path))}
    forget(fake)
    (fake / "jobs.json").write_text(json.dumps({"99": {"state": "PENDING", "reason": ""}}))
    again = run_plan(plan_of(tmp_path))
    assert all(one.new for one in again)
    assert not old & {one.job for one in again}
    assert not old & {number for one in again for number in one.after}


@pytest.mark.parametrize("ended", ["FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"])
def test_a_step_whose_job_has_ended_without_a_result_is_submitted_again(tmp_path: Path, fake: Path, ended: str) -> None:
    first = {one.step.name: one for one in run_plan(plan_of(tmp_path))}
    change(fake, first["sft"].job, state=ended)
    again = {one.step.name: one for one in run_plan(plan_of(tmp_path))}
    assert [name for name, one in again.items() if one.new] == ["sft"]


def test_the_id_is_found_by_the_token_when_it_could_not_be_written(tmp_path: Path, fake: Path) -> None:
    first = {one.step.name: one for one in run_plan(plan_of(tmp_path))}
    folder = first["grpo"].step.folder
    record = slurm.read_job(folder)
    assert record is not None
    slurm.write_job(folder, slurm.JobRecord(record.token, record.launcher, record.submitted, None, record.log))
    again = {one.step.name: one for one in run_plan(plan_of(tmp_path))}
    assert not any(one.new for one in again.values())
    found = slurm.read_job(folder)
    assert found is not None
    assert found.id == first["grpo"].job


@pytest.mark.parametrize(
    ("answer", "job", "cluster"),
    [("41\n", "41", None), ("41;west\n", "41", "west"), ("sbatch: lua: welcome\n41;west\n", "41", "west")],
)
def test_the_cluster_that_took_a_job_is_written_down(answer: str, job: str, cluster: str | None) -> None:
    assert slurm.parse_submission(answer) == (job, cluster)


def test_an_answer_without_an_id_is_an_error() -> None:
    with pytest.raises(LaunchError, match="expected the id of a job"):
        slurm.parse_submission("Submitted\n")


def test_a_job_record_from_before_clusters_is_read(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"token": "t", "launcher": "slurm", "submitted": 1.0, "id": "41", "log": null}')
    assert slurm.read_job(tmp_path) == slurm.JobRecord("t", "slurm", 1.0, "41", None, None)


def test_a_job_is_submitted_to_the_cluster_that_the_file_names(tmp_path: Path, fake: Path) -> None:
    found = run_plan(make_plan(["tiny"], ["cluster.slurm.clusters=west"], cluster="slurm", runs=tmp_path / "runs"))
    assert {job["clusters"] for job in jobs(fake).values()} == {"west"}
    assert {slurm.read_job(one.step.folder).cluster for one in found} == {"west"}  # type: ignore[union-attr]


def test_a_refusal_in_the_middle_is_told_and_the_next_command_completes(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_plan(plan_of(tmp_path, stages=("preprocess",)))
    monkeypatch.setenv("REFUSE", "Batch job submission failed: Invalid account")
    with pytest.raises(LaunchError) as caught:
        run_plan(plan_of(tmp_path))
    assert caught.value.exit_code == 2
    assert caught.value.problems[0] == ("tiny/sft: Slurm refused the job: Batch job submission failed: Invalid account")
    assert "the same command submits the remaining steps" in caught.value.problems[-1]
    monkeypatch.delenv("REFUSE")
    found = run_plan(plan_of(tmp_path))
    assert [one.new for one in found] == [False, True, True, True, True, True, True]


def test_a_controller_that_takes_no_job_is_no_mistake_of_the_user(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer may have been lost after Slurm took the job: the token will tell, and only one job comes of it."""
    monkeypatch.setenv("REFUSE", "Batch job submission failed: Unable to contact slurm controller (connect failure)")
    with pytest.raises(LaunchError, match="tiny/preprocess: Slurm cannot be reached") as caught:
        run_plan(plan_of(tmp_path))
    assert caught.value.exit_code == 1
    monkeypatch.delenv("REFUSE")
    record = slurm.read_job(plan_of(tmp_path).steps[0].folder)
    assert record is not None
    assert record.id is None
    (fake / "jobs.json").write_text(json.dumps({"41": {"state": "PENDING", "reason": "", "comment": record.token}}))
    found = run_plan(plan_of(tmp_path))
    assert [one.job for one in found if not one.new] == ["41"]


def test_without_sbatch_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "bin"
    path.mkdir()
    for name in ("bash", "env", "git"):
        (path / name).symlink_to(str(shutil.which(name)))
    done = run_cli("run", "tiny", "--launcher", "slurm", "--runs", str(tmp_path / "runs"), env={"PATH": str(path)})
    assert done.returncode == 2
    assert "sbatch: no such program on this machine. Fix: use a login node" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_controller_that_is_down_is_told(tmp_path: Path, fake: Path) -> None:
    run_plan(plan_of(tmp_path))
    (fake / "up").unlink()
    with pytest.raises(LaunchError, match=r"squeue: cannot query Slurm: .*Unable to contact slurm controller"):
        run_plan(plan_of(tmp_path))
    told = run_cli("status", "--runs", str(tmp_path / "runs"))
    assert told.returncode == 0
    assert "note: squeue: cannot query Slurm" in told.stdout
    assert set(states(tmp_path / "runs").values()) == {"unknown"}  # not lost: nobody knows


def test_inputs_that_nobody_makes_are_told(tmp_path: Path, fake: Path) -> None:
    with pytest.raises(PlanError, match="tiny/sft is not done, and grpo needs it"):
        run_plan(plan_of(tmp_path, stages=("preprocess", "grpo")))


def test_a_step_that_is_queued_is_not_run_here_as_well(tmp_path: Path, fake: Path) -> None:
    run_plan(plan_of(tmp_path))
    done = run_cli("run", "tiny", "--runs", str(tmp_path / "runs"), "cluster.processes=2")
    assert done.returncode == 2
    assert "is with Slurm, as job 41 (PENDING)" in done.stderr


@pytest.mark.slow
def test_a_folder_that_was_copied_from_a_cluster_runs_where_there_is_no_slurm(tmp_path: Path, fake: Path) -> None:
    """Nobody can be asked about the job that its job.json names, and nobody has to be."""
    run_plan(make_plan(["tiny"], NANO, cluster="slurm", stages=("preprocess",), runs=tmp_path / "runs"))
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("bash", "env", "git"):
        (bare / name).symlink_to(str(shutil.which(name)))
    words = ["run", "tiny", *NANO, "--stages", "preprocess", "--runs", str(tmp_path / "runs")]
    done = run_cli(*words, env={"PATH": str(bare)})
    assert done.returncode == 0, done.stderr


def test_a_cluster_without_slurm_has_no_batch_scripts(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "pipeline.launchers.slurm", "local", str(tmp_path / "scripts")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "cluster local: got launcher local; expected slurm or submitit, whose jobs have batch scripts" in done.stderr
    assert not (tmp_path / "scripts").exists()


def test_a_dry_run_prints_scripts_and_lines_and_writes_nothing(tmp_path: Path, fake: Path) -> None:
    words = ["run", "tiny", "--launcher", "slurm", "--dry-run", "--runs", str(tmp_path / "runs")]
    done = run_cli(*words)
    assert done.returncode == 0
    assert done.stdout.count("#!/bin/bash -l") == 7
    assert done.stdout.count("\nsbatch --parsable") == 7
    assert "sbatch --parsable --dependency=afterok:tiny/preprocess --comment=TOKEN" in done.stdout
    assert not (tmp_path / "runs").exists()
    assert not (fake / "jobs.json").exists()


# ---------------------------------------------------------------- who may write


@pytest.mark.parametrize(
    ("host", "job", "mine", "state", "alive"),
    [
        ("elsewhere", "41", None, "RUNNING", True),
        ("elsewhere", "41", None, "FAILED", False),
        ("elsewhere", "41", None, None, False),  # Slurm has forgotten it
        ("elsewhere", "41", "41", "RUNNING", False),  # an earlier attempt of this very job
        ("elsewhere", "41", "42", "RUNNING", True),
        ("elsewhere", None, "42", None, True),  # nobody to ask
    ],
)
def test_an_owner_on_another_node_is_asked_for(
    fake: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    job: str | None,
    mine: str | None,
    state: str | None,
    alive: bool,
) -> None:
    known = {"41": {"state": state, "reason": ""}} if state else {}
    (fake / "jobs.json").write_text(json.dumps(known))
    if mine:
        monkeypatch.setenv("SLURM_JOB_ID", mine)
    assert is_alive(LockHolder("token", host, 1, 1.0, time.time(), job)) == alive


def test_a_requeued_job_takes_its_step_over_and_the_zombie_finds_out(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only slurmd was killed, the processes of the first attempt are still there."""
    (fake / "jobs.json").write_text(json.dumps({"41": {"state": "RUNNING", "reason": ""}}))
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    with lock(tmp_path) as zombie:
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with lock(tmp_path) as owner:
            assert read_holder(tmp_path) == owner != zombie
        monkeypatch.delenv("SLURM_RESTART_COUNT")
        monkeypatch.setenv("SLURM_JOB_ID", "42")
    with lock(tmp_path):
        monkeypatch.setenv("SLURM_JOB_ID", "43")
        with pytest.raises(ArtifactError, match="is being written by Slurm job 42"), lock(tmp_path):
            pass


def test_two_runs_in_one_allocation_do_not_both_own_a_step(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is the same and so is the attempt: on one host the process decides, on another one nobody can tell."""
    (fake / "jobs.json").write_text(json.dumps({"41": {"state": "RUNNING", "reason": ""}}))
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    with lock(tmp_path), pytest.raises(ArtifactError, match="is being written by Slurm job 41"), lock(tmp_path):
        pass
    with lock(tmp_path) as owner:
        there = replace(owner, host="elsewhere")
    assert is_alive(there)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not is_alive(there)  # an attempt before this one
    assert not is_alive(replace(owner, pid=2**22 + 1, restart=1))  # of this host, and gone


def test_a_job_of_another_cluster_is_another_job(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clusters of a site number their jobs alike and may call their nodes alike."""
    (fake / "jobs.json").write_text(json.dumps({"41": {"state": "RUNNING", "reason": "", "clusters": "west"}}))
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "east")
    (fake / "up-west").touch()
    west = LockHolder("token", socket.gethostname(), os.getpid(), 1.0, time.time(), "41", "west", 0)
    assert is_alive(west)
    change(fake, "41", state="FAILED")
    assert not is_alive(west)


# ---------------------------------------------------------------- a job that prepares itself


def test_a_job_is_as_wide_as_slurm_made_it_and_starts_again_with_what_it_resolved(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fake / "jobs.json").write_text(json.dumps({"7": {"state": "RUNNING", "reason": ""}}))
    mine = tmp_path / "mine.yaml"
    mine.write_text(Path("configs/tiny.yaml").read_text())
    words = ["prepare", "--stages", "preprocess", "--cluster", "slurm", str(mine), "--runs", str(tmp_path / "runs")]
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "16"}
    folder = Path(run_cli(*words, env=env).stdout.strip())
    cluster = json.loads((folder / "step.json").read_text())["cluster"]
    assert (cluster["nodes"], cluster["gpus"], cluster["slurm"]["cpus"]) == (2, 1, 16)
    record = slurm.read_job(folder)
    assert record is not None
    assert record.id == "7"
    mine.write_text(mine.read_text().replace("seed: 1", "seed: 5"))
    assert run_cli(*words, env={**env, "SLURM_RESTART_COUNT": "1"}).stdout.strip() == str(folder)
    other = run_cli(*words, env={**env, "SLURM_JOB_ID": "8"}).stdout.strip()
    assert other != str(folder)


@pytest.mark.parametrize(("minutes", "noted"), [(10, True), (90, False)])
def test_a_limit_shorter_than_the_scripts_warning_is_noted(
    tmp_path: Path, fake: Path, minutes: int, noted: bool
) -> None:
    """sbatch --time=10 slurm/sft.slurm: Slurm would signal at once, and the job save and start again without end."""
    (fake / "jobs.json").write_text(json.dumps({"7": {"state": "RUNNING", "reason": ""}}))
    here = ["--cluster", "slurm", "tiny", "cluster.slurm.signal_before_limit=900", "--runs", str(tmp_path / "runs")]
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(time.time()) + 60 * minutes)}
    done = run_cli("prepare", "--stages", "preprocess,sft", *here, env=env)
    assert done.returncode == 0, done.stderr
    assert "preprocess: " not in done.stderr  # it has nothing to save
    assert ("tiny/sft: " in done.stderr and "signalled to save 15:00 before the limit" in done.stderr) is noted
    assert ("Fix: sbatch --signal=B:USR1@1" in done.stderr) is noted


def test_a_step_that_is_queued_is_not_taken_by_another_job(tmp_path: Path, fake: Path) -> None:
    run_plan(plan_of(tmp_path, stages=("preprocess",)))
    words = ["prepare", "--stages", "preprocess", "--cluster", "slurm", "tiny", "--runs", str(tmp_path / "runs")]
    done = run_cli(*words, env={"SLURM_JOB_ID": "7"})
    assert done.returncode == 2
    assert "is with Slurm, as job 41 (PENDING)" in done.stderr


# ---------------------------------------------------------------- status


def test_status_the_day_after_tells_what_never_started_and_why(tmp_path: Path, fake: Path) -> None:
    """Without accounting, and with every job forgotten by Slurm: the files of the steps are enough."""
    found = {one.step.name: one for one in run_plan(plan_of(tmp_path))}
    sft = found["sft"].step
    ProgressFile(sft.folder, "sft").update(state="failed", problems=("rows are missing",), exit_code=2)
    forget(fake)
    told = states(tmp_path / "runs")
    assert told["sft"] == "failed"
    assert told["preprocess"] == "lost"
    assert {told[name] for name in ("grpo", "evaluate-sft", "evaluate-grpo", "report")} == {"cancelled"}
    text = run_cli("status", "--runs", str(tmp_path / "runs")).stdout
    assert "rows are missing" in text
    assert "never started: tiny/sft failed" in text
    assert f"log: {sft.folder}/log.txt" in text


@pytest.mark.parametrize(
    ("state", "reason", "shown", "words"),
    [
        ("PENDING", "Resources", "queued", "waits for free nodes (Resources)"),
        ("PENDING", "Dependency", "queued", "waits for tiny/preprocess"),
        ("PENDING", "AssocGrpGRES", "queued", "AssocGrpGRES"),
        ("RUNNING", "None", "starting", ""),
        ("COMPLETING", "None", "ending", ""),
        ("TIMEOUT", "TimeLimit", "failed", "before it could save. Fix: raise cluster.slurm.signal_before_limit"),
        ("OUT_OF_MEMORY", "None", "failed", "more memory than cluster.slurm.memory"),
        ("CANCELLED", "None", "cancelled", "was cancelled"),
    ],
)
def test_a_jobs_state_is_told_in_words(
    tmp_path: Path, fake: Path, state: str, reason: str, shown: str, words: str
) -> None:
    found = {one.step.name: one for one in run_plan(plan_of(tmp_path, stages=("preprocess", "sft")))}
    change(fake, found["sft"].job, state=state, reason=reason)
    row = status.find_step(status.table(tmp_path / "runs")[0], "sft")
    assert row.state == shown
    assert words in " ".join(row.reasons)
    assert row.job == found["sft"].job


def test_a_running_job_shows_how_far_it_is(tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {one.step.name: one for one in run_plan(plan_of(tmp_path, stages=("preprocess", "sft")))}
    folder, job = found["sft"].step.folder, found["sft"].job
    change(fake, job, state="RUNNING", reason="None")
    monkeypatch.setenv("SLURM_JOB_ID", job)
    with lock(folder):
        progress = ProgressFile(folder, "sft")
        progress.update(state="running", done=0, first=0, total=100)
        time.sleep(0.02)
        progress.update(done=40, figures={"loss": 0.25}, force=True)
        row = status.find_step(status.table(tmp_path / "runs")[0], job)
    assert (row.state, row.done, row.total, row.node, row.limit) == ("running", 40, 100, "node1", "1:00:00")
    assert row.figures == {"loss": 0.25}
    assert row.eta is not None


def test_only_the_newest_step_of_a_name_is_shown(tmp_path: Path, fake: Path) -> None:
    for word in ("seed=1", "seed=2"):
        plan = plan_of(tmp_path, word, stages=("preprocess",))
        write_spec(plan.steps[0].folder, spec_of(plan.steps[0], plan.cluster))
        time.sleep(0.02)
    rows, _ = status.table(tmp_path / "runs")
    assert [row.folder for row in rows] == [str(plan.steps[0].folder)]
    assert len(status.table(tmp_path / "runs", everything=True)[0]) == 2


def test_status_watches_until_nothing_is_under_way(tmp_path: Path, fake: Path) -> None:
    found = run_plan(plan_of(tmp_path, stages=("preprocess",)))
    texts = []
    for text in status.watch(lambda: status.table(tmp_path / "runs"), seconds=0.01):
        texts.append(text)
        change(fake, found[0].job, state="CANCELLED")
    assert "queued" in texts[0]
    assert "1 step under way; Ctrl-C leaves what runs running" in texts[0]
    assert "cancelled" in texts[-1]
    assert "nothing is under way" in texts[-1]
    assert "\x1b" not in texts[0]  # no terminal


def test_a_log_is_followed_to_its_end(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    answers = iter([True, True, False])

    def going() -> bool:
        with log.open("a") as file:
            file.write("line\n")
        return next(answers)

    assert "".join(status.follow(log, going, poll=0.01)) == "line\n" * 3
    with pytest.raises(PlanError, match="nothing has been written yet"):
        list(status.follow(tmp_path / "none"))


def test_cancel_ends_what_is_queued_and_leaves_the_rest(tmp_path: Path, fake: Path) -> None:
    found = run_plan(plan_of(tmp_path))
    change(fake, found[0].job, state="FAILED")
    words = ["cancel", "tiny", "--yes", "--runs", str(tmp_path / "runs")]
    done = run_cli(*words)
    assert done.returncode == 0, done.stderr
    assert "cancelled 6 jobs" in done.stdout
    assert {job["state"] for job in jobs(fake).values()} == {"FAILED", "CANCELLED"}
    assert "nothing is under way" in run_cli(*words).stdout


@pytest.mark.parametrize(("answer", "code", "left"), [("n", 130, 7), ("", 130, 7), ("y", 0, 0)])
def test_cancel_asks_at_a_terminal(tmp_path: Path, fake: Path, answer: str, code: int, left: int) -> None:
    run_plan(plan_of(tmp_path))
    terminal, keyboard = os.openpty()
    os.write(terminal, f"{answer}\n".encode())
    words = [sys.executable, "-m", "pipeline", "cancel", "--runs", str(tmp_path / "runs")]
    done = subprocess.run(words, cwd=ROOT, stdin=keyboard, capture_output=True, text=True, timeout=60)
    os.close(terminal)
    os.close(keyboard)
    assert "end these 7 steps? what is done stays [y/N]" in done.stdout
    assert done.returncode == code
    assert sum(job["state"] == "PENDING" for job in jobs(fake).values()) == left


def test_a_step_that_does_not_exist_is_told(tmp_path: Path, fake: Path) -> None:
    run_plan(plan_of(tmp_path))
    done = run_cli("logs", "gpro", "--runs", str(tmp_path / "runs"))
    assert done.returncode == 2
    assert "'gpro': no such step; did you mean 'grpo'?" in done.stderr
