"""Stages and generation on a GPU, in the process of a section: checks of scripts/prove-gpu.

The stages are the pipeline's own, called as the harness calls them."""

from __future__ import annotations

import gc
import json
import math
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import allocated, peak
from proof import Check, Measured, Place, check

from pipeline.config.cluster import Cluster, TrainingStage
from pipeline.config.recipe import Lora, Model, Recipe
from pipeline.core.files import read_json, write_json
from pipeline.sizing.fitting import needs, resolve_auto
from pipeline.sizing.memory import CONTEXT
from pipeline.sizing.model_sizes import GIB
from pipeline.workflow.artifact import HISTORY, Artifact
from pipeline.workflow.plan import make_plan
from pipeline.workflow.progress import ProgressFile
from pipeline.workflow.runtime import Runtime
from pipeline.workflow.weights import Checkpoint

SMALLER_CARD = 10.75  # GiB that a card of 11 GB leaves to programs, its CUDA context included
SEVEN = Path("configs/models/deepseek-ai--DeepSeek-R1-Distill-Qwen-7B.json")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 1024,
}

# ---------------------------------------------------------------- the stages, as the harness runs them


def run_stage(
    name: str, recipe: Recipe, cluster: Cluster, inputs: dict[str, Artifact], folder: Path
) -> tuple[Artifact, dict[str, float]]:
    """Run a stage in this process. Returns its artifact and the GPU memory at its peak, in GiB."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from pipeline import evaluate, grpo, preprocess, sft

    gc.freeze()  # each trainer collects several times, and would look through all that is imported
    runs = {"preprocess": preprocess.run, "sft": sft.run, "grpo": grpo.run, "evaluate": evaluate.run}
    folder.mkdir(parents=True, exist_ok=True)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        runtime = Runtime(cluster, ProgressFile(None, name), 0, 1, folder, None, None)
        metrics = runs[name](recipe, inputs, folder, runtime)
        most = peak()
    finally:  # a process of the pipeline trains once; this one goes on, also after a failure
        AcceleratorState._reset_state()
        unset_hf_deepspeed_config()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return Artifact(name, name, recipe.name, "", {}, {}, {}, metrics, {}, folder), most


def allow_float16_on_a_cpu() -> None:
    """DeepSpeed refuses float16 on most CPUs, which compute it all the same."""
    if not torch.cuda.is_available():
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        CPU_Accelerator.is_fp16_supported = lambda self: True


def history(artifact: Artifact) -> list[dict[str, Any]]:
    """What the trainer logged, one entry a step."""
    return [entry for entry in read_json(artifact.folder / HISTORY) if "loss" in entry]


# ---------------------------------------------------------------- wires

WAYS = {
    "nf4": [],
    "nf4-fp16": ["model.dtype=float16"],
    "int8": ["model.quantization=int8"],
    "lora": ["model.quantization=none"],
    "lora-fp16": ["model.quantization=none", "model.dtype=float16"],
    "full": ["model.quantization=none", "lora.enabled=false"],
}


@check("SFT, resume, GRPO, evaluation", "resumed from checkpoint-2, every loss finite, the SFT loss falls by > 0.1")
def wire(place: Place, layout: str, way: str) -> Measured:
    allow_float16_on_a_cpu()
    words = [f"{stage}.optimizer.learning_rate=1e-2" for stage in ("sft", "grpo")]
    for stage in ("sft", "grpo"):
        words += [f"cluster.{stage}.deepspeed={layout}", f"cluster.{stage}.gradient_checkpointing=true"]
    words += ["cluster.processes=1", "cluster.save_steps=2", "cluster.gpu_memory=null", "grpo.beta=0.1"]
    plan = make_plan(["qwen1.5b"], [*words, *WAYS[way]], smoke_test=True, runs=place.work)
    cluster, recipe, here = plan.cluster, plan.steps[0].recipe, place.work / "wires" / layout / way
    half = replace(recipe, sft=replace(recipe.sft, max_steps=2), grpo=replace(recipe.grpo, max_steps=1))
    whole = replace(half, sft=replace(recipe.sft, max_steps=4))
    data, _ = run_stage("preprocess", recipe, cluster, {}, here / "preprocess")
    run_stage("sft", half, cluster, {"data": data}, here / "sft")
    learned, _ = run_stage("sft", whole, cluster, {"data": data}, here / "sft")
    rewarded, _ = run_stage("grpo", half, cluster, {"data": data, "model": learned}, here / "grpo")
    run_stage("evaluate", half, cluster, {"data": data, "model": rewarded}, here / "evaluate")
    losses = [entry["loss"] for entry in history(learned)]
    resumed = learned.metrics["resumed_from"]
    finite = all(math.isfinite(entry["loss"]) for entry in [*history(learned), *history(rewarded)])
    got = f"resumed from {resumed}, loss {losses[0]:.2f} to {losses[-1]:.2f}"
    passed = resumed == "checkpoint-2" and finite and losses[-1] < losses[0] - 0.1
    return Measured(got, passed, {"losses": losses})


def wires(layout: str) -> tuple[Check, ...]:
    return tuple(wire(layout, way) for way in WAYS)


# ---------------------------------------------------------------- overflow


@check("fp16 with a loss scale that overflows", "the skipped steps are counted, and training ends with all its steps")
def overflow(place: Place, layout: str) -> Measured:
    """DeepSpeed skips a step whose gradients overflow and halves its loss scale; training has to go on (F1)."""
    import pipeline.training.trainer as training

    allow_float16_on_a_cpu()
    read = training.read_deepspeed

    def higher(
        layout: TrainingStage,
    ) -> dict[str, Any] | None:  # what the gradients of a large model do to the usual scale
        settings = read(layout)
        return settings and settings | {"fp16": {"enabled": "auto", "initial_scale_power": 24}}

    training.read_deepspeed = higher
    try:
        words = [f"cluster.{stage}.deepspeed={layout}" for stage in ("sft", "grpo")]
        words += ["model.dtype=float16", "cluster.processes=1", "cluster.gpu_memory=null"]
        plan = make_plan(["qwen1.5b"], words, smoke_test=True, runs=place.work)
        recipe, here = plan.steps[0].recipe, place.work / "overflow" / layout
        recipe = replace(recipe, sft=replace(recipe.sft, max_steps=16))
        data, _ = run_stage("preprocess", recipe, plan.cluster, {}, here / "preprocess")
        done, _ = run_stage("sft", recipe, plan.cluster, {"data": data}, here / "sft")
    finally:
        training.read_deepspeed = read
    steps, skipped = done.metrics["steps"], done.metrics.get("skipped_steps", 0)
    return Measured(f"{steps} of 16 steps, {skipped} skipped", steps == 16 and 0 < skipped < 16)


# ---------------------------------------------------------------- the 7B shape


def random_seven(place: Place, data: Artifact) -> Path:
    """A model of the 7B shape with random weights and the smoke test's tokenizer; drawn once for all sections."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = place.work / "seven" / "model"
    if (folder / "whole").is_file():
        return folder
    shape = json.loads(SEVEN.read_text(encoding="utf-8")) | (TINY if place.small else {})
    tokenizer = AutoTokenizer.from_pretrained(data.folder / "model")
    shape |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    save_random(model.state_dict(), folder, place)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "whole").touch()
    return folder


