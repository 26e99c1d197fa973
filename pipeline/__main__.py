"""The command line: python -m pipeline run tiny, or `therefore run tiny`.

run       run what is not done yet, here or on Slurm
plan      what would run, and why, field by field; --memory: what each stage needs of a GPU
check     everything that would fail later, known now
status    how far each step is, here and on Slurm
logs      what a step has printed; -f goes on
cancel    end what waits or runs; what is done stays
fetch     download a recipe's model to the local cache, for nodes without internet
list      recipes, tasks, rewards, stages, clusters
ask       any checkpoint a question: thought and answer as they are written
export    any checkpoint for others: adapter, merged in 16 or 4 bit, GGUF
evaluate  any checkpoint: a step's folder, a Trainer checkpoint, an adapter, a model folder, a hub id
audit     a file of a task's rows: which labels are wrong, by the task's exact solver
generate  a task's rows as parquet files with a data card
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline import __version__, refresh, slurm, status
from pipeline.artifact import open_artifact
from pipeline.errors import (
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    DataError,
    MissingDependency,
    PipelineError,
    PlanError,
    RecipeError,
    printable,
    run_main,
)
from pipeline.families import FORMATS, QUANTS
from pipeline.files import read_text
from pipeline.fingerprint import plain
from pipeline.jobs import claim
from pipeline.plan import RUNS, Plan, Step, evaluation_plan, explain, export_plan, make_plan, order_of, recipe_of
from pipeline.recipe import recipe_names
from pipeline.records import LARGEST
from pipeline.stage import STAGES, write_order

# of a process that answers at once: no warnings of the libraries to each other, no half a minute of compiling
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
EPILOG = """examples:
  python -m pipeline run tiny                              everything, from rows to report
  python -m pipeline run tiny grpo.beta=0.01               the same with one setting changed: SFT is not run again
  python -m pipeline run tiny --skip-sft                   GRPO from the base model
  python -m pipeline run tiny --refresh changed            steps whose task or rewards were edited, and what needs them
  python -m pipeline run tiny --launcher slurm             the same as a chain of Slurm jobs
  python -m pipeline status --watch                        how far they are
  python -m pipeline plan tiny                             what would run, and why
  python -m pipeline evaluate --ckpt runs/tiny/grpo-…      any checkpoint
  python -m pipeline ask --ckpt runs/tiny/grpo-… "…"       a question of your own
  python -m pipeline export --ckpt runs/tiny/grpo-… --format gguf
