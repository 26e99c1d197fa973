"""The only reader of model text: the thought, what follows it, the verdict.

The verdict is what stands after the first `</think>`. An unclosed thought, no verdict, or two that disagree are
unanswered, and so is a verdict that names both answers, quotes the instruction or stands in a second thought. Nothing
that stands inside the thought counts. A chat format that pre-fills `<think>` (R1-Distill, tiny) makes a completion
begin inside it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Parts:
    """A completion taken apart. `thought` is None where there is none, `answer` None where a thought never ends."""

    thought: str | None
    answer: str | None
    well_formed: bool  # one thought, opened and closed once, nothing before it


def split_thought(completion: str, prefilled: bool) -> Parts:
    """The thought and the answer of a completion; `prefilled` says whether the prompt already opened the thought."""
    text = completion if prefilled else completion.lstrip()
    if not prefilled and OPEN not in text and CLOSE not in text:
        return Parts(None, text, False)
    opened = prefilled or text.startswith(OPEN)
    before, closed, after = text.partition(CLOSE)
    thought = before if prefilled else before.partition(OPEN)[2]
    if not closed:
        return Parts(thought, None, False)
    tags = text.count(OPEN) + text.count(CLOSE) + prefilled
    return Parts(thought, after, opened and tags == 2)


_MENTION = re.compile(r"\bTherefore\s*:", re.IGNORECASE)
YES_NO = ("Yes", "No")


@cache
def _verdicts(words: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Where one of these verdicts is given, and an answer that is nothing but one of them."""
    said = rf"\bTherefore\s*:[\s*_]*(?P<word>{'|'.join(words)})\b(?![\s*_]*(?:/|\||,?\s*(?:or|and)\b))"
    return re.compile(said, re.IGNORECASE), re.compile(rf"\s*Therefore: (?:{'|'.join(words)})\s*")


def verdict(completion: str, prefilled: bool, words: Sequence[str] = YES_NO) -> str | None:
    """`Yes`, `No` (or another of `words`), or None where the completion does not commit to one of them."""
    answer = split_thought(completion, prefilled).answer
    if answer is None or OPEN in answer or CLOSE in answer:
        return None
    given = [match["word"].capitalize() for match in _verdicts(tuple(words))[0].finditer(answer)]
    if len(given) != len(_MENTION.findall(answer)) or len(set(given)) != 1:
        return None
    return given[0]


def is_well_formed(completion: str, prefilled: bool, words: Sequence[str] = YES_NO) -> bool:
    """Whether the completion is one thought that is not empty, then `Therefore: Yes` or `Therefore: No` alone."""
    parts = split_thought(completion, prefilled)
    return bool(
        parts.well_formed
        and parts.thought
        and parts.thought.strip()
        and parts.answer is not None
        and _verdicts(tuple(words))[1].fullmatch(parts.answer)
    )
