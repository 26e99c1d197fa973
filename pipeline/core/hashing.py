"""Compute identities: canonical JSON, its hash, and the difference of two values field by field.

The whole typed object is hashed, never the YAML and never a difference from defaults. So an identity cannot change
because a default moved. The encoder raises TypeError for any value without a single canonical form.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from pipeline.core import heartbeat
from pipeline.core.schema import is_neutral

FINGERPRINT_LENGTH = 10  # hexadecimal characters of a fingerprint


def plain(value: Any, path: str = "") -> Any:
    """Return `value` as dicts, lists, strings, finite numbers, booleans and None.

    Fields that were `schema.added` to a dataclass are left out while they are neutral. Raises TypeError, naming the
    path, for anything without a deterministic form (sets, floats that are not finite, objects).
    """
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{path or 'value'} is {value}: only finite numbers have a fingerprint")
        return int(value) if value.is_integer() and abs(value) < 2**53 else value  # 1 and 1.0 are one setting
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: plain(item, f"{path}.{f.name}")
            for f in dataclasses.fields(value)
            if not is_neutral(f, item := getattr(value, f.name))
        }
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"{path or 'value'} has keys that are not strings")
        return {key: plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{path or 'value'} is a {type(value).__name__}, which has no fingerprint")


def canonical_json(value: Any) -> str:
    """Return one line of JSON with sorted keys: equal exactly for equal values."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """Return the first ten hexadecimal characters of the sha256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:FINGERPRINT_LENGTH]


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    digest, buffer = hashlib.sha256(), bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            heartbeat.beat(long=True)  # a large model takes minutes
    return digest.hexdigest()


def files_sha256(paths: Sequence[Path]) -> list[str]:
    """Return the sha256 of each file; as many are read at once as there are cores, eight at most.

    One core hashes 1.3 GB/s, less than what a cluster's file system reads.
    """
    with ThreadPoolExecutor(min(HASH_THREADS, len(os.sched_getaffinity(0)))) as pool:
        found = [pool.submit(file_sha256, path) for path in paths]
        while wait(found, timeout=1).not_done:
            heartbeat.beat(long=True)  # the threads' own signs do not count
    return [one.result() for one in found]


HASH_THREADS = 8
READ_BYTES = 1 << 20  # bytes of a file that are read and hashed at once
FULL_HASH_LIMIT = 64 << 20  # bytes; the identity of a file up to this size is its whole content
EDGE_BYTES = 1 << 20  # bytes hashed at the start and at the end of a larger file


def file_identity(path: Path) -> str:
    """Return a local file's part of an identity: its sha256; over 64 MiB the sha256 of its size and both ends.

    At most the size on disk is read: files such as those of /proc have size 0 and may never end.
    """
    size = path.stat().st_size
    if size <= FULL_HASH_LIMIT:
        with path.open("rb") if size else contextlib.nullcontext(io.BytesIO()) as file:
            return hashlib.sha256(file.read(size)).hexdigest()
    with path.open("rb") as file:
        head = file.read(EDGE_BYTES)
        file.seek(-EDGE_BYTES, 2)
        return hashlib.sha256(str(size).encode() + head + file.read()).hexdigest()


def describe_drift(old: Any, new: Any, path: str = "") -> list[str]:
    """Return a line for each field that differs, `sft.learning_rate: 2e-05 -> 1e-05`, in the order of `new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in [*new, *(key for key in old if key not in new)]:
            where = f"{path}.{key}" if path else key
            if key not in old:
                lines.append(f"{where}: (new) -> {_short(new[key])}")
            elif key not in new:
                lines.append(f"{where}: {_short(old[key])} -> (gone)")
            else:
                lines.extend(describe_drift(old[key], new[key], where))
        return lines
    return [] if old == new else [f"{path}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
