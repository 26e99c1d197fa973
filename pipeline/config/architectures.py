"""The model architectures this project knows, by the `model_type` of a config.json: one entry each.

    architecture = ARCHITECTURES.get(config["model_type"])     None where the architecture is not known

An entry serves the memory plan, the check of LoRA targets, the small random model of a smoke test, and GGUF. A model of
another type still trains and evaluates, without a check of its memory and LoRA targets. docs/architecture.md shows how
to add an entry; the tests compare each entry with transformers' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

# a linear map of a layer: its module's name -> (widths that it reads, widths that it writes), by the names of DIMS
Projections = Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]
SEPARATE: Projections = {
    "q_proj": (("hidden",), ("query",)),
    "k_proj": (("hidden",), ("key",)),
    "v_proj": (("hidden",), ("key",)),
    "o_proj": (("query",), ("hidden",)),
    "gate_proj": (("hidden",), ("inner",)),
    "up_proj": (("hidden",), ("inner",)),
    "down_proj": (("inner",), ("hidden",)),
}
JOINED: Projections = {
    "qkv_proj": (("hidden",), ("query", "key", "key")),
    "o_proj": (("query",), ("hidden",)),
    "gate_up_proj": (("hidden",), ("inner", "inner")),
    "down_proj": (("inner",), ("hidden",)),
}
# the sizes of a decoder, and their keys in config.json
DIMS = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "inner": "intermediate_size",
    "vocabulary": "vocab_size",
}


@dataclass(frozen=True)
class GgufLayout:
    """What llama.cpp's converter does to the weights and metadata of an architecture."""

    name: str  # llama.cpp's name of the architecture
    rotary_pairs: bool = False  # it rotates neighbouring rows of queries and keys; transformers rotates two halves
    rope_dimension: bool = True  # writes the width that is rotated
    long_context: bool = False  # writes the context of pre-training, the window and the factors of long contexts


@dataclass(frozen=True)
class Architecture:
    """Everything that is known of a model type."""

    title: str
    gguf: GgufLayout | None  # None: export as merged16 and use llama.cpp's own converter
    projections: Projections = field(default_factory=lambda: SEPARATE)  # what LoRA can adapt; what is quantized
    dims: Mapping[str, str] = field(default_factory=lambda: DIMS)
    head_dim: int | None = None  # where config.json names none; None: the model's width ÷ its heads
    attention_bias: bool = False  # the query, key and value projections have one
    head_norms: bool = False  # each head of queries and keys is normed
    layer_norms: int = 2  # of the model's width, in a layer
    norms_in_float32: bool = False  # they multiply by their weights before they round
    tied: bool = False  # the head is the embedding where config.json does not say
    full_attention_every: int = 1  # layers; those between attend to config.json's sliding_window
    overflows_float16: bool = False  # its activations exceed 65,504
    random: Mapping[str, Any] = field(default_factory=dict)  # more of the config.json of a randomly initialized model

    @property
    def joined(self) -> bool:
        """Whether query, key and value are one linear map, and gate and up another."""
        return "qkv_proj" in self.projections


ARCHITECTURES: dict[str, Architecture] = {
    "qwen2": Architecture("Qwen2", GgufLayout("qwen2", rope_dimension=False), attention_bias=True),
    "llama": Architecture("Llama", GgufLayout("llama", rotary_pairs=True)),
    "phi3": Architecture("Phi-3", GgufLayout("phi3", long_context=True), projections=JOINED),
    "qwen3": Architecture("Qwen3", GgufLayout("qwen3", rope_dimension=False), head_dim=128, head_norms=True),
    "gemma3_text": Architecture(
        "Gemma 3 (text)",
        None,
        head_dim=256,
        head_norms=True,
        layer_norms=4,
        norms_in_float32=True,
        tied=True,
        full_attention_every=6,
        overflows_float16=True,
        random={"sliding_window": 64, "sliding_window_pattern": 2},
    ),
}

if TYPE_CHECKING:
    ModelType = str
else:  # a setting's type: the names of the entries
    ModelType = Literal[tuple(ARCHITECTURES)]


def architecture_of(config: Mapping[str, Any]) -> Architecture | None:
    """The entry of a config.json; None where its model type has none."""
    return ARCHITECTURES.get(str(config.get("model_type")))
