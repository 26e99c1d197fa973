"""What sites want of a job: the batch script in a real bash, with stand-ins for srun and the site's own tools."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import change, cluster_of, jobs, plan_of
from running import ROOT, run_cli

from pipeline.config.cluster import Cluster, read_cluster
from pipeline.config.site import is_secret
from pipeline.core import slurm_client as slurm
from pipeline.core.errors import PlanError
from pipeline.core.schema import parse
from pipeline.core.slurm_words import explain_exit_code
from pipeline.launchers import submitit
from pipeline.launchers.batch_script import script, shell_value
from pipeline.launchers.slurm import run_plan
from pipeline.launchers.torchrun import Rendezvous, command, rendezvous
from pipeline.preflight import checks as preflight
from pipeline.workflow import status
from pipeline.workflow.plan import Plan, make_plan
from pipeline.workflow.progress import ProgressFile
from pipeline.workflow.runtime import Deadline, Runtime, read_times
from pipeline.workflow.stage import STAGES

SECRET = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz"


def site_plan(tmp_path: Path, *words: str, runs: str = "runs", launcher: str = "slurm") -> Plan:
    """The first step of tiny on a cluster with these settings of `slurm`."""
    changes = [f"cluster.launcher={launcher}", *(f"cluster.slurm.{word}" for word in words)]
    return make_plan(["tiny"], changes, cluster="slurm", stages=("preprocess",), runs=tmp_path / runs)


def run_script(tmp_path: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Submit the step and run its batch script as Slurm would; `env` comes to what the job has from Slurm."""
    (one,) = run_plan(site_plan(tmp_path, *words))
    change(Path(os.environ["FAKE_SLURM"]), one.job, state="RUNNING")
    job = {"SLURM_JOB_ID": one.job, "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_CPUS_PER_TASK": "2", **env}
    path = one.step.folder / "job.slurm"
    return subprocess.run(["bash", str(path)], env={**os.environ, **job}, capture_output=True, text=True, timeout=60)


def seen_by(fake: Path, name: str) -> dict[str, str]:
    return dict(json.loads((fake / f"{name}.env").read_text()))


def problems_of(*words: str) -> list[str]:
    return read_cluster("slurm", [f"slurm.{word}" for word in words])[1]


# ---------------------------------------------------------------- nothing of the shell that submits


def test_srun_passes_everything_on_whatever_sbatch_has_exported(tmp_path: Path, fake: Path) -> None:
    """With --export=NONE srun's processes had no PATH: execve(): python: No such file."""
    done = run_script(tmp_path, SLURM_EXPORT_ENV="NONE", SLURM_MEM_PER_CPU="100", SLURM_MEM_PER_NODE="65536")
    assert done.returncode == 0, done.stderr
    seen = seen_by(fake, "srun")
    assert "SLURM_EXPORT_ENV" not in seen
    assert "SLURM_MEM_PER_CPU" not in seen  # of salloc --mem-per-cpu; srun refuses two kinds of memory
    assert seen["SLURM_MEM_PER_NODE"] == "65536"
    assert seen["PATH"].split(":")[0] == f"{sys.prefix}/bin"


