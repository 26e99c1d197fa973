r"""Numbers with units, as a final answer states them: `1,234`, `18 thousand dollars`, `d \approx 12 \text{ m}`.

One number, or none: `5 or 6`, `6=5` and `3x` are not read. Exact expressions without variables are evaluated within
bounds (pipeline/scoring/arithmetic.py), and units are converted (pipeline/scoring/units.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from pipeline.scoring.arithmetic import DIGITS, Value, evaluate, nearly_equal
from pipeline.scoring.reading import plain_math, unwrapped
from pipeline.scoring.units import converted, same_dimension, unit_of

LONGEST = 300  # characters of a final answer: what is longer is none
EXPONENT = 200  # what is larger is not read: it would only cost time


@dataclass(frozen=True)
class Quantity:
    """A number, powers of ten and `thousand` folded in, and the unit that follows it, as written."""

    value: Fraction
    unit: str
    exact: bool = True  # False: an irrational number, rounded to 50 digits
    name: str = ""  # what stands before `=`: `x` in `x = 5`
    attached: bool = False  # whether the unit touches the number, as a variable does

    @property
    def number(self) -> Value:
        return Value(self.value, self.exact)


_ABOUT = r"(?:approximately|approx\.?|about|roughly|around|nearly|exactly|only|just|≈|=|:|\s)*"
_CURRENCY = r"(?:US\s?|CA\s?|AU\s?)?[$€£¥₹]|(?:USD|EUR|GBP|Rs\.?)(?=\s*[0-9])"
_CURRENCIES = {"USD": "$", "EUR": "€", "GBP": "£", "Rs": "₹"}
_TEN = r"10\s*\^\s*\{?\s*(?P<%s>[+-]?[0-9]{1,4})(?![0-9.])\s*\}?"
_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"{_ABOUT}(?P<sign>[+-]?)\s*(?P<currency>{_CURRENCY})?\s*(?P<late>-?)(?:"
    r"(?:(?P<whole>[0-9]{1,12})\s*)?\\frac\s*\{\s*(?P<top>[+-]?[0-9,]+)\s*\}\s*\{\s*(?P<under>[0-9,]+)\s*\}"
    rf"|{_TEN % 'alone'}"
    r"|(?P<mixed>[0-9]{1,12})\s+(?P<over>[0-9]{1,6})/(?P<by>[0-9]{1,6})(?![0-9A-Za-z/]|\.[0-9])"
    rf"|(?P<number>{_DECIMAL})(?:\s*/\s*(?P<divisor>[0-9]+)(?![0-9A-Za-z]|\.[0-9]))?)"
    rf"(?:[eE](?P<e>[+-]?[0-9]{{1,4}})(?![0-9A-Za-z])|\s*(?:×|\\times|\\cdot|·|⋅|\*|x)?\s*{_TEN % 'power'})?"
    r"(?P<unit>.*)",
    re.DOTALL,
)
_MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "k": 3, "m": 6, "b": 9}
_MAGNITUDE = re.compile(r"\s*(?:(hundred|thousand|million|billion|trillion)s?\b|([kmb])\b)\s*(?:of\s+)?", re.IGNORECASE)
_NO_UNIT = re.compile(
    r"\s*(?:[0-9,^_+\-({!]|/(?!\s*[A-Za-z]))"
    r"|.*\b(?:is|are|was)\s+(?:not|wrong|incorrect|false|untrue)\b"
    r"|.*(?:[=<>≤≥≈±;]|\b(?:or|and|to)\b|\\(?!circ|degree|mu|Omega|AA|cdot|ohm|celsius|times|frac\s*\{\s*\\?[A-Za-z]))"
    r"|.*(?<![\^_{A-Za-z0-9-])[+-]?[0-9](?!\s*/\s*[A-Za-z])",
    re.DOTALL,
)
_EXACT = re.compile(r"\\(?:sqrt|pi|frac|binom|times|cdot|ln|log)(?![A-Za-z])|[√π×·⋅^]")
_NAME_PARTS = re.compile(  # what may stand in a name beside letters and blanks
    r"_\s*\{[^{}]*\}|_\s*\\?[A-Za-z0-9]+"  # an index
    r"|(?<=[A-Za-z}])\([A-Za-z0-9, ]{0,12}\)"  # f(3)
    r"|(?<=[a-z]{3})-(?=[a-z]{2})"  # a word with a hyphen
    r"|\^\s*\{[^{}0-9]*\}|\^\s*[*'A-Za-z]|°|\\[A-Za-z]+|['{}\s]"
)
_AFTER_COMMA = re.compile(
    r",\s+(?:which|so|since|because|as|thus|hence|therefore|where|assuming|rounded|after|i|we|the)\b[^0-9]*$",
    re.IGNORECASE,
)
_REASON = re.compile(r",?\s+(?:because|since)\s.*", re.IGNORECASE | re.DOTALL)
_TAKEN_BACK = re.compile(
    r"\b(?:or|wait|actually|no|not|correction|rather|instead|sorry|but)\b[^0-9]{0,60}[0-9]", re.IGNORECASE
)


@lru_cache(maxsize=4096)  # a gold is compared with every completion of its row, a target read more than once
def quantity_in(text: str) -> Quantity | None:
    r"""The one number of a short text with its unit: `1,234`, `$18.00`, `v = -2.5 \times 10^{-3}\ \mathrm{m/s^2}`.

    None where there is none, or two (`5 or 6`, `6=5`), or one that is too long or too large (`1e999`).
    """
    if len(text) > LONGEST:
        return None
    dollars = r"\$" in text or text.count("$") % 2 == 1  # else they delimit formulas
    text = plain_math(unwrapped(text)).replace("π", r"\pi").replace("√", r"\sqrt")
    text = re.sub(r"\$(?![0-9\s.-])|(?<=[0-9A-Za-z})\s])\$", "", text) if dollars else text.replace("$", " ")
    text = text.strip().strip("*_`\"'").strip()
    while grouped := re.fullmatch(r"\{([^{}]*)\}", text):
        text = grouped[1].strip()
    if again := re.fullmatch(r"([^()]*[^()\s])\s+\(([^()]*[0-9][^()]*)\)\s*\.?", text):  # 72 hours (3 days)
        first, second = quantity_in(again[1]), quantity_in(again[2])
        return first if first and second and same_value(first, second) else None
    name, text = _named(text)
    text = re.sub(
        r"(?<=[0-9A-Za-z])\s+\([A-Za-z][A-Za-z -]{2,}\)\s*\.?$", "", text.strip().strip("*_").rstrip("$").strip()
    )
    found = _one(text)
    if found is None:
        return _both_sides(text, name)
    return Quantity(found.value, found.unit, found.exact, name, found.attached)


def _both_sides(text: str, name: str) -> Quantity | None:
    r"""The exact side of `\sqrt{493} \approx 22.2 m` or `\frac{1}{2} = 0.5`; None where they are not equal."""
    left, sign, right = re.sub(r"=\s*≈|≈\s*=", "≈", text).replace("≈", "=≈").partition("=")
    if not sign or "=" in right:
        return None
    one, other = (_one(side.lstrip("≈").strip()) for side in (left, right))
    if one is None or other is None or (one.unit and other.unit and one.unit != other.unit):
        return None
    near = abs(one.value) / 100 if right.startswith("≈") else Fraction(0)
    if abs(one.value - other.value) > near:
        return None
    return Quantity(one.value, one.unit or other.unit, one.exact, name, one.attached)


def _one(text: str) -> Quantity | None:
    match = _NUMBER.fullmatch(text)
    return (match and _from_match(match)) or _evaluated(text)


def _named(text: str) -> tuple[str, str]:
    r"""What stands before `=` or `≈` and is a name (`\Delta H`, `\text{Total}`, `f(3)`), and the text without it."""
    name = ""
    for _ in range(3):
        place = min((place for place in map(text.find, "=≈:") if place >= 0), default=-1)
        if place < 0 or not _is_name(text[:place]):
            break
        name = text[:place].strip(" ${}")
        text = text[place + 1 :].lstrip("= ")
    return name, text


def _is_name(text: str) -> bool:
    words = _NAME_PARTS.sub(" ", text).strip(" $*")
    letters = re.search(r"[A-Za-z]", text) is not None
    return (
        letters
        and re.fullmatch(r"[A-Za-z ]*", words) is not None
        and not re.search(r"\b(?:or|and|not)\b", words)
        and not re.search(
            r"\\(?:n?eq?|ne|leq?|geq?|frac|sqrt|pi|times|cdot|binom|pm|in|notin|not|lt|gt|sin|cos|tan|ln|log|exp|int|sum|lim)(?![A-Za-z])",
            text,
        )
    )


def _from_match(match: re.Match[str]) -> Quantity | None:
    unit = _unit_text(match["unit"])
    said = (match["number"] or match["top"] or match["over"] or "1").replace(",", "")
    under = (match["under"] or match["divisor"] or match["by"] or "1").replace(",", "")
    power = sum(int(match[name] or 0) for name in ("e", "alone", "power"))
    if (
        unit is None
        or max(len(said), len(under)) > DIGITS
        or abs(power) > EXPONENT
        or not said
        or not under
        or not int(under)
    ):
        return None
    magnitude = _MAGNITUDE.match(unit)
    if magnitude and not (magnitude[2] and not match["currency"]):
        power += _MAGNITUDES[(magnitude[1] or magnitude[2]).lower()]
        unit = unit[magnitude.end() :]
    ordinal = re.match(r"(?:st|nd|rd|th)\b", unit)
    unit = unit[ordinal.end() :] if ordinal else unit
    value = Fraction(said) / int(under)
    if whole := match["whole"] or match["mixed"]:
        if not 0 < value < 1:
            return None
        value += int(whole)
    value *= Fraction(10) ** power
    start = match.start("unit")
    attached = re.match(r"[A-Za-z\\]", match["unit"]) is not None and not match.string[start - 1].isspace()
    if match["late"] and (match["sign"] or not match["currency"]):
        return None  # --5
    if attached and not (unit.strip() and unit_of(unit).dimension is not None) and not (magnitude or ordinal):
        return None  # 3x, 5abc
    if match["currency"]:
        sign = match["currency"].strip(" .")
        per = unit if unit.lstrip().startswith(("/", "per ")) else ""
        unit = _CURRENCIES.get(sign, sign[-1]) + per
    return Quantity(-value if "-" in (match["sign"], match["late"]) else value, unit.strip(), attached=attached)


def _unit_text(text: str) -> str | None:
    """What follows a number, as far as it is a unit or words; None where it is a formula or a second number."""
    unit, _, rest = _sentence(text)
    reason = _REASON.search(unit)
    if _TAKEN_BACK.search(rest) or (reason and _TAKEN_BACK.search(reason[0])):
        return None
    unit = _AFTER_COMMA.sub("", unit[: reason.start()] if reason else unit).rstrip(" .,;*_\"'`")
    return None if _NO_UNIT.match(unit) else unit


def _sentence(text: str) -> tuple[str, str, str]:
    """(what stands before the first full stop that ends a sentence, the stop, the rest)."""
    match = re.search(r"\.(?=\s|$)|\n", text)
    return (text, "", "") if match is None else (text[: match.start()], match[0], text[match.end() :])


def _evaluated(text: str) -> Quantity | None:
    r"""The value of an expression without variables, `\sqrt{493} m`."""
    text = re.sub(rf"^{_ABOUT}", "", text)
    if not _EXACT.search(text):
        return None
    found = evaluate(text)
    if found is None:
        return None
    value, rest = found
    unit = _unit_text(rest)
    if unit is None or (unit.strip() and not re.match(r"\s", rest) and unit_of(unit).dimension is None):
        return None
    number, magnitude = value.number, _MAGNITUDE.match(unit)
    if magnitude and magnitude[1]:
        number *= 10 ** _MAGNITUDES[magnitude[1].lower()]
        unit = unit[magnitude.end() :]
    return Quantity(number, unit.strip(), value.exact, attached=bool(re.match(r"[A-Za-z]", rest)))


# ---------------------------------------------------------------- comparisons


def same_quantity(gold: Fraction, unit: str, said: Quantity, tolerance: float) -> bool:
    """Whether a stated quantity is the gold one, within a share `tolerance` of it.

    Units are converted, and another dimension is another answer: `12.5 s` is not 12.5 m, `373 °C` not 373 K. An answer
    without a unit may leave out the gold unit's power of ten too. A unit that is not understood, on either side, is
    not held against an answer: only its number counts.
    """
    asked, given = unit_of(unit), unit_of(said.unit)
    values = [said.value]
    if given.none:
        values.append(said.value * Fraction(10) ** asked.ten)
    elif not asked.none and asked.dimension is not None and given.dimension is not None:
        if not same_dimension(asked, given):
            return False
        values = [converted(said.value * Fraction(10) ** given.ten, given, asked)]
    right = gold * Fraction(10) ** asked.ten
    return any(abs(value - right) <= Fraction(str(tolerance)) * abs(right) for value in values)


def same_value(one: Quantity, other: Quantity) -> bool:
    """Whether two stated quantities are one: an answer may leave out the unit, and units are converted.

    Words that are no known unit have to share one: `5 apples` and `5 oranges` are different.
    """
    units = unit_of(one.unit), unit_of(other.unit)
    if not units[0].none and not units[1].none:
        if units[0].dimension is None or units[1].dimension is None:
            if units[0].dimension is not units[1].dimension or not units[0].words & units[1].words:
                return False
        elif not same_dimension(*units):
            return False
        else:
            return nearly_equal(Value(converted(one.value, *units), one.exact), other.number)
    return nearly_equal(one.number, other.number)
