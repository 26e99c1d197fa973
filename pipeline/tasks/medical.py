"""Medical reasoning: questions with a long thought and an open answer (Chen et al. 2024, HuatuoGPT-o1).

    task: {name: medical, source: hub, params: {language: en, rows: 5000}}

SFT learns thought and answer of medical-o1-reasoning-SFT (`Question`, `Complex_CoT`, `Response`). Open answers cannot
be verified. The companion set medical-o1-verifiable-problem (`Open-ended Verifiable Question`, `Ground-True Answer`)
has short gold answers: GRPO and the test set `short` compare them by normalised words. This match is a proxy, not
correctness: another wording of the right answer counts as a miss, and the reasoning is unchecked.

A question that both sets contain is either in training or held out. One file may mix both kinds: the kind of a row
follows from its filled columns. Not for use on patients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pipeline.core.schema import PositiveInt
from pipeline.scoring import answers
from pipeline.tasks.rows import Columns, Row, has_fields, missing_fields
from pipeline.tasks.task import (
    Example,
    Grade,
    Needs,
    Part,
    Splits,
    Task,
    divide,
    group_of,
    split_summary,
    thought_block,
)

REASONING, VERIFIABLE = (
    "FreedomIntelligence/medical-o1-reasoning-SFT",
    "FreedomIntelligence/medical-o1-verifiable-problem",
)
OPEN_FIELDS = ("Question", "Complex_CoT", "Response")
SHORT_FIELDS = ("Open-ended Verifiable Question", "Ground-True Answer")
INSTRUCTION = 'Think step by step, then end with "Final answer:" and the answer in a few words.'


@dataclass(frozen=True)
class MedicalParams:
    """`task.params`: which rows are used, and their number."""

    language: Literal["en", "zh", "en_mix", "zh_mix"] = "en"  # a configuration of the reasoning set
    rows: PositiveInt | None = None  # SFT rows; null: all
    grpo_rows: PositiveInt | None = None  # rows of the companion set; null: all
    validation: Part = 100  # open answers
    test: Part = 100  # open answers
    short: Part = 500  # of the companion set


class Medical(Task):
    name = "medical"
    title = "Medical reasoning with open answers"
    Params = MedicalParams
    sources = ("hub", "path", "sample")
    hub = (REASONING, VERIFIABLE)
    columns: ClassVar[Columns] = dict.fromkeys((*OPEN_FIELDS, *SHORT_FIELDS), ())
    positive = None
    answer_kind = "words"
    needs: ClassVar[Needs] = {"sft": "Question, Complex_CoT and Response", "grpo": " and ".join(SHORT_FIELDS)}
    proxy = "the final answer equals the gold one in normalised words"

    params: MedicalParams

    def load(self) -> Splits:
        p = self.params
        opened, short, skipped = self._read()
        named, more = self.read_named(_problem)
        parts = {name: [example for row in rows for example in _each(row)] for name, rows in named.items()}
        both = {
            name: ([e for e in rows if not e.tags["short"]], [e for e in rows if e.tags["short"]])
            for name, rows in parts.items()
        }
        open_test, short_test = both.get("test", (p.test, p.short))
        open_validation = both["validation"][0] if "validation" in both else p.validation
        first = divide(opened, self.seed, test=open_test, validation=open_validation)
        second = divide(short, self.seed, test=short_test, validation=0, names=("short", "validation"))
        # the two sets share questions: a question held out of one is not trained on in the other
        held = {example.group for rows in (first.test, first.validation, second.test) for example in rows}
        left = first.left + second.left + [e.id for e in first.train + second.train if e.group in held]
        train = [example for example in first.train if example.group not in held][: p.rows]
        grpo = [example for example in second.train if example.group not in held][: p.grpo_rows]
        tests = {name: rows for name, rows in (("test", first.test), ("short", second.test)) if rows}
        held_out = {"validation": first.validation, **tests}
        summary = split_summary(train + grpo, held_out, same_question=left, skipped=skipped + more)
        return Splits(train, grpo, first.validation, tests, summary)

    def row_problem(self, values: Any) -> str | None:
        return _problem(values)

    def _read(self) -> tuple[list[Example | None], list[Example | None], list[str]]:
        """Return (rows of open answers, rows of short gold answers, skipped); None in the place of an unreadable row.

        One file may hold both kinds.
        """
        if self.source == "path":
            rows, skipped = self.read(_problem)
            examples = [example for row in rows for example in _each(row)]
            opened = [example for example in examples if not example.tags["short"]]
            return [*opened], [example for example in examples if example.tags["short"]], skipped
        long, skipped = self.read_places(_open_problem, config=self.params.language)
        short, more = self.read_places(_short_problem, hub=VERIFIABLE, sample="medical_verifiable")
        return (
            [_open(row) if row else None for row in long],
            [_short(row) if row else None for row in short],
            skipped + more,
        )

    def grade(self, example: Example, completion: str, prompt_opens_think: bool) -> Grade:
        if not example.gold:
            reading = answers.read_text(completion, prompt_opens_think)
            return Grade(None, reading.value is not None, reading.value, reason=reading.reason)
        final = answers.read_words(completion, prompt_opens_think)
        matches = final.value is not None and final.value == answers.normalised(example.gold)
        return Grade(None, final.value is not None, final.value, proxy=matches, reason=final.reason)

    def is_well_formed(self, completion: str, prompt_opens_think: bool) -> bool:
        return answers.thinks_then_answers(completion, prompt_opens_think)

    def split_names(self) -> list[str]:
        return ["test", "short", "validation"]

    def smoke_test_params(self) -> dict[str, Any]:
        return {"validation": 4, "test": 6, "short": 6, "rows": None, "grpo_rows": None}


def _open(row: Row) -> Example:
    question, thought, answer = (row.text(name) for name in OPEN_FIELDS)
    target = f"{thought_block(thought)}\n\n{answer}"
    return Example(f"open-{row.line}", question, "", group_of(question), {"short": False}, target)


def _short(row: Row) -> Example:
    question, gold = (row.text(name) for name in SHORT_FIELDS)
    gold = " ".join(gold.split())  # a final answer is one line
    return Example(f"short-{row.line}", f"{question}\n\n{INSTRUCTION}", gold, group_of(question), {"short": True})


def _each(row: Row) -> list[Example]:
    """Return the examples of a file's row, which may belong to either set, or to both."""
    kinds = ((OPEN_FIELDS, _open), (SHORT_FIELDS, _short))
    return [make(row) for fields, make in kinds if has_fields(row.values, fields)]


