"""Resolve a cluster's `auto` for a recipe, suggest overrides that make it fit, and print the memory table.

    python -m pipeline plan deepseek7b --cluster 2x2080ti --memory

Memory decides where the GPU and the model are known (memory.py). Where they are not, the smallest values are chosen for
any model that is not randomly initialised, and check reports that nothing was compared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.config.cluster import (
    AUTO_EVALUATE,
    AUTO_PER_DEVICE,
    Cluster,
    TrainingStage,
    batches,
    generation_sizes,
    process_count,
    wanted_gpus,
)
from pipeline.config.model_files import model_config
from pipeline.config.recipe import Recipe
from pipeline.sizing.engines import resolve_engines
from pipeline.sizing.host_memory import HostMemoryEstimate, too_large
from pipeline.sizing.memory import (
    FRAGMENTATION,
    MemoryEstimate,
    Stage,
    Term,
    evaluation_estimate,
    phases,
    shares_prompts,
    training_estimates,
    usable,
)
from pipeline.sizing.model_sizes import GIB, known_dims

AUTO_ZERO = ("zero2", "zero3", "zero3_offload")  # the cheapest first
UNKNOWN_AT_ONCE = 8  # prompts that are answered at once where nobody knows what fits
LIGHT = "paged_adamw_8bit"
ENOUGH_TOKENS = 4096  # of a device at once, that keep a GPU busy: more rows gain less than checkpointing costs
ENOUGH = (("fits",), ("fits", "tight"))


def resolve_auto(recipe: Recipe, cluster: Cluster) -> Cluster:
    """Return the cluster with every `auto` resolved for this recipe; the global batch stays the recipe's.

    The first ZeRO stage under which a batch fits, the cheapest first, and under it the largest batch per device; then
    the most completions at once that are expected to fit, because a token takes as long for one row as for many.
    """
    chosen = _resolve_sizes(recipe, resolve_engines(recipe, cluster))
    asked, engine = cluster.generation.grpo.engine, chosen.generation.grpo.engine
    if asked == "auto" and engine == "vllm" and not _grpo_fits(recipe, chosen):  # beside the trainer
        plain = replace(cluster.generation, grpo=replace(cluster.generation.grpo, engine="transformers"))
        return resolve_auto(recipe, replace(cluster, generation=plain))
    return chosen


def _resolve_sizes(recipe: Recipe, cluster: Cluster) -> Cluster:
    """Return the cluster with layouts and batches decided, those of generation last."""
    cluster = replace(cluster, sft=_resolve_stage(recipe, cluster, "sft"), grpo=_resolve_stage(recipe, cluster, "grpo"))
    return _resolve_generation(recipe, cluster)


def _grpo_fits(recipe: Recipe, cluster: Cluster) -> bool:
    dims = known_dims(recipe.model)
    if dims is None or not usable(cluster):
        return True
    return all(
        need.fit(usable(cluster)) != "does not fit" for need in training_estimates(recipe, cluster, dims, "grpo")
    )


def needs(recipe: Recipe, cluster: Cluster) -> list[MemoryEstimate] | None:
    """Estimate every phase of the recipe's stages, `auto` resolved; None where the model is not known."""
    return phases(recipe, resolve_auto(recipe, cluster))


def is_unknown(recipe: Recipe, cluster: Cluster) -> bool:
    """Return whether the GPUs' memory or the model is not known: `auto` is as small as it can be then."""
    if recipe.model.random_init or not wanted_gpus(cluster):
        return False
    return not usable(cluster) or known_dims(recipe.model) is None


