"""The pipeline on a real Slurm: chains, requeues, lost nodes. Every stage really trains, on models of a few weights.

Where results are compared byte for byte the processes are two, as in the local run `nano`; where their number does not
matter, one.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import NANO, ROOT, only, pid_of_rank, run_cli
from slurm_lab import Lab, copy_steps, has_ended, is_running, jobs_of, rows, slurm, submit, wait_for_end, wait_until

from pipeline.core.files import read_json
from pipeline.core.slurm_client import read_job
from pipeline.training.checkpoints import validation_error
from pipeline.workflow.artifact import open_artifact
from pipeline.workflow.attempts import HANG, KILLED, read_attempts
from pipeline.workflow.progress import read_progress

ALL = ["preprocess", "sft", "grpo", "evaluate-base", "evaluate-sft", "evaluate-grpo", "report"]
LONG = ["sft.max_steps=300", "task.params.phases=[{n: [3, 4], rows: 2400}]"]
ONE = "cluster.processes=1"
FORTY = "sft.max_steps=40"  # long enough for a signal to come before the end
LATER = "cluster.slurm.extra_sbatch_args=[--begin=now+1hour]"  # jobs that are queued and do not start


@pytest.fixture(scope="module")
def chain(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recipes side by side through sbatch, with one report, run to the end."""
    folder = tmp_path_factory.mktemp("chain")
    other = folder / "other.yaml"
    other.write_text(Path("configs/tiny.yaml").read_text().replace("seed: 1", "seed: 2"))
    runs = folder / "runs"
    text = other.read_text()
    told = submit(lab, runs, "cluster.gpus=1", recipes=("tiny", str(other)))  # two jobs fit on a node
    assert "13 jobs submitted" in told
    other.write_text("no: [recipe")  # the jobs start from step.json, whatever becomes of the YAML
    wait_for_end(runs)
    other.write_text(text)
    wait_until(lambda: not slurm("squeue", "--noheader"), runs, "empty queue", 60)  # the last job's epilogue
    return runs


@pytest.fixture
def runs(tmp_path: Path, lab: Lab) -> Iterator[Path]:
    """A runs folder whose jobs are ended with the test."""
    folder = tmp_path / "runs"
    yield folder
    jobs = jobs_of(folder).values()
    if jobs:
        subprocess.run(["scancel", *jobs], check=True)


# ---------------------------------------------------------------- the chain


def test_a_chain_ends_with_every_step_done_and_one_report(chain: Path) -> None:
    found = rows(chain)
    assert {row["state"] for row in found.values()} == {"done"}
    assert set(found) == {f"{recipe}/{name}" for recipe in ("tiny", "other") for name in ALL[:-1]} | {
        "tiny+other/report"
    }
    report = read_json(only(chain, "tiny+other/report-*") / "report.json")
    assert [model["role"] for model in report["models"]] == ["base", "sft", "grpo"] * 2
    for name, job in jobs_of(chain).items():
        told = slurm("scontrol", "show", "job", "--oneliner", job)
        assert "JobState=COMPLETED" in told, name


def test_the_chain_has_the_results_of_the_local_launcher(chain: Path, nano: Path) -> None:
    for pattern in ("evaluate-*/metrics.json", "evaluate-*/predictions.jsonl", "*/model/model.safetensors"):
        ours, local = ({p.relative_to(r): p.read_bytes() for p in r.glob(f"tiny/{pattern}")} for r in (chain, nano))
        assert ours
        assert ours == local


