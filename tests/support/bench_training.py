"""How fast training is, beside what others use: `scripts/bench sft|grpo|growth [--recipe NAME] [key=value …]`.

    sft       real tokens a second (padding is not counted) of SFT on the recipe's own rows
    grpo      optimizer steps a second of GRPO on Corr2Cause prompts of N = 5 and 6, 8 completions each
    growth    the seconds of `ours` over a factor of 16: rows, N, width, group size, completion length; processes 1, 2

The ways are those of plain_training.py (`seed`, `trl`, `padded`) and `ours`: the stage of this project as its launcher
starts it. All of them train the same model on the same rows, with the same optimizer, batch and precision, in the same
number of processes; they take turns, so that all of them meet the same moments of a noisy machine. What is counted
lies between the end of a warm-up and the end of the last step (bench_worker.py); starting is `scripts/bench startup`.

It prints a Markdown table of medians with the least and the most; ratios are taken run by run. --json FILE keeps every
run. --profile adds where the seconds of `ours` went.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.recipe import Recipe, read
from pipeline.core.files import read_json
from pipeline.launchers.torchrun import command, environment, is_single, single_rank
from pipeline.workflow.stage import STAGES, read_spec

WORKER = Path(__file__).with_name("bench_worker.py")
PLAIN = {"sft": ("seed", "trl", "padded"), "grpo": ("seed", "trl")}
DEFAULT_WAYS = ["seed", "trl", "ours"]
STEPS = {"tiny": {"sft": 100, "grpo": 6}}  # optimizer steps of a run; others are larger
OTHER_STEPS = {"sft": 8, "grpo": 3}
WARMUP = {"sft": 0.1, "grpo": 1}  # steps before measuring; a share of them when below 1
GROUP = 8  # completions of a prompt
# what a whole run would decide is fixed: every row once, no schedule that needs a length, loss on completions alone
SETTINGS = {
    "sft": [
        "sft.epochs=1",
        "sft.max_steps=null",
        "sft.full_loss_fraction=0",
        "sft.eval_steps=null",
        "sft.early_stopping_patience=null",
        "sft.optimizer.lr_scheduler_type=constant_with_warmup",
        "sft.optimizer.lr_scheduler_kwargs=null",
    ],
    "grpo": [
        "grpo.init_from=base",
        "grpo.max_prompt_length=1536",
        f"grpo.num_generations={GROUP}",
        "grpo.optimizer.lr_scheduler_type=constant_with_warmup",
    ],
}
FEW_ROWS = ["task.params.validation_rows=0", "task.params.test_rows=20", "task.params.perturbed_rows=0"]

Run = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """A step that is prepared, and run as often as is asked for."""

    stage: str
    folder: Path
    spec: str  # the content of its step.json
    warmup: int
    log: Path

    def run(self, way: str, profile: bool = False) -> Run:
        """Train once, in processes of its own. Returns the sums and maxima over its processes."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        (self.folder / "step.json").write_text(self.spec, encoding="utf-8")
        stage, cluster, out = STAGES[self.stage], read_spec(self.folder).cluster, self.folder / "measured"
        words = command(stage, self.folder, cluster)
        options = ["--way", way, "--out", str(out), "--warmup", str(self.warmup), *["--profile"] * profile]
        words = [*words[: words.index(stage.module) - 1], str(WORKER), "--step", str(self.folder), *options]
        settings = environment(stage, cluster, self.folder) | (single_rank() if is_single(stage, cluster) else {})
        with self.log.open("w", encoding="utf-8") as log:
            code = subprocess.call(words, stdout=log, stderr=log, env=settings)
        ranks = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))]
        if code or not ranks:
            end = self.log.read_text(encoding="utf-8")[-3000:]
            raise SystemExit(f"bench: {way} ended with exit code {code}:\n{end}")
        record = read_json(self.folder / "artifact.json")  # of `ours`
        parts = {"parts": record["provenance"].get("seconds_by_part", {})} if record else {}
        return {**combined(ranks), **parts}


