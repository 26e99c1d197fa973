r"""What is read as what: the cases of tests/test_answer_law.py, and the table of docs/tasks.md that is made of them.

python tests/answer_cases.py        writes the table into docs/tasks.md
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs" / "tasks.md"
BEGIN, END = "<!-- answers: made by tests/answer_cases.py -->", "<!-- answers: end -->"


@dataclass(frozen=True)
class Case:
    """What stands after the thought, and what is read; where `value` is None, the reason why nothing is."""

    kind: str  # verdict, number, quantity, expression, choice, words
    text: str
    value: str | None
    reason: str | None = None
    shown: bool = True  # in the table of the docs


@dataclass(frozen=True)
class Pair:
    """A gold answer and one that was given: the same, or another."""

    kind: str  # expression, quantity (with a unit: `5 minutes`), words
    gold: str
    said: str
    same: bool
    shown: bool = True


def _verdicts(value: str | None, *texts: str, reason: str | None = None, shown: bool = True) -> list[Case]:
    return [Case("verdict", text, value, reason, shown) for text in texts]


def _numbers(value: str | None, *texts: str, reason: str | None = None, shown: bool = True) -> list[Case]:
    return [Case("number", text, value, reason, shown) for text in texts]


VERDICTS = [
    *_verdicts(
        "No",
        *("Therefore: No", "**Therefore:** No.", "Therefore: _No_", 'Therefore: "No"', r"Therefore: \boxed{No}"),
        *(
            "Therefore：No",
            "Therefore:\n- C is a collider.\n\nTherefore: No",
            "Therefore: No, because C blocks the path.",
        ),
    ),
    *_verdicts(
        "Yes",
        *("Therefore: Yes, and A causes B.", "Therefore: Yes. No graph lacks it.", "Therefore: The answer is Yes."),
        "Therefore: No direct edge joins A and B, so I go on.\nTherefore: Yes",
    ),
    *_verdicts(
        "Yes",
        *(
            "therefore:YES",
            "Therefore: **“Yes”**",
            r"Therefore: $\boxed{\text{Yes}}$.",
            r"$\boxed{\text{Therefore: Yes}}$",
        ),
        *("**Therefore**: Yes", "Therefore:\u00a0Yes", "Therefore: Yes\u200b", "Therefore: `Yes`", "Therefore: (Yes)"),
        *("Therefore: Yes — A causes B", "Therefore: Yes (A causes B)", "Therefore: <answer>Yes</answer>"),
        *("Since B is not a cause of A, Therefore: Yes", "It is not a collider. Therefore: Yes", "Therefore: Ｙｅｓ"),
        *(
            "B is not a cause of A: Therefore: Yes",
            "Therefore: Yes, the claim holds.",
            "Therefore: Yes; no other graph fits.",
        ),
        *("Therefore: perhaps B is a cause.\n\nTherefore: Yes", "Therefore: Yes. It does not depend on C."),
        shown=False,
    ),
    *_verdicts(
        None, "Yes", "Therefore: No direct edge joins A and B, so I go on.", "Therefore: Yes?", reason="no_verdict"
    ),
    *_verdicts(
        None,
        *("Therefore: Yes\nTherefore: No", "Therefore: Yes or No", "Therefore: Yes? No.", "Therefore: Yes (No)"),
        *("Therefore: Yes, but the right answer is: No", "Therefore: Yes. Wait, no."),
        reason="two_verdicts",
    ),
    *_verdicts(None, "It is not the case that Therefore: Yes", reason="denied_verdict"),
    *_verdicts(None, "Therefore: Y\u0435s (a Cyrillic е)", "Therefore: Y\u200bes", reason="lookalike"),
    *_verdicts(None, "", reason="empty"),
    *_verdicts(None, "<think>Therefore: Yes", reason="two_thoughts"),
    *_verdicts(
        None,
        *(
            "Therefore: Yes/No",
            "Therefore: **Yes** / **No**",
            "Therefore: Yes, or No",
            "Therefore: Yes No",
            "Therefore: Yes\nNo",
        ),
        *(
            "Therefore: Yes. No.",
            "Therefore: Yes; No",
            "Therefore: Yes - No",
            "Therefore: Yes…No",
            "Therefore: Yes\nAnswer: No",
        ),
        *(
            "Therefore: Yes\u2028No",
            "Therefore: Yes\u200bNo",
            "Therefore: Yes, not No",
            "Therefore: Yes or not",
            "Therefore: Yes = No",
        ),
        *(
            "Therefore: Yes\nTher\u0435fore: No",
            "Therefore: Yes\nTherefore: N\u043e",
            "Therefore: Yes \u0274\u1d0f",
            "Therefore: Yes⁄No",
        ),
        *(
            "Therefore: Yes\nThere\u200bfore: No",
            "Therefore: Yes. Actually, no.",
            "Therefore: Yes. That is wrong.",
            "Therefore: Yes、No",
        ),
        *(
            "Therefore: maybe. Therefore: Yes",
            "Therefore: Yes if A causes B, No otherwise",
            r"Therefore: Yes \boxed{No}",
        ),
        *(
            'It would be wrong to say "Therefore: Yes"',
            "I would not answer: Therefore: Yes",
            "Therefore: Yes is wrong",
            "Therefore: Yesterday",
        ),
        reason="*",
        shown=False,
    ),
]
NUMBERS = [
    *_numbers(
        "72",
        *(
            "#### 72",
            r"\boxed{72}",
            "The answer is 72.",
            "**Answer:** 72",
            "Final answer: 72 apples",
            "<answer>72</answer>",
        ),
        *("Answer: The answer is 72.", "Final Answer: The final answer is $72$. I hope it is correct.", "####\n72"),
        *(
            "#### Step 1: add\n2+70=72\n\\boxed{72}",
            "#### Final Answer: 72",
            r"Fill \boxed{}. So \boxed{72}",
            r"\boxed{n \approx 72}",
        ),
    ),
    *_numbers(
        "72",
        *(
            "#### $72.00",
            "#### ７２",
            "#### 𝟕𝟐",
            "Answer：72",
            "答案是 72",
            "**Final Answer**\n\n$$\\boxed{72}$$",
            "### Final Answer\n72",
        ),
        *(
            "The final answer is:\n\n72",
            "The answer is:\n\\[\n72\n\\]",
            "The answer is **72**.",
            "The correct answer is $72$ dollars.",
        ),
        *(
            "Answer: $\\boxed{72}$",
            "So the answer is therefore 72.",
            "#### 72\nI hope it is correct.",
            "#### 72.0",
            "The answer is $72.",
        ),
        *(
            r"\boxed{\text{Total} = \$72}",
            r"\boxed{x_1 = 72}",
            r"\boxed{72 \text{ cm}}",
            r"\boxed{72\%}",
            r"\fbox{72}",
            "#### 144/2",
        ),
        *(
            "**The final answer is $\\boxed{72}$**",
            "$\\boxed{72}$ is the answer. The answer is 72",
            "The answer is 72, because 6 times 12 is 72."[:0] or "#### 72",
        ),
        shown=False,
    ),
    *_numbers("57500", r"\boxed{\$57,\!500}", r"\boxed{57\,500}", "#### 57{,}500", "#### 57 500"),
    *_numbers(
        "57500",
        "#### 57,500",
        "#### 57\u202f500",
        "#### $57.5k",
        "#### 57.5 thousand",
        r"\boxed{5.75 \times 10^4}",
        "#### 5.75e4",
        shown=False,
    ),
    *_numbers("18000", "#### 18 thousand", "#### 18 thousand dollars"),
    *_numbers("-5", "#### -5", "#### −5", "#### -$5", r"\boxed{x = -5}", shown=False),
    *_numbers("3/2", r"\boxed{1\frac{1}{2}}", "#### 1 1/2", r"\boxed{\dfrac{3}{2}}", "#### 1½", "#### 1.5"),
    *_numbers("120", r"\boxed{120^\circ}", "#### 120°", r"\boxed{120^{\circ}}", "#### 120 degrees", "#### 120"),
    *_numbers(
        "18",
        r"\boxed{\sqrt{324}}",
        r"\boxed{\frac{36}{2}}",
        r"\boxed{\binom{18}{1}}",
        r"\boxed{2 \cdot 9}",
        shown=False,
    ),
    *_numbers(None, "72", "I am done.", r"\boxed{}", "#### Step 1: add", reason="no_answer"),
    *_numbers(None, "#### 5\n#### 6", r"\boxed{5} or \boxed{6}", "The answer is 6. #### 5", reason="two_numbers"),
    *_numbers(None, "#### 5, 6", r"\boxed{6=5}", r"\boxed{3x}", r"\boxed{5abc}", "#### ٧٢", reason="no_number"),
    *_numbers(
        None,
        "It is not true that the answer is 72.",
        r"The answer is not \boxed{72}",
        "The answer is 72 is wrong",
        reason="*",
    ),
    *_numbers(
        None,
        *(
            "#### 5 or 6",
            "#### 5/6/7",
            "#### 5-6",
            "#### 5<6",
            "#### 1e999",
            "#### nan",
            "#### 1/0",
            "#### 5!",
            r"\boxed{5",
            "#### 5. No, 6.",
        ),
        *(
            r"\boxed{5} \boxed{6}",
            "The answer is 5. The answer is 6.",
            r"\boxed{5 \pm 1}",
            "#### --5",
            r"\boxed{5}\n\boxed{6 \text{ kg}}",
            "#### 1,23",
        ),
        *(
            "<answer>5</answer><answer>6</answer>",
            r"\boxed{5 \text{ kg}} = \boxed{5 \text{ m}}",
            "#### 5\n" * 30,
            "#### 9" * 5000,
        ),
        reason="*",
        shown=False,
    ),
]
CHOICES = [
    *(
        Case("choice", text, "C")
        for text in (
            "The answer is: (C)",
            r"\boxed{\text{(C)}}",
            "**Answer:** C",
            "Answer: C) Vitamin C deficiency",
            "The correct option is C.",
        )
    ),
    *(
        Case("choice", text, "C", shown=False)
        for text in (
            "(C)",
            "C.",
            "**C**",
            "#### C",
            "<answer>C</answer>",
            "The answer is option C",
            "Answer: $\\textbf{(C)}$",
            "Answer：Ｃ",
            "\\boxed{\\mathrm{C}}",
        )
    ),
    Case("choice", "The answer is B or C", None, "*"),
    *(
        Case("choice", text, None, "*", False)
        for text in (
            "The answer is AB",
            "Answer: A/C",
            "Answer: (A) (C)",
            "The answer is C, but B is right",
            "The answer is F",
            "The answer is not C",
            "Answer: \u0421",
            "The answer is A. The answer is C.",
        )
    ),
]
WORDS = [
    Case("words", "Final answer: The iron deficiency.", "iron deficiency"),
    Case("words", "**Final answer:** Iron deficiency. I hope it is correct.", "iron deficiency", shown=False),
    Case("words", r"\boxed{\text{Iron deficiency}}", "iron deficiency", shown=False),
    Case("words", "Iron deficiency", None, "no_answer"),
    Case("words", "Final answer: rest\nFinal answer: surgery", None, "two_answers"),
]
CASES = [*VERDICTS, *NUMBERS, *CHOICES, *WORDS]

PAIRS = [
    *(
        Pair("expression", gold, said, True)
        for gold, said in (
            (r"2\sqrt{3}", r"\sqrt{12}"),
            (r"800 \text{ ml}", "800"),
            (r"5 \text{ cm}", "0.05 m"),
            (r"90^\circ", "90 degrees"),
            (r"\text{(C)}", "C"),
            (r"\text{Ellipse}", "ellipse"),
            (r"x \in [-2,7]", r"\left[-2, 7\right]"),
            (
                r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
                r"\left(\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right)",
            ),
            (r"\binom{5}{2}", "10"),
            ("2x+4y-3=0", "4x+8y-6=0"),
            (r"6\pi", r"6\pi\text{ cm}^2"),
            ("x = 5", "5"),
            ("204_5", "204_{5}"),
            (r"\{1,2\}", r"\{2,1\}"),
        )
    ),
    *(
        Pair("expression", gold, said, True, False)
        for gold, said in (
            (r"\frac{1}{2}", "0.5"),
            ("6x - 4", "-4 + 6x"),
            ("x>3", "3<x"),
            (r"(-\infty,1)\cup(2,\infty)", r"(2,\infty) \cup (-\infty,1)"),
            (r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", r"\left[\begin{matrix} 1 \\ 2 \end{matrix}\right]"),
            (r"x=1 \text{ or } x=2", "x=1, x=2"),
            ("y=2x+1", "2x+1"),
            (r"\$11,232", "11232 dollars"),
            (r"1\frac{1}{2}", "1.5"),
            (r"-\frac{1}{2}", r"\frac{-1}{2}"),
            (r"10{,}080", "10080"),
            (r"\sqrt{2}+1", r"1+\sqrt2"),
            ("3+4i", "4i+3"),
            (r"(1,\frac12)", "(1, 0.5)"),
            (r"2^{10}", "1024"),
            ("x^2=4", "4=x^2"),
            (r"\text{120 degrees}", r"120^{\circ}"),
        )
    ),
    *(
        Pair("expression", gold, said, False)
        for gold, said in (
            ("204_5", "204_7"),
            ("x=3", "y=3"),
            (r"5\text{ cm}", r"5\text{ inches}"),
            ("5", "5abc"),
            ("5", "-5"),
            ("5", "6=5"),
            ("(1,2)", "[1,2]"),
            ("3x", "3"),
            (r"\pi", "3.14"),
        )
    ),
    *(
        Pair("expression", gold, said, False, False)
        for gold, said in (
            ("5", "5, 6"),
            ("5", r"5 \text{ or } 6"),
            ("x>3", "x<3"),
            ("x>3", r"x \ge 3"),
            ("(1,2)", "(2,1)"),
            ("x", "X"),
            ("5 apples", "5 oranges"),
            (r"\text{even}", "odd"),
            ("2x+4y-3=0", "4x+8y+6=0"),
            (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 2 & 1 \end{pmatrix}"),
            (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}"),
            (r"5 \text{ kg}", r"5 \text{ m}"),
            ("5", "5000"),
            ("5", "5 thousand"),
            ("cat", "act"),
            ("x^2", "x_2"),
            (r"\sqrt{2}", "1.41421356"),
            ("y=2x+1", "y=2x-1"),
            ("(C)", "(D)"),
            (r"6\pi\text{ cm}", r"6\pi\text{ cm}^2"),
            ("€5", "$5"),
            ("3m", "3"),
        )
    ),
    *(
        Pair("quantity", gold, said, True)
        for gold, said in (
            ("5 min", "300 s"),
            ("12 m", r"d \approx 12 \text{ m}"),
            ("22.2 m", r"\sqrt{493} \text{ m}"),
            ("5.63e-19 J", "5.63 × 10⁻¹⁹ J"),
            (r"-60 $\mathrm{~kJ} \mathrm{~mol}^{-1}$", "-60000 J mol⁻¹"),
            ("373.15 K", "100 °C"),
            (r"12 $\Omega$", "12 ohms"),
        )
    ),
    *(
        Pair("quantity", gold, said, True, False)
        for gold, said in (
            ("5 min", "5 minutes"),
            ("5 min", "5"),
            (r"9.81 m/s^2", r"9.81\ \mathrm{m}\cdot\mathrm{s}^{-2}"),
            (r"12 J", r"\Delta H = 12 \text{ J}"),
            ("90 °", r"90^\circ"),
            ("5 km", "5 kilometers"),
            ("5655 m^3", r"1800\pi \text{ m}^3"),
            (r"12 $k\Omega$", r"12000\,\Omega"),
            ("2 h", "120 minutes"),
            ("50 N", "50 kg m/s^2"),
            ("2 cm^3", "2 mL"),
        )
    ),
    *(
        Pair("quantity", gold, said, False)
        for gold, said in (
            ("5 kg", "5 m"),
            ("5 min", "5 hours"),
            ("12.5 m", "12.5 s"),
            ("373 K", "373 °C"),
            ("240 kJ", "240 J"),
        )
    ),
    *(
        Pair("quantity", gold, said, False, False)
        for gold, said in (
            ("5 m", "-5 m"),
            ("5 m", "5 m^2"),
            ("5 m/s", "5 m s"),
            ("5 J", "5 J/mol"),
            ("90 °", "90 rad"),
            ("5 m", "5 cm"),
            ("5 m", "50"),
        )
    ),
    *(
        Pair("words", gold, said, False)
        for gold, said in (("Rh+", "Rh-"), ("pH > 7.35", "pH < 7.35"), ("Hepatitis", "Hepatitis A"))
    ),
    *(
        Pair("words", gold, said, True, shown)
        for gold, said, shown in (
            ("The big toe", "big toe.", True),
            ("Rh−", "Rh-", False),
            ("Ca²⁺", "ca2+", False),
            ("A rupture of a tendon", "rupture of the tendon", False),
            ("hepatitis A", "Hepatitis A", False),
            ("pH >= 7", "pH ≥ 7", False),
        )
    ),
    *(
        Pair("words", gold, said, False, False)
        for gold, said in (
            ("7.35", "735"),
            ("-5", "5"),
            ("Vitamin A", "Vitamin"),
            ("A+", "A-"),
            ("5%", "5"),
            ("HER2+", "HER2"),
            ("iron", "not iron"),
            ("Vitamin C", "Vitamin \u0421"),
        )
    ),
]


def table() -> str:
    """The Markdown of docs/tasks.md, from the cases that are shown."""

    def code(text: str) -> str:
        shown = text.replace("\n", "⏎").replace("\u200b", "·zero-width·").replace("|", "\\|")
        return f"`{shown}`" if "`" not in shown else f"`` {shown} ``"

    lines = ["| kind | what stands after the thought | is read as |", "|---|---|---|"]
    groups: dict[tuple[str, str], list[str]] = {}
    for case in CASES:
        if case.shown:
            reads = (
                code(case.value)
                if case.value is not None
                else f"unanswered: `{case.reason}`".replace("`*`", "with a reason")
            )
            groups.setdefault((case.kind, reads), []).append(code(case.text) if case.text else "nothing")
    lines += [f"| {kind} | {', '.join(texts)} | {reads} |" for (kind, reads), texts in groups.items()]
    lines += ["", "| kind | one answer | different answers |", "|---|---|---|"]
    for kind in dict.fromkeys(pair.kind for pair in PAIRS):
        cells = [
            ", ".join(
                f"{code(pair.gold)} and {code(pair.said)}"
                for pair in PAIRS
                if pair.kind == kind and pair.shown and pair.same is same
            )
            for same in (True, False)
        ]
        lines.append(f"| {kind} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    page = DOCS.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    DOCS.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