"""


AUDIT = """Find the rows of a file whose label is wrong, whose premise no graph fits, or that cannot be read.
Exit code 0: every row is right; 1: not; 2: the file cannot be read."""


GENERATE = """Every claim about every class of N variables (drawn classes from N = 7 on), split by canonical class.
The same seed gives the same bytes, whatever the number of processes."""


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
        ("check", check_command, "everything that would fail later, known now"),
        ("prepare", prepare_command, "write orders and print the folders (torchrun by hand and batch scripts do)"),
    ):
        sub = add(name, run, about)
        words = "*" if name == "prepare" else "+"  # prepare --ckpt needs none
        sub.add_argument("words", nargs=words, metavar="RECIPE|key=value", help="recipes of configs/, and overrides")
        where(sub)
        sub.add_argument("--stages", default="", metavar="A,B", help=f"only these: {', '.join(STAGES)}")
        sub.add_argument("--skip-sft", action="store_true", help="GRPO from the base model (grpo.start=base)")
        sub.add_argument("--rehearse", action="store_true", help="the same in small: every wire tried, no result")
        if name in ("run", "plan"):
            about = "make these again where the code of their task or rewards has changed, or all such: changed"
            sub.add_argument("--refresh", default="", metavar="A,B", help=about)
        if name == "run":
            sub.add_argument(
                "--dry-run", action="store_true", help="print the plan, or the batch scripts, and start nothing"
            )
        if name == "check":
            sub.add_argument("--audit", action="store_true", help="replay the known exploits against the rewards too")
        if name == "plan":
            sub.add_argument("--memory", action="store_true", help="what each stage needs of a GPU, term by term")
        if name == "prepare":
            evaluation(sub, required=False)
            exporting(sub, required=False)
    sub = add("status", status_command, "how far each step is, here and on Slurm")
    sub.add_argument("recipes", nargs="*", metavar="RECIPE", help="only these (default: all that have run)")
    sub.add_argument(
        "--watch",
        action="store_true",
        help="again every 2 seconds (Slurm is queried every 30), until nothing is under way",
    )
    sub.add_argument("--all", action="store_true", help="older steps of the same name too")
    sub.add_argument("--json", action="store_true", help="for scripts")
    sub = add("logs", logs_command, "what a step has printed")
    sub.add_argument("step", metavar="STEP", help="grpo, tiny/grpo, its folder, or its job's id")
    sub.add_argument("-f", "--follow", action="store_true", help="go on until the step ends")
    sub = add("cancel", cancel_command, "end what waits or runs; what is done stays, and what runs may save")
    sub.add_argument("names", nargs="*", metavar="RECIPE|STEP", help="only these (default: everything)")
    sub.add_argument("--yes", action="store_true", help="do not ask")
    sub = add("fetch", fetch_command, "download a recipe's model to the local cache, for nodes without internet")
    sub.add_argument("words", nargs="+", metavar="RECIPE|key=value", help="recipes of configs/, and overrides")
    where(sub)
    add("list", list_command, "recipes, tasks, rewards, stages, clusters")
    sub = add("ask", ask_command, "ask any checkpoint a question, and watch the answer being written")
    sub.add_argument("question", nargs="?", help="in quotes; - reads it from stdin; --chat needs none")
    sub.add_argument("words", nargs="*", metavar="RECIPE|key=value", help="default: what the checkpoint was made with")
    about = "a step's folder, a checkpoint, an adapter, a model, a hub id; several are asked side by side"
    sub.add_argument("--ckpt", action="append", required=True, metavar="DIR", help=about)
    sub.add_argument("--chat", action="store_true", help="go on with questions from stdin, one a line")
    sub.add_argument("--sample", action="store_true", help="draw the answer as the recipe does (default: greedy)")
    sub.add_argument("--temperature", type=float, metavar="T", help="draw it at this temperature; 0 is greedy")
    sub.add_argument("--top-p", type=float, metavar="P", help="from the likeliest tokens that make up this share")
    sub.add_argument("--top-k", type=int, metavar="K", help="from this many tokens; 0: all")
    sub.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens of an answer (default: the recipe's)")
    sub.add_argument("--seed", type=int, metavar="N", help="another seed draws another answer")
    sub = add("export", export_command, "any checkpoint for others: adapter, merged model, GGUF, with its card")
    sub.add_argument("words", nargs="*", metavar="RECIPE|key=value", help="default: what the checkpoint was made with")
    exporting(sub, required=True)
    sub.add_argument("--out", type=Path, metavar="DIR", help="where to (default: a folder of runs/exports/)")
    sub.add_argument("--push", metavar="OWNER/NAME", help="upload it to the hub, as a private repository")
    sub.add_argument("--public", action="store_true", help="with --push: a repository that everyone can read")
    where(sub)
    sub.set_defaults(dry_run=False)
    sub = add("evaluate", evaluate_command, "ask any checkpoint a task's rows")
    sub.add_argument("words", nargs="*", metavar="RECIPE|key=value", help="default: what the checkpoint was made with")
    evaluation(sub, required=True)
    where(sub)
    sub.set_defaults(dry_run=False)
    sub = commands.add_parser("audit", help="a file of rows: which labels are wrong", description=AUDIT)
    sub.set_defaults(run=audit_command)
    sub.add_argument("task", choices=["corr2cause"], help="the task whose rows they are")
    sub.add_argument("--data", type=Path, required=True, metavar="FILE", help="csv, json, jsonl or parquet")
    sub.add_argument(
        "--semantics", choices=["wording", "published", "plusplus"], default="wording", help="of the claims"
    )
    sub.add_argument("--paper", action="store_true", help="count the rows that the published program makes, too")
    sub.add_argument("--json", action="store_true", help="for scripts: every row that is wrong")
    sub = commands.add_parser("generate", help="a task's rows as parquet files with a data card", description=GENERATE)
    sub.set_defaults(run=generate_command)
    sub.add_argument("task", choices=["corr2cause"], help="the task")
    sub.add_argument("words", nargs="*", metavar="key=value", help="of the task's params: mode=paper style=story …")
    sub.add_argument("--n", required=True, metavar="N", help="numbers of variables, 2 to 10: 6, or 3,5 or 2-6")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--copies", type=int, default=1, metavar="K", help="each claim under K renamings (default: 1)")
    sub.add_argument("--proofs", choices=["none", "short", "full"], default="none", help="in the completions")
    sub.add_argument("--processes", type=int, default=1, metavar="P", help="the bytes do not depend on it")
    return top


def where(sub: argparse.ArgumentParser) -> None:
    """Where it runs: the options of every command that makes a plan."""
    sub.add_argument("--cluster", help="a file of configs/clusters/ (default: local, or slurm with such a launcher)")
    sub.add_argument("--launcher", choices=["local", "slurm", "submitit"], help="the same as cluster.launcher=…")
    sub.add_argument("--nodes", type=int, metavar="N", help="of a training stage or an evaluation: cluster.nodes=N")


def evaluation(sub: argparse.ArgumentParser, *, required: bool) -> None:
    """What is evaluated."""
    about = "a step's folder, a checkpoint, an adapter, a model, a hub id"
    sub.add_argument("--ckpt", required=required, help=about if required else argparse.SUPPRESS)
    sub.add_argument("--task", help="a task by name (default: the recipe's)" if required else argparse.SUPPRESS)
    sub.add_argument("--split", help="one split (default: the recipe's)" if required else argparse.SUPPRESS)
    sub.add_argument("--limit", type=int, help="rows of each split" if required else argparse.SUPPRESS)


def exporting(sub: argparse.ArgumentParser, *, required: bool) -> None:
    """What is exported, and as what."""
    about = "a step's folder, a checkpoint, an adapter, a model, a hub id"
    if required:
        sub.add_argument("--ckpt", required=True, metavar="DIR", help=about)
    told = "; ".join(f"{name}: {text[0].lower()}{text[1:].rstrip('.')}" for name, text in FORMATS.items())
    sub.add_argument("--format", required=required, choices=list(FORMATS), help=told if required else argparse.SUPPRESS)
    told = "of a GGUF file (default: q8_0); q4_k_m needs llama-cpp-python"
    sub.add_argument("--quant", choices=QUANTS, help=told if required else argparse.SUPPRESS)


def cluster_of(args: argparse.Namespace) -> tuple[str, list[str]]:
    """The cluster that the options name, and what they change in it."""
    name = args.cluster or ("slurm" if args.launcher in ("slurm", "submitit") else "local")
    changes = [f"cluster.launcher={args.launcher}"] * bool(args.launcher)
    return name, changes + [f"cluster.nodes={args.nodes}"] * (args.nodes is not None)


def _plan(args: argparse.Namespace, changes: Sequence[str] = ()) -> Plan:
    """The plan that the words and options ask for; `changes` are overrides that theirs come after."""
    names = [word for word in args.words if "=" not in word]
    overrides = [word for word in args.words if "=" in word]
    if not names:
        raise RecipeError(f"no recipe; name one or more of {', '.join(recipe_names())}")
    stages = [stage for stage in args.stages.split(",") if stage]
    cluster, more = cluster_of(args)
    overrides = [*changes, *more, *overrides]
    return make_plan(
        names,
        overrides,
        cluster=cluster,
        stages=stages,
        skip_sft=args.skip_sft,
        rehearse=args.rehearse,
        runs=args.runs,
    )


def run_command(args: argparse.Namespace) -> int:
    plan = _plan(args)
    if args.refresh:
        outdated = _outdated(plan, args)
        if args.dry_run:
            return _show_plan(plan, outdated)
        print("".join(f"{line}\n" for line in refresh.move_aside(outdated, plan.runs)), end="", file=sys.stderr)
    print("".join(f"note: {note}\n" for note in refresh.code_notes(plan)), end="", file=sys.stderr)
    if plan.cluster.launcher != "local":
        return submit_command(args, plan)
    if args.dry_run:
        return _show_plan(plan)
    from pipeline.launchers.local import run_plan

    if not plan.to_run:
        print("everything is done already; nothing to run")
    else:
        _refuse_what_would_fail(plan)
        print(f"{len(plan.to_run)} of {len(plan.wanted)} steps to run, under {plan.runs}/", file=sys.stderr)
        run_plan(plan)
    _show_end(plan, _typed(args))
    return 0


def submit_command(args: argparse.Namespace, plan: Plan) -> int:
    """Hand the plan to Slurm, say what was done, and leave."""
    from pipeline.launchers import slurm as chain
    from pipeline.launchers import submitit

    if not plan.to_run:
        print("everything is done already; nothing to submit")
        if hasattr(args, "stages"):
            _show_end(plan, _typed(args))
        elif plan.steps[0].stage == "export":
            _show_export(plan.steps[0])
        else:
            _show_metrics(plan.steps[0])
        return 0
    if args.dry_run:
        print(chain.show_dry_run(chain.run_plan(plan, dry_run=True), plan))
        _refuse_what_would_fail(plan)  # after the scripts, which are worth reading all the same
        return 0
    _refuse_what_would_fail(plan)
    submit = submitit.submit if plan.cluster.launcher == "submitit" else chain.sbatch
    submissions = chain.run_plan(plan, submit, typed=_typed(args) if hasattr(args, "stages") else None)
    print(chain.show(submissions))
    new = sum(one.new for one in submissions)
    names = " ".join(dict.fromkeys(step.folder.parent.name for step in plan.to_run))
    runs = f" --runs {shlex.quote(str(args.runs))}" if args.runs != RUNS else ""
    print(
        f"\n{new} jobs submitted" + (f", {len(submissions) - new} were there before" if new < len(submissions) else "")
    )
    print(f"\nnext:\n  python -m pipeline status {names}{runs} --watch")
    print(f"  python -m pipeline logs {submissions[0].step.label}{runs} -f")
    print(f"  python -m pipeline cancel {names}{runs}      ends what waits or runs; the run command goes on later")
    return 0


def check_command(args: argparse.Namespace) -> int:
    """Everything at once, with what sbatch itself would say."""
    from pipeline import preflight
    from pipeline.launchers.batch_script import script

    plan = _plan(args)
    wrong, notes = preflight.problems(plan, audited=args.audit)
    if plan.cluster.launcher != "local":
        stages = dict.fromkeys(step.stage for step in plan.to_run)
        wrong += preflight.refused({stage: script(STAGES[stage], plan.cluster) for stage in stages})
    print("".join(f"note: {note}\n" for note in notes), end="")
    if wrong:
        raise PlanError(*wrong)
    print(f"{len(plan.to_run)} steps can be run; nothing is known that would stop them")
    return 0


def _refuse_what_would_fail(plan: Plan) -> None:
    """The checks that cost nothing, at the start of every run."""
    from pipeline import preflight

    wrong, notes = preflight.problems(plan)
    if wrong:
        raise PlanError(*wrong)
    print("".join(f"note: {note}\n" for note in notes), end="", file=sys.stderr)


def plan_command(args: argparse.Namespace) -> int:
    plan = _plan(args)
    if not args.memory:
        return _show_plan(plan, _outdated(plan, args) if args.refresh else ())
    from pipeline.fitting import show

    recipes = {step.recipe.name: step.recipe for step in plan.steps}
    print("\n\n".join(show(recipe, plan.cluster) for recipe in recipes.values()))
    return 0


def _outdated(plan: Plan, args: argparse.Namespace) -> list[Path]:
    """The results that --refresh makes again; what stays is said."""
    folders, notes = refresh.outdated_folders(plan, [name for name in args.refresh.split(",") if name])
    print("".join(f"note: {note}\n" for note in notes), end="", file=sys.stderr)
    return folders


def _show_plan(plan: Plan, outdated: Sequence[Path] = ()) -> int:
    """The steps and why each runs. `outdated`: results that the run would make again."""
    width = max(len(step.label) for step in plan.steps)
    count = 0
    for step in plan.steps:
        reasons = (
            explain(step, plan.cluster) if step.label in plan.wanted else ["done" if step.done else "not asked for"]
        )
        done = step.done
        if step.folder in outdated:
            reasons, done = ["made again: its code, or that of a step before it, has changed"], False
        state = "done" if done else "run " if step.label in plan.wanted else "-   "
        count += state == "run "
        first = reasons[0] if reasons[0] != "done" else ""
        print(printable(f"{state}  {step.label:<{width}}  {step.fingerprint}  {first}".rstrip()))
        for reason in reasons[1:]:
            print(printable(f"{'':<{width + 20}}{reason}"))
    print(f"\n{count} of {len(plan.wanted)} steps to run, under {plan.runs}/")
    return 0


def prepare_command(args: argparse.Namespace) -> int:
    """Write the orders of one stage's steps and print their folders: for torchrun by hand, and for a batch script.

    In a Slurm job the job's own nodes and GPUs count, whatever the cluster's file says; and a job that starts again
    goes on with what it has resolved at first, even if the YAML has changed since.
    """
    job = slurm.this_job() if "RANK" not in os.environ else None
    kept = args.runs / ".jobs" / f"{job}.txt"
    if job and os.environ.get("SLURM_RESTART_COUNT") and kept.is_file():
        print(kept.read_text(encoding="utf-8"), end="")
        return 0
    changes = _of_this_job() if job else []
    if args.stages == "export":
        if not args.ckpt or not args.format:
            raise PlanError("an export needs --ckpt DIR and --format: see python -m pipeline export --help")
        plan = _export_plan(args, changes)
    elif args.ckpt:
        plan = _evaluation_plan(args, changes)
    else:
        plan = _plan(args, changes)
        missing = plan.missing()
        if missing:
            raise PlanError(*missing)
    steps = [step for step in plan.steps if step.label in plan.wanted]
    if len(steps) != 1 and not job:
        which = ", ".join(step.label for step in steps)
        raise PlanError(f"torchrun runs one step, but {len(steps)} are asked for ({which}); use python -m pipeline run")
    todo = [step for step in steps if not step.done]
    if job:
        _refuse_what_would_fail(plan)
        claim([step.folder for step in todo], job)
    for step in todo:
        write_order(step.folder, order_of(step, plan.cluster))
    told = "".join(f"{step.folder}\n" for step in (todo if job else steps))
    if job:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(told, encoding="utf-8")
        print("".join(f"{step.label}: done already\n" for step in steps if step.done), end="", file=sys.stderr)
    print(told, end="")
    return 0


def _of_this_job() -> list[str]:
    """The nodes, GPUs and cores that Slurm has given this job, as overrides of the cluster."""
    given = {"nodes": "SLURM_JOB_NUM_NODES", "gpus": "SLURM_GPUS_ON_NODE", "slurm.cpus": "SLURM_CPUS_PER_TASK"}
    found = {key: os.environ.get(name) for key, name in given.items()}
    return [f"cluster.{key}={value or 0}" for key, value in found.items() if value or key == "gpus"]


def _typed(args: argparse.Namespace) -> str:
    """The run that was asked for, to be typed again: every word but --stages and --dry-run."""
    words = list(args.words)
    words += ["--skip-sft"] if args.skip_sft else []
    words += ["--rehearse"] if args.rehearse else []
    words += ["--launcher", args.launcher] if args.launcher else []
    words += ["--cluster", args.cluster] if args.cluster else []
    words += ["--nodes", str(args.nodes)] if args.nodes else []
    words += ["--runs", str(args.runs)] if args.runs != RUNS else []
    return shlex.join(["python", "-m", "pipeline", "run", *words])


def _show_end(plan: Plan, typed: str) -> None:
    """Where everything is, the headline numbers, and what to type next."""
    done = {step.name: step for step in plan.steps if step.done}
    report = next((step for step in plan.steps if step.stage == "report" and step.done), None)
    if report:
        print()
        print(_summary(report.folder / "summary.txt"))
        print(f"\nreport    {report.folder}/report.html   (report.md and report.json beside it)")
    else:  # the report's summary has them
        for step in done.values():
            for warning in open_artifact(step.folder, verify=False).warnings:
                print(printable(f"warning: {step.label}: {warning}"))
    for step in plan.steps:
        if step.done and step.stage in ("sft", "grpo"):
            print(f"{step.label:<9} {step.folder}")
    last = done.get("grpo") or done.get("sft")
    print("\nnext:")
    if last:
        print(f"  python -m pipeline ask --ckpt {last.folder} --chat      questions of your own")
        print(f"  python -m pipeline evaluate --ckpt {last.folder} --split validation")
    left = [step for step in plan.steps if not step.done]
    if left:
        print(f"  {typed}      ({len(left)} steps are left)")
    else:
        change = "grpo.beta=0.01" if "grpo" in done else "sft.epochs=2"
        print(f"  {typed} {change}      one setting changed; only what depends on it runs")


def _summary(path: Path) -> str:
    """The report in short; where the file cannot be used, a sentence that says how it is made again."""
    text, problem = _text(path)
    if problem:
        return f"note: {path}: {problem}. Fix: delete {path.parent} and run the same command, which writes it again"
    return text.rstrip()


def _text(path: Path) -> tuple[str, str]:
    """A small file's text as a terminal may show it and "", or "" and why it cannot be read."""
    try:
        text, problem = read_text(path, LARGEST)
    except OSError as error:
        return "", f"cannot be read ({error.strerror})"
    return printable(text or ""), problem


