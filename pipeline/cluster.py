"""Where a plan runs and how wide: processes, threads, per-device sizes, ZeRO, checkpoints, loggers.

    cluster, problems = read_cluster("local", ["sft.deepspeed=none"])

`configs/clusters/local.yaml` ← `configs/clusters/<name>.yaml` ← the command line's `cluster.key=value`. Nothing
here is ever part of a result's identity: the same recipe on another cluster is the same step.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.recipe import CONFIGS, Recipe, find_yaml, read_typed
from pipeline.typed import Positive

CLUSTERS = CONFIGS / "clusters"
DEEPSPEED = Path("deepspeed")


@dataclass(frozen=True)
class TrainingStage:
    """How one training stage is laid out on the devices."""

    per_device_batch_size: Positive | Literal["auto"]
    deepspeed: str  # none, or the name of a file in deepspeed/
    gradient_checkpointing: bool


@dataclass(frozen=True)
class Cluster:
    name: str
    launcher: Literal["local"]
    processes: Positive | Literal["auto"]  # per node; auto: one a GPU, on a CPU one a core, two at most
    threads: Positive | Literal["auto"]  # per process; auto: cores ÷ processes
    sft: TrainingStage
    grpo: TrainingStage
    evaluate_batch_size: Positive  # prompts generated at once by each process
    save_steps: Positive
    keep_checkpoints: Positive
    logging_steps: Positive
    loggers: tuple[Literal["tensorboard"], ...]
    stop_grace: Positive  # seconds a process has to end after it was asked to

    def problems(self) -> list[str]:
        """What cannot be, before any recipe is looked at."""
        found = []
        known = deepspeed_names()
        for name, stage in (("sft", self.sft), ("grpo", self.grpo)):
            if stage.deepspeed not in known:
                found.append(
                    f"cluster.{name}.deepspeed: {stage.deepspeed!r} is no file of {DEEPSPEED}/; "
                    f"use {' or '.join(known)}"
                )
        return found


def deepspeed_names() -> list[str]:
    return ["none", *sorted(file.stem for file in DEEPSPEED.glob("*.json"))]


def cluster_names() -> list[str]:
    return sorted(file.stem for file in CLUSTERS.glob("*.yaml"))


def read_cluster(name: str, overrides: Sequence[str] = ()) -> tuple[Cluster | None, list[str]]:
    """A cluster by name or by the path of its YAML file, and everything that is wrong with it."""
    file = find_yaml(name, "cluster", CLUSTERS, cluster_names())
    files = list(dict.fromkeys([CLUSTERS / "local.yaml", file]))
    cluster, problems = read_typed(Cluster, files, overrides, {"name": file.stem})
    return cluster, [f"cluster.{text}" if not text.startswith(("cluster.", "'")) else text for text in problems]


def gpu_count() -> int:
    """The GPUs this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    return len([p for p in Path("/dev").glob("nvidia[0-9]*") if p.name.removeprefix("nvidia").isdigit()])


def core_count() -> int:
    """The cores this process may use."""
    granted = os.environ.get("SLURM_CPUS_PER_TASK")
    return int(granted) if granted and granted.isdigit() else len(os.sched_getaffinity(0))


def process_count(cluster: Cluster) -> int:
    """Training processes on one node."""
    if cluster.processes != "auto":
        return cluster.processes
    return gpu_count() or min(2, core_count())


def thread_count(cluster: Cluster) -> int:
    """Threads of each process: together no more than the cores, or everything becomes many times slower."""
    if cluster.threads != "auto":
        return cluster.threads
    return max(1, core_count() // process_count(cluster))


@dataclass(frozen=True)
class Batches:
    """How a global batch is made of devices: global = processes × per_device × accumulation."""

    processes: int
    per_device: int
    accumulation: int


AUTO_PER_DEVICE = 16


def batches(
    cluster: Cluster, recipe: Recipe, stage: Literal["sft", "grpo"], processes: int | None = None
) -> tuple[Batches | None, list[str]]:
    """The layout of one training stage, or what does not divide and the nearest values that do."""
    processes = processes or process_count(cluster)
    settings = recipe.sft if stage == "sft" else recipe.grpo
    wanted, layout = settings.global_batch_size, cluster.sft if stage == "sft" else cluster.grpo
    if settings.optimizer.name == "muon" and layout.deepspeed == "none":
        return None, [
            f"{stage}.optimizer.name: 'muon' is DeepSpeed's, but cluster.{stage}.deepspeed is 'none'; "
            "use zero2, or an optimizer such as adamw_torch"
        ]
    if wanted % processes:
        lower, upper = wanted // processes * processes, -(-wanted // processes) * processes
        return None, [
            f"{stage}.global_batch_size: {wanted} cannot be shared by {processes} processes; "
            f"use {' or '.join(str(n) for n in (lower, upper) if n)}, or cluster.processes=1"
        ]
    share = wanted // processes
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    if layout.per_device_batch_size == "auto":
        per_device = max(n for n in divisors if n <= AUTO_PER_DEVICE)
    else:
        per_device = layout.per_device_batch_size
    if share % per_device:
        near = [n for n in divisors if n < per_device][-1:] + [n for n in divisors if n > per_device][:1]
        return None, [
            f"cluster.{stage}.per_device_batch_size: {per_device} does not divide the {share} rows "
            f"that each of {processes} processes has of {stage}.global_batch_size {wanted}; "
            f"use {' or '.join(str(n) for n in near)}"
        ]
    return Batches(processes, per_device, share // per_device), []