def combined(ranks: list[Run]) -> Run:
    """Return one record of all processes: sums of what each did, the longest time, rank 0's other figures."""
    sums = ("rate", "bandwidth", "places", "memory_gb", "completions", "completion_tokens", "prompt_tokens")
    found = {**ranks[0], **{name: sum(rank.get(name, 0) for rank in ranks) for name in sums}}
    if "seconds" in found:
        found["tokens"] = sum(rank["tokens"] for rank in ranks)
        found["seconds"] = max(rank["seconds"] for rank in ranks)
        found["generation_seconds"] = max(rank.get("generation_ms", 0) for rank in ranks) / 1000
    return found


# ---------------------------------------------------------------- what is run


def prepare(stage: str, recipe: str, words: Sequence[str], runs: Path, *, steps: int, ckpt: str | None = None) -> Bench:
    """Make the rows, and the step that trains on them."""
    shutil.rmtree(runs, ignore_errors=True)
    pipeline(["run", recipe, *words, "--stages", "preprocess", "--runs", str(runs)])
    folder = Path(pipeline(["prepare", recipe, *words, "--stages", stage, "--runs", str(runs)]).splitlines()[-1])
    spec = (folder / "step.json").read_text(encoding="utf-8")
    if ckpt:
        record = json.loads(spec)
        record["inputs"]["model"] = str(Path(ckpt).absolute())
        spec = json.dumps(record)
    warmup = WARMUP[stage]
    return Bench(stage, folder, spec, max(1, round(warmup * steps) if warmup < 1 else int(warmup)), runs / "log.txt")