def status_command(args: argparse.Namespace) -> int:
    ask = status.Asked()  # the table again and again, Slurm at most every 30 s

    def read() -> tuple[list[status.Row], list[str]]:
        return status.table(args.runs, args.recipes, everything=args.all, ask=ask)

    rows, troubles = read()
    if args.json:
        print(json.dumps([status.as_record(row) for row in rows], indent=1))
    elif not rows and troubles:
        raise PlanError(*troubles)
    elif not rows:
        print(f"nothing has run under {args.runs}/; begin with python -m pipeline run tiny")
    elif args.watch:
        for text in status.watch(read):
            print(text, flush=True)
    else:
        print(status.show(rows, troubles))
    reports = [row for row in rows if row.state == "done" and row.step.partition("/")[2].startswith("report-")]
    if not args.json and reports and not any(row.live for row in rows):
        print("\n" + "\n".join(f"report: {row.folder}/report.html" for row in reports))
    return 0


def logs_command(args: argparse.Namespace) -> int:
    ask = status.Asked()
    rows, troubles = status.table(args.runs, ask=ask)
    try:
        row = status.find_step(rows, args.step)
    except PlanError as error:
        raise PlanError(*error.problems, *troubles) from None  # it may lie where nothing could be listed

    def going() -> bool:
        now, _ = status.table(args.runs, [Path(row.folder).parent.name], ask=ask)
        return any(other.live for other in now if other.folder == row.folder)

    print(printable(f"{row.step}: {row.state}; {row.log}"), file=sys.stderr)
    for text in status.follow(Path(row.log), going if args.follow else None):
        print(text, end="", flush=True)
    return 0


