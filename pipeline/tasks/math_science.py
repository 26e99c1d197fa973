r"""Mathematics and science: MathCodeInstruct (Wang et al. 2024) and SciBench (Wang et al. 2024), mixed.

    task: {name: math_science, source: hub, params: {mathcode_rows: 24308, tolerance: 0.05}}

MathCodeInstruct: `messages` alternates text, code and the code's output. All parts but the last text become the
thought; the last text is the answer. Its final answer is the gold, parsed as a model's answer is parsed: a number, or
an expression that math-verify compares.

SciBench: `problem_text`, `solution`, `answer_number`, `unit`. The answer is a number with a unit. It is correct within
a tolerance, after powers of ten and SI prefixes are multiplied in. Rows without a worked solution are not SFT rows.

A row whose own target would not be graded correct gets no gold. SFT uses it if its target is well formed, GRPO never
does, and `without_gold` counts it. A file may mix both kinds: the kind of a row follows from its filled columns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pipeline.core.schema import Fraction, PositiveInt
from pipeline.scoring import answers
from pipeline.tasks.rows import Columns, Row, empty_fields, has_fields, is_missing, missing_fields
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

MATHCODE, SCIBENCH = "MathLLMs/MathCodeInstruct", "xw27/scibench"
MATH_FIELDS = ("messages",)
SCIENCE_FIELDS = ("problem_text", "answer_number")
INSTRUCTION = r"Think step by step, then put the final answer in \boxed{}."
FENCES = {"text": "{}", "code": "```python\n{}\n```", "execution": "```output\n{}\n```"}


@dataclass(frozen=True)
class MathScienceParams:
    """`task.params`: the number of rows of each set, which are held out, and the tolerance of numbers."""

    mathcode_rows: PositiveInt | None = None  # drawn from MathCodeInstruct; null: all
    scibench_rows: PositiveInt | None = None
    validation: Part = 0.1
    test: Part = 500
    grpo_rows: PositiveInt | None = None  # of the training rows that have a gold answer; null: all
    tolerance: Fraction = 0.05  # relative, of SciBench's numbers


class MathScience(Task):
    name = "math_science"
    title = "Mathematics and science"
    Params = MathScienceParams
    sources = ("hub", "path", "sample")
    hub = (MATHCODE, SCIBENCH)
    columns: ClassVar[Columns] = dict.fromkeys(("messages", *SCIENCE_FIELDS, "unit", "solution"), ())
    positive = None
    answer_kind = "expression"
    breakdowns = ("set",)
    needs: ClassVar[Needs] = {
        "sft": "messages that end with an answer, or problem_text, answer_number and solution",
        "grpo": "messages whose last text states one final answer, or problem_text and answer_number",
    }

    params: MathScienceParams

    def load(self) -> Splits:
        p = self.params
        self._faults: dict[str, str] = {}  # why rows have no gold, by id
        math, science, skipped = self._read()
        named, more = self.read_named(_problem)
        parts = {name: [example for row in rows for example in self._each(row)] for name, rows in named.items()}
        done = divide(
            [*_draw(math, p.mathcode_rows, self.seed), *_draw(science, p.scibench_rows, self.seed)],
            self.seed,
            test=parts.get("test", p.test),
            validation=parts.get("validation", p.validation),
        )
        sft = [example for example in done.train if example.target]
        grpo = [replace(example, target="") for example in done.train if example.gold][: p.grpo_rows]
        held = {"validation": done.validation, "test": done.test}
        read = [*done.train, *done.validation, *done.test]
        summary = split_summary(
            done.train,
            held,
            same_question=done.left,
            skipped=skipped + more,
            without_solution=sum(not example.target for example in done.train + done.validation),
            without_gold=[f"{e.id}: {self._faults[e.id]}" for e in read if not e.gold and e.id in self._faults],
        )
        validation = [example for example in done.validation if example.target]
        return Splits(sft, grpo, validation, {"test": done.test} if done.test else {}, summary)

    def row_problem(self, values: Any) -> str | None:
        return _problem(values)

    def _read(self) -> tuple[list[Example | None], list[Example | None], list[str]]:
        """Return (rows of MathCodeInstruct, rows of SciBench, skipped); None in the place of an unreadable row."""
        if self.source == "path":
            rows, skipped = self.read(_problem)
            examples = [example for row in rows for example in self._each(row)]
            math = [example for example in examples if example.tags["set"] == "mathcode"]
            return [*math], [example for example in examples if example.tags["set"] != "mathcode"], skipped
        rows_of_math, skipped = self.read_places(_math_problem, sample="mathcode")
        rows_of_science, more = self.read_places(_science_problem, hub=SCIBENCH, sample="scibench")
        science = [self._science(row) if row else None for row in rows_of_science]
        return [self._math(row) if row else None for row in rows_of_math], science, skipped + more

    def _each(self, row: Row) -> list[Example]:
        """Return the examples of a file's row, which may belong to either set, or to both."""
        kinds = ((MATH_FIELDS, self._math), (SCIENCE_FIELDS, self._science))
        return [make(row) for fields, make in kinds if has_fields(row.values, fields)]

    def _math(self, row: Row) -> Example:
        """Return the example of a MathCodeInstruct row; without gold if its target would not earn the full reward."""
        example, why = _math(row)
        fault = why or self.target_fault(example)
        return self._without_gold(example, fault) if fault else example

    def _science(self, row: Row) -> Example:
        """Return the example of a SciBench row, with the fullest form of its answer that parses back to its gold."""
        fault = ""
        for answer in _science_answers(row):
            example = _science(row, answer)
            worked = replace(example, target=example.target or f"{thought_block('worked out')}\n\n{answer}")
            fault = self.target_fault(worked) or ""
            if not fault:
                return example
        return self._without_gold(example, fault)

    def _without_gold(self, example: Example, why: str) -> Example:
        """Return the example without gold, and without a target that is malformed; record why."""
        self._faults[example.id] = why
        learned = answers.thinks_then_answers(example.target, prompt_opens_think=False)
        return replace(example, gold="", target=example.target if learned else "")

    def grade(self, example: Example, completion: str, prompt_opens_think: bool) -> Grade:
        if not example.gold:
            text = answers.read_text(completion, prompt_opens_think)
            return Grade(None, text.value is not None, text.value, reason=text.reason)
        reading = answers.read_expression(completion, prompt_opens_think)
        if example.tags["set"] == "mathcode":
            correct = reading.value is not None and answers.same_expression(example.gold, reading.value)
            return Grade(correct, reading.value is not None, reading.value, reason=reading.reason)
        number, gold = answers.read_quantity(completion, prompt_opens_think), answers.quantity_in(example.gold)
        correct = False
        if number.value is not None and gold is not None:
            correct = answers.same_quantity(gold.value, example.tags["unit"], number.value, self.params.tolerance)
        return Grade(correct, number.value is not None, reading.value, reason=number.reason)

    def is_well_formed(self, completion: str, prompt_opens_think: bool) -> bool:
        expression = answers.expression(completion, prompt_opens_think)
        return answers.thinks_then_answers(completion, prompt_opens_think) and expression is not None

    def smoke_test_params(self) -> dict[str, Any]:
        return {"mathcode_rows": None, "scibench_rows": None, "validation": 4, "test": 8, "grpo_rows": None}


