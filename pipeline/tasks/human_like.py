"""Human-like answers: conversational questions, each with a chosen human-like answer and a rejected one.

    task: {name: human_like, source: hub, params: {test: 200}}

Reads the published pairs (`prompt`, `chosen`, `rejected`; Çalık & Akkuş 2025), or a file with the same columns. SFT
learns the chosen answers. Whether an answer is human-like cannot be verified, so `Grade.correct` is None and GRPO has
no rows. Every row keeps its rejected answer (`tags["rejected"]`), so that the model's preference can be measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.core.schema import PositiveInt
from pipeline.scoring import answers
from pipeline.tasks.rows import Columns, Row, missing_fields
from pipeline.tasks.task import Example, Grade, Needs, Part, Splits, Task, group_of


@dataclass(frozen=True)
class HumanLikeParams:
    """`task.params`: the number of rows, and which are held out."""

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
        rows, skipped = self.read_places(_problem)
        named, more = self.read_named(_problem)
        return self.make_splits(self._example, rows, named, skipped + more)

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
        reading = answers.read_text(completion, prompt_opens_think)
        return Grade(None, reading.value is not None, reading.value, reason=reading.reason)

    def is_well_formed(self, completion: str, prompt_opens_think: bool) -> bool:
        return bool((answers.answer_text(completion, prompt_opens_think) or "").strip())

    def smoke_test_params(self) -> dict[str, Any]:
        return {"validation": 4, "test": 8, "rows": None}


def _problem(values: Any) -> str | None:
    if problem := missing_fields(values, "prompt", "chosen", "rejected"):
        return problem
    if str(values["chosen"]).strip() == str(values["rejected"]).strip():
        return "chosen and rejected are the same"
    reason = answers.read_text(str(values["chosen"]), prompt_opens_think=False).reason
    return f"chosen is not an answer: {answers.REASONS[reason]}" if reason else None


TASK = HumanLike
