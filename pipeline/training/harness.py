"""The harness of every stage process.

    python -m pipeline.sft RECIPE [key=value …]     by hand: replaces itself by `python -m pipeline run --stages sft …`
    torchrun --nproc_per_node=2 -m pipeline.sft RECIPE …     the same, in the processes that torchrun has started
    torchrun … -m pipeline.sft --step DIR           by a launcher: DIR/step.json is the complete specification

A stage module defines `run(recipe, inputs, out, runtime) -> metrics`; only the harness calls it. The harness holds the
lock, updates the progress file, and commits the artifact last. It imports torch only for a stage that needs it.
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
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, Protocol

from pipeline.config.cluster import Cluster
from pipeline.config.recipe import Recipe
from pipeline.core import stopwatch
from pipeline.core.errors import (
    EXIT_FAILURE,
    ArtifactError,
    DiskError,
    Diverged,
    LaunchError,
    LostPeer,
    PipelineError,
    Stopped,
    explain_disk,
    run_main,
    write_problem,
)
from pipeline.core.files import appears
from pipeline.core.heartbeat import Failure, report_failure
from pipeline.core.project import TYPED_IN, enter_project
from pipeline.core.slurm_client import this_job, this_retry
from pipeline.workflow import faults
from pipeline.workflow.artifact import ARTIFACT, ATTEMPTS, SCHEMA, WARNINGS, Artifact, finalize, is_done, open_artifact
from pipeline.workflow.attempts import CONNECTION, DIVERGED, MEMORY, bad_batches, keep, kind_of, read_attempts, shrinks
from pipeline.workflow.lock import lock
from pipeline.workflow.progress import BadBatch, ProgressFile, Shrink, many_attempts, read_progress
from pipeline.workflow.runtime import Runtime, format_hardware
from pipeline.workflow.stage import STAGES, EvaluateEndpoint, StepSpec, read_spec
from pipeline.workflow.task_code import code_of
from pipeline.workflow.time_spent import add, queued_since
from pipeline.workflow.watchdog import dump_on_signal


class StageFunction(Protocol):
    def __call__(
        self, recipe: Recipe, inputs: Mapping[str, Artifact], out: Path, runtime: Runtime
    ) -> dict[str, Any]: ...


def main(stage: str, run: StageFunction) -> None:
    """Run the command line of a stage module."""
    run_main(lambda: _main(stage, run, sys.argv[1:]))


def _main(stage: str, run: StageFunction, argv: list[str]) -> int:
    given = argv[:1] == ["--step"] and len(argv) == 2
    if not given and "RANK" not in os.environ:  # started by hand: run the command line instead
        alone = stage == "export" or any(word in " ".join(argv) for word in ("--ckpt", "--endpoint"))
        command = ["export" if stage == "export" else "evaluate"] if alone else ["run", "--stages", stage]
        os.execv(sys.executable, [sys.executable, "-m", "pipeline", *command, *argv])
    argv, typed_in = enter_project(argv, STAGES[stage].module)
    if given:
        return _run_stage((typed_in or Path()) / argv[1], run)
    # started by torchrun: every rank makes the same plan and gets the same folder
    command = [sys.executable, "-m", "pipeline", "prepare", "--stages", stage, *argv]
    environment = {**os.environ, "THEREFORE_PROCESSES": os.environ["WORLD_SIZE"]}
    environment |= {TYPED_IN: str(typed_in)} if typed_in else {}
    prepared = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if prepared.returncode:
        return prepared.returncode
    return _run_stage(Path(prepared.stdout.splitlines()[-1]), run)


def _run_stage(folder: Path, run: StageFunction) -> int:
    """Run a step in this process, which its launcher or torchrun started; end the process if its parent dies."""
    faults.die_with_parent()
    dump_on_signal()
    stopwatch.begin(_process_start())
    return run_spec(folder, run)


def _process_start() -> float | None:
    """Return when this rank's torchrun started, or this process where there is none; None where that is not known."""
    parent = os.environ.get(faults.PARENT, "")
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and parent.isdigit()
    torchrun = stopwatch.process_start(int(parent)) if by_torchrun else None
    return torchrun or stopwatch.process_start()


