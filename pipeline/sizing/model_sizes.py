"""Count a model's parameters, adapters, and the bytes a token needs in a layer, from its `config.json` alone.

    dims = known_dims(recipe.model)       None where its configuration or its architecture is not known
    activation_bytes_per_token(dims, recipe.lora)      for the backward pass
    prefill_bytes_per_token(dims, lora=True)           while a prompt is read

The counts follow the code of transformers and PEFT, to the byte: tests/torch/test_memory.py runs it on tensors
without data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config.architectures import ARCHITECTURES, Architecture, architecture_of
from pipeline.config.model_files import model_config
from pipeline.config.recipe import Lora, Model, RandomInit

GIB = 2**30
BYTES_16, BYTES_32 = 2, 4  # of a number
TILE = (4096, 32768)  # tokens × vocabulary: TRL computes log-probabilities in tiles of this size, never all logits


@dataclass(frozen=True)
class ModelDims:
    """A decoder's sizes, from its config.json."""

    architecture: Architecture
    hidden: int
    layers: int
    heads: int
    key_heads: int  # of keys, and of values
    head_dim: int
    inner: int
    vocabulary: int
    tied: bool
    sliding_window: int  # tokens
    sliding_layers: int  # attend to that window alone

    @property
    def query(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of all key (or value) heads."""
        return self.key_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Input and output width of each linear map of a layer, by its module's name."""
        return {
            name: (sum(getattr(self, width) for width in read), sum(getattr(self, width) for width in written))
            for name, (read, written) in self.architecture.projections.items()
        }

    @property
    def matrices(self) -> int:
        """Weights of the linear maps of all layers: what is quantized."""
        return self.layers * sum(wide * high for wide, high in self.linears.values())

    @property
    def others(self) -> int:
        """Embedding, head, norms and biases: what stays in 16 bit."""
        heads = self.vocabulary * self.hidden * (1 if self.tied else 2)
        biases = self.layers * (self.query + 2 * self.key) * self.architecture.attention_bias
        norms = self.architecture.layer_norms * self.hidden + 2 * self.head_dim * self.architecture.head_norms
        return heads + biases + self.layers * norms + self.hidden

    @property
    def parameters(self) -> int:
        return self.matrices + self.others

    def cache_bytes(self, tokens: int) -> int:
        """Return the bytes of the keys and values of a row; a sliding layer keeps those of its window."""
        seen = (self.layers - self.sliding_layers) * tokens + self.sliding_layers * min(tokens, self.sliding_window)
        return 2 * BYTES_16 * self.key * seen


def dims_of(config: dict[str, Any]) -> ModelDims:
    """Read the sizes from the config.json of a known architecture. KeyError where it is not known."""
    architecture = architecture_of(config)
    if architecture is None:
        raise KeyError(config.get("model_type"))
    size = {name: config[key] for name, key in architecture.dims.items()}
    return ModelDims(
        architecture=architecture,
        **size,
        key_heads=config.get("num_key_value_heads") or size["heads"],
        head_dim=config.get("head_dim") or architecture.head_dim or size["hidden"] // size["heads"],
        tied=bool(config.get("tie_word_embeddings", architecture.tied)),
        sliding_window=config.get("sliding_window") or 0,
        sliding_layers=_sliding_layers(config, architecture, size["layers"]),
    )


def _sliding_layers(config: dict[str, Any], architecture: Architecture, layers: int) -> int:
    """Count the layers that attend to a window alone."""
    every = architecture.full_attention_every
    if every == 1 or not config.get("sliding_window"):
        return 0
    if config.get("layer_types"):
        return list(config["layer_types"]).count("sliding_attention")
    return int(layers - layers // (config.get("sliding_window_pattern") or every))


def random_dims(random: RandomInit) -> ModelDims:
    """Return the sizes of a model that preprocess initializes at random, at the full size of its vocabulary."""
    return dims_of(
        {
            "model_type": random.architecture,
            "hidden_size": random.hidden_size,
            "num_hidden_layers": random.layers,
            "num_attention_heads": random.heads,
            "num_key_value_heads": random.key_value_heads,
            "intermediate_size": random.intermediate_size,
            "vocab_size": random.vocabulary,
            "tie_word_embeddings": True,
            **ARCHITECTURES[random.architecture].random,
        }
    )


def known_dims(model: Model) -> ModelDims | None:
    """Return the sizes of a recipe's model; None where its configuration or its architecture is not known."""
    config = model_config(model)
    return dims_of(config) if config is not None and architecture_of(config) else None


def adapter_parameters(dims: ModelDims, lora: Lora) -> int:
    """Count the weights of the adapters: r × (in + out) for each adapted map."""
    named = dims.linears if lora.targets == ("all-linear",) else set(lora.targets) & set(dims.linears)
    return dims.layers * sum(lora.r * sum(dims.linears[name]) for name in named)


def activation_bytes_per_token(
    dims: ModelDims,
    lora: Lora | None,
    *,
    mask: int = 1,
    dropped: int = BYTES_16,
    low: int = BYTES_16,
    repeated: bool = True,
) -> tuple[int, int]:
    """Return activation bytes per token and layer: (without, with) gradient checkpointing.

    The base computes in 16 bit; `mask`, `dropped` and `low` are the bytes of an element of LoRA's dropout mask, of its
    dropped input, and of its low-rank product. `repeated`: keys and values are repeated for the heads that share them,
    which transformers does before SDPA where rows are padded, and this project on GPUs before Ampere; FlashAttention
    takes them as they are.
    """
    joined, head_norms = dims.architecture.joined, dims.architecture.head_norms
    normed = dims.architecture.layer_norms * dims.hidden + (dims.query + dims.key) * head_norms
    scales = dims.architecture.layer_norms + (dims.heads + dims.key_heads) * head_norms
    norms = BYTES_32 * (normed + scales)  # the float32 copy that each RMSNorm squares, and its scale
    keys = dims.query if repeated and dims.key_heads > 1 else dims.key  # one head is repeated as a view of it
    attention = BYTES_16 * (2 * dims.query + 2 * keys)  # queries, keys, values and the output
    if joined:  # the values are a view that keeps the whole joined projection alive
        attention += BYTES_16 * (dims.query + dims.key)
    mlp = BYTES_16 * 3 * dims.inner  # gate, its activation, up
    whole = norms + attention + mlp
    if lora is None:  # what linear maps and norms need for the gradients of their own weights
        inputs = 2 * dims.hidden + dims.inner + dims.hidden * joined
        whole += BYTES_16 * inputs + (BYTES_32 if dims.architecture.norms_in_float32 else BYTES_16) * normed
    else:
        names = dims.linears if lora.targets == ("all-linear",) else [n for n in dims.linears if n in lora.targets]
        wide = sum(dims.linears[name][0] for name in names)
        whole += wide * ((mask if lora.dropout else 0) + dropped) + low * lora.r * len(names)
    return whole, BYTES_16 * dims.hidden


def logits_and_loss_bytes(dims: ModelDims, tokens: int, *, full: bool) -> int:
    """Return what the head and the loss hold while `tokens` are scored: a tile of logits, and float32 gradients.

    `full`: the head's own weights are trained.
    """
    tile = BYTES_16 * min(tokens, TILE[0]) * TILE[1]
    hidden = tokens * dims.hidden * (BYTES_16 + BYTES_32)  # the gradient, summed in float32, then in 16 bit
    return tile + hidden + (dims.vocabulary * dims.hidden * (BYTES_32 + BYTES_16) if full else 0)


def prefill_bytes_per_token(dims: ModelDims, *, lora: bool, low: int = BYTES_16) -> int:
    """Return the most bytes a layer holds of each prompt token while it is read, without its keys and values.

    The most is held in the MLP. `low`: bytes of an element of the adapters; adapters in 32 bit copy what they read.
    """
    joined = dims.architecture.joined
    hidden = 4 * BYTES_16 * dims.hidden  # the layer's input and sum, normed twice
    if not lora:
        return hidden + BYTES_16 * dims.inner * (4 if joined else 3)
    added = 2 * low * dims.inner * (2 if joined else 1)  # the product of an adapter, and that scaled
    read = low * dims.hidden * (low != BYTES_16)
    return hidden + added + read + BYTES_16 * dims.inner * 2  # what it is added to, and the gate
