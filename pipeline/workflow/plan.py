"""What will run, in which order, and why: the graph of steps of one or several recipes. No torch, no processes.

    plan = make_plan(["tiny"], ["grpo.beta=0.01"])
    for step in plan.steps: print(step.name, step.fingerprint, explain(step))

A step is a stage of one recipe. Its fingerprint is the hash of what decides its result: the parts of the recipe
its stage reads, the stage's revision, and the fingerprints of its inputs. Its folder is known before anything runs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.config.cluster import Cluster, batches, read_cluster
from pipeline.config.endpoint import endpoint_problems
from pipeline.config.former import identity, present_names
from pipeline.config.model_files import gguf_file
from pipeline.config.recipe import Recipe, local_files, local_problems, read
from pipeline.core.errors import PlanError, RecipeError, did_you_mean
from pipeline.core.hashing import describe_drift, file_identity, fingerprint, plain
from pipeline.core.records import InvalidRecord
from pipeline.rewards.reward import find_rewards
from pipeline.sizing.fitting import resolve_auto
from pipeline.sizing.smoke import smoke_test_of
from pipeline.tasks.task import make_task, resolved_params, split_problems, task_of
from pipeline.workflow.artifact import ARTIFACT, SCHEMA, STEP, Artifact, artifact_problem, is_done, read_artifact
from pipeline.workflow.layouts import resume_notes, resume_problems
from pipeline.workflow.lock import is_alive, read_holder
from pipeline.workflow.stage import (
    ENDPOINT_ROLE,
    STAGES,
    EvaluateCheckpoint,
    EvaluateEndpoint,
    Export,
    Options,
    ReportModels,
    Stage,
    StepSpec,
    stage_of,
)
from pipeline.workflow.task_code import code_changes

RUNS = Path("runs")
MAX_FOLDER_NAME = 150  # characters of a folder that holds a report of several recipes
SMOKE_OVERRIDES = (
    "sft.per_device_batch_size=auto",
    "grpo.per_device_batch_size=auto",
    "save_steps=2",
    "logging_steps=1",
)


@dataclass(frozen=True)
class Step:
    """One stage of one recipe."""

    name: str  # preprocess, sft, grpo, evaluate-base, evaluate-sft, evaluate-grpo, report
    stage: str
    recipe: Recipe
    payload: dict[str, Any]
    folder: Path
    inputs: dict[str, Step] = field(default_factory=dict)
    folders: dict[str, str] = field(default_factory=dict)  # inputs that are not a step of this plan
    options: Options | None = None
    role: str | None = None  # of an evaluation: which of ROLES or endpoints it is of

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.payload)

    @property
    def label(self) -> str:
        """`tiny/sft`"""
        return f"{self.folder.parent.name}/{self.name}"

    @property
    def runs_as(self) -> Stage:
        return stage_of(self.stage, self.options)

    @property
    def done(self) -> bool:
        """Whether it is known to be done; see `unreadable`."""
        return self.unreadable is None and is_done(self.folder)

    @property
    def unreadable(self) -> str | None:
        """Why it cannot be known whether the step is done: its artifact cannot be opened. None where it is known."""
        try:
            is_done(self.folder)
        except InvalidRecord as odd:
            return f"{odd}, so it is not known whether {self.label} is done. Fix: make it readable, or delete it"
        return None

    @property
    def outdated(self) -> str | None:
        """That the step is done and its task's or rewards' code has changed since, and the remedy; else None."""
        changed = code_changes(self.folder, self.stage, self.recipe.task.name, self.recipe.grpo.rewards)
        alone = self.role is None and isinstance(self.options, EvaluateCheckpoint | EvaluateEndpoint | Export)
        again = f"delete {self.folder} to make it again" if alone else f"rerun with --refresh {self.name}"
        return f"done, but its code has changed since: {', '.join(changed)}; {again}" if changed else None


@dataclass(frozen=True)
class Plan:
    """Steps in an order in which each comes after its inputs; `wanted` are those that may be started."""

    steps: tuple[Step, ...]
    wanted: frozenset[str]  # labels
    cluster: Cluster
    runs: Path

    @property
    def to_run(self) -> list[Step]:
        return [step for step in self.steps if step.label in self.wanted and not step.done]

    def missing(self, coming: Iterable[str] = ()) -> list[str]:
        """Inputs that are neither done, nor to be run, nor on their way already (`coming`), as sentences."""
        coming = set(coming)
        there = self.wanted | coming
        users: dict[str, list[str]] = {}
        for step in self.to_run:
            if step.label not in coming:
                for needed in step.inputs.values():
                    if not needed.done and needed.label not in there:
                        users.setdefault(needed.label, []).append(step.name)
        return [
            f"{label} is not done, and {', '.join(names)} need{'s' if len(names) == 1 else ''} it: "
            f"run it first, or without --stages"
            for label, names in users.items()
        ]


def make_plan(
    names: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    cluster: str = "local",
    stages: Sequence[str] = (),
    skip_sft: bool = False,
    smoke_test: bool = False,
    runs: Path = RUNS,
) -> Plan:
    """The plan for these recipes; RecipeError or PlanError with every problem.

    Inputs that are missing are an error here for the local launcher; on Slurm they may be on their way, and the
    launcher asks.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise PlanError(*(f"--stages: got {stage!r}; {did_you_mean(stage, STAGES)}" for stage in unknown))
    if "export" in stages:
        raise PlanError(
            "--stages: got export; expected stages of a run. "
            "Fix: python -m pipeline export --ckpt DIR --format merged16"
        )
    if skip_sft:
        overrides = [*overrides, "grpo.init_from=base"]
    recipes, where = _resolve(names, overrides, cluster, smoke_test)
    steps: list[Step] = []
    for recipe in recipes:
        steps += _recipe_steps(recipe, runs)
    steps.append(_report_step(recipes, steps, runs))
    chosen = [step for step in steps if not stages or step.stage in stages]
    if not chosen:
        raise PlanError(
            f"{' and '.join(names)} has no {' and no '.join(stages)} step: see grpo.init_from and evaluate.splits"
        )
    plan = Plan(tuple(steps), frozenset(step.label for step in chosen), where, runs)
    if where.launcher == "local" and (missing := plan.missing()):
        raise PlanError(*missing)
    return plan


