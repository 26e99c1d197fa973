"""Read or generate the task's rows, split them, and write them; initialise a random model where the recipe has one.

    python -m pipeline.preprocess tiny

Leaves `data/<split>.parquet` (conversational prompt/completion records with metadata, readable by `datasets`),
`splits.json` (which groups are in which split, overlap 0) and, for a randomly initialised model, `model/` with a
tokenizer trained on the rows. A GGUF file is unpacked to `model/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.recipe import Recipe
from pipeline.core import stopwatch
from pipeline.core.errors import DataError, join_first
from pipeline.core.files import write_json
from pipeline.scoring import answers
from pipeline.tasks.rows import BAD_ROWS_SHOWN, BadRows
from pipeline.tasks.task import Example, Splits, Task, rows, task_of
from pipeline.training.harness import main
from pipeline.workflow.artifact import Artifact
from pipeline.workflow.runtime import Runtime

WARNED_LISTS = {  # lists of the split summary that the user has to know of
    "skipped": "rows cannot be read and were left out",
    "without_gold": "rows have no gold answer, so they are not rewarded and nothing verifies them",
    "unpaid_targets": "targets would not be paid in full by the task's own judge",
}
BAD_ROWS = "bad-rows.txt"  # of a step that failed because of them
TOKENIZER_ROWS = 4000  # rows that a tokenizer from scratch is trained on


def run(recipe: Recipe, inputs: Mapping[str, Artifact], out: Path, runtime: Runtime) -> dict[str, Any]:
    # ---- the task's rows
    stopwatch.enter("rows")
    runtime.progress.update(state="running", note="reading or generating rows", unit="splits")
    task = task_of(recipe.task, recipe.seed)
    (out / BAD_ROWS).unlink(missing_ok=True)
    try:
        splits = task.load()
    except BadRows as error:
        raise all_bad_rows(error, task, out) from None
    if problems := missing_training_rows(recipe, task, splits):
        raise DataError(*problems)

    # ---- one parquet file a split
    parts = {"sft": splits.sft, "grpo": splits.grpo, "validation": splits.validation, **splits.tests}
    (out / "data").mkdir(exist_ok=True)
    for done, (name, examples) in enumerate(parts.items()):
        runtime.progress.update(done=done, total=len(parts), note=f"writing {name}")
        if examples:
            write_rows(task, examples, out / "data" / f"{name}.parquet")
    unpaid, thoughtless = target_problems(task, [*splits.sft, *splits.validation])
    proof = {**splits.proof, "unpaid_targets": unpaid, "empty_thoughts": len(thoughtless)}
    write_json(out / "splits.json", {"tests": list(splits.tests), **proof})
    counts = {name: len(examples) for name, examples in parts.items()}
    metrics: dict[str, Any] = {"rows": counts, "overlap": proof.get("overlap"), "empty_thoughts": len(thoughtless)}
    for name, what in WARNED_LISTS.items():
        found = proof.get(name, [])
        metrics[name] = len(found)
        if found:
            runtime.warn(f"{len(found):,} {what} (splits.json names all): {join_first(found, between='; ')}")

    # ---- a randomly initialised model
    stopwatch.enter("load")
    if recipe.model.random_init:
        from pipeline.models.loading import make_random_model

        runtime.progress.update(note="training the tokenizer")
        some = splits.sft[:: max(1, len(splits.sft) // TOKENIZER_ROWS)] or splits.grpo
        prompts = [message["content"] for example in some for message in task.messages(example)]
        metrics["parameters"] = make_random_model(
            recipe.model.random_init,
            (example.target for example in some),
            recipe.model.chat_template or "think",
            out / "model",
            recipe.seed,
            prompts,
        )
    # ---- or one from a file
    if recipe.model.gguf:
        from pipeline.models.loading import unpack_gguf

        runtime.progress.update(note="unpacking the model")
        metrics["parameters"] = unpack_gguf(recipe.model, out / "model")
    if recipe.model.random_init or recipe.model.gguf:  # the tokenizer is here already; otherwise SFT makes them
        from pipeline.models.loading import base_checkpoint, load_tokenizer
        from pipeline.training.tokens import keep_tokens

        runtime.progress.update(note="tokenizing")
        tokenizer = load_tokenizer(base_checkpoint(recipe.model, out), recipe.model)
        for split in ("sft", "validation") if "sft" in recipe.stages else ():
            if parts[split]:
                keep_tokens(tokenizer, out, split)
    different = {example.id for examples in parts.values() for example in examples}  # SFT and GRPO may share theirs
    runtime.progress.update(done=len(parts), figures={"rows": float(len(different))})
    return metrics


def all_bad_rows(first: BadRows, task: Task, out: Path) -> BadRows:
    """Return the error for the bad rows of all files of a task. Where they fill a screen, a file of `out` names all."""
    messages = (task.bad_rows() if len(task.choice.files) > 1 else []) or list(first.messages)
    if len(messages) <= BAD_ROWS_SHOWN:
        return BadRows(messages)
    text = "".join(f"{message}\n" for message in messages)
    (out / BAD_ROWS).write_text(text, encoding="utf-8", errors="backslashreplace")
    return BadRows(messages, named_in=str(out / BAD_ROWS))


def target_problems(task: Task, examples: Iterable[Example]) -> tuple[list[str], list[str]]:
    """Return the rows whose target the task's own grading would not reward in full, and those with an empty thought.

    An empty thought is what some recipes teach on purpose (`proof_fraction: 0.75`), so it is counted by itself.
    """
    unpaid, thoughtless = [], []
    for example in examples:
        if answers.has_empty_thought(example.target):
            thoughtless.append(example.id)
            worded = replace(example, target=example.target.replace(answers.OPEN, f"{answers.OPEN}x", 1))
            fault = task.target_fault(worded)
        else:
            fault = task.target_fault(example)
        if fault:
            unpaid.append(f"{example.id}: {fault}")
    return unpaid, thoughtless


def missing_training_rows(recipe: Recipe, task: Task, splits: Splits) -> list[str]:
    """Return a sentence for each training stage without rows: what was read, and why rows were left out."""
    rows = {"sft": splits.sft, "grpo": splits.grpo}
    read = ", ".join(
        f"{name} {len(examples):,}"
        for name, examples in {**rows, "validation": splits.validation, **splits.tests}.items()
    )
    lost = []
    for name, what in {**WARNED_LISTS, "same_question": "rows ask what a held-out row asks"}.items():
        if found := splits.proof.get(name):
            lost.append(f"{len(found):,} {what}: {join_first(found, between='; ')}")
    if without := splits.proof.get("without_solution"):
        lost.append(f"{without:,} rows have no worked solution")
    where = recipe.task.path if task.source == "path" else f"task.source={task.source}"
    sentences = []
    for stage in recipe.stages:
        if not rows[stage]:
            needs = f" (a row needs {task.needs[stage]})" if stage in task.needs else ""
            leave = {"sft": "train without SFT (--skip-sft)", "grpo": "train without GRPO (grpo.init_from=none)"}[stage]
            sentences.append(
                f"task: got no row for {stage} to learn from in {where}; expected one at least{needs}. Rows by use: "
                f"{read}. {''.join(f'{text}. ' for text in lost)}Fix: name a file with such rows, ask for some in "
                f"task.params, or {leave}"
            )
    return sentences


def write_rows(task: Task, examples: Iterable[Example], path: Path) -> None:
    """Examples as records; the same examples give the same bytes."""
    table = pa.Table.from_pylist(list(rows(task, list(examples))))
    pq.write_table(table, path, compression="zstd")


if __name__ == "__main__":
    main("preprocess", run)
