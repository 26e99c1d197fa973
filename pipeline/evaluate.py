"""Generate an answer to every test row, grade it, and compute metrics.

    python -m pipeline.evaluate tiny                             the recipe's models: base, SFT, GRPO, its endpoints
    python -m pipeline.evaluate --ckpt DIR [--task corr2cause] [--split test] [--limit N]    any checkpoint
    python -m pipeline.evaluate --endpoint URL --model NAME [--task corr2cause] …            a model behind a server

Each row gets one completion, or `evaluate.samples` of them, drawn as `recipe.evaluate` says (greedy at temperature 0)
with a seed of its own, whatever the batch size and the number of processes. `Task.grade` grades it, as it does for
GRPO's rewards.

Leaves `predictions.jsonl` (a line for each completion: prompt's hash, completion, grade) and `metrics.json`. An
evaluation that was interrupted resumes with the completions that are missing. An endpoint is asked by one process
without torch; a row that it never answers is unanswered, with the reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.cluster import AUTO_EVALUATE
from pipeline.config.endpoint import Endpoint
from pipeline.config.recipe import Recipe
from pipeline.core import heartbeat, stopwatch
from pipeline.core.errors import DataError
from pipeline.core.files import write_json
from pipeline.engines.engine import Completion, Engine, Request, Sampling
from pipeline.engines.families import share_out
from pipeline.scoring.answers import has_thought
from pipeline.scoring.predictions import FAILED, PREDICTIONS, Prediction, read_predictions
from pipeline.scoring.results import to_json
from pipeline.tasks.rows import skipped_note
from pipeline.tasks.task import Example, Grade, Message, Task, example_of, rows, task_of
from pipeline.training.harness import main
from pipeline.workflow.artifact import ENDPOINT, PROMPTS, Artifact, read_split
from pipeline.workflow.figures import count
from pipeline.workflow.runtime import Deadline, Runtime
from pipeline.workflow.stage import EvaluateCheckpoint, EvaluateEndpoint
from pipeline.workflow.weights import find_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
PROGRESS_METRICS = ("f1", "balanced_accuracy", "accuracy", "valid_proofs", "proxy", "preference", "unanswered")


def run(recipe: Recipe, inputs: Mapping[str, Artifact], out: Path, runtime: Runtime) -> dict[str, Any]:
    settings = recipe.evaluate
    endpoint = runtime.options.endpoint if isinstance(runtime.options, EvaluateEndpoint) else None
    barrier = join_processes() if endpoint is None else lambda: None

    # ---- rows
    stopwatch.enter("rows")
    runtime.progress.update(note="reading rows", unit="rows" if settings.samples == 1 else "answers")
    task = task_of(recipe.task, recipe.seed)
    tests, skipped = test_rows(recipe, task, inputs)
    if skipped and runtime.rank == 0:
        runtime.warn(skipped_note(skipped))

    # ---- the rows that have no answer yet
    test_cases = [(split, row) for split, split_rows in tests.items() for row in split_rows]
    answered = read_partial_answers(out)
    left = unanswered_samples(test_cases, settings.samples, answered.keys())
    shown = [task.messages(task.example_from_text(text)) for text in settings.prompts]
    barrier()  # every rank has to see the same rows left before any writes

    # ---- the model
    stopwatch.enter("load")
    runtime.progress.update(note="loading the model" if endpoint is None else f"asking {endpoint.url}")
    if endpoint is None:
        model = load_model(recipe, inputs, runtime, left, shown)
    else:
        model = connect(endpoint, recipe, runtime, left, shown)
    sampling = Sampling(
        settings.temperature, settings.top_p, settings.top_k, settings.max_new_tokens, settings.repetition_penalty
    )

    # ---- ask and grade, one line a row, each line kept as soon as it is there
    stopwatch.enter("evaluate")
    total = len(test_cases) * settings.samples
    runtime.progress.update(state="running", done=len(answered), first=len(answered), total=total, note="")
    with contextlib.closing(model.engine) as engine:
        for finished, _ in enumerate(answer_rows(task, left, model, sampling, out, runtime), 1):
            runtime.progress.update(done=min(total, len(answered) + finished * (runtime.world // model.together)))
            if endpoint is None:  # an endpoint's engine looks between answers, when it has handed on all it has
                runtime.raise_if_stopping()
        barrier()

        # ---- the questions whose answers are only shown
        if model.shown and runtime.rank < model.together:
            asked = stopwatch.each("generate", engine.generate(model.shown, sampling))
            texts = {answer.request: answer.completion.text for answer in asked}
            answers = [{"prompt": prompt, "answer": texts[k]} for k, prompt in enumerate(settings.prompts)]
            if runtime.rank == 0:
                write_json(out / PROMPTS, answers)

    # ---- count
    if runtime.rank != 0:
        return {}
    heartbeat.beat(long=True)
    done = read_partial_answers(out)
    predictions = [done[split, row["id"], k] for split, row in test_cases for k in range(settings.samples)]
    with (out / PREDICTIONS).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(one.to_json(), ensure_ascii=False) + "\n" for one in predictions)
    by_split = count(predictions, task, recipe.report, recipe.seed)
    metrics: dict[str, Any] = to_json(by_split)
    if endpoint is not None:
        metrics[ENDPOINT] = usage = calls_made(endpoint, predictions, engine)
        unit = runtime.progress.now.unit
        if failed := usage["failed"]:
            runtime.warn(f"{failed} of {total} {unit} have no answer from {endpoint.url}, and count as unanswered")
        if not usage["completion_tokens"]:
            runtime.warn(f"{endpoint.url} reports no usage: tokens are not known")
    write_json(out / "metrics.json", metrics)
    for path in out.glob("partial-*.jsonl"):
        path.unlink()
    main_split = by_split[settings.splits[0]].overall
    figures = {name: main_split[name].value for name in PROGRESS_METRICS if name in main_split}
    runtime.progress.update(done=total, figures=figures)
    return metrics


@dataclass(frozen=True)
class Missing:
    """Samples of a row that have no answer yet."""

    split: str
    row: Row
    first: int
    samples: int


def unanswered_samples(
    test_cases: Sequence[tuple[str, Row]], samples: int, answered: Collection[tuple[str, str, int]]
) -> list[Missing]:
    """The samples without an answer, those of a row that follow each other together."""
    found = []
    for split, row in test_cases:
        missing = [k for k in range(samples) if (split, row["id"], k) not in answered]
        for k in missing:
            if k - 1 not in missing:
                found.append(Missing(split, row, k, 1))
            else:
                found[-1] = replace(found[-1], samples=found[-1].samples + 1)
    return found


def answer_rows(
    task: Task, left: Sequence[Missing], model: Asked, sampling: Sampling, out: Path, runtime: Runtime
) -> Iterator[Prediction]:
    """Yield this process's share of the rows, answered, graded and written."""
    requests, shares = model.requests, runtime.world // model.together
    mine = share_out(requests, runtime.rank // model.together, shares) if shares > 1 else list(range(len(requests)))
    leads = runtime.rank % model.together == 0  # of the processes that share a model, one writes
    deadline = Deadline(runtime, "evaluate")
    partial = out / f"partial-{runtime.rank}-{time.time_ns()}.jsonl" if leads else Path(os.devnull)
    with partial.open("w", encoding="utf-8") as file:
        for answer in stopwatch.each("generate", model.engine.generate([requests[k] for k in mine], sampling)):
            split, row = left[mine[answer.request]].split, left[mine[answer.request]].row
            example, request, completion = example_of(row), requests[mine[answer.request]], answer.completion
            verdict = judge(task, example, completion, model.prompt_opens_think)
            prediction = Prediction(
                split=split,
                id=row["id"],
                sample=answer.sample,
                prompt_sha256=sha256(json.dumps(request.prompt or request.messages).encode()).hexdigest()[:16],
                group=row["group"],
                tags=row["tags"],
                gold=row["gold"],
                answer=verdict.answer,
                correct=verdict.correct,
                proxy=verdict.proxy,
                answered=verdict.answered,
                reason=verdict.reason,
                solved=task.solve(example),
                thought=has_thought(completion.text, model.prompt_opens_think),
                proof=task.check_thought(example, completion.text, model.prompt_opens_think),
                preferred=model.prefers(row) if answer.sample == 0 else None,
                completion=completion.text,
                tokens=completion.tokens,
                truncated=completion.truncated,
                call=asdict(completion.call) if completion.call else None,
            )
            file.write(json.dumps(prediction.to_json(), ensure_ascii=False) + "\n")
            file.flush()
            deadline.step()
            yield prediction


# ---------------------------------------------------------------- who answers


@dataclass(frozen=True)
class Asked:
    """The model that is evaluated, loaded here or behind a server."""

    engine: Engine
    requests: list[Request]  # of the rows, in their order
    shown: list[Request]  # of the questions whose answers are only shown
    prompt_opens_think: bool
    prefers: Callable[[Row], bool | None]
    together: int = 1  # processes that share the model


def join_processes() -> Callable[[], None]:
    """Join the process group. Returns the function that waits for all of them, whose shares may end far apart."""
    from pipeline.training import distributed

    distributed.start(deepspeed=False)
    return distributed.meet


def load_model(
    recipe: Recipe,
    inputs: Mapping[str, Artifact],
    runtime: Runtime,
    left: Sequence[Missing],
    shown: Sequence[Sequence[Message]],
) -> Asked:
    """Load the step's weights into the engine that the cluster chooses."""
    from pipeline.engines.loading import load_engine
    from pipeline.models.loading import initial_checkpoint, load_tokenizer, prompt_ids, template_opens_think

    given = runtime.options.checkpoint if isinstance(runtime.options, EvaluateCheckpoint) else None
    checkpoint = find_checkpoint(given) if given else initial_checkpoint(recipe.model, inputs)
    tokenizer = load_tokenizer(checkpoint, recipe.model)
    opens_think = template_opens_think(tokenizer)
    with stopwatch.part("rows"):
        prompts, others = (
            prompt_ids(tokenizer, list(some)) if some else [] for some in ([one.row["prompt"] for one in left], shown)
        )
    chosen, rows_at_once = runtime.cluster.generation.evaluate, runtime.cluster.evaluate_batch_size
    engine = load_engine(
        checkpoint,
        recipe.model,
        tokenizer,
        chosen,
        rows=AUTO_EVALUATE if rows_at_once == "auto" else rows_at_once,
        length=_longest(tokenizer, [*prompts, *others], [one.row for one in left], recipe.evaluate.max_new_tokens),
        limits=runtime.cluster.max_memory,
    ).engine
    return Asked(
        engine,
        [Request(ids, recipe.seed, one.samples, one.first) for ids, one in zip(prompts, left, strict=True)],
        [Request(ids, recipe.seed) for ids in others],
        opens_think,
        lambda row: prefers(engine, tokenizer, row),
        1 if chosen.tensor_parallel == "auto" or chosen.engine != "vllm" else chosen.tensor_parallel,
    )


def _longest(tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], rows: Sequence[Row], new: int) -> int:
    """Return the tokens of the longest prompt with its answer, or of the longest answer that is only scored."""
    from pipeline.models.loading import encode_rows

    scored = [row for row in rows if (row["tags"] or {}).get("rejected")]
    answers = [row["completion"] for row in scored]
    answers += [[{"role": "assistant", "content": row["tags"]["rejected"]}] for row in scored]
    both = encode_rows(tokenizer, [row["prompt"] for row in scored] * 2, answers) if scored else []
    return max([len(prompt) + new for prompt in prompts] + [len(one["input_ids"]) + 1 for one in both], default=new)


