"""Recovery without a human: ranks that are killed or hang, and what the step is in the end."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from running import NANO, ROOT, only, pid_of_rank, run_cli

from pipeline.core.files import read_json
from pipeline.core.hashing import file_sha256
from pipeline.workflow.artifact import open_artifact
from pipeline.workflow.attempts import HANG, KILLED, read_attempts
from pipeline.workflow.progress import Progress, Shrink, read_progress

STEPS = 80
ONE = "cluster.processes=1"
LONG = [*NANO, f"sft.max_steps={STEPS}", "cluster.save_steps=10"]


def start(
    runs: Path, *words: str, stages: str = "preprocess,sft", env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", "tiny", *LONG, *words, "--stages", stages, "--runs", str(runs)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], runs: Path, pattern: str, what: Callable[[Progress], bool]) -> Path:
    """Wait until the progress of a step is as `what` says. Returns its folder."""
    until = time.time() + 120
    while True:
        for folder in runs.glob(pattern):
            if (progress := read_progress(folder)) and what(progress):
                return folder
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < until
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("undisturbed")
    process = start(runs)
    assert process.wait(240) == 0, process.communicate()[0]
    process.communicate()
    return only(runs, "tiny/sft-*")


@pytest.fixture
def runs(tmp_path: Path, undisturbed: Path) -> Path:
    """A runs folder whose rows are there already."""
    rows = only(undisturbed.parents[1], "tiny/preprocess-*")
    shutil.copytree(rows, tmp_path / "tiny" / rows.name)
    return tmp_path


def same_result(folder: Path, other: Path) -> None:
    """To the last bit: two processes add two numbers in either order alike."""
    losses = [[entry.get("loss") for entry in read_json(place / "history.json")] for place in (folder, other)]
    assert losses[0] == losses[1]
    for path in sorted((other / "model").glob("*.safetensors")):
        assert file_sha256(folder / "model" / path.name) == file_sha256(path)


def test_a_killed_rank_and_a_stopped_one_cost_no_more_than_save_steps_and_nobody_has_to_come(
    runs: Path, undisturbed: Path
) -> None:
    process = start(runs, "cluster.hang_timeout=5")
    folder = wait_for(process, runs, "tiny/sft-*", lambda progress: progress.done >= 15)
    os.kill(pid_of_rank(1, folder), signal.SIGKILL)
    killed = time.time()
    wait_for(process, runs, "tiny/sft-*", lambda progress: progress.attempt == 2 and progress.done > progress.first)
    print(f"{time.time() - killed:.1f} s from the kill to the next step")
    pid = pid_of_rank(1, folder)
    os.kill(pid, signal.SIGSTOP)
    stopped = time.time()
    wait_for(process, runs, "tiny/sft-*", lambda progress: progress.attempt == 3 and progress.done > progress.first)
    print(f"{time.time() - stopped:.1f} s from the stop to the next step")
    told = process.communicate(timeout=240)[0]
    assert process.returncode == 0, told
    first, second = read_attempts(folder).attempts
    assert (first.number, first.state, first.kind) == (1, "failed", KILLED)
    assert first.problem.startswith("rank 1 (process ")
    assert "was killed by SIGKILL" in told
    assert f"note: the step failed at step {first.last}; it starts again" in told
    assert first.last - second.first <= 10 + 20  # and the steps of half a second
    spent, whole = open_artifact(folder).seconds_by_part, (folder / "artifact.json").stat().st_mtime - first.started
    assert whole - 1 <= sum(spent.values()) <= whole + 60  # and the imports before the first record
    assert spent["lost"] + spent["wait"] >= 5  # until the watchdog saw the stopped rank
    assert (second.kind, second.problem.partition(" on ")[0]) == (HANG, f"rank 1 (process {pid}")
    log = (folder / "log.txt").read_text()
    assert "rank 0 (process " in log
    assert "most recent call first" in log  # where rank 0 waits
    same_result(folder, undisturbed)


def test_out_of_memory_halves_the_batch_and_the_step_goes_on(runs: Path) -> None:
    """On rank 1 alone: rank 0 sees only that its peer is gone."""
    small = {"PYTHONPATH": str(ROOT / "tests/support/faulty_model"), "TRAIN_ROWS": "2", "GENERATE_ROWS": "2"}
    words = ["sft.max_steps=4", "cluster.save_steps=2", "cluster.padding_free=false"]  # a row of tokens each
    process = start(runs, *words, env={**small, "ON_RANK": "1"})
    told = process.communicate(timeout=400)[0]
    assert process.returncode == 0, told
    sft = open_artifact(only(runs, "tiny/sft-*"))
    assert sft.metrics["steps"] == 4
    assert sft.warnings == [
        "cluster.sft.per_device_batch_size: 4 was out of memory, so it is 2; sums of another order differ in their "
        "last bits"
    ]
    (attempt,) = read_attempts(sft.folder).attempts
    assert attempt.problem.startswith("rank 1: sft: the GPU's memory ran out")
    assert attempt.shrink == Shrink("cluster.sft.per_device_batch_size", 4, 2)
    assert "note: out of memory with cluster.sft.per_device_batch_size=4; the step starts again with 2" in told


def bad_row(place: Path, call: int = 6) -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT / "tests/support/faulty_model"), "BAD_ROW": str(place), "BAD_CALL": str(call)}


def test_a_loss_that_is_not_a_number_names_its_rows_and_keeps_the_checkpoint(runs: Path) -> None:
    words = ["sft.max_steps=8", "cluster.save_steps=1", "cluster.logging_steps=50", "cluster.keep_checkpoints=9"]
    process = start(runs, *words, env=bad_row(runs / "row"))
    told = process.communicate(timeout=400)[0]
    assert process.returncode == 1, told
    assert "training diverged: loss is nan at step 6, whose rows are " in told
    assert "cluster.skip_bad_batches=1" in told
    folder = only(runs, "tiny/sft-*")
    saved = {path.parent.name for path in folder.glob("checkpoints/*/manifest.json")}
    assert saved == {f"checkpoint-{step}" for step in range(1, 6)}  # not those of step 6
    log = (folder / "log.txt").read_text()
    (line,) = [line for line in log.splitlines() if line.startswith("the rows of step 6: ")]
    named = line.partition(": ")[2].split(", ")
    rows = pq.read_table(only(runs, "tiny/preprocess-*") / "data" / "sft.parquet")["id"].to_pylist()
    assert 6 <= len(named) <= 8  # the global batch, of both ranks; two of its rows may be the same text
    assert {one for name in named for one in name.split(" or ")} <= set(rows)
    assert [one.kind for one in read_attempts(folder).attempts] == [""]  # not tried again


def test_a_bad_batch_is_skipped_by_a_setting(runs: Path) -> None:
    words = ["sft.max_steps=8", "cluster.save_steps=3", "cluster.skip_bad_batches=1", ONE]
    process = start(runs, *words, env=bad_row(runs / "row"))
    told = process.communicate(timeout=400)[0]
    assert process.returncode == 0, told
    assert "note: training diverged at step 6; the step starts again without that batch" in told
    sft = open_artifact(only(runs, "tiny/sft-*"))
    assert (sft.metrics["steps"], sft.metrics["resumed_from"]) == (8, "checkpoint-3")
    (skipped,) = sft.metrics["skipped_batches"]
    assert skipped["step"] == 6
    assert skipped["rows"]
    assert sft.warnings[0].startswith("the batch of step 6 was skipped, because training diverged at it: ")
    losses = [entry["loss"] for entry in read_json(sft.folder / "history.json") if "loss" in entry]
    assert all(math.isfinite(loss) for loss in losses)


def test_a_crash_loop_ends_and_the_same_command_goes_on_when_its_cause_is_gone(runs: Path) -> None:
    words = ["sft.max_steps=8", "cluster.save_steps=1000", ONE]
    process = start(runs, *words, env={"PYTHONPATH": str(ROOT / "tests/support/faulty_model"), "KILL_CALL": "4"})
    told = process.communicate(timeout=400)[0]
    assert process.returncode == 1, told
    assert told.count("it starts again") == 2
    assert told.count("gave up: the same failure came 3 times at step 3.") == 1
    folder = only(runs, "tiny/sft-*")
    assert [(one.kind, one.last) for one in read_attempts(folder).attempts] == [(KILLED, 3)] * 3
    shown = run_cli("status", "--runs", str(runs)).stdout
    assert shown.count("gave up: the same failure came 3 times at step 3.") == 1
    process = start(runs, *words)
    told = process.communicate(timeout=400)[0]
    assert process.returncode == 0, told
    assert open_artifact(folder).metrics["steps"] == 8
