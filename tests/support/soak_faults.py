"""A run that is disturbed, what is seen of it from outside, and the faults: what scripts/soak and tests/slurm share.

    trial = Trial(runs, "grpo", lab, random.Random(1))
    trial.type_command()
    FAULTS["rank 1 killed"].inject(trial)

Nothing here knows how the pipeline recovers: a trial looks at the files of its step, at /proc and at Slurm's queue.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from running import NANO, ROOT
from slurm_lab import Lab, slurm

from pipeline.core.files import read_json
from pipeline.workflow.artifact import is_done
from pipeline.workflow.progress import Progress, read_progress
from pipeline.workflow.signing import MANIFEST

STEPS = {"sft": 400, "grpo": 240, "evaluate": 480}  # optimizer steps, and rows of the main split
SAVE_STEPS = 5
SMALL = [
    *NANO,
    "task.params.phases=[{n: [3, 4], rows: 2400}]",
    "task.params.grpo_rows=480",
    f"task.params.test_rows={STEPS['evaluate']}",
    f"sft.max_steps={STEPS['sft']}",
    f"grpo.max_steps={STEPS['grpo']}",
    "grpo.max_completion_length=24",
    "evaluate.max_new_tokens=160",
    "evaluate.samples=4",
    "cluster.evaluate_batch_size=4",
    "cluster.hang_timeout=8",
    f"cluster.save_steps={SAVE_STEPS}",
]
FOLDERS = {"sft": "sft", "grpo": "grpo", "evaluate": "evaluate-base"}  # of the step that is disturbed
INPUTS = {
    "sft": ["preprocess"],
    "grpo": ["preprocess", "sft"],
    "evaluate": ["preprocess", "sft", "grpo", "evaluate-sft", "evaluate-grpo"],
}
PAUSE = 6.0  # seconds that a network, a node or a controller is away


# ---------------------------------------------------------------- a run, and what can be seen of it


@dataclass
class Trial:
    """One stage of one run, with its inputs in place."""

    runs: Path
    stage: str
    lab: Lab | None  # None: the local launcher
    rng: random.Random
    settings: Sequence[str] = tuple(SMALL)
    two_nodes: bool = False
    process: subprocess.Popen[bytes] | None = None
    typed: int = 0  # how often the command was
    after: list[Callable[[], None]] = field(default_factory=list)  # what puts the world right again

    @property
    def folder(self) -> Path:
        found = sorted(self.runs.glob(f"tiny/{FOLDERS[self.stage]}-*"))
        return found[0] if found else self.runs / "none"

    @property
    def done(self) -> bool:
        return is_done(self.folder)

    def type_command(self) -> None:
        """Type the run command, as the user does."""
        words = [sys.executable, "-m", "pipeline", "run", "tiny", *self.settings, "--stages", self.stage]
        words += ["--runs", str(self.runs)]
        if self.lab:
            words += ["--launcher", "slurm", "--cluster", str(self.lab.yaml)]
            words += ["--nodes", "2", "cluster.processes=1"] if self.two_nodes else []
        self.typed += 1
        with (self.runs / "stdout.txt").open("ab") as log:
            self.process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        if self.lab:
            self.process.wait()

    def ended(self) -> bool:
        """Return whether nothing will resume by itself."""
        if not self.lab:
            return self.process is None or self.process.poll() is not None
        states = "PENDING,RUNNING,COMPLETING,SUSPENDED,CONFIGURING,REQUEUED"
        done = subprocess.run(
            ["squeue", "--noheader", f"--states={states}", "--format=%i"], capture_output=True, text=True
        )
        job = self.job()
        return done.returncode == 0 and (job is None or job not in done.stdout.split())

    def job(self) -> str | None:
        record = read_json(self.folder / "job.json")
        return str(record["id"]) if isinstance(record, dict) and record.get("id") else None

    def node(self) -> str:
        return slurm("squeue", "--noheader", f"--jobs={self.job()}", "--format=%B")

    def progress(self) -> Progress | None:
        return read_progress(self.folder)

    def checkpoints(self) -> list[Path]:
        """Return the folders of checkpoints, the oldest first, whole or not."""
        return sorted(self.folder.glob("checkpoints/checkpoint-*"), key=step_of)

    def whole_checkpoints(self) -> list[Path]:
        return [path for path in self.checkpoints() if (path / MANIFEST).is_file()]

    def committed(self) -> int:
        """Return the steps, or rows, that must never have to be done again."""
        if self.stage != "evaluate":
            return max((step_of(path) for path in self.whole_checkpoints()), default=0)
        return sum(path.read_bytes().count(b"\n") for path in self.folder.glob("partial-*.jsonl"))

    def ranks(self) -> dict[int, int]:
        """Return the pid of each rank, as this machine counts them."""
        found = {}
        for pid, words in processes():
            if str(self.folder) in words and any(f"pipeline.{self.stage}" == word for word in words):
                with contextlib.suppress(OSError, StopIteration):
                    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    found[int(next(entry[5:] for entry in entries if entry.startswith(b"RANK=")))] = pid
        return found

    def all_processes(self) -> list[int]:
        return [pid for pid, words in processes() if any(str(self.runs) in word for word in words)]

    def end(self) -> None:
        """End whatever still runs."""
        self.repair()
        if self.lab and (job := self.job()):
            subprocess.run(["scancel", job], capture_output=True)
        kill(self.all_processes())

    def repair(self) -> None:
        while self.after:
            self.after.pop()()


def processes() -> Iterator[tuple[int, list[str]]]:
    """Yield each process but this one, with its command line."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if int(path.name) != os.getpid():
                yield int(path.name), words


