"""SFT and GRPO as others write them today, for `scripts/bench sft|grpo`: same model, rows and settings of the recipe.

    seed    the loop of the source guides' scripts: every row padded to max_length, one row a device, the batch by
            accumulation, gradient checkpointing, DeepSpeed (ZeRO-2 for SFT, ZeRO-3 for GRPO)
    trl     a plain TRL script of today: packed rows (bfd), default attention, no checkpointing where memory allows it,
            plain data parallelism; DeepSpeed only where the optimizer is DeepSpeed's (muon)
    padded  the same without packing: batches padded to their longest row

Each reads the step that a plan of this project has prepared. What a script of a few lines would do is kept: nothing
here is taken from the stages but rows, rewards and the start of the process group.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from pipeline.config.recipe import Optimizer, Recipe
from pipeline.engines.text import stop_ids
from pipeline.grpo import as_trl_reward
from pipeline.models.loading import choose_dtype, encode_rows, initial_checkpoint, load_tokenizer, prompt_ids
from pipeline.rewards.reward import find_rewards
from pipeline.tasks.task import task_of
from pipeline.training import distributed
from pipeline.workflow.artifact import Artifact, open_artifact, read_split
from pipeline.workflow.stage import read_spec
from pipeline.workflow.weights import Checkpoint

TRL_BATCH = 8  # TRL's default rows of a device


@dataclass(frozen=True)
class Job:
    """What a script is given: settings, rows, and weights to begin with."""

    recipe: Recipe
    data: Artifact
    checkpoint: Checkpoint
    tokenizer: Any
    out: Path

    @property
    def dtype(self) -> torch.dtype:
        return choose_dtype(self.recipe.model)


def read_job(folder: Path) -> Job:
    spec = read_spec(folder)
    inputs = {role: open_artifact(Path(where)) for role, where in spec.inputs.items()}
    checkpoint = initial_checkpoint(spec.recipe.model, inputs)
    tokenizer = load_tokenizer(checkpoint, spec.recipe.model)
    return Job(spec.recipe, inputs["data"], checkpoint, tokenizer, folder / "plain")


def sft_rows(job: Job) -> list[dict[str, list[int]]]:
    """Return the tokens and labels of the rows that fit into max_length."""
    rows = Dataset(read_split(job.data, "sft"))
    encoded = encode_rows(job.tokenizer, rows["prompt"], rows["completion"])
    return [row for row in encoded if len(row["input_ids"]) <= job.recipe.sft.max_length]


# ---------------------------------------------------------------- SFT


def seed_sft(job: Job) -> None:
    settings, padded = job.recipe.sft, []
    for row in sft_rows(job):
        more = settings.max_length - len(row["input_ids"])
        padded.append(
            {
                "input_ids": row["input_ids"] + [job.tokenizer.pad_token_id] * more,
                "attention_mask": [1] * len(row["input_ids"]) + [0] * more,
                "labels": row["labels"] + [-100] * more,
            }
        )
    deepspeed = deepspeed_json("zero2", settings.optimizer)
    distributed.start(deepspeed=True)
    config = TrainingArguments(
        **arguments(job, settings.optimizer),
        deepspeed=deepspeed,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.global_batch_size // distributed.world_size(),
        gradient_checkpointing=True,
        num_train_epochs=settings.epochs,
    )
    model = load(job)
    if job.recipe.lora.enabled:
        model = get_peft_model(model, lora(job))
        model.enable_input_require_grads()
    rows = Dataset.from_list(padded)
    Trainer(model, config, train_dataset=rows, data_collator=default_data_collator).train()


def trl_sft(job: Job, packing: bool = True) -> None:
    settings, rows, world = job.recipe.sft, sft_rows(job), distributed.world_size()
    lengths = [len(row["input_ids"]) for row in rows]
    share = settings.global_batch_size // world
    at_once = 1 if packing else min(TRL_BATCH, share)
    muon = settings.optimizer.name == "muon"
    distributed.start(deepspeed=muon)
    config = SFTConfig(
        **arguments(job, settings.optimizer),
        deepspeed=deepspeed_json("zero2", settings.optimizer) if muon else None,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=1 if packing else share // at_once,
        gradient_checkpointing=False,
        num_train_epochs=settings.epochs,
        packing=packing,
        # as many tokens an optimizer step as the rows of a batch have, where the longest row allows it
        max_length=max(*lengths, round(sum(lengths) / len(lengths) * share)) if packing else settings.max_length,
    )
    adapter = lora(job) if job.recipe.lora.enabled else None
    rows_of_tokens = Dataset.from_list(rows)
    SFTTrainer(
        load(job), config, train_dataset=rows_of_tokens, processing_class=job.tokenizer, peft_config=adapter
    ).train()


def padded_sft(job: Job) -> None:
    trl_sft(job, packing=False)


# ---------------------------------------------------------------- GRPO


def seed_grpo(job: Job) -> None:
    settings = job.recipe.grpo
    distributed.start(deepspeed=True)
    config = grpo_config(
        job,
        deepspeed=deepspeed_json("zero3", settings.optimizer),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.global_batch_size // distributed.world_size(),
        gradient_checkpointing=True,
    )
    train_grpo(job, config)


def trl_grpo(job: Job) -> None:
    settings = job.recipe.grpo
    share = settings.global_batch_size // distributed.world_size()
    at_once = min(TRL_BATCH, share)
    distributed.start(deepspeed=False)
    config = grpo_config(
        job,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=share // at_once,
        gradient_checkpointing=False,
    )
    train_grpo(job, config)


def grpo_config(job: Job, **layout: Any) -> GRPOConfig:
    settings = job.recipe.grpo
    return GRPOConfig(
        **arguments(job, settings.optimizer),
        **layout,
        logging_steps=1,
        max_steps=settings.max_steps or -1,
        num_generations=settings.num_generations,
        max_completion_length=settings.max_completion_length,
        temperature=settings.temperature,
        loss_type=settings.loss_type,
        scale_rewards=settings.scale_rewards,
        epsilon=settings.epsilon,
        epsilon_high=settings.epsilon_high,
        reward_weights=[reward.weight for reward in settings.rewards.values()],
    )


def train_grpo(job: Job, config: GRPOConfig) -> None:
    model = load(job)
    task, functions = task_of(job.recipe.task, job.recipe.seed), find_rewards(job.recipe.grpo.rewards)[0]
    stops = {*stop_ids(model, job.tokenizer), job.tokenizer.pad_token_id}
    prompts = Dataset(read_split(job.data, "grpo")).remove_columns("completion")
    tokens = prompt_ids(job.tokenizer, prompts["prompt"])
    fits = [k for k, ids in enumerate(tokens) if len(ids) <= job.recipe.grpo.max_prompt_length]
    GRPOTrainer(
        model,
        reward_funcs=[as_trl_reward(task, name, one, job.tokenizer, stops) for name, one in functions.items()],
        args=config,
        train_dataset=prompts.select(fits),
        processing_class=job.tokenizer,
        peft_config=lora(job) if job.recipe.lora.enabled and not job.checkpoint.adapter else None,
    ).train()


# ---------------------------------------------------------------- shared


def arguments(job: Job, optimizer: Optimizer) -> dict[str, Any]:
    """Return the settings that decide the result, and the quiet of a measurement."""
    return {
        "output_dir": str(job.out),
        "optim": "adamw_torch" if optimizer.name == "muon" else optimizer.name,
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": optimizer.lr_scheduler_type,
        "warmup_steps": optimizer.warmup,
        "weight_decay": optimizer.weight_decay,
        "adam_beta2": optimizer.adam_beta2,
        "max_grad_norm": optimizer.max_grad_norm,
        "bf16": job.dtype == torch.bfloat16,
        "fp16": job.dtype == torch.float16,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": job.recipe.seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def deepspeed_json(name: str, optimizer: Optimizer) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(Path("deepspeed", f"{name}.json").read_text(encoding="utf-8"))
    if optimizer.name == "muon":
        params = {"lr": "auto", "muon_lr": optimizer.muon_learning_rate, "adam_lr": optimizer.learning_rate}
        params |= {"betas": "auto", "momentum": 0.95, "weight_decay": "auto", "ns_method": "standard"}
        settings["optimizer"] = {"type": "Muon", "params": {**params, "torch_adam": True}}
    return settings


def load(job: Job) -> Any:
    """Load the weights: in float32 where all of them are trained, else in the precision that is computed in."""
    full = not job.recipe.lora.enabled and job.checkpoint.adapter is None
    model = AutoModelForCausalLM.from_pretrained(job.checkpoint.base, dtype=torch.float32 if full else job.dtype)
    if job.checkpoint.adapter:
        model = PeftModel.from_pretrained(model, job.checkpoint.adapter, is_trainable=True)
    return model


def lora(job: Job) -> LoraConfig:
    settings = job.recipe.lora
    targets = "all-linear" if list(settings.targets) == ["all-linear"] else list(settings.targets)
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )


WAYS = {
    "sft": {"seed": seed_sft, "trl": trl_sft, "padded": padded_sft},
    "grpo": {"seed": seed_grpo, "trl": trl_grpo},
}