def test_steps_that_do_not_wait_for_each_other_run_side_by_side(chain: Path) -> None:
    """A step begins when what it needs is done, not when the step before it in the list is; also on one node."""
    jobs = jobs_of(chain)
    lines = slurm(
        "sacct", "-X", "-n", "-P", "-j", ",".join(jobs.values()), "-o", "jobid,start,end,nodelist"
    ).splitlines()
    name = {job: name for name, job in jobs.items()}
    ran = {name[job]: (start, end, node) for job, start, end, node in (line.split("|") for line in lines)}
    assert len(ran) == 13
    for recipe in ("tiny", "other"):
        assert ran[f"{recipe}/preprocess"][1] <= ran[f"{recipe}/sft"][0]
        assert ran[f"{recipe}/sft"][1] <= ran[f"{recipe}/grpo"][0]
        assert ran[f"{recipe}/evaluate-base"][0] < ran[f"{recipe}/sft"][1]  # neither needs the other
    assert max(end for _, end, _ in ran.values()) == ran["tiny+other/report"][1]
    wide = [span for step, span in ran.items() if "preprocess" not in step and "report" not in step]
    together = [
        (one, other)
        for one in wide
        for other in wide
        if one is not other and one[2] == other[2] and one[0] < other[1] and other[0] < one[1]
    ]
    assert together  # torchrun twice on one node, at different ports


def test_an_unchanged_second_submission_submits_nothing(chain: Path, lab: Lab) -> None:
    before = slurm("squeue", "--states=all", "--noheader", "--format=%i")
    files = {path: path.stat().st_mtime_ns for path in chain.rglob("*")}
    told = submit(lab, chain, recipes=("tiny", str(chain.parent / "other.yaml")))
    assert "everything is done already; nothing to submit" in told
    assert slurm("squeue", "--states=all", "--noheader", "--format=%i") == before
    assert {path: path.stat().st_mtime_ns for path in chain.rglob("*")} == files


def test_only_what_a_setting_changes_is_submitted(chain: Path, lab: Lab, runs: Path) -> None:
    shutil.copytree(chain, runs, ignore=shutil.ignore_patterns("job.json"))
    told = submit(lab, runs, "grpo.beta=0.1", LATER)
    assert [line.split()[0] for line in told.splitlines()[:3]] == ["tiny/grpo", "tiny/evaluate-grpo", "tiny/report"]
    assert "3 jobs submitted" in told


def test_submitit_runs_a_chain_and_requeues_in_its_own_way(lab: Lab, runs: Path, nano: Path) -> None:
    """Its signal comes while SFT starts: the step saves at its first step, starts again and goes on from there."""
    copy_steps(nano, runs, "preprocess")
    submit(lab, runs, FORTY, ONE, "--stages", "sft,grpo", launcher="submitit")
    sft = jobs_of(runs)["tiny/sft"]
    wait_until(lambda: is_running(runs, "sft"), runs, "running SFT")
    slurm("scancel", "--signal=USR2", sft)
    found = wait_for_end(runs)
    assert {row["state"] for row in found.values()} == {"done"}
    assert {found[f"tiny/{name}"]["launcher"] for name in ("sft", "grpo")} == {"submitit"}
    assert found["tiny/sft"]["restarts"] == 1
    metrics = open_artifact(only(runs, "tiny/sft-*")).metrics
    assert metrics["steps"] == 40
    assert metrics["resumed_from"]
    assert jobs_of(runs)["tiny/sft"] == sft
    log = Path(found["tiny/sft"]["log"])
    assert "resumes from checkpoint-" in log.read_text()
    pickled = pickle.loads(next(only(runs, "tiny/sft-*").glob("submitit/*_submitted.pkl")).read_bytes())
    assert vars(pickled.function) == {"folder": str(only(runs, "tiny/sft-*"))}  # a name, and no closure


