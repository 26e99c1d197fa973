"""A line of predictions.jsonl: one test row, what a model answered, and how the answer was graded.

    predictions = read_predictions(folder / "predictions.jsonl")

Lines of earlier versions are read too: what they do not record has its default.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.core.files import read_lines

PREDICTIONS = "predictions.jsonl"
FAILED = "request_failed"  # the reason of a row that an endpoint did not answer
FAILED_TITLE = "the endpoint gave no completion"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One graded answer."""

    split: str
    id: str
    sample: int = 0  # which of the row's completions
    prompt_sha256: str = ""  # of the prompt's tokens
    group: str  # rows of a group are drawn together
    tags: Mapping[str, Any] | None = None
    gold: str
    answer: str | None = None  # as it was read; None where nothing could be
    correct: bool | None  # None where correctness cannot be verified
    proxy: bool | None = None  # what stands in for `correct` where that is None
    answered: bool
    reason: str | None = None  # why nothing could be read: a key of reading.REASONS
    solved: str | None = None  # the answer of the task's exact program, where it has one
    thought: bool = False  # whether the completion thinks before it answers
    proof: float | None = None  # share of the thought's steps before the first that does not follow; 1: a valid proof
    preferred: bool | None = None  # whether the gold answer is likelier than the rejected one; None without one
    completion: str = ""
    tokens: int  # of the completion
    truncated: bool = False
    # of an endpoint's answer: its seconds, attempts, tokens of the prompt, and the failure where there is no answer
    call: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in record.items() if value or name not in ("call", "sample")}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Prediction:
        """Read a line; unknown keys are ignored. Raises KeyError for a line without id, group, gold or grade."""
        required = {name: record[name] for name in ("split", "id", "group", "gold", "correct", "answered", "tokens")}
        return cls(**{f.name: record[f.name] for f in fields(cls) if f.name in record} | required)


def read_predictions(path: Path) -> list[Prediction]:
    """Every line of a file; a last line that was cut off is left out."""
    return [Prediction.from_json(record) for record in read_lines(path)]


def count_reasons(predictions: Sequence[Prediction]) -> dict[str, int]:
    """Count unanswered rows by reason, the commonest first.

    Lines of an earlier version have no reason: `truncated` where they were cut off, else `not_recorded`.
    """
    found = Counter(
        prediction.reason or ("truncated" if prediction.truncated else "not_recorded")
        for prediction in predictions
        if not prediction.answered
    )
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
