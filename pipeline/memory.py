"""What a stage needs of each GPU, term by term, from the model's configuration alone: no weights, no GPU, no torch.

    python -m pipeline plan deepseek7b --cluster 2x2080ti --memory

Weights and states are exact. What a layer keeps for its backward pass is counted from transformers' model code and
agrees with it to the byte (tests/test_memory.py runs that code on tensors without data). What is not counted is
estimated, and says so: the CUDA context, fragmentation, the kernels' work spaces.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipeline.cluster import (
    AUTO_EVALUATE,
    AUTO_PER_DEVICE,
    DEEPSPEED,
    Cluster,
    TrainingStage,
    batches,
    generation_sizes,
    process_count,
)
from pipeline.families import model_config
from pipeline.recipe import Lora, Optimizer, Recipe

GIB = 2**30  # a card of 11 GB has 11 GiB
HALF, SINGLE = 2, 4  # bytes
CONTEXT = 0.75 * GIB  # CUDA context, NCCL, cuBLAS work spaces: an estimate
FRAGMENTATION = 0.08  # of everything else: an estimate
TILE = (4096, 32768)  # tokens × vocabulary: TRL computes log-probabilities in tiles of this size, never all logits
TIGHT = 0.9  # of the GPU's memory
LIGHT = "paged_adamw_8bit"
SHAPES = ("qwen2", "llama", "phi3")  # architectures whose sizes are understood here


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, from its config.json."""

    hidden: int
    layers: int
    query: int  # width of all query heads
    key: int  # width of all key (or value) heads
    inner: int
    vocabulary: int
    tied: bool
    bias: bool  # of the query, key and value projections
    fused: bool  # Phi joins its projections

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Input and output width of each linear map of a layer, by its module's name."""
        if self.fused:
            return {
                "qkv_proj": (self.hidden, self.query + 2 * self.key),
                "o_proj": (self.query, self.hidden),
                "gate_up_proj": (self.hidden, 2 * self.inner),
                "down_proj": (self.inner, self.hidden),
            }
        return {
            "q_proj": (self.hidden, self.query),
            "k_proj": (self.hidden, self.key),
            "v_proj": (self.hidden, self.key),
            "o_proj": (self.query, self.hidden),
            "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner),
            "down_proj": (self.inner, self.hidden),
        }

    @property
    def matrices(self) -> int:
        """Weights of the linear maps of all layers: what is quantized."""
        return self.layers * sum(wide * high for wide, high in self.linears.values())

    @property
    def others(self) -> int:
        """Embedding, head, norms and biases: what stays in 16 bit."""
        heads = self.vocabulary * self.hidden * (1 if self.tied else 2)
        biases = self.layers * (self.query + 2 * self.key) * self.bias
        return heads + biases + (2 * self.layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        return self.matrices + self.others


def shape_of(config: dict[str, Any]) -> Shape:
    """The sizes of a Qwen2, Llama or Phi-3 configuration."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return Shape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        query=heads * width,
        key=config.get("num_key_value_heads", heads) * width,
        inner=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        bias=config["model_type"] == "qwen2",
        fused=config["model_type"] == "phi3",
    )


def adapter_parameters(shape: Shape, lora: Lora) -> int:
    """Weights of the adapters: r × (in + out) for each adapted map."""
    named = shape.linears if lora.targets == ("all-linear",) else set(lora.targets) & set(shape.linears)
    return shape.layers * sum(lora.r * sum(shape.linears[name]) for name in named)


def kept_per_token(
    shape: Shape, lora: Lora | None, *, mask: int = 1, dropped: int = HALF, low: int = HALF
) -> tuple[int, int]:
    """Bytes that one layer keeps of each token for its backward pass: the whole, and its input alone.

    The first holds without gradient checkpointing, the second with it. The base computes in 16 bit; `mask`, `dropped`
    and `low` are the bytes of an element of LoRA's dropout mask, of its dropped input, and of its low-rank product.
    """
    norms = 2 * (SINGLE * shape.hidden + SINGLE)  # the float32 copy that each RMSNorm squares, and its scale
    attention = HALF * (2 * shape.query + 2 * shape.key)  # queries, keys, values and the output
    if shape.fused:  # the values are a view that keeps the whole joined projection alive
        attention += HALF * (shape.query + shape.key)
    mlp = HALF * 3 * shape.inner  # gate, its activation, up
    whole = norms + attention + mlp
    if lora is None:  # what linear maps and norms need for the gradients of their own weights
        whole += HALF * (4 * shape.hidden + shape.inner + shape.hidden * shape.fused)
    else:
        names = shape.linears if lora.targets == ("all-linear",) else [n for n in shape.linears if n in lora.targets]
        wide = sum(shape.linears[name][0] for name in names)
        whole += wide * ((mask if lora.dropout else 0) + dropped) + low * lora.r * len(names)
    return whole, HALF * shape.hidden


def head_bytes(shape: Shape, tokens: int, *, full: bool) -> int:
    """What the head and the loss hold beside the model while `tokens` are scored: a tile of logits, float32 gradients.

    `full`: the head's own weights are trained.
    """
    tile = HALF * min(tokens, TILE[0]) * TILE[1]
    hidden = tokens * shape.hidden * (HALF + SINGLE)  # the gradient, summed in float32, then in 16 bit
    return tile + hidden + (shape.vocabulary * shape.hidden * (SINGLE + HALF) if full else 0)


# ---------------------------------------------------------------- the terms of a phase


@dataclass(frozen=True)
class Term:
    what: str
    bytes: float


@dataclass(frozen=True)
class Need:
    """What one phase of a stage needs of each GPU."""

    phase: str  # sft; grpo, learning; grpo, generating; evaluate
    terms: tuple[Term, ...]

    @property
    def total(self) -> float:
        known = sum(term.bytes for term in self.terms)
        return known * (1 + FRAGMENTATION) + CONTEXT

    def verdict(self, gpu: float) -> Literal["fits", "tight", "does not fit"]:
        """`gpu` in bytes."""
        return "fits" if self.total <= TIGHT * gpu else "tight" if self.total <= gpu else "does not fit"


def needs(recipe: Recipe, cluster: Cluster) -> list[Need] | None:
    """Every phase of the recipe's stages; None where the model's configuration is not known."""
    config = model_config(recipe.model)
    if config is None or config.get("model_type") not in SHAPES:
        return None
    shape, cluster = shape_of(config), resolved(recipe, cluster)
    found = []
    for stage in recipe.stages:
        found += _training(recipe, cluster, shape, stage)
    found.append(_evaluation(recipe, cluster, shape))
    return found


def _evaluation(recipe: Recipe, cluster: Cluster, shape: Shape) -> Need:
    rows = AUTO_EVALUATE if cluster.evaluate_batch_size == "auto" else cluster.evaluate_batch_size
    cache = _cache(shape, rows, recipe.grpo.max_prompt_length + recipe.evaluate.max_new_tokens)
    weights = _weights(recipe, shape)
    most = cluster.max_memory.gpu if cluster.max_memory else None
    if most and most * GIB < weights.bytes:
        weights = Term(f"{weights.what}, the others on the CPU", most * GIB)
    return Need("evaluate", (weights, *_dequantized(recipe, shape), cache))


AUTO_ZERO = {"sft": ("zero2", "zero3", "zero3_offload"), "grpo": ("zero2", "zero3", "zero3_offload")}
UNKNOWN_ZERO = {"sft": "zero2", "grpo": "zero3"}  # where nobody knows the GPU or the model


def resolved(recipe: Recipe, cluster: Cluster) -> Cluster:
    """The cluster with the `auto` of its training stages decided for this recipe.

    The first ZeRO stage under which a batch fits, the cheapest first, and under it the largest batch per device; the
    global batch stays the recipe's. Where the GPU or the model is not known, the batch stays `auto` (cluster.batches).
    """
    cluster = replace(cluster, sft=_decided(recipe, cluster, "sft"), grpo=_decided(recipe, cluster, "grpo"))
    return _generating(recipe, cluster)


def _generating(recipe: Recipe, cluster: Cluster) -> Cluster:
    """The cluster with the most that can be generated at once, in GRPO and in evaluation."""
    config, gpu = model_config(recipe.model), (cluster.gpu_memory or 0) * GIB
    known = config is not None and config.get("model_type") in SHAPES and gpu
    sizes, _ = batches(cluster, recipe, "grpo")
    if cluster.generation_batch_size == "auto" and sizes:
        choices = [replace(cluster, generation_batch_size=n) for n in generation_sizes(recipe, sizes)]
        needed = [_training(recipe, one, shape_of(config), "grpo")[1] if config and known else None for one in choices]
        cluster = choices[_first_that_fits(needed, gpu)]
    if cluster.evaluate_batch_size == "auto":
        halved = [AUTO_EVALUATE, *(2**n for n in range(6, -1, -1))]
        choices = [replace(cluster, evaluate_batch_size=n) for n in halved]
        needed = [_evaluation(recipe, one, shape_of(config)) if config and known else None for one in choices]
        cluster = choices[_first_that_fits(needed, gpu)]
    return cluster


def _first_that_fits(needed: list[Need | None], gpu: float) -> int:
    """Which of these, the largest first; the largest where nobody knows, the smallest where none fits."""
    for enough in (("fits",), ("fits", "tight")):
        for number, need in enumerate(needed):
            if need is None or need.verdict(gpu) in enough:
                return number
    return len(needed) - 1


def _with(cluster: Cluster, stage: str, layout: TrainingStage) -> Cluster:
    return replace(cluster, sft=layout) if stage == "sft" else replace(cluster, grpo=layout)


def _decided(recipe: Recipe, cluster: Cluster, stage: Literal["sft", "grpo"]) -> TrainingStage:
    layout = cluster.sft if stage == "sft" else cluster.grpo
    if layout.deepspeed != "auto" and layout.per_device_batch_size != "auto":
        return layout
    zeros = AUTO_ZERO[stage] if layout.deepspeed == "auto" else (layout.deepspeed,)
    settings, world = recipe.sft if stage == "sft" else recipe.grpo, cluster.nodes * process_count(cluster)
    share, config, given = settings.global_batch_size // world, model_config(recipe.model), layout.per_device_batch_size
    known = config is not None and config.get("model_type") in SHAPES
    if config is None or not known or not cluster.gpu_memory or settings.global_batch_size % world:
        return replace(layout, deepspeed=UNKNOWN_ZERO[stage] if layout.deepspeed == "auto" else layout.deepspeed)
    rows = [n for n in range(min(share, AUTO_PER_DEVICE), 0, -1) if share % n == 0] if given == "auto" else [given]
    choices = [replace(layout, deepspeed=zero, per_device_batch_size=n) for zero in zeros for n in rows]
    for enough in (("fits",), ("fits", "tight")):
        for choice in choices:
            phases = _training(recipe, _with(cluster, stage, choice), shape_of(config), stage)
            if all(need.verdict(cluster.gpu_memory * GIB) in enough for need in phases):
                return choice
    return choices[-1]  # the smallest; that it does not fit is told by check


def _weights(recipe: Recipe, shape: Shape) -> Term:
    """The base model as it lies in memory."""
    kind = recipe.model.quantization
    wide = SINGLE if recipe.model.dtype == "float32" else HALF
    if kind == "nf4":  # half a byte, a byte of scale a 64 weights, a float32 of double quantization a 256 scales
        matrices = shape.matrices * (0.5 + 1 / 64 + 4 / (64 * 256))
    elif kind == "int8":  # a byte, and a float32 of scale a row
        matrices = shape.matrices + 4 * shape.layers * sum(high for _, high in shape.linears.values())
    else:
        matrices = shape.matrices * wide
    about = {"nf4": "weights, nf4 with double quantization", "int8": "weights, 8 bit"}.get(
        kind, f"weights, {8 * wide} bit"
    )
    return Term(about, matrices + shape.others * wide)


def _dequantized(recipe: Recipe, shape: Shape) -> list[Term]:
    """A quantized matrix is unpacked before it multiplies."""
    if recipe.model.quantization == "none":
        return []
    return [Term("one matrix unpacked", HALF * max(wide * high for wide, high in shape.linears.values()))]


def _cache(shape: Shape, rows: int, tokens: int) -> Term:
    each = 2 * shape.layers * shape.key * HALF
    return Term(f"key/value cache, {rows} × {tokens} tokens", rows * tokens * each)


def _training(recipe: Recipe, cluster: Cluster, shape: Shape, stage: Literal["sft", "grpo"]) -> list[Need]:
    settings = recipe.sft if stage == "sft" else recipe.grpo
    layout = cluster.sft if stage == "sft" else cluster.grpo
    sizes, _ = batches(cluster, recipe, stage)
    world = cluster.nodes * process_count(cluster)
    zero = zero_of(layout.deepspeed)
    rows = sizes.per_device if sizes else 1
    lora = recipe.lora if recipe.lora.enabled else None
    trained = adapter_parameters(shape, recipe.lora) if lora else shape.parameters
    base, gathered = _weights(recipe, shape), []
    share = 0.0 if zero.weights_on_cpu else 1 / world  # of the weights, under ZeRO-3
    if zero.stage == 3 and lora:
        gathered = [Term("layers gathered from elsewhere", 2 * base.bytes / shape.layers)]
        base = Term(f"{base.what}, {'on the CPU' if zero.weights_on_cpu else f'1/{world}'}", base.bytes * share)
    states = states_of(trained, settings.optimizer, zero, world, bool(lora))
    if stage == "grpo" and recipe.grpo.beta:
        states.append(_reference(shape, trained, zero, world, bool(lora)))
    held = [*([base] if lora else []), *states]

    tokens = recipe.sft.max_length
    if stage == "grpo":
        tokens = recipe.grpo.max_prompt_length + recipe.grpo.max_completion_length
    whole, only_input = kept_per_token(shape, lora)
    each = only_input if layout.gradient_checkpointing else whole
    kept = Term(f"activations, {rows} × {tokens} tokens", rows * tokens * shape.layers * each)
    again = Term("one layer computed again", rows * tokens * whole * layout.gradient_checkpointing)
    scored = rows * (tokens if stage == "sft" else recipe.grpo.max_completion_length)
    head = Term(f"head and loss of {scored} tokens, in tiles", head_bytes(shape, scored, full=lora is None))
    later = max(again, head, key=lambda term: term.bytes)  # the backward pass leaves the head before a layer
    unpacked = _dequantized(recipe, shape)
    learning = Need("sft" if stage == "sft" else "grpo, learning", (*held, *gathered, *unpacked, kept, later))
    if stage == "sft":
        return [learning]
    together = cluster.generation_batch_size
    if together == "auto":  # not decided yet: the least there is
        together = generation_sizes(recipe, sizes)[-1] if sizes else rows
    whole_model = []
    if zero.stage == 3:  # TRL gathers the model before it generates
        missing = (_weights(recipe, shape).bytes if lora else shape.parameters * HALF) * (1 - share)
        whole_model = [Term("the rest of the model, gathered to generate", missing)]
    generating = Need("grpo, generating", (*held, *whole_model, *unpacked, _cache(shape, together, tokens)))
    return [learning, generating]


@dataclass(frozen=True)
class Zero:
    """What a file of deepspeed/ shares out among the GPUs, and what it keeps in the CPU's memory instead."""

    stage: int
    optimizer_on_cpu: bool
    weights_on_cpu: bool


def zero_of(deepspeed: str) -> Zero:
    if deepspeed == "none":
        return Zero(0, False, False)
    settings = json.loads((DEEPSPEED / f"{deepspeed}.json").read_text(encoding="utf-8"))["zero_optimization"]
    return Zero(int(settings["stage"]), "offload_optimizer" in settings, "offload_param" in settings)


def states_of(trained: int, optimizer: Optimizer, zero: Zero, world: int, lora: bool) -> list[Term]:
    """Weights that are trained, their gradients, and what the optimizer keeps of them."""
    name = "adapters" if lora else "weights"
    moments = trained * (2 if "8bit" in optimizer.name else 8)
    if zero.stage == 0:
        return [
            Term(f"{name}, float32", trained * SINGLE),
            Term("gradients", trained * SINGLE),
            Term(f"optimizer, {optimizer.name}", moments),
        ]
    share = f", 1/{world}" if world > 1 else ""
    parted = zero.stage == 3
    kept = 0.0 if zero.weights_on_cpu else trained * HALF / (world if parted else 1)
    weights = Term(f"{name}, 16 bit{share if parted else ''}", kept)
    gradients = Term(f"gradients{share}", trained * HALF / world)
    if zero.optimizer_on_cpu:
        return [weights, gradients]
    return [
        weights,
        gradients,
        Term(f"float32 copy{share}", trained * SINGLE / world),
        Term(f"optimizer, {optimizer.name}{share}", moments / world),
    ]


def _reference(shape: Shape, trained: int, zero: Zero, world: int, lora: bool) -> Term:
    """What `grpo.beta` measures the distance from: a copy of the adapter, or of the model."""
    wide = HALF if zero.stage else SINGLE
    if lora:
        return Term("reference adapter", trained * wide)
    share = 0.0 if zero.weights_on_cpu else 1 / world if zero.stage == 3 else 1.0
    return Term("reference model" + (f", 1/{world}" if 0 < share < 1 else ""), shape.parameters * wide * share)


# ---------------------------------------------------------------- shown


def show(recipe: Recipe, cluster: Cluster) -> str:
    """Every phase with its terms, the verdict, and what would make it fit."""
    found = needs(recipe, cluster)
    if found is None:
        return f"{recipe.name}: {recipe.model.name} has no configuration that is known here; its memory cannot be told"
    gpu = cluster.gpu_memory * GIB if cluster.gpu_memory else None
    lines = _told(cluster, resolved(recipe, cluster))
    for need in found:
        verdict = f"{need.verdict(gpu)} in {cluster.gpu_memory:g}" if gpu else "cluster.gpu_memory names no GPU"
        lines.append(f"{recipe.name}/{need.phase}: {need.total / GIB:.1f} GiB, {verdict}")
        terms = [*need.terms, Term(f"fragmentation, {FRAGMENTATION:.0%} (estimate)", FRAGMENTATION * _known(need))]
        terms.append(Term("CUDA context and work spaces (estimate)", CONTEXT))
        lines += [f"  {term.bytes / GIB:7.2f}  {term.what}" for term in terms if term.bytes >= GIB / 200]
    if gpu and any(need.verdict(gpu) == "does not fit" for need in found):
        remedy = what_fits(recipe, cluster)
        how = "say " + " ".join(remedy) if remedy else "no single change or pair of changes makes it fit: a larger GPU"
        lines.append(f"to make it fit: {how}")
    return "\n".join(lines)


def _told(asked: Cluster, decided: Cluster) -> list[str]:
    """What auto has become."""
    words = []
    for stage in ("sft", "grpo"):
        old, new = getattr(asked, stage), getattr(decided, stage)
        for name in ("per_device_batch_size", "deepspeed"):
            if getattr(old, name) != getattr(new, name):
                words.append(f"cluster.{stage}.{name}={getattr(new, name)}")
    for name in ("generation_batch_size", "evaluate_batch_size"):
        if getattr(asked, name) != getattr(decided, name):
            words.append(f"cluster.{name}={getattr(decided, name)}")
    return [f"auto is {' '.join(words)}"] if words else []


def _known(need: Need) -> float:
    return sum(term.bytes for term in need.terms)


def what_fits(recipe: Recipe, cluster: Cluster) -> list[str]:
    """The smallest change that makes every phase fit, as overrides: one alone, else two, the mildest first."""
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
    gpu = (cluster.gpu_memory or 0) * GIB
    return all(need.verdict(gpu) != "does not fit" for need in needs(recipe, cluster) or [])


Change = tuple[list[str], tuple[Recipe, Cluster]]


def _changes(recipe: Recipe, cluster: Cluster) -> list[Change]:
    """What may be changed, the mildest first: where it runs before what it is."""
    found: list[Change] = []
    if cluster.evaluate_batch_size != "auto" or cluster.generation_batch_size != "auto":
        names = ("generation_batch_size", "evaluate_batch_size")
        words = [f"cluster.{name}=auto" for name in names if getattr(cluster, name) != "auto"]
        auto = replace(cluster, generation_batch_size="auto", evaluate_batch_size="auto")
        found.append((words, (recipe, auto)))
    layouts = (("gradient_checkpointing", True), ("per_device_batch_size", 1))
    for change, value in (*layouts, ("deepspeed", "zero3"), ("deepspeed", "zero3_offload")):
        decided = resolved(recipe, cluster)
        old = {name: getattr(decided, name) for name in ("sft", "grpo")}
        new = {name: replace(layout, **{change: value}) for name, layout in old.items()}
        words = [f"cluster.{name}.{change}={str(value).lower()}" for name in new if new[name] != old[name]]
        if words:
            found.append((words, (recipe, replace(cluster, **new))))
    if "8bit" not in recipe.sft.optimizer.name + recipe.grpo.optimizer.name:
        stages = {n: replace(s, optimizer=replace(s.optimizer, name=LIGHT)) for n, s in _stages(recipe).items()}
        words = [f"{name}.optimizer.name={LIGHT}" for name in stages]
        found.append((words, (replace(recipe, **stages), cluster)))
    if recipe.model.quantization != "nf4" and not recipe.model.scratch:
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
