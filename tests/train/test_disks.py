"""Disks that are really full while a run saves: the previous checkpoint stays, the error is clear, nothing loops."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import NANO, only, run_cli, run_here

from pipeline.core.files import read_json
from pipeline.training.checkpoints import numbered, validation_error
from pipeline.workflow.artifact import open_artifact
from pipeline.workflow.progress import read_progress

SFT = ["run", "tiny", *NANO, "cluster.processes=1", "--stages", "sft"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of preprocess and SFT on a disk with room."""
    runs = tmp_path_factory.mktemp("undisturbed")
    run_here("run", "tiny", *NANO, "cluster.processes=1", "--stages", "preprocess,sft", "--runs", str(runs))
    return runs


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, which tests make as small as they want; mounting it takes root."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def prepare(undisturbed: Path, disk: Path) -> Path:
    data = only(undisturbed, "tiny/preprocess-*")
    (disk / "tiny").mkdir()
    (disk / "tiny" / data.name).symlink_to(data)
    return only(undisturbed, "tiny/sft-*")


def resize(disk: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(disk)], check=True)


def test_a_disk_that_fills_in_the_middle_of_a_save(undisturbed: Path, disk: Path) -> None:
    """No more files fit, as at a quota of files: half of the second checkpoint is written."""
    whole, told = prepare(undisturbed, disk), "no space left to write"
    inside = len(list((whole / "checkpoints" / "checkpoint-6").rglob("*"))) + 1
    late = {"model", "checkpoints", "history.json", "artifact.json"}
    beside = [path for path in whole.rglob("*") if path.relative_to(whole).parts[0] not in late]
    resize(disk, f"nr_inodes={len(beside) + 8 + inside + inside // 2}")
    done = run_cli(*SFT, "--runs", str(disk))
    assert done.returncode == 1, done.stderr
    assert told in done.stderr
    assert "then run the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    folder = only(disk, "tiny/sft-*")
    assert [path.name for path in numbered(folder / "checkpoints")] == ["checkpoint-2"]
    assert validation_error(folder / "checkpoints" / "checkpoint-2") is None
    log = (folder / "log.txt").read_text()
    assert log.count("begins at step 0") == 1  # started once: a full disk is not tried again
    assert "resumes from" not in log
    progress = read_progress(folder)
    assert progress is not None
    assert (progress.state, progress.kind) == ("failed", "")
    assert told in progress.problems[0]
    resize(disk, "nr_inodes=10000")
    run_here(*SFT, "--runs", str(disk))
    assert open_artifact(folder).metrics["resumed_from"] == "checkpoint-2"
    assert (folder / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    steps = [entry["step"] for entry in read_json(folder / "history.json") if "loss" in entry]
    assert steps == list(range(1, 7))