def cancel_command(args: argparse.Namespace) -> int:
    rows, troubles = status.table(args.runs)
    recipes = {row.step.partition("/")[0] for row in rows}
    chosen = [row for row in rows if not args.names or row.step.partition("/")[0] in args.names]
    chosen += [status.find_step(rows, name) for name in args.names if name not in recipes]
    going = {row.step: row for row in chosen if row.live}
    if troubles and (not rows or any(row.state == "unknown" for row in chosen)):
        raise PlanError(*troubles)
    if not going:
        print("nothing is under way; nothing to cancel")
        return 0
    print(status.show(list(going.values())))
    if not args.yes:
        if not sys.stdin.isatty():
            raise PlanError(f"{len(going)} steps would be ended; say --yes")
        if input(f"end these {len(going)} steps? what is done stays [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was ended")
            return EXIT_INTERRUPTED
    print("\n".join(status.cancel(going.values())))
    return 0


def fetch_command(args: argparse.Namespace) -> int:
    from pipeline.fetch import fetch

    args.stages, args.skip_sft, args.rehearse = "", False, False
    plan = _plan(args)
    for line in fetch([step.recipe for step in plan.steps], plan.cluster):
        print(line)
    return 0


def list_command(args: argparse.Namespace) -> int:
    from pipeline.cluster import cluster_names
    from pipeline.recipe import CONFIGS
    from pipeline.rewards.reward import reward_names
    from pipeline.tasks.task import task_names

    print("recipes")
    for name in recipe_names():
        text, problem = _text(CONFIGS / f"{name}.yaml")
        first = text.partition("\n")[0]
        print(f"  {name:<12} {problem or (first.removeprefix('#').strip() if first.startswith('#') else '')}")
    print("tasks")
    for name in task_names():
        print(f"  {name:<12} {_imported(f'pipeline.tasks.{name}', _about_task)}")
    print("rewards")
    for name in reward_names():
        print(f"  {name:<12} {_imported(f'pipeline.rewards.{name}', _about_reward)}")
    print("stages")
    for stage in STAGES.values():
        print(f"  {stage.name:<12} {stage.about}")
    print("clusters")
    print(f"  {', '.join(cluster_names())}")
    return 0