def _problem(values: Any) -> str | None:
    """Return the problem of a file's row, which may belong to either set, or to both; None if it is good."""
    opened, short = has_fields(values, OPEN_FIELDS), has_fields(values, SHORT_FIELDS)
    if not opened and not short:
        begun = has_fields(values, SHORT_FIELDS[:1]) and not has_fields(values, OPEN_FIELDS[:1])
        named = isinstance(values, dict) and SHORT_FIELDS[0] in values and OPEN_FIELDS[0] not in values
        return _short_problem(values) if begun or named else _open_problem(values)
    problems = [_open_problem(values) if opened else None, _short_problem(values) if short else None]
    return "; ".join(text for text in problems if text) or None


def _open_problem(values: Any) -> str | None:
    if problem := missing_fields(values, *OPEN_FIELDS):
        return problem
    thought, answer = str(values["Complex_CoT"]), str(values["Response"])
    if any(tag in text for text in (thought, answer) for tag in (answers.OPEN, answers.CLOSE)):
        return "Complex_CoT or Response holds <think> or </think>"
    learned = answers.thinks_then_answers(f"{answers.OPEN}{thought}{answers.CLOSE}{answer}", prompt_opens_think=False)
    return None if learned else f"Complex_CoT {thought!r} has no words"


def _short_problem(values: Any) -> str | None:
    if problem := missing_fields(values, *SHORT_FIELDS):
        return problem
    gold = " ".join(str(values[SHORT_FIELDS[1]]).split())
    if not answers.normalised(gold):
        return f"{SHORT_FIELDS[1]} {gold!r} has no words"
    reading = answers.read_words(f"Final answer: {gold}", prompt_opens_think=False)
    if reading.value != answers.normalised(gold):
        reason = answers.REASONS[reading.reason] if reading.reason else f"read as {reading.value!r}"
        return f"{SHORT_FIELDS[1]} {gold[:80]!r} is not an answer that parses back to itself ({reason})"
    return None


TASK = Medical