def test_a_job_is_submitted_without_the_variables_of_another_one(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From salloc or a job, whose SLURM_* and PMI* would ask for something; SBATCH_* are the user's own wishes."""
    for name in ("SLURM_MEM_PER_CPU", "SLURM_NTASKS", "SLURMD_NODENAME", "PMIX_RANK", "SLURM_TIME_FORMAT"):
        monkeypatch.setenv(name, "9")
    for name in ("SBATCH_TIMELIMIT", "SLURM_CONF", "MINE"):
        monkeypatch.setenv(name, "kept")
    run_plan(site_plan(tmp_path))
    seen = seen_by(fake, "sbatch")
    assert not [name for name in seen if name.startswith(("SLURM", "PMI")) and name != "SLURM_CONF"]
    assert {name: seen[name] for name in ("SBATCH_TIMELIMIT", "SLURM_CONF", "MINE")} == dict.fromkeys(
        ("SBATCH_TIMELIMIT", "SLURM_CONF", "MINE"), "kept"
    )
    (fake / "sbatch.env").unlink()
    assert preflight.refused({"sft": script(STAGES["sft"], cluster_of())}) == []  # sbatch --test-only
    assert "SLURM_MEM_PER_CPU" not in seen_by(fake, "sbatch")


def test_slurms_answers_do_not_depend_on_the_shell(tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQUEUE_PARTITION made a queued job `lost`, and the same command submitted it again."""
    (fake / "real").mkdir()
    real = (fake / "squeue").rename(fake / "real" / "squeue")
    odd = (
        "env | grep -E '^(SQUEUE|SACCT|SLURM)_' | grep -v '^SLURM_CONF=' >&2 && exit 1"  # which says whose Slurm it is
    )
    (fake / "squeue").write_text(f'#!/bin/bash\n{odd}\nexec {real} "$@"\n')
    (fake / "squeue").chmod(0o755)
    for name in ("SQUEUE_PARTITION", "SQUEUE_FORMAT", "SACCT_FORMAT", "SLURM_TIME_FORMAT"):
        monkeypatch.setenv(name, "relative")
    (first,) = run_plan(site_plan(tmp_path))
    (again,) = run_plan(site_plan(tmp_path))
    assert (first.new, again.new, again.job) == (True, False, first.job)


# ---------------------------------------------------------------- setting up the node

LOADS = '() { case "$1 $2" in "load gone"*) echo no such module >&2; return 1;; esac; echo "module $*" >> "$TOLD"; }'
# environment-modules 3 reports no failure; Lmod reads variables that are not set
OLD = '() { [ "$2" = gone ] || export LOADEDMODULES="$LOADEDMODULES:$2/1.0"; : $LMOD_UNSET; }'


@pytest.mark.parametrize(
    ("words", "module", "told"),
    [
        (["modules=[cuda]"], None, "slurm.modules: the command module is not defined. Fix: "),
        (["modules=[cuda, gone]"], LOADS, "slurm.modules: gone does not load. Fix: module avail gone"),
        (["modules=[cuda, gone]"], OLD, "slurm.modules: gone does not load. Fix: module avail gone"),
        (["setup=[module use /none, false && true]"], LOADS, "slurm.setup: 'false && true' failed"),
        (["setup=['echo \"unbalanced']"], None, "slurm.setup: 'echo \"unbalanced' failed"),
        (["environment={HF_HOME: $NOWHERE/hf}"], None, "slurm.environment.HF_HOME: $NOWHERE is not set in the job"),
        (["wrapper=[apptainer, exec, $IMAGE]"], None, "slurm.wrapper: $IMAGE is not set in the job"),
        (["venv=/nowhere/venv"], None, "slurm.venv: got /nowhere/venv without bin/python. Fix: "),
    ],
)
def test_what_is_not_there_on_the_node_ends_the_job_with_a_sentence(
    tmp_path: Path, fake: Path, words: list[str], module: str | None, told: str
) -> None:
    """Before: the step ran without its modules and was `done`. And `status` shows the sentence."""
    env = {"BASH_FUNC_module%%": module} if module else {}
    done = run_script(tmp_path, *words, TOLD=str(tmp_path / "told"), **env)
    assert done.returncode == 2
    assert f"error: {told}" in done.stderr
    assert not (fake / "srun.txt").exists()
    (number,) = jobs(fake)
    change(fake, number, state="FAILED", exit_code="512")
    (tmp_path / "runs").joinpath(slurm.read_job(site_plan(tmp_path).steps[0].folder).log).write_text(done.stderr)  # type: ignore[union-attr, arg-type]
    (row,) = status.table(tmp_path / "runs")[0]
    assert row.state == "failed"
    assert told in row.reasons[0]
    assert row.reasons[0].endswith("(FAILED; exit code 2)")


def test_a_node_is_set_up_by_lines_then_modules_then_variables(tmp_path: Path, fake: Path) -> None:
    words = (
        "setup=[module purge, export BASE=/from/setup, 'x=1; [ $x = 1 ]  # a comment']",
        "modules=[cuda/12.4, '2023.10', gcc]",
        "environment={ONE: '$BASE/my cache', TWO: ~/x, THREE: '${ONE}-$BASE', SIGN: '5$ ~ \"q\" * \\'}",
        "interface=ib0",
        "srun=[--mpi=pmix, --container-image=$BASE/i.sqsh]",
        "wrapper=[env, 'A B=1']",
    )
    env = {"BASH_FUNC_module%%": LOADS, "TOLD": str(tmp_path / "told"), "HOME": "/home/me"}
    done = run_script(tmp_path, *(word.replace("${", "\\${") for word in words), **env)  # as YAML wants it
    assert done.returncode == 0, done.stderr
    loaded = ["module purge", "module load cuda/12.4", "module load 2023.10", "module load gcc"]
    assert (tmp_path / "told").read_text().splitlines() == loaded
    seen = seen_by(fake, "srun")
    assert seen["ONE"] == "/from/setup/my cache"
    assert seen["TWO"] == "/home/me/x"
    assert seen["THREE"] == "/from/setup/my cache-/from/setup"
    assert seen["SIGN"] == '5$ ~ "q" * \\'
    assert seen["NCCL_SOCKET_IFNAME"] == seen["GLOO_SOCKET_IFNAME"] == "ib0"
    words_of_srun = json.loads((fake / "srun.json").read_text())
    start = ["--wait=60", "--cpus-per-task=2", "--mpi=pmix", "--container-image=/from/setup/i.sqsh", "env", "A B=1"]
    assert words_of_srun[: len(start) + 1] == [*start, "python"]


NASTY = [
    "a b",
    "it's",
    '"',
    "`id`",
    "$",
    "5$ $(id)",
    "*",
    "!x",
    "#c",
    "\\",
    "a\\$ b",
    ";id",
    "&",
    "é",
    "$'x'",
    "~me",
    "",
]


def test_a_value_is_text_but_for_its_names() -> None:
    line = "printf '%s\\0' " + " ".join(map(shell_value, [*NASTY, "~", "~/x", "$V/${V}x$V"]))
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env={"HOME": "/h", "V": "a  *"})
    assert done.stdout.split("\0")[:-1] == [*NASTY, "/h", "/h/x", "a  */a  *xa  *"]


def test_a_cluster_that_leaves_cores_memory_and_gpus_to_the_site() -> None:
    text = script(STAGES["sft"], cluster_of("slurm.cpus=null", "slurm.memory=null", "slurm.gpu_request=none"))
    assert not [line for line in text.splitlines() if "#SBATCH --cpus" in line or "--mem" in line or "--g" in line]
    assert "--gpus-per-node=h100:2" in script(
        STAGES["sft"], cluster_of("slurm.gpu_request=gpus-per-node", "slurm.gpu_type=h100")
    )


# ---------------------------------------------------------------- where nodes meet


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("node[1-3,7],other2", "node1"),
        ("node[007,9]", "node007"),
        ("a1,b[2-3]", "a1"),
        ("r[1-2]n[03-04]", "r1n03"),
        ("login-1.site", "login-1.site"),
    ],
)
def test_the_first_host_is_known_without_scontrol(nodes: str, first: str) -> None:
    assert slurm.first_host(nodes) == first


def test_nodes_meet_where_their_fast_network_is_and_one_node_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `scontrol` on the node: before, a job of one node ended there."""
    monkeypatch.setenv("PATH", "/nowhere")
    found = {
        "SLURM_JOB_ID": "41",
        "SLURM_JOB_NODELIST": "n[3-4].site",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURMD_NODENAME": "n4.site",
    }
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert rendezvous() == Rendezvous(2, "n3.site", 15_041, "41-0", None)
    fast = rendezvous("-ib")
    assert fast == Rendezvous(2, "n3-ib.site", 15_041, "41-0", "n4-ib.site")
    words = command(STAGES["sft"], Path("x"), cluster_of("gpus=4"), fast)
    assert {"--rdzv-endpoint=n3-ib.site:15041", "--local-addr=n4-ib.site"} <= set(words)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    assert rendezvous("-ib") == Rendezvous(1, "127.0.0.1", 15_041, "41-0", "127.0.0.1")


# ---------------------------------------------------------------- an early signal


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_before_the_step_has_begun_queues_the_job_again(tmp_path: Path, fake: Path, name: str) -> None:
    """While the node is set up; before, it ended the job, and the chain with it."""
    done = run_script(tmp_path, f"setup=['kill -{name} $$']")
    assert done.returncode == 75, done.stderr
    assert not (fake / "srun.txt").exists()
    (number,) = jobs(fake)
    assert f"requeue {number}" in (fake / "scontrol.txt").read_text()


# ---------------------------------------------------------------- what has no place in a batch script


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ('partition="gpu\\n#SBATCH --wrap=id"', "cluster.slurm.partition: got a line break or another control"),
        ('extra_sbatch_args=["--nice\\nid"]', "cluster.slurm.extra_sbatch_args[0]: got a line break"),
        ('modules=["a\\nid"]', "cluster.slurm.modules[0]: got a line break"),
        ('environment={A: "x\\ny"}', "cluster.slurm.environment.A: got a line break"),
        ("environment={'A;id': x}", "cluster.slurm.environment: got the name 'A;id'; expected letters"),
        ("environment={'9A': x}", "cluster.slurm.environment: got the name '9A'"),
        ("pass_environment=['A=b']", "got the name 'A=b'; expected letters"),
        ("environment={A: '$(date)'}", "cluster.slurm.environment.A: got '$(date)'; expected text in which only $NAME"),
        ("environment={A: '`date`'}", "only $NAME is filled in. Fix: cluster.slurm.setup: ['export A=…']"),
        ("extra_sbatch_args=[node7]", "cluster.slurm.extra_sbatch_args: got 'node7'; expected an option of sbatch"),
        (
            'extra_sbatch_args=["--comment=\'x"]',
            'cluster.slurm.extra_sbatch_args: got "--comment=\'x" (No closing quotation)',
        ),
        (
            "modules=[2023.10]",
            "cluster.slurm.modules[0]: got 2023.1; expected a text. Fix: write it in quotes, such as '2023.10'",
        ),
        ("modules=[2023]", "cluster.slurm.modules[0]: got 2023; expected a text. Fix: write it in quotes"),
        ("host_suffix='-ib;id'", "cluster.slurm.host_suffix: got '-ib;id'"),
        ("gpu_request=gpus", "cluster.slurm.gpu_request: got 'gpus'; expected one of its values"),
    ],
)
def test_what_has_no_place_in_a_batch_script_is_refused(word: str, told: str) -> None:
    assert any(told in problem for problem in problems_of(word)), problems_of(word)


