"""Read the files of a large model once per node, in large pieces, before its processes map them into memory.

    read_ahead(files)               each process reads its share; then all find the whole in the kernel's page cache
    for key in local_share(keys)    a piece of work that one process of each node has to do

Processes that map the same files read them page by page and wait for each other; on a network disk each page is a
request to its server. Nothing depends on the cache: what is not there is read when it is used.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pipeline.core import heartbeat

T = TypeVar("T")
PIECE = 64 << 20  # bytes that one process reads in a row
READ = 8 << 20  # bytes of one call


def local_share(items: Sequence[T]) -> Sequence[T]:
    """Return every n-th of the items, for the n processes of this node; all of them where there is one."""
    return items[int(os.environ.get("LOCAL_RANK", "0")) :: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))]


def read_ahead(files: Sequence[Path]) -> int:
    """Read this process's share of the files. Returns the bytes that it read; 0 where memory has no room for them."""
    sizes = {file: file.stat().st_size for file in files}
    if sum(sizes.values()) > _available() / 2:  # they would push each other out
        return 0
    pieces = [(file, start) for file, size in sizes.items() for start in range(0, size, PIECE)]
    buffer, total = bytearray(READ), 0
    for file, start in local_share(pieces):
        heartbeat.beat(long=True)
        descriptor = os.open(file, os.O_RDONLY)
        try:
            for offset in range(start, min(start + PIECE, sizes[file]), READ):
                if not _is_cached(descriptor, offset):
                    total += os.preadv(descriptor, [buffer], offset)
        finally:
            os.close(descriptor)
    return total


def _is_cached(descriptor: int, offset: int) -> bool:
    """Return whether a byte is in the page cache; False where the file system cannot tell."""
    with contextlib.suppress(OSError):
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    return False


def _available() -> int:
    """Return the bytes of memory that are free or can be freed (Linux); 0 where that is not known."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return 0
