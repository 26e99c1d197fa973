"""From plain YAML values to frozen dataclasses, with every problem found at once.

`parse(Recipe, values)` checks names, types and the `Constraint` of each annotated field, and returns the typed object
with the list of what is wrong, each as `sft.learning_rate: got 'fast'; expected a number > 0`. The dataclass is the
schema: no other list of keys exists. Values are never guessed: a missing key is a problem, not a default, except for
fields that were `added` later.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pipeline import former_names
from pipeline.core.errors import did_you_mean

T = TypeVar("T")
MISSING = object()


def added(neutral: Any) -> Any:
    """A dataclass field that came after records were first written: `field: Type = added(neutral)`.

    `neutral` is the behaviour from before the field existed. Older records are read as if they held it, and
    `hashing.plain` leaves the field out while it is neutral, so a finished step stays finished.
    """
    metadata = {"added": True}
    if isinstance(neutral, dict):
        return dataclasses.field(default_factory=lambda: dict(neutral), metadata=metadata)
    return dataclasses.field(default=neutral, metadata=metadata)


def is_neutral(field: dataclasses.Field[Any], value: Any) -> bool:
    """Whether a field was `added` and holds its neutral value."""
    if not field.metadata.get("added"):
        return False
    factory = field.default_factory
    return bool(value == (field.default if factory is dataclasses.MISSING else factory()))


@dataclass(frozen=True)
class Constraint:
    """What a value must be, in words and as a test: `Annotated[int, Constraint("a whole number > 0", ...)]`."""

    words: str
    test: Callable[[Any], bool]


MAX_INT = 2**32 - 1  # of a whole number: more rows, steps or tokens than any run has, and few enough to compute with
NonNegativeInt = Annotated[int, Constraint("a whole number ≥ 0", lambda v: v >= 0)]
PositiveInt = Annotated[int, Constraint("a whole number ≥ 1", lambda v: v >= 1)]
PositiveFloat = Annotated[float, Constraint("a number > 0", lambda v: v > 0)]
NonNegativeFloat = Annotated[float, Constraint("a number ≥ 0", lambda v: v >= 0)]
Fraction = Annotated[float, Constraint("a number from 0 to 1", lambda v: 0 <= v <= 1)]

FORMER = {  # what a task that someone wrote may import
    "Positive": "PositiveInt",
    "Count": "NonNegativeInt",
    "Rate": "PositiveFloat",
    "NonNegative": "NonNegativeFloat",
    "Share": "Fraction",
    "Check": "Constraint",
    "build": "parse",
}
if not TYPE_CHECKING:  # a type checker shall know the present names only
    __getattr__ = former_names(__name__, FORMER)


RESERVED = ("evaluations", "exports")  # folders of runs/ that belong to no recipe


def is_name(text: str) -> bool:
    """Whether a text can be the name of a folder or file: it stays in its place and needs no escapes."""
    return bool(re.fullmatch(r"\w[\w .+=@,-]*", text)) and len(text) <= 100 and text not in RESERVED


Name = Annotated[
    str,
    Constraint(
        "a name: letters, digits and _ . - + = @ or spaces, at most 100, the first a letter or digit, and not "
        f"{' or '.join(RESERVED)}",
        is_name,
    ),
]


def parse(cls: type[T], values: Any, path: str = "") -> tuple[T | None, list[str]]:
    """The typed object, or None where something is wrong, and the problems, each with its full path."""
    problems: list[str] = []
    result = _value(cls, values, path, problems)
    return (None if problems else result), problems


def _value(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _free(value, path, problems)
    if origin is Annotated:
        return _checked(args[0], args[1:], value, path, problems)
    if origin in (typing.Union, types.UnionType):
        return _union(args, value, path, problems)
    if origin is Literal:
        if value in args and type(value) in {type(arg) for arg in args}:
            return value
        problems.append(f"{path}: got {_shown(value)}; expected one of its values; {_menu(value, args)}")
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_value(args[0], item, f"{path}[{i}]", problems) for i, item in enumerate(value))
        problems.append(f"{path}: got {_shown(value)}; expected a list. Fix: {path}=[{value}]")
    elif origin is dict:
        if isinstance(value, Mapping):
            problems += _key_problems(value, path)
            return {str(key): _value(args[1], item, f"{path}.{key}", problems) for key, item in value.items()}
        problems.append(f"{path}: got {_shown(value)}; expected a mapping of names to values")
    elif dataclasses.is_dataclass(kind):
        return _dataclass(typing.cast(type, kind), value, path, problems)
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _finite(value, path, problems)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        if kind is int and abs(value) > MAX_INT:
            problems.append(f"{path}: got {_shown(value)}; expected a whole number of at most {MAX_INT}")
            return None
        return _text(value, path, problems) if isinstance(value, str) else value
    else:
        problems.append(f"{path}: got {_shown(value)}; expected {_NAMES.get(kind, kind.__name__)}")
    return None


def _finite(value: float, path: str, problems: list[str]) -> float | None:
    """A number as a float; one that is infinite, not a number, or too large for a float is a problem."""
    try:
        if math.isfinite(float(value)):
            return float(value)
    except OverflowError:
        pass
    problems.append(f"{path}: got {_shown(value)}; expected a finite number")
    return None


def _text(value: str, path: str, problems: list[str]) -> str:
    """A text that UTF-8 can write: half of a surrogate pair cannot be hashed or saved."""
    if any("\ud800" <= character <= "\udfff" for character in value):
        problems.append(f"{path}: got {_shown(value)}; expected a text in UTF-8, but it contains bytes that are not")
    return value


def _free(value: Any, path: str, problems: list[str]) -> Any:
    """A value without a declared type: it must still have a written form, or it could not be hashed."""
    if isinstance(value, Mapping):
        problems += _key_problems(value, path)
        return {str(key): _free(item, f"{path}.{key}", problems) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_free(item, f"{path}[{index}]", problems) for index, item in enumerate(value)]
    if isinstance(value, float):
        return _finite(value, path, problems)
    if isinstance(value, str):
        return _text(value, path, problems)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MAX_INT:
        problems.append(f"{path}: got {_shown(value)}; expected a whole number of at most {MAX_INT}")
    elif not (value is None or isinstance(value, int)):
        problems.append(f"{path}: got {_shown(value)}; expected a text, number, list or mapping")
    return value


def _key_problems(value: Mapping[Any, Any], path: str) -> list[str]:
    return [
        f"{path}: got the name {key!r}; expected a text. Fix: write it in quotes"
        for key in value
        if not isinstance(key, str)
    ]


def is_free_mapping(cls: type, path: str) -> bool:
    """Whether the setting at `path` of a dataclass is a mapping whose names the class does not fix."""
    kinds: list[Any] = [cls]
    for name in path.split("."):
        below: list[Any] = []
        for kind in _members(kinds):
            if kind is Any:
                return True
            if dataclasses.is_dataclass(kind):
                hints = typing.get_type_hints(kind, include_extras=True)
                below += [hints[name]] if name in hints else []
            elif typing.get_origin(kind) is dict:
                below.append(typing.get_args(kind)[1])
        kinds = below
    return any(kind is Any or typing.get_origin(kind) is dict for kind in _members(kinds))


def _members(kinds: list[Any]) -> list[Any]:
    """The members of unions and what annotations are on."""
    found: list[Any] = []
    for kind in kinds:
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if origin is Annotated:
            found += _members([args[0]])
        elif origin in (typing.Union, types.UnionType):
            found += _members(list(args))
        else:
            found.append(kind)
    return found


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}


def _checked(kind: Any, checks: tuple[Any, ...], value: Any, path: str, problems: list[str]) -> Any:
    before = len(problems)
    result = _value(kind, value, path, problems)
    number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if len(problems) > before and kind in (int, float) and number:
        return None  # beyond all bounds, which says more than the check's words
    for check in checks:
        if len(problems) > before or not check.test(result):
            del problems[before:]
            problems.append(f"{path}: got {_shown(value)}; expected {check.words}")
            return None
    return result


def _union(kinds: tuple[Any, ...], value: Any, path: str, problems: list[str]) -> Any:
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    found: list[list[str]] = []
    for kind in others:
        tried: list[str] = []
        result = _value(kind, value, path, tried)
        if not tried:
            return result
        found.append(tried)
    mapping = [
        tried
        for kind, tried in zip(others, found, strict=True)
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping)
    ]
    problems.extend((mapping or found)[0])  # the first kind says it best; words that may stand instead follow it
    words = [word for kind in others[1:] for word in typing.get_args(kind) if isinstance(word, str)]
    if words:
        problems[-1] += f", or {' or '.join(words)}"
    return None


@dataclass(frozen=True)
class Renames:
    """Settings that had another name, and choices that had another word.

    `names` maps a former path to the present one, "" where the setting is gone: `{"evaluate.draws":
    "report.bootstrap_samples"}`; `phases[].traces` is a setting of each item of a list. `choices` maps a present path
    to its former words. A dataclass with a classmethod `renames(values)` is read under either name.
    """

    names: Mapping[str, str]
    choices: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    prefix: str = ""  # of the paths in a notice

    def including(self, other: Renames, path: str) -> Renames:
        """Return these and those of the mapping at `path`."""
        names = {f"{path}.{old}": f"{path}.{new}" if new else "" for old, new in other.names.items()}
        choices = {f"{path}.{name}": words for name, words in other.choices.items()}
        return dataclasses.replace(self, names={**self.names, **names}, choices={**self.choices, **choices})

    def apply(self, values: Any) -> tuple[Any, list[str]]:
        """Return the values under their present names, and a notice for each former one.

        Where a former and the present name are both set, the present one counts.
        """
        notices, at = [], self.prefix
        for old, new in self.names.items():
            values, found = _moved(values, old.split("."), new.split(".") if new else [])
            if found:
                now = f"now {at}{new}; the former name is read in this version" if new else "gone, and is ignored"
                notices.append(f"{at}{old} is {now}")
        for path, words in self.choices.items():
            values, found_words = _reworded(values, path.split("."), words)
            notices += [f"{at}{path}={word} is now {at}{path}={words[word]}" for word in found_words]
        return values, notices

    def undo(self, values: Any) -> Any:
        """Return values that have the present names under the former ones; what is gone stays so."""
        back = {new: old for old, new in self.names.items() if new}
        choices = {back.get(path, path): {new: old for old, new in of.items()} for path, of in self.choices.items()}
        return Renames(back, choices).apply(values)[0]


def value_at(values: Any, path: str) -> Any:
    """Return what stands at a dotted path of nested mappings; None where nothing does."""
    for name in path.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return None
        values = values[name]
    return values


def _moved(values: Any, old: list[str], new: list[str]) -> tuple[Any, bool]:
    """(the values with what stood at path `old` at path `new`, whether anything did)."""
    first, *rest = old
    key = first.removesuffix("[]")
    if not isinstance(values, Mapping) or key not in values:
        return values, False
    below = values[key]
    if rest and new and first == new[0]:
        if key == first:
            below, found = _moved(below, rest, new[1:])
        else:
            items = [_moved(item, rest, new[1:]) for item in below] if isinstance(below, list | tuple) else []
            below, found = [item for item, _ in items], any(moved for _, moved in items)
        return ({**values, key: below} if found else values), found
    if rest:
        below, found = _taken(below, rest)
        if found is MISSING:
            return values, False
        kept = {**values, key: below}
    else:
        kept, found = {name: item for name, item in values.items() if name != key}, below
    return (_given(kept, new, found) if new else kept), True


def _taken(values: Any, path: list[str]) -> tuple[Any, Any]:
    """(the values without what stood at a path, what stood there or MISSING)."""
    first, *rest = path
    if not isinstance(values, Mapping) or first not in values:
        return values, MISSING
    if not rest:
        return {name: item for name, item in values.items() if name != first}, values[first]
    below, found = _taken(values[first], rest)
    return {**values, first: below}, found


def _given(values: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    first, *rest = path
    if not rest:
        return {first: value, **values}
    below = values.get(first)
    return {**values, first: _given(below if isinstance(below, Mapping) else {}, rest, value)}


def _reworded(values: Any, path: list[str], words: Mapping[str, str]) -> tuple[Any, list[str]]:
    """(the values with the present word at a path, the former word that stood there)."""
    first, *rest = path
    if not isinstance(values, Mapping) or first not in values:
        return values, []
    if rest:
        below, found = _reworded(values[first], rest, words)
    else:
        word = values[first]
        below, found = (words[word], [word]) if isinstance(word, str) and word in words else (word, [])
    return ({**values, first: below} if found else values), found


def _dataclass(cls: type, value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{path or 'the file'}: got {_shown(value)}; expected a mapping of settings")
        return None
    if renames := getattr(cls, "renames", None):
        value, _ = renames(value).apply(value)
    hints = typing.get_type_hints(cls, include_extras=True)
    names = [field.name for field in dataclasses.fields(cls)]
    before = len(problems)
    for key in value:
        if key not in names:
            problems.append(f"{_join(path, str(key))}: unknown setting; {did_you_mean(str(key), names)}")
    found = {}
    for name in names:
        if name in value:
            found[name] = _value(hints[name], value[name], _join(path, name), problems)
        elif (default := _default(cls, name)) is not MISSING:
            found[name] = default
        else:
            problems.append(f"{_join(path, name)}: missing")
    return None if len(problems) > before else cls(**found)


def _default(cls: type, name: str) -> Any:
    field = next(f for f in dataclasses.fields(cls) if f.name == name)
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shown(value: Any) -> str:
    """A value in a message: short, also where it is an integer of more digits than Python prints."""
    if isinstance(value, int) and value.bit_length() > 400:
        return f"a number of about {int(value.bit_length() * 0.30103)} digits"
    text = "null" if value is None else repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _menu(value: Any, options: tuple[Any, ...]) -> str:
    return did_you_mean(str(value), [str(option) for option in options])