def _resolve_stage(recipe: Recipe, cluster: Cluster, stage: Stage) -> TrainingStage:
    layout, on_gpus = cluster.layout(stage), wanted_gpus(cluster) > 0
    if layout.gradient_checkpointing == "auto" and (recipe.model.random_init or not on_gpus):
        layout = replace(layout, gradient_checkpointing=False)
    settings, world = recipe.training(stage), cluster.nodes * process_count(cluster)
    if layout.deepspeed == "auto" and world == 1 and not on_gpus and settings.optimizer.name != "muon":
        layout = replace(layout, deepspeed="none")  # there is nothing to share out, and no memory to save
    if "auto" not in (layout.deepspeed, layout.per_device_batch_size, layout.gradient_checkpointing):
        return layout
    share, dims, given = settings.global_batch_size // world, known_dims(recipe.model), layout.per_device_batch_size
    if dims is None or not usable(cluster) or settings.global_batch_size % world:
        small = given == "auto" and is_unknown(recipe, cluster)
        zero = AUTO_ZERO[0] if layout.deepspeed == "auto" else layout.deepspeed
        saving = layout.gradient_checkpointing in (True, "auto")
        one = 1 if small else given
        return replace(layout, deepspeed=zero, per_device_batch_size=one, gradient_checkpointing=saving)
    zeros = AUTO_ZERO if layout.deepspeed == "auto" else (layout.deepspeed,)
    if settings.optimizer.name == "muon":  # which DeepSpeed refuses under ZeRO-3
        zeros = zeros[:1]
    rows = [n for n in range(min(share, AUTO_PER_DEVICE), 0, -1) if share % n == 0] if given == "auto" else [given]
    asked = layout.gradient_checkpointing
    savings = [False, True] if asked == "auto" else [asked]
    options = [(n, saving) for saving in savings for n in rows]
    options = [one for one in options if one[1] is savings[-1] or one[0] == rows[0] or _busy(recipe, stage, one[0])]
    options.sort(key=lambda one: (_computed(recipe, cluster, stage, *one), -one[0]))
    choices = [
        replace(layout, deepspeed=zero, per_device_batch_size=n, gradient_checkpointing=saving)
        for zero in zeros
        for n, saving in options
    ]
    for enough in ENOUGH:
        for choice in choices:
            tried = _with(cluster, stage, choice)
            found = training_estimates(recipe, tried, dims, stage)
            held = all(need.fit(usable(cluster)) in enough for need in found)
            if held and stage not in {need.stage for need in too_large(recipe, tried)}:
                return choice
    return choices[-1]  # the smallest; check reports that it does not fit


def _longest(recipe: Recipe, stage: Stage) -> tuple[int, int]:
    """Return the tokens of a row's prompt, where rows share it, and of the rest."""
    if stage == "sft":
        return 0, recipe.sft.max_length
    return recipe.grpo.max_prompt_length, recipe.grpo.max_completion_length


def _busy(recipe: Recipe, stage: Stage, rows: int) -> bool:
    """Return whether so many rows keep a GPU busy."""
    return rows * sum(_longest(recipe, stage)) >= ENOUGH_TOKENS


def _computed(recipe: Recipe, cluster: Cluster, stage: Stage, rows: int, checkpointing: bool) -> float:
    """Return what a row costs: its tokens, its share of its prompt, and a third more where activations are not kept."""
    prompt, rest = _longest(recipe, stage)
    shared = stage == "grpo" and shares_prompts(recipe, cluster, rows)
    tokens = rest + prompt / (min(rows, recipe.grpo.num_generations) if shared else 1)
    return tokens * (4 / 3 if checkpointing else 1)


def _with(cluster: Cluster, stage: str, layout: TrainingStage) -> Cluster:
    return replace(cluster, sft=layout) if stage == "sft" else replace(cluster, grpo=layout)


def _resolve_generation(recipe: Recipe, cluster: Cluster) -> Cluster:
    """Return the cluster with the largest batches for generation, in GRPO and in evaluation."""
    dims = known_dims(recipe.model) if usable(cluster) else None
    sizes, _ = batches(cluster, recipe, "grpo")
    if cluster.generation_batch_size == "auto" and sizes:
        choices = [replace(cluster, generation_batch_size=n) for n in generation_sizes(recipe, sizes)]
        needed = [training_estimates(recipe, one, dims, "grpo")[1] for one in choices] if dims else []
        cluster = _first_that_fits(recipe, choices, needed, "generation_batch_size")
    if cluster.evaluate_batch_size == "auto":
        halved = [AUTO_EVALUATE, *(2**n for n in range(6, -1, -1))]
        choices = [replace(cluster, evaluate_batch_size=n) for n in halved]
        needed = [evaluation_estimate(recipe, one, dims) for one in choices] if dims else []
        cluster = _first_that_fits(recipe, choices, needed, "evaluate_batch_size")
    return cluster


