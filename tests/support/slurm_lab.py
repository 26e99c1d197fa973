"""A real Slurm of four virtual nodes: installed, started and stopped; nodes that lose power, jobs to wait for.

with running_lab() as lab:          lab is why there is none, or the cluster that SLURM_CONF points at
    lab.node("crash", "node1")
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from running import NANO, only, run_cli

from pipeline.cli.main import command
from pipeline.core import slurm_client

SCRIPTS = Path(__file__).parents[1] / "slurm" / "cluster"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "slurmdbd", "mariadbd", "unshare")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "slurmdbd", "mariadb-server")
SBIN = "/usr/sbin:/sbin"

YAML = """\
launcher: slurm
gpus: 2
threads: 1
slurm:
  cpus: 2
  memory: 2G
  time: {preprocess: 10m, sft: 10m, grpo: 10m, evaluate: 10m, report: 10m}
  signal_before_limit: 30
  environment: {THEREFORE_ALLOW_CPU: "1"}   # its GPUs are files without a driver
"""


@dataclass(frozen=True)
class Lab:
    """The running cluster."""

    folder: Path
    scripts: Path

    def node(self, what: str, name: str) -> None:
        """`up` or `crash` a node: crash is a power loss, every process of it gone at once."""
        with (self.folder / "nodes.log").open("a") as log:
            env = {**os.environ, "LAB": str(self.folder)}
            subprocess.run(
                ["bash", str(self.scripts / "node.sh"), what, name], env=env, stdout=log, stderr=log, check=True
            )

    @property
    def yaml(self) -> Path:
        """The cluster as configs/clusters/ would have it."""
        path = self.folder / "lab.yaml"
        path.write_text(YAML)
        return path


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


@contextlib.contextmanager
def running_lab() -> Iterator[Lab | str]:
    """Start the cluster, and stop it in the end; yields why there is none where it cannot be had."""
    why = install()
    folder = Path(tempfile.mkdtemp(prefix="lab-"))  # a short path: munge's socket has to fit in 108 letters
    # below the ports that the system hands out, and not those of a cluster of another test run
    env = {**os.environ, "LAB": str(folder), "PORT": str(20_000 + os.getpid() % 400 * 20)}
    if why is None:
        with (folder / "start.log").open("w") as log:  # a file: the daemons keep what they inherit open
            started = subprocess.run(["bash", str(SCRIPTS / "start.sh")], env=env, stdout=log, stderr=log)
        why = f"it did not start: {(folder / 'start.log').read_text()[-500:]}" if started.returncode else None
    try:
        if why is None:
            os.environ["SLURM_CONF"] = str(folder / "etc" / "slurm.conf")
            slurm_client.current_cluster.cache_clear()
        yield Lab(folder, SCRIPTS) if why is None else why
    finally:
        subprocess.run(["bash", str(SCRIPTS / "stop.sh")], env=env, check=True, capture_output=True)
        os.environ.pop("SLURM_CONF", None)
        slurm_client.current_cluster.cache_clear()
        shutil.rmtree(folder, ignore_errors=True)


def slurm(*command: str) -> str:
    """A command of Slurm's, its output."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def submit(lab: Lab, runs: Path, *words: str, recipes: tuple[str, ...] = ("tiny",), launcher: str = "slurm") -> str:
    """`python -m pipeline run tiny … --launcher slurm`; returns what it printed."""
    options = ["--cluster", str(lab.yaml), "--launcher", launcher, "--runs", str(runs)]
    done = run_cli("run", *recipes, *NANO, *words, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(runs: Path) -> dict[str, dict[str, Any]]:
    """`status --json`, by step without its fingerprint; in this process, because tests wait for what it says."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert command(["status", "--json", "--runs", str(runs)]) == 0
    return {row["step"].rpartition("-")[0]: row for row in json.loads(told.getvalue())}


def wait_until(condition: Callable[[], object], runs: Path, what: str, seconds: float = 400) -> None:
    """Wait for a condition; where it does not come, show how the steps stand and what they have printed."""
    until = time.time() + seconds
    while not condition():
        if time.time() > until:
            logs = "".join(f"== {p}\n{p.read_text(errors='replace')[-1500:]}" for p in runs.glob("*/*/**/*log*"))
            raise AssertionError(f"no {what} in {seconds} s\n{run_cli('status', '--runs', str(runs)).stdout}\n{logs}")
        time.sleep(0.2)


def wait_for_end(runs: Path, seconds: float = 400) -> dict[str, dict[str, Any]]:
    """Wait until nothing is under way, then return the rows."""
    live = ("queued", "starting", "running", "saving", "ending")
    wait_until(lambda: not any(row["state"] in live for row in rows(runs).values()), runs, "end of the chain", seconds)
    return rows(runs)


def has_ended(job: str) -> bool:
    """Whether a job is over, and its epilogue too; one that Slurm starts again is not, in any of its states between."""
    return slurm("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T") in slurm_client.FINAL_STATES


def copy_steps(source: Path, runs: Path, *names: str) -> None:
    """Put finished steps of another run in place, so that a test begins where it is about."""
    for name in names:
        folder = only(source, f"tiny/{name}-*")
        shutil.copytree(folder, runs / "tiny" / folder.name)


def jobs_of(runs: Path) -> dict[str, str]:
    """The job's id of each step that has one."""
    found = {}
    for path in runs.glob("*/*/job.json"):
        name = f"{path.parent.parent.name}/{path.parent.name.rpartition('-')[0]}"
        if job := json.loads(path.read_text())["id"]:
            found[name] = job
    return found


def is_running(runs: Path, step: str) -> bool:
    """Whether a step's own processes are at work: they hold its owner file."""
    return bool(list(runs.glob(f"tiny/{step}-*/owner.json")))
