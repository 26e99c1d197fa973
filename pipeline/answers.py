"""The only reader of model text: the thought, what follows it, the verdict, number, expression, choice or words.

The verdict is what stands after the first `</think>`. An unclosed thought, no verdict, or two that disagree are
unanswered, and so is a verdict that names both answers, quotes the instruction or stands in a second thought. Nothing
that stands inside the thought counts. A chat format that pre-fills `<think>` (R1-Distill, tiny) makes a completion
begin inside it.

Other final answers have to be marked as such (`stated`): after `####`, in `\\boxed{}`, after "answer is". Marks that
disagree are unanswered too. Everything is read in time that grows with the length of the text only.
"""

from __future__ import annotations

import math
import re
import threading
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Parts:
    """A completion taken apart. `thought` is None where there is none, `answer` None where a thought never ends."""

    thought: str | None
    answer: str | None
    well_formed: bool  # one thought, opened and closed once, nothing before it


def split_thought(completion: str, prefilled: bool) -> Parts:
    """The thought and the answer of a completion; `prefilled` says whether the prompt already opened the thought."""
    text = completion if prefilled else completion.lstrip()
    if not prefilled and OPEN not in text and CLOSE not in text:
        return Parts(None, text, False)
    opened = prefilled or text.startswith(OPEN)
    before, closed, after = text.partition(CLOSE)
    thought = before if prefilled else before.partition(OPEN)[2]
    if not closed:
        return Parts(thought, None, False)
    tags = text.count(OPEN) + text.count(CLOSE) + prefilled
    return Parts(thought, after, opened and tags == 2)


_MENTION = re.compile(r"\bTherefore\s*:", re.IGNORECASE)
YES_NO = ("Yes", "No")


