"""Rows, splits and their proof; for a model from scratch also its tokenizer and first weights.

    python -m pipeline.preprocess tiny

Leaves `data/<split>.parquet` (conversational prompt/completion records with metadata, readable by `datasets`),
`splits.json` (which groups are in which split, overlap 0) and, from scratch, `model/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifact import Artifact
from pipeline.errors import DataError
from pipeline.files import write_json
from pipeline.recipe import Recipe
from pipeline.rows import left_out
from pipeline.runtime import Runtime
from pipeline.stage import main
from pipeline.tasks.task import Example, Task, rows, task_of

TOKENIZER_ROWS = 4000  # rows that a tokenizer from scratch is trained on


def run(recipe: Recipe, inputs: Mapping[str, Artifact], out: Path, runtime: Runtime) -> dict[str, Any]:
    # ---- the task's rows
    runtime.progress.update(state="running", note="reading or generating rows", unit="splits")
    task = task_of(recipe.task, recipe.seed)
    splits = task.load()
    if not splits.sft and not splits.grpo:
        raise DataError(f"task {recipe.task.name}: no training rows; ask for some in task.params")

    # ---- one parquet file a split
    parts = {"sft": splits.sft, "grpo": splits.grpo, "validation": splits.validation, **splits.tests}
    (out / "data").mkdir(exist_ok=True)
    for done, (name, examples) in enumerate(parts.items()):
        runtime.progress.update(done=done, total=len(parts), note=f"writing {name}")
        if examples:
            write_rows(task, examples, out / "data" / f"{name}.parquet")
    write_json(out / "splits.json", {"tests": list(splits.tests), **splits.proof})
    counts = {name: len(examples) for name, examples in parts.items()}
    skipped = splits.proof.get("skipped", [])
    metrics: dict[str, Any] = {"rows": counts, "overlap": splits.proof.get("overlap"), "skipped": len(skipped)}
    if skipped:
        runtime.warn(left_out(skipped, " (splits.json names all)"))

    # ---- a model from nothing
    if recipe.model.scratch:
        from pipeline.modeling import make_scratch

        runtime.progress.update(note="training the tokenizer")
        texts = _texts(task, splits.sft[:: max(1, len(splits.sft) // TOKENIZER_ROWS)] or splits.grpo)
        template = recipe.model.chat_template or "think"
        metrics["parameters"] = make_scratch(recipe.model.scratch, texts, template, out / "model", recipe.seed)
    # ---- or one from a file
    if recipe.model.gguf:
        from pipeline.modeling import unpack_gguf

        runtime.progress.update(note="unpacking the model")
        metrics["parameters"] = unpack_gguf(recipe.model, out / "model")
    runtime.progress.update(done=len(parts), figures={"rows": float(sum(counts.values()))})
    return metrics


def write_rows(task: Task, examples: Iterable[Example], path: Path) -> None:
    """Examples as records; the same examples give the same bytes."""
    table = pa.Table.from_pylist(list(rows(task, list(examples))))
    pq.write_table(table, path, compression="zstd")


def _texts(task: Task, examples: list[Example]) -> Iterator[str]:
    for example in examples:
        for message in task.messages(example):
            yield message["content"]
        yield example.target


if __name__ == "__main__":
    main("preprocess", run)
