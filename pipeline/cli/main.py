"""The command line: python -m pipeline run tiny, or `therefore run tiny`.

run       run what is not done yet, here or on Slurm
plan      what would run, and why, field by field; --memory: what each stage needs of a GPU
check     everything that would fail later, known now
status    how far each step is, here and on Slurm
logs      what a step has printed; -f follows it
cancel    end what waits or runs; what is done stays
download  download a recipe's model to the local cache, for nodes without internet
list      recipes, tasks, rewards, stages, clusters
chat      put questions to any checkpoint: thought and answer as they are written
export    any checkpoint for others: adapter, merged in 16 or 4 bit, GGUF
evaluate  any checkpoint: a step's folder, a Trainer checkpoint, an adapter, a model folder, a hub id; or any endpoint
audit     a file of a task's rows: which labels are wrong, by the task's exact solver
generate  a task's rows as parquet files with a data card
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pipeline import __version__
from pipeline.cli.checkpoints import chat_command, evaluate_command, export_command
from pipeline.cli.data import audit_command, download_command, generate_command, list_command
from pipeline.cli.jobs import cancel_command, logs_command, status_command
from pipeline.cli.run import check_command, plan_command, prepare_command, run_command
from pipeline.config.load import notify
from pipeline.config.model_files import FORMATS, QUANTS
from pipeline.core.errors import (
    PlanError,
    run_main,
)
from pipeline.core.project import enter_project, from_root
from pipeline.workflow.plan import RUNS
from pipeline.workflow.stage import STAGES

EPILOG = """examples:
  python -m pipeline run tiny                              everything, from rows to report
  python -m pipeline run tiny grpo.beta=0.01               the same with one setting changed: SFT is not run again
  python -m pipeline run tiny --skip-sft                   GRPO from the base model
  python -m pipeline run tiny --refresh changed            steps whose task or rewards were edited, and what needs them
  python -m pipeline run tiny --launcher slurm             the same as a chain of Slurm jobs
  python -m pipeline status --watch                        how far they are
  python -m pipeline plan tiny                             what would run, and why
  python -m pipeline evaluate --ckpt runs/tiny/grpo-…      any checkpoint
  python -m pipeline evaluate --endpoint URL --model NAME --task gsm8k     a model behind a server
  python -m pipeline chat --ckpt runs/tiny/grpo-… "…"       a question of your own
  python -m pipeline export --ckpt runs/tiny/grpo-… --format gguf
"""


AUDIT = """Find the rows of a file whose label is wrong, whose premise no graph fits, or that cannot be read.
Exit code 0: every row is right; 1: not; 2: the file cannot be read."""


GENERATE = """Every claim about every class of N variables (drawn classes from N = 7 on), split by canonical class.
The same seed gives the same bytes, whatever the number of processes."""


FILE_SETTINGS = (
    *("task.path", "task.validation_path", "task.test_path"),
    *("model.name", "model.gguf", "model.chat_template"),
)
FORMER_COMMANDS = {"fetch": "download", "ask": "chat"}
FORMER_OPTIONS = {"--rehearse": "--smoke-test", "--chat": "--interactive"}


def present_words(argv: Sequence[str]) -> list[str]:
    """Return the command line in present words; each former one is noticed on stderr."""
    former = [FORMER_COMMANDS if place == 0 else FORMER_OPTIONS for place in range(len(argv))]
    for word, words in zip(argv, former, strict=True):
        if word in words:
            notify(f"{word} is now {words[word]}; the former word is read in this version")
    return [words.get(word, word) for word, words in zip(argv, former, strict=True)]


def main() -> None:
    run_main(lambda: command(*enter_project(sys.argv[1:])))


def command(argv: Sequence[str], typed_in: Path | None = None) -> int:
    """Run a command line in the project's root and return its exit code; `typed_in` where it was typed elsewhere."""
    top = parser()
    args, rest = top.parse_known_args(present_words(argv))  # words may stand between options too
    flags = [word for word in rest if word.startswith("-")]
    if flags or (rest and not hasattr(args, "words")):
        raise PlanError(
            *(f"{word}: got an unknown argument. Fix: python -m pipeline {argv[0]} --help" for word in flags or rest)
        )
    if rest:
        args.words += rest
    if typed_in is not None:
        name_from_root(args, typed_in)
    return int(args.run(args) or 0)


