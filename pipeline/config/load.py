r"""Read YAML files and `key=value` overrides into one typed object, with every problem found at once.

    recipe, problems = read_typed(Recipe, [Path("configs/base.yaml"), file], ["grpo.beta=0.01"], {"name": "tiny"})

Files and overrides are templates: `${sft.max_length}` refers to another setting, and `\${` writes the characters
themselves. A mapping among the sources is data, such as the recipe of an older step.json: its texts are taken as they
stand, whatever they contain. Resolvers such as `${oc.env:HF_TOKEN}` are refused: what they return would enter records
and model cards. Sizes are bounded, so that no file makes the login node wait.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pipeline.core.files import read_text
from pipeline.core.schema import Renames, is_free_mapping, parse

MAX_BYTES = 256 * 1024  # of a YAML file or an override
MAX_REFERENCES = 32  # in one file: each may double what came before
MARK = "\0{}\0"  # stands for a text of the data; YAML and the command line cannot contain a NUL
MARKS = re.compile("\0(\\d+)\0")


class Checked(Protocol):
    """A typed object that reports its own impossible combinations."""

    def problems(self) -> list[str]: ...


T = TypeVar("T", bound=Checked)


def read_typed(
    cls: type[T],
    sources: Sequence[Path | dict[str, Any]],
    overrides: Sequence[str],
    extra: dict[str, Any],
) -> tuple[T | None, list[str]]:
    """The typed object, or None, and every problem.

    `sources` are YAML files (templates) and mappings (data, never interpolated), later ones over earlier ones; then
    the overrides; then `extra`, whose values are final.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    problems: list[str] = []
    texts: list[str] = []
    layers: list[Any] = []
    for source in sources:
        layers += _from_file(source, problems) if isinstance(source, Path) else [source]
    for override in overrides:
        layers += _from_override(override, problems)
    renames = _renames(cls, layers)
    layers = [
        OmegaConf.create(_masked(renames.apply(layer)[0], texts))
        if isinstance(layer, dict)
        else _with_present_names(layer, renames)
        for layer in layers
    ]
    try:
        merged: Any = OmegaConf.create({})
        for layer in layers:
            for path in _emptied(cls, OmegaConf.to_container(layer)):
                OmegaConf.update(merged, path, None, force_add=True)
            merged = OmegaConf.merge(merged, layer)
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, TypeError, ValueError, RecursionError, AttributeError) as error:
        where = next((source for source in reversed(sources) if isinstance(source, Path)), "the command line")
        return None, [*problems, f"{where}: {_reason(error)}"]
    if isinstance(values, dict):
        values = {**values, **extra}
    missing = [f"{path}: not set. Fix: give {path} a value" for path in _missing(values)]
    result, found = parse(cls, _unmasked(values, texts))
    problems += [*missing, *found]
    if result is not None:
        problems += result.problems()
    return (None if problems else result), problems


_noticed: set[str] = set()


def notify(notice: str) -> None:
    """Print a notice about a former name on stderr, the first time that the process meets it."""
    if notice not in _noticed:
        _noticed.add(notice)
        print(f"note: {notice}", file=sys.stderr)


def _renames(cls: type, layers: Sequence[Any]) -> Renames:
    """The renamed settings of a class; those of a task follow from its name, so all layers are looked at."""
    from omegaconf import OmegaConf

    if not hasattr(cls, "renames"):
        return Renames({})
    values = [layer if isinstance(layer, dict) else OmegaConf.to_container(layer) for layer in layers]
    found = cls.renames(*values)
    assert isinstance(found, Renames)
    return found


def _with_present_names(layer: Any, renames: Renames) -> Any:
    """A layer that someone wrote, under the present names, references included; each former name is noticed once."""
    from omegaconf import OmegaConf

    given = OmegaConf.to_container(layer)
    values, notices = renames.apply(given)
    for notice in notices:
        notify(notice)
    former = {old: new for old, new in renames.names.items() if new and "[]" not in old}
    pattern = re.compile(rf"(?<!\\)\$\{{({'|'.join(map(re.escape, former))})(?=[.}}\[])") if former else None

    def refer(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda found: "${" + former[found[1]], value) if pattern and "${" in value else value
        if isinstance(value, Mapping):
            return {key: refer(item) for key, item in value.items()}
        return [refer(item) for item in value] if isinstance(value, list) else value

    present = refer(values)
    return layer if present == given else OmegaConf.create(present)


# ---------------------------------------------------------------- one layer


def _from_file(file: Path, problems: list[str]) -> list[Any]:
    """The settings of a YAML file; none where the file is wrong, which is added to `problems`."""
    from omegaconf import OmegaConf

    try:
        text, wrong = read_text(file, MAX_BYTES)
    except FileNotFoundError:
        problems.append(f"{file}: no such file; run from the project's root, where configs/ is")
        return []
    except OSError as error:
        problems.append(f"{file}: {error.strerror}. Fix: give a readable file")
        return []
    if text is None:
        problems.append(f"{file}: {wrong}")
        return []
    content = text if text.strip() else "{}"
    layer, found = _parsed(content, lambda: OmegaConf.load(io.StringIO(content)), "the file")
    problems += [f"{file}: {problem}" for problem in found]
    return [] if layer is None else [layer]


