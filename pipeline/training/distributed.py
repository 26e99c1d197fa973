"""The process group of a stage: ranks, barriers, broadcasts, and a wrapper around torchrun.

    python -m pipeline.training.distributed --nproc-per-node=2 -m pipeline.sft --step DIR

runs torchrun with three differences: it returns the exit code of the process that failed first, prints no traceback of
its own, and names a process that a signal has ended. torchrun sets RANK, WORLD_SIZE and LOCAL_RANK; without it there
is one process. While rank 0 works alone (hashing, counting, committing), the others wait on a key of the rendezvous
store. A collective would time out and keep the GPUs busy.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from pipeline.core import cgroups, errors, heartbeat, stopwatch
from pipeline.core.errors import LaunchError, LostPeer, PipelineError
from pipeline.training import operators
from pipeline.workflow import faults
from pipeline.workflow.progress import ATTEMPT, this_attempt

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
POLL = 0.2  # seconds between two reads of the store, at most
FIRST_POLL = 0.005  # seconds; most waits are short
CAUSE_WINDOW = 3  # seconds after the first failure; torchrun itself ends the processes that fail later
_shared = 0  # number of values broadcast from rank 0 so far
_given = 0  # number of values gathered on rank 0 so far


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(*, deepspeed: bool) -> None:
    """Join the process group: gloo on a CPU, NCCL on GPUs.

    DeepSpeed must initialize it before the model is built: on a CPU under ZeRO-3 it otherwise assumes one process.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if deepspeed:
        import deepspeed as ds

        if backend == "gloo":
            # DeepSpeed compiles Muon's products of small matrices: up to half a minute, for no speed on a CPU
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
            dist.init_process_group(backend, timeout=TIMEOUT)
            load_operator()
        ds.init_distributed(dist_backend=backend, timeout=TIMEOUT, verbose=False)
    else:
        dist.init_process_group(backend, timeout=TIMEOUT)


