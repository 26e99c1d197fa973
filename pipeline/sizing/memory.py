"""Estimate the memory a stage needs of each GPU, term by term, from the model's configuration alone.

    phases(recipe, cluster)     of every stage, on a cluster whose `auto` is decided; None where the model is not known

Weights and states are exact; model_sizes.py counts what a layer keeps or needs of a token. The rest is
estimated, and marked so: CUDA context, fragmentation, the kernels' work spaces. fitting.py resolves `auto` by it.
Needs no weights, no GPU and no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.cluster import AUTO_EVALUATE, Cluster, batches, deepspeed_file, generation_sizes, process_count
from pipeline.config.recipe import Model, Optimizer, Recipe
from pipeline.sizing.model_sizes import (
    BYTES_16,
    BYTES_32,
    GIB,
    ModelDims,
    activation_bytes_per_token,
    adapter_parameters,
    known_dims,
    logits_and_loss_bytes,
    prefill_bytes_per_token,
)

USABLE = 10.75 / 11  # of the memory on a card's box: what torch sees of an RTX 2080 Ti; larger cards lose less
CONTEXT = 0.75 * GIB  # CUDA context, NCCL, cuBLAS work spaces: an estimate
FRAGMENTATION = 0.15  # of everything else: an estimate; public runs had 8 to 46 %
TIGHT = 0.9  # of the GPU's memory
REUSE = 10**9  # elements: DeepSpeed's stage3_max_reuse_distance, below which a gathered layer is kept for its next use
READ = 2048  # tokens of prompts that the transformers engine reads in one pass; a longer prompt is read alone
GUESSED = 8  # tokens that it guesses at once, at most
VLLM_SCORED = 256  # rows whose next tokens vLLM draws at once
VLLM_WORK = 0.75 * GIB  # what its kernels, their graphs and its context take: an estimate
LEAST_SAVED = 0.1  # of the tokens of a training step: below it, taking rows apart for the attention costs more
SAMPLED = 32  # bytes of each row and word while a token is drawn: logits in 32 bit, sorted, with their indices

Stage = Literal["sft", "grpo"]


@dataclass(frozen=True)
class Term:
    what: str
    bytes: float
    reserved: bool = False  # taken at once, so that it does not fragment


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory that one phase of a stage needs of each GPU."""

    phase: str  # sft; grpo, learning; grpo, generating; evaluate
    terms: tuple[Term, ...]
    context: float = CONTEXT

    @property
    def known(self) -> float:
        """Bytes of everything that is counted."""
        return sum(term.bytes for term in self.terms)

    @property
    def fragmentation(self) -> float:
        return FRAGMENTATION * sum(term.bytes for term in self.terms if not term.reserved)

    @property
    def total(self) -> float:
        return self.known + self.fragmentation + self.context

    def fit(self, gpu: float) -> Literal["fits", "tight", "does not fit"]:
        """Compare with the bytes of a GPU that can be used, as `usable` returns them."""
        return "fits" if self.total <= TIGHT * gpu else "tight" if self.total <= gpu else "does not fit"


def usable(cluster: Cluster) -> float:
    """Return the bytes of each GPU that torch can use; 0 where the cluster's file names no memory."""
    return (cluster.gpu_memory or 0) * GIB * USABLE


def phases(recipe: Recipe, cluster: Cluster) -> list[MemoryEstimate] | None:
    """Estimate every phase of the recipe's stages on a cluster without `auto`; None where the model is not known."""
    dims = known_dims(recipe.model)
    if dims is None:
        return None
    found = [need for stage in recipe.stages for need in training_estimates(recipe, cluster, dims, stage)]
    return [*found, evaluation_estimate(recipe, cluster, dims)]


# ---------------------------------------------------------------- weights


@dataclass(frozen=True)
class Weights:
    """The base model as it lies in memory, in bytes."""

    what: str
    matrices: float  # of the linear maps, packed where they are quantized
    others: float  # embedding, head, norms, biases
    scales: float  # of packed matrices: ZeRO-3 does not share them out

    @property
    def total(self) -> float:
        return self.matrices + self.others + self.scales


def weights_of(model: Model, dims: ModelDims) -> Weights:
    kind, wide = model.quantization, BYTES_32 if model.dtype == "float32" else BYTES_16
    others = dims.others * wide
    if kind == "nf4":  # half a byte; a byte of scale a 64 weights, a float32 of double quantization a 256 scales
        scales = dims.matrices * (1 / 64 + 4 / (64 * 256))
        return Weights("weights, nf4 with double quantization", dims.matrices / 2, others, scales)
    if kind == "int8":  # a byte, and a float32 of scale a row
        scales = 4 * dims.layers * sum(high for _, high in dims.linears.values())
        return Weights("weights, 8 bit", dims.matrices, others, scales)
    return Weights(f"weights, {8 * wide} bit", dims.matrices * wide, others, 0)


