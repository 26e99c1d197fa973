"""Check a stage's devices against the cluster's settings, and record them.

    check_devices(cluster, smoke_test=False)                at the start of a stage process: LaunchError, or warnings
    describe_hardware(recipe, cluster, stage, world)        names, precision, attention, layout, planned memory
    explain_out_of_memory(error, stage, cluster)            the error message for a GPU that ran out of memory

This module only reads torch and /dev. models/loading.py chooses precision and attention.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import resource
from typing import Any, Literal

import torch

from pipeline.config.cluster import Cluster, driver_devices, wanted_gpus
from pipeline.config.recipe import Recipe
from pipeline.core.errors import LaunchError
from pipeline.models.loading import choose_attention, choose_dtype
from pipeline.sizing.engines import PACKAGES as VLLM_PACKAGES
from pipeline.sizing.fitting import needs
from pipeline.sizing.model_sizes import GIB
from pipeline.workflow.layouts import stage_layout

ALLOW_CPU = "THEREFORE_ALLOW_CPU"  # 1: stages of a cluster with GPUs may run on CPUs, for tests of cluster files
MEMORY_TOLERANCE = 0.9  # least share of cluster.gpu_memory that a GPU must have: its driver uses some itself


def check_devices(cluster: Cluster, *, smoke_test: bool) -> list[str]:
    """Raise LaunchError if this process cannot use the cluster's GPUs. Returns a warning for each difference.

    A smoke test may run on a CPU, with a warning, because its figures are not results.
    """
    if not wanted_gpus(cluster):
        return []
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if problem := device_error(local):
        if smoke_test or os.environ.get(ALLOW_CPU) == "1":
            return [f"cluster.gpus: got {cluster.gpus}, but this ran on the CPU: {problem}"]
        raise LaunchError(
            f"cluster.gpus: got {cluster.gpus} on {os.uname().nodename}, where torch cannot use a GPU; {problem}. "
            "cluster.gpus=0 trains on the CPU"
        )
    if local >= torch.cuda.device_count():
        raise LaunchError(
            f"cluster.processes: got a process number {local + 1} on {os.uname().nodename}; expected one for each of "
            f"its {torch.cuda.device_count()} GPUs. Fix: cluster.processes={torch.cuda.device_count()}"
        )
    return _differences(cluster, local)


def device_error(index: int = 0) -> str | None:
    """Return why torch cannot compute on a GPU here, with a fix; None if it can. Selects GPU `index`."""
    if torch.cuda.is_available():
        try:
            if index < torch.cuda.device_count():
                torch.cuda.set_device(index)
                torch.zeros(1, device=f"cuda:{index}")
        except (RuntimeError, AssertionError) as error:
            return (
                f"CUDA fails at its first use: {str(error).strip().splitlines()[0]}. Fix: use another node, or repair "
                "the node's driver"
            )
        return None
    built = torch.version.cuda or torch.version.hip
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", os.environ.get("HIP_VISIBLE_DEVICES"))
    if built is None:
        return f"torch {torch.__version__} has neither CUDA nor ROCm. Fix: run scripts/setup on a node with a GPU"
    if not driver_devices():
        return "there is no device file of a driver (/dev/nvidia0, /dev/kfd). Fix: request a node with GPUs (--gres)"
    if visible in ("", "-1"):
        return (
            "CUDA_VISIBLE_DEVICES hides all GPUs. Fix: unset it, or request GPUs from Slurm (cluster.slurm.gpu_type, "
            "--gres)"
        )
    return (
        f"torch {torch.__version__} was built for {built}, which the driver does not support. Fix: compare "
        "nvidia-smi's CUDA version; install an older torch or a newer driver"
    )


def _differences(cluster: Cluster, index: int) -> list[str]:
    """Return a warning for each setting of the cluster's GPUs that this GPU does not match."""
    card = torch.cuda.get_device_properties(index)
    found = []
    if cluster.gpu_memory and card.total_memory < MEMORY_TOLERANCE * cluster.gpu_memory * GIB:
        found.append(
            f"cluster.gpu_memory: got {cluster.gpu_memory:g}; expected at most {card.total_memory / GIB:.1f}, which "
            f"{card.name} has. Fix: cluster.gpu_memory={card.total_memory / GIB:.1f}, so that batches fit into it"
        )
    capability = card.major + card.minor / 10
    if cluster.compute_capability and torch.version.hip is None and capability != cluster.compute_capability:
        found.append(
            f"cluster.compute_capability: got {cluster.compute_capability:g}; expected {capability:g}, which "
            f"{card.name} has. Fix: cluster.compute_capability={capability:g}; precision follows the card"
        )
    return found


