"""The names that transformers and TRL give to optimizers, learning-rate schedules and losses, as types of settings.

They are written down here, so that a mistyped name is refused without importing either library. A test compares every
list with the installed libraries: after an upgrade it says what to change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pipeline.core.errors import did_you_mean

# fmt: off
# transformers' OptimizerNames; muon (Jordan et al. 2024) is DeepSpeed's
OptimizerName = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor", "adamw_anyprecision",
    "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "sgd", "adagrad", "adamw_bnb_8bit", "adamw_8bit",
    "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit",
    "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "lomo", "adalomo", "grokadamw", "schedule_free_radam",
    "schedule_free_adamw", "schedule_free_sgd", "apollo_adamw", "apollo_adamw_layerwise", "stable_adamw", "muon",
]
# transformers' SchedulerType
SchedulerName = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
]
# what TRL's GRPOTrainer compares `loss_type` with, and GRPOConfig `scale_rewards`
LossName = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"]
RewardScale = Literal["group", "batch", "none"]
# fmt: on

MIN_LR = ("min_lr", "min_lr_rate")
# schedule -> (arguments that it needs, arguments that it takes); a schedule that is not here takes what its class takes
SCHEDULER_KWARGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": ((), ()),
    "constant": ((), ()),
    "constant_with_warmup": ((), ()),
    "cosine": ((), ("num_cycles",)),
    "cosine_with_restarts": ((), ("num_cycles",)),
    "polynomial": ((), ("lr_end", "power")),
    "inverse_sqrt": ((), ("timescale",)),
    "cosine_with_min_lr": ((), ("num_cycles", *MIN_LR)),
    "cosine_warmup_with_min_lr": ((), ("num_cycles", *MIN_LR, "warmup_lr_rate")),
    "warmup_stable_decay": (
        ("num_decay_steps",),
        ("num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"),
    ),
}


def scheduler_problems(key: str, kind: str, given: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with `lr_scheduler_kwargs`, the setting `key`, for a schedule."""
    needs, takes = SCHEDULER_KWARGS.get(kind, ((), tuple(given)))
    found = []
    for name in given:
        if name not in takes:
            fix = did_you_mean(name, takes) if takes else f"it takes none. Fix: {key}=null"
            found.append(f"{key}.{name}: got an argument that the schedule {kind} does not take; {fix}")
    lacks = [name for name in needs if name not in given]
    if set(MIN_LR) <= set(takes) and not set(MIN_LR) & set(given):
        lacks.append("min_lr_rate")
    if lacks:
        found.append(f"{key}: got none of {', '.join(lacks)}, which {kind} needs. Fix: {key}.{lacks[0]}=0.1")
    return found
