"""What a task is: its examples, its prompts, its targets and its judge.

A task is one module of `pipeline/tasks/` that defines `TASK`, a subclass of `Task`. `grade` is the only judge:
the rewards, the evaluation and the report all call it, so they cannot disagree.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pipeline.tasks
from pipeline import former_names
from pipeline.config.recipe import TaskChoice
from pipeline.core.errors import DataError, RecipeError, did_you_mean, join_first
from pipeline.core.schema import Constraint, parse
from pipeline.scoring.reading import REASONS, plain_characters
from pipeline.tasks.rows import SAMPLES, Columns, Row, file_problem, file_rows, filter_rows, hub_rows

Message = dict[str, str]  # {"role": …, "content": …}
Needs = Mapping[str, str]
FORMER_METHODS = {"asked": "example_from_text", "specimens": "audit_examples"}
FRAMEWORK_MODULES = ("task", "rows", "row_files")  # modules of this folder that are no task
PEEKED_ROWS = 1000  # rows of a file that `check` looks at
Part = Annotated[
    float, Constraint("a share below 1, or a whole number of rows", lambda v: 0 <= v < 1 or v == int(v) >= 1)
]


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
class Grade:
    """A judgement. `correct` is None where it cannot be verified; unanswered is never correct.

    `proxy` is for answers that cannot be verified: a stand-in for correctness, and shown as one wherever it is shown.
    `reason` is why there is no answer, a word of `pipeline.scoring.reading.REASONS`; None for one that was read.
    """

    correct: bool | None
    answered: bool
    answer: str | None
    proxy: bool | None = None
    reason: str | None = None


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
    hub: ClassVar[tuple[str, ...]] = ()  # the data sets of source `hub`
    columns: ClassVar[Columns] = {}  # what it reads of a row of a file -> other names that a file may have for it
    rewardable: ClassVar[bool] = True  # whether it has rows for GRPO
    answer_kind: ClassVar[str | None] = None  # of its final answers: a key of `rewards.audit.FINAL`; None: any text
    proxy: ClassVar[str | None] = None  # what `Grade.proxy` is, in words
    positive: ClassVar[str | None]  # the gold that F1 and recall count, None for tasks without one
    needs: ClassVar[Needs] = {}  # what a row has to have for sft and for grpo, in words
    breakdowns: ClassVar[tuple[str, ...]] = ()  # tags by which the report splits its figures
    published: ClassVar[tuple[dict[str, Any], ...]] = ()  # scores to stand beside: name, test, f1, …

    def __init_subclass__(cls) -> None:
        """Take a method that a task defines under a former name for the one that replaced it."""
        for old, new in FORMER_METHODS.items():
            if old in vars(cls):
                warnings.warn(f"{cls.__name__}.{old} is now {new}", FutureWarning, stacklevel=2)
                setattr(cls, new, vars(cls)[old])

    def __init__(self, choice: TaskChoice, params: Any, seed: int) -> None:
        self.choice, self.params, self.seed = choice, params, seed

    @property
    def source(self) -> str:
        """Where rows come from: as the recipe says, else a file that it names, else the task's own."""
        if self.choice.source != "auto":
            return self.choice.source
        return "path" if self.choice.files else self.sources[0]

    @abstractmethod
    def load(self) -> Splits:
        """Every row. DataError where a file cannot be read, with file and line."""

    @abstractmethod
    def grade(self, example: Example, completion: str, prompt_opens_think: bool) -> Grade:
        """Judge a completion (without its stop token). Of a question that someone types (`asked`) gold is ""."""

    def judge(self, example: Example, completion: str, prompt_opens_think: bool, truncated: bool) -> Grade:
        """The grade that rewards, evaluation and ask all use: a completion that was cut off is unanswered.

        `truncated`: it ran into the length limit, so it has no stop token. What it has committed to so far may be
        taken back in what is missing, and paying for it would reward never ending.
        """
        verdict = self.grade(example, completion, prompt_opens_think)
        if truncated:
            wrong, unmatched = None if verdict.correct is None else False, None if verdict.proxy is None else False
            return replace(verdict, correct=wrong, answered=False, proxy=unmatched, reason="truncated")
        if not verdict.answered and verdict.reason is None:
            return replace(verdict, reason="unread")
        return verdict

    @abstractmethod
    def is_well_formed(self, completion: str, prompt_opens_think: bool) -> bool:
        """Whether the completion keeps the form the task asks for, whatever it says."""

    def target_fault(self, example: Example) -> str | None:
        """Why the task's own judge would not pay a row's target in full; None where it does, or the row has no gold.

        What SFT teaches is what evaluation calls right and the form reward pays: `preprocess` asks this of each row
        that is learned from, and reports the others.
        """
        if not example.gold or not example.target:
            return None
        verdict = self.judge(example, example.target, False, False)
        if not verdict.answered:
            return f"its target is unanswered ({REASONS.get(verdict.reason or '', verdict.reason)})"
        if not (verdict.correct or verdict.proxy):
            return f"its target answers {verdict.answer!r}, its gold is {example.gold!r}"
        return None if self.is_well_formed(example.target, False) else "its target is not in the form that is rewarded"

    def solve(self, example: Example) -> str | None:
        """The answer of an exact program, which then stands beside the models; None where the task has none."""
        return None

    def row_problem(self, values: Any) -> str | None:
        """What is wrong with a row of a file, in words; what `check` says about the first rows."""
        return None

    def read(self, problem: Callable[[Any], str | None], **where: str) -> tuple[list[Row], list[str]]:
        """Rows of the task's source that `problem` has nothing to say against, and a sentence for each skipped one.

        `where` as for `read_places`. DataError names what cannot be read, with its place.
        """
        rows, skipped = self.read_places(problem, **where)
        return [row for row in rows if row], skipped

    def read_places(
        self,
        problem: Callable[[Any], str | None],
        *,
        hub: str = "",
        split: str = "train",
        config: str | None = None,
        sample: str = "",
    ) -> tuple[list[Row | None], list[str]]:
        """As `read`, with None in the place of each skipped row: splits are drawn over all places (`divide`).

        `hub` is the data set (default: the first), with its split and configuration; `sample` the name of the file
        of the project's own rows (default: the task's).
        """
        if self.source == "path":
            return self._read_file(self.choice.path, problem)
        if self.source == "hub":
            name = hub or self.hub[0]
            rows, what = hub_rows(name, self.repositories()[name], split=split, config=config), name
        else:
            path = SAMPLES / f"{sample or self.name}.jsonl"
            rows, what = file_rows(path), str(path)
        return filter_rows(rows, problem, what, skip_bad=self.choice.on_bad_row == "skip")

    def read_named(self, problem: Callable[[Any], str | None]) -> tuple[dict[str, list[Row]], list[str]]:
        """Rows of the files that are named for themselves, as `test` and `validation`, and a sentence a skipped one."""
        found, skipped = {}, list[str]()
        for name, path in (("test", self.choice.test_path), ("validation", self.choice.validation_path)):
            if path:
                rows, bad = self._read_file(path, problem)
                found[name] = [row for row in rows if row]
                skipped += bad
        return found, skipped

    def _read_file(self, path: str | None, problem: Callable[[Any], str | None]) -> tuple[list[Row | None], list[str]]:
        """The rows of a file; none where none is named: an evaluation may name its test rows alone."""
        if path is None:
            return [], []
        rows = file_rows(Path(path), self.columns)
        return filter_rows(rows, problem, path, skip_bad=self.choice.on_bad_row == "skip")

    def peek(self) -> tuple[list[str], list[str]]:
        """(what is wrong, what is worth knowing) with the first rows of the files that it would read, as sentences."""
        wrong, notes = list[str](), list[str]()
        for key, path in self.choice.files.items() if self.source == "path" else ():
            if problem := file_problem(Path(path)):
                wrong.append(f"{key}: {problem}")
                continue
            try:
                rows = list(islice(file_rows(Path(path), self.columns), PEEKED_ROWS))
            except DataError as error:
                wrong += error.problems
                continue
            bad = [f"{row.place}: {told}" for row in rows if (told := row.fault or self.row_problem(row.values))]
            if not rows:
                wrong.append(f"{key}: {path} has no rows")
            elif bad:
                many = f"{len(bad)} of its first {len(rows)} rows cannot be read: {join_first(bad, between='; ')}"
                stops = self.choice.on_bad_row == "error" or len(bad) == len(rows)
                fix = "correct them, or leave them out with task.on_bad_row=skip (they are counted)"
                (wrong if stops else notes).append(f"{key}: {many}" + (f". Fix: {fix}" if stops else "; left out"))
        return wrong, notes

    def repositories(self) -> dict[str, str | None]:
        """The data sets of source `hub`, with the commit each is pinned to."""
        pinned = self.choice.revision
        return {name: pinned.get(name) if isinstance(pinned, dict) else pinned for name in self.hub}

    def smoke_test_params(self) -> dict[str, Any]:
        """Params that leave a few dozen rows of every kind."""
        former = getattr(self, "rehearsal", None)  # what a task written for version 0.1 calls it
        return dict(former()) if former else {}

    def audit_examples(self) -> list[Example]:
        """A few rows for the audit of rewards, at no cost: of the project's own, where the task has such."""
        if "sample" not in self.sources:
            return []
        choice = replace(self.choice, source="sample", revision=None)
        splits = type(self)(choice, parse(self.Params, self.smoke_test_params())[0], self.seed).load()
        return [example for example in splits.grpo if example.gold][:3]

    def messages(self, example: Example) -> list[Message]:
        """The conversation that asks the question."""
        return [{"role": "user", "content": example.question}]

    def example_from_text(self, question: str) -> Example:
        """A question that someone types: no row, and no gold to grade against."""
        return Example("asked", question, "", "asked")

    def problems(self) -> list[str]:
        """Settings that cannot work together."""
        return []

    def split_names(self) -> list[str]:
        """The splits that an evaluation may ask for: those of `load().tests`, and validation."""
        return ["test", "validation"]