def test_spaces_quotes_and_signs_in_names_are_quoted(tmp_path: Path, fake: Path) -> None:
    """Before: sbatch refused, and the advice spoke of partitions."""
    runs = tmp_path / 'it\'s 100% "mine" $HOME #1'
    plan = make_plan(
        ["tiny"],
        ["cluster.slurm.partition=my gpus", "cluster.slurm.account=a'b", "cluster.slurm.venv=" + sys.prefix],
        cluster="slurm",
        stages=("preprocess",),
        runs=runs,
    )
    (one,) = run_plan(plan)
    asked = jobs(fake)[one.job]
    assert (asked["partition"], asked["account"]) == ("my gpus", "a'b")
    assert asked["output"] == str(one.step.folder / "log.txt").replace("%", "%%")  # sbatch fills in %j and its like
    change(fake, one.job, state="RUNNING")
    env = {**os.environ, "SLURM_JOB_ID": one.job, "SLURM_SUBMIT_DIR": str(ROOT)}
    done = subprocess.run(["bash", str(one.step.folder / "job.slurm")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((fake / "srun.json").read_text())[-2:] == ["--step", str(one.step.folder)]
    for name in ("a\nb", "a\\b"):
        with pytest.raises(PlanError, match=r"--runs: got .*; expected a folder without control characters"):
            run_plan(site_plan(tmp_path, runs=name))


# ---------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("HF_TOKEN", "abc123456", True),
        ("WANDB_API_KEY", "0123456789", True),
        ("AWS_SECRET_ACCESS_KEY", "abcdef", True),
        ("DB_PASSWORD", "x1", True),
        ("ANYTHING", SECRET, True),
        ("HTTPS_PROXY", "http://me:pw@proxy:3128", True),
        ("HTTPS_PROXY", "http://proxy:3128", False),
        ("HF_TOKEN", "$MY_TOKEN", False),
        ("THEREFORE_KEY_FILE", "/project/key", False),
        ("SSH_KEY", "~/.ssh/id", False),
        ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1", False),
        ("TOKENIZERS_PARALLELISM", "false", False),
        ("HF_HOME", "/scratch/hf", False),
    ],
)
def test_what_is_a_secret(name: str, value: str, secret: bool) -> None:
    assert is_secret(name, value) == secret
    told = problems_of(f"environment={{{name}: '{value}'}}")
    assert bool(told) == secret
    assert not any(value in problem for problem in told)
    if secret:
        assert f"Fix: cluster.slurm.pass_environment=[{name}]" in told[0]
        assert f"the value of {name}" in problems_of(f"setup=['export {name}={value}']")[0]