def _unpacked(recipe: Recipe, dims: ModelDims) -> list[Term]:
    """Count the quantized matrix that is unpacked before it multiplies."""
    if recipe.model.quantization == "none":
        return []
    return [Term("one matrix unpacked", BYTES_16 * max(wide * high for wide, high in dims.linears.values()))]


@dataclass(frozen=True)
class Zero:
    """What a file of deepspeed/ shares out among the GPUs, and what it keeps in the CPU's memory instead."""

    stage: int
    optimizer_on_cpu: bool
    weights_on_cpu: bool
    gradient: int = BYTES_32  # bytes of an element of the sum of gradients


def zero_of(deepspeed: str) -> Zero:
    settings = deepspeed_file(deepspeed)
    if settings is None:
        return Zero(0, False, False)
    zero, summed = settings["zero_optimization"], settings.get("data_types", {}).get("grad_accum_dtype")
    gradient = BYTES_32 if summed == "fp32" else BYTES_16
    return Zero(int(zero["stage"]), "offload_optimizer" in zero, "offload_param" in zero, gradient)


def states_of(trained: int, optimizer: Optimizer, zero: Zero, world: int, lora: bool) -> list[Term]:
    """Count the weights that are trained, their gradients, and their optimizer states."""
    name = "adapters" if lora else "weights"
    moments = trained * (2 if "8bit" in optimizer.name else 8)
    if zero.stage == 0:
        return [
            Term(f"{name}, float32", trained * BYTES_32),
            Term("gradients", trained * BYTES_32),
            Term(f"optimizer, {optimizer.name}", moments),
        ]
    share = f", 1/{world}" if world > 1 else ""
    parted = zero.stage == 3
    kept = 0.0 if zero.weights_on_cpu else trained * BYTES_16 / (world if parted else 1)
    weights = Term(f"{name}, 16 bit{share if parted else ''}", kept)
    if zero.optimizer_on_cpu:
        return [weights, Term(f"gradients on their way to the CPU{share}", trained * BYTES_16 / world)]
    return [
        weights,
        Term(f"gradients{share}", trained * zero.gradient / world),
        Term(f"float32 copy{share}", trained * BYTES_32 / world),
        Term(f"optimizer, {optimizer.name}{share}", moments / world),
    ]


def _reference(dims: ModelDims, trained: int, zero: Zero, world: int, lora: bool) -> Term:
    """Count the reference that `grpo.beta` measures the distance from: a copy of the adapter, or of the model."""
    wide = BYTES_16 if zero.stage else BYTES_32
    share = 0.0 if zero.weights_on_cpu else 1 / world if zero.stage == 3 else 1.0
    what, weights = ("reference adapter", trained) if lora else ("reference model", dims.parameters)
    return Term(what + (f", 1/{world}" if 0 < share < 1 else ""), weights * wide * share)


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class _Layout:
    """The inputs of a training stage's estimates."""

    recipe: Recipe
    dims: ModelDims
    zero: Zero
    world: int
    rows: int  # of a device at once
    checkpointing: bool
    trained: int  # weights

    @property
    def lora(self) -> bool:
        return self.recipe.lora.enabled

    @property
    def whole(self) -> Weights:
        """The model that a GPU computes with: the base, or what is trained itself, in 16 bit."""
        if self.lora:
            return weights_of(self.recipe.model, self.dims)
        return Weights("weights, 16 bit", self.dims.matrices * BYTES_16, self.dims.others * BYTES_16, 0)


def shares_prompts(recipe: Recipe, cluster: Cluster, rows: int) -> bool:
    """Return whether GRPO computes a prompt once for its completions among the `rows` that a device learns at once."""
    if cluster.padding_free != "auto":
        return cluster.padding_free
    prompt, new = recipe.grpo.max_prompt_length, recipe.grpo.max_completion_length
    together = min(rows, recipe.grpo.num_generations)
    return prompt * (1 - 1 / together) >= LEAST_SAVED * (prompt + new)


