"""The harness that every stage process runs in.

    python -m pipeline.sft RECIPE [key=value …]     by hand: becomes `python -m pipeline run --stages sft …`
    torchrun --nproc_per_node=2 -m pipeline.sft RECIPE …     the same, in the processes torchrun has started
    torchrun … -m pipeline.sft --step DIR           by a launcher: everything it needs is in DIR/step.json

A stage module defines `run(recipe, inputs, out, runtime) -> metrics`; only the harness calls it. It holds the owner
file, keeps the progress file, and commits the artifact, last. It imports torch for a stage that needs it, not before.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pipeline.config.recipe import Recipe
from pipeline.core.errors import EXIT_FAULT, ArtifactError, LaunchError, PipelineError, Stopped, explain_disk, run_main
from pipeline.workflow import faults
from pipeline.workflow.artifact import SCHEMA, WARNINGS, Artifact, commit, is_done, open_artifact, own
from pipeline.workflow.progress import ProgressFile, many_attempts
from pipeline.workflow.runtime import Runtime, show_hardware
from pipeline.workflow.stage import STAGES, Order, read_order
from pipeline.workflow.task_code import code_of


class Run(Protocol):
    def __call__(
        self, recipe: Recipe, inputs: Mapping[str, Artifact], out: Path, runtime: Runtime
    ) -> dict[str, Any]: ...


def main(stage: str, run: Run) -> None:
    """The command line of a stage module."""
    run_main(lambda: _main(stage, run, sys.argv[1:]))


def _main(stage: str, run: Run, argv: list[str]) -> int:
    if argv[:1] == ["--step"] and len(argv) == 2:
        return _work(Path(argv[1]), run)
    if "RANK" not in os.environ:  # a stage started by hand names the command line and becomes it
        alone = stage == "export" or "--ckpt" in " ".join(argv)
        asked = ["export" if stage == "export" else "evaluate"] if alone else ["run", "--stages", stage]
        os.execv(sys.executable, [sys.executable, "-m", "pipeline", *asked, *argv])
    # torchrun started us: every rank asks for the same plan and finds the same folder
    command = [sys.executable, "-m", "pipeline", "prepare", "--stages", stage, *argv]
    environment = {**os.environ, "THEREFORE_PROCESSES": os.environ["WORLD_SIZE"]}
    prepared = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if prepared.returncode:
        return prepared.returncode
    return _work(Path(prepared.stdout.splitlines()[-1]), run)


def _work(folder: Path, run: Run) -> int:
    faults.die_with_parent()
    order = read_order(folder)
    if is_done(folder):
        print(f"{folder} is done; nothing to do")
        return 0
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    started = time.time()
    with own(folder) if rank == 0 else contextlib.nullcontext() as owner:
        progress = ProgressFile(folder if rank == 0 else None, order.name)
        runtime = Runtime(order.cluster, progress, rank, world, folder, owner, order.checkpoint, order.options)
        code = code_of(order.stage, order.recipe.task.name, order.recipe.grpo.rewards)  # as this process imported it
        try:
            if rank == 0:  # whose home has the key; the others end with it
                _refuse_checkpoints(order, folder, world)
            inputs = {role: open_artifact(Path(where)) for role, where in order.inputs.items()}
            if rank == 0:
                print(f"{order.name} {order.fingerprint}: {world} processes, {versions()}", flush=True)
            hardware = _hardware(order, runtime)
            metrics = run(order.recipe, inputs, folder, runtime)
            hardware |= _measured(order, runtime)
            if sentence := many_attempts(progress.now):
                runtime.warn(sentence)
            if warnings := progress.now.warnings:
                metrics = {**metrics, WARNINGS: list(warnings)}
            runtime.check_still_owner()
            if rank == 0:
                provenance = {"hardware": hardware, "code": code}
                commit(_artifact(order, folder, metrics, started, world, provenance))
                progress.update(state="done", note="")
            _leave_together(folder, world)
        except Stopped as error:
            progress.update(state="stopped", problems=error.problems, exit_code=error.exit_code)
            raise
        except PipelineError as error:
            progress.update(state="failed", problems=error.problems, exit_code=error.exit_code)
            raise
        except Exception as error:
            memory = _out_of_memory(error, order)
            told = memory or explain_disk(error, folder) or f"{type(error).__name__}: {error}".strip().splitlines()[0]
            with contextlib.suppress(OSError):  # the disk may be full for this too
                progress.update(state="failed", problems=(told,), exit_code=EXIT_FAULT)
            if memory:
                raise LaunchError(memory) from error
            raise
    return 0


def _refuse_checkpoints(order: Order, folder: Path, world: int) -> None:
    """ArtifactError, before a model is loaded, where this step's checkpoints cannot be resumed as it was started."""
    if order.stage in ("sft", "grpo"):
        from pipeline.workflow.layouts import refusals

        if problems := refusals(folder, order.recipe, order.cluster, order.stage, world):
            raise ArtifactError(*problems)


