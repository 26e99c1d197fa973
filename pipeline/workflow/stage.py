"""The table of stages, and the order that a stage process is given: `step.json` of its folder.

STAGES["sft"].reads     the parts of a recipe that decide the stage's result
read_spec(folder)      what the process in this folder has to do
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.cluster import Cluster, process_count
from pipeline.config.recipe import Recipe
from pipeline.core.errors import ArtifactError
from pipeline.core.files import write_json
from pipeline.core.hashing import plain
from pipeline.core.records import read_mapping, read_record
from pipeline.core.schema import parse
from pipeline.workflow.artifact import STEP, STOP, refuse_newer


@dataclass(frozen=True)
class Stage:
    """A row of the table. `reads` are the parts of a recipe that decide its result; `revision` its code."""

    name: str
    about: str
    reads: tuple[str, ...]
    revision: int
    processes: str  # "one", or "all": under torchrun with every process of the cluster

    @property
    def module(self) -> str:
        return f"pipeline.{self.name}"


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "preprocess",
            "rows, splits and their proof; for a model from scratch also its tokenizer and first weights",
            ("seed", "model.name", "model.revision", "model.random_init", "model.gguf", "model.chat_template", "task"),
            2,
            "one",
        ),
        Stage("sft", "supervised fine-tuning on the task's targets", ("seed", "model", "lora", "sft"), 2, "all"),
        Stage("grpo", "reinforcement learning from the task's rewards", ("seed", "model", "lora", "grpo"), 2, "all"),
        Stage("evaluate", "answers to every test row, graded", ("seed", "model", "evaluate"), 3, "all"),
        Stage("report", "the models side by side, with intervals and curves", ("seed", "evaluate", "report"), 4, "one"),
        Stage("export", "a checkpoint for others: adapter, merged model or GGUF, with its card", ("model",), 2, "one"),
    )
}


@dataclass(frozen=True)
class StepSpec:
    """What a stage process is told: `step.json` of its folder. Nothing else decides what it does."""

    name: str  # such as evaluate-grpo
    stage: str
    fingerprint: str
    payload: dict[str, Any]
    recipe: Recipe
    cluster: Cluster
    inputs: dict[str, str]  # role -> folder
    checkpoint: str | None = None  # weights to evaluate that are no step's, or to export
    options: dict[str, str] = field(default_factory=dict)  # of an export: format, …; of a report: success_criteria
    schema: int = 1  # of this file: see artifact.SCHEMA


def write_spec(folder: Path, spec: StepSpec) -> None:
    """Tell the process that will run in `folder` what to do; an earlier request to stop is over."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STOP).unlink(missing_ok=True)
    write_json(folder / STEP, plain(spec))


def read_spec(folder: Path) -> StepSpec:
    record = read_mapping(folder / STEP)
    if record is None:
        raise ArtifactError(f"{folder / STEP} is missing: start the step with python -m pipeline run")
    recipe, problems = parse(Recipe, record.get("recipe"), "recipe")
    cluster, more = parse(Cluster, record.get("cluster"), "cluster")
    if recipe is None or cluster is None:
        raise ArtifactError(
            *(f"{folder / STEP}: {problem}" for problem in problems + more),
            "it was written by another version of the project; delete the folder and run again",
        )
    spec = read_record(folder / STEP, StepSpec, recipe=recipe, cluster=cluster)
    assert spec is not None
    refuse_newer(folder / STEP, spec.schema)
    if spec.stage not in STAGES:
        raise ArtifactError(f"{folder / STEP}: stage: got {spec.stage!r}; expected one of {', '.join(STAGES)}")
    return spec


def stage_processes(stage: Stage, cluster: Cluster) -> int:
    """How many processes a stage is started with on one node."""
    return process_count(cluster) if stage.processes == "all" else 1