def _about_task(module: Any) -> str:
    task = module.TASK
    params = [f"    task.params.{field.name} = {field.default}" for field in dataclasses.fields(task.Params)]
    return "\n".join([f"{task.title}; source: {', '.join(task.sources)}", *params])


def _about_reward(module: Any) -> str:
    return str(module.__doc__ or "").partition("\n")[0]


def _imported(name: str, about: Callable[[Any], str]) -> str:
    """What a module of tasks/ or rewards/ says of itself; a user's own file may fail in any way, and costs its line."""
    try:
        return about(importlib.import_module(name))
    except Exception as error:
        return f"cannot be used: {type(error).__name__}: {error}".splitlines()[0]


def ask_command(args: argparse.Namespace) -> int:
    """Resolve every checkpoint's recipe, then become the process that loads the models."""
    problems = []
    question = sys.stdin.read() if args.question == "-" and not args.chat else args.question
    if args.question == "-" and args.chat:
        problems.append("--chat reads its questions from stdin already: leave - out")
    if question is not None and not question.strip():
        problems.append("the question is empty: write it in quotes after the options, or pipe it in with -")
    if question is None and not args.chat:
        problems.append("no question: write it in quotes, - reads it from stdin, --chat asks for several")
    limits = {
        "--temperature": (args.temperature, 0, 1e6),
        "--top-p": (args.top_p, 1e-6, 1),
        "--top-k": (args.top_k, 0, 1e9),
    }
    limits |= {"--max-new-tokens": (args.max_new_tokens, 1, 1e9), "--seed": (args.seed, 0, 2**63 - 1)}
    for name, (value, least, most) in limits.items():
        if value is not None and not least <= value <= most:
            problems.append(f"{name}: {value} is not a number from {least:g} to {most:g}")
    asked, memory = [], None
    for checkpoint in args.ckpt:
        try:
            recipe, cluster, _ = recipe_of(checkpoint, args.words)
            asked.append({"checkpoint": checkpoint, "recipe": plain(recipe)})
            memory = plain(cluster.max_memory)
        except PipelineError as error:
            problems += error.problems
    if problems:
        raise PlanError(*dict.fromkeys(problems))
    names = ("chat", "sample", "temperature", "top_p", "top_k", "max_new_tokens", "seed")
    options = {name: getattr(args, name) for name in names} | {"question": question, "max_memory": memory}
    order = json.dumps({"asked": asked, "options": options})
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "pipeline.ask", "--order", order], QUIET | os.environ)


