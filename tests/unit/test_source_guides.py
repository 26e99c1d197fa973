"""docs/source-guides.md: no empty row, and every value it names is the recipe's."""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.cluster import read_cluster
from pipeline.config.recipe import Recipe, read
from pipeline.workflow.plan import with_task_params

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "source-guides.md").read_text(encoding="utf-8")
SECTIONS = {"1": "gsm8k", "2": "math_science", "3": "deepseek7b", "4": "medical", "5": "human_like"}
SETTING = re.compile(r"`([a-z_][\w.]*)` = `([^`]*)`( \(not in the guide)?")
OVERRIDE = re.compile(r"`([a-z_]+\.[\w.]+=[^`]+)`")


def table(number: str) -> list[list[str]]:
    """The cells of a section's table, its head left out."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)[int(number)]
    assert section.startswith(f"{number}. ")
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]


def value_of(text: str) -> Any:
    """A value as YAML reads it; `2e-5` is a number too."""
    try:
        return float(text)
    except ValueError:
        return yaml.safe_load(text)


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def at(recipe: Recipe, key: str) -> Any:
    def step(here: Any, name: str) -> Any:
        return here[name] if isinstance(here, dict) else getattr(here, name)

    return plain(reduce(step, key.split("."), recipe))


def recipe_of(name: str) -> Recipe:
    recipe, problems = read(name)
    assert recipe is not None, problems
    return with_task_params(recipe)


@pytest.mark.parametrize("number", SECTIONS)
def test_no_row_is_empty(number: str) -> None:
    rows = table(number)
    assert len(rows) >= 25
    for row in rows:
        assert len(row) == 3, row
        assert all(row), row
        assert not re.search(r"\b(todo|tbd)\b|^[-–…?]+$", row[2], re.IGNORECASE), row


@pytest.mark.parametrize("number", SECTIONS)
def test_every_value_is_the_recipes_and_the_documents(number: str) -> None:
    recipe = recipe_of(SECTIONS[number])
    checked = 0
    for feature, given, here in table(number):
        for key, written, ours in SETTING.findall(here):
            assert value_of(written) == at(recipe, key), f"{feature}: {key}"
            if not ours:
                documented = re.findall(r"`([^`]*)`", given)
                assert documented, f"{feature}: the document's value of {key} is not given"
                assert value_of(documented[-1]) == at(recipe, key), f"{feature}: {key}"
            checked += 1
    assert checked >= 10


@pytest.mark.parametrize("number", SECTIONS)
def test_every_override_that_is_named_is_understood(number: str) -> None:
    for feature, _, here in table(number):
        for text in OVERRIDE.findall(here):
            words = re.split(r" (?=[a-z_]+\.[\w.]+=)", text)
            mine = [word for word in words if not word.startswith("cluster.")]
            where = [word.removeprefix("cluster.") for word in words if word.startswith("cluster.")]
            assert (read_cluster("local", where)[1], read(SECTIONS[number], mine)[1]) == ([], []), f"{feature}: {text}"


def test_every_file_that_is_named_is_there() -> None:
    named = re.findall(
        r"`((?:configs|pipeline|docs|slurm|tests)/[\w./-]+\.\w+|constraints\.txt|run_pipeline\.sh)`", PAGE
    )
    assert len(named) >= 15
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_a_wrong_value_on_the_page_would_be_seen() -> None:
    assert at(recipe_of("gsm8k"), "sft.optimizer.learning_rate") == value_of("2e-5") != value_of("2e-4")
    assert SETTING.findall("x `sft.epochs` = `3` (not in the guide: y), `a.b` = `c`") == [
        ("sft.epochs", "3", " (not in the guide"),
        ("a.b", "c", ""),
    ]