@pytest.mark.parametrize("launcher", ["slurm", "submitit"])
def test_a_job_needs_nothing_of_the_shell_that_submits(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    """From within another allocation, exporting nothing, in a folder of odd letters; with a site's own set-up.

    The first attempt is signalled while its node is set up (by sbatch): it is queued again and goes on.
    """
    runs = tmp_path / 'it\'s 100% "mine" #1'
    leaked = {"SLURM_MEM_PER_CPU": "100", "SLURM_NTASKS": "7", "SLURM_JOB_ID": "1", "SLURM_EXPORT_ENV": "NONE"}
    asked = {"SQUEUE_PARTITION": "urgent", "SLURM_TIME_FORMAT": "relative", "SACCT_FORMAT": "jobid"}
    for name, value in {**leaked, **asked, "SBATCH_EXPORT": "NONE", "HF_TOKEN": "hf_" + "x" * 20, "LOST": "1"}.items():
        monkeypatch.setenv(name, value)
    early = '[ -n "$SLURM_RESTART_COUNT" ] || { scancel --batch --signal=USR1 $SLURM_JOB_ID; sleep 1; }'
    words = [
        "cluster.slurm.setup=['export BASE=/tmp', 'module() { export LOADEDMODULES=$2/1; }'"
        + (f", '{early}']" if launcher == "slurm" else "]"),
        "cluster.slurm.modules=[cuda]",
        "cluster.slurm.environment={THEREFORE_ALLOW_CPU: '1', SEEN: $BASE/hf}",
        "cluster.slurm.pass_environment=[HF_TOKEN]",
        "cluster.slurm.srun=[--kill-on-bad-exit=1]",
        'cluster.slurm.wrapper=[bash, -c, \'env | grep -E "^(SEEN|HF_TOKEN|LOST|LOADED)"; exec "$@"\', bash]',
        "cluster.slurm.gpu_request=gpus-per-node",
        "cluster.slurm.cpus=null",
        "cluster.slurm.extra_sbatch_args=['--comment=never mind', '--mail-type NONE']",
    ]
    submit(lab, runs, *words, "--stages", "preprocess", launcher=launcher)
    (job,) = jobs_of(runs).values()
    for name in (*leaked, *asked):
        monkeypatch.delenv(name)
    found = wait_for_end(runs)["tiny/preprocess"]
    log = Path(found["log"]).read_text()
    assert found["state"] == "done", log
    seen = [line for line in log.splitlines() if line.startswith(("SEEN", "HF_TOKEN", "LOST", "LOADED"))]
    assert sorted(seen) == ["HF_TOKEN=hf_" + "x" * 20, "LOADEDMODULES=cuda/1", "SEEN=/tmp/hf"]
    if launcher == "slurm":
        assert "Restarts=1 " in slurm("scontrol", "show", "job", "--oneliner", job)


# ---------------------------------------------------------------- what fails


def test_a_failing_step_cancels_what_waits_for_it_and_status_says_why(lab: Lab, runs: Path, nano: Path) -> None:
    copy_steps(nano, runs, "preprocess", "evaluate-base")
    submit(lab, runs, "sft.max_length=1", ONE)
    found = wait_for_end(runs)
    assert {name.partition("/")[2]: row["state"] for name, row in found.items()} == {
        "preprocess": "done",
        "sft": "failed",
        "grpo": "cancelled",
        "evaluate-base": "done",
        "evaluate-sft": "cancelled",
        "evaluate-grpo": "cancelled",
        "report": "cancelled",
    }
    assert "sft.max_length 1 tokens" in found["tiny/sft"]["reasons"][0]
    assert "tiny/sft failed" in found["tiny/grpo"]["reasons"][0]
    told = run_cli("status", "--runs", str(runs)).stdout
    assert "never started: tiny/sft failed" in told
    assert f"log: {found['tiny/sft']['log']}" in told
    log = run_cli("logs", "sft", "--runs", str(runs)).stdout
    assert "error: all SFT rows are longer than sft.max_length 1 tokens" in log
    assert "Traceback" not in log
    assert slurm("sacct", "-X", "-n", "-P", "-j", str(found["tiny/sft"]["job"]), "-o", "exitcode") == "2:0"
    without = runs.parent / "without" / "sacct"  # as on a cluster that has no accounting
    without.parent.mkdir()
    without.write_text("#!/bin/sh\necho Slurm accounting storage is disabled >&2\nexit 1\n")
    without.chmod(0o755)
    same = run_cli("status", "--runs", str(runs), env={"PATH": f"{without.parent}:{os.environ['PATH']}"}).stdout
    assert [line.split()[0] for line in same.splitlines()] == [line.split()[0] for line in told.splitlines()]
    forgetful = runs.parent / "bin" / "squeue"  # the day after: squeue knows none of the jobs, accounting does
    forgetful.parent.mkdir()
    forgetful.write_text("#!/bin/sh\n")
    forgetful.chmod(0o755)
    later = run_cli("status", "--runs", str(runs), env={"PATH": f"{forgetful.parent}:{os.environ['PATH']}"}).stdout
    assert [line.split()[0] for line in later.splitlines()] == [line.split()[0] for line in told.splitlines()]


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("cluster.slurm.partition=gpuu", "nvalid partition"),
        ("cluster.gpus=3", "Requested node configuration is not available"),
    ],
)
def test_what_slurm_refuses_is_told_with_its_reason(
    lab: Lab, runs: Path, nano: Path, setting: str, reason: str
) -> None:
    copy_steps(nano, runs, "preprocess")
    words = ["sft.global_batch_size=12", "grpo.global_batch_size=12", setting]  # three processes could share it
    done = run_cli("run", "tiny", *NANO, *words, "--cluster", str(lab.yaml), "--runs", str(runs))
    assert done.returncode == 2
    assert re.search(f"tiny/sft: Slurm refused the job: .*{reason}", done.stderr)
    assert "the job requested " in done.stderr
    assert "Traceback" not in done.stderr
    assert not jobs_of(runs)