def _from_override(override: str, problems: list[str]) -> list[Any]:
    """One `key=value` of the command line."""
    from omegaconf import OmegaConf

    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        problems.append(f"{_short(override)}: not an override; write key=value, such as grpo.beta=0.01")
        return []
    layer, found = _parsed(text, lambda: OmegaConf.from_dotlist([override]), "the value")
    problems += [f"{_short(override)}: {problem}" for problem in found]
    return [] if layer is None else [layer]


def _parsed(text: str, parse: Callable[[], Any], what: str) -> tuple[Any, list[str]]:
    """What `parse` makes of a YAML text, or None and what is wrong. OmegaConf bounds what aliases expand to."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if len(text) > MAX_BYTES:
        return None, [f"got {len(text)} characters; expected at most {MAX_BYTES}"]
    if text.count("${") > MAX_REFERENCES:
        return None, [f"more than {MAX_REFERENCES} references such as ${{key}}. Fix: write the values out"]
    try:
        layer = parse()
        found = _resolvers(OmegaConf.to_container(layer)) if "${" in text else []
    except YAMLError as error:
        if "nesting depth" in str(error):
            return None, ["nested too deeply. Fix: write it flat"]
        return None, [f"{what} is not YAML ({' '.join(str(error).split())})"]
    except OmegaConfBaseException as error:
        return None, [_reason(error)]
    except RecursionError:
        return None, ["nested too deeply. Fix: write it flat"]
    except (ValueError, TypeError, OSError, AttributeError) as error:  # an integer of 5,000 digits, a text alone
        return None, [f"{what} cannot be read ({error})"]
    if not isinstance(layer, DictConfig):
        return None, ["got a list; expected settings, one 'key: value' a line"]
    return (None if found else layer), found


def _resolvers(value: Any) -> list[str]:
    """A sentence for each resolver that a layer's texts call, by OmegaConf's own grammar."""
    from omegaconf.grammar_parser import parse

    found: list[str] = []

    def walk(here: Any) -> None:
        if type(here).__name__ == "InterpolationResolverContext":
            found.append(
                f"got {_short(here.getText())}; expected a value, or a reference to a setting such as "
                "${sft.max_length}. Fix: write the value itself (on the command line the shell fills in $NAME), or "
                "\\${…} where these characters are meant"
            )
        for child in getattr(here, "children", None) or ():
            walk(child)

    if isinstance(value, str) and "${" in value:
        walk(parse(value))
    elif isinstance(value, Mapping):
        found += [problem for item in value.values() for problem in _resolvers(item)]
    elif isinstance(value, list):
        found += [problem for item in value for problem in _resolvers(item)]
    return found


# ---------------------------------------------------------------- data, empty mappings, what is missing


def _masked(value: Any, texts: list[str]) -> Any:
    """Data whose texts OmegaConf must not read: each with a `${` or `???` is replaced by a mark."""
    if isinstance(value, str):
        if "${" not in value and "\\" not in value and "\0" not in value and value != "???":
            return value
        texts.append(value)
        return MARK.format(len(texts) - 1)
    if isinstance(value, Mapping):
        return {key: _masked(item, texts) for key, item in value.items()}
    return [_masked(item, texts) for item in value] if isinstance(value, list | tuple) else value


def _unmasked(value: Any, texts: list[str]) -> Any:
    if isinstance(value, str):
        return MARKS.sub(lambda found: texts[int(found[1])], value) if texts else value
    if isinstance(value, Mapping):
        return {key: _unmasked(item, texts) for key, item in value.items()}
    return [_unmasked(item, texts) for item in value] if isinstance(value, list) else value


def _emptied(cls: type, value: Any, path: str = "") -> list[str]:
    """Where a layer sets a free mapping to `{}`: that replaces what was there, which merging would keep."""
    found = []
    for key, item in value.items() if isinstance(value, Mapping) else ():
        where = f"{path}.{key}" if path else str(key)
        if item == {} and is_free_mapping(cls, where):
            found.append(where)
        found += _emptied(cls, item, where)
    return found


def _missing(value: Any, path: str = "") -> list[str]:
    """The settings that are still `???`."""
    if isinstance(value, Mapping):
        return [where for key, item in value.items() for where in _missing(item, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list):
        return [where for index, item in enumerate(value) for where in _missing(item, f"{path}[{index}]")]
    return [path] if value == "???" else []


# ---------------------------------------------------------------- words


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply. Fix: write it flat"
    reason = " ".join(str(error).split())
    if "nterpolation" in type(error).__name__ or "Grammar" in type(error).__name__:
        reason += ". Fix: name a setting by its full path, or write \\${…} where these characters are meant"
    if "key type" in reason:
        reason += ". Fix: give every setting a name; a name such as null or ~ is written in quotes"
    return reason


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