def evaluate_command(args: argparse.Namespace) -> int:
    plan = _evaluation_plan(args)
    print("".join(f"note: {note}\n" for note in refresh.code_notes(plan)), end="", file=sys.stderr)
    if plan.cluster.launcher != "local":
        return submit_command(args, plan)
    from pipeline.launchers.local import run_plan

    run_plan(plan)
    _show_metrics(plan.steps[0])
    return 0


def audit_command(args: argparse.Namespace) -> int:
    from pipeline.rows import file_problem, file_rows
    from pipeline.tasks.corr2cause.audit import audit, show
    from pipeline.tasks.corr2cause.graphs import PLUSPLUS, PUBLISHED
    from pipeline.tasks.corr2cause.published_rows import COLUMNS

    if problem := file_problem(args.data):
        raise DataError(f"--data: {problem}")
    semantics = {"wording": None, "published": PUBLISHED, "plusplus": PLUSPLUS}[args.semantics]
    found = audit(file_rows(args.data, COLUMNS), semantics, paper=args.paper)
    if not found.rows:
        raise DataError(f"{args.data}: no rows")
    if len(found.malformed) == found.rows:
        first = found.malformed[0]
        raise DataError(
            f"{args.data}: none of its {found.rows} rows can be read; line {first['line']}: {first['problem']}"
        )
    print(json.dumps(found.record(), indent=1) if args.json else show(found, str(args.data)))
    return 0 if found.clean else EXIT_FAULT