def task_names() -> list[str]:
    """Every module of this folder but those that all tasks stand on."""
    return sorted(m.name for m in pkgutil.iter_modules(pipeline.tasks.__path__) if m.name not in FRAMEWORK_MODULES)


def make_task(choice: TaskChoice, seed: int) -> tuple[Task | None, list[str]]:
    """The task of a recipe, and everything that is wrong with its settings."""
    if choice.name not in task_names():
        return None, [f"task.name: unknown task {choice.name!r}; {did_you_mean(choice.name, task_names())}"]
    cls: type[Task] = importlib.import_module(f"pipeline.tasks.{choice.name}").TASK
    params, problems = parse(cls.Params, choice.params, "task.params")
    if choice.source not in ("auto", *cls.sources):
        problems.append(
            f"task.source: {choice.source!r} is nothing {choice.name} offers; use {' or '.join(cls.sources)}"
        )
    if problems:
        return None, problems
    task = cls(choice, params, seed)
    found = [*_revision_problems(task), *task.problems()]
    return (None if found else task), found


def _revision_problems(task: Task) -> list[str]:
    """Pins that fit no data set."""
    pinned, found = task.choice.revision, []
    if isinstance(pinned, str) and len(task.hub) > 1:
        found.append(
            f"task.revision: {pinned!r} is one commit, but {task.name} reads {' and '.join(task.hub)}; "
            "write {name: commit}"
        )
    for name in pinned if isinstance(pinned, dict) else ():
        if name not in task.hub:
            found.append(f"task.revision: {task.name} reads no data set {name!r}; {did_you_mean(name, task.hub)}")
    return found


