"""The processes of a stage on one node: their command, their environment, and how a job's node starts them.

    python -m pipeline.launchers.torchrun --step DIR      on every node of a Slurm job, by srun: for one and for many

The nodes meet at the job's first host (one node at its own loopback), at a port that follows from the job's id and its
attempt. TERM, USR1 and USR2 are not the end of a run but the wish that it saves and leaves: whichever node receives one
writes the stop file, and the training processes, which Slurm may have signalled too, ignore them. Ends with the code of
the stage: 0, 75 after a stop, 2, 1.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.cluster import Cluster, driver_devices, gpu_count, thread_count
from pipeline.core import cgroups
from pipeline.core.errors import EXIT_FAILURE, EXIT_STOPPED, PlanError, run_main
from pipeline.core.slurm_client import first_host, this_job, this_restart
from pipeline.workflow import faults
from pipeline.workflow.artifact import STOP, is_done
from pipeline.workflow.progress import read_progress
from pipeline.workflow.stage import STAGES, Stage, read_spec, stage_processes

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
PORTS = range(15_000, 30_000)  # below those that the system hands out itself
HIDE_GPUS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}  # the user's own settings of torch's allocator
LOOPBACK = "127.0.0.1"
PORT_STRIDE = 7919  # between the ports of a job's attempts
SHUTDOWN_SECONDS = 10  # seconds that torchrun gives the other processes when one has failed


@dataclass(frozen=True)
class Rendezvous:
    """Where the nodes of a job meet."""

    nodes: int
    host: str
    port: int
    id: str
    address: str | None = None  # of this node, for the others; None: what its own name resolves to


def rendezvous(suffix: str | None = None) -> Rendezvous | None:
    """The meeting point of the Slurm job this runs in; None outside of one.

    One node needs no name that can be looked up. `suffix` turns a node's name into that of its fast network.
    """
    job = this_job()
    if job is None:
        return None
    attempt, nodes = this_restart(), int(os.environ["SLURM_JOB_NUM_NODES"])
    name = f"{job}-{attempt}"
    if nodes == 1:
        return Rendezvous(1, LOOPBACK, port_of(job, attempt), name, LOOPBACK)
    first = fast_name(first_host(os.environ["SLURM_JOB_NODELIST"]), suffix)
    mine = fast_name(os.environ["SLURMD_NODENAME"], suffix) if suffix else None
    return Rendezvous(nodes, first, port_of(job, attempt), name, mine)


def fast_name(host: str, suffix: str | None) -> str:
    """node1 and -ib make node1-ib; node1.site makes node1-ib.site."""
    name, dot, domain = host.partition(".")
    return f"{name}{suffix or ''}{dot}{domain}"


def port_of(job: str, attempt: int = 0) -> int:
    """A port for an attempt of a job: jobs that follow each other, and so may share a node, have different ones.

    So do a job's attempts: where only slurmd has died, processes of the one before still hold its port.
    """
    return PORTS[(int(job) + PORT_STRIDE * attempt) % len(PORTS)]


def command(stage: Stage, folder: Path, cluster: Cluster, at: Rendezvous | None = None) -> list[str]:
    """The argv that runs a stage's processes of this node. Outside of a job the port is torchrun's own choice."""
    work = ["-m", stage.module, "--step", str(folder)]
    if stage.processes == "one":
        return [sys.executable, *work]
    where = ["--standalone"]
    if at:
        where = [f"--nnodes={at.nodes}", f"--rdzv-id={at.id}", "--rdzv-backend=c10d"]
        where += [f"--rdzv-endpoint={at.host}:{at.port}", "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT"]
        where += [f"--local-addr={at.address}"] * bool(at.address)
    count = stage_processes(stage, cluster)
    return [sys.executable, "-m", "pipeline.training.distributed", *where, f"--nproc-per-node={count}", *work]


def environment(stage: Stage, cluster: Cluster) -> dict[str, str]:
    """The parent's environment with threads that fit the cores: oversubscription costs a factor of fifty."""
    settings = {
        # DeepSpeed looks for ninja there, also where the virtual environment is not active
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "OMP_NUM_THREADS": str(thread_count(cluster, stage_processes(stage, cluster))),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        faults.PARENT: str(os.getpid()),  # whose end is theirs
        "PYTHONHASHSEED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",  # of the libraries, to each other
    }
    if cluster.gpus == 0 or not gpu_count():
        # compiling costs a CPU a minute and a C++ compiler for what eager mode does in milliseconds
        settings |= {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"} | dict.fromkeys(HIDE_GPUS, "")
    elif driver_devices()[0].startswith("nvidia") and not ALLOCATOR & os.environ.keys():
        settings["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # a cache that grows leaves fewer holes
    return {**os.environ, **settings}


def run_on_node(folder: Path) -> int:
    """Run a step's processes of this node to their end. Returns the step's exit code."""
    order = read_spec(folder)
    stage, started = STAGES[order.stage], time.time()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: (folder / STOP).touch())
    kills = cgroups.memory_kills()
    process = subprocess.Popen(
        command(stage, folder, order.cluster, rendezvous(order.cluster.slurm.host_suffix)),
        env={**environment(stage, order.cluster), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS)},
        preexec_fn=ignore_stop_signals,
    )
    code, still = None, faults.StoppedProcesses(process.pid)
    while code is None:
        for warning in still.new():
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(faults.POLL_SECONDS)
    if sentence := faults.record_death(folder, f"{order.name} on {os.uname().nodename}", code, kills, started):
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    return exit_code(folder, code, started)


def ignore_stop_signals() -> None:
    """Slurm signals every process of a step; only the launcher shall act. What is ignored stays so over exec."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def exit_code(folder: Path, code: int, started: float) -> int:
    """The step's own code: what this attempt's progress file says, whichever process ended first and how."""
    if is_done(folder):
        return 0
    progress = read_progress(folder)
    if progress and progress.updated >= started and progress.state in ("stopped", "failed"):
        return EXIT_STOPPED if progress.state == "stopped" else progress.exit_code or EXIT_FAILURE
    early = [128 + number for number in STOP_SIGNALS]  # of a launcher that was signalled before it listened
    return code if code > 0 and code not in early else EXIT_FAILURE


def main(argv: list[str]) -> int:
    if argv[:1] != ["--step"] or len(argv) != 2:
        raise PlanError("usage: python -m pipeline.launchers.torchrun --step DIR, the folder of a step")
    return run_on_node(Path(argv[1]))


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
