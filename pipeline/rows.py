"""Rows of files and of the hub's data sets, each with where it stands, so that a bad one can be named.

    rows, skipped = good_rows(file_rows(path), problem, str(path), skip_bad=False)

One reader for every task: .jsonl, .json (a list), .csv, .parquet. A data set of the hub is read from the local cache,
which `python -m pipeline fetch` fills; where there is a network, it is fetched on the way.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import Artifact
from pipeline.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLES = Path(__file__).parent / "tasks" / "samples"  # small files in the hub's schemas, written for rehearsals
SHOWN = 20  # bad rows that are named; the others are counted
MISSING = ("nan", "NaN", "NaT", "<NA>")  # what str() and pandas make of a missing number, date or text


@dataclass(frozen=True)
class Row:
    """One row and its place. `values` is a mapping, or a text that says why the row cannot be read."""

    source: str  # a file, or a data set and its split
    line: int  # its line in a text file; its number, from 1, elsewhere
    values: Any

    @property
    def place(self) -> str:
        return f"{self.source}:{self.line}"

    def text(self, name: str) -> str:
        """The text of a cell; empty where the value is missing."""
        value = self.values.get(name)
        return "" if is_missing(value) else str(value).strip()


def read_split(data: Artifact, split: str) -> pa.Table:
    """The rows that preprocess has written: `data/<split>.parquet` of its step."""
    import pyarrow.parquet as pq

    path = data.folder / "data" / f"{split}.parquet"
    if not path.is_file():
        raise DataError(f"{path} does not exist: the task has no rows for this stage; leave it out with --stages")
    return pq.read_table(path)


def file_rows(path: Path) -> Iterator[Row]:
    """Every row of a file. DataError where there is no such file or its kind is not known."""
    if not path.is_file():
        raise DataError(f"task.path: {path} does not exist; give a .jsonl, .json, .csv or .parquet file")
    readers = {".jsonl": _jsonl, ".json": _json_list, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise DataError(f"{path}: a {path.suffix or 'nameless'} file; give .jsonl, .json, .csv or .parquet")
    try:
        for line, values in readers[path.suffix](path):
            yield Row(str(path), line, values)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1}); save it as UTF-8") from error


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for line, content in enumerate(file, 1):
            if content.strip():
                yield line, _json(content)


def _json_list(path: Path) -> Iterator[tuple[int, Any]]:
    content = _json(path.read_text(encoding="utf-8"))
    if isinstance(content, list):
        yield from enumerate(content, 1)
    else:
        yield 1, content if isinstance(content, str) else "not a list of rows"


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        line = 2
        for row in reader:
            yield line, row  # where it begins: a cell may have several lines
            line = reader.line_num + 1


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(path).iter_batches()
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a parquet file ({' '.join(str(error).split())})") from error


def _json(content: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at character {error.pos + 1})"


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
            "where nodes have no internet, python -m pipeline fetch RECIPE brings it before; "
            "task.source=path reads a file, task.source=sample the project's own few rows",
        ) from error
    for number, values in enumerate(data, 1):
        yield Row(f"{name}/{split}", number, values)


def good_rows(
    rows: Iterable[Row], problem: Callable[[Any], str | None], what: str, *, skip_bad: bool
) -> tuple[list[Row], list[str]]:
    """The rows that `problem` has nothing to say against, and a sentence for each of the others.

    DataError names the bad ones by their places, unless they are to be skipped; and `what` where it has no good ones.
    """
    good, bad = [], []
    for row in rows:
        told = row.values if isinstance(row.values, str) else problem(row.values)
        if told:
            bad.append(f"{row.place}: {told}")
        else:
            good.append(row)
    if bad and not skip_bad:
        shown = bad if len(bad) <= SHOWN else [*bad[:SHOWN], f"… and {len(bad) - SHOWN} more bad rows"]
        raise DataError(*shown, "mend them, or leave them out with task.bad_rows=skip (they are counted)")
    if not good:
        raise DataError(*bad[:SHOWN], f"{what}: no rows are left" if bad else f"{what}: no rows")
    return good, bad


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: null, a blank text, NaN, NaT, or the text that libraries write for those."""
    return value is None or str(value).strip() in ("", *MISSING)


def lacks(values: Any, *names: str) -> str | None:
    """What a row lacks: each name has to be there, a text or a number, and not missing."""
    if not isinstance(values, dict):
        return f"not a mapping with {' and '.join(names)}"
    found = []
    if absent := [name for name in names if name not in values]:
        has = ", ".join(str(key) for key in values) or "nothing"
        found.append(f"no {' and no '.join(absent)} (it has {has})")
    for name in names:
        if name in values and is_missing(values[name]):
            found.append(f"no {name} (it is {str(values[name]).strip() or 'empty'})")
    return "; ".join(found) or no_text(values, *names)


def no_text(values: dict[str, Any], *names: str) -> str | None:
    """What is wrong with cells that may be missing, and have to be texts or numbers where they are not."""
    there = {name: values[name] for name in names if not is_missing(values.get(name))}
    booleans = [name for name, value in there.items() if isinstance(value, bool)]
    infinite = [name for name, value in there.items() if isinstance(value, float) and math.isinf(value)]
    others = [name for name, value in there.items() if not isinstance(value, str | int | float)]
    found = [f"{name} is {str(there[name]).lower()}, not a text: quote it if the word is meant" for name in booleans]
    found += [f"{name} is {there[name]}, not a text or a finite number" for name in infinite]
    found += [f"{' and '.join(others)} is no text"] if others else []
    return "; ".join(found) or None