def generate_command(args: argparse.Namespace) -> int:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from pipeline.tasks.corr2cause.generate import generate

    sizes, problems = _sizes(args.n)
    most = 4 * (os.cpu_count() or 1)
    problems += [f"--copies: {args.copies} is not a whole number ≥ 1"] if args.copies < 1 else []
    problems += [f"--seed: got {args.seed}; expected 0 to {2**31 - 1}"] if not 0 <= args.seed < 2**31 else []
    if not 1 <= args.processes <= most:
        problems.append(f"--processes: got {args.processes}; expected 1 to {most}, four for each core here")
    if problems:
        raise PlanError(*problems)
    try:
        params = OmegaConf.to_container(OmegaConf.from_dotlist(args.words))
    except OmegaConfBaseException as error:
        raise PlanError(f"{' '.join(args.words)}: {error}") from None
    assert isinstance(params, dict)
    # every claim, as many as there are of each answer, unless something else is asked for
    wanted = {"balance": "natural", "n": sizes, **{str(key): value for key, value in params.items()}}
    made = generate(args.out, wanted, seed=args.seed, copies=args.copies, proof=args.proofs, processes=args.processes)
    for split, counts in made["rows"].items():
        told = ", ".join(f"n {n} {said}: {rows}" for n, said, rows in counts)
        print(f"{split:<11} {sum(rows for *_, rows in counts):>9} rows of {made['classes'][split]} classes; {told}")
    print(f"overlap {made['overlap']}; {args.out}/README.md is the data card")
    return 0


