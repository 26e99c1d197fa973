"""A real Slurm of four nodes with two pretend GPUs each, installed and started by the tests that need it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_lab import Lab

from pipeline.core import slurm_client

SCRIPTS = Path(__file__).parent / "cluster"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "slurmdbd", "mariadbd", "unshare")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "slurmdbd", "mariadb-server")
SBIN = "/usr/sbin:/sbin"
missing: list[str] = []  # why there is no cluster, for the summary


def install() -> str | None:
    """Install Slurm with apt where it is not there. Returns why that cannot be done."""
    os.environ["PATH"] += f":{SBIN}"
    if all(shutil.which(program) for program in PROGRAMS):
        return None
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "Slurm is not installed, and installing it takes root and apt"
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", *words], capture_output=True, text=True, env=quiet)
    if done.returncode:
        return f"apt-get install {' '.join(PACKAGES)} failed: {done.stderr.strip().splitlines()[-1:]}"
    return None


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The cluster; SLURM_CONF points at it as long as the tests run."""
    why = install()
    folder = Path(tempfile.mkdtemp(prefix="lab-"))  # a short path: munge's socket has to fit in 108 letters
    # below the ports that the system hands out, and not those of a cluster of another test run
    env = {**os.environ, "LAB": str(folder), "PORT": str(20_000 + os.getpid() % 400 * 20)}
    if why is None:
        with (folder / "start.log").open("w") as log:  # a file: the daemons keep what they inherit open
            started = subprocess.run(["bash", str(SCRIPTS / "start.sh")], env=env, stdout=log, stderr=log)
        why = f"it did not start: {(folder / 'start.log').read_text()[-500:]}" if started.returncode else None
    try:
        if why and os.environ.get("THEREFORE_REQUIRE_SLURM"):
            pytest.fail(f"no Slurm cluster: {why}")
        if why:
            missing.append(why)
            pytest.skip(f"no Slurm cluster: {why}")
        os.environ["SLURM_CONF"] = str(folder / "etc" / "slurm.conf")
        slurm_client.current_cluster.cache_clear()
        yield Lab(folder, SCRIPTS)
    finally:
        subprocess.run(["bash", str(SCRIPTS / "stop.sh")], env=env, check=True, capture_output=True)
        os.environ.pop("SLURM_CONF", None)
        slurm_client.current_cluster.cache_clear()
        shutil.rmtree(folder, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if missing:
        terminalreporter.section("THE TESTS ON A REAL SLURM CLUSTER DID NOT RUN", red=True, bold=True)
        terminalreporter.line(f"{missing[0]}. The launcher was tested against stand-ins for sbatch and squeue only.")
