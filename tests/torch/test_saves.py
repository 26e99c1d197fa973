"""Saves: checkpoints are committed while training goes on, read back before others are deleted, and copied."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from running import NANO, only, run_here

from pipeline.config.cluster import read_cluster
from pipeline.core.errors import DiskError, LaunchError
from pipeline.core.files import read_json
from pipeline.training import trainer
from pipeline.training.checkpoints import (
    checkpoint_to_resume,
    file_sizes,
    latest_valid_checkpoint,
    numbered,
    restore_copy,
    validation_error,
    wait_for_files,
)
from pipeline.training.saves import Saves
from pipeline.workflow import signing
from pipeline.workflow.artifact import open_artifact
from pipeline.workflow.layouts import Layout
from pipeline.workflow.progress import ProgressFile
from pipeline.workflow.runtime import Runtime
from pipeline.workflow.signing import MANIFEST

LARGE = 192 << 20  # bytes: hashed in tenths of a second


def written(folder: Path, step: int, size: int = 1000) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "global_step").mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(bytes([step]) * size)
    (checkpoint / "global_step" / "shard").write_bytes(b"shard")
    return checkpoint


def save(saves: Saves, step: int, best: str | None = None) -> Path:
    checkpoint = written(saves.folder, step)
    saves.begin(checkpoint, file_sizes(checkpoint), best)
    saves.wait()
    return checkpoint


def names(folder: Path) -> list[str]:
    return [path.name for path in numbered(folder)]


def test_training_goes_on_while_a_checkpoint_is_hashed_and_the_next_save_waits(tmp_path: Path) -> None:
    saves = Saves(tmp_path, None, keep=2)
    first = written(tmp_path, 2, LARGE)
    began = time.monotonic()
    saves.begin(first, file_sizes(first), None)
    waited = time.monotonic() - began
    assert not (first / MANIFEST).exists()  # incomplete until every file is hashed and on the disk
    assert validation_error(first) == "it is incomplete (no manifest)"
    second = written(tmp_path, 4)
    saves.begin(second, file_sizes(second), None)
    assert validation_error(first) is None
    assert waited < saves.seconds / 4 or saves.seconds < 0.1
    saves.wait()
    assert latest_valid_checkpoint(tmp_path) == (second, [])


def test_the_trained_model_is_saved_while_the_last_checkpoint_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits for its hashes but the end of the step, which has them all."""
    saving, real = threading.Event(), trainer.save

    def sign(folder: Path, manifest: dict[str, Any]) -> None:
        if folder.name == "checkpoint-6":
            assert saving.wait(60)
        signing.sign(folder, manifest)

    def save_model(*words: Any) -> None:
        saving.set()
        real(*words)

    monkeypatch.setattr("pipeline.training.checkpoints.sign", sign)
    monkeypatch.setattr("pipeline.training.trainer.save", save_model)
    words = [*NANO, "cluster.processes=1", "cluster.launcher=debug"]
    run_here("run", "tiny", *words, "--stages", "preprocess,sft", "--runs", str(tmp_path))
    step = only(tmp_path, "tiny/sft-*")
    assert open_artifact(step, deep=True).metrics["steps"] == 6
    assert names(step / "checkpoints") == ["checkpoint-4", "checkpoint-6"]
    assert validation_error(step / "checkpoints" / "checkpoint-6") is None


def test_a_process_that_dies_before_the_manifest_loses_no_older_checkpoint(tmp_path: Path) -> None:
    good = save(Saves(tmp_path, None, keep=1), 2)
    written(tmp_path, 4, LARGE)
    child = os.fork()
    if child == 0:
        new = tmp_path / "checkpoint-4"
        Saves(tmp_path, None, keep=1).begin(new, file_sizes(new), None)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    found, skipped = latest_valid_checkpoint(tmp_path)
    assert found == good
    assert skipped == ["skipped checkpoint-4: it is incomplete (no manifest)"]


