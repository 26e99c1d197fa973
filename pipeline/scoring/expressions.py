r"""Whether two final answers are the same mathematics: as values with units, as texts, by structure, by math-verify.

Own code compares what has a structure that can be read safely: values, names, bases, lists, intervals, matrices,
equations. What is left goes to math-verify (Kydlíček 2025), one side of it at a time and only when it is short and
says one thing: math-verify takes `6=5` for 5, its parser (sympy) evaluates while it reads, and its time limits work
in the main thread only.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Sequence
from typing import Any

from pipeline.scoring.arithmetic import Value, evaluate, nearly_equal
from pipeline.scoring.quantities import Quantity, quantity_in, same_value
from pipeline.scoring.reading import plain_math, unwrapped

SECONDS = 2  # for one comparison by math-verify, in the main thread
SHORT, LENGTH, PARTS, DEPTH = 120, 300, 12, 3
TERMS = 300  # that an expression may have when its products are multiplied out
_COMMANDS = re.compile(
    r"frac|sqrt|pi|cdot|times|infty|pm|ln|log|sin|cos|tan|exp|le|leq|ge|geq|theta|alpha|beta|gamma|lambda|phi|binom"
)
_MATRIX = re.compile(
    r"(?P<open>\(|\[)?\s*\\begin\{(?P<kind>[pb]?matrix|smallmatrix|array)\}\s*(?:\{[lcr| ]*\})?(?P<cells>.*)"
    r"\\end\{(?P=kind)\}\s*(?P<close>\)|\])?",
    re.DOTALL,
)
_MEMBER = re.compile(r"\s*(?P<name>[A-Za-z](?:_\{?[A-Za-z0-9]\}?)?)\s*(?:\\in(?![A-Za-z])|∈)\s*(?P<rest>.+)", re.DOTALL)
_VARIABLE = re.compile(
    r"\([A-Za-z](?:,[A-Za-z]){1,3}\)|\\?[A-Za-z](?:_\{?[A-Za-z0-9]{1,6}\}?)?|\\[A-Za-z]+|[A-Za-z]\([A-Za-z0-9, ]{1,6}\)"
)
_BASED = re.compile(r"\s*\(?([0-9A-Fa-f]+(?:\.[0-9A-Fa-f]+)?)\)?\s*_\s*(?:\{\s*([0-9]+)\s*\}|([0-9]+))\s*")
_RELATION = re.compile(r"\\(?:leq?|geq?|lt|gt|neq?)(?![A-Za-z])|[=<>≤≥≠]")
_RELATIONS = {**dict.fromkeys((r"\le", r"\leq", "≤"), "<="), **dict.fromkeys((r"\ge", r"\geq", "≥"), ">=")}
_RELATIONS |= {r"\lt": "<", r"\gt": ">", **dict.fromkeys((r"\ne", r"\neq", "≠"), "!=")}
_TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
_JOINED = re.compile(r"\\(?:text|mathrm)\s*\{\s*,?\s*(?:or|and)\s*\}|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])|;")


def same_expression(gold: str, said: str) -> bool:
    r"""Whether two final answers are equal.

    As values (`800 \text{ ml}` and 800, `5 cm` and `0.05 m`, `\binom{5}{2}` and 10), as texts (`\text{(C)}` and C), by
    structure (`x \in [-2,7]` and `[-2,7]`, matrices, `2x+4y-3=0` and `4x+8y-6=0`), else by math-verify. What says two
    things (`6=5`) or could take long (towers of powers, factorials, long numbers, sums) is equal to nothing else.
    """
    if max(len(gold), len(said)) > LENGTH:
        return gold.strip() == said.strip()
    return _same(gold, said, DEPTH)


def _same(gold: str, said: str, depth: int) -> bool:
    one, other = quantity_in(gold), quantity_in(said)
    if one and other and not (_one_letter(one) or _one_letter(other)) and _names_agree(one.name, other.name):
        return same_value(one, other)
    if _text(gold) == _text(said) and _text(gold):
        return True
    gold, said = _bare(gold), _bare(said)
    if not gold or not said:
        return False
    if gold == said:
        return True
    if one and other and re.search(r"[=≈]", gold) and re.search(r"[=≈]", said):
        return _same_relation(gold, said)
    based = _BASED.fullmatch(gold), _BASED.fullmatch(said)
    if based[0] or based[1]:
        return bool(based[0] and based[1]) and _base(based[0]) == _base(based[1])
    for compare in (_same_matrix, _same_member, _same_list):
        found = compare(gold, said, depth) if depth else None
        if found is not None:
            return found
    if _RELATION.search(gold) and _RELATION.search(said):
        return _same_relation(gold, said)
    gold, said = _unnamed(gold), _unnamed(said)
    values = _value(gold), _value(said)
    if values[0] and values[1]:
        return nearly_equal(values[0], values[1])
    return gold == said or _verified(gold, said)


def _one_letter(one: Quantity) -> bool:
    """Whether what looks like a unit may be a variable: `3m`."""
    return one.attached and re.fullmatch(r"[A-Za-z]", one.unit) is not None


def _names_agree(one: str, other: str) -> bool:
    """`x=3` and `y=3` are different; `x=3` and `3` are not, and words in front of a number are no variables."""
    names = [re.sub(r"[\s{}]", "", name) for name in (one, other)]
    variables = [
        name
        for name in names
        if re.fullmatch(r"(?:[A-Za-z]{1,2}|\\[a-z]+)(?:_[A-Za-z0-9]{1,6})?'{0,3}|[A-Za-z]'{0,3}\(.*\)", name)
    ]
    return len(set(variables)) < 2


# ---------------------------------------------------------------- texts


def _text(text: str) -> str:
    r"""A choice, or words: `\text{(C)}` is C, `\text{Ellipse}` is ellipse. Empty for mathematics."""
    plain = " ".join(plain_math(unwrapped(text, r" \1 ")).strip(" $.*").split())
    letter = re.fullmatch(r"\(?\s*([A-Z])\s*\)?", plain)
    if letter:
        return letter[1]
    words = plain.casefold()
    return words if re.fullmatch(r"[^\W\d_]+(?:[\s,'-]+[^\W\d_]+)*", words) and re.search(r"\w{3}", words) else ""


def _bare(text: str) -> str:
    """An expression without what does not change it: spaces, dollars, sizes of brackets, fonts, a last full stop."""
    text = re.sub(r"\s*\.\s*I hope it is correct\.?\s*$", "", text)
    text = plain_math(_JOINED.sub(",", text)).replace("$", "").replace("π", r"\pi").replace("√", r"\sqrt")
    text = unwrapped(text.replace("∞", r"\infty").replace("∪", r"\cup "), r"\1")
    text = re.sub(r"(\\[A-Za-z]+)\s+(?=[A-Za-z])", r"\1§", text)  # the blank that ends a command stays
    return re.sub(r"\s", "", text).replace("§", " ").strip("*").rstrip(".,")


def _base(match: re.Match[str] | None) -> tuple[str, int]:
    assert match is not None
    return match[1].upper().lstrip("0"), int(match[2] or match[3])


def _unnamed(text: str) -> str:
    """`x=` and `f(x)=` before an expression fall away."""
    left, sign, right = text.partition("=")
    return right if sign and _VARIABLE.fullmatch(left) and not _RELATION.search(right) else text


# ---------------------------------------------------------------- structures


def _same_matrix(gold: str, said: str, depth: int) -> bool | None:
    cells = [_matrix(text) for text in (_unnamed(gold), _unnamed(said))]
    if cells[0] is None and cells[1] is None:
        return None
    if cells[0] is None or cells[1] is None or [len(row) for row in cells[0]] != [len(row) for row in cells[1]]:
        return False
    pairs = [pair for rows in zip(*cells, strict=True) for pair in zip(*rows, strict=True)]
    return len(pairs) <= 36 and all(_same(one, other, depth - 1) for one, other in pairs)


def _matrix(text: str) -> list[list[str]] | None:
    """The cells of a matrix in brackets; None for anything else (a determinant among it)."""
    match = _MATRIX.fullmatch(text)
    if match is None or (match["kind"] in ("array", "matrix", "smallmatrix")) != (match["open"] is not None):
        return None
    if match["open"] and not match["close"]:
        return None
    rows = re.split(r"\\\\(?:\[[^\]]*\])?|\\cr(?![A-Za-z])", match["cells"].replace(r"\hline", ""))
    return [row.split("&") for row in rows if row.strip()]


def _same_member(gold: str, said: str, depth: int) -> bool | None:
    """`x ∈ [-2,7]` and `[-2,7]`; different variables are different answers."""
    members = _MEMBER.fullmatch(gold), _MEMBER.fullmatch(said)
    if not (members[0] or members[1]):
        return None
    if members[0] and members[1] and members[0]["name"] != members[1]["name"]:
        return False
    rests = [match["rest"] if match else text for match, text in zip(members, (gold, said), strict=True)]
    return _same(rests[0], rests[1], depth - 1)


def _same_list(gold: str, said: str, depth: int) -> bool | None:
    """Intervals, tuples, sets, unions and lists, part by part; None where neither is one."""
    for split, ordered in ((_union, False), (_list, True)):
        parts = split(_unnamed(gold)), split(_unnamed(said))
        if parts[0] is None and parts[1] is None:
            continue
        if parts[0] is None or parts[1] is None or parts[0][0] != parts[1][0] or len(parts[0][1]) != len(parts[1][1]):
            return False
        ordered = ordered and parts[0][0] not in ("", r"\{\}")
        return _same_parts(parts[0][1], parts[1][1], ordered, depth)
    return None


def _same_parts(gold: Sequence[str], said: Sequence[str], ordered: bool, depth: int) -> bool:
    if len(gold) > PARTS:
        return False
    if ordered:
        return all(_same(one, other, depth - 1) for one, other in zip(gold, said, strict=True))
    left = list(said)
    for one in gold:
        place = next((k for k, other in enumerate(left) if _same(one, other, depth - 1)), None)
        if place is None:
            return False
        del left[place]
    return True


def _union(text: str) -> tuple[str, list[str]] | None:
    parts = re.split(r"\\cup(?![A-Za-z])", text)
    return (r"\cup", [part.strip() for part in parts]) if len(parts) > 1 else None


def _list(text: str) -> tuple[str, list[str]] | None:
    r"""(brackets, parts) of `(a,b)`, `[a,b)`, `\{a,b\}` or `a,b`; None for what has one part only."""
    inner, brackets = text, ""
    match = re.fullmatch(r"(\\\{|\\lbrace\s?|[(\[])(.*)(\\\}|\\rbrace|[)\]])", text, re.DOTALL)
    if match and _split(match[2]) is not None:
        inner, brackets = match[2], match[1].replace("lbrace", "{").strip() + match[3].replace("rbrace", "}")
    parts = _split(inner)
    single = brackets == r"\{\}" and parts is not None
    return (brackets, parts) if parts and (len(parts) > 1 or single) else None


def _split(text: str) -> list[str] | None:
    """The parts between the commas that stand in no brackets; None where brackets do not match."""
    depth, parts, start = 0, [], 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth < 0:
            return None
        if letter == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return None if depth else [*parts, text[start:]]


# ---------------------------------------------------------------- equations and what is left


def _same_relation(gold: str, said: str) -> bool:
    """`2x+4y-3=0` and `4x+8y-6=0`, `x>3` and `3<x`: equal up to a factor of both sides."""
    sides = [_sides(text) for text in (gold, said)]
    if sides[0] is None or sides[1] is None:
        return False
    (one, sign), (other, other_sign) = sides[0], sides[1]
    if len(one) != len(other) or len(one) > 3:
        return False
    turned = [_TURNED[mark] for mark in reversed(other_sign)]
    for parts, marks in ((other, other_sign), (list(reversed(other)), turned)):
        if marks == sign and all(_same(a, b, 0) for a, b in zip(one, parts, strict=True)):
            return True
    return len(one) == 2 and _proportional(one, sign[0], other, other_sign[0])


def _sides(text: str) -> tuple[list[str], list[str]] | None:
    """(the sides, the relations between them)."""
    marks = [_RELATIONS.get(match[0], match[0]) for match in _RELATION.finditer(text)]
    sides = [side.strip() for side in _RELATION.split(text)]
    return (sides, marks) if marks and all(sides) else None


def _proportional(one: Sequence[str], mark: str, other: Sequence[str], other_mark: str) -> bool:
    """Whether left minus right of the one is a number times that of the other, and the relations fit its sign."""
    parts = [_parsed(side) for side in (*one, *other)]
    if any(part is None for part in parts):
        return False
    import sympy

    def ratio() -> Any:
        left, right = parts[0] - parts[1], parts[2] - parts[3]
        if left.free_symbols != right.free_symbols or not left.free_symbols:
            return None
        return sympy.cancel(left / right)

    factor = _within(ratio)
    if factor is None or not factor.is_number or factor == 0 or factor.is_real is not True:
        return False
    return mark == (other_mark if factor > 0 else _TURNED[other_mark])


def _parsed(text: str) -> Any:
    """One side as sympy reads it; None where it is not short and harmless, or no expression."""
    if not _harmless(text) or _RELATION.search(text):
        return None
    from math_verify import parse

    found = parse(rf"\boxed{{{text}}}", parsing_timeout=_seconds(), fallback_mode="no_fallback")
    from sympy import Expr

    return found[0] if found and isinstance(found[0], Expr) else None


def _verified(gold: str, said: str) -> bool:
    if not (_harmless(gold) and _harmless(said)) or bool(_RELATION.search(gold)) != bool(_RELATION.search(said)):
        return False
    if _letters(gold) != _letters(said):  # math-verify takes X for x, and the m of 3m for a unit
        return False
    from math_verify import parse, verify

    both = [parse(rf"\boxed{{{text}}}", parsing_timeout=_seconds()) for text in (gold, said)]
    return bool(both[0] and both[1] and verify(both[0], both[1], timeout_seconds=_seconds()))


def _terms(text: str) -> int:
    """An upper bound of the terms that multiplying out its sums and their powers gives."""
    found = 1
    for match in re.finditer(r"\(([^()]*)\)(?:\^\{?([0-9]{1,2})\}?)?", text):
        parts, power = 1 + len(re.findall(r"[+-]", match[1].lstrip("+-"))), int(match[2] or 1)
        found *= math.comb(parts + power - 1, power)
    return found


def _letters(text: str) -> set[str]:
    """The variables of an expression; e and i are numbers."""
    return set(re.sub(r"\\[A-Za-z]+|[^A-Za-z]", "", text)) - {"e", "i"}


def _seconds() -> int | None:
    return SECONDS if threading.current_thread() is threading.main_thread() else None


def _within(work: Any) -> Any:
    """What `work` gives; None where sympy fails or takes too long (in the main thread, where limits work)."""
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    try:
        return timeout(timeout_seconds=_seconds())(work)() if _seconds() else work()
    except (TimeoutException, ArithmeticError, AttributeError, TypeError, ValueError, NotImplementedError):
        return None


def _value(text: str) -> Value | None:
    """The number that a whole expression is."""
    found = evaluate(text)
    return found[0] if found and not found[1].strip() else None


def _harmless(text: str) -> bool:
    """Whether comparing an expression costs little and it says one thing."""
    if len(text) > SHORT or not re.fullmatch(r"[0-9A-Za-z\\{}()\[\]+\-*/^_.=<>|\s]*", text):
        return False
    if not all(_COMMANDS.fullmatch(name) for name in re.findall(r"\\([A-Za-z]+)", text)):
        return False
    if re.search(r"[A-Za-z]{3}", re.sub(r"\\[A-Za-z]+", " ", text)):  # a word, whose letters are no factors
        return False
    if re.search(r"[0-9]{13}|[0-9]\s*\}?_", text) or text.count("=") > 1:
        return False
    binomials = re.findall(r"\\binom\{([0-9]{1,2})\}\{([0-9]{1,2})\}", text)
    if len(binomials) != text.count(r"\binom"):
        return False
    powers = re.findall(r"\^\s*(?:\{([^{}^]{1,8})\}|([0-9A-Za-z]))", text)
    if len(powers) != text.count("^"):
        return False
    if re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text)) and _terms(text) > TERMS:
        return False
    high = [int(digits) for pair in powers for digits in re.findall(r"[0-9]+", "".join(pair))]
    return math.prod(max(1, exponent) for exponent in high) <= 50
