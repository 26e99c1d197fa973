"""docs/settings.md and its schema are what the types and defaults say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from running import ROOT

from pipeline.config import reference
from pipeline.config.cluster import Cluster
from pipeline.config.recipe import Recipe


def test_the_reference_is_what_the_types_and_defaults_say() -> None:
    """scripts/reference writes it."""
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == reference.page()
    written = (ROOT / "docs" / "settings.schema.json").read_text(encoding="utf-8")
    assert json.loads(written) == json.loads(json.dumps(reference.schema()))


def test_a_setting_has_its_type_default_and_meaning() -> None:
    page = reference.page()
    assert "| `grpo.beta` | a number ≥ 0 | `0.0` | weight of the KL term; 0 keeps no reference model |" in page
    assert '| `model.quantization` | `none`, `nf4`, `int8` | `"none"` | none, nf4 (4 bit) or int8, with LoRA |' in page
    assert "| `slurm.time.grpo` | " in page


def faults(schema: Any, value: Any, path: str = "") -> Iterator[str]:
    """What the schema has against a value, as far as this project's files use it."""
    if "anyOf" in schema:
        tried = [list(faults(one, value, path)) for one in schema["anyOf"]]
        yield from [] if [] in tried else min(tried, key=len)
    elif "enum" in schema:
        yield from [] if value in schema["enum"] else [f"{path}: {value!r}"]
    elif schema.get("type") == "object":
        for key, item in value.items() if isinstance(value, dict) else [(path, None)]:
            below = schema.get("properties", {}).get(key, schema.get("additionalProperties", False))
            yield from [f"{path}.{key}"] if below is False else faults(below, item, f"{path}.{key}")
    elif schema.get("type") == "array":
        for item in value if isinstance(value, list) else [None]:
            yield from faults(schema["items"], item, f"{path}[]")
    elif "type" in schema:
        kinds: dict[str, Any] = {"integer": int, "number": (int, float), "string": str, "boolean": bool}
        kind = kinds.get(schema["type"], type(None))
        fits = isinstance(value, kind) and (schema["type"] == "boolean" or not isinstance(value, bool))
        yield from [] if fits else [f"{path}: {value!r}"]


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("**/*.yaml")), ids=lambda file: file.stem)
def test_every_file_fits_the_schema_that_editors_use(file: Any) -> None:
    cls = Cluster if file.parent.name == "clusters" else Recipe
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert not list(faults(reference.schema_of(cls), values))
    assert list(faults(reference.schema_of(cls), {**values, "sft": {"no_such": 1}})) == [".sft.no_such"]
