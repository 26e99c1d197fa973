"""Rows of files and of the hub's data sets, the bad ones named and left out.

    rows, skipped = filter_rows(file_rows(path), problem, str(path), skip_bad=False)

A file is read by row_files.py. A data set of the hub is read from the local cache, which `python -m pipeline download`
fills; where there is a network, it is fetched on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline import former_names
from pipeline.core.errors import DataError, join_first
from pipeline.tasks.row_files import Columns, Row, file_problem, file_rows, is_missing

__all__ = ["Columns", "Row", "file_problem", "file_rows", "is_missing"]  # the other half of what a task reads rows by
SAMPLES = Path(__file__).parent / "samples"  # small files in the hub's schemas, written for smoke tests
BAD_ROWS_SHOWN = 20  # bad rows that are named; the others are counted


def hub_rows(name: str, revision: str | None, *, split: str, config: str | None = None) -> Iterator[Row]:
    """Every row of a split of a data set, at its pinned commit. DataError where it cannot be had."""
    from datasets import load_dataset
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, repo_type="dataset", revision=revision)
        data = load_dataset(folder, config, split=split)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"data set {name}: split {split!r} cannot be read ({why[:300]})",
            "where nodes have no internet, python -m pipeline download RECIPE brings it before; "
            "task.source=path reads a file, task.source=sample the project's own few rows",
        ) from error
    for number, values in enumerate(data, 1):
        yield Row(f"{name}/{split}", number, values)


def filter_rows(
    rows: Iterable[Row], problem: Callable[[Any], str | None], what: str, *, skip_bad: bool
) -> tuple[list[Row | None], list[str]]:
    """The rows, None in the place of each that is bad, and a sentence for each bad one.

    Places are kept because a split is drawn over them: that of a published set has to be its publisher's, whatever rows
    cannot be read. DataError names the bad ones, unless they are to be skipped; and `what` where it has no good ones.
    """
    found: list[Row | None] = []
    bad = []
    for row in rows:
        told = row.fault or problem(row.values)
        if told:
            bad.append(f"{row.place}: {told}")
        found.append(None if told else row)
    if bad and not skip_bad:
        shown = (
            bad
            if len(bad) <= BAD_ROWS_SHOWN
            else [*bad[:BAD_ROWS_SHOWN], f"… and {len(bad) - BAD_ROWS_SHOWN} more bad rows"]
        )
        raise DataError(*shown, "fix them, or leave them out with task.on_bad_row=skip (they are counted)")
    if len(bad) == len(found):
        raise DataError(*bad[:BAD_ROWS_SHOWN], f"{what}: no rows are left" if bad else f"{what}: no rows")
    return found, bad


def skipped_note(skipped: list[str], more: str = "") -> str:
    """What a step says about rows that cannot be read: how many, and the first few. `more` says where all are."""
    return f"{len(skipped)} rows cannot be read and were left out{more}: {join_first(skipped, between='; ')}"


def missing_fields(values: Any, *names: str) -> str | None:
    """What a row lacks: each name has to be there, a text or a number, and not missing."""
    if not isinstance(values, dict):
        return f"not a mapping with {' and '.join(names)}"
    found = []
    if absent := [name for name in names if name not in values]:
        has = join_first([str(key) for key in values], BAD_ROWS_SHOWN) or "nothing"
        found.append(f"no {' and no '.join(absent)} (it has {has})")
    for name in names:
        if name in values and is_missing(values[name]):
            found.append(f"no {name} (it is {str(values[name]).strip() or 'empty'})")
    return "; ".join(found) or empty_fields(values, *names)


def empty_fields(values: dict[str, Any], *names: str) -> str | None:
    """What is wrong with cells that may be missing, and have to be texts or numbers where they are not."""
    there = {name: values[name] for name in names if not is_missing(values.get(name))}
    booleans = [name for name, value in there.items() if isinstance(value, bool)]
    infinite = [name for name, value in there.items() if isinstance(value, float) and math.isinf(value)]
    others = [name for name, value in there.items() if not isinstance(value, str | int | float)]
    found = [f"{name} is {str(there[name]).lower()}, not a text: quote it if the word is meant" for name in booleans]
    found += [f"{name} is {there[name]}, not a text or a finite number" for name in infinite]
    found += [f"{' and '.join(others)} is no text"] if others else []
    return "; ".join(found) or None


__getattr__ = former_names(
    __name__, {"lacks": "missing_fields", "no_text": "empty_fields", "sorted_out": "filter_rows"}
)
