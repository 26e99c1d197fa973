"""chat, evaluate, export: any checkpoint."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace

from pipeline.cli.plans import evaluation_plan_of, export_plan_of
from pipeline.cli.results import show_export, show_metrics
from pipeline.cli.run import submit_command
from pipeline.core.errors import (
    MissingDependency,
    PipelineError,
    PlanError,
)
from pipeline.core.hashing import plain
from pipeline.sizing.engines import ENVIRONMENT, resolve_engines, vllm_problems
from pipeline.workflow import refresh
from pipeline.workflow.single_step import recipe_of
from pipeline.workflow.stage import Export

# of a process that answers at once: no warnings of the libraries to each other, no half a minute of compiling
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def chat_command(args: argparse.Namespace) -> int:
    """Resolve every checkpoint's recipe, then become the process that loads the models."""
    problems = []
    interactive = args.interactive or args.question is None
    question = sys.stdin.read() if args.question == "-" and not interactive else args.question
    if args.question == "-" and interactive:
        problems.append("--interactive: got - too; expected one of them, since both read stdin. Fix: leave - out")
    if question is not None and not question.strip():
        problems.append(
            "question: got an empty one; expected text. Fix: write it in quotes after the options, or pipe it in with -"
        )
    limits = {
        "--temperature": (args.temperature, 0, 1e6),
        "--top-p": (args.top_p, 1e-6, 1),
        "--top-k": (args.top_k, 0, 1e9),
    }
    limits |= {"--max-new-tokens": (args.max_new_tokens, 1, 1e9), "--seed": (args.seed, 0, 2**63 - 1)}
    for name, (value, least, most) in limits.items():
        if value is not None and not least <= value <= most:
            problems.append(f"{name}: got {value}; expected a number from {least:g} to {most:g}")
    checkpoints, memory, generation = [], None, None
    for checkpoint in args.ckpt:
        try:
            recipe, cluster, _ = recipe_of(checkpoint, args.words)
            checkpoints.append({"checkpoint": checkpoint, "recipe": plain(recipe)})
            memory = plain(cluster.max_memory)
            chosen = resolve_engines(recipe, cluster).generation.evaluate
            if chosen.engine == "vllm":
                problems += vllm_problems(recipe, cluster, "evaluate")
            # all of them are on the GPU together
            generation = plain(replace(chosen, gpu_memory=chosen.gpu_memory / len(args.ckpt), tensor_parallel=1))
        except PipelineError as error:
            problems += error.problems
    if problems:
        raise PlanError(*dict.fromkeys(problems))
    names = ("sample", "temperature", "top_p", "top_k", "max_new_tokens", "seed")
    options = {name: getattr(args, name) for name in names} | {
        "question": question,
        "interactive": interactive,
        "max_memory": memory,
        "generation": generation,
    }
    order = json.dumps({"checkpoints": checkpoints, "options": options})
    sys.stdout.flush()
    os.execve(
        sys.executable, [sys.executable, "-m", "pipeline.ask", "--order", order], QUIET | ENVIRONMENT | os.environ
    )


def evaluate_command(args: argparse.Namespace) -> int:
    plan = evaluation_plan_of(args)
    print("".join(f"note: {note}\n" for note in refresh.code_notes(plan)), end="", file=sys.stderr)
    if plan.cluster.submits:
        return submit_command(args, plan)
    from pipeline.launchers.local import run_plan

    run_plan(plan)
    show_metrics(plan.steps[0])
    return 0


def export_command(args: argparse.Namespace) -> int:
    plan = export_plan_of(args)
    step = plan.steps[0]
    options = step.options
    assert isinstance(options, Export)
    if options.quant:
        _refuse_missing_packages(options.quant)
    if args.public and not args.push:
        raise PlanError("--public: got no --push; expected the repository to make public. Fix: add --push OWNER/NAME")
    if plan.cluster.submits:
        if args.push:
            raise PlanError(
                "--push: nodes have no internet; export first, then the same here without --launcher pushes"
            )
        return submit_command(args, plan)
    from pipeline.hub.upload import check_access, push
    from pipeline.launchers.local import run_plan

    if args.push:
        check_access(args.push)
    if step.done:
        print("this export is done already")
    run_plan(plan)
    place = show_export(step, pushed=bool(args.push))
    if args.push:
        message = f"{step.recipe.name} {options.source} as {options.format}"
        print("\n".join(["", *push(place, args.push, public=args.public, message=message)]))
    return 0


def _refuse_missing_packages(quant: str) -> None:
    from pipeline.preflight.checks import missing_for_gguf

    if missing := missing_for_gguf(quant):
        raise MissingDependency(*missing)
