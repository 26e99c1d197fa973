"""Query NVIDIA's driver for the memory and compute capability of this machine's GPUs, without torch.

smallest_gpu()      (11.0, 7.5): the minimum over the GPUs that this process may use; None where nvidia-smi fails
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
    """Return the smallest memory (GiB) and the lowest compute capability of the usable GPUs; None where unknown."""
    if shutil.which(QUERY[0]) is None:
        return None
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=QUERY_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    gpus = _visible(done.stdout) if done.returncode == 0 else []
    return (min(memory for memory, _ in gpus), min(capability for _, capability in gpus)) if gpus else None


def _visible(table: str) -> list[tuple[float, float]]:
    """Return GiB and capability of the GPUs in a table that CUDA_VISIBLE_DEVICES, by index or id, does not hide."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = None if named is None else [part.strip() for part in named.split(",")]
    gpus = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 4 or not cells[2].isdigit() or not cells[3].replace(".", "", 1).isdigit():
            continue  # the driver reports no number: an unreachable card, or shared memory (GH200)
        if wanted is None or any(part and (part == cells[0] or cells[1].startswith(part)) for part in wanted):
            gpus.append((int(cells[2]) / 1024, float(cells[3])))
    return gpus
