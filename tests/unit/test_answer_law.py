"""One law for answers: variants of a value are one, values that differ never are, and what is not read has a reason."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from answer_cases import BEGIN, CASES, DOCS, END, PAIRS, Case, Pair, table
from bounded import is_linear
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.scoring import answers
from pipeline.scoring.reading import REASONS

READERS: dict[str, Callable[[str], answers.Reading[Any]]] = {
    "verdict": lambda text: answers.read_verdict(text, True),
    "number": lambda text: answers.read_quantity(text, True),
    "expression": lambda text: answers.read_expression(text, True),
    "choice": lambda text: answers.read_choice(text, True),
    "words": lambda text: answers.read_words(text, True),
}


def read(kind: str, text: str) -> answers.Reading[Any]:
    """The reading of what stands after a thought; a quantity as its number."""
    found = READERS[kind](f"x\n</think>\n{text}")
    if isinstance(found.value, answers.Quantity):
        return answers.Reading(str(found.value.value))
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.text[:40]!r}")
def test_what_is_read_as_what(case: Case) -> None:
    found = read(case.kind, case.text)
    assert found.value == case.value
    if case.reason == "*":
        assert found.reason in REASONS
    else:
        assert found.reason == case.reason


def same(pair: Pair, gold: str, said: str) -> bool:
    if pair.kind == "expression":
        return answers.same_expression(gold, said)
    if pair.kind == "words":
        return answers.normalised(gold) == answers.normalised(said)
    number, _, unit = gold.partition(" ")
    wanted, given_ = answers.quantity_in(number), answers.quantity_in(said)
    assert wanted is not None
    assert given_ is not None
    return answers.same_quantity(wanted.value, unit, given_, 0.01)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.gold[:24]!r}-{pair.said[:24]!r}")
def test_what_is_one_answer_and_what_is_not(pair: Pair) -> None:
    assert same(pair, pair.gold, pair.said) is pair.same
    if pair.kind != "quantity":
        assert same(pair, pair.said, pair.gold) is pair.same


def test_the_table_of_the_docs_is_made_of_these_cases() -> None:
    """`python tests/support/answer_cases.py` writes it."""
    page = DOCS.read_text(encoding="utf-8")
    assert page.partition(BEGIN)[2].partition(END)[0].strip() == table()


def test_no_thought_no_end_or_two_of_them_are_reasons() -> None:
    for reader in READERS.values():
        assert reader("I am still thinking. #### 5").reason == "unclosed_thought"
        assert reader("x</think>a</think>#### 5").reason == "two_thoughts"
        assert reader("x</think> \n").reason == "empty"
    assert answers.read_verdict("x</think>" + "word " * 50_000, True).reason == "too_long"
    assert answers.read_verdict("x</think>Therefore:" + " " * 1_000_000 + "Yes", True).value == "Yes"


@pytest.mark.parametrize(
    ("thought", "thinks"), [("x", True), (".", False), ("…\n--", False), ("\u200b", False), ("1", True)]
)
def test_a_thought_has_words(thought: str, thinks: bool) -> None:
    assert answers.thinks_then_answers(f"{thought}\n</think>\nTherefore: Yes", True) is thinks
    assert answers.is_well_formed(f"{thought}\n</think>\nTherefore: Yes", True) is thinks
    assert answers.has_thought(f"{thought}\n</think>\nTherefore: Yes", True) is thinks


# ---------------------------------------------------------------- variants of one value

ENDINGS = [
    *(
        "#### {}",
        r"\boxed{{{}}}",
        "The answer is {}.",
        "**Answer:** {}",
        "<answer>{}</answer>",
        "Answer: The answer is {}.",
    ),
    *("Final Answer: The final answer is ${}$. I hope it is correct.", "**Final Answer**\n\n\\[\n\\boxed{{{}}}\n\\]"),
    *(
        "So the final answer is: $\\boxed{{{}}}$.",
        "### Final Answer\n{}",
        "Fill \\boxed{{}}. \\boxed{{{}}}",
        "####\n{}",
    ),
    *(
        "The answer is **{}**",
        "Final answer：{}",
        "#### Step 1: see above\n#### {}",
        "Thus, the answer is therefore ${}$.",
    ),
]
VERDICT_ENDINGS = [
    *(
        "Therefore: {}",
        "**Therefore:** {}",
        "**Therefore: {}**",
        "Therefore：{}",
        "Therefore: _{}_",
        'Therefore: "{}"',
        "Therefore: “{}”.",
    ),
    *(
        r"Therefore: \boxed{{{}}}",
        r"Therefore: $\boxed{{\text{{{}}}}}$",
        "Therefore: **{}**.",
        "therefore: {}",
        "Therefore: {}, because it is so.",
    ),
    *(
        "Therefore:\n- C is a collider.\n\nTherefore: {}",
        "Therefore: {}\n\nTherefore: {}",
        "Therefore: The answer is {}.",
    ),
    *(
        "Therefore: No direct edge joins A and B.\n\nTherefore: {}",
        "Therefore: {}, and this holds in every graph.",
        "Therefore: {}\u200b",
    ),
]


def grouped(value: int, separator: str) -> str:
    return f"{value:,}".replace(",", separator)


def ways(value: Fraction, rng: random.Random) -> list[str]:
    """A number as people and models write it."""
    sign, size = ("-" if value < 0 else ""), abs(value)
    minus = rng.choice(["-", "−", "－"]) if sign else ""
    found = []
    if size.denominator == 1:
        whole = int(size)
        found = [
            f"{minus}{whole}",
            f"{minus}{whole}.0",
            *(f"{minus}{grouped(whole, one)}" for one in (",", "{,}", r"\,", r",\!", "\u202f")),
        ]
        found += [
            f"{minus}{whole}".translate({ord(str(k)): chr(0xFF10 + k) for k in range(10)}),
            f"{minus}\\text{{{whole}}}",
        ]
        found += [f"{minus}${whole}"] if not sign else []
        found += [f"{minus}{whole // 1000} thousand"] if whole and whole % 1000 == 0 else []
        found += [
            f"{minus}{whole}^\\circ",
            f"{minus}{whole}°",
            f"{minus}{whole} degrees",
            f"n = {minus}{whole}",
            f"{minus}{whole} \\text{{ cm}}",
        ]
    else:
        found = [
            f"{minus}\\frac{{{size.numerator}}}{{{size.denominator}}}",
            f"{minus}{size.numerator}/{size.denominator}",
        ]
        found += [f"{minus}\\dfrac{{{size.numerator}}}{{{size.denominator}}}"]
    return found


numbers = (
    st.integers(-(10**9), 10**9).map(Fraction)
    | st.fractions(-1000, 1000, max_denominator=1000)
    | st.integers(1, 999).map(lambda n: Fraction(n * 1000))
)


@given(numbers, st.sampled_from(ENDINGS), st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_every_way_to_write_a_number_is_that_number(value: Fraction, ending: str, rng: random.Random) -> None:
    text = rng.choice(ways(value, rng))
    assert answers.number(f"x\n</think>\n{ending.format(text)}", True) == value, (ending, text)


@given(numbers, numbers, st.sampled_from(ENDINGS), st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_two_values_are_never_one(value: Fraction, other: Fraction, ending: str, rng: random.Random) -> None:
    one, two = rng.choice(ways(value, rng)), rng.choice(ways(other, rng))
    assert answers.same_expression(one, two) in ((True, False) if value == other else (False,)), (one, two)
    for changed in (-value, value * 10, value + 1, value / 1000):
        if changed != value:
            assert not answers.same_expression(one, rng.choice(ways(changed, rng)))
    if value != other:
        both = f"x\n</think>\n{ending.format(one)}\n{ending.format(two)}"
        assert answers.number(both, True) is None, both


UNITS = [
    ("m", "meters", "m"),
    ("kg", "kilograms", "kg"),
    ("s", "seconds", "s"),
    ("J", "joules", "J"),
    ("K", "kelvins", "K"),
    ("mol", "moles", "mol"),
]
PREFIXED = {"k": 3, "m": -3, "": 0, "µ": -6, "M": 6}


@given(
    st.integers(1, 10**6),
    st.sampled_from(UNITS[:1] + UNITS[2:4]),
    st.sampled_from(sorted(PREFIXED)),
    st.integers(-6, 6),
)
def test_a_unit_is_converted_whatever_prefix_and_power_it_has(
    size: int, unit: tuple[str, str, str], prefix: str, power: int
) -> None:
    said = answers.quantity_in(rf"{size} \times 10^{{{power}}}\ \mathrm{{{prefix}{unit[0]}}}")
    assert said is not None
    gold = Fraction(size) * Fraction(10) ** (power + PREFIXED[prefix])
    assert answers.same_quantity(gold, unit[0], said, 1e-9)
    assert answers.same_quantity(gold, unit[1], said, 1e-9)
    for other in UNITS:
        if other != unit:
            assert not answers.same_quantity(gold, other[0], said, 1e-9)
            assert not answers.same_quantity(gold, other[1], said, 0.5)


@given(st.sampled_from(["Yes", "No"]), st.sampled_from(VERDICT_ENDINGS))
def test_every_way_to_give_a_verdict_is_that_verdict(said: str, ending: str) -> None:
    assert answers.verdict(f"x\n</think>\n{ending.format(*[said] * 2)}", True) == said


JOINTS = [
    "",
    " ",
    "\n",
    "\u200b",
    "\u2028",
    "? ",
    ". ",
    ", ",
    "; ",
    " - ",
    " — ",
    "/",
    "|",
    " or ",
    " and ",
    " not ",
    "=",
    "…",
    "⁄",
    "、",
    " (",
    "), ",
    "**",
    ": ",
    "\u00a0",
    "->",
]


@given(
    st.sampled_from(["Yes", "No"]),
    st.text(alphabet="".join(sorted(set("".join(JOINTS)) - {"o", "r", "a", "n", "d", "t"})), max_size=6)
    | st.sampled_from(JOINTS),
    st.sampled_from(
        ["{}", "Therefore: {}", "the right answer is: {}", "Answer: {}", "actually {}", "({})", "**{}**", "it is {}."]
    ),
    st.sampled_from(["", "letters", "case"]),
)
@settings(max_examples=400)
def test_a_verdict_beside_the_other_one_is_none(said: str, joint: str, form: str, disguise: str) -> None:
    other = "No" if said == "Yes" else "Yes"
    if disguise == "letters":
        other = other.translate(str.maketrans("eoYN", "еоΥΝ"))
    elif disguise == "case":
        other = other.lower()
    assert answers.verdict(f"x\n</think>\nTherefore: {said}{joint} {form.format(other)}", True) is None


@given(st.text(max_size=60), st.sampled_from(sorted(READERS)))
@settings(max_examples=300)
def test_a_reading_is_a_value_or_a_known_reason(text: str, kind: str) -> None:
    for completion in (
        text,
        f"x</think>{text}",
        f"x</think>#### {text}",
        f"x</think>\\boxed{{{text}}}",
        f"x</think>Therefore: {text}",
    ):
        found = READERS[kind](completion)
        assert (found.value is None) is (found.reason is not None)
        assert found.reason is None or found.reason in REASONS


# ---------------------------------------------------------------- time

SEPARATORS = [
    *(
        " ",
        "\n",
        "\t",
        "\u00a0",
        "\u200b",
        "\u3000",
        "*",
        "_",
        "$",
        "{",
        "}",
        "\\",
        "(",
        ")",
        "[",
        "|",
        "/",
        ",",
        ".",
        "#",
        "'",
        '"',
    ),
    *(
        "#### ",
        "#### 5\n",
        "\\boxed{",
        "\\boxed{}",
        "{}",
        "answer is ",
        "Answer: ",
        "answer \n",
        "Therefore:",
        "Therefore: ",
        "Y\u200b",
    ),
    *(
        "Therefore: Yes\n",
        "Therefore: Yes ",
        "<answer>",
        "1",
        "1,",
        "\\,",
        "\\!",
        "\\text{",
        "е",
        "Yes ",
        "or ",
        "the ",
        "0",
        "\u0301",
        "-",
    ),
]
AROUND = [
    ("", ""),
    ("Therefore:", "Yes"),
    ("Therefore: Yes", "No"),
    ("#### ", "5"),
    ("\\boxed{", "5}"),
    ("The answer is ", "5"),
]


def repeated(read: Callable[[str], object], before: str, separator: str, after: str) -> Callable[[int], Any]:
    """Read a text of a length, most of it a repeated separator."""

    def work(size: int) -> Callable[[], object]:
        text = f"x</think>{before}{separator * (size // len(separator))}{after}"
        return lambda: read(text)

    return work


@pytest.mark.slow
@pytest.mark.parametrize("separator", SEPARATORS, ids=repr)
def test_a_megabyte_of_any_separator_costs_little(separator: str) -> None:
    """Quadratic reading of a megabyte takes hours."""
    for before, after in AROUND[:3]:
        for reader in (*READERS.values(), lambda text: answers.is_well_formed(text, True)):
            assert is_linear(repeated(reader, before, separator, after), 2**16)


@pytest.mark.parametrize("kind", sorted(READERS))
def test_the_time_of_reading_grows_as_the_text(kind: str) -> None:
    """Below the length that is refused, where everything is read."""
    for separator in SEPARATORS[::2]:
        for before, after in AROUND[1:]:
            assert is_linear(repeated(READERS[kind], before, separator, after), 3_000)