def _resolve(
    names: Sequence[str], overrides: Sequence[str], cluster: str, smoke_test: bool
) -> tuple[list[Recipe], Cluster]:
    """Typed recipes and cluster, everything that is wrong with any of them reported at once."""
    problems: list[str] = []
    for_recipe, for_cluster = split_overrides(overrides)
    if processes := os.environ.get("THEREFORE_PROCESSES"):  # torchrun was started by hand
        for_cluster.append(f"processes={processes}")
    where = None
    try:
        where, found = read_cluster(cluster, [*for_cluster, *(SMOKE_OVERRIDES if smoke_test else ())])
        problems += found
    except RecipeError as error:
        problems += error.problems
    recipes: list[Recipe] = []
    sources: dict[str, str] = {}  # a recipe's name -> the word it was named by
    for name in dict.fromkeys(names):
        try:
            recipe, found = read(name, for_recipe)
            if recipe is not None and smoke_test and not task_problems(recipe):
                recipe = smoke_test_of(recipe, where)
                found = recipe.problems()
        except RecipeError as error:
            problems += error.problems
            continue
        found = found if recipe is None else _recipe_problems(recipe, where)
        problems += [f"{name}: {text}" if len(names) > 1 else text for text in found]
        if recipe is not None and (other := sources.setdefault(recipe.name, name)) != name:
            problems.append(
                f"recipes: got {other} and {name}, both called {recipe.name!r}; expected one name each, which is their "
                "folder. Fix: rename one of the files"
            )
        elif recipe is not None and not found:
            recipes.append(with_task_params(recipe))
    if problems or where is None:
        raise RecipeError(*dict.fromkeys(problems))
    return recipes, where


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides of the recipe, and those of the cluster (`cluster.sft.deepspeed=none`)."""
    for_cluster = [text.removeprefix("cluster.") for text in overrides if text.startswith("cluster.")]
    return [text for text in overrides if not text.startswith("cluster.")], for_cluster


def with_task_params(recipe: Recipe) -> Recipe:
    """The recipe with every setting of its task filled in, so that a changed default is a changed identity."""
    params = resolved_params(task_of(recipe.task, recipe.seed))
    return replace(recipe, task=replace(recipe.task, params=params))


def _recipe_problems(recipe: Recipe, cluster: Cluster | None) -> list[str]:
    """What only the task, the rewards and the cluster together with the recipe can tell."""
    problems = [*local_problems(recipe), *task_problems(recipe)]
    if recipe.task.files and not recipe.task.path:
        problems.append(
            f"task.path: got null with {' and '.join(recipe.task.files)} set; expected a file of training rows too. "
            "Fix: name one, or evaluate a checkpoint: python -m pipeline evaluate --ckpt DIR task.path=FILE"
        )
    _, rewards = find_rewards(recipe.grpo.rewards)
    problems = [*problems, *rewards]
    if cluster is not None:
        for name, endpoint in recipe.evaluate.endpoints.items():
            key = f"evaluate.endpoints.{name}."
            problems += endpoint_problems(endpoint, cluster.endpoint, f"{key}url", key)
        problems += [text for stage in recipe.stages for text in batches(cluster, recipe, stage)[1]]
    return problems


def task_problems(recipe: Recipe) -> list[str]:
    task, problems = make_task(recipe.task, recipe.seed)
    if task is None:
        return problems
    problems = split_problems(task, recipe.evaluate.splits)
    if "grpo" in recipe.stages and not task.rewardable:
        start = recipe.grpo.init_from
        problems.append(f"grpo.init_from: {start!r}, but nothing of {task.name} can be rewarded; use none")
    return problems


def _recipe_steps(recipe: Recipe, runs: Path) -> list[Step]:
    data = _step("preprocess", recipe, {}, runs)
    steps = [data]
    trained: dict[str, Step] = {}
    for stage in recipe.stages:  # each begins with the one before it, the first with the base model
        inputs = {"data": data, "model": trained["sft"]} if "sft" in trained else {"data": data}
        trained[stage] = _step(stage, recipe, inputs, runs)
    steps += trained.values()
    if not recipe.evaluate.splits:
        return steps
    steps.append(_step("evaluate", recipe, {"data": data}, runs, role="base"))
    for role, step in trained.items():
        steps.append(_step("evaluate", recipe, {"data": data, "model": step}, runs, role=role))
    for name, endpoint in recipe.evaluate.endpoints.items():
        options = EvaluateEndpoint(endpoint)
        steps.append(_step("evaluate", recipe, {"data": data}, runs, role=ENDPOINT_ROLE + name, options=options))
    return steps


def _report_step(recipes: Sequence[Recipe], steps: Sequence[Step], runs: Path) -> Step:
    shown = {step.label: step for step in steps if step.stage != "report"}
    place = "+".join(recipe.name for recipe in recipes)
    if len(place) > MAX_FOLDER_NAME:  # a folder's name has its limit
        place = f"{recipes[0].name}+{len(recipes) - 1}-{fingerprint(place)}"
    options = ReportModels({recipe.name: recipe.report.success_criteria for recipe in recipes})
    return _step("report", recipes[0], shown, runs, place=place, options=options)


def _step(
    stage: str,
    recipe: Recipe,
    inputs: dict[str, Step],
    runs: Path,
    *,
    role: str | None = None,
    place: str | None = None,
    options: ReportModels | EvaluateEndpoint | None = None,
) -> Step:
    """A step of a recipe, in the folder `place` of the runs (default: the recipe's)."""
    files = {} if inputs else local_files(recipe)
    if not inputs and (packed := gguf_file(recipe.model)):
        files["model.gguf"] = file_identity(packed)
    prints = {name: step.fingerprint for name, step in inputs.items()}
    payload = step_payload(stage, recipe, inputs=prints, files=files, options=options)
    name = f"{stage}-{role}" if role else stage
    folder = runs / (place or recipe.name) / f"{name}-{fingerprint(payload)}"
    return Step(name, stage, recipe, payload, folder, inputs, options=options, role=role)


def step_payload(
    stage: str,
    recipe: Recipe,
    *,
    inputs: Mapping[str, str],
    files: Mapping[str, str],
    reads: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    options: ReportModels | EvaluateEndpoint | None = None,
) -> dict[str, Any]:
    """Return what a step's fingerprint is the hash of: all that decides its result.

    `reads` are parts of the recipe beside those that every step of the stage reads; `settings` are no part of a recipe.
    A recipe's endpoints decide no other model's answers, and the recipe's model none of theirs.
    """
    values = plain(recipe)
    values["evaluate"].pop("endpoints", None)
    read = [*STAGES[stage].reads, *reads]
    if isinstance(options, EvaluateEndpoint):
        read.remove("model")
        settings = {"endpoint": options.endpoint.identity}
    elif options is not None:
        settings = plain(options)
    return {
        "stage": stage,
        "revision": STAGES[stage].revision,
        "settings": identity(values, read) | dict(settings or {}),
        "inputs": dict(inputs),
        "files": dict(files),
    }


def spec_of(step: Step, cluster: Cluster) -> StepSpec:
    """Return what is written into the step's folder before its process starts, every `auto` of memory decided."""
    return StepSpec(
        name=step.name,
        stage=step.stage,
        fingerprint=step.fingerprint,
        payload=step.payload,
        recipe=step.recipe,
        cluster=resolve_auto(step.recipe, cluster),
        inputs={**{name: str(needed.folder) for name, needed in step.inputs.items()}, **step.folders},
        options=step.options,
        role=step.role,
        schema=SCHEMA,
    )


def explain(step: Step, cluster: Cluster | None = None) -> list[str]:
    """Why a step will run, or that it will not: one line, or one line a field that differs from the last run.

    With the `cluster` it would run on, also that its checkpoints cannot be resumed there.
    """
    if step.done:
        return [step.outdated or "done"]
    if step.unreadable:
        return [f"cannot run: {step.unreadable}"]
    try:
        odd = artifact_problem(step.folder)
        holder = read_holder(step.folder)
    except InvalidRecord as error:
        return [f"cannot run: {error}"]
    if holder and is_alive(holder):
        return [f"running: {holder}"]
    if odd:
        return [f"restart: its {ARTIFACT} {odd}"]
    saved = [path for path in step.folder.glob("checkpoints/checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    if saved:
        newest = max(saved, key=lambda path: int(path.name.rpartition("-")[2]))
        refused = resume_problems_of(step, cluster) if cluster else []
        changes = resume_notes_of(step, cluster) if cluster else []
        return [f"cannot resume: {text}" for text in refused] or changes or [f"resumes from {newest.name}"]
    if (step.folder / STEP).exists():
        return ["restart: the previous attempt saved no checkpoint"]
    before = _latest(step)
    if before is None:
        return ["new"]
    old = before.payload
    drift: list[str] = []
    for part, shown in (("settings", present_names), ("files", dict)):
        was_part = old.get(part)
        drift += describe_drift(shown(was_part if isinstance(was_part, dict) else {}), shown(step.payload[part]))
    if old.get("revision") != step.payload["revision"]:
        drift.append(f"the stage's code: revision {old.get('revision')} -> {step.payload['revision']}")
    inputs = old.get("inputs")
    for role, needed in step.inputs.items():
        was = inputs.get(role) if isinstance(inputs, dict) else None
        if was != needed.fingerprint:
            drift.append(f"input {role}: {was or '(new)'} -> {needed.fingerprint}")
    return drift or ["new"]


def resume_problems_of(step: Step, cluster: Cluster) -> list[str]:
    """Why a training step's checkpoints cannot be resumed on this cluster; nothing for other steps."""
    if not STAGES[step.stage].trains or step.done:
        return []
    return resume_problems(step.folder, step.recipe, resolve_auto(step.recipe, cluster), step.stage)


def resume_notes_of(step: Step, cluster: Cluster) -> list[str]:
    """What changes where a training step resumes in another layout; nothing for other steps."""
    if not STAGES[step.stage].trains or step.done:
        return []
    return resume_notes(step.folder, step.recipe, resolve_auto(step.recipe, cluster), step.stage)


def _latest(step: Step) -> Artifact | None:
    """The record of the newest finished step of the same name."""
    found = []
    for path in step.folder.parent.glob(f"{step.name}-*/{ARTIFACT}"):
        with contextlib.suppress(OSError):
            found.append((path.stat().st_mtime, path))
    for _, path in sorted(found, reverse=True):
        with contextlib.suppress(InvalidRecord):  # another step's file: `status` shows it
            record = read_artifact(path.parent)
            if record and record.step == step.name:  # not of a step whose name is longer
                return record
    return None
