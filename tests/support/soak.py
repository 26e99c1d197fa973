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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from running import ROOT, only
from slurm_lab import copy_steps, running_lab, slurm
from soak_faults import FAULTS, FOLDERS, INPUTS, SMALL, STEPS, Fault, Trial, step_of

from pipeline.core.files import read_json
from pipeline.workflow.artifact import HISTORY
from pipeline.workflow.progress import Progress

LONGEST = 240.0  # seconds until a run must be at work again
DISK = "320m"


# ---------------------------------------------------------------- a trial


@dataclass(frozen=True)
class Record:
    """What one fault did."""

    fault: str
    launcher: str
    stage: str
    lost: int  # committed steps, or rows, that had to be done again
    redone: int  # steps, or rows, that were done and not committed
    seconds: float  # until the work resumed
    scheduler: float  # of these, between the attempts: in Slurm's queue
    typed: int  # how often the command was typed again


def disturb(trial: Trial, faults: Sequence[Fault], report: Callable[[Record], None]) -> None:
    """Run the trial to its end with these faults on its way. Raises TimeoutError where it does not resume."""
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
        except (subprocess.CalledProcessError, KeyError) as error:  # what it would hit has just ended
            print(f"  {fault.name}: not injected, {error!r}", flush=True)
            continue
        if fault.passes:
            before, began = trial.progress(), time.monotonic()
        assert before is not None
        now = wait_until_it_goes_on(trial, before, fault)
        seconds = time.monotonic() - began
        trial.repair()
        if now is None:
            print(f"  {fault.name}: the step ended before it", flush=True)
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
    """Return the progress of the attempt that continues; None where the step was done before."""
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
        found["steps"] = str([step for step, _ in kept] == list(range(1, len(kept) + 1)))  # each once
    return found


def table(records: Sequence[Record]) -> str:
    """Return the table of docs/reliability.md."""
    lines = [
        "| fault | launcher | sft, grpo, evaluate | committed steps lost | others done again, at most "
        "| seconds until it resumed: median, most | without the queue's | typed again |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for fault in FAULTS.values():
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
        print("\n".join(f"{fault.name}  ({', '.join(fault.where)})" for fault in FAULTS.values()))
        return 0
    rng, records, problems, trials = random.Random(words.seed), [], [], 0
    # Slurm's queue takes time: two of three trials are local, so that more faults fit in an hour
    launchers = ["local", "slurm", "local"] if words.launcher == "both" else [words.launcher]
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
                        trial = Trial(runs, stage, lab if launcher == "slurm" else None, rng, two_nodes=two)
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
        for fault in FAULTS.values()
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
    parser.add_argument("--each", type=int, default=10, help="faults in a trial (default: 10)")
    parser.add_argument("--undisturbed", type=Path, metavar="RUNS", help="keep the undisturbed run there, or take it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one record for each fault")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="copy the folders of trials that failed")
    parser.add_argument("--list", action="store_true", help="print the faults")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
