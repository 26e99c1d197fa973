"""The command line: python -m pipeline run tiny, or `therefore run tiny`.

run       run what is not done yet, then print where everything is
plan      what would run, and why, field by field
status    how far each step is
list      recipes, tasks, rewards, stages, clusters
evaluate  any checkpoint: a step's folder, a Trainer checkpoint, an adapter, a model folder, a hub id
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline import __version__
from pipeline.artifact import is_alive, open_artifact, read_owner
from pipeline.errors import PlanError, RecipeError, did_you_mean, run_main
from pipeline.plan import RUNS, Plan, Step, evaluation_plan, explain, make_plan, order_of
from pipeline.progress import read_progress
from pipeline.recipe import recipe_names
from pipeline.stage import STAGES, write_order

EPILOG = """examples:
  python -m pipeline run tiny                              everything, from rows to report
  python -m pipeline run tiny grpo.beta=0.01               the same with one setting changed: SFT is not run again
  python -m pipeline run tiny --skip-sft                   GRPO from the base model
  python -m pipeline plan tiny                             what would run, and why
  python -m pipeline evaluate --ckpt runs/tiny/grpo-…      any checkpoint
"""


def main() -> None:
    run_main(lambda: command(sys.argv[1:]))


def command(argv: Sequence[str]) -> int:
    top = parser()
    args, rest = top.parse_known_args(argv)  # words may stand between options too
    flags = [word for word in rest if word.startswith("-")]
    if flags or (rest and not hasattr(args, "words")):
        raise PlanError(
            *(f"unknown option or word {word!r}: see python -m pipeline {argv[0]} --help" for word in flags or rest)
        )
    if rest:
        args.words += rest
    return int(args.run(args) or 0)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Therefore: preprocess → SFT → GRPO → evaluate → report, for a model that reasons.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: object, about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        sub.set_defaults(run=run)
        sub.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where steps live (default: runs)")
        return sub

    for name, run, about in (
        ("run", run_command, "run what is not done yet"),
        ("plan", plan_command, "what would run, and why"),
        ("prepare", prepare_command, "write one step's order and print its folder (torchrun by hand calls this)"),
    ):
        sub = add(name, run, about)
        sub.add_argument("words", nargs="+", metavar="RECIPE|key=value", help="recipes of configs/, and overrides")
        sub.add_argument("--cluster", default="local", help="a file of configs/clusters/ (default: local)")
        sub.add_argument("--stages", default="", metavar="A,B", help=f"only these: {', '.join(STAGES)}")
        sub.add_argument("--skip-sft", action="store_true", help="GRPO from the base model (grpo.start=base)")
        if name == "run":
            sub.add_argument("--dry-run", action="store_true", help="print the plan and start nothing")
    sub = add("status", status_command, "how far each step is")
    sub.add_argument("recipes", nargs="*", metavar="RECIPE", help="only these (default: all that have run)")
    sub.add_argument("--json", action="store_true", help="for scripts")
    add("list", list_command, "recipes, tasks, rewards, stages, clusters")
    sub = add("evaluate", evaluate_command, "ask any checkpoint a task's rows")
    sub.add_argument("--ckpt", required=True, help="a step's folder, a checkpoint, an adapter, a model, a hub id")
    sub.add_argument("words", nargs="*", metavar="RECIPE|key=value", help="default: what the checkpoint was made with")
    sub.add_argument("--task", help="a task by name (default: the recipe's)")
    sub.add_argument("--split", help="one split (default: the recipe's)")
    sub.add_argument("--limit", type=int, help="rows of each split")
    sub.add_argument("--cluster", default="local", help="a file of configs/clusters/ (default: local)")
    return top


def _plan(args: argparse.Namespace) -> Plan:
    names = [word for word in args.words if "=" not in word]
    overrides = [word for word in args.words if "=" in word]
    if not names:
        raise RecipeError(f"no recipe; name one or more of {', '.join(recipe_names())}")
    stages = [stage for stage in args.stages.split(",") if stage]
    return make_plan(names, overrides, cluster=args.cluster, stages=stages, skip_sft=args.skip_sft, runs=args.runs)


def run_command(args: argparse.Namespace) -> int:
    plan = _plan(args)
    if args.dry_run:
        return _show_plan(plan)
    from pipeline.launchers.local import run_plan

    if not plan.to_run:
        print("everything is done already; nothing to run")
    else:
        print(f"{len(plan.to_run)} of {len(plan.wanted)} steps to run, under {plan.runs}/", file=sys.stderr)
        run_plan(plan)
    _show_end(plan, _typed(args))
    return 0


def plan_command(args: argparse.Namespace) -> int:
    return _show_plan(_plan(args))


def _show_plan(plan: Plan) -> int:
    width = max(len(step.label) for step in plan.steps)
    for step in plan.steps:
        reasons = explain(step) if step.label in plan.wanted else ["done" if step.done else "not asked for"]
        state = "done" if step.done else "run " if step.label in plan.wanted else "-   "
        print(
            f"{state}  {step.label:<{width}}  {step.fingerprint}  {reasons[0] if reasons[0] != 'done' else ''}".rstrip()
        )
        for reason in reasons[1:]:
            print(f"{'':<{width + 20}}{reason}")
    print(f"\n{len(plan.to_run)} of {len(plan.wanted)} steps to run, under {plan.runs}/")
    return 0


def prepare_command(args: argparse.Namespace) -> int:
    """For a stage that torchrun started by hand: its order, in its folder. Every rank may call it."""
    plan = _plan(args)
    steps = [step for step in plan.steps if step.label in plan.wanted]
    if len(steps) != 1:
        which = ", ".join(step.label for step in steps)
        raise PlanError(f"torchrun runs one step, but {len(steps)} are asked for ({which}); use python -m pipeline run")
    if not steps[0].done:
        write_order(steps[0].folder, order_of(steps[0], plan.cluster))
    print(steps[0].folder)
    return 0


def _typed(args: argparse.Namespace) -> str:
    """The run that was asked for, to be typed again: every word but --stages and --dry-run."""
    words = list(args.words)
    words += ["--skip-sft"] if args.skip_sft else []
    words += ["--cluster", args.cluster] if args.cluster != "local" else []
    words += ["--runs", str(args.runs)] if args.runs != RUNS else []
    return shlex.join(["python", "-m", "pipeline", "run", *words])


def _show_end(plan: Plan, typed: str) -> None:
    """Where everything is, the headline numbers, and what to type next."""
    done = {step.name: step for step in plan.steps if step.done}
    report = next((step for step in plan.steps if step.stage == "report" and step.done), None)
    if report:
        print()
        print((report.folder / "summary.txt").read_text(encoding="utf-8").rstrip())
        print(f"\nreport    {report.folder}/report.html   (report.md and report.json beside it)")
    for step in plan.steps:
        if step.done and step.stage in ("sft", "grpo"):
            print(f"{step.label:<9} {step.folder}")
    last = done.get("grpo") or done.get("sft")
    print("\nnext:")
    if last:
        print(f"  python -m pipeline evaluate --ckpt {last.folder} --split validation")
    left = [step for step in plan.steps if not step.done]
    if left:
        print(f"  {typed}      ({len(left)} steps are left)")
    else:
        print(f"  {typed} grpo.beta=0.01      one setting changed; only what depends on it runs")


def status_command(args: argparse.Namespace) -> int:
    from pipeline.launchers.local import clock, describe

    unknown = [name for name in args.recipes if not (args.runs / name).is_dir()]
    if unknown:
        there = [path.name for path in args.runs.glob("*") if path.is_dir()]
        raise PlanError(*(f"{args.runs}/{name}: nothing has run; {did_you_mean(name, there)}" for name in unknown))
    table = []
    for folder in sorted(path.parent for path in args.runs.glob("*/*/step.json")):
        if args.recipes and folder.parent.name not in args.recipes:
            continue
        progress = read_progress(folder)
        owner = read_owner(folder)
        state = progress.state if progress else "waiting"
        if state in ("starting", "running", "saving") and not (owner and is_alive(owner)):
            state = "lost"  # its process is gone without a word: the same command goes on from its checkpoint
        table.append(
            {
                "step": f"{folder.parent.name}/{folder.name}",
                "state": state,
                "done": progress.done if progress else 0,
                "total": progress.total if progress else 0,
                "seconds": round(progress.seconds) if progress else 0,
                "attempt": progress.attempt if progress else 0,
                "what": describe(progress) if progress else "",
                "problems": list(progress.problems) if progress else [],
                "owner": str(owner) if owner else None,
                "updated": progress.updated if progress else None,
            }
        )
    table.sort(key=lambda row: (str(row["step"]).partition("/")[0], row["updated"] or 0))
    if args.json:
        print(json.dumps(table, indent=1))
        return 0
    if not table:
        print(f"nothing has run under {args.runs}/; begin with python -m pipeline run tiny")
        return 0
    width = max(len(str(row["step"])) for row in table)
    for row in table:
        progress_text = f"{row['done']}/{row['total']}" if row["total"] else ""
        seconds = clock(float(str(row["seconds"])))
        print(f"{row['state']:<9} {row['step']:<{width}} {progress_text:>13} {seconds:>8}  {row['what']}".rstrip())
        for problem in row["problems"]:  # type: ignore[attr-defined]
            print(f"{'':<10}{problem}")
    return 0


def list_command(args: argparse.Namespace) -> int:
    import dataclasses
    import importlib

    from pipeline.cluster import cluster_names
    from pipeline.recipe import CONFIGS
    from pipeline.rewards.reward import reward_names
    from pipeline.tasks.task import task_names

    print("recipes")
    for name in recipe_names():
        lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        print(f"  {name:<12} {lines[0].removeprefix('#').strip() if lines[0].startswith('#') else ''}")
    print("tasks")
    for name in task_names():
        task = importlib.import_module(f"pipeline.tasks.{name}").TASK
        print(f"  {name:<12} {task.title}; source: {', '.join(task.sources)}")
        for field in dataclasses.fields(task.Params):
            print(f"    task.params.{field.name} = {field.default}")
    print("rewards")
    for name in reward_names():
        about = importlib.import_module(f"pipeline.rewards.{name}").__doc__ or ""
        print(f"  {name:<12} {about.splitlines()[0]}")
    print("stages")
    for stage in STAGES.values():
        print(f"  {stage.name:<12} {stage.about}")
    print("clusters")
    print(f"  {', '.join(cluster_names())}")
    return 0


def evaluate_command(args: argparse.Namespace) -> int:
    from pipeline.launchers.local import run_plan

    plan = evaluation_plan(
        args.ckpt,
        args.words,
        task=args.task,
        split=args.split,
        limit=args.limit,
        cluster=args.cluster,
        runs=args.runs,
    )
    run_plan(plan)
    _show_metrics(plan.steps[0])
    return 0


def _show_metrics(step: Step) -> None:
    artifact = open_artifact(step.folder)
    for split, figures in artifact.metrics.items():
        print(f"{split}: {int(figures['all']['rows']['value'])} rows, {int(figures['all']['groups']['value'])} groups")
        for name in ("f1", "balanced_accuracy", "mcc", "accuracy", "unanswered", "tokens"):
            value = figures["all"][name]
            print(f"  {name:<18} {value['value']:7.3f}   {value['low']:.3f} … {value['high']:.3f}")
    print(f"\n{step.folder}/predictions.jsonl and metrics.json")


if __name__ == "__main__":
    main()
