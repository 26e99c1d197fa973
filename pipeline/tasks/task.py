"""The base class of tasks: examples, prompts, targets and the grader.

A task is one module of `pipeline/tasks/` that defines `TASK`, a subclass of `Task`. Rewards, evaluation and report all
call its `grade`, so they cannot disagree.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import pipeline.tasks
from pipeline import former_names
from pipeline.config.recipe import TaskChoice
from pipeline.core.errors import DataError, RecipeError, did_you_mean, join_first
from pipeline.core.hashing import plain
from pipeline.core.schema import Constraint, parse
from pipeline.scoring.answers import CLOSE, OPEN
from pipeline.scoring.reading import REASONS, plain_characters
from pipeline.tasks.rows import SAMPLES, Columns, Row, bad_row, file_problem, file_rows, filter_rows, hub_rows

Message = dict[str, str]  # {"role": …, "content": …}
Needs = Mapping[str, str]
FORMER = {"Verdict": "Grade", "proof_of": "split_summary"}  # what a task that someone wrote may import
FORMER_METHODS = {
    "asked": "example_from_text",
    "specimens": "audit_examples",
    "rehearsal": "smoke_test_params",
}
FRAMEWORK_MODULES = ("task", "rows", "row_files")  # modules of this folder that are not tasks
PEEKED_ROWS = 1000  # rows of a file that `check` reads
Part = Annotated[
    float, Constraint("a share below 1, or a whole number of rows", lambda v: 0 <= v < 1 or v == int(v) >= 1)
]


@dataclass(frozen=True)
class Example:
    """One question. Examples with the same `group` (such as one premise) are not independent."""

    id: str
    question: str
    gold: str
    group: str
    tags: dict[str, Any] = field(default_factory=dict)
    target: str = ""  # the completion that SFT learns; `<think>` opens its thought


@dataclass(frozen=True)
class Grade:
    """The grade of one completion. `correct` is None where it cannot be verified; unanswered is never correct.

    `proxy` is a stand-in for correctness where answers cannot be verified; it is always reported as a proxy.
    `reason` is why there is no answer, a key of `pipeline.scoring.reading.REASONS`; None for an answer that was read.
    """

    correct: bool | None
    answered: bool
    answer: str | None
    proxy: bool | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Splits:
    """A task's rows: `sft` and `grpo` for training, `tests` for the report with the main test set first."""

    sft: list[Example]
    grpo: list[Example]
    validation: list[Example]
    tests: dict[str, list[Example]]
    proof: dict[str, Any]  # the artifact's record of the splits: see `split_summary`


