"""A stage, the table of stages, and the harness every stage process runs in.

    python -m pipeline.sft RECIPE [key=value …]     by hand: becomes `python -m pipeline run --stages sft …`
    torchrun --nproc_per_node=2 -m pipeline.sft RECIPE …     the same, in the processes torchrun has started
    torchrun … -m pipeline.sft --step DIR           by a launcher: everything it needs is in DIR/step.json

A stage module defines `run(recipe, inputs, out, runtime) -> metrics`; only the harness calls it. The harness
holds the owner file, joins the process group, keeps the progress file, and commits the artifact, last.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline import faults
from pipeline.artifact import STEP, STOP, WARNINGS, Artifact, commit, is_done, open_artifact, own
from pipeline.cluster import Cluster, process_count
from pipeline.errors import EXIT_FAULT, ArtifactError, LaunchError, PipelineError, Stopped, explain_disk, run_main
from pipeline.files import write_json
from pipeline.fingerprint import plain
from pipeline.progress import ProgressFile, many_attempts
from pipeline.recipe import Recipe
from pipeline.records import read_mapping, read_record
from pipeline.runtime import Runtime, show_hardware
from pipeline.task_code import code_of
from pipeline.typed import build


@dataclass(frozen=True)
class Stage:
    """A row of the table. `reads` are the parts of a recipe that decide its result; `revision` its code."""

    name: str
    about: str
    reads: tuple[str, ...]
    revision: int
    processes: str  # "one", or "all": under torchrun with every process of the cluster

    @property
    def module(self) -> str:
        return f"pipeline.{self.name}"


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "preprocess",
            "rows, splits and their proof; for a model from scratch also its tokenizer and first weights",
            ("seed", "model.name", "model.revision", "model.scratch", "model.gguf", "model.chat_template", "task"),
            1,
            "one",
        ),
        Stage("sft", "supervised fine-tuning on the task's targets", ("seed", "model", "lora", "sft"), 1, "all"),
        Stage("grpo", "reinforcement learning from the task's rewards", ("seed", "model", "lora", "grpo"), 1, "all"),
        Stage("evaluate", "answers to every test row, graded", ("seed", "model", "evaluate"), 2, "all"),
        Stage("report", "the models side by side, with intervals and curves", ("seed", "evaluate"), 3, "one"),
        Stage("export", "a checkpoint for others: adapter, merged model or GGUF, with its card", ("model",), 1, "one"),
    )
}


@dataclass(frozen=True)
class Order:
    """What a stage process is told: `step.json` of its folder. Nothing else decides what it does."""

    name: str  # such as evaluate-grpo
    stage: str
    fingerprint: str
    payload: dict[str, Any]
    recipe: Recipe
    cluster: Cluster
    inputs: dict[str, str]  # role -> folder
    checkpoint: str | None = None  # weights to evaluate that are no step's, or to export
    options: dict[str, str] = field(default_factory=dict)  # of an export: format, quant, source, trained_in


def write_order(folder: Path, order: Order) -> None:
    """Tell the process that will run in `folder` what to do; an earlier request to stop is over."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STOP).unlink(missing_ok=True)
    write_json(folder / STEP, plain(order))


def read_order(folder: Path) -> Order:
    record = read_mapping(folder / STEP)
    if record is None:
        raise ArtifactError(f"{folder / STEP} is missing: start the step with python -m pipeline run")
    recipe, problems = build(Recipe, record.get("recipe"), "recipe")
    cluster, more = build(Cluster, record.get("cluster"), "cluster")
    if recipe is None or cluster is None:
        raise ArtifactError(
            *(f"{folder / STEP}: {problem}" for problem in problems + more),
            "it was written by another version of the project; delete the folder and run again",
        )
    order = read_record(folder / STEP, Order, recipe=recipe, cluster=cluster)
    assert order is not None
    if order.stage not in STAGES:
        raise ArtifactError(f"{folder / STEP}: stage: got {order.stage!r}; expected one of {', '.join(STAGES)}")
    return order


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
        from pipeline.layouts import refusals

        if problems := refusals(folder, order.recipe, order.cluster, order.stage, world):
            raise ArtifactError(*problems)


def _hardware(order: Order, runtime: Runtime) -> dict[str, Any]:
    """What a stage with a model runs on, refused where it is not what the cluster asks for; for its provenance."""
    if STAGES[order.stage].processes == "one":
        return {}
    from pipeline import devices

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
    from pipeline import devices, distributed

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
        from pipeline import distributed

        distributed.leave_together(lambda: is_done(folder))


def _out_of_memory(error: Exception, order: Order) -> str | None:
    """The sentence for a GPU whose memory ran out; only a process that has loaded torch can have such an error."""
    if "torch" not in sys.modules or STAGES[order.stage].processes == "one":
        return None
    from pipeline import devices

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


def stage_processes(stage: Stage, cluster: Cluster) -> int:
    """How many processes a stage is started with on one node."""
    return process_count(cluster) if stage.processes == "all" else 1
