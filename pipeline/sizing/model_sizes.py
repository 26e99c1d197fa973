"""Sizes of a model, from its `config.json` alone: parameters, adapters, and the bytes that a token needs in a layer.

    shape = known_shape(recipe.model)       None where nobody knows its configuration, or its architecture
    kept_per_token(shape, recipe.lora)      for the backward pass
    prefill_per_token(shape, lora=True)     while a prompt is read

The bytes are those of transformers' and PEFT's code, to the byte: tests/test_memory.py runs it on tensors without data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config.architectures import model_config
from pipeline.config.recipe import Lora, Model

GIB = 2**30
HALF, SINGLE = 2, 4  # bytes
TILE = (4096, 32768)  # tokens × vocabulary: TRL computes log-probabilities in tiles of this size, never all logits
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


def known_shape(model: Model) -> Shape | None:
    """The sizes of a recipe's model; None where its configuration or its architecture is not known here."""
    config = model_config(model)
    return shape_of(config) if config is not None and config.get("model_type") in SHAPES else None


def adapter_parameters(shape: Shape, lora: Lora) -> int:
    """Weights of the adapters: r × (in + out) for each adapted map."""
    named = shape.linears if lora.targets == ("all-linear",) else set(lora.targets) & set(shape.linears)
    return shape.layers * sum(lora.r * sum(shape.linears[name]) for name in named)


def kept_per_token(
    shape: Shape, lora: Lora | None, *, mask: int = 1, dropped: int = HALF, low: int = HALF, repeated: bool = True
) -> tuple[int, int]:
    """Bytes that one layer keeps of each token for its backward pass: the whole, and its input alone.

    The first holds without gradient checkpointing, the second with it. The base computes in 16 bit; `mask`, `dropped`
    and `low` are the bytes of an element of LoRA's dropout mask, of its dropped input, and of its low-rank product.
    `repeated`: keys and values are repeated for the heads that share them, which transformers does before SDPA where
    rows are padded, and this project on GPUs before Ampere; FlashAttention takes them as they are.
    """
    norms = 2 * (SINGLE * shape.hidden + SINGLE)  # the float32 copy that each RMSNorm squares, and its scale
    keys = shape.query if repeated else shape.key
    attention = HALF * (2 * shape.query + 2 * keys)  # queries, keys, values and the output
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


def prefill_per_token(shape: Shape, *, lora: bool, low: int = HALF) -> int:
    """Bytes that a layer holds at most of each token of a prompt while it is read, beside its keys and values.

    That is in the MLP. `low`: bytes of an element of the adapters; those in 32 bit make such copies of what they read.
    """
    hidden = 4 * HALF * shape.hidden  # the layer's input and sum, normed twice
    maps = 2 if shape.fused else 1  # gate and up are one map in Phi
    if not lora:
        return hidden + HALF * shape.inner * (4 if shape.fused else 3)
    added = 2 * low * shape.inner * maps  # the product of an adapter, and that scaled
    read = low * shape.hidden * (low != HALF)
    return hidden + added + read + HALF * shape.inner * 2  # beside what it is added to, and the gate