def training_estimates(recipe: Recipe, cluster: Cluster, dims: ModelDims, stage: Stage) -> list[MemoryEstimate]:
    """Estimate the phases of a training stage: one of SFT; of GRPO, learning and generating."""
    settings, given = recipe.training(stage), cluster.layout(stage)
    sizes, _ = batches(cluster, recipe, stage)
    layout = _Layout(
        recipe,
        dims,
        zero_of(given.deepspeed),
        cluster.nodes * process_count(cluster),
        sizes.per_device if sizes else 1,
        given.gradient_checkpointing is True,
        adapter_parameters(dims, recipe.lora) if recipe.lora.enabled else dims.parameters,
    )
    held = states_of(layout.trained, settings.optimizer, layout.zero, layout.world, layout.lora)
    if layout.lora:
        held = [*_base_held(layout), *held]
    if stage == "grpo" and recipe.grpo.beta:
        held.append(_reference(dims, layout.trained, layout.zero, layout.world, layout.lora))
    if stage == "sft":
        return [_training_estimate("sft", layout, held, recipe.sft.max_length, recipe.sft.max_length)]
    grpo, chosen = recipe.grpo, cluster.generation.grpo
    if chosen.engine == "vllm":
        share = vllm_share(cluster, chosen.gpu_memory)
        learning = held if chosen.sleep is True else [*held, share]
        return [
            _learning_estimate(layout, cluster, learning),
            MemoryEstimate("grpo, generating", (*held, *_unpacked(recipe, dims), share)),
        ]
    together = cluster.generation_batch_size
    if together == "auto":  # not decided yet: the least there is
        together = generation_sizes(recipe, sizes)[-1] if sizes else layout.rows
    low = BYTES_16 if layout.zero.stage else BYTES_32
    generation = _generation_term(
        recipe, dims, together, grpo.max_prompt_length, grpo.max_completion_length, grpo.num_generations, low
    )
    return [
        _learning_estimate(layout, cluster, held),
        MemoryEstimate("grpo, generating", (*held, *_whole_model(layout), *_unpacked(recipe, dims), generation)),
    ]


def shared_keys(dims: ModelDims, rows: int, tokens: int, wide: int) -> int:
    """Return the bytes of keys and values of a layer's attention where a prompt's stand beside each completion's."""
    return 2 * wide * dims.query * rows * tokens