def _first_that_fits(recipe: Recipe, choices: list[Cluster], needed: list[MemoryEstimate], name: str) -> Cluster:
    """Return the first of the choices, the largest first, that is expected to fit, else the last.

    Without needs to go by it is the first, on GPUs that are not known the first of at most `UNKNOWN_AT_ONCE`.
    """
    if needed:
        known = zip(choices, needed, strict=True)
        return next((one for one, need in known if need.fit(usable(one)) != "does not fit"), choices[-1])
    most = UNKNOWN_AT_ONCE if is_unknown(recipe, choices[0]) else getattr(choices[0], name)
    return next((one for one in choices if getattr(one, name) <= most), choices[-1])


# ---------------------------------------------------------------- remedies


def suggest_overrides(recipe: Recipe, cluster: Cluster) -> list[str]:
    """Return the smallest change that makes every phase fit, as overrides: one alone, else two, the mildest first."""
    changes = _changes(recipe, cluster)
    for words, changed in changes:
        if _all_fit(*changed):
            return words
    for number, (words, changed) in enumerate(changes):
        later = [" ".join(more) for more, _ in changes[number + 1 :]]
        for more, both in _changes(*changed):
            if " ".join(more) in later and _all_fit(*both):
                return [*words, *more]
    return []


def _all_fit(recipe: Recipe, cluster: Cluster) -> bool:
    """Return whether the GPUs hold every phase, as far as their memory is known, and the nodes their share."""
    decided = resolve_auto(recipe, cluster)
    found = phases(recipe, decided) or [] if usable(cluster) else []
    return all(need.fit(usable(cluster)) != "does not fit" for need in found) and not too_large(recipe, decided)


def host_remedies(recipe: Recipe, cluster: Cluster, over: list[HostMemoryEstimate]) -> list[str]:
    """Return overrides, each of which alone makes the nodes' memory suffice, and the GPUs' where it is known."""
    found = []
    if any(need.stage == "preprocess" for need in over):  # a randomly initialised model, of any size
        return ["a smaller model.random_init"]
    if cluster.submits:
        found.append(f"cluster.slurm.memory={-(-max(need.bytes for need in over) // GIB):.0f}G")
    names = [need.stage for need in over]
    for zero in AUTO_ZERO[:2]:
        changed = cluster
        for name in names:
            changed = _with(changed, name, replace(getattr(changed, name), deepspeed=zero))
        if changed != cluster and _all_fit(recipe, changed):
            found.append(" ".join(f"cluster.{name}.deepspeed={zero}" for name in names))
    if not recipe.lora.enabled:
        adapted = replace(recipe, lora=replace(recipe.lora, enabled=True))
        if _all_fit(adapted, cluster):
            return [*found, "lora.enabled=true"]
        packed = replace(adapted, model=replace(recipe.model, quantization="nf4"))
        if _all_fit(packed, cluster):
            return [*found, "lora.enabled=true model.quantization=nf4"]
    return found


Change = tuple[list[str], tuple[Recipe, Cluster]]


def _changes(recipe: Recipe, cluster: Cluster) -> list[Change]:
    """Return the changes to try, the mildest first: where it runs before what it is."""
    found: list[Change] = []
    if cluster.evaluate_batch_size != "auto" or cluster.generation_batch_size != "auto":
        names = ("generation_batch_size", "evaluate_batch_size")
        words = [f"cluster.{name}=auto" for name in names if getattr(cluster, name) != "auto"]
        auto = replace(cluster, generation_batch_size="auto", evaluate_batch_size="auto")
        found.append((words, (recipe, auto)))
    if resolve_auto(recipe, cluster).generation.grpo.engine == "vllm":
        plain = replace(cluster.generation, grpo=replace(cluster.generation.grpo, engine="transformers"))
        found.append((["cluster.generation.grpo.engine=transformers"], (recipe, replace(cluster, generation=plain))))
    layouts = (("gradient_checkpointing", True), ("per_device_batch_size", 1), ("deepspeed", "zero2"))
    for change, value in (*layouts, ("deepspeed", "zero3"), ("deepspeed", "zero3_offload")):
        decided = resolve_auto(recipe, cluster)
        old = {name: getattr(decided, name) for name in ("sft", "grpo")}
        new = {name: replace(layout, **{change: value}) for name, layout in old.items()}
        words = [f"cluster.{name}.{change}={str(value).lower()}" for name in new if new[name] != old[name]]
        if words:
            found.append((words, (recipe, replace(cluster, **new))))
    if "8bit" not in recipe.sft.optimizer.name + recipe.grpo.optimizer.name:
        stages = {n: replace(s, optimizer=replace(s.optimizer, name=LIGHT)) for n, s in _stages(recipe).items()}
        words = [f"{name}.optimizer.name={LIGHT}" for name in stages]
        found.append((words, (replace(recipe, **stages), cluster)))
    if recipe.model.quantization != "nf4" and not recipe.model.random_init:
        model, lora = replace(recipe.model, quantization="nf4"), replace(recipe.lora, enabled=True)
        found.append(
            (["model.quantization=nf4", "lora.enabled=true"], (replace(recipe, model=model, lora=lora), cluster))
        )
    half = recipe.grpo.max_completion_length // 2
    shorter = replace(recipe, grpo=replace(recipe.grpo, max_completion_length=half))
    found.append(([f"grpo.max_completion_length={half}"], (shorter, cluster)))
    return found


