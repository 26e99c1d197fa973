"""The sections of scripts/prove-gpu, in the order of their value.

They show what a CPU cannot, on one GPU, with random weights and nothing downloaded. docs/gpu.md explains what each
proves, and what one GPU cannot show."""

from __future__ import annotations

from gpu_kernels import (
    compiler,
    fused_head,
    grouped_attention,
    known_architecture,
    nf4_product,
    own_precision,
    packages,
    repeated_keys,
)
from gpu_stages import cached_decode, decode, overflow, planned_memory, same_answers, smaller_card, wires
from proof import Section

SECTIONS: dict[str, Section] = {
    "environment": Section("what is here", 30, (packages(), known_architecture(), own_precision(), compiler())),
    "kernels": Section(
        "kernels that only a GPU takes, against plain computations",
        60,
        (nf4_product("bfloat16"), nf4_product("float16"), fused_head(), grouped_attention(), repeated_keys()),
    ),
    "wires-zero2": Section("every way to train, in small, under ZeRO-2", 90, wires("zero2")),
    "wires-zero3": Section("every way to train, in small, under ZeRO-3", 90, wires("zero3")),
    "wires-none": Section("every way to train, in small, without DeepSpeed", 70, wires("none")),
    "overflow": Section("a float16 overflow is no breakdown", 30, (overflow("zero2"),)),
    "seven": Section(
        "memory of the 7B shape against the planner",
        150,
        (planned_memory("sft"), planned_memory("grpo"), planned_memory("evaluate")),
    ),
    "small-card": Section(
        "the same with the memory of a card of 11 GB", 80, (smaller_card("sft"), smaller_card("grpo"))
    ),
    "generation": Section(
        "what a decode step costs; answers do not depend on the batch",
        110,
        (decode(), cached_decode("static"), cached_decode("static and compiled"), same_answers()),
    ),
}
