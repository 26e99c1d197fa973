"""What NVIDIA's driver says of this machine's GPUs, without torch: memory and compute capability.

smallest()      (11.0, 7.5) of the GPUs that this process may use; None where nvidia-smi is not there or fails
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess

QUERY = ("nvidia-smi", "--query-gpu=index,uuid,memory.total,compute_cap", "--format=csv,noheader,nounits")
QUERY_TIMEOUT = 20.0  # seconds: without persistence mode the driver is loaded first


@functools.cache
def smallest_gpu() -> tuple[float, float] | None:
    """GiB and compute capability that each of the usable GPUs has at least."""
    if shutil.which(QUERY[0]) is None:
        return None
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=QUERY_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = _visible(done.stdout) if done.returncode == 0 else []
    return (min(memory for memory, _ in found), min(capability for _, capability in found)) if found else None


def _visible(table: str) -> list[tuple[float, float]]:
    """GiB and capability of the GPUs in a table that CUDA_VISIBLE_DEVICES does not hide, by their index or their id."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = None if named is None else [part.strip() for part in named.split(",")]
    found = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 4 or not cells[2].isdigit() or not cells[3].replace(".", "", 1).isdigit():
            continue  # a card that the driver does not answer for, or shared memory (GH200): nothing to compare
        if wanted is None or any(part and (part == cells[0] or cells[1].startswith(part)) for part in wanted):
            found.append((int(cells[2]) / 1024, float(cells[3])))
    return found
