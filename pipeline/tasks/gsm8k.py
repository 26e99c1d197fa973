"""GSM8K: grade-school word problems with a worked solution and one number as the answer (Cobbe et al. 2021).

    task: {name: gsm8k, source: hub, params: {format: chat, validation: 0.1}}

Reads the published rows (`question`, `answer`), or a file with the same columns. An answer is steps, then `#### 72` or
`Final answer: 72`. The steps (or the text in `<think>` tags) become the thought, without calculator marks such as
`<<48/2=24>>`. The number becomes the final answer, as the row writes it. It is parsed as a model's answer is parsed. A
row whose target would not earn the full reward is a bad row. A completion is correct if its one final number equals
the gold number, in any notation.
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
from pipeline.tasks.task import Example, Grade, Needs, Part, Splits, Task, group_of, thought_block

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
    """`task.params`: the prompt format, and which rows are held out."""

    format: Literal["chat", "text"] = "chat"  # text: question and answer as plain text
    validation: Part = 0.1  # of the training rows
    test: Part = 0.1  # of the rows of a file, which has no separate test set
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
        rows, skipped = self.read_places(_problem, config="main")
        named, more = self.read_named(_problem)
        skipped += more
        if self.source == "hub":
            named["test"], more = self.read(_problem, config="main", split="test")
            skipped += more
        return self.make_splits(self._example, rows, named, skipped)

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
        answer, gold = reading.value, answers.quantity_in(example.gold)
        correct = answer is not None and gold is not None and answer.value == gold.value
        return Grade(correct, answer is not None, format_number(answer), reason=reading.reason)

    def is_well_formed(self, completion: str, prompt_opens_think: bool) -> bool:
        answer = answers.number(completion, prompt_opens_think)
        return answers.thinks_then_answers(completion, prompt_opens_think) and answer is not None

    def smoke_test_params(self) -> dict[str, Any]:
        return {"validation": 4, "test": 8, "rows": None}


def format_number(quantity: answers.Quantity | None) -> str | None:
    """Return a number as predictions.jsonl stores it: 3.75, 1/3; an irrational one with the digits of a double."""
    if quantity is None:
        return None
    return _digits(quantity.value) if quantity.exact else f"{float(quantity.value)}"


def _digits(value: Fraction) -> str:
    """Return a number in decimal digits if they terminate, else as a fraction."""
    for places in range(1, 13):
        if value.denominator > 1 and 10**places % value.denominator == 0:
            digits = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}d}"
            return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"
    return str(value)


@dataclass(frozen=True)
class Solution:
    """The parts of a row's answer; `problem` is the reason why it cannot be a target."""

    steps: str = ""
    gold: str = ""
    target: str = ""
    problem: str | None = None


def _solution(answer: str) -> Solution:
    """Split a row's answer into steps and final number."""
    text = _CALCULATOR.sub("", answer)
    thought, rest = "", text
    if answers.OPEN in text or answers.CLOSE in text:
        parts = answers.split_thought(text, prompt_opens_think=False)
        if not parts.well_formed:
            return Solution(problem="answer holds <think> or </think>, and not one thought and then the answer")
        thought, rest = parts.thought or "", parts.answer or ""
    final_lines = [match for match in _FINAL_LINE.finditer(rest) if _states(match[0].strip())]
    final = _final("\n".join(match[0].strip() for match in final_lines))
    if isinstance(final, str):
        return Solution(problem=f'answer does not end with one number after "####" or "Final answer:"{final}')
    for match in reversed(final_lines):
        rest = rest[: match.start()] + rest[match.end() :]
    steps = f"{thought.strip()}\n{rest.strip()}".strip()
    target = f"{thought_block(steps)}\n#### {final[1]}"
    if not answers.thinks_then_answers(target, prompt_opens_think=False):
        return Solution(problem="answer has no steps before its number")
    return Solution(steps, final[0], target)


@lru_cache(maxsize=4096)
def _states(line: str) -> bool:
    """Return whether a line states an answer: `#### 72` does, the heading `#### Step 1: add` does not."""
    return bool(answers.stated(line))


@lru_cache(maxsize=4096)  # many rows share their last lines: there are fewer numbers than rows
def _final(lines: str) -> tuple[str, str] | str:
    """Return (number, the row's text for it) from an answer's last lines; or the end of an error message."""
    found = answers.read_quantity(lines, prompt_opens_think=False)
    gold = format_number(found.value)
    if found.value is None or gold is None:
        return " (it has two that differ)" if found.reason == "two_numbers" else ""
    text = answers.stated(lines)[-1].rstrip(" .")
    reread = answers.read_quantity(f"#### {text}", prompt_opens_think=False).value
    return gold, text if reread and reread.value == found.value.value else gold


def _problem(values: Any) -> str | None:
    return missing_fields(values, "question", "answer") or _solution(str(values["answer"]).strip()).problem


TASK = Gsm8k