def _learning_estimate(layout: _Layout, cluster: Cluster, held: list[Term]) -> MemoryEstimate:
    """Estimate GRPO's training step: rows of prompt and completion, or each prompt once."""
    grpo, rows = layout.recipe.grpo, layout.rows
    prompt, new = grpo.max_prompt_length, grpo.max_completion_length
    if not shares_prompts(layout.recipe, cluster, rows):
        return _training_estimate("grpo, learning", layout, held, prompt + new, new)
    prompts = -(-rows // grpo.num_generations) + (rows % grpo.num_generations != 0 and rows > grpo.num_generations)
    wide = BYTES_32 if layout.recipe.model.dtype == "float32" else BYTES_16
    taken = shared_keys(layout.dims, rows, prompt + new, wide) * (1 if layout.checkpointing else layout.dims.layers)
    more = Term(f"keys and values of {rows} × {prompt + new} tokens", taken)
    tokens = -(-(prompts * prompt + rows * new) // rows)  # of a row, on average
    return _training_estimate("grpo, learning", layout, [*held, more], tokens, new)


def _training_estimate(phase: str, layout: _Layout, held: list[Term], tokens: int, scored: int) -> MemoryEstimate:
    recipe, dims, rows = layout.recipe, layout.dims, layout.rows
    flash = recipe.model.attention == "flash_attention_2"
    whole, only_input = activation_bytes_per_token(dims, recipe.lora if layout.lora else None, repeated=not flash)
    each = only_input if layout.checkpointing else whole
    kept = Term(f"activations, {rows} × {tokens} tokens", rows * tokens * dims.layers * each)
    again = Term("one layer computed again", rows * tokens * whole * layout.checkpointing)
    head = logits_and_loss_bytes(dims, rows * scored, full=not layout.lora)
    head_term = Term(f"head and loss of {rows * scored} tokens, in tiles", head)
    later = max(again, head_term, key=lambda term: term.bytes)  # the backward pass leaves the head before a layer
    return MemoryEstimate(phase, (*held, *_gathered_layers(layout), *_unpacked(recipe, dims), kept, later))


def _base_held(layout: _Layout) -> list[Term]:
    """The frozen base under an adapter, between two passes."""
    base, zero = layout.whole, layout.zero
    if zero.stage != 3:
        return [Term(base.what, base.total)]
    where = "on the CPU" if zero.weights_on_cpu else f"1/{layout.world}"
    shared = 0.0 if zero.weights_on_cpu else (base.matrices + base.others) / layout.world
    held = [Term(f"{base.what}, {where}", shared)]
    if layout.recipe.model.quantization == "int8":  # bitsandbytes keeps what it has multiplied with
        held.append(Term("8-bit matrices, which ZeRO-3 does not share out", base.matrices))
    return [*held, Term("scales of all of them", base.scales)] if base.scales else held


def _gathered_layers(layout: _Layout) -> list[Term]:
    """Under ZeRO-3: the layer that computes and the next, those kept for their next use, and the head."""
    if layout.zero.stage != 3:
        return []
    whole, dims = layout.whole, layout.dims
    layer = whole.matrices / dims.layers
    passes = 3 if layout.checkpointing else 2  # forward, again, backward: what lies between two uses of a layer
    kept = min(REUSE * BYTES_16 / (passes * layer), dims.layers - 2)
    if layout.lora and layout.recipe.model.quantization == "int8":
        layer = 0.0  # they are held whole already
    what = f"{2 + kept:.0f} layers and the head gathered from elsewhere"
    return [Term(what, (2 + kept) * layer + dims.vocabulary * dims.hidden * BYTES_16)]


def _whole_model(layout: _Layout) -> list[Term]:
    """Under ZeRO-3 TRL gathers all weights before it generates, and each process keeps its part of them as well."""
    if layout.zero.stage != 3:
        return []
    whole, adapters = layout.whole, 2 if layout.recipe.grpo.beta else 1  # the reference is one of them
    gathered = whole.matrices + whole.others + (adapters * layout.trained * BYTES_16 if layout.lora else 0)
    if layout.lora and layout.recipe.model.quantization == "int8":
        gathered -= whole.matrices  # counted as held already; while all are gathered there is no second copy
    return [Term("the whole model, gathered to generate", gathered)]


# ---------------------------------------------------------------- generating


def _generation_term(recipe: Recipe, dims: ModelDims, rows: int, prompt: int, new: int, samples: int, low: int) -> Term:
    """Return the larger of two moments of the transformers engine: while prompts are read, and while tokens are drawn.

    Args:
        recipe: whose model generates.
        dims: its sizes.
        rows: completions at once.
        prompt: tokens of a prompt.
        new: tokens of a completion.
        samples: completions of a prompt, which share its keys and values.
        low: bytes of an element of the adapters.
    """
    own, prompts = new + GUESSED + (1 if samples > 1 else prompt), -(-rows // samples) if samples > 1 else 0
    cache = 2 * BYTES_16 * dims.key * dims.layers * (rows * own + prompts * prompt)
    held = prefill_bytes_per_token(dims, lora=recipe.lora.enabled, low=low)
    reading = cache + min((prompts or rows) * prompt, max(READ, prompt)) * held
    scores = rows * dims.heads * (prompt + new) * (2 * BYTES_32 + BYTES_16)  # of one layer, and their softmax
    drawing = cache + scores + rows * dims.vocabulary * SAMPLED
    if reading > drawing:
        return Term(f"key/value cache, {rows} × {prompt + new} tokens, and reading prompts", reading)
    return Term(f"key/value cache, {rows} × {prompt + new} tokens, and drawing the next", drawing)


def evaluation_estimate(recipe: Recipe, cluster: Cluster, dims: ModelDims) -> MemoryEstimate:
    """Estimate an evaluation; its adapters are held and computed in 32 bit, as PEFT loads them."""
    if cluster.generation.evaluate.engine == "vllm":  # it counts its own context
        return MemoryEstimate("evaluate", (vllm_share(cluster, cluster.generation.evaluate.gpu_memory),), 0)
    rows = AUTO_EVALUATE if cluster.evaluate_batch_size == "auto" else cluster.evaluate_batch_size
    prompt = recipe.grpo.max_prompt_length
    generation = _generation_term(recipe, dims, rows, prompt, recipe.evaluate.max_new_tokens, 1, BYTES_32)
    weights = weights_of(recipe.model, dims)
    terms = [Term(weights.what, weights.total)]
    if recipe.lora.enabled:
        terms.append(Term("adapters, float32", adapter_parameters(dims, recipe.lora) * BYTES_32))
    most = cluster.max_memory.gpu * GIB if cluster.max_memory and cluster.max_memory.gpu else None
    if most and most < sum(term.bytes for term in terms):
        terms = [Term(f"{weights.what}, the others on the CPU", most)]
    return MemoryEstimate("evaluate", (*terms, *_unpacked(recipe, dims), generation))


# ---------------------------------------------------------------- vLLM


def vllm_share(cluster: Cluster, share: float) -> Term:
    """Return what vLLM takes of each GPU: all of its share, for keys and values what the model leaves."""
    return Term(f"vLLM, {share:.0%} of the GPU", share * usable(cluster), reserved=True)


def vllm_minimum(recipe: Recipe, dims: ModelDims, prompt: int, new: int, rank: int, gpus: int = 1) -> float:
    """Return the least bytes that vLLM can work with: the model, room for adapters of a rank, one sequence.

    `gpus` share the model. What its kernels work with is an estimate.
    """
    weights = weights_of(recipe.model, dims).total
    adapters = BYTES_16 * dims.layers * sum(rank * sum(widths) for widths in dims.linears.values())
    words = VLLM_SCORED * dims.vocabulary * BYTES_32  # logits of the rows of a step, in 32 bit
    return (weights + adapters + dims.cache_bytes(prompt + new)) / gpus + words + VLLM_WORK
