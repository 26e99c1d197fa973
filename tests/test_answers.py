"""answers: the only reader of model text. Whatever a model writes, it is answered only where it commits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.answers import CLOSE, OPEN, is_well_formed, split_thought, verdict

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
    assert verdict(completion, prefilled=True) == said


@pytest.mark.parametrize("completion", UNANSWERED)
def test_anything_else_is_unanswered(completion: str) -> None:
    assert verdict(completion, prefilled=True) is None


def test_a_model_that_opens_the_thought_itself() -> None:
    assert verdict("<think>a</think>Therefore: Yes", prefilled=False) == "Yes"
    assert verdict("Therefore: Yes", prefilled=False) == "Yes"  # a model that does not think
    assert verdict("<think>Therefore: Yes", prefilled=False) is None
    assert split_thought("<think>a</think>b", prefilled=False).thought == "a"


@pytest.mark.parametrize(
    ("completion", "prefilled", "good"),
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
def test_the_form(completion: str, prefilled: bool, good: bool) -> None:
    assert is_well_formed(completion, prefilled) is good


pieces = st.lists(
    st.sampled_from(["Therefore: Yes", "Therefore: No", OPEN, CLOSE, "\n", " ", "or", "/", "Yes", "No", "x", ":"])
    | st.text(max_size=5),
    max_size=12,
).map("".join)


@given(pieces, st.booleans())
def test_an_answer_names_one_verdict_after_the_thought(completion: str, prefilled: bool) -> None:
    said = verdict(completion, prefilled)
    parts = split_thought(completion, prefilled)
    if said is not None:
        assert parts.answer is not None
        other = "No" if said == "Yes" else "Yes"
        assert (
            f"therefore: {said}".lower() in " ".join(parts.answer.replace("*", "").lower().split())
            or ":" in parts.answer
        )
        assert f"Therefore: {other}" not in parts.answer
    if is_well_formed(completion, prefilled):
        assert said is not None


@given(pieces)
def test_an_open_thought_is_never_an_answer(completion: str) -> None:
    assert verdict(completion.replace(CLOSE, ""), prefilled=True) is None


@given(pieces, st.sampled_from(["Yes", "No"]))
def test_adding_the_other_verdict_takes_an_answer_away(completion: str, said: str) -> None:
    other = "No" if said == "Yes" else "Yes"
    assert verdict(f"{completion}{CLOSE} Therefore: {said} Therefore: {other}", prefilled=True) is None
