"""Faults, one after another, in runs that really train, until each run has ended: scripts/soak.

    scripts/soak --minutes 60 --seed 1                        both launchers, every fault, for an hour
    scripts/soak --minutes 5 --launcher local --stages grpo --faults "rank 1 killed"
    scripts/soak --list                                       the faults

An undisturbed run of a small `tiny` comes first. Then trials: one stage with the finished inputs of that run, which a
fault hits every few seconds at a random moment. Where a fault ends a run for good, the same command is typed again, as
a user would. In the end its weights, its history or its answers must be the undisturbed run's, byte for byte.

The real Slurm is that of the tests (root, apt). The runs folder is a small file system in memory, so that a full disk
is one. Only this script's own processes are hit. Exit code 1 where a result differs or a committed step was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from running import NANO, ROOT, only
from slurm_lab import Lab, copy_steps, running_lab, slurm

from pipeline.core.files import read_json
from pipeline.workflow.artifact import HISTORY, is_done
from pipeline.workflow.progress import Progress, read_progress
from pipeline.workflow.signing import MANIFEST

STEPS = {"sft": 150, "grpo": 40, "evaluate": 240}  # optimizer steps, and rows of the main split
SAVE_STEPS = 5
SMALL = [
    *NANO,
    "task.params.phases=[{n: [3, 4], rows: 1200}]",
    "task.params.grpo_rows=80",
    f"task.params.test_rows={STEPS['evaluate']}",
    f"sft.max_steps={STEPS['sft']}",
    f"grpo.max_steps={STEPS['grpo']}",
    "evaluate.max_new_tokens=160",
    "cluster.evaluate_batch_size=4",
    "cluster.hang_timeout=15",
    f"cluster.save_steps={SAVE_STEPS}",
]
FOLDERS = {"sft": "sft", "grpo": "grpo", "evaluate": "evaluate-grpo"}  # of the step that is disturbed
INPUTS = {
    "sft": ["preprocess"],
    "grpo": ["preprocess", "sft"],
    "evaluate": ["preprocess", "sft", "grpo", "evaluate-base", "evaluate-sft"],
}
LONGEST = 240.0  # seconds until a run must be at work again
DISK = "320m"
PAUSE = 10.0  # seconds that a network, a node or a controller is away


# ---------------------------------------------------------------- a run, and what can be seen of it


@dataclass
class Trial:
    """One stage of one run, with its inputs in place."""

    runs: Path
    stage: str
    lab: Lab | None  # None: the local launcher
    rng: random.Random
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
        words = [sys.executable, "-m", "pipeline", "run", "tiny", *SMALL, "--stages", self.stage]
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
        """Whether nothing will go on by itself."""
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
    """Have the kernel kill rank 1 for memory: it and its parent move to a memory cgroup without room."""
    group = Path("/sys/fs/cgroup/memory") / f"soak-{os.getpid()}-{time.time_ns()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(6 << 20))
    pid = trial.ranks()[1]
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    for one in (parent, pid):
        (group / "cgroup.procs").write_text(str(one))

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
    inject: Callable[[Trial], None]
    where: tuple[str, ...] = ("local", "slurm")
    passes: bool = False
    two_nodes: bool = False
    damages: bool = False  # of the newest checkpoint: the one before it counts


FAULTS = [
    Fault("asked to stop (Ctrl-C; the signal before the limit)", asked_to_stop),
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
    Fault("scancel", lambda trial: void(slurm("scancel", str(trial.job()))), ("slurm",)),
    Fault("scontrol requeue", lambda trial: void(slurm("scontrol", "requeue", str(trial.job()))), ("slurm",)),
    Fault("node lost its power", node_lost, ("slurm",)),
    Fault("node lost its power during a save", in_a_save(node_lost), ("slurm",)),
    Fault("slurmd lost, its processes alive", slurmd_lost, ("slurm",)),
    Fault("controller restarted", controller_restarted, ("slurm",), passes=True),
    Fault("network between two nodes paused", network_paused, ("slurm",), passes=True, two_nodes=True),
]


def void(_: object) -> None:
    """Return nothing."""


# ---------------------------------------------------------------- a trial


@dataclass(frozen=True)
class Record:
    """What one fault did."""

    fault: str
    launcher: str
    stage: str
    lost: int  # committed steps, or rows, that had to be done again
    redone: int  # steps, or rows, that were done and not committed
    seconds: float  # until the work went on
    scheduler: float  # of these, between the attempts: in Slurm's queue
    typed: int  # how often the command was typed again


def wait(condition: Callable[[], object], seconds: float, what: str) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            nodes = subprocess.run(["sinfo", "-N", "-o", "%N %T %P"], capture_output=True, text=True).stdout
            raise TimeoutError(f"no {what} in {seconds:.0f} s\n{nodes}")
        time.sleep(0.1)


def disturb(trial: Trial, faults: Sequence[Fault], report: Callable[[Record], None]) -> None:
    """Run the trial to its end with these faults on its way. Raises TimeoutError where it does not go on."""
    trial.type_command()
    reached = -1
    for fault in faults:
        wait_for_work(trial, reached, LONGEST)
        if trial.done:
            break
        time.sleep(trial.rng.uniform(0, 1.5))
        before, committed = trial.progress(), trial.committed()
        if fault.damages and trial.stage != "evaluate":
            whole = trial.whole_checkpoints()
            committed = step_of(whole[-2]) if len(whole) > 1 else committed
        typed, began = trial.typed, time.monotonic()
        try:
            fault.inject(trial)
        except (subprocess.CalledProcessError, KeyError):
            if wait_for_end_or_nothing(trial):
                break
            continue
        if fault.passes:
            before, began = trial.progress(), time.monotonic()
        assert before is not None
        now = wait_until_it_goes_on(trial, before, fault)
        seconds = time.monotonic() - began
        trial.repair()
        if now is None:  # it ended before the fault could hit it
            break
        again = now.attempt > before.attempt
        reached = trial.committed()
        report(
            Record(
                fault.name,
                "slurm" if trial.lab else "local",
                trial.stage,
                max(0, committed - now.first) if again else 0,
                max(0, before.done - now.first) if again else 0,
                seconds,
                queued(trial, seconds) if again else 0.0,
                trial.typed - typed,
            )
        )
    until = time.monotonic() + LONGEST
    while not trial.done:
        if time.monotonic() > until:
            raise TimeoutError(f"not done {LONGEST:.0f} s after the last fault")
        retype_if_ended(trial)
        time.sleep(0.1)


def wait_for_end_or_nothing(trial: Trial) -> bool:
    """Return whether the step was done at the moment of a fault that could not be injected."""
    time.sleep(1)
    return trial.done


def wait_for_work(trial: Trial, reached: int, seconds: float) -> None:
    """Wait until the step runs and has committed something new."""
    until = time.monotonic() + seconds
    while not trial.done:
        progress = trial.progress()
        if progress and progress.state == "running" and trial.committed() > max(reached, 0) and trial.ranks():
            return
        if time.monotonic() > until:
            raise TimeoutError(f"no work in {seconds:.0f} s: {progress}")
        retype_if_ended(trial)
        time.sleep(0.1)


def wait_until_it_goes_on(trial: Trial, before: Progress, fault: Fault) -> Progress | None:
    """Return the progress of the attempt that goes on; None where the step was done before."""
    until = time.monotonic() + LONGEST
    while True:
        if trial.done:
            return None
        now = trial.progress()
        if now and now.state == "running":
            if now.attempt > before.attempt and now.total:
                return now
            if fault.passes and now.done > before.done:
                return now
        if time.monotonic() > until:
            raise TimeoutError(f"{fault.name}: not at work again in {LONGEST:.0f} s: {now}")
        retype_if_ended(trial)
        time.sleep(0.05)


def retype_if_ended(trial: Trial) -> None:
    if not trial.ended() or trial.done:
        return
    trial.repair()
    time.sleep(1)  # between two states of a job that Slurm starts again, it is in none
    if trial.ended() and not trial.done:
        trial.type_command()


def queued(trial: Trial, seconds: float) -> float:
    """Return how long of the last seconds the job waited in the queue."""
    if not trial.lab:
        return 0.0
    told = slurm("squeue", "--noheader", f"--jobs={trial.job()}", "--states=all", "--format=%M")
    parts = [int(part) for part in told.replace("-", ":").split(":")] if told else [0]
    running = sum(part * 60.0**k for k, part in enumerate(reversed(parts)))
    return max(0.0, seconds - running)


# ---------------------------------------------------------------- results


def result(folder: Path, stage: str) -> dict[str, str]:
    """Return what must be equal: a hash of each file of weights, history and answers."""
    names = ["predictions.jsonl", "metrics.json"] if stage == "evaluate" else ["model/model.safetensors"]
    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:12] for name in names}
    if stage != "evaluate":
        history = read_json(folder / HISTORY)
        kept = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        found["history"] = hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:12]
        found["steps"] = str([step for step, _ in kept] == list(range(1, STEPS[stage] + 1)))
    return found


def table(records: Sequence[Record]) -> str:
    """Return the table of docs/reliability.md."""
    lines = [
        "| fault | launcher | sft, grpo, evaluate | committed steps lost | others done again, at most "
        "| seconds until it went on: median, most | without the queue's | typed again |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        for launcher in fault.where:
            mine = [one for one in records if (one.fault, one.launcher) == (fault.name, launcher)]
            if not mine:
                continue
            counts = ", ".join(str(sum(one.stage == stage for one in mine)) for stage in STEPS)
            trained = [one.redone for one in mine if one.stage != "evaluate"]
            rows = [one.redone for one in mine if one.stage == "evaluate"]
            redone = [f"{max(trained)} steps"] if trained else []
            redone += [f"{max(rows)} rows"] if rows else []
            seconds = [one.seconds for one in mine]
            own = [one.seconds - one.scheduler for one in mine]
            lines.append(
                f"| {fault.name} | {launcher} | {counts} | {sum(one.lost for one in mine)} | {', '.join(redone)} "
                f"| {statistics.median(seconds):.0f}, {max(seconds):.0f} | {statistics.median(own):.0f}, "
                f"{max(own):.0f} | {sum(one.typed for one in mine)} of {len(mine)} |"
            )
    return "\n".join(lines)


def main() -> int:
    words = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what it started is ended, too
    if words.list:
        print("\n".join(f"{fault.name}  ({', '.join(fault.where)})" for fault in FAULTS))
        return 0
    rng, records, problems, trials = random.Random(words.seed), [], [], 0
    launchers = ["local", "slurm"] if words.launcher == "both" else [words.launcher]
    place = Path(tempfile.mkdtemp(prefix="soak-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "soak", str(place)], check=True)

    def report(record: Record) -> None:
        records.append(record)
        print(f"  {json.dumps(asdict(record))}", flush=True)

    try:
        with contextlib.ExitStack() as stack:
            lab = stack.enter_context(running_lab()) if "slurm" in launchers else None
            if isinstance(lab, str):
                print(f"error: {lab}", file=sys.stderr)
                return 1
            if lab:
                lab.yaml  # noqa: B018 - writes the file
            undisturbed = words.undisturbed or place / "undisturbed"
            began = time.monotonic()
            whole = [sys.executable, "-m", "pipeline", "run", "tiny", *SMALL, "--runs", str(undisturbed)]
            subprocess.run(whole, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            print(f"undisturbed run: {time.monotonic() - began:.0f} s", flush=True)
            wanted = {stage: result(only(undisturbed, f"tiny/{FOLDERS[stage]}-*"), stage) for stage in STEPS}
            until = time.monotonic() + 60 * words.minutes
            bags: dict[tuple[str, str], list[Fault]] = {}
            while time.monotonic() < until:
                for launcher in launchers:
                    for stage in words.stages:
                        if time.monotonic() > until:
                            break
                        trials += 1
                        faults = draw(bags, launcher, stage, words, rng)
                        two = any(fault.two_nodes for fault in faults)
                        runs = place / f"trial-{trials}"
                        runs.mkdir()
                        copy_steps(undisturbed, runs, *INPUTS[stage])
                        trial = Trial(runs, stage, lab if launcher == "slurm" else None, rng, two)
                        print(f"trial {trials}: {stage} by {launcher}, {[fault.name for fault in faults]}", flush=True)
                        try:
                            disturb(trial, faults, report)
                            if (found := result(trial.folder, stage)) != wanted[stage]:
                                problems.append(f"trial {trials}: {stage} by {launcher}: {found} != {wanted[stage]}")
                        except TimeoutError as error:
                            problems.append(f"trial {trials}: {stage} by {launcher}: {error}")
                        finally:
                            trial.end()
                        if problems and problems[-1].startswith(f"trial {trials}:"):
                            print(f"PROBLEM {problems[-1]}", flush=True)
                            keep(trial, words.keep)
                        subprocess.run(["rm", "-rf", str(runs)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()
    lost = sum(record.lost for record in records)
    print(table(records))
    print(f"\n{len(records)} faults in {trials} trials; {trials - len(problems)} ended with the undisturbed result")
    print(f"committed steps lost: {lost}")
    print("\n".join(problems))
    if words.json:
        words.json.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))
    return 1 if problems or lost else 0


def draw(
    bags: dict[tuple[str, str], list[Fault]], launcher: str, stage: str, words: argparse.Namespace, rng: random.Random
) -> list[Fault]:
    """Draw the faults of a trial without replacement, so that each comes equally often."""
    chosen = [
        fault
        for fault in FAULTS
        if launcher in fault.where and (not words.faults or any(part in fault.name for part in words.faults))
    ]
    bag = bags.setdefault((launcher, stage), [])
    while len(bag) < words.each:
        bag += rng.sample(chosen, len(chosen))
    faults = bag[: words.each]
    del bag[: words.each]
    return faults


def keep(trial: Trial, folder: Path | None) -> None:
    """Copy a trial's folder, to be looked at."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", str(trial.runs), str(folder / f"{trial.runs.name}-{os.getpid()}")], check=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="begin no trial after these (default: 10)")
    parser.add_argument("--seed", type=int, default=1, help="of the order and the moments of the faults (default: 1)")
    parser.add_argument("--launcher", choices=["local", "slurm", "both"], default="both")
    parser.add_argument("--stages", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--faults", nargs="+", metavar="WORDS", help="only those whose names contain one of these")
    parser.add_argument("--each", type=int, default=5, help="faults in a trial (default: 5)")
    parser.add_argument("--undisturbed", type=Path, metavar="RUNS", help="keep the undisturbed run there, or take it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one record for each fault")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="copy the folders of trials that failed")
    parser.add_argument("--list", action="store_true", help="print the faults")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
