"""Decide which steps run at the same time on this machine: those whose cores, GPUs and memory are free.

    room = Room(cluster)
    more = room.take(step)      variables of the environment of its processes; None while it has to wait
    room.leave(step)

A step that runs alone may take more than there is. On GPUs, where each process has one and the work is there, a process
counts as one core. A step whose memory is not known has the machine for itself.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal

from pipeline.config.cluster import Cluster, core_count, driver_devices, gpu_count, process_count, thread_count
from pipeline.sizing.fitting import resolve_auto
from pipeline.sizing.host_memory import PROCESS, host_estimates, limit
from pipeline.sizing.memory import evaluation_estimate, training_estimates
from pipeline.sizing.model_sizes import BYTES_32, known_dims, random_dims
from pipeline.workflow.plan import Step
from pipeline.workflow.stage import EvaluateEndpoint


@dataclass(frozen=True)
class Share:
    """What a step takes of the machine."""

    cores: int
    gpus: int
    memory: float  # bytes of the host; infinite where it is not known


def share_of(step: Step, cluster: Cluster) -> Share:
    if isinstance(step.options, EvaluateEndpoint):
        return Share(0, 0, 0)  # it waits for a server
    if step.runs_as.processes == "one":
        return Share(1, 0, PROCESS)
    processes, gpus = process_count(cluster), visible_gpus(cluster)
    if not gpus:
        return Share(processes * thread_count(cluster, processes), 0, processes * _memory(step, cluster, on_gpu=False))
    used = len(gpus) if cluster.max_memory else min(processes, len(gpus))
    return Share(processes, used, processes * _memory(step, cluster, on_gpu=True))


def _memory(step: Step, cluster: Cluster, *, on_gpu: bool) -> float:
    """Return the bytes of the host that each process of a step takes; infinite where nobody knows."""
    recipe, random = step.recipe, step.recipe.model.random_init
    dims = random_dims(random) if random else known_dims(recipe.model)
    if dims is None:
        return math.inf
    resolved = resolve_auto(recipe, cluster)
    if on_gpu:
        estimated = [one.bytes for one in host_estimates(recipe, resolved) if one.stage == step.stage]
        return max(PROCESS + BYTES_32 * dims.parameters, *(one / process_count(cluster) for one in estimated), 0)
    if step.stage == "evaluate":
        return PROCESS + evaluation_estimate(recipe, resolved, dims).total
    stage: Literal["sft", "grpo"] = "sft" if step.stage == "sft" else "grpo"
    return PROCESS + max(phase.total for phase in training_estimates(recipe, resolved, dims, stage))


def visible_gpus(cluster: Cluster) -> list[str]:
    """The GPUs of this machine that a step may use, as CUDA_VISIBLE_DEVICES names them."""
    count = gpu_count() if cluster.gpus == "auto" else min(cluster.gpus, gpu_count())
    given = [part.strip() for part in os.environ.get(_variable(), "").split(",") if part.strip()]
    return (given or [str(number) for number in range(count)])[:count]


def _variable() -> str:
    devices = driver_devices()
    return "HIP_VISIBLE_DEVICES" if devices and devices[0].startswith("kfd") else "CUDA_VISIBLE_DEVICES"


class Room:
    """The machine, and what the steps that run have of it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.gpus = visible_gpus(cluster)
        self.taken: dict[str, tuple[Share, list[str]]] = {}  # by the label of a step

    def take(self, step: Step) -> dict[str, str] | None:
        """Give a step its share. Returns the variables that keep its processes to it; None while it is taken."""
        share = share_of(step, self.cluster)
        if share.cores and any(other.cores for other, _ in self.taken.values()) and not self._fits(share):
            return None
        used = [name for _, names in self.taken.values() for name in names]
        mine = [name for name in self.gpus if name not in used][: share.gpus]
        self.taken[step.label] = (share, mine)
        return {} if mine == self.gpus[: share.gpus] else {_variable(): ",".join(mine)}

    def leave(self, step: Step) -> None:
        del self.taken[step.label]

    def _fits(self, share: Share) -> bool:
        shares = [share, *(one for one, _ in self.taken.values())]
        most = limit(self.cluster)
        return (
            sum(one.cores for one in shares) <= core_count()
            and sum(one.gpus for one in shares) <= len(self.gpus)
            and (most is None or sum(one.memory for one in shares) <= most)
        )
