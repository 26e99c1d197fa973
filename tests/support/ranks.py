"""Two processes of one torchrun for tests/torch/test_faults.py.

python -m pipeline.training.distributed --standalone --nproc-per-node=2 tests/support/ranks.py MODE --step DIR
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.core.errors import ArtifactError
from pipeline.training import distributed
from pipeline.workflow import faults
from pipeline.workflow.progress import ProgressFile


def main(mode: str, folder: Path) -> None:
    faults.die_with_parent()
    rank = distributed.rank()
    progress = ProgressFile(folder if rank == 0 else None, "sft")
    distributed.start(deepspeed=False)
    progress.update(state="running")
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    if mode == "killed":
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            dist.all_reduce(torch.ones(1))
        except RuntimeError as error:
            progress.update(state="failed", problems=(str(error).splitlines()[0],), exit_code=1)
            raise
    elif mode == "asleep":
        time.sleep(120)
    else:
        share(rank, folder)


def share(rank: int, folder: Path) -> None:
    """What rank 0 makes is everyone's, an error too; then rank 0 works alone for a while and all end together."""
    made = []

    def make() -> list[str | None]:
        made.append(1)
        time.sleep(0.5)
        return ["checkpoint-4", None]

    def refuse() -> None:
        raise ArtifactError("of another layout", "Fix: none")

    found: dict[str, object] = {"value": distributed.from_rank_0(make), "made": len(made)}
    found["given"] = [distributed.to_rank_0([rank, word]) for word in "ab"]
    try:
        distributed.from_rank_0(refuse)
    except ArtifactError as error:
        found["problems"] = list(error.problems)
    if rank == 0:
        time.sleep(2)
        (folder / "committed").touch()
    distributed.exit_together((folder / "committed").exists)
    found["committed"] = (folder / "committed").exists()
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    distributed.finish()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[3]))
