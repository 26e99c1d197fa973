"""What the tests that load no torch share: stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from fake_slurm import COMMANDS, FAKE

from pipeline.core import slurm_client as slurm


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with stand-ins for Slurm's commands, first on PATH; `up` in it means that the controller answers."""
    folder = tmp_path / "fake"
    folder.mkdir()
    for name in COMMANDS:
        (folder / name).symlink_to(FAKE)
    (folder / "up").touch()
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name in ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    slurm.current_cluster.cache_clear()
    return folder
