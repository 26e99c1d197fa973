"""The table of stages, and the spec that a stage process is started with: `step.json` of its folder.

    STAGES["sft"].reads    the parts of a recipe that decide the stage's result
    read_spec(folder)      what the process in this folder has to do, typed

A new stage is a row of STAGES and a module with `run`.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.config.cluster import Cluster, process_count
from pipeline.config.endpoint import Endpoint
from pipeline.config.recipe import Goal, Recipe
from pipeline.core.errors import ArtifactError
from pipeline.core.files import write_json
from pipeline.core.hashing import plain
from pipeline.core.records import read_mapping, read_record
from pipeline.core.schema import parse
from pipeline.core.slurm_client import this_restart
from pipeline.workflow.artifact import STEP, STOP, refuse_newer, stage_and_role
from pipeline.workflow.attempts import begin_count


@dataclass(frozen=True)
class Stage:
    """A row of the table. `reads` are the parts of a recipe that decide its result; `revision` its code."""

    name: str
    about: str
    reads: tuple[str, ...]
    revision: int
    processes: Literal["one", "all"] = "all"  # all: under torchrun with every process of the cluster
    trains: bool = False  # leaves a model, and checkpoints on its way
    resumable: bool = False  # saves when a stop is requested, and resumes from there

    @property
    def module(self) -> str:
        return f"pipeline.{self.name}"


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "preprocess",
            "rows, splits and their proof; for a randomly initialised model also its tokenizer and weights",
            ("seed", "model.name", "model.revision", "model.random_init", "model.gguf", "model.chat_template", "task"),
            revision=2,
            processes="one",
        ),
        Stage(
            "sft",
            "supervised fine-tuning on the task's targets",
            ("seed", "model", "lora", "sft"),
            revision=2,
            trains=True,
            resumable=True,
        ),
        Stage(
            "grpo",
            "reinforcement learning from the task's rewards",
            ("seed", "model", "lora", "grpo"),
            revision=2,
            trains=True,
            resumable=True,
        ),
        Stage(
            "evaluate",
            "answers to every test row, graded",
            ("seed", "model", "evaluate"),
            revision=3,
            resumable=True,
        ),
        Stage(
            "report",
            "the models side by side, with intervals and curves",
            ("seed", "evaluate", "report"),
            revision=4,
            processes="one",
        ),
        Stage(
            "export",
            "a checkpoint for others: adapter, merged model or GGUF, with its card",
            ("model", "name"),
            revision=2,
            processes="one",
        ),
    )
}
TRAINING_STAGES = tuple(stage.name for stage in STAGES.values() if stage.trains)
ROLES = ("base", *TRAINING_STAGES)  # of a run's models: the base model, and what each training stage leaves
ENDPOINT_ROLE = "endpoint-"  # and the name: of an evaluation of a recipe's endpoint


@dataclass(frozen=True)
class EvaluateCheckpoint:
    """Evaluate weights that no step of the plan has made."""

    checkpoint: str  # a folder or a hub id


@dataclass(frozen=True)
class EvaluateEndpoint:
    """Evaluate a model behind a server, which needs no weights and no device here."""

    endpoint: Endpoint


@dataclass(frozen=True)
class Export:
    """Export a checkpoint for others."""

    checkpoint: str
    format: str  # a key of FORMATS
    source: str  # the folder it was exported from, for its card
    quant: str | None = None  # of a GGUF file
    trained_in: str = "none"  # the quantization of the weights that were trained


@dataclass(frozen=True)
class ReportModels:
    """Compare models, each recipe's against its own criteria of success."""

    success_criteria: dict[str, dict[str, Goal]] = field(default_factory=dict)  # recipe -> metric -> bounds


Options = EvaluateCheckpoint | EvaluateEndpoint | Export | ReportModels
OPTIONS: dict[str, tuple[type[Options], ...]] = {
    "evaluate": (EvaluateCheckpoint, EvaluateEndpoint),
    "export": (Export,),
    "report": (ReportModels,),
}


