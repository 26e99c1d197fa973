"""GRPO with vLLM in every layout, and evaluations with it, in the processes of one torchrun.

    torchrun --nproc_per_node=2 tests/support/vllm_ways.py OUT

Leaves OUT/<way>/<layout>/ as GRPO does, with metrics.json; `stale` is a run whose engine misses every update but the
first. OUT/<way>/evaluate-<engine>/ has the predictions of each engine, those of vllm after an interruption.
tests/vllm/test_training.py looks at them.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from every_way import run as run_stage
from recipes import cluster_of

from pipeline import evaluate, grpo
from pipeline.config.cluster import Cluster
from pipeline.config.recipe import Recipe
from pipeline.core.errors import Stopped
from pipeline.core.files import write_json
from pipeline.engines.vllm import VllmEngine
from pipeline.rewards.reward import Sample
from pipeline.training import distributed
from pipeline.workflow.artifact import STOP, Artifact
from pipeline.workflow.plan import make_plan
from pipeline.workflow.progress import ProgressFile
from pipeline.workflow.runtime import Runtime

LAYOUTS = {"full": ("none", "zero2", "zero3"), "lora": ("none", "zero2", "zero3"), "nf4": ("zero3",)}
WAYS = {
    "full": ["lora.enabled=false", "model.quantization=none", "model.dtype=float32"],
    "lora": ["model.quantization=none", "model.dtype=float32"],
    "nf4": ["model.quantization=nf4", "model.dtype=bfloat16"],
}
STALE = ("full", "zero3"), ("lora", "none")
# dropout makes the trainer's own probabilities random, and hides what the engine computes otherwise
FAST = [f"{stage}.optimizer.{word}" for stage in ("sft", "grpo") for word in ("learning_rate=1e-2", "warmup=0")]
FAR = ["lora.dropout=0", *FAST]
VLLM = ["generation.grpo.engine=vllm", "generation.grpo.sleep=false", "processes=2"]
ENGINES = {
    "transformers": ["generation.evaluate.engine=transformers"],
    "vllm": ["generation.evaluate.engine=vllm"],
    "vllm-2": ["generation.evaluate.engine=vllm", "generation.evaluate.tensor_parallel=2"],
}


def main(out: Path) -> None:
    distributed.start(deepspeed=True)
    gc.collect()
    gc.freeze()
    vars(grpo)["find_rewards"] = lambda wanted: (dict.fromkeys(wanted, noise), [])
    for way, words in WAYS.items():
        recipe = small(words, out)
        plain = cluster_of("local", "sft.deepspeed=none", *VLLM)
        data = run_stage("preprocess", recipe, plain, {}, out / way / "preprocess")
        sft = run_stage("sft", recipe, plain, {"data": data}, out / way / "sft")
        inputs = {"data": data, "model": sft}
        for layout in LAYOUTS[way]:
            cluster = cluster_of("local", f"grpo.deepspeed={layout}", *VLLM)
            run_stage("grpo", recipe, cluster, inputs, out / way / layout)
            if (way, layout) in STALE:
                without_updates(run_stage)("grpo", recipe, cluster, inputs, out / way / f"{layout}-stale")
        for engine, words in ENGINES.items() if way != "nf4" else ():
            ask(recipe, cluster_of("local", "processes=2", *words), inputs, out / way / f"evaluate-{engine}")
    distributed.finish()


def small(words: list[str], out: Path) -> Recipe:
    """A recipe's smoke test, of a few steps, with heads as wide as vLLM computes on a CPU."""
    recipe = make_plan(["qwen1.5b"], [*FAR, "cluster.processes=2", *words], smoke_test=True, runs=out).steps[0].recipe
    assert recipe.model.random_init is not None
    model = replace(recipe.model, random_init=replace(recipe.model.random_init, heads=2, key_value_heads=2))
    sft, grpo = replace(recipe.sft, max_steps=2), replace(recipe.grpo, max_steps=2)
    return replace(recipe, model=model, sft=sft, grpo=grpo)


def noise(sample: Sample) -> float:
    """A reward that no completion of a group is likely to share with another."""
    return sha256(sample.completion.encode()).digest()[0] / 255


def without_updates(run: Callable[..., Artifact]) -> Callable[..., Artifact]:
    """The stage with an engine that answers with the weights of the first step for ever."""

    def stale(*arguments: Any) -> Artifact:
        update, begun = VllmEngine.update, list[int]()

        def first(engine: VllmEngine, policy: Any) -> None:
            if not begun:
                update(engine, policy)
            begun.append(1)

        VllmEngine.update = first  # type: ignore[assignment, method-assign]
        try:
            return run(*arguments)
        finally:
            VllmEngine.update = update  # type: ignore[method-assign]

    return stale


def stop_after_the_first_answer(runtime: Runtime, evaluation: Callable[[], Any]) -> None:
    """Run an evaluation that is told to stop; what was answered is kept."""
    distributed.barrier()
    stop = runtime.folder / STOP
    stop.touch()
    try:
        evaluation()
    except Stopped:
        pass
    else:
        raise AssertionError("the evaluation did not stop")
    distributed.barrier()
    kept = sum(len(path.read_text().splitlines()) for path in runtime.folder.glob("partial-*"))
    assert kept == runtime.world, kept  # one of each process
    distributed.barrier()
    stop.unlink(missing_ok=True)
    distributed.barrier()


def ask(recipe: Recipe, cluster: Cluster, inputs: dict[str, Artifact], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rank, world = distributed.rank(), distributed.world_size()
    recipe = replace(recipe, evaluate=replace(recipe.evaluate, temperature=0.0, max_new_tokens=12))
    runtime = Runtime(cluster, ProgressFile(None, "evaluate"), rank, world, folder, None, None)
    distributed.barrier()
    if folder.name == "evaluate-vllm":
        stop_after_the_first_answer(runtime, lambda: evaluate.run(recipe, inputs, folder, runtime))
    metrics = evaluate.run(recipe, inputs, folder, runtime)
    if rank == 0:
        write_json(folder / "metrics.json", metrics)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