def connect(
    endpoint: Endpoint, recipe: Recipe, runtime: Runtime, left: Sequence[Missing], shown: Sequence[Sequence[Message]]
) -> Asked:
    """Prepare to ask a model behind a server; nothing is sent yet."""
    from pipeline.engines.endpoint import EndpointEngine, read_key

    calls = runtime.cluster.endpoint
    key = read_key(endpoint.key_variable or calls.key_variable, os.environ)
    engine = EndpointEngine(endpoint, calls, key, while_waiting=runtime.raise_if_stopping)
    rows = [Request((), recipe.seed, one.samples, one.first, one.row["prompt"]) for one in left]
    others = [Request((), recipe.seed, messages=messages) for messages in shown]
    return Asked(engine, rows, others, False, lambda row: None)


def judge(task: Task, example: Example, completion: Completion, prompt_opens_think: bool) -> Grade:
    """Grade a completion; one that a server never gave is unanswered."""
    grade = task.judge(example, completion.text, prompt_opens_think, completion.truncated)
    if completion.call is None or completion.call.failure is None:
        return grade
    return replace(grade, answer=None, answered=False, reason=FAILED)


def calls_made(endpoint: Endpoint, predictions: Sequence[Prediction], engine: Any) -> dict[str, Any]:
    """What all answers took of a server, in every attempt of the evaluation."""
    calls = [prediction.call or {} for prediction in predictions]
    return {
        "url": endpoint.url,
        "model": endpoint.model,
        "answered_by": sorted(engine.served),  # as the server names it, in this attempt
        "failed": sum(call.get("failure") is not None for call in calls),
        "requests": sum(call.get("attempts", 0) for call in calls),
        "seconds": round(sum(call.get("seconds", 0.0) for call in calls), 3),  # of the requests, which overlap
        "prompt_tokens": sum(call.get("prompt_tokens", 0) for call in calls),
        "completion_tokens": sum(call.get("completion_tokens", 0) for call in calls),
    }


def prefers(engine: Engine, tokenizer: PreTrainedTokenizerBase, row: Row) -> bool | None:
    """Whether the row's wanted answer is likelier, by its mean log-probability a token, than its rejected one.

    None for a row without a rejected answer.
    """
    rejected = (row["tags"] or {}).get("rejected")
    if not rejected:
        return None
    from pipeline.models.loading import encode_rows

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


def read_partial_answers(out: Path) -> dict[tuple[str, str, int], Prediction]:
    """Read the answers that every process and earlier attempt has left; a last line that was cut off is left out."""
    parts = [read_predictions(path) for path in sorted(out.glob("partial-*.jsonl"))]
    return {(one.split, one.id, one.sample): one for part in parts for one in part}


if __name__ == "__main__":
    main("evaluate", run)
