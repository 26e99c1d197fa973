"""What SFT and GRPO share: rows, first weights, the arguments of a trainer, the loop that resumes and stops.

Everything here translates the typed recipe and cluster to transformers' Trainer, in one place.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from pipeline import distributed
from pipeline.artifact import Artifact, Checkpoint
from pipeline.checkpoints import SaveAndStop, newest_good
from pipeline.cluster import DEEPSPEED, Batches, TrainingStage, batches
from pipeline.errors import DataError, LaunchError, RecipeError, Stopped, some_of
from pipeline.modeling import add_lora, add_lora_by_unsloth, choose_dtype, load_model
from pipeline.monitor import Watch, write_history
from pipeline.recipe import Optimizer, Recipe
from pipeline.rows import read_split
from pipeline.runtime import Runtime

PROJECT = "therefore"  # the name under which wandb and trackio keep the runs


def load_rows(data: Artifact, split: str) -> Dataset:
    """A split of the preprocess step."""
    return Dataset(read_split(data, split))


def trainable(recipe: Recipe, checkpoint: Checkpoint, layout: TrainingStage) -> PreTrainedModel | PeftModel:
    """The model to train: an adapter that is there is trained on, LoRA gets a fresh one, else all weights.

    Weights that are themselves trained are held in float32 (DeepSpeed and autocast compute in the lower precision).
    """
    if recipe.model.backend == "unsloth" and checkpoint.adapter is None:
        length = max(recipe.sft.max_length, recipe.grpo.max_prompt_length + recipe.grpo.max_completion_length)
        return add_lora_by_unsloth(
            checkpoint,
            recipe.model,
            recipe.lora,
            dtype=choose_dtype(recipe.model),
            length=length,
            checkpointing=layout.gradient_checkpointing,
            seed=recipe.seed,
        )
    full = not recipe.lora.enabled and checkpoint.adapter is None
    model = load_model(
        checkpoint, recipe.model, dtype=torch.float32 if full else choose_dtype(recipe.model), train_adapter=True
    )
    if recipe.lora.enabled and checkpoint.adapter is None:
        plain_weights = recipe.model.quantization == "none"
        model = add_lora(model, recipe.lora, keep_dtype=plain_weights and zero_stage(layout) == 3)
    model.config.use_cache = False
    return model


@contextlib.contextmanager
def adapters_kept(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """While a trainer is made: its adapters on a quantized model stay as they are.

    TRL casts them to bfloat16, whose gradients the scaler of float16 cannot take (trl#4901), and which rounds away
    what SFT has learned and most of what a step of 1e-6 moves.
    """
    before = {name: weights.data for name, weights in model.named_parameters() if weights.requires_grad}
    yield
    for name, weights in model.named_parameters():
        if name in before:
            weights.data = before[name]


def zero_stage(layout: TrainingStage) -> int:
    """The ZeRO stage of a DeepSpeed file; 0 without one."""
    settings = read_deepspeed(layout)
    return int(settings["zero_optimization"]["stage"]) if settings else 0


def read_deepspeed(layout: TrainingStage) -> dict[str, Any] | None:
    """The stage's DeepSpeed file."""
    if layout.deepspeed == "none":
        return None
    return dict(json.loads((DEEPSPEED / f"{layout.deepspeed}.json").read_text(encoding="utf-8")))


def deepspeed_settings(optimizer: Optimizer, layout: TrainingStage) -> dict[str, Any] | None:
    """The stage's DeepSpeed file, with the optimizer where it is DeepSpeed's own.

    Muon orthogonalizes the update of each hidden matrix; in units of AdamW's step its learning rate is larger
    by 1 / (0.2 · √(longer side)).
    """
    settings = read_deepspeed(layout)
    if settings and optimizer.name == "muon":
        params = {
            "lr": "auto",
            "muon_lr": optimizer.muon_learning_rate,
            "adam_lr": optimizer.learning_rate,
            "betas": "auto",
            "momentum": 0.95,
            "weight_decay": "auto",
            "ns_method": "standard",
            "torch_adam": True,  # DeepSpeed's own would have to be compiled
        }
        settings["optimizer"] = {"type": "Muon", "params": params}
    return settings


def layout_of(recipe: Recipe, runtime: Runtime, stage: str) -> tuple[TrainingStage, Batches]:
    """The stage's layout and batches for the processes that really run."""
    layout = runtime.cluster.sft if stage == "sft" else runtime.cluster.grpo
    sizes, problems = batches(runtime.cluster, recipe, "sft" if stage == "sft" else "grpo", runtime.world)
    if sizes is None:
        raise RecipeError(*problems)
    return layout, sizes


def arguments(
    recipe: Recipe, optimizer: Optimizer, layout: TrainingStage, sizes: Batches, out: Path, runtime: Runtime
) -> dict[str, Any]:
    """The arguments that SFTConfig and GRPOConfig share."""
    cluster, dtype = runtime.cluster, choose_dtype(recipe.model)
    for name, place in (("TENSORBOARD_LOGGING_DIR", "tensorboard"), ("WANDB_DIR", ""), ("TRACKIO_DIR", "trackio")):
        os.environ[name] = str(out / place)
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    return {
        "output_dir": str(out / "checkpoints"),
        "per_device_train_batch_size": sizes.per_device,
        "gradient_accumulation_steps": sizes.accumulation,
        "optim": "adamw_torch" if optimizer.name == "muon" else optimizer.name,
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": optimizer.schedule,
        "lr_scheduler_kwargs": optimizer.schedule_args,
        "warmup_steps": optimizer.warmup,
        "weight_decay": optimizer.weight_decay,
        "adam_beta2": optimizer.beta2,
        "max_grad_norm": optimizer.max_grad_norm,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "gradient_checkpointing": layout.gradient_checkpointing,
        "deepspeed": deepspeed_settings(optimizer, layout),
        "save_strategy": "steps",
        "save_steps": cluster.save_steps,
        "save_total_limit": cluster.keep_checkpoints,
        "logging_steps": cluster.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "report_to": list(cluster.loggers) or "none",
        "project": PROJECT,
        "run_name": f"{recipe.name}/{out.name}",
        "disable_tqdm": True,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "ddp_timeout": int(distributed.TIMEOUT.total_seconds()),
    }


def train(trainer: Trainer, out: Path, runtime: Runtime) -> dict[str, Any]:
    """Resume from the newest checkpoint that verifies, train, save the result. Returns the stage's metrics.

    Raises Stopped after an agreed stop, its work saved.
    """
    stopper, watch = SaveAndStop(runtime), Watch(runtime)
    trainer.add_callback(stopper)
    trainer.add_callback(watch)
    resume, passed = newest_good(out / "checkpoints")
    if runtime.rank == 0:
        for sentence in passed:
            print(sentence, flush=True)
        print(f"goes on from {resume.name}" if resume else "begins at step 0", flush=True)
    result = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if runtime.rank == 0:
        write_history(trainer.state.log_history, out)
    if watch.broken:
        raise LaunchError(
            f"training broke down: {watch.broken}; lower the learning rate, raise the warm-up, "
            "or compute with model.dtype=float32"
        )
    if stopper.stopped:
        raise Stopped(f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, saved")
    runtime.progress.update(state="saving", note="saving the model")
    save(trainer, out)
    steps = {"steps": trainer.state.global_step, "epochs": trainer.state.epoch, "train_loss": result.training_loss}
    found = {"peak_memory_gb": round(peak_memory(), 3), "resumed_from": resume.name if resume else None}
    return {**steps, **found, "passed_over": passed}


def peak_memory() -> float:
    """GB that this process has held at most: of its GPU, or of the machine's memory where it has none."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def save(trainer: Trainer, out: Path) -> None:
    """`adapter/` for LoRA, `model/` for all weights, with the tokenizer; every rank takes part."""
    adapter = isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel)
    folder = out / ("adapter" if adapter else "model")
    trainer.save_model(str(folder))
    (folder / "training_args.bin").unlink(missing_ok=True)
    distributed.barrier()


def warn_of_long_rows(runtime: Runtime, ids: Sequence[str], kept: Sequence[int], what: str, limit: str) -> None:
    """A warning that names how many rows were longer than the limit, and the first few of them."""
    dropped = sorted(set(range(len(ids))) - set(kept))
    if dropped:
        first = some_of([ids[k] for k in dropped])
        runtime.warn(f"{len(dropped)} of {len(ids)} {what} are longer than {limit} and were left out: {first}")


def require_rows(kept: int, what: str, limit: str) -> None:
    """DataError where every row was too long."""
    if not kept:
        raise DataError(f"all {what} are longer than {limit}: raise it, or use a task with shorter prompts")
