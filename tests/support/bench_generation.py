"""How fast text comes, by engine: `scripts/bench generation [--ckpt DIR] [--recipe NAME] [--rows N] [--runs N]`.

Each engine is a process of one thread that has loaded the model; they run one after another, in turns, so that all of
them meet the same moments of a noisy machine. Two loads: an evaluation (one sampled answer a row) and the rollouts of
GRPO (8 samples a prompt). What is compared:

    one row      `model.generate` for one row at a time, as a first evaluation script is written
    batched      `model.generate` for padded batches, as a good script is written
    before       this project before it had engines: batches of similar length, a static cache, a stream per row;
                 in GRPO TRL's own generation
    transformers, vllm     the engines of this project (vllm where scripts/setup --vllm has been run)

It prints a Markdown table of medians, with the least and the most, and what each process held beyond the loaded model;
--json FILE keeps every run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

KINDS = ("one row", "batched", "before", "transformers", "vllm")
SHARE = 8  # "one row" answers an eighth of the rows
GROUP = 8  # samples of a prompt in GRPO
AT_ONCE = {"evaluation": 100, "GRPO": 32}  # rows at once: those of `tiny` in one process


def main() -> None:
    options = read_options()
    if options.worker:
        work(options)
        return
    workers = {kind: start(options, kind) for kind in options.engines}
    results: dict[str, dict[str, list[dict[str, float]]]] = {load: {k: [] for k in workers} for load in AT_ONCE}
    for run in range(options.runs + 1):  # the first warms up
        for load in AT_ONCE:
            for kind, worker in workers.items():
                measured = ask(worker, load)
                speed = measured["tokens"] / measured["seconds"]
                print(f"{load}, {kind}, run {run}: {speed:.0f} tokens/s", file=sys.stderr)
                if run:
                    results[load][kind].append(measured)
    for worker in workers.values():
        worker.stdin.close()  # type: ignore[union-attr]
        worker.wait()
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))
    for load, found in results.items():
        print(f"\n{load}: {options.rows if load == 'evaluation' else f'{options.prompts} prompts × {GROUP}'}\n")
        print("\n".join(table(found)))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench generation", description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", help="a trained step's folder; default: the newest GRPO step of the recipe in runs/")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--base", action="store_true", help="the recipe's own model, which nobody has trained")
    parser.add_argument("--rows", type=int, default=200, help="of the evaluation")
    parser.add_argument("--prompts", type=int, default=16, help="of GRPO")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--n", type=int, default=5, help="variables of Corr2Cause's premises")
    parser.add_argument("--engines", default=",".join(KINDS[:-1]), type=lambda words: words.split(","))
    parser.add_argument("--json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = [kind for kind in options.engines if kind not in KINDS]
    if unknown:
        parser.error(f"--engines: got {', '.join(unknown)}; expected some of {', '.join(KINDS)}")
    if options.base:  # a model from a file or from nothing lies in the preprocess step
        made = sorted(Path("runs", options.recipe).glob("preprocess-*/model"), key=lambda path: path.stat().st_mtime)
        options.ckpt = str(made[-1]) if made else None
    elif not options.ckpt:
        made = sorted(Path("runs", options.recipe).glob("grpo-*/artifact.json"), key=lambda path: path.stat().st_mtime)
        if not made:
            parser.error(f"--ckpt: no trained model in runs/. Fix: bash run_pipeline.sh {options.recipe}, or --base")
        options.ckpt = str(made[-1].parent)
    return options


def start(options: argparse.Namespace, kind: str) -> subprocess.Popen[str]:
    """Start an engine's process and wait until it has loaded the model."""
    python = sys.executable
    if kind == "vllm":
        python = str(Path(os.environ.get("THEREFORE_VLLM_VENV", ".venv-vllm"), "bin", "python"))
    given = ["--ckpt", options.ckpt] if options.ckpt and not options.base else []
    words = [python, __file__, *sys.argv[1:], *given, "--worker", kind]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    worker = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert worker.stdout is not None
    for line in worker.stdout:
        if line == "ready\n":
            return worker
    raise SystemExit(f"bench: the process of {kind} ended: {worker.wait()}")