def run_spec(folder: Path, run: StageFunction) -> int:
    """Run the step of `folder`/step.json, from its lock to its artifact. Returns 0."""
    spec = read_spec(folder)
    if is_done(folder):
        print(f"{folder} is done; nothing to do")
        return 0
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    started = time.time()
    with lock(folder) if rank == 0 else contextlib.nullcontext() as holder:
        if rank == 0:
            keep(folder, read_progress(folder))
        command = read_attempts(folder).command
        progress = ProgressFile(
            folder if rank == 0 else None, spec.name, command, lambda: queued_since(folder, spec.inputs)
        )
        cluster, shrunk = _as_small_as_needed(spec, folder, world)
        spec = replace(spec, cluster=cluster)
        runtime = Runtime(cluster, progress, rank, world, folder, holder, spec.options)
        code = code_of(spec.stage, spec.recipe.task.name, spec.recipe.grpo.rewards)  # as this process imported it
        try:
            if rank == 0:  # only its home must have the signing key; the other ranks end with it
                _refuse_checkpoints(spec, folder, world)
            for where in spec.inputs.values() if this_job() else ():  # another node has written it
                appears(Path(where) / ARTIFACT)
            inputs = {role: open_artifact(Path(where)) for role, where in spec.inputs.items()}
            if rank == 0:
                print(f"{spec.name} {spec.fingerprint}: {world} processes, {versions()}", flush=True)
            hardware = _hardware(spec, runtime)
            for note in shrunk:
                runtime.warn(note)
            metrics = run(spec.recipe, inputs, folder, runtime)
            stopwatch.enter("save")
            hardware |= _measured(spec, runtime)
            if warning := many_attempts(progress.now):
                runtime.warn(warning)
            if warnings := progress.now.warnings:
                metrics = {**metrics, WARNINGS: list(warnings)}
            runtime.check_lock()
            if rank == 0:
                provenance = {"hardware": hardware, "code": code}
                artifact = _artifact(spec, folder, metrics, started, world, provenance)
                finalize(artifact, lambda: add(progress.now.earlier, stopwatch.seconds()))
                progress.update(state="done", note="")
            _leave_together(folder, world)
        except Stopped as error:
            progress.update(state="stopped", problems=error.problems, exit_code=error.exit_code)
            raise
        except PipelineError as error:
            lost = CONNECTION if isinstance(error, LostPeer) else ""
            report_failure(Failure(rank, list(error.problems), lost, error.exit_code))
            with contextlib.suppress(OSError):  # the disk may be full
                bad = BadBatch(error.step, error.rows) if isinstance(error, Diverged) else None
                kind = DIVERGED if bad and len(bad_batches(folder)) < _may_skip(spec) else lost
                problems, failed = error.problems, error.exit_code
                progress.update(state="failed", problems=problems, exit_code=failed, kind=kind, bad_batch=bad)
            raise
        except Exception as error:
            memory, shrink = _out_of_memory(error, spec, world)
            disk = None if memory else explain_disk(error, folder) or write_problem(folder)
            first_line = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            if disk and rank == 0:
                _discard_incomplete(folder, spec)
            problem = memory or disk or first_line
            kind = MEMORY if shrink else "" if memory or disk else kind_of(error)
            report_failure(Failure(rank, [problem], kind, EXIT_FAILURE, astuple(shrink) if shrink else None))
            with contextlib.suppress(OSError):  # the disk may be full all the same
                progress.update(state="failed", problems=(problem,), exit_code=EXIT_FAILURE, kind=kind, shrink=shrink)
            if memory:
                raise LaunchError(memory) from error
            if disk:
                raise DiskError(disk) from error
            raise
    return 0


def _discard_incomplete(folder: Path, spec: StepSpec) -> None:
    """Delete the checkpoint that a full disk cut off: that makes room to write down why the step ended."""
    if STAGES[spec.stage].trains:
        from pipeline.training.checkpoints import discard_incomplete

        discard_incomplete(folder / "checkpoints")


def _refuse_checkpoints(spec: StepSpec, folder: Path, world: int) -> None:
    """Raise ArtifactError, before a model is loaded, if this step's checkpoints cannot be resumed in this layout."""
    if STAGES[spec.stage].trains:
        from pipeline.workflow.layouts import resume_problems

        if problems := resume_problems(folder, spec.recipe, spec.cluster, spec.stage, world):
            raise ArtifactError(*problems)


