"""The reader of the small JSON files in a step's folder: artifact, progress, owner, job and step.

    read_record(folder / "owner.json", Owner)   the dataclass; None where the file is missing; InvalidRecord otherwise
    record_or_none(folder / "progress.json", …)    the same, an odd file counts as missing

Tolerant: fields that this version does not know are ignored, fields that it lacks take their defaults. Strict: a value
of another type, a number that is not finite, a file that is too large or no regular file is an `InvalidRecord` with one
sentence. Never a traceback, whatever the file holds.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import time
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pipeline.core.errors import ArtifactError
from pipeline.core.files import read_text

T = TypeVar("T")
MAX_BYTES = 64 << 20  # bytes: the artifact of a step with many files is the largest, about one
MAX_NUMBER = 2.0**63  # of a number, so that dates and durations can be computed
ATTEMPTS = 3  # for a file whose handle a network file system calls stale
RETRY_DELAY = 0.1  # seconds between them


class InvalidRecord(ArtifactError):
    """A file that exists and cannot be used."""

    path = Path()
    problem = ""


def invalid_record(path: Path, problem: str) -> InvalidRecord:
    error = InvalidRecord(f"{path}: {problem}")
    error.path, error.problem = path, problem
    return error


def read_record(
    path: Path, kind: type[T], upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None = None, **given: Any
) -> T | None:
    """The record in a file; None where there is no such file.

    `upgrade` turns the object of an earlier version into a present one; `given` are fields that the file does not hold.
    """
    value = read_mapping(path)
    if value is None:
        return None
    value = upgrade(value) if upgrade else value
    hints = typing.get_type_hints(kind)
    found = dict(given)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in given:
            continue
        if field.name in value:
            found[field.name] = _value(hints[field.name], value[field.name], path, field.name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise invalid_record(path, f"{field.name}: missing; expected {_type_name(hints[field.name])}")
    return kind(**found)


def record_or_none(path: Path, kind: type[T]) -> T | None:
    """The record in a file; None where there is none that can be used."""
    try:
        return read_record(path, kind)
    except InvalidRecord:
        return None


def read_mapping(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no such file. InvalidRecord for anything else."""
    text, problem = _text(path)
    if text is None and not problem:
        return None
    if text is None:
        raise invalid_record(path, problem)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # also an integer of more digits than Python reads
        what = "is half-written" if text.strip() else "is empty"
        raise invalid_record(path, f"{what}; expected a JSON object") from None
    if not isinstance(value, dict):
        raise invalid_record(path, f"got {_name(value)}; expected a JSON object")
    return value


def _text(path: Path) -> tuple[str | None, str]:
    """A file's text; None and no problem where it is missing."""
    for attempt in range(ATTEMPTS):
        try:
            return read_text(path, MAX_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return None, ""
        except OSError as error:
            if error.errno == errno.ESTALE and attempt + 1 < ATTEMPTS:  # replaced on the server: opening it again helps
                time.sleep(RETRY_DELAY)
                continue
            return None, f"cannot be read ({error.strerror})"
    raise AssertionError("unreachable")


def _value(kind: Any, value: Any, path: Path, name: str) -> Any:
    """The value as a field's type has it; InvalidRecord where it is not of that type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (kind,) = (one for one in args if one is not type(None))
        return _value(kind, value, path, name)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(args[0], item, path, name) for item in value)
    if origin is dict and isinstance(value, dict):
        # figures may be NaN: a loss that broke down is worth showing
        return {key: _value(args[1], item, path, f"{name}.{key}") for key, item in value.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        if all(key in value for key in hints):
            return kind(**{key: _value(hint, value[key], path, f"{name}.{key}") for key, hint in hints.items()})
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) < MAX_NUMBER or (isinstance(value, float) and "." in name and not math.isfinite(value)):
            return float(value)
    elif kind is int and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) < MAX_NUMBER:
            return value
    elif kind in (str, bool) and isinstance(value, kind):
        return value
    raise invalid_record(path, f"{name}: got {_name(value)}; expected {_type_name(kind)}")


def _type_name(kind: Any) -> str:
    names = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(one) for one in typing.get_args(kind) if one is not type(None)) + " or null"
    return names.get(kind) or ("a list" if origin is tuple else "a mapping")


def _name(value: Any) -> str:
    """A value in a message, short: the type of a container, the beginning of a text."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= MAX_NUMBER:
        return "a number of too many digits"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