@pytest.mark.parametrize("wish", [None, "NONE", "OTHER", "ALL"])
def test_a_secret_is_passed_by_name_and_written_nowhere(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch, wish: str | None
) -> None:
    """Whatever else of the shell the user has passed on: SBATCH_EXPORT wins over #SBATCH --export."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    words = ["pass_environment=[HF_TOKEN]", *([f"extra_sbatch_args=[--export={wish}]"] if wish else [])]
    (one,) = run_plan(site_plan(tmp_path, *words))
    exported = {None: None, "NONE": "HF_TOKEN", "OTHER": "OTHER,HF_TOKEN", "ALL": None}[wish]
    assert seen_by(fake, "sbatch").get("SBATCH_EXPORT") == exported
    for path in (tmp_path / "runs").rglob("*"):
        assert not path.is_file() or SECRET not in path.read_text(), path
    assert "HF_TOKEN" in (one.step.folder / "job.slurm").read_text()


def test_a_secret_that_the_shell_does_not_have_is_told_before_and_in_the_job(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(PlanError, match=r"got HF_TOKEN; expected a variable of this shell\. Fix: export HF_TOKEN="):
        run_plan(site_plan(tmp_path, "pass_environment=[HF_TOKEN]"))
    assert not (tmp_path / "runs").exists()
    monkeypatch.setenv("HF_TOKEN", SECRET)
    (one,) = run_plan(site_plan(tmp_path, "pass_environment=[HF_TOKEN]"))
    env = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    done = subprocess.run(["bash", str(one.step.folder / "job.slurm")], env=env, capture_output=True, text=True)
    assert (done.returncode, "slurm.pass_environment: HF_TOKEN is not set" in done.stderr) == (2, True)


# ---------------------------------------------------------------- submitit


def test_submitit_gets_the_same_job(tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own batch script, run by bash: variables filled in, modules checked, everything passed to srun."""
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "9")
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    before = dict(os.environ)
    words = (
        "setup=[export BASE=/from/setup]",
        "modules=[cuda]",
        "environment={HF_HOME: $BASE/hf}",
        "pass_environment=[HF_TOKEN]",
        "srun=[--mpi=pmix]",
        "wrapper=[env, 'A B=1']",
        "signal_before_limit=77",
    )
    plan = site_plan(tmp_path, *words, launcher="submitit")
    (one,) = run_plan(plan, submitit.submit)
    assert dict(os.environ) == before
    seen = seen_by(fake, "sbatch")
    assert "SLURM_MEM_PER_CPU" not in seen
    assert seen["SBATCH_EXPORT"] == "HF_TOKEN"
    assert jobs(fake)[one.job]["signal"] == "USR2@77"
    (path,) = one.step.folder.glob("submitit/*_submission.sh")
    env = {**before, "SLURM_EXPORT_ENV": "NONE", "BASH_FUNC_module%%": LOADS, "TOLD": str(tmp_path / "told")}
    done = subprocess.run(["bash", str(path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = seen_by(fake, "srun")
    assert (seen["HF_HOME"], "SLURM_EXPORT_ENV" in seen) == ("/from/setup/hf", False)
    words_of_srun = json.loads((fake / "srun.json").read_text())
    at = words_of_srun.index("bash")
    assert words_of_srun[at - 1] == "--mpi=pmix"
    assert words_of_srun[at + 4 : at + 9] == ["env", "A B=1", "python", "-u", "-m"]
    env.pop("BASH_FUNC_module%%")
    done = subprocess.run(["bash", str(path)], env=env, capture_output=True, text=True)
    assert (done.returncode, "the command module is not defined" in done.stderr) == (2, True)


# ---------------------------------------------------------------- time to save


def test_each_stage_has_its_own_time_to_save() -> None:
    text = {name: script(STAGES[name], cluster_of()) for name in STAGES}
    for name, seconds in {"preprocess": 120, "sft": 300, "grpo": 1200, "evaluate": 600}.items():
        assert f"--signal=B:USR1@{seconds} " in text[name]
    one = cluster_of("slurm.signal_before_limit=90")
    assert all("USR1@90 " in script(stage, one) for stage in STAGES.values())
    partly = cluster_of("slurm.signal_before_limit.grpo=1800").slurm
    assert (partly.save_seconds("grpo"), partly.save_seconds("sft")) == (1800, 300)
    short = cluster_of("slurm.time.grpo=10m").slurm  # a file from before stages had a time of their own
    assert (short.save_seconds("grpo"), short.save_seconds("evaluate")) == (150, 600)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["time.grpo=20m", "signal_before_limit.grpo=1200"],
            "signal_before_limit.grpo: got 1200 seconds; expected less than the 1200 of cluster.slurm.time.grpo",
        ),
        (["time.grpo=20m", "signal_before_limit.grpo=1200"], "Fix: cluster.slurm.signal_before_limit.grpo=300"),
        (
            ["signal_before_limit={grpo: 0}"],
            "cluster.slurm.signal_before_limit.grpo: got 0; expected a whole number ≥ 1",
        ),
        (
            ["signal_before_limit={gpro: 9}"],
            "cluster.slurm.signal_before_limit.gpro: unknown setting; did you mean 'grpo'?",
        ),
        (["signal_before_limit=soon"], "cluster.slurm.signal_before_limit: got 'soon'; expected a whole number ≥ 1"),
    ],
)
def test_a_time_to_save_that_cannot_be_is_told(words: list[str], told: str) -> None:
    assert any(told in problem for problem in problems_of(*words)), problems_of(*words)


