"""GSM8K: grade-school word problems with a worked solution and one number as the answer (Cobbe et al. 2021).

    task: {name: gsm8k, source: hub, params: {format: chat, validation: 0.1}}

The published rows (`question`, `answer`), or a file of the same shape: an answer is steps, then `#### 72` or
`Final answer: 72`. The steps (or what stands in `<think>` tags) become the thought, without the calculator's marks
`<<48/2=24>>`; the number becomes the answer, in the row's own words. It is read as a model's answer is read, and a row
whose target would not be paid in full is a bad row. A completion is right where its one final number is equal to the
gold one, however it is written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, ClassVar, Literal

from pipeline.core.schema import PositiveInt
from pipeline.scoring import answers
from pipeline.tasks.rows import Columns, Row, missing_fields
from pipeline.tasks.task import Example, Grade, Needs, Part, Splits, Task, divide, group_of, split_summary

PROMPTS = {
    "chat": '{}\n\nThink step by step, then end with "####" and the number.',
    "text": "Solve this problem step-by-step:\nQuestion: {}\nAnswer:",  # with model.chat_template=plain
}
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_FINAL_LINE = re.compile(  # `#### 72`, also with the number on the next line, or `**Final answer:** 72`
    r"^[^\S\n]*(?:####[^\S\n]*(?:\n\s*)?\S.*|\W{0,3}final answer\W{0,3}[:：].*)$", re.IGNORECASE | re.MULTILINE
)


@dataclass(frozen=True)
class Gsm8kParams:
    """`task.params`: how a problem is asked, and which rows are held out."""

    format: Literal["chat", "text"] = "chat"  # text: question and answer as plain text
    validation: Part = 0.1  # of the training rows
    test: Part = 0.1  # of the rows of a file, which has no test set of its own
    rows: PositiveInt | None = None  # training rows; null: all


class Gsm8k(Task):
    name = "gsm8k"
    title = "GSM8K: grade-school mathematics"
    Params = Gsm8kParams
    sources = ("hub", "path", "sample")
    hub = ("openai/gsm8k",)
    columns: ClassVar[Columns] = {
        "question": ("problem", "prompt", "query", "input"),
        "answer": ("solution", "response", "output"),
    }
    positive = None
    answer_kind = "number"
    needs: ClassVar[Needs] = dict.fromkeys(("sft", "grpo"), 'question and answer, steps that end with "#### 72"')

    params: Gsm8kParams

    def load(self) -> Splits:
        p = self.params
        rows, skipped = self.read_places(_problem, config="main")
        named, more = self.read_named(_problem)
        skipped += more
        if self.source == "hub":
            named["test"], more = self.read(_problem, config="main", split="test")
            skipped += more
        parts = {name: [self._example(row) for row in rows] for name, rows in named.items()}
        done = divide(
            [self._example(row) if row else None for row in rows],
            self.seed,
            test=parts.get("test", p.test),
            validation=parts.get("validation", p.validation),
        )
        train = done.train[: p.rows]
        held = {"validation": done.validation, "test": done.test}
        proof = split_summary(train, held, same_question=done.left, skipped=skipped)
        return Splits(train, train, done.validation, {"test": done.test} if done.test else {}, proof)

    def row_problem(self, values: Any) -> str | None:
        return _problem(values)

    def _example(self, row: Row) -> Example:
        solution = _solution(row.text("answer"))
        question = row.text("question")
        return Example(
            id=f"{row.source.rpartition('/')[2]}-{row.line}",
            question=PROMPTS[self.params.format].format(question),
            gold=solution.gold,
            group=group_of(question),
            tags={"steps": solution.steps.count("\n") + 1},
            target=solution.target,
        )

    def grade(self, example: Example, completion: str, prompt_opens_think: bool) -> Grade:
        reading = answers.read_quantity(completion, prompt_opens_think)
        said, gold = reading.value, answers.quantity_in(example.gold)
        right = said is not None and gold is not None and said.value == gold.value
        return Grade(right, said is not None, shown(said), reason=reading.reason)

    def is_well_formed(self, completion: str, prompt_opens_think: bool) -> bool:
        said = answers.number(completion, prompt_opens_think)
        return answers.thinks_then_answers(completion, prompt_opens_think) and said is not None

    def smoke_test_params(self) -> dict[str, Any]:
        return {"validation": 4, "test": 8, "rows": None}


def shown(said: answers.Quantity | None) -> str | None:
    """A number as it is kept in predictions.jsonl: 3.75, 1/3; an irrational one with the digits of a double."""
    return None if said is None else _digits(said.value) if said.exact else f"{float(said.value)}"


def _digits(value: Fraction) -> str:
    """Decimal digits where they end, else a fraction."""
    for places in range(1, 13):
        if value.denominator > 1 and 10**places % value.denominator == 0:
            digits = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}d}"
            return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"
    return str(value)


@dataclass(frozen=True)
class Solution:
    """An answer of a row, taken apart; `problem` says why it is no target."""

    steps: str = ""
    gold: str = ""
    target: str = ""
    problem: str | None = None


def _solution(answer: str) -> Solution:
    """(steps, number) of a published answer."""
    text = _CALCULATOR.sub("", answer)
    thought, said = "", text
    if answers.OPEN in text or answers.CLOSE in text:
        parts = answers.split_thought(text, prompt_opens_think=False)
        if not parts.well_formed:
            return Solution(problem="answer holds <think> or </think>, and not one thought and then the answer")
        thought, said = parts.thought or "", parts.answer or ""
    marks = [match for match in _FINAL_LINE.finditer(said) if _states(match[0].strip())]
    final = _final("\n".join(match[0].strip() for match in marks))
    if isinstance(final, str):
        return Solution(problem=f'answer does not end with one number after "####" or "Final answer:"{final}')
    for match in reversed(marks):
        said = said[: match.start()] + said[match.end() :]
    steps = f"{thought.strip()}\n{said.strip()}".strip()
    target = f"{answers.OPEN}\n{steps}\n{answers.CLOSE}\n#### {final[1]}"
    if not answers.thinks_then_answers(target, prompt_opens_think=False):
        return Solution(problem="answer has no steps before its number")
    return Solution(steps, final[0], target)


@lru_cache(maxsize=4096)
def _states(line: str) -> bool:
    """Whether a line states an answer, as `#### 72` does and the heading `#### Step 1: add` does not."""
    return bool(answers.stated(line))


@lru_cache(maxsize=4096)  # rows share their last lines: there are fewer numbers than rows
def _final(lines: str) -> tuple[str, str] | str:
    """(the number, the row's words for it) that the last lines of an answer state, or what is wrong with them."""
    found = answers.read_quantity(lines, prompt_opens_think=False)
    gold = shown(found.value)
    if found.value is None or gold is None:
        return " (it has two that differ)" if found.reason == "two_numbers" else ""
    words = answers.stated(lines)[-1].rstrip(" .")
    again = answers.read_quantity(f"#### {words}", prompt_opens_think=False).value
    return gold, words if again and again.value == found.value.value else gold


def _problem(values: Any) -> str | None:
    return missing_fields(values, "question", "answer") or _solution(str(values["answer"]).strip()).problem


TASK = Gsm8k
