"""What the installed libraries know, read from their source: importing them would take seconds.

    values("transformers", "trainer_utils.py", "SchedulerType")     the names of an enumeration

Preflight asks, so that a name that a library has changed is told on the login node and not by a job. A package that is
not there knows nothing: an empty answer.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

GIVEN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")  # to a schedule, by the trainer


@cache
def _source(package: str, file: str) -> ast.Module:
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec and spec.origin else Path(file)
    return ast.parse(path.read_text(encoding="utf-8") if path.is_file() else "")


def values(package: str, file: str, name: str) -> list[str]:
    """The strings of an enumeration."""
    classes = (node for node in _source(package, file).body if isinstance(node, ast.ClassDef) and node.name == name)
    found = (node.value for each in classes for node in each.body if isinstance(node, ast.Assign))
    return [value.value for value in found if isinstance(value, ast.Constant) and isinstance(value.value, str)]


def fields(package: str, file: str) -> set[str]:
    """The fields of the dataclasses in a file."""
    classes = (node for node in _source(package, file).body if isinstance(node, ast.ClassDef))
    found = (node.target for each in classes for node in each.body if isinstance(node, ast.AnnAssign))
    return {field.id for field in found if isinstance(field, ast.Name)}


def passed(package: str, file: str, name: str) -> set[str]:
    """The keywords that a file calls `name` with, or the keys of the dict that its function `name` returns."""
    found: set[str] = set()
    for node in ast.walk(_source(package, file)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            found |= {word.arg for word in node.keywords if word.arg}
        if isinstance(node, ast.FunctionDef) and node.name == name:
            returned = (part.value for part in ast.walk(node) if isinstance(part, ast.Return))
            keys = (key for value in returned if isinstance(value, ast.Dict) for key in value.keys)
            found |= {str(key.value) for key in keys if isinstance(key, ast.Constant)}
    return found


@cache
def compared(package: str, file: str, name: str) -> tuple[str, ...]:
    """The strings that a file compares `self.name` with: what it knows to do something about."""
    found: dict[str, None] = {}
    for node in ast.walk(_source(package, file)):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr == name:
            parts = (part for side in node.comparators for part in ast.walk(side))
            found |= {
                part.value: None for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)
            }
    return tuple(found)


def schedule_arguments(name: str) -> dict[str, bool] | None:
    """The arguments of a learning-rate schedule of transformers, and whether each has to be given; None: unknown."""
    source = _source("transformers", "optimization.py")
    table: dict[str, str] = {}
    for node in ast.walk(source):  # {SchedulerType.COSINE: get_cosine_schedule_with_warmup, …}
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            table |= {
                k.attr.lower(): v.id for k, v in pairs if isinstance(k, ast.Attribute) and isinstance(v, ast.Name)
            }
    functions = {node.name: node.args for node in source.body if isinstance(node, ast.FunctionDef)}
    takes = functions.get(table.get(name, ""))
    if takes is None or takes.kwarg:
        return None
    names = [argument.arg for argument in takes.args]
    needed = names[: len(names) - len(takes.defaults)]
    return {name: name in needed for name in names if name not in GIVEN}