def hold_out(
    examples: Sequence[Example], part: float, seed: int, what: str
) -> tuple[list[Example], list[Example], list[str]]:
    """(kept, held out, left out): `part` of the rows held out, none of whose groups is among those kept.

    `part` is a share or a number of rows. Drawn as `datasets.Dataset.train_test_split(test_size=part, seed=seed)`
    draws, so a split that is published by its seed is the same here; what it would keep beside a held-out row of the
    same group is left out, by its id. DataError where no row would be kept.
    """
    kept, held, left = _hold_out(examples, part, seed, what)
    return [example for example in kept if example], held, left


def _hold_out(
    examples: Sequence[Example | None], part: float, seed: int, what: str
) -> tuple[list[Example | None], list[Example], list[str]]:
    """As `hold_out`; None is the place of a row that cannot be read.

    A share is drawn over all places and then loses such rows, so that the others are those of the published split; a
    number is that many rows.
    """
    import numpy as np

    count = math.ceil(part * len(examples)) if part < 1 else int(part)
    if count >= (len(examples) if part < 1 else sum(example is not None for example in examples)):
        raise DataError(
            f"task.params.{what}: {part:g} would take {count} of {len(examples)} rows and leave none to learn; "
            f"use less, a larger file, or a file of its own for {what} rows: task.test_path, task.validation_path"
        )
    order = np.random.default_rng(seed).permutation(len(examples))
    if part >= 1:
        good = [place for place, k in enumerate(order) if examples[k] is not None]
        count = good[count]  # the place of the first good row that is not held out
    held = [example for k in order[:count] if (example := examples[k])]
    groups = {example.group for example in held}
    rest = [examples[k] for k in order[count:]]
    kept = [example for example in rest if example is None or example.group not in groups]
    return kept, held, [example.id for example in rest if example and example.group in groups]


