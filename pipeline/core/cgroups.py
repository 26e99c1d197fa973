"""Read the memory cgroup of this process (versions 1 and 2): its limit, its peak and its out-of-memory kills."""

from __future__ import annotations

import contextlib
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


OWN_GROUPS = Path("/proc/self/cgroup")


UNLIMITED = 1 << 60  # cgroup version 1 writes a number near 2^63 for "no limit"


def _memory_groups() -> list[Path]:
    """Return the folders of this process's memory cgroup, from its own up to the root.

    Any of them may carry the limit: Slurm limits the job and the step, and starts processes in a group below.
    A container sees the root alone.
    """
    folders: list[Path] = []
    with contextlib.suppress(OSError):
        for line in OWN_GROUPS.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" or "memory" in controllers.split(","):
                root = CGROUPS if number == "0" else CGROUPS / "memory"
                own = root / path.strip("/")
                folders += [own, *(folder for folder in own.parents if folder.is_relative_to(root))]
    return [folder for folder in dict.fromkeys([*folders, CGROUPS]) if folder.is_dir()]


def _counter(folder: Path, file: str, name: str) -> int | None:
    """Return N of the line `name N` in a cgroup's file; None without such a line."""
    with contextlib.suppress(OSError):
        for line in (folder / file).read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name and value.strip().isdigit():
                return int(value)
    return None


def memory_kills() -> int | None:
    """Count the processes of this cgroup that the kernel has killed for memory; None where it does not count them."""
    for folder in _memory_groups():
        for file in ("memory.events", "memory.oom_control"):  # version 2, version 1
            if (count := _counter(folder, file, "oom_kill")) is not None:
                return count
    return None


def memory_limit() -> tuple[int | None, int | None]:
    """Return this cgroup's memory limit and peak in bytes; None where unknown or unlimited."""
    names = (("memory.max", "memory.peak"), ("memory.limit_in_bytes", "memory.max_usage_in_bytes"))
    for folder in _memory_groups():
        for limit, peak in names:
            if (most := _number(folder / limit)) is not None and most < UNLIMITED:
                return most, _number(folder / peak)
    return None, None


def _number(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return None
