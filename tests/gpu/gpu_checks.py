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

# the limits together stay below the time of the whole proof (prove_gpu.TOTAL), so that no section is left out
SECTIONS: dict[str, Section] = {
    "environment": Section("what is here", 30, (packages(), known_architecture(), own_precision(), compiler())),
    "kernels": Section(
        "kernels that only a GPU takes, against plain computations",
        50,
        (nf4_product("bfloat16"), nf4_product("float16"), fused_head(), grouped_attention(), repeated_keys()),
    ),
    "wires-zero2": Section("every way to train, in small, under ZeRO-2", 80, wires("zero2")),
    "wires-zero3": Section("every way to train, in small, under ZeRO-3", 80, wires("zero3")),
    "wires-none": Section("every way to train, in small, without DeepSpeed", 60, wires("none")),
    "overflow": Section("a float16 overflow is no breakdown", 25, (overflow("zero2"),)),
    "seven": Section(
        "memory of the 7B shape against the planner",
        120,
        (planned_memory("sft"), planned_memory("grpo"), planned_memory("evaluate")),
    ),
    "small-card": Section(
        "the same with the memory of a card of 11 GB", 60, (smaller_card("sft"), smaller_card("grpo"))
    ),
    "generation": Section(
        "what a decode step costs; answers do not depend on the batch",
        75,
        (decode(), cached_decode("static"), cached_decode("static and compiled"), same_answers()),
    ),
}