def _draw(examples: list[Example | None], count: int | None, seed: int) -> Sequence[Example | None]:
    """Draw `count` of the rows; all of them if there are no more, or `count` is None."""
    if count is None or count >= len(examples):
        return examples
    return divide(examples, seed, test=count, validation=0, names=("mathcode_rows", "validation")).test


def _parts(content: Any) -> list[tuple[str, str]]:
    """Return (kind, text) of each part of a message, whose content may also be one text. A missing text is empty.

    Raises TypeError for a content that is not a text, a number or a list of parts.
    """
    if isinstance(content, str | float) or content is None:
        content = [{"type": "text", "content": content}]
    for part in content:
        if not isinstance(part, dict) or empty_fields(part, "content"):
            raise TypeError("a part of a message is not a {type, content} with a text")
    return [(str(p["type"]), "" if is_missing(p["content"]) else str(p["content"]).strip()) for p in content]


def _message(values: Any, role: str) -> list[tuple[str, str]]:
    """Return the non-empty parts of all messages of a role."""
    found = [_parts(message["content"]) for message in values["messages"] if message["role"] == role]
    return [part for parts in found for part in parts if part[1]]


def _math(row: Row) -> tuple[Example, str | None]:
    """Return (example of a MathCodeInstruct row, why it has no gold)."""
    question = "\n".join(text for _, text in _message(row.values, "user"))
    parts = _message(row.values, "assistant")
    last = parts[-1][1] if parts[-1][0] == "text" else ""
    thought = "\n".join(FENCES.get(kind, "{}").format(text) for kind, text in parts[:-1])
    answer = last
    if not thought and answers.split_thought(last, prompt_opens_think=False).well_formed:
        thought, _, answer = (part.strip() for part in last.removeprefix(answers.OPEN).partition(answers.CLOSE))
    elif not thought:  # one text holds both the solution and the answer
        gold = answers.read_expression(last, prompt_opens_think=False).value
        thought, answer = last, rf"The answer is $\boxed{{{gold}}}$." if gold else last
    target = f"{thought_block(thought)}\n\n{answer}"
    if not answers.thinks_then_answers(target, prompt_opens_think=False):
        why = "holds <think> or </think> out of place" if last else "ends in code, not in a text"
        return _example(f"mathcode-{row.line}", question, "", "mathcode", "", ""), f"its answer {why}"
    reading = answers.read_expression(target, prompt_opens_think=False)
    example = _example(f"mathcode-{row.line}", question, reading.value or "", "mathcode", "", target)
    return example, None if reading.value else answers.REASONS[reading.reason or "no_answer"]


