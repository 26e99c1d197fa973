"""Names that settings had in earlier versions: they are read, with a notice, and they are what is hashed.

    recipe_renames("corr2cause").apply(values)      values under the present names, and a notice for each former one
    identity(plain(recipe), ["sft", "model.name"])  these parts of a recipe as they enter a fingerprint

A setting that is renamed keeps its former name in every identity, so that finished steps stay finished. An entry of
RENAMED and TASK_PARAMS therefore stays for as long as the revisions of the stages that read it; MOVED and CLUSTER may
go in the next version.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.core.schema import Renames, value_at

RENAMED = {
    "rehearsal": "smoke_test",
    "model.scratch": "model.random_init",
    "task.bad_rows": "task.on_bad_row",
    "sft.prompt_loss": "sft.full_loss_fraction",
    "sft.validate_every": "sft.eval_steps",
    "sft.optimizer.schedule": "sft.optimizer.lr_scheduler_type",
    "sft.optimizer.schedule_args": "sft.optimizer.lr_scheduler_kwargs",
    "sft.optimizer.beta2": "sft.optimizer.adam_beta2",
    "grpo.optimizer.schedule": "grpo.optimizer.lr_scheduler_type",
    "grpo.optimizer.schedule_args": "grpo.optimizer.lr_scheduler_kwargs",
    "grpo.optimizer.beta2": "grpo.optimizer.adam_beta2",
    "grpo.start": "grpo.init_from",
    "grpo.mask_truncated": "grpo.mask_truncated_completions",
}
MOVED = {  # to another stage, whose identity has the present name; "": gone
    "evaluate.draws": "report.bootstrap_samples",
    "evaluate.confidence": "report.confidence",
    "evaluate.goals": "report.success_criteria",
    "model.backend": "",  # transformers, or Unsloth's copy of it, which could not be installed beside TRL
}
VALUES = {"task.on_bad_row": {"stop": "error"}}
TASK_PARAMS: dict[str, dict[str, str]] = {  # task -> former name -> name
    "corr2cause": {
        "letters": "variable_names",
        "density": "edge_probability",
        "phases[].traces": "phases[].proof_fraction",
    }
}
TASK_VALUES: dict[str, dict[str, dict[str, str]]] = {"corr2cause": {"balance": {"even": "balanced"}}}
CLUSTER = Renames(
    {
        "stop_grace": "kill_timeout",
        "slurm.save_before": "slurm.signal_before_limit",
        "slurm.options": "slurm.extra_sbatch_args",
    },
    prefix="cluster.",
)


def param_renames(task: str) -> Renames:
    """Return the renamed settings among a task's own, without `task.params.` before them."""
    return Renames(TASK_PARAMS.get(task, {}), TASK_VALUES.get(task, {}), prefix="task.params.")


def recipe_renames(task: str) -> Renames:
    """Return all renamed settings of a recipe whose task is `task`."""
    return Renames({**RENAMED, **MOVED}, VALUES).including(param_renames(task), "task.params")


def identity(recipe: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """Return the parts of a recipe that enter a hash, by their paths, all under their former names."""
    renamed = Renames(RENAMED, VALUES).including(param_renames(task_name(recipe)), "task.params")
    values = renamed.undo(recipe)
    former = {new: old for old, new in RENAMED.items()}
    return {former.get(path, path): value_at(values, former.get(path, path)) for path in paths}


def present_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an identity, as `identity` made them, as a mapping under the present names."""
    values: dict[str, Any] = {}
    for path, value in settings.items():
        *above, name = path.split(".")
        below = values
        for part in above:
            if not isinstance(below.setdefault(part, {}), dict):
                below[part] = {}  # not a record of this project's: shown as well as it can be
            below = below[part]
        below[name] = value
    present: dict[str, Any] = recipe_renames(task_name(values)).apply(values)[0]
    return present


def task_name(recipe: Any) -> str:
    """Return the name of the task in a recipe's values, "" where they have none."""
    found = value_at(recipe, "task.name")
    return found if isinstance(found, str) else ""