def test_a_submission_that_was_cut_off_is_completed_and_not_doubled(lab: Lab, runs: Path, tmp_path: Path) -> None:
    """Killed after Slurm took the third job and before its id was written down."""
    real, count = shutil.which("sbatch"), tmp_path / "count"
    killer = tmp_path / "bin" / "sbatch"
    killer.parent.mkdir()
    killer.write_text(
        f'#!/bin/bash\n[ "$1" = --version ] || echo >> {count}\n{real} "$@"; code=$?\n'
        f"[ -f {count} ] && [ $(wc -l < {count}) = 3 ] && kill -9 $PPID\nexit $code\n"
    )
    killer.chmod(0o755)
    words = ["run", "tiny", *NANO, LATER, "--cluster", str(lab.yaml), "--runs", str(runs)]
    cut = run_cli(*words, env={"PATH": f"{killer.parent}:{os.environ['PATH']}"})
    assert cut.returncode == -9
    assert len(jobs_of(runs)) == 2
    comments = [json.loads(path.read_text())["token"] for path in runs.glob("*/*/job.json")]
    assert len(comments) == 3

    done = run_cli(*words)
    assert done.returncode == 0, done.stderr
    assert "4 jobs submitted, 3 were there before" in done.stdout
    jobs = jobs_of(runs)
    assert sorted(name.partition("/")[2] for name in jobs) == sorted(ALL)
    tokens = {json.loads(path.read_text())["token"] for path in runs.glob("*/*/job.json")}
    ours = [line for line in slurm("squeue", "-h", "--Format=Comment:|").splitlines() if line.strip("|") in tokens]
    assert len(ours) == 7
    told = slurm("scontrol", "show", "job", "--oneliner", jobs["tiny/sft"])
    assert f"afterok:{jobs['tiny/preprocess']}" in told

    status = rows(runs)
    assert {row["state"] for row in status.values()} == {"queued"}
    assert status["tiny/grpo"]["reasons"] == ["waits for tiny/preprocess, tiny/sft"]
    refused = run_cli("cancel", "tiny", "--runs", str(runs))
    assert refused.returncode == 2
    assert "say --yes" in refused.stderr
    assert "cancelled 7 jobs" in run_cli("cancel", "tiny", "--yes", "--runs", str(runs)).stdout
    assert {row["state"] for row in wait_for_end(runs).values()} == {"cancelled"}
    assert "4 jobs" not in run_cli(*words).stdout  # the next command submits all seven again
    assert len(set(jobs_of(runs).values()) - set(jobs.values())) == 7