def _science_answers(row: Row) -> list[str]:
    """Return the final answer with its unit, as published, and then without it, for units that do not parse."""
    gold, unit = row.text("answer_number"), row.text("unit")
    bare = re.sub(r"(?<!\\)\$", "", unit).strip()  # `$\mathrm{~N}$` without its dollars; `$\$$` is a dollar
    joined = gold + ((r" \times " if bare.startswith("10") else r"\ ") + bare if bare else "")
    return [rf"Final Answer: $\boxed{{{text}}}$" for text in dict.fromkeys((joined, gold))]


def _science(row: Row, answer: str) -> Example:
    unit, solution = row.text("unit"), row.text("solution")
    question = row.text("problem_text") + (f" Give the answer in {unit}." if unit else "")
    target = f"{thought_block(solution)}\n\n{answer}" if solution else ""
    return _example(f"scibench-{row.line}", question, row.text("answer_number"), "scibench", unit, target)


def _example(id: str, question: str, gold: str, set_: str, unit: str, target: str) -> Example:
    return Example(
        id=id,
        question=f"{question}\n\n{INSTRUCTION}",
        gold=gold,
        group=group_of(question),
        tags={"set": set_, "unit": unit},
        target=target,
    )


def _problem(values: Any) -> str | None:
    """Return the problem of a file's row, which may belong to either set, or to both; None if it is good."""
    math, science = has_fields(values, MATH_FIELDS), has_fields(values, SCIENCE_FIELDS)
    if not math and not science:
        named = isinstance(values, dict) and MATH_FIELDS[0] in values and SCIENCE_FIELDS[0] not in values
        return _math_problem(values) if named else _science_problem(values)
    problems = [_math_problem(values) if math else None, _science_problem(values) if science else None]
    return "; ".join(text for text in problems if text) or None


def _math_problem(values: Any) -> str | None:
    if not isinstance(values, dict) or not isinstance(values.get("messages"), list):
        return "no messages, a list of turns with role and content"
    try:
        prompt, answer = (_message(values, role) for role in ("user", "assistant"))
    except (KeyError, TypeError):
        return "a message is not a {role, content} with a text or a list of {type, content}"
    return None if prompt and answer else f"messages have no turn of the {'user' if answer else 'assistant'}"


def _science_problem(values: Any) -> str | None:
    if problem := missing_fields(values, *SCIENCE_FIELDS) or empty_fields(values, "unit", "solution"):
        return problem
    number = str(values["answer_number"])
    return None if answers.quantity_in(number) else f"answer_number {number!r} is not a number"


TASK = MathScience
