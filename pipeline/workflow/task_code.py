"""Hash the code that decides rows, grades and rewards, to report finished steps whose code has changed since.

A fingerprint does not include it, because a changed comment must not repeat ten hours of training. An artifact records
it under `provenance["code"]`. `plan`, `run` and `status` report a finished step whose code has changed, and
`run --refresh` repeats such steps. The stages' own code has a revision (stage.py), which the fingerprint includes.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pipeline.rewards
import pipeline.scoring
import pipeline.tasks
from pipeline.core.hashing import FINGERPRINT_LENGTH
from pipeline.core.records import InvalidRecord, read_mapping
from pipeline.workflow.artifact import ARTIFACT, STEP

# the readers of model text, which decide grades
READERS = tuple(
    f"pipeline.scoring.{name}"
    for name in ("answers", "verdicts", "quantities", "arithmetic", "units", "expressions", "reading")
)
# of no one task or reward: they count by the stages' revisions
FRAMEWORK = ("pipeline.tasks.task", "pipeline.tasks.rows", "pipeline.tasks.row_files", "pipeline.rewards.reward")
FOLDERS = {"pipeline.tasks": pipeline.tasks.__path__, "pipeline.rewards": pipeline.rewards.__path__}


def code_of(stage: str, task: str, rewards: Iterable[str]) -> dict[str, str]:
    """Return the modules that decide a stage's rows, grades and rewards, each path with its hash.

    `rewards` are the names that the recipe lists. Empty for a stage that uses no task code.
    """
    of_task, of_rewards = f"pipeline.tasks.{task}", [f"pipeline.rewards.{name}" for name in rewards]
    first = {
        "preprocess": [of_task],
        "grpo": [of_task, *of_rewards, *READERS],
        "evaluate": [of_task, *READERS],
    }
    found: dict[str, str] = {}
    for name, path in sorted(_reachable(first.get(stage, [])).items()):
        place = name.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")
        found[place] = _module(path, name, path.stat().st_mtime_ns)[0]
    return found


def code_changes(folder: Path, stage: str, task: str, rewards: Iterable[str]) -> list[str]:
    """Return the modules that have changed since the finished step of this folder ran.

    Empty also for a step that recorded none, because an earlier version made it.
    """
    before = recorded_code(folder)
    if before is None:
        return []
    now = code_of(stage, task, rewards)
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def code_changes_of(folder: Path) -> list[str]:
    """Do the same for a folder alone: its step.json names stage, task and rewards."""
    try:
        record: Any = read_mapping(folder / STEP)
        recipe = record["recipe"]
        return code_changes(folder, record["stage"], recipe["task"]["name"], list(recipe["grpo"]["rewards"]))
    except (TypeError, KeyError, InvalidRecord):  # not a step of this version, which is reported elsewhere
        return []


def recorded_code(folder: Path) -> dict[str, Any] | None:
    """Return the code hashes that a folder's artifact recorded; None without an artifact or without such a record."""
    try:
        record = read_mapping(folder / ARTIFACT) or {}
    except InvalidRecord:  # which counts as none
        return None
    provenance = record.get("provenance")
    code = provenance.get("code") if isinstance(provenance, dict) else None
    return code if isinstance(code, dict) else None


def _reachable(names: Sequence[str]) -> dict[str, Path]:
    """Return these modules, and those of tasks and rewards that they import, with their files."""
    found: dict[str, Path] = {}
    left = list(names)
    while left:
        name = left.pop()
        path = None if name in found or name in FRAMEWORK else _file_of(name)
        if path:
            found[name] = path
            left += _module(path, name, path.stat().st_mtime_ns)[1]
    return found


def _file_of(name: str) -> Path | None:
    """Find the file of a module without importing anything."""
    if name in READERS:
        return Path(pipeline.scoring.__path__[0]) / f"{name.rpartition('.')[2]}.py"
    package = ".".join(name.split(".")[:2])
    for folder in FOLDERS.get(package, ()):
        path = Path(folder).joinpath(*name.split(".")[2:])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


@lru_cache(maxsize=256)
def _module(path: Path, name: str, changed: int) -> tuple[str, list[str]]:
    """Hash a module without comments, docstrings and positions; list the modules of FOLDERS that it imports."""
    tree = _tree(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    wanted = tuple(f"{folder}." for folder in FOLDERS)
    imported = [other for other in _imports(tree, package) if other.startswith(wanted)]
    return hashlib.sha256(repr(_plain(tree)).encode()).hexdigest()[:FINGERPRINT_LENGTH], imported


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    """Yield every imported name of a module of this package that may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _tree(path: Path) -> ast.Module:
    """Parse a file; one that is not Python becomes its text, so that a change of it shows."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):
        return ast.Module([ast.Pass(), ast.Expr(ast.Constant(text))], [])


def _plain(node: Any) -> Any:
    """Turn a syntax tree into nested tuples, without empty fields: later Pythons add some, and the hash has to stay."""
    if isinstance(node, list):
        return tuple(_plain(item) for item in node)
    if not isinstance(node, ast.AST):
        return node
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            value = value[1:] if _is_docstring(value) else value
        if value not in (None, []) and name != "ctx":
            fields.append((name, _plain(value)))
    return (type(node).__name__, *fields)


def _is_docstring(body: list[ast.stmt]) -> bool:
    first = body[0] if body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
