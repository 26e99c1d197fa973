"""read_ahead: the processes of a node read a file once together, and share the check of its weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.core.errors import ArtifactError
from pipeline.core.files import drop_cache, sync
from pipeline.models import read_ahead as module
from pipeline.models.read_ahead import local_share, read_ahead
from pipeline.models.weight_checks import check_finite

MIB = 1 << 20


def ranks(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world))


def written(path: Path, size: int) -> Path:
    """Write a file that the kernel has on the disk alone."""
    path.write_bytes(os.urandom(size))
    sync(path)
    drop_cache(path)
    return path


def test_the_processes_of_a_node_share_a_list_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_share("abcde") == "abcde"
    found: list[str] = []
    for rank in range(3):
        ranks(monkeypatch, rank, 3)
        found += local_share("abcde")
    assert sorted(found) == list("abcde")


def test_the_processes_of_a_node_read_the_files_once_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 2 * MIB)
    monkeypatch.setattr(module, "READ", MIB)
    sizes = [5 * MIB + 17, 3 * MIB, 1]
    files = [written(tmp_path / str(k), size) for k, size in enumerate(sizes)]
    found: list[int] = []
    for rank in range(2):
        ranks(monkeypatch, rank, 2)
        found.append(read_ahead(files))
    assert all(found)
    assert sum(found) <= sum(sizes)  # the kernel itself reads somewhat ahead
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert read_ahead(files) == 0  # all of them are in memory now


def test_a_model_that_memory_has_no_room_for_is_not_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path / "weights", MIB)
    monkeypatch.setattr(module, "_available", lambda: MIB)
    assert read_ahead([file]) == 0


@pytest.mark.parametrize("bad", range(4))
def test_every_weight_is_checked_by_some_process_of_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    tensors = {f"w{k}": torch.zeros(3) for k in range(4)}
    tensors[f"w{bad}"][1] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    refused: list[str] = []
    for rank in range(3):
        ranks(monkeypatch, rank, 3)
        try:
            check_finite(torch.nn.Linear(1, 1), str(tmp_path), None, torch.float32)
        except ArtifactError as error:
            refused += error.problems
    (problem,) = refused
    assert f"1 of 3 values of w{bad} are NaN or infinite" in problem