def test_a_record_from_before_these_settings_is_read() -> None:
    """step.json of a step that was submitted earlier: one number, no lines of set-up."""
    record: dict[str, Any] = asdict(cluster_of())
    for name in ("gpu_request", "setup", "srun", "wrapper", "pass_environment", "host_suffix", "interface", "clusters"):
        del record["slurm"][name]
    record["slurm"]["signal_before_limit"] = 120
    found, problems = parse(Cluster, json.loads(json.dumps(record)))
    assert not problems
    assert found
    assert found.slurm.save_seconds("grpo") == 120
    assert "USR1@120 " in script(STAGES["grpo"], found)


def deadline_of(tmp_path: Path, left: float, monkeypatch: pytest.MonkeyPatch) -> Deadline:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + left)))
    progress = ProgressFile(tmp_path, "grpo")
    return Deadline(Runtime(cluster_of("slurm.signal_before_limit=60"), progress, 0, 1, tmp_path, None, None), "grpo")


def test_a_stage_whose_steps_take_longer_than_the_time_to_save_stops_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GRPO's steps take minutes: at the limit Slurm would have killed it, and the chain with it."""
    deadline = deadline_of(tmp_path, 1000, monkeypatch)
    deadline.step()
    assert not deadline.runtime.progress.now.warnings
    deadline.last -= 300  # a step of five minutes: two of them still fit
    deadline.step()
    assert not deadline.runtime.stop_requested()
    (told,) = deadline.runtime.progress.now.warnings
    assert "one step or batch took 5:00, more than cluster.slurm.signal_before_limit.grpo (1:00)" in told
    assert "Fix: cluster.slurm.signal_before_limit.grpo=auto, or 600" in told
    deadline.end = time.time() + 500  # and now they do not
    deadline.step()
    assert deadline.runtime.stop_requested()
    assert len(deadline.runtime.progress.now.warnings) == 1


