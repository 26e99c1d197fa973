"""What a user can get wrong, and what a machine can lack: each a sentence that says how to go on, and nothing lost."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import NANO, ROOT, only, run_cli, run_here

from pipeline.core.errors import LaunchError, PipelineError, explain_disk
from pipeline.launchers.local import check_port
from pipeline.workflow.artifact import is_done
from pipeline.workflow.progress import read_progress

ONE = ["cluster.processes=1"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "tinny"], "unknown recipe 'tinny' in configs/; did you mean 'tiny'?"),
        (["run"], "the following arguments are required"),
        (["run", "sft.epochs=1"], "recipe: got none; expected one or more of"),
        (["plan", "tiny", "grpo.num_generation=4"], "grpo.num_generation: unknown setting; did you mean"),
        (
            ["plan", "tiny", "sft.optimizer.learning_rate=fast"],
            "sft.optimizer.learning_rate: got 'fast'; expected a number > 0",
        ),
        (["plan", "tiny", "--stages", "stf"], "--stages: got 'stf'; did you mean 'sft'?"),
        (["plan", "tiny", "evaluate.splits=[tests]"], "has no split 'tests'; did you mean 'test'?"),
        (["plan", "tiny", "task.name=corr2caus"], "unknown task 'corr2caus'; did you mean 'corr2cause'?"),
        (["plan", "tiny", "--cluster", "locall"], "unknown cluster 'locall'"),
        (
            ["plan", "tiny", "cluster.sft.deepspeed=zero9"],
            "cluster.sft.deepspeed: got 'zero9'; expected a file of deepspeed/",
        ),
        (["plan", "tiny", "cluster.sft.deepspeed=none"], "got 'muon', which is DeepSpeed's"),
        (["plan", "tiny", "--verbose"], "--verbose: got an unknown argument. Fix: python -m pipeline plan --help"),
        (["status", "tinny"], "nothing has run"),
        (["evaluate", "--ckpt", "no/such/folder"], "checkpoint no/such/folder: no such folder"),
        (["evaluate", "tiny", "--ckpt", "owner/name", "--task", "corr2caus"], "unknown task 'corr2caus'"),
        (["evaluate", "tiny", "--ckpt", "owner/name", "--split", "tst"], "has no split 'tst'; did you mean 'test'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_and_exit_code_2(words: list[str], told: str, tmp_path: Path) -> None:
    done = run_cli(*words, "--runs", str(tmp_path / "runs"))
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_everything_that_is_wrong_is_said_at_once() -> None:
    told = run_cli("plan", "tiny", "seed=-1", "sft.epochs=many", "grpo.num_generations=7", "cluster.threads=0").stderr
    for name in ("seed: got -1", "sft.epochs: got 'many'", "cluster.threads: got 0"):
        assert name in told


def test_a_reader_that_has_enough_is_no_error() -> None:
    """python -m pipeline list | head -1"""
    words = [sys.executable, "-u", "-m", "pipeline", "list"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


@pytest.mark.parametrize("what", ["empty", "half-written", "of another tokenizer"])
def test_a_bad_checkpoint_is_named(nano: Path, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    expected = "neither config.json nor adapter_config.json in it; it holds nothing"
    if what != "empty":
        shutil.copytree(only(nano, "tiny/sft-*") / "model", folder, dirs_exist_ok=True)
    if what == "half-written":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        expected = "cannot be loaded"
    if what == "of another tokenizer":
        text = (folder / "tokenizer_config.json").read_text()
        (folder / "tokenizer_config.json").write_text(text.replace("<|end|>", "<|user|>"))
        expected = "the tokenizer in"
    words = ["evaluate", "tiny", *NANO, *ONE, "--ckpt", str(folder), "--limit", "2", "--runs", str(tmp_path / "runs")]
    if what == "of another tokenizer":
        with pytest.raises(PipelineError, match=expected) as caught:
            run_here(*words)
        assert caught.value.exit_code == 2
        return
    done = run_cli(*words)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_a_step_that_has_not_ended_is_no_checkpoint(nano: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny" / "sft-0123456789"
    folder.mkdir(parents=True)
    shutil.copy(only(nano, "tiny/sft-*") / "step.json", folder)
    done = run_cli("evaluate", "--ckpt", str(folder), "--runs", str(tmp_path))
    assert done.returncode == 2
    assert "that step has not ended" in done.stderr


def test_broken_lines_of_a_data_file_are_all_named(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    good = json.dumps({"input": "Premise: Suppose there is a closed system of 2 variables.\nHypothesis: h", "label": 1})
    rows.write_text(good + '\n{"input": "Premise\n{"label": 0}\n')
    words = ["tiny", *NANO, "task.source=path", f"task.path={rows}", "evaluate.splits=[test]", "--stages", "preprocess"]
    done = run_cli("run", *words, "--runs", str(tmp_path / "runs"))
    assert done.returncode == 2, done.stderr
    assert [f"{rows}:{line}: " in done.stderr for line in (1, 2, 3)] == [False, True, True]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("where", ["/sys/runs", "file"])
def test_a_folder_that_may_not_be_written(tmp_path: Path, where: str) -> None:
    """Root too may not write into /sys, nor where a file stands; a folder marked read-only would not stop it."""
    (tmp_path / "file").write_text("")
    done = run_cli("run", "tiny", *NANO, "--runs", str(tmp_path / where))
    assert done.returncode == 1
    assert re.search(rf"error: .*{where}.*cannot be written .*Fix: choose another folder with --runs DIR", done.stderr)
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_told_whoever_notices_it(tmp_path: Path) -> None:
    """Python raises OSError, torch and safetensors errors of their own that quote the system's words."""
    with Path("/dev/full").open("w") as full, pytest.raises(OSError, match="No space left") as caught:
        full.write("x" * 100_000)
    assert "no space left to write" in str(explain_disk(caught.value, tmp_path))
    quoted = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "no space left to write" in str(explain_disk(quoted, tmp_path))
    assert explain_disk(RuntimeError("shapes do not match"), tmp_path) is None