def save_random(shapes: dict[str, torch.Tensor], folder: Path, place: Place) -> None:
    """Random weights of these shapes in shards of 2 GiB, each drawn on the GPU: the whole need not fit on it."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    where: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def write() -> None:
        name = f"model-{len(set(where.values())):05}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        where.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        weights = torch.empty(shape.shape, dtype=shape.dtype, device=place.device)
        weights.normal_(0, 0.02) if weights.dim() > 1 else weights.fill_(0.0 if name.endswith("bias") else 1.0)
        shard[name] = weights.cpu()
        if sum(tensor.nbytes for tensor in shard.values()) > 2 * GIB:
            write()
    write()
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})


def seven(place: Place) -> tuple[Recipe, Cluster, Artifact]:
    """The recipe deepseek7b on one card of the cluster 2x2080ti, two steps of it, with its rows; the model is drawn."""
    few = ["cluster.processes=1", f"cluster.gpus={int(place.gpu)}", "task.params.n=[3, 4]"]
    few += ["task.params.phases=[{n: [3, 4], rows: 64}]", "task.params.grpo_rows=32", "task.params.test_rows=32"]
    few += ["task.params.validation_rows=0", "task.params.perturbed_rows=0", "evaluate.splits=[test]"]
    smoke_tested = make_plan(["deepseek7b"], few, cluster="2x2080ti", smoke_test=True, runs=place.work)
    folder = place.work / "seven" / "preprocess"
    data = Artifact("preprocess", "preprocess", "deepseek7b", "", {}, {}, {}, {}, {}, folder)
    if not (folder / "splits.json").is_file():
        run_stage("preprocess", smoke_tested.steps[0].recipe, smoke_tested.cluster, {}, folder)
    short = 16 if place.small else 256
    words = [*few, f"model.name={random_seven(place, data)}", "sft.max_steps=2", "sft.global_batch_size=4"]
    words += [f"grpo.max_steps={1 if place.small else 2}", "grpo.global_batch_size=16"]
    words += [f"grpo.max_completion_length={short}"]
    words += [f"evaluate.max_new_tokens={short}", "cluster.save_steps=50"]
    plan = make_plan(["deepseek7b"], words, cluster="2x2080ti", runs=place.work)
    recipe = plan.steps[0].recipe
    return recipe, resolve_auto(recipe, plan.cluster), data


def trained(place: Place, stage: str, name: str) -> tuple[Artifact, dict[str, float], float]:
    """Run a stage of the 7B shape: its artifact, its peak memory, and what the planner says of it, in GiB."""
    recipe, cluster, data = seven(place)
    inputs = {"data": data}
    before = place.work / name / "sft"
    if stage != "sft" and before.is_dir():
        inputs["model"] = Artifact("sft", "sft", recipe.name, "", {}, {}, {}, {}, {}, before)
    planned = [need.total / GIB for need in needs(recipe, cluster) or () if need.phase.startswith(stage)]
    done, most = run_stage(stage, recipe, cluster, inputs, place.work / name / stage)
    return done, most, max(planned)


@check("memory of the 7B shape in nf4", "reserved + 0.75 GiB of CUDA context < 1.1 × planned")
def planned_memory(place: Place, stage: str) -> Measured:
    done, most, planned = trained(place, stage, "seven")
    facts: dict[str, Any] = {"peak_gib": most, "planned_gib": planned}
    if stage == "grpo":
        names = ("step_time", "completions/mean_length", "grad_norm")
        facts["steps"] = [{name: entry[name] for name in names if name in entry} for entry in history(done)]
    if place.small:
        return Measured(f"it runs; {planned:.2f} GiB planned, not measured on a CPU", planned > 0, facts)
    held = most["reserved"] + CONTEXT / GIB
    return Measured(f"{held:.2f} GiB held, {planned:.2f} planned", held < 1.1 * planned, facts)


@check("the 7B shape within a card of 11 GB", f"it runs where {SMALLER_CARD} GiB are left to it", needs_gpu=True)
def smaller_card(place: Place, stage: str) -> Measured:
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((SMALLER_CARD * GIB - CONTEXT) / whole)
    _, most, planned = trained(place, stage, "small-card")
    held = most["reserved"] + CONTEXT / GIB
    return Measured(f"{held:.2f} GiB held, {planned:.2f} planned", held <= SMALLER_CARD)


# ---------------------------------------------------------------- generation


def nf4_seven(place: Place) -> tuple[Checkpoint, Model]:
    """The 7B shape as a checkpoint, and the model section that loads it in nf4."""
    _, _, data = seven(place)
    where = str(random_seven(place, data))
    return Checkpoint(where, None, where), Model(where, None, None, None, None, "nf4", "sdpa", "auto")


@check("time of a decode step, nf4 with LoRA", "64 rows take at most twice as long as 1")
def decode(place: Place) -> Measured:
    """F4: a step costs its kernel launches whatever the rows, so all rows of a GRPO step go into one call."""
    model = with_adapter(place)
    took = {rows: step_time(model, place, rows, {}) for rows in (1, 8, 16, 64)}
    hours = took[16] * 2048 * 500 / 3600
    got = ", ".join(f"{1000 * seconds:.1f} ms at {rows}" for rows, seconds in took.items())
    facts = {"seconds_a_step": took, "hours_of_500_steps_of_2048_tokens": round(hours, 1)}
    if place.small:
        return Measured(f"{got} (no bound on a CPU)", None)
    return Measured(f"{got}; {hours:.1f} h for 500 steps of 2,048 tokens", took[64] <= 2 * took[1], facts)


@check("time of a decode step at 16 rows", "a figure without a bound", needs_gpu=True)
def cached_decode(place: Place, cache: str) -> Measured:
    more: dict[str, Any] = {"cache_implementation": "static", "disable_compile": cache != "static and compiled"}
    seconds = step_time(with_adapter(place), place, 16, more)
    return Measured(f"{1000 * seconds:.1f} ms, {peak()['reserved']:.2f} GiB reserved", None)


@cache
def with_adapter(place: Place) -> Any:
    """The 7B shape in nf4 with a fresh adapter of rank 64, ready to generate; loaded once."""
    from pipeline.models.loading import add_lora, choose_dtype, load_model

    checkpoint, choice = nf4_seven(place)
    base = load_model(checkpoint, choice, dtype=choose_dtype(choice))
    return add_lora(base, Lora(True, 64, 128.0, 0.05, TARGETS), keep_dtype=False).to(place.device).eval()


def step_time(model: Any, place: Place, rows: int, more: dict[str, Any]) -> float:
    """Seconds that each token of `rows` completions takes, after one generation to warm up."""
    from transformers import GenerationConfig

    steps, prompt = (8, 40) if place.small else (64, 400)
    ids = torch.randint(10, 500, (rows, prompt), device=place.device)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0  # as padded prompts have it
    settings: dict[str, Any] = {"do_sample": True, "temperature": 0.6, "top_k": 0, "disable_compile": True, **more}
    config = GenerationConfig(max_new_tokens=steps, min_new_tokens=steps, pad_token_id=0, eos_token_id=1, **settings)
    with torch.inference_mode():
        for _ in range(2):
            allocated()
            began = time.perf_counter()
            model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            peak()
            took = (time.perf_counter() - began) / steps
    return took


@check("the same 16 answers at batch 16 and at batch 4", "16 of 16 on a CPU; on a GPU a figure without a bound")
def same_answers(place: Place) -> Measured:
    from pipeline.engines.engine import Request, Sampling
    from pipeline.engines.transformers import TransformersEngine
    from pipeline.models.loading import load_for_chat, load_tokenizer

    checkpoint, choice = nf4_seven(place)
    model, tokenizer = load_for_chat(checkpoint, choice, None), load_tokenizer(checkpoint, choice)
    prompts = [torch.randint(10, 500, (50 + 7 * k,)).tolist() for k in range(16)]
    sampling = Sampling(0.6, 0.95, 0, 8 if place.small else 48)
    asked = [Request(prompt) for prompt in prompts]
    engines = [TransformersEngine(model, tokenizer, rows) for rows in (16, 4)]
    first, second = ({one.request: one.completion.text for one in e.generate(asked, sampling)} for e in engines)
    same = sum(first[k] == second[k] for k in range(16))
    return Measured(f"{same} of 16", same == 16 if place.small else None)
