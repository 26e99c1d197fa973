"""Start the processes of a stage on one node: their command and environment, and the rendezvous of a job's nodes.

    python -m pipeline.launchers.torchrun --step DIR      srun starts it on every node of a Slurm job

The rendezvous is at the job's first host (for one node at its loopback), at a port computed from the job's id and
attempt. TERM, USR1 and USR2 do not end a run but request a stop: a node that receives one writes the stop file. The
training processes, which Slurm may signal too, ignore them. Exits with the code of the stage: 0, 75 after a stop, 2, 1.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.config.cluster import Cluster, driver_devices, gpu_count, thread_count
from pipeline.core import cgroups
from pipeline.core.errors import EXIT_FAILURE, EXIT_STOPPED, PlanError, run_main
from pipeline.core.files import appears
from pipeline.core.slurm_client import first_host, this_job, this_restart, this_retry
from pipeline.sizing.engines import ENVIRONMENT as ENGINE_ENVIRONMENT
from pipeline.workflow import faults
from pipeline.workflow.artifact import ARTIFACT, STEP, STOP, is_done
from pipeline.workflow.attempts import HANG
from pipeline.workflow.progress import ATTEMPT, read_progress, this_attempt
from pipeline.workflow.stage import Stage, read_spec, stage_processes
from pipeline.workflow.watchdog import Watchdog, heartbeat_settings, heartbeats

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
PORTS = range(15_000, 30_000)  # below the system's ephemeral ports
HIDE_GPUS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}  # the user's own settings of torch's allocator
LOOPBACK = "127.0.0.1"
PORT_STRIDE = 7919  # distance between the ports of a job's attempts
RETRY_STRIDE = 1009  # and between those of an attempt's retries
SHUTDOWN_SECONDS = 10  # seconds that torchrun leaves the other processes after one has failed


@dataclass(frozen=True)
class Rendezvous:
    """The rendezvous of a job's nodes."""

    nodes: int
    host: str
    port: int
    id: str
    address: str | None = None  # of this node, for the others; None: the address that its name resolves to


def rendezvous(suffix: str | None = None) -> Rendezvous | None:
    """Return the rendezvous of the Slurm job that this process runs in; None outside of a job.

    A job of one node resolves no host name. `suffix` converts a node's name to its name on the fast network.
    """
    job = this_job()
    if job is None:
        return None
    attempt, retry, nodes = this_restart(), this_retry(), int(os.environ["SLURM_JOB_NUM_NODES"])
    name, port = f"{job}-{attempt}" + (f"-{retry}" if retry else ""), port_of(job, attempt, retry)
    if nodes == 1:
        return Rendezvous(1, LOOPBACK, port, name, LOOPBACK)
    first = fast_name(first_host(os.environ["SLURM_JOB_NODELIST"]), suffix)
    mine = fast_name(os.environ["SLURMD_NODENAME"], suffix) if suffix else None
    return Rendezvous(nodes, first, port, name, mine)


def fast_name(host: str, suffix: str | None) -> str:
    """Insert a suffix into a host name: node1 and -ib make node1-ib; node1.site makes node1-ib.site."""
    name, dot, domain = host.partition(".")
    return f"{name}{suffix or ''}{dot}{domain}"


def port_of(job: str, attempt: int = 0, retry: int = 0) -> int:
    """Return the port of a job's attempt. Consecutive jobs, which may share a node, get different ports.

    So do the attempts of a job, and the retries of an attempt: where only slurmd has died, or a network was cut,
    processes of the previous one still hold its port.
    """
    return PORTS[(int(job) + PORT_STRIDE * attempt + RETRY_STRIDE * retry) % len(PORTS)]


def command(stage: Stage, folder: Path, cluster: Cluster, at: Rendezvous | None = None) -> list[str]:
    """Return the argv that runs a stage's processes of this node. Outside of a job torchrun chooses the port.

    A process that is alone there needs no torchrun, whose own start takes seconds, but the variables of `single_rank`.
    """
    work = ["-m", stage.module, "--step", str(folder)]
    if stage.processes == "one" or is_single(stage, cluster, at):
        return [sys.executable, *work]
    where = ["--standalone"]
    if at:
        where = [f"--nnodes={at.nodes}", f"--rdzv-id={at.id}", "--rdzv-backend=c10d"]
        where += [f"--rdzv-endpoint={at.host}:{at.port}", "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT"]
        where += [f"--local-addr={at.address}"] * bool(at.address)
    count = stage_processes(stage, cluster)
    return [sys.executable, "-m", "pipeline.training.distributed", *where, f"--nproc-per-node={count}", *work]