@cache
def _verdicts(words: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Where one of these verdicts is given, and an answer that is nothing but one of them."""
    one = "|".join(words)
    other = rf"[\s*_]*(?:/|\||,?\s*(?:or|and)\b|[ \t,;.*_]*(?:{one})\b)"
    said = rf"\bTherefore\s*:[\s*_]*(?P<word>{one})\b(?!{other})"
    return re.compile(said, re.IGNORECASE), re.compile(rf"\s*Therefore: (?:{one})\s*")


def verdict(completion: str, prefilled: bool, words: Sequence[str] = YES_NO) -> str | None:
    """`Yes`, `No` (or another of `words`), or None where the completion does not commit to one of them."""
    answer = answer_text(completion, prefilled)
    if answer is None:
        return None
    said = [match["word"].capitalize() for match in _verdicts(tuple(words))[0].finditer(answer)]
    if len(said) != len(_MENTION.findall(answer)) or len(set(said)) != 1:
        return None
    return said[0]


def is_well_formed(completion: str, prefilled: bool, words: Sequence[str] = YES_NO) -> bool:
    """Whether the completion is one thought that is not empty, then `Therefore: Yes` or `Therefore: No` alone."""
    answer = split_thought(completion, prefilled).answer
    return thinks_then_answers(completion, prefilled) and bool(_verdicts(tuple(words))[1].fullmatch(answer or ""))


# ---------------------------------------------------------------- final answers that are marked as such

LONGEST, MARKS = 300, 20  # characters of a final answer, and how often one is stated: what is more is none
_MARK = re.compile(r"####|\\boxed(?![A-Za-z])|\banswer\b[\s*_]*(?:is\b|:|=)[\s*_:]*", re.IGNORECASE)


def answer_text(completion: str, prefilled: bool) -> str | None:
    """What stands after the thought; None where the thought never ends or a second one begins."""
    answer = split_thought(completion, prefilled).answer
    return None if answer is None or OPEN in answer or CLOSE in answer else answer


def has_thought(completion: str, prefilled: bool) -> bool:
    """Whether the completion thinks and comes to an end of it."""
    parts = split_thought(completion, prefilled)
    return parts.answer is not None and bool((parts.thought or "").strip())


def thinks_then_answers(completion: str, prefilled: bool) -> bool:
    """Whether the completion is one thought that is not empty, then an answer."""
    parts = split_thought(completion, prefilled)
    return bool(parts.well_formed and parts.thought and parts.thought.strip() and parts.answer and parts.answer.strip())


def stated(text: str | None) -> list[str]:
    r"""Every final answer that is marked as one: after `####`, in `\boxed{}`, after "answer is" or "Answer:".

    Empty where there is none, and where a box or `####` has nothing after it (an instruction that is quoted). Beside
    those two, the looser words count only where they name a number: `The answer is 6. #### 5` is two answers.
    """
    strict, loose, text = [], [], text or ""
    for count, mark in enumerate(_MARK.finditer(text), 1):
        if count > MARKS:
            return []
        rest = text[mark.end() : mark.end() + LONGEST + 20]
        boxed = mark.group().lower() == r"\boxed"
        content = (_braces(rest) if boxed else rest.partition("\n")[0]) or ""
        if not boxed and r"\boxed" in content:
            continue  # "the answer is \boxed{5}": the box says it
        content = _MARK.split(content)[0].strip().strip("*_").strip() if not boxed else content.strip()
        if mark.group().lower().startswith("answer"):
            loose.append(content)
        elif not content or len(content) > LONGEST:
            return []
        else:
            strict.append(content)
    if strict:
        return [*(content for content in loose if quantity_in(content)), *strict]
    return [content for content in loose if content and len(content) <= LONGEST]


def _braces(text: str) -> str | None:
    """The content of the braces that the text begins with; None where they never close."""
    depth, text = 0, text.lstrip()
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[1:place] if place else None
    return None


# ---------------------------------------------------------------- numbers and quantities


@dataclass(frozen=True)
class Quantity:
    """A number, powers of ten folded in, and the unit that follows it, as written."""

    value: Fraction
    unit: str


DIGITS, EXPONENT = 40, 200  # what is longer or larger is not read: it would only cost time
_WRAPPERS = re.compile(r"\\(?:text|mathrm|mathbf|mathit|operatorname|rm|bf)\s*\{([^{}]*)\}")
_SPACES = re.compile(r"\\[,;:! ]|\\q?quad|~|\\(?:left|right)(?![A-Za-z])")
_TEN = r"10\s*\^\s*\{?\s*(?P<%s>[+-]?[0-9]{1,4})(?![0-9])\s*\}?"
_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    r"(?:approximately|about|roughly|\\approx|\\sim|≈|=|\s)*(?P<sign>[+-]?)\s*[$€£]?\s*(?:"
    r"\\[dt]?frac\s*\{\s*(?P<top>[+-]?[0-9]+)\s*\}\s*\{\s*(?P<under>[0-9]+)\s*\}"
    rf"|{_TEN % 'alone'}"
    rf"|(?P<number>{_DECIMAL})(?:\s*/\s*(?P<divisor>[0-9]+)(?![0-9A-Za-z.]))?)"
    rf"(?:[eE](?P<e>[+-]?[0-9]{{1,4}})(?![0-9A-Za-z])|\s*(?:×|\\times|\\cdot|·|\*|x)?\s*{_TEN % 'power'})?"
    r"(?P<unit>.*)",
    re.DOTALL,
)
_NAMED = re.compile(r"\s*\\?[A-Za-z](?:[A-Za-z]{0,11}|_\{?[A-Za-z0-9]{1,8}\}?)\s*(?==)")  # "v = " before the number
_NO_UNIT = re.compile(
    r"\s*[0-9,^/+\-({!]|.*(?:[=<>≤≥;]|\b(?:or|and|to)\b|\\(?!circ|degree|mu|Omega|AA|cdot))|.*(?<![\^_{A-Za-z0-9-])[+-]?[0-9]",
    re.DOTALL,
)


def quantity_in(text: str) -> Quantity | None:
    r"""The one number of a short text with its unit: `1,234`, `$18.00`, `v = -2.5 \times 10^{-3}\ \mathrm{m/s^2}`.

    None where there is none, or two (`5 or 6`, `6=5`), or one that is too long or too large (`1e999`). Only the
    digits 0-9 are read.
    """
    if len(text) > LONGEST:
        return None
    text = text.replace("−", "-").replace(r"\$", "$").replace("{,}", ",").replace(r"\%", "%")
    text = re.sub(r"\\[()\[\]]", "", _SPACES.sub(" ", _WRAPPERS.sub(r" \1 ", _WRAPPERS.sub(r" \1 ", text))))
    text = re.sub(r"\$(?![0-9\s.])|(?<=[0-9A-Za-z}\s])\$", "", text).strip().strip("$*").strip()
    match = _NUMBER.fullmatch(_NAMED.sub("", text, count=1))
    if match is None:
        return None
    unit = re.split(r"\.(?=\s|$)", match["unit"], maxsplit=1)[0].rstrip(" .,;*")
    said = (match["number"] or match["top"] or "1").replace(",", "")
    under = match["under"] or match["divisor"] or "1"
    power = sum(int(match[name] or 0) for name in ("e", "alone", "power"))
    if _NO_UNIT.match(unit) or max(len(said), len(under)) > DIGITS or abs(power) > EXPONENT or not int(under):
        return None
    value = Fraction(said) / int(under) * Fraction(10) ** power
    return Quantity(-value if match["sign"] == "-" else value, unit.strip())


def quantity(completion: str, prefilled: bool) -> Quantity | None:
    """The number (with its unit) that the completion states as its final answer; None where two disagree."""
    found = [quantity_in(text) for text in stated(answer_text(completion, prefilled))]
    if not found or None in found or len({one.value for one in found if one}) != 1:
        return None
    return found[-1]


def number(completion: str, prefilled: bool) -> Fraction | None:
    """The number that the completion states as its final answer."""
    found = quantity(completion, prefilled)
    return found.value if found else None


_PREFIXES = {"T": 12, "G": 9, "M": 6, "k": 3, "d": -1, "c": -2, "m": -3, "µ": -6, "μ": -6, "n": -9, "p": -12, "f": -15}
_UNITS = ("m", "g", "s", "J", "N", "Pa", "W", "V", "A", "Hz", "K", "mol", "eV", "C", "F", "T", "L", "Ω", "cal", "bar")


@dataclass(frozen=True)
class Unit:
    """A unit taken apart: `$10^{6} \\mathrm{~km/s}$` has ten 6, prefix 3 and bases {m: 1, s: -1}."""

    ten: int  # the power of ten that is written in front of it
    prefix: int  # that of its SI prefixes
    bases: dict[str, int] | None  # None where not all of it is understood


def unit_of(text: str) -> Unit:
    text = _SPACES.sub(" ", _WRAPPERS.sub(r" \1 ", text.replace("$", " ")))
    text = re.sub(r"\\mu\s*", "µ", re.sub(r"[{}]", "", text)).replace("\\", " ").strip()
    ten = re.match(r"(?:×|times|x)?\s*10\s*\^\s*([+-]?[0-9]{1,3})", text)
    prefix, bases, side = 0, dict[str, int](), 1
    for token in re.findall(r"/|[A-Za-zµμΩ]+(?:\s*\^\s*[+-]?[0-9]{1,2})?|[^\s·*]", text[ten.end() :] if ten else text):
        if token == "/":
            side = -1
            continue
        name, _, high = token.replace(" ", "").partition("^")
        scale, base = (0, name) if name in _UNITS else (_PREFIXES.get(name[:1]), name[1:])
        if base not in _UNITS or scale is None:
            return Unit(int(ten[1]) if ten else 0, 0, None)
        prefix += scale * side * int(high or 1)
        bases[base] = bases.get(base, 0) + side * int(high or 1)
    return Unit(int(ten[1]) if ten else 0, prefix, {base: high for base, high in bases.items() if high})


def same_quantity(gold: Fraction, unit: str, said: Quantity, tolerance: float) -> bool:
    """Whether a stated quantity is the gold one, within a share `tolerance` of it.

    Powers of ten and SI prefixes of both units are folded in. An answer without a unit may leave out the gold unit's
    power of ten too. A unit that is not understood is not held against an answer: only its number counts.
    """
    asked, given = unit_of(unit), unit_of(said.unit)
    values = [said.value]
    if not said.unit:
        values.append(said.value * Fraction(10) ** asked.ten)
    elif asked.bases is not None and asked.bases == given.bases:
        values = [said.value * Fraction(10) ** (given.prefix - asked.prefix)]
    right = gold * Fraction(10) ** asked.ten
    return any(abs(value - right) <= Fraction(str(tolerance)) * abs(right) for value in values)


# ---------------------------------------------------------------- expressions

_COMMANDS = re.compile(
    "[dt]?frac|sqrt|pi|cdot|times|left|right|infty|cup|pm|ln|log|sin|cos|tan|exp|circ|leq?|geq?|theta|alpha|beta|quad"
)
SECONDS = 2  # for one comparison


def expression(completion: str, prefilled: bool) -> str | None:
    """The final answer as written; None where there is none, or two that are not the same."""
    found = stated(answer_text(completion, prefilled))
    if not found or any(not same_expression(found[-1], other) for other in found[:-1]):
        return None
    return found[-1]


def same_expression(gold: str, said: str) -> bool:
    """Whether two final answers are equal: as numbers, as texts, or by math-verify (Kydlíček 2025).

    What could take long (towers of exponents, factorials, long numbers, sums) and what says two things (`6=5`) is
    not handed to math-verify. Its own time limits work in the main thread only, and are used there.
    """
    numbers = quantity_in(gold), quantity_in(said)
    if numbers[0] and numbers[1] and all(_is_unit(one.unit) for one in numbers if one):
        return numbers[0].value == numbers[1].value
    if _bare(gold) == _bare(said):
        return True
    if not (_harmless(gold) and _harmless(said)):
        return False
    from math_verify import parse, verify

    seconds = SECONDS if threading.current_thread() is threading.main_thread() else None
    both = [parse(rf"\boxed{{{text}}}", parsing_timeout=seconds) for text in (gold, said)]
    return bool(both[0] and both[1] and verify(both[0], both[1], timeout_seconds=seconds))


def _is_unit(text: str) -> bool:
    """Whether what follows a number is a unit or a word, and no variable (`3x`)."""
    return unit_of(text).bases is not None or re.match(r"[A-Za-z]{3}|[%°]|\^?\\circ", text) is not None


def _bare(text: str) -> str:
    """An expression without what does not change it: spaces, dollars, sizes of brackets, fonts."""
    text = _SPACES.sub("", _WRAPPERS.sub(r"\1", text)).replace("dfrac", "frac").replace("tfrac", "frac")
    return re.sub(r"\\[()\[\]]|[\s$]", "", text).rstrip(".")


def _harmless(text: str) -> bool:
    """Whether comparing an expression costs little and it says one thing."""
    if len(text) > 120 or not re.fullmatch(r"[0-9A-Za-z\\{}()\[\]+\-*/^_.,=<>|\s$]*", text):
        return False
    if not all(_COMMANDS.fullmatch(name) for name in re.findall(r"\\([A-Za-z]+)", text)):
        return False
    if re.search(r"[0-9]{13}", text) or ("=" in text and not re.fullmatch(r"[\s$]*[A-Za-z]{1,3}\s*=[^=]*", text)):
        return False
    powers = re.findall(r"\^\s*(?:\{([^{}^]{1,8})\}|([0-9A-Za-z]))", text)
    if len(powers) != text.count("^"):
        return False
    high = [int(digits) for pair in powers for digits in re.findall(r"[0-9]+", "".join(pair))]
    return math.prod(max(1, exponent) for exponent in high) <= 50


# ---------------------------------------------------------------- choices and words

_CHOICE = re.compile(r"\(?(?P<letter>[A-E])\)?(?=\s*(?:$|[.,:;)\]]|because\b|since\b))")
_OTHER = re.compile(r"(?:\b(?:or|and)\b|[,;/&|])\s*\(?[A-E](?![A-Za-z'])")
_LISTED = re.compile(r"(?<![A-Za-z])([A-E])\)")  # a choice as it is listed in a question


def choice(completion: str, prefilled: bool) -> str | None:
    """The letter A-E that the completion states, marked as its answer or alone; None where it names two."""
    answer = (answer_text(completion, prefilled) or "").strip()
    found = stated(answer) or ([answer] if len(answer) <= len("(A).") else [])
    matches = [_CHOICE.match(_WRAPPERS.sub(r"\1", text).strip(" $*_")) for text in found]
    letters = {match["letter"] if match else None for match in matches}
    if len(letters) != 1 or any(_OTHER.search(text) or len(set(_LISTED.findall(text))) > 1 for text in found):
        return None
    return letters.pop()


def normalised(text: str) -> str:
    """Words only: one case, no punctuation, no articles, one space between them."""
    text = unicodedata.normalize("NFKC", _WRAPPERS.sub(r"\1", text)).casefold()
    words = re.sub(r"[^\w]+", " ", text).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def words(completion: str, prefilled: bool) -> str | None:
    """The final answer in normalised words; None where there is none, or two that differ."""
    found = {normalised(text) for text in stated(answer_text(completion, prefilled))}
    return found.pop() or None if len(found) == 1 else None
