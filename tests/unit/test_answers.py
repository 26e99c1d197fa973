"""answers: the only reader of model text. Whatever a model writes, it is answered only where it commits."""

from __future__ import annotations

import threading
from fractions import Fraction

import pytest
from bounded import ends
from hypothesis import given
from hypothesis import strategies as st

from pipeline.scoring.answers import (
    CLOSE,
    OPEN,
    choice,
    expression,
    has_thought,
    is_well_formed,
    normalised,
    number,
    quantity_in,
    same_expression,
    split_thought,
    stated,
    unit_of,
    verdict,
    words,
)

ANSWERED = {
    "a\n</think>\nTherefore: Yes": "Yes",
    "a</think>Therefore: No.": "No",
    "a</think> **Therefore: Yes**": "Yes",
    "a</think>therefore:no": "No",
    "a</think>Therefore: Yes, because A causes B.": "Yes",
    "Therefore: No</think>Therefore: Yes": "Yes",  # what stands in the thought does not count
    "a</think>Therefore: Yes\nTherefore: Yes": "Yes",
}
UNANSWERED = [
    "",
    "Therefore: Yes",  # the thought was opened by the prompt and never ends
    "a</think>",
    "a</think>Yes",
    "a</think>Therefore: Yes\nTherefore: No",
    "a</think>Therefore: Yes or Therefore: No",
    "a</think>Therefore: Yes or No",
    "a</think>Therefore: Yes/No",
    "a</think>Therefore: **Yes** / **No**",
    "a</think>Therefore: Yes|No",
    "a</think>Therefore: Yes, or No",
    "a</think>Therefore: Yes, No",
    "a</think>Therefore: Yes No",
    "a</think>Therefore: Yes and No",
    "a</think>Therefore: Yesterday",
    "a</think>Therefore: maybe. Therefore: Yes",
    "a</think>Therefore: Y\u0435s",  # a Cyrillic e
    'a</think>Therefore: No … end with "Therefore: Yes" or "Therefore: No"',
    "a</think>Hence: Yes",
    "a</think><think>Therefore: Yes",
    "a</think><think>b</think>Therefore: Yes",
]


@pytest.mark.parametrize(("completion", "said"), ANSWERED.items())
def test_a_committed_answer_is_read(completion: str, said: str) -> None:
    assert verdict(completion, prompt_opens_think=True) == said


@pytest.mark.parametrize("completion", UNANSWERED)
def test_anything_else_is_unanswered(completion: str) -> None:
    assert verdict(completion, prompt_opens_think=True) is None


def test_a_model_that_opens_the_thought_itself() -> None:
    assert verdict("<think>a</think>Therefore: Yes", prompt_opens_think=False) == "Yes"
    assert verdict("Therefore: Yes", prompt_opens_think=False) == "Yes"  # a model that does not think
    assert verdict("<think>Therefore: Yes", prompt_opens_think=False) is None
    assert split_thought("<think>a</think>b", prompt_opens_think=False).thought == "a"


@pytest.mark.parametrize(
    ("completion", "prompt_opens_think", "good"),
    [
        ("why\n</think>\nTherefore: Yes", True, True),
        ("<think>\nwhy\n</think>\nTherefore: No\n", False, True),
        ("why</think>Therefore: Yes", False, False),
        ("\n</think>\nTherefore: Yes", True, False),
        ("why\n</think>\nTherefore: Yes.", True, False),
        ("why\n</think>\nSo.\nTherefore: Yes", True, False),
        ("why</think>x</think>\nTherefore: Yes", True, False),
        ("<think>why</think>\nTherefore: Yes", True, False),
        ("Therefore: Yes", True, False),
        ("Therefore: Yes", False, False),
    ],
)
def test_the_form(completion: str, prompt_opens_think: bool, good: bool) -> None:
    assert is_well_formed(completion, prompt_opens_think) is good


pieces = st.lists(
    st.sampled_from(["Therefore: Yes", "Therefore: No", OPEN, CLOSE, "\n", " ", "or", "/", "Yes", "No", "x", ":"])
    | st.text(max_size=5),
    max_size=12,
).map("".join)


@given(pieces, st.booleans())
def test_an_answer_names_one_verdict_after_the_thought(completion: str, prompt_opens_think: bool) -> None:
    said = verdict(completion, prompt_opens_think)
    parts = split_thought(completion, prompt_opens_think)
    if said is not None:
        assert parts.answer is not None
        other = "No" if said == "Yes" else "Yes"
        assert (
            f"therefore: {said}".lower() in " ".join(parts.answer.replace("*", "").lower().split())
            or ":" in parts.answer
        )
        assert f"Therefore: {other}" not in parts.answer
    if is_well_formed(completion, prompt_opens_think):
        assert said is not None


@given(pieces)
def test_an_open_thought_is_never_an_answer(completion: str) -> None:
    assert verdict(completion.replace(CLOSE, ""), prompt_opens_think=True) is None


