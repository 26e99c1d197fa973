"""Every setting with its type, its default and what it means, made from the dataclasses and the YAML files.

    python -m pipeline.config.reference        writes docs/settings.md and docs/settings.schema.json (scripts/reference)

The type of a setting and its comment stand in recipe.py, cluster.py and site.py, its default in configs/base.yaml and
configs/clusters/local.yaml; this joins them. The schema is for editors: it knows names, types and choices, not limits.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import re
import tokenize
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from pipeline.config.cluster import CLUSTERS, Cluster
from pipeline.config.recipe import CONFIGS, Recipe
from pipeline.core.errors import run_main
from pipeline.core.schema import Constraint

DOCS = Path("docs")
HEAD = """# Settings

Made by `scripts/reference` from the types in `pipeline/config/` and the defaults in `configs/`. A recipe is a YAML file
in `configs/`, a cluster one in `configs/clusters/`; on the command line a setting is `key=value`, that of a cluster
`cluster.key=value`. Editors complete and check a file that begins with
`# yaml-language-server: $schema=../docs/settings.schema.json`. The settings under `task.params` are the task's own:
`python -m pipeline list`.
"""


@dataclass(frozen=True)
class Setting:
    key: str
    kind: str
    default: str
    about: str


def settings_of(cls: type, defaults: Any, path: str = "") -> Iterator[Setting]:
    """The settings of a dataclass, those of the dataclasses in it too, in their order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    comments = _comments(cls)
    for field in dataclasses.fields(cls):
        key, kind = f"{path}{field.name}", hints[field.name]
        value = defaults.get(field.name, dataclasses.MISSING) if isinstance(defaults, dict) else dataclasses.MISSING
        below = _dataclass_in(kind)
        if below is not None:
            optional = type(None) in typing.get_args(kind)
            if optional:
                yield Setting(key, _words(kind), _shown(value), comments.get(field.name, ""))
            yield from settings_of(below, value, f"{key}.")
        else:
            yield Setting(key, _words(kind), _shown(value), comments.get(field.name, ""))


def _dataclass_in(kind: Any) -> type | None:
    """The dataclass that a setting is or may be; None for values, lists and free mappings."""
    members = typing.get_args(kind) if _is_union(kind) else (kind,)
    return next((one for one in members if dataclasses.is_dataclass(one) and isinstance(one, type)), None)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _comments(cls: type) -> dict[str, str]:
    """The comment behind each field of a dataclass."""
    found: dict[str, str] = {}
    name = ""
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(cls)).readline):
        if token.type == tokenize.NAME and not token.line[: token.start[1]].strip():
            name = token.string
        elif token.type == tokenize.COMMENT and token.line[: token.start[1]].strip():
            found[name] = token.string.removeprefix("#").strip()
    return found


_LINE = re.compile(r"(?P<indent> *)(?P<key>\w+):(?P<value>(?:[^#\"]|\"[^\"]*\")*?)(?:\s+#\s*(?P<comment>.*))?$")


def _yaml_comments(file: Path) -> dict[str, str]:
    """The comment behind each setting of a YAML file, by its path."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        depth = len(match["indent"])
        path = [*(part for part in path if part[0] < depth), (depth, match["key"])]
        if match["comment"]:
            found[".".join(name for _, name in path)] = match["comment"]
    return found


_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "any"}


def _words(kind: Any) -> str:
    """A type in words: `a whole number ≥ 1 or null`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return next((check.words for check in args[1:] if isinstance(check, Constraint)), _words(args[0]))
    if _is_union(kind):
        return " or ".join(_words(one) for one in args)
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in args)
    if origin is tuple:
        return f"list of {_words(args[0])}"
    if origin is dict:
        return f"mapping of names to {'settings' if dataclasses.is_dataclass(args[1]) else _words(args[1])}"
    if dataclasses.is_dataclass(kind):
        return "settings"
    return _NAMES.get(kind, str(kind))


def _shown(value: Any) -> str:
    if value is dataclasses.MISSING or value == "???":
        return ""
    text = json.dumps(value, ensure_ascii=False)
    return f"`{text}`" if len(text) <= 60 else "see the file"


def schema_of(kind: Any) -> dict[str, Any]:
    """The JSON schema of a type. No name is required: a file holds what it changes."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return schema_of(args[0])
    if _is_union(kind):
        return {"anyOf": [schema_of(one) for one in args]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is tuple:
        return {"type": "array", "items": schema_of(args[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema_of(args[1])}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind, include_extras=True)
        comments = _comments(kind)
        fields = {
            field.name: schema_of(hints[field.name])
            | ({"description": comments[field.name]} if field.name in comments else {})
            for field in dataclasses.fields(kind)
        }
        return {"type": "object", "properties": fields, "additionalProperties": False}
    simple = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
    return {"type": simple[kind]} if kind in simple else {}


def page() -> str:
    """docs/settings.md."""
    parts = [HEAD]
    for title, cls, file in (
        ("A recipe", Recipe, CONFIGS / "base.yaml"),
        ("A cluster", Cluster, CLUSTERS / "local.yaml"),
    ):
        defaults = yaml.safe_load(file.read_text(encoding="utf-8"))
        comments = _yaml_comments(file)
        rows = []
        for one in settings_of(cls, defaults):
            about = (one.about or comments.get(one.key, "")).replace("|", "/")
            rows.append(f"| `{one.key}` | {one.kind} | {one.default} | {about} |")
        parts.append(
            "\n".join([f"## {title}", "", f"Defaults: `{file}`.", "", "| setting | type | default | meaning |"])
            + "\n|---|---|---|---|\n"
            + "\n".join(row.replace("\n", " ") for row in rows)
            + "\n"
        )
    return "\n".join(parts)


def schema() -> dict[str, Any]:
    """docs/settings.schema.json: a file of configs/ or of configs/clusters/."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Therefore: a recipe or a cluster",
        "anyOf": [schema_of(Recipe), schema_of(Cluster)],
    }


def main() -> None:
    (DOCS / "settings.md").write_text(page(), encoding="utf-8")
    (DOCS / "settings.schema.json").write_text(json.dumps(schema(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
