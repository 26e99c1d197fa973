"""Readers of a user's file of rows. Each row has its file and line, so that errors can name it.

    for row in file_rows(Path("mine.csv"), {"question": ("problem",)}): print(row.place, row.text("question"))

Reads .jsonl, .json (a list, JSON lines, or {"data": [rows]}), .csv and .tsv (as spreadsheets write them: a byte-order
mark, semicolons or tabs, `sep=;`) and .parquet. An unreadable row becomes a Row with a fault; an unreadable file raises
DataError. Whether a row fits its task is checked elsewhere, by `rows.filter_rows`.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.core.errors import DataError
from pipeline.core.files import BOMS

KINDS = ".jsonl, .json, .csv or .parquet"
WRAPPER_KEYS = ("data", "rows", "examples", "instances", "records", "train", "test", "validation")  # {"data": [rows]}
DELIMITERS = ",;\t|"
MISSING_WORDS = ("nan", "NaN", "NaT", "<NA>")  # str() and pandas write these for a missing number, date or text

Columns = Mapping[str, tuple[str, ...]]  # a task's name for a column -> other names for it in files


@dataclass(frozen=True)
class Row:
    """One row and its place. `values` is a mapping from columns to cells, unless the file has something else there."""

    source: str  # a file, or a data set and its split
    line: int  # its line in a text file; its number, from 1, elsewhere
    values: Any
    fault: str | None = None  # why the row cannot be read; `values` is then None

    @property
    def place(self) -> str:
        return f"{self.source}:{self.line}"

    def text(self, name: str) -> str:
        """Return the text of a cell; "" if the value is missing."""
        value = self.values.get(name)
        return "" if is_missing(value) else str(value).strip()


def is_missing(value: Any) -> bool:
    """Return whether a cell is empty: null, a blank text, NaN, NaT, or the text that libraries write for those."""
    if isinstance(value, str):
        return not value or value.isspace() or value.strip() in MISSING_WORDS
    if isinstance(value, float):
        return value != value
    return value is None or type(value).__name__ in ("NaTType", "NAType")  # pandas' own


def file_problem(path: Path) -> str | None:
    """Return why a path cannot be a file of rows, checked without reading its rows; None if it may be one."""
    try:
        if path.is_dir():
            return f"{path} is a folder; expected a {KINDS} file"
        if not path.exists():
            return f"{path} does not exist; expected a {KINDS} file"
        if not path.is_file():
            return f"{path} is a device or a pipe; expected a {KINDS} file"
        if path.suffix.lower() not in READERS:
            return f"{path} is a {path.suffix or 'nameless'} file; expected {KINDS}"
        with path.open("rb") as file:
            start = file.read(4)
    except (OSError, ValueError) as error:  # a path of 5,000 characters, one with a NUL, no permission
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return f"{str(path)[:80]}: {reason}; expected a {KINDS} file"
    for mark, name in BOMS.items():
        if start.startswith(mark) and path.suffix.lower() != ".parquet":
            return f"{path} is {name}; expected UTF-8. Fix: iconv -f {name} -t UTF-8"
    return None


def file_rows(path: Path, columns: Columns | None = None) -> Iterator[Row]:
    """Yield every row of a file. Raises DataError for a missing file, an unknown kind or a damaged file.

    `columns` maps the task's names to other names for them. A file's columns that match one of these, in any case and
    with blanks around them, get the task's name. A column that already has a task's name is not renamed.
    """
    if problem := file_problem(path):
        raise DataError(problem)
    rename = _Names(columns or {})
    for line, values, fault in READERS[path.suffix.lower()](path):
        if fault is None and isinstance(values, dict):
            values = rename(values)
        yield Row(str(path), line, values, fault)


class _Names:
    """Renames the columns of rows. Files have few sets of columns, so the mapping of each set is cached."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self.known: dict[tuple[Any, ...], dict[str, str]] = {}

    def __call__(self, values: dict[str, Any]) -> dict[str, Any]:
        keys = tuple(values)
        if keys not in self.known:
            if len(self.known) > 1000:  # rows that share no columns
                self.known.clear()
            self.known[keys] = self._renamed(keys)
        renamed = self.known[keys]
        return {renamed.get(key, key): value for key, value in values.items()} if renamed else values

    def _renamed(self, keys: tuple[Any, ...]) -> dict[str, str]:
        plain = {str(key).strip().lower(): key for key in reversed(keys)}
        found = {}
        for name, others in self.columns.items():
            if name not in keys:
                there = [plain[other.lower()] for other in (name, *others) if other.lower() in plain]
                free = [key for key in there if key not in found and key not in self.columns]
                if free:
                    found[free[0]] = name
        return found


# ---------------------------------------------------------------- JSON

Read = Iterator[tuple[int, Any, str | None]]  # (line, values, fault)


