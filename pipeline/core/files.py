"""Read and write small files; a reader never sees a half-written record."""

from __future__ import annotations

import codecs
import contextlib
import errno
import json
import os
import stat
import time
from pathlib import Path
from typing import Any

BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: Path, limit: int) -> tuple[str | None, str]:
    """Return a small UTF-8 file's text and "", or None and the problem. Raises OSError where it cannot be opened.

    A byte-order mark is dropped. Pipes and devices are not opened. At most the size on disk is read: files such as
    those of /proc have size 0 and may never end.
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
        return None, "got zero bytes, as in UTF-16; expected UTF-8 text. Fix: save it as UTF-8"
    return text, ""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a .jsonl file without a truncated last line.

    Only a newline ends a record: `str.splitlines` would also split at the U+2028 or U+0085 that a model may write.
    """
    records = []
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            if line.endswith("\n"):
                records.append(json.loads(line))
    return records


LATE_SECONDS = 60.0  # a network file system's client asks again whether a name exists (acdirmax)


def appears(path: Path, seconds: float = LATE_SECONDS) -> bool:
    """Wait until a file that another node has written is seen here. Returns whether it is, after `seconds` at most."""
    until = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > until:
            return False
        with contextlib.suppress(OSError):
            list(path.parent.iterdir())  # has the client ask its server
        time.sleep(0.2)
    return True


def write_json(path: Path, value: Any, *, durable: bool = False) -> None:
    """Write JSON to a temporary file in the same folder, then rename it: a reader never sees half a file.

    `durable`: the new name survives a power loss too, as a record must before anything that it replaces is deleted.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a file system that cannot sync folders
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def drop_cache(path: Path) -> None:
    """Have the kernel forget a synced file's content, so that the next reader gets it from the disk or its server."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """Return the JSON of a file; None where it is missing or half-written."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    # ValueError: not UTF-8, not JSON, or an integer of more digits than Python reads
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
