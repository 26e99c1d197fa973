"""Fixtures: the project's root, and one small run of the whole pipeline."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings
from running import NANO, ROOT, run_cli

# the same examples in every run, and no clock: the machines are shared
settings.register_profile("therefore", deadline=None, derandomize=True)
settings.load_profile("therefore")

gc.disable()  # while tests are collected: what is imported stays
# begin first: one worker has a file
LONGEST = ("test_slurm", "test_resume", "test_training", "test_pipeline", "test_rehearsal")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="module", autouse=True)
def imports_are_not_collected() -> None:
    """Leave what is there already out of garbage collections: with torch loaded each one costs half a second."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def at_the_root() -> None:
    """Recipes and DeepSpeed files are found from the project's root, as a user has them."""
    os.chdir(ROOT)


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of one whole run: seven steps, ZeRO-2 for SFT, ZeRO-3 for GRPO, two processes."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared  # one run for all workers
    runs = shared / "nano" / "runs"
    with FileLock(shared / "nano.lock"):
        if not (runs / "stdout.txt").exists():
            done = run_cli("run", "tiny", *NANO, "--runs", str(runs))
            assert done.returncode == 0, done.stderr + "".join(p.read_text() for p in runs.glob("*/*/log.txt"))
            (runs / "stdout.txt").write_text(done.stdout)
    return runs
