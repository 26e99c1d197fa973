"""How long whole stages take: `scripts/bench pipeline|preprocess [--recipe NAME] [--runs N] [key=value …]`.

    pipeline      each stage of a whole run; --ref GITREV runs the same at another revision of the project, in turns.
                  A short run, unless --whole says that the recipe's own settings count
    preprocess    rows a second over a factor of 16 of rows, and for N = 3 to 6

A stage's seconds are those between its order (step.json) and its record (artifact.json), with the start of Python.
It prints a Markdown table; ratios are taken run by run. --json FILE keeps every run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench_training import FEW_ROWS, exponent, resolved, scaled_phases, spread, workspace

ROOT = Path(__file__).parents[2]
SHORT = [
    "sft.max_steps=100",
    "sft.optimizer.lr_scheduler_type=constant_with_warmup",
    "sft.optimizer.lr_scheduler_kwargs=null",
    "grpo.max_steps=2",
    "task.params.test_rows=100",
    "task.params.perturbed_rows=40",
]
ROWS = (1000, 4000, 16000)
N = (3, 4, 5, 6)

Seconds = dict[str, float]  # by stage, and `all` by the clock of the command


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("pipeline", "preprocess"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ref", help="pipeline: a revision of git to compare with")
    parser.add_argument("--whole", action="store_true", help="pipeline: with the recipe's own settings")
    parser.add_argument("--stages", help="pipeline: only these")
    parser.add_argument("--rows", type=lambda words: [int(n) for n in words.split(",")], default=ROWS)
    parser.add_argument("--n", type=lambda words: [int(n) for n in words.split(",")], default=N)
    parser.add_argument("--work", type=Path, help="a folder for what is made; default: temporary")
    parser.add_argument("--json")
    options = parser.parse_intermixed_args()
    with workspace(options) as runs:
        found = preprocess(options, runs) if options.command == "preprocess" else compare(options, runs)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


def run_once(project: Path, words: Sequence[str], runs: Path) -> Seconds:
    """Run the pipeline of a checkout into an empty folder. Returns the seconds of its steps."""
    shutil.rmtree(runs, ignore_errors=True)
    command = [sys.executable, "-m", "pipeline", "run", *words, "--runs", str(runs.absolute())]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"bench: {' '.join(command)} in {project}:\n{done.stderr[-3000:]}")
    found = {}
    for record in sorted(runs.glob("*/*/artifact.json"), key=lambda path: path.stat().st_mtime):
        ordered = record.with_name("step.json").stat().st_mtime
        found[record.parent.name.rpartition("-")[0]] = record.stat().st_mtime - ordered
    return {**found, "all": seconds}


# ---------------------------------------------------------------- a whole run


def compare(options: argparse.Namespace, runs: Path) -> dict[str, list[Seconds]]:
    """Run this checkout, and the one of `--ref`, in turns."""
    words = [options.recipe, *(() if options.whole else SHORT), *options.overrides]
    words += ["--stages", options.stages] if options.stages else []
    found: dict[str, list[Seconds]] = {}
    with contextlib.ExitStack() as stack:
        places = {"here": ROOT}
        if options.ref:
            places = {options.ref: stack.enter_context(checkout(options.ref)), **places}
        for run in range(options.runs):
            for name, project in places.items():
                one = run_once(project, words, runs)
                print(f"{name}, run {run + 1}: {one['all']:.1f} s", file=sys.stderr)
                found.setdefault(name, []).append(one)
    print("\n".join(stage_table(found, options.ref)))
    return found


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """Check a revision out beside the project while it is measured."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        project = Path(folder) / "project"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(project), revision], check=True)
        try:
            yield project
        finally:
            subprocess.run([*git, "remove", "--force", str(project)], check=True)


def stage_table(found: dict[str, list[Seconds]], ref: str | None) -> list[str]:
    here = found["here"]
    lines = (
        [f"| step | s here | s at {ref} | here ÷ {ref} |", "|---|---|---|---|"]
        if ref
        else ["| step | s |", "|---|---|"]
    )
    for name in dict.fromkeys(name for runs in found.values() for name in runs[0]):
        cells = [name, spread([run[name] for run in here], ".1f") if name in here[0] else "–"]
        if ref:
            there = found[ref]
            known = name in here[0] and name in there[0]
            cells.append(spread([run[name] for run in there], ".1f") if name in there[0] else "–")
            shares = [one[name] / other[name] for one, other in zip(here, there, strict=True)] if known else []
            cells.append(spread(shares, ".2f") if known else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# ---------------------------------------------------------------- preprocess


def preprocess(options: argparse.Namespace, runs: Path) -> dict[str, list[list[float]]]:
    """Print rows a second of the step that makes rows: first by their number, then by N."""
    recipe = resolved(options.recipe, options.overrides)
    most = max(options.rows)
    points = {f"rows, N as in {options.recipe}": [(rows, rows, None) for rows in options.rows]}
    points[f"N, {most} rows"] = [(n, most, n) for n in options.n]
    found: dict[str, list[list[float]]] = {}
    print("| what grows | values | s, median of each | rows/s | exponent |\n|---|---|---|---|---|")
    for name, axis in points.items():
        if len(axis) < 2:
            continue
        found[name] = [[] for _ in axis]
        for _ in range(options.runs):
            for place, (_, rows, n) in enumerate(axis):
                words = [*FEW_ROWS, "task.params.grpo_rows=8", *scaled_phases(recipe, rows, n)]
                words += [f"task.params.n=[{n}]"] if n else []
                words = [options.recipe, *words, *options.overrides, "--stages", "preprocess"]
                found[name][place].append(run_once(ROOT, words, runs)["preprocess"])
        seconds = [statistics.median(times) for times in found[name]]
        values = [value for value, *_ in axis]
        speeds = ", ".join(f"{rows / one:,.0f}" for (_, rows, _), one in zip(axis, seconds, strict=True))
        texts = ", ".join(f"{one:.1f}" for one in seconds)
        slope = exponent(values, seconds)
        print(f"| {name} | {', '.join(map(str, values))} | {texts} | {speeds} | {slope:.2f} |", flush=True)
    return found


if __name__ == "__main__":
    main()