def pipeline(words: Sequence[str]) -> str:
    done = subprocess.run([sys.executable, "-m", "pipeline", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bench: python -m pipeline {' '.join(words)}:\n{done.stderr[-3000:]}")
    return done.stdout


def overrides(stage: str, recipe_name: str, steps: int, words: Sequence[str], n: int | None = None) -> list[str]:
    """Return the overrides of a run of so many steps: the user's own come last."""
    settings = [*SETTINGS[stage], *words]
    recipe = resolved(recipe_name, settings)
    batch = recipe.training("sft" if stage == "sft" else "grpo").global_batch_size
    found = list(SETTINGS[stage])
    if recipe.task.name == "corr2cause":
        found += FEW_ROWS
        if stage == "sft":
            found += [*scaled_phases(recipe, steps * batch, n), "task.params.grpo_rows=8"]
        else:
            rows = -(-steps * batch // recipe.grpo.num_generations)
            found += [f"task.params.grpo_rows={rows}", *scaled_phases(recipe, 16, n)]
        found += [f"task.params.n=[{n}]"] if n else []
    if stage == "grpo":
        found.append(f"grpo.max_steps={steps}")
    return [*found, *words]


def scaled_phases(recipe: Recipe, rows: int, n: int | None) -> list[str]:
    """Return the override that makes so many SFT rows, in the proportions of the recipe's phases."""
    phases = [dict(phase) for phase in recipe.task.params.get("phases") or []]
    if n:
        phases = [{"n": [n], "rows": rows}]
    if not phases:
        return []
    total, given = sum(phase["rows"] for phase in phases), 0
    for phase in phases:
        phase["rows"] = max(1, rows * phase["rows"] // total)
        given += phase["rows"]
    phases[-1]["rows"] += max(0, rows - given)
    texts = ["{" + ", ".join(f"{key}: {value}" for key, value in phase.items()) + "}" for phase in phases]
    return [f"task.params.phases=[{', '.join(texts)}]"]


def resolved(name: str, words: Sequence[str]) -> Recipe:
    recipe, problems = read(name, [word for word in words if not word.startswith("cluster.")])
    if recipe is None:
        raise SystemExit("\n".join(problems))
    return recipe


def default_steps(options: argparse.Namespace, stage: str) -> int:
    return options.steps or STEPS.get(options.recipe, OTHER_STEPS)[stage]


def trained_model(options: argparse.Namespace) -> str | None:
    """Return the SFT model that GRPO begins with: the one that is named, else the newest of the recipe in runs/."""
    if options.ckpt or options.base:
        return options.ckpt if not options.base else None
    made = sorted(Path("runs", options.recipe).glob("sft-*/artifact.json"), key=lambda path: path.stat().st_mtime)
    return str(made[-1].parent) if made else None


# ---------------------------------------------------------------- commands


def main() -> None:
    options = read_options()
    with workspace(options) as runs:
        found = growth(options, runs) if options.command == "growth" else compare_all(options, runs)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("sft", "grpo", "growth"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, for every way")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, help="optimizer steps of a run")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--ways", type=lambda words: words.split(","), default=DEFAULT_WAYS)
    parser.add_argument("--n", type=lambda words: [int(n) for n in words.split(",")], default=[5, 6], help="of grpo")
    parser.add_argument("--ckpt", help="grpo: the SFT step to begin with; default: the recipe's newest in runs/")
    parser.add_argument("--base", action="store_true", help="grpo: begin with the recipe's initial weights")
    parser.add_argument("--axes", type=lambda words: words.split(","), help="growth: some of its axes")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--work", type=Path, help="a folder for rows and logs, which is emptied; default: temporary")
    parser.add_argument("--json")
    options = parser.parse_intermixed_args()
    known = [*PLAIN["sft" if options.command != "grpo" else "grpo"], "ours"]
    if unknown := [way for way in options.ways if way not in known]:
        parser.error(f"--ways: got {', '.join(unknown)}; expected some of {', '.join(known)}")
    if resolved(options.recipe, []).model.quantization != "none":
        parser.error(f"--recipe: got {options.recipe}, whose model is quantized; expected one that is not")
    return options


@contextlib.contextmanager
def workspace(options: argparse.Namespace) -> Iterator[Path]:
    if options.work:
        yield options.work
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        yield Path(folder) / "runs"


def compare_all(options: argparse.Namespace, runs: Path) -> Run:
    """Compare the ways; GRPO for each N."""
    stage, steps = options.command, default_steps(options, options.command)
    ckpt = trained_model(options) if stage == "grpo" else None
    words = [f"cluster.processes={options.processes}", *options.overrides]
    corr2cause = resolved(options.recipe, options.overrides).task.name == "corr2cause"
    found: Run = {}
    for n in options.n if stage == "grpo" and corr2cause else [None]:
        made = overrides(stage, options.recipe, steps, words, n)
        bench = prepare(stage, options.recipe, made, runs, steps=steps, ckpt=ckpt)
        title = f"{options.recipe}, {stage}" + (f", N = {n}" if n else "")
        cost = bench.run("machine")
        results = compare(bench, options, title)
        found[title] = {"machine": cost, "ways": results}
        print(f"\n{title}: {headline(bench, cost, options, ckpt)}\n")
        print("\n".join(sft_table(results, cost) if stage == "sft" else grpo_table(results)))
        if options.profile:
            if stage == "sft" and "ours" in results:
                print(roofline(results["ours"], cost, options.processes))
            print_profile(bench.run("ours", profile=True))
    return found


def compare(bench: Bench, options: argparse.Namespace, title: str) -> dict[str, list[Run]]:
    results: dict[str, list[Run]] = {way: [] for way in options.ways}
    for run in range(options.runs):
        for way in options.ways:
            one = bench.run(way)
            print(f"{title}, {way}, run {run + 1}: {one['steps']} steps in {one['seconds']:.2f} s", file=sys.stderr)
            results[way].append(one)
    return results


def headline(bench: Bench, cost: Run, options: argparse.Namespace, ckpt: str | None) -> str:
    spec = json.loads(bench.spec)
    settings = spec["recipe"][bench.stage]
    parts = [
        f"{cost['weights']:,} weights, {cost['precision']}",
        f"{settings['optimizer']['name']}, batches of {settings['global_batch_size']}",
        f"{options.processes} processes, {options.runs} runs in turns",
    ]
    if bench.stage == "sft":
        mean = cost["tokens"] / cost["rows"]
        parts.append(f"{cost['rows']} rows of {mean:.0f} tokens, the longest {cost['longest']}")
        parts.append(f"{cost['operations'] / cost['tokens'] / 1e6:.3g} million operations a token")
        if cost["orthogonalized"]:
            parts.append(f"muon {cost['orthogonalized'] / 1e9:.3g} billion a step")
    else:
        parts.append(f"from {'the SFT step' if ckpt else 'the initial weights'}")
    parts.append(f"this machine's products of these shapes: {cost['rate'] / 1e9:.3g} GFLOP/s")
    return ", ".join(parts)


# ---------------------------------------------------------------- tables


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    """`median (least … most)`"""
    return f"{statistics.median(values):{form}} ({min(values):{form}} … {max(values):{form}})"


def ratios(results: dict[str, list[Run]], way: str, speed: Callable[[Run], float]) -> str:
    """Return how many times faster a way is than the plain TRL script, run by run."""
    if "trl" not in results or way == "trl":
        return "1" if way == "trl" else "–"
    pairs = zip(results[way], results["trl"], strict=True)
    return spread([speed(one) / speed(other) for one, other in pairs], ".2f")


def sft_table(results: dict[str, list[Run]], cost: Run) -> list[str]:
    def speed(run: Run) -> float:
        return float(run["tokens"] / run["seconds"])

    needed = cost["operations"] / cost["tokens"]
    lines = [
        "| way | real tokens/s | ratio to trl | tokens a step | padding | memory, together | share of matmul rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, runs in results.items():
        last, speeds = runs[-1], [speed(run) for run in runs]
        padding = 1 - last["tokens"] / last["places"]
        share = statistics.median(speeds) * needed / cost["rate"]
        lines.append(
            f"| {way} | {spread(speeds)} | {ratios(results, way, speed)} | {last['tokens'] / last['steps']:,.0f} "
            f"| {padding:.0%} | {last['memory_gb']:.2f} GB | {share:.0%} |"
        )
    return lines


def grpo_table(results: dict[str, list[Run]]) -> list[str]:
    def speed(run: Run) -> float:
        return float(run["steps"] / run["seconds"])

    lines = [
        "| way | steps/s | ratio to trl | completions/s | completion tokens/s | s a step: generation + rest "
        "| tokens of a completion | groups without spread | memory, together |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for way, runs in results.items():
        last = runs[-1]
        generation = statistics.median(run["generation_seconds"] / run["steps"] for run in runs)
        rest = statistics.median((run["seconds"] - run["generation_seconds"]) / run["steps"] for run in runs)
        completions = statistics.median(run["completions"] / run["seconds"] for run in runs)
        tokens = statistics.median(run["completion_tokens"] / run["seconds"] for run in runs)
        lines.append(
            f"| {way} | {spread([speed(run) for run in runs], '.3f')} | {ratios(results, way, speed)} "
            f"| {completions:.1f} | {tokens:,.0f} | {generation:.2f} + {rest:.2f} "
            f"| {last['completion_tokens'] / last['completions']:.0f} | {last['flat_groups']:.0%} "
            f"| {last['memory_gb']:.2f} GB |"
        )
    return lines


def roofline(runs: Sequence[Run], cost: Run, processes: int) -> str:
    """Return what a step of `ours` needs at the rates of this machine, and what it took."""
    tokens = statistics.median(run["tokens"] / run["steps"] for run in runs)
    spent = statistics.median(run["seconds"] / run["steps"] for run in runs)
    operations, moved = tokens * cost["operations"] / cost["tokens"], processes * cost["bytes"]
    return (
        f"\na step of {tokens:,.0f} tokens: {operations / 1e9:.3g} billion operations, at the rate of products "
        f"{1000 * operations / cost['rate']:.0f} ms; muon {cost['orthogonalized'] / 1e9:.3g} billion, "
        f"{1000 * cost['orthogonalized'] / cost['rate']:.0f} ms; weights, gradients and moments {moved / 1e6:.3g} MB, "
        f"at {cost['bandwidth'] / 1e9:.3g} GB/s {1000 * moved / cost['bandwidth']:.1f} ms; it took "
        f"{1000 * spent:.0f} ms"
    )


def print_profile(run: Run) -> None:
    print("\nthe whole step, by part, as rank 0 counts it:\n")
    print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in run["parts"].items()))
    profile = run["profile"]
    total = sum(profile["seconds"].values())
    print("\nwhere the seconds of rank 0 went (with the profiler, which slows Python down):\n")
    print("| | s | share |\n|---|---|---|")
    for name, seconds in profile["seconds"].items():
        print(f"| {name} | {seconds:.2f} | {seconds / total:.0%} |")
    print("\n" + profile["table"])


# ---------------------------------------------------------------- growth


@dataclass(frozen=True)
class Axis:
    """A quantity that grows: its values, and the overrides of one of them."""

    stage: str
    values: tuple[int, ...]
    words: Callable[[int], list[str]]
    unit: str  # of the seconds: a run, or a step

    def steps(self, value: int, steps: int) -> int:
        return value if self.unit == "run" else steps


def wide(width: int) -> list[str]:
    heads = max(2, width // 32)
    shape = {"hidden_size": width, "intermediate_size": width * 11 // 4, "heads": heads, "key_value_heads": heads}
    return [f"model.random_init.{name}={value}" for name, value in shape.items()]


def group_of(size: int) -> list[str]:
    return [f"grpo.num_generations={size}", f"grpo.global_batch_size={4 * size}"]


AXES = {
    "sft rows": Axis("sft", (100, 400, 1600), lambda rows: [], "run"),
    "sft N": Axis("sft", (3, 4, 5, 6), lambda n: ["sft.max_length=2048"], "step"),
    "sft width": Axis("sft", (64, 256, 1024), wide, "step"),
    "sft processes": Axis("sft", (1, 2), lambda count: [f"cluster.processes={count}"], "step"),
    "grpo N": Axis("grpo", (3, 4, 5, 6), lambda n: [], "step"),
    "grpo group size": Axis("grpo", (2, 8, 32), group_of, "step"),
    "grpo completion length": Axis("grpo", (32, 128, 512), lambda n: [f"grpo.max_completion_length={n}"], "step"),
    "grpo width": Axis("grpo", (64, 256, 1024), wide, "step"),
    "grpo processes": Axis("grpo", (1, 2), lambda count: [f"cluster.processes={count}"], "step"),
}


def growth(options: argparse.Namespace, runs: Path) -> Run:
    """Print the seconds of `ours` along each axis, with the exponent that fits them. From the initial weights."""
    found: Run = {}
    print("| axis | values | s, median of each | exponent |\n|---|---|---|---|")
    for name in options.axes or AXES:
        axis = AXES[name]
        points = [point(options, runs, axis, value, n=value if name.endswith(" N") else 4) for value in axis.values]
        seconds = [statistics.median(of_run) for of_run in points]
        found[name] = {"values": axis.values, "seconds": points, "exponent": exponent(axis.values, seconds)}
        values, texts = ", ".join(map(str, axis.values)), ", ".join(f"{one:.3g}" for one in seconds)
        print(f"| {name} | {values} | {texts} a {axis.unit} | {found[name]['exponent']:.2f} |")
    return found


def point(options: argparse.Namespace, runs: Path, axis: Axis, value: int, n: int) -> list[float]:
    steps = axis.steps(value, options.steps or {"sft": 20, "grpo": 3}[axis.stage])
    # without a KL term the completions of initial weights, whose rewards are all 0, have no gradient to compute
    words = [f"cluster.processes={options.processes}", "grpo.beta=0.001", *axis.words(value), *options.overrides]
    made = overrides(axis.stage, options.recipe, steps, words, n)
    bench = prepare(axis.stage, options.recipe, made, runs, steps=steps)
    found = [bench.run("ours") for _ in range(options.runs)]
    times = steps if axis.unit == "run" else 1
    print(f"{axis.stage} {value}: {[round(one['seconds'], 2) for one in found]}", file=sys.stderr)
    return [one["seconds"] / one["steps"] * times for one in found]


def exponent(values: Sequence[int], seconds: Sequence[float]) -> float:
    """Return b of seconds = a · value^b, by least squares in logarithms."""
    x, y = [math.log(value) for value in values], [math.log(one) for one in seconds]
    return statistics.linear_regression(x, y).slope


if __name__ == "__main__":
    main()
