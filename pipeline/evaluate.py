"""Generate an answer to every test row, grade it, and compute metrics.

    python -m pipeline.evaluate tiny                             the recipe's models: base, SFT, GRPO
    python -m pipeline.evaluate --ckpt DIR [--task corr2cause] [--split test] [--limit N]    any checkpoint

Each row gets one completion, drawn as `recipe.evaluate` says (greedy at temperature 0) with a seed of its own, whatever
the batch size and the number of processes. `Task.grade` grades it, as it does for GRPO's rewards.

Leaves `predictions.jsonl` (one line a row: prompt's hash, completion, grade) and `metrics.json`. An evaluation that
was interrupted resumes with the rows that have no answer yet.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.config.cluster import AUTO_EVALUATE
from pipeline.config.recipe import Recipe
from pipeline.core.errors import DataError
from pipeline.core.files import write_json
from pipeline.engines.engine import Engine, Request, Sampling
from pipeline.engines.families import share_out
from pipeline.engines.loading import load_engine
from pipeline.models.loading import (
    encode_rows,
    initial_checkpoint,
    load_tokenizer,
    prompt_ids,
    template_opens_think,
)
from pipeline.scoring.answers import has_thought
from pipeline.scoring.predictions import PREDICTIONS, Prediction, read_predictions
from pipeline.scoring.results import to_json
from pipeline.tasks.rows import skipped_note
from pipeline.tasks.task import Task, example_of, rows, task_of
from pipeline.training import distributed
from pipeline.training.harness import main
from pipeline.workflow.artifact import PROMPTS, Artifact, read_split
from pipeline.workflow.figures import count
from pipeline.workflow.runtime import Deadline, Runtime
from pipeline.workflow.stage import EvaluateCheckpoint
from pipeline.workflow.weights import find_checkpoint

PROGRESS_METRICS = ("f1", "balanced_accuracy", "accuracy", "proxy", "preference", "unanswered")


def run(recipe: Recipe, inputs: Mapping[str, Artifact], out: Path, runtime: Runtime) -> dict[str, Any]:
    settings = recipe.evaluate
    distributed.start(deepspeed=False)

    # ---- rows
    runtime.progress.update(note="reading rows", unit="rows")
    task = task_of(recipe.task, recipe.seed)
    tests, skipped = test_rows(recipe, task, inputs)
    if skipped and runtime.rank == 0:
        runtime.warn(skipped_note(skipped))

    # ---- the model
    runtime.progress.update(note="loading the model")
    given = runtime.options.checkpoint if isinstance(runtime.options, EvaluateCheckpoint) else None
    checkpoint = find_checkpoint(given) if given else initial_checkpoint(recipe.model, inputs)
    tokenizer = load_tokenizer(checkpoint, recipe.model)
    sampling = Sampling(
        settings.temperature, settings.top_p, settings.top_k, settings.max_new_tokens, settings.repetition_penalty
    )
    prompt_opens_think = template_opens_think(tokenizer)

    # ---- ask and grade, one line a row, each line kept as soon as it is there
    test_cases = [(split, row) for split, split_rows in tests.items() for row in split_rows]
    answered = read_partial_answers(out)
    left = [(split, row) for split, row in test_cases if (split, row["id"]) not in answered]
    distributed.barrier()  # every rank has to see the same rows left before any writes
    prompts = prompt_ids(tokenizer, [row["prompt"] for _, row in left])
    asked = [task.messages(task.example_from_text(text)) for text in settings.prompts]
    shown = prompt_ids(tokenizer, asked) if asked else []
    requests = [Request(prompt, recipe.seed) for prompt in prompts]
    total, rows_at_once = len(test_cases), runtime.cluster.evaluate_batch_size
    chosen = runtime.cluster.generation.evaluate
    together = 1 if chosen.tensor_parallel == "auto" or chosen.engine != "vllm" else chosen.tensor_parallel
    leads = runtime.rank % together == 0  # of the processes that share a model, one writes
    mine = share_out(requests, runtime.rank // together, runtime.world // together)
    engine = load_engine(
        checkpoint,
        recipe.model,
        tokenizer,
        chosen,
        rows=AUTO_EVALUATE if rows_at_once == "auto" else rows_at_once,
        length=_longest(tokenizer, [*prompts, *shown], [row for _, row in left], settings.max_new_tokens),
        limits=runtime.cluster.max_memory,
    ).engine
    runtime.progress.update(state="running", done=len(answered), first=len(answered), total=total, note="")
    deadline = Deadline(runtime, "evaluate")
    partial = out / f"partial-{runtime.rank}-{time.time_ns()}.jsonl" if leads else Path(os.devnull)
    with partial.open("w", encoding="utf-8") as file:
        for finished, answer in enumerate(engine.generate([requests[k] for k in mine], sampling), 1):
            index, completion = mine[answer.request], answer.completion
            split, row = left[index]
            example = example_of(row)
            verdict = task.judge(example, completion.text, prompt_opens_think, completion.truncated)
            prediction = Prediction(
                split=split,
                id=row["id"],
                prompt_sha256=sha256(json.dumps(prompts[index]).encode()).hexdigest()[:16],
                group=row["group"],
                tags=row["tags"],
                gold=row["gold"],
                answer=verdict.answer,
                correct=verdict.correct,
                proxy=verdict.proxy,
                answered=verdict.answered,
                reason=verdict.reason,
                solved=task.solve(example),
                thought=has_thought(completion.text, prompt_opens_think),
                preferred=prefers(engine, tokenizer, row),
                completion=completion.text,
                tokens=completion.tokens,
                truncated=completion.truncated,
            )
            file.write(json.dumps(prediction.to_json(), ensure_ascii=False) + "\n")
            file.flush()
            runtime.progress.update(done=min(total, len(answered) + finished * (runtime.world // together)))
            deadline.step()
            runtime.raise_if_stopping()
    distributed.barrier()

    # ---- the questions whose answers are only shown
    if shown and runtime.rank < together:
        found = engine.generate([Request(ids, recipe.seed) for ids in shown], sampling)
        texts = {answer.request: answer.completion.text for answer in found}
        answers = [{"prompt": prompt, "answer": texts[k]} for k, prompt in enumerate(settings.prompts)]
        if runtime.rank == 0:
            write_json(out / PROMPTS, answers)

    engine.close()

    # ---- count
    if runtime.rank != 0:
        return {}
    done = read_partial_answers(out)
    predictions = [done[split, row["id"]] for split, row in test_cases]
    with (out / PREDICTIONS).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(one.to_json(), ensure_ascii=False) + "\n" for one in predictions)
    by_split = count(predictions, task, recipe.report, recipe.seed)
    metrics: dict[str, Any] = to_json(by_split)
    write_json(out / "metrics.json", metrics)
    for path in out.glob("partial-*.jsonl"):
        path.unlink()
    main_split = by_split[settings.splits[0]].overall
    figures = {name: main_split[name].value for name in PROGRESS_METRICS if name in main_split}
    runtime.progress.update(done=total, figures=figures)
    return metrics


def _longest(tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], rows: list[dict[str, Any]], new: int) -> int:
    """Return the tokens of the longest prompt with its answer, or of the longest answer that is only scored."""
    scored = [row for row in rows if (row["tags"] or {}).get("rejected")]
    answers = [row["completion"] for row in scored]
    answers += [[{"role": "assistant", "content": row["tags"]["rejected"]}] for row in scored]
    both = encode_rows(tokenizer, [row["prompt"] for row in scored] * 2, answers) if scored else []
    return max([len(prompt) + new for prompt in prompts] + [len(one["input_ids"]) + 1 for one in both], default=new)


def prefers(engine: Engine, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> bool | None:
    """Whether the row's wanted answer is likelier, by its mean log-probability a token, than its rejected one.

    None for a row without a rejected answer.
    """
    rejected = (row["tags"] or {}).get("rejected")
    if not rejected:
        return None
    pair = [row["completion"], [{"role": "assistant", "content": rejected}]]
    wanted, other = (
        engine.log_likelihood(one["input_ids"], one["labels"])
        for one in encode_rows(tokenizer, [row["prompt"]] * 2, pair)
    )
    return wanted > other


def test_rows(
    recipe: Recipe, task: Task, inputs: Mapping[str, Artifact]
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """The records of each split in `evaluate.splits`, and a sentence for each row that was skipped.

    They are those of the preprocess step, or of the task itself where there is none.
    """
    wanted, limit = recipe.evaluate.splits, recipe.evaluate.limit
    if "data" in inputs:
        known = [path.stem for path in sorted((inputs["data"].folder / "data").glob("*.parquet"))]
        found = {name: read_split(inputs["data"], name).to_pylist() for name in wanted if name in known}
        skipped = []
    else:
        splits = task.load()
        parts = {**splits.tests, "validation": splits.validation}
        known = [name for name, examples in parts.items() if examples]
        found = {name: list(rows(task, parts[name])) for name in wanted if name in known}
        skipped = splits.proof.get("skipped", [])
    if missing := [name for name in wanted if name not in found]:
        raise DataError(
            f"evaluate.splits: no rows for split {' and '.join(missing)}; this task has {', '.join(known) or 'none'}"
        )
    return {name: found[name][:limit] for name in wanted}, skipped


def read_partial_answers(out: Path) -> dict[tuple[str, str], Prediction]:
    """Read the answers that every process and earlier attempt has left; a last line that was cut off is left out."""
    parts = [read_predictions(path) for path in sorted(out.glob("partial-*.jsonl"))]
    return {(one.split, one.id): one for part in parts for one in part}


if __name__ == "__main__":
    main("evaluate", run)
