r"""What reading a final answer gives, and the clean-up that every reader of model text shares.

A `Reading` is a value, or the reason why there is none: a word of `REASONS`, which predictions.jsonl keeps and the
report counts. The clean-up makes the usual ways to write one character or one LaTeX phrase the same; it never joins
two words and never removes a sign. Every function takes time that grows with the length of its text only.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")

REASONS = {
    "truncated": "the completion ran into the length limit",
    "unclosed_thought": "the thought never ends",
    "two_thoughts": "a second thought begins after the first",
    "empty": "there is no text after the thought",
    "no_verdict": "there is no Therefore: with a verdict",
    "two_verdicts": "two verdicts disagree, or one is taken back",
    "denied_verdict": "the sentence denies its verdict",
    "lookalike": "a verdict hides behind letters of another script or invisible characters",
    "no_answer": "no final answer is marked as one",
    "two_answers": "two final answers disagree",
    "denied_answer": "the sentence denies its final answer",
    "too_many_answers": "a final answer is marked too often",
    "too_long": "the final answer is too long",
    "no_number": "the final answer is not one number",
    "two_numbers": "two numbers disagree",
    "no_choice": "the final answer is not one letter",
    "two_choices": "two choices disagree",
    "no_words": "the final answer has no words",
    "unread": "the task does not say why",
}


@dataclass(frozen=True)
class Reading(Generic[T]):
    """A value that was read, or the reason (a key of REASONS) why there is none: exactly one of them is None."""

    value: T | None
    reason: str | None = None


def unread(reason: str) -> Reading[T]:
    return Reading(None, reason)


# ---------------------------------------------------------------- characters

INVISIBLE = "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u2060-\u206f\u200b-\u200f"
INVISIBLE += "\u202a-\u202e\u3164\ufe00-\ufe0f\ufeff\uffa0"
_INVISIBLE = re.compile(f"[{INVISIBLE}]+")
_LATIN = {  # letters of other scripts that look like Latin ones (Unicode TR 39, those in the words that are read)
    **dict(zip("АВЕЅІЈКМНОРСТУХҮԌԚԜҺ", "ABESIJKMHOPCTYXYGQWH", strict=True)),  # Cyrillic
    **dict(zip("аеоѕіјкмнһрстухүԁԛԝѵӏг", "aeosijkmnhpctyxydqwvlr", strict=True)),
    **dict(zip("ΑΒΕΖΗΙΚΜΝΟΡΤΥΧΥ", "ABEZHIKMNOPTYXY", strict=True)),  # Greek
    **dict(zip("αγεικνορτυχϒ", "ayeiknoptuxY", strict=True)),
    **dict(zip("ՍՏօոսհՕ", "USonuhO", strict=True)),  # Armenian
    **dict(zip("ꓬꓠꓳꓢꓰ꓄ᎢᎬᏚᎩᎳ", "YNOSEUTESYW", strict=True)),  # Lisu, Cherokee
}
_DASHES = dict.fromkeys("−–‐‑‒﹣－", "-")
_DEGREES = dict.fromkeys("º˚∘", "°")
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_SUPER, _SUB = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+"), re.compile(f"[{''.join(_SUBSCRIPTS)}]+")


def compatible(text: str) -> str:
    """Each character in its compatibility form (NFKC): fullwidth, bold and circled letters and digits are plain ones.

    One character at a time, because the normal form of a whole text takes quadratic time on stacked accents.
    """
    if text.isascii():
        return text
    forms = {ord(letter): unicodedata.normalize("NFKC", letter) for letter in set(text) if not letter.isascii()}
    return text.translate(forms)


def without_invisible(text: str, instead: str = "") -> str:
    """The text without zero-width, joining and direction characters."""
    return text if text.isascii() else _INVISIBLE.sub(instead, text)


def latin(text: str) -> str:
    """Letters that look like Latin ones as these, without accents: for finding what hides, never for reading."""
    if text.isascii():
        return text
    return text.translate({ord(letter): _latin(letter) for letter in set(text) if not letter.isascii()})


def _latin(letter: str) -> str:
    if letter in _LATIN:
        return _LATIN[letter]
    name = unicodedata.name(letter, "").split(" WITH ")[0].split()
    if name[:1] == ["LATIN"] and len(name[-1]) == 1:  # accented, turned, small capitals
        return name[-1] if "CAPITAL" in name and "SMALL" not in name else name[-1].lower()
    return letter


# ---------------------------------------------------------------- LaTeX

_FONTS = r"text(?:bf|it|rm|normal|sf|tt|up)?|math(?:rm|bf|it|sf|tt|cal|bb)|operatorname|boldsymbol|bm|mbox|hbox|emph"
_WRAPPERS = re.compile(rf"\\(?:{_FONTS}|rm|bf)\s*\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}")
_OLD_FONTS = re.compile(r"\\(?:rm|bf|it|displaystyle|textstyle|large|Large|huge|normalsize|limits)(?![A-Za-z])")
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])")
_MATH_ENDS = re.compile(r"\\[()\[\]]")
_WIDE = r"(?:\\[,:; ]|\\(?:thinspace|medspace)(?![A-Za-z])|\{\\[,:; ]\}|~|[\u00a0\u2000-\u200a\u202f\u205f]| )"
_THOUSANDS = re.compile(rf"(?<=[0-9])(?<![.,][0-9])(?<![.,][0-9]{{2}}){_WIDE}(?=[0-9]{{3}}(?![0-9]))")
_SPACES = re.compile(
    r"\\[,:; ]|\\(?:q?quad|thinspace|medspace|enspace)(?![A-Za-z])|~|[\u00a0\u2000-\u200a\u202f\u205f\u3000]"
)
_DEGREE = re.compile(
    r"(?:\{\})?\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\(?:text)?degrees?(?![A-Za-z])|\^\s*\{?°\}?"
)
_NEW_LINE = "\ue000"  # stands for two backslashes, which are no part of another command
_APPROXIMATELY = re.compile(r"\\(?:approx|simeq|sim|cong|doteq)(?![A-Za-z])|[≈≃≅∼]")


def unwrapped(text: str, instead: str = r" \1 ") -> str:
    r"""`\text{cm}` as `cm`, two deep."""
    return _WRAPPERS.sub(instead, _WRAPPERS.sub(instead, text))


def plain_characters(text: str) -> str:
    """One way to write a dash, a degree, a power, an index, a digit; nothing that cannot be seen."""
    if text.isascii():
        return text
    text = text.translate({ord(a): b for a, b in {**_DASHES, **_DEGREES}.items()})
    text = _SUPER.sub(lambda match: "^{" + "".join(_SUPERSCRIPTS[letter] for letter in match[0]) + "}", text)
    text = _SUB.sub(lambda match: "_{" + "".join(_SUBSCRIPTS[letter] for letter in match[0]) + "}", text)
    text = without_invisible(text)
    forms = {ord(letter): _form(letter) for letter in set(text) if not letter.isascii()}
    return text.translate(forms).replace("μ", "µ")


def _form(letter: str) -> str:
    """The compatible form of a letter, but for those whose form would say something else in a formula."""
    form = unicodedata.normalize("NFKC", letter)
    if "\u2044" in form:  # one half
        above, _, under = form.partition("\u2044")
        return rf"\frac{{{above}}}{{{under}}}"
    return letter if letter in "…" or " " in form else form


def plain_math(text: str) -> str:
    r"""A short LaTeX text (a final answer) with one way to write what is written in many.

    `\!` is nothing; `\,`, `{,}` and thin spaces before three digits separate thousands and become `,`; other spaces
    are one blank; sizes of brackets and delimiters of formulas are left out; `^\circ` is `°`; `\dfrac` is `\frac`.
    """
    text = (
        plain_characters(text)
        .replace("\\\\", _NEW_LINE)
        .replace(r"\!", "")
        .replace("{,}", ",")
        .replace(r"\$", "$")
        .replace(r"\%", "%")
    )
    text = _THOUSANDS.sub(",", text)
    text = re.sub(r"\\(?:text)?color\s*\{[^{}]*\}", "", text)
    text = text.replace(r"\varnothing", r"\emptyset")
    text = _DEGREE.sub("°", _MATH_ENDS.sub("", _SIZES.sub("", _OLD_FONTS.sub("", text))))
    text = _APPROXIMATELY.sub("≈", _SPACES.sub(" ", text))
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", re.sub(r"\\[dt]binom(?![A-Za-z])", r"\\binom", text))
    text = re.sub(r"\\frac\s*([0-9])\s*([0-9])(?![0-9])", r"\\frac{\1}{\2}", text)  # \frac12
    return text.replace(_NEW_LINE, "\\\\")


# ---------------------------------------------------------------- words

_WORD = re.compile(
    r"[<>≤≥=±%]"  # comparisons
    r"|(?<![\w.])[+-]?[0-9]+(?:[.,][0-9]+)*(?:[+-][0-9]+(?:[.,][0-9]+)*)*[+-]?(?!\w)"  # numbers, signs, ranges
    r"|[^\W_]+(?:[+-]+(?!\w))?"  # words, and charges: Rh-, Na+
    r"|[+-](?=\s*$|\))|(?<=\s)[+-](?=\s+[0-9])"  # a sign alone
)
_BEFORE_AN_ARTICLE = {
    "of",
    "with",
    "is",
    "was",
    "has",
    "have",
    "had",
    "to",
    "in",
    "on",
    "at",
    "by",
    "for",
    "from",
    "as",
}
_BEFORE_AN_ARTICLE |= {"and", "or", "due", "caused", "causes", "not", "after", "into", "than", "over", "under"}


def normalised(text: str) -> str:
    """Words only: one case, no punctuation, no articles, one space between them.

    Signs, comparisons and decimals are words (`Rh+`, `pH > 7.35`), and so is a letter that is no article
    (`Hepatitis A`): `a` is an article at the beginning and after a word like `of`, where another word follows.
    """
    text = re.sub(r"\\(?:leq?|geq?)(?![A-Za-z])", lambda match: "≤" if match[0][1] == "l" else "≥", text)
    text = compatible(unwrapped(text, r"\1").translate({ord(letter): "-" for letter in _DASHES})).casefold()
    found = _WORD.findall(text.replace("<=", "≤").replace(">=", "≥"))
    kept: list[str] = []
    for place, word in enumerate(found):
        first_or_after = place + 1 < len(found) and (not kept or kept[-1] in _BEFORE_AN_ARTICLE)
        if word not in ("an", "the") and not (word == "a" and first_or_after):
            kept.append(word.replace(",", "") if word[-1:].isdigit() else word)
    if len(kept) > 1 and kept[-1] in "+-" and kept[-2][-1] not in "+-":  # Rh (-)
        kept[-2:] = [kept[-2] + kept[-1]]
    return " ".join(kept)