def test_a_stage_stops_by_itself_when_less_than_a_step_and_a_save_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's own signal may be lost; a step that ends in time is left to it."""
    deadline = deadline_of(tmp_path, 100, monkeypatch)
    deadline.last -= 30
    deadline.step()
    assert not deadline.runtime.stop_requested()
    deadline.saved(80)  # 30 + 80 seconds do not fit into 100
    deadline.step()
    assert deadline.runtime.stop_requested()
    assert not deadline.runtime.progress.now.warnings


def test_the_first_step_which_compiles_counts_until_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadline = deadline_of(tmp_path, 1000, monkeypatch)
    longest = []
    for seconds in (600, 10, 20, 10):
        deadline.last -= seconds
        deadline.step()
        longest.append(round(deadline.longest))
    assert longest == [600, 600, 20, 20]


def test_the_signal_of_the_next_job_follows_from_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = make_plan(["tiny"], cluster="slurm", runs=tmp_path).steps[1]
    step.folder.mkdir(parents=True)
    assert "USR1@300 " in script(STAGES["sft"], cluster_of(), step)
    deadline = deadline_of(step.folder, 10_000, monkeypatch)
    for _ in range(2):
        deadline.last -= 40
        deadline.step()
    known = read_times(step.folder)
    assert known is not None
    assert (round(known.step), known.save) == (40, None)
    deadline.saved(200)
    for words, seconds in (
        ([], 375),  # 1.5 (40 + 200) + 15
        (["slurm.signal_before_limit=auto"], 375),
        (["slurm.signal_before_limit.sft=auto"], 375),
        (["slurm.signal_before_limit.sft=77"], 77),
        (["slurm.time.sft=10m"], 300),  # half of it
    ):
        assert f"USR1@{seconds} " in script(STAGES["sft"], cluster_of(*words), step)
    assert Deadline(deadline.runtime, "sft").save == 200  # before its own first save
    other = Runtime(deadline.runtime.cluster, deadline.runtime.progress, 0, 8, step.folder, None, None)
    assert Deadline(other, "sft").save is None  # of another number of processes