@dataclass(frozen=True)
class Division:
    """Rows for training, and those held out of it; `left` are the ids that would have put a group on both sides."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    left: list[str]


def divide(
    pool: Sequence[Example | None],
    seed: int,
    *,
    test: float | Sequence[Example | None],
    validation: float | Sequence[Example | None],
    names: tuple[str, str] = ("test", "validation"),
) -> Division:
    """The training rows of a pool: `test`, then `validation` are held out of it, each a share or a number of its rows.

    A part that is rows of its own takes none of the pool, which then loses the rows of its groups. None in the pool is
    the place of a row that cannot be read. `names` are the settings that say how many.
    """
    rest, held, left = list(pool), dict[str, list[Example]](), list[str]()
    for name, part in zip(names, (test, validation), strict=True):
        if not isinstance(part, int | float):
            held[name] = [example for example in part if example]
        elif not pool:
            held[name] = []
        else:
            rest, held[name], more = _hold_out(rest, part, seed, name)
            left += more
    groups = {example.group for rows in held.values() for example in rows}
    train = [example for example in rest if example and example.group not in groups]
    left += [example.id for example in rest if example and example.group in groups]
    return Division(train, held[names[1]], held[names[0]], left)


_TOKEN = re.compile(  # numbers, words, and what makes a formula another one
    r"\d+(?:[.,]\d+)*|[^\W\d_]+|[-+*/^<>=≤≥≠±×÷·%√|()\[\]]|(?<=[\d)])!|(?<!\d)\.(?=\d)"
)
_HYPHEN = re.compile(r"(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})")


def group_of(question: str) -> str:
    """What questions share that are copies of each other: the same words, numbers and signs in the same order.

    Case, punctuation, articles and blanks do not count; `3 + x` and `3 - x`, `(2+3)*4` and `2+(3*4)` are different.
    """
    found = _TOKEN.findall(_HYPHEN.sub(" ", plain_characters(question)).casefold())
    kept = []
    for word, following in zip(found, [*found[1:], ""], strict=True):
        article = word in ("the", "an") or (word == "a" and len(following) > 1 and following.isalpha())
        if not article:
            kept.append(word.replace(",", ""))
    return sha256(" ".join(kept).encode("utf-8", "replace")).hexdigest()[:10]


def split_summary(train: Sequence[Example], held: Mapping[str, Sequence[Example]], **more: Any) -> dict[str, Any]:
    """What an artifact records of a split: rows, and how many groups are in training and in another split too."""
    trained = {example.group for example in train}
    overlap = sum(len(trained & {example.group for example in rows}) for rows in held.values())
    return {"overlap": overlap, "train": len(train), **{name: len(rows) for name, rows in held.items()}, **more}


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
            "tags": example.tags or None,  # parquet knows no mapping without keys
        }


def example_of(row: dict[str, Any]) -> Example:
    """The Example of a record."""
    return Example(row["id"], row["question"], row["gold"], row["group"], row["tags"] or {})


__getattr__ = former_names(__name__, {"Verdict": "Grade", "proof_of": "split_summary"})
