"""GSM8K: grade-school word problems with a worked solution and one number as the answer (Cobbe et al. 2021).

    task: {name: gsm8k, source: hub, params: {format: chat, validation: 0.1}}

The published rows (`question`, `answer`), or a file of the same shape: an answer is steps, then `#### 72` or
`Final answer: 72`. The steps become the thought, without the calculator's marks `<<48/2=24>>`; the number becomes the
answer. A completion is right where its one final number is equal to the gold one, however it is written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, ClassVar, Literal

from pipeline import answers
from pipeline.rows import Columns, Row, lacks
from pipeline.tasks.task import Example, Part, Splits, Task, Verdict, divide, proof_of
from pipeline.typed import Positive

PROMPTS = {
    "chat": '{}\n\nThink step by step, then end with "####" and the number.',
    "text": "Solve this problem step-by-step:\nQuestion: {}\nAnswer:",  # with model.chat_template=plain
}
_LAST_LINE = re.compile(r"^\s*(?:####|final answer:).*$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Gsm8kParams:
    """`task.params`: how a problem is asked, and which rows are held out."""

    format: Literal["chat", "text"] = "chat"  # text: question and answer as plain text
    validation: Part = 0.1  # of the training rows
    test: Part = 0.1  # of the rows of a file, which has no test set of its own
    rows: Positive | None = None  # training rows; null: all


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
        proof = proof_of(train, held, same_question=done.left, skipped=skipped)
        return Splits(train, train, done.validation, {"test": done.test} if done.test else {}, proof)

    def row_problem(self, values: Any) -> str | None:
        return _problem(values)

    def _example(self, row: Row) -> Example:
        steps, gold = _solution(row.text("answer"))
        question = row.text("question")
        return Example(
            id=f"{row.source.rpartition('/')[2]}-{row.line}",
            question=PROMPTS[self.params.format].format(question),
            gold=gold or "",
            group=sha256(answers.normalised(question).encode()).hexdigest()[:10],
            tags={"steps": steps.count("\n") + 1},
            target=f"{answers.OPEN}\n{steps}\n{answers.CLOSE}\n#### {gold}",
        )

    def grade(self, example: Example, completion: str, prefilled: bool) -> Verdict:
        reading = answers.read_quantity(completion, prefilled)
        said, gold = reading.value, answers.quantity_in(example.gold)
        right = said is not None and gold is not None and said.value == gold.value
        return Verdict(right, said is not None, shown(said), reason=reading.reason)

    def is_well_formed(self, completion: str, prefilled: bool) -> bool:
        said = answers.number(completion, prefilled)
        return answers.thinks_then_answers(completion, prefilled) and said is not None

    def rehearsal(self) -> dict[str, Any]:
        return {"validation": 4, "test": 8, "rows": None}


def shown(said: answers.Quantity | None) -> str | None:
    """A number as it is kept in predictions.jsonl; an irrational one with the digits of a double."""
    return None if said is None else str(said.value) if said.exact else f"{float(said.value)}"


def _solution(answer: str) -> tuple[str, str | None]:
    """(steps, number) of a published answer."""
    text = re.sub(r"<<[^<>]*>>", "", answer)
    found = answers.quantity(text, prefilled=False)
    gold = text and _LAST_LINE.findall(text)
    steps = _LAST_LINE.sub("", text).strip()
    if found is None or not gold:
        return steps, None
    return steps, str(found.value)


def _problem(values: Any) -> str | None:
    if told := lacks(values, "question", "answer"):
        return told
    steps, gold = _solution(str(values["answer"]))
    if gold is None:
        return 'answer does not end with one number after "####" or "Final answer:"'
    return None if steps else "answer has no steps before its number"


TASK = Gsm8k
