"""Read the small JSON files of a step's folder: artifact, progress, owner, job and step.

    read_record(folder / "owner.json", LockHolder)   the dataclass; None where the file is missing
    record_or_none(folder / "progress.json", …)      the same; an invalid file counts as missing

Tolerant: unknown fields are ignored, missing fields take their defaults. Strict: a value of another type or a number
that is not finite raises `InvalidRecord`. So does a file that is too large or not regular. It raises no other error.
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
MAX_BYTES = 64 << 20  # bytes; the largest record, the artifact of a step with many files, has about 1 MiB
MAX_NUMBER = 2.0**63  # bound of every number, so that dates and durations can be computed
ATTEMPTS = 3  # reads of a file whose handle a network file system reports as stale
RETRY_DELAY = 0.1  # seconds between attempts


class InvalidRecord(ArtifactError):
    """A record file that exists and cannot be used."""

    path = Path()
    problem = ""


def invalid_record(path: Path, problem: str) -> InvalidRecord:
    """Return the error for a file, with its path and problem as attributes."""
    error = InvalidRecord(f"{path}: {problem}")
    error.path, error.problem = path, problem
    return error


def read_record(
    path: Path, kind: type[T], upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None = None, **given: Any
) -> T | None:
    """Return the record in a file; None where the file is missing. Raises InvalidRecord.

    `upgrade` converts the object of an earlier version to the present one. `given` supplies fields that are not in the
    file.
    """
    value = read_mapping(path)
    if value is None:
        return None
    value = upgrade(value) if upgrade else value
    hints = typing.get_type_hints(kind)
    fields = dict(given)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in given:
            continue
        if field.name in value:
            fields[field.name] = _value(hints[field.name], value[field.name], path, field.name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise invalid_record(path, f"{field.name}: missing; expected {_type_name(hints[field.name])}")
    return kind(**fields)


def record_or_none(path: Path, kind: type[T]) -> T | None:
    """Return the record in a file; None where the file is missing or invalid."""
    try:
        return read_record(path, kind)
    except InvalidRecord:
        return None


def read_mapping(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None where the file is missing. Raises InvalidRecord for anything else."""
    text, problem = _text(path)
    if text is None and not problem:
        return None
    if text is None:
        raise invalid_record(path, problem)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # also an integer of more digits than Python reads
        content = "incomplete JSON" if text.strip() else "an empty file"
        raise invalid_record(path, f"got {content}; expected a JSON object") from None
    if not isinstance(value, dict):
        raise invalid_record(path, f"got {_name(value)}; expected a JSON object")
    return value


def _text(path: Path) -> tuple[str | None, str]:
    """Return a file's text and ""; None and the problem otherwise, which is "" where the file is missing."""
    for attempt in range(ATTEMPTS):
        try:
            return read_text(path, MAX_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return None, ""
        except OSError as error:
            if error.errno == errno.ESTALE and attempt + 1 < ATTEMPTS:  # replaced on the server: open it again
                time.sleep(RETRY_DELAY)
                continue
            return None, f"cannot be read ({error.strerror})"
    raise AssertionError("unreachable")


def _value(kind: Any, value: Any, path: Path, name: str) -> Any:
    """Return a JSON value as a field's type. Raises InvalidRecord for a value of another type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (kind,) = (arg for arg in args if arg is not type(None))
        return _value(kind, value, path, name)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(args[0], item, path, name) for item in value)
    if origin is dict and isinstance(value, dict):
        # figures may be NaN, so that the loss of a diverged run is shown
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
        return " or ".join(_type_name(arg) for arg in typing.get_args(kind) if arg is not type(None)) + " or null"
    return names.get(kind) or ("a list" if origin is tuple else "a mapping")


def _name(value: Any) -> str:
    """Return a short name of a value for a message: the type of a container, the beginning of a text."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= MAX_NUMBER:
        return "a number of too many digits"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