def test_a_checkpoint_that_does_not_read_back_deletes_nothing(tmp_path: Path) -> None:
    """The disk lost what it had confirmed: both sizes and hashes are looked at before the last good one goes."""

    class Losing(Saves):
        def _read_back(self, checkpoint: Path) -> str | None:
            (checkpoint / "model.safetensors").write_bytes(bytes(1000))
            return super()._read_back(checkpoint)

    good = save(Saves(tmp_path, None, keep=1), 2)
    losing = Losing(tmp_path, None, keep=1)
    save(losing, 4)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    (warning,) = losing.take_warnings()
    assert warning.startswith("checkpoint-4 is damaged, so no older checkpoint is deleted: model.safetensors has")
    assert latest_valid_checkpoint(tmp_path)[0] == good
    save(Saves(tmp_path, None, keep=2), 6)
    assert latest_valid_checkpoint(tmp_path)[0] == tmp_path / "checkpoint-6"


def test_a_shorter_file_does_not_count_as_a_checkpoint_to_keep(tmp_path: Path) -> None:
    saves = Saves(tmp_path, None, keep=3)
    for step in (2, 4, 6):
        save(saves, step)
    (tmp_path / "checkpoint-4" / "model.safetensors").write_bytes(b"cut")
    save(saves, 8)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]


def test_a_stop_waits_for_the_manifest_alone(tmp_path: Path) -> None:
    """The rest can be done by the next attempt, and the time limit is near."""
    save(Saves(tmp_path, None, keep=1, second=tmp_path / "second"), 2)
    saves = Saves(tmp_path, None, keep=1, second=tmp_path / "second")
    checkpoint = written(tmp_path, 4, LARGE)
    saves.begin(checkpoint, file_sizes(checkpoint), None)
    saves.wait(ending=True)
    assert validation_error(checkpoint) is None
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert names(tmp_path / "second") == ["checkpoint-2"]