def is_single(stage: Stage, cluster: Cluster, at: Rendezvous | None = None) -> bool:
    """Return whether a stage that has ranks runs as one process outside of a job."""
    return at is None and stage.processes == "all" and stage_processes(stage, cluster) == 1


def single_rank() -> dict[str, str]:
    """Return the variables that torchrun sets for the only process of a run."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return {**ranks, "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port)}


def environment(stage: Stage, cluster: Cluster, folder: Path | None = None) -> dict[str, str]:
    """Return the environment of the processes of a step in `folder`.

    Threads match cores: oversubscription costs a factor of fifty.
    """
    settings = {
        # DeepSpeed searches PATH for ninja, and the virtual environment may not be active
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "OMP_NUM_THREADS": str(thread_count(cluster, stage_processes(stage, cluster))),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        faults.PARENT: str(os.getpid()),  # the processes end with this parent
        "PYTHONHASHSEED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",  # libraries raise them for each other
    }
    if folder:
        settings["TRACKIO_DIR"] = str(folder.absolute() / "trackio")  # TRL imports trackio, which reads it only then
    if cluster.gpus == 0 or not gpu_count():
        # on a CPU, compiling takes a minute and a C++ compiler; eager mode takes milliseconds
        settings |= {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"} | dict.fromkeys(HIDE_GPUS, "")
    elif driver_devices()[0].startswith("nvidia") and not ALLOCATOR & os.environ.keys():
        settings["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # a growing cache then fragments memory less
    return {**ENGINE_ENVIRONMENT, **os.environ, **settings}


def run_on_node(folder: Path) -> int:
    """Run a step's processes of this node to their end. Returns the step's exit code."""
    if this_job():  # another node has written it
        appears(folder / STEP)
    spec = read_spec(folder)
    stage, attempt = spec.runs_as, this_attempt() or uuid.uuid4().hex
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: (folder / STOP).touch())
    kills = cgroups.memory_kills()
    at = rendezvous(spec.cluster.slurm.host_suffix)
    words = command(stage, folder, spec.cluster, at)
    settings = {**environment(stage, spec.cluster, folder), ATTEMPT: attempt}
    settings |= single_rank() if is_single(stage, spec.cluster, at) else {}
    settings["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SHUTDOWN_SECONDS)
    with heartbeats() as signs:
        settings |= heartbeat_settings(signs)
        process = subprocess.Popen(words, env=settings, preexec_fn=ignore_stop_signals)
        code, suspended = None, faults.StoppedProcesses(process.pid)
        watchdog = Watchdog(signs, hang_timeout(stage, spec.cluster), faults.POLL_SECONDS)
        while code is None:
            for warning in suspended.new():
                print(f"warning: {warning}", file=sys.stderr, flush=True)
            if hangs := watchdog.look():
                print(f"error: {hangs}", file=sys.stderr, flush=True)
                watchdog.dump(sys.stderr)
                watchdog.end(process)
                faults.record_failure(folder, [hangs], attempt, kind=HANG)
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(faults.POLL_SECONDS)
    if message := faults.record_death(folder, f"{spec.name} on {os.uname().nodename}", code, kills, attempt):
        print(f"error: {message}", file=sys.stderr, flush=True)
    return exit_code(folder, code, attempt)


def hang_timeout(stage: Stage, cluster: Cluster) -> int | Literal["auto"] | None:
    """Return `cluster.hang_timeout` for stages whose loops show signs of life; None for the others."""
    return cluster.hang_timeout if stage.resumable else None


def ignore_stop_signals() -> None:
    """Ignore TERM, USR1 and USR2, also after exec: Slurm signals every process, and only the launcher may act."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def exit_code(folder: Path, code: int, attempt: str) -> int:
    """Return the step's exit code from this attempt's progress file, whichever process ended first and how.

    Where every process of this node ended well, rank 0 has committed: its file may be seen late on other nodes.
    """
    if code == 0:
        appears(folder / ARTIFACT)
    if is_done(folder):
        return 0
    progress = read_progress(folder)
    if progress and progress.token == attempt and progress.state in ("stopped", "failed"):
        return EXIT_STOPPED if progress.state == "stopped" else progress.exit_code or EXIT_FAILURE
    early = [128 + number for number in STOP_SIGNALS]  # of a launcher that was signalled before it set its handlers
    return code if code > 0 and code not in early else EXIT_FAILURE


def main(argv: list[str]) -> int:
    if argv[:1] != ["--step"] or len(argv) != 2:
        raise PlanError("usage: python -m pipeline.launchers.torchrun --step DIR, where DIR is the folder of a step")
    return run_on_node(Path(argv[1]))


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
