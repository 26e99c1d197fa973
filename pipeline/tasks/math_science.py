r"""Mathematics and science: MathCodeInstruct (Wang et al. 2024) and SciBench (Wang et al. 2024), mixed.

    task: {name: math_science, source: hub, params: {mathcode_rows: 24308, tolerance: 0.05}}

A row of MathCodeInstruct (`messages`: text, code and what the code printed, by turns) becomes a thought of all its
parts and its last text as the answer, whose final answer is the gold: a number, or an expression that math-verify
compares. A row of SciBench (`problem_text`, `solution`, `answer_number`, `unit`) is a number with a unit, right within
a tolerance, powers of ten and SI prefixes folded in; those without a worked solution are asked and not learned from.
A file may hold rows of both kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, ClassVar

from pipeline import answers
from pipeline.rows import Columns, Row, is_missing, lacks, no_text
from pipeline.tasks.task import Example, Part, Splits, Task, Verdict, divide, proof_of
from pipeline.typed import Positive, Share

MATHCODE, SCIBENCH = "MathLLMs/MathCodeInstruct", "xw27/scibench"
SCIENCE_FIELDS = ("problem_text", "answer_number")
INSTRUCTION = r"Think step by step, then put the final answer in \boxed{}."
FENCES = {"text": "{}", "code": "```python\n{}\n```", "execution": "```output\n{}\n```"}


@dataclass(frozen=True)
class MathScienceParams:
    """`task.params`: how many rows of each set, which are held out, how near a number has to be."""

    mathcode_rows: Positive | None = None  # drawn from MathCodeInstruct; null: all
    scibench_rows: Positive | None = None
    validation: Part = 0.1
    test: Part = 500
    grpo_rows: Positive | None = None  # of the training rows that have a gold answer; null: all
    tolerance: Share = 0.05  # of SciBench's numbers


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

    params: MathScienceParams

    def load(self) -> Splits:
        p = self.params
        math, science, skipped = self._read()
        named, more = self.read_named(_problem)
        parts = {name: [_either(row) for row in rows] for name, rows in named.items()}
        done = divide(
            [*_draw(math, p.mathcode_rows, self.seed), *_draw(science, p.scibench_rows, self.seed)],
            self.seed,
            test=parts.get("test", p.test),
            validation=parts.get("validation", p.validation),
        )
        sft = [example for example in done.train if example.target]
        grpo = [replace(example, target="") for example in done.train if example.gold][: p.grpo_rows]
        left = len(done.train) - len(sft)
        held = {"validation": done.validation, "test": done.test}
        proof = proof_of(done.train, held, same_question=done.left, skipped=skipped + more, without_solution=left)
        validation = [example for example in done.validation if example.target]
        return Splits(sft, grpo, validation, {"test": done.test} if done.test else {}, proof)

    def row_problem(self, values: Any) -> str | None:
        return _problem(values)

    def _read(self) -> tuple[list[Example | None], list[Example | None], list[str]]:
        """(rows of MathCodeInstruct, rows of SciBench, skipped); None in the place of a row that cannot be read."""
        if self.source == "path":
            rows, skipped = self.read(_problem)
            examples = [_either(row) for row in rows]
            math = [example for example in examples if example.tags["set"] == "mathcode"]
            return [*math], [example for example in examples if example.tags["set"] != "mathcode"], skipped
        rows_of_math, skipped = self.read_places(_math_problem, sample="mathcode")
        rows_of_science, more = self.read_places(_science_problem, hub=SCIBENCH, sample="scibench")
        science = [_science(row) if row else None for row in rows_of_science]
        return [_math(row) if row else None for row in rows_of_math], science, skipped + more

    def grade(self, example: Example, completion: str, prefilled: bool) -> Verdict:
        if not example.gold:
            text = answers.read_text(completion, prefilled)
            return Verdict(None, text.value is not None, text.value, reason=text.reason)
        said = answers.read_expression(completion, prefilled)
        if example.tags["set"] == "mathcode":
            right = said.value is not None and answers.same_expression(example.gold, said.value)
            return Verdict(right, said.value is not None, said.value, reason=said.reason)
        number, gold = answers.read_quantity(completion, prefilled), answers.quantity_in(example.gold)
        right = False
        if number.value is not None and gold is not None:
            right = answers.same_quantity(gold.value, example.tags["unit"], number.value, self.params.tolerance)
        return Verdict(right, number.value is not None, said.value, reason=number.reason)

    def is_well_formed(self, completion: str, prefilled: bool) -> bool:
        said = answers.expression(completion, prefilled)
        return answers.thinks_then_answers(completion, prefilled) and said is not None

    def rehearsal(self) -> dict[str, Any]:
        return {"mathcode_rows": None, "scibench_rows": None, "validation": 4, "test": 8, "grpo_rows": None}


def _draw(examples: list[Example | None], count: int | None, seed: int) -> Sequence[Example | None]:
    """`count` of the rows, or all where there are no more."""
    if count is None or count >= len(examples):
        return examples
    return divide(examples, seed, test=count, validation=0, names=("mathcode_rows", "validation")).test


def _parts(content: Any) -> list[tuple[str, str]]:
    """(kind, text) of each part of a message; a message may also be one text. A missing text is empty.

    Raises TypeError for a content that is not a text, a number or a list of parts.
    """
    if isinstance(content, str | float) or content is None:
        content = [{"type": "text", "content": content}]
    for part in content:
        if not isinstance(part, dict) or no_text(part, "content"):
            raise TypeError("a part of a message is not a {type, content} with a text")
    return [(str(p["type"]), "" if is_missing(p["content"]) else str(p["content"]).strip()) for p in content]


def _message(values: Any, role: str) -> list[tuple[str, str]]:
    found = [_parts(message["content"]) for message in values["messages"] if message["role"] == role]
    return [part for parts in found for part in parts if part[1]]


def _math(row: Row) -> Example:
    question = "\n".join(text for _, text in _message(row.values, "user"))
    parts = _message(row.values, "assistant")
    last = parts[-1][1] if parts[-1][0] == "text" else ""
    gold = (answers.stated(last) or [""])[-1]
    thought = "\n".join(FENCES.get(kind, "{}").format(text) for kind, text in (parts[:-1] or parts))
    answer = last if last and len(parts) > 1 else rf"The answer is $\boxed{{{gold}}}$." if gold else last
    return _example(f"mathcode-{row.line}", question, gold.strip("$ ."), "mathcode", "", thought, answer)


def _either(row: Row) -> Example:
    """The example of a row of a file, which may be of either set."""
    return _math(row) if "messages" in row.values else _science(row)


def _science(row: Row) -> Example:
    unit = row.text("unit")
    question = row.text("problem_text") + (f" Give the answer in {unit}." if unit else "")
    gold, solution = row.text("answer_number"), row.text("solution")
    bare = unit.replace("$", "").strip()
    joined = gold + ((r" \times " if bare.startswith("10") else r"\ ") + bare if bare else "")
    answer = rf"Final Answer: $\boxed{{{joined}}}$"
    return _example(f"scibench-{row.line}", question, gold, "scibench", unit, solution, answer)


def _example(id: str, question: str, gold: str, set_: str, unit: str, thought: str, answer: str) -> Example:
    return Example(
        id=id,
        question=f"{question}\n\n{INSTRUCTION}",
        gold=gold,
        group=sha256(answers.normalised(question).encode()).hexdigest()[:10],
        tags={"set": set_, "unit": unit},
        target=f"{answers.OPEN}\n{thought}\n{answers.CLOSE}\n\n{answer}" if thought else "",
    )


def _problem(values: Any) -> str | None:
    """Of a row of a file, which may be of either set."""
    turns = isinstance(values, dict) and "messages" in values
    return _math_problem(values) if turns else _science_problem(values)


def _math_problem(values: Any) -> str | None:
    if not isinstance(values, dict) or not isinstance(values.get("messages"), list):
        return "no messages, a list of turns with role and content"
    try:
        asked, said = (_message(values, role) for role in ("user", "assistant"))
    except (KeyError, TypeError):
        return "a message is no {role, content} with a text or a list of {type, content}"
    return None if asked and said else f"messages have no {'turn of the user' if said else 'turn of the assistant'}"


def _science_problem(values: Any) -> str | None:
    if told := lacks(values, *SCIENCE_FIELDS) or no_text(values, "unit", "solution"):
        return told
    number = str(values["answer_number"])
    return None if answers.quantity_in(number) else f"answer_number {number!r} is no number"


TASK = MathScience
