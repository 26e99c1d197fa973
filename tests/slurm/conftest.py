"""A real Slurm of four nodes with two pretend GPUs each, installed and started by the tests that need it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from slurm_lab import Lab, running_lab

missing: list[str] = []  # why there is no cluster, for the summary


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The cluster; SLURM_CONF points at it as long as the tests run."""
    with running_lab() as found:
        if isinstance(found, Lab):
            yield found
            return
        if os.environ.get("THEREFORE_REQUIRE_SLURM"):
            pytest.fail(f"no Slurm cluster: {found}")
        missing.append(found)
        pytest.skip(f"no Slurm cluster: {found}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if missing:
        terminalreporter.section("THE TESTS ON A REAL SLURM CLUSTER DID NOT RUN", red=True, bold=True)
        terminalreporter.line(f"{missing[0]}. The launcher was tested against stand-ins for sbatch and squeue only.")