def test_a_running_predecessor_of_an_earlier_submission_is_waited_for(lab: Lab, runs: Path) -> None:
    submit(lab, runs, LATER, "--stages", "preprocess,sft")
    before = jobs_of(runs)
    told = submit(lab, runs, LATER, "--stages", "grpo")
    assert f"after {before['tiny/preprocess']}, {before['tiny/sft']}" in told
    slurm("scancel", before["tiny/sft"])
    wait_until(lambda: rows(runs)["tiny/grpo"]["state"] == "cancelled", runs, "cancelled GRPO")
    late = run_cli("run", "tiny", *NANO, "--stages", "grpo", "--cluster", str(lab.yaml), "--runs", str(runs))
    assert late.returncode == 2  # a cancelled job is no predecessor: afterok would start at once
    assert "tiny/sft is not done, and grpo needs it" in late.stderr


# ---------------------------------------------------------------- wide, and alone


def test_two_nodes_train_together(lab: Lab, runs: Path, nano: Path) -> None:
    """One process on each of two nodes, in both stages."""
    copy_steps(nano, runs, "preprocess")
    submit(lab, runs, "cluster.processes=1", "--nodes", "2", "--stages", "sft,grpo")
    found = wait_for_end(runs)
    for name in ("sft", "grpo"):
        assert found[f"tiny/{name}"]["state"] == "done", found
        artifact = open_artifact(only(runs, f"tiny/{name}-*"))
        assert artifact.provenance["processes"] == 2
        nodes = slurm("sacct", "-X", "-n", "-P", "-j", str(found[f"tiny/{name}"]["job"]), "-o", "nnodes")
        assert nodes == "2"
    ours, local = (only(r, "tiny/sft-*") / "model" / "model.safetensors" for r in (runs, nano))
    assert ours.stat().st_size == local.stat().st_size


def test_a_stage_alone_by_its_committed_script(lab: Lab, runs: Path, nano: Path) -> None:
    """sbatch slurm/grpo.slurm from the project's root, as a user types it; then the same once more."""
    copy_steps(nano, runs, "preprocess", "sft")
    # the scripts' signal comes up to 20 minutes before the limit: with a shorter one, half a minute after the start
    env = {**os.environ, "THEREFORE_VENV": sys.prefix, "SBATCH_TIMELIMIT": "25", "THEREFORE_ALLOW_CPU": "1"}

    def sbatch(stage: str, *words: str) -> tuple[str, str]:
        command = ["sbatch", "--parsable", f"slurm/{stage}.slurm", *words]
        job = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, check=True).stdout.strip()
        wait_until(lambda: has_ended(job), runs, f"end of {stage}")  # sbatch --wait looks every ten seconds
        return job, Path(f"logs/{stage}-{job}.log").read_text()

    job, log = sbatch("grpo", "tiny", *NANO, ONE, "grpo.beta=0.01", "--runs", str(runs))
    folder = only(runs, "tiny/grpo-*")
    assert open_artifact(folder).metrics["steps"] == 2, log
    assert read_json(folder / "step.json")["recipe"]["grpo"]["beta"] == 0.01
    assert slurm("sacct", "-X", "-n", "-P", "-j", job, "-o", "timelimit") == "00:25:00"  # SBATCH_* variables win
    assert rows(runs)["tiny/grpo"]["log"].endswith(f"logs/grpo-{job}.log")
    _, again = sbatch("grpo", "tiny", *NANO, ONE, "grpo.beta=0.01", "--runs", str(runs))
    assert "tiny/grpo: done already" in again
    nothing, told = sbatch("grpo")
    assert "expected a recipe. Fix: sbatch slurm/grpo.slurm RECIPE" in told
    _, told = sbatch(
        "evaluate", "--ckpt", str(folder / "model"), "--limit", "2", "tiny", *NANO, ONE, "--runs", str(runs)
    )
    assert read_json(only(runs, "evaluations/*") / "metrics.json")["test"]["all"]["rows"]["value"] == 2, told
    assert slurm("sacct", "-X", "-n", "-P", "-j", nothing, "-o", "exitcode") == "2:0"


