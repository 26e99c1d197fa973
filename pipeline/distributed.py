"""The processes of one stage: which one this is, how they wait for each other and agree.

    python -m pipeline.distributed --nproc-per-node=2 -m pipeline.sft --step DIR

is torchrun, but ends with the exit code of the process that failed first, and leaves the traceback to that process.
torchrun sets RANK, WORLD_SIZE and LOCAL_RANK; without it there is one process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=30)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(*, deepspeed: bool) -> None:
    """Join the process group: gloo on a CPU, NCCL on GPUs.

    DeepSpeed has to start it itself before the model is built: on a CPU under ZeRO-3 it otherwise believes that
    the world is one process.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if deepspeed:
        import deepspeed as ds

        if backend == "gloo":
            build_operator()
        ds.init_distributed(dist_backend=backend, timeout=TIMEOUT, verbose=False)
    else:
        dist.init_process_group(backend, timeout=TIMEOUT)


def build_operator() -> None:
    """Have DeepSpeed's shared-memory operator built (once, under a minute), or say why gloo does its work.

    DeepSpeed itself would fail without a C++ compiler; the operator only makes the exchange between processes faster.
    """
    from deepspeed.ops import __compatible_ops__
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    builder = ShareMemCommBuilder()
    try:
        builder.load(verbose=False)
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        __compatible_ops__[builder.NAME] = False
        if rank() == 0:
            compiler = os.environ.get("CXX", "c++")
            why = str(error).strip().splitlines()[0] if shutil.which(compiler) else f"no C++ compiler ({compiler})"
            print(f"DeepSpeed's shared-memory operator cannot be built: {why}; gloo is used instead, which is slower. ")
            print("to build it, install g++ and Python's headers (Debian: apt install g++ python3-dev)", flush=True)


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized():
        dist.barrier()


def agree(flag: bool) -> bool:
    """Rank 0's answer, in every process: a decision that all ranks take at the same step."""
    if not dist.is_initialized():
        return flag
    answer = torch.tensor([int(flag)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.broadcast(answer, src=0)
    return bool(answer.item())


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def torchrun(argv: list[str]) -> int:
    """Run torchrun. Returns 0, or the code of the first process that failed (128 + n where signal n ended it)."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main(argv)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    return 0


if __name__ == "__main__":
    sys.exit(torchrun(sys.argv[1:]))
