r"""Units as written in answers: what they measure, and how many of the base unit one is.

    unit_of(r"\mathrm{~kJ} \mathrm{~mol}^{-1}")      1000 m² kg s⁻² mol⁻¹

Symbols, names in words, prefixes, powers, products and quotients; `°C` and `°F` with their zero. Nothing is evaluated,
and a unit that is not understood is a value of its own (`dimension` None) that keeps the words. pint is not used: it
is one more dependency that parses text of a model by evaluating it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

from pipeline.scoring.reading import plain_math, unwrapped

Dimension = tuple[tuple[str, int], ...]
LONGEST_UNIT, HIGHEST = 80, 12


@dataclass(frozen=True)
class Unit:
    r"""A unit taken apart: `$10^{6} \mathrm{~km/s}$` has ten 6, scale 1000 and dimension ((m, 1), (s, -1))."""

    ten: int  # the power of ten that is written in front of it
    scale: Fraction  # base units in one, without that power of ten
    dimension: Dimension | None  # None where the unit is not understood, () where there is no unit
    zero: Fraction = Fraction(0)  # of a temperature scale, in kelvin
    words: frozenset[str] = field(default=frozenset())  # of a unit that is not understood
    none: bool = False  # whether there is no unit at all


PREFIXES = {
    **dict(zip("TGMkhdcmnpf", (12, 9, 6, 3, 2, -1, -2, -3, -9, -12, -15), strict=True)),
    "µ": -6,
    "u": -6,
}
LONG_PREFIXES = dict(
    zip(
        ("tera", "giga", "mega", "kilo", "hecto", "deci", "centi", "milli", "micro", "nano", "pico", "femto"),
        (12, 9, 6, 3, 2, -1, -2, -3, -6, -9, -12, -15),
        strict=True,
    )
)
# a symbol, how many base units one is, and the base units with their powers; these take prefixes
_TAKE_PREFIXES = """
m 1 m; g 1/1000 kg; s 1 s; A 1 A; K 1 K; mol 1 mol; cd 1 cd; J 1 kg m2 s-2; N 1 kg m s-2; Pa 1 kg m-1 s-2
W 1 kg m2 s-3; V 1 kg m2 s-3 A-1; C 1 s A; F 1 kg-1 m-2 s4 A2; Ω 1 kg m2 s-3 A-2; T 1 kg s-2 A-1; H 1 kg m2 s-2 A-2
Wb 1 kg m2 s-2 A-1; S 1 kg-1 m-2 s3 A2; Hz 1 s-1; Bq 1 s-1; Gy 1 m2 s-2; Sv 1 m2 s-2; L 1/1000 m3; l 1/1000 m3
M 1000 mol m-3; bar 100000 kg m-1 s-2; eV 1.602176634e-19 kg m2 s-2; cal 4.184 kg m2 s-2; B 8 bit; bit 1 bit; rad 1
Wh 3600 kg m2 s-2; t 1000 kg; yr 31557600 s; pc 3.0856775814913673e16 m
"""
_TAKE_NONE = """
min 60 s; h 3600 s; hr 3600 s; d 86400 s; week 604800 s; month 2629800 s; y 31557600 s; decade 315576000 s
century 3155760000 s; ° 0.017453292519943295769; % 0.01; rev 6.283185307179586476925; ppm 1e-6; dozen 12
rpm 0.10471975511965977462 s-1; Å 1e-10 m; AU 149597870700 m; ly 9460730472580800 m; u 1.66053906660e-27 kg
in 0.0254 m; ft 0.3048 m; yd 0.9144 m; mi 1609.344 m; lb 0.45359237 kg; oz 0.028349523125 kg; gal 0.003785411784 m3
qt 0.000946352946 m3; ha 10000 m2; acre 4046.8564224 m2; cc 1e-6 m3; mph 0.44704 m s-1; kph 5/18 m s-1
atm 101325 kg m-1 s-2; Torr 133.322368421 kg m-1 s-2; mmHg 133.322387415 kg m-1 s-2; psi 6894.757293168 kg m-1 s-2
dyn 1e-5 kg m s-2; erg 1e-7 kg m2 s-2; G 1e-4 kg s-2 A-1; hp 745.69987158227 kg m2 s-3; D 3.33564e-30 m s A
$ 1 $; cent 0.01 $; € 1 €; £ 1 £; ¥ 1 ¥; ₹ 1 ₹
"""
# names in words and other ways to write a symbol; plurals in s and long prefixes are made
_WORDS = """
m: meter metre; g: gram gramme; s: second sec secs; A: ampere amp; K: kelvin; mol: mole; J: joule; N: newton; Pa: pascal
W: watt; V: volt; C: coulomb; F: farad; Ω: ohm; T: tesla; H: henry; Wb: weber; S: siemens; Hz: hertz hz; Bq: becquerel
Gy: gray; Sv: sievert; cd: candela; L: liter litre; M: molar; eV: electronvolt ev; cal: calorie; B: byte; rad: radian
t: tonne ton; yr: year yrs; pc: parsec; min: minute mins; h: hour hrs; d: day; week: weeks; month: months
century: centuries; °: degree deg; %: percent; rev: revolution; Å: angstrom ångström ångstrom; in: inch inches
ft: foot feet; yd: yard; mi: mile; lb: pound lbs; oz: ounce; gal: gallon; ha: hectare; qt: quart; atm: atmosphere
Torr: torr; dyn: dyne; G: gauss; hp: horsepower; D: debye; $: dollar usd; €: euro eur; £: gbp; ¥: yen jpy; ₹: rupee inr
µm: micron; mL: ml; cm: cms; km: kms; kg: kgs; u: amu; AU: au; kph: kmh kmph; kJ: kj; kHz: khz; MHz: mhz; kPa: kpa
cent: cents; decade: decades; acre: acres
"""


def _table(text: str) -> dict[str, tuple[Fraction, dict[str, int]]]:
    found = {}
    for entry in re.split(r"[;\n]", text.strip()):
        name, scale, *bases = entry.split()
        powers = [re.fullmatch(r"([^\d-]+)(-?[0-9]*)", base) for base in bases]
        found[name] = Fraction(scale), {power[1]: int(power[2] or 1) for power in powers if power}
    return found


_SI, _OTHERS = _table(_TAKE_PREFIXES), _table(_TAKE_NONE)
_NAMES = {
    word: symbol.strip()
    for symbol, _, words in (entry.partition(":") for entry in re.split(r"[;\n]", _WORDS.strip()))
    for word in words.split()
}
_NAMES |= {symbol.casefold(): symbol for symbol in ("kg", "km", "cm", "mm")}
_TEMPERATURES = {  # (kelvin in one degree, kelvin at zero)
    **dict.fromkeys(("°C", "celsius", "centigrade", "degC"), (Fraction(1), Fraction(27315, 100))),
    **dict.fromkeys(("°F", "fahrenheit", "degF"), (Fraction(5, 9), Fraction(45967, 180))),
}
_TEN = re.compile(r"\s*(?:×|\\times|times|x)?\s*10\s*\^\s*\{?\s*([+-]?[0-9]{1,3})\s*\}?\s*(?:\\cdot|\\times|×|·)?")
_TOKEN = re.compile(
    r"\s*(?:(?P<over>/|\bper\b)|(?P<dot>[·*⋅∙.]|\\cdot(?![A-Za-z])|\\times(?![A-Za-z])|×)|(?P<open>[({])|(?P<close>[)}])"
    r"|(?P<one>1(?=\s*/))"
    r"|(?P<name>°\s*[CFK](?![A-Za-z])|\\?[A-Za-zµÅåößΩ]+|[°%$€£¥₹])"
    r"(?P<power>\s*\^\s*\{?\s*[+-]?[0-9]{1,2}\s*\}?|[-−]?[0-9](?![0-9.]))?)"
)
_COMMANDS = {
    r"\Omega": "Ω",
    r"\ohm": "Ω",
    r"\mu": "µ",
    r"\micro": "µ",
    r"\AA": "Å",
    r"\angstrom": "Å",
    r"\celsius": "°C",
}


@lru_cache(maxsize=2048)
def _one(name: str) -> tuple[Fraction, dict[str, int]] | None:
    """(base units in one, their powers) of a symbol or a name; None where it is not known."""
    if name in _OTHERS or name in _SI:
        return _OTHERS.get(name) or _SI[name]
    if name[:1] in PREFIXES and name[1:] in _SI and (name[1:] not in ("rad", "M", "yr") or name[0] in "mµnMG"):
        scale, powers = _SI[name[1:]]
        return scale * Fraction(10) ** PREFIXES[name[0]], powers
    word = name.casefold()
    for written in (word, word.removesuffix("s"), word.removesuffix("es")):
        if written in _NAMES:
            return _one(_NAMES[written])
        for prefix, power in LONG_PREFIXES.items():
            symbol = _NAMES.get(written.removeprefix(prefix)) if written.startswith(prefix) else None
            if symbol in _SI:
                scale, powers = _SI[symbol]
                return scale * Fraction(10) ** power, powers
    return None


@lru_cache(maxsize=4096)  # the units of a data set are few; texts are as short as answers are
def unit_of(text: str) -> Unit:
    """The unit that a text begins with; words that follow it (`m tall`) are left out."""
    text = plain_math(unwrapped(text.replace("$", " $ ") if re.search(r"\$.*\$", text) else text))
    if re.search(r"\$.*\$", text):  # delimiters of a formula, not dollars
        text = text.replace("$", " ")
    text = _words(text).strip()
    match = _TEN.match(text)
    ten = int(match[1]) if match else 0
    rest = text[match.end() :] if match else text
    found = _compound(rest[: LONGEST_UNIT + 1])
    if found is None:
        words = frozenset(word.removesuffix("s") for word in re.findall(r"[^\W\d_]+", rest.casefold()))
        none = not words and ten == 0
        return Unit(ten, Fraction(1), () if none else None, words=words, none=none)
    scale, powers, zero = found
    return Unit(ten, scale, tuple(sorted((base, high) for base, high in powers.items() if high)), zero)


def _words(text: str) -> str:
    r"""Names of several words as one symbol, and `\frac{m}{s}` as a quotient."""
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"(\1)/(\2)", text)
    for command, symbol in _COMMANDS.items() if "\\" in text else ():
        text = re.sub(rf"{re.escape(command)}(?![A-Za-z])\s*", symbol, text)
    text = re.sub(r"(?:°|\bdeg(?:rees?)?)\s*(?:[Cc]elsius|[Cc]entigrade|C\b)", "°C", text)
    text = re.sub(r"(?:°|\bdeg(?:rees?)?)\s*(?:[Ff]ahrenheit|F\b)", "°F", text)
    text = re.sub(r"\b(?:square|sq\.?)\s+([A-Za-z]+)", r"\1^2", text)
    text = re.sub(r"\b(?:cubic|cu\.?)\s+([A-Za-z]+)", r"\1^3", text)
    text = re.sub(r"([A-Za-z]+)\s+squared\b", r"\1^2", text)
    text = re.sub(r"([A-Za-z]+)\s+cubed\b", r"\1^3", text)
    text = re.sub(r"\b(?:US|CA|AU)\s*(?:\$|dollars?\b)", "$", text)
    return re.sub(r"\b(electron|light)[\s-]+(volts?|years?)\b", lambda m: "eV" if m[1] == "electron" else "ly", text)


def _compound(text: str) -> tuple[Fraction, dict[str, int], Fraction] | None:
    """(scale, powers, zero) of a product or quotient; None where its first part is not known or it is malformed."""
    if len(text) > LONGEST_UNIT:
        return None
    scale, powers, zero = Fraction(1), dict[str, int](), Fraction(0)
    place, side, joined, count, depth = 0, 1, False, 0, 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            break
        if match["over"]:
            side, joined = -1, True
        elif match["dot"] and match["dot"] != ".":
            joined = True
        elif match["open"] or match["close"]:
            depth += 1 if match["open"] else -1
        elif match["name"]:
            name = match["name"].replace(" ", "").removeprefix("\\")
            word_follows = re.match(r"\s+[A-Za-z]{2,}", text[match.end() :]) is not None
            one = None if name in ("in", "a", "A") and count == 0 and word_follows else _one(name)
            temperature = _TEMPERATURES.get(name) or _TEMPERATURES.get(name.casefold())
            if temperature:
                one, zero = (temperature[0], {"K": 1}), temperature[1]
            power = int(re.sub(r"[\s^{}]", "", (match["power"] or "1").replace("−", "-")) or 1)
            if one is None:
                if count and not joined:
                    break  # "m tall": a word that is no part of the unit
                return None
            if abs(power) > HIGHEST:
                return None
            if count and not joined and re.fullmatch(r"(?:A|a|in|h|d|y|t|u)", name) and word_follows:
                break
            scale *= one[0] ** (side * power)
            for base, high in one[1].items():
                powers[base] = powers.get(base, 0) + side * power * high
            joined, count = False, count + 1
        elif match["dot"]:  # a full stop: the end, unless a unit follows at once
            if not re.match(r"[A-Za-zµΩ]", text[match.end() :]):
                break
            joined = True
        place = match.end()
    if not count or joined or depth:
        return None
    return scale, powers, zero if count == 1 and powers == {"K": 1} else Fraction(0)


def same_dimension(one: Unit, other: Unit) -> bool:
    """Whether both are understood and measure the same."""
    return one.dimension is not None and one.dimension == other.dimension


def converted(value: Fraction, given: Unit, wanted: Unit) -> Fraction:
    """`value` of the unit `given` in the unit `wanted` (of the same dimension), powers of ten left out."""
    return ((value * given.scale + given.zero) - wanted.zero) / wanted.scale
