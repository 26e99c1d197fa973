r"""Exact values of short LaTeX expressions without variables: `\sqrt{493}`, `1800\pi`, `\binom{5}{2}`, `\frac{3}{4}`.

A parser of its own, because sympy's evaluates while it reads: every number here is bounded before it is computed, so
a tower of powers costs nothing. A value is a Fraction; one that is irrational is rounded to 50 digits and called so.
"""

from __future__ import annotations

import decimal
import math
import re
from dataclasses import dataclass
from fractions import Fraction

DIGITS, BITS, DEPTH = 40, 4000, 12
_CONTEXT = decimal.Context(prec=50, Emax=10_000, Emin=-10_000)
PI = Fraction("3.14159265358979323846264338327950288419716939937510582097494459")
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"|(?P<command>\\(?:frac|binom|sqrt|pi|cdot|times|div|ln|log)(?![A-Za-z]))|(?P<sign>[-+*/^!(){}\[\]_]|×|·|⋅))"
)


@dataclass(frozen=True)
class Value:
    number: Fraction
    exact: bool = True


class _NotArithmetic(Exception):
    """The text is no expression, or a value in it is beyond the bounds."""


def evaluate(text: str) -> tuple[Value, str] | None:
    """The value of the expression that a text begins with, and the rest of the text; None where there is none.

    `text` went through `plain_math`. A minus or plus between two plain numbers (`5-6`, `10^2-10^3`) is a range or a
    sum left undone, so it is not read.
    """
    text = text.replace("π", r"\pi").replace("√", r"\sqrt")
    reader = _Reader(text)
    try:
        value = reader.sum()
    except (_NotArithmetic, decimal.DecimalException):
        return None
    return value, text[reader.place :]


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.place, self.depth = text, 0, 0

    def peek(self) -> re.Match[str] | None:
        return _TOKEN.match(self.text, self.place)

    def take(self, *wanted: str) -> str | None:
        """The next sign or command, where it is one of these."""
        match = self.peek()
        found = match and (match["sign"] or match["command"])
        if match and found in wanted:
            self.place = match.end()
            return found
        return None

    def need(self, sign: str) -> None:
        if self.take(sign) is None:
            raise _NotArithmetic

    def sum(self) -> Value:
        self.depth += 1
        if self.depth > DEPTH:
            raise _NotArithmetic
        start = self.place
        total = self.product()
        while sign := self.take("+", "-"):
            term = self.product()
            if not re.search(r"\\(?:sqrt|pi|frac|ln|log)", self.text[start : self.place]):
                raise _NotArithmetic
            total = _bounded(total.number + (term.number if sign == "+" else -term.number), total.exact and term.exact)
        self.depth -= 1
        return total

    def product(self) -> Value:
        signs = 0
        while sign := self.take("+", "-"):
            signs += sign == "-"
            if signs > 1:
                raise _NotArithmetic
        total = self.power()
        while True:
            before = self.place
            sign = self.take("*", r"\cdot", r"\times", "×", "·", "⋅", "/", r"\div")
            match = self.peek()
            factor = match and (
                match["number"]
                or match["command"] in (r"\frac", r"\binom", r"\sqrt", r"\pi", r"\ln", r"\log")
                or match["sign"] in ("(", "{")
            )
            if not factor or (sign is None and match and match["number"]):  # "2 3" is no product
                self.place = before
                break
            other = self.power()
            if sign in ("/", r"\div"):
                if other.number == 0:
                    raise _NotArithmetic
                total = _bounded(total.number / other.number, total.exact and other.exact)
            else:
                total = _bounded(total.number * other.number, total.exact and other.exact)
        return Value(-total.number, total.exact) if signs else total

    def power(self) -> Value:
        base = self.atom()
        while self.take("^"):
            base = _power(base, self.argument(signed=True))
        return base

    def argument(self, *, signed: bool = False) -> Value:
        r"""What stands in braces, or one digit: `\sqrt2`."""
        if self.take("{"):
            value = self.sum()
            self.need("}")
            return value
        sign = self.take("-") if signed else None
        match = self.peek()
        if match and match["number"]:
            digits = match["number"] if signed else match["number"][:1]
            self.place = match.end("number") - len(match["number"]) + len(digits)
            value = Value(_number(digits))
        else:
            value = self.atom()
        return Value(-value.number, value.exact) if sign else value

    def atom(self) -> Value:
        match = self.peek()
        if match is None:
            raise _NotArithmetic
        self.place = match.end()
        if match["number"]:
            value = _number(match["number"])
            mixed = self.peek()
            if value.denominator == 1 and mixed and mixed["command"] == r"\frac":  # 1\frac{1}{2}
                place = self.place
                part = self.atom()
                if part.exact and 0 < part.number < 1:
                    return Value(value + part.number)
                self.place = place
            return Value(value)
        name = match["sign"] or match["command"]
        if name in ("(", "{"):
            value_ = self.sum()
            self.need(")" if name == "(" else "}")
            return value_
        if name == r"\pi":
            return Value(PI, exact=False)
        if name == r"\frac":
            top, under = self.argument(), self.argument()
            if under.number == 0:
                raise _NotArithmetic
            return _bounded(top.number / under.number, top.exact and under.exact)
        if name == r"\binom":
            n, k = self.argument(), self.argument()
            if not (n.number.denominator == k.number.denominator == 1 and 0 <= k.number <= n.number <= 200):
                raise _NotArithmetic
            return Value(Fraction(math.comb(int(n.number), int(k.number))))
        if name == r"\sqrt":
            index = Value(Fraction(2))
            if self.take("["):
                index = self.sum()
                self.need("]")
            if self.take("("):
                inner = self.sum()
                self.need(")")
            else:
                inner = self.argument()
            return _root(inner, index)
        if name in (r"\ln", r"\log"):
            base = self.argument() if name == r"\log" and self.take("_") else None
            value_ = _logarithm(self.atom())
            return value_ if name == r"\ln" else _quotient(value_, _logarithm(base or Value(Fraction(10))))
        raise _NotArithmetic


