"""Estimate the memory a stage needs of a node: what is offloaded there, and what is loaded there before a GPU has it.

    too_large(recipe, cluster)      [(stage, bytes, what)] of stages that need more than a node has
    limit(cluster)                  bytes of a node; None where nobody knows

Offloaded states and loaded weights are exact; what a process itself takes is an estimate.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from pipeline.config.cluster import Cluster, process_count, wanted_gpus
from pipeline.config.recipe import Recipe
from pipeline.core.cgroups import memory_limit
from pipeline.sizing.memory import weights_of, zero_of
from pipeline.sizing.model_sizes import BYTES_16, BYTES_32, GIB, adapter_parameters, known_dims, random_dims

PROCESS = 3 * GIB  # Python, torch, CUDA's libraries and buffers of one process: an estimate
SLURM_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
UNITS = {"K": 2**10, "": 2**20, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class HostMemoryEstimate:
    """The memory that a stage needs of each node."""

    stage: str
    bytes: float
    what: str


def limit(cluster: Cluster) -> float | None:
    """Return the bytes that a stage may take of a node: the job's request to Slurm, or this machine's memory."""
    if cluster.submits:
        return slurm_bytes(cluster.slurm.memory or "")
    mine = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    group, _ = memory_limit()  # a container or a job may have less
    return min(mine, group) if group else mine


def slurm_bytes(text: str) -> float | None:
    """`64G`, `500M`, or `64000`, which Slurm reads as megabytes; None for 0 (all of a node) and for what it is not."""
    found = SLURM_SIZE.fullmatch(text.strip())
    return float(found[1]) * UNITS[found[2].upper()] or None if found else None


def host_estimates(recipe: Recipe, cluster: Cluster) -> list[HostMemoryEstimate]:
    """Estimate each stage on a cluster without `auto`; nothing where model or layout are not known."""
    if recipe.model.random_init:
        drawn = BYTES_32 * random_dims(recipe.model.random_init).parameters
        return [
            HostMemoryEstimate("preprocess", drawn, f"{drawn / GIB:.0f} of the weights that it initialises in 32 bit")
        ]
    dims = known_dims(recipe.model)
    if dims is None or not wanted_gpus(cluster):
        return []
    processes, found = process_count(cluster), []
    lora = recipe.lora.enabled
    trained = adapter_parameters(dims, recipe.lora) if lora else dims.parameters
    for stage in recipe.stages:
        layout = cluster.layout(stage)
        if layout.deepspeed == "auto":
            continue
        zero, optimizer = zero_of(layout.deepspeed), recipe.training(stage).optimizer
        moments = 2 if "8bit" in optimizer.name else 8
        offloaded = trained / cluster.nodes * (2 * BYTES_32 + moments) * zero.optimizer_on_cpu
        offloaded += dims.parameters / cluster.nodes * BYTES_16 * zero.weights_on_cpu
        if stage == "grpo" and lora and cluster.generation.grpo.engine == "vllm" and cluster.generation.grpo.sleep:
            offloaded += weights_of(recipe.model, dims).total * processes  # where vLLM's copy of the base sleeps
        loaded = 0.0  # a quantized model is read to its GPU, and ZeRO-3 maps the files
        if recipe.model.quantization == "none" and zero.stage < 3:
            loaded = dims.parameters * (BYTES_16 if lora else BYTES_32) * processes
        parts = [f"{processes * PROCESS / GIB:.0f} of {processes} processes (estimate)"]
        if offloaded > loaded:
            parts.insert(0, f"{offloaded / GIB:.0f} of what {_keeper(layout.deepspeed, cluster, stage)} keeps there")
        elif loaded:
            wide = "16" if lora else "32"
            parts.insert(0, f"{loaded / GIB:.0f} of the weights in {wide} bit, which each process loads there first")
        found.append(HostMemoryEstimate(stage, max(offloaded, loaded) + processes * PROCESS, " and ".join(parts)))
    return found


def _keeper(deepspeed: str, cluster: Cluster, stage: str) -> str:
    sleeps = stage == "grpo" and cluster.generation.grpo.engine == "vllm" and cluster.generation.grpo.sleep
    return "vLLM" if sleeps and not zero_of(deepspeed).optimizer_on_cpu else deepspeed


def too_large(recipe: Recipe, cluster: Cluster) -> list[HostMemoryEstimate]:
    """Return the stages that need more of a node than it has, on a cluster without `auto`."""
    most = limit(cluster)
    return [need for need in host_estimates(recipe, cluster) if most is not None and need.bytes > most]
