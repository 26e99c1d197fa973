r"""How rows become targets: the cases of test_target_law.py, and the table of docs/tasks.md that is made of them.

python tests/support/target_cases.py        writes the table into docs/tasks.md
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs" / "tasks.md"
BEGIN, END = "<!-- targets: made by tests/support/target_cases.py -->", "<!-- targets: end -->"
BAD, UNVERIFIED = "bad row", "no gold"


@dataclass(frozen=True)
class Case:
    """What a row holds, its gold (or BAD, UNVERIFIED), and what its target ends with, or why it has none."""

    task: str
    said: str  # the cell that decides
    gold: str
    ends: str
    more: tuple[str, ...] = ()  # the unit of a number of SciBench, and whether it has a solution
    shown: bool = True


CASES = [
    # gsm8k: the cell `answer`
    Case("gsm8k", "2 + 1\n#### 3", "3", "#### 3"),
    Case("gsm8k", "15 / 4\n#### 3.75", "3.75", "#### 3.75"),
    Case("gsm8k", "1000 + 234\n#### 1,234", "1234", "#### 1,234"),
    Case("gsm8k", "It costs\n#### $18.00", "18", "#### $18.00"),
    Case("gsm8k", "so many\n#### 18 thousand", "18000", "#### 18 thousand"),
    Case("gsm8k", "one of three\n#### 1/3", "1/3", "#### 1/3"),
    Case("gsm8k", "a half more\n#### 1 1/2", "1.5", "#### 1 1/2", shown=False),
    Case("gsm8k", "27 - 8 = 19\n**Final answer:** 19 apples.", "19", "#### 19 apples"),
    Case("gsm8k", "27 - 8 = 19\nFinal answer: 19", "19", "#### 19", shown=False),
    Case("gsm8k", "#### Step 1: add\n2 + 3\n#### 5", "5", "2 + 3\n</think>\n#### 5"),
    Case("gsm8k", "The answer is 3 at first.\n3 + 2\n#### 5", "5", "#### 5"),
    Case("gsm8k", "33 + 33\n=66\n=66\n#### 66", "66", "=66\n=66\n</think>\n#### 66", shown=False),
    Case("gsm8k", "2 + 3\n####\n5", "5", "#### 5", shown=False),
    Case("gsm8k", "fifty-five\n#### 5\n#### 5", "5", "#### 5", shown=False),
    Case("gsm8k", "#### 5 is not it, 55 is\n#### 55", "55", "5 is not it, 55 is\n</think>\n#### 55", shown=False),
    Case("gsm8k", "<think>2 + 3</think>\n#### 5", "5", "2 + 3\n</think>\n#### 5"),
    Case("gsm8k", "2 + 3\n#### 5\n#### 6", BAD, "two that differ"),
    Case("gsm8k", "2 <think> 3\n#### 5", BAD, "holds <think> or </think>"),
    Case("gsm8k", "...\n#### 5", BAD, "no steps"),
    Case("gsm8k", "so it is two", BAD, 'one number after "####"', shown=False),
    Case("gsm8k", "7 or 8\n#### 7 or 8", BAD, 'one number after "####"', shown=False),
    # math_science, `messages`: the one text of the assistant, or what is after the code
    Case("mathcode", r"Half of 30 is \boxed{15}.", "15", r"The answer is $\boxed{15}$."),
    Case("mathcode", r"print(9) | So it is $\boxed{4\sqrt{3}}$.", r"4\sqrt{3}", r"So it is $\boxed{4\sqrt{3}}$."),
    Case("mathcode", "print(9) | The answer is 9.", "9", "The answer is 9."),
    Case("mathcode", r"<think>9 + 6</think>So \boxed{15}", "15", "9 + 6\n</think>\n\nSo \\boxed{15}"),
    Case("mathcode", r"First \boxed{15}, then \boxed{9}.", UNVERIFIED, "two final answers disagree"),
    Case("mathcode", r"print(9) | It is \boxed{15}. No, \boxed{9}.", UNVERIFIED, "two final answers disagree"),
    Case("mathcode", "print(9) | Which was to be shown.", UNVERIFIED, "no final answer is marked"),
    Case("mathcode", r"print(9) | So \boxed{15", UNVERIFIED, "no final answer is marked", shown=False),
    Case("mathcode", "print(9) |", UNVERIFIED, "its answer ends in code", shown=False),
    Case("mathcode", r"print('</think>') | So \boxed{15}", UNVERIFIED, "<think> or </think> out of place", shown=False),
    Case("mathcode", r"print(9) | So \boxed{}.", UNVERIFIED, "no final answer is marked", shown=False),
    # math_science, SciBench: `answer_number` and `unit`
    Case("scibench", "50", "50", r"$\boxed{50\ \mathrm{~N}}$", (r"$\mathrm{~N}$",)),
    Case("scibench", "3.97", "3.97", r"$\boxed{3.97 \times 10^{-19} \mathrm{~J}}$", (r"$10^{-19} \mathrm{~J}$",)),
    Case("scibench", "3000", "3000", r"$\boxed{3000\ \$}$", (r"$\$$",)),
    Case("scibench", "+7.3", "+7.3", r"$\boxed{+7.3\ \mathrm{JK}^{-1}}$", (r"$\mathrm{JK}^{-1}$ ",)),
    Case("scibench", "5", "5", r"$\boxed{5}$", ("= m",), shown=False),
    Case("scibench", "5", "5", r"$\boxed{5}$", ("",), shown=False),
    Case("scibench", "many", BAD, "is not a number"),
    # medical
    Case("medical", "iron | Low ferritin.", "", "Low ferritin."),
    Case("medical", "... | Low ferritin.", BAD, "has no words"),
    Case("medical", "iron</think> | Low ferritin.", BAD, "holds <think> or </think>"),
    Case("verifiable", "The\n iron  deficiency", "The iron deficiency", ""),
    Case("verifiable", "?", BAD, "has no words"),
    Case("verifiable", "word " * 80, BAD, "not an answer that parses back to itself", shown=False),
    # human_like
    Case("human_like", "Oh, tea!", "", "Oh, tea!"),
    Case("human_like", "<think>tea or coffee", BAD, "the thought never ends"),
]  # fmt: skip


def row(case: Case, number: int = 0) -> dict[str, Any]:
    """The row of a case, as its source has it."""
    question = f"Which is it, number {number}?"
    first, _, second = (part.strip() for part in case.said.partition("|"))
    if case.task == "gsm8k":
        return {"question": question, "answer": case.said}
    if case.task == "mathcode":
        parts = [{"type": "text", "content": case.said}]
        if "|" in case.said:
            parts = [{"type": "text", "content": "I ask."}, {"type": "code", "content": first}]
            parts += [{"type": "text", "content": second}] if second else []
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": parts}]}
    if case.task == "scibench":
        return {"problem_text": question, "answer_number": case.said, "unit": "".join(case.more), "solution": "So."}
    if case.task == "medical":
        return {"Question": question, "Complex_CoT": first, "Response": second}
    if case.task == "verifiable":
        return {"Open-ended Verifiable Question": question, "Ground-True Answer": case.said}
    return {"prompt": question, "chosen": case.said, "rejected": "I am a language model."}


FIELDS = {
    "gsm8k": "gsm8k: `answer`",
    "mathcode": "math_science: `messages` (code │ text after it)",
    "scibench": "math_science: `answer_number`, `unit`",
    "medical": "medical: `Complex_CoT` │ `Response`",
    "verifiable": "medical: `Ground-True Answer`",
    "human_like": "human_like: `chosen`",
}


def table() -> str:
    """The Markdown of docs/tasks.md, from the cases that are shown."""

    def code(text: str) -> str:
        return "`" + text.replace("\n", "⏎").replace("|", "│") + "`"

    lines = ["| row | its content | gold | its target ends with |", "|---|---|---|---|"]
    for case in CASES:
        if not case.shown:
            continue
        held = ", ".join(map(code, (case.said, *case.more)))
        if case.gold in (BAD, UNVERIFIED):
            lines.append(f"| {FIELDS[case.task]} | {held} | {case.gold} | {case.ends} |")
        else:
            gold = code(case.gold) if case.gold else "cannot be verified"
            ends = code(case.ends) if case.ends else "not an SFT row"
            lines.append(f"| {FIELDS[case.task]} | {held} | {gold} | {ends} |")
    return "\n".join(lines)


if __name__ == "__main__":
    page = DOCS.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    DOCS.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