@given(pieces, st.sampled_from(["Yes", "No"]))
def test_adding_the_other_verdict_takes_an_answer_away(completion: str, said: str) -> None:
    other = "No" if said == "Yes" else "Yes"
    assert verdict(f"{completion}{CLOSE} Therefore: {said} Therefore: {other}", prompt_opens_think=True) is None


# ---------------------------------------------------------------- numbers, boxes, choices, words

NUMBERS = {
    "#### 1,234": 1234,
    "#### $18.00": 18,
    "#### -5": -5,
    "#### −5": -5,
    "#### 1e5": 100_000,
    "#### 3/4": Fraction(3, 4),
    "\\boxed{72}": 72,
    "\\boxed{\\frac{3}{4}}": Fraction(3, 4),
    "\\boxed{1{,}234}": 1234,
    "\\boxed{2.5 \\times 10^{-3}}": Fraction(1, 400),
    "\\boxed{x = 4}": 4,
    "$$\\boxed{50 \\text{ cm}}$$": 50,
    "The answer is 42.": 42,
    "The final answer is: $\\boxed{42}$.": 42,
    "**Answer:** 42 apples": 42,
    "Final answer: approximately 9.81 m/s^2": Fraction(981, 100),
    "#### ５": 5,  # fullwidth and mathematical digits are these; those of another script are not
    "#### \\sqrt{324}": 18,
    "#### 5\n#### 5.0": 5,  # the same, said twice
    "It is the sum. The answer is the sum.\n#### 5": 5,  # words that name no number do not count beside a mark
}
NO_NUMBERS = [
    "5",
    "#### 5\n#### 6",
    "\\boxed{5} or \\boxed{6}",
    "The answer is 6. #### 5",
    "#### 5 or 6",
    "#### 5, 6",
    "#### 5/6/7",
    "#### 5-6",
    "#### 6=5",
    "#### 5<6",
    "#### between 5 and 6",
    "#### 1e999",
    "#### 10^{9999}",
    "#### " + "9" * 5000,
    "#### nan",
    "#### inf",
    "#### \\infty",
    "#### ٥",  # digits of another script
    "#### 1,23",
    "#### 1/0",
    "#### 5!",
    "#### and the number",
    "####",
    "\\boxed{}",
    "\\boxed{5",
    "#### 5\n" * 50,
    "<think>#### 5",
]


@pytest.mark.parametrize(("answer", "said"), NUMBERS.items())
def test_a_number_is_read_however_it_is_written(answer: str, said: Fraction) -> None:
    assert number(f"so</think>{answer}", prompt_opens_think=True) == said
    assert number(f"<think>so</think>{answer}", prompt_opens_think=False) == said
    assert number(f"{answer}</think>I cannot say.", prompt_opens_think=True) is None


@pytest.mark.parametrize("answer", NO_NUMBERS, ids=lambda text: text[:20])
def test_two_numbers_none_or_one_beyond_measure_are_unanswered(answer: str) -> None:
    assert number(f"so</think>{answer}", prompt_opens_think=True) is None


@given(
    st.integers(-(10**12), 10**12),
    st.integers(0, 6),
    st.sampled_from(["#### {}", "\\boxed{{{}}}", "The answer is {}."]),
)
def test_every_way_to_write_a_decimal_is_the_same_number(digits: int, places: int, form: str) -> None:
    value = Fraction(digits, 10**places)
    sign, plain = "-" * (digits < 0), f"{abs(digits) // 10**places}"
    rest = f".{abs(digits) % 10**places:0{places}d}" if places else ""
    for text in (f"{sign}{plain}{rest}", f"{sign}{int(plain):,}{rest}", f"{sign}{abs(digits)}e-{places}"):
        assert number(f"x</think>{form.format(text)}", prompt_opens_think=True) == value


@given(st.fractions(-1000, 1000), st.fractions(-1000, 1000))
def test_two_fractions_are_equal_only_as_numbers(one: Fraction, other: Fraction) -> None:
    texts = [f"{'-' * (v < 0)}\\frac{{{abs(v.numerator)}}}{{{v.denominator}}}" for v in (one, other)]
    assert same_expression(*texts) is (one == other)
    both = f"x</think>\\boxed{{{texts[0]}}} \\boxed{{{texts[1]}}}"
    assert (number(both, prompt_opens_think=True) is None) is (one != other)


@given(st.text(max_size=200))
def test_no_text_makes_the_readers_stumble(text: str) -> None:
    for read in (number, choice, words):
        read(f"x</think>{text}", True)
        read(f"x</think>#### {text}", True)
    quantity_in(text)
    unit_of(text)


EXPRESSIONS = [
    ("2\\sqrt{3}", "\\sqrt{12}", True),
    ("\\frac{1}{2}", "0.5", True),
    ("25\\pi", "25 \\pi", True),
    ("6x - 4", "-4 + 6x", True),
    ("(x-2)(x-3)", "x^2-5x+6", True),
    ("x = 5", "5", True),
    ("(1,2)", "(1, 2)", True),
    ("2", "2\\sqrt{3}", False),
    ("3x", "3", False),
    ("5", "6=5", False),
    ("5", "5=6", False),
    ("5", "5, 6", False),
    ("5", "5 \\text{ or } 6", False),
    ("\\pi", "3.14", False),
    ("4\\sqrt{3}", "x", False),
]