def _sizes(text: str) -> tuple[list[int], list[str]]:
    """(the numbers of variables that `6`, `3,5` or `2-6` names, what is wrong with it); the task says which can be."""
    sizes: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", part)
        if match is None:
            return [], [f"--n: {text[:40]!r} is no list of numbers; write 6, or 3,5 or 2-6"]
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            return [], [f"--n: {part.strip()!r} runs backwards and names no number. Fix: --n {high}-{low}"]
        if high - low > 20:
            return [], [f"--n: {part.strip()!r} are {high - low + 1:,} numbers of variables; write 6, or 3,5 or 2-6"]
        sizes |= set(range(low, high + 1))
    return sorted(sizes), []


def _evaluation_plan(args: argparse.Namespace, changes: Sequence[str] = ()) -> Plan:
    cluster, more = cluster_of(args)
    return evaluation_plan(
        args.ckpt,
        [*changes, *more, *args.words],
        task=args.task,
        split=args.split,
        limit=args.limit,
        cluster=cluster,
        runs=args.runs,
    )


def export_command(args: argparse.Namespace) -> int:
    plan = _export_plan(args)
    step = plan.steps[0]
    if step.options.get("quant"):
        _refuse_missing_packages(step.options["quant"])
    if args.public and not args.push:
        raise PlanError("--public: says how to push; add --push OWNER/NAME, or leave it out")
    if plan.cluster.launcher != "local":
        if args.push:
            raise PlanError(
                "--push: nodes have no internet; export first, then the same here without --launcher pushes"
            )
        return submit_command(args, plan)
    from pipeline.launchers.local import run_plan
    from pipeline.push import check_access, push

    if args.push:
        check_access(args.push)
    if step.done:
        print("this export is done already")
    run_plan(plan)
    place = _show_export(step, pushed=bool(args.push))
    if args.push:
        message = f"{step.recipe.name} {step.options['source']} as {step.options['format']}"
        print("\n".join(["", *push(place, args.push, public=args.public, message=message)]))
    return 0


def _export_plan(args: argparse.Namespace, changes: Sequence[str] = ()) -> Plan:
    cluster, more = cluster_of(args)
    return export_plan(
        args.ckpt,
        [*changes, *more, *args.words],
        format=args.format,
        quant=args.quant,
        out=getattr(args, "out", None),
        cluster=cluster,
        runs=args.runs,
    )


def _refuse_missing_packages(quant: str) -> None:
    from pipeline.preflight import missing_for_gguf

    if missing := missing_for_gguf(quant):
        raise MissingDependency(*missing)


def _show_export(step: Step, *, pushed: bool = False) -> Path:
    """Where it is, how large, and what to type next. Returns the folder that others get."""
    artifact = open_artifact(step.folder)
    place = next(path for path in (step.folder / name for name in ("model", "adapter", "gguf")) if path.is_dir())
    print(f"{artifact.metrics['format']}: {artifact.metrics['bytes'] / 1e6:,.2f} MB in {place}")
    print("\n".join(f"  {path.name}" for path in sorted(place.iterdir())))
    print("\nnext:")
    if step.options["format"] == "gguf":
        print(f"  llama-cli -m {next(place.glob('*.gguf'))} --jinja")
    else:
        print(f"  python -m pipeline ask --ckpt {step.folder} --chat")
    if not pushed:
        print("  the same export with --push OWNER/NAME puts it on the hub")
    return place


def _show_metrics(step: Step) -> None:
    from pipeline.metrics import HEADLINE
    from pipeline.tasks.task import task_of

    artifact = open_artifact(step.folder)
    for split, figures in artifact.figures.items():
        print(f"{split}: {int(figures['all']['rows']['value'])} rows, {int(figures['all']['groups']['value'])} groups")
        if figures["all"]["verified"]["value"] < figures["all"]["rows"]["value"]:
            print(f"  {int(figures['all']['verified']['value'])} of them can be verified")
        for name in [name for name in HEADLINE if name in figures["all"]]:
            value = figures["all"][name]
            print(f"  {name:<18} {value['value']:7.3f}   {value['low']:.3f} … {value['high']:.3f}")
        if "proxy" in figures["all"]:
            print(f"  proxy is no correctness: {task_of(step.recipe.task, step.recipe.seed).proxy}")
    print(printable("".join(f"warning: {warning}\n" for warning in artifact.warnings)), end="")
    print(f"\n{step.folder}/predictions.jsonl and metrics.json")


if __name__ == "__main__":
    main()