def test_a_job_that_is_submitted_from_elsewhere_works_in_the_root(lab: Lab, runs: Path, tmp_path: Path) -> None:
    """With a recipe and a runs folder that are named from where the command is typed."""
    shutil.copy(ROOT / "configs" / "tiny.yaml", tmp_path / "mine.yaml")
    words = ["mine.yaml", *NANO, "--stages", "preprocess", "--launcher", "slurm", "--cluster", str(lab.yaml)]
    where = ["--runs", "runs", "--project", str(ROOT)]
    done = run_cli("run", *words, *where, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    wait_for_end(runs)
    step = only(runs, "mine/preprocess-*")
    assert open_artifact(step).metrics["rows"]["sft"] == 96, (step / "log.txt").read_text()


# ---------------------------------------------------------------- never lose work


def saved(folder: Path) -> list[int]:
    """The steps of the checkpoints that verify."""
    good = [path for path in folder.glob("checkpoints/checkpoint-*") if validation_error(path) is None]
    return sorted(int(path.name.rpartition("-")[2]) for path in good)


def test_the_time_limit_is_not_the_end_of_a_run(lab: Lab, runs: Path) -> None:
    """A minute is too short for SFT: it saves, starts again by itself, and goes on with no step lost."""
    limit = ["cluster.slurm.time.sft=1m", "cluster.slurm.signal_before_limit=40"]
    submit(lab, runs, *LONG, "cluster.save_steps=1000", *limit, ONE, "--stages", "preprocess,sft")
    wait_until(lambda: rows(runs).get("tiny/sft", {}).get("restarts") == 1, runs, "second attempt")
    folder = only(runs, "tiny/sft-*")
    stopped = saved(folder)
    assert len(stopped) == 1  # saved because it was asked to: save_steps is beyond the end
    assert stopped[0] < 300
    job = jobs_of(runs)["tiny/sft"]
    slurm("scontrol", "update", f"jobid={job}", "timelimit=10")  # one restart is what is tested; it need not be four
    found = wait_for_end(runs)
    assert found["tiny/sft"]["state"] == "done"
    metrics = open_artifact(folder).metrics
    assert metrics["resumed_from"] == f"checkpoint-{stopped[0]}"
    assert metrics["steps"] == 300
    steps = [entry["step"] for entry in read_json(folder / "history.json") if "loss" in entry]
    assert steps == list(range(1, 301))  # each once: none lost, none twice
    assert jobs_of(runs)["tiny/sft"] == job


def test_a_preempted_job_saves_and_goes_on(lab: Lab, runs: Path, nano: Path) -> None:
    copy_steps(nano, runs, "preprocess")
    submit(lab, runs, FORTY, "cluster.save_steps=1000", ONE, "--stages", "sft,grpo")
    wait_until(lambda: is_running(runs, "sft"), runs, "running SFT")
    urgent = slurm("sbatch", "--parsable", "-p", "urgent", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    found = wait_for_end(runs)
    assert "COMPLETED" in slurm("sacct", "-X", "-n", "-P", "-j", urgent, "-o", "state")
    assert found["tiny/sft"]["restarts"] == 1
    assert [found[f"tiny/{name}"]["state"] for name in ("sft", "grpo")] == ["done", "done"]  # what waited still ran
    sft = open_artifact(only(runs, "tiny/sft-*"))
    assert sft.metrics["resumed_from"]
    assert sft.metrics["steps"] == 40
    job = read_job(sft.folder)
    assert job is not None
    whole = (sft.folder / "artifact.json").stat().st_mtime - job.submitted
    assert sum(sft.seconds_by_part.values()) == pytest.approx(whole, abs=1)  # both attempts and the queue before each
    assert sft.seconds_by_part["wait"] > 0.5


def test_a_signal_to_every_process_of_a_step_is_a_wish_to_stop(lab: Lab, runs: Path, nano: Path) -> None:
    """Sites without preempt_send_user_signal send TERM to the processes themselves, not to the batch script."""
    copy_steps(nano, runs, "preprocess")
    submit(lab, runs, FORTY, "cluster.save_steps=1000", "--stages", "sft")
    wait_until(lambda: is_running(runs, "sft"), runs, "running SFT")
    slurm("scancel", "--signal=TERM", jobs_of(runs)["tiny/sft"])
    found = wait_for_end(runs)
    assert found["tiny/sft"]["state"] == "done"
    assert found["tiny/sft"]["restarts"] == 1


def test_a_rank_that_dies_and_one_that_hangs_start_again_within_their_job(lab: Lab, runs: Path, nano: Path) -> None:
    """Of two nodes: the other node's rank finds its way to the new start too, at another port."""
    copy_steps(nano, runs, "preprocess")
    words = ["sft.max_steps=120", "cluster.save_steps=5", "cluster.nodes=2", ONE, "cluster.hang_timeout=10"]
    submit(lab, runs, *words, "--stages", "sft")
    wait_until(lambda: list(runs.glob("tiny/sft-*/checkpoints/*/manifest.json")), runs, "first checkpoint")
    folder, job = only(runs, "tiny/sft-*"), jobs_of(runs)["tiny/sft"]
    os.kill(pid_of_rank(1, folder), signal.SIGKILL)
    wait_until(lambda: (rows(runs)["tiny/sft"]["restarts"], is_at_work(folder)) == (1, True), runs, "second attempt")
    os.kill(pid_of_rank(1, folder), signal.SIGSTOP)
    found = wait_for_end(runs)
    assert found["tiny/sft"]["state"] == "done", found
    assert jobs_of(runs)["tiny/sft"] == job
    assert "Restarts=0 " in slurm("scontrol", "show", "job", job)
    killed, hung = read_attempts(folder).attempts
    assert (killed.kind, hung.kind) == (KILLED, HANG)
    assert "rank 1 (process " in killed.problem
    assert "is stopped (SIGSTOP)" in (folder / "log.txt").read_text()
    metrics = open_artifact(folder).metrics
    assert (metrics["steps"], bool(metrics["resumed_from"])) == (120, True)


def is_at_work(folder: Path) -> bool:
    progress = read_progress(folder)
    return progress is not None and progress.state == "running" and progress.done > progress.first


def test_a_node_that_loses_its_power_costs_no_more_than_save_steps(lab: Lab, runs: Path, nano: Path) -> None:
    """In the middle of GRPO every process of the node is gone at once; Slurm starts the job again on another."""
    copy_steps(nano, runs, "preprocess", "sft")
    submit(lab, runs, "grpo.max_steps=20", "cluster.save_steps=5", ONE, "--stages", "grpo")
    wait_until(lambda: (runs / "tiny").is_dir() and list(runs.glob("tiny/grpo-*")), runs, "GRPO")
    folder = only(runs, "tiny/grpo-*")
    wait_until(lambda: saved(folder), runs, "first checkpoint")
    row = rows(runs)["tiny/grpo"]
    lab.node("crash", row["node"])
    reached = read_json(folder / "progress.json")["done"]
    try:
        wait_until(lambda: rows(runs)["tiny/grpo"]["restarts"] >= 1, runs, "second attempt", 120)
        found = wait_for_end(runs)
    finally:
        lab.node("up", row["node"])
    assert found["tiny/grpo"]["state"] == "done", found
    artifact = open_artifact(folder)
    resumed = int(artifact.metrics["resumed_from"].rpartition("-")[2])
    assert reached - resumed <= 5
    assert artifact.metrics["steps"] == 20
    until = time.time() + 30
    while "idle" not in slurm("sinfo", "-h", "-n", row["node"], "-o", "%T") and time.time() < until:
        time.sleep(0.5)