def test_a_full_disk_loses_nothing(nano: Path, tmp_path: Path) -> None:
    """Files may not grow beyond 40 kB, as on a full quota: SFT says so, and goes on once there is room."""
    data = only(nano, "tiny/preprocess-*")
    shutil.copytree(data, tmp_path / "tiny" / data.name)
    words = ["run", "tiny", *NANO, *ONE, "--stages", "sft", "--runs", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
    )
    assert done.returncode == 1
    assert "no space left to write" in done.stderr
    assert "run the same command again" in done.stderr
    folder = only(tmp_path, "tiny/sft-*")
    assert not is_done(folder)
    progress = read_progress(folder)
    assert progress is not None
    assert progress.state == "failed"
    run_here(*words)
    assert is_done(folder)


def test_no_free_port() -> None:
    """Nothing can be bound at an address that no interface has."""
    check_port()
    with pytest.raises(LaunchError, match=r"no TCP port of 192\.0\.2\.1 is free for torchrun .*loopback"):
        check_port("192.0.2.1")


def test_without_a_compiler_training_still_works(nano: Path, tmp_path: Path) -> None:
    """DeepSpeed builds an operator on first use; where no compiler is found it falls back to torch's own."""
    data = only(nano, "tiny/preprocess-*")
    shutil.copytree(data, tmp_path / "tiny" / data.name)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "bash", "env", "uname", "git", "ldconfig", "which"):
        if found := shutil.which(name):
            (programs / name).symlink_to(found)
    env = {"PATH": str(programs), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    assert not any(shutil.which(name, path=str(programs)) for name in ("c++", "g++", "gcc", "clang++"))
    done = run_cli("run", "tiny", *NANO, "sft.max_steps=1", "--stages", "sft", "--runs", str(tmp_path), env=env)
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in (only(tmp_path, "tiny/sft-*") / "log.txt").read_text()


def test_the_environment_of_a_stage_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.config.cluster import read_cluster
    from pipeline.launchers.torchrun import environment
    from pipeline.workflow.stage import STAGES

    cluster, _ = read_cluster("local", ["processes=2"])
    assert cluster is not None
    monkeypatch.setenv("MY_OWN", "1")
    env = environment(STAGES["sft"], cluster, Path("runs/tiny/sft-1a2b3c4d5e"))
    assert env["MY_OWN"] == "1"
    assert env["TRACKIO_DIR"] == str(Path("runs/tiny/sft-1a2b3c4d5e/trackio").absolute())
    assert int(env["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
