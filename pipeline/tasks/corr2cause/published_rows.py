"""Read the premise, the claim and the label of a Corr2Cause file's row, under any of the known column names.

    premise, claim = question_of(values)      ("Suppose there is a closed system of …", "A directly causes B.")
    label = label_of(values)                  True, False, or entailed, contradicted, undetermined

A row has `input` or `query` ("Premise: … Hypothesis: …", after any other text) or `question`, or `premise` and
`hypothesis`. It also has `label`, `gold` or `relation`: 0/1, Yes/No, or one of entailment, neutral and contradiction.
The task (`task.source=path`) and `python -m pipeline audit` both read rows with this module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.tasks.row_files import Columns, is_missing

WORDS = ("input", "query", "question")
LABELS = ("label", "gold", "relation")
COLUMNS: Columns = dict.fromkeys((*WORDS, "premise", "hypothesis", *LABELS), ())
THREE = {"entailment": "entailed", "entailed": "entailed", "neutral": "undetermined", "undetermined": "undetermined"}
THREE |= {"contradiction": "contradicted", "contradicted": "contradicted"}
TWO = {"1": True, "yes": True, "true": True, "0": False, "no": False, "false": False}
TWO |= {"1.0": True, "0.0": False}  # pandas writes a column with missing values as floats
_QUESTION = re.compile(r"Premise:\s*(?P<premise>.*?)\s*\n\s*Hypothesis:\s*(?P<claim>[^\n]*)", re.DOTALL)


def words_of(values: Any) -> str:
    """Return premise and hypothesis as one text. Raises ValueError if the row has none."""
    if not isinstance(values, Mapping):
        raise ValueError("not a mapping with input and label")
    for name in WORDS:
        if not is_missing(values.get(name)):
            return str(values[name])
    if not is_missing(values.get("premise")) and not is_missing(values.get("hypothesis")):
        return f"Premise: {values['premise']}\nHypothesis: {values['hypothesis']}"
    raise ValueError(_missing(values, WORDS, ", or premise and hypothesis"))


def question_of(words: str) -> tuple[str, str]:
    """Split such a text into (premise, claim). Raises ValueError if it has another form."""
    match = _QUESTION.search(words)
    if not match:
        raise ValueError('not "Premise: …" and, on a later line, "Hypothesis: …"')
    return match["premise"], match["claim"].strip()


def label_of(values: Mapping[str, Any]) -> bool | str:
    """Return True or False, or one of three classes. Raises ValueError if the row has none of them."""
    for name in LABELS:
        if not is_missing(values.get(name)):
            label = str(values[name]).strip().lower()
            if label in TWO:
                return TWO[label]
            if label in THREE:
                return THREE[label]
            raise ValueError(
                f"{name}: got {str(values[name])[:40]!r}; expected 0, 1 or one of {', '.join(sorted(THREE))}"
            )
    raise ValueError(_missing(values, LABELS, ""))


def _missing(values: Mapping[str, Any], names: tuple[str, ...], more: str) -> str:
    """Return the error message for a row in which all of the named cells are missing."""
    column = next((name for name in names if name in values), None)
    if column is not None:
        return f"no {column} (it is {str(values[column]).strip() or 'empty'})"
    has = ", ".join(str(name) for name in list(values)[:20]) or "nothing"
    return f"no {names[0]} (or {', or '.join(names[1:])}{more}; it has {has})"


def gold_of(label: bool | str, *, three: bool) -> str:
    """Return the answer for a label. Raises ValueError for label 0 with `three` answers, which is ambiguous."""
    if not three:
        return "Yes" if label is True or label == "entailed" else "No"
    if label is False:
        raise ValueError("label 0 may be contradiction or neutral; task.params.labels=three needs one of these labels")
    return {True: "Yes", "entailed": "Yes", "contradicted": "No", "undetermined": "Unknown"}[label]