def name_from_root(args: argparse.Namespace, typed_in: Path) -> None:
    """Rename the paths in `args` so that they mean in the root what they meant where they were typed.

    Folders to write are relative to where they were typed; files to read are looked up there, then in the root. The
    default of --runs is the project's, as an absolute path, so that what is printed can be typed anywhere.
    """

    def renamed(word: str) -> str:
        key, equals, value = word.partition("=")
        if equals:
            return f"{key}={from_root(value, typed_in)}" if key in FILE_SETTINGS else word
        return from_root(word, typed_in) if "/" in word or word.endswith((".yaml", ".yml")) else word

    options = vars(args)
    for name in options.keys() & {"runs", "out"}:
        if options[name] is not None:
            options[name] = (Path.cwd() if options[name] is RUNS else typed_in) / options[name]
    if isinstance(options.get("data"), Path):
        args.data = Path(from_root(str(args.data), typed_in))
    for name in options.keys() & {"ckpt", "cluster", "words", "names", "step"}:
        value = options[name]
        change = partial(from_root, typed_in=typed_in) if name == "ckpt" else renamed
        options[name] = [change(word) for word in value] if isinstance(value, list) else value and change(value)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Therefore: preprocess → SFT → GRPO → evaluate → report, for a model that reasons.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=__version__)
    about = "the project's folder (default: the one around the working folder, else that of this code)"
    top.add_argument("--project", metavar="DIR", help=about)
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
        sub.add_argument("--skip-sft", action="store_true", help="GRPO from the base model (grpo.init_from=base)")
        sub.add_argument("--smoke-test", action="store_true", help="run a tiny copy: every code path, no result")
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
    sub.add_argument("--time", action="store_true", help="where each step's seconds went, of all attempts")
    sub.add_argument("--json", action="store_true", help="for scripts")
    sub = add("logs", logs_command, "what a step has printed")
    sub.add_argument("step", metavar="STEP", help="grpo, tiny/grpo, its folder, or its job's id")
    sub.add_argument("-f", "--follow", action="store_true", help="go on until the step ends")
    sub = add("cancel", cancel_command, "end what waits or runs; what is done stays, and what runs may save")
    sub.add_argument("names", nargs="*", metavar="RECIPE|STEP", help="only these (default: everything)")
    sub.add_argument("--yes", action="store_true", help="do not ask")
    sub = add("download", download_command, "download a recipe's model to the local cache, for nodes without internet")
    sub.add_argument("words", nargs="+", metavar="RECIPE|key=value", help="recipes of configs/, and overrides")
    where(sub)
    add("list", list_command, "recipes, tasks, rewards, stages, clusters")
    sub = add("chat", chat_command, "put questions to any checkpoint and watch the answers being written")
    sub.add_argument("question", nargs="?", help="in quotes; - reads it from stdin; none: a conversation")
    sub.add_argument("words", nargs="*", metavar="RECIPE|key=value", help="default: what the checkpoint was made with")
    about = "a step's folder, a checkpoint, an adapter, a model, a hub id; several are asked side by side"
    sub.add_argument("--ckpt", action="append", required=True, metavar="DIR", help=about)
    sub.add_argument("--interactive", action="store_true", help="continue with questions from stdin, one a line")
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
    sub = add("evaluate", evaluate_command, "ask any checkpoint, or a model behind a server, a task's rows")
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
    sub.add_argument("--proofs", choices=["none", "short", "full", "steps"], default="none", help="in the completions")
    sub.add_argument("--processes", type=int, default=1, metavar="P", help="the bytes do not depend on it")
    return top


def where(sub: argparse.ArgumentParser) -> None:
    """Where it runs: the options of every command that makes a plan."""
    sub.add_argument("--cluster", help="a file of configs/clusters/ (default: local, or slurm with such a launcher)")
    sub.add_argument(
        "--launcher", choices=["local", "debug", "slurm", "submitit"], help="the same as cluster.launcher=…"
    )
    sub.add_argument("--nodes", type=int, metavar="N", help="of a training stage or an evaluation: cluster.nodes=N")


def evaluation(sub: argparse.ArgumentParser, *, required: bool) -> None:
    """What is evaluated."""
    about = {
        "--ckpt": "a step's folder, a checkpoint, an adapter, a model, a hub id",
        "--endpoint": "a server of the OpenAI format, such as https://host/v1; the key is in THEREFORE_API_KEY",
    }
    what = sub.add_mutually_exclusive_group(required=required)
    for name, text in about.items():
        what.add_argument(
            name, metavar="DIR" if name == "--ckpt" else "URL", help=text if required else argparse.SUPPRESS
        )
    text = "of an endpoint: the model's name there"
    sub.add_argument("--model", metavar="NAME", help=text if required else argparse.SUPPRESS)
    text = "of an endpoint's requests, more than the recipe sets; null leaves one out. May be repeated"
    text = text if required else argparse.SUPPRESS
    sub.add_argument("--parameter", action="append", default=[], metavar="NAME=VALUE", help=text)
    sub.add_argument("--task", help="a task by name (default: the recipe's)" if required else argparse.SUPPRESS)
    sub.add_argument("--split", help="one split (default: the recipe's)" if required else argparse.SUPPRESS)
    sub.add_argument("--limit", type=int, help="rows of each split" if required else argparse.SUPPRESS)


def exporting(sub: argparse.ArgumentParser, *, required: bool) -> None:
    """What is exported, and as what."""
    about = "a step's folder, a checkpoint, an adapter, a model, a hub id"
    if required:
        sub.add_argument("--ckpt", required=True, metavar="DIR", help=about)
    text = "; ".join(f"{name}: {text[0].lower()}{text[1:].rstrip('.')}" for name, text in FORMATS.items())
    sub.add_argument("--format", required=required, choices=list(FORMATS), help=text if required else argparse.SUPPRESS)
    text = "of a GGUF file (default: q8_0); q4_k_m needs llama-cpp-python"
    sub.add_argument("--quant", choices=QUANTS, help=text if required else argparse.SUPPRESS)