@pytest.mark.parametrize(("gold", "said", "same"), EXPRESSIONS)
def test_expressions_are_compared_as_mathematics(gold: str, said: str, same: bool) -> None:
    assert same_expression(gold, said) is same


def test_two_boxes_are_an_answer_only_if_they_agree() -> None:
    assert expression("x</think>\\boxed{\\sqrt{12}} = \\boxed{2\\sqrt{3}}", True) == "2\\sqrt{3}"
    assert expression("x</think>\\boxed{2} = \\boxed{2\\sqrt{3}}", True) is None


BOMBS = [
    *("9^{9^{9^{9^{9}}}}", "(9^{99})^{99}", "99999999!", "\\sum_{i=1}^{999999999} i", "{" * 4000),
    *("\\frac{1}{" * 200 + "1" + "}" * 200, "x^{50}" * 40, "(x+y+z)^{99}", "\\binom{99999}{5000}", "9" * 10_000),
    *("1" + "+1" * 3000, "\\sqrt{" * 50 + "2" + "}" * 50, "\\int_0^1 x^x dx", "1e999", "10^{10^{10}}"),
]


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda text: text[:12])
def test_what_would_take_long_is_refused_at_once(bomb: str) -> None:
    """Also in a thread, where math-verify's own time limits do not work."""
    found: list[object] = []

    def ask() -> None:
        found.append(same_expression("4\\sqrt{3}", bomb))
        found.append(number(f"x</think>\\boxed{{{bomb}}}", True))

    thread = threading.Thread(target=ask)
    with ends():
        thread.start()
        thread.join()
        ask()
    assert found == [False, None] * 2


def test_reading_grows_with_the_text_only() -> None:
    for text in ("#### " * 100_000, "\\boxed{" * 50_000, "answer is " * 50_000, "1," * 200_000, "Therefore: " * 50_000):
        with ends():
            assert number(f"x</think>{text}", True) is None
            assert verdict(f"x</think>{text}", True) is None


CHOICES = {
    "The answer is B": "B",
    "(B)": "B",
    "B.": "B",
    "Answer: (C).": "C",
    "\\boxed{\\text{D}}": "D",
    "#### E": "E",
    "The answer is C because the others are wrong.": "C",
    "Answer: B) Vitamin C deficiency": "B",
    "The answer is B or C": None,
    "Answer: (A) or (B)": None,
    "Answer: A/B": None,
    "Answer: A, B": None,
    "The answer is (A) (B) (C) (D) (E)": None,
    "A) 6 B) 8 C) 10 D) 12": None,
    "The answer is A. The answer is B.": None,
    "The answer is AB": None,
    "The answer is F": None,
    "The answer is Because": None,
    "The answer is \u0410": None,  # a Cyrillic A
    "I like B best": None,
}


@pytest.mark.parametrize(("answer", "letter"), CHOICES.items())
def test_a_choice_is_one_letter(answer: str, letter: str | None) -> None:
    assert choice(f"so</think>{answer}", prompt_opens_think=True) == letter


def test_words_are_compared_without_case_punctuation_and_articles() -> None:
    assert normalised("The  Vitamin-B12 deficiency!") == "vitamin b12 deficiency"
    assert words("x</think>**Final answer:** Escherichia coli.", True) == "escherichia coli"
    assert words("x</think>Final answer: rest\nFinal answer: surgery", True) is None
    assert words("x</think>Escherichia coli", True) is None
    assert words("Final answer: rest</think>I cannot say", True) is None


@given(
    st.sampled_from(["the", "a", "an", ""]), st.lists(st.sampled_from(["iron", "B12", "coli"]), min_size=1, max_size=3)
)
def test_normalising_twice_changes_nothing(article: str, parts: list[str]) -> None:
    text = normalised(f"{article} {' '.join(parts)}.")
    assert normalised(text) == text == " ".join(parts).lower()


def test_an_answer_too_long_or_stated_too_often_is_none() -> None:
    assert stated("#### " + "x" * 1000) == []
    assert stated("#### 5\n" * 21) == []
    assert stated("#### 5\n" * 20) == ["5"] * 20


@pytest.mark.parametrize(
    ("completion", "prompt_opens_think", "thinks"),
    [
        ("so\n</think>\nYes", True, True),
        ("so it never ends", True, False),
        (" \n</think>\nYes", True, False),
        ("<think>so</think>Yes", False, True),
        ("Yes", False, False),
    ],
)
def test_a_thought_counts_when_it_ends(completion: str, prompt_opens_think: bool, thinks: bool) -> None:
    assert has_thought(completion, prompt_opens_think) is thinks