class Task(ABC):
    """A task. Subclasses define `Params` (a frozen dataclass, the settings `task.params`) and the methods below."""

    name: ClassVar[str]
    title: ClassVar[str]
    Params: ClassVar[type]
    sources: ClassVar[tuple[str, ...]]  # the values of `task.source`; the first is `auto`
    hub: ClassVar[tuple[str, ...]] = ()  # the data sets of source `hub`
    columns: ClassVar[Columns] = {}  # each column that it reads -> other names for it in files
    rewardable: ClassVar[bool] = True  # whether it has rows for GRPO
    answer_kind: ClassVar[str | None] = None  # of its final answers: a key of `rewards.audit.FINAL`; None: any text
    proxy: ClassVar[str | None] = None  # a description of `Grade.proxy`
    positive: ClassVar[str | None]  # the gold that F1 and recall count, None for tasks without one
    needs: ClassVar[Needs] = {}  # the columns that a row needs for sft and for grpo, as text for messages
    breakdowns: ClassVar[tuple[str, ...]] = ()  # tags by which the report splits its figures
    published: ClassVar[tuple[dict[str, Any], ...]] = ()  # published scores for comparison: name, test, f1, …

    def __init_subclass__(cls) -> None:
        """Map a method that a task defines under a former name to its current name."""
        for old, new in FORMER_METHODS.items():
            if old in vars(cls):
                warnings.warn(f"{cls.__name__}.{old} is now {new}", FutureWarning, stacklevel=2)
                setattr(cls, new, vars(cls)[old])

    def __init__(self, choice: TaskChoice, params: Any, seed: int) -> None:
        self.choice, self.params, self.seed = choice, params, seed

    @property
    def source(self) -> str:
        """The source of the rows: the recipe's, else `path` if the recipe names a file, else the task's default."""
        if self.choice.source != "auto":
            return self.choice.source
        return "path" if self.choice.files else self.sources[0]

    @abstractmethod
    def load(self) -> Splits:
        """Return every row. Raises DataError with file and line for a file that cannot be read."""

    @abstractmethod
    def grade(self, example: Example, completion: str, prompt_opens_think: bool) -> Grade:
        """Grade a completion (without its stop token). `example.gold` is "" for a question that a user types."""

    def judge(self, example: Example, completion: str, prompt_opens_think: bool, truncated: bool) -> Grade:
        """Return the grade that rewards, evaluation and chat all use: a truncated completion is unanswered.

        `truncated`: the completion reached the length limit, so it has no stop token. Its missing rest could retract
        the answer so far, and a reward for it would teach the model never to end.
        """
        grade = self.grade(example, completion, prompt_opens_think)
        if truncated:
            wrong, unmatched = None if grade.correct is None else False, None if grade.proxy is None else False
            return replace(grade, correct=wrong, answered=False, proxy=unmatched, reason="truncated")
        if not grade.answered and grade.reason is None:
            return replace(grade, reason="unread")
        return grade

    @abstractmethod
    def is_well_formed(self, completion: str, prompt_opens_think: bool) -> bool:
        """Return whether the completion has the task's format, independent of its answer."""

    def target_fault(self, example: Example) -> str | None:
        """Return why a row's own target would not earn the full reward; None if it does, or the row has no gold.

        SFT must teach answers that evaluation grades as correct and the format reward accepts. `preprocess` checks
        every SFT row and reports those that fail.
        """
        if not example.gold or not example.target:
            return None
        grade = self.judge(example, example.target, False, False)
        if not grade.answered:
            return f"its target is unanswered ({REASONS.get(grade.reason or '', grade.reason)})"
        if not (grade.correct or grade.proxy):
            return f"its target answers {grade.answer!r}, its gold is {example.gold!r}"
        return None if self.is_well_formed(example.target, False) else "its target is not in the form that is rewarded"

    def solve(self, example: Example) -> str | None:
        """Return the answer of an exact solver, which the report lists as a baseline; None if the task has none."""
        return None

    def check_thought(self, example: Example, completion: str, prompt_opens_think: bool) -> float | None:
        """Return the share of the thought's steps before the first that does not follow; None without a checker.

        It is 1 only for a valid proof of the answer that is given. The report shows the share of valid proofs, because
        a right answer can be a guess; the reward `proof` pays for them.
        """
        return None

    def row_problem(self, values: Any) -> str | None:
        """Return the problem of a file's row, which `check` prints for the first rows; None if the row is good."""
        return None

    def read(self, problem: Callable[[Any], str | None], **where: str) -> tuple[list[Row], list[str]]:
        """Return the good rows of the task's source, for which `problem` returns None, and a message for each bad one.

        `where` as for `read_places`. Raises DataError, with file and line, for bad rows that are not to be skipped.
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
        """Return the same as `read`, with None in the place of each skipped row; `divide` draws over all places.

        `hub` is the data set (default: the first), with its split and configuration. `sample` is the file of sample
        rows (default: the task's).
        """
        if self.source == "path":
            return self._read_file(self.choice.path, problem)
        if self.source == "hub":
            name = hub or self.hub[0]
            rows, where = hub_rows(name, self.repositories()[name], split=split, config=config), name
        else:
            path = SAMPLES / f"{sample or self.name}.jsonl"
            rows, where = file_rows(path), str(path)
        return filter_rows(rows, problem, where, skip_bad=self.choice.on_bad_row == "skip")

    def read_named(self, problem: Callable[[Any], str | None]) -> tuple[dict[str, list[Row]], list[str]]:
        """Return the rows of `task.test_path` and `task.validation_path` by split, and a message for each bad one."""
        found, skipped = {}, list[str]()
        for name, path in (("test", self.choice.test_path), ("validation", self.choice.validation_path)):
            if path:
                rows, bad = self._read_file(path, problem)
                found[name] = [row for row in rows if row]
                skipped += bad
        return found, skipped

    def _read_file(self, path: str | None, problem: Callable[[Any], str | None]) -> tuple[list[Row | None], list[str]]:
        """Return the rows of a file; none for no file, because an evaluation may name its test rows alone."""
        if path is None:
            return [], []
        rows = file_rows(Path(path), self.columns)
        return filter_rows(rows, problem, path, skip_bad=self.choice.on_bad_row == "skip")

    def make_splits(
        self,
        example: Callable[[Row], Example],
        rows: Sequence[Row | None],
        named: Mapping[str, Sequence[Row]],
        skipped: list[str],
    ) -> Splits:
        """Return the splits of a task with one kind of rows and `Params` with test, validation and rows.

        `rows` and `named` are the results of `read_places` and `read_named`, `skipped` the messages of both.
        """
        p = self.params
        parts = {name: [example(row) for row in part] for name, part in named.items()}
        done = divide(
            [example(row) if row else None for row in rows],
            self.seed,
            test=parts.get("test", p.test),
            validation=parts.get("validation", p.validation),
        )
        train = done.train[: p.rows]
        held = {"validation": done.validation, "test": done.test}
        summary = split_summary(train, held, same_question=done.left, skipped=skipped)
        tests = {"test": done.test} if done.test else {}
        return Splits(train, train if self.rewardable else [], done.validation, tests, summary)

    def bad_rows(self) -> list[str]:
        """Return a message for each bad row of all of the task's files, with file and line."""
        found: list[str] = []
        for path in self.choice.files.values():
            try:
                for row in file_rows(Path(path), self.columns):
                    if message := row.fault or self.row_problem(row.values):
                        found.append(bad_row(row, message))
            except DataError as error:
                found += error.problems
        return found

    def peek(self) -> tuple[list[str], list[str]]:
        """Read the first rows of the task's files. Returns (errors, notes) as messages."""
        errors, notes = list[str](), list[str]()
        for key, path in self.choice.files.items() if self.source == "path" else ():
            if problem := file_problem(Path(path)):
                errors.append(f"{key}: {problem}")
                continue
            try:
                rows = list(islice(file_rows(Path(path), self.columns), PEEKED_ROWS))
            except DataError as error:
                errors += error.problems
                continue
            bad = [f"{row.place}: {problem}" for row in rows if (problem := row.fault or self.row_problem(row.values))]
            if not rows:
                errors.append(f"{key}: {path} has no rows")
            elif bad:
                many = f"{len(bad)} of its first {len(rows)} rows cannot be read: {join_first(bad, between='; ')}"
                stops = self.choice.on_bad_row == "error" or len(bad) == len(rows)
                fix = "correct them, or leave them out with task.on_bad_row=skip (they are counted)"
                (errors if stops else notes).append(f"{key}: {many}" + (f". Fix: {fix}" if stops else "; left out"))
        return errors, notes

    def repositories(self) -> dict[str, str | None]:
        """Return the data sets of source `hub`, each with its pinned commit or None."""
        pinned = self.choice.revision
        return {name: pinned.get(name) if isinstance(pinned, dict) else pinned for name in self.hub}

    def smoke_test_params(self) -> dict[str, Any]:
        """Return params that leave a few dozen rows of every kind."""
        return {}

    def audit_examples(self) -> list[Example]:
        """Return a few sample rows for the audit of rewards; none if the task has no sample rows."""
        if "sample" not in self.sources:
            return []
        choice = replace(self.choice, source="sample", revision=None)
        splits = type(self)(choice, parse(self.Params, self.smoke_test_params())[0], self.seed).load()
        return [example for example in splits.grpo if example.gold][:3]

    def messages(self, example: Example) -> list[Message]:
        """Return the conversation of the prompt."""
        return [{"role": "user", "content": example.question}]

    def example_from_text(self, question: str) -> Example:
        """Return an example without gold for a question that a user types."""
        return Example("asked", question, "", "asked")

    def problems(self) -> list[str]:
        """Return an error message for each conflict between settings."""
        return []

    def split_names(self) -> list[str]:
        """Return the values of `evaluate.splits`: the names in `load().tests`, and validation."""
        return ["test", "validation"]


def task_names() -> list[str]:
    """Return the names of all tasks: every module of this folder but those that all tasks share."""
    return sorted(m.name for m in pkgutil.iter_modules(pipeline.tasks.__path__) if m.name not in FRAMEWORK_MODULES)


def make_task(choice: TaskChoice, seed: int) -> tuple[Task | None, list[str]]:
    """Return (the task of a recipe or None, error messages for its settings)."""
    if choice.name not in task_names():
        return None, [f"task.name: unknown task {choice.name!r}; {did_you_mean(choice.name, task_names())}"]
    cls: type[Task] = importlib.import_module(f"pipeline.tasks.{choice.name}").TASK
    params, problems = parse(cls.Params, choice.params, "task.params")
    if choice.source not in ("auto", *cls.sources):
        problems.append(
            f"task.source: got {choice.source!r}; expected a source of {choice.name}: {', '.join(cls.sources)}"
        )
    if problems:
        return None, problems
    task = cls(choice, params, seed)
    found = [*_revision_problems(task), *task.problems()]
    return (None if found else task), found


def _revision_problems(task: Task) -> list[str]:
    """Return an error message for each pinned commit that matches no data set of the task."""
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
    """Return (kept, held out, ids left out): `part` of the rows is held out, and no group is on both sides.

    `part` is a share or a number of rows. The draw equals `datasets.Dataset.train_test_split(test_size=part,
    seed=seed)`, so splits that are published by seed are reproduced. Kept rows in the group of a held-out row are left
    out and returned by id. Raises DataError if no row would be kept.
    """
    kept, held, left = _hold_out(examples, part, seed, what)
    return [example for example in kept if example], held, left


def _hold_out(
    examples: Sequence[Example | None], part: float, seed: int, what: str
) -> tuple[list[Example | None], list[Example], list[str]]:
    """Return the same as `hold_out`; None in `examples` is the place of an unreadable row.

    A share is drawn over all places and then loses the unreadable rows, so that the other rows are those of the
    published split. A number is a number of readable rows.
    """
    import numpy as np

    count = math.ceil(part * len(examples)) if part < 1 else int(part)
    if count >= (len(examples) if part < 1 else sum(example is not None for example in examples)):
        raise DataError(
            f"task.params.{what}: {part:g} would hold out {count} of {len(examples)} rows and leave none for training. "
            f"Fix: use less, a larger file, or a separate file for {what} rows: task.test_path, task.validation_path"
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
    """Training and held-out rows; `left` are the ids left out because their group would be on both sides."""

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
    """Split a pool: hold out `test`, then `validation`, each a share or a number of its rows; the rest is training.

    A part may also be a list of rows from elsewhere. Then the pool keeps its rows but loses those in the part's groups.
    None in the pool is the place of an unreadable row. `names` are the settings' names for error messages.
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


_TOKEN = re.compile(  # numbers, words, and the signs that distinguish formulas
    r"\d+(?:[.,]\d+)*|[^\W\d_]+|[-+*/^<>=≤≥≠±×÷·%√|()\[\]]|(?<=[\d)])!|(?<!\d)\.(?=\d)"
)
_HYPHEN = re.compile(r"(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})")


def group_of(question: str) -> str:
    """Return a hash that is equal for copies of a question: the same words, numbers and signs in the same order.

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
    """Return the artifact's record of the splits: rows of each, and `overlap`, the groups in training and elsewhere."""
    trained = {example.group for example in train}
    overlap = sum(len(trained & {example.group for example in rows}) for rows in held.values())
    return {"overlap": overlap, "train": len(train), **{name: len(rows) for name, rows in held.items()}, **more}


def thought_block(thought: str) -> str:
    r"""Return a thought in its tags, each tag on its own line: `<think>\n…\n</think>`."""
    return f"{OPEN}\n{thought}\n{CLOSE}" if thought else f"{OPEN}\n{CLOSE}"


def split_problems(task: Task, wanted: Sequence[str]) -> list[str]:
    """Return an error message for each split that an evaluation wants and the task does not have."""
    known = task.split_names()
    return [
        f"evaluate.splits: {task.name} with source {task.source!r} has no split {name!r}; {did_you_mean(name, known)}"
        for name in wanted
        if name not in known
    ]


def task_of(choice: TaskChoice, seed: int) -> Task:
    """Return the task of a recipe. Raises RecipeError with every problem."""
    task, problems = make_task(choice, seed)
    if task is None:
        raise RecipeError(*problems)
    return task


def resolved_params(task: Task) -> dict[str, Any]:
    """Return the task's settings with every default filled in, but for neutral ones that were added later."""
    found: dict[str, Any] = plain(task.params)
    return found


def rows(task: Task, examples: list[Example]) -> Iterator[dict[str, Any]]:
    """Yield examples as conversational prompt/completion records with their metadata, for parquet."""
    for example in examples:
        yield {
            "id": example.id,
            "prompt": task.messages(example),
            "completion": [{"role": "assistant", "content": example.target}],
            "question": example.question,
            "gold": example.gold,
            "group": example.group,
            "tags": example.tags or None,  # parquet cannot store a mapping without keys
        }


def example_of(row: dict[str, Any]) -> Example:
    """Return the Example of a record that `rows` made."""
    return Example(row["id"], row["question"], row["gold"], row["group"], row["tags"] or {})


if not TYPE_CHECKING:  # a type checker shall know the present names only
    __getattr__ = former_names(__name__, FORMER)
