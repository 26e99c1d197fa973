"""Every way to train a small model of each architecture, SFT and then GRPO, in the processes of one torchrun.

    torchrun --nproc_per_node=2 tests/every_way.py zero2 OUT

Each way is the recipe's rehearsal, run by the stages themselves. Leaves OUT/<recipe>/<way>/{sft,grpo}/ as a run does.
tests/test_training.py starts it and looks at what it left.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path

from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pipeline import distributed, grpo, preprocess, sft
from pipeline.artifact import Artifact
from pipeline.cluster import Cluster
from pipeline.plan import make_plan
from pipeline.progress import ProgressFile
from pipeline.recipe import Recipe
from pipeline.runtime import Runtime

RECIPES = ("qwen1.5b", "phi3.5", "llama8b")
ONCE = ("fp16",)  # ways that no architecture has a say in: the first recipe's only
WAYS = {
    "nf4": ["lora.dropout=0"],  # so that the policy is its own reference to the last bit
    "fp16": ["model.dtype=float16"],  # nf4, as on a Turing GPU
    "int8": ["model.quantization=int8"],
    "lora": ["model.quantization=none"],
    "full": ["model.quantization=none", "lora.enabled=false"],
}
FAR = [
    f"{stage}.optimizer.learning_rate=1e-2" for stage in ("sft", "grpo")
]  # what SFT has learned is far from the base
SHORT = [*FAR, "grpo.beta=0.1", "cluster.save_steps=2", "cluster.processes=2", "cluster.gpu_memory=null"]


def cells() -> list[tuple[str, str]]:
    """(recipe, way) for each model that is trained."""
    return [(name, way) for name in RECIPES for way in WAYS if name == RECIPES[0] or way not in ONCE]


def main(layout: str, out: Path) -> None:
    distributed.start(deepspeed=layout != "none")
    where = [f"cluster.{stage}.deepspeed={layout}" for stage in ("sft", "grpo")]
    for name, way in cells():
        plan = make_plan([name], [*SHORT, *where, *WAYS[way]], rehearse=True, runs=out)
        train(plan.steps[0].recipe, plan.cluster, out / name / way)
    distributed.finish()


def train(recipe: Recipe, cluster: Cluster, out: Path) -> None:
    """Rows, SFT, GRPO, as the harness would run them in processes of their own."""
    recipe = replace(recipe, sft=replace(recipe.sft, max_steps=2), grpo=replace(recipe.grpo, max_steps=1))
    rank, world = distributed.rank(), distributed.world_size()
    steps: dict[str, Artifact] = {}
    for stage, run in (("preprocess", preprocess.run), ("sft", sft.run), ("grpo", grpo.run)):
        folder = out / stage
        folder.mkdir(parents=True, exist_ok=True)
        inputs = {"data": steps["preprocess"]} if steps else {}
        if stage == "grpo":
            inputs["model"] = steps["sft"]
        if stage != "preprocess" or rank == 0:
            runtime = Runtime(cluster, ProgressFile(None, stage), rank, world, out, None, None)
            run(recipe, inputs, folder, runtime)
        steps[stage] = Artifact(stage, recipe.name, "", {}, {}, {}, {}, {}, folder)
        distributed.barrier()
        AcceleratorState._reset_state()  # a process of the pipeline trains once
        unset_hf_deepspeed_config()
        gc.collect()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