def _number(text: str) -> Fraction:
    if len(text) > DIGITS:
        raise _NotArithmetic
    return Fraction(text.replace(",", ""))


def _bounded(value: Fraction, exact: bool) -> Value:
    size = max(value.numerator.bit_length(), value.denominator.bit_length())
    if size > BITS:
        raise _NotArithmetic
    if exact or abs(value - round(value)) * 10**45 < 1:  # sqrt(2) sqrt(2)
        return Value(value if exact else Fraction(round(value)))
    return Value(Fraction(_decimal(value)), exact=False)


def _decimal(value: Fraction) -> decimal.Decimal:
    return _CONTEXT.divide(decimal.Decimal(value.numerator), decimal.Decimal(value.denominator))


def _quotient(top: Value, under: Value) -> Value:
    if under.number == 0:
        raise _NotArithmetic
    return _bounded(top.number / under.number, exact=False)


def _power(base: Value, exponent: Value) -> Value:
    high = exponent.number
    if not exponent.exact or abs(high) > 200 or (base.number == 0 and high <= 0):
        raise _NotArithmetic
    if high.denominator == 1:
        size = max(base.number.numerator.bit_length(), base.number.denominator.bit_length())
        if size * abs(high) > BITS:
            raise _NotArithmetic
        return _bounded(base.number ** int(high), base.exact)
    root = _root(base, Value(Fraction(high.denominator)))
    return _power(root, Value(Fraction(high.numerator)))


def _root(inner: Value, index: Value) -> Value:
    n = index.number
    if n.denominator != 1 or not 2 <= n <= 20 or inner.number < 0:
        raise _NotArithmetic
    exact = [_whole_root(part, int(n)) for part in (inner.number.numerator, inner.number.denominator)]
    if inner.exact and exact[0] is not None and exact[1] is not None:
        return Value(Fraction(exact[0], exact[1]))
    if inner.number == 0:
        return Value(Fraction(0))
    root = _CONTEXT.power(_decimal(inner.number), _CONTEXT.divide(decimal.Decimal(1), decimal.Decimal(int(n))))
    return Value(Fraction(root), exact=False)


def _whole_root(value: int, n: int) -> int | None:
    """The n-th root of a whole number, where that is whole."""
    if value < 2:
        return value
    low, high = 1, 1 << (value.bit_length() // n + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**n <= value else (low, middle - 1)
    return low if low**n == value else None


def _logarithm(value: Value) -> Value:
    if value.number <= 0:
        raise _NotArithmetic
    if value.number == 1:
        return Value(Fraction(0))
    return Value(Fraction(_CONTEXT.ln(_decimal(value.number))), exact=False)


def nearly_equal(one: Value, other: Value) -> bool:
    """Whether two values are the same number; the last ten digits of rounded ones do not count."""
    if one.exact and other.exact:
        return one.number == other.number
    return abs(one.number - other.number) <= abs(one.number) * Fraction(1, 10**40)