def _json(path: Path) -> Read:
    """Yield the rows of JSON lines or of one JSON value: files of either kind have either ending."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        starts = [line.strip() for line in islice((line for line in file if line.strip()), 2)]
        file.seek(0)
        alone = [_value(line)[1] is None for line in starts]  # whether each line alone is a JSON value
        lines = path.suffix.lower() == ".jsonl"
        if alone[:1] == [True] and (lines or len(starts) > 1):
            yield from _lines(file)
            return
        text = file.read()
    content, fault = _value(text)
    if fault and (lines or (alone[1:] == [True] and starts[1].startswith("{"))):  # JSON lines with a broken first line
        yield from _lines(io.StringIO(text))
    elif fault and starts:
        raise DataError(f"{path}: {fault}; expected a list of rows, or JSON lines")
    elif starts:
        yield from _rows_of(content, path)


def _lines(file: Iterator[str] | io.TextIOBase) -> Read:
    for line, content in enumerate(file, 1):
        if content.strip():
            yield (line, *_value(content))


def _rows_of(content: Any, path: Path) -> Read:
    """Yield the rows of one JSON value: a list, {"data": a list}, or a single row."""
    if isinstance(content, dict):
        wrapped = [content[key] for key in WRAPPER_KEYS if isinstance(content.get(key), list)]
        content = wrapped[0] if len(wrapped) == 1 else [content]
    if not isinstance(content, list):
        raise DataError(f'{path}: not rows; expected a list of rows, {{"data": [rows]}}, or JSON lines')
    for number, values in enumerate(content, 1):
        yield number, values, None


def _value(content: str) -> tuple[Any, str | None]:
    """Parse JSON. Returns (value, None) or (None, error message)."""
    if fault := _not_text(content):
        return None, fault
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        return None, f"not JSON ({error.msg} at character {error.pos + 1})"
    except ValueError:
        return None, f"a number of more than {sys.get_int_max_str_digits()} digits"
    except RecursionError:
        return None, "nested too deep"
    if "\\ud" in content or "\\uD" in content:  # one escape of a surrogate pair is not a character
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return None, f"not a text (half a character, {error.object[error.start]!a})"
    return value, None


def _not_text(content: str) -> str | None:
    """Return an error message for text with bytes that are not UTF-8 (read as surrogates); None if there are none."""
    if content.isascii():
        return None
    try:
        content.encode()
    except UnicodeEncodeError as error:
        return f"not UTF-8 (at character {error.start + 1}); save the file as UTF-8"
    return None


# ---------------------------------------------------------------- CSV and parquet


def _csv(path: Path) -> Read:
    """Yield the rows of a table with column names in the first line, as spreadsheets and pandas write it."""
    csv.field_size_limit(sys.maxsize)  # an answer may be longer than csv's default limit of 131,072 characters
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        before, delimiter = _delimiter(file, path)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            names = [name.strip() for name in next(reader, [])]
        except csv.Error as error:
            raise DataError(f"{path}:{before + 1}: the names of the columns cannot be read ({error})") from error
        twice = sorted({name for name in names if name and names.count(name) > 1})
        if twice:
            raise DataError(f"{path}:{before + 1}: two columns are called {' and '.join(twice)}; rename one")
        end = before + reader.line_num
        while True:
            line = end + 1  # the row's first line: a cell may have several lines
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                end = before + reader.line_num
                yield line, None, f"not CSV ({error}); a quote lacks its partner"
                continue
            end = before + reader.line_num
            if cells:
                yield (line, *_cells(names, cells))


def _cells(names: list[str], cells: list[str]) -> tuple[Any, str | None]:
    if len(cells) > len(names):
        return None, f"{len(cells)} cells for {len(names)} columns; quote a cell that holds the delimiter"
    if fault := next(filter(None, map(_not_text, cells)), None):
        return None, fault
    return dict(zip(names, [*cells, *[None] * (len(names) - len(cells))], strict=True)), None


def _delimiter(file: io.TextIOBase | Any, path: Path) -> tuple[int, str]:
    """Return (number of lines before the column names, the delimiter).

    The delimiter is that of a line `sep=;`, else the one that is most frequent in the line of column names.
    """
    first = file.readline()
    if first.lower().startswith("sep=") and len(first.strip()) == 5:
        return 1, first.strip()[4]
    file.seek(0)
    if path.suffix.lower() == ".tsv":
        return 0, "\t"
    bare = "".join(first.split('"')[::2])  # a delimiter within quotes does not count
    return 0, max(DELIMITERS, key=bare.count)  # the first of equals: the comma


def _parquet(path: Path) -> Read:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(path).iter_batches(batch_size=4096)
        yield from ((k, row, None) for k, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # OSError: a damaged page
        raise DataError(f"{path}: not a parquet file, or a damaged one ({' '.join(str(error).split())})") from error


READERS = {".jsonl": _json, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
