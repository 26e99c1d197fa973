"""faults, distributed: ranks end with their parent and together; one sentence for a process that a signal has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from running import ROOT, is_alive

from pipeline.core import cgroups
from pipeline.core.errors import LaunchError
from pipeline.core.files import read_json
from pipeline.launchers import local, torchrun
from pipeline.launchers.stops import StopRequests
from pipeline.workflow import faults
from pipeline.workflow.plan import make_plan
from pipeline.workflow.progress import ATTEMPT, ProgressFile, read_progress


def start_ranks(mode: str, folder: Path) -> subprocess.Popen[str]:
    """Two processes of tests/ranks.py under the project's torchrun."""
    where = [sys.executable, "-m", "pipeline.training.distributed", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    env |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10"}
    return subprocess.Popen(
        [*where, "tests/support/ranks.py", mode, "--step", str(folder)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until_dead(pid: int, seconds: float = 20) -> bool:
    until = time.time() + seconds
    while is_alive(pid) and time.time() < until:
        time.sleep(0.05)
    return not is_alive(pid)


def test_a_killed_rank_is_named_with_its_signal_and_not_as_a_connection(tmp_path: Path) -> None:
    process = start_ranks("killed", tmp_path)
    told = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGKILL
    progress = read_progress(tmp_path)
    assert progress is not None
    assert (progress.state, progress.exit_code) == ("failed", 1)
    (sentence,) = progress.problems
    assert sentence.startswith(f"rank 1 (process {(tmp_path / 'pid-1').read_text()} on ")
    assert "was killed by SIGKILL" in sentence
    assert "memory" in sentence
    assert "Fix: raise cluster.slurm.memory" in sentence
    assert f"error: {sentence}" in told


def test_ranks_end_when_torchrun_is_killed(tmp_path: Path) -> None:
    process = start_ranks("asleep", tmp_path)
    until = time.time() + 60
    while len(list(tmp_path.glob("pid-*"))) < 2:
        assert process.poll() is None
        assert time.time() < until
        time.sleep(0.1)
    pids = [int(path.read_text()) for path in tmp_path.glob("pid-*")]
    process.kill()
    process.communicate()
    assert all(wait_until_dead(pid) for pid in pids)


def test_rank_0_decides_for_all_and_nobody_leaves_before_its_commit(tmp_path: Path) -> None:
    process = start_ranks("share", tmp_path)
    told = process.communicate(timeout=120)[0]
    assert process.returncode == 0, told
    for rank in range(2):
        assert read_json(tmp_path / f"found-{rank}.json") == {
            "value": ["checkpoint-4", None],
            "made": 1 if rank == 0 else 0,  # the others neither read nor hash anything
            "given": [[[0, "a"], [1, "a"]], [[0, "b"], [1, "b"]]] if rank == 0 else [[], []],
            "problems": ["of another layout", "Fix: none"],
            "committed": True,
        }


CHILD = "import os, time; from pipeline import faults; faults.die_with_parent(); print(os.getpid(), flush=True); "


def test_a_process_ends_with_its_parent(tmp_path: Path) -> None:
    child = f"[{sys.executable!r}, '-c', {CHILD + 'time.sleep(60)'!r}]"
    code = f"import subprocess; subprocess.Popen({child}).wait()"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.kill()
    parent.communicate()
    assert wait_until_dead(pid)


def test_a_process_whose_parent_has_ended_already_does_not_begin() -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    env = {**os.environ, faults.PARENT: str(gone.pid)}
    done = subprocess.run([sys.executable, "-c", CHILD], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    env[faults.PARENT] = str(os.getpid())  # alive, with a shell in between
    shell = ["bash", "-c", f"{sys.executable} -c {CHILD!r}; true"]
    done = subprocess.run(shell, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.strip().isdigit()


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (-signal.SIGKILL, "was killed by SIGKILL: most likely the host's memory ran out"),
        (128 + signal.SIGKILL, "was killed by SIGKILL"),
        (-signal.SIGSEGV, "was killed by SIGSEGV: compiled code crashed"),
        (-signal.SIGBUS, "/dev/shm"),
        (-signal.SIGTERM, "run the same command again to resume"),
    ],
)
def test_each_signal_has_its_cause(code: int, told: str) -> None:
    sentence = faults.explain_death("rank 3", code)
    assert sentence is not None
    assert sentence.startswith("rank 3 ")
    assert told in sentence


def test_an_exit_code_is_no_death() -> None:
    assert [faults.explain_death("rank 3", code) for code in (0, 1, 2, 75, 128)] == [None] * 5


def test_the_kernels_own_count_proves_that_memory_ran_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "_memory_groups", lambda: [tmp_path])
    assert cgroups.memory_kills() is None
    events = "low 0\nhigh 0\nmax 12\noom 4\noom_kill {}\noom_group_kill 0\n"
    (tmp_path / "memory.events").write_text(events.format(3))
    (tmp_path / "memory.max").write_text(f"{64 << 30}\n")
    (tmp_path / "memory.peak").write_text(f"{63 << 30}\n")
    before = cgroups.memory_kills()
    assert before == 3
    unproved = faults.explain_death("rank 0", -9, before)
    assert unproved is not None
    assert "most likely" in unproved
    (tmp_path / "memory.events").write_text(events.format(4))
    proved = faults.explain_death("rank 0", -9, before)
    assert proved is not None
    assert "out of host memory (the kernel counts 1 such kills, limit 64.0 GiB, peak 63.0 GiB)" in proved


@pytest.mark.parametrize(
    ("root", "line", "counter", "limit", "peak"),
    [
        ("", "0::/slurm/job_41/step_0/task_0", "memory.events", "memory.max", "memory.peak"),
        (
            "memory", "4:memory:/slurm/job_41/step_0/task_0", "memory.oom_control", "memory.limit_in_bytes",
            "memory.max_usage_in_bytes",
        ),
    ],
)  # fmt: skip
def test_the_limit_is_that_of_the_job_above_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str, line: str, counter: str, limit: str, peak: str
) -> None:
    """As Slurm makes them: the count in the group of the process, the limit on the job. Before: no limit, no peak."""
    monkeypatch.setattr(cgroups, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cgroups, "OWN_GROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(f"9:cpu:/other\n{line}\n")
    job = tmp_path / "cgroup" / root / "slurm" / "job_41"
    task = job / "step_0" / "task_0"
    task.mkdir(parents=True)
    unlimited = "max\n" if limit == "memory.max" else f"{2**63 - 4096}\n"
    for folder in (task, task.parent, job.parent):
        (folder / limit).write_text(unlimited)
    (job / limit).write_text(f"{8 << 30}\n")
    (job / peak).write_text(f"{8 << 30}\n")
    (task / counter).write_text("oom_kill 1\n")
    (job / counter).write_text("oom_kill 7\n")
    assert cgroups.memory_kills() == 1
    assert cgroups.memory_limit() == (8 << 30, 8 << 30)
    told = faults.explain_death("rank 1", -9, 0)
    assert told is not None
    assert "out of host memory (the kernel counts 1 such kills, limit 8.0 GiB, peak 8.0 GiB)" in told


def test_cgroups_of_version_1_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "_memory_groups", lambda: [tmp_path])
    (tmp_path / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    (tmp_path / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert cgroups.memory_kills() == 2
    assert cgroups.memory_limit() == (None, None)  # 2^63 is no limit


def test_what_a_step_has_written_itself_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ATTEMPT, "mine")
    progress = ProgressFile(tmp_path, "preprocess")
    progress.update(state="failed", problems=("no rows",), exit_code=2)
    assert faults.record_death(tmp_path, "its process", -9, None, "mine") is None
    kept = read_progress(tmp_path)
    assert kept is not None
    assert kept.problems == ("no rows",)


def test_a_death_before_rank_0_keeps_its_progress_is_this_attempts(tmp_path: Path) -> None:
    """Before: the launcher took it for another run's and showed the end of the log in place of the sentence."""
    progress = ProgressFile(tmp_path, "sft")
    progress.update(state="stopped", done=4, total=9)
    faults.record_failure(tmp_path, ["rank 1 was killed"], "mine")
    found = read_progress(tmp_path)
    assert found is not None
    assert (found.state, found.problems, found.token, found.attempt) == ("failed", ("rank 1 was killed",), "mine", 2)
    assert found.host == os.uname().nodename


def test_a_step_that_could_write_nothing_gets_its_sentence(tmp_path: Path) -> None:
    sentence = faults.record_death(tmp_path / "preprocess-1a2b3c4d5e", "its process", -9, None, "mine")
    assert sentence is not None
    (tmp_path / "preprocess-1a2b3c4d5e").mkdir()
    assert faults.record_death(tmp_path / "preprocess-1a2b3c4d5e", "its process", -9, None, "mine") == sentence
    progress = read_progress(tmp_path / "preprocess-1a2b3c4d5e")
    assert progress is not None
    assert (progress.stage, progress.state, progress.problems) == ("preprocess", "failed", (sentence,))


def stop_rank_1(process: subprocess.Popen[str], folder: Path) -> int:
    until = time.time() + 60
    while len(list(folder.glob("pid-*"))) < 2:
        assert process.poll() is None
        assert time.time() < until
        time.sleep(0.1)
    pid = int((folder / "pid-1").read_text())
    os.kill(pid, signal.SIGSTOP)
    while faults.process_state(pid) != "T":
        time.sleep(0.01)
    return pid


def test_a_stopped_rank_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: the other ranks waited for it, and nobody said so."""
    monkeypatch.setattr(faults, "POLL_SECONDS", 0.0)
    process = start_ranks("asleep", tmp_path)
    try:
        still = faults.StoppedProcesses(process.pid)
        pid = stop_rank_1(process, tmp_path)
        (sentence,) = still.new()
        assert sentence.startswith(f"rank 1, process {pid} on {os.uname().nodename} is stopped (SIGSTOP)")
        assert sentence.endswith(f"Fix: kill -CONT {pid}")
        assert still.new() == []  # told once
        os.kill(pid, signal.SIGCONT)
        while faults.process_state(pid) == "T":
            time.sleep(0.01)
        assert still.new() == []
        os.kill(pid, signal.SIGSTOP)
        while faults.process_state(pid) != "T":
            time.sleep(0.01)
        assert len(still.new()) == 1
    finally:
        process.kill()
        process.communicate()


def test_both_launchers_say_that_a_process_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(faults, "POLL_SECONDS", 0.1)
    plan = make_plan(["tiny"], stages=["preprocess"], runs=tmp_path)
    (step,) = plan.to_run
    wait = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP); raise SystemExit(1)"
    child = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {wait!r}]))"
    shown = []

    def go_on() -> None:
        for _ in range(2):
            text = ""
            while "is stopped (SIGSTOP)" not in text:
                time.sleep(0.1)
                text += "".join(capfd.readouterr())
            shown.append(text)
            os.kill(int(text.rpartition("kill -CONT ")[2].split()[0]), signal.SIGCONT)

    helper = threading.Thread(target=go_on)
    helper.start()
    for module in (local, torchrun):
        monkeypatch.setattr(module, "command", lambda *_: [sys.executable, "-c", child])
    with pytest.raises(LaunchError), StopRequests() as stops:
        local.run_step(step, "[1/1]", {}, plan=plan, stops=stops)
    signals = {number: signal.getsignal(number) for number in torchrun.STOP_SIGNALS}
    assert torchrun.run_on_node(step.folder) == 1
    for number, handler in signals.items():
        signal.signal(number, handler)
    helper.join()
    assert [text.count("warning: process") for text in shown] == [1, 1]
