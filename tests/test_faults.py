"""faults, distributed: ranks end with their parent and together; one sentence for a process that a signal has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import ROOT, is_alive

from pipeline import faults
from pipeline.files import read_json
from pipeline.progress import ProgressFile, read_progress


def start_ranks(mode: str, folder: Path) -> subprocess.Popen[str]:
    """Two processes of tests/ranks.py under the project's torchrun."""
    where = [sys.executable, "-m", "pipeline.distributed", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    env |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10"}
    return subprocess.Popen(
        [*where, "tests/ranks.py", mode, "--step", str(folder)],
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
    monkeypatch.setattr(faults, "_memory_groups", lambda: [tmp_path])
    assert faults.memory_kills() is None
    events = "low 0\nhigh 0\nmax 12\noom 4\noom_kill {}\noom_group_kill 0\n"
    (tmp_path / "memory.events").write_text(events.format(3))
    (tmp_path / "memory.max").write_text(f"{64 << 30}\n")
    (tmp_path / "memory.peak").write_text(f"{63 << 30}\n")
    before = faults.memory_kills()
    assert before == 3
    unproved = faults.explain_death("rank 0", -9, before)
    assert unproved is not None
    assert "most likely" in unproved
    (tmp_path / "memory.events").write_text(events.format(4))
    proved = faults.explain_death("rank 0", -9, before)
    assert proved is not None
    assert "out of host memory (the kernel counts 1 such kills, limit 64.0 GiB, peak 63.0 GiB)" in proved


def test_cgroups_of_version_1_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_memory_groups", lambda: [tmp_path])
    (tmp_path / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    (tmp_path / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert faults.memory_kills() == 2
    assert faults.memory_limit() == (None, None)  # 2^63 is no limit


def test_what_a_step_has_written_itself_stands(tmp_path: Path) -> None:
    since = time.time() - 1
    progress = ProgressFile(tmp_path, "preprocess")
    progress.update(state="failed", problems=("no rows",), exit_code=2)
    assert faults.record_death(tmp_path, "its process", -9, None, since) is None
    kept = read_progress(tmp_path)
    assert kept is not None
    assert kept.problems == ("no rows",)


def test_a_step_that_could_write_nothing_gets_its_sentence(tmp_path: Path) -> None:
    sentence = faults.record_death(tmp_path / "preprocess-1a2b3c4d5e", "its process", -9, None, time.time())
    assert sentence is not None
    (tmp_path / "preprocess-1a2b3c4d5e").mkdir()
    assert faults.record_death(tmp_path / "preprocess-1a2b3c4d5e", "its process", -9, None, time.time()) == sentence
    progress = read_progress(tmp_path / "preprocess-1a2b3c4d5e")
    assert progress is not None
    assert (progress.stage, progress.state, progress.problems) == ("preprocess", "failed", (sentence,))