def describe_hardware(recipe: Recipe, cluster: Cluster, stage: str, world: int) -> dict[str, Any]:
    """Return a stage's device, precision, attention, layout and planned memory, for the artifact's provenance."""
    on_gpu = torch.cuda.is_available()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "precision": str(choose_dtype(recipe.model)).removeprefix("torch."),
        "attention": choose_attention(recipe.model),
    }
    if on_gpu:
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["compute_capability"] = card.major + card.minor / 10
        found["gpu_memory_gib"] = round(card.total_memory / GIB, 2)
        found["runtime"] = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    if stage in ("sft", "grpo"):
        found["layout"] = str(stage_layout(recipe, cluster, stage, processes=world))
    if stage in ("grpo", "evaluate"):
        found["engine"] = engine_version(getattr(cluster.generation, stage).engine)
    planned = {need.phase: round(need.total / GIB, 2) for need in needs(recipe, cluster) or ()}
    mine = {phase: size for phase, size in planned.items() if phase.split()[0].rstrip(",:") == stage}
    if mine:
        found["planned_gib"] = mine
    return found


def engine_version(engine: str) -> str:
    """Return the engine that generates text, with its version."""
    if engine != "vllm":
        return "transformers"  # its version is among those of every step
    for package in VLLM_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{package} {importlib.metadata.version(package)}"
    return engine


def measured_usage() -> dict[str, float]:
    """Return the peak memory of this process in GiB: allocated and reserved on its GPU, or resident without a GPU."""
    if torch.cuda.is_available():
        return {
            "allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
        }
    return {"resident_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 3)}


def explain_out_of_memory(error: BaseException, stage: str, cluster: Cluster) -> str | None:
    """Return the error message for a GPU that ran out of memory, with a fix; None for any other error."""
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in text:
        return None
    if "DefaultCPUAllocator" in text:
        return (
            f"{stage}: the host's memory ran out ({text.strip().splitlines()[0]}). Fix: raise cluster.slurm.memory, or "
            "lower cluster.processes"
        )
    held = measured_usage()
    reserved = f" with {held['reserved_gib']:.1f} GiB reserved" if "reserved_gib" in held else ""
    return (
        f"{stage}: the GPU's memory ran out{reserved}. Fix: {_remedies(stage, cluster)}; the same command then resumes"
    )


def _remedies(stage: str, cluster: Cluster) -> str:
    """Return overrides with which the stage needs less memory."""
    if stage not in ("sft", "grpo"):
        size = cluster.evaluate_batch_size
        smaller = max(1, size // 2) if isinstance(size, int) else 8
        spread = "cluster.max_memory={gpu: GIB, cpu: GIB}, which keeps a part of the model on the CPU"
        return spread if size == 1 else f"cluster.evaluate_batch_size={smaller}, or {spread}"
    kind: Literal["sft", "grpo"] = "sft" if stage == "sft" else "grpo"
    layout, overrides = getattr(cluster, kind), []
    rows = layout.per_device_batch_size
    if rows == "auto" or rows > 1:
        overrides.append(f"cluster.{kind}.per_device_batch_size={1 if rows == 'auto' else max(1, rows // 2)}")
    if layout.gradient_checkpointing is not True:
        overrides.append(f"cluster.{kind}.gradient_checkpointing=true")
    if kind == "grpo" and cluster.generation_batch_size == "auto":
        overrides.append("cluster.generation_batch_size=N below what the log shows")
    elif kind == "grpo":
        overrides.append("a smaller cluster.generation_batch_size")
    if layout.deepspeed in ("none", "zero2"):
        overrides.append(f"cluster.{kind}.deepspeed=zero3 (a step that has checkpoints starts again)")
    shorter = "sft.max_length" if kind == "sft" else "grpo.max_completion_length"
    return f"{', '.join(overrides) or 'larger GPUs'}, or a smaller {shorter} (another step)"
