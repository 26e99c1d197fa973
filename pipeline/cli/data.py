"""download, list, audit, generate: models, rows, and what there is."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
from collections.abc import Callable
from typing import Any

from pipeline.cli.plans import plan_of
from pipeline.cli.results import read_small_text
from pipeline.config.former import param_renames
from pipeline.config.load import notify
from pipeline.config.recipe import recipe_names
from pipeline.core.errors import (
    EXIT_FAILURE,
    DataError,
    PlanError,
)
from pipeline.workflow.stage import STAGES


def download_command(args: argparse.Namespace) -> int:
    from pipeline.hub.download import download

    args.stages, args.skip_sft, args.smoke_test = "", False, False
    plan = plan_of(args)
    for line in download([step.recipe for step in plan.steps], plan.cluster):
        print(line)
    return 0


def list_command(args: argparse.Namespace) -> int:
    from pipeline.config.cluster import cluster_names
    from pipeline.config.recipe import CONFIGS
    from pipeline.rewards.reward import reward_names
    from pipeline.tasks.task import task_names

    print("recipes")
    for name in recipe_names():
        text, problem = read_small_text(CONFIGS / f"{name}.yaml")
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


def audit_command(args: argparse.Namespace) -> int:
    from pipeline.tasks.corr2cause.audit import audit_rows, audit_text
    from pipeline.tasks.corr2cause.graphs import PLUSPLUS, PUBLISHED
    from pipeline.tasks.corr2cause.published_rows import COLUMNS
    from pipeline.tasks.rows import file_problem, file_rows

    if problem := file_problem(args.data):
        raise DataError(f"--data: {problem}")
    semantics = {"wording": None, "published": PUBLISHED, "plusplus": PLUSPLUS}[args.semantics]
    found = audit_rows(file_rows(args.data, COLUMNS), semantics, paper=args.paper)
    if not found.rows:
        raise DataError(f"{args.data}: no rows")
    if len(found.malformed) == found.rows:
        first = found.malformed[0]
        raise DataError(
            f"{args.data}: none of its {found.rows} rows can be read; line {first['line']}: {first['problem']}"
        )
    print(json.dumps(found.record(), indent=1) if args.json else audit_text(found, str(args.data)))
    return 0 if found.clean else EXIT_FAILURE


def generate_command(args: argparse.Namespace) -> int:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from pipeline.tasks.corr2cause.generate import generate

    sizes, problems = _sizes(args.n)
    most = 4 * (os.cpu_count() or 1)
    problems += [f"--copies: got {args.copies}; expected a whole number ≥ 1"] if args.copies < 1 else []
    problems += [f"--seed: got {args.seed}; expected 0 to {2**31 - 1}"] if not 0 <= args.seed < 2**31 else []
    if not 1 <= args.processes <= most:
        problems.append(f"--processes: got {args.processes}; expected 1 to {most}, four for each core here")
    if problems:
        raise PlanError(*problems)
    try:
        params = OmegaConf.to_container(OmegaConf.from_dotlist(args.words))
    except OmegaConfBaseException as error:
        raise PlanError(f"{' '.join(args.words)}: {error}") from None
    params, notices = param_renames("corr2cause").apply(params)
    for notice in notices:
        notify(notice)
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
            return [], [f"--n: got {text[:40]!r}; expected numbers of variables. Fix: --n 6, or --n 3,5 or --n 2-6"]
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            return [], [f"--n: got {part.strip()!r}; expected the smaller number first. Fix: --n {high}-{low}"]
        if high - low > 20:
            return [], [
                f"--n: got {part.strip()!r}, {high - low + 1:,} numbers; expected at most 20. Fix: --n 6, or --n 2-6"
            ]
        sizes |= set(range(low, high + 1))
    return sorted(sizes), []
