"""Rows of files and of the hub's data sets, with a message for each bad row.

    rows, skipped = filter_rows(file_rows(path), problem, str(path), skip_bad=False)

row_files.py reads files. A data set of the hub is read from the local cache, which `python -m pipeline download`
fills; with a network, it is downloaded when needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import former_names
from pipeline.core.errors import DataError, join_first
from pipeline.tasks.row_files import Columns, Row, file_problem, file_rows, is_missing

__all__ = ["Columns", "Row", "file_problem", "file_rows", "is_missing"]  # tasks import all row functions from here
SAMPLES = Path(__file__).parent / "samples"  # small files in the hub's schemas, written for smoke tests
BAD_ROWS_SHOWN = 20  # bad rows listed in an error; the others are counted
MESSAGE_LENGTH = 500  # characters of one bad row's message


class BadRows(DataError):
    """Rows that cannot be read: the first few as problems, and a message for each as `messages`."""

    def __init__(self, messages: Sequence[str], named_in: str = "") -> None:
        more = len(messages) - BAD_ROWS_SHOWN
        rest = [f"… and {more} more bad rows{f'; {named_in} names all {len(messages)}' if named_in else ''}"]
        fix = "fix them, or leave them out with task.on_bad_row=skip (they are counted)"
        super().__init__(*messages[:BAD_ROWS_SHOWN], *(rest if more > 0 else []), fix)
        self.messages = messages


def hub_rows(name: str, revision: str | None, *, split: str, config: str | None = None) -> Iterator[Row]:
    """Yield every row of a split of a data set, at its pinned commit. Raises DataError if it cannot be read."""
    from datasets import load_dataset
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, repo_type="dataset", revision=revision)
        data = load_dataset(folder, config, split=split)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"data set {name}: split {split!r} cannot be read ({reason[:300]})",
            "Fix: on nodes without internet, first run python -m pipeline download RECIPE; "
            "or set task.source=path (a file) or task.source=sample (a few sample rows)",
        ) from error
    for number, values in enumerate(data, 1):
        yield Row(f"{name}/{split}", number, values)


def filter_rows(
    rows: Iterable[Row], problem: Callable[[Any], str | None], what: str, *, skip_bad: bool
) -> tuple[list[Row | None], list[str]]:
    """Return the rows, with None in the place of each bad one, and an error message for each bad one.

    Places are kept because splits are drawn over them: a published split must stay the same if some rows cannot be
    read. Raises BadRows, unless `skip_bad`; and DataError with `what` if no good rows are left.
    """
    found: list[Row | None] = []
    bad: list[str] = []
    for row in rows:
        message = row.fault or problem(row.values)
        if message:
            bad.append(bad_row(row, message))
        found.append(row if not message and (skip_bad or not bad) else None)  # what will not be used is not kept
    if bad and not skip_bad:
        raise BadRows(bad)
    if len(bad) == len(found):
        raise DataError(*bad[:BAD_ROWS_SHOWN], f"{what}: no rows are left" if bad else f"{what}: no rows")
    return found, bad


def bad_row(row: Row, message: str) -> str:
    """Return the message of a bad row, with its file and line."""
    return f"{row.place}: {message[:MESSAGE_LENGTH]}"


def skipped_note(skipped: list[str], more: str = "") -> str:
    """Return a step's warning about unreadable rows: their number and the first few. `more` names the full list."""
    return f"{len(skipped)} rows cannot be read and were left out{more}: {join_first(skipped, between='; ')}"


def missing_fields(values: Any, *names: str) -> str | None:
    """Return which of the named cells a row lacks, or which are not a text or a number; None if all are good."""
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
    """Return which of the named cells are filled but are not a text or a finite number; None if all are good."""
    filled = {name: values[name] for name in names if not is_missing(values.get(name))}
    booleans = [name for name, value in filled.items() if isinstance(value, bool)]
    infinite = [name for name, value in filled.items() if isinstance(value, float) and math.isinf(value)]
    others = [name for name, value in filled.items() if not isinstance(value, str | int | float)]
    found = [f"{name} is {str(filled[name]).lower()}, not a text: quote it if the word is meant" for name in booleans]
    found += [f"{name} is {filled[name]}, not a text or a finite number" for name in infinite]
    found += [f"{' and '.join(others)} is not a text"] if others else []
    return "; ".join(found) or None


def has_fields(values: Any, names: Sequence[str]) -> bool:
    """Return whether a row is a mapping in which none of the named cells is missing."""
    return isinstance(values, dict) and all(not is_missing(values.get(name)) for name in names)


FORMER = {"lacks": "missing_fields", "no_text": "empty_fields", "sorted_out": "filter_rows"}
if not TYPE_CHECKING:  # a type checker shall know the present names only
    __getattr__ = former_names(__name__, FORMER)