def _stages(recipe: Recipe) -> dict[str, Any]:
    return {name: getattr(recipe, name) for name in recipe.stages}


# ---------------------------------------------------------------- shown


def show(recipe: Recipe, cluster: Cluster) -> str:
    """Return the table of `plan --memory`: every phase with its terms, its fit, and the overrides that make it fit."""
    decided = resolve_auto(recipe, cluster)
    found = phases(recipe, decided)
    if found is None:
        return f"{recipe.name}: {unknown_model(recipe)}, so its memory cannot be told"
    gpu, lines = usable(cluster), _resolved_overrides(cluster, decided)
    for need in found:
        verdict = f"{need.fit(gpu)} in {cluster.gpu_memory:g}" if gpu else "cluster.gpu_memory names no GPU"
        lines.append(f"{recipe.name}/{need.phase}: {need.total / GIB:.1f} GiB, {verdict}")
        terms = [*need.terms, Term(f"fragmentation, {FRAGMENTATION:.0%} (estimate)", need.fragmentation)]
        terms.append(Term("CUDA context and work spaces (estimate)", need.context))
        lines += [f"  {term.bytes / GIB:7.2f}  {term.what}" for term in terms if term.bytes >= GIB / 200]
    if gpu:
        lines.append(f"of {cluster.gpu_memory:g} GB torch can use about {gpu / GIB:.2f} GiB")
    if gpu and any(need.fit(gpu) == "does not fit" for need in found):
        remedy = suggest_overrides(recipe, cluster)
        how = "say " + " ".join(remedy) if remedy else "no single change or pair of changes makes it fit: a larger GPU"
        lines.append(f"to make it fit: {how}")
    return "\n".join(lines)


def unknown_model(recipe: Recipe) -> str:
    """Say why the sizes of a recipe's model are not known, as the beginning of a sentence."""
    config = model_config(recipe.model)
    if recipe.model.random_init:
        return "its model is randomly initialised"
    if config is None:
        return f"the config.json of {recipe.model.name} is neither bundled nor in the local cache"
    return f"the architecture of {recipe.model.name}, {config.get('model_type')!r}, is not one that is known here"


def _resolved_overrides(asked: Cluster, decided: Cluster) -> list[str]:
    """Return the overrides that `auto` stands for."""
    words = []
    for stage in ("sft", "grpo"):
        old, new = getattr(asked, stage), getattr(decided, stage)
        for name in ("per_device_batch_size", "deepspeed", "gradient_checkpointing"):
            if getattr(old, name) != getattr(new, name):
                words.append(f"cluster.{stage}.{name}={str(getattr(new, name)).lower()}")
    for name in ("generation_batch_size", "evaluate_batch_size"):
        if getattr(asked, name) != getattr(decided, name):
            words.append(f"cluster.{name}={getattr(decided, name)}")
    for use in ("grpo", "evaluate"):
        old, new = getattr(asked.generation, use), getattr(decided.generation, use)
        if old.engine != new.engine and new.engine != "transformers":
            words.append(f"cluster.generation.{use}.engine={new.engine}")
    return [f"auto is {' '.join(words)}"] if words else []