def _hardware(spec: StepSpec, runtime: Runtime) -> dict[str, Any]:
    """Check the devices of a stage with a model. Returns its hardware for the provenance; {} for other stages."""
    if isinstance(spec.options, EvaluateEndpoint):
        return {"device": f"{spec.options.endpoint.model} at {spec.options.endpoint.url}", "engine": "endpoint"}
    if spec.runs_as.processes == "one":
        return {}
    from pipeline.training import devices

    for warning in devices.check_devices(spec.cluster, smoke_test=spec.recipe.smoke_test):
        runtime.warn(warning)
    found = devices.describe_hardware(spec.recipe, spec.cluster, spec.stage, runtime.world)
    if runtime.rank == 0:
        print(format_hardware(found), flush=True)
    return found


def _measured(spec: StepSpec, runtime: Runtime) -> dict[str, Any]:
    """Return the peak memory over all processes of a stage with a model, for comparison with the plan; also print it.

    Warnings of ranks other than 0 (a different GPU on another node) are repeated here.
    """
    if spec.runs_as.processes == "one":
        return {}
    from pipeline.training import devices, distributed

    own: dict[str, Any] = {"usage": devices.measured_usage(), "warnings": list(runtime.progress.now.warnings)}
    records = distributed.to_rank_0(own)
    for rank, record in enumerate(records):
        for warning in record["warnings"]:
            if warning not in records[0]["warnings"]:
                runtime.warn(f"rank {rank}: {warning}")
    if not records:
        return {}
    usages = [record["usage"] for record in records]
    found = {"measured": {name: max(usage[name] for usage in usages if name in usage) for name in usages[0]}}
    print(format_hardware(found), flush=True)
    return found


def _leave_together(folder: Path, world: int) -> None:
    """Keep every process until rank 0 has committed: torchrun and srun end a step whose processes end far apart."""
    if world > 1:
        from pipeline.training import distributed

        distributed.exit_together(lambda: appears(folder / ARTIFACT, 10.0) and is_done(folder))


def _as_small_as_needed(spec: StepSpec, folder: Path, world: int) -> tuple[Cluster, list[str]]:
    """Return the cluster with the settings that earlier attempts found too large made smaller, and notes about them."""
    if this_job() and this_retry():  # written by the node that decided; every rank must read the same
        appears(folder / ATTEMPTS)
    if spec.runs_as.processes == "one" or not (found := shrinks(folder)):
        return spec.cluster, []
    from pipeline.training.out_of_memory import apply_shrinks

    return apply_shrinks(found, spec.recipe, spec.cluster, spec.stage, world)


def _may_skip(spec: StepSpec) -> int:
    return spec.cluster.skip_bad_batches if STAGES[spec.stage].trains else 0


def _out_of_memory(error: Exception, spec: StepSpec, world: int) -> tuple[str | None, Shrink | None]:
    """Return the message for a device that ran out of memory, and what the next attempt makes smaller; else None."""
    if "torch" not in sys.modules or spec.runs_as.processes == "one":
        return None, None
    from pipeline.training import devices, out_of_memory

    message = devices.explain_out_of_memory(error, spec.stage, spec.cluster)
    if message is None:
        return None, None
    return message, out_of_memory.next_smaller(error, spec.recipe, spec.cluster, spec.stage, world)


def _artifact(
    spec: StepSpec, folder: Path, metrics: dict[str, Any], started: float, world: int, more: dict[str, Any]
) -> Artifact:
    """Return the step's record. `more` is added to its provenance: `hardware` of a stage with a model, and `code`."""
    ended = time.time()
    return Artifact(
        step=spec.name,
        stage=spec.stage,
        recipe=spec.recipe.name,
        fingerprint=spec.fingerprint,
        payload=spec.payload,
        inputs=spec.inputs,
        files={},
        metrics=metrics,
        provenance={
            "started": started,
            "seconds": ended - started,
            "processes": world,
            "cluster": spec.cluster.name,
            "smoke_test": spec.recipe.smoke_test,  # its figures are not results: the model is shrunken
            "versions": versions(),
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "git": git_commit(),
            **more,
        },
        folder=folder,
        role=spec.role,
        schema=SCHEMA,
    )


PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "bitsandbytes")


def versions() -> dict[str, str]:
    """Return the installed versions of the packages a result depends on, without importing them."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_commit() -> str | None:
    """Return the commit of the project, with `+` if files differ from it; None outside a checkout."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], capture_output=True, text=True, timeout=20)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+" if git("status", "--porcelain") else "") if commit else None
    except (OSError, subprocess.TimeoutExpired):
        return None