def step_of(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def wait(condition: Callable[[], object], seconds: float, what: str) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            nodes = subprocess.run(["sinfo", "-N", "-o", "%N %T %P"], capture_output=True, text=True).stdout
            raise TimeoutError(f"no {what} in {seconds:.0f} s\n{nodes}")
        time.sleep(0.1)


def kill(pids: Sequence[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


# ---------------------------------------------------------------- the faults


def rank_killed(number: int) -> Callable[[Trial], None]:
    return lambda trial: kill([pid for rank, pid in trial.ranks().items() if rank == number])


def rank_stopped(trial: Trial) -> None:
    kill([pid for rank, pid in trial.ranks().items() if rank == 1], signal.SIGSTOP)


def every_process_killed(trial: Trial) -> None:
    if trial.lab:
        slurm("scancel", "--signal=KILL", "--full", str(trial.job()))
    else:
        kill(trial.all_processes())


def asked_to_stop(trial: Trial) -> None:
    """Ctrl-C; on Slurm the signal that comes before the time limit."""
    if trial.lab:
        slurm("scancel", "--signal=USR1", "--batch", str(trial.job()))
    elif trial.process:
        trial.process.send_signal(signal.SIGINT)


def in_a_save(fault: Callable[[Trial], None]) -> Callable[[Trial], None]:
    """Have a fault in the middle of a save: a checkpoint's folder is there, its manifest is not."""

    def inject(trial: Trial) -> None:
        until = time.monotonic() + 30
        while time.monotonic() < until and not trial.done:
            newest = trial.checkpoints()
            if trial.stage == "evaluate" or (newest and not (newest[-1] / MANIFEST).exists()):
                break
            time.sleep(0.002)
        fault(trial)

    return inject


def out_of_memory(trial: Trial) -> None:
    """Have the kernel kill rank 1 for memory, in a memory cgroup whose limit is reached.

    What it holds already is charged elsewhere, and its allocator may ask for nothing more, so another process of the
    group asks: the kernel takes rank 1, the largest of the two, then that one. Its parent joins before it can notice.
    """
    group = Path("/sys/fs/cgroup/memory") / f"soak-{os.getpid()}-{time.time_ns()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(6 << 20))
    pid = trial.ranks()[1]
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    kill([parent], signal.SIGSTOP)
    try:
        (group / "cgroup.procs").write_text(str(pid))
        greedy = ["sh", "-c", f"echo $$ > {group}/cgroup.procs && exec tail /dev/zero"]
        subprocess.run(greedy, stderr=subprocess.DEVNULL, timeout=60)
        wait(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z", 30, "kill of rank 1")
        (group / "memory.limit_in_bytes").write_text("-1")  # its parent continues
        (group / "cgroup.procs").write_text(str(parent))
    finally:
        kill([parent], signal.SIGCONT)

    def leave() -> None:
        for one in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (group.parent / "cgroup.procs").write_text(one)
        with contextlib.suppress(OSError):
            group.rmdir()

    trial.after.append(leave)


def disk_full(trial: Trial) -> None:
    """Fill the file system of the runs folder until the run has ended."""
    ballast = trial.runs.parent / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    trial.after.append(lambda: ballast.unlink(missing_ok=True))


def newest_damaged(trial: Trial) -> None:
    """End every process and turn a byte of the newest checkpoint's weights."""
    every_process_killed(trial)
    wait(lambda: not trial.ranks(), 30, "end of the processes")
    if trial.stage == "evaluate":  # the last line of what was answered is torn
        for path in trial.folder.glob("partial-*.jsonl"):
            with path.open("ab") as file:
                file.write(b'{"split": "te')
        return
    whole = trial.whole_checkpoints()
    if len(whole) > 1:
        path = max(whole[-1].rglob("*.safetensors"), key=lambda path: path.stat().st_size)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))


def suspended(trial: Trial) -> None:
    slurm("scontrol", "suspend", str(trial.job()))
    time.sleep(PAUSE)
    slurm("scontrol", "resume", str(trial.job()))


def preempted(mode: str, grace: int) -> Callable[[Trial], None]:
    """Have a job of a partition of a higher tier take all nodes."""

    def inject(trial: Trial) -> None:
        slurm("scontrol", "update", "PartitionName=main", f"PreemptMode={mode}", f"GraceTime={grace}")
        urgent = ["-p", "urgent", "-N4", "--exclusive", "-t", "1", "-o", "/dev/null", "--wrap", "sleep 1"]
        slurm("sbatch", "--parsable", *urgent)

    return inject


def node_lost(trial: Trial) -> None:
    node = trial.node()
    assert trial.lab
    trial.lab.node("crash", node)
    trial.after.append(lambda: back_up(trial, node))


def slurmd_lost(trial: Trial) -> None:
    """Kill the node's daemon alone: its processes go on while Slurm starts the job elsewhere."""
    node = trial.node()
    kill([pid for pid, words in processes() if words[:1] == ["/usr/sbin/slurmd"] and node in words])
    trial.after.append(lambda: back_up(trial, node))


def back_up(trial: Trial, node: str) -> None:
    assert trial.lab
    trial.lab.node("crash", node)
    trial.lab.node("up", node)
    ready = ("idle", "mixed", "allocated", "completing")
    wait(lambda: slurm("sinfo", "-h", "-p", "main", "-n", node, "-o", "%T") in ready, 90, f"{node} that is up")


def controller_restarted(trial: Trial) -> None:
    assert trial.lab
    pid = int((trial.lab.folder / "pid" / "slurmctld.pid").read_text())
    kill([pid])
    time.sleep(PAUSE)
    subprocess.run(["slurmctld"], check=True, capture_output=True)
    wait(lambda: subprocess.run(["squeue"], capture_output=True).returncode == 0, 60, "controller")


def network_paused(trial: Trial) -> None:
    """Drop every packet between the nodes for a while."""
    rule = ["INPUT", "-d", "127.0.1.0/24", "-j", "DROP"]
    subprocess.run(["iptables-legacy", "-A", *rule], check=True)
    time.sleep(PAUSE)
    subprocess.run(["iptables-legacy", "-D", *rule], check=True)


@dataclass(frozen=True)
class Fault:
    """One kind of fault; `passes`: the attempt that it hits may go on."""

    name: str
    inject: Callable[[Trial], object]
    where: tuple[str, ...] = ("local", "slurm")
    passes: bool = False
    two_nodes: bool = False
    damages: bool = False  # of the newest checkpoint: the one before it counts


KINDS = [
    Fault("stop requested (Ctrl-C; the signal before the limit)", asked_to_stop),
    Fault("every process killed", every_process_killed),
    Fault("every process killed during a save", in_a_save(every_process_killed)),
    Fault("rank 0 killed", rank_killed(0)),
    Fault("rank 1 killed", rank_killed(1)),
    Fault("rank 1 stopped (SIGSTOP)", rank_stopped),
    Fault("rank 1 out of host memory", out_of_memory),
    Fault("disk full", disk_full),
    Fault("newest checkpoint damaged", newest_damaged, damages=True),
    Fault("preempted by REQUEUE, 20 s of grace", preempted("REQUEUE", 20), ("slurm",)),
    Fault("preempted by REQUEUE, no grace", preempted("REQUEUE", 0), ("slurm",)),
    Fault("preempted by CANCEL, 20 s of grace", preempted("CANCEL", 20), ("slurm",)),
    Fault("preempted by CANCEL, no grace", preempted("CANCEL", 0), ("slurm",)),
    Fault("suspended and resumed", suspended, ("slurm",), passes=True),
    Fault("scancel", lambda trial: slurm("scancel", str(trial.job())), ("slurm",)),
    Fault("scontrol requeue", lambda trial: slurm("scontrol", "requeue", str(trial.job())), ("slurm",)),
    Fault("node lost its power", node_lost, ("slurm",)),
    Fault("node lost its power during a save", in_a_save(node_lost), ("slurm",)),
    Fault("slurmd lost, its processes alive", slurmd_lost, ("slurm",)),
    Fault("controller restarted", controller_restarted, ("slurm",), passes=True),
    Fault("network between two nodes paused", network_paused, ("slurm",), passes=True, two_nodes=True),
]


FAULTS = {fault.name: fault for fault in KINDS}
