"""The processes of one stage: which one this is, how they wait for each other and agree.

    python -m pipeline.training.distributed --nproc-per-node=2 -m pipeline.sft --step DIR

is torchrun, but ends with the exit code of the process that failed first, leaves the traceback to that process, and
says in one sentence which process a signal has ended. torchrun sets RANK, WORLD_SIZE and LOCAL_RANK; without it there
is one process. What rank 0 does alone (hashing, counting, committing) the others wait for in the rendezvous store and
not in a collective: that has no time limit and keeps no GPU busy.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from pipeline.core import cgroups, errors
from pipeline.core.errors import LaunchError, PipelineError
from pipeline.training import operators
from pipeline.workflow import faults

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
POLL = 0.2  # seconds between two looks for what rank 0 has done
CAUSE_WINDOW = 3  # seconds: failures that torchrun saw within these are causes; later ones it caused itself
_shared = 0  # values that rank 0 has given the others so far
_given = 0  # values that each has given rank 0 so far


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
            dist.init_process_group(backend, timeout=TIMEOUT)
            load_operator()
        ds.init_distributed(dist_backend=backend, timeout=TIMEOUT, verbose=False)
    else:
        dist.init_process_group(backend, timeout=TIMEOUT)


def load_operator() -> None:
    """Load DeepSpeed's shared-memory operator in every process, or in none: processes that differ would hang.

    The first process of each node builds it where it is missing; rank 0 says why gloo does its work instead.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    for mine in (first, not first):
        why = operators.load() if mine else None
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, why)
        failed = next((text for text in found if text), None)
        if failed:
            operators.switch_off()
            if rank() == 0:
                print(operators.explain(failed), flush=True)
            return


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_flag(flag: bool) -> bool:
    """Rank 0's answer, in every process: a decision that all ranks take at the same step."""
    if not dist.is_initialized():
        return flag
    answer = torch.tensor([int(flag)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.broadcast(answer, src=0)
    return bool(answer.item())


def from_rank_0(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0 (anything JSON holds), in every process.

    The others do not run it: they wait as long as rank 0 lives, and raise the PipelineError that it raises.
    """
    global _shared
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    _shared += 1
    key, store = f"therefore/{_shared}", _store()
    if rank() == 0:
        told: dict[str, Any]
        try:
            value = make()
        except BaseException as error:
            problems = list(error.problems) if isinstance(error, PipelineError) else [f"rank 0 failed: {error!r}"]
            name = type(error).__name__ if isinstance(error, PipelineError) else "LaunchError"
            store.set(key, json.dumps({"error": name, "problems": problems}))
            raise
        store.set(key, json.dumps({"value": value}))
        return value
    while not store.check([key]):
        time.sleep(POLL)
    told = json.loads(store.get(key))
    if "error" in told:
        kind = getattr(errors, told["error"], LaunchError)
        raise kind(*told["problems"])
    return cast("T", told["value"])


def to_rank_0(value: T) -> list[T]:
    """What every process gives (anything JSON holds), by rank, on rank 0; an empty list on the others."""
    global _given
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    _given += 1
    keys, store = [f"therefore/given/{_given}/{number}" for number in range(dist.get_world_size())], _store()
    store.set(keys[rank()], json.dumps(value))
    if rank() != 0:
        return []
    while not store.check(keys):
        time.sleep(POLL)
    return [cast("T", json.loads(store.get(key))) for key in keys]


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def exit_together(done: Callable[[], bool]) -> None:
    """The last thing of a stage: no process ends before rank 0 has, so that torchrun and srun see them end together.

    Rank 0 calls it after its commit. A store that is gone means that rank 0 has ended: well where `done()` says so.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    try:
        if rank() == 0:
            _store().set("therefore/left", "1")
            return
        while not _store().check(["therefore/left"]):
            time.sleep(POLL)
    except (RuntimeError, ConnectionError) as error:
        if rank() != 0 and not done():
            raise LaunchError(f"rank {rank()}: rank 0 ended before this step was committed; see its error") from error


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def reset() -> None:
    """Undo what a stage leaves in its process, so that another can run in it: the debug launcher does this."""
    if "deepspeed" in sys.modules and sys.modules["deepspeed"].comm.is_initialized():
        sys.modules["deepspeed"].comm.destroy_process_group()  # and the groups that it has made of it
    finish()
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    if "transformers.integrations.deepspeed" in sys.modules:
        sys.modules["transformers.integrations.deepspeed"].unset_hf_deepspeed_config()
    gc.collect()  # a model and its optimizer refer to each other


def torchrun(argv: list[str]) -> int:
    """Run torchrun. Returns 0, or the code of the first process that failed (128 + n where signal n ended it).

    A process that a signal has ended is named with the likely cause, here and in the step's progress file.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    faults.die_with_parent()
    os.environ[faults.PARENT] = str(os.getpid())
    began, kills = time.time(), cgroups.memory_kills()
    try:
        main(argv)
    except ChildFailedError as error:
        first = error.get_first_failure()[1]
        sentences = []
        for number, failure in sorted(error.failures.items()):
            caused = failure.exitcode == -signal.SIGTERM or failure.timestamp - first.timestamp > CAUSE_WINDOW
            who = f"rank {number} (process {failure.pid} on {os.uname().nodename})"
            if not caused and (sentence := faults.explain_death(who, failure.exitcode, kills)):
                sentences.append(sentence)
        if sentences:
            print("\n".join(f"error: {sentence}" for sentence in sentences), file=sys.stderr, flush=True)
            if "--step" in argv:
                faults.record_failure(Path(argv[argv.index("--step") + 1]), sentences, began)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(torchrun(sys.argv[1:]))
