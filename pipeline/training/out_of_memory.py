"""Smaller pieces of the same batch, after a process ran out of memory.

    shrunk = next_smaller(error, recipe, cluster, "sft", world)    which setting is halved for the next attempt
    cluster, notes = apply_shrinks(shrinks, recipe, cluster, "sft", world)    at the start of that attempt

A training stage halves the rows of a device and doubles the accumulation, so the global batch and the order of the rows
stay; what generates halves the rows that it generates at once, or lowers vLLM's share of the GPU. The artifact records
it: sums of another order differ in their last bits. A setting that the user has changed since is the user's.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pipeline.config.cluster import AUTO_EVALUATE, Cluster, batches, generation_sizes
from pipeline.config.recipe import Recipe, divisors
from pipeline.workflow.progress import Shrink

ENGINES = Path(__file__).parents[1] / "engines"
ROWS = "cluster.generation.grpo.rows"
SHARE_FACTOR, LEAST_SHARE = 0.8, 0.1  # of vLLM's share of a GPU
NOTE = "{name}: {before:g} was out of memory, so it is {after:g}; sums of another order differ in their last bits"


def next_smaller(error: BaseException, recipe: Recipe, cluster: Cluster, stage: str, world: int) -> Shrink | None:
    """Return the setting that the next attempt makes smaller; None where nothing is left to make smaller."""
    generates = stage == "evaluate" or any(
        Path(frame.filename).is_relative_to(ENGINES) for frame in traceback.extract_tb(error.__traceback__)
    )
    engine = getattr(cluster.generation, stage).engine if stage in ("grpo", "evaluate") else "none"
    names = [f"cluster.{stage}.per_device_batch_size"]
    if generates:
        names = {"grpo": [ROWS], "evaluate": ["cluster.evaluate_batch_size"]}.get(stage, names)
    if engine == "vllm":
        share = f"cluster.generation.{stage}.gpu_memory"
        names = [share] if generates else [*names, share]
    for name in names:
        before = _value(name, recipe, cluster, stage, world)
        after = _smaller(name, before)
        if after < before:
            return Shrink(name, before, after)
    return None


def apply_shrinks(
    shrinks: Sequence[Shrink], recipe: Recipe, cluster: Cluster, stage: str, world: int
) -> tuple[Cluster, list[str]]:
    """Return the cluster with its settings as small as earlier attempts found necessary, and a note for each."""
    notes: dict[str, str] = {}
    configured: dict[str, float] = {}
    for shrink in shrinks:
        if _value(shrink.name, recipe, cluster, stage, world) != shrink.before:
            continue
        cluster = _with(shrink, cluster, stage)
        before = configured.setdefault(shrink.name, shrink.before)
        notes[shrink.name] = NOTE.format(name=shrink.name, before=before, after=shrink.after)
    return cluster, list(notes.values())


def _kind(stage: str) -> Literal["sft", "grpo"]:
    return "sft" if stage == "sft" else "grpo"


def _value(name: str, recipe: Recipe, cluster: Cluster, stage: str, world: int) -> float:
    """Return what a setting is, with every `auto` resolved."""
    if name.endswith("gpu_memory"):
        return float(getattr(cluster.generation, stage).gpu_memory)
    if name == "cluster.evaluate_batch_size":
        return AUTO_EVALUATE if cluster.evaluate_batch_size == "auto" else cluster.evaluate_batch_size
    sizes, _ = batches(cluster, recipe, _kind(stage), world)
    if sizes is None:
        return 1
    if name != ROWS:
        return sizes.per_device
    at_once = cluster.generation_batch_size
    rows = generation_sizes(recipe, sizes)[0] if at_once == "auto" else at_once
    return min(rows, cluster.generation.grpo.rows or rows)


def _smaller(name: str, before: float) -> float:
    if name.endswith("gpu_memory"):
        smaller = round(before * SHARE_FACTOR, 3)
        return smaller if smaller >= LEAST_SHARE else before
    half = max(1, int(before) // 2)
    if not name.endswith("per_device_batch_size"):
        return half
    return max(size for size in divisors(int(before)) if size <= half)  # whole shares of a batch and of a generation


def _with(shrink: Shrink, cluster: Cluster, stage: str) -> Cluster:
    generation, after = cluster.generation, int(shrink.after)
    if shrink.name.endswith("gpu_memory"):
        chosen = replace(getattr(generation, stage), gpu_memory=shrink.after)
        return replace(cluster, generation=replace(generation, **{stage: chosen}))
    if shrink.name == "cluster.evaluate_batch_size":
        return replace(cluster, evaluate_batch_size=after)
    if shrink.name == ROWS:
        return replace(cluster, generation=replace(generation, grpo=replace(generation.grpo, rows=after)))
    layout = replace(cluster.layout(stage), per_device_batch_size=after)
    return replace(cluster, sft=layout) if stage == "sft" else replace(cluster, grpo=layout)