def _hardware(order: Order, runtime: Runtime) -> dict[str, Any]:
    """What a stage with a model runs on, refused where it is not what the cluster asks for; for its provenance."""
    if STAGES[order.stage].processes == "one":
        return {}
    from pipeline.training import devices

    for sentence in devices.check_devices(order.cluster, rehearsal=order.recipe.rehearsal):
        runtime.warn(sentence)
    found = devices.describe(order.recipe, order.cluster, order.stage, runtime.world)
    if runtime.rank == 0:
        print(show_hardware(found), flush=True)
    return found


def _measured(order: Order, runtime: Runtime) -> dict[str, Any]:
    """The most memory that a process of a stage with a model has held, to be compared with what was planned.

    Also in the log. What other processes than rank 0 have warned of (another card, on another node) is reported too.
    """
    if STAGES[order.stage].processes == "one":
        return {}
    from pipeline.training import devices, distributed

    mine: dict[str, Any] = {"held": devices.measured(), "warnings": list(runtime.progress.now.warnings)}
    told = distributed.to_rank_0(mine)
    for rank, one in enumerate(told):
        for sentence in one["warnings"]:
            if sentence not in told[0]["warnings"]:
                runtime.warn(f"rank {rank}: {sentence}")
    if not told:
        return {}
    held = [one["held"] for one in told]
    found = {"measured": {name: max(one[name] for one in held if name in one) for name in held[0]}}
    print(show_hardware(found), flush=True)
    return found


def _leave_together(folder: Path, world: int) -> None:
    """Keep every process until rank 0 has committed: torchrun and srun end a step whose processes end far apart."""
    if world > 1:
        from pipeline.training import distributed

        distributed.leave_together(lambda: is_done(folder))


def _out_of_memory(error: Exception, order: Order) -> str | None:
    """The sentence for a GPU whose memory ran out; only a process that has loaded torch can have such an error."""
    if "torch" not in sys.modules or STAGES[order.stage].processes == "one":
        return None
    from pipeline.training import devices

    return devices.explain_out_of_memory(error, order.stage, order.cluster)


def _artifact(
    order: Order, folder: Path, metrics: dict[str, Any], started: float, world: int, more: dict[str, Any]
) -> Artifact:
    """The record of the step. `more` of its provenance: the `hardware` of a stage with a model, and the `code`."""
    ended = time.time()
    return Artifact(
        stage=order.name,
        recipe=order.recipe.name,
        fingerprint=order.fingerprint,
        payload=order.payload,
        inputs=order.inputs,
        files={},
        metrics=metrics,
        provenance={
            "started": started,
            "seconds": ended - started,
            "processes": world,
            "cluster": order.cluster.name,
            "rehearsal": order.recipe.rehearsal,  # of a shrunken model: no figure of it is a result
            "versions": versions(),
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "git": git_commit(),
            **more,
        },
        folder=folder,
        schema=SCHEMA,
    )


PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "bitsandbytes")


def versions() -> dict[str, str]:
    """The installed versions of the packages a result depends on, without importing them."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_commit() -> str | None:
    """The commit of the project, with `+` when files differ from it; None outside a checkout."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], capture_output=True, text=True, timeout=20)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit_ = git("rev-parse", "HEAD")
        return commit_ + ("+" if git("status", "--porcelain") else "") if commit_ else None
    except (OSError, subprocess.TimeoutExpired):
        return None
