"""What SFT and GRPO share: rows, first weights, the arguments of a trainer, the loop that resumes and stops.

Everything here translates the typed recipe and cluster to transformers' Trainer, in one place.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from pipeline.config.cluster import Batches, TrainingStage, batches, deepspeed_file, zero_stage
from pipeline.config.recipe import Optimizer, Recipe
from pipeline.core.errors import DataError, LaunchError, RecipeError, Stopped, join_first
from pipeline.models.loading import add_lora, choose_dtype, load_model
from pipeline.training import distributed
from pipeline.training.callbacks import (
    MINIMUM_SCALE_MESSAGE,
    LearningSignalCallback,
    NoStepsLeft,
    ProgressCallback,
    restore_callbacks,
    write_history,
)
from pipeline.training.checkpoints import CheckpointCallback, checkpoint_to_resume
from pipeline.training.pace import PaceCallback
from pipeline.workflow.artifact import Artifact, read_split
from pipeline.workflow.layouts import stage_layout
from pipeline.workflow.runtime import Deadline, Runtime
from pipeline.workflow.weights import Checkpoint

LOGGER_FOLDERS = {"TENSORBOARD_LOGGING_DIR": "tensorboard", "WANDB_DIR": "", "TRACKIO_DIR": "trackio"}
PROJECT = "therefore"  # the name under which wandb and trackio keep the runs
SKIPPED_SHARE_WARNING = 0.1  # share of the steps that is worth a warning


def load_rows(data: Artifact, split: str) -> Dataset:
    """A split of the preprocess step."""
    return Dataset(read_split(data, split))


def load_for_training(recipe: Recipe, checkpoint: Checkpoint, layout: TrainingStage) -> PreTrainedModel | PeftModel:
    """The model to train: an adapter that is there is trained on, LoRA gets a fresh one, else all weights.

    Weights that are themselves trained are held in float32 (DeepSpeed and autocast compute in the lower precision).
    """
    full = not recipe.lora.enabled and checkpoint.adapter is None
    keep_dtype = recipe.model.quantization == "none" and zero_stage(layout.deepspeed) == 3
    model = load_model(
        checkpoint,
        recipe.model,
        dtype=torch.float32 if full else choose_dtype(recipe.model),
        train_adapter=True,
        keep_dtype=keep_dtype,
    )
    if recipe.lora.enabled and checkpoint.adapter is None:
        torch.manual_seed(recipe.seed)  # the trainer seeds later, and the adapter is drawn here
        model = add_lora(model, recipe.lora, keep_dtype=keep_dtype)
    if isinstance(
        model, PeftModel
    ):  # the trainer resumes through it; PEFT's own choice is the first GPU for every rank
        model.load_adapter = functools.partial(model.load_adapter, torch_device="cpu")
    model.config.use_cache = False
    return model


@contextlib.contextmanager
def preserve_adapter_dtype(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """While a trainer is made: its adapters on a quantized model stay as they are.

    TRL casts them to bfloat16, whose gradients the scaler of float16 cannot take (trl#4901), and which rounds away
    what SFT has learned and most of what a step of 1e-6 moves.
    """
    before = {name: weights.data for name, weights in model.named_parameters() if weights.requires_grad}
    yield
    for name, weights in model.named_parameters():
        if name in before:
            weights.data = before[name]


def read_deepspeed(layout: TrainingStage) -> dict[str, Any] | None:
    """The stage's DeepSpeed file."""
    return deepspeed_file(layout.deepspeed)


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


def layout_and_batches(recipe: Recipe, runtime: Runtime, stage: str) -> tuple[TrainingStage, Batches]:
    """The stage's layout and batches for the processes that really run."""
    layout = runtime.cluster.layout(stage)
    sizes, problems = batches(runtime.cluster, recipe, "sft" if stage == "sft" else "grpo", runtime.world)
    if sizes is None:
        raise RecipeError(*problems)
    return layout, sizes


def training_arguments(
    recipe: Recipe, optimizer: Optimizer, layout: TrainingStage, sizes: Batches, out: Path, runtime: Runtime
) -> dict[str, Any]:
    """The arguments that SFTConfig and GRPOConfig share."""
    cluster, dtype = runtime.cluster, choose_dtype(recipe.model)
    return {
        "output_dir": str(out / "checkpoints"),
        "per_device_train_batch_size": sizes.per_device,
        "gradient_accumulation_steps": sizes.accumulation,
        "optim": "adamw_torch" if optimizer.name == "muon" else optimizer.name,
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": optimizer.lr_scheduler_type,
        "lr_scheduler_kwargs": optimizer.lr_scheduler_kwargs,
        "warmup_steps": optimizer.warmup,
        "weight_decay": optimizer.weight_decay,
        "adam_beta2": optimizer.adam_beta2,
        "max_grad_norm": optimizer.max_grad_norm,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "gradient_checkpointing": layout.gradient_checkpointing is True,  # auto is decided before a step starts
        "deepspeed": deepspeed_settings(optimizer, layout),
        "save_strategy": "steps",
        "save_steps": cluster.save_steps,
        "save_total_limit": None,  # checkpoints.rotate deletes older ones, when the newer one has its manifest
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


@contextlib.contextmanager
def logger_environment(out: Path, runtime: Runtime) -> Iterator[None]:
    """The variables through which TensorBoard, W&B and trackio are configured, set while a trainer runs.

    What the user has set for W&B stays. Afterwards the environment is as before: another step of this process is
    another run.
    """
    wanted = {name: str(out / place) for name, place in LOGGER_FOLDERS.items()}
    defaults = {"WANDB_PROJECT": PROJECT}
    if runtime.rank == 0:  # every attempt of a step continues one run; trackio does so by the run's name
        defaults |= {"WANDB_RUN_ID": run_id(out), "WANDB_RESUME": "allow"}
    wanted |= {name: value for name, value in defaults.items() if name not in os.environ}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def run_id(out: Path) -> str:
    """The id of a step's run at Weights & Biases: its name and fingerprint, and a part drawn with its folder.

    The same step of another user, or one that is started again in a new folder, is another run.
    """
    path = out / ".run-id"
    if not path.is_file():
        path.write_text(f"{out.name}-{secrets.token_hex(3)}", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def train(trainer: Trainer, recipe: Recipe, stage: str, out: Path, runtime: Runtime) -> dict[str, Any]:
    """Resume from the newest checkpoint that verifies, train, save the result. Returns the stage's metrics.

    Raises Stopped after an agreed stop, its work saved; LaunchError where training diverged or took no step;
    ArtifactError for a checkpoint that this user did not write or that needs another layout.
    """
    precision = str(choose_dtype(recipe.model)).removeprefix("torch.")
    layout = stage_layout(recipe, runtime.cluster, stage, processes=runtime.world, precision=precision)
    stopper = CheckpointCallback(runtime, layout, Deadline(runtime, stage))
    watch, signal = ProgressCallback(runtime, trainer), LearningSignalCallback(runtime)
    save_adapter_alone(trainer)
    trainer.callback_handler.callbacks.insert(0, watch)  # so that the loggers after it get the figures that it adds
    trainer.add_callback(stopper)
    trainer.add_callback(signal)
    trainer.add_callback(PaceCallback(runtime, stage))
    resume, passed = checkpoint_to_resume(out / "checkpoints", layout, stage, runtime)
    if runtime.rank == 0:
        for sentence in passed:
            print(sentence, flush=True)
        print(f"resumes from {resume.name}" if resume else "begins at step 0", flush=True)
    if resume:
        restore_callbacks(trainer, resume)
    with logger_environment(out, runtime):
        loss = run_trainer(trainer, watch, resume)
    if runtime.rank == 0:
        write_history(trainer.state.log_history, out)
    raise_if_training_failed(trainer, watch, signal, stopped=stopper.stopped, out=out)
    if stopper.stopped:
        raise Stopped(f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, saved")
    signal.warn()
    runtime.progress.update(state="saving", note="saving the model")
    save(trainer, out)
    steps = {"steps": trainer.state.global_step, "epochs": trainer.state.epoch, "train_loss": loss}
    scaled = {"skipped_steps": watch.skipped, "loss_scale": loss_scale(trainer)} if trainer.args.fp16 else {}
    found = {"peak_memory_gb": round(peak_memory(), 3), "resumed_from": resume.name if resume else None}
    return {**steps, **scaled, **signal.metrics(), **found, "passed_over": passed}


def run_trainer(trainer: Trainer, watch: ProgressCallback, resume: Path | None) -> float | None:
    """The trainer's loop. Returns the mean loss; None where the checkpoint left no step to take."""
    try:
        return float(trainer.train(resume_from_checkpoint=str(resume) if resume else None).training_loss)
    except NoStepsLeft:
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trainer._load_best_model()
    except Exception as error:
        if MINIMUM_SCALE_MESSAGE not in str(error):
            raise
        watch.broken = (
            f"the gradients of {watch.in_a_row + 1} steps in a row overflowed float16, down to a loss scale of 1"
        )
    return None


def raise_if_training_failed(
    trainer: Trainer, watch: ProgressCallback, signal: LearningSignalCallback, *, stopped: bool, out: Path
) -> None:
    """LaunchError where training diverged, had nothing to learn for too long, or took no optimizer step at all."""
    if watch.broken:
        raise LaunchError(
            f"training broke down: {watch.broken}; lower the learning rate, raise the warm-up, "
            "or compute with model.dtype=float32"
        )
    if signal.broken:
        raise LaunchError(
            f"GRPO had nothing to learn: {signal.broken}; cluster.max_idle_steps ended it. Fix: change the rewards, "
            "the prompts or grpo.max_completion_length, or set cluster.max_idle_steps=null to be warned only"
        )
    steps = trainer.state.global_step
    if watch.skipped and watch.skipped >= steps and not stopped:
        distributed.barrier()
        if watch.runtime.rank == 0:
            shutil.rmtree(
                out / "checkpoints", ignore_errors=True
            )  # the first weights: a rerun must not resume at the end
        raise LaunchError(
            f"no optimizer step was taken: the gradients of all {steps} steps overflowed float16, and the loss scale "
            "was still too high at the end. Fix: train more steps, lower fp16.initial_scale_power in the stage's file "
            "of deepspeed/, or compute with model.dtype=float32"
        )
    if watch.skipped >= SKIPPED_SHARE_WARNING * max(steps, 1):
        watch.runtime.warn(f"{watch.skipped} of {steps} steps were skipped: their gradients overflowed float16")


def loss_scale(trainer: Trainer) -> float:
    """What the loss is multiplied by in float16, at this moment."""
    if trainer.deepspeed is not None:
        return float(trainer.deepspeed.optimizer.loss_scale)
    scaler = trainer.accelerator.scaler  # None on a CPU
    return float(scaler.get_scale()) if scaler else 1.0


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


def save_adapter_alone(trainer: Trainer) -> None:
    """Have the saves of an adapter leave its base alone.

    Below ZeRO-3 accelerate clones the whole state to the CPU at each save, in every process: 4 to 5 GiB of a 7B model
    in 4 bit, of which PEFT then writes the adapter.
    """
    whole = trainer.accelerator.get_state_dict

    def state(model: Any, unwrap: bool = True) -> dict[str, torch.Tensor] | None:
        plain = trainer.accelerator.unwrap_model(model)
        if not isinstance(plain, PeftModel) or trainer.deepspeed.zero_optimization_stage() == 3:
            found: dict[str, torch.Tensor] | None = whole(model, unwrap)  # under ZeRO-3 rank 0 alone has one
            return found
        own = {name: value for name, value in plain.state_dict().items() if ".base_layer." not in name}
        return {name: value.detach().cpu().clone() for name, value in own.items()}

    if trainer.is_deepspeed_enabled:
        trainer.accelerator.get_state_dict = state


def warn_of_long_rows(runtime: Runtime, ids: Sequence[str], kept: Sequence[int], what: str, limit: str) -> None:
    """A warning that names how many rows were longer than the limit, and the first few of them."""
    dropped = sorted(set(range(len(ids))) - set(kept))
    if dropped:
        first = join_first([ids[k] for k in dropped])
        runtime.warn(f"{len(dropped)} of {len(ids)} {what} are longer than {limit} and were left out: {first}")


def require_rows(kept: int, what: str, limit: str) -> None:
    """DataError where every row was too long."""
    if not kept:
        raise DataError(f"all {what} are longer than {limit}: raise it, or use a task with shorter prompts")