def ask(worker: subprocess.Popen[str], load: str) -> dict[str, float]:
    """Let an engine's process run a load once."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    print(load, file=worker.stdin, flush=True)
    for line in worker.stdout:
        if line.startswith("{"):
            found: dict[str, float] = json.loads(line)
            return found
    raise SystemExit(f"bench: a process ended: {worker.wait()}")


def table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """Return a Markdown table; ratios are taken run by run, to what was before."""
    lines = ["| engine | rows/s | tokens/s | ratio to before | memory beyond the model |", "|---|---|---|---|---|"]
    for kind, runs in found.items():
        speeds = [run["tokens"] / run["seconds"] for run in runs]
        rows = statistics.median(run["rows"] / run["seconds"] for run in runs)
        ratio = "–"
        if "before" in found:
            base = [run["tokens"] / run["seconds"] for run in found["before"]]
            ratios = sorted(one / other for one, other in zip(speeds, base, strict=True))
            ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} … {ratios[-1]:.2f})"
        speed = f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f} … {max(speeds):,.0f})"
        lines.append(f"| {kind} | {rows:.2f} | {speed} | {ratio} | {runs[-1]['memory']:.2f} GB |")
    return lines


# ---------------------------------------------------------------- one engine's process


def work(options: argparse.Namespace) -> None:
    """Load the model and the rows, then run each load that stdin names."""
    import torch

    from pipeline.config.cluster import EvaluationEngine
    from pipeline.config.recipe import read
    from pipeline.engines.engine import Sampling
    from pipeline.engines.loading import load_engine
    from pipeline.models.loading import base_checkpoint, load_for_chat, load_tokenizer, prompt_ids
    from pipeline.tasks.task import rows, task_of
    from pipeline.workflow.weights import find_checkpoint

    torch.set_num_threads(1)
    overrides = [f"task.params.n=[{options.n}]", "task.params.test_rows=1000", "task.params.perturbed_rows=0"]
    recipe, problems = read(options.recipe, overrides)
    if recipe is None:
        raise SystemExit("\n".join(problems))
    splits = task_of(recipe.task, recipe.seed).load()
    messages = [row["prompt"] for row in rows(task_of(recipe.task, recipe.seed), next(iter(splits.tests.values())))]
    checkpoint = find_checkpoint(options.ckpt) if options.ckpt else base_checkpoint(recipe.model, Path())
    tokenizer = load_tokenizer(checkpoint, recipe.model)
    prompts = prompt_ids(tokenizer, messages[: max(options.rows, options.prompts)])
    new = recipe.evaluate.max_new_tokens
    samplings = {"evaluation": Sampling(0.6, 0.95, 0, new), "GRPO": Sampling(1.0, 1.0, 0, new)}
    if options.worker == "vllm":
        settings = EvaluationEngine(engine="vllm", gpu_memory=0.9, tensor_parallel=1)
        length = max(map(len, prompts)) + new
        loaded = load_engine(checkpoint, recipe.model, tokenizer, settings, rows=max(AT_ONCE.values()), length=length)
        run = engine_run(loaded.engine)
    else:
        model = load_for_chat(checkpoint, recipe.model, None)
        run = makers(model, tokenizer)[options.worker]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("ready", flush=True)
    for line in sys.stdin:
        load = line.strip()
        chosen = prompts[: options.rows] if load == "evaluation" else prompts[: options.prompts]
        if options.worker == "one row":
            chosen = chosen[::SHARE]
        began = time.perf_counter()
        tokens = run(load, chosen, samplings[load])
        seconds = time.perf_counter() - began
        count = len(chosen) * (1 if load == "evaluation" else GROUP)
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e9
        print(json.dumps({"seconds": seconds, "rows": count, "tokens": tokens, "memory": memory}), flush=True)


Run = Callable[[str, list[list[int]], Any], int]  # load, prompts, sampling -> tokens made


def engine_run(engine: Any) -> Run:
    from pipeline.engines.engine import Request

    def run(load: str, prompts: list[list[int]], sampling: Any) -> int:
        samples = 1 if load == "evaluation" else GROUP
        engine.rows = AT_ONCE[load]
        if hasattr(engine, "core"):  # vLLM's: what it has kept of the prompts of an earlier run
            engine.core.reset_prefix_cache()
        requests = [Request(prompt, 1, samples) for prompt in prompts]
        return sum(one.completion.tokens for one in engine.generate(requests, sampling))

    return run


def makers(model: Any, tokenizer: Any) -> dict[str, Run]:
    """Return what runs a load, by name."""
    from plain_generate import plain_generate

    from pipeline.engines.text import stop_ids
    from pipeline.engines.transformers import TransformersEngine

    stops = stop_ids(model, tokenizer)

    def plain(prompts: Sequence[list[int]], sampling: Any, **more: Any) -> int:
        """Generate for one padded batch; count what stands before and at the stop token."""
        padded = tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt")
        found = model.generate(
            **padded,
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
            disable_compile=True,
            **more,
        )[:, padded["input_ids"].shape[1] :].tolist()
        return sum(next((k + 1 for k, token in enumerate(ids) if token in stops), len(ids)) for ids in found)

    def one_row(load: str, prompts: list[list[int]], sampling: Any) -> int:
        times = 1 if load == "evaluation" else GROUP
        return sum(plain([prompt], sampling) for prompt in prompts for _ in range(times))

    def batched(load: str, prompts: list[list[int]], sampling: Any, **more: Any) -> int:
        rows = [prompt for prompt in prompts for _ in range(1 if load == "evaluation" else GROUP)]
        size = AT_ONCE[load]
        return sum(plain(rows[k : k + size], sampling, **more) for k in range(0, len(rows), size))

    def before(load: str, prompts: list[list[int]], sampling: Any) -> int:
        if load == "evaluation":
            return sum(map(len, plain_generate(model, tokenizer, prompts, sampling, AT_ONCE[load], 1)))
        return batched(load, prompts, sampling, cache_implementation="static")

    engine = engine_run(TransformersEngine(model, tokenizer, 1))
    return {"one row": one_row, "batched": batched, "before": before, "transformers": engine}


if __name__ == "__main__":
    main()