def test_a_checkpoint_that_would_not_fit_is_not_begun(tmp_path: Path) -> None:
    """Older ones make room before; the newest and the best stay."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system takes root")
    try:
        saves = Saves(tmp_path, None, keep=5)
        for step in (2, 4, 6):
            checkpoint = written(tmp_path, step, 1_000_000)
            saves.begin(checkpoint, file_sizes(checkpoint), None)
            saves.wait()
        saves.check_room(None)
        assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
        (tmp_path / "other").write_bytes(bytes(600_000))  # of somebody else
        saves.check_room(str(tmp_path / "checkpoint-2"))
        assert names(tmp_path) == ["checkpoint-2", "checkpoint-6"]
        (tmp_path / "more").write_bytes(bytes(1_000_000))
        with pytest.raises(
            DiskError, match=r"no space left to write the next checkpoint .* checkpoint-6 is kept. Fix: "
        ):
            saves.check_room(str(tmp_path / "checkpoint-2"))
        assert names(tmp_path) == ["checkpoint-2", "checkpoint-6"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# ---------------------------------------------------------------- files of other nodes


def test_a_file_that_another_node_shows_late_is_waited_for(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, 2)
    shard = checkpoint / "global_step" / "shard-1"
    late = threading.Timer(0.5, lambda: shard.write_bytes(b"x" * 70))
    late.start()
    wait_for_files(checkpoint, {**file_sizes(checkpoint), "global_step/shard-1": 70})
    assert shard.stat().st_size == 70
    saves = Saves(tmp_path, None, keep=2)
    saves.begin(checkpoint, file_sizes(checkpoint), None)
    saves.wait()
    assert "global_step/shard-1" in read_json(checkpoint / MANIFEST)


def test_a_shard_that_never_comes_makes_no_checkpoint(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, 2)
    with pytest.raises(LaunchError, match=r"checkpoint-2: shard-1 was written by another process and is not seen here"):
        wait_for_files(checkpoint, {"shard-1": 70}, seconds=0.3)


def test_what_a_commit_raised_is_raised_by_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait_for_files, "__defaults__", (0.2,))
    saves = Saves(tmp_path, None, keep=2)
    saves.begin(written(tmp_path, 2), {"shard-1": 70}, None)
    new = written(tmp_path, 4)
    with pytest.raises(LaunchError, match="is not seen here"):
        saves.begin(new, file_sizes(new), None)
    saves.wait()
    assert latest_valid_checkpoint(tmp_path)[0] is None


# ---------------------------------------------------------------- the second place


def test_copies_are_kept_as_checkpoints_are_and_the_best_among_them(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    saves = Saves(first, None, keep=2, second=second)
    best = str(save(saves, 2))
    for step in (4, 6, 8):
        save(saves, step, best)
    assert names(first) == names(second) == ["checkpoint-2", "checkpoint-8"]
    assert [validation_error(path) for path in numbered(second)] == [None, None]
    assert not list(second.glob(".*"))


@pytest.mark.parametrize("damage", ["lost", "cut", "whole"])
def test_the_newest_valid_one_of_both_places_is_resumed(tmp_path: Path, damage: str) -> None:
    out, copies = tmp_path / "runs" / "tiny" / "sft-1", tmp_path / "copies"
    first, second = out / "checkpoints", copies / "tiny" / "sft-1"
    saves = Saves(first, None, keep=2, second=second)
    for step in (2, 4):
        newest = save(saves, step)
    if damage == "lost":
        for path in numbered(first):
            path.rename(tmp_path / path.name)
    elif damage == "cut":
        (newest / "model.safetensors").write_bytes(b"cut")
    cluster, problems = read_cluster("local", [f"checkpoint_copy={copies}"])
    assert cluster is not None, problems
    runtime = Runtime(cluster, ProgressFile(None, "sft"), 0, 1, out, None, None)
    layout = Layout(1, 0, "none", False, "full", "adamw_torch")
    found, messages = checkpoint_to_resume(first, layout, runtime)
    assert found == newest
    assert validation_error(newest) is None
    assert (f"checkpoint-4 is restored from {second}" in messages) == (damage != "whole")
    assert len(numbered(second)) == 2


def test_a_damaged_copy_is_passed_over(tmp_path: Path) -> None:
    saves = Saves(tmp_path / "first", None, keep=2, second=tmp_path / "second")
    for step in (2, 4):
        save(saves, step)
    (tmp_path / "second" / "checkpoint-4" / "global_step" / "shard").write_bytes(b"SHARD")
    found, messages = restore_copy(tmp_path / "other", tmp_path / "second", None)
    assert found == tmp_path / "other" / "checkpoint-2"
    assert messages[0].endswith("checkpoint-4: global_step/shard has changed since it was written")


def test_a_second_place_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    saves = Saves(tmp_path / "first", None, keep=2, second=tmp_path / "file" / "tiny")
    checkpoint = save(saves, 2)
    assert validation_error(checkpoint) is None
    (warning,) = saves.take_warnings()
    assert warning.startswith("cluster.checkpoint_copy: checkpoint-2 has no copy: ")
    assert saves.take_warnings() == []


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_lost_goes_on_from_their_copies(tmp_path: Path, nano: Path) -> None:
    data = only(nano, "tiny/preprocess-*")
    runs = tmp_path / "runs"
    (runs / "tiny").mkdir(parents=True)
    (runs / "tiny" / data.name).symlink_to(data)
    copies = f"cluster.checkpoint_copy={tmp_path / 'copies'}"
    words = ["run", "tiny", *NANO, "cluster.processes=1", copies, "--stages", "sft", "--runs", str(runs)]
    run_here(*words)
    folder = only(runs, "tiny/sft-*")
    weights = (folder / "model" / "model.safetensors").read_bytes()
    assert names(folder / "checkpoints") == names(tmp_path / "copies" / "tiny" / folder.name) != []
    subprocess.run(["rm", "-r", str(folder)], check=True)
    for path in (tmp_path / "copies" / "tiny" / folder.name).glob("checkpoint-6/*/*optim*"):
        path.write_bytes(b"cut")
    run_here(*words)
    assert open_artifact(folder).metrics["resumed_from"] == "checkpoint-4"
    assert (folder / "model" / "model.safetensors").read_bytes() == weights
