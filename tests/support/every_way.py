"""Every way to train a small model, SFT and then GRPO, in the processes of one torchrun.

    torchrun --nproc_per_node=2 tests/support/every_way.py zero2 OUT

Each way is the recipe's smoke test, run by the stages themselves. Leaves OUT/<recipe>/<way>/{sft,grpo}/ as a run does,
with the stage's metrics and, under DeepSpeed, what its optimizer holds (engine.json) and what a process holds of the
weights before GRPO generates and while it does (weights.json); OUT/overflow/ has SFT in float16 from loss scales that
are too high, OUT/padding_free/{true,false}/ one way in float32 without padding and with it.
tests/train/test_training.py starts it and looks at what it left.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accelerate.state import AcceleratorState
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pipeline import grpo, preprocess, sft
from pipeline.config.cluster import Cluster, TrainingStage
from pipeline.config.recipe import Recipe
from pipeline.core.errors import LaunchError
from pipeline.core.files import write_json
from pipeline.rewards.reward import RewardFunction
from pipeline.training import distributed, rollouts
from pipeline.training import trainer as training
from pipeline.workflow.artifact import Artifact
from pipeline.workflow.plan import make_plan
from pipeline.workflow.progress import ProgressFile
from pipeline.workflow.runtime import Runtime

RECIPES = ("qwen1.5b", "phi3.5", "llama8b", "qwen3-4b", "gemma3-1b")
LAYOUTS = ("none", "zero2", "zero3")
ONCE = ("fp16", "fp16 lora", "bf16")  # ways that no architecture has a say in: the first recipe's only
CHECKPOINTING = [f"cluster.{stage}.gradient_checkpointing=true" for stage in ("sft", "grpo")]
WAYS = {
    "nf4": ["lora.dropout=0"],  # so that the policy is its own reference to the last bit
    "fp16": ["model.dtype=float16"],  # nf4, as on a Turing GPU
    "fp16 lora": ["model.dtype=float16", "model.quantization=none", *CHECKPOINTING],
    "bf16": ["model.dtype=bfloat16", *CHECKPOINTING],  # nf4, as on an Ampere GPU
    "int8": ["model.quantization=int8"],
    "lora": ["model.quantization=none"],
    "full": ["model.quantization=none", "lora.enabled=false"],
}
FAR = [
    f"{stage}.optimizer.learning_rate=1e-2" for stage in ("sft", "grpo")
]  # what SFT has learned is far from the base
FLOAT32 = ["model.dtype=float32", "model.quantization=none", "lora.dropout=0", "grpo.beta=0"]
current: list[Path] = []  # the folder of the stage that runs
SHORT = [*FAR, "grpo.beta=0.1", "cluster.save_steps=2", "cluster.processes=2", "cluster.gpu_memory=null"]


def cells(layout: str) -> list[tuple[str, str]]:
    """(recipe, way) for each model that is trained in a layout.

    The first recipe's in every way and layout. Of the others each architecture is trained in every way and in every
    layout, and each way in every layout, but not all three together: that would be twice the time.
    """
    first = [(RECIPES[0], way) for way in WAYS]
    ways = [way for way in WAYS if way not in ONCE]
    pairs = [(n, w) for n in range(1, len(RECIPES)) for w in range(len(ways)) if LAYOUTS[(n + w) % 3] == layout]
    return first + [(RECIPES[n], ways[w]) for n, w in pairs]


def main(layout: str, out: Path) -> None:
    # DeepSpeed refuses float16 on a CPU without AVX512-FP16, and computes it there all the same
    CPU_Accelerator.is_fp16_supported = lambda self: True
    training.save = observed(training.save)  # type: ignore[assignment]
    rollouts.unwrap_model_for_generation = weighed(rollouts.unwrap_model_for_generation)  # type: ignore[attr-defined]
    distributed.start(deepspeed=layout != "none")
    gc.collect()
    gc.freeze()  # what is imported stays: each trainer collects several times, and would look through all of it
    where = [f"cluster.{stage}.deepspeed={layout}" for stage in ("sft", "grpo")]
    for name, way in cells(layout):
        plan = make_plan([name], [*SHORT, *where, *WAYS[way]], smoke_test=True, runs=out)
        train(plan.steps[0].recipe, plan.cluster, out / name / way)
    for padding_free in ("true", "false"):
        words = [*SHORT, *where, *FLOAT32, f"cluster.padding_free={padding_free}"]
        plan = make_plan(RECIPES[:1], words, smoke_test=True, runs=out)
        with rewards_that_differ():
            train(plan.steps[0].recipe, plan.cluster, out / "padding_free" / padding_free)
    if layout != "none":  # accelerate scales nothing on a CPU
        plan = make_plan(RECIPES[:1], [*SHORT, *where, *WAYS["fp16 lora"]], smoke_test=True, runs=out)
        overflow(plan.steps[0].recipe, plan.cluster, out / "overflow")
    distributed.finish()


def train(recipe: Recipe, cluster: Cluster, out: Path) -> None:
    """Rows, SFT, GRPO, as the harness would run them in processes of their own."""
    recipe = replace(recipe, sft=replace(recipe.sft, max_steps=2), grpo=replace(recipe.grpo, max_steps=1))
    steps: dict[str, Artifact] = {}
    for stage in ("preprocess", "sft", "grpo"):
        inputs = {"data": steps["preprocess"]} if steps else {}
        if stage == "grpo":
            inputs["model"] = steps["sft"]
        steps[stage] = run(stage, recipe, cluster, inputs, out / stage)


def run(stage: str, recipe: Recipe, cluster: Cluster, inputs: dict[str, Artifact], folder: Path) -> Artifact:
    """One stage, in every process but for preprocess."""
    rank, world = distributed.rank(), distributed.world_size()
    folder.mkdir(parents=True, exist_ok=True)
    current[:] = [folder]
    metrics: dict[str, Any] = {}
    try:
        if stage != "preprocess" or rank == 0:
            runtime = Runtime(cluster, ProgressFile(None, stage), rank, world, folder, None, None)
            metrics = {"preprocess": preprocess.run, "sft": sft.run, "grpo": grpo.run}[stage](
                recipe, inputs, folder, runtime
            )
    finally:
        AcceleratorState._reset_state()  # a process of the pipeline trains once
        unset_hf_deepspeed_config()
        gc.collect()
    distributed.barrier()
    if rank == 0:
        write_json(folder / "metrics.json", metrics)
    return Artifact(stage, stage, recipe.name, "", {}, {}, {}, metrics, {}, folder)


@contextmanager
def rewards_that_differ() -> Iterator[None]:
    """Pay a model that knows nothing by the length of its text."""
    pay: dict[str, RewardFunction] = {
        "correctness": lambda sample: float(len(sample.completion) % 3),
        "format": lambda sample: 0.0,
    }
    with patch.object(grpo, "find_rewards", lambda wanted: (pay, [])):
        yield


def overflow(recipe: Recipe, cluster: Cluster, out: Path) -> None:
    """SFT from a loss scale that DeepSpeed lowers in time (2^20), and from one that it does not (2^60)."""
    data = run("preprocess", recipe, cluster, {}, out / "preprocess")
    read = training.read_deepspeed
    for power, steps in ((20, 10), (60, 2)):

        def scaled(stage: TrainingStage, power: int = power) -> dict[str, Any] | None:
            settings = read(stage)
            return settings and {**settings, "fp16": {**settings["fp16"], "initial_scale_power": power}}

        training.read_deepspeed = scaled  # type: ignore[assignment]
        few = replace(recipe, sft=replace(recipe.sft, max_steps=steps))
        try:
            run("sft", few, cluster, {"data": data}, out / f"sft-{power}")
        except LaunchError as error:
            if distributed.rank() == 0:
                write_json(out / f"sft-{power}" / "error.json", list(error.problems))


def observed(save: Callable[[Trainer, Path], None]) -> Callable[[Trainer, Path], None]:
    """A stage's save, which also writes what DeepSpeed's optimizer holds at the end of training."""

    def save_and_write(trainer: Trainer, out: Path) -> None:
        save(trainer, out)
        if trainer.deepspeed is None or distributed.rank():
            return
        optimizer = trainer.deepspeed.optimizer
        if hasattr(optimizer, "setup_buckets"):
            optimizer.setup_buckets()  # ZeRO-2 allocates them at each backward pass
        whole = trainer.deepspeed.zero_optimization_stage() == 3  # there every process takes part
        saved = [] if whole else sorted(trainer.accelerator.get_state_dict(trainer.deepspeed))
        buffers = [bucket.buffer for bucket in optimizer.ipg_buckets.values()]
        facts = {
            "dtype": str(optimizer.dtype),
            "summed_in": str(optimizer.gradient_accumulation_dtype),
            "bucket": max(b.numel() for group in buffers for b in (group if isinstance(group, list) else [group])),
            "width": trainer.model.config.hidden_size,
            "saved": saved,
        }
        write_json(out / "engine.json", facts)

    return save_and_write


def weighed(unwrap: Any) -> Any:
    """TRL's way to a model that generates, which also writes what this process holds of the weights."""

    @contextmanager
    def unwrap_and_write(model: Any, accelerator: Any, **arguments: Any) -> Iterator[Any]:
        before = weight_bytes(accelerator.unwrap_model(model))
        with unwrap(model, accelerator, **arguments) as whole:
            yield whole
            while_generating = weight_bytes(whole)
        if distributed.rank() == 0 and not (current[0] / "weights.json").exists():
            write_json(current[0] / "weights.json", {"before": before, "while_generating": while_generating})

    return unwrap_and_write


def weight_bytes(model: Any) -> int:
    """Bytes of the storages that parameters, their ZeRO-3 parts and bitsandbytes' states occupy in this process."""
    tensors = []
    for weights in model.parameters():
        tensors += [weights.data, getattr(weights, "ds_tensor", None), getattr(weights, "CB", None)]
        if state := getattr(weights, "quant_state", None):
            tensors += [state.absmax, state.state2.absmax if state.state2 else None]
    tensors += [getattr(getattr(module, "state", None), "CB", None) for module in model.modules()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(size for place, size in storages.items() if place)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
