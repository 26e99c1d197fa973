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

from pipeline.config.architectures import Architecture, architecture_of
from pipeline.config.model_files import model_config
from pipeline.config.recipe import Lora, Model

GIB = 2**30
BYTES_16, BYTES_32 = 2, 4  # of a number
TILE = (4096, 32768)  # tokens × vocabulary: TRL computes log-probabilities in tiles of this size, never all logits


@dataclass(frozen=True)
class ModelDims:
    """A decoder's sizes, from its config.json."""

    architecture: Architecture
    hidden: int
    layers: int
    query: int  # width of all query heads
    key: int  # width of all key (or value) heads
    inner: int
    vocabulary: int
    tied: bool

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
        return heads + biases + (2 * self.layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        return self.matrices + self.others


def dims_of(config: dict[str, Any]) -> ModelDims:
    """Read the sizes from the config.json of a known architecture. KeyError where it is not known."""
    architecture = architecture_of(config)
    if architecture is None:
        raise KeyError(config.get("model_type"))
    size = {name: config[key] for name, key in architecture.dims.items()}
    width = config.get("head_dim") or size["hidden"] // size["heads"]
    return ModelDims(
        architecture=architecture,
        hidden=size["hidden"],
        layers=size["layers"],
        query=size["heads"] * width,
        key=config.get("num_key_value_heads", size["heads"]) * width,
        inner=size["inner"],
        vocabulary=size["vocabulary"],
        tied=bool(config.get("tie_word_embeddings", architecture.tied)),
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
    joined = dims.architecture.joined
    norms = 2 * (BYTES_32 * dims.hidden + BYTES_32)  # the float32 copy that each RMSNorm squares, and its scale
    keys = dims.query if repeated else dims.key
    attention = BYTES_16 * (2 * dims.query + 2 * keys)  # queries, keys, values and the output
    if joined:  # the values are a view that keeps the whole joined projection alive
        attention += BYTES_16 * (dims.query + dims.key)
    mlp = BYTES_16 * 3 * dims.inner  # gate, its activation, up
    whole = norms + attention + mlp
    if lora is None:  # what linear maps and norms need for the gradients of their own weights
        whole += BYTES_16 * (4 * dims.hidden + dims.inner + dims.hidden * joined)
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
