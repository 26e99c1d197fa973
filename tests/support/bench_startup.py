"""What passes before the work begins: `scripts/bench startup [--recipe NAME] [--runs N] [key=value …]`.

    commands    --help, plan, check, status: seconds by the clock and of the processor, with all that they start
    stages      from the start of torchrun to the first step: the process and its imports, rows, model and trainer

The commands and stages take turns. The parts are those that rank 0 itself counts (core/stopwatch.py). A stage is ended
when its first step begins. --json FILE keeps every run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_training import pipeline, spread, workspace

from pipeline.launchers.torchrun import command, environment, is_single, single_rank
from pipeline.workflow.progress import read_progress
from pipeline.workflow.stage import STAGES, read_spec

PARTS = ("start", "rows", "load")
POLL = 0.01
TICK = os.sysconf("SC_CLK_TCK")

Run = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench startup", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--stages", type=lambda words: words.split(","), default=["sft", "grpo", "evaluate"])
    parser.add_argument("--work", type=Path, help="a folder for rows and logs; default: temporary")
    parser.add_argument("--json")
    options = parser.parse_intermixed_args()
    with workspace(options) as runs:
        commands = measure_commands(options, runs)
        stages = measure_stages(options, runs)
    print("\n".join([*command_table(commands), "", *stage_table(stages)]))
    if options.json:
        Path(options.json).write_text(json.dumps({"commands": commands, "stages": stages}, indent=1), encoding="utf-8")


# ---------------------------------------------------------------- commands


def measure_commands(options: argparse.Namespace, runs: Path) -> dict[str, list[Run]]:
    given = [options.recipe, *options.overrides, "--runs", str(runs)]
    commands = {
        "--help": ["-m", "pipeline", "--help"],
        "plan": ["-m", "pipeline", "plan", *given],
        "check": ["-m", "pipeline", "check", *given],
        "status": ["-m", "pipeline", "status", "--runs", str(runs)],
    }
    commands |= {f"import pipeline.{stage}": ["-c", f"import pipeline.{stage}"] for stage in options.stages}
    found: dict[str, list[Run]] = {name: [] for name in commands}
    for run in range(options.runs + 1):  # the first reads the files from the disk
        for name, words in commands.items():
            one = timed([sys.executable, *words])
            if run:
                found[name].append(one)
    return found


def timed(words: Sequence[str]) -> Run:
    """Return the seconds of a command, by the clock and of the processor with its children."""
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    code, used = os.wait4(process.pid, 0)[1:]
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode:
        raise SystemExit(f"bench: {' '.join(words)} ended with exit code {process.returncode}")
    return {"seconds": time.perf_counter() - began, "processor": used.ru_utime + used.ru_stime}


def command_table(found: dict[str, list[Run]]) -> list[str]:
    lines = ["| command | s by the clock | s of the processor |", "|---|---|---|"]
    for name, runs in found.items():
        seconds, used = ([run[key] for run in runs] for key in ("seconds", "processor"))
        lines.append(f"| `{name}` | {spread(seconds, '.2f')} | {spread(used, '.2f')} |")
    return lines


# ---------------------------------------------------------------- stages


@dataclass(frozen=True)
class Prepared:
    """A step that is started as often as is asked for."""

    folder: Path
    spec: str


def measure_stages(options: argparse.Namespace, runs: Path) -> dict[str, list[Run]]:
    given = [options.recipe, *options.overrides, "--runs", str(runs)]
    pipeline(["run", *given, "--stages", "preprocess"])
    prepared = {stage: prepare(stage, given, runs) for stage in options.stages}
    found: dict[str, list[Run]] = {stage: [] for stage in prepared}
    for run in range(options.runs + 1):
        for stage, step in prepared.items():
            one = until_first_step(stage, step)
            print(f"{stage}, run {run}: {one['seconds']:.2f} s", file=sys.stderr)
            if run:
                found[stage].append(one)
    return found


def prepare(stage: str, given: Sequence[str], runs: Path) -> Prepared:
    """Prepare a step that needs no other one than preprocess: GRPO and the evaluation are of the base model."""
    words = [*given, "--stages", stage, *["--skip-sft"] * (stage == "grpo")]
    if stage == "evaluate":  # the rows are those of the folder, whose recipe is not named again
        words = [*given[1:], "--ckpt", str(next(runs.glob("*/preprocess-*/model"))), "--split", "test"]
    folder = Path(pipeline(["prepare", *words]).splitlines()[-1])
    return Prepared(folder, (folder / "step.json").read_text(encoding="utf-8"))


def until_first_step(stage: str, step: Prepared) -> Run:
    """Start a stage's processes, and end them when the first step begins. Returns the seconds until then."""
    shutil.rmtree(step.folder, ignore_errors=True)
    step.folder.mkdir(parents=True)
    (step.folder / "step.json").write_text(step.spec, encoding="utf-8")
    cluster = read_spec(step.folder).cluster
    began, settings = time.time(), environment(STAGES[stage], cluster, step.folder)
    settings |= single_rank() if is_single(STAGES[stage], cluster) else {}
    with (step.folder / "log.txt").open("w", encoding="utf-8") as log:
        words = command(STAGES[stage], step.folder, cluster)
        process = subprocess.Popen(words, stdout=log, stderr=log, env=settings, start_new_session=True)
        try:
            while True:
                progress = read_progress(step.folder)
                if progress and progress.state == "running":
                    begins = progress.since or progress.updated
                    parts = {name: progress.spent.get(name, 0.0) for name in PARTS}
                    return {"seconds": begins - began, "processor": processor_time(process.pid), **parts}
                if process.poll() is not None:
                    end = (step.folder / "log.txt").read_text(encoding="utf-8")[-3000:]
                    raise SystemExit(f"bench: {stage} ended with exit code {process.returncode}:\n{end}")
                time.sleep(POLL)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def processor_time(root: int) -> float:
    """Return the processor's seconds of a process and its descendants, and of those that they have waited for."""
    parents, ticks = {}, {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            fields = place.read_text(encoding="utf-8").rpartition(")")[2].split()
            parents[int(place.parent.name)] = int(fields[1])
            ticks[int(place.parent.name)] = sum(map(int, fields[11:15]))
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(ticks.get(pid, 0) for pid in family) / TICK


def stage_table(found: dict[str, list[Run]]) -> list[str]:
    heads = " | ".join(PARTS)
    lines = [f"| stage | s until its first step | {heads} | between | s of the processor, all processes |"]
    lines.append("|---" * (4 + len(PARTS)) + "|")
    for stage, runs in found.items():
        parts = [statistics.median(run[name] for run in runs) for name in PARTS]
        rest = statistics.median(run["seconds"] for run in runs) - sum(parts)
        cells = " | ".join(f"{part:.2f}" for part in [*parts, rest])
        used = statistics.median(run["processor"] for run in runs)
        lines.append(f"| {stage} | {spread([run['seconds'] for run in runs], '.2f')} | {cells} | {used:.1f} |")
    return lines


if __name__ == "__main__":
    main()