def stage_of(name: str, options: Options | None) -> Stage:
    """Return the stage of a step: its row of the table, with one process where a server computes."""
    stage = STAGES[name]
    return replace(stage, processes="one") if isinstance(options, EvaluateEndpoint) else stage


def endpoint_name(role: str | None) -> str | None:
    """Return which of a recipe's endpoints an evaluation is of, by its role; None for other roles."""
    return role.removeprefix(ENDPOINT_ROLE) if role and role.startswith(ENDPOINT_ROLE) else None


@dataclass(frozen=True)
class StepSpec:
    """All that decides what a stage process does: `step.json` of its folder."""

    name: str  # such as evaluate-grpo
    stage: str
    fingerprint: str
    payload: dict[str, Any]
    recipe: Recipe
    cluster: Cluster
    inputs: dict[str, str]  # role -> folder
    options: Options | None = None
    role: str | None = None  # of an evaluation of a run: which of ROLES or endpoints it is of
    schema: int = 1  # of this file: see artifact.SCHEMA

    @property
    def runs_as(self) -> Stage:
        return stage_of(self.stage, self.options)


def write_spec(folder: Path, spec: StepSpec) -> None:
    """Write what the process in `folder` shall do. An earlier request to stop is over, and failures count anew."""
    folder.mkdir(parents=True, exist_ok=True)
    if not this_restart():  # a committed script that Slurm starts again is not a new command
        begin_count(folder)
    (folder / STOP).unlink(missing_ok=True)
    write_json(folder / STEP, plain(spec))


def read_spec(folder: Path) -> StepSpec:
    """Read what the process in `folder` shall do; ArtifactError where the file is missing or cannot be used."""
    path = folder / STEP
    record = read_mapping(path)
    if record is None:
        raise ArtifactError(f"{path} is missing: start the step with python -m pipeline run")
    record = _upgrade(record)
    recipe, problems = parse(Recipe, record.get("recipe"), "recipe")
    cluster, more = parse(Cluster, record.get("cluster"), "cluster")
    options, of_options = _read_options(record)
    problems = [*problems, *more, *of_options]
    if recipe is None or cluster is None or problems:
        raise ArtifactError(
            *(f"{path}: {problem}" for problem in problems),
            "it was written by another version of the project; delete the folder and run again",
        )
    spec = read_record(path, StepSpec, _upgrade, recipe=recipe, cluster=cluster, options=options)
    assert spec is not None
    refuse_newer(path, spec.schema)
    if spec.stage not in STAGES:
        raise ArtifactError(f"{path}: stage: got {spec.stage!r}; expected one of {', '.join(STAGES)}")
    return spec


def _read_options(record: dict[str, Any]) -> tuple[Options | None, list[str]]:
    kinds = OPTIONS.get(str(record.get("stage")))
    value = record.get("options")
    if not kinds or value is None:
        return None, []
    names = set(value) if isinstance(value, dict) else set()
    kind = next((one for one in kinds if names and names <= {f.name for f in fields(one)}), kinds[0])
    return parse(kind, value, "options")


def _upgrade(record: dict[str, Any]) -> dict[str, Any]:
    """A step.json of schema 1 or 2 as one of schema 3: options were texts, the checkpoint stood beside them."""
    if "checkpoint" not in record:
        return record
    former = record.get("options")
    options = dict(former) if isinstance(former, dict) else {}
    with contextlib.suppress(KeyError, TypeError, ValueError):  # `parse` names what cannot be used
        options["success_criteria"] = json.loads(options["success_criteria"])
    if record["checkpoint"] is not None:
        options["checkpoint"] = record["checkpoint"]
    options_or_none = options if options or record.get("stage") == "report" else None
    return {**record, "options": options_or_none, "role": stage_and_role(str(record.get("name")))[1]}


def stage_processes(stage: Stage, cluster: Cluster) -> int:
    """How many processes a stage is started with on one node."""
    return process_count(cluster) if stage.processes == "all" else 1
