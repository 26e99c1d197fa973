"""Plans of one step that belongs to no run: `evaluate --ckpt` and `--endpoint`, `export`; and a checkpoint's recipe.

plan = evaluation_plan("runs/tiny/grpo-1a2b3c4d5e", split="validation")
plan = endpoint_plan(Endpoint("https://host/v1", "name"), task="gsm8k")
plan = export_plan("runs/tiny/grpo-1a2b3c4d5e", format="merged16")
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config.cluster import Cluster, read_cluster
from pipeline.config.endpoint import Endpoint, endpoint_problems
from pipeline.config.load import read_typed
from pipeline.config.recipe import CONFIGS, Recipe, find_yaml, recipe_names
from pipeline.core.errors import ArtifactError, PlanError, RecipeError
from pipeline.core.files import read_json
from pipeline.core.hashing import file_identity, fingerprint, plain
from pipeline.tasks.task import make_task
from pipeline.workflow.artifact import STEP, is_done, step_of
from pipeline.workflow.plan import RUNS, Plan, Step, split_overrides, step_payload, task_problems, with_task_params
from pipeline.workflow.stage import EvaluateCheckpoint, EvaluateEndpoint, Export
from pipeline.workflow.weights import find_checkpoint


def evaluation_plan(
    checkpoint: str,
    words: Sequence[str] = (),
    *,
    task: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    cluster: str = "local",
    runs: Path = RUNS,
) -> Plan:
    """A plan of one step: ask any checkpoint a task's rows.

    The recipe is the one named in `words`, else the one the checkpoint was made with (its step's `step.json`), else
    the defaults; the rows are those of the checkpoint's own preprocess step where task and split are the same.
    """
    words, file = _whole_file(words)
    more = _rows_asked(split, limit, file)
    recipe, where, made_by = recipe_of(checkpoint, [*words, *more], task=task, cluster=cluster, splits=True)
    names = [word for word in words if "=" not in word]
    inputs = {}
    if made_by and not names and plain(recipe.task) == _present(made_by[1]["recipe"])["task"]:
        data = made_by[1]["inputs"].get("data") or str(made_by[0])
        if is_done(Path(data)):
            inputs["data"] = data
    payload = step_payload(
        "evaluate",
        recipe,
        inputs={"data": Path(inputs["data"]).name} if inputs else {},
        files={**checkpoint_identity(checkpoint), **({"task.test_path": file_identity(file)} if file else {})},
        reads=("task",),
    )
    folder = runs / "evaluations" / f"{Path(checkpoint).name}-{fingerprint(payload)}"
    options = EvaluateCheckpoint(checkpoint)
    step = Step("evaluate-checkpoint", "evaluate", recipe, payload, folder, folders=inputs, options=options)
    return Plan((step,), frozenset([step.label]), where, runs)


def endpoint_plan(
    endpoint: Endpoint,
    words: Sequence[str] = (),
    *,
    task: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    cluster: str = "local",
    runs: Path = RUNS,
) -> Plan:
    """A plan of one step: ask a model behind a server a task's rows, as the recipe in `words` or the defaults say."""
    words, file = _whole_file(words)
    names = [word for word in words if "=" not in word]
    overrides, for_cluster = split_overrides([word for word in words if "=" in word])
    if not names and not any(word.startswith("evaluate.splits=") for word in overrides):
        split = split or "test"  # the one that every task has
    overrides += _rows_asked(split, limit, file) + ([f"task.name={task}"] if task is not None else [])
    values: list[Path | dict[str, Any]] = [CONFIGS / "base.yaml"]
    without = {"model": {"name": "endpoint"}, "grpo": {"init_from": "none"}}  # nothing is loaded or trained here
    values += [find_yaml(names[0], "recipe", CONFIGS, recipe_names()) if names else without]
    name = values[1].stem if isinstance(values[1], Path) else "base"
    recipe, problems = read_typed(Recipe, values, overrides, {"name": name})
    where, found = read_cluster(cluster, for_cluster)
    problems += found + (task_problems(recipe) if recipe is not None else [])
    if where is not None:
        problems += endpoint_problems(endpoint, where.endpoint, "--endpoint", "--")
    if recipe is None or where is None or problems:
        raise RecipeError(*problems)
    recipe, options = with_task_params(recipe), EvaluateEndpoint(endpoint)
    files = {"task.test_path": file_identity(file)} if file else {}
    payload = step_payload("evaluate", recipe, inputs={}, files=files, reads=("task",), options=options)
    model = re.sub(r"[^\w.+=@,-]+", "-", endpoint.model)[-60:].strip("-.")
    folder = runs / "evaluations" / f"{model or 'endpoint'}-{fingerprint(payload)}"
    step = Step("evaluate-endpoint", "evaluate", recipe, payload, folder, options=options)
    return Plan((step,), frozenset([step.label]), where, runs)


def _rows_asked(split: str | None, limit: int | None, file: Path | None) -> list[str]:
    """Overrides for the rows that an evaluation is asked for by options, or by a file."""
    more = [f"evaluate.limit={limit}"] if limit is not None else []
    return more + ([f"evaluate.splits=[{split or 'test'}]"] if split is not None or file else [])


def _present(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe of an older record, under the present names."""
    values: dict[str, Any] = Recipe.renames(recipe).apply(recipe)[0]
    return values


def _whole_file(words: Sequence[str]) -> tuple[list[str], Path | None]:
    """The words with a file that they name as the test rows, all of them, and that file.

    Rows are held out of a file to learn from the others; an evaluation learns nothing.
    """
    keys = ("task.path", "task.test_path")
    named = {key: path for key, _, path in (word.partition("=") for word in words) if key in keys}
    path = named.get("task.test_path") or named.get("task.path")
    if not path or path == "null":
        return list(words), None
    if not Path(path).is_file():
        raise PlanError(f"{', '.join(named)}: got {path[:80]}, which is not a file; expected the rows to evaluate")
    others = [word for word in words if not word.startswith(("task.source=", "task.validation_path=", *keys))]
    cleared = ["task.source=path", "task.path=null", "task.validation_path=null"]
    return [*others, *cleared, f"task.test_path={path}"], Path(path)


def export_plan(
    checkpoint: str,
    words: Sequence[str] = (),
    *,
    format: str,
    quant: str | None = None,
    out: Path | None = None,
    cluster: str = "local",
    runs: Path = RUNS,
) -> Plan:
    """A plan of one step: a checkpoint for others. Its folder is `out`, else one of `runs/exports/`."""
    recipe, where, made_by = recipe_of(checkpoint, words, cluster=cluster)
    problems = []
    if format == "adapter" and find_checkpoint(checkpoint).adapter is None:
        problems.append(f"--format adapter: {checkpoint} is a whole model without an adapter; use merged16")
    if quant is not None and format != "gguf":
        problems.append(
            f"--quant {quant}: of a GGUF file, but the format is {format}; use --format gguf, or leave it out"
        )
    source = made_by[0].name if made_by else Path(checkpoint).name
    quant = (quant or "q8_0") if format == "gguf" else None
    options = Export(checkpoint, format, source, quant, recipe.model.quantization)
    settings = {"format": format, "source": source} | ({"quant": quant} if quant else {})
    identity = checkpoint_identity(checkpoint)
    payload = step_payload("export", recipe, inputs={"source": source}, files=identity, settings=settings)
    ending = "-".join([format, *([quant] if quant else []), fingerprint(payload)])
    step_name = source.removesuffix(f"-{made_by[1].get('fingerprint')}") if made_by else source.rpartition("-")[0]
    folder = out or runs / "exports" / f"{recipe.name}-{step_name or source}-{ending}"
    if out and out.exists() and any(out.iterdir()):
        there = read_json(out / STEP) or {}
        if there.get("fingerprint") != fingerprint(payload):
            problems.append(f"--out {out}: there is something else in it already; name a new folder")
    if problems:
        raise PlanError(*problems)
    if format != "adapter":  # what is merged is loaded as it lies there, by whoever asks or evaluates it
        recipe = replace(recipe, model=replace(recipe.model, quantization="none"))
    step = Step("export", "export", recipe, payload, folder, options=options)
    return Plan((step,), frozenset([step.label]), where, runs)


def recipe_of(
    checkpoint: str,
    words: Sequence[str] = (),
    *,
    task: str | None = None,
    cluster: str = "local",
    splits: bool = False,
) -> tuple[Recipe, Cluster, tuple[Path, dict[str, Any]] | None]:
    """The recipe and cluster a checkpoint is used with, and the step it was made by.

    The recipe is the one named in `words`, else the one the checkpoint was made with (its step's `step.json`), else
    the defaults. `splits`: those that an evaluation asks for have to exist. Raises with everything that is wrong.
    """
    names = [word for word in words if "=" not in word]
    find_checkpoint(checkpoint)  # what cannot be loaded is refused before anything is started
    overrides, for_cluster = split_overrides([word for word in words if "=" in word])
    made_by = step_of(Path(checkpoint))
    if made_by and not (isinstance(made_by[1], dict) and isinstance(made_by[1].get("recipe"), dict)):
        raise ArtifactError(f"{made_by[0] / STEP}: got no recipe; expected a step's record. Fix: name another folder")
    values: list[Path | dict[str, Any]]
    if names:
        file = find_yaml(names[0], "recipe", CONFIGS, recipe_names())
        values, name = [CONFIGS / "base.yaml", file], file.stem
    elif made_by:
        values, name = [made_by[1]["recipe"]], made_by[1]["recipe"].get("name")
    else:
        values, name = [CONFIGS / "base.yaml", {"model": {"name": checkpoint}}], "base"
    if task is not None:
        overrides.append(f"task.name={task}")
        if made_by and task != made_by[1]["recipe"]["task"]["name"]:
            values.append(
                {"task": {"source": "auto", "path": None, "validation_path": None, "test_path": None, "params": None}}
            )
            overrides.append("task.params={}")
    recipe, problems = read_typed(Recipe, values, overrides, {"name": name})
    where, found = read_cluster(cluster, for_cluster)
    if recipe is not None:
        found = [*found, *(task_problems(recipe) if splits else make_task(recipe.task, recipe.seed)[1])]
    if recipe is None or where is None or found:
        raise RecipeError(*problems, *found)
    return with_task_params(recipe), where, made_by


def checkpoint_identity(checkpoint: str) -> dict[str, str]:
    folder = Path(checkpoint)
    if not folder.is_dir():
        return {"checkpoint": checkpoint}
    endings = (".safetensors", ".bin", ".json", ".jinja")
    kept = [p for p in sorted(folder.rglob("*")) if p.suffix in endings and p.is_file()]
    named = {path.relative_to(folder): path for path in kept}
    weights = {name: path for name, path in named.items() if not any("global_step" in part for part in name.parts)}
    return {name.as_posix(): file_identity(path) for name, path in weights.items()}