def load_operator() -> None:
    """Load DeepSpeed's shared-memory operator in every process, or in none: processes that differ would hang.

    The first process of each node builds it if it is missing; rank 0 prints why gloo is used instead.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    for loads_now in (first, not first):
        problem = operators.load() if loads_now else None
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        failed = next((text for text in problems if text), None)
        if failed:
            operators.switch_off()
            if rank() == 0:
                print(operators.explain(failed), flush=True)
            return


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized():
        heartbeat.wait()
        with stopwatch.part("wait"):
            dist.barrier()
        heartbeat.beat(long=True)


def meet() -> None:
    """Wait for every process, however long: work that is shared out may end far apart, and a barrier has a limit."""
    to_rank_0(None)
    from_rank_0(lambda: None)


def broadcast_flag(flag: bool) -> bool:
    """Return rank 0's flag in every process, so that all ranks decide alike at the same step."""
    if not dist.is_initialized():
        return flag
    value = torch.tensor([int(flag)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.broadcast(value, src=0)
    return bool(value.item())


def any_flag(flag: bool) -> bool:
    """Return, in every process, whether any of them has the flag."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    value = torch.tensor([int(flag)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    with stopwatch.part("wait"):
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())


def from_rank_0(make: Callable[[], T]) -> T:
    """Run `make` on rank 0 and return its result (a JSON value) in every process.

    The other ranks wait as long as rank 0 lives. They raise the same PipelineError as rank 0.
    """
    global _shared
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    _shared += 1
    key, store = f"therefore/{_shared}", _store()
    if rank() == 0:
        heartbeat.beat(long=True)
        try:
            value = make()
        except BaseException as error:
            problems = list(error.problems) if isinstance(error, PipelineError) else [f"rank 0 failed: {error!r}"]
            name = type(error).__name__ if isinstance(error, PipelineError) else "LostPeer"
            store.set(key, json.dumps({"error": name, "problems": problems}))
            raise
        store.set(key, json.dumps({"value": value}))
        return value
    _wait_for([key])
    heartbeat.beat(long=True)
    message = json.loads(store.get(key))
    if "error" in message:
        kind = getattr(errors, message["error"], LaunchError)
        raise kind(*message["problems"])
    return cast("T", message["value"])


def to_rank_0(value: T) -> list[T]:
    """Gather the value of every process (a JSON value). Returns them by rank on rank 0; an empty list elsewhere."""
    global _given
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    _given += 1
    keys, store = [f"therefore/given/{_given}/{number}" for number in range(dist.get_world_size())], _store()
    store.set(keys[rank()], json.dumps(value))
    if rank() != 0:
        return []
    _wait_for(keys)
    heartbeat.beat(long=True)
    return [cast("T", json.loads(store.get(key))) for key in keys]


def _wait_for(keys: list[str]) -> None:
    """Wait until the store has these keys, however long."""
    heartbeat.wait()
    pause = FIRST_POLL
    with stopwatch.part("wait"):
        while not _store().check(keys):
            time.sleep(pause)
            pause = min(POLL, 1.5 * pause)


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def exit_together(done: Callable[[], bool]) -> None:
    """Keep every process alive until rank 0 has committed; torchrun and srun end a step whose processes end far apart.

    Every rank calls it last. A lost store means that rank 0 has ended. Raises LaunchError if `done()` is then false.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    try:
        if rank() == 0:
            _store().set("therefore/left", "1")
            return
        _wait_for(["therefore/left"])
    except (RuntimeError, ConnectionError) as error:
        if rank() != 0 and not done():
            raise LostPeer(f"rank {rank()}: rank 0 ended before this step finished; see its error") from error


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def reset() -> None:
    """Reset the global state of a process after a stage, so that the debug launcher can run another stage in it."""
    if "deepspeed" in sys.modules and sys.modules["deepspeed"].comm.is_initialized():
        sys.modules["deepspeed"].comm.destroy_process_group()  # and its subgroups
    finish()
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    if "transformers.integrations.deepspeed" in sys.modules:
        sys.modules["transformers.integrations.deepspeed"].unset_hf_deepspeed_config()
    if zero := sys.modules.get("deepspeed.runtime.zero.partition_parameters"):
        # ZeRO-3 replaces this function for the rest of the process, and keeps the original under this name
        original = getattr(zero.InsertPostInitMethodToModuleSubClasses, "linear_bk", torch.nn.functional.linear)
        torch.nn.functional.linear = original
    gc.collect()  # a model and its optimizer form a reference cycle


def torchrun(argv: list[str]) -> int:
    """Run torchrun. Returns 0, or the exit code of the first process that failed (128 + n if signal n ended it).

    For a process that a signal has ended, stderr and the step's progress file get its rank and the likely cause.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    faults.die_with_parent()
    os.environ[faults.PARENT] = str(os.getpid())
    token = os.environ.setdefault(ATTEMPT, this_attempt() or uuid.uuid4().hex)
    kills = cgroups.memory_kills()
    try:
        main(argv)
    except ChildFailedError as error:
        first = error.get_first_failure()[1]
        messages = []
        for number, failure in sorted(error.failures.items()):
            caused = failure.exitcode == -signal.SIGTERM or failure.timestamp - first.timestamp > CAUSE_WINDOW
            who = f"rank {number} (process {failure.pid} on {os.uname().nodename})"
            if not caused and (message := faults.explain_death(who, failure.exitcode, kills)):
                messages.append(message)
        if messages:
            print("\n".join(f"error: {message}" for message in messages), file=sys.stderr, flush=True)
        if "--step" in argv:
            folder = Path(argv[argv.index("--step") + 1])
            faults.record_failure(folder, messages, token) if messages else faults.record_report(folder, token)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


if __name__ == "__main__":
    errors.run_main(lambda: torchrun(sys.argv[1:]))
