"""What a task is: its examples, its prompts, its targets and its judge.

A task is one module of `pipeline/tasks/` that defines `TASK`, a subclass of `Task`. `grade` is the only judge:
the rewards, the evaluation and the report all call it, so they cannot disagree.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import pipeline.tasks
from pipeline.errors import RecipeError, did_you_mean
from pipeline.recipe import TaskChoice
from pipeline.typed import build

Message = dict[str, str]  # {"role": …, "content": …}


@dataclass(frozen=True)
class Example:
    """One question. `group` names what its rows share (the premise): rows of one group are not independent."""

    id: str
    question: str
    gold: str
    group: str
    tags: dict[str, Any] = field(default_factory=dict)
    target: str = ""  # the completion SFT learns; the thought is opened by `<think>`


@dataclass(frozen=True)
class Verdict:
    """A judgement. `correct` is None where it cannot be verified; unanswered is never correct."""

    correct: bool | None
    answered: bool
    answer: str | None


@dataclass(frozen=True)
class Splits:
    """A task's rows. `sft` and `grpo` are for training, `tests` for the report, the main one first."""

    sft: list[Example]
    grpo: list[Example]
    validation: list[Example]
    tests: dict[str, list[Example]]
    proof: dict[str, Any]  # what the artifact records about the splits


class Task(ABC):
    """Subclasses give `Params` (a frozen dataclass: the settings under `task.params`) and the methods below."""

    name: ClassVar[str]
    title: ClassVar[str]
    Params: ClassVar[type]
    sources: ClassVar[tuple[str, ...]]  # what `task.source` may be; the first is `auto`
    hub: ClassVar[str | None] = None  # the data set of source `hub`
    positive: ClassVar[str | None]  # the gold that F1 and recall count, None for tasks without one
    breakdowns: ClassVar[tuple[str, ...]] = ()  # tags by which the report splits its figures
    published: ClassVar[tuple[dict[str, Any], ...]] = ()  # scores to stand beside: name, test, f1, …

    def __init__(self, choice: TaskChoice, params: Any, seed: int) -> None:
        self.choice, self.params, self.seed = choice, params, seed

    @property
    def source(self) -> str:
        return self.sources[0] if self.choice.source == "auto" else self.choice.source

    @abstractmethod
    def load(self) -> Splits:
        """Every row. DataError where a file cannot be read, with file and line."""

    @abstractmethod
    def grade(self, example: Example, completion: str, prefilled: bool) -> Verdict:
        """Judge a completion (without its stop token). Of a question that someone types (`asked`) gold is ""."""

    @abstractmethod
    def is_well_formed(self, completion: str, prefilled: bool) -> bool:
        """Whether the completion keeps the form the task asks for, whatever it says."""

    def solve(self, example: Example) -> str | None:
        """The answer of an exact program, which then stands beside the models; None where the task has none."""
        return None

    def rehearsal(self) -> dict[str, Any]:
        """Params that leave a few dozen rows of every kind."""
        return {}

    def messages(self, example: Example) -> list[Message]:
        """The conversation that asks the question."""
        return [{"role": "user", "content": example.question}]

    def asked(self, question: str) -> Example:
        """A question that someone types: no row, and no gold to grade against."""
        return Example("asked", question, "", "asked")

    def problems(self) -> list[str]:
        """Settings that cannot work together."""
        return []

    def split_names(self) -> list[str]:
        """The splits that an evaluation may ask for: those of `load().tests`, and validation."""
        return ["test", "validation"]


def task_names() -> list[str]:
    """Every module of this folder but this one."""
    return sorted(m.name for m in pkgutil.iter_modules(pipeline.tasks.__path__) if m.name != "task")


def make_task(choice: TaskChoice, seed: int) -> tuple[Task | None, list[str]]:
    """The task of a recipe, and everything that is wrong with its settings."""
    if choice.name not in task_names():
        return None, [f"task.name: unknown task {choice.name!r}; {did_you_mean(choice.name, task_names())}"]
    cls: type[Task] = importlib.import_module(f"pipeline.tasks.{choice.name}").TASK
    params, problems = build(cls.Params, choice.params, "task.params")
    if choice.source not in ("auto", *cls.sources):
        problems.append(
            f"task.source: {choice.source!r} is nothing {choice.name} offers; use {' or '.join(cls.sources)}"
        )
    if problems:
        return None, problems
    task = cls(choice, params, seed)
    found = task.problems()
    return (None if found else task), found


def split_problems(task: Task, asked: Sequence[str]) -> list[str]:
    """What an evaluation asks for and the task does not have."""
    known = task.split_names()
    return [
        f"evaluate.splits: {task.name} with source {task.source!r} has no split {name!r}; {did_you_mean(name, known)}"
        for name in asked
        if name not in known
    ]


def task_of(choice: TaskChoice, seed: int) -> Task:
    """The task of a recipe; RecipeError with every problem."""
    task, problems = make_task(choice, seed)
    if task is None:
        raise RecipeError(*problems)
    return task


def resolved_params(task: Task) -> dict[str, Any]:
    """The task's settings with every default filled in: what enters a fingerprint."""
    return asdict(task.params)


def rows(task: Task, examples: list[Example]) -> Iterator[dict[str, Any]]:
    """Examples as conversational prompt/completion records with their metadata, ready for parquet."""
    for example in examples:
        yield {
            "id": example.id,
            "prompt": task.messages(example),
            "completion": [{"role": "assistant", "content": example.target}],
            "question": example.question,
            "gold": example.gold,
            "group": example.group,
            "tags": example.tags,
        }


def example_of(row: dict[str, Any]) -> Example:
    """The Example of a record."""
    return Example(row["id"], row["question"], row["gold"], row["group"], row["tags"] or {})
