"""Make the plan that a command's arguments and options describe."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence

from pipeline.config.endpoint import Endpoint
from pipeline.config.recipe import recipe_names
from pipeline.core.errors import (
    PlanError,
    RecipeError,
)
from pipeline.workflow.plan import RUNS, Plan, make_plan
from pipeline.workflow.single_step import endpoint_plan, evaluation_plan, export_plan


def cluster_of(args: argparse.Namespace) -> tuple[str, list[str]]:
    """The cluster that the options name, and what they change in it."""
    name = args.cluster or ("slurm" if args.launcher in ("slurm", "submitit") else "local")
    changes = [f"cluster.launcher={args.launcher}"] * bool(args.launcher)
    return name, changes + [f"cluster.nodes={args.nodes}"] * (args.nodes is not None)


def plan_of(args: argparse.Namespace, changes: Sequence[str] = ()) -> Plan:
    """Make the plan that the arguments and options describe; their overrides come after `changes`."""
    names = [word for word in args.words if "=" not in word]
    overrides = [word for word in args.words if "=" in word]
    if not names:
        raise RecipeError(f"recipe: got none; expected one or more of {', '.join(recipe_names())}. Fix: name one")
    stages = [stage for stage in args.stages.split(",") if stage]
    cluster, more = cluster_of(args)
    overrides = [*changes, *more, *overrides]
    return make_plan(
        names,
        overrides,
        cluster=cluster,
        stages=stages,
        skip_sft=args.skip_sft,
        smoke_test=args.smoke_test,
        runs=args.runs,
    )


def refuse_what_would_fail(plan: Plan) -> None:
    """The checks that cost nothing, at the start of every run."""
    from pipeline.preflight import checks

    wrong, notes = checks.problems(plan)
    if wrong:
        raise PlanError(*wrong)
    print("".join(f"note: {note}\n" for note in notes), end="", file=sys.stderr)


def typed_again(args: argparse.Namespace) -> str:
    """The run that was asked for, to be typed again: every word but --stages and --dry-run."""
    words = list(args.words)
    words += ["--skip-sft"] if args.skip_sft else []
    words += ["--smoke-test"] if args.smoke_test else []
    words += ["--launcher", args.launcher] if args.launcher else []
    words += ["--cluster", args.cluster] if args.cluster else []
    words += ["--nodes", str(args.nodes)] if args.nodes else []
    words += ["--runs", str(args.runs)] if args.runs not in (RUNS, RUNS.absolute()) else []
    return shlex.join(["python", "-m", "pipeline", "run", *words])


def evaluation_plan_of(args: argparse.Namespace, changes: Sequence[str] = ()) -> Plan:
    cluster, more = cluster_of(args)
    words = [*changes, *more, *args.words]
    rows = {"task": args.task, "split": args.split, "limit": args.limit}
    if args.endpoint is not None:
        return endpoint_plan(_endpoint_of(args), words, **rows, cluster=cluster, runs=args.runs)
    if args.model is not None or args.parameter:
        raise PlanError("--model, --parameter: got one with --ckpt; expected --endpoint URL, whose model it names")
    return evaluation_plan(args.ckpt, words, **rows, cluster=cluster, runs=args.runs)


def _endpoint_of(args: argparse.Namespace) -> Endpoint:
    """The endpoint that the options name. Raises PlanError."""
    if args.model is None:
        raise PlanError("--model: got none; expected the model's name at the server. Fix: --model NAME")
    parameters = {}
    for word in args.parameter:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise PlanError(f"--parameter: got {word[:80]!r}; expected NAME=VALUE, such as reasoning_effort=low")
        try:
            parameters[name] = json.loads(text)
        except ValueError:
            parameters[name] = text
    return Endpoint(args.endpoint, args.model, parameters)


def export_plan_of(args: argparse.Namespace, changes: Sequence[str] = ()) -> Plan:
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
