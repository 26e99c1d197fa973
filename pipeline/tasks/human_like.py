"""Human-like answers: conversational questions with an answer as a person gives it, and one that was rejected.

    task: {name: human_like, source: hub, params: {test: 200}}

The published pairs (`prompt`, `chosen`, `rejected`; Çalık & Akkuş 2025), or a file of the same shape. SFT learns the
chosen answers. Whether an answer is human-like cannot be verified, so nothing is graded right or wrong and there is
no GRPO. Every row keeps its rejected answer (`tags["rejected"]`), so that a model can be asked which it prefers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.core.schema import PositiveInt
from pipeline.scoring import answers
from pipeline.tasks.rows import Columns, Row, missing_fields
from pipeline.tasks.task import Example, Grade, Needs, Part, Splits, Task, divide, group_of, split_summary


@dataclass(frozen=True)
class HumanLikeParams:
    """`task.params`: how many rows, and which are held out."""

    rows: PositiveInt | None = None  # training rows; null: all
    validation: Part = 200
    test: Part = 200


class HumanLike(Task):
    name = "human_like"
    title = "Human-like answers"
    Params = HumanLikeParams
    sources = ("hub", "path", "sample")
    hub = ("HumanLLMs/Human-Like-DPO-Dataset",)
    columns: ClassVar[Columns] = {"prompt": ("question", "instruction", "query", "input")}
    positive = None
    rewardable = False
    needs: ClassVar[Needs] = {"sft": "prompt, chosen and rejected"}

    params: HumanLikeParams

    def load(self) -> Splits:
        p = self.params
        rows, skipped = self.read_places(_problem)
        named, more = self.read_named(_problem)
        parts = {name: [self._example(row) for row in rows] for name, rows in named.items()}
        done = divide(
            [self._example(row) if row else None for row in rows],
            self.seed,
            test=parts.get("test", p.test),
            validation=parts.get("validation", p.validation),
        )
        train = done.train[: p.rows]
        held = {"validation": done.validation, "test": done.test}
        proof = split_summary(train, held, same_question=done.left, skipped=skipped + more)
        return Splits(train, [], done.validation, {"test": done.test} if done.test else {}, proof)

    def row_problem(self, values: Any) -> str | None:
        return _problem(values)

    def _example(self, row: Row) -> Example:
        prompt = row.text("prompt")
        return Example(
            id=f"{row.source.rpartition('/')[2]}-{row.line}",
            question=prompt,
            gold="",
            group=group_of(prompt),
            tags={"rejected": row.text("rejected")},
            target=row.text("chosen"),
        )

    def grade(self, example: Example, completion: str, prompt_opens_think: bool) -> Grade:
        said = answers.read_text(completion, prompt_opens_think)
        return Grade(None, said.value is not None, said.value, reason=said.reason)

    def is_well_formed(self, completion: str, prompt_opens_think: bool) -> bool:
        return bool((answers.answer_text(completion, prompt_opens_think) or "").strip())

    def smoke_test_params(self) -> dict[str, Any]:
        return {"validation": 4, "test": 8, "rows": None}


def _problem(values: Any) -> str | None:
    if told := missing_fields(values, "prompt", "chosen", "rejected"):
        return told
    if str(values["chosen"]).strip() == str(values["rejected"]).strip():
        return "chosen and rejected are the same"
    why = answers.read_text(str(values["chosen"]), prompt_opens_think=False).reason
    return f"chosen is no answer: {answers.REASONS[why]}" if why else None


TASK = HumanLike
