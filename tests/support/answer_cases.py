r"""How answers are parsed: the cases of test_answer_law.py, and the table of docs/tasks.md that is made of them.

python tests/support/answer_cases.py        writes the table into docs/tasks.md
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs" / "tasks.md"
BEGIN, END = "<!-- answers: made by tests/support/answer_cases.py -->", "<!-- answers: end -->"


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
    *_numbers("5", "The answer is 5 because 2+3=5.", "#### 5 apples, since 2 + 3 = 5", shown=False),
    *_numbers(None, "#### 5 because not 5 but 6", reason="no_answer", shown=False),
    *_numbers(None, "The answer is 5 because the answer is 6.", reason="two_numbers", shown=False),
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


# ---------------------------------------------------------------- more of the same kinds, not in the table

MORE_VERDICTS = {
    "No": [
        "Therefore: **No**, as B is a collider",
        "Therefore: \\text{No}",
        "Therefore: $\\boxed{No}$",
        "Therefore: 'No'",
        "Therefore: «No»",
        "Therefore: No, there is no path.",
        "Therefore: No, it does not.",
        "\\[\\boxed{\\text{Therefore: No}}\\]",
        "Therefore: ***No***",
        "Therefore: <b>No</b>",
        "Therefore: No\n\nThe hypothesis is not entailed.",
        "Therefore: No.\n\n(There is a DAG in which it fails.)",
        "Therefore : No",
        "Therefore:No",
        "Therefore: The final answer is: **No**",
        "THEREFORE: NO",
        "Therefore: No\n---",
        "Therefore: - No",
        "Therefore: \u201cNo,\u201d because",
    ],
    "Yes": [
        "Therefore:\n\n**Yes**",
        "*Therefore:* Yes",
        "Therefore: *Yes*",
        "### Therefore: Yes",
        "> Therefore: Yes",
        "Therefore: Yes!",
        "Therefore: Yes, no other DAG fits.",
        "Therefore: Yes (no other DAG lacks it)",
        "Therefore: Yes; no DAG lacks it",
        "Therefore: No variable is left, hence\nTherefore: Yes",
        "Therefore: \\textbf{Yes}",
        "Therefore: Yes\n\nIn every graph of the class A is a cause of B, and there is no graph without it.",
        "Therefore: yes.",
        "Therefore:\tYes",
        "Therefore: \n Yes",
        "Therefore: Yes,",
        "Therefore: Yes:",
        'Therefore: The correct answer is "Yes".',
        "Therefore: Yes ✅",
        "✅ Therefore: Yes",
        "Therefore: ✅ Yes",
        "Therefore: Answer: Yes",
        "Therefore: Yes, so A causes B",
        "Therefore: Yes indeed",
        "I think Therefore: Yes",
        "If so, Therefore: Yes",
        "Therefore: 𝐘𝐞𝐬",
    ],
    None: [
        "Therefore: No one member lacks the edge",
        "Therefore: No so B",
        "Therefore: No way to tell",
        "Therefore: Nope",
        "Therefore: not Yes",
        "Therefore: Yes but No",
        "Therefore: Yes, No, Yes",
        "Therefore: No\u2026 or Yes",
        "I doubt that Therefore: Yes",
        "Therefore: Yes is false",
        "Therefore: Yes [No]",
        "Therefore: Yes {No}",
        "Therefore: Yes <No>",
        "Therefore: Yes *No*",
        "Therefore: Yes, i.e. No",
        "Therefore: Yes ~ No",
        "Therefore: Yes ⇒ No",
        "Therefore: Yes¹No",
        "Therefore: Yes. The answer is no",
        "Therefore: Yes. Just kidding.",
        "Therefore: Yes\xadNo",
        "Therefore: Ye\xads",
        "Therefore: \u202eoN\u202c",
        "Never Therefore: Yes",
        "Therefore: Yes. I changed my mind: No.",
        "Nobody would say Therefore: Yes",
        "Therefore: Yes, which is incorrect",
    ],
}
MORE_NUMBERS = {
    "72": [
        "#### **72**",
        "#### 72 km/h",
        "Final answer: 72%",
        "\\boxed{72\\text{ apples}}",
        "\\boxed{\\textbf{72}}",
        "The answer is: 72 (seventy-two)",
        "\\boxed{72 \\, \\text{km}}",
        "\\boxed{72\\ \\mathrm{km\\,h^{-1}}}",
        "\\boxed{\\text{72}}",
        "\\boxed{\\approx 72}",
        "\\boxed{{72}}",
        "\\boxed{ \\$ 72 }",
        "\\boxed{USD\\ 72}",
        "The answer is $72 per week.",
        "**Final Answer: 72**",
        "**Final answer:**\n72",
        "Final Answer:\n\n**72**",
        "### Answer:\n72 apples",
        "<answer>\n72\n</answer>",
        "<answer>$72$</answer>",
        "<answer>\\boxed{72}</answer>",
        "The final answer is: \\(72\\).",
        "The final answer is \\[72\\]",
        "Thus the answer is $\\boxed{72}$.",
        "Therefore, the answer is 72.",
        "So, the final answer is **72 dollars**.",
        "Hence the answer is 72, as claimed.",
        "Answer = 72",
        "answer: 72.",
        "ANSWER: 72",
        "#### 72.",
        "####72",
        "#### $72$",
        "#### \\$72",
        "#### 72 \n\n",
        "The answer to the question is 72.",
        "The answer should be 72.",
        "My final answer is 72",
        "The correct answer is: 72",
        "\\boxed{x=72}",
        "\\boxed{72 \\, m^2}",
        "\\boxed{\\text{72 cm}}",
        "\\boxed{72\\text{ (dollars)}}",
        "\\boxed{\\mathbf{72}}",
        "\\boxed{\\color{red}{72}}",
        "\\boxed{\\displaystyle 72}",
        "The answer is 72\xa0apples",
        "The answer is\xa072",
        "Answer: **$72**",
        "Answer: ~72",
        "The answer is 72%.",
        "The answer is 72 hours (3 days)",
        "**Answer: $\\boxed{72}$**",
        "\\boxed{72}\n\\boxed{72.0}",
        "The total is \\boxed{72} apples, so each gets \\boxed{72}",
        "#### Answer: 72",
        "#### The answer is 72",
        "Answer:72",
        "答案：72",
        "最终答案是：72",
        "The answer is 72<|im_end|>",
        "#### 72</s>",
        "#### 72<|eot_id|>",
        "The answer is 72nd",
    ],
    "-72": [
        "\\boxed{\\text{-}72}",
    ],
    None: [
        "The answer is 72 dollars and 0 cents",
        "The answer is 7 2",
    ],
    "36": [
        "#### 72 / 2",
    ],
    "1": [
        "#### 1.000",
    ],
    "1/2": [
        "The answer is 0.5",
        "Answer: 1/2",
        "Answer: ½",
        "Answer: .5",
    ],
    "-1/2": [
        "Answer: -1/2",
    ],
    "50": [
        "Answer: 50 cents",
    ],
    "3": [
        "Answer: 3 dozen",
    ],
    "2000000": [
        "The answer is 2 million.",
    ],
    "1500000000": [
        "The answer is 1.5 billion dollars",
    ],
    "20000": [
        "The answer is 20 thousand",
    ],
    "2000": [
        "The answer is 2e3",
    ],
    "12": [
        "The answer is 12 o'clock",
    ],
}
MORE_QUANTITIES = [  # gold, its unit, what is said, whether it is right
    ("5", "kg", "5000 g", True),
    ("9.81", "m/s^2", "9.81 \\mathrm{~m} / \\mathrm{s}^2", True),
    ("1000", "kg/m^3", "1 g/cm^3", True),
    ("2", "M", "2 mol/L", True),
    ("101.325", "kPa", "1 atm", True),
    ("3", "h", "3 hours", True),
    ("1", "$\\mathrm{eV}$", "1.602e-19 J", True),
    ("0.1", "nm", "1 Å", True),
    ("100", "pm", "1\\ \\text{\\AA}", True),
    ("8.314", "$\\mathrm{J} \\mathrm{~K}^{-1} \\mathrm{~mol}^{-1}$", "8.314 J/(mol K)", True),
    ("101.3", "$\\mathrm{J}$", "1 L atm", True),
    ("5", "$\\mu \\mathrm{m}$", "5 \\times 10^{-6} m", True),
    ("5", "$\\mathrm{\\mu F}$", "5 microfarads", True),
    ("5", "mA", "0.005 A", True),
    ("25", "%", "25\\%", True),
    ("25", "%", "0.25", False),
    ("25", "%", "25 percent", True),
    ("4.184", "kJ", "1 kcal", True),
    ("24", "hours", "1 day", True),
    ("5", "m/s", "18 km/h", True),
    ("5", "m/s", "5 m", False),
    ("5", "W/m^2", "5 W", False),
    ("5", "cm^{-1}", "5 cm", False),
    ("5", "cm^{-1}", "500 m^{-1}", True),
    ("100", "°C", "373.15 K", True),
    ("100", "$^{\\circ} \\mathrm{C}$", "100", True),
    ("100", "$^{\\circ} \\mathrm{C}$", "212 °F", True),
    ("45", "$^{\\circ}$", "45 degrees", True),
    ("45", "$^{\\circ}$", "0.785398 rad", True),
    ("5", "lb", "5 pounds", True),
    ("60", "mph", "60 miles per hour", True),
    ("60", "mph", "60 mi/h", True),
    ("5", "N", "5 newtons", True),
    ("5", "N·m", "5 J", True),
    ("5", "m", "5 meters long", True),
    ("5", "m", "5 m/s", False),
    ("12", "$\\mathrm{~kJ/mol}$", "12 kJ·mol^{-1}", True),
    ("12", "$\\mathrm{~kJ/mol}$", "12 kJ", False),
    ("12", "kJ", "12 kJ/mol", False),
    ("300", "K", "300 kelvin", True),
    ("2.5", "$10^{6} \\mathrm{~m}/\\mathrm{s}$", "2500 km/s", True),
    ("1.2", "$\\mathrm{MPa}$", "12 bar", True),
    ("5", "$\\mathrm{ft}$", "60 inches", True),
    ("5", "dollars", "$5", True),
    ("5", "dollars", "500 cents", True),
    ("5", "Hz", "5 s^{-1}", True),
    ("5", "mi", "5 min", False),
    ("7", "s", "7 sec.", True),
    ("7", "kg", "7 kgs", True),
    ("7", "L", "7 liters of water", True),
    ("7", "m^3", "7 cubic meters", True),
    ("7", "m^3", "7 meters cubed", True),
    ("7", "m^2", "7 sq. m", True),
    ("7", "Ω", "7\\,\\Omega", True),
    ("7", "kΩ", "7 kilohms", True),
    ("7", "A", "7 amps", True),
    ("7", "T", "7 Tesla", True),
    ("7", "g", "7 grams", True),
    ("1e-3", "m^3", "1 liter", True),
    ("5", "m", "5 N", False),
    ("3.5", "yr", "3.5 years", True),
    ("12", "$", "12 dollars", True),
]
MORE_EXPRESSIONS = [
    ("\\frac{\\sqrt{3}}{2}", "\\dfrac{\\sqrt{3}}{2}", True),
    ("\\frac{\\sqrt3}{2}", "0.5\\sqrt{3}", True),
    ("(3, \\frac{\\pi}{2})", "\\left( 3, \\frac{\\pi}{2} \\right)", True),
    ("p - q", "p-q", True),
    ("\\text{(C)}", "(\\text{C})", True),
    ("C", "\\textbf{C}", True),
    ("\\frac{14}{3}", "4.666", False),
    ("x^3+3x-6", "3x - 6 + x^3", True),
    ("-2,1", "-2 \\text{ and } 1", True),
    ("(-2,1)", "-2,1", False),
    (
        "\\begin{pmatrix} -1/3 \\\\ 2/3 \\\\ 5/3 \\end{pmatrix}",
        "\\begin{pmatrix} -\\frac{1}{3} \\\\ \\frac{2}{3} \\\\ \\frac{5}{3} \\end{pmatrix}",
        True,
    ),
    (
        "\\begin{bmatrix}1 & 0\\\\0 & 1\\end{bmatrix}",
        "\\left[ \\begin{array}{rr} 1 & 0 \\\\ 0 & 1 \\end{array} \\right]",
        True,
    ),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1 & 2\\end{pmatrix}", False),
    ("\\left[\\frac{1}{2},\\infty\\right)", "[0.5, \\infty)", True),
    ("[1,2)", "(1,2]", False),
    ("x\\in(-\\infty,0)\\cup(1,2)", "(-\\infty,0)\\cup(1,2)", True),
    ("x \\in [0,1]", "y \\in [0,1]", False),
    ("\\text{east}", "west", False),
    ("\\text{Hyperbola}", "\\text{hyperbola}", True),
    ("\\text{Monday}", "Monday", True),
    ("10\\%", "10", True),
    ("10\\%", "0.1", False),
    ("0.1", "1/10", True),
    ("\\$18.90", "18.90", True),
    ("18\\text{ square units}", "18", True),
    ("5\\text{ hours}", "5\\text{ minutes}", False),
    ("1{,}000", "1\\,000", True),
    ("2^8", "256", True),
    ("1011_2", "1011_{2}", True),
    ("1011_2", "1011_3", False),
    ("1011_2", "1011", False),
    ("\\sqrt[3]{8}", "2", True),
    ("3\\sqrt{2}+2\\sqrt{3}", "2\\sqrt{3}+3\\sqrt{2}", True),
    ("\\frac{1+\\sqrt{5}}{2}", "\\frac{1}{2}+\\frac{\\sqrt5}{2}", True),
    ("y = -2x+3", "2x+y=3", True),
    ("y=2x", "y = 2 x", True),
    ("y=2x", "x=2y", False),
    ("x^2+y^2=4", "y^2+x^2-4=0", True),
    ("x<2", "2>x", True),
    ("x\\leq 2", "x \\le 2", True),
    ("x \\leq 2", "x<2", False),
    ("k=3", "3", True),
    ("\\alpha=3", "\\beta=3", False),
    ("n=4", "m=4", False),
    ("a=1,b=2", "a=1, b=2", True),
    ("a=1,b=2", "a=2,b=1", False),
    ("\\theta = 30^\\circ", "30^{\\circ}", True),
    ("30^\\circ", "30°", True),
    ("\\frac{\\pi}{6}", "30^\\circ", False),
    ("6i", "6", False),
    ("i", "1", False),
    ("e^{i\\pi}", "x", False),
    ("\\infty", "-\\infty", False),
    ("+5", "5", True),
    ("5", "05", True),
    ("-5", "5", False),
    ("5x", "5", False),
    ("5", "5y", False),
    ("12", "12.0", True),
    ("12", "1.2", False),
    ("0.333", "1/3", False),
    ("\\frac{1}{3}", "\\frac{2}{6}", True),
    ("abc", "abd", False),
    ("f(x)=2x", "2x", True),
    ("\\log_2 3", "\\frac{\\ln 3}{\\ln 2}", True),
    ("\\ln 2", "\\log 2", False),
    ("\\binom{6}{3}", "20", True),
    ("\\binom{6}{3}", "\\binom{6}{2}", False),
    ("3:4", "4:3", False),
    ("3:4", "3 : 4", True),
    ("\\text{no solution}", "\\text{No solution}", True),
    ("\\emptyset", "\\varnothing", True),
    ("\\{1,2,3\\}", "\\{3,2,1\\}", True),
    ("\\{1,2\\}", "(1,2)", False),
    ("\\frac{x+1}{x-1}", "\\frac{1+x}{-1+x}", True),
    ("2(x+1)", "2x+2", True),
    ("x^{2}", "x^2", True),
    ("x^2", "x^3", False),
    ("\\sin x", "\\cos x", False),
    ("\\frac{3}{4}\\pi", "\\frac{3\\pi}{4}", True),
    ("3.14\\ldots", "\\pi", False),
    ("2n+1", "2n+1, n \\in \\mathbb{Z}", False),
    ("11\\sqrt2", "11\\sqrt{2}", True),
    ("60\\text{ mph}", "60", True),
    ("90", "90^\\circ", True),
    ("45 ^ \\circ", "45°", True),
    ("\\overline{AB}", "AB", False),
    ("A", "\\text{A.}", True),
    ("\\text{odd}", "\\textbf{odd}", True),
    ("5,\\!000", "5000", True),
    ("\\left(\\frac{1}{2}, 3\\right)", "(\\frac12,3)", True),
    ("(x,y)=(1,2)", "(1,2)", True),
    ("x = \\frac{1}{2}", "\\frac{1}{2}", True),
    ("1.5", "\\frac{3}{2}", True),
    ("10^{-3}", "0.001", True),
    ("3\\times10^{5}", "300000", True),
]
CASES += [
    Case("verdict", text, value, None if value else "*", False)
    for value, texts in MORE_VERDICTS.items()
    for text in texts
]
CASES += [
    Case("number", text, value, None if value else "*", False)
    for value, texts in MORE_NUMBERS.items()
    for text in texts
]
PAIRS += [Pair("quantity", f"{gold} {unit}", said, same, False) for gold, unit, said, same in MORE_QUANTITIES]
PAIRS += [Pair("expression", gold, said, same, False) for gold, said, same in MORE_EXPRESSIONS]


def table() -> str:
    """The Markdown of docs/tasks.md, from the cases that are shown."""

    def code(text: str) -> str:
        shown = text.replace("\n", "⏎").replace("\u200b", "·zero-width·").replace("|", "\\|")
        return f"`{shown}`" if "`" not in shown else f"`` {shown} ``"

    lines = ["| kind | text after the thought | parsed as |", "|---|---|---|"]
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
