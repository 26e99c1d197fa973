"""Records on disk that a reader never sees half-written."""

from __future__ import annotations

import codecs
import json
import os
import stat
from pathlib import Path
from typing import Any

BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: Path, limit: int) -> tuple[str | None, str]:
    """A small UTF-8 file's text and "", or None and what is wrong with the file; OSError where it cannot be opened.

    A byte-order mark is left out. Pipes and devices are not opened, and no more is read than the size on disk: files
    such as those of /proc have none and may never end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        return None, "got a folder, pipe or device; expected a regular file"
    if status.st_size > limit:
        return None, f"got {status.st_size} bytes; expected at most {limit}"
    data = b""
    if status.st_size:
        with path.open("rb") as file:
            data = file.read(status.st_size)
    for mark, name in BOMS.items():
        if data.startswith(mark):
            return None, f"got {name}; expected UTF-8. Fix: iconv -f {name} -t UTF-8"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return None, f"got bytes that are not UTF-8 (the first at {error.start}); expected UTF-8. Fix: save it as UTF-8"
    if "\0" in text:
        return None, "got zero bytes, as UTF-16 has; expected UTF-8 text. Fix: save it as UTF-8"
    return text, ""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file; a last line that was cut off is left out.

    Only a newline ends a record: `str.splitlines` would also cut at the U+2028 or U+0085 that a model may write.
    """
    records = []
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            if line.endswith("\n"):
                records.append(json.loads(line))
    return records


def write_json(path: Path, value: Any) -> None:
    """Write to a temporary name beside it, then rename: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The JSON of a file; None where it is missing or half-written."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (
        FileNotFoundError,
        NotADirectoryError,
        ValueError,
        RecursionError,
    ):  # ValueError: no UTF-8, no JSON, 5,000 digits
        return None