# ---------------------------------------------------------------- how a job ended


@pytest.mark.parametrize(
    ("waited", "told"),
    [("512", "exit code 2"), ("9", "signal 9"), ("137", "signal 9"), ("0", ""), ("2:0", "exit code 2")],
)
def test_what_squeue_calls_an_exit_code_is_decoded(waited: str, told: str) -> None:
    assert explain_exit_code(slurm.exit_code_of(waited)) == told


def test_the_words_of_a_dry_run_can_be_typed(tmp_path: Path, fake: Path) -> None:
    runs = tmp_path / "my runs"
    done = run_cli("run", "tiny", "--launcher", "slurm", "--dry-run", "--stages", "preprocess", "--runs", str(runs))
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("sbatch"))
    assert shlex.split(line)[-1].startswith(f"{runs}/tiny/preprocess-")
    assert plan_of(tmp_path).steps


def test_the_recipes_for_sites_are_cluster_files(tmp_path: Path) -> None:
    """Every block and every `setting: value` of docs/sites.md."""
    text = (ROOT / "docs" / "sites.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    names = "setup|environment|pass_environment|srun|wrapper|gpu_request|extra_sbatch_args|clusters|host_suffix"
    names += "|interface|cpus"
    blocks += [f"  {line}\n" for line in re.findall(rf"`((?:{names}): [^`]+)`", text)]
    assert len(blocks) >= 12
    for block in blocks:
        (tmp_path / "mine.yaml").write_text(f"launcher: slurm\ngpus: 2\nslurm:\n{block}")
        cluster, problems = read_cluster(str(tmp_path / "mine.yaml"))
        assert cluster, (block, problems)
        assert subprocess.run(["bash", "-n"], input=script(STAGES["sft"], cluster), text=True).returncode == 0
